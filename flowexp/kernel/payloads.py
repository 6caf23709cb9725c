# SPDX-License-Identifier: GPL-2.0-or-later
"""Field group `application`: first payloads come out of the packet path's ring (bpf/payload.h), and flows are named.

What was found out is kept in the flows' rows, which outlive the exporter; a payload that is in the ring when it goes
is lost with it, and so is a DNS query that is not answered yet. A row that is free again by the time that its payload
is read stays as it is.
"""

from __future__ import annotations

import mmap
import struct
from typing import Dict, Iterator, List, Sequence, Tuple

import numpy as np

from ..metering.applications import APPLICATIONS, PORTS, Verdict, classify
from ..metering.responses import Conversation, Responses
from .family import Family
from .layout import Array, Layout
from .table import RING_OCTETS

GROUP = "application"

_HEAD_OCTETS = 8  # of a record: its length, with two flags, and what is the kernel's (BPF_RINGBUF_HDR_SZ)
_BUSY, _DISCARDED = 1 << 31, 1 << 30

# Classification engines (RFC 6759): the first octet of an applicationId; three of a selector follow.
_BY_PORT, _BY_PAYLOAD = 3, 6  # IANA-L4, USER-Defined
_SELECTOR_OCTETS = 3
ID_OCTETS = 1 + _SELECTOR_OCTETS

_WITH_PORTS = (6, 17, 33, 132, 136)


class Ring:
    """The records of a BPF ring buffer, as they are committed. It has one reader."""

    def __init__(self, fd: int, octets: int) -> None:
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        self._consumer = np.frombuffer(mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, writable), np.uint64, 1)
        # The data is there twice, so that no record is in two pieces.
        self._memory = mmap.mmap(fd, mmap.PAGESIZE + 2 * octets, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._producer = np.frombuffer(self._memory, np.uint64, 1)
        self._mask = octets - 1

    def take(self) -> Iterator[bytes]:
        """What is there now; what comes meanwhile is left for the next time, and so is what is not finished."""
        position, end = int(self._consumer[0]), int(self._producer[0])
        while position < end:
            at = mmap.PAGESIZE + (position & self._mask)
            (word,) = struct.unpack_from("=I", self._memory, at)
            if word & _BUSY:
                return
            octets = word & ~_DISCARDED
            record = self._memory[at + _HEAD_OCTETS : at + _HEAD_OCTETS + octets]
            position += _HEAD_OCTETS + octets + -octets % 8
            self._consumer[0] = position
            if not word & _DISCARDED:
                yield record


def _conversation(head: np.void) -> Conversation:
    octets, address = head["addr"].tobytes(), 16 if head["is_ipv6"] else 4
    return Conversation(
        octets[:address], octets[address : 2 * address], head["ports"].tobytes(), int(head["protocol"]), int(head["ns"])
    )


class Naming:
    """Names flows by their payloads, from a ring into the families' rows."""

    def __init__(self, ring_fd: int, layout: Layout, families: Sequence[Family]) -> None:
        self._ring = Ring(ring_fd, RING_OCTETS)
        self._head, self._row = layout.structs["payload"], layout.structs["flow_application"]
        self._name_octets = layout.constants["SERVER_NAME_OCTETS"]
        self._families = families
        self._responses = Responses()

    def look(self) -> None:
        """Names all flows whose payload has come since the last look."""
        found: List[Tuple[int, Verdict]] = []
        dns: List[Tuple[int, Conversation, bytes]] = []
        for record in self._ring.take():
            head = np.frombuffer(record, self._head, 1)[0]
            first = self._head.itemsize
            payload = record[first : first + int(head["octets"])]
            ports = struct.unpack("!HH", head["ports"].tobytes())
            verdict = classify(payload, int(head["protocol"]), (ports[0], ports[1]))
            if verdict.application:
                found.append((int(head["number"]), verdict))
            if verdict.application == "dns":
                dns.append((int(head["number"]), _conversation(head), payload))
        if found:
            self._keep(found, self._times_us(dns))

    def _times_us(self, dns: List[Tuple[int, Conversation, bytes]]) -> Dict[int, int]:
        """By row, in the order in which they passed: in the ring another CPU's answer may be before its query."""
        dns.sort(key=lambda each: each[1].time_ns)
        return {number: self._responses.time_us(conversation, payload) for number, conversation, payload in dns}

    def _keep(self, found: List[Tuple[int, Verdict]], times_us: Dict[int, int]) -> None:
        by_number = dict(found)  # a flow that two CPUs took a payload of: the later one
        rows = np.zeros(len(by_number), self._row)
        rows["is_taken"] = 1
        for row, (number, verdict) in zip(rows, by_number.items()):
            row["id"] = APPLICATIONS[verdict.application].number
            row["name_kind"] = verdict.name_kind
            row["dns_response_us"] = times_us.get(number, 0)
            name = verdict.name[: self._name_octets]
            row["server_name"][: len(name)] = np.frombuffer(name, np.uint8)
        numbers = np.fromiter(by_number, np.int64, len(by_number))
        for place, family in enumerate(self._families):
            slots = numbers - place * family.slots
            ours = (slots >= 0) & (slots < family.slots)
            family.groups.store(GROUP, slots[ours], rows[ours], where="is_taken")


def application_ids(numbers: Array, protocols: Array, ports: Tuple[Array, Array]) -> Array:
    """applicationId of flows, (n, 4): by what their payload was taken for, else by a port, else all 0 (not known).

    Of two ports that a service has, the lower one.
    """
    have_ports = np.isin(protocols, _WITH_PORTS)
    known = np.fromiter(PORTS, np.uint16, len(PORTS))
    served = [np.where(have_ports & np.isin(each, known), each, 0xFFFF).astype(np.uint32) for each in ports]
    port = np.minimum(*served)
    by_port = np.where(port == 0xFFFF, 0, _BY_PORT << 8 * _SELECTOR_OCTETS | port)
    by_payload = (_BY_PAYLOAD << 8 * _SELECTOR_OCTETS) | numbers.astype(np.uint32)
    ids = np.where(numbers != 0, by_payload, by_port)
    octets: Array = ids.astype(">u4").view(np.uint8).reshape(-1, ID_OCTETS)
    return octets


def application_names() -> Tuple[Tuple[bytes, str, str], ...]:
    """Every applicationId that there can be, its name and its description."""

    def row(engine: int, selector: int, name: str, description: str) -> Tuple[bytes, str, str]:
        return bytes([engine]) + selector.to_bytes(_SELECTOR_OCTETS, "big"), name, description

    by_payload = (row(_BY_PAYLOAD, each.number, name, each.description) for name, each in APPLICATIONS.items())
    by_port = (row(_BY_PORT, port, name, f"by port {port} alone") for port, name in PORTS.items())
    return (*by_payload, *by_port)
