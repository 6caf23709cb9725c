# SPDX-License-Identifier: GPL-2.0-or-later
"""The flow table itself, fed frame by frame through the replay program: who is found, who is made, who finds no room.

Nothing runs beside the test: every count is exact, and what a killed exporter may leave in a slot is
written there by the test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from lab import needs
from table_meter import FAMILIES, HEADERS, SECOND_NS, Ended, Meter, live, take, timeouts

from flowexp.errors import FlowexpError
from flowexp.kernel.table import FlowTable, LayoutDiffers
from flowexp.meter import MeteringProcess, new_table
from flowexp.metering.sweep import ACTIVE, FORCED, IDLE, LACK_OF_RESOURCES

pytestmark = pytest.mark.kernel

U64 = np.uint64
SLOTS = 32  # of the small table; so many flows take each of them, whatever its secret
MORE_THAN_FIT = 400


@pytest.fixture(autouse=True)
def bpf() -> None:
    needs.need(needs.namespace_support(), needs.bpf())


@pytest.fixture
def small() -> Iterator[Meter]:
    """A table for 16 flows of each family: two buckets, 32 slots."""
    meter = Meter(16)
    yield meter
    meter.close()


def check_free(meter: Meter) -> None:
    """Every slot is free and zero, after all flows have ended and been given back."""
    for family in meter.table.families:
        assert not family.tags.any()
        assert not family._hot_rows.any()
        assert not family._cold_rows.any()


# Find or create


def test_100_000_flows_of_each_family_get_exactly_one_slot_each_in_a_table_made_for_as_many() -> None:
    flows = 100_000
    meter = Meter(flows)
    for version in FAMILIES:
        meter.feed(version, range(flows))
        meter.feed(version, range(0, flows, 10), time_ns=2 * SECOND_NS)
    assert meter.count("flows_created") == 2 * flows
    assert meter.count("not_metered_table_full") == 0
    for version in FAMILIES:
        family = meter.family(version)
        slots = live(family)
        hot, cold = family.read(slots)
        assert len(slots) == flows
        flow = hot["src_port_be"].byteswap().astype(int) - 1
        flow += 50_000 * hot["src_addr"][:, :4].copy().view(">u4").ravel().astype(int)
        assert np.array_equal(np.sort(flow), np.arange(flows))
        packets = np.where(flow % 10 == 0, 2, 1)
        assert np.array_equal(hot["packets"], packets)
        assert np.array_equal(hot["octets"], packets * HEADERS[version])
        assert np.array_equal(hot["last_ns"], packets * SECOND_NS)
        assert (cold["first_ns"] == SECOND_NS).all()
    assert meter.process.ledger().missing() == (0, 0)
    meter.close()


def test_flows_spread_over_two_buckets_so_evenly_that_none_is_refused_at_seven_tenths_of_the_slots() -> None:
    meter = Meter(11_200)  # 1000 buckets, 16,000 slots
    meter.feed(4, range(11_200))
    assert np.count_nonzero(meter.family(4).tags) == 11_200
    assert meter.count("not_metered_table_full") == 0  # one bucket each would refuse some 40
    meter.close()


def test_a_table_that_is_full_counts_what_it_refuses_and_the_ledger_closes(small: Meter) -> None:
    small.feed(4, range(MORE_THAN_FIT))
    created, refused = small.count("flows_created"), small.count("not_metered_table_full")
    assert created == small.family(4).slots == SLOTS
    assert refused == MORE_THAN_FIT - SLOTS
    assert small.table.counters()["not_metered_table_full"] == (refused, refused * HEADERS[4])
    assert small.process.ledger().missing() == (0, 0)


def test_one_family_that_is_full_leaves_room_to_the_other(small: Meter) -> None:
    small.feed(4, range(MORE_THAN_FIT))
    refused = small.count("not_metered_table_full")
    small.feed(6, range(10))
    assert small.count("not_metered_table_full") == refused
    assert len(live(small.family(6))) == 10


def test_a_flow_of_a_full_table_goes_on_counting(small: Meter) -> None:
    small.feed(4, range(MORE_THAN_FIT))
    refused = small.count("not_metered_table_full")
    ports = small.family(4).hot(live(small.family(4)))["src_port_be"].byteswap()
    small.feed(4, (ports.astype(int) - 1).tolist())
    assert small.count("not_metered_table_full") == refused
    assert {ended.packets for ended in take(small.process.drain())} == {2}
    assert small.process.ledger().missing() == (0, 0)


def test_a_slot_is_free_for_another_flow_after_the_sweep_that_follows_its_end(small: Meter) -> None:
    for _ in range(3):
        small.feed(4, range(MORE_THAN_FIT))
        assert len(take(small.process.drain())) == SLOTS
        assert take(small.process.sweep(timeouts(), SECOND_NS)) == []
        check_free(small)
    assert small.count("not_metered_table_full") == 3 * (MORE_THAN_FIT - SLOTS)
    assert small.process.ledger().exported == (3 * SLOTS, 3 * SLOTS * HEADERS[4])


def test_a_packet_between_the_end_of_a_flow_and_the_next_sweep_makes_a_new_flow(small: Meter) -> None:
    small.feed(4, [1, 1, 1])
    assert take(small.process.drain()) == [Ended(2, 3, 84, FORCED)]
    small.feed(4, [1])
    assert take(small.process.drain()) == [Ended(2, 1, 28, FORCED)]
    assert small.process.ledger().missing() == (0, 0)


def test_a_batch_that_is_never_done_stays_in_the_ledger_as_in_the_table(small: Meter) -> None:
    small.feed(4, range(5))
    (batch, *_) = small.process.drain()
    assert batch.records == 5
    ledger = small.process.ledger()
    assert (ledger.exported, ledger.in_table, ledger.missing()) == ((0, 0), (5, 140), (0, 0))


# A crowded table


def test_above_nine_tenths_of_max_flows_those_idle_longest_end_with_reason_5() -> None:
    meter = Meter(1000)
    for number in range(1000):
        meter.feed(4, [number], time_ns=SECOND_NS + number)
    ended = take(meter.process.sweep(timeouts(), 2 * SECOND_NS))
    assert sorted(each.port for each in ended) == list(range(1, 101))
    assert {each.reason for each in ended} == {LACK_OF_RESOURCES}
    assert meter.process.flows_live == 900
    assert meter.process.ledger().missing() == (0, 0)
    meter.close()


def test_flows_made_since_the_last_sweep_are_counted_from_when_it_began(small: Meter) -> None:
    small.feed(4, range(7))
    assert small.process.flows_made_since_sweep() == 7
    take(small.process.sweep(timeouts(), SECOND_NS))
    assert small.process.flows_made_since_sweep() == 0
    small.feed(6, range(2))
    assert small.process.flows_made_since_sweep() == 2


# What a killed exporter leaves


def put_state(meter: Meter, version: int, slots: np.ndarray, state: str, *, reason: int = 0) -> None:
    """Writes the `ctl` of these slots as an exporter does."""
    constants = meter.table.layout.constants
    word = constants[f"FLOW_{state}"] << constants["FLOW_STATE_SHIFT"] | reason << constants["FLOW_REASON_SHIFT"]
    meter.family(version)._hot_rows[slots, 0] = U64(word + constants["FLOW_CLAIM_BIAS"])


@pytest.mark.parametrize("version", FAMILIES)
def test_flows_left_closing_are_given_back_for_export_with_their_reasons(small: Meter, version: int) -> None:
    small.feed(version, range(6))
    family = small.family(version)
    slots = live(family)
    put_state(small, version, slots[:4], "CLOSING", reason=IDLE)
    assert np.array_equal(np.sort(family.recover()), slots[:4])
    batch = small.process.left_closing(family, slots[:4])
    assert batch.columns["end_reason"].tolist() == [IDLE] * 4
    assert batch.packets == 4
    batch.done()
    assert len(take(small.process.drain())) == 2
    take(small.process.sweep(timeouts(), SECOND_NS))
    check_free(small)
    assert small.process.ledger().missing() == (0, 0)


def test_flows_left_closing_that_were_exported_already_are_not_exported_again(small: Meter) -> None:
    small.feed(4, range(3))
    family, slots = small.family(4), live(small.family(4))
    put_state(small, 4, slots, "CLOSING", reason=IDLE)
    hot, _ = family.read(slots)
    family.mark_exported(slots, hot["packets"], hot["octets"], hot["last_ns"].view(np.int64))
    assert len(family.recover()) == 3
    batch = small.process.left_closing(family, slots)
    assert (batch.records, batch.packets) == (0, 0)
    batch.done()
    take(small.process.sweep(timeouts(), SECOND_NS))
    check_free(small)


def test_interim_records_in_doubt_come_again_as_they_were_however_often_and_what_has_grown_comes_later(
    small: Meter,
) -> None:
    small.feed(4, range(3), time_ns=SECOND_NS)
    (first, *_) = small.process.report()  # and is killed before that is done
    for _ in range(2):
        small.feed(4, [1], time_ns=2 * SECOND_NS)
        (again, *_) = small.process.recover()
        assert all(np.array_equal(again.columns[name], column) for name, column in first.columns.items())
    assert take(small.process.recover()) == [Ended(port, 1, 28, ACTIVE) for port in first.columns["src_port"]]
    assert take(small.process.recover()) == []
    assert take(small.process.report()) == [Ended(2, 2, 56, ACTIVE)]
    assert small.process.ledger().missing() == (0, 0)


def test_ending_flows_in_doubt_come_again_in_one_batch_before_others_that_were_closing(small: Meter) -> None:
    small.feed(4, range(6))
    family = small.family(4)
    slots = live(family)
    put_state(small, 4, slots, "CLOSING", reason=IDLE)
    doubtful = small.process.left_closing(family, slots[::2])
    batches = []
    for batch in small.process.recover():
        batches.append(batch.columns["src_port"].tolist())
        batch.done()
    assert batches[0] == doubtful.columns["src_port"].tolist()
    assert [len(ports) for ports in batches] == [3, 3]
    assert sorted(batches[0] + batches[1]) == list(range(1, 7))
    assert small.process.ledger().exported == (6, 6 * HEADERS[4])
    assert small.process.ledger().missing() == (0, 0)


def test_slots_left_retired_and_half_zeroed_are_zeroed_freed_and_never_exported(small: Meter) -> None:
    small.feed(4, range(4))
    family, slots = small.family(4), live(small.family(4))
    put_state(small, 4, slots, "RETIRED")
    family._hot_rows[slots[:2], 1:] = 0
    assert len(family.recover()) == 0
    check_free(small)
    assert take(small.process.drain()) == []


def test_a_claim_without_a_flow_is_freed_and_can_be_claimed_again(small: Meter) -> None:
    family = small.family(4)
    family._hot_rows[:, 0] = 1  # every slot, as if a program had vanished after its claim
    small.feed(4, [0])
    assert small.count("not_metered_table_full") == 1
    assert len(family.recover()) == 0
    small.feed(4, range(MORE_THAN_FIT))
    assert len(take(small.process.drain())) == SLOTS


def test_a_tag_without_a_flow_no_longer_hides_a_free_slot(small: Meter) -> None:
    family = small.family(4)
    family.tags[:] = 0x1234
    small.feed(4, [0])
    assert small.count("not_metered_table_full") == 1
    family.recover()
    assert not family.tags.any()
    small.feed(4, range(MORE_THAN_FIT))
    assert len(live(family)) == SLOTS


@pytest.mark.parametrize("version", FAMILIES)
def test_a_flow_without_a_tag_is_not_lost(small: Meter, version: int) -> None:
    small.feed(version, range(5))
    family = small.family(version)
    family.tags[:] = 0
    assert len(live(family)) == 0
    family.recover()
    assert len(live(family)) == 5
    small.feed(version, range(5))
    assert sum(each.packets for each in take(small.process.drain())) == 10
    assert small.process.ledger().missing() == (0, 0)


def test_a_table_in_order_is_left_as_it_is(small: Meter) -> None:
    for version in FAMILIES:
        small.feed(version, range(9))
    before = [(f.tags.copy(), f._hot_rows.copy(), f._cold_rows.copy()) for f in small.table.families]
    assert [len(family.recover()) for family in small.table.families] == [0, 0]
    for family, (tags, hot, cold) in zip(small.table.families, before):
        assert np.array_equal(family.tags, tags)
        assert np.array_equal(family._hot_rows, hot)
        assert np.array_equal(family._cold_rows, cold)


def test_a_table_that_is_taken_over_finds_its_flows_again() -> None:
    meter = Meter(1000)
    meter.feed(4, range(500))
    adopted = FlowTable.adopt(meter.table.layout, meter.table.fds)
    assert adopted.secret == meter.table.secret
    second = Meter(1000, adopted)
    second.feed(4, range(500))
    assert second.count("flows_created") == 500
    assert {ended.packets for ended in take(second.process.drain())} == {2}
    assert second.process.ledger().missing() == (0, 0)
    second.process.programs.close()  # the table's descriptors are the first one's
    meter.close()


def test_a_table_of_another_layout_is_not_taken_over(small: Meter) -> None:
    small.table.set_control(layout=small.table.layout.digest ^ 1)
    fds = {name: os.dup(fd) for name, fd in small.table.fds.items()}
    with pytest.raises(LayoutDiffers, match="another version"):
        FlowTable.adopt(small.table.layout, fds)
    for fd in fds.values():
        with pytest.raises(OSError):
            os.fstat(fd)


def test_two_tables_never_share_a_secret() -> None:
    tables = [new_table(16) for _ in range(2)]
    assert tables[0].secret != tables[1].secret
    assert all(any(table.secret) for table in tables)
    for table in tables:
        table.close()


@pytest.mark.parametrize("began_s", [1, 1_800_000_000], ids=["boot time", "a capture's Unix time"])
def test_flows_sleep_whatever_the_clock(small: Meter, began_s: int) -> None:
    began_ns, limits = began_s * SECOND_NS, timeouts(idle_ns=10 * SECOND_NS)
    small.feed(4, range(5), time_ns=began_ns)
    assert take(small.process.sweep(limits, began_ns)) == []
    family = small.family(4)
    asleep = [family.asleep(family.occupied(), began_ns + second * SECOND_NS).tolist() for second in (0, 9, 10)]
    assert asleep == [5 * [True], 5 * [True], 5 * [False]]
    assert len(take(small.process.sweep(limits, began_ns + 10 * SECOND_NS))) == 5


def test_programs_that_cannot_be_loaded_leave_no_map_behind(small: Meter) -> None:
    class Refused:
        def load(self, **_: object) -> dict[str, int]:
            raise FlowexpError("the verifier says no")

    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FlowexpError, match="says no"):
        MeteringProcess(small.table, programs=("replay",), max_flows=16, loader=Refused())
    assert len(os.listdir("/proc/self/fd")) == descriptors
