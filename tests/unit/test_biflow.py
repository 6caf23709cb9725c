# SPDX-License-Identifier: GPL-2.0-or-later
"""Biflows: which flows are two directions of one conversation, who began it, and what a record then carries."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from columns import flows

from flowexp.metering.biflow import conversations_of, paired, together
from flowexp.metering.sweep import ACTIVE, END_OF_FLOW, IDLE, Array, Due
from flowexp.protocol.decode import Decoder
from flowexp.protocol.elements import Columns
from flowexp.protocol.encoders import check_template, encoder_for
from flowexp.protocol.registry import ElementError
from flowexp.protocol.template import DEFAULT, TemplateSpec, build_templates, template_spec, with_groups

EXPORT_TIME_S = 1_700_000_000
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
SYN = 0x02
A, B = 1, 2
IN, OUT = 0, 1
LEFT, RIGHT, THIRD = 11, 12, 13


class Flow(NamedTuple):
    source: int
    destination: int
    ports: tuple[int, int] = (1000, 53)
    protocol: int = UDP
    ifindex: tuple[int, int] = (LEFT, RIGHT)
    direction: int = IN
    began_ns: int = 0
    tcp_flags: int = 0
    icmp: int = 0  # type and code
    vlan: int = 0
    packets: int = 1


def columns(*rows: Flow, version: int = 4) -> Columns:
    """Each row's packets are its own number, and so are its octets but for a factor."""
    made: dict[str, Any] = dict(flows(len(rows), version=version))
    for name in ("began_ns", "protocol", "direction", "tcp_flags", "packets"):
        made[name] = np.array([getattr(row, name) for row in rows], made.get(name, np.empty(0, "i8")).dtype)
    made["octets"] = made["packets"] * np.uint64(100)
    made["icmp_type_code"] = np.array([row.icmp for row in rows], "u2")
    made["vlan_id"] = np.array([row.vlan for row in rows], "u2")
    made["vlan_tagged"] = made["vlan_id"] > 0
    for number, name in enumerate(("ingress_ifindex", "egress_ifindex")):
        made[name] = np.array([row.ifindex[number] for row in rows], "u4")
    for number, name in enumerate(("src_port", "dst_port")):
        made[name] = np.array([row.ports[number] for row in rows], "u2")
    for name, number in (("src_addr", 0), ("dst_addr", 1)):
        made[name][:, -1] = [row[number] for row in rows]
    made["start_ns"], made["end_ns"] = made["began_ns"], made["began_ns"] + 1000
    return made


def pairs(*rows: Flow, version: int = 4) -> list[tuple[int, int]]:
    """What the rows carry: packets of the forward direction, and of the reverse one."""
    found = paired(columns(*rows, version=version), ())
    return list(zip(found["packets"].tolist(), found["reverse_packets"].tolist()))


def back(flow: Flow, **changes: Any) -> Flow:
    """The answer of a router's other side."""
    swapped = flow._replace(
        source=flow.destination, destination=flow.source, ports=flow.ports[::-1], ifindex=flow.ifindex[::-1],
        began_ns=flow.began_ns + 5, packets=flow.packets + 1,
    )  # fmt: skip
    return swapped._replace(**changes)


ASKED = Flow(A, B)


@pytest.mark.parametrize("version", [4, 6])
def test_a_question_and_its_answer_are_one_row_and_others_stay_alone(version: int) -> None:
    alone = Flow(A, 3, packets=7)
    assert pairs(ASKED, alone, back(ASKED), version=version) == [(1, 2), (7, 0)]


def test_the_first_seen_is_forward_whichever_comes_first_in_the_table() -> None:
    assert pairs(back(ASKED), ASKED) == [(1, 2)]
    assert pairs(ASKED._replace(began_ns=9), back(ASKED)) == [(2, 1)]


def test_who_began_is_told_and_where_nobody_knows_that_too() -> None:
    found = paired(columns(ASKED, back(ASKED), Flow(5, 6), back(Flow(5, 6), began_ns=0)), ())
    assert found["biflow_direction"].tolist() == [1, 0]


def test_a_syn_on_one_side_alone_tells_who_began() -> None:
    late = Flow(A, B, protocol=TCP, tcp_flags=SYN, began_ns=50)
    assert pairs(late, back(late, began_ns=0, tcp_flags=0)) == [(1, 2)]
    both = back(late, began_ns=0, tcp_flags=SYN)
    assert pairs(late, both) == [(2, 1)]


@pytest.mark.parametrize(("version", "protocol", "asks", "answers"), [(4, ICMP, 8, 0), (6, ICMPV6, 128, 129)])
def test_echo_goes_with_its_reply_and_who_asks_is_forward(version: int, protocol: int, asks: int, answers: int) -> None:
    ping = Flow(A, B, (0, 0), protocol, icmp=asks << 8, began_ns=50, packets=1)
    pong = back(ping, icmp=answers << 8, began_ns=0, packets=2)
    ping_back = back(ping, icmp=asks << 8, packets=3)
    pong_back = ping._replace(icmp=answers << 8, packets=4)
    assert pairs(ping, pong, ping_back, pong_back, version=version) == [(1, 2), (3, 4)]


def test_icmp_errors_and_what_has_one_end_only_stay_alone() -> None:
    error = Flow(A, B, (0, 0), ICMP, icmp=3 << 8)
    land = Flow(A, A, (7, 7))
    assert pairs(error, back(error), land, land._replace(direction=OUT, packets=5)) == [(1, 0), (2, 0), (1, 0), (5, 0)]


def test_where_all_is_metered_twice_each_side_of_the_router_is_a_pair() -> None:
    asked_out, answered = ASKED._replace(direction=OUT, packets=3), back(ASKED)
    answered_out = answered._replace(direction=OUT, packets=4)
    assert sorted(pairs(ASKED, asked_out, answered, answered_out)) == [(1, 4), (3, 2)]


def test_of_two_answers_that_which_came_in_where_the_question_went_out_is_taken() -> None:
    elsewhere = back(ASKED, ifindex=(THIRD, LEFT), packets=9, began_ns=1)
    assert sorted(pairs(ASKED, elsewhere, back(ASKED))) == [(1, 2), (9, 0)]


def test_an_answer_on_an_asymmetric_path_is_found_and_keeps_its_interfaces() -> None:
    found = paired(columns(ASKED, back(ASKED, ifindex=(THIRD, 0))), ["ingress_ifindex", "egress_ifindex"])
    assert found["reverse_packets"].tolist() == [2]
    assert (found["reverse_ingress_ifindex"].tolist(), found["reverse_egress_ifindex"].tolist()) == ([THIRD], [0])


def test_tagged_and_untagged_flows_are_no_pair() -> None:
    assert pairs(ASKED, back(ASKED, vlan=5)) == [(1, 0), (2, 0)]
    assert pairs(ASKED._replace(vlan=6), back(ASKED, vlan=5)) == [(1, 2)]


def test_a_flow_that_was_told_of_twice_goes_with_its_answers_in_order() -> None:
    again = ASKED._replace(began_ns=100, packets=5)
    assert sorted(pairs(again, back(again), ASKED, back(ASKED))) == [(1, 2), (5, 6)]
    assert sorted(pairs(again, ASKED, back(ASKED))) == [(1, 2), (5, 0)]


@pytest.mark.parametrize("version", [4, 6])
def test_of_random_flows_nothing_is_lost_and_nothing_is_there_twice(version: int) -> None:
    random = np.random.default_rng(3)
    rows = [
        Flow(
            int(random.integers(4)), int(random.integers(4)), (int(random.integers(3)), int(random.integers(3))),
            int(random.choice([TCP, UDP, ICMP, ICMPV6])), (int(random.integers(3)), int(random.integers(3))),
            int(random.integers(2)), int(random.integers(50)), int(random.integers(256)),
            int(random.choice([0, 8, 3, 128, 129])) << 8, int(random.integers(2)), 1 << number % 50,
        )
        for number in range(2000)
    ]  # fmt: skip
    before = columns(*rows, version=version)
    after = paired(before, ["began_ns"])
    for name in ("packets", "octets"):
        assert before[name].sum() == after[name].sum() + after[f"reverse_{name}"].sum()
    biflows = int(after["is_biflow"].sum())
    assert len(after["packets"]) + biflows == len(rows)
    assert biflows > 300
    assert ((after["reverse_packets"] > 0) == after["is_biflow"]).all()


def test_no_flows_and_one_flow_are_no_trouble() -> None:
    assert len(paired(columns(), ())["packets"]) == 0
    assert pairs(ASKED) == [(1, 0)]


# What a record carries


def told(spec: TemplateSpec, *rows: Flow, version: int = 4) -> list[dict[str, Any]]:
    """What a Collector decodes of these rows."""
    encoder = encoder_for("ipfix", observation_domain_id=1, max_message_octets=1472, template=spec, biflow=True)
    needed = build_templates(spec, biflow=True).reverse_columns
    records = encoder.as_records(paired(columns(*rows, version=version), needed))
    decoder, found = Decoder(), []
    makes = (encoder.announce, partial(encoder.encode, records))
    for burst in (burst for make in makes for burst in make(EXPORT_TIME_S)):
        encoder.commit(burst)
        decoded = decoder.decode(bytes(burst.octets), "here")
        assert decoded.problems == []
        found += [dict(record) for record in decoded.records if "packetDeltaCount" in record]
    return found


def test_a_record_has_both_directions_and_one_of_a_single_flow_nothing_of_the_other() -> None:
    alone = Flow(A, 3, packets=9)
    first, second = sorted(told(DEFAULT, ASKED, back(ASKED), alone), key=len, reverse=True)
    assert first["biflowDirection"] == 1
    assert (first["packetDeltaCount"], first["reversePacketDeltaCount"]) == (1, 2)
    assert (first["octetDeltaCount"], first["reverseOctetDeltaCount"]) == (100, 200)
    assert (first["ingressInterface"], first["reverseIngressInterface"]) == (LEFT, RIGHT)
    assert (first["egressInterface"], first["reverseEgressInterface"]) == (RIGHT, LEFT)
    assert "reverseSourceIPv4Address" not in first
    assert second["packetDeltaCount"] == 9
    assert not [name for name in second if name.startswith(("reverse", "biflow"))]


def test_reverse_times_of_flows_counted_from_system_start_are_relative_to_the_same() -> None:
    spec = template_spec("own", ["packetDeltaCount", "flowStartSysUpTime", "flowEndDeltaMicroseconds"])
    asked = ASKED._replace(began_ns=(EXPORT_TIME_S - 5) * 10**9)
    (record,) = told(spec, asked, back(asked, began_ns=asked.began_ns + 2 * 10**9))
    assert record["reverseFlowStartSysUpTime"] - record["flowStartSysUpTime"] == 2000
    assert record["flowEndDeltaMicroseconds"] - record["reverseFlowEndDeltaMicroseconds"] == 2_000_000


def test_tags_of_both_directions_are_told_where_there_are_any() -> None:
    tagged = ASKED._replace(vlan=6)
    (record,) = told(DEFAULT, tagged, back(tagged, vlan=5))
    assert (record["vlanId"], record["reverseVlanId"]) == (6, 5)


def test_short_counters_of_either_direction_split_the_record_and_nothing_is_lost() -> None:
    spec = template_spec("own", ["octetDeltaCount/4", "packetDeltaCount/4"])
    records = told(spec, ASKED._replace(packets=3), back(ASKED, packets=2**30 + 1))
    names = ("packetDeltaCount", "octetDeltaCount", "reversePacketDeltaCount", "reverseOctetDeltaCount")
    sums = [sum(record[name] for record in records) for name in names]
    assert sums == [3, 300, 2**30 + 1, 100 * (2**30 + 1)]
    assert len(records) == 26


def test_an_enterprises_own_element_has_no_reverse_and_is_refused_by_name() -> None:
    with pytest.raises(ElementError, match="tcpZeroWindowPacketDeltaCount has no reverse element"):
        check_template(template_spec("own", ["tcpZeroWindowPacketDeltaCount"]), "ipfix", biflow=True)
    with pytest.raises(ElementError, match="has no reverse element"):
        check_template(with_groups(DEFAULT, ["tcp"]), "ipfix", biflow=True)


# What ends together


class Table:
    """A family's table of these flows, slot 100 and up."""

    def __init__(self, rows: list[Flow]) -> None:
        made = columns(*rows)
        names = {"src_addr": "src_addr", "dst_addr": "dst_addr", "src_port": "src_port_be", "dst_port": "dst_port_be",
                 "protocol": "protocol"}  # fmt: skip
        types = [(to, made[name].dtype, made[name].shape[1:]) for name, to in names.items()]
        self._hot = np.zeros(len(rows), types)
        for name, to in names.items():
            self._hot[to] = made[name]
        icmp = np.isin(made["protocol"], (ICMP, ICMPV6))
        self._hot["dst_port_be"] = np.where(icmp, made["icmp_type_code"], made["dst_port"])

    def conversations(self, slots: Array) -> Array:
        return conversations_of(self._hot[slots - 100])


def plan(ending: dict[int, int], active: list[int], living: list[int]) -> Due:
    slots = [np.array(each, np.int64) + 100 for each in (list(ending), active, living)]
    return Due(slots[0], np.array(list(ending.values()), np.uint8), slots[1], slots[2])


def test_where_one_direction_ends_the_other_does_and_they_stand_side_by_side() -> None:
    rows = [ASKED, Flow(3, 4), Flow(5, 6), back(ASKED), back(Flow(5, 6)), back(Flow(3, 4))]
    found = together(Table(rows), plan({0: IDLE, 1: END_OF_FLOW}, [2], [2, 3, 4, 5]))
    ended = dict(zip((found.ending - 100).tolist(), found.reasons.tolist()))
    assert ended == {0: IDLE, 3: ACTIVE, 1: END_OF_FLOW, 5: END_OF_FLOW}
    order = (found.ending - 100).tolist()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset((0, 3)), frozenset((1, 5))}
    assert sorted((found.active - 100).tolist()) == sorted((found.living - 100).tolist()) == [2, 4]


def test_an_even_number_at_a_time_parts_no_pair() -> None:
    rows = [Flow(1, 2, (port, 1)) for port in range(99)] + [back(Flow(1, 2, (port, 1))) for port in range(0, 99, 2)]
    found = together(Table(rows), plan(dict.fromkeys(range(len(rows)), IDLE), [], []))
    ports = [row % 99 if row < 99 else (row - 99) * 2 for row in (found.ending - 100).tolist()]
    assert all(one == other for one, other in zip(ports[:100:2], ports[1:100:2]))
    assert len(set(ports[100:])) == 49


def test_nothing_due_is_nothing_due() -> None:
    nothing = plan({}, [], [0])
    assert together(Table([ASKED]), nothing) is nothing
