# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP transport over a router: narrow paths, ICMP errors, routes and addresses that come and go.

Each record is a number; what the Collector has is compared with what was sent, number by number.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.netns import Link, Namespace, connect, namespaces, veth
from lab.process import CommandFailed
from lab.wait import wait_for

from flowexp.transport.base import Sent
from flowexp.transport.udp import REOPEN_PERIOD_NS, UdpTransport

pytestmark = pytest.mark.kernel

HEADER_OCTETS = 20
RECORD_OCTETS = 8
EXPORTER = {4: "10.1.0.1", 6: "fd01::1"}
ROUTER_IN = {4: "10.1.0.2", 6: "fd01::2"}
ROUTER_OUT = {4: "10.2.0.2", 6: "fd02::2"}
COLLECTOR = {4: "10.2.0.1", 6: "fd02::1"}
LENGTH = {4: 24, 6: 64}
UDP_IP_OCTETS = {4: 28, 6: 48}
BUFFER_OCTETS = 1 << 24


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    needs.need(needs.namespace_support())


class Messages(NamedTuple):
    octets: memoryview
    message_octets: int
    count: int
    records: int


def encode(records: list[int], max_message_octets: int) -> tuple[Messages, list[int]]:
    """As many full Messages as there are, and the records left over."""
    each = (max_message_octets - HEADER_OCTETS) // RECORD_OCTETS
    count = len(records) // each
    used = records[: count * each]
    content = b"".join(
        bytes(HEADER_OCTETS) + struct.pack(f">{each}Q", *used[i * each : (i + 1) * each]) for i in range(count)
    )
    return Messages(memoryview(content), HEADER_OCTETS + each * RECORD_OCTETS, count, len(used)), records[len(used) :]


def send_all(transport: UdpTransport, records: list[int]) -> list[Sent]:
    """All records, as the exporter does it: what got too big is encoded again. Less than a Message is left out."""
    answers = []
    while True:
        transport.take_templates_due()
        batch, rest = encode(records, transport.max_message_octets())
        if not batch.count:
            return answers
        answers.append(transport.send(batch))
        if not answers[-1].too_big:
            return answers
        records = records[answers[-1].messages * (batch.records // batch.count) :]


def received(sock: socket.socket, count: int) -> list[int]:
    """The records of all datagrams, once there are at least so many."""
    records: list[int] = []
    wait_for(f"{count} records", lambda: records.extend(_here(sock)) or len(records) >= count)
    return records


def _here(sock: socket.socket) -> list[int]:
    records: list[int] = []
    while True:
        try:
            datagram = sock.recv(65_535)
        except BlockingIOError:
            return records
        records += [number for (number,) in struct.iter_unpack(">Q", datagram[HEADER_OCTETS:])]


class Path(NamedTuple):
    """Exporter, router, Collector, and the router's link to the Collector."""

    exporter: Namespace
    router: Namespace
    collector: Namespace
    out: Link


@contextmanager
def path() -> Iterator[Path]:
    with namespaces("exporter", "router", "collector", ipv6=True) as (exporter, router, collector):
        near, router_in = veth(exporter, router, names=("eth0", "in0"))
        far, router_out = veth(collector, router, names=("eth0", "out0"))
        connect(near, router_in, *((f"{EXPORTER[v]}/{LENGTH[v]}", f"{ROUTER_IN[v]}/{LENGTH[v]}") for v in (4, 6)))
        connect(far, router_out, *((f"{COLLECTOR[v]}/{LENGTH[v]}", f"{ROUTER_OUT[v]}/{LENGTH[v]}") for v in (4, 6)))
        router.sysctl("net.ipv4.ip_forward", 1)
        router.sysctl("net.ipv6.conf.all.forwarding", 1)
        for version in (4, 6):
            exporter.ip("route", "add", "default", "via", ROUTER_IN[version])
            collector.ip("route", "add", "default", "via", ROUTER_OUT[version])
        yield Path(exporter, router, collector, router_out)


@contextmanager
def collector_socket(namespace: Namespace, version: int) -> Iterator[socket.socket]:
    with namespace.socket(socket.AF_INET if version == 4 else socket.AF_INET6) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, BUFFER_OCTETS)  # SO_RCVBUFFORCE
        sock.bind((COLLECTOR[version], 0))
        sock.setblocking(False)
        yield sock


@contextmanager
def transport_in(namespace: Namespace, sock: socket.socket, **options: Any) -> Iterator[UdpTransport]:
    """Opened inside; what it reopens later it reopens where the test is, see `inside`."""
    host, port = sock.getsockname()[:2]
    with closing(UdpTransport(host, port, **{"messages_per_s": 0, **options})) as transport:
        with namespace.entered():
            transport.open()
        yield transport


@pytest.mark.parametrize("version", [4, 6])
def test_a_narrow_path_is_learned_before_anything_is_lost(version: int) -> None:
    with path() as world, collector_socket(world.collector, version) as sock:
        world.out.set("mtu", "1400")
        with transport_in(world.exporter, sock) as transport:
            assert transport.max_message_octets() == 1500 - UDP_IP_OCTETS[version]
            records = list(range(100_000))
            answers = send_all(transport, records)
            assert answers[0] == Sent(0, too_big=True)  # the one that went ahead
            assert transport.max_message_octets() == 1400 - UDP_IP_OCTETS[version]
            sent = transport.counters.records_sent
            assert len(records) - sent < 200
            assert received(sock, sent) == records[:sent]
            assert transport.counters.mtu_changes == 1
            assert transport.counters.messages_failed == transport.counters.gso_fallbacks == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_path_that_gets_narrower_costs_only_what_was_under_way(version: int) -> None:
    with path() as world, collector_socket(world.collector, version) as sock:
        with transport_in(world.exporter, sock) as transport:
            send_all(transport, list(range(20_000)))
            before = transport.counters.records_sent
            assert received(sock, before) == list(range(before))
            world.out.set("mtu", "1300")
            records = list(range(1_000_000, 1_100_000))
            answers = send_all(transport, records)
            assert answers[0].too_big
            sent = transport.counters.records_sent - before
            lost = answers[0].messages * ((1500 - UDP_IP_OCTETS[version] - HEADER_OCTETS) // RECORD_OCTETS)
            assert answers[0].messages <= 64  # one system call: the error is there before the next
            assert received(sock, sent - lost) == records[lost:sent]
            assert transport.counters.mtu_changes == 1
            assert transport.max_message_octets() == 1300 - UDP_IP_OCTETS[version]


@pytest.mark.parametrize("version", [4, 6])
def test_a_wide_path_is_proven_by_one_message_and_then_takes_whole_bursts(version: int) -> None:
    with path() as world, collector_socket(world.collector, version) as sock:
        with transport_in(world.exporter, sock) as transport:
            assert [answer.too_big for answer in send_all(transport, list(range(100_000)))] == [False]
            sent = transport.counters.records_sent
            assert received(sock, sent) == list(range(sent))
            assert transport.counters.mtu_changes == 0


def test_a_link_that_checksums_in_software_carries_every_message_once() -> None:
    needs.need(needs.tools("ethtool"))
    with path() as world, collector_socket(world.collector, 4) as sock:
        Link(world.exporter, "eth0").set_offloads(tx=False)
        with transport_in(world.exporter, sock) as transport:
            send_all(transport, list(range(20_000)))  # EIO before Linux 6.11, segments in software since
            sent = transport.counters.records_sent
            assert received(sock, sent) == list(range(sent))
            assert transport.counters.messages_failed == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_collector_behind_a_router_that_has_no_port_open_is_counted_and_survived(version: int) -> None:
    with path() as world, collector_socket(world.collector, version) as sock:
        port = sock.getsockname()[1]
        with transport_in(world.exporter, sock, mtu_octets=600 if version == 4 else 1280) as transport:
            sock.close()
            records = list(range(2_000))
            for _ in range(2):
                send_all(transport, records)
            assert transport.take_templates_due()
            assert transport.counters.refused >= 1
            assert transport.counters.messages_failed == 0
            assert transport.status()["state"] == "refused"
            with world.collector.socket(sock_family(version)) as back:
                back.setsockopt(socket.SOL_SOCKET, 33, BUFFER_OCTETS)
                back.bind((COLLECTOR[version], port))
                back.setblocking(False)
                before = transport.counters.records_sent
                send_all(transport, records)
                sent = transport.counters.records_sent - before
                assert received(back, sent) == records[:sent]


def sock_family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


@pytest.mark.parametrize("version", [4, 6])
def test_an_unreachable_network_is_reported_by_the_router_and_counted(version: int) -> None:
    with path() as world, collector_socket(world.collector, version) as sock:
        with transport_in(world.exporter, sock) as transport:
            world.router.ip("route", "add", "unreachable", f"{COLLECTOR[version]}/{32 if version == 4 else 128}")
            send_all(transport, list(range(500)))
            wait_for(
                "the router's ICMP error", lambda: transport.take_templates_due() and transport.counters.unreachable
            )
            assert transport.status()["state"] == "unreachable"
            assert received(sock, 0) == []


@pytest.mark.parametrize("version", [4, 6])
def test_a_route_that_goes_fails_batches_and_one_that_comes_back_is_used(version: int) -> None:
    with path() as world, collector_socket(world.collector, version) as sock:
        clock_ns = [0]
        with transport_in(world.exporter, sock, clock_ns=lambda: clock_ns[0]) as transport:
            send_all(transport, list(range(500)))
            first = received(sock, transport.counters.records_sent)
            world.exporter.ip(f"-{version}", "route", "del", "default")
            assert [answer.messages for answer in send_all(transport, list(range(500)))] == [0]
            assert transport.counters.records_failed == len(first)
            world.exporter.ip(f"-{version}", "route", "add", "default", "via", ROUTER_IN[version])
            send_all(transport, list(range(500)))
            assert received(sock, len(first)) == first


def test_an_address_that_changes_is_followed_after_five_seconds() -> None:
    with path() as world, collector_socket(world.collector, 4) as sock:
        clock_ns = [0]
        with transport_in(world.exporter, sock, clock_ns=lambda: clock_ns[0]) as transport:
            send_all(transport, list(range(500)))
            first = received(sock, transport.counters.records_sent)
            near = Link(world.exporter, "eth0")
            world.exporter.ip("address", "del", f"{EXPORTER[4]}/24", "dev", "eth0")
            near.add_address("10.1.0.9/24")
            Link(world.router, "in0").add_neighbour("10.1.0.9", near.mac)
            world.exporter.ip("route", "add", "default", "via", ROUTER_IN[4])
            assert [answer.messages for answer in send_all(transport, list(range(500)))] == [0]
            clock_ns[0] = REOPEN_PERIOD_NS
            with world.exporter.entered():
                send_all(transport, list(range(500)))
            sock.settimeout(10)
            _, sender = sock.recvfrom(65_535, socket.MSG_PEEK)
            sock.setblocking(False)
            assert sender[0] == "10.1.0.9"
            assert received(sock, len(first)) == first


def test_a_queue_that_drops_is_noticed_and_waited_for() -> None:
    with path() as world, collector_socket(world.collector, 4) as sock:
        try:
            world.exporter.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf",
                               "rate", "40mbit", "burst", "40k", "limit", "100k")  # fmt: skip
        except CommandFailed as error:
            needs.need(f"no tbf: {error}")
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            time.sleep(seconds)

        # Pieces of 24 kB: what is larger than its burst, tbf cuts up, and then drops parts of it without a word.
        with transport_in(world.exporter, sock, sleep=sleep, messages_per_s=100_000) as transport:
            records = list(range(100_000))
            send_all(transport, records)
            sent = transport.counters.records_sent
            assert received(sock, sent) == records[:sent]
            assert pauses
            assert transport.counters.messages_failed == 0
