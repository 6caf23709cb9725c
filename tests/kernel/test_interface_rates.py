# SPDX-License-Identifier: GPL-2.0-or-later
"""Interfaces with sampling intervals of their own: one exporter, an Observation Domain for each interval.

By count and on one CPU it is known how many packets are selected.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.collectors import MessageFile, Nfcapd, Recorder
from lab.flowexp import BPFFS, PIN_PREFIX, Exporter, remove_pins
from lab.flows import Counts, add_up, total
from lab.netns import Link, bring_up, namespaces, veth
from lab.process import on_one_cpu
from lab.traffic import STACKS, make_capture, replay
from lab.wait import wait_for
from storm import sending, write_capture
from test_sampling import FLOWS, PACKETS, ScalingNfacctd, check_packets, check_scaled

from flowexp.protocol.decode import Decoder
from flowexp.rates import domain_of

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

INTERVALS = {"lan": 10, "wan0": 100, "dmz": 4}
SAMPLING = {"interval": 4, "by_interface": {"lan": 10, "w*": 100}}
DOMAIN = 7
DOMAINS = {"dmz": DOMAIN, "lan": domain_of(DOMAIN, 10), "wan0": domain_of(DOMAIN, 100)}


class Told(NamedTuple):
    """What records were told under."""

    domain: int
    interval: int
    ifindex: int


def told(messages: Iterable[bytes]) -> Counter[Told]:
    """How many packets records carry, each taken by what its domain's Options said last. No record is missing."""
    packets: Counter[Told] = Counter()
    intervals: dict[int, int] = {}
    decoder = Decoder()
    for message in messages:
        decoded = decoder.decode(message, "session")
        assert (decoded.problems, decoded.lost_records, decoded.sets_without_template) == ([], 0, 0)
        domain = decoded.observation_domain_id
        for record in decoded.options_records:
            if "samplingInterval" in record:
                assert record["observationDomainId"] == domain
                intervals[domain] = record["samplingInterval"]
        for record in decoded.records:
            packets[Told(domain, intervals[domain], record["ingressInterface"])] += record["packetDeltaCount"]
    return packets


def configuration(**more: Any) -> dict[str, Any]:
    export = {"observation_domain_id": DOMAIN}
    timeouts = {"idle": 600, "active": 3600}
    return {"direction": "ingress", "export": export, "timeouts": timeouts, "sampling": SAMPLING, **more}


@pytest.mark.parametrize("mode", ["random", "count"])
@pytest.mark.parametrize("protocol", ["ipfix", "netflow9", "netflow5"])
def test_collectors_scale_each_interface_by_its_own_interval(protocol: str, mode: str, tmp_path: Path) -> None:
    """Two that judge, and one that tells domains apart."""
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "nfacctd", "tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        links = {name: veth(sender, meter, names=(name, name)) for name in INTERVALS}
        mac = links["lan"][0].mac
        stacks = [stack for stack in STACKS if stack.ip_version == 4 or protocol != "netflow5"]
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(mac, mac), stacks=stacks)
        with (
            Nfcapd(meter, tmp_path) as nfcapd,
            ScalingNfacctd(meter, tmp_path) as nfacctd,
            Recorder(meter) as recorder,
        ):
            urls = [f"{each.url}?protocol={protocol}" for each in (nfcapd, nfacctd)] + [recorder.url]
            sampled = configuration(sampling={**SAMPLING, "mode": mode})
            with Exporter(
                meter, tmp_path, interfaces=list(INTERVALS), collectors=urls, configuration=sampled
            ) as exporter:
                for left, _ in links.values():
                    assert replay(left, capture) == PACKETS
                assert exporter.stop() == 0, exporter.log
            ledger = exporter.ledger()
            assert ledger.closes
            assert ledger.seen == ledger.exported + ledger.not_metered["not selected"] == PACKETS * len(INTERVALS)
            records = told(recorder.messages())
            assert sum(records.values()) == ledger.exported
            for collector in (nfcapd, nfacctd):
                collector.finish()
                assert collector.losses() == []
            for name, interval in INTERVALS.items():
                ifindex = links[name][1].ifindex
                selected = records[Told(DOMAINS[name], interval, ifindex)]
                check_packets(selected * interval, PACKETS, (interval,))
                scaled = of_nfcapd(nfcapd, ifindex)
                assert scaled.packets == selected * interval
                check_scaled(scaled, total(capture.flows), (interval,))
                if protocol == "netflow9":  # of whatever domain, nfacctd 1.7.7 takes the interval that it was told last
                    assert of_nfacctd(nfacctd, ifindex).packets == selected * max(INTERVALS.values())
                else:
                    assert of_nfacctd(nfacctd, ifindex) == scaled
    assert len(records) == len(INTERVALS)


def of_nfcapd(nfcapd: Nfcapd, ifindex: int) -> Counts:
    return total(nfcapd.flows(lambda record: record["input_snmp"] == ifindex))


def of_nfacctd(nfacctd: ScalingNfacctd, ifindex: int) -> Counts:
    mine = (record for record in nfacctd.records() if int(record["iface_in"]) == ifindex)
    return total(add_up(map(nfacctd._flow, mine)))


class Router:
    """Three interfaces that are sent to in turn, and a file as Collector."""

    def __init__(self, links: dict[str, tuple[Link, Link]], directory: Path) -> None:
        self.links, self.meter, self.directory = links, links["lan"][1].namespace, directory
        self.file = MessageFile(directory / "flows.ipfix")
        mac = links["lan"][0].mac
        self._capture = make_capture(directory / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(mac, mac))

    def exporter(self, **more: Any) -> Exporter:
        return Exporter(self.meter, self.directory, interfaces=["*[!o]"], configuration=self.configuration(**more))

    def configuration(self, **more: Any) -> dict[str, Any]:
        sampling = {**SAMPLING, "mode": "count", **more.pop("sampling", {})}
        return configuration(collector=[{"url": self.file.url}], sampling=sampling, **more)

    def send(self, *names: str) -> None:
        with on_one_cpu():
            for name in names or self.links:
                assert replay(self.links[name][0], self._capture) == PACKETS

    def told(self, domain: str, interval: int, interface: str) -> Told:
        domain_id = domain_of(DOMAIN, interval) if domain == "own" else DOMAIN
        return Told(domain_id, interval, self.links[interface][1].ifindex)


@pytest.fixture()
def router(tmp_path: Path) -> Iterable[Router]:
    needs.need(needs.kernel(), needs.tools("tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        yield Router({name: veth(sender, meter, names=(name, name)) for name in INTERVALS}, tmp_path)


def test_by_count_one_packet_in_so_many_of_each_interface_is_metered(router: Router) -> None:
    with router.exporter() as exporter:
        router.send()
        assert exporter.stop() == 0, exporter.log
    assert told(router.file.messages()) == {
        router.told("own", 10, "lan"): PACKETS // 10,
        router.told("own", 100, "wan0"): PACKETS // 100,
        router.told("configured", 4, "dmz"): PACKETS // 4,
    }
    ledger = exporter.ledger()
    assert ledger.closes
    assert ledger.not_metered["not selected"] == sum(PACKETS - PACKETS // each for each in INTERVALS.values())


def test_where_some_interfaces_are_sampled_all_of_the_others_is_metered(router: Router) -> None:
    """Or the other way round: an interval of 1 is one like any other."""
    with router.exporter(sampling={"interval": 1}) as exporter:
        router.send()
        exporter.reload(router.configuration(sampling={"interval": 50, "by_interface": {"lan": 1}}))
        router.send()
        assert exporter.stop() == 0, exporter.log
    assert told(router.file.messages()) == {
        router.told("own", 10, "lan"): PACKETS // 10,
        router.told("own", 100, "wan0"): PACKETS // 100,
        router.told("configured", 1, "dmz"): PACKETS,
        router.told("own", 1, "lan"): PACKETS,
        router.told("configured", 50, "wan0"): PACKETS // 50,
        router.told("configured", 50, "dmz"): PACKETS // 50,
    }
    assert exporter.ledger().closes


def test_a_reload_ends_flows_of_an_interface_under_the_interval_that_it_had(router: Router) -> None:
    """Its new flows are of another domain. An interval that comes again goes on where its domain was."""
    with router.exporter() as exporter:
        router.send()
        exporter.reload(router.configuration(sampling={"by_interface": {"lan": 20, "w*": 100}}))
        assert exporter.status()["ledger"]["inTable"]["packets"] == 0
        router.send("lan", "wan0")
        exporter.reload(router.configuration())
        router.send("lan")
        assert exporter.status()["ledger"]["missing"] == {"packets": 0, "octets": 0}
        assert exporter.stop() == 0, exporter.log
    assert told(router.file.messages()) == {
        router.told("own", 10, "lan"): 2 * PACKETS // 10,
        router.told("own", 20, "lan"): PACKETS // 20,
        router.told("own", 100, "wan0"): 2 * PACKETS // 100,
        router.told("configured", 4, "dmz"): PACKETS // 4,
    }
    assert exporter.ledger().closes


def test_a_killed_exporters_flows_keep_their_intervals(router: Router) -> None:
    """Also those that came while there was none, and whatever the next configuration says of the interface."""
    pins = BPFFS / f"{PIN_PREFIX}interface-rates"
    table = {"pin_path": str(pins), "persist": True}
    try:
        with router.exporter(table=table) as exporter:
            router.send()
            exporter.process.kill()
        router.send("lan")
        changed = {"by_interface": {"dmz": 10, "w*": 100}}
        with router.exporter(table={**table, "persist": False}, sampling=changed) as exporter:
            router.send()
            assert exporter.stop() == 0, exporter.log
    finally:
        remove_pins(pins)
    assert told(router.file.messages()) == {
        router.told("own", 10, "lan"): 2 * PACKETS // 10,
        router.told("own", 100, "wan0"): 2 * PACKETS // 100,
        router.told("configured", 4, "dmz"): PACKETS // 4,
        router.told("configured", 4, "lan"): PACKETS // 4,
        router.told("own", 10, "dmz"): PACKETS // 10,
    }
    assert exporter.ledger().closes


def test_an_interface_that_comes_later_has_the_interval_of_its_name(router: Router) -> None:
    """Even where another one had its index, whose flows have not ended yet."""
    sender = router.links["lan"][0].namespace

    def send_to(name: str) -> None:
        wait_for(f"{name} to be metered", lambda: name in [each["interface"] for each in exporter.status()["attached"]])
        router.send(name)

    with router.exporter() as exporter:
        router.links["wan1"] = veth(sender, router.meter, names=("wan1", "wan1"))
        send_to("wan1")
        ifindex = router.links["wan1"][1].ifindex
        router.meter.ip("link", "delete", "wan1")
        router.meter.ip(*f"link add dmz1 index {ifindex} type veth peer name dmz1 netns {sender.name}".split())
        router.links["dmz1"] = bring_up(Link(sender, "dmz1"), Link(router.meter, "dmz1"))
        send_to("dmz1")
        assert exporter.stop() == 0, exporter.log
    assert told(router.file.messages()) == {
        Told(DOMAINS["wan0"], 100, ifindex): PACKETS // 100,
        Told(DOMAIN, 4, ifindex): PACKETS // 4,
    }


def test_under_traffic_each_packet_is_selected_by_one_interval_or_another(router: Router) -> None:
    """Whatever reloads and a kill make of it; of each interval as many as it should be."""
    pins = BPFFS / f"{PIN_PREFIX}interface-rates-traffic"
    capture = write_capture(router.directory / "storm.pcap", ports=100)
    intervals = ({"lan": 3}, {"lan": 30, "wan0": 3}, {"lan": 3, "wan0": 7})
    table = {"pin_path": str(pins), "persist": True}

    def wanted(interfaces: dict[str, int], *, persist: bool = True) -> dict[str, Any]:
        timeouts = {"idle": 1, "active": 1, "sweep_interval": 0.1}
        sampling = {"interval": 4, "by_interface": interfaces, "mode": "random"}
        more = {"table": {**table, "persist": persist}, "timeouts": timeouts}
        return {**router.configuration(sampling=sampling), **more}

    def passed() -> int:
        return sum(right.counters()["rx_packets"] for _, right in router.links.values())

    try:
        exporter = Exporter(router.meter, router.directory, interfaces=["*[!o]"], configuration=wanted(intervals[0]))
        exporter.pins = pins
        with sending(router.links["lan"][0], capture), sending(router.links["wan0"][0], capture):
            for interfaces in intervals[1:]:
                goal = passed() + PACKETS
                wait_for("packets to pass", lambda: passed() >= goal)  # noqa: B023
                exporter.reload(wanted(interfaces))
            exporter.process.kill()
            exporter = Exporter(
                router.meter, router.directory, interfaces=["*[!o]"], configuration=wanted(intervals[0], persist=False)
            )
        assert exporter.stop() == 0, exporter.log
    finally:
        remove_pins(pins)
    ledger = exporter.ledger()
    assert ledger.closes
    assert ledger.seen == passed()


def test_a_stream_carries_all_domains_and_each_transport_session_begins_with_the_templates_of_all(
    router: Router,
) -> None:
    with router.meter.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(60)
        collector = [{"url": f"tcp://127.0.0.1:{listener.getsockname()[1]}"}]
        timeouts = {"idle": 600, "active": 1, "sweep_interval": 0.1}
        wanted = {**router.configuration(), "collector": collector, "timeouts": timeouts}
        expected = {
            router.told("own", 10, "lan"): PACKETS // 10,
            router.told("own", 100, "wan0"): PACKETS // 100,
            router.told("configured", 4, "dmz"): PACKETS // 4,
        }
        with Exporter(router.meter, router.directory, interfaces=["*[!o]"], configuration=wanted) as exporter:
            for _ in range(2):
                stream, _ = listener.accept()
                with stream:
                    router.send()
                    stream.settimeout(60)
                    octets = b""
                    while sum(told(messages_in(octets)).values()) < sum(expected.values()):
                        octets += stream.recv(1 << 20)
                assert told(messages_in(octets)) == expected
            assert exporter.stop() == 0, exporter.log
    assert exporter.ledger().closes


def messages_in(octets: bytes) -> list[bytes]:
    """The whole Messages of a stream, in order."""
    messages, at = [], 0
    while at + 16 <= len(octets) and at + (length := int.from_bytes(octets[at + 2 : at + 4], "big")) <= len(octets):
        messages.append(octets[at : at + length])
        at += length
    return messages


def test_the_mode_that_is_told_is_that_under_which_records_were_sampled(router: Router) -> None:
    """By PSAMP's elements: selectorAlgorithm 3 is any packet, 1 the last (RFC 5477, section 8.2.1)."""
    psamp = [{"url": router.file.url, "psamp": True}]
    random, count = (
        {**router.configuration(sampling={"mode": mode}), "collector": psamp} for mode in ("random", "count")
    )
    with Exporter(router.meter, router.directory, interfaces=["*[!o]"], configuration=random) as exporter:
        router.send("lan", "dmz")
        exporter.reload(count)
        router.send("lan", "dmz")
        assert exporter.stop() == 0, exporter.log
    algorithms: dict[int, int] = {}
    packets: Counter[tuple[int, int]] = Counter()
    decoder = Decoder()
    for message in router.file.messages():
        decoded = decoder.decode(message, "session")
        for record in decoded.options_records:
            if "selectorAlgorithm" in record:
                algorithms[decoded.observation_domain_id] = record["selectorAlgorithm"]
        for record in decoded.records:
            domain = decoded.observation_domain_id
            packets[domain, algorithms[domain]] += record["packetDeltaCount"]
    assert set(packets) == {(DOMAINS[name], each) for name in ("lan", "dmz") for each in (1, 3)}
    assert (packets[DOMAINS["lan"], 1], packets[DOMAINS["dmz"], 1]) == (PACKETS // 10, PACKETS // 4)
