# SPDX-License-Identifier: GPL-2.0-or-later
"""What Collectors and decoders make of recorded Messages, all in one form, so that they can be held against each other.

A judge is given the very datagrams that the exporter sent. In every form ICMP type and code stand in the destination
port, where NetFlow has them.
"""

from __future__ import annotations

import socket
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from scapy.layers.netflow import NetflowHeader, NetflowHeaderV5, NetflowHeaderV9, NetflowRecordV5

from . import decoders
from .collectors import Nfacctd, Nfcapd, Record, write_pcap
from .flows import Counts, FlowKey
from .netns import Namespace
from .process import run

PROTOCOL_NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58}


class Told(NamedTuple):
    """What one record tells; times in Unix milliseconds, or seconds where a judge keeps no more."""

    key: FlowKey
    counts: Counts
    start: int
    end: int
    ingress_ifindex: int
    egress_ifindex: int
    reverse: Counts = Counts(0, 0)


class Verdict(NamedTuple):
    """The records that a judge read, and what it objects to."""

    told: list[Told]
    objections: list[str]


def icmp_in_port(key: FlowKey) -> FlowKey:
    """Type and code in the destination port."""
    return key._replace(dst_port=key.dst_port or key.icmp_type_code, icmp_type_code=0)


class _Nfdump(Nfcapd):
    def told(self) -> Iterator[Told]:
        for record in self.records():
            key, counts = self._flow(record)
            times = [round(datetime.fromisoformat(record[name]).timestamp() * 1000) for name in ("first", "last")]
            reverse = Counts(record.get("out_packets", 0), record.get("out_bytes", 0))
            ways = (record.get(name, 0) for name in ("input_snmp", "output_snmp"))
            yield Told(icmp_in_port(key), counts, *times, *ways, reverse)


class _Nfacctd(Nfacctd):
    """nfacctd told to multiply by the sampling interval."""

    configuration = Nfacctd.configuration + "\nnfacctd_renormalize: true\n"

    @staticmethod
    def _key(record: Record) -> tuple[FlowKey, Counts]:
        return Nfacctd._flow(record)

    def told(self) -> Iterator[Told]:
        for record in self.records():
            key, counts = self._key(record)
            times = [round(float(record[name]) * 1000) for name in ("timestamp_start", "timestamp_end")]
            yield Told(icmp_in_port(key), counts, *times, record["iface_in"], record["iface_out"])


class _NfacctdOfNetflow(_Nfacctd):
    """nfacctd with its own idea of the protocol, as custom primitives find nothing in NetFlow v5."""

    configuration = _Nfacctd.configuration.replace("tcpflags,", "proto, tcpflags,")

    @staticmethod
    def _key(record: Record) -> tuple[FlowKey, Counts]:
        ports = record["port_src"], record["port_dst"]
        protocol = PROTOCOL_NUMBERS[record["ip_proto"]]
        key = FlowKey(record["ip_src"], record["ip_dst"], protocol, *ports, vlan_id=record["vlan"])
        return key, Counts(record["packets"], record["bytes"], int(record["tcp_flags"]))


def nfcapd(namespace: Namespace, directory: Path, messages: Sequence[bytes]) -> Verdict:
    return _collected(_Nfdump(namespace, directory), messages)


def nfacctd(namespace: Namespace, directory: Path, messages: Sequence[bytes]) -> Verdict:
    is_ipfix = messages[0][1] == 10
    return _collected((_Nfacctd if is_ipfix else _NfacctdOfNetflow)(namespace, directory), messages)


def _collected(collector: _Nfdump | _Nfacctd, messages: Iterable[bytes]) -> Verdict:
    with collector, collector.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for message in messages:
            sender.sendto(message, (collector.address, collector.port))
        collector.finish()
        return Verdict(list(collector.told()), collector.losses())


def scapy(namespace: Namespace, directory: Path, messages: Sequence[bytes]) -> Verdict:
    found: list[Told] = []
    if messages[0][1] == 5:
        return Verdict(list(_scapy_netflow5(messages)), [])
    init_ms = 0
    if messages[0][1] == 9:
        headers = [NetflowHeader(message)[NetflowHeaderV9] for message in messages]
        (init_ms,) = {int(header.unixSecs) * 1000 - header.sysUptime for header in headers}
    for record in decoders.records(messages):
        key, counts = decoders.flow_of(record)
        ms = [init_ms + decoders.number(record, *elements)
              for elements in ((decoders.FLOW_START_MS, 22), (decoders.FLOW_END_MS, 21))]  # fmt: skip
        ways = (decoders.number(record, way) for way in (decoders.INGRESS_INTERFACE, decoders.EGRESS_INTERFACE))
        reverse = (decoders.number(record, decoders.reverse(each)) for each in (decoders.PACKETS, decoders.OCTETS))
        found.append(Told(icmp_in_port(key), counts, *ms, *ways, Counts(*reverse)))
    return Verdict(found, [])


def _scapy_netflow5(messages: Sequence[bytes]) -> Iterator[Told]:
    for packet in map(NetflowHeader, messages):
        header, layer = packet[NetflowHeaderV5], packet[NetflowHeaderV5].payload
        init_ms = int(header.unixSecs) * 1000 - header.sysUptime
        while isinstance(layer, NetflowRecordV5):
            key = FlowKey(layer.src, layer.dst, layer.prot, layer.srcport, layer.dstport)
            counts = Counts(layer.dpkts, layer.dOctets, int(layer.tcpFlags))
            yield Told(key, counts, init_ms + layer.first, init_ms + layer.last, layer.input, layer.output)
            layer = layer.payload


def tshark(namespace: Namespace, directory: Path, messages: Sequence[bytes]) -> Verdict:
    """Field for field from its tree; expert information of any kind is an objection."""
    capture, port = directory / f"messages-{messages[0][1]}.pcap", 4739
    write_pcap(capture, list(messages), port=port)
    command: list[str | Path] = ["tshark", "-n", "-r", capture, "-d", f"udp.port=={port},cflow"]
    objections = run([*command, "-Y", "_ws.malformed || _ws.expert || !cflow"]).splitlines()
    tree = ElementTree.fromstring(run([*command, "-T", "pdml"]).encode())
    return Verdict([told for message in tree.iter("proto") for told in _in_tree(message)], objections)


def _in_tree(message: ElementTree.Element) -> Iterator[Told]:
    if message.get("name") != "cflow":
        return
    header = _values(message, forward=True)
    init_ms = header.get("unix_secs", 0) * 1000 - header.get("sysuptime", 0)
    for flow in message.iter("field"):
        if flow.get("show", "").startswith(("Flow ", "pdu ")) and _text(flow, "srcaddr"):
            values, reverse = _values(flow, forward=True), _values(flow, forward=False)
            key = FlowKey(
                _text(flow, "srcaddr"), _text(flow, "dstaddr"), values["protocol"], values.get("srcport", 0),
                values.get("dstport", 0),
                values.get("icmp_type_code_ipv4", 0) or _both(values, "icmp_ipv6_type", "icmp_ipv6_code"),
                values.get("vlanid", 0),
            )  # fmt: skip
            times = (
                values.get(f"abstime{which}", init_ms + values.get(f"time{which}", 0)) for which in ("start", "end")
            )
            counts = Counts(values["packets"], values["octets"], values.get("tcpflags", 0))
            back = Counts(reverse.get("packets", 0), reverse.get("octets", 0))
            yield Told(icmp_in_port(key), counts, *times, values["inputint"], values["outputint"], back)


def _text(flow: ElementTree.Element, name: str) -> str:
    names = (f"cflow.{name}", f"cflow.{name}v6")
    return next((field.get("show", "") for field in flow.iter("field") if field.get("name") in names), "")


def _both(values: dict[str, int], upper: str, lower: str) -> int:
    return values.get(upper, 0) << 8 | values.get(lower, 0)


def _values(parent: ElementTree.Element, *, forward: bool) -> dict[str, int]:
    """The first of each field's numbers, of one direction. tshark says of a reverse element that it is one; but not of
    times, of which those of the forward direction come last."""
    values: dict[str, int] = {}
    for field in parent.iter("field"):
        name, value = field.get("name", ""), field.get("value", "")
        if name.startswith("cflow.") and value and ("Reverse Type" not in field.get("showname", "")) == forward:
            place = name[len("cflow.") :]
            values[place] = int(value, 16) if place.startswith("abstime") else values.get(place, int(value, 16))
    return values


Judge = Callable[[Namespace, Path, Sequence[bytes]], Verdict]
COLLECTORS: dict[str, Judge] = {"nfcapd": nfcapd, "nfacctd": nfacctd}
DECODERS: dict[str, Judge] = {"tshark": tshark, "scapy": scapy}
