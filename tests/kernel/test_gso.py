# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts are true on the wire: super-packets of GSO, GRO, guests and BIG TCP count as their segments.

The other side of each comparison is the sender's own stack (OutSegs + RetransSegs), the next link's frame
counter, or the sizes that the test itself has written.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import decoders, needs, tcp, tun
from lab.collectors import MessageFile
from lab.flowexp import Exporter
from lab.flows import Counts, FlowKey, add_up
from lab.netns import Link, Namespace, connect, namespaces, veth
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

pytestmark = pytest.mark.kernel

MTU = 1500
CLIENT = {4: "10.1.0.1", 6: "fd01::1"}
SERVER = {4: "10.1.0.2", 6: "fd01::2"}
PREFIX_LENGTH = {4: 24, 6: 64}
UDP_SEGMENT = 103


@pytest.fixture(autouse=True)
def live_metering() -> None:
    needs.need(needs.kernel(), needs.tools("iperf3", "ethtool"))


class Meter:
    """An exporter that writes to a file: its own packets would be in the books that it is compared with."""

    def __init__(self, exporter: Exporter, file: MessageFile) -> None:
        self.exporter = exporter
        self.file = file

    def records_from(self, source: str) -> list[decoders.Record]:
        """Stops the exporter; all its Data Records with this source address."""
        assert self.exporter.stop() == 0, self.exporter.log
        assert self.exporter.ledger().closes, self.exporter.log
        return [record for record in decoders.records(self.file.messages()) if _source(record) == source]


def _source(record: decoders.Record) -> str:
    return decoders.text(record, *decoders.SOURCE_ADDRESS)


def _sum(records: list[decoders.Record]) -> Counts:
    pairs = [decoders.flow_of(record)[1] for record in records]
    return Counts(sum(pair.packets for pair in pairs), sum(pair.octets for pair in pairs))


@contextmanager
def metering(namespace: Namespace, directory: Path, interface: str = "eth0") -> Iterator[Meter]:
    file = MessageFile(directory / f"{namespace.name}.ipfix")
    with Exporter(namespace, directory, interfaces=[interface], collectors=[file.url]) as exporter:
        yield Meter(exporter, file)


class Pair(NamedTuple):
    """A client and a server with a link between them, and what is needed to send over it."""

    client: Namespace
    server: Namespace
    client_link: Link
    server_link: Link
    ip_version: int


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    version = request.param
    with namespaces("client", "server", ipv6=version == 6) as (client, server):
        ends = veth(client, server)
        length = PREFIX_LENGTH[version]
        connect(*ends, (f"{CLIENT[version]}/{length}", f"{SERVER[version]}/{length}"))
        ends[0].set_offloads(tso=True, gso=True)
        ends[1].set_offloads(gro=True)
        yield Pair(client, server, *ends, version)


def _check(records: list[decoders.Record], sent: tcp.Sent) -> None:
    assert _sum(records) == Counts(sent.segments, sent.octets)
    assert max(decoders.number(record, decoders.MAXIMUM_IP_TOTAL_LENGTH) for record in records) == MTU


def _nothing_was_dropped(pair: Pair) -> bool:
    return pair.client_link.counters()["tx_dropped"] == pair.server_link.counters()["rx_dropped"] == 0


def test_tcp_segments_at_both_ends_equal_what_the_senders_stack_sent(pair: Pair, tmp_path: Path) -> None:
    source, to = CLIENT[pair.ip_version], SERVER[pair.ip_version]
    with metering(pair.client, tmp_path) as at_egress, metering(pair.server, tmp_path) as at_ingress:
        sent = tcp.iperf3(pair.client, pair.server, tmp_path, to=to, octets="400M")
        assert sent.ip_packets * 5 < sent.segments, "no super-packets were sent; the test shows nothing"
        _check(at_egress.records_from(source), sent)
        assert _nothing_was_dropped(pair), "the link dropped packets; what came in is less than what was sent"
        _check(at_ingress.records_from(source), sent)


def test_big_tcp_counts_as_the_segments_it_stands_for(pair: Pair, tmp_path: Path) -> None:
    needs.need(needs.big_tcp())
    for link in (pair.client_link, pair.server_link):
        link.set_big_tcp(180_000)
    source, to = CLIENT[pair.ip_version], SERVER[pair.ip_version]
    with metering(pair.client, tmp_path) as at_egress, metering(pair.server, tmp_path) as at_ingress:
        sent = tcp.stream(pair.client, pair.server, to=to, octets=400_000_000)
        is_big = sent.ip_packet_octets > 65_535
        needs.need(None if is_big else f"no BIG TCP over veth with IPv{pair.ip_version}")
        _check(at_egress.records_from(source), sent)
        assert _nothing_was_dropped(pair), "the link dropped packets; what came in is less than what was sent"
        _check(at_ingress.records_from(source), sent)


def test_udp_gso_counts_as_the_datagrams_it_stands_for(pair: Pair, tmp_path: Path) -> None:
    payload, segment, times = 48_000, 1_200, 50
    version = pair.ip_version
    with metering(pair.client, tmp_path) as at_egress, metering(pair.server, tmp_path) as at_ingress:
        family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
        with pair.server.socket(family) as sink, pair.client.socket(family) as sender:
            sink.bind((SERVER[version], 9))
            sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, segment)
            for _ in range(times):
                sender.sendto(bytes(payload), (SERVER[version], 9))
        assert pair.client_link.counters()["tx_packets"] < 2 * times, "no super-packets were sent"
        datagrams = times * payload // segment
        expected = Counts(datagrams, datagrams * (tcp.IP_HEADER[version] + 8 + segment))
        assert _sum(at_egress.records_from(CLIENT[version])) == expected
        assert _sum(at_ingress.records_from(CLIENT[version])) == expected


def test_merged_segments_count_as_the_frames_that_the_next_link_carries(tmp_path: Path) -> None:
    with namespaces("sender", "router", "receiver") as (sender, router, receiver):
        left = veth(sender, router, names=("eth0", "left"))
        right = veth(router, receiver, names=("right", "eth0"))
        connect(*left, ("10.1.0.1/24", "10.1.0.254/24"))
        connect(*right, ("10.2.0.254/24", "10.2.0.2/24"))
        sender.ip("route", "add", "default", "via", "10.1.0.254")
        receiver.ip("route", "add", "default", "via", "10.2.0.254")
        router.sysctl("net.ipv4.ip_forward", 1)
        left[0].set_offloads(tso=True)
        left[1].set_offloads(gro=True)
        right[0].set_offloads(tso=False, gso=False, tx=False)
        with metering(router, tmp_path, "left") as meter:
            frames_before = right[1].counters()["rx_packets"]
            octets_before = right[1].counters()["rx_bytes"]
            tcp.iperf3(sender, receiver, tmp_path, to="10.2.0.2", octets="50M")
            frames = right[1].counters()["rx_packets"] - frames_before
            octets = right[1].counters()["rx_bytes"] - octets_before
            assert left[1].counters()["rx_packets"] * 5 < frames, "nothing was merged; the test shows nothing"
            assert _sum(meter.records_from("10.1.0.1")) == Counts(frames, octets - 14 * frames)


SUPER_PACKETS = {
    "TCP over IPv4": (IP, TCP, tun.GSO_TCPV4),
    "TCP over IPv4 with ECN": (IP, TCP, tun.GSO_TCPV4 | tun.GSO_ECN),
    "TCP over IPv6": (IPv6, TCP, tun.GSO_TCPV6),
    "UDP over IPv4": (IP, UDP, tun.GSO_UDP_L4),
    "UDP over IPv6": (IPv6, UDP, tun.GSO_UDP_L4),
}


@pytest.mark.parametrize("name", SUPER_PACKETS)
@pytest.mark.parametrize("ethernet", [True, False], ids=["tap", "tun"])
def test_super_packets_of_a_guest_count_although_gso_segs_is_0(name: str, ethernet: bool, tmp_path: Path) -> None:
    """Payloads that fill the last segment to the full, by one octet, and but for one octet."""
    needs.need(needs.tun())
    network, transport, kind = SUPER_PACKETS[name]
    segment = 1_400
    with namespaces("host", ipv6=True) as (host,):
        with tun.Device(host, "guest0", ethernet=ethernet, vnet_header=True) as guest:
            with metering(host, tmp_path, "guest0") as meter:
                expected = []
                for port, payload in enumerate((segment * 10, segment * 10 + 1, segment * 11 - 1, segment + 1, 60), 1):
                    expected.append(_write(guest, network, transport, kind, (port, payload, segment, ethernet)))
                assert guest.link.counters()["rx_packets"] == len(expected)
                source = CLIENT[6] if network is IPv6 else CLIENT[4]
                got = add_up(decoders.flow_of(record) for record in meter.records_from(source))
    assert got == dict(expected)


def _write(
    guest: tun.Device, network: type, transport: type, kind: int, shape: tuple[int, int, int, bool]
) -> tuple[FlowKey, Counts]:
    """Writes one packet of (source port, payload, payload of a segment); what it is to be counted as."""
    port, payload, segment, ethernet = shape
    version = 6 if network is IPv6 else 4
    ip = network(src=CLIENT[version], dst=SERVER[version])
    packet = bytes(ip / transport(sport=port, dport=443) / Raw(bytes(payload)))
    ip_header, headers = tcp.IP_HEADER[version], len(packet) - payload
    macs = {"src": "02:00:00:00:00:02", "dst": "02:00:00:00:00:01"}
    link = bytes(Ether(**macs, type=0x86DD if version == 6 else 0x0800)) if ethernet else b""
    if payload > segment:
        at = len(link) + ip_header
        guest.write_super(
            link + packet, kind=kind, segment_octets=segment, transport_at=at, headers=len(link) + headers
        )
    else:
        guest.write(link + packet)
    segments = -(-payload // segment)
    protocol, flags = (6, 2) if transport is TCP else (17, 0)
    key = FlowKey(CLIENT[version], SERVER[version], protocol, port, 443)
    return key, Counts(segments, payload + segments * headers, flags)
