# SPDX-License-Identifier: GPL-2.0-or-later
"""`dump --read` and the packet path behind it: every header stack comes out as others see it.

The others are tests/reference.py, tshark, and scapy, which sees what it has built itself.
"""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

import captures
import in_process
import pytest
import reference
import stacks
import tshark
from captures import Packet
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import needs
from lab.flowexp import COMMAND, read_ledger_line
from lab.process import environment
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6Unknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet as Layer
from scapy.packet import Raw
from scapy.utils import wrpcap

from flowexp.kernel.replay import CapturedPacket

pytestmark = pytest.mark.kernel

START_NS = 1_700_000_000_000_000_000
STEP_NS = 1_234_567
MS_NS = 1_000_000
MAX_IP_OCTETS = 65_535


@pytest.fixture(autouse=True)
def bpf() -> None:
    needs.need(needs.bpf(), needs.exporter())


# In this process, a stack at a time


class Pair:
    """The packet path and the reference, fed with the same packets."""

    def __init__(self) -> None:
        self._meter = in_process.Meter("replay")
        self._replay = self._meter.replay()
        self._reference = reference.Meter()

    def feed(self, frame: bytes, *, wire_octets: int) -> None:
        self._replay.feed(frame, time_ns=START_NS, wire_octets=wire_octets)
        self._reference.feed(frame, time_ns=START_NS, wire_octets=wire_octets)

    def feed_all(self, frames: Sequence[bytes]) -> None:
        """Whole frames, all at once."""
        self._replay.feed_all([CapturedPacket(START_NS, frame, len(frame), 0) for frame in frames])
        for frame in frames:
            self._reference.feed(frame, time_ns=START_NS, wire_octets=len(frame))

    def compare(self) -> reference.Books:
        """What both say of all since this was asked last."""
        expected = self._reference.take()
        assert in_process.differences(expected, self._meter.take()) == []
        return expected


@pytest.fixture(scope="module")
def pair() -> Pair:
    needs.need(needs.bpf())
    return Pair()


@pytest.mark.parametrize("name", stacks.METERED)
def test_a_stack_is_metered_as_the_reference_says(name: str, pair: Pair) -> None:
    frames = stacks.METERED[name]
    for frame in frames:
        pair.feed(frame, wire_octets=len(frame))
    books = pair.compare()
    assert not books.not_metered
    assert books.seen.packets == len(frames)


@pytest.mark.parametrize(
    ("reason", "name"), [(reason, name) for reason, named in stacks.NOT_METERED.items() for name in named]
)
def test_what_is_no_whole_ip_header_is_counted_under_its_reason(reason: str, name: str, pair: Pair) -> None:
    frames = stacks.NOT_METERED[reason][name]
    for frame in frames:
        pair.feed(frame, wire_octets=len(frame))
    expected = {reason: reference.Count(len(frames), sum(len(frame) for frame in frames))}
    assert pair.compare() == reference.Books({}, expected)


def test_a_stack_that_was_cut_at_any_octet_is_metered_by_what_is_left(pair: Pair) -> None:
    for frames in stacks.METERED.values():
        frame = frames[0]
        for cut in range(min(len(frame), 400)):
            pair.feed(frame[:cut], wire_octets=len(frame))
        pair.compare()


def test_a_cut_packet_counts_by_its_ip_length_if_its_ip_header_is_there(pair: Pair) -> None:
    for version, frame in ((4, stacks.METERED["Ethernet II"][0]), (6, stacks.METERED["IPv6"][0])):
        pair.feed(frame[: {4: 34, 6: 54}[version]], wire_octets=len(frame))
        ((key, flow),) = pair.compare().flows.items()
        assert (key.src_port, key.dst_port, flow.tcp_flags) == (0, 0, 0)
        assert (flow.packets, flow.octets) == (1, len(frame) - 14)


@pytest.mark.parametrize("octets", [3_699, 3_700, 3_701, 9_000, MAX_IP_OCTETS])
def test_a_packet_longer_than_the_kernel_takes_counts_by_its_ip_length(octets: int, pair: Pair) -> None:
    payload = bytes(octets - 40)
    frame = bytes(stacks.Host(0).ipv4() / TCP(sport=40_000, dport=443, flags="PA") / Raw(payload))
    pair.feed(frame, wire_octets=len(frame))
    ((key, flow),) = pair.compare().flows.items()
    assert (key.src_port, flow.packets, flow.octets, flow.tcp_flags) == (40_000, 1, octets, 0x18)


def test_frames_by_the_thousand_are_metered_one_by_one_whatever_signals_come_between(pair: Pair) -> None:
    some = [stacks.METERED["Ethernet II"][0], stacks.METERED["IPv6"][0], bytes(13), b"", stacks.METERED["IPv6"][0][:53]]
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        pair.feed_all(some * 20_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    books = pair.compare()
    assert books.seen.packets == len(some) * 20_000
    assert [flow.packets for flow in books.flows.values()] == [20_000, 20_000]


def big_tcp(version: int) -> bytes:
    """The first octets of a packet of more than 65,535, as a host's own capture has it: with length 0."""
    host = stacks.Host(0)
    ip = host.ipv4(len=0) if version == 4 else host.ipv6(plen=0)
    return bytes(ip / TCP(sport=40_000, dport=443)) + bytes(100)


@pytest.mark.parametrize("version", [4, 6])
def test_a_packet_of_more_than_65535_octets_counts_by_its_length_on_the_wire(version: int, pair: Pair) -> None:
    pair.feed(big_tcp(version), wire_octets=14 + 150_000)
    ((key, flow),) = pair.compare().flows.items()
    assert (key.src_port, flow.packets, flow.octets) == (40_000, 1, 150_000)


def test_times_out_of_order_leave_the_last_where_it_was() -> None:
    meter, frame = in_process.Meter("replay"), stacks.METERED["Ethernet II"][0]
    for time_ns in (START_NS + 5, START_NS + 9, START_NS + 7):
        meter.replay().feed(frame, time_ns=time_ns, wire_octets=len(frame))
    (flow,) = meter.take().flows.values()
    assert (flow.first_ns, flow.last_ns) == (START_NS + 5, START_NS + 9)


# Random stacks, by hypothesis: scapy builds the frame, and what it built it from is what must be seen

PORTS = st.sampled_from([0, 53, 443, 40_000, 65_535])
OCTET = st.sampled_from([0, 1, 0x2E, 0xFF])
NEXT_HEADER = {IPv6ExtHdrHopByHop: 0, IPv6ExtHdrRouting: 43, IPv6ExtHdrFragment: 44, AH: 51, IPv6ExtHdrDestOpt: 60}


class Transport(NamedTuple):
    """A transport header (or what takes its place), and what must be seen of it."""

    layer: Layer
    protocol: int
    ports: tuple[int, int] = (0, 0)
    icmp_type_code: int = 0
    tcp_flags: int = 0


class Network(NamedTuple):
    """An IP header and what follows it up to the transport header."""

    headers: list[Layer]
    addresses: tuple[str, str]
    tos: int
    ttl: int
    flow_label: int = 0


def transports(icmp: Callable[..., Layer], icmp_protocol: int, others: list[int]) -> st.SearchStrategy[Transport]:
    def tcp(ports: tuple[int, int], flags: int) -> Transport:
        return Transport(TCP(sport=ports[0], dport=ports[1], flags=flags), 6, ports, 0, flags)

    def with_ports(made: tuple[int, Callable[..., Layer]], ports: tuple[int, int]) -> Transport:
        return Transport(made[1](sport=ports[0], dport=ports[1]), made[0], ports)

    def message(kind: int, code: int) -> Transport:
        return Transport(icmp(type=kind, code=code), icmp_protocol, (0, 0), kind << 8 | code)

    ports = st.tuples(PORTS, PORTS)
    return st.one_of(
        st.builds(tcp, ports, st.integers(0, 511)),
        st.builds(with_ports, st.sampled_from([(17, UDP), (132, SCTP), (136, UDP)]), ports),
        st.builds(message, OCTET, OCTET),
        st.builds(lambda octets, protocol: Transport(Raw(octets), protocol), st.binary(), st.sampled_from(others)),
    )


def ipv4_networks() -> st.SearchStrategy[Network]:
    def network(options: int, addresses: tuple[str, str], tos: int, ttl: int, **fields: Any) -> Network:
        src, dst = addresses
        header = IP(src=src, dst=dst, tos=tos, ttl=ttl, options=[IPOption_NOP()] * 4 * options, **fields)
        return Network([header], addresses, tos, ttl)

    addresses = st.tuples(st.sampled_from(["10.0.0.1", "10.0.0.2"]), st.sampled_from(["10.0.1.1", "255.255.255.255"]))
    flags, offset = st.sampled_from([0, 0, 1, 2, 3, 7]), st.sampled_from([0, 0, 0, 1, 8191])
    return st.builds(
        network, st.integers(0, 10), addresses, OCTET, OCTET, id=st.integers(0, 3), flags=flags, frag=offset
    )


def extension_headers() -> st.SearchStrategy[Layer]:
    more, offset = st.integers(0, 1), st.sampled_from([0, 0, 0, 3])
    return st.one_of(
        st.builds(IPv6ExtHdrHopByHop),
        st.builds(IPv6ExtHdrDestOpt),
        st.builds(lambda n: IPv6ExtHdrRouting(addresses=["fd00::9"] * n), st.integers(0, 3)),
        st.builds(lambda n: AH(spi=1, icv=bytes(4 * n), payloadlen=1 + n), st.integers(0, 5)),
        st.builds(IPv6ExtHdrFragment, id=st.integers(0, 3), m=more, offset=offset),
    )


def ipv6_networks() -> st.SearchStrategy[Network]:
    def network(addresses: tuple[str, str], tos: int, ttl: int, label: int, headers: list[Layer]) -> Network:
        src, dst = addresses
        return Network([IPv6(src=src, dst=dst, tc=tos, hlim=ttl, fl=label), *headers], addresses, tos, ttl, label)

    addresses = st.tuples(st.sampled_from(["fd00::1", "fd00::2"]), st.sampled_from(["fd00::3", "ff02::fb"]))
    headers = st.lists(extension_headers(), max_size=10)
    return st.builds(network, addresses, OCTET, OCTET, st.sampled_from([0, 0xFFFFF]), headers)


def links() -> st.SearchStrategy[list[Layer]]:
    def tag(kind: Callable[..., Layer], vlan: int, priority: int) -> Layer:
        return kind(vlan=vlan, prio=priority)

    return st.lists(
        st.builds(tag, st.sampled_from([Dot1Q, Dot1AD]), st.integers(0, 4095), st.integers(0, 7)), max_size=4
    )


class Built(NamedTuple):
    frame: bytes
    seen: tuple[Any, ...]  # as `as_the_reference_sees_it`


def built(tags: list[Layer], network: Network, transport: Transport, payload: bytes, padding: bytes) -> Built:
    header, *extensions = (layer.copy() for layer in network.headers)
    header_numbers = [*(NEXT_HEADER[type(layer)] for layer in extensions), transport.protocol]
    for layer, number in zip([header, *extensions], header_numbers):
        layer.setfieldval("proto" if isinstance(layer, IP) else "nh", number)
    packet = header
    for layer in extensions:
        packet = packet / layer
    ip = bytes(packet / transport.layer / Raw(payload))
    link = Ether(src=stacks.SRC_MAC, dst=stacks.DST_MAC)
    for layer in tags:
        link = link / layer.copy()
    addresses = [ipaddress.ip_address(address).packed for address in network.addresses]
    vlan = tags[0].vlan | reference.TAGGED if tags else 0
    protocol, ports, type_code, flags = transport[1:]
    if isinstance(header, IP) and header.frag:
        ports, type_code, flags = (0, 0), 0, 0
    for layer, number in zip(extensions, header_numbers[1:]):
        if isinstance(layer, IPv6ExtHdrFragment) and layer.offset:
            protocol, ports, type_code, flags = number, (0, 0), 0, 0
            break
    link.lastlayer().type = 0x0800 if isinstance(header, IP) else 0x86DD
    seen = (*addresses, protocol, *ports, type_code, vlan, len(ip), flags, *network[2:])
    return Built(bytes(link) + ip + padding, seen)


PADDING = st.binary(max_size=8)
BUILT = st.one_of(
    st.builds(built, links(), ipv4_networks(), transports(ICMP, 1, [4, 47, 50, 51, 58, 253]), PADDING, PADDING),
    st.builds(built, links(), ipv6_networks(), transports(ICMPv6Unknown, 58, [1, 41, 50, 59, 253]), PADDING, PADDING),
)


def as_the_reference_sees_it(frame: bytes) -> tuple[Any, ...]:
    """Addresses, protocol, ports, ICMP type and code, tag, octets, TCP flags, ToS, TTL, flow label."""
    packet = reference.dissect(frame, len(frame))
    assert isinstance(packet, reference.Packet), packet
    return (*packet.key[:7], packet.octets, packet.tcp_flags, packet.tos, packet.ttl, packet.flow_label)


@settings(max_examples=200, deadline=None)
@given(st.lists(BUILT, min_size=1, max_size=20))
def test_random_stacks_are_metered_as_scapy_has_built_them(pair: Pair, sent: list[Built]) -> None:
    for frame, seen in sent:
        assert as_the_reference_sees_it(frame) == seen
    for frame, _ in sent:
        pair.feed(frame, wire_octets=len(frame))
    assert pair.compare().seen.packets == len(sent)


# The command


class Record(NamedTuple):
    """A flow as the JSON has it: from `first_ms` on in milliseconds, else as reference.Flow has it."""

    packets: int
    octets: int
    tcp_flags: int
    min_length: int
    max_length: int
    min_ttl: int
    max_ttl: int
    first_ms: int
    last_ms: int
    fragment_flags: int
    tos: int
    flow_label: int
    inner_vlan: int
    src_mac: bytes
    dst_mac: bytes


class Dump:
    """What `flowexp dump --read` made of a capture; its ledger has to close."""

    def __init__(self, path: Path, content: bytes, *, status: int = 0) -> None:
        path.write_bytes(content)
        done = subprocess.run(
            [COMMAND, "dump", "--read", path, "--format", "json"],
            capture_output=True,
            check=False,
            text=True,
            timeout=120,
            env=environment(),
        )
        assert done.returncode == status, done.stderr
        self.log = done.stderr
        self.records: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
        self.ledger = read_ledger_line(done.stderr)
        assert self.ledger.closes, self.log

    @property
    def flows(self) -> dict[reference.Key, Record]:
        """One record a flow: nothing may have expired."""
        flows = dict(map(_flow, self.records))
        assert len(flows) == len(self.records)
        return flows


def _flow(record: dict[str, Any]) -> tuple[reference.Key, Record]:
    version = record["ipVersion"]
    src, dst = (
        ipaddress.ip_address(record[f"{which}IPv{version}Address"]).packed for which in ("source", "destination")
    )
    vlan, inner = (
        reference.TAGGED | record[name] if name in record else 0 for name in ("vlanId", "dot1qCustomerVlanId")
    )
    key = reference.Key(
        src, dst, record["protocolIdentifier"], record["sourceTransportPort"], record["destinationTransportPort"],
        record[f"icmpTypeCodeIPv{version}"], vlan, record["ingressInterface"],
    )  # fmt: skip
    assert (record["flowDirection"], record["egressInterface"]) == (0, 0)
    macs = (bytes.fromhex(record[name].replace(":", "")) for name in ("sourceMacAddress", "destinationMacAddress"))
    return key, Record(
        record["packetDeltaCount"], record["octetDeltaCount"], record["tcpControlBits"],
        record["minimumIpTotalLength"], record["maximumIpTotalLength"], record["minimumTTL"], record["maximumTTL"],
        record["flowStartMilliseconds"], record["flowEndMilliseconds"], record["fragmentFlags"],
        record["ipClassOfService"], record.get("flowLabelIPv6", 0), inner, *macs,
    )  # fmt: skip


def expected(packets: Iterable[tuple[Packet, int]]) -> dict[reference.Key, Record]:
    """What the reference makes of packets, each with its interface."""
    meter = reference.Meter()
    for packet, interface in packets:
        meter.feed(packet.data, time_ns=packet.time_ns, wire_octets=packet.length, interface=interface)
    return {
        key: Record(*flow[:7], flow.first_ns // MS_NS, flow.last_ns // MS_NS, flow.fragment_flags, *flow[11:])
        for key, flow in meter.take().flows.items()
    }


def one_after_the_other(some: Iterable[bytes]) -> list[Packet]:
    return [Packet(frame, START_NS + n * STEP_NS) for n, frame in enumerate(some)]


def all_frames(named: dict[str, tuple[bytes, ...]]) -> Iterator[bytes]:
    for each in named.values():
        yield from each


def test_a_capture_of_all_stacks_is_dumped_as_the_reference_counts_it(tmp_path: Path) -> None:
    packets = one_after_the_other(all_frames(stacks.EVERYTHING))
    dump = Dump(tmp_path / "all.pcap", captures.pcap(packets))
    assert dump.flows == expected((packet, 0) for packet in packets)
    reasons = {
        reason.replace("_", " "): sum(1 for _ in all_frames(named)) for reason, named in stacks.NOT_METERED.items()
    }
    assert dump.ledger.not_metered == reasons
    assert dump.ledger.seen == len(packets)


# Of a header that the packet's end cuts off tshark shows nothing, and no header behind a mobility header.
NOT_FOR_TSHARK = {
    "ICMP with type and code alone",
    "TCP with its first 14 octets",
    "TCP, data offset 0",
    "every extension header",
    "mobility header before UDP",
    "IPv6 fragments with options inside",
}


def test_a_capture_of_all_stacks_is_dumped_as_tshark_counts_it(tmp_path: Path) -> None:
    needs.need(needs.tools("tshark"))
    catalogue = {name: builder for name, builder in stacks.IP_STACKS.items() if name not in NOT_FOR_TSHARK}
    packets = one_after_the_other(all_frames(stacks.build_all(catalogue)))
    dump = Dump(tmp_path / "all.pcap", captures.pcap(packets))
    got = {
        tshark.Key(
            *(str(ipaddress.ip_address(address)) for address in key[:2]), *key[2:6], key.vlan - reference.TAGGED
            if key.vlan else -1,
        ): tshark.Flow(flow.packets, flow.octets, flow.tcp_flags, flow.first_ms, flow.last_ms)
        for key, flow in dump.flows.items()
    }  # fmt: skip
    assert got == tshark.count(tmp_path / "all.pcap")


@pytest.mark.parametrize("snap_octets", [40, 68, 96])
def test_a_capture_cut_by_its_snap_length_is_counted_by_ip_lengths(snap_octets: int, tmp_path: Path) -> None:
    whole = one_after_the_other(all_frames(stacks.METERED))
    cut = [Packet(data[:snap_octets], time_ns, len(data)) for data, time_ns, _ in whole]
    dump = Dump(tmp_path / "cut.pcap", captures.pcap(cut))
    assert dump.flows == expected((packet, 0) for packet in cut)
    if snap_octets == 96:  # no stack has its IP header behind that
        octets = sum(flow.octets for flow in expected((packet, 0) for packet in whole).values())
        assert sum(flow.octets for flow in dump.flows.values()) == octets


def test_long_and_short_packets_leave_the_ledger_closed(tmp_path: Path) -> None:
    host = stacks.Host(1)
    lengths = [1, 13, 14, 15, 33, 34, 3_713, 3_714, 9_014, 14 + MAX_IP_OCTETS]
    frame = bytes(host.ipv4() / UDP(sport=1, dport=2) / Raw(bytes(MAX_IP_OCTETS - 28)))
    packets = one_after_the_other([frame[:octets] for octets in lengths])
    dump = Dump(tmp_path / "lengths.pcap", captures.pcap(packets))
    assert dump.ledger.seen == len(lengths)
    assert dump.ledger.not_metered == {"truncated": 5}
    assert sorted(flow.packets for flow in dump.flows.values()) == [1, 4]
    assert sum(flow.octets for flow in dump.flows.values()) == 5 * MAX_IP_OCTETS


COOKED, COOKED_2 = b"\0\0\0\1\0\6\2\0\0\0\0\x0a\0\0", b"\0\0\0\0\0\7\0\1\0\6\2\0\0\0\0\x0a\0\0"
ETHERTYPE = {4: b"\x08\0", 6: b"\x86\xdd"}
LINK_TYPES = {
    "raw IP": (101, {4: b"", 6: b""}),
    "Linux cooked": (113, {v: COOKED + ETHERTYPE[v] for v in (4, 6)}),
    "Linux cooked 2": (276, {v: ETHERTYPE[v] + COOKED_2 for v in (4, 6)}),
    "loopback": (0, {4: b"\2\0\0\0", 6: b"\x0a\0\0\0"}),
    "OpenBSD loopback": (108, {4: b"\0\0\0\2", 6: b"\0\0\0\x18"}),
    "PPP": (9, {4: b"\0\x21", 6: b"\0\x57"}),
    "PPP in HDLC framing": (50, {4: b"\xff\3\0\x21", 6: b"\xff\3\0\x57"}),
}


@pytest.mark.parametrize("name", LINK_TYPES)
def test_a_capture_of_another_link_type_has_the_same_flows(name: str, tmp_path: Path) -> None:
    link_type, header = LINK_TYPES[name]
    source = bytes.fromhex(stacks.SRC_MAC.replace(":", "")) if name.startswith("Linux cooked") else bytes(6)
    ethernet, other = [], []
    for each in stacks.METERED.values():
        frame = each[0]
        if frame[12:14] in ETHERTYPE.values() and frame[14] >> 4 in ETHERTYPE:
            ethernet.append(bytes(6) + source + frame[12:])
            other.append(header[frame[14] >> 4] + frame[14:])
    dump = Dump(tmp_path / "other.pcap", captures.pcap(one_after_the_other(other), link_type=link_type))
    assert dump.flows == expected((packet, 0) for packet in one_after_the_other(ethernet))
    assert len(dump.flows) > 80


def test_tags_behind_a_cooked_header_are_read(tmp_path: Path) -> None:
    tagged = b"\0\x64" + ETHERTYPE[4] + bytes(stacks.Host(0).bare_ipv4() / stacks.udp())
    packets = one_after_the_other([COOKED + b"\x81\0" + tagged])
    ((key, _),) = Dump(tmp_path / "tag.pcap", captures.pcap(packets, link_type=113)).flows.items()
    assert (key.vlan, key.src_port) == (reference.TAGGED | 100, 40_000)


def test_a_pcapng_interface_is_an_observation_point_of_its_own(tmp_path: Path) -> None:
    frame = stacks.METERED["Ethernet II"][0]
    packets = [(packet, number % 2) for number, packet in enumerate(one_after_the_other([frame] * 5))]
    blocks = [captures.section(), captures.interface(), captures.interface()]
    blocks += [captures.enhanced(packet, number=number) for packet, number in packets]
    dump = Dump(tmp_path / "two.pcapng", b"".join(blocks))
    assert dump.flows == expected((packet, number + 1) for packet, number in packets)
    assert {key.interface: flow.packets for key, flow in dump.flows.items()} == {1: 3, 2: 2}


def test_successive_records_of_a_long_flow_do_not_overlap_on_the_captures_clock(tmp_path: Path) -> None:
    second_ns = 1000 * MS_NS
    frame = stacks.METERED["Ethernet II"][0]
    dump = Dump(tmp_path / "long.pcap", captures.pcap([Packet(frame, START_NS + n * second_ns) for n in range(151)]))
    times = [(record["flowStartMilliseconds"], record["flowEndMilliseconds"]) for record in dump.records]
    assert times[0][0] == START_NS // MS_NS
    assert [start for start, _ in times[1:]] == [end for _, end in times[:-1]]
    assert times[-1][1] == START_NS // MS_NS + 150_000
    assert all(59_000 <= end - start <= 61_000 for start, end in times[:-1])
    assert [record["flowEndReason"] for record in dump.records] == [2, 2, 4]
    assert sum(record["packetDeltaCount"] for record in dump.records) == 151


def test_an_idle_flow_ends_on_the_captures_clock(tmp_path: Path) -> None:
    frame = stacks.METERED["Ethernet II"][0]
    times_s = (0, 1, 20, 21)
    dump = Dump(tmp_path / "idle.pcap", captures.pcap([Packet(frame, START_NS + s * 1000 * MS_NS) for s in times_s]))
    seen = [
        (record["flowStartMilliseconds"] - START_NS // MS_NS, record["packetDeltaCount"], record["flowEndReason"])
        for record in dump.records
    ]
    assert seen == [(0, 3, 1), (21_000, 1, 4)] or seen == [(0, 2, 1), (20_000, 2, 4)]


def test_a_damaged_capture_is_dumped_up_to_the_damage(tmp_path: Path) -> None:
    packets = one_after_the_other([stacks.METERED["Ethernet II"][0]] * 3)
    path = tmp_path / "cut.pcap"
    dump = Dump(path, captures.pcap(packets)[:-1], status=1)
    assert dump.log.endswith(f"flowexp: {path}: cut off after 2 packets: the file ends within a record\n")
    assert dump.ledger.exported == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a capture", "not a pcap or pcapng capture"),
        (captures.pcap([Packet(b"")], link_type=127), "link type 127 (IEEE802_11_RADIO)"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "refused"
    path.write_bytes(content)
    command: list[Union[str, Path]] = [COMMAND, "dump", "--read", path, "--format", "json"]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"flowexp: {path}: {message}")
    assert done.stderr.count("\n") == 1


# IPFIX where there is no -o


def test_ipfix_goes_to_standard_output_as_to_a_file_but_not_to_a_terminal(tmp_path: Path) -> None:
    capture, file = tmp_path / "one.pcap", tmp_path / "one.ipfix"
    wrpcap(str(capture), [Ether() / IP(src="192.0.2.1", dst="192.0.2.2") / UDP(sport=1, dport=2)])
    command = [str(COMMAND), "dump", "--read", str(capture), "--format", "ipfix"]
    subprocess.run([*command, "-o", str(file)], check=True, timeout=60)
    for dash in ([], ["-o", "-"]):
        piped = subprocess.run([*command, *dash], check=True, stdout=subprocess.PIPE, timeout=60).stdout
        assert (len(piped), piped[:4]) == (file.stat().st_size, file.read_bytes()[:4])
    terminal, end = os.openpty()
    try:
        refused = subprocess.run(command, stdout=end, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(end)
        os.close(terminal)
    assert refused.returncode == 2
    assert refused.stderr == "flowexp: --format ipfix is binary; name a file for it with -o FILE\n"
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert closed.returncode == 1
    assert closed.stderr.endswith("flowexp: standard output: cannot be written: Bad file descriptor\n")
