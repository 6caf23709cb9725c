# SPDX-License-Identifier: GPL-2.0-or-later
"""What a sweep finds due, to the nanosecond: which flows end and why, and which owe a record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List

import numpy as np
import pytest

from flowexp.metering.sweep import (
    ACTIVE,
    CLASSES,
    END_OF_FLOW,
    FORCED,
    IDLE,
    LACK_OF_RESOURCES,
    Array,
    Due,
    Timeouts,
    due,
    everything,
)

NOW_NS = 1_000_000_000_000
TCP, UDP, ICMP, ICMPV6, GRE, SCTP = 6, 17, 1, 58, 47, 132
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
IDLE_NS, ACTIVE_NS, LINGER_NS, ROOM = 15_000, 60_000, 5_000, 1_000
TIMEOUTS = Timeouts(dict.fromkeys(CLASSES, IDLE_NS), dict.fromkeys(CLASSES, ACTIVE_NS), LINGER_NS)


LIVE = 1
HOT = np.dtype([("ctl", "u8"), ("last_ns", "u8"), ("flags_hint", "u1"), ("protocol", "u1")])


@dataclass
class Flow:
    """One flow: how long ago its last packet was, and how long ago the record under way began."""

    idle_ns: int = 0
    age_ns: int = 0
    protocol: int = UDP
    flags: int = 0
    is_left_behind: bool = False


@dataclass
class FlowsOf:
    """A family's flow table of these flows. Their slots lie apart: a flow's slot is not its place in the list."""

    flows: List[Flow]
    slots: Array = field(init=False)
    wakes_ns: Array = field(init=False)
    looked_at: int = 0

    def __post_init__(self) -> None:
        self.slots = 100 + 7 * np.arange(len(self.flows), dtype=np.int64)
        self.wakes_ns = np.zeros(len(self.flows), np.int64)

    def _index(self, slots: Array) -> Array:
        index: Array = (slots - 100) // 7
        return index

    def occupied(self) -> Array:
        return self.slots

    def hot(self, slots: Array) -> Array:
        self.looked_at += len(slots)
        rows = [(LIVE, NOW_NS - flow.idle_ns, flow.flags, flow.protocol) for flow in self.flows]
        return np.array(rows, HOT)[self._index(slots)]

    def is_live(self, ctl: Array) -> Array:
        live: Array = ctl == LIVE
        return live

    def starts(self, slots: Array) -> Array:
        return np.array([NOW_NS - flow.age_ns for flow in self.flows], np.int64)[self._index(slots)]

    def is_left_behind(self, slots: Array) -> Array:
        return np.array([flow.is_left_behind for flow in self.flows], bool)[self._index(slots)]

    def asleep(self, slots: Array, now_ns: int) -> Array:
        asleep: Array = self.wakes_ns[self._index(slots)] > now_ns
        return asleep

    def sleep(self, slots: Array, until_ns: Array) -> None:
        self.wakes_ns[self._index(slots)] = until_ns


def ending(found: Due) -> Dict[int, int]:
    """The reason why a flow ends, by its place in the list."""
    assert found.reasons.dtype == np.uint8
    return {(slot - 100) // 7: reason for slot, reason in zip(found.ending.tolist(), found.reasons.tolist())}


def active(found: Due) -> List[int]:
    return [(slot - 100) // 7 for slot in found.active.tolist()]


def sweep(*flows: Flow, timeouts: Timeouts = TIMEOUTS, room_flows: int = ROOM) -> Due:
    return due(FlowsOf(list(flows)), timeouts, NOW_NS, room_flows=room_flows)


def test_an_empty_table_owes_nothing() -> None:
    found = sweep()
    assert (len(found.ending), len(found.reasons), len(found.active), len(found.living)) == (0, 0, 0, 0)


def test_an_idle_flow_ends_with_reason_1_at_exactly_the_idle_timeout() -> None:
    found = sweep(Flow(idle_ns=IDLE_NS - 1), Flow(idle_ns=IDLE_NS), Flow(idle_ns=IDLE_NS + 1))
    assert ending(found) == {1: IDLE, 2: IDLE}
    assert len(found.living) == 1


def test_a_long_flow_owes_a_record_at_exactly_the_active_timeout_and_lives_on() -> None:
    found = sweep(Flow(age_ns=ACTIVE_NS - 1), Flow(age_ns=ACTIVE_NS), Flow(age_ns=ACTIVE_NS + 1))
    assert active(found) == [1, 2]
    assert ending(found) == {}


def test_a_flow_that_ends_owes_no_interim_record_as_well() -> None:
    found = sweep(Flow(idle_ns=IDLE_NS, age_ns=ACTIVE_NS))
    assert ending(found) == {0: IDLE}
    assert active(found) == []


def test_the_active_timeout_counts_from_the_start_of_the_record_not_from_the_last_packet() -> None:
    assert active(sweep(Flow(idle_ns=IDLE_NS - 1, age_ns=ACTIVE_NS - 1))) == []
    assert active(sweep(Flow(idle_ns=0, age_ns=ACTIVE_NS))) == [0]


@pytest.mark.parametrize("flags", [FIN, RST, FIN | ACK, RST | ACK, FIN | SYN | PSH])
def test_a_tcp_flow_with_fin_or_rst_ends_with_reason_3_at_exactly_the_linger(flags: int) -> None:
    found = sweep(
        Flow(idle_ns=LINGER_NS - 1, protocol=TCP, flags=flags), Flow(idle_ns=LINGER_NS, protocol=TCP, flags=flags)
    )
    assert ending(found) == {1: END_OF_FLOW}


def test_other_tcp_flags_do_not_end_a_flow() -> None:
    assert ending(sweep(Flow(idle_ns=IDLE_NS - 1, protocol=TCP, flags=SYN | PSH | ACK | 0xE0))) == {}


def test_a_flow_left_behind_ends_with_reason_2_when_its_record_is_due_and_not_before() -> None:
    found = sweep(
        Flow(age_ns=ACTIVE_NS, is_left_behind=True),
        Flow(age_ns=ACTIVE_NS - 1, is_left_behind=True),
        Flow(age_ns=ACTIVE_NS),
        Flow(idle_ns=IDLE_NS, age_ns=ACTIVE_NS, is_left_behind=True),
    )
    assert ending(found) == {0: ACTIVE, 3: IDLE}
    assert active(found) == [2]
    assert len(found.living) == 2


def test_a_linger_of_zero_ends_a_flow_at_the_next_sweep() -> None:
    timeouts = Timeouts(TIMEOUTS.idle_ns, TIMEOUTS.active_ns, 0)
    assert ending(sweep(Flow(idle_ns=0, protocol=TCP, flags=FIN), timeouts=timeouts)) == {0: END_OF_FLOW}


def test_an_idle_timeout_shorter_than_the_linger_ends_a_finished_flow_first_and_the_reason_stays_3() -> None:
    timeouts = Timeouts(dict.fromkeys(CLASSES, 100), TIMEOUTS.active_ns, LINGER_NS)
    found = sweep(
        Flow(idle_ns=99, protocol=TCP, flags=FIN), Flow(idle_ns=100, protocol=TCP, flags=FIN), timeouts=timeouts
    )
    assert ending(found) == {1: END_OF_FLOW}


@pytest.mark.parametrize("protocol", [UDP, ICMP, SCTP])
def test_only_tcp_has_an_end_of_flow(protocol: int) -> None:
    assert ending(sweep(Flow(idle_ns=IDLE_NS - 1, protocol=protocol, flags=FIN | RST))) == {}


@pytest.mark.parametrize(
    ("name", "protocols"), [("tcp", [TCP]), ("udp", [UDP]), ("icmp", [ICMP, ICMPV6]), ("other", [0, GRE, SCTP, 255])]
)
def test_each_protocol_class_has_timeouts_of_its_own(name: str, protocols: List[int]) -> None:
    timeouts = Timeouts({**TIMEOUTS.idle_ns, name: 10}, {**TIMEOUTS.active_ns, name: 20}, LINGER_NS)
    everyone = [TCP, UDP, ICMP, ICMPV6, 0, GRE, SCTP, 255]
    found = sweep(*(Flow(idle_ns=10, protocol=protocol) for protocol in everyone), timeouts=timeouts)
    assert {everyone[place] for place in ending(found)} == set(protocols)
    found = sweep(*(Flow(age_ns=20, protocol=protocol) for protocol in everyone), timeouts=timeouts)
    assert {everyone[place] for place in active(found)} == set(protocols)


def test_a_last_packet_later_than_now_is_not_idle_for_ages() -> None:
    found = sweep(Flow(idle_ns=-1), Flow(idle_ns=-10 * ACTIVE_NS), Flow(idle_ns=-1, protocol=TCP, flags=FIN))
    assert ending(found) == {}
    assert active(found) == []


def test_a_record_that_starts_later_than_now_is_not_old() -> None:
    assert active(sweep(Flow(age_ns=-1), Flow(age_ns=-(1 << 40)))) == []


def test_without_room_the_flows_that_were_idle_longest_end_with_reason_5() -> None:
    flows = [Flow(idle_ns=idle) for idle in (3, 900, 5, 700, 1, 800)]
    assert ending(sweep(*flows, room_flows=4)) == {1: LACK_OF_RESOURCES, 5: LACK_OF_RESOURCES}


def test_a_table_filled_exactly_to_its_room_ends_nothing_early() -> None:
    flows = [Flow(idle_ns=idle) for idle in range(8)]
    assert ending(sweep(*flows, room_flows=8)) == {}
    assert ending(sweep(*flows, room_flows=7)) == {7: LACK_OF_RESOURCES}


def test_flows_that_end_anyway_make_room_first_and_keep_their_reasons() -> None:
    flows = [Flow(idle_ns=IDLE_NS), Flow(idle_ns=LINGER_NS, protocol=TCP, flags=RST), Flow(idle_ns=9), Flow(idle_ns=8)]
    assert ending(sweep(*flows, room_flows=2)) == {0: IDLE, 1: END_OF_FLOW}
    assert ending(sweep(*flows, room_flows=1)) == {0: IDLE, 1: END_OF_FLOW, 2: LACK_OF_RESOURCES}


def test_with_no_room_at_all_everything_ends() -> None:
    assert ending(sweep(Flow(), Flow(idle_ns=1), room_flows=0)) == {0: LACK_OF_RESOURCES, 1: LACK_OF_RESOURCES}


def test_a_flow_that_ends_early_owes_no_interim_record() -> None:
    found = sweep(Flow(idle_ns=2, age_ns=ACTIVE_NS), Flow(idle_ns=1, age_ns=ACTIVE_NS), room_flows=1)
    assert ending(found) == {0: LACK_OF_RESOURCES}
    assert active(found) == [1]


def test_a_flow_is_not_looked_at_before_anything_of_it_can_be_due() -> None:
    flows = FlowsOf([Flow(), Flow(protocol=TCP), Flow(protocol=TCP, flags=FIN), Flow(age_ns=ACTIVE_NS - 1_000)])
    looked_at = []
    for after_ns in (0, 1, 999, 1_000, LINGER_NS - 1, LINGER_NS, IDLE_NS):
        flows.looked_at = 0
        due(flows, TIMEOUTS, NOW_NS + after_ns, room_flows=ROOM)
        looked_at.append(flows.looked_at)
    assert looked_at == [4, 0, 0, 1, 1, 3, 4]  # one that owes a record and got none is looked at again and again


def test_a_crowd_wakes_every_flow() -> None:
    flows = FlowsOf([Flow(idle_ns=idle) for idle in (3, 900, 5)])
    assert ending(due(flows, TIMEOUTS, NOW_NS, room_flows=3)) == {}
    assert ending(due(flows, TIMEOUTS, NOW_NS, room_flows=2)) == {1: LACK_OF_RESOURCES}


@pytest.mark.parametrize("linger_ns", [0, 300, 5_000, 40_000])
def test_flows_that_sleep_are_due_when_those_that_never_do_are(linger_ns: int) -> None:
    generator = np.random.default_rng(linger_ns)
    timeouts = Timeouts({**TIMEOUTS.idle_ns, "udp": 7_000}, {**TIMEOUTS.active_ns, "tcp": 21_000}, linger_ns)
    flows = FlowsOf([Flow(0, 0, protocol) for protocol in (TCP, UDP, ICMP, GRE) for _ in range(100)])
    for now_ns in range(NOW_NS, NOW_NS + 200_000, 1_000):
        for flow in flows.flows:
            if generator.random() < 0.05:
                flow.idle_ns = NOW_NS - now_ns + int(generator.integers(1_000))
                flow.flags |= FIN if generator.random() < 0.02 else 0
        found = due(flows, timeouts, now_ns, room_flows=ROOM)
        awake = due(FlowsOf(flows.flows), timeouts, now_ns, room_flows=ROOM)
        assert ending(found) == ending(awake)
        assert active(found) == active(awake)
        assert sorted(found.living) == sorted(awake.living)
        for place in ending(found):
            flows.flows[place] = Flow(NOW_NS - now_ns, NOW_NS - now_ns, flows.flows[place].protocol)
            flows.wakes_ns[place] = 0
        for place in active(found):
            flows.flows[place].age_ns = NOW_NS - now_ns


def test_everything_ends_all_flows_for_the_reason_given_and_none_is_left_active() -> None:
    found = everything(FlowsOf([Flow(), Flow(idle_ns=IDLE_NS), Flow(age_ns=ACTIVE_NS, protocol=TCP)]), FORCED)
    assert ending(found) == {0: FORCED, 1: FORCED, 2: FORCED}
    assert (active(found), len(found.living)) == ([], 0)


def test_reasons_have_their_iana_numbers() -> None:
    assert (IDLE, ACTIVE, END_OF_FLOW, FORCED, LACK_OF_RESOURCES) == (1, 2, 3, 4, 5)
