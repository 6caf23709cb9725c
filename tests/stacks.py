# SPDX-License-Identifier: GPL-2.0-or-later
"""Every header stack that may come along, as Ethernet frames made by scapy, by what has to become of them.

Each stack has addresses of its own, so that none can hide behind another's flow. Where octets are wrong they
are wrong on purpose, and set by hand.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Sequence
from typing import Any, Union

from scapy.layers.inet import GRE, ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_Timestamp
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    IPv6ExtHdrSegmentRouting,
    Jumbo,
    PadN,
    RouterAlert,
)
from scapy.layers.l2 import ARP, LLC, SNAP, Dot1AD, Dot1Q, Dot3, Ether
from scapy.layers.ppp import PPP, PPPoE
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Packet, Raw

SRC_MAC, DST_MAC = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
PAYLOAD = b"payload, octet by octet"

MPLS, PPPOE_SESSION, LLDP, QINQ = 0x8847, 0x8864, 0x88CC, 0x9100
IPIP, IGMP, IPV6_IN_IP, DCCP, ESP, AH, OSPF, PIM, MOBILITY, UDP_LITE = 4, 2, 41, 33, 50, 51, 89, 103, 135, 136
NO_NEXT_HEADER, EXPERIMENT = 59, 253

LONG_OPTION = PadN(optdata=bytes(255))

Layers = Union[Packet, bytes]


class Host:
    """Makes the headers of one stack, with addresses that no other stack has."""

    def __init__(self, number: int) -> None:
        self._ipv4 = [str(ipaddress.ip_address(0x0A000000 + 4 * number + i)) for i in (1, 2)]
        self._ipv6 = [str(ipaddress.ip_address((0xFD << 120) + 4 * number + i)) for i in (1, 2)]

    @staticmethod
    def ether(**fields: Any) -> Packet:
        return Ether(src=SRC_MAC, dst=DST_MAC, **fields)

    def ipv4(self, **fields: Any) -> Packet:
        return self.ether() / self.bare_ipv4(**fields)

    def ipv6(self, **fields: Any) -> Packet:
        return self.ether() / self.bare_ipv6(**fields)

    def bare_ipv4(self, **fields: Any) -> Packet:
        return IP(**{"src": self._ipv4[0], "dst": self._ipv4[1], "id": 1, **fields})

    def bare_ipv6(self, **fields: Any) -> Packet:
        return IPv6(**{"src": self._ipv6[0], "dst": self._ipv6[1], **fields})


def tcp(flags: int = 0x10, **fields: Any) -> Packet:
    """`flags`: nine bits."""
    return TCP(sport=40_000, dport=443, flags=flags, **fields) / Raw(PAYLOAD)


def udp() -> Packet:
    return UDP(sport=40_000, dport=9) / Raw(PAYLOAD)


def dccp() -> bytes:
    """A DCCP Request, RFC 4340, section 5.1: ports, data offset, ..., type 0 with long sequence numbers."""
    return struct.pack(">HHBBHB7sI", 40_000, 5_001, 5, 0, 0, 1, bytes(7), 0x1234) + PAYLOAD


def authentication(next_header: int) -> bytes:
    """An Authentication Header of 24 octets, RFC 4302, section 2."""
    return struct.pack(">BBHII12s", next_header, 4, 0, 0x100, 1, bytes(12))


def mobility(next_header: int) -> bytes:
    """A Binding Refresh Request, RFC 6275, section 6.1."""
    return struct.pack(">BBBBHH", next_header, 0, 0, 0, 0, 0)


def destination_options(next_header: int, units: int = 0) -> bytes:
    """Destination Options of nothing but padding, 8 octets and `units` times 8 more."""
    return bytes([next_header, units, 1, 4 + 8 * units]) + bytes(4 + 8 * units)


def chain(count: int, protocol: int) -> bytes:
    """`count` Destination Options headers, the last of which announces `protocol`."""
    return b"".join(destination_options(60 if n < count - 1 else protocol) for n in range(count))


def ipv4_fragments(host: Host, size: int = 24, *, id: int = 7) -> list[Packet]:
    """A UDP datagram in three fragments."""
    whole = bytes(UDP(sport=40_000, dport=9, len=8 + 3 * size - 8, chksum=0)) + bytes(3 * size - 8)
    return [
        host.ipv4(proto=17, id=id, flags="MF" if at < 2 else 0, frag=at * size // 8) / whole[at * size :][:size]
        for at in range(3)
    ]


def ipv6_fragments(host: Host, size: int = 24, *, before: Sequence[Packet] = (), id: int = 7) -> list[Packet]:
    """A UDP datagram in three fragments; `before`: extension headers in each of them."""
    whole = bytes(UDP(sport=40_000, dport=9, len=8 + 3 * size - 8, chksum=1)) + bytes(3 * size - 8)
    fragments = []
    for at in range(3):
        packet = host.ipv6()
        for header in before:
            packet /= header.copy()
        packet /= IPv6ExtHdrFragment(nh=17, id=id, m=int(at < 2), offset=at * size // 8)
        fragments.append(packet / whole[at * size :][:size])
    return fragments


def with_octets(packet: Layers, *changes: tuple[int, bytes]) -> bytes:
    """The frame with other octets at these offsets."""
    frame = bytearray(bytes(packet))
    for at, octets in changes:
        frame[at : at + len(octets)] = octets
    return bytes(frame)


def jumbogram(host: Host, octets: int, *options: Any) -> bytes:
    """The first octets of a jumbogram (RFC 2675) with `octets` behind its IPv6 header."""
    options = options or (Jumbo(jumboplen=octets),)
    packet = host.ipv6(plen=0) / IPv6ExtHdrHopByHop(options=list(options), autopad=0) / TCP(sport=40_000, dport=443)
    return bytes(packet) + PAYLOAD


Builder = Callable[[Host], Union[Layers, Sequence[Layers]]]

IP_STACKS: dict[str, Builder] = {
    # Link
    "Ethernet II": lambda h: h.ipv4() / udp(),
    "802.1Q": lambda h: h.ether() / Dot1Q(vlan=100) / h.bare_ipv4() / tcp(),
    "802.1Q, IPv6": lambda h: h.ether() / Dot1Q(vlan=100) / h.bare_ipv6() / tcp(),
    "802.1Q, id 4095, priority 7, DEI": lambda h: h.ether() / Dot1Q(vlan=4095, prio=7, dei=1) / h.bare_ipv4() / udp(),
    "802.1ad": lambda h: h.ether() / Dot1AD(vlan=200) / h.bare_ipv4() / udp(),
    "tag 0x9100": lambda h: h.ether(type=QINQ) / Dot1Q(vlan=300) / h.bare_ipv4() / udp(),
    "QinQ": lambda h: h.ether() / Dot1AD(vlan=200) / Dot1Q(vlan=100) / h.bare_ipv4() / udp(),
    "QinQ, IPv6": lambda h: h.ether() / Dot1AD(vlan=200) / Dot1Q(vlan=100) / h.bare_ipv6() / udp(),
    "two 802.1Q tags": lambda h: h.ether() / Dot1Q(vlan=1) / Dot1Q(vlan=2) / h.bare_ipv4() / udp(),
    "priority tag": lambda h: h.ether() / Dot1Q(vlan=0, prio=5) / h.bare_ipv4() / udp(),
    "priority tag in 802.1ad": lambda h: h.ether() / Dot1AD(vlan=200) / Dot1Q(vlan=0) / h.bare_ipv4() / udp(),
    "one flow in two VLANs": lambda h: [h.ether() / Dot1Q(vlan=n) / h.bare_ipv4() / udp() for n in (0, 1, 2, 1)],
    "three tags": lambda h: h.ether() / Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3) / h.bare_ipv4() / udp(),
    "four tags": lambda h: (
        h.ether() / (Dot1Q(vlan=1) / Dot1Q(vlan=2)) / (Dot1Q(vlan=3) / Dot1Q(vlan=4)) / h.bare_ipv6() / udp()
    ),
    "padded to 60 octets": lambda h: bytes(h.ipv4() / UDP(sport=40_000, dport=9)).ljust(60, b"\xee"),
    "padded to 60 octets, no transport": lambda h: bytes(h.ipv4(proto=6, len=20)).ljust(60, b"\xee"),
    "padded within the TCP header": lambda h: with_octets(h.ipv4() / tcp(), (16, b"\0\x20")),
    "padded IPv6": lambda h: bytes(h.ipv6(plen=0, nh=17)).ljust(60, b"\xee"),
    # IPv4
    "IPv4, no payload": lambda h: h.ipv4(proto=EXPERIMENT),
    "IPv4 with 4 octets of options": lambda h: h.ipv4(options=[IPOption_NOP()] * 4) / tcp(),
    "IPv4 with 40 octets of options": lambda h: h.ipv4(options=[IPOption_NOP()] * 40) / tcp(),
    "IPv4 with a timestamp option": lambda h: h.ipv4(options=[IPOption_Timestamp()]) / udp(),
    "IPv4, do not fragment": lambda h: h.ipv4(flags="DF") / udp(),
    "IPv4, the evil bit": lambda h: h.ipv4(flags="evil") / udp(),
    "IPv4, ToS that changes": lambda h: [h.ipv4(tos=tos, ttl=ttl) / udp() for tos, ttl in ((0xB8, 9), (0, 64), (4, 1))],
    "IPv4, TTL 0": lambda h: h.ipv4(ttl=0) / udp(),
    "IPv4, one address twice": lambda h: h.ipv4(src="127.0.0.1", dst="127.0.0.1") / udp(),
    "IPv4 to a multicast group": lambda h: h.ipv4(dst="224.0.0.251") / udp(),
    "IPv4, 0.0.0.0 to 255.255.255.255": lambda h: h.ipv4(src="0.0.0.0", dst="255.255.255.255") / udp(),
    "IPv4 fragments": lambda h: ipv4_fragments(h),
    "IPv4 fragments of 8 octets": lambda h: ipv4_fragments(h, 8),
    "IPv4 fragments, the last first": lambda h: ipv4_fragments(h)[::-1],
    "IPv4 fragments, the first is missing": lambda h: ipv4_fragments(h)[1:],
    "IPv4 fragments of two datagrams, mixed": lambda h: [
        fragment for pair in zip(ipv4_fragments(h, id=1), ipv4_fragments(h, id=2)) for fragment in pair
    ],
    "IPv4 fragments of ICMP": lambda h: [
        h.ipv4(flags="MF") / ICMP(type=8) / bytes(8),
        h.ipv4(proto=1, frag=2) / bytes(24),
    ],
    "IPv4 fragment, 8 octets of TCP": lambda h: [
        h.ipv4(proto=6, flags="MF") / bytes(tcp())[:8],
        h.ipv4(proto=6, frag=1) / bytes(tcp())[8:],
    ],
    # IPv6
    "IPv6": lambda h: h.ipv6() / tcp(),
    "IPv6, traffic class and flow label": lambda h: h.ipv6(tc=0xB9, fl=0xABCDE, hlim=1) / udp(),
    "IPv6, hop limits": lambda h: [h.ipv6(hlim=n, tc=n) / udp() for n in (64, 255, 0)],
    "IPv6, no next header": lambda h: h.ipv6(nh=NO_NEXT_HEADER) / PAYLOAD,
    "IPv6, no payload": lambda h: h.ipv6(nh=NO_NEXT_HEADER, plen=0),
    "IPv6, TCP without octets": lambda h: h.ipv6(nh=6, plen=0),
    "hop-by-hop options": lambda h: h.ipv6() / IPv6ExtHdrHopByHop(options=[RouterAlert()]) / udp(),
    "hop-by-hop options of 264 octets": lambda h: h.ipv6() / IPv6ExtHdrHopByHop(options=[LONG_OPTION]) / udp(),
    "routing header": lambda h: h.ipv6() / IPv6ExtHdrRouting(addresses=["fd00::9"]) / tcp(),
    "segment routing header": lambda h: h.ipv6() / IPv6ExtHdrSegmentRouting(addresses=["fd00::8", "fd00::9"]) / udp(),
    "destination options": lambda h: h.ipv6() / IPv6ExtHdrDestOpt() / udp(),
    "authentication header": lambda h: h.ipv6(nh=AH) / (authentication(17) + bytes(udp())),
    "mobility header": lambda h: h.ipv6(nh=MOBILITY) / mobility(NO_NEXT_HEADER),
    "mobility header before UDP": lambda h: h.ipv6(nh=MOBILITY) / (mobility(17) + bytes(udp())),
    "every extension header": lambda h: (
        h.ipv6()
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrRouting(addresses=["fd00::9"])
        / IPv6ExtHdrFragment(nh=AH, id=1)
        / (authentication(MOBILITY) + mobility(60) + destination_options(6) + bytes(tcp()))
    ),
    "8 extension headers": lambda h: h.ipv6(nh=60) / (chain(8, 17) + bytes(udp())),
    "12 extension headers": lambda h: h.ipv6(nh=60) / (chain(12, 17) + bytes(udp())),
    "atomic fragment": lambda h: h.ipv6() / IPv6ExtHdrFragment(id=5) / udp(),
    "IPv6 fragments": lambda h: ipv6_fragments(h),
    "IPv6 fragments of 8 octets": lambda h: ipv6_fragments(h, 8),
    "IPv6 fragments with their reserved bits set": lambda h: [
        h.ipv6() / IPv6ExtHdrFragment(nh=17, id=1, res1=255, res2=3, m=m, offset=offset) / bytes(udp())[:16]
        for m, offset in ((0, 0), (1, 0), (0, 2))
    ],
    "IPv6 fragments, the last first": lambda h: ipv6_fragments(h)[::-1],
    "IPv6 fragments, the first is missing": lambda h: ipv6_fragments(h)[1:],
    "IPv6 fragments behind other headers": lambda h: ipv6_fragments(
        h, before=[IPv6ExtHdrHopByHop(), IPv6ExtHdrRouting(addresses=["fd00::9"])]
    ),
    # A late fragment says 60, and only the first one that UDP follows.
    "IPv6 fragments with options inside": lambda h: [
        h.ipv6() / IPv6ExtHdrFragment(nh=60, id=3, m=1) / (destination_options(17) + bytes(udp())[:16]),
        h.ipv6() / IPv6ExtHdrFragment(nh=60, id=3, offset=3) / bytes(16),
    ],
    "jumbogram": lambda h: jumbogram(h, 70_000),
    "jumbograms": lambda h: [jumbogram(h, 65_536), jumbogram(h, 3_000_000_000)],
    # Transport
    "TCP, every combination of flags": lambda h: [h.ipv4() / TCP(sport=1024 + n, flags=n) for n in range(512)],
    "TCP, one flag after the other": lambda h: [h.ipv6() / tcp(1 << n) for n in range(9)],
    "TCP with options": lambda h: (
        h.ipv4()
        / tcp(0x02, options=[("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)])
    ),
    "TCP, data offset 0": lambda h: h.ipv4() / tcp(dataofs=0),
    "TCP without flags in the packet": lambda h: h.ipv4(proto=6) / bytes(tcp())[:13],
    "TCP with its first 14 octets": lambda h: h.ipv4(proto=6) / bytes(tcp(0x1FF))[:14],
    "TCP without ports": lambda h: h.ipv4(proto=6) / bytes(tcp())[:3],
    "UDP": lambda h: [h.ipv4() / UDP(sport=n, dport=65_535 - n) / PAYLOAD for n in (0, 1, 65_535)],
    "UDP over IPv6": lambda h: h.ipv6() / udp(),
    "UDP-Lite": lambda h: h.ipv4(proto=UDP_LITE) / bytes(udp()),
    "UDP-Lite over IPv6": lambda h: h.ipv6(nh=UDP_LITE) / bytes(udp()),
    "SCTP": lambda h: h.ipv4() / SCTP(sport=36_412, dport=36_413) / SCTPChunkInit(),
    "SCTP over IPv6": lambda h: h.ipv6() / SCTP(sport=36_412, dport=36_413) / SCTPChunkInit(),
    "DCCP": lambda h: h.ipv4(proto=DCCP) / dccp(),
    "DCCP over IPv6": lambda h: h.ipv6(nh=DCCP) / dccp(),
    "ICMP": lambda h: [h.ipv4() / ICMP(type=t, code=c) / PAYLOAD for t, c in ((8, 0), (0, 0), (3, 4), (255, 255))],
    "ICMP with its type alone": lambda h: h.ipv4(proto=1) / b"\x08",
    "ICMP with type and code alone": lambda h: h.ipv4(proto=1) / b"\x03\x01",
    "ICMPv6": lambda h: [
        h.ipv6() / message for message in (ICMPv6EchoRequest(), ICMPv6EchoReply(), ICMPv6DestUnreach(code=4))
    ],
    "neighbour solicitation": lambda h: h.ipv6(hlim=255) / ICMPv6ND_NS(tgt="fd00::1"),
    "ICMP over IPv6": lambda h: h.ipv6(nh=1) / b"\x08\x00\x00\x00",
    "ICMPv6 over IPv4": lambda h: h.ipv4(proto=58) / b"\x80\x00\x00\x00",
    # Other protocols
    "GRE": lambda h: h.ipv4() / GRE() / IP(src="192.0.2.1", dst="192.0.2.2") / tcp(),
    "GRE over IPv6": lambda h: h.ipv6(nh=47) / GRE() / IP(src="192.0.2.1", dst="192.0.2.2") / udp(),
    "ESP": lambda h: h.ipv4(proto=ESP) / struct.pack(">II", 0x100, 1) / PAYLOAD,
    "ESP over IPv6": lambda h: h.ipv6(nh=ESP) / struct.pack(">II", 0x100, 1) / PAYLOAD,
    "AH over IPv4": lambda h: h.ipv4(proto=AH) / (authentication(6) + bytes(tcp())),
    "IPv4 in IPv4": lambda h: h.ipv4() / IP(src="192.0.2.1", dst="192.0.2.2") / tcp(),
    "IPv6 in IPv4": lambda h: h.ipv4(proto=IPV6_IN_IP) / IPv6(src="2001:db8::1", dst="2001:db8::2") / udp(),
    "IPv6 in IPv6": lambda h: h.ipv6() / IPv6(src="2001:db8::1", dst="2001:db8::2") / udp(),
    "IGMP": lambda h: h.ipv4(proto=IGMP, options=[IPOption_NOP()] * 4) / bytes.fromhex("1164ee9b00000000"),
    "OSPF": lambda h: h.ipv4(proto=OSPF) / bytes.fromhex("0201002c0a00000100000000"),
    "PIM": lambda h: h.ipv6(nh=PIM) / bytes.fromhex("20000000"),
    "every other protocol number": lambda h: [h.ipv4(proto=n) / bytes(32) for n in range(256)],
    "every other next header": lambda h: [
        h.ipv6(nh=n) / bytes(32) for n in range(256) if n not in (0, 43, 44, 51, 60, 135)
    ],
}

CUT_CHAINS: dict[str, Builder] = {
    "13 extension headers": lambda h: h.ipv6(nh=60) / (chain(13, 17) + bytes(udp())),
    "16 extension headers": lambda h: h.ipv6(nh=60) / (chain(16, 17) + bytes(udp())),
    "extension header cut by the packet's end": lambda h: h.ipv6(nh=60) / destination_options(17)[:7],
    "extension header longer than the packet": lambda h: h.ipv6(nh=60) / destination_options(17, 30)[:64],
    "padding behind a cut extension header": lambda h: h.ipv6(nh=60, plen=7) / destination_options(17),
}

NOT_IP: dict[str, Builder] = {
    "ARP": lambda h: h.ether(type=0x0806) / ARP(psrc="10.0.0.1", pdst="10.0.0.2"),
    "ARP in a VLAN": lambda h: h.ether() / Dot1Q(vlan=100) / ARP(),
    "LLDP": lambda h: h.ether(type=LLDP) / bytes.fromhex("0207040200000000010403013106020078 0000"),
    "MPLS": lambda h: h.ether(type=MPLS) / struct.pack(">I", 16 << 12 | 0x1FF) / h.bare_ipv4() / udp(),
    "PPPoE": lambda h: h.ether(type=PPPOE_SESSION) / PPPoE(sessionid=1) / PPP() / h.bare_ipv4() / udp(),
    "802.3 with LLC": lambda h: Dot3(src=SRC_MAC, dst="01:80:c2:00:00:00") / LLC(dsap=0x42, ssap=0x42) / bytes(35),
    "IPv4 in SNAP": lambda h: Dot3(src=SRC_MAC, dst=DST_MAC) / LLC() / SNAP(code=0x0800) / h.bare_ipv4() / udp(),
    "five tags": lambda h: (
        h.ether()
        / (Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3) / Dot1Q(vlan=4) / Dot1Q(vlan=5))
        / h.bare_ipv4()
        / udp()
    ),
    "nothing behind the Ethernet header": lambda h: h.ether(type=0x0806),
    "a tag and ARP without octets": lambda h: h.ether() / Dot1Q(vlan=100, type=0x0806),
    "EtherType 0": lambda h: h.ether(type=0) / bytes(46),
}

MALFORMED: dict[str, Builder] = {
    "IPv4, version 6": lambda h: with_octets(h.ipv4() / udp(), (14, b"\x65")),
    "IPv4, version 0": lambda h: with_octets(h.ipv4() / udp(), (14, b"\x05")),
    "IPv4, header of 0 octets": lambda h: with_octets(h.ipv4() / udp(), (14, b"\x40")),
    "IPv4, header of 16 octets": lambda h: with_octets(h.ipv4() / udp(), (14, b"\x44")),
    "IPv4, 19 octets in all": lambda h: with_octets(h.ipv4() / udp(), (16, b"\0\x13")),
    "IPv4, shorter than its options": lambda h: with_octets(
        h.ipv4(options=[IPOption_NOP()] * 4) / udp(), (16, b"\0\x17")
    ),
    "IPv6, version 4": lambda h: with_octets(h.ipv6() / udp(), (14, b"\x40")),
    "IPv6, version 7": lambda h: with_octets(h.ipv6() / udp(), (14, b"\x70")),
}

TRUNCATED: dict[str, Builder] = {
    "frames of less than 14 octets": lambda h: [bytes(h.ipv4() / udp())[:n] for n in range(14)],
    "frames that end in a tag": lambda h: [
        bytes(h.ether() / Dot1Q(vlan=100) / h.bare_ipv4())[:n] for n in range(14, 18)
    ],
    "frames that end in the second tag": lambda h: [
        bytes(h.ether() / Dot1AD(vlan=200) / Dot1Q(vlan=100) / h.bare_ipv4())[:n] for n in range(18, 22)
    ],
    "frames that end in the IPv4 header": lambda h: [bytes(h.ipv4() / udp())[:n] for n in range(14, 34)],
    "frames that end in the IPv6 header": lambda h: [bytes(h.ipv6() / udp())[:n] for n in range(14, 54)],
    "frames that end in the IP header of a VLAN": lambda h: [
        bytes(h.ether() / Dot1Q(vlan=100) / ip)[:n]
        for ip, end in ((h.bare_ipv4(), 38), (h.bare_ipv6(), 58))
        for n in range(18, end)
    ],
}


def build(builder: Builder, number: int) -> tuple[bytes, ...]:
    """The frames of one stack, with the addresses of host `number`."""
    built = builder(Host(number))
    return tuple(bytes(each) for each in (built if isinstance(built, (list, tuple)) else [built]))


def build_all(*catalogues: dict[str, Builder]) -> dict[str, tuple[bytes, ...]]:
    """Frames by the name of their stack."""
    stacks = {name: builder for catalogue in catalogues for name, builder in catalogue.items()}
    return {name: build(builder, number) for number, (name, builder) in enumerate(stacks.items())}


METERED = build_all(IP_STACKS, CUT_CHAINS)
NOT_METERED = {
    "not_ip": build_all(NOT_IP),
    "malformed": build_all(MALFORMED),
    "truncated": build_all(TRUNCATED),
}
EVERYTHING = build_all(IP_STACKS, CUT_CHAINS, NOT_IP, MALFORMED, TRUNCATED)
