# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the programs run: which devices get them, what of others' is left alone, and what is left behind (nothing)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import needs, tun
from lab.collectors import MessageFile
from lab.decoders import PACKETS, number, records
from lab.flowexp import Exporter
from lab.netns import Link, Namespace, attached, namespaces, tc_filters, tcx_programs, veth
from lab.process import run
from lab.traffic import send_frames
from lab.wait import wait_for
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from flowexp.errors import FlowexpError
from flowexp.kernel import libbpf, netlink
from flowexp.kernel.attach import HOOK_PROGRAMS, Attacher
from flowexp.kernel.owners import handle_for_once, handle_of, handles_left
from flowexp.meter import MeteringProcess, new_table
from flowexp.metering.ledger import Ledger

pytestmark = pytest.mark.kernel

XDP_GENERIC, XDP_NATIVE = 2, 4  # XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE
TUNSETLINK, ARPHRD_IEEE80211 = 0x400454CD, 801
PACKET_OCTETS = 28


@pytest.fixture(autouse=True)
def live_metering() -> None:
    needs.need(needs.kernel())


class Meter:
    """Programs over a small table, and what they have counted; used by the thread inside the namespace."""

    def __init__(self, before: MeteringProcess | None = None) -> None:
        self.process = MeteringProcess(
            new_table(64), programs=HOOK_PROGRAMS, max_flows=64, egress_once=True, before=before
        )

    def attacher(
        self, *, handle: int = 1, direction: str = "once", hook: str = "tc", xdp_force: bool = False
    ) -> Attacher:
        programs, ingress_map = self.process.programs, self.process.ingress_map
        return Attacher(programs, ingress_map, handle=handle, direction=direction, hook=hook, xdp_force=xdp_force)

    def ledger(self) -> Ledger:
        """All that was seen is in the table: nothing is exported here."""
        ledger = self.process.ledger()
        assert ledger.missing() == (0, 0)
        return ledger

    def wait_for_packets(self, packets: int) -> None:
        wait_for(f"{packets} packets to be metered", lambda: self.ledger().in_table[0] >= packets)
        assert self.ledger().in_table == (packets, packets * PACKET_OCTETS)


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    """The sender's end and the metered end of a veth pair."""
    with namespaces("host", "meter") as (host, meter):
        yield veth(host, meter)


@contextmanager
def metering(namespace: Namespace) -> Iterator[Meter]:
    """The calling thread is inside `namespace` meanwhile."""
    with namespace.entered():
        meter = Meter()
        try:
            yield meter
        finally:
            meter.process.close()


@contextmanager
def following(attacher: Attacher, *names: str) -> Iterator[list[str]]:
    """How the programs are attached to these interfaces, in order."""
    attacher.follow(netlink.resolve(names))
    try:
        yield [attachment.how for attachment in attacher.attached.values()]
    finally:
        attacher.detach_all()


def packet() -> bytes:
    return bytes(IP(src="10.1.0.1", dst="10.1.0.9") / UDP(sport=1, dport=9))


def send(link: Link, to: Link, count: int = 5) -> None:
    send_frames(link, [bytes(Ether(src=link.mac, dst=to.mac, type=0x0800)) + packet()] * count)


@pytest.fixture
def without_tcx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel before 6.6: links of kind TCX are refused."""
    create_link = libbpf.create_link

    def refuse(program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
        if attach_type in (libbpf.TCX_INGRESS, libbpf.TCX_EGRESS):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create_link(program_fd, ifindex, attach_type, flags)

    monkeypatch.setattr(libbpf, "create_link", refuse)


def qdiscs(link: Link) -> str:
    return run(["tc", "-n", link.namespace.name, "qdisc", "show", "dev", link.name])


# TC


def test_an_ethernet_device_is_metered_in_both_directions_and_let_go_of(pair: tuple[Link, Link]) -> None:
    sender, metered = pair
    with metering(metered.namespace) as meter:
        with following(meter.attacher(), "eth0") as how:
            assert how == ["tcx", "tcx"]
            assert [tcx_programs(metered, direction) for direction in ("ingress", "egress")] == [1, 1]
            send(sender, metered)
            send(metered, sender, 3)
            meter.wait_for_packets(8)
        assert attached(metered) == []
        send(sender, metered)
        assert meter.ledger().seen[0] == 8


@pytest.mark.parametrize(("direction", "packets"), [("ingress", 5), ("egress", 3), ("both", 8), ("once", 8)])
def test_a_direction_says_which_programs_are_attached(pair: tuple[Link, Link], direction: str, packets: int) -> None:
    sender, metered = pair
    with metering(metered.namespace) as meter, following(meter.attacher(direction=direction), "eth0") as how:
        assert len(how) == (1 if direction in ("ingress", "egress") else 2)
        send(sender, metered)
        send(metered, sender, 3)
        meter.wait_for_packets(packets)


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_other_programs_take_the_place_of_those_that_are_attached(
    tcx: bool, pair: tuple[Link, Link], request: pytest.FixtureRequest
) -> None:
    if not tcx:
        request.getfixturevalue("without_tcx")
    sender, metered = pair
    with metering(metered.namespace) as first:
        attacher = first.attacher()
        with following(attacher, "eth0") as how:
            assert how == ["tcx" if tcx else "clsact"] * 2
            send(sender, metered)
            first.wait_for_packets(5)
            second = Meter(before=first.process)
            attacher.replace(second.process.programs, second.process.ingress_map)
            send(sender, metered, 2)
            send(metered, sender, 3)
            second.wait_for_packets(5)
            assert first.ledger().seen[0] == 5
        assert attached(metered) == []
        second.process.close()


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_a_device_without_ethernet_is_metered_from_its_ip_header_on(tcx: bool, request: pytest.FixtureRequest) -> None:
    needs.need(needs.tun())
    if not tcx:
        request.getfixturevalue("without_tcx")
    with namespaces("meter") as (namespace,), tun.Device(namespace, "tun0") as device, metering(namespace) as meter:
        with following(meter.attacher(), "tun0") as how:
            assert how == ["tcx" if tcx else "clsact"] * 2
            for _ in range(5):
                device.write(packet())
            meter.wait_for_packets(5)
        assert attached(device.link) == []


def test_where_tcx_is_refused_a_filter_on_clsact_meters_and_goes_with_its_qdisc(
    pair: tuple[Link, Link], without_tcx: None
) -> None:
    sender, metered = pair
    before = qdiscs(metered)
    with metering(metered.namespace) as meter:
        with following(meter.attacher(), "eth0") as how:
            assert how == ["clsact", "clsact"]
            assert all("flowexp" in tc_filters(metered, direction) for direction in ("ingress", "egress"))
            send(sender, metered)
            send(metered, sender, 3)
            meter.wait_for_packets(8)
        assert attached(metered) == []
        assert qdiscs(metered) == before


def test_filters_of_others_on_the_same_clsact_stay_as_they_are(pair: tuple[Link, Link], without_tcx: None) -> None:
    sender, metered = pair
    tc = ["tc", "-n", metered.namespace.name]
    run([*tc, "qdisc", "add", "dev", "eth0", "clsact"])
    for direction in ("ingress", "egress"):
        run([*tc, "filter", "add", "dev", "eth0", direction, "protocol", "all", "pref", "49152", "u32",
             "match", "u32", "0", "0", "flowid", "1:1"])  # fmt: skip
    before = (qdiscs(metered), tc_filters(metered, "ingress"), tc_filters(metered, "egress"))
    with metering(metered.namespace) as meter:
        with following(meter.attacher(), "eth0") as how:
            assert how == ["clsact", "clsact"]
            send(sender, metered)
            meter.wait_for_packets(5)
        assert (qdiscs(metered), tc_filters(metered, "ingress"), tc_filters(metered, "egress")) == before
    run([*tc, "qdisc", "del", "dev", "eth0", "clsact"])


def test_one_direction_on_clsact_leaves_with_its_qdisc(pair: tuple[Link, Link], without_tcx: None) -> None:
    _, metered = pair
    before = qdiscs(metered)
    with metering(metered.namespace) as meter, following(meter.attacher(direction="egress"), "eth0") as how:
        assert how == ["clsact"]
    assert qdiscs(metered) == before


def test_a_filter_that_a_killed_exporter_left_is_replaced_not_doubled(
    pair: tuple[Link, Link], without_tcx: None
) -> None:
    sender, metered = pair
    with metering(metered.namespace) as killed, metering(metered.namespace) as meter:
        killed.attacher().follow(netlink.resolve(["eth0"]))
        with following(meter.attacher(), "eth0"):
            send(sender, metered)
            meter.wait_for_packets(5)
            assert killed.ledger().seen == (0, 0)
        assert attached(metered) == []


def test_two_exporters_on_one_clsact_meter_each_and_take_but_their_own_away(
    pair: tuple[Link, Link], without_tcx: None
) -> None:
    sender, metered = pair
    with metering(metered.namespace) as first, metering(metered.namespace) as second:
        with following(first.attacher(handle=handle_of("/sys/fs/bpf/first")), "eth0"):
            with handle_for_once() as handle, following(second.attacher(handle=handle), "eth0"):
                send(sender, metered)
                for each in (first, second):
                    each.wait_for_packets(5)
            send(sender, metered)
            first.wait_for_packets(10)
            assert second.ledger().seen[0] == 5
        assert attached(metered) == []


def test_a_filter_of_one_who_metered_once_and_was_killed_is_taken_away_and_no_neighbours(
    pair: tuple[Link, Link], without_tcx: None
) -> None:
    sender, metered = pair
    with metering(metered.namespace) as killed, metering(metered.namespace) as meter:
        with handle_for_once() as handle:
            killed.attacher(handle=handle).follow(netlink.resolve(["eth0"]))
            assert handle not in handles_left()
        with following(meter.attacher(handle=handle_of("/sys/fs/bpf/neighbour")), "eth0"):
            netlink.remove_filters(handle_of("/sys/fs/bpf/flowexp"), handles_left())
            send(sender, metered)
            meter.wait_for_packets(5)
        assert killed.ledger().seen == (0, 0)
        assert attached(metered) == []


def test_a_device_that_goes_while_it_is_metered_on_clsact_is_no_error(
    pair: tuple[Link, Link], without_tcx: None
) -> None:
    _, metered = pair
    with metering(metered.namespace) as meter, following(meter.attacher(), "eth0") as how:
        assert how == ["clsact", "clsact"]
        metered.namespace.ip("link", "del", "eth0")


def test_an_attachment_that_fails_half_way_leaves_nothing_attached(
    pair: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, metered = pair

    def no_room(*_: object) -> None:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))

    monkeypatch.setattr(libbpf, "update", no_room)
    with metering(metered.namespace) as meter:
        attacher = meter.attacher()
        with pytest.raises(FlowexpError, match="eth0 ingress: more interfaces than the packet path has room for"):
            attacher.follow(netlink.resolve(["eth0"]))
        attacher.detach_all()
        assert attached(metered) == []


# XDP


def test_xdp_is_native_on_veth_and_counts_what_comes_in(pair: tuple[Link, Link]) -> None:
    sender, metered = pair
    with metering(metered.namespace) as meter:
        with following(meter.attacher(direction="ingress", hook="xdp"), "eth0") as how:
            assert how == ["xdp"]
            send(sender, metered)
            send(metered, sender, 3)
            meter.wait_for_packets(5)
        assert attached(metered) == []


def send_over_loopback(count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 0))
        for _ in range(count):
            sender.sendto(b"", sender.getsockname())


def test_generic_xdp_is_refused_while_gro_is_on() -> None:
    with namespaces("meter") as (namespace,), metering(namespace) as meter:
        attacher = meter.attacher(direction="ingress", hook="xdp")
        with pytest.raises(FlowexpError) as refused:
            attacher.follow(netlink.resolve(["lo"]))
        assert str(refused.value) == (
            "lo: its driver has no XDP, and generic XDP miscounts while GRO is on: "
            "'ethtool -K lo gro off', hook = \"tc\", or xdp_force = true"
        )
        assert attached(Link(namespace, "lo")) == []


def test_generic_xdp_with_gro_on_is_for_those_who_force_it() -> None:
    with namespaces("meter") as (namespace,), metering(namespace) as meter:
        attacher = meter.attacher(direction="ingress", hook="xdp", xdp_force=True)
        with following(attacher, "lo") as how:
            assert how == ["xdp-generic"]
            send_over_loopback(5)
            meter.wait_for_packets(5)
        assert attached(Link(namespace, "lo")) == []


def test_generic_xdp_is_used_where_gro_is_off() -> None:
    needs.need(needs.tools("ethtool"))
    with namespaces("meter") as (namespace,), metering(namespace) as meter:
        Link(namespace, "lo").set_offloads(gro=False)
        with following(meter.attacher(direction="ingress", hook="xdp"), "lo") as how:
            assert how == ["xdp-generic"]


def test_xdp_on_a_device_without_ethernet_is_refused() -> None:
    needs.need(needs.tun())
    with namespaces("meter") as (namespace,), tun.Device(namespace, "tun0"), metering(namespace) as meter:
        with pytest.raises(FlowexpError, match='tun0: XDP is for Ethernet devices; use hook = "tc" here'):
            meter.attacher(direction="ingress", hook="xdp").follow(netlink.resolve(["tun0"]))


@pytest.mark.parametrize("mode", [XDP_NATIVE, XDP_GENERIC], ids=["native", "generic"])
def test_another_xdp_program_is_left_alone_and_the_error_says_what_to_do(pair: tuple[Link, Link], mode: int) -> None:
    _, metered = pair
    with metering(metered.namespace) as other, metering(metered.namespace) as meter:
        ifindex = socket.if_nametoindex("eth0")
        link = libbpf.create_link(other.process.programs["xdp_ethernet"], ifindex, libbpf.XDP, flags=mode)
        try:
            with pytest.raises(FlowexpError) as refused:
                meter.attacher(direction="ingress", hook="xdp").follow(netlink.resolve(["eth0"]))
            assert str(refused.value) == (
                'eth0 ingress: another XDP program is attached; it is left alone: use hook = "tc" here'
            )
            assert attached(metered) == ["eth0: XDP program"]
        finally:
            os.close(link)


# Devices that come and go


@contextmanager
def exporting(namespace: Namespace, directory: Path, *interfaces: str) -> Iterator[tuple[Exporter, MessageFile]]:
    file = MessageFile(directory / "flows.ipfix")
    options = {"collectors": [file.url], "configuration": {"log_level": "debug"}}
    with Exporter(namespace, directory, interfaces=interfaces, **options) as exporter:
        yield exporter, file


def is_metered(link: Link) -> bool:
    return tcx_programs(link, "egress") == 1  # the last to be attached


def packets_in(file: MessageFile) -> int:
    return sum(number(record, PACKETS) for record in records(file.messages()))


def wait_until_metered(links: Sequence[Link], exporter: Exporter) -> None:
    for link in links:
        try:
            wait_for(f"{link.name} to be metered", lambda link=link: is_metered(link), timeout_s=5)
        except TimeoutError as error:
            raise AssertionError(f"{error}; the log: {exporter.log}") from error


def test_a_device_that_comes_later_and_matches_a_glob_is_metered_until_it_goes(tmp_path: Path) -> None:
    with namespaces("host", "meter") as (host, meter):
        rounds = 0
        with exporting(meter, tmp_path, "late*") as (exporter, file):
            assert "interfaces late*: none is there yet; waiting for one" in exporter.log
            for packets in (5, 7):
                sender, late = veth(host, meter, names=("eth0", "late0"))
                wait_until_metered([late], exporter)
                send(sender, late, packets)
                ifindex = late.ifindex
                meter.ip("link", "del", "late0")
                line = f"metering late0 egress (tcx, ifindex {ifindex})"
                assert line in exporter.log
                rounds += 1
                wait_for("it to be let go of", lambda n=rounds: exporter.log.count("no longer metering late0 e") == n)
            assert exporter.stop() == 0, exporter.log
            assert exporter.ledger().closes
        assert packets_in(file) == 12


def test_a_device_that_is_renamed_is_metered_under_the_name_that_is_asked_for(
    pair: tuple[Link, Link], tmp_path: Path
) -> None:
    sender, metered = pair
    with exporting(metered.namespace, tmp_path, "wan*") as (exporter, file):
        metered.set("down")
        metered.set("name", "wan-0.1é")
        renamed = Link(metered.namespace, "wan-0.1é")
        renamed.set("up")
        wait_until_metered([renamed], exporter)
        send(sender, renamed)
        assert exporter.stop() == 0, exporter.log
        assert attached(renamed) == []
    assert packets_in(file) == 5


def test_a_device_that_cannot_be_metered_does_not_keep_others_from_being_metered(tmp_path: Path) -> None:
    needs.need(needs.tun())
    with namespaces("host", "meter") as (host, meter), exporting(meter, tmp_path, "x*") as (exporter, _):
        with tun.Device(meter, "odd") as odd:
            odd.link.set("down")
            fcntl.ioctl(odd._file, TUNSETLINK, ARPHRD_IEEE80211)
            odd.link.set("name", "x-odd")
            _, late = veth(host, meter, names=("eth0", "x-late"))
            wait_until_metered([late], exporter)
            said = f"x-odd: link type {ARPHRD_IEEE80211} (ARPHRD) is not supported"
            wait_for("the other to be named", lambda: said in exporter.log)
            assert exporter.stop() == 0, exporter.log
