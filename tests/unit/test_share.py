# SPDX-License-Identifier: GPL-2.0-or-later
"""Shares of conversations: the same for both directions, even, and stable when a Collector comes or goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flowexp.metering.share import shares

Columns = dict[str, np.ndarray[Any, Any]]


def flows(count: int, address_octets: int) -> Columns:
    random = np.random.default_rng(7)
    address = lambda: random.integers(0, 256, (count, address_octets), np.uint8)  # noqa: E731
    port = lambda: random.integers(0, 65536, count, np.uint16)  # noqa: E731
    return {
        "src_addr": address(), "dst_addr": address(), "src_port": port(), "dst_port": port(),
        "protocol": np.full(count, 6, np.uint8),
    }  # fmt: skip


@pytest.mark.parametrize("address_octets", [4, 16])
def test_both_directions_of_a_conversation_have_the_same_owner(address_octets: int) -> None:
    columns = flows(10_000, address_octets)
    back = {
        "src_addr": columns["dst_addr"], "dst_addr": columns["src_addr"], "src_port": columns["dst_port"],
        "dst_port": columns["src_port"], "protocol": columns["protocol"],
    }  # fmt: skip
    assert np.array_equal(shares(columns, [11, 22, 33]), shares(back, [11, 22, 33]))


@pytest.mark.parametrize("address_octets", [4, 16])
def test_shares_are_even(address_octets: int) -> None:
    counts = np.bincount(shares(flows(30_000, address_octets), [1, 2, 3]))
    assert counts.sum() == 30_000
    assert all(abs(count - 10_000) < 500 for count in counts)


def test_only_the_conversations_of_one_that_leaves_move() -> None:
    columns, keys = flows(10_000, 4), [101, 202, 303]
    before, after = np.take(keys, shares(columns, keys)), np.take([101, 303], shares(columns, [101, 303]))
    assert np.array_equal(before[before != 202], after[before != 202])


def test_the_order_of_the_collectors_does_not_matter() -> None:
    columns = flows(1000, 4)
    assert np.array_equal(np.take([5, 6], shares(columns, [5, 6])), np.take([6, 5], shares(columns, [6, 5])))


def test_no_flow_has_no_owner() -> None:
    assert len(shares(flows(0, 4), [1, 2])) == 0
