# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGINT and SIGTERM for a command that then shows what it has: they are noted, and interrupt nothing."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def until_told() -> Iterator[Callable[[float], bool]]:
    """What it gives waits for some seconds at most, and says whether one of the signals has come.

    Once it has said so both are as they were before: a second one ends the command. Not by blocking them: numpy's
    threads would take them.
    """
    told = False

    def note(_number: int, _frame: object) -> None:
        nonlocal told
        told = True

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def wait(timeout_s: float) -> bool:
        if timeout_s > 0 and not told:
            select.select([woken], [], [], timeout_s)
        if told:
            put_back()
        return told

    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # a signal between the look and the wait ends the wait, too
    wakes_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield wait
    finally:
        put_back()
        signal.set_wakeup_fd(wakes_before)
        os.close(woken)
        os.close(wake)
