# SPDX-License-Identifier: GPL-2.0-or-later
"""An interface that is deleted under traffic and made again, many times, while another is metered without a pause."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lab import needs
from lab.collectors import MessageFile
from lab.flowexp import Exporter
from lab.netns import Link, Namespace, bring_up, namespaces, tc_filters, tcx_programs, veth
from lab.process import run
from lab.traffic import send_frames
from lab.wait import wait_for
from storm import UDP, flow_sums, frame, records, sending, write_capture

from flowexp.errors import FlowexpError
from flowexp.kernel import default_routes, libbpf, netlink
from flowexp.meter import MeteringProcess, new_table

pytestmark = pytest.mark.kernel

TIMES = int(os.environ.get("FLOWEXP_INTERFACES", "50"))
MARKED_PORT, MARKED_PACKETS = 50_000, 25
XDP_GENERIC = 2  # XDP_FLAGS_SKB_MODE
INDEX = 4000
METERED_S = 10.0  # the deadline on a busy machine; on an idle one it takes a hundredth of a second


@contextmanager
def foreign_programs(link: Link) -> Iterator[None]:
    """Someone else's TC filters, TCX program and XDP program are on this link, before and after."""
    meter = MeteringProcess(new_table(64), programs=("ingress_ethernet", "xdp_ethernet"), max_flows=64)
    run(["tc", "-n", link.namespace.name, "qdisc", "add", "dev", link.name, "clsact"])
    for direction in ("ingress", "egress"):
        run(["tc", "-n", link.namespace.name, "filter", "add", "dev", link.name, direction, "prio", "7",
             "protocol", "all", "u32", "match", "u32", "0", "0", "flowid", "1:1"])  # fmt: skip
    ifindex = link.ifindex
    with link.namespace.entered():
        held = [
            libbpf.create_link(meter.programs["xdp_ethernet"], ifindex, libbpf.XDP, flags=XDP_GENERIC),
            libbpf.create_link(meter.programs["ingress_ethernet"], ifindex, libbpf.TCX_INGRESS),
        ]
    before = programs_on(link)
    try:
        yield
        assert programs_on(link) == before
        assert all(libbpf.link_ifindex(fd) == ifindex for fd in held)
    finally:
        for fd in held:
            os.close(fd)
        meter.close()
        run(["tc", "-n", link.namespace.name, "qdisc", "del", "dev", link.name, "clsact"])


def programs_on(link: Link) -> list[object]:
    filters = [tc_filters(link, direction).partition("Sent")[0] for direction in ("ingress", "egress")]
    return [*filters, tcx_programs(link, "ingress"), link._show("-d")["xdp"]]


def make(sender: Namespace, meter: Namespace, *, index: int | None) -> tuple[Link, Link]:
    """A veth pair; the metered end gets this index, or one of the kernel's choice."""
    if index is None:
        return veth(sender, meter, names=("gone0", "gone0"))
    meter.ip("link", "add", "gone0", "index", str(index), "type", "veth", "peer", "name", "gone0", "netns", sender.name)
    return bring_up(Link(sender, "gone0"), Link(meter, "gone0"))


def has_received(link: Link, packets: int) -> bool:
    return link.counters()["rx_packets"] > packets


def test_an_interface_with_another_name_is_metered_on_and_goes_by_that_name(tmp_path: Path) -> None:
    needs.need(needs.kernel())
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"direction": "ingress", "sampling": {"mode": "count", "by_interface": {"wan*": 5}}}
    with namespaces("sender", "meter") as (sender, meter):
        source, metered = veth(sender, meter)
        with Exporter(
            meter, tmp_path, interfaces=("eth*", "wan*"), configuration=configuration, collectors=[file.url]
        ) as exporter:
            send_frames(source, [frame(4, UDP, 2001)] * MARKED_PACKETS)
            for words in (["down"], ["name", "wan0"], ["up"]):
                meter.ip("link", "set", "dev", "wan0" if words == ["up"] else "eth0", *words)
            wait_for("the new name", lambda: [each["interface"] for each in exporter.status()["attached"]] == ["wan0"])
            send_frames(source, [frame(4, UDP, 2002)] * MARKED_PACKETS)
            (program,) = exporter.status()["attached"]
            assert program["devicePackets"] == 2 * MARKED_PACKETS
            assert exporter.stop() == 0, exporter.log
        assert exporter.ledger().closes, exporter.log
        assert exporter.log.count("metering eth0") == 1 and "metering wan0" not in exporter.log
    rows = records(file.messages())
    found = {port: int(rows["packets"][rows["port"] == port].sum()) for port in (2001, 2002)}
    assert found == {2001: MARKED_PACKETS, 2002: MARKED_PACKETS // 5}


@pytest.mark.parametrize("index", [None, INDEX], ids=["another index each time", "the same index each time"])
def test_an_interface_that_comes_back_is_metered_again_and_no_other_is_disturbed(
    tmp_path: Path, index: int | None
) -> None:
    needs.need(needs.kernel(), needs.tools("tcpreplay", "taskset", "tc"))
    capture = write_capture(tmp_path / "flows.pcap", ports=100)
    marked = [frame(4, UDP, MARKED_PORT)] * MARKED_PACKETS
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"direction": "ingress", "timeouts": {"active": 0.3, "sweep_interval": 0.05, "linger": 0}}
    with namespaces("sender", "meter") as (sender, meter):
        steady, metered = veth(sender, meter)
        with (
            foreign_programs(metered),
            Exporter(
                meter, tmp_path, interfaces=("eth0", "gone*"), configuration=configuration, collectors=[file.url]
            ) as exporter,
        ):
            with sending(steady, capture, packets_per_s=20_000):
                for _ in range(TIMES):
                    source, link = make(sender, meter, index=index)
                    wait_for("the interface to be metered", partial(tcx_programs, link, "ingress"), timeout_s=METERED_S)
                    send_frames(source, marked)
                    with sending(source, capture, packets_per_s=5_000, until_gone=True):
                        wait_for("traffic on it", partial(has_received, link, 2 * MARKED_PACKETS))
                        meter.ip("link", "delete", "gone0")
            assert exporter.stop() == 0, exporter.log
        assert exporter.ledger().closes, exporter.log
        rows = records(file.messages())
        assert np.array_equal(*flow_sums(rows))
        assert rows["packets"][rows["port"] == MARKED_PORT].sum() == TIMES * MARKED_PACKETS
        assert rows["packets"][rows["interface"] == metered.ifindex].sum() == metered.counters()["rx_packets"]


def test_an_interface_made_again_with_the_same_index_before_the_exporter_looks_is_metered(tmp_path: Path) -> None:
    needs.need(needs.kernel())
    marked = [frame(4, UDP, MARKED_PORT)] * MARKED_PACKETS
    with namespaces("sender", "meter") as (sender, meter):
        make(sender, meter, index=INDEX)
        file = MessageFile(tmp_path / "flows.ipfix")
        with Exporter(meter, tmp_path, interfaces=("gone*",), collectors=[file.url]) as exporter:
            os.kill(exporter.process.pid, signal.SIGSTOP)
            meter.ip("link", "delete", "gone0")
            source, link = make(sender, meter, index=INDEX)
            os.kill(exporter.process.pid, signal.SIGCONT)
            wait_for("the interface to be metered", lambda: tcx_programs(link, "ingress"), timeout_s=METERED_S)
            send_frames(source, marked)
            assert exporter.stop() == 0, exporter.log
        assert exporter.ledger().exported == MARKED_PACKETS


@pytest.mark.parametrize(
    ("family", "address", "gateway"), [("-4", "10.{}.0.2/24", "10.{}.0.1"), ("-6", "fd0{}::2/64", "fd0{}::1")]
)
def test_metering_follows_the_default_route(tmp_path: Path, family: str, address: str, gateway: str) -> None:
    needs.need(needs.kernel())
    marked = [frame(4, UDP, MARKED_PORT)] * MARKED_PACKETS
    with namespaces("one", "other", "meter", ipv6=family == "-6") as (one, other, meter):
        _, first = veth(one, meter, names=("eth0", "first"))
        source, second = veth(other, meter, names=("eth0", "second"))
        for number, link in enumerate((first, second), 1):
            meter.ip("address", "add", address.format(number), "dev", link.name, *(["nodad"] if family == "-6" else []))
        meter.ip(family, "route", "add", "default", "via", gateway.format(1))
        file = MessageFile(tmp_path / "flows.ipfix")
        with Exporter(meter, tmp_path, interfaces=(), collectors=[file.url]) as exporter:
            assert (tcx_programs(first, "ingress"), tcx_programs(second, "ingress")) == (1, 0)
            meter.ip(family, "route", "replace", "default", "via", gateway.format(2))
            wait_for("the other interface to be metered", lambda: tcx_programs(second, "ingress"), timeout_s=METERED_S)
            assert tcx_programs(first, "ingress") == 0
            send_frames(source, marked)
            assert exporter.stop() == 0, exporter.log
        rows = records(file.messages())
        assert rows["packets"][rows["port"] == MARKED_PORT].sum() == MARKED_PACKETS


def test_of_routes_only_those_by_default_wake_the_exporter_and_count() -> None:
    needs.need(needs.kernel())
    with namespaces("far", "here", ipv6=True) as (far, here):
        _, link = veth(far, here)
        here.ip("address", "add", "10.1.0.2/24", "dev", "eth0")
        with here.entered(), netlink.LinkWatch() as watch:
            watch.changed()
            for destination in ("10.2.0.0/16", "10.3.0.1/32", "fd02::/16"):
                here.ip("route", "add", destination, "dev", "eth0")
            assert not watch.changed()
            assert default_routes.interfaces() == set()
            for route in (("default", "table", "99"), ("unreachable", "default", "metric", "9"), ("default",)):
                here.ip("route", "add", *route, *(() if "unreachable" in route else ("dev", "eth0")))
                assert watch.changed(), route
            assert default_routes.interfaces() == {link.ifindex}
            here.ip("route", "delete", "default", "dev", "eth0")
            assert watch.changed()
            here.ip("route", "flush", "table", "99")
            assert default_routes.interfaces() == set()
            here.ip("route", "add", "default", "nexthop", "via", "10.1.0.3", "nexthop", "via", "10.1.0.4")
            assert default_routes.interfaces() == {link.ifindex}


def test_our_filter_is_known_from_another_one_and_from_none() -> None:
    needs.need(needs.namespace_support(), needs.bpf())
    with namespaces("sender", "meter") as (sender, meter):
        _, link = veth(sender, meter)
        process = MeteringProcess(new_table(64), programs=("ingress_ethernet",), max_flows=64)
        ifindex = link.ifindex
        with meter.entered():
            assert not netlink.has_filter(ifindex, "ingress", handle=7)
            run(["tc", "-n", meter.name, "qdisc", "add", "dev", link.name, "clsact"])
            netlink.add_filter(ifindex, "ingress", 7, process.programs["ingress_ethernet"])
            assert netlink.has_filter(ifindex, "ingress", handle=7)
            assert not netlink.has_filter(ifindex, "egress", handle=7)
            assert not netlink.has_filter(ifindex, "ingress", handle=8)
            netlink.remove_filter(ifindex, "ingress", handle=7)
            run(["tc", "-n", meter.name, "filter", "add", "dev", link.name, "ingress", "prio", "7",
                 "protocol", "all", "u32", "match", "u32", "0", "0", "flowid", "1:1"])  # fmt: skip
            assert not netlink.has_filter(ifindex, "ingress", handle=7)
            run(["tc", "-n", meter.name, "qdisc", "del", "dev", link.name, "clsact"])
            assert not netlink.has_filter(INDEX, "ingress", handle=7)
        process.close()


def test_devices_are_listed_again_where_one_came_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyroute2 before 0.9 tells it: where that is what is installed, any new device would end the exporter."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkDumpInterrupted

    there, interruptions = netlink.interfaces(), iter(range(3))

    def interrupted(self: IPRoute) -> Iterator[object]:
        yield from self.link("dump")
        if next(interruptions, None) is not None:
            raise NetlinkDumpInterrupted

    monkeypatch.setattr(IPRoute, "get_links", interrupted, raising=False)
    assert netlink.interfaces() == there
    assert next(interruptions, None) is None
    interruptions = iter(lambda: 0, 1)
    with pytest.raises(FlowexpError, match="come and go faster than the kernel can list them"):
        netlink.interfaces()
