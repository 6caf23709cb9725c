# SPDX-License-Identifier: GPL-2.0-or-later
"""A router between two hosts: what is counted where, and which interfaces and next hop a record names.

The hosts have no addresses: they are links from which crafted frames are sent, and answer nothing. So
every packet there is, is one that the test sent or that the router made of it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import decoders, needs, tun
from lab.collectors import MessageFile
from lab.flowexp import Exporter, LogLedger
from lab.flows import Counts, FlowKey, FlowTable, add_up, differences
from lab.netns import Link, Namespace, masquerade, namespaces, tc_filters, veth
from lab.process import run
from lab.traffic import make_capture, replay, send_frames
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

pytestmark = pytest.mark.kernel

INGRESS, EGRESS = 0, 1
HOST_A, HOST_B = {4: "10.1.0.2", 6: "fd01::2"}, {4: "10.2.0.2", 6: "fd02::2"}
ROUTER_LEFT, ROUTER_RIGHT = {4: "10.1.0.254", 6: "fd01::fe"}, {4: "10.2.0.254", 6: "fd02::fe"}
BEHIND_B = {4: "10.9.0.9", 6: "fd09::9"}
NOWHERE = {4: "0.0.0.0", 6: "::"}
MAC_A, MAC_B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
PORT = 4000


@pytest.fixture(autouse=True)
def live_metering() -> None:
    needs.need(needs.kernel(), needs.tools("ethtool", "tcpreplay", "tc"))


class Router(NamedTuple):
    """The router, its two links, and the hosts' ends of them."""

    namespace: Namespace
    left: Link
    right: Link
    host_a: Link
    host_b: Link

    def send_from_a(self, *packets: Packet, times: int = 1) -> None:
        self._send(self.host_a, MAC_A, self.left, packets * times)

    def send_from_b(self, *packets: Packet, times: int = 1) -> None:
        self._send(self.host_b, MAC_B, self.right, packets * times)

    @staticmethod
    def _send(host: Link, mac: str, to: Link, packets: Sequence[Packet]) -> None:
        ethernet = Ether(src=mac, dst=to.mac)
        send_frames(host, [bytes(ethernet / packet) for packet in packets])


@pytest.fixture
def router() -> Iterator[Router]:
    with namespaces("a", "router", "b") as (a, middle, b):
        middle.sysctl("net.ipv6.conf.default.disable_ipv6", 0)
        host_a, left = veth(a, middle, names=("eth0", "left"))
        right, host_b = veth(middle, b, names=("right", "eth0"))
        for link, address, mac, neighbour in (
            (left, ROUTER_LEFT, MAC_A, HOST_A),
            (right, ROUTER_RIGHT, MAC_B, HOST_B),
        ):
            for version, length in ((4, 24), (6, 64)):
                link.add_address(f"{address[version]}/{length}")
                link.add_neighbour(neighbour[version], mac)
        middle.ip("route", "add", "10.9.0.0/24", "via", HOST_B[4])
        middle.ip("-6", "route", "add", "fd09::/64", "via", HOST_B[6])
        middle.sysctl("net.ipv4.ip_forward", 1)
        middle.sysctl("net.ipv6.conf.all.forwarding", 1)
        yield Router(middle, left, right, host_a, host_b)


class Meter:
    """An exporter on the router that writes to a file, and what is in it once it has been stopped."""

    def __init__(self, exporter: Exporter, file: MessageFile) -> None:
        self.exporter = exporter
        self._file = file

    def stop(self) -> list[decoders.Record]:
        assert self.exporter.stop() == 0, self.exporter.log
        assert self.exporter.ledger().closes, self.exporter.log
        return decoders.records(self._file.messages())

    @property
    def ledger(self) -> LogLedger:
        return self.exporter.ledger()


@contextmanager
def metering(
    namespace: Namespace,
    directory: Path,
    *interfaces: str,
    direction: str | None = None,
    **configuration: object,
) -> Iterator[Meter]:
    file = MessageFile(directory / "flows.ipfix")
    options = ["--direction", direction] if direction else []
    with Exporter(
        namespace,
        directory,
        *options,
        interfaces=interfaces,
        collectors=[file.url],
        configuration=configuration,
    ) as exporter:
        yield Meter(exporter, file)


class Observation(NamedTuple):
    """Where and how a flow was seen."""

    direction: int
    ingress: int
    egress: int
    next_hop: str
    counts: Counts


def observations(records: Sequence[decoders.Record], source: str, destination: str) -> list[Observation]:
    """Every record of the flows between two addresses, in the order of direction."""
    found = []
    for record in records:
        key, counts = decoders.flow_of(record)
        if (key.src_addr, key.dst_addr) == (source, destination):
            found.append(
                Observation(
                    decoders.number(record, decoders.FLOW_DIRECTION),
                    decoders.number(record, decoders.INGRESS_INTERFACE),
                    decoders.number(record, decoders.EGRESS_INTERFACE),
                    decoders.text(record, *decoders.NEXT_HOP),
                    counts,
                )
            )
    return sorted(found)


def _ip(source: str, destination: str) -> Packet:
    return IPv6(src=source, dst=destination) if ":" in source else IP(src=source, dst=destination)


def _udp(source: str, destination: str) -> Packet:
    """68 octets of IPv4, 88 of IPv6."""
    return _ip(source, destination) / UDP(sport=PORT, dport=PORT) / Raw(bytes(40))


def _udp_counts(version: int, packets: int) -> Counts:
    return Counts(packets, packets * {4: 68, 6: 88}[version])


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_once_counts_each_forwarded_packet_once_where_it_came_in(router: Router, version: int, tmp_path: Path) -> None:
    a, b, behind = HOST_A[version], HOST_B[version], BEHIND_B[version]
    left, right = router.left.ifindex, router.right.ifindex
    with metering(router.namespace, tmp_path, "left", "right") as meter:
        router.send_from_a(_udp(a, b), times=5)
        router.send_from_a(_udp(a, behind), times=6)
        router.send_from_b(_udp(b, a), times=7)
        records = meter.stop()
    assert observations(records, a, b) == [Observation(INGRESS, left, right, b, _udp_counts(version, 5))]
    assert observations(records, a, behind) == [Observation(INGRESS, left, right, b, _udp_counts(version, 6))]
    assert observations(records, b, a) == [Observation(INGRESS, right, left, a, _udp_counts(version, 7))]
    assert meter.ledger.not_metered["seen at ingress"] == 5 + 6 + 7


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_both_counts_each_forwarded_packet_at_each_observation_point(
    router: Router, version: int, tmp_path: Path
) -> None:
    a, behind = HOST_A[version], BEHIND_B[version]
    left, right = router.left.ifindex, router.right.ifindex
    with metering(router.namespace, tmp_path, "left", "right", direction="both") as meter:
        router.send_from_a(_udp(a, behind), times=5)
        coming, going = observations(meter.stop(), a, behind)
    assert coming == Observation(INGRESS, left, right, HOST_B[version], _udp_counts(version, 5))
    assert going[:3] == (EGRESS, left, right)
    assert going.counts == _udp_counts(version, 5)


@pytest.mark.parametrize(
    ("direction", "expected"), [("ingress", INGRESS), ("egress", EGRESS)], ids=["ingress", "egress"]
)
def test_one_direction_counts_each_forwarded_packet_there_alone(
    router: Router, direction: str, expected: int, tmp_path: Path
) -> None:
    left, right = router.left.ifindex, router.right.ifindex
    with metering(router.namespace, tmp_path, "left", "right", direction=direction) as meter:
        router.send_from_a(_udp(HOST_A[4], HOST_B[4]), times=5)
        (only,) = observations(meter.stop(), HOST_A[4], HOST_B[4])
    assert only[:3] == (expected, left, right)
    assert only.counts == _udp_counts(4, 5)


def test_once_on_a_single_interface_shows_what_comes_in_and_what_goes_out(router: Router, tmp_path: Path) -> None:
    left, right = router.left.ifindex, router.right.ifindex
    with metering(router.namespace, tmp_path, "right") as meter:
        router.send_from_a(_udp(HOST_A[4], HOST_B[4]), times=5)
        router.send_from_b(_udp(HOST_B[4], HOST_A[4]), times=7)
        records = meter.stop()
    (going,) = observations(records, HOST_A[4], HOST_B[4])
    assert going[:3] == (EGRESS, left, right)
    assert going.counts == _udp_counts(4, 5)
    coming = Observation(INGRESS, right, left, HOST_A[4], _udp_counts(4, 7))
    assert observations(records, HOST_B[4], HOST_A[4]) == [coming]


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_what_the_router_itself_sends_is_counted_as_it_leaves(router: Router, version: int, tmp_path: Path) -> None:
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    with metering(router.namespace, tmp_path, "left", "right") as meter:
        with router.namespace.socket(family) as sender:
            for _ in range(5):
                sender.sendto(bytes(40), (HOST_B[version], PORT))
        (only,) = observations(meter.stop(), ROUTER_RIGHT[version], HOST_B[version])
    assert only[:3] == (EGRESS, 0, router.right.ifindex)
    assert only.counts == _udp_counts(version, 5)


@pytest.mark.parametrize(
    "destination",
    [ROUTER_LEFT[4], ROUTER_RIGHT[4], "224.0.0.251", "239.1.2.3", "255.255.255.255", "10.1.0.255"],
)
def test_output_interface_is_0_for_the_router_itself_for_multicast_and_for_broadcast(
    router: Router, destination: str, tmp_path: Path
) -> None:
    packet = IP(src=HOST_A[4], dst=destination, proto=253) / Raw(bytes(48))
    with metering(router.namespace, tmp_path, "left", "right") as meter:
        router.send_from_a(packet, times=5)
        (only,) = observations(meter.stop(), HOST_A[4], destination)
    assert only == Observation(INGRESS, router.left.ifindex, 0, NOWHERE[4], _udp_counts(4, 5))


@pytest.mark.parametrize("destination", [ROUTER_LEFT[6], ROUTER_RIGHT[6], "ff02::fb", "ff0e::1:2"])
def test_output_interface_is_0_for_the_router_itself_and_for_multicast_of_ipv6(
    router: Router, destination: str, tmp_path: Path
) -> None:
    packet = IPv6(src=HOST_A[6], dst=destination, nh=59) / Raw(bytes(48))
    with metering(router.namespace, tmp_path, "left", "right") as meter:
        router.send_from_a(packet, times=5)
        (only,) = observations(meter.stop(), HOST_A[6], destination)
    assert only == Observation(INGRESS, router.left.ifindex, 0, NOWHERE[6], _udp_counts(6, 5))


def test_output_interface_is_0_for_replies_that_masquerading_hides(router: Router, tmp_path: Path) -> None:
    needs.need(needs.nat())
    masquerade(router.namespace, "right")
    left, right = router.left.ifindex, router.right.ifindex
    with metering(router.namespace, tmp_path, "left", "right", direction="both") as meter:
        router.send_from_a(_udp(HOST_A[4], HOST_B[4]), times=5)
        router.send_from_b(_udp(HOST_B[4], ROUTER_RIGHT[4]), times=7)
        records = meter.stop()
    request = Observation(INGRESS, left, right, HOST_B[4], _udp_counts(4, 5))
    assert observations(records, HOST_A[4], HOST_B[4]) == [request]
    hidden = Observation(INGRESS, right, 0, NOWHERE[4], _udp_counts(4, 7))
    assert observations(records, HOST_B[4], ROUTER_RIGHT[4]) == [hidden]
    (delivered,) = observations(records, HOST_B[4], HOST_A[4])
    assert delivered[:3] == (EGRESS, right, left)
    assert delivered.counts == _udp_counts(4, 7)


def test_a_packet_without_a_route_has_no_output_interface(router: Router, tmp_path: Path) -> None:
    with metering(router.namespace, tmp_path, "left", "right") as meter:
        router.send_from_a(_udp(HOST_A[4], "10.77.0.1"), times=5)
        records = meter.stop()
    nowhere = Observation(INGRESS, router.left.ifindex, 0, NOWHERE[4], _udp_counts(4, 5))
    assert observations(records, HOST_A[4], "10.77.0.1") == [nowhere]


def _replay_through(hook: str, directory: Path) -> tuple[FlowTable, FlowTable]:
    """Sends the same 20,000 packets past one hook: what was sent, and what the records say."""
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        right.set_offloads(gro=False)
        capture = make_capture(
            directory / "sent.pcap", packets=20_000, flows=2_000, macs=(left.mac, "02:00:00:00:00:99")
        )
        with metering(meter, directory, "eth0", direction="ingress", hook=hook) as exporter:
            assert replay(left, capture) == 20_000
            records = exporter.stop()
        return capture.flows, add_up(decoders.flow_of(record) for record in records)


def test_tc_and_xdp_agree_with_what_was_sent_where_gro_is_off(tmp_path: Path) -> None:
    for hook in ("tc", "xdp"):
        directory = tmp_path / hook
        directory.mkdir()
        sent, got = _replay_through(hook, directory)
        assert differences(sent, got) == [], hook


def test_xdp_names_the_same_interfaces_and_next_hop_as_tc(router: Router, tmp_path: Path) -> None:
    router.left.set_offloads(gro=False)
    with metering(router.namespace, tmp_path, "left", direction="ingress", hook="xdp") as meter:
        for version in (4, 6):
            router.send_from_a(_udp(HOST_A[version], BEHIND_B[version]), times=5)
            router.send_from_a(_udp(HOST_A[version], ROUTER_RIGHT[version]), times=3)
        records = meter.stop()
    left, right = router.left.ifindex, router.right.ifindex
    for version in (4, 6):
        forwarded = Observation(INGRESS, left, right, HOST_B[version], _udp_counts(version, 5))
        assert observations(records, HOST_A[version], BEHIND_B[version]) == [forwarded]
        local = Observation(INGRESS, left, 0, NOWHERE[version], _udp_counts(version, 3))
        assert observations(records, HOST_A[version], ROUTER_RIGHT[version]) == [local]


def test_a_device_without_ethernet_is_metered_as_it_is(tmp_path: Path) -> None:
    needs.need(needs.tun())
    packets = [
        _udp("10.3.0.1", "10.3.0.2"),
        IP(src="10.3.0.1", dst="10.3.0.2") / TCP(sport=1, dport=2, flags="PA") / Raw(b"x"),
        IP(src="10.3.0.1", dst="10.3.0.2") / ICMP(type=8, code=0),
        _udp("fd03::1", "fd03::2"),
        IPv6(src="fd03::1", dst="fd03::2") / ICMPv6EchoRequest(),
    ]
    with namespaces("host") as (host,), tun.Device(host, "tun0") as device:
        with metering(host, tmp_path, "tun0") as meter:
            for packet in packets:
                device.write(bytes(packet))
            records = meter.stop()
            assert meter.ledger.seen == meter.ledger.exported == len(packets)
        ifindex = device.link.ifindex
    assert {decoders.number(record, decoders.INGRESS_INTERFACE) for record in records} == {ifindex}
    assert add_up(map(decoders.flow_of, records)) == {
        FlowKey("10.3.0.1", "10.3.0.2", 17, PORT, PORT): Counts(1, 68),
        FlowKey("10.3.0.1", "10.3.0.2", 6, 1, 2): Counts(1, 41, 0x18),
        FlowKey("10.3.0.1", "10.3.0.2", 1, icmp_type_code=8 << 8): Counts(1, 28),
        FlowKey("fd03::1", "fd03::2", 17, PORT, PORT): Counts(1, 88),
        FlowKey("fd03::1", "fd03::2", 58, icmp_type_code=128 << 8): Counts(1, 48),
    }


def test_filters_of_others_stay_and_go_on_seeing_every_packet(router: Router, tmp_path: Path) -> None:
    router.namespace.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
    mirror = veth(router.namespace, router.host_b.namespace, names=("mirror", "mirror"))[1]
    tc = ["tc", "-n", router.namespace.name]
    catch_all = ["protocol", "all", "pref", "9", "u32", "match", "u32", "0", "0"]
    run([*tc, "qdisc", "add", "dev", "left", "clsact"])
    run([*tc, "filter", "add", "dev", "left", "egress", *catch_all, "flowid", "1:1"])
    run([*tc, "filter", "add", "dev", "left", "ingress", *catch_all,
         "action", "mirred", "egress", "mirror", "dev", "mirror"])  # fmt: skip
    before = _of_others(router.left)
    with metering(router.namespace, tmp_path, "left") as meter:
        meanwhile = _of_others(router.left)
        router.send_from_a(_udp(HOST_A[4], HOST_B[4]), times=5)
        records = meter.stop()
    after = _of_others(router.left)
    for direction in ("ingress", "egress"):
        run([*tc, "filter", "del", "dev", "left", direction])
    assert [seen.counts for seen in observations(records, HOST_A[4], HOST_B[4])] == [_udp_counts(4, 5)]
    assert before == meanwhile == after
    assert mirror.counters()["rx_packets"] == 5


def _of_others(link: Link) -> list[str]:
    """The filters on a link that are not the exporter's, and the qdiscs."""
    qdiscs = run(["tc", "-n", link.namespace.name, "qdisc", "show", "dev", link.name])
    return [qdiscs, tc_filters(link, "ingress"), tc_filters(link, "egress")]
