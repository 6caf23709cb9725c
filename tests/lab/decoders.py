# SPDX-License-Identifier: GPL-2.0-or-later
"""Decoders that are not ours: scapy's netflow layer and tshark, over Messages that a Recorder kept."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Union

from scapy.layers.inet import IP, UDP
from scapy.layers.netflow import (
    NetflowDataflowsetV9,
    NetflowHeader,
    NetflowTemplateV9,
    NetflowV910TemplateFieldTypes,
    netflowv9_defragment,
)
from scapy.packet import Packet

from .collectors import write_pcap
from .flows import Counts, FlowKey
from .process import run

Value = Union[int, str]
Record = dict[int, Value]
"""Information Element numbers (an enterprise's in the upper 16 bits) and values: addresses and MACs as text, all else
as numbers."""

OCTETS, PACKETS, PROTOCOL, TCP_CONTROL_BITS, SOURCE_PORT, DESTINATION_PORT = 1, 2, 4, 6, 7, 11
SOURCE_ADDRESS, DESTINATION_ADDRESS, NEXT_HOP = (8, 27), (12, 28), (15, 62)
INGRESS_INTERFACE, EGRESS_INTERFACE, VLAN_ID, FLOW_DIRECTION = 10, 14, 58, 61
ICMP_TYPE_CODE = (32, 139)
MAXIMUM_IP_TOTAL_LENGTH = 26
FLOW_START_MS, FLOW_END_MS = 152, 153
REVERSE_ENTERPRISE = 29305
_OF_ENTERPRISE = 0x4000


def reverse(element: int) -> int:
    """The number here of an element of the reverse direction (RFC 5103)."""
    return REVERSE_ENTERPRISE << 16 | element


# scapy makes a field of each Information Element by its name: 2.5 trips over names with spaces (52, 53),
# and all elements unknown to it share one name, and so one value.
for _element in range(512):
    if not NetflowV910TemplateFieldTypes.get(_element, "").isidentifier():
        NetflowV910TemplateFieldTypes[_element] = f"element_{_element}"

ADDRESSES = {*SOURCE_ADDRESS, *DESTINATION_ADDRESS, *NEXT_HOP}


def records(messages: Sequence[bytes]) -> list[Record]:
    """Every Data Record that describes a flow, as scapy decodes it."""
    return [_record(template, record) for _, template, record in _data_records(messages)]


def octets_of(messages: Sequence[bytes]) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    """Template ID and the octets of each field, of every Data Record that describes a flow, as scapy cuts them out."""
    for template_id, template, record in _data_records(messages):
        octets, ends = bytes(record.original), list(itertools.accumulate(field.fieldLength for field in template))
        assert len(octets) == ends[-1]
        yield template_id, tuple(octets[begin:end] for begin, end in zip([0, *ends], ends))


def _data_records(messages: Sequence[bytes]) -> Iterator[tuple[int, list[Packet], Packet]]:
    """Each record with its Template."""
    packets = [IP() / UDP(dport=4739) / NetflowHeader(message) for message in messages]
    _tell_enterprises_apart(packets)
    netflowv9_defragment(packets, verb=0)
    templates: dict[int, list[Packet]] = {}
    for packet in packets:
        for layer in _layers(packet):
            if isinstance(layer, NetflowTemplateV9):
                templates[layer.templateID] = layer.template_fields
            elif isinstance(layer, NetflowDataflowsetV9) and layer.templateID in templates:
                yield from ((layer.templateID, templates[layer.templateID], record) for record in layer.records)


def _layers(packet: Packet) -> Iterator[Packet]:
    """The layers of a packet from the outside in, Templates in a Template Set each by itself."""
    layer = packet
    while layer:
        yield from getattr(layer, "templates", [])
        yield layer
        layer = layer.payload


def _tell_enterprises_apart(packets: Sequence[Packet]) -> None:
    """scapy takes elements of enterprises for IANA's of the same number: they get numbers that nobody has."""
    for layer in (layer for packet in packets for layer in _layers(packet) if isinstance(layer, NetflowTemplateV9)):
        for field in layer.template_fields:
            if field.enterpriseBit:
                field.fieldType |= _OF_ENTERPRISE
                NetflowV910TemplateFieldTypes[field.fieldType] = f"enterprise_element_{field.fieldType}"


def _record(template: Sequence[Packet], record: Packet) -> Record:
    elements = [(field.enterpriseNumber or 0) << 16 | field.fieldType & ~_OF_ENTERPRISE for field in template]
    values = [record.getfieldval(field.name) for field in record.fields_desc]
    return {element: _value(element, value) for element, value in zip(elements, values)}


def _value(element: int, value: object) -> Value:
    if isinstance(value, bytes):
        return str(ipaddress.ip_address(value)) if element in ADDRESSES else int.from_bytes(value, "big")
    return value if isinstance(value, (int, str)) else int(str(value))


def number(record: Record, *elements: int) -> int:
    """The value of the first of the Information Elements that the record has; 0 when it has none."""
    return int(next((record[element] for element in elements if element in record), 0))


def text(record: Record, *elements: int) -> str:
    """As `number`, for addresses; empty when the record has none."""
    return str(next((record[element] for element in elements if element in record), ""))


def flow_of(record: Record) -> tuple[FlowKey, Counts]:
    """A Data Record in the form in which flows are compared."""
    key = FlowKey(
        text(record, *SOURCE_ADDRESS),
        text(record, *DESTINATION_ADDRESS),
        number(record, PROTOCOL),
        number(record, SOURCE_PORT),
        number(record, DESTINATION_PORT),
        number(record, *ICMP_TYPE_CODE),
        number(record, VLAN_ID),
    )
    return key, Counts(number(record, PACKETS), number(record, OCTETS), number(record, TCP_CONTROL_BITS) & 0xFF)


class Dissection(NamedTuple):
    """tshark's view: what it objects to, a line each, and the sums over all flows it saw."""

    objections: list[str]
    records: int
    packets: int
    octets: int


def dissect(messages: Sequence[bytes], directory: Path) -> Dissection:
    """Has tshark dissect every Message; expert information of any kind counts as an objection."""
    tshark = _tshark(messages, directory)
    objections = run(
        [
            *tshark,
            "-Y",
            "_ws.malformed || _ws.expert || !cflow",
            "-e",
            "frame.number",
            "-e",
            "_ws.expert.message",
        ]
    )
    figures = run([*tshark, "-e", "cflow.packets", "-e", "cflow.octets"])
    packets: list[int] = []
    octets: list[int] = []
    for line in figures.splitlines():
        columns = line.split("\t")
        packets.extend(int(n) for n in columns[0].split(",") if n)
        octets.extend(int(n) for n in columns[1].split(",") if n)
    return Dissection(objections.splitlines(), len(packets), sum(packets), sum(octets))


def texts(messages: Sequence[bytes], directory: Path, field: str) -> list[str]:
    """The values that tshark reads of one of its fields, in order. Of an empty text it shows nothing.

    They must have neither commas nor ends of lines in them.
    """
    lines = run([*_tshark(messages, directory), "-Y", field, "-e", field]).split("\n")[:-1]
    return [text for line in lines for text in line.split(",")]


def _tshark(messages: Sequence[bytes], directory: Path) -> list[str | Path]:
    """The command that dissects these Messages and prints fields, whichever are named behind it."""
    capture, port = directory / "messages.pcap", 4739
    write_pcap(capture, list(messages), port=port)
    return ["tshark", "-n", "-r", capture, "-d", f"udp.port=={port},cflow", "-T", "fields"]
