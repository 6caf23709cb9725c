# SPDX-License-Identifier: GPL-2.0-or-later
"""A table of which packets use a part, more, and less again: every flow is found, and every packet is counted once.

Fed frame by frame through the replay program; the smallest part is made so small that a few flows crowd it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab import needs
from table_meter import FAMILIES, HEADERS, SECOND_NS, Meter, live, take, timeouts

from flowexp.kernel.table import FlowTable
from flowexp.meter import new_table
from flowexp.metering import fitting
from flowexp.metering.sweep import ACTIVE, FORCED, IDLE

pytestmark = pytest.mark.kernel

LEAST = 64  # slots
MAX_FLOWS = 2048
SLOTS = 2928  # MAX_FLOWS / 0.7 in whole buckets
FLOWS = range(700)
FEW = range(10)
MINUTE_NS = 60 * SECOND_NS


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    """A table for MAX_FLOWS of each family, of which LEAST slots are in use."""
    needs.need(needs.namespace_support(), needs.bpf())
    monkeypatch.setattr(fitting, "LEAST_SLOTS", LEAST)
    made = Meter(MAX_FLOWS, new_table(MAX_FLOWS, begin_small=True))
    yield made
    made.close()


def extent(meter: Meter, version: int = 4) -> tuple[int, int]:
    """Slots in use, and before the change that is under way."""
    family = meter.family(version)
    return family.extent.slots, family.extent.before


def sweep(meter: Meter, now_ns: int, **after_ns: int) -> list[int]:
    """Fits and sweeps as the exporter does; the reasons of the records."""
    meter.process.fit(now_ns)
    return [ended.reason for ended in take(meter.process.sweep(timeouts(**after_ns), now_ns))]


def check_packets(meter: Meter, packets: int) -> None:
    """So many were counted, each once."""
    ledger = meter.process.ledger()
    assert ledger.missing() == (0, 0)
    assert ledger.seen[0] == packets
    assert ledger.exported[0] + ledger.in_table[0] == packets


def test_flows_of_a_table_that_begins_small_lie_in_its_first_slots(meter: Meter) -> None:
    for version in FAMILIES:
        meter.feed(version, FEW)
        assert extent(meter, version) == (LEAST, 0)
        assert live(meter.family(version)).max() < LEAST


@pytest.mark.parametrize("version", FAMILIES)
def test_a_flood_that_comes_before_the_exporter_looks_finds_room_and_each_flow_its_one_slot(
    meter: Meter, version: int
) -> None:
    for _ in range(3):
        meter.feed(version, FLOWS)
    assert meter.family(version).extent.is_overrun()
    assert meter.count("flows_created") == len(FLOWS)
    assert meter.count("not_metered_table_full") == 0
    meter.process.fit(SECOND_NS)
    assert not meter.family(version).extent.is_overrun()
    assert extent(meter, version) == (SLOTS, LEAST)
    meter.feed(version, FLOWS)
    assert meter.count("flows_created") == len(FLOWS)
    assert {ended.packets for ended in take(meter.process.drain())} == {4}
    check_packets(meter, 4 * len(FLOWS))


@pytest.mark.parametrize("version", FAMILIES)
def test_flows_are_found_where_they_are_after_all_of_the_table_has_come_into_use(meter: Meter, version: int) -> None:
    meter.feed(version, range(LEAST // 2 + 1))
    meter.process.fit(SECOND_NS)
    assert extent(meter, version) == (SLOTS, LEAST)
    meter.feed(version, FLOWS)
    assert meter.count("flows_created") == len(FLOWS)
    assert meter.family(version).occupied().max() >= LEAST
    check_packets(meter, LEAST // 2 + 1 + len(FLOWS))


def test_half_of_the_slots_in_use_may_be_taken(meter: Meter) -> None:
    meter.feed(4, range(LEAST // 2))
    meter.process.fit(SECOND_NS)
    assert extent(meter) == (LEAST, 0)


def test_a_family_grows_alone(meter: Meter) -> None:
    meter.feed(4, FLOWS)
    meter.process.fit(SECOND_NS)
    assert (extent(meter, 4), extent(meter, 6)) == ((SLOTS, LEAST), (LEAST, 0))


def test_a_flow_made_before_a_change_ends_at_its_active_timeout_and_the_change_with_the_last_of_them(
    meter: Meter,
) -> None:
    meter.feed(4, FLOWS, time_ns=SECOND_NS)
    assert sweep(meter, 2 * SECOND_NS, active_ns=5 * SECOND_NS) == []
    assert extent(meter) == (SLOTS, LEAST)
    meter.feed(4, [5000], time_ns=3 * SECOND_NS)
    assert sweep(meter, 6 * SECOND_NS, active_ns=5 * SECOND_NS) == [ACTIVE] * len(FLOWS)
    assert len(live(meter.family(4))) == 1  # made after the change: it goes on
    assert extent(meter) == (SLOTS, LEAST)
    meter.feed(4, FLOWS, time_ns=7 * SECOND_NS)
    assert sweep(meter, 8 * SECOND_NS, active_ns=5 * SECOND_NS) == [ACTIVE]
    assert len(live(meter.family(4))) == len(FLOWS) + 1
    assert sweep(meter, 9 * SECOND_NS) == []
    assert extent(meter) == (SLOTS, 0)
    assert meter.count("flows_created") == 2 * len(FLOWS) + 1
    check_packets(meter, 2 * len(FLOWS) + 1)


def settled(meter: Meter) -> None:
    """Makes all of the table be used, with no flow left."""
    meter.feed(4, FLOWS, time_ns=SECOND_NS)
    sweep(meter, SECOND_NS)
    assert sweep(meter, 2 * SECOND_NS, idle_ns=1) == [IDLE] * len(FLOWS)
    sweep(meter, 3 * SECOND_NS)
    sweep(meter, 4 * SECOND_NS)
    assert extent(meter) == (SLOTS, 0)


def test_a_table_that_has_been_quiet_for_a_minute_uses_less_and_finds_its_flows_all_the_same(meter: Meter) -> None:
    settled(meter)
    meter.feed(4, FEW, time_ns=5 * SECOND_NS)
    for second in range(5, 190):
        meter.feed(4, FEW, time_ns=second * SECOND_NS)
        sweep(meter, second * SECOND_NS)
    assert extent(meter) == (LEAST, SLOTS)
    assert meter.count("flows_created") == len(FLOWS) + len(FEW)
    assert sweep(meter, 190 * SECOND_NS, active_ns=SECOND_NS) == [ACTIVE] * len(FEW)
    meter.feed(4, FEW, time_ns=191 * SECOND_NS)
    sweep(meter, 191 * SECOND_NS)
    sweep(meter, 192 * SECOND_NS)
    assert extent(meter) == (LEAST, 0)
    assert live(meter.family(4)).max() < LEAST
    assert meter.family(4).extent.searched == LEAST
    check_packets(meter, len(FLOWS) + (1 + 185 + 1) * len(FEW))


def test_a_table_grows_while_it_is_being_made_smaller(meter: Meter) -> None:
    settled(meter)
    meter.feed(4, FEW, time_ns=5 * SECOND_NS)
    for minute in (1, 2, 3):
        sweep(meter, 5 * SECOND_NS + minute * MINUTE_NS)
    assert extent(meter) == (LEAST, SLOTS)
    meter.feed(4, FLOWS, time_ns=200 * SECOND_NS)
    meter.process.fit(201 * SECOND_NS)
    assert extent(meter) == (SLOTS, LEAST)
    meter.feed(4, FLOWS, time_ns=202 * SECOND_NS)
    assert meter.count("flows_created") == 2 * len(FLOWS)
    check_packets(meter, 3 * len(FLOWS) + len(FEW))


def test_a_flow_that_a_cpu_has_made_outside_of_the_slots_in_use_is_swept_like_any_other(meter: Meter) -> None:
    family = meter.family(4)
    sweep(meter, SECOND_NS)
    assert family.extent.searched == LEAST
    family.tags[:LEAST] = 1  # as if they were taken
    meter.feed(4, FEW, time_ns=SECOND_NS)
    family.tags[:LEAST] = 0
    assert sweep(meter, 2 * SECOND_NS, idle_ns=1) == [IDLE] * len(FEW)
    sweep(meter, 3 * SECOND_NS)
    assert len(family.occupied()) == 0
    check_packets(meter, len(FEW))


@pytest.mark.parametrize("stale", [False, True])
def test_an_exporter_that_finds_a_change_under_way_goes_on_with_it(meter: Meter, stale: bool) -> None:
    meter.feed(4, FLOWS)
    meter.process.fit(SECOND_NS)
    if stale:  # the one before was killed between two CPUs
        meter.family(4).extent._words[1:] = LEAST // 16
    second = Meter(MAX_FLOWS, FlowTable.adopt(meter.table.layout, meter.table.fds))
    assert take(second.process.recover()) == []
    assert extent(second) == (SLOTS, LEAST)
    assert len(set(second.family(4).extent._words.tolist())) == 1
    second.feed(4, FLOWS, time_ns=2 * SECOND_NS)
    assert second.count("flows_created") == len(FLOWS)
    assert sweep(second, 3 * SECOND_NS, active_ns=1) == [ACTIVE] * len(FLOWS)
    for when_ns in (4 * SECOND_NS, 5 * SECOND_NS):
        sweep(second, when_ns)
    assert extent(second) == (SLOTS, 0)
    check_packets(second, 2 * len(FLOWS))
    second.process.programs.close()  # the table's descriptors are the first one's


def test_draining_finds_flows_outside_of_the_slots_in_use_though_nobody_has_looked(meter: Meter) -> None:
    meter.feed(4, FLOWS)
    assert meter.family(4).extent.searched == LEAST
    assert {ended.reason for ended in take(meter.process.drain())} == {FORCED}
    check_packets(meter, len(FLOWS))
    assert meter.process.ledger().exported == (len(FLOWS), len(FLOWS) * HEADERS[4])
