# SPDX-License-Identifier: GPL-2.0-or-later
"""Field groups: what the packet path counts of a flow beyond the default fields, packet by packet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from group_meter import Meter
from lab import needs
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP, fragment
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q
from scapy.packet import Packet, Padding, Raw

from flowexp.kernel.groups import group_names
from flowexp.kernel.table import RING_OCTETS

pytestmark = pytest.mark.kernel

US, MS = 1_000, 1_000_000
GROUPS = ("sizes", "timing", "tcp", "congestion", "integrity", "application")


class Addresses(NamedTuple):
    client: Packet
    server: Packet


SIDES = {
    4: Addresses(IP(src="192.0.2.1", dst="198.51.100.1"), IP(src="198.51.100.1", dst="192.0.2.1")),
    6: Addresses(IPv6(src="2001:db8::1", dst="2001:db8::2"), IPv6(src="2001:db8::2", dst="2001:db8::1")),
}
IP_HEADER_OCTETS = {4: 20, 6: 40}


@pytest.fixture(scope="module")
def with_all_groups() -> Iterator[Meter]:
    needs.need(needs.bpf())
    made = Meter(GROUPS)
    yield made
    made.process.close()


@pytest.fixture
def meter(with_all_groups: Meter) -> Meter:
    """A table without a flow."""
    for _ in range(2):  # the second sweep frees what the first has retired
        with_all_groups.drain()
    return with_all_groups


def of_group(flow: dict[str, Any], group: str, *names: str) -> list[int]:
    return [flow[f"{group}_{name}"] for name in names]


def test_every_group_of_the_packet_path_is_tested_here(meter: Meter) -> None:
    elsewhere = "drops", "tunnels"  # test_drops.py, test_tunnels.py
    assert sorted(group_names(meter.process.table.layout)) == sorted([*GROUPS, *elsewhere])


def test_a_group_alone_keeps_nothing_of_the_others() -> None:
    needs.need(needs.bpf())
    for group in GROUPS:
        meter = Meter([group])
        meter.feed(SIDES[4].client / TCP(flags="S"))
        (flow,) = meter.drain()
        kept = {other for other in GROUPS for name in flow if name.startswith(f"{other}_") and name != "tcp_flags"}
        assert kept == {group}
        meter.process.close()


# Sizes


@pytest.mark.parametrize("version", [4, 6])
def test_each_packet_is_counted_in_the_class_of_its_ip_length(version: int, meter: Meter) -> None:
    lengths = [60, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 1514, 1515, 9000]
    for length in lengths:
        meter.feed(SIDES[version].client / UDP(sport=1, dport=2) / Raw(bytes(length - IP_HEADER_OCTETS[version] - 8)))
    (flow,) = meter.drain()
    assert flow["sizes_packets"] == [2, 2, 2, 2, 2, 2, 2]
    assert flow["sizes_octets_squared"] == sum(length**2 for length in lengths)
    assert flow["packets"] == len(lengths)


def test_fragments_are_counted_the_first_included(meter: Meter) -> None:
    for offset, more in ((0, 1), (64, 1), (128, 0)):
        ip = IP(src="192.0.2.1", dst="198.51.100.1", id=7, frag=offset, flags=more, proto=17)
        meter.feed(ip / Raw(bytes(UDP(sport=1, dport=2, len=8 + 1024)) + bytes(504) if offset == 0 else bytes(512)))
    (flow,) = meter.drain()
    assert (flow["sizes_fragments"], flow["packets"]) == (3, 3)


# Interim records carry differences


@pytest.mark.parametrize("version", [4, 6])
def test_an_interim_record_carries_what_came_since_the_one_before(version: int, meter: Meter) -> None:
    packet = SIDES[version].client / TCP(flags="A", window=0) / Raw(b"x" * 30)
    for _ in range(3):
        meter.feed(packet, after_ns=MS)
    (first,) = meter.interim()
    for _ in range(5):
        meter.feed(packet, after_ns=MS)
    (second,) = meter.interim()
    meter.feed(packet, after_ns=MS)
    (last,) = meter.drain()
    flows = [first, second, last]
    assert [flow["packets"] for flow in flows] == [3, 5, 1]
    assert [flow["tcp_zero_windows"] for flow in flows] == [3, 5, 1]
    assert [flow["tcp_zero_windows_total"] for flow in flows] == [3, 8, 9]
    assert [sum(flow["sizes_packets"]) for flow in flows] == [3, 5, 1]
    assert [flow["timing_gaps"] for flow in flows] == [2, 5, 1]


def test_a_slot_that_is_used_again_begins_at_zero(meter: Meter) -> None:
    for _ in range(3):
        meter.feed(SIDES[4].client / TCP(flags="S"), after_ns=MS)
        (flow,) = meter.drain()
        meter.drain()
        assert (flow["tcp_syn"], flow["timing_gaps"], flow["sizes_packets"]) == (1, 0, [1, 0, 0, 0, 0, 0, 0])


# Timing


def test_gaps_between_arrivals_and_their_jitter(meter: Meter) -> None:
    gaps = [1000, 1000, 5000, 200, 200, 10_000]
    meter.feed(SIDES[4].client / UDP())
    for gap in gaps:
        meter.feed(SIDES[4].client / UDP(), after_ns=gap)
    (flow,) = meter.drain()
    assert of_group(flow, "timing", "gaps", "gaps_ns", "max_gap_ns") == [len(gaps), sum(gaps), 10_000]
    jitter = 0
    for before, gap in zip(gaps, gaps[1:]):
        jitter += abs(gap - before) - (jitter >> 4)
    assert flow["timing_jitter_16ns"] == jitter


# TCP


def connect(meter: Meter, version: int, *, server_ns: int, client_ns: int, mss: int = 1460, scale: int = 7) -> None:
    """A handshake as it passes: the server is `server_ns` away, the client `client_ns`."""
    sides = SIDES[version]
    options = [("MSS", mss), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", scale)]
    meter.feed(sides.client / TCP(sport=40000, dport=80, flags="S", seq=100, window=64240, options=options))
    answer = TCP(sport=80, dport=40000, flags="SA", seq=900, ack=101, window=65160, options=[("MSS", 1400)])
    meter.feed(sides.server / answer, after_ns=server_ns)
    meter.feed(sides.client / TCP(sport=40000, dport=80, flags="A", seq=101, ack=901), after_ns=client_ns)


@pytest.mark.parametrize("version", [4, 6])
def test_a_handshake_tells_how_far_each_side_is_away(version: int, meter: Meter) -> None:
    connect(meter, version, server_ns=25 * MS, client_ns=3 * MS)
    client, server = meter.drain()
    assert (client["tcp_handshake_ns"], server["tcp_handshake_ns"]) == (3 * MS, 25 * MS)


def test_options_of_the_syn_are_kept(meter: Meter) -> None:
    connect(meter, 4, server_ns=MS, client_ns=MS, mss=1380, scale=0)
    client, server = meter.drain()
    assert of_group(client, "tcp", "mss", "window_scale", "first_window") == [1380, 1, 64240]
    assert of_group(server, "tcp", "mss", "window_scale", "first_window") == [1400, 0, 65160]


@pytest.mark.parametrize(("repeated", "times"), [("S", 1), ("S", 2), ("SA", 1), ("SA", 2)])
def test_a_handshake_with_a_segment_sent_again_tells_nothing_of_the_answer_to_it(
    repeated: str, times: int, meter: Meter
) -> None:
    sides = SIDES[4]
    syn = sides.client / TCP(sport=40000, dport=80, flags="S", seq=100)
    answer = sides.server / TCP(sport=80, dport=40000, flags="SA", seq=900, ack=101)
    meter.feed(syn)
    for _ in range(times if repeated == "S" else 0):
        meter.feed(syn, after_ns=1000 * MS)
    meter.feed(answer, after_ns=20 * MS)
    for _ in range(times if repeated == "SA" else 0):
        meter.feed(answer, after_ns=1000 * MS)
    meter.feed(sides.client / TCP(sport=40000, dport=80, flags="A", seq=101, ack=901), after_ns=5 * MS)
    client, server = meter.drain()
    answered = {"S": (5 * MS, 0), "SA": (0, 20 * MS)}
    assert (client["tcp_handshake_ns"], server["tcp_handshake_ns"]) == answered[repeated]


def send(meter: Meter, first: int, octets: int, *, after_ns: int = 0, flags: str = "PA") -> None:
    segment = TCP(sport=40000, dport=80, flags=flags, seq=first % 2**32)
    meter.feed(SIDES[4].client / segment / Raw(bytes(octets)), after_ns=after_ns)


COUNTS = ("retransmitted", "retransmitted_octets", "out_of_order", "out_of_order_octets")


@pytest.mark.parametrize("base", [1, 2**32 - 250])
class TestSegments:
    """Sequence Numbers from `base` on, over their end, too."""

    def test_in_order_nothing_is_counted(self, base: int, meter: Meter) -> None:
        for number in range(5):
            send(meter, base + 100 * number, 100)
        (flow,) = meter.drain()
        assert of_group(flow, "tcp", *COUNTS) == [0, 0, 0, 0]

    def test_what_was_seen_before_is_sent_again(self, base: int, meter: Meter) -> None:
        send(meter, base, 100)
        send(meter, base + 100, 100)
        send(meter, base, 100, after_ns=MS)
        send(meter, base + 100, 150, after_ns=200 * MS)
        send(meter, base + 250, 10)
        (flow,) = meter.drain()
        assert of_group(flow, "tcp", *COUNTS) == [2, 250, 0, 0]

    def test_a_gap_that_is_filled_at_once_was_reordering(self, base: int, meter: Meter) -> None:
        send(meter, base, 100)
        send(meter, base + 200, 100)
        send(meter, base + 100, 100, after_ns=100 * US)
        send(meter, base + 300, 100)
        (flow,) = meter.drain()
        assert of_group(flow, "tcp", *COUNTS) == [0, 0, 1, 100]

    def test_a_gap_that_is_filled_later_was_a_loss_before_us(self, base: int, meter: Meter) -> None:
        send(meter, base, 100)
        send(meter, base + 300, 100)
        send(meter, base + 100, 100, after_ns=30 * MS)
        send(meter, base + 200, 100, after_ns=MS)
        (flow,) = meter.drain()
        assert of_group(flow, "tcp", *COUNTS) == [2, 200, 0, 0]

    def test_a_keep_alive_is_not_sent_again(self, base: int, meter: Meter) -> None:
        send(meter, base, 100)
        send(meter, base + 99, 1, after_ns=1000 * MS, flags="A")
        (flow,) = meter.drain()
        assert of_group(flow, "tcp", *COUNTS) == [0, 0, 0, 0]

    def test_another_connection_with_the_same_ports_begins_anew(self, base: int, meter: Meter) -> None:
        for first in (base + 2**30, base, base + 2**29):
            for _ in range(2):  # a SYN that is sent again is no data
                send(meter, first, 0, flags="S")
            send(meter, first + 1, 100)
            send(meter, first + 101, 100)
            send(meter, first + 201, 0, flags="R")
        (flow,) = meter.drain()
        assert of_group(flow, "tcp", *COUNTS) == [0, 0, 0, 0]

    def test_syn_and_fin_take_a_number_each(self, base: int, meter: Meter) -> None:
        send(meter, base, 0, flags="S")
        send(meter, base + 1, 100)
        send(meter, base + 101, 0, flags="FA")
        send(meter, base + 102, 0, flags="A")
        (flow,) = meter.drain()
        assert of_group(flow, "tcp", *COUNTS) == [0, 0, 0, 0]
        assert of_group(flow, "tcp", "syn", "fin", "rst") == [1, 1, 0]


# Congestion


def test_ecn_fields_and_flags_are_counted(meter: Meter) -> None:
    tos_and_flags = [(0, "SEC"), (2, "A"), (2, "AE"), (1, "AC"), (3, "A"), (3, "AEC"), (0x2A, "A"), (0, "A")]
    for tos, flags in tos_and_flags:
        meter.feed(IP(src="192.0.2.1", dst="198.51.100.1", tos=tos) / TCP(flags=flags))
    (flow,) = meter.drain()
    assert of_group(flow, "congestion", "ect0", "ect1", "ce", "ece", "cwr", "dscp_changes") == [3, 1, 2, 2, 2, 1]


# Integrity


def test_a_header_checksum_that_is_wrong_is_counted(meter: Meter) -> None:
    good, options = IP(src="192.0.2.1", dst="198.51.100.1"), [IPOption_NOP()] * 4
    for ip in (good, IP(src="192.0.2.1", dst="198.51.100.1", options=options), good.copy()):
        meter.feed(ip / UDP())
    meter.feed(IP(src="192.0.2.1", dst="198.51.100.1", chksum=0x1234) / UDP())
    meter.feed(IP(src="192.0.2.1", dst="198.51.100.1", options=options, chksum=0x1234) / UDP())
    (flow,) = meter.drain()
    assert (flow["integrity_bad_checksum"], flow["packets"]) == (2, 5)


@pytest.mark.parametrize("version", [4, 6])
def test_lengths_that_contradict_each_other_are_counted(version: int, meter: Meter) -> None:
    client = SIDES[version].client
    for layer in (UDP(len=8 + 10) / Raw(bytes(10)), UDP(len=8 + 11) / Raw(bytes(10)), UDP(len=7) / Raw(bytes(10))):
        meter.feed(client / layer)
    meter.feed(client / TCP(sport=1, dataofs=5))
    meter.feed(client / TCP(sport=1, dataofs=6))
    meter.feed(client / TCP(sport=1, dataofs=4))
    counts = {flow["protocol"]: (flow["integrity_bad_length"], flow["packets"]) for flow in meter.drain()}
    assert counts == {17: (2, 3), 6: (2, 3)}


def test_a_packet_that_ends_here_and_one_from_itself_to_itself_are_counted(meter: Meter) -> None:
    for ttl in (2, 1, 0):
        meter.feed(IP(src="192.0.2.1", dst="192.0.2.1", ttl=ttl) / UDP(sport=7, dport=7))
    meter.feed(IPv6(src="2001:db8::1", dst="2001:db8::1", hlim=1) / UDP(sport=7, dport=7))
    flows = meter.drain()
    assert [of_group(flow, "integrity", "expiring", "land") for flow in flows] == [[1, 1], [2, 3]]


def test_flags_that_no_stack_sends_together_are_counted(meter: Meter) -> None:
    possible, impossible = ("S", "SA", "A", "FA", "R", "RA"), ("", "SF", "SR", "F", "FPU")
    for flags in possible + impossible:
        meter.feed(SIDES[4].client / TCP(flags=flags))
        (flow,) = meter.drain()
        assert flow["integrity_impossible_flags"] == (flags in impossible), flags


# Layer 2: of the default path


def test_priorities_of_both_tags_are_kept() -> None:
    needs.need(needs.bpf())
    meter = Meter([])
    for prio, dei in ((5, 0), (0, 1)):
        meter.feed(Dot1Q(vlan=9, prio=prio, dei=dei) / Dot1Q(vlan=8, prio=7, dei=0) / SIDES[4].client / UDP(sport=prio))
    flows = sorted(meter.drain(), key=lambda flow: int(flow["src_port"]))
    assert [flow["priorities"] for flow in flows] == [0x1E, 0xAE]
    meter.process.close()


def name_of(flow: dict[str, Any]) -> tuple[str, bytes]:
    """applicationId, and the name that was asked for."""
    return bytes(flow["application_id"]).hex(), bytes(flow["application_server_name"]).rstrip(b"\0")


def request(host: str, octets: int = 0) -> Raw:
    return Raw(f"GET /{'x' * octets} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())


HTTP, SSH, NOT_KNOWN = "06000003", "06000006", "00000000"


@pytest.mark.parametrize("version", [4, 6])
def test_a_flow_is_named_by_its_first_payload_alone(meter: Meter, version: int) -> None:
    segment = SIDES[version].client / TCP(sport=40000, dport=50000, flags="A")
    for payload in (None, request("first.example"), request("second.example"), Raw(b"SSH-2.0-x\r\n")):
        meter.feed(segment / payload if payload else segment / Padding(bytes(6)))
    (flow,) = meter.interim()
    assert name_of(flow) == (HTTP, b"first.example")
    meter.feed(segment / request("third.example"))
    (flow,) = meter.drain()
    assert name_of(flow) == (HTTP, b"first.example")
    meter.drain()
    meter.feed(segment / Raw(b"SSH-2.0-x\r\n"))  # another flow, perhaps in the same slot
    (flow,) = meter.drain()
    assert name_of(flow) == (SSH, b"")


@pytest.mark.parametrize("octets", [960, 984, 1000, 1400, 1950])
def test_a_name_is_found_as_far_as_a_payload_is_copied(meter: Meter, octets: int) -> None:
    """On either side of the length from where more room is reserved, and up to what a replayed frame holds."""
    meter.feed(SIDES[4].client / TCP(sport=1, dport=2, flags="PA") / request("www.example", octets))
    (flow,) = meter.drain()
    assert name_of(flow) == (HTTP, b"www.example")


def test_what_is_no_payload_of_the_transport_names_nothing(meter: Meter) -> None:
    datagram = SIDES[4].client / UDP(sport=40000, dport=50000) / Raw(b"z" * 1480 + bytes(request("www.example")))
    for part in fragment(datagram, 1480):
        meter.feed(part)
    meter.feed(IP(src="192.0.2.2", dst="198.51.100.1", proto=50) / Raw(bytes(request("www.example"))))
    assert [name_of(flow) for flow in meter.drain()] == [(NOT_KNOWN, b"")] * 2


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("over", [UDP, TCP], ids=["udp", "tcp"])
def test_a_dns_answer_has_the_time_since_its_query(meter: Meter, version: int, over: type[Packet]) -> None:
    sides = SIDES[version]
    there, back = sides.client / over(sport=40000, dport=53), sides.server / over(sport=53, dport=40000)
    question = DNSQR(qname="www.example.org")
    meter.feed(there / DNS(id=7, rd=1, qd=question))
    meter.feed(there / DNS(id=8, rd=1, qd=question), after_ns=1_000_000)
    meter.feed(back / DNS(id=7, qr=1, qd=question), after_ns=2_345_678)
    meter.feed(back / DNS(id=8, qr=1, qd=question), after_ns=1_000_000)
    took_us = {flow["src_port"]: flow["application_dns_response_us"] for flow in meter.drain()}
    assert took_us == {40000: 0, 53: 3345}


def test_a_dns_answer_before_its_query_in_the_ring_has_its_time(meter: Meter) -> None:
    """As two CPUs may have it; the time stands in the record."""
    question = DNSQR(qname="www.example.org")
    meter.feed(SIDES[4].server / UDP(sport=53, dport=40000) / DNS(id=7, qr=1, qd=question))
    meter.feed(SIDES[4].client / UDP(sport=40000, dport=53) / DNS(id=7, rd=1, qd=question), after_ns=-5_000_000)
    took_us = {flow["src_port"]: flow["application_dns_response_us"] for flow in meter.drain()}
    assert took_us == {40000: 0, 53: 5000}


def test_payloads_that_find_no_room_are_counted_and_all_else_goes_on() -> None:
    needs.need(needs.bpf())
    flows = 4200
    meter = Meter(["application"], max_flows=flows)
    record_octets = 8 + meter.process.table.layout.structs["payload"].itemsize + 2048
    try:
        for number in range(flows):
            ip = IP(src=f"10.0.{number >> 8}.{number & 255}", dst="198.51.100.1")
            meter.feed(ip / TCP(sport=1, dport=2, flags="PA") / request("www.example", 1100))
        named = RING_OCTETS // record_octets
        assert meter.process.table.counters()["payloads_lost"][0] == flows - named
        found = [name_of(flow) for flow in meter.drain()]
        assert found == [(HTTP, b"www.example")] * named + [(NOT_KNOWN, b"")] * (flows - named)
        assert meter.process.ledger().missing() == (0, 0)
        meter.drain()
        meter.feed(IP(src="10.1.0.1", dst="198.51.100.1") / TCP(sport=1, dport=2, flags="PA") / request("www.example"))
        assert [name_of(flow) for flow in meter.drain()] == [(HTTP, b"www.example")]
    finally:
        meter.process.close()
