# SPDX-License-Identifier: GPL-2.0-or-later
"""What the packet path has to make of a frame, said a second time: plain Python over octets.

Headers are taken off from the outside in; what is left of the packet is cut to its IP length at once, so that
padding cannot be mistaken for a header. A cut frame is metered by what its headers say: at a live interface
(`live`) there is none, so an IP length beyond the frame is malformed there.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

NOT_IP, TRUNCATED, MALFORMED = "not_ip", "truncated", "malformed"

TPIDS = {b"\x81\x00", b"\x88\xa8", b"\x91\x00"}
MAX_TAGS = 4
ETHERTYPES = {b"\x08\x00": 4, b"\x86\xdd": 6}
TAGGED = 0x1000  # beside a VLAN id: there is a tag

TCP, PORTS_ONLY = 6, {17, 33, 132, 136}
ICMP = {4: 1, 6: 58}
HOP_BY_HOP, FRAGMENT, AUTHENTICATION = 0, 44, 51
EXTENSION_HEADERS = {HOP_BY_HOP, 43, FRAGMENT, AUTHENTICATION, 60, 135}
MAX_EXTENSION_HEADERS = 12
JUMBO_OPTION = b"\xc2\x04"
DONT_FRAGMENT, MORE_FRAGMENTS = 0x02, 0x04  # fragmentFlags


class Key(NamedTuple):
    """The Flow Key. Addresses in network order; `vlan` is 0 without a tag, else TAGGED and the id."""

    src_addr: bytes
    dst_addr: bytes
    protocol: int
    src_port: int
    dst_port: int
    icmp_type_code: int
    vlan: int
    interface: int


class Packet(NamedTuple):
    """One packet of a flow. `octets` is the IP length; `flags` are TCP's nine."""

    key: Key
    octets: int
    tcp_flags: int
    tos: int
    ttl: int
    flow_label: int
    inner_vlan: int
    src_mac: bytes
    dst_mac: bytes
    fragment_flags: int
    fragment_id: Optional[int] = None  # None: not fragmented
    is_late: bool = False  # a fragment that is not the first


class Flow(NamedTuple):
    """What is kept of a flow's packets; from `tos` to `dst_mac` it is the first packet's, as is DONT_FRAGMENT."""

    packets: int
    octets: int
    tcp_flags: int
    min_length: int
    max_length: int
    min_ttl: int
    max_ttl: int
    first_ns: int
    last_ns: int
    fragment_flags: int
    tos_changes: int
    tos: int
    flow_label: int
    inner_vlan: int
    src_mac: bytes
    dst_mac: bytes


class Count(NamedTuple):
    packets: int
    octets: int


class Books(NamedTuple):
    """All that became of the packets of a while: flows, and what was not metered, by reason."""

    flows: dict[Key, Flow]
    not_metered: dict[str, Count]

    @property
    def seen(self) -> Count:
        parts = [*self.flows.values(), *self.not_metered.values()]
        return Count(sum(part.packets for part in parts), sum(part.octets for part in parts))


def _transport(protocol: int, version: int, segment: bytes) -> tuple[int, int, int, int]:
    """Ports, ICMP type and code, TCP flags, each 0 where its octets are not there."""
    if protocol == ICMP[version]:
        return 0, 0, int.from_bytes(segment[:2], "big") if len(segment) >= 2 else 0, 0
    if len(segment) < 4 or (protocol != TCP and protocol not in PORTS_ONLY):
        return 0, 0, 0, 0
    src_port, dst_port = segment[0] << 8 | segment[1], segment[2] << 8 | segment[3]
    has_flags = protocol == TCP and len(segment) >= 14
    return src_port, dst_port, 0, (segment[12] & 1) << 8 | segment[13] if has_flags else 0


class _Chain(NamedTuple):
    """Where a walk along IPv6 extension headers has led."""

    protocol: int
    rest: bytes
    fragment_flags: int = 0
    fragment_id: Optional[int] = None
    is_late: bool = False


def _walk(protocol: int, rest: bytes) -> _Chain:
    flags, fragment_id = 0, None
    for _ in range(MAX_EXTENSION_HEADERS):
        if protocol not in EXTENSION_HEADERS or len(rest) < 8:
            break
        header, protocol = protocol, rest[0]
        if header == FRAGMENT:
            offset_and_more = rest[2] << 8 | rest[3]
            flags = MORE_FRAGMENTS if offset_and_more & 1 else 0
            fragment_id = int.from_bytes(rest[4:8], "big") if offset_and_more & 0xFFF9 else None
            rest, length = rest[8:], 0
            if offset_and_more & 0xFFF8:
                return _Chain(protocol, rest, flags, fragment_id, True)
        else:
            length = (rest[1] + 2) * 4 if header == AUTHENTICATION else (rest[1] + 1) * 8
        rest = rest[length:]
    return _Chain(protocol, rest, flags, fragment_id)


class _Link(NamedTuple):
    version: int
    octets: int
    vlan: int = 0
    inner_vlan: int = 0
    src_mac: bytes = bytes(6)
    dst_mac: bytes = bytes(6)


def _ethernet(frame: bytes) -> Union[_Link, str]:
    at, tags = 14, []
    if len(frame) < at:
        return TRUNCATED
    while frame[at - 2 : at] in TPIDS and len(tags) < MAX_TAGS:
        if len(frame) < at + 4:
            return TRUNCATED
        tags.append((frame[at] << 8 | frame[at + 1]) & 0xFFF | TAGGED)
        at += 4
    version = ETHERTYPES.get(frame[at - 2 : at])
    if version is None:
        return NOT_IP
    outer, inner = (*tags, 0, 0)[:2]
    return _Link(version, at, outer, inner, frame[6:12], frame[:6])


def _no_link(frame: bytes) -> Union[_Link, str]:
    if not frame:
        return TRUNCATED
    version = frame[0] >> 4
    return _Link(version, 0) if version in (4, 6) else NOT_IP


def _ipv4(link: _Link, ip: bytes, wire_octets: int, interface: int, live: bool) -> Union[Packet, str]:
    if len(ip) < 20:
        return TRUNCATED
    header_octets, octets = (ip[0] & 15) * 4, ip[2] << 8 | ip[3]
    if octets == 0 and not live:  # a super-packet of more than 65,535 octets
        octets = wire_octets - link.octets
    if ip[0] >> 4 != 4 or header_octets < 20 or octets < header_octets or (live and octets > len(ip)):
        return MALFORMED
    fragment, protocol = ip[6] << 8 | ip[7], ip[9]
    is_late = fragment & 0x1FFF != 0
    ports = (0, 0, 0, 0) if is_late else _transport(protocol, 4, ip[header_octets:octets])
    flags = (DONT_FRAGMENT if fragment & 0x4000 else 0) | (MORE_FRAGMENTS if fragment & 0x2000 else 0)
    return Packet(
        Key(ip[12:16], ip[16:20], protocol, *ports[:3], link.vlan, interface), octets, ports[3], ip[1], ip[8], 0,
        link.inner_vlan, link.src_mac, link.dst_mac, flags,
        ip[4] << 8 | ip[5] if fragment & 0x3FFF else None, is_late,
    )  # fmt: skip


def _ipv6(link: _Link, ip: bytes, wire_octets: int, interface: int, live: bool) -> Union[Packet, str]:
    if len(ip) < 40:
        return TRUNCATED
    if ip[0] >> 4 != 6:
        return MALFORMED
    octets = 40 + (ip[4] << 8 | ip[5])
    if octets == 40 and ip[6] == HOP_BY_HOP and ip[42:44] == JUMBO_OPTION and len(ip) >= 48:
        octets += int.from_bytes(ip[44:48], "big")
    elif octets == 40 and not live and wire_octets - link.octets - 40 > 65_535:
        octets = wire_octets - link.octets
    if live and octets > len(ip):
        return MALFORMED
    chain = _walk(ip[6], ip[40:octets])
    ports = (0, 0, 0, 0) if chain.is_late else _transport(chain.protocol, 6, chain.rest)
    return Packet(
        Key(ip[8:24], ip[24:40], chain.protocol, *ports[:3], link.vlan, interface), octets, ports[3],
        (ip[0] << 4 | ip[1] >> 4) & 0xFF, ip[7], int.from_bytes(ip[1:4], "big") & 0xFFFFF,
        link.inner_vlan, link.src_mac, link.dst_mac, chain.fragment_flags, chain.fragment_id, chain.is_late,
    )  # fmt: skip


def dissect(
    frame: bytes, wire_octets: int, *, interface: int = 0, live: bool = False, has_ethernet: bool = True
) -> Union[Packet, str]:
    """The packet in a frame (network order), or the reason why it is not metered. Fragments stay as they are."""
    link = _ethernet(frame) if has_ethernet else _no_link(frame)
    if isinstance(link, str):
        return link
    parse = _ipv4 if link.version == 4 else _ipv6
    return parse(link, frame[link.octets :], wire_octets, interface, live)


class Meter:
    """Packets in, Books out. Fragments take their ports from the first one, over all its Books."""

    def __init__(self, *, live: bool = False, has_ethernet: bool = True) -> None:
        self._live, self._has_ethernet = live, has_ethernet
        self._first_fragments: dict[tuple[bytes, bytes, int, int], Key] = {}
        self._books = Books({}, {})

    def take(self) -> Books:
        """All since this was asked last."""
        books, self._books = self._books, Books({}, {})
        return books

    def feed(self, frame: bytes, *, time_ns: int = 0, wire_octets: Optional[int] = None, interface: int = 0) -> None:
        """wire_octets: of the whole frame; None: it is whole."""
        if wire_octets is None:
            wire_octets = len(frame)
        packet = dissect(frame, wire_octets, interface=interface, live=self._live, has_ethernet=self._has_ethernet)
        if isinstance(packet, str):
            packets, octets = self._books.not_metered.get(packet, (0, 0))
            self._books.not_metered[packet] = Count(packets + 1, octets + wire_octets)
            return
        key = packet.key if packet.fragment_id is None else self._resolve(packet)
        flow = self._books.flows.get(key)
        self._books.flows[key] = _begin(packet, time_ns) if flow is None else _add(flow, packet, time_ns)

    def _resolve(self, packet: Packet) -> Key:
        """A first fragment is remembered; a later one gets the first one's ports, and over IPv6 its protocol."""
        key = packet.key
        assert packet.fragment_id is not None
        protocol = key.protocol if len(key.src_addr) == 4 else 0
        datagram = key.src_addr, key.dst_addr, packet.fragment_id, protocol
        if not packet.is_late:
            self._first_fragments[datagram] = key
            return key
        first = self._first_fragments.get(datagram, key)
        return first._replace(vlan=key.vlan, interface=key.interface)


def _begin(packet: Packet, time_ns: int) -> Flow:
    length = _length_field(packet)
    return Flow(
        1, packet.octets, packet.tcp_flags, length, length, packet.ttl, packet.ttl, time_ns, time_ns,
        packet.fragment_flags, 0, packet.tos, packet.flow_label, packet.inner_vlan, packet.src_mac, packet.dst_mac,
    )  # fmt: skip


def _add(flow: Flow, packet: Packet, time_ns: int) -> Flow:
    length = _length_field(packet)
    return Flow(
        flow.packets + 1, flow.octets + packet.octets, flow.tcp_flags | packet.tcp_flags,
        min(flow.min_length, length), max(flow.max_length, length),
        min(flow.min_ttl, packet.ttl), max(flow.max_ttl, packet.ttl),
        flow.first_ns, max(flow.last_ns, time_ns),
        flow.fragment_flags | packet.fragment_flags & MORE_FRAGMENTS, flow.tos_changes + (packet.tos != flow.tos),
        *flow[11:],
    )  # fmt: skip


def _length_field(packet: Packet) -> int:
    """The IP length as far as its field goes: 65,535 octets, of the payload in IPv6."""
    return min(packet.octets, 65_535 + (40 if len(packet.key.src_addr) == 16 else 0))
