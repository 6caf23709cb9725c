# SPDX-License-Identifier: GPL-2.0-or-later
"""Couriers: in order, in time for those who are, and no one waits for another."""

from __future__ import annotations

import threading
import time

import pytest

from flowexp.courier import MAX_RECORDS_WAITING, Courier


def soon() -> float:
    return time.monotonic() + 20


def long_ago() -> float:
    return 0.0


def test_jobs_are_done_in_the_order_given_and_wait_returns_when_they_are() -> None:
    courier, done = Courier("a"), list[int]()
    for number in range(100):
        assert courier.give(lambda number=number: done.append(number), 7)  # type: ignore[misc]
    assert courier.wait(soon())
    assert done == list(range(100))
    assert courier.records_waiting == 0
    assert courier.close(soon()) == 0


def test_one_that_is_stuck_is_behind_is_not_waited_for_again_and_catches_up() -> None:
    stuck, prompt, done, free = Courier("stuck"), Courier("prompt"), list[str](), threading.Event()
    stuck.give(lambda: free.wait(60) and None, 1)
    assert not stuck.wait(long_ago())
    for _ in range(50):
        stuck.give(lambda: done.append("late"), 1)
        prompt.give(lambda: done.append("prompt"), 1)
        assert not stuck.wait(soon())  # returns at once
        assert prompt.wait(soon())
    assert done == ["prompt"] * 50
    assert stuck.is_behind and stuck.records_waiting == 51
    free.set()
    assert stuck.close(soon()) == 0
    assert done == ["prompt"] * 50 + ["late"] * 50
    assert not stuck.is_behind
    prompt.close(soon())


def test_the_queue_is_bounded_and_what_is_left_at_the_end_is_told() -> None:
    courier, free = Courier("stuck"), threading.Event()
    courier.give(lambda: free.wait(60) and None, 5)
    assert courier.give(lambda: None, MAX_RECORDS_WAITING - 5)
    assert not courier.give(lambda: None, 1)
    left = courier.close(long_ago())
    assert left in (MAX_RECORDS_WAITING - 5, MAX_RECORDS_WAITING)  # the first may not have begun
    free.set()


def test_a_fault_in_a_job_is_raised_where_it_is_waited_for() -> None:
    courier = Courier("a")
    courier.give(lambda: [][1])
    with pytest.raises(IndexError):
        courier.wait(soon())
    courier.close(soon())
