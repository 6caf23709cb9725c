# SPDX-License-Identifier: GPL-2.0-or-later
"""Sums over fewer keys and orders, held against plain Python over random flows."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Dict, List

import numpy as np
import pytest

from flowexp.arrange import ORDERS, SHORT_NAMES, aggregate_spec, aggregated, first, in_order
from flowexp.errors import UsageError
from flowexp.protocol.elements import MEASURED
from flowexp.protocol.record import Record, columns_to_records
from flowexp.protocol.template import DEFAULT, build_templates

Columns = Dict[str, np.ndarray]

KEYS = ["src,dst", "src", "proto,dport", "vlan", "vlan,dst", "dscp", "in,out", "smac,dmac,tos", "icmp", "dot1qDEI",
        "postVlanId", "destinationIPv6Address", ",".join(SHORT_NAMES)]  # fmt: skip
SUMS = {"deltaFlowCount": sum, "packetDeltaCount": sum, "octetDeltaCount": sum, "flowStartMilliseconds": min,
        "flowEndMilliseconds": max}  # fmt: skip


def random_flows(rng: random.Random, version: int, count: int) -> Columns:
    """Flows with few values a column, and counts that no float holds."""

    def few(dtype: str, most: int, shape: int = 0) -> np.ndarray:
        values = [rng.randrange(most) for _ in range(count * (shape or 1))]
        return np.array(values, dtype).reshape((count, shape) if shape else count)

    width = 4 if version == 4 else 16
    start_ns = few("i8", 10**12)
    octets = np.array([(1 << 60) + rng.randrange(1000) for _ in range(count)], "u8") // np.uint64(count or 1)
    return {
        "src_addr": few("u1", 2, width) * (np.arange(width) == 1).astype("u1"),
        "dst_addr": few("u1", 2, width) * (np.arange(width) == width - 1).astype("u1"),
        "next_hop": np.zeros((count, width), "u1"), "src_mac": few("u1", 2, 6), "dst_mac": np.zeros((count, 6), "u1"),
        "protocol": few("u1", 3), "src_port": few("u2", 2), "dst_port": few("u2", 3), "icmp_type_code": few("u2", 2),
        "ip_version": np.full(count, version, "u1"), "tos": few("u1", 8), "priorities": few("u1", 255),
        "vlan_id": few("u2", 2), "vlan_tagged": few("u1", 2).astype(bool), "inner_vlan_id": few("u2", 2),
        "inner_tagged": few("u1", 2).astype(bool), "ingress_ifindex": few("u4", 2), "egress_ifindex": few("u4", 3),
        "direction": few("u1", 2), "flows": np.ones(count, "u8"), "packets": few("u8", 10**6), "octets": octets,
        "packets_total": few("u8", 9), "octets_total": few("u8", 9),
        "start_ns": start_ns, "end_ns": start_ns + few("i8", 10**12), "tcp_flags": few("u2", 512),
        "flow_label": few("u4", 9), "fragment_flags": few("u1", 2), "end_reason": few("u1", 6),
        "min_length": few("u4", 9), "max_length": few("u4", 9), "min_ttl": few("u1", 9), "max_ttl": few("u1", 9),
    }  # fmt: skip


def both_families(seed: int) -> List[Columns]:
    rng = random.Random(seed)
    return [random_flows(rng, version, rng.choice((0, 1, 40, 150))) for version in (4, 6, 4, 6, 6)]


def records_of(parts: List[Columns], keys: str) -> List[Record]:
    templates = build_templates(aggregate_spec(keys))
    return [record for part in parts for record in columns_to_records(part, templates)]


@pytest.mark.parametrize("keys", KEYS)
def test_an_aggregate_is_what_adding_up_its_records_gives(keys: str) -> None:
    parts = both_families(len(keys))
    groups: Dict[tuple, List[Record]] = defaultdict(list)
    for record in records_of(parts, keys):
        key = tuple((name, value) for name, value in record.items() if name not in SUMS)
        groups[key].append(record)
    expected = {
        key: {name: how(record[name] for record in records) for name, how in SUMS.items()}
        for key, records in groups.items()
    }
    got = records_of(list(aggregated(parts, aggregate_spec(keys))), keys)
    assert len(got) == len(expected)
    for record in got:
        key = tuple((name, value) for name, value in record.items() if name not in SUMS)
        assert {name: record[name] for name in SUMS} == expected[key]


def test_sums_go_on_over_parts_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = both_families(1)
    at_once = records_of(list(aggregated(parts, aggregate_spec("src,proto"))), "src,proto")
    monkeypatch.setattr("flowexp.arrange._AT_ONCE", 10)
    assert records_of(list(aggregated(parts, aggregate_spec("src,proto"))), "src,proto") == at_once


def test_no_flows_have_no_aggregate() -> None:
    rng = random.Random(0)
    assert list(aggregated([], aggregate_spec("src"))) == []
    assert list(aggregated([random_flows(rng, 4, 0)], aggregate_spec("src"))) == []


@pytest.mark.parametrize("keys", ["src,,dst", "", "srk", "octetDeltaCount", "flowEndSeconds", "src,src", "src/3"])
def test_what_is_no_key_is_told_in_one_line(keys: str) -> None:
    with pytest.raises(UsageError) as error:
        aggregate_spec(keys)
    assert str(error.value).startswith(f"--aggregate {keys}: ") and "\n" not in str(error.value)


def test_a_key_of_a_field_group_that_is_off_is_told() -> None:
    with pytest.raises(UsageError, match="tcpWindowSize is not measured here; its field group is off"):
        list(aggregated(both_families(3), aggregate_spec("tcpWindowSize")))


@pytest.mark.parametrize("limit", [None, 1, 7, 10_000])
@pytest.mark.parametrize("by", sorted(ORDERS))
def test_flows_are_in_order_over_both_families(by: str, limit: int) -> None:
    parts = both_families(7)
    rows = [row for part in parts for row in zip(*(part[name].tolist() for name in ("octets", "packets", "flows",
                                                                                   "start_ns", "end_ns")))]  # fmt: skip
    orders = {
        "octets": lambda row: -row[0], "packets": lambda row: -row[1], "flows": lambda row: -row[2],
        "duration": lambda row: row[3] - row[4], "start": lambda row: row[3], "end": lambda row: row[4],
    }  # fmt: skip
    expected = sorted(rows, key=lambda row: (orders[by](row), -row[0]))[:limit]
    kept, order = in_order(parts, by, limit)
    got = [row for part in kept for row in zip(*(part[name].tolist() for name in ("octets", "packets", "flows",
                                                                                 "start_ns", "end_ns")))]  # fmt: skip
    ordered = [got[number] for number in order.tolist()]
    assert [(orders[by](row), -row[0]) for row in ordered] == [(orders[by](row), -row[0]) for row in expected]
    assert set(ordered) <= set(rows)


def test_with_a_limit_no_more_is_asked_for_than_it_takes() -> None:
    rng = random.Random(2)
    asked = []

    def parts():
        for number in range(5):
            asked.append(number)
            yield random_flows(rng, 4, 10)

    assert [len(part["packets"]) for part in first(parts(), 20)] == [10, 10]
    assert asked == [0, 1]


def test_every_short_name_is_of_an_element_that_records_have() -> None:
    names = {field.name for field in DEFAULT.fields}
    assert set(SHORT_NAMES.values()) <= names and names <= MEASURED.keys()
