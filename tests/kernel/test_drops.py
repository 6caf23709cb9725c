# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel drops of a flow, to the packet, and the reason that it gives.

A router whose left link frames are sent to, as in test_router.py: every packet there is, is one that the test sent.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.collectors import MessageFile, udp_sockets
from lab.flowexp import Exporter
from lab.netns import Link, Namespace, namespaces, veth
from lab.process import CommandFailed, run
from lab.traffic import send_frames
from lab.wait import wait_for
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from flowexp.protocol.decode import Decoder

pytestmark = pytest.mark.kernel

MAC = "02:00:00:00:00:0a"
A, B = {4: "10.1.0.2", 6: "fd01::2"}, {4: "10.2.0.2", 6: "fd02::2"}
LEFT, RIGHT = {4: "10.1.0.254", 6: "fd01::fe"}, {4: "10.2.0.254", 6: "fd02::fe"}
OCTETS = {4: 68, 6: 88}
BLOCKED, OPEN, QUEUED, NOBODY = 4000, 5000, 6000, 7000


class Router(NamedTuple):
    namespace: Namespace
    left: Link
    right: Link
    host: Link

    def send(self, *packets: Packet) -> None:
        """What the host sends, until the router has it."""
        before = self.left.counters()["rx_packets"]
        send_frames(self.host, [bytes(Ether(src=MAC, dst=self.left.mac) / packet) for packet in packets])
        wait_for("the router to receive all", lambda: self.left.counters()["rx_packets"] >= before + len(packets))


@pytest.fixture
def router() -> Iterator[Router]:
    needs.need(needs.kernel(), needs.tools("nft", "tc"), needs.kernel_btf())
    with namespaces("a", "router", "b") as (a, middle, b):
        middle.sysctl("net.ipv6.conf.default.disable_ipv6", 0)
        host, left = veth(a, middle, names=("eth0", "left"))
        right, _ = veth(middle, b, names=("right", "eth0"))
        for link, address, neighbour in ((left, LEFT, A), (right, RIGHT, B)):
            for version, length in ((4, 24), (6, 64)):
                link.add_address(f"{address[version]}/{length}")
                link.add_neighbour(neighbour[version], MAC)
        middle.sysctl("net.ipv4.ip_forward", 1)
        middle.sysctl("net.ipv6.conf.all.forwarding", 1)
        yield Router(middle, left, right, host)


def udp(version: int, to: dict[int, str], port: int, *, ttl: int = 64) -> Packet:
    ip = IP(src=A[4], dst=to[4], ttl=ttl) if version == 4 else IPv6(src=A[6], dst=to[6], hlim=ttl)
    return ip / UDP(sport=1000 + ttl, dport=port) / Raw(bytes(40))


class Told(NamedTuple):
    """What a record says of its packets."""

    packets: int
    dropped: int
    octets: int
    reason: str
    status: int


def told(file: MessageFile) -> dict[tuple[int, int], Told]:
    """By IP version and destination port; only what came from A."""
    decoder, found = Decoder(), {}
    for message in file.messages():
        for record in decoder.decode(message, None).records:
            if record.get("sourceIPv4Address") == A[4] or record.get("sourceIPv6Address") == A[6]:
                found[int(record["ipVersion"]), int(record["destinationTransportPort"])] = Told(
                    *(record[name] for name in (
                        "packetDeltaCount", "droppedPacketDeltaCount", "droppedOctetDeltaCount",
                        "packetDropReason", "forwardingStatus",
                    ))
                )  # fmt: skip
    return found


def metering(router: Router, directory: Path, file: MessageFile, **configuration: Any) -> Exporter:
    configuration = {"fields": {"groups": ["drops"]}, **configuration}
    return Exporter(
        router.namespace, directory, interfaces=["left"], collectors=[file.url], configuration=configuration
    )


def test_drops_are_counted_to_the_packet_with_the_kernels_reason(router: Router, tmp_path: Path) -> None:
    router.namespace.run(
        "nft",
        "add table inet filter; "
        "add chain inet filter forward { type filter hook forward priority 0; }; "
        f"add rule inet filter forward udp dport {BLOCKED} drop",
    )
    file = MessageFile(tmp_path / "flows.ipfix")
    with metering(router, tmp_path, file) as exporter:
        for version in (4, 6):
            router.send(*[udp(version, B, BLOCKED)] * 7)
            router.send(*[udp(version, B, OPEN)] * 4)
            router.send(*[udp(version, B, NOBODY, ttl=1)] * 5)
            router.send(*[udp(version, RIGHT, NOBODY + 1)] * 3)
        assert exporter.stop() == 0
    assert exporter.ledger().closes
    found = told(file)
    for version, octets in OCTETS.items():
        assert found[version, BLOCKED] == Told(7, 7, 7 * octets, "NETFILTER_DROP", 130)
        assert found[version, OPEN] == Told(4, 0, 0, "", 64)
        assert found[version, NOBODY][:3] == (5, 5, 5 * octets)
        assert found[version, NOBODY].reason in ("IP_INHDR", "NOT_SPECIFIED")  # what kernels call a TTL that ran out
        assert found[version, NOBODY + 1] == Told(3, 3, 3 * octets, "NO_SOCKET", 128)


def test_what_a_full_socket_and_a_full_queue_drop_equals_their_own_counts(router: Router, tmp_path: Path) -> None:
    try:
        run(["tc", "-n", router.namespace.name, "qdisc", "add", "dev", "right", "root", "tbf", "rate", "8kbit",
             "burst", "2000", "limit", "3000"])  # fmt: skip
    except CommandFailed as error:
        needs.need(f"no tbf: {error}")
    file = MessageFile(tmp_path / "flows.ipfix")
    with metering(router, tmp_path, file) as exporter, router.namespace.socket() as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        receiver.bind((RIGHT[4], QUEUED))
        router.send(*[udp(4, RIGHT, QUEUED)] * 100)
        router.send(*[udp(4, B, OPEN)] * 200)
        socket_drops = udp_sockets(router.namespace)[QUEUED].drops
        assert exporter.stop() == 0
    found = told(file)
    queue = run(["tc", "-n", router.namespace.name, "-s", "qdisc", "show", "dev", "right"])
    queue_drops = int(queue.split("dropped ")[1].split(",")[0])
    assert 0 < socket_drops < 100 and 0 < queue_drops < 200
    assert found[4, QUEUED] == Told(100, socket_drops, socket_drops * OCTETS[4], "SOCKET_RCVBUFF", 0)
    assert found[4, OPEN][:3] == (200, queue_drops, queue_drops * OCTETS[4])
    assert found[4, OPEN].reason.startswith("QDISC_")


def test_drops_in_another_namespace_are_not_ours(router: Router, tmp_path: Path) -> None:
    """The same addresses and ports, and an interface of the same index, dropped next door."""
    file = MessageFile(tmp_path / "flows.ipfix")
    with metering(router, tmp_path, file) as exporter:
        router.send(*[udp(4, B, OPEN)] * 4)  # B's host has no such address: it drops them
        assert exporter.stop() == 0
    assert told(file)[4, OPEN] == Told(4, 0, 0, "", 64)
