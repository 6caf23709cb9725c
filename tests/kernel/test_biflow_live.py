# SPDX-License-Identifier: GPL-2.0-or-later
"""Both directions of a conversation in one record, on a router, on one of its interfaces and on asymmetric paths.

The hosts have no addresses: they are links from which crafted frames are sent. So every packet there is, is one that
the test sent or that the router made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.collectors import MessageFile, Nfcapd, Recorder
from lab.flowexp import Exporter
from lab.netns import Link, Namespace, namespaces, veth
from lab.traffic import send_frames
from lab.wait import wait_for
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from flowexp.protocol.decode import Decoder
from flowexp.status import ask

pytestmark = pytest.mark.kernel

A, B = "10.1.0.2", "10.2.0.2"
Record = Mapping[str, Any]


class Router(NamedTuple):
    """Three links and the hosts' ends of them: A is behind left, B behind right; its packets may come in at third."""

    namespace: Namespace
    links: Mapping[str, Link]
    hosts: Mapping[str, Link]

    def send(self, *packets: Packet, through: str) -> None:
        ethernet = Ether(src="02:00:00:00:00:0a", dst=self.links[through].mac)
        send_frames(self.hosts[through], [bytes(ethernet / packet) for packet in packets])

    def ifindex(self, name: str) -> int:
        return self.links[name].ifindex


@pytest.fixture
def router() -> Iterator[Router]:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump"))
    with namespaces("router", "left", "right", "third") as (middle, *sides):
        links, hosts = {}, {}
        for number, (side, name) in enumerate(zip(sides, ("left", "right", "third")), start=1):
            links[name], hosts[name] = veth(middle, side, names=(name, "eth0"))
            links[name].add_address(f"10.{number}.0.254/24")
            links[name].add_neighbour(f"10.{number}.0.2", f"02:00:00:00:00:0{number}")
        middle.sysctl("net.ipv4.ip_forward", 1)
        yield Router(middle, links, hosts)


def conversation(port: int, sizes: tuple[Sequence[int], Sequence[int]], kind: Any = UDP) -> tuple[list[Packet], ...]:
    """Packets of A, and those with which B answers; `sizes`: of their payloads."""
    asks = [IP(src=A, dst=B) / kind(sport=port, dport=53) / Raw(bytes(size)) for size in sizes[0]]
    answers = [IP(src=B, dst=A) / kind(sport=53, dport=port) / Raw(bytes(size)) for size in sizes[1]]
    return asks, answers


def exporting(router: Router, directory: Path, url: str, *interfaces: str, **others: Any) -> Exporter:
    configuration = {"timeouts": {"idle": 600, "active": 600}, "collector": [{"url": url, "biflow": True}], **others}
    return Exporter(router.namespace, directory, interfaces=interfaces, configuration=configuration)


def finish(exporter: Exporter, messages: Sequence[bytes], *, sent: int) -> list[Record]:
    """All flow records; the exporter has metered and told of so many packets, and of no other."""
    assert exporter.process.status == 0, exporter.log
    ledger = exporter.ledger()
    assert ledger.closes and ledger.exported == sent, exporter.log
    found = records(messages)
    names = ("packetDeltaCount", "reversePacketDeltaCount")
    assert sum(record.get(name, 0) for record in found for name in names) == sent
    return found


def records(messages: Sequence[bytes]) -> list[Record]:
    decoder, found = Decoder(), []
    for message in messages:
        decoded = decoder.decode(message, "here")
        assert decoded.problems == []
        found += [record for record in decoded.records if "packetDeltaCount" in record]
    return found


def counts(record: Record) -> tuple[int, ...]:
    names = ("packetDeltaCount", "octetDeltaCount", "reversePacketDeltaCount", "reverseOctetDeltaCount")
    return tuple(record[name] for name in names)


def interfaces(record: Record) -> tuple[int, ...]:
    names = ("ingressInterface", "egressInterface", "reverseIngressInterface", "reverseEgressInterface")
    return tuple(record[name] for name in names)


def test_a_router_tells_of_question_and_answer_at_once_with_the_answers_own_interfaces(
    router: Router, tmp_path: Path
) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    asks, answers = conversation(4000, ((100, 200), (300,)))
    with exporting(router, tmp_path, file.url, "left", "right") as exporter:
        router.send(*asks, through="left")
        router.send(*answers, through="right")
        exporter.stop()
    (record,) = finish(exporter, file.messages(), sent=3)
    left, right = router.ifindex("left"), router.ifindex("right")
    assert record["biflowDirection"] == 1
    assert (record["sourceIPv4Address"], record["sourceTransportPort"]) == (A, 4000)
    assert counts(record) == (2, 28 * 2 + 300, 1, 28 + 300)
    assert interfaces(record) == (left, right, right, left)
    assert record["flowStartMilliseconds"] <= record["reverseFlowStartMilliseconds"]
    assert "1 flows in the record of their other direction" in exporter.log


def test_one_interface_of_a_router_tells_of_what_comes_in_and_what_goes_out_at_once(
    router: Router, tmp_path: Path
) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    asks, answers = conversation(4000, ((100,), (300, 300)))
    with exporting(router, tmp_path, file.url, "left") as exporter:
        router.send(*answers, through="right")
        router.send(*asks, through="left")
        exporter.stop()
    (record,) = finish(exporter, file.messages(), sent=3)
    assert record["sourceIPv4Address"] == B, "its packet was the first"
    assert (record["flowDirection"], record["reverseFlowDirection"]) == (1, 0)
    assert counts(record) == (2, 2 * 328, 1, 128)


def test_where_all_is_metered_twice_there_is_a_record_for_each_interface(router: Router, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    asks, answers = conversation(4000, ((100, 200), (300,)))
    with exporting(router, tmp_path, file.url, "left", "right", direction="both") as exporter:
        router.send(*asks, through="left")
        router.send(*answers, through="right")
        exporter.stop()
    found = finish(exporter, file.messages(), sent=6)
    assert [counts(record) for record in found] == [(2, 356, 1, 328)] * 2
    assert sorted((record["flowDirection"], record["reverseFlowDirection"]) for record in found) == [(0, 1), (1, 0)]


def test_an_answer_on_an_asymmetric_path_is_found_wherever_it_comes_in(router: Router, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    asks, answers = conversation(4000, ((0,) * 3, (10,) * 2))
    alone = conversation(4001, ((1,), ()))[0]
    ping = IP(src=A, dst=B) / ICMP(type=8), IP(src=B, dst=A) / ICMP(type=0)
    with exporting(router, tmp_path, file.url, "left", "right", "third") as exporter:
        router.send(*answers, ping[1], through="third")
        router.send(*asks, ping[0], *alone, through="left")
        exporter.stop()
    found = {(record["protocolIdentifier"], record["sourceTransportPort"]): record
             for record in finish(exporter, file.messages(), sent=8)}  # fmt: skip
    left, right, third = map(router.ifindex, ("left", "right", "third"))
    assert interfaces(found[17, 53]) == (third, left, left, right)
    assert counts(found[17, 53]) == (2, 76, 3, 84)
    assert (found[1, 0]["icmpTypeCodeIPv4"], found[1, 0]["reverseIcmpTypeCodeIPv4"]) == (8 << 8, 0)
    assert interfaces(found[1, 0]) == (left, right, third, left)
    assert "biflowDirection" not in found[17, 4001]


def test_of_tcp_the_one_with_the_syn_is_forward_and_both_end_in_the_same_sweep(router: Router, tmp_path: Path) -> None:
    asks = [IP(src=A, dst=B) / TCP(sport=port, dport=80, flags="S") for port in range(1, 501)]
    answers = [IP(src=B, dst=A) / TCP(sport=80, dport=port, flags="R") / Raw(b"x") for port in range(1, 501)]
    timeouts = {"idle": 600, "active": 600, "linger": 3, "sweep_interval": 0.05}
    with Recorder(router.namespace) as recorder, Nfcapd(router.namespace, tmp_path) as nfcapd:
        collectors = [{"url": each.url, "biflow": True} for each in (recorder, nfcapd)]
        with exporting(router, tmp_path, "", "left", "right", timeouts=timeouts, collector=collectors) as exporter:
            router.send(*answers, through="right")  # overtakes: what asks for it comes later
            router.send(*asks, through="left")
            wait_for(
                "all flows to be exported", lambda: sum(ask(str(exporter.pins))["exportedRecords"].values()) == 1000
            )
            exporter.stop()
        nfcapd.finish()
        found = finish(exporter, recorder.messages(), sent=1000)
        assert nfcapd.losses() == []
        shown = [(each["in_packets"], each["in_bytes"], each["out_packets"], each["out_bytes"])
                 for each in nfcapd.records()]  # fmt: skip
    assert [counts(record) for record in found] == [(1, 40, 1, 41)] * 500
    assert {record["flowEndReason"] for record in found} | {record["reverseFlowEndReason"] for record in found} == {3}
    assert shown == [(1, 40, 1, 41)] * 500
