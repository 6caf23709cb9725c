# SPDX-License-Identifier: GPL-2.0-or-later
"""A clock that is set (NTP, an operator) while flows go on: the table counts boot time, and only records Unix time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab import needs
from table_meter import SECOND_NS, Meter

from flowexp.meter import Batch

pytestmark = pytest.mark.kernel

HOUR_S = 3600


@pytest.fixture(autouse=True)
def programs_can_be_run() -> None:
    needs.need(needs.bpf())


def times(batches: Iterator[Batch]) -> list[tuple[int, ...]]:
    """Packets, start and end (seconds) of each record; all are done with."""
    found = []
    for batch in batches:
        columns = batch.columns
        seconds = (columns[name] / SECOND_NS for name in ("start_ns", "end_ns"))
        found += [tuple(map(int, row)) for row in zip(columns["packets"], *seconds)]
        batch.done()
    return found


@pytest.mark.parametrize("step_s", [-HOUR_S, HOUR_S])
def test_a_step_of_the_clock_neither_tears_a_flow_nor_ends_a_record_before_it_starts(step_s: int) -> None:
    meter, unix_s = Meter(64), 1_000_000
    meter.process._unix_offset = lambda: unix_s * SECOND_NS
    meter.feed(4, [1], time_ns=1 * SECOND_NS)
    meter.feed(4, [1], time_ns=3 * SECOND_NS)
    assert times(meter.process.report()) == [(2, 1_000_001, 1_000_003)]
    unix_s += step_s
    meter.feed(4, [1], time_ns=4 * SECOND_NS)
    meter.feed(4, [1], time_ns=7 * SECOND_NS)
    ((packets, start_s, end_s),) = times(meter.process.drain())
    assert (packets, end_s) == (2, unix_s + 7)
    assert unix_s + 3 <= start_s <= unix_s + 4
    assert meter.count("flows_created") == 1
    assert meter.process.ledger().missing() == (0, 0)
    meter.close()
