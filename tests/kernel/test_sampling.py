# SPDX-License-Identifier: GPL-2.0-or-later
"""Sampling: one packet in N of those on the wire, the others in the ledger, and Collectors that multiply by N.

Each CPU selects one packet in each N that it sees: of so many packets the number selected is known, but for the
windows that have not ended, one a CPU. Which ones is chance, and so are the octets.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import toml
from lab import decoders, needs
from lab.collectors import MessageFile, Nfacctd, Nfcapd
from lab.flowexp import BPFFS, PIN_PREFIX, Exporter, remove_pins
from lab.flows import Counts, total
from lab.netns import connect, namespaces, veth
from lab.process import on_one_cpu
from lab.traffic import make_capture, replay, send_frames
from lab.wait import wait_for
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from storm import sending, write_capture

from flowexp.protocol.decode import Decoder

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

INTERVAL, PACKETS, FLOWS = 10, 20_000, 1_800
UDP_SEGMENT = 103
DEVIATION_OCTETS = 750  # no distribution of IP lengths up to 1500 has a larger standard deviation


class ScalingNfacctd(Nfacctd):
    """nfacctd, told to multiply by the sampling interval."""

    configuration = Nfacctd.configuration + "\nnfacctd_renormalize: true\n"


def check_packets(scaled: int, sent: int, intervals: tuple[int, ...]) -> None:
    """Each CPU may have a window open, once for each interval that there was; not where each packet is metered."""
    assert abs(scaled - sent) <= sum(each for each in intervals if each > 1) * (os.cpu_count() or 1)


def check_scaled(scaled: Counts, sent: Counts, intervals: tuple[int, ...] = (INTERVAL,)) -> None:
    """The octets may differ by five standard deviations: less than once in a million runs."""
    assert scaled.packets % min(intervals) == 0
    check_packets(scaled.packets, sent.packets, intervals)
    bound = 5 * sum(interval * math.sqrt(sent.packets / interval) for interval in intervals) * DEVIATION_OCTETS
    assert abs(scaled.octets - sent.octets) <= bound


@pytest.mark.parametrize(("mode", "hook"), [("random", "tc"), ("count", "tc"), ("random", "xdp")])
def test_collectors_show_what_was_sent_after_their_own_scaling(mode: str, hook: str, tmp_path: Path) -> None:
    """IPv4 and IPv6, without VLAN tags and with one and two."""
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "nfacctd", "tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        left, _ = veth(sender, meter)
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, left.mac))
        with (
            Nfcapd(meter, tmp_path) as nfcapd,
            Nfcapd(meter, tmp_path) as nfcapd9,
            ScalingNfacctd(meter, tmp_path) as nfacctd,
        ):
            collectors = (nfcapd, nfcapd9, nfacctd)
            configuration: dict[str, Any] = {
                "sampling": {"mode": mode, "interval": INTERVAL}, "hook": hook, "direction": "ingress"
            }  # fmt: skip
            urls = [nfcapd.url, f"{nfcapd9.url}?protocol=netflow9", nfacctd.url]
            with Exporter(meter, tmp_path, collectors=urls, configuration=configuration) as exporter:
                assert replay(left, capture) == PACKETS
                assert exporter.stop() == 0, exporter.log
            for collector in collectors:
                collector.finish()
                assert collector.losses() == []
                check_scaled(total(collector.flows()), total(capture.flows))
        ledger = exporter.ledger()
        assert ledger.closes
        assert (ledger.seen, ledger.not_metered["not selected"]) == (PACKETS, PACKETS - ledger.exported)


def test_what_was_metered_before_the_interval_changed_is_exported_under_the_old_one(tmp_path: Path) -> None:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "tcpreplay"))
    pins = BPFFS / f"{PIN_PREFIX}sampling"
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, left.mac))
        sent = total(capture.flows)
        with Nfcapd(meter, tmp_path) as nfcapd:
            for number, interval in enumerate((20, 5)):
                configuration = {
                    "sampling": {"interval": interval},
                    "direction": "ingress",
                    "table": {"pin_path": str(pins), "persist": number == 0},
                }
                with Exporter(meter, tmp_path, collectors=[nfcapd.url], configuration=configuration) as exporter:
                    if number:
                        assert replay(left, capture) == PACKETS
                    assert exporter.stop() == 0, exporter.log
                if not number:
                    assert replay(left, capture) == PACKETS  # into the table that waits for the next exporter
            nfcapd.finish()
            check_scaled(total(nfcapd.flows()), Counts(2 * sent.packets, 2 * sent.octets), (20, 5))
    assert not pins.exists() or not list(pins.glob("*/*"))


class Rate(NamedTuple):
    """An interval, and how many packets records carry that were sent under it."""

    interval: int
    packets: int


def rates(messages: Iterable[bytes]) -> list[Rate]:
    """As they follow each other in an IPFIX File: a Collector takes each record by what it was told last."""
    found: list[Rate] = []
    interval = 0
    decoder = Decoder()
    for message in messages:
        decoded = decoder.decode(message, "file")
        assert (decoded.problems, decoded.lost_records) == ([], 0)
        for record in decoded.options_records:
            interval = record.get("samplingInterval", interval)
        for record in decoded.records:
            before = found.pop().packets if found and found[-1].interval == interval else 0
            found.append(Rate(interval, before + record["packetDeltaCount"]))
    return found


def test_a_reload_ends_flows_under_the_old_rate_and_the_ledger_goes_on(tmp_path: Path) -> None:
    """Nothing is due but what the reload makes due. Where each packet is metered, the figures are exact."""
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "tcpreplay"))
    samplings = [
        {"interval": 1}, {"interval": 20}, {"interval": 5, "mode": "count"}, {"interval": 5}, {"interval": 1}
    ]  # fmt: skip
    intervals = tuple(int(each["interval"]) for each in samplings)
    with namespaces("sender", "meter") as (sender, meter):
        left, _ = veth(sender, meter)
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, left.mac))
        file = MessageFile(tmp_path / "flows.ipfix")
        with Nfcapd(meter, tmp_path) as nfcapd:
            same: dict[str, Any] = {
                "timeouts": {"idle": 600, "active": 3600},
                "direction": "ingress",
                "collector": [{"url": file.url}, {"url": nfcapd.url}],
            }
            with Exporter(meter, tmp_path, configuration={**same, "sampling": samplings[0]}) as exporter:
                for number, sampling in enumerate(samplings):
                    if number:
                        exporter.reload({**same, "sampling": sampling})
                    assert exporter.status()["configuration"]["needRestart"] == []
                    assert len([path for path in exporter.pins.iterdir() if path.is_dir()]) == 1
                    ledger = exporter.status()["ledger"]
                    assert ledger["seen"]["packets"] == number * PACKETS
                    assert (ledger["inTable"]["packets"], ledger["missing"]["octets"]) == (0, 0)
                    assert replay(left, capture) == PACKETS
                assert exporter.stop() == 0, exporter.log
            nfcapd.finish()
            sent = total(capture.flows)
            times = len(samplings)
            check_scaled(total(nfcapd.flows()), Counts(times * sent.packets, times * sent.octets), intervals)
    told = rates(file.messages())
    assert [told[0], told[-1]] == [Rate(1, PACKETS)] * 2
    assert [each.interval for each in told] == [1, 20, 5, 1]  # another mode has the same rate
    for rate, sendings in zip(told, (1, 1, 2, 1)):
        check_packets(rate.interval * rate.packets, sendings * PACKETS, (rate.interval,) * sendings)
    ledger = exporter.ledger()
    assert ledger.closes
    assert (ledger.seen, ledger.exported) == (times * PACKETS, sum(each.packets for each in told))


@pytest.mark.parametrize("hook", ["tc", "xdp"])
def test_under_traffic_each_packet_is_seen_once_whatever_the_rate_becomes(hook: str, tmp_path: Path) -> None:
    needs.need(needs.kernel(), needs.tools("tcpreplay"))
    intervals = (1, 10, 3, 1, 100, 1)
    file = MessageFile(tmp_path / "flows.ipfix")
    done = threading.Event()
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, left.mac))

        def send() -> None:
            while not done.is_set():
                replay(left, capture)

        def configuration(interval: int) -> dict[str, Any]:
            timeouts = {"idle": 1, "active": 1, "sweep_interval": 0.1}
            return {"timeouts": timeouts, "sampling": {"interval": interval}, **same}

        same = {"hook": hook, "direction": "ingress", "collector": [{"url": file.url}]}
        with Exporter(meter, tmp_path, configuration=configuration(1)) as exporter:
            traffic = threading.Thread(target=send)
            traffic.start()
            try:
                for interval in intervals[1:]:
                    goal = right.counters()["rx_packets"] + PACKETS
                    wait_for("packets to pass", lambda: right.counters()["rx_packets"] >= goal)  # noqa: B023
                    exporter.reload(configuration(interval))
            finally:
                done.set()
                traffic.join()
            assert exporter.stop() == 0, exporter.log
        received = right.counters()["rx_packets"]
    told = rates(file.messages())
    ledger = exporter.ledger()
    assert ledger.closes
    assert (ledger.seen, ledger.exported) == (received, sum(each.packets for each in told))
    assert {each.interval for each in told} == set(intervals)
    check_packets(sum(each.interval * each.packets for each in told), received, intervals)


def test_the_ledger_goes_on_where_an_exporter_is_killed_between_two_tables(tmp_path: Path) -> None:
    """Wherever in between: the next one finds both, under traffic, and each packet is seen once."""
    needs.need(needs.kernel(), needs.tools("tcpreplay", "taskset"))
    file = MessageFile(tmp_path / "flows.ipfix")
    pins = BPFFS / f"{PIN_PREFIX}sampling-killed"

    def configuration(interval: int, *, persist: bool = True) -> dict[str, Any]:
        table = {"pin_path": str(pins), "persist": persist}
        collector = [{"url": file.url}]
        return {"direction": "ingress", "table": table, "sampling": {"interval": interval}, "collector": collector}

    def tables() -> list[int]:
        return [int(path.name) for path in pins.iterdir() if path.is_dir()]

    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        capture = write_capture(tmp_path / "sent.pcap", ports=100)
        try:
            exporter = Exporter(meter, tmp_path, configuration=configuration(1))
            with sending(left, capture):
                for interval, persist in ((7, True), (1, False)):
                    before = max(tables())
                    exporter.configuration.write_text(toml.dumps(configuration(interval)))
                    os.kill(exporter.process.pid, signal.SIGHUP)
                    wait_for("another table", lambda: max(tables()) > before, timeout_s=30)  # noqa: B023
                    exporter.process.kill()
                    exporter = Exporter(meter, tmp_path, configuration=configuration(interval, persist=persist))
                    assert len(tables()) == 1
            assert exporter.stop() == 0, exporter.log
        finally:
            remove_pins(pins)
        received = right.counters()["rx_packets"]
    ledger = exporter.ledger()
    assert ledger.closes
    assert ledger.seen == received
    assert ledger.not_metered["not selected"] > 0


def test_a_reload_that_is_refused_leaves_the_rate_as_it_is(tmp_path: Path) -> None:
    needs.need(needs.kernel())
    file = MessageFile(tmp_path / "flows.ipfix")
    with namespaces("sender", "meter") as (sender, meter):
        left, _ = veth(sender, meter)
        collectors = [{"url": file.url}]
        with Exporter(meter, tmp_path, configuration={"collector": collectors, "direction": "ingress"}) as exporter:
            wrong = exporter.configuration.read_text() + "[sampling]\ninterval = 9\n"
            exporter.configuration.write_text(wrong + "[[collector]]\nurl = 'file:///nowhere/x'\n")
            os.kill(exporter.process.pid, signal.SIGHUP)
            wait_for("the refusal", lambda: exporter.status()["configuration"]["refusal"])
            assert len([path for path in exporter.pins.iterdir() if path.is_dir()]) == 1
            send_frames(left, [bytes(Ether() / IP(src="10.1.0.1", dst="10.1.0.2") / UDP())] * 100)
            assert exporter.stop() == 0, exporter.log
    assert rates(file.messages()) == [Rate(1, exporter.ledger().seen)]


@pytest.mark.parametrize(("interval", "whole", "last"), [(41, 0, 50), (10, 200, 5), (82, 0, 25), (2, 1000, 25)])
def test_each_segment_of_a_super_packet_is_selected_or_not(
    interval: int, whole: int, last: int, tmp_path: Path
) -> None:
    """By count, on one CPU: of 50 super-packets of 40 whole segments and a short one each it is known which."""
    needs.need(needs.kernel())
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"sampling": {"mode": "count", "interval": interval}, "direction": "egress"}
    with namespaces("client", "server") as (client, server):
        ends = veth(client, server)
        connect(*ends, ("10.1.0.1/24", "10.1.0.2/24"))
        ends[0].set_offloads(tso=True, gso=True)
        with Exporter(client, tmp_path, collectors=[file.url], configuration=configuration) as exporter:
            with on_one_cpu(), server.socket(socket.AF_INET) as sink, client.socket(socket.AF_INET) as sender:
                sink.bind(("10.1.0.2", 9))
                sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1200)
                for _ in range(50):
                    sender.sendto(bytes(40 * 1200 + 100), ("10.1.0.2", 9))
            assert exporter.stop() == 0, exporter.log
    ledger = exporter.ledger()
    assert ledger.closes
    assert ledger.seen == 50 * 41
    counts = [decoders.flow_of(record)[1] for record in decoders.records(file.messages())]
    assert sum(each.packets for each in counts) == whole + last
    assert sum(each.octets for each in counts) == whole * 1228 + last * 128


def test_no_segment_of_what_was_seen_coming_in_is_told_as_not_selected(tmp_path: Path) -> None:
    """Of super-packets that a router forwards: each segment is sampled as it comes in, and as it leaves none is."""
    needs.need(needs.kernel())
    sampling = {"mode": "count", "interval": 10}
    with namespaces("client", "router", "server") as (client, router, server):
        (out, left), (right, away) = veth(client, router), veth(router, server, names=("eth1", "eth0"))
        connect(out, left, ("10.1.0.1/24", "10.1.0.254/24"))
        connect(right, away, ("10.2.0.254/24", "10.2.0.2/24"))
        router.sysctl("net.ipv4.ip_forward", 1)
        client.ip("route", "add", "10.2.0.0/24", "via", "10.1.0.254")
        for link in (out, left, right):
            link.set_offloads(tso=True, gso=True)
        with Exporter(router, tmp_path, interfaces=("eth*",), collectors=[MessageFile(tmp_path / "flows.ipfix").url],
                      configuration={"sampling": sampling, "direction": "once"}) as exporter:  # fmt: skip
            with on_one_cpu(), server.socket(socket.AF_INET) as sink, client.socket(socket.AF_INET) as sender:
                sink.bind(("10.2.0.2", 9))
                sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1200)
                for _ in range(50):
                    sender.sendto(bytes(40 * 1200 + 100), ("10.2.0.2", 9))
            assert exporter.stop() == 0, exporter.log
    ledger = exporter.ledger()
    assert ledger.closes
    assert ledger.seen == 2 * 50 * 41
    assert f"{50 * 41} not metered (seen at ingress)" in exporter.log
