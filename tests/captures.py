# SPDX-License-Identifier: GPL-2.0-or-later
"""Capture files, octet by octet: pcap in its four forms, and pcapng a block at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

ETHERNET = 1
SECOND_NS = 1_000_000_000

INTERFACE_BLOCK, OBSOLETE_PACKET_BLOCK, SIMPLE_PACKET_BLOCK, ENHANCED_PACKET_BLOCK = 1, 2, 3, 6
SECTION_BLOCK, SECTION_MAGIC = 0x0A0D0D0A, 0x1A2B3C4D
OPTION_END, OPTION_COMMENT, OPTION_NAME, OPTION_TIME_RESOLUTION, OPTION_TIME_OFFSET = 0, 1, 2, 9, 14


class Packet(NamedTuple):
    """One packet to be written; wire_octets None: as long as `data`."""

    data: bytes
    time_ns: int = 0
    wire_octets: Optional[int] = None

    @property
    def length(self) -> int:
        return len(self.data) if self.wire_octets is None else self.wire_octets


def pcap(packets: Iterable[Packet], *, link_type: int = ETHERNET, order: str = "<", nano: bool = True) -> bytes:
    """A pcap file; `order` as in struct."""
    magic, fraction_ns = (0xA1B23C4D, 1) if nano else (0xA1B2C3D4, 1000)
    parts = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 262144, link_type)]
    for packet in packets:
        seconds, rest_ns = divmod(packet.time_ns, SECOND_NS)
        header = seconds, rest_ns // fraction_ns, len(packet.data), packet.length
        parts += [struct.pack(order + "IIII", *header), packet.data]
    return b"".join(parts)


def _padded(octets: bytes) -> bytes:
    return octets + bytes(-len(octets) % 4)


def block(kind: int, body: bytes, *, order: str = "<") -> bytes:
    """A pcapng block, whatever is in it."""
    body = _padded(body)
    length = struct.pack(order + "I", 12 + len(body))
    return struct.pack(order + "I", kind) + length + body + length


def option(code: int, value: bytes, *, order: str = "<") -> bytes:
    return struct.pack(order + "HH", code, len(value)) + _padded(value)


def section(*, order: str = "<", options: bytes = b"") -> bytes:
    return block(SECTION_BLOCK, struct.pack(order + "IHHq", SECTION_MAGIC, 1, 0, -1) + options, order=order)


def interface(
    *, link_type: int = ETHERNET, snap_octets: int = 0, options: Sequence[bytes] = (), order: str = "<"
) -> bytes:
    body = struct.pack(order + "HHI", link_type, 0, snap_octets) + b"".join(options)
    return block(INTERFACE_BLOCK, body, order=order)


def enhanced(packet: Packet, *, number: int = 0, tick_ns: int = 1000, order: str = "<", options: bytes = b"") -> bytes:
    """An Enhanced Packet Block of interface `number`, whose clock's tick is `tick_ns`."""
    ticks = packet.time_ns // tick_ns
    header = number, ticks >> 32, ticks & 0xFFFFFFFF, len(packet.data), packet.length
    return block(
        ENHANCED_PACKET_BLOCK, struct.pack(order + "5I", *header) + _padded(packet.data) + options, order=order
    )


def obsolete(packet: Packet, *, number: int = 0, order: str = "<") -> bytes:
    """A Packet Block, as files from before 2010 have it; microseconds."""
    ticks = packet.time_ns // 1000
    header = number, 0, ticks >> 32, ticks & 0xFFFFFFFF, len(packet.data), packet.length
    return block(OBSOLETE_PACKET_BLOCK, struct.pack(order + "HH4I", *header) + packet.data, order=order)


def simple(packet: Packet, *, order: str = "<") -> bytes:
    """A Simple Packet Block: no interface, no time."""
    return block(SIMPLE_PACKET_BLOCK, struct.pack(order + "I", packet.length) + packet.data, order=order)
