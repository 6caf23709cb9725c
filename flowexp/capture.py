# SPDX-License-Identifier: GPL-2.0-or-later
"""Captures as a stream of Ethernet frames. Nothing of a packet is dissected here; scapy finds the blocks of a pcapng.

A capture may come from anywhere: no length in it is believed beyond _MAX_READ_OCTETS, and one that is damaged
counts up to where it is. What has no Ethernet header gets one, of zero addresses and the right EtherType.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import struct
import zlib
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, cast

import numpy as np

from .errors import FlowexpError, UsageError
from .kernel.replay import CapturedPacket, Frames

_GZIP_MAGIC = b"\x1f\x8b"
_PCAP_MAGICS = (b"\xa1\xb2\xc3\xd4", b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\x3c\x4d", b"\x4d\x3c\xb2\xa1")
_PCAPNG_MAGIC = b"\x0a\x0d\x0d\x0a"
_PCAP_HEADER_OCTETS = 24
_RECORD_OCTETS = 16  # of a record's header: seconds, their fraction, octets captured, octets on the wire
_BLOCK_OCTETS = 1 << 19  # asked for at once; no more packets are in it than the ring of first payloads has room for
_GATHERED = 1024  # packets, where they are read one by one

_MAX_READ_OCTETS = 1 << 24  # of one block; the largest that Wireshark reads, too
_MAX_INTERFACES = 1 << 16  # of one section
_SECOND_NS = 1_000_000_000
_MAX_TIME_NS = 1 << 62  # the year 2116: timeouts are added to it
_MAX_WIRE_OCTETS = (1 << 32) - 1


def read_capture(path: Path) -> Iterator[Frames]:
    """The packets of a pcap or pcapng file, gzipped or not, in the file's order, some thousands at a time.

    UsageError for what cannot be read as a capture, or has a link type that cannot be metered; FlowexpError
    where scapy is missing; CutOff behind all packets before the place where the file is damaged.
    """
    packets = 0
    try:
        with path.open("rb") as file:
            for frames in _frames(path, _unzipped(file)):
                yield frames
                packets += len(frames)
    except _DamagedError as error:
        raise CutOff(f"{path}: cut off after {packets} packets: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


class CutOff(FlowexpError):
    """The capture goes on, or did once, behind the packets that were read."""


class _DamagedError(Exception):
    """From here on the file is no capture; the text says why."""


class _Record(NamedTuple):
    """A packet of a pcapng file, with the link header of its interface."""

    time_ns: int
    data: bytes
    wire_octets: int
    interface: int
    link_type: int


def _frames(path: Path, file: io.BufferedReader) -> Iterator[Frames]:
    magic = file.peek(4)[:4]
    if magic in _PCAP_MAGICS:
        for link_type, frames in _pcap(file):
            yield frames if link_type == _ETHERNET else Frames.of(_packet(path, each, link_type) for each in frames)
    elif magic == _PCAPNG_MAGIC:
        yield from _gathered(_packet(path, record[:4], record.link_type) for record in _pcapng(_Source(file)))
    else:
        raise UsageError(f"{path}: not a pcap or pcapng capture, plain or gzipped")


def _gathered(packets: Iterator[CapturedPacket]) -> Iterator[Frames]:
    """Up to _GATHERED at a time; what ends them comes behind those that it followed."""
    end: Optional[Exception] = None

    def until_the_end() -> Iterator[CapturedPacket]:
        nonlocal end
        try:
            yield from islice(packets, _GATHERED)
        except (_DamagedError, FlowexpError) as error:
            end = error

    while len(frames := Frames.of(until_the_end())):
        yield frames
    if end is not None:
        raise end


def _packet(path: Path, packet: Tuple[int, bytes, int, int], link_type: int) -> CapturedPacket:
    time_ns, frame, wire_octets, interface = packet
    if link_type != _ETHERNET:
        if link_type not in _LINK_HEADERS:
            known = "Ethernet, raw IP, Linux cooked, loopback and PPP"
            raise UsageError(f"{path}: link type {_link_type_name(link_type)}; only {known} can be metered")
        header, octets = _LINK_HEADERS[link_type](frame)
        frame = header + frame[octets:]
        wire_octets += len(header) - octets
    octets = len(frame)
    if wire_octets < octets:
        wire_octets = octets
    if not 0 <= time_ns <= _MAX_TIME_NS:
        time_ns = min(max(time_ns, 0), _MAX_TIME_NS)
    return CapturedPacket(time_ns, frame, min(wire_octets, _MAX_WIRE_OCTETS), interface)


def _link_type_name(link_type: int) -> str:
    try:
        from scapy import data
    except ImportError:
        return str(link_type)
    names = [name[4:] for name, value in vars(data).items() if name.startswith("DLT_") and value == link_type]
    return f"{link_type} ({names[0]})" if names else str(link_type)


# From a file to records.


class _Source:
    """Gives all that it is asked for, or _DamagedError; nothing only between records. Scapy's reader reads from it."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._read = file.read
        self.between_records = False
        self.is_at_end = False

    def read(self, octets: int) -> bytes:
        if octets > _MAX_READ_OCTETS:
            raise _DamagedError(f"a length of {octets} octets")
        try:
            data: bytes = self._read(octets)
        except (EOFError, OSError, zlib.error) as error:
            raise _DamagedError(str(error)) from error
        if len(data) < octets:
            if data or not self.between_records:
                raise _DamagedError("the file ends within a record")
            self.is_at_end = True
        self.between_records = False
        return data


def _unzipped(file: io.BufferedReader) -> io.BufferedReader:
    if file.peek(2)[:2] != _GZIP_MAGIC:
        return file
    unzipping: Any = gzip.GzipFile(fileobj=file)
    return io.BufferedReader(unzipping)


def _pcap(file: io.BufferedReader) -> Iterator[Tuple[int, Frames]]:
    """Packets with the link type of them all, as they come: a capture may come through a pipe."""
    header = _Source(file).read(_PCAP_HEADER_OCTETS)
    order = "<" if header[:1] in b"\xd4\x4d" else ">"
    fraction_ns = 1 if b"\x3c" in header[:4] else 1000
    link_type = struct.unpack_from(order + "I", header, 20)[0] & 0x03FFFFFF  # above: the length of a checksum
    records, rest = _PcapRecords(order, fraction_ns), b""
    while more := _read(file, _BLOCK_OCTETS):
        octets = rest + more
        frames, end = records.of(octets)
        if len(frames):
            yield link_type, frames
        rest = octets[end:]
        records.check(rest)
    if rest:
        raise _DamagedError("the file ends within a record")


def _read(file: io.BufferedReader, octets: int) -> bytes:
    """What is there, up to so many octets; nothing at the end."""
    try:
        return file.read1(octets)
    except (EOFError, OSError, zlib.error) as error:
        raise _DamagedError(str(error)) from error


class _PcapRecords:
    """The records of a pcap file of this byte order and unit of a second's fraction."""

    def __init__(self, order: str, fraction_ns: int) -> None:
        self._fraction_ns = fraction_ns
        self._word = np.dtype(order + "u4")
        self._captured = struct.Struct(order + "8xI")

    def of(self, octets: bytes) -> Tuple[Frames, int]:
        """Those that are whole, and where the last of them ends."""
        begins: List[int] = []
        add, captured_at = begins.append, self._captured.unpack_from
        at, last = 0, len(octets) - _RECORD_OCTETS
        while at <= last:
            end = at + _RECORD_OCTETS + captured_at(octets, at)[0]
            if end > len(octets):
                break
            add(at)
            at = end
        begin = np.array(begins, np.int64)
        anywhere = np.ndarray((max(last + 1, 0),), f"V{_RECORD_OCTETS}", octets, strides=(1,))
        headers = anywhere[begin].view(self._word).reshape(-1, 4).astype(np.int64)
        seconds, fraction, captured, wire = headers.T
        time_ns = seconds * _SECOND_NS + fraction * self._fraction_ns
        wire_octets = np.maximum(wire, captured).astype(np.uint32)
        interface = np.zeros(len(begin), np.uint32)
        return Frames(octets, begin + _RECORD_OCTETS, captured, time_ns, wire_octets, interface), at

    def check(self, rest: bytes) -> None:
        """_DamagedError where the record that begins there is longer than any."""
        if len(rest) >= _RECORD_OCTETS:
            (captured,) = self._captured.unpack_from(rest)
            if captured > _MAX_READ_OCTETS:
                raise _DamagedError(f"a length of {captured} octets")


class _Interface(NamedTuple):
    """What an Interface Description Block says."""

    link_type: int
    snap_octets: int  # 0: no limit
    tick: Tuple[int, int]  # in nanoseconds, as a fraction
    offset_ns: int


def _pcapng(source: _Source) -> Iterator[_Record]:
    """Scapy finds the blocks. What is in them is read here: it drops interface numbers and time offsets."""
    # Scapy takes the level that it finds; what it would say of a damaged file is said here, once.
    logging.getLogger("scapy").setLevel(logging.ERROR)
    try:
        from scapy.error import Scapy_Exception
        from scapy.utils import RawPcapNgReader
    except ImportError as error:
        raise FlowexpError("reading a pcapng needs scapy: install python3-scapy, or 'pip install scapy'") from error
    section = _Section()

    class Reader(RawPcapNgReader):
        def _read_block(self, size: int = 0) -> Any:
            source.between_records = True
            return super()._read_block(size)

        def _read_block_shb(self) -> None:
            super()._read_block_shb()
            section.begin(self.endian)

        def _read_options(self, options: bytes) -> Dict[Any, Any]:
            return {}  # of a Section Header Block: only words

    try:
        reader: Any = Reader(cast(Any, source))
        reader.blocktypes = section.blocks()
        for record in reader:  # not `yield from`, which would close the file that is not the reader's
            yield record
    except (Scapy_Exception, struct.error) as error:
        raise _DamagedError(str(error)) from error
    if not source.is_at_end:
        raise _DamagedError("no record begins where the one before it ends")


class _Section:
    """The part of a pcapng file between two Section Header Blocks: byte order and interfaces of its own."""

    def begin(self, byte_order: str) -> None:
        self._interfaces: List[_Interface] = []
        self._order = byte_order
        self._last_ns = 0
        self._packet = struct.Struct(byte_order + "5I")

    def blocks(self) -> Dict[int, Callable[[bytes, int], Optional[_Record]]]:
        """Readers of blocks by type: a block's body and a maximum of octets that is none of ours."""
        return {
            1: self._read_interface,
            2: self._read_obsolete_packet,
            3: self._read_simple_packet,
            6: self._read_enhanced_packet,
        }

    def _read_interface(self, body: bytes, _: int) -> None:
        if len(self._interfaces) == _MAX_INTERFACES:
            raise _DamagedError(f"more than {_MAX_INTERFACES} interfaces")
        link_type, snap_octets = struct.unpack_from(self._order + "HxxI", body)
        options = dict(self._options(body[8:]))
        resolution, offset_s = options.get(9, b"\x06"), options.get(14, bytes(8))
        if len(resolution) != 1 or len(offset_s) != 8:
            raise _DamagedError("the time resolution or offset of an interface has a wrong length")
        ticks_s = (2 if resolution[0] & 0x80 else 10) ** (resolution[0] & 0x7F)
        divisor = math.gcd(_SECOND_NS, ticks_s)
        offset_ns = struct.unpack(self._order + "q", offset_s)[0] * _SECOND_NS
        tick = _SECOND_NS // divisor, ticks_s // divisor
        self._interfaces.append(_Interface(link_type, snap_octets, tick, offset_ns))

    def _options(self, octets: bytes) -> Iterator[Tuple[int, bytes]]:
        at = 0
        while at + 4 <= len(octets):
            code, length = struct.unpack_from(self._order + "HH", octets, at)
            if code == 0:
                return
            yield code, octets[at + 4 : at + 4 + length]
            at += 4 + length + -length % 4

    def _read_enhanced_packet(self, body: bytes, _: int) -> _Record:
        number, high, low, captured, wire = self._packet.unpack_from(body)
        return self._record(number, high << 32 | low, body[20 : 20 + captured], captured, wire)

    def _read_obsolete_packet(self, body: bytes, _: int) -> _Record:
        number, high, low, captured, wire = struct.unpack_from(self._order + "Hxx4I", body)
        return self._record(number, high << 32 | low, body[20 : 20 + captured], captured, wire)

    def _record(self, number: int, ticks: int, data: bytes, captured: int, wire: int) -> _Record:
        interface = self._interface(number)
        if len(data) < captured:
            raise _DamagedError(f"a packet of {captured} octets in a block that holds {len(data)}")
        multiplier, divisor = interface.tick
        self._last_ns = ticks * multiplier // divisor + interface.offset_ns
        return _Record(self._last_ns, data, wire, number + 1, interface.link_type)

    def _read_simple_packet(self, body: bytes, _: int) -> _Record:
        """It has no time; that of the packet before is the best guess. It belongs to the first interface."""
        interface = self._interface(0)
        (wire,) = struct.unpack_from(self._order + "I", body)
        captured = min(wire, interface.snap_octets or wire)
        if len(body) - 4 < captured:
            raise _DamagedError(f"a packet of {captured} octets in a block that holds {len(body) - 4}")
        return _Record(self._last_ns, body[4 : 4 + captured], wire, 1, interface.link_type)

    def _interface(self, number: int) -> _Interface:
        if number >= len(self._interfaces):
            raise _DamagedError(f"a packet of interface {number}, which the file does not describe")
        return self._interfaces[number]


# From a link header to an Ethernet header: its octets, and how many octets of the frame it replaces.

_ETHERNET = 1
_IPV4, _IPV6, _NOT_IP = 0x0800, 0x86DD, 0xFFFF  # EtherTypes; the last is reserved
_AF_IPV4 = 2
_AF_IPV6 = (10, 24, 28, 30)  # Linux; NetBSD, OpenBSD; FreeBSD; macOS
_PPP_IPV4, _PPP_IPV6 = 0x0021, 0x0057
_PPP_ETHERTYPES = {_PPP_IPV4: _IPV4, _PPP_IPV6: _IPV6}
_CISCO_ADDRESSES = (0x0F, 0x8F)

_LinkHeader = Tuple[bytes, int]


def _ethernet(ethertype: int, replaces: int, *, source: bytes = bytes(6)) -> _LinkHeader:
    return bytes(6) + source + ethertype.to_bytes(2, "big"), replaces


def _cut(frame: bytes) -> _LinkHeader:
    """The frame ends within its link header: nothing of it can be told."""
    return b"", len(frame)


def _always(ethertype: int) -> Callable[[bytes], _LinkHeader]:
    return lambda frame: _ethernet(ethertype, 0)


def _raw_ip(frame: bytes) -> _LinkHeader:
    if not frame:
        return _cut(frame)
    return _ethernet({4: _IPV4, 6: _IPV6}.get(frame[0] >> 4, _NOT_IP), 0)


def _family(family: int) -> _LinkHeader:
    return _ethernet(_IPV4 if family == _AF_IPV4 else _IPV6 if family in _AF_IPV6 else _NOT_IP, 4)


def _null(frame: bytes) -> _LinkHeader:
    """The address family is in the byte order of the machine that captured: the one in which it is small."""
    if len(frame) < 4:
        return _cut(frame)
    return _family(min(int.from_bytes(frame[:4], "little"), int.from_bytes(frame[:4], "big")))


def _loop(frame: bytes) -> _LinkHeader:
    return _family(int.from_bytes(frame[:4], "big")) if len(frame) >= 4 else _cut(frame)


def _cooked(frame: bytes) -> _LinkHeader:
    """LINUX_SLL: packet type, ARPHRD, address length, address (8), EtherType. VLAN tags follow as in Ethernet."""
    if len(frame) < 16:
        return _cut(frame)
    source = frame[6:12] if frame[4:6] == b"\0\6" else bytes(6)
    return _ethernet(int.from_bytes(frame[14:16], "big"), 16, source=source)


def _cooked2(frame: bytes) -> _LinkHeader:
    """LINUX_SLL2: EtherType, 0, interface index (4), ARPHRD, packet type, address length, address (8)."""
    if len(frame) < 20:
        return _cut(frame)
    source = frame[12:18] if frame[11] == 6 else bytes(6)
    return _ethernet(int.from_bytes(frame[:2], "big"), 20, source=source)


def _ppp(frame: bytes) -> _LinkHeader:
    """RFC 1661 and 1662: address and control may be left out, and the first octet of a protocol below 256."""
    at = 2 if frame[:2] == b"\xff\x03" else 0
    octets = 1 if frame[at : at + 1] and frame[at] & 1 else 2
    if len(frame) < at + octets:
        return _cut(frame)
    protocol = int.from_bytes(frame[at : at + octets], "big")
    return _ethernet(_PPP_ETHERTYPES.get(protocol, _NOT_IP), at + octets)


def _ppp_serial(frame: bytes) -> _LinkHeader:
    """PPP in HDLC framing (RFC 1662, section 4.2), or Cisco's HDLC, which carries an EtherType."""
    if frame[:1] and frame[0] in _CISCO_ADDRESSES:
        return _ethernet(int.from_bytes(frame[2:4], "big"), 4) if len(frame) >= 4 else _cut(frame)
    return _ppp(frame)


_LINK_HEADERS: Dict[int, Callable[[bytes], _LinkHeader]] = {
    0: _null,
    9: _ppp,
    12: _raw_ip,
    14: _raw_ip,
    50: _ppp_serial,
    101: _raw_ip,
    108: _loop,
    113: _cooked,
    228: _always(_IPV4),
    229: _always(_IPV6),
    276: _cooked2,
}
