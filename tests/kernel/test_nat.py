# SPDX-License-Identifier: GPL-2.0-or-later
"""Network address translation: one record carries both sides, as `conntrack -L` has them.

A router between an inside and an outside hides the inside's sources (masquerade) and lets the outside in to one
port (port forwarding), by nftables, IPv4 and IPv6. The hosts answer, so that connections have both directions.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.collectors import MessageFile, Nfcapd, write_pcap
from lab.flowexp import COMMAND, Exporter
from lab.netns import Link, Namespace, connect, namespaces, veth
from lab.process import run
from lab.wait import wait_for

from flowexp.protocol.decode import Decoder

pytestmark = pytest.mark.kernel

INSIDE, OUTSIDE = {4: "10.1.0.2", 6: "fd01::2"}, {4: "192.0.2.2", 6: "2001:db8::2"}
PUBLIC = {4: "192.0.2.1", 6: "2001:db8::1"}
ROUTER_INSIDE = {4: "10.1.0.1", 6: "fd01::1"}
SERVICE, FORWARDED, REAL = 7000, 8080, 80
NFT = """
table inet translate {
    chain before { type nat hook prerouting priority dstnat;
        iifname "wan" meta nfproto ipv4 tcp dport 8080 dnat ip to 10.1.0.2:80
        iifname "wan" meta nfproto ipv6 tcp dport 8080 dnat ip6 to [fd01::2]:80
        iifname "wan" icmp type echo-request dnat ip to 10.1.0.2
        iifname "wan" icmpv6 type echo-request dnat ip6 to fd01::2
    }
    chain after { type nat hook postrouting priority srcnat;
        oifname "wan" meta l4proto tcp masquerade to :40000-40999
        oifname "wan" meta l4proto { udp, icmp, ipv6-icmp } masquerade
    }
}
"""


class Network(NamedTuple):
    inside: Namespace
    router: Namespace
    outside: Namespace
    lan: Link
    wan: Link


@pytest.fixture
def network() -> Iterator[Network]:
    needs.need(needs.kernel(), needs.nat(), needs.tools("conntrack", "nfcapd", "ping", "tshark"))
    with namespaces("inside", "router", "outside", ipv6=True) as (inside, router, outside):
        host, lan = veth(inside, router, names=("eth0", "lan"))
        wan, far = veth(router, outside, names=("wan", "eth0"))
        connect(host, lan, ("10.1.0.2/24", "10.1.0.1/24"), ("fd01::2/64", "fd01::1/64"))
        connect(wan, far, ("192.0.2.1/24", "192.0.2.2/24"), ("2001:db8::1/64", "2001:db8::2/64"))
        for version, words in ((4, []), (6, ["-6"])):
            inside.ip(*words, "route", "add", "default", "via", ROUTER_INSIDE[version])
        router.sysctl("net.ipv4.ip_forward", 1)
        router.sysctl("net.ipv6.conf.all.forwarding", 1)
        router.run("nft", "-f", "-", stdin=NFT)
        yield Network(inside, router, outside, lan, wan)


def _family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


@contextmanager
def conversation(client: Namespace, server: Namespace, version: int, to: tuple[str, int], port: int) -> Iterator[int]:
    """A TCP connection to `to`, which the server takes at its port, 1000 octets each way; the client's port."""
    with server.socket(_family(version), socket.SOCK_STREAM) as listening:
        listening.bind(("", port))
        listening.listen()
        with client.socket(_family(version), socket.SOCK_STREAM) as calling:
            calling.settimeout(20)
            calling.connect(to)
            answering, _ = listening.accept()
            with answering:
                for one, other in ((calling, answering), (answering, calling)):
                    one.sendall(bytes(1000))
                    other.recv(1000, socket.MSG_WAITALL)
                yield int(calling.getsockname()[1])


class Connection(NamedTuple):
    """The tuples of a line of `conntrack -L`: source, destination, their ports."""

    original: tuple[str, str, int, int]
    reply: tuple[str, str, int, int]


def connections(namespace: Namespace, version: int) -> list[Connection]:
    listed = namespace.run("conntrack", "-L", "-f", f"ipv{version}", "-p", "tcp")
    pattern = r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)"
    found = [[(a, b, int(c), int(d)) for a, b, c, d in re.findall(pattern, line)] for line in listed.splitlines()]
    return [Connection(*tuples) for tuples in found if len(tuples) == 2]


def turned(side: tuple[str, str, int, int]) -> tuple[str, str, int, int]:
    return side[1], side[0], side[3], side[2]


def side_of(record: Mapping[str, Any], version: int, prefix: str = "") -> tuple[Any, ...]:
    """Addresses and ports of a record: as metered, or with "postNA" or "preNA" those of the other side."""
    source, destination = ("Source", "Destination") if prefix else ("source", "destination")
    t, pt = ("T", "PT") if prefix else ("", "")
    return (
        record.get(f"{prefix}{t}{source}IPv{version}Address"),
        record.get(f"{prefix}{t}{destination}IPv{version}Address"),
        record.get(f"{prefix}{pt}{source}TransportPort"),
        record.get(f"{prefix}{pt}{destination}TransportPort"),
    )


def tcp_records(file: MessageFile) -> list[dict[str, Any]]:
    decoder = Decoder()
    found: list[dict[str, Any]] = []
    for message in file.messages():
        found += [record for record in decoder.decode(message, None).records if record.get("protocolIdentifier") == 6]
    return found


def by_tshark(file: MessageFile, version: int, directory: Path) -> set[tuple[str, str, int, int]]:
    """What tshark finds as the other sides."""
    capture = directory / "messages.pcap"
    write_pcap(capture, file.messages(), port=4739)
    joint = "" if version == 4 else "_"
    names = [f"post_nat{joint}{side}_ipv{version}_address" for side in ("source", "destination")]
    names += [f"post_napt{side}_transport_port" for side in ("source", "destination")]
    fields = [word for name in names for word in ("-e", f"cflow.{name}")]
    shown = run(["tshark", "-n", "-r", capture, "-d", "udp.port==4739,cflow", "-T", "fields", *fields])
    columns = [column.split(",") for line in shown.splitlines() for column in line.split("\t")]
    rows = [zip(*columns[first : first + 4]) for first in range(0, len(columns), 4)]
    return {(a, b, int(c), int(d)) for found in rows for a, b, c, d in found if a}


@pytest.mark.parametrize("version", [4, 6])
def test_one_record_carries_both_sides_of_a_translation(network: Network, version: int, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"fields": {"groups": ["nat"]}}
    lan, wan = network.lan.ifindex, network.wan.ifindex
    with Nfcapd(network.router, tmp_path) as nfcapd:
        with Exporter(
            network.router, tmp_path, interfaces=["lan", "wan"], collectors=[file.url, nfcapd.url],
            configuration=configuration,
        ) as exporter:  # fmt: skip
            outward = conversation(network.inside, network.outside, version, (OUTSIDE[version], SERVICE), SERVICE)
            inward = conversation(network.outside, network.inside, version, (PUBLIC[version], FORWARDED), REAL)
            with outward as client, inward as caller:
                known = connections(network.router, version)
                assert exporter.stop() == 0
            assert exporter.ledger().closes
        nfcapd.finish()
        shown = [record for record in nfcapd.records() if record["proto"] == 6]
    records = {side_of(record, version): record for record in tcp_records(file)}
    assert len(records) == len(shown) == 4
    tsharks = by_tshark(file, version, tmp_path)
    (masqueraded,) = (each for each in known if each.original[2] == client)
    (forwarded,) = (each for each in known if each.original[2] == caller)
    assert 40000 <= masqueraded.reply[3] <= 40999
    assert forwarded.reply[:3] == (INSIDE[version], OUTSIDE[version], REAL)
    for connection, came_in, went_out in ((masqueraded, lan, wan), (forwarded, wan, lan)):
        for seen, beyond, interfaces in (
            (connection.original, turned(connection.reply), (came_in, went_out)),
            (connection.reply, turned(connection.original), (went_out, came_in)),
        ):
            record = records[seen]
            assert side_of(record, version, "postNA") == beyond
            assert (record["ingressInterface"], record["egressInterface"]) == interfaces
            assert record[f"ipNextHopIPv{version}Address"] == beyond[1]
            assert "preNATSourceIPv4Address" not in record
            (nfdumps,) = (each for each in shown if (each["src_port"], each["dst_port"]) == seen[2:])
            assert (int(nfdumps["src_xlt_port"]), int(nfdumps["dst_xlt_port"])) == beyond[2:]
            if version == 4:  # nfdump 1.7.1 drops those of IPv6
                assert (nfdumps["src4_xlt_ip"], nfdumps["dst4_xlt_ip"]) == beyond[:2]
            assert beyond in tsharks


class Event(NamedTuple):
    """A session before and after translation, and what befell it: natEvent."""

    what: int
    before: tuple[Any, ...]
    after: tuple[Any, ...]


def events_of(file: MessageFile) -> list[Event]:
    decoder = Decoder()
    records = [each for message in file.messages() for each in decoder.decode(message, None).records]
    return [
        Event(each["natEvent"], side_of(each, version), side_of(each, version, "postNA"))
        for each in records
        if "natEvent" in each
        for version in [4 if "sourceIPv4Address" in each else 6]
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_events_tell_of_each_translated_connection_as_it_begins_and_as_it_ends(
    network: Network, version: int, tmp_path: Path
) -> None:
    created, deleted = {4: (4, 5), 6: (1, 2)}[version]  # RFC 8158 has numbers of their own for IPv4 to IPv4 alone
    file, port = MessageFile(tmp_path / "flows.ipfix"), SERVICE
    with Nfcapd(network.router, tmp_path) as nfcapd:
        with Exporter(
            network.router, tmp_path, interfaces=["lan"],
            collectors=[file.url, nfcapd.url, "udp://127.0.0.1:9?protocol=netflow5"],
            configuration={"export": {"nat_events": True}},
        ) as exporter:  # fmt: skip
            assert "NetFlow v5 has no words for NAT events" in exporter.log
            outward = conversation(network.inside, network.outside, version, (OUTSIDE[version], port), port)
            inward = conversation(network.outside, network.inside, version, (PUBLIC[version], FORWARDED), REAL)
            with (
                outward,
                inward,
                conversation(network.inside, network.router, version, (ROUTER_INSIDE[version], port), port),
            ):
                known = connections(network.router, version)
            translated = [each for each in known if turned(each.reply) != each.original]
            assert (len(known), len(translated)) == (3, 2)
            wait_for("all to be told of", lambda: nat_figures(exporter)["created"] == 2)
            network.router.run("conntrack", "-F")
            wait_for("their end to be told of", lambda: nat_figures(exporter)["deleted"] == 2)
            assert nat_figures(exporter)["overruns"] == 0
            assert exporter.stop() == 0
        nfcapd.finish()
        assert nfcapd.losses() == []
        shown = [record for record in nfcapd.records() if "nat_event_id" in record]
    expected = [Event(what, each.original, turned(each.reply)) for what in (created, deleted) for each in translated]
    found = events_of(file)
    assert sorted(found) == sorted(expected)
    assert [each.what for each in found] == [created] * 2 + [deleted] * 2
    assert set(events_by_tshark(file, version, tmp_path)) == set(expected)
    assert sorted(map(by_nfdump, shown)) == sorted(map(without_ipv6_beyond, expected))


def by_nfdump(record: Mapping[str, Any]) -> Event:
    """An event as nfdump's JSON has it."""
    family = "6" if "src6_addr" in record else "4"
    before = record[f"src{family}_addr"], record[f"dst{family}_addr"], record["src_port"], record["dst_port"]
    after = record.get("src4_xlt_ip"), record.get("dst4_xlt_ip"), record["src_xlt_port"], record["dst_xlt_port"]
    return Event(int(record["nat_event_id"]), before, (*after[:2], *map(int, after[2:])))


def without_ipv6_beyond(event: Event) -> Event:
    """What nfdump 1.7.1 keeps of an event."""
    is_ipv6 = ":" in event.before[0]
    return event._replace(after=(None, None, *event.after[2:])) if is_ipv6 else event


def nat_figures(exporter: Exporter) -> dict[str, int]:
    return exporter.status()["natEvents"] or {}


def events_by_tshark(file: MessageFile, version: int, directory: Path) -> list[Event]:
    capture = directory / "messages.pcap"
    write_pcap(capture, file.messages(), port=4739)
    joint = "" if version == 4 else "_"
    names = ["nat_event", "srcaddr", "dstaddr", "srcport", "dstport"]
    names[1:3] = ["srcaddr", "dstaddr"] if version == 4 else ["srcaddrv6", "dstaddrv6"]
    names += [f"post_nat{joint}{side}_ipv{version}_address" for side in ("source", "destination")]
    names += [f"post_napt{side}_transport_port" for side in ("source", "destination")]
    fields = [word for name in names for word in ("-e", f"cflow.{name}")]
    shown = run(
        ["tshark", "-n", "-r", capture, "-d", "udp.port==4739,cflow", "-Y", "cflow.nat_event", "-T", "fields", *fields]
    )
    found = []
    for line in shown.splitlines():
        for values in zip(*(column.split(",") for column in line.split("\t"))):
            numbers = [int(value) if value.isdigit() else value for value in values]
            found.append(Event(numbers[0], tuple(numbers[1:5]), tuple(numbers[5:])))
    return found


def test_events_begin_and_end_with_the_key_in_the_configuration(network: Network, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration: dict[str, Any] = {"export": {"nat_events": False}}
    with Exporter(
        network.router, tmp_path, interfaces=["lan"], collectors=[file.url], configuration=configuration
    ) as exporter:
        for port, is_on in ((SERVICE, False), (SERVICE + 1, True), (SERVICE + 2, False)):
            exporter.reload({"export": {"nat_events": is_on}})
            with conversation(network.inside, network.outside, 4, (OUTSIDE[4], port), port):
                if is_on:
                    wait_for("it to be told of", lambda: nat_figures(exporter)["created"] == 1)
        assert exporter.stop() == 0
    assert [each.before[3] for each in events_of(file)] == [SERVICE + 1]


def test_events_that_nobody_read_in_time_are_said_to_be_lost_and_later_ones_are_told(
    network: Network, tmp_path: Path
) -> None:
    file, more = MessageFile(tmp_path / "flows.ipfix"), 60_000  # than the socket's buffer holds events
    with Exporter(
        network.router, tmp_path, interfaces=["lan"], collectors=[file.url],
        configuration={"export": {"nat_events": True}},
    ) as exporter:  # fmt: skip
        with network.inside.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            sending.bind(("", SERVICE))
            os.kill(exporter.process.pid, signal.SIGSTOP)
            try:
                for port in range(1024, 1024 + more):
                    sending.sendto(b"", (OUTSIDE[4], port))
            finally:
                os.kill(exporter.process.pid, signal.SIGCONT)
            wait_for("the overrun to be known", lambda: nat_figures(exporter)["overruns"])
        told = nat_figures(exporter)["created"]
        assert 0 < told < more
        assert "SOME LOST" in network.router.run(COMMAND, "status", "-c", exporter.configuration)
        assert "NAT events came faster than they could be read" in exporter.log
        with conversation(network.inside, network.outside, 4, (OUTSIDE[4], SERVICE), SERVICE):
            wait_for("a later one to be told of", lambda: nat_figures(exporter)["created"] == told + 1)
        assert exporter.stop() == 0
    assert events_of(file)[-1].before[3] == SERVICE


def test_what_is_metered_behind_the_translation_tells_what_it_was_before(network: Network, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"fields": {"groups": ["nat"]}}
    with Exporter(
        network.router, tmp_path, interfaces=["wan"], collectors=[file.url], configuration=configuration
    ) as exporter:
        with conversation(network.inside, network.outside, 4, (OUTSIDE[4], SERVICE), SERVICE) as client:
            ((original, reply),) = connections(network.router, 4)
            assert exporter.stop() == 0
    assert original == (INSIDE[4], OUTSIDE[4], client, SERVICE)
    records = {side_of(record, 4): record for record in tcp_records(file)}
    assert records.keys() == {turned(reply), reply}
    assert side_of(records[turned(reply)], 4, "preNA") == original
    assert side_of(records[reply], 4, "postNA") == turned(original)


def test_flows_that_are_not_translated_carry_nothing_of_it(network: Network, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"fields": {"groups": ["nat"]}}
    with Exporter(
        network.router, tmp_path, interfaces=["lan"], collectors=[file.url], configuration=configuration
    ) as exporter:
        with conversation(network.inside, network.router, 4, (ROUTER_INSIDE[4], SERVICE), SERVICE):
            assert exporter.stop() == 0
    records = tcp_records(file)
    assert len(records) == 2
    assert not [name for record in records for name in record if "NAT" in name or "NAPT" in name]


class Ping(NamedTuple):
    """Source and destination of a line of `conntrack -L`, and the type, of questions and of their answers."""

    original: tuple[str, str, int]
    reply: tuple[str, str, int]


def pings(namespace: Namespace, version: int) -> list[Ping]:
    listed = namespace.run("conntrack", "-L", "-f", f"ipv{version}", "-p", "icmp" if version == 4 else "icmpv6")
    pattern = r"src=(\S+) dst=(\S+) type=(\d+)"
    found = [[(a, b, int(c)) for a, b, c in re.findall(pattern, line)] for line in listed.splitlines()]
    return [Ping(*tuples) for tuples in found if len(tuples) == 2]


def ping_records(file: MessageFile, version: int) -> list[dict[str, Any]]:
    """Those of questions and answers; of IPv6, Neighbor Discovery is there, too."""
    decoder = Decoder()
    records = [each for message in file.messages() for each in decoder.decode(message, None).records]
    types, name = ((8, 0), "icmpTypeCodeIPv4") if version == 4 else ((128, 129), "icmpTypeCodeIPv6")
    return [each for each in records if int(each.get(name, -1)) >> 8 in types]


@pytest.mark.parametrize("version", [4, 6])
def test_pings_and_their_answers_carry_both_sides_of_a_translation(
    network: Network, version: int, tmp_path: Path
) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"fields": {"groups": ["nat"]}, "direction": "both"}
    lan, wan = network.lan.ifindex, network.wan.ifindex
    with Exporter(
        network.router, tmp_path, interfaces=["lan", "wan"], collectors=[file.url], configuration=configuration
    ) as exporter:
        for host, to in ((network.inside, OUTSIDE[version]), (network.outside, PUBLIC[version])):
            for _ in range(2):  # of two identifiers, which agree
                host.run("ping", "-c", "2", "-i", "0.2", "-W", "20", to)
        known = pings(network.router, version)
        assert exporter.stop() == 0
        assert exporter.ledger().closes
    records = ping_records(file, version)
    name = f"icmpTypeCodeIPv{version}"
    by_flow = {
        (*side_of(record, version)[:2], record[name] >> 8, record["flowDirection"]): record for record in records
    }
    assert len(records) == len(by_flow) == 8
    assert {record["packetDeltaCount"] for record in records} == {4}
    tsharks = by_tshark(file, version, tmp_path)
    assert len(known) == 4
    assert len(set(known)) == 2
    for connection in set(known):
        came_in, went_out = (lan, wan) if connection.original[0] == INSIDE[version] else (wan, lan)
        for these, those, interfaces in (
            (connection.original, connection.reply, (came_in, went_out)),
            (connection.reply, connection.original, (went_out, came_in)),
        ):
            came, left = (*these[:2], 0, 0), (those[1], those[0], 0, 0)
            assert came != left
            ingress, egress = by_flow[(*came[:2], these[2], 0)], by_flow[(*left[:2], these[2], 1)]
            assert side_of(ingress, version, "postNA") == left
            assert (ingress["ingressInterface"], ingress["egressInterface"]) == interfaces
            assert ingress[f"ipNextHopIPv{version}Address"] == left[1]
            assert side_of(egress, version, "preNA") == came
            assert left in tsharks


def test_answers_to_several_hosts_behind_one_address_are_told_as_translated_to_none(
    network: Network, tmp_path: Path
) -> None:
    file, hosts = MessageFile(tmp_path / "flows.ipfix"), (INSIDE[4], "10.1.0.3")
    network.inside.ip("address", "add", f"{hosts[1]}/24", "dev", "eth0")
    with Exporter(
        network.router, tmp_path, interfaces=["lan", "wan"], collectors=[file.url],
        configuration={"fields": {"groups": ["nat"]}},
    ) as exporter:  # fmt: skip
        for host in hosts:
            network.inside.run("ping", "-c", "1", "-W", "20", "-I", host, OUTSIDE[4])
        assert exporter.stop() == 0
    sides = {side_of(record, 4)[:2]: side_of(record, 4, "postNA")[:2] for record in ping_records(file, 4)}
    assert sides == {
        **{(host, OUTSIDE[4]): (PUBLIC[4], OUTSIDE[4]) for host in hosts},
        (OUTSIDE[4], PUBLIC[4]): (None, None),
    }


@pytest.mark.parametrize("version", [4, 6])
def test_an_icmp_error_is_not_taken_for_a_ping(network: Network, version: int, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"fields": {"groups": ["nat"]}}
    with Exporter(
        network.router, tmp_path, interfaces=["lan", "wan"], collectors=[file.url], configuration=configuration
    ) as exporter:
        network.inside.run("ping", "-c", "1", "-W", "20", OUTSIDE[version])
        with network.inside.socket(_family(version), socket.SOCK_DGRAM) as sending:
            sending.settimeout(20)
            sending.connect((OUTSIDE[version], 9))
            sending.send(b"nobody listens")
            with pytest.raises(ConnectionRefusedError):
                sending.recv(1)
        assert exporter.stop() == 0
    decoder, name = Decoder(), f"icmpTypeCodeIPv{version}"
    records = [each for message in file.messages() for each in decoder.decode(message, None).records]
    (error,) = (each for each in records if each.get(name, -1) == {4: 0x0303, 6: 0x0104}[version])
    assert not [field for field in error if "NAT" in field or "NAPT" in field]
    assert sum("postNATSourceIPv4Address" in each or "postNATSourceIPv6Address" in each for each in records) == 3
