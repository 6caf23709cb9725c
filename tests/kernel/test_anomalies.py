# SPDX-License-Identifier: GPL-2.0-or-later
"""What is odd at an interface: connections that nobody answers, scans, frames too short or too long.

Scans and answers are those of the machine's own stack, floods are frames; every figure is exact.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from group_meter import Meter
from lab import needs
from lab.collectors import Recorder
from lab.flowexp import Exporter
from lab.netns import Link, Namespace, connect, namespaces, veth
from lab.traffic import send_frames
from lab.wait import wait_for
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from flowexp.metering import anomalies
from flowexp.metering.anomalies import INTERVAL_NS, FanOut
from flowexp.metering.sweep import Timeouts
from flowexp.protocol.decode import Decoder

pytestmark = pytest.mark.kernel

CLIENT, SERVER = "10.0.0.1", "10.0.0.2"
SECOND_NS = 10**9
OPEN_PORTS, CLOSED_PORTS = (8001, 8002, 8003), range(9000, 9097)
NOBODIES = [f"10.0.0.{last}" for last in range(100, 150)]
CONFIGURATION = {
    "fields": {"groups": ["integrity"]},
    "timeouts": {"idle": 0.5, "linger": 0.5, "sweep_interval": 0.05},
}


@pytest.fixture(autouse=True)
def live_metering() -> None:
    needs.need(needs.kernel())


class Lab(NamedTuple):
    """A client, and a server that meters itself on eth0 and has nobody behind it."""

    client: Namespace
    server: Namespace
    sender: Link
    metered: Link

    def send(self, *packets: Packet) -> None:
        ethernet = Ether(src=self.sender.mac, dst=self.metered.mac)
        send_frames(self.sender, [bytes(ethernet / packet) for packet in packets])

    def try_all(self, addresses: Sequence[str], ports: Sequence[int]) -> None:
        """A SYN to each, whatever comes of it."""
        tries = [self.client.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in addresses for _ in ports]
        targets = [(address, port) for address in addresses for port in ports]
        for each, target in zip(tries, targets):
            each.setblocking(False)
            assert each.connect_ex(target) in (0, errno.EINPROGRESS, errno.ECONNREFUSED)
        for each in tries:
            each.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with namespaces("client", "server") as (client, server):
        left, right = veth(client, server)
        connect(left, right, (f"{CLIENT}/24", f"{SERVER}/24"))
        for nobody in NOBODIES:
            left.add_neighbour(nobody, right.mac)
        yield Lab(client, server, left, right)


@contextlib.contextmanager
def listening(namespace: Namespace, ports: Sequence[int]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for port in ports:
            listener = stack.enter_context(namespace.socket(socket.AF_INET, socket.SOCK_STREAM))
            listener.bind((SERVER, port))
            listener.listen(128)
        yield


def figures(exporter: Exporter, direction: str = "ingress") -> dict[str, Any]:
    (found,) = [each for each in exporter.status()["anomalies"] if each["direction"] == direction]
    return dict(found)


def is_empty(exporter: Exporter) -> bool:
    return not any(exporter.status()["table"]["flows"].values())


def is_counted(exporter: Exporter, flows: int) -> bool:
    """Whether so many flows have been ended, and none is left."""
    status = exporter.status()
    return is_empty(exporter) and sum(status["exportedRecords"].values()) >= flows


def test_a_port_scan_and_an_address_sweep_are_told_with_their_source_and_what_is_answered_is_no_more(
    lab: Lab, tmp_path: Path
) -> None:
    with (
        Recorder(lab.server) as recorder,
        listening(lab.server, OPEN_PORTS),
        Exporter(lab.server, tmp_path, collectors=[recorder.url], configuration=CONFIGURATION) as exporter,
    ):
        lab.try_all([SERVER], [*OPEN_PORTS, *CLOSED_PORTS])
        wait_for("both directions of each", lambda: is_counted(exporter, 2 * (3 + 97)))
        scanned = figures(exporter)
        lab.try_all(NOBODIES, [443])
        wait_for("the sweep", lambda: is_counted(exporter, 2 * (3 + 97) + len(NOBODIES)))
        swept, answers = figures(exporter), figures(exporter, "egress")
        exporter.reload(CONFIGURATION)  # tells what has changed
        assert exporter.stop() == 0, exporter.log
        messages = recorder.messages()
    assert (scanned["unansweredFlows"], scanned["destinations"], scanned["ports"]) == (0, 1, 100)
    assert scanned["destinationsSource"] == scanned["portsSource"] == CLIENT
    assert (swept["unansweredFlows"], swept["destinations"], swept["ports"]) == (50, 51, 101)
    assert (answers["unansweredFlows"], answers["destinations"], answers["ports"]) == (0, 0, 0)
    decoder = Decoder()
    decoded = [decoder.decode(message, "exporter") for message in messages]
    assert not [problem for each in decoded for problem in each.problems]
    told = [record for each in decoded for record in each.options_records if "maximumPortsOfOneSource" in record]
    last = told[-1]
    names = ("unansweredTcpFlowTotalCount", "maximumDestinationsOfOneSource", "maximumPortsOfOneSource")
    assert [last[name] for name in names] == [50, 51, 101]
    assert last["ingressInterface"] == lab.metered.ifindex
    described = {
        record["informationElementName"]
        for each in decoded
        for record in each.options_records
        if "informationElementName" in record
    }
    assert {*names, "undersizedPacketTotalCount", "jumboPacketTotalCount"} <= described


def test_each_connection_of_a_flood_that_nobody_answers_counts_and_those_that_go_on_beside_it_do_not(
    lab: Lab, tmp_path: Path
) -> None:
    flood = [
        IP(src=f"198.18.{number >> 8}.{number & 255}", dst=NOBODIES[0]) / TCP(sport=1024 + number, dport=80)
        for number in range(3000)
    ]
    with (
        Recorder(lab.server) as recorder,
        listening(lab.server, OPEN_PORTS),
        Exporter(lab.server, tmp_path, collectors=[recorder.url], configuration=CONFIGURATION) as exporter,
    ):
        answered = [lab.client.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(20)]
        for each in answered:
            each.connect((SERVER, OPEN_PORTS[0]))
            each.send(b"x")
        lab.send(*flood, *flood[:100])  # one that is sent again is the same attempt
        for each in answered:
            each.close()
        wait_for("all flows", lambda: is_counted(exporter, 3000 + 2 * 20))
        found = figures(exporter)
        assert exporter.stop() == 0, exporter.log
    assert (found["unansweredFlows"], found["destinations"], found["ports"]) == (3000, 1, 1)


def test_segments_of_a_super_packet_are_not_jumbo_and_packets_on_a_link_of_jumbo_frames_are(
    lab: Lab, tmp_path: Path
) -> None:
    needs.need(needs.tools("ethtool"))
    for link in (lab.sender, lab.metered):
        link.set_offloads(tso=True, gso=True)
    with (
        Recorder(lab.server) as recorder,
        listening(lab.server, OPEN_PORTS),
        Exporter(lab.server, tmp_path, collectors=[recorder.url], configuration=CONFIGURATION) as exporter,
    ):
        before = lab.metered.counters()["rx_packets"]
        with lab.client.socket(socket.AF_INET, socket.SOCK_STREAM) as sender:
            sender.connect((SERVER, OPEN_PORTS[0]))
            sender.settimeout(0.5)
            with contextlib.suppress(OSError):  # nobody reads
                sender.sendall(bytes(1 << 20))
        seen = exporter.status()["ledger"]["seen"]
        super_packets = lab.metered.counters()["rx_packets"] - before
        assert seen["packets"] > super_packets  # there were some
        for link in (lab.sender, lab.metered):
            link.set("mtu", "9000")
        lab.send(*(IP(src=CLIENT, dst=SERVER) / UDP(dport=9) / Raw(bytes(size - 28)) for size in (1500, 1501, 9000)))
        wait_for("the long ones", lambda: figures(exporter)["jumboPackets"] > 0)
        wait_for("all flows", lambda: is_empty(exporter))
        found = figures(exporter)
        assert exporter.stop() == 0, exporter.log
    assert (found["jumboPackets"], found["undersizedPackets"]) == (2, 0)


def test_frames_that_come_in_too_short_for_ethernet_are_counted(lab: Lab, tmp_path: Path) -> None:
    with (
        Recorder(lab.server) as recorder,
        Exporter(lab.server, tmp_path, collectors=[recorder.url], configuration=CONFIGURATION) as exporter,
    ):
        lab.send(*(IP(src=CLIENT, dst=NOBODIES[0]) / UDP(dport=9) / Raw(bytes(n)) for n in (0, 1, 17, 18, 19)))
        lab.send(Dot1Q(vlan=7) / IP(src=CLIENT, dst=NOBODIES[0]) / UDP(dport=9) / Raw(bytes(14)))
        lab.send(Dot1Q(vlan=7) / IP(src=CLIENT, dst=NOBODIES[0]) / UDP(dport=9) / Raw(bytes(13)))
        wait_for("both flows", lambda: is_counted(exporter, 2))
        found = figures(exporter)
        assert exporter.stop() == 0, exporter.log
    assert (found["undersizedPackets"], found["jumboPackets"]) == (4, 0)


def test_without_the_group_or_with_sampling_there_is_nothing_to_tell(lab: Lab, tmp_path: Path) -> None:
    for configuration in ({}, {**CONFIGURATION, "sampling": {"interval": 2}}):
        with (
            Recorder(lab.server) as recorder,
            Exporter(lab.server, tmp_path, collectors=[recorder.url], configuration=configuration) as exporter,
        ):
            assert exporter.status()["anomalies"] == []
            assert exporter.stop() == 0, exporter.log


# Conversations, packet by packet

CLIENT6, SERVER6 = "2001:db8::1", "2001:db8::2"
IDLE = Timeouts(
    idle_ns=dict.fromkeys(("tcp", "udp", "icmp", "other"), 15 * SECOND_NS),
    active_ns=dict.fromkeys(("tcp", "udp", "icmp", "other"), 10**18),
    linger_ns=5 * SECOND_NS,
)


@pytest.fixture
def meter() -> Iterator[Meter]:
    made = Meter(["integrity"], max_flows=4096)
    yield made
    made.process.close()


def sweep(meter: Meter, *, after_s: float = 0) -> tuple[int, FanOut, FanOut]:
    """Some time later: connections unanswered, destinations and ports of one source, of the only interface."""
    assert meter.process.anomalies is not None
    meter.wait(int(after_s * SECOND_NS))
    meter.process.anomalies.tick(meter.now_ns)
    meter.sweep(IDLE)
    (found,) = meter.process.anomalies.figures.values() or [anomalies.Figures()]
    return found.unanswered_flows, found.recent_destinations, found.recent_ports


@pytest.mark.parametrize("answer", ["SA", "RA", "R"])
@pytest.mark.parametrize("in_the_same_sweep", [True, False])
def test_an_answer_of_any_kind_is_one_and_may_come_before_the_next_sweep_or_after(
    answer: str, in_the_same_sweep: bool, meter: Meter
) -> None:
    meter.feed(IPv6(src=CLIENT6, dst=SERVER6) / TCP(sport=1025, dport=80))
    meter.feed(IPv6(src=CLIENT6, dst=SERVER6) / TCP(sport=1026, dport=80), after_ns=1)
    if not in_the_same_sweep:
        sweep(meter, after_s=1)
    meter.feed(IPv6(src=SERVER6, dst=CLIENT6) / TCP(sport=80, dport=1025, flags=answer), after_ns=1)
    sweep(meter, after_s=1)
    assert sweep(meter, after_s=10)[0] == 0  # a refusal has ended by now
    assert sweep(meter, after_s=10)[0] == 1


def test_an_icmp_error_is_no_answer_and_neither_is_another_connections(meter: Meter) -> None:
    syn = IP(src=CLIENT, dst=SERVER) / TCP(sport=1025, dport=80)
    meter.feed(syn)
    meter.feed(IP(src=SERVER, dst=CLIENT) / ICMP(type=3, code=3) / syn)
    meter.feed(IP(src=SERVER, dst=CLIENT) / TCP(sport=80, dport=1026, flags="RA"))
    sweep(meter)
    assert sweep(meter, after_s=20)[0] == 1


def test_a_server_that_answers_many_is_not_taken_for_a_scanner(meter: Meter) -> None:
    for number in range(1, 101):
        client = f"192.0.2.{number}"
        meter.feed(IP(src=client, dst=SERVER) / TCP(sport=1024 + number, dport=443))
        meter.feed(IP(src=SERVER, dst=client) / TCP(sport=443, dport=1024 + number, flags="SA"), after_ns=1)
        meter.feed(IP(src=client, dst=SERVER) / UDP(sport=1024 + number, dport=53), after_ns=1)
        meter.feed(IP(src=SERVER, dst=client) / UDP(sport=53, dport=1024 + number), after_ns=1)
    _, destinations, ports = sweep(meter)
    assert (destinations.targets, ports.targets) == (1, 2)


def test_connections_that_began_before_they_were_metered_are_no_scan(meter: Meter) -> None:
    for number in range(1, 101):
        meter.feed(IP(src=SERVER, dst=f"192.0.2.{number}") / TCP(sport=443, dport=1024 + number, flags="PA"))
        meter.feed(IP(src=SERVER, dst=f"192.0.2.{number}") / ICMP(type=3, code=3))
    assert sweep(meter) == (0, FanOut(), FanOut())


def test_a_ping_sweep_of_ipv6_counts_addresses_and_no_ports(meter: Meter) -> None:
    for number in range(500):
        meter.feed(IPv6(src=CLIENT6, dst=f"2001:db8::1:{number:x}") / ICMPv6EchoRequest())
    _, destinations, ports = sweep(meter)
    assert destinations.targets == 500
    assert socket.inet_ntop(socket.AF_INET6, destinations.source) == CLIENT6
    assert ports == FanOut()


def test_the_same_destination_counts_once_and_the_worst_source_is_told(meter: Meter) -> None:
    for source, count in (("192.0.2.1", 10), ("192.0.2.2", 12), ("192.0.2.3", 11)):
        for sweeps in range(3):
            for number in range(count):
                meter.feed(IP(src=source, dst=f"198.51.100.{number}") / TCP(sport=sweeps + 1, dport=80))
            sweep(meter, after_s=0.1)
    _, destinations, ports = sweep(meter)
    assert destinations == (12, socket.inet_aton("192.0.2.2"))
    assert ports.targets == 1


def test_a_minute_begins_anew_and_the_one_before_is_still_told(meter: Meter) -> None:
    for number in range(20):
        meter.feed(IP(src=CLIENT, dst=f"198.51.100.{number}") / UDP(dport=161))
    assert sweep(meter)[1].targets == 20
    for number in range(20, 25):
        meter.feed(IP(src=CLIENT, dst=f"198.51.100.{number}") / UDP(dport=161), after_ns=INTERVAL_NS // 5)
    assert sweep(meter)[1].targets == 20
    assert sweep(meter, after_s=60)[1].targets == 5
    assert sweep(meter, after_s=60)[1] == FanOut()


def test_what_is_remembered_of_a_minute_is_bounded_and_the_worst_sources_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anomalies, "MAX_PAIRS", 1000)
    pairs = anomalies._Pairs()
    np = anomalies.np
    scanner, many = np.full(400, 7, np.uint32), np.arange(100, 900, dtype=np.uint32)
    assert pairs.add(scanner, np.arange(400, dtype=np.uint32))[1].tolist() == [400]
    assert pairs.add(many, many)[1].tolist() == [1] * 800
    assert len(pairs._keys) <= 500
    assert pairs.add(scanner[:1], many[-1:] + 1)[1].tolist() == [401]
