# SPDX-License-Identifier: GPL-2.0-or-later
"""NetFlow v5 packets octet by octet; what its 32 bits and its IPv4 cannot hold is split or counted."""

from __future__ import annotations

import logging
import struct
from socket import inet_ntoa

import numpy as np
import pytest
from columns import random_columns
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ipfix import EXPORT_TIME_S, messages, one_flow, two_tags
from test_netflow9 import INIT_MS, recent_columns
from wire import golden

from flowexp.protocol.encoder import Encoder, split_counters
from flowexp.protocol.encoders import encoder_for
from flowexp.session import CollectorSession
from flowexp.transport.base import Batch, Counters, Sent

HEADER = struct.Struct(">HHIIIIBBH")
RECORD = struct.Struct(">4s4s4sHHIIIIHHBBBBHHBBH")
RECORDS_MAX = 30


def encoder(*, max_message_octets: int = 1472, sequence_number: int = 0) -> Encoder:
    return encoder_for(
        "netflow5",
        observation_domain_id=0x10203,
        max_message_octets=max_message_octets,
        tcp_control_bits_octets=1,
        sequence_number=sequence_number,
    )


def records_of(packet: bytes) -> list[tuple]:
    """The fields of each record, after the header's Count."""
    assert len(packet) == HEADER.size + HEADER.unpack_from(packet)[1] * RECORD.size
    return list(RECORD.iter_unpack(packet[HEADER.size :]))


def encoded(columns: dict[str, np.ndarray], meter: Encoder) -> list[bytes]:
    return messages(meter.encode(meter.as_records(columns), EXPORT_TIME_S))


def small_columns(rows: int, *, seed: int) -> dict[str, np.ndarray]:
    """Recent IPv4 flows; one in two has counters of up to 40 bits."""
    columns = recent_columns(rows, ip_version=4, seed=seed)
    bits = np.where(columns["packets"] % 2, 32, 40).astype(np.uint64)
    for name in ("packets", "octets"):
        columns[name] >>= np.uint64(64) - bits
    return columns


def test_packet_of_a_flow_above_four_gigabytes_is_the_golden_one():
    (packet,) = encoded(one_flow(), encoder(sequence_number=2**32 - 1))
    assert packet.hex() == golden("netflow5.txt").hex()


def test_nothing_is_announced():
    assert encoder().announce(EXPORT_TIME_S) == []


def test_a_packet_has_at_most_thirty_records_and_the_sequence_number_counts_records():
    columns = recent_columns(75, ip_version=4, seed=1)
    columns["octets"] %= 1000
    columns["packets"] %= 1000
    meter = encoder(max_message_octets=65535, sequence_number=2**32 - 40)
    full, rest = meter.encode(meter.as_records(columns), EXPORT_TIME_S)
    packets = messages([full, rest])
    assert [HEADER.unpack_from(packet)[1] for packet in packets] == [30, 30, 15]
    assert [HEADER.unpack_from(packet)[5] for packet in packets] == [2**32 - 40, 2**32 - 10, 20]
    for burst in (full, rest):
        meter.commit(burst)
    assert meter.sequence_number == 35


def test_a_smaller_path_gets_smaller_packets():
    packets = encoded(small_columns(50, seed=2), encoder(max_message_octets=512))
    assert {len(packet) for packet in packets[:-1]} == {24 + 10 * 48}


@pytest.mark.parametrize(
    ("octets", "packets", "rows"),
    [
        (2**32 - 1, 2**32 - 1, 1),
        (2**32, 1_000_000, 2),
        (1_000_000, 2**32, 2),
        (2 * (2**32 - 1), 7, 2),
        (2 * (2**32 - 1) + 1, 7, 3),
        (2**40, 2**35 + 5, 257),
    ],
)
def test_a_flow_beyond_32_bits_is_split_into_the_fewest_rows_with_exact_sums(octets: int, packets: int, rows: int):
    counters = {"octets": np.array([5, octets], "u8"), "packets": np.array([1, packets], "u8")}
    columns = split_counters(counters, dict.fromkeys(counters, 4))
    assert len(columns["octets"]) == 1 + rows
    assert int(columns["octets"].sum()) == 5 + octets
    assert int(columns["packets"].sum()) == 1 + packets
    assert max(columns["octets"].max(), columns["packets"].max()) <= 2**32 - 1


def test_what_else_a_split_flow_counts_is_split_too():
    counters = {
        "octets": np.array([2**34], "u8"), "packets": np.array([10], "u8"), "flows": np.array([1], "u8"),
        "sizes": np.array([[7, 0, 3]], "u8"), "tos": np.array([4], "u1"),
    }  # fmt: skip
    columns = split_counters(counters, {"octets": 4}, ("packets", "flows", "sizes"))
    assert len(columns["octets"]) == 5
    assert {name: column.sum(axis=0).tolist() for name, column in columns.items() if name != "tos"} == {
        "octets": 2**34, "packets": 10, "flows": 1, "sizes": [7, 0, 3],
    }  # fmt: skip
    assert columns["tos"].tolist() == [4] * 5


def test_flows_that_fit_are_not_copied():
    columns = one_flow(octets=2**32 - 1)
    told = encoder().as_records(columns)
    assert all(told[name] is column for name, column in columns.items())


def test_interface_beyond_16_bits_is_not_known():
    (packet,) = encoded(one_flow(octets=1, ingress_ifindex=65535, egress_ifindex=65536), encoder())
    assert records_of(packet)[0][3:5] == (65535, 0)


def test_as_numbers_and_prefix_lengths_are_told_where_they_are_known():
    (packet,) = encoded(one_flow(octets=1), encoder())
    assert records_of(packet)[0][-5:] == (0, 0, 0, 0, 0)
    ends = {"src_as": 65535, "dst_as": 65536, "src_prefix_length": 24, "dst_prefix_length": 32}
    known = {name: np.array([value], np.uint32) for name, value in ends.items()}
    (packet,) = encoded(one_flow(octets=1, **known), encoder())
    assert records_of(packet)[0][-5:] == (65535, 23456, 24, 32, 0)


def test_icmp_is_told_in_the_destination_port():
    flow = one_flow(octets=1, protocol=1, src_port=0, dst_port=0, icmp_type_code=0x0800)
    (packet,) = encoded(flow, encoder())
    assert records_of(packet)[0][9:11] == (0, 0x0800)


def test_ipv6_flows_are_counted_and_leave_no_record():
    meter = encoder()
    assert encoded(random_columns(5, ip_version=6, seed=0), meter) == []
    assert encoded(two_tags(), meter) == []
    assert meter.flows_not_representable == 6
    assert meter.sequence_number == 0


class NarrowingPath:
    """A transport whose path takes `wide` packets of any size, and then only smaller ones."""

    def __init__(self, wide: int) -> None:
        self.counters = Counters()
        self.packets: list[bytes] = []
        self._wide = wide

    def open(self) -> None: ...

    def close(self) -> None: ...

    def max_message_octets(self) -> int:
        return 1472 if len(self.packets) < self._wide else 548

    def take_templates_due(self) -> bool:
        return False

    def announces(self, domain: int | None) -> None: ...

    def send(self, batch: Batch) -> Sent:
        taken = min(batch.count, max(0, self._wide - len(self.packets))) if batch.message_octets > 548 else batch.count
        size = batch.message_octets
        self.packets += [bytes(batch.octets[number * size : (number + 1) * size]) for number in range(taken)]
        return Sent(taken, too_big=taken < batch.count)

    def status(self) -> dict[str, str | int]:
        return {"collector": "udp://192.0.2.1:2055"}


def test_a_path_that_narrows_gets_each_part_of_a_split_flow_exactly_once():
    columns = small_columns(100, seed=3)
    path = NarrowingPath(wide=2)
    CollectorSession(path, encoder(), refresh_ns=10**9).send(columns, 0, EXPORT_TIME_S)
    records = [record for packet in path.packets for record in records_of(packet)]
    assert {len(packet) for packet in path.packets[:2]} == {1464}
    assert max(len(packet) for packet in path.packets[2:]) == 24 + 10 * 48
    assert sum(record[5] for record in records) == int(columns["packets"].sum())
    assert sum(record[6] for record in records) == int(columns["octets"].sum())
    sequence = 0
    for packet in path.packets:
        assert HEADER.unpack_from(packet)[5] == sequence
        sequence += HEADER.unpack_from(packet)[1]


def test_a_session_counts_ipv6_flows_once_and_warns_once(caplog: pytest.LogCaptureFixture):
    session = CollectorSession(NarrowingPath(wide=0), encoder(), refresh_ns=10**9)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            session.send(random_columns(5, ip_version=6, seed=0), 0, EXPORT_TIME_S)
    assert session.status()["flows_not_representable"] == 15
    assert [record.getMessage() for record in caplog.records] == [
        "udp://192.0.2.1:2055: its protocol has no IPv6: such flows are counted and not sent"
    ]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 200),
    seed=st.integers(0, 2**32 - 1),
    max_message_octets=st.integers(72, 2000),
    sequence_number=st.integers(0, 2**32 - 1),
)
def test_what_is_encoded_is_read_again(rows: int, seed: int, max_message_octets: int, sequence_number: int):
    columns = small_columns(rows, seed=seed)
    meter = encoder(max_message_octets=max_message_octets, sequence_number=sequence_number)
    told = meter.as_records(columns)
    for name in ("octets", "packets"):
        assert int(told[name].sum()) == int(columns[name].sum())
    found = {}
    for burst in meter.encode(told, EXPORT_TIME_S):
        for part in burst.split(1):
            packet = bytes(part.octets)
            assert len(packet) <= min(max_message_octets, HEADER.size + RECORDS_MAX * RECORD.size)
            assert HEADER.unpack_from(packet)[5] == meter.sequence_number
            found.update(zip(part.rows.tolist(), records_of(packet)))
            meter.commit(part)
    assert meter.sequence_number == (sequence_number + len(told["packets"])) % 2**32
    for row, record in found.items():
        value = {name: column[row] for name, column in told.items()}
        assert [inet_ntoa(octets) for octets in record[:3]] == [
            ".".join(map(str, value[name])) for name in ("src_addr", "dst_addr", "next_hop")
        ]
        assert record[3:] == (
            *(index if index <= 0xFFFF else 0 for index in (value["ingress_ifindex"], value["egress_ifindex"])),
            value["packets"], value["octets"],
            *(int(value[name]) // 10**6 - INIT_MS for name in ("start_ns", "end_ns")),
            value["src_port"], value["dst_port"] or value["icmp_type_code"],
            0, value["tcp_flags"] & 0xFF, value["protocol"], value["tos"], 0, 0, 0, 0, 0,
        )  # fmt: skip
    assert sorted(found) == list(range(len(told["packets"])))


def test_the_sampling_interval_is_in_every_header():
    meter = encoder()
    meter.facts = meter.facts._replace(sampling_interval=16_383)
    packets = encoded(small_columns(31, seed=1), meter)
    assert {packet[22:24] for packet in packets} == {b"\x3f\xff"}
