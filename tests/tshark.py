# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows of a capture as tshark counts them: its dissectors, and nothing of ours but addition."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lab.process import run

EXTENSION_HEADERS = {0, 43, 44, 51, 60, 135}
TCP, ICMP = 6, {4: 1, 6: 58}
PORTS = {TCP: "tcp", 17: "udp", 33: "dccp", 132: "sctp", 136: "udp"}
NEXT_HEADERS = (
    "ipv6.hopopts.nxt", "ipv6.routing.nxt", "ipv6.fraghdr.nxt", "ipv6.dstopts.nxt", "ah.next_header", "mip6.proto",
)  # fmt: skip
FIELDS = (
    "frame.time_epoch", "eth.type", "vlan.id", "ieee8021ad.id",
    "ip.version", "ip.src", "ip.dst", "ip.proto", "ip.len", "ip.id", "ip.frag_offset",
    "ipv6.version", "ipv6.src", "ipv6.dst", "ipv6.nxt", "ipv6.plen", "ipv6.opt.jumbo",
    "ipv6.fraghdr.ident", "ipv6.fraghdr.offset", *NEXT_HEADERS,
    *(f"{name}.{which}port" for name in ("tcp", "udp", "dccp", "sctp") for which in ("src", "dst")),
    "tcp.flags", "icmp.type", "icmp.code", "icmpv6.type", "icmpv6.code",
)  # fmt: skip
PREFERENCES = ("ip.defragment:FALSE", "ipv6.defragment:FALSE", "tcp.relative_sequence_numbers:FALSE")


class Key(NamedTuple):
    """Addresses as text; vlan -1: no tag."""

    src_addr: str
    dst_addr: str
    protocol: int
    src_port: int
    dst_port: int
    icmp_type_code: int
    vlan: int


class Flow(NamedTuple):
    packets: int
    octets: int
    tcp_flags: int
    first_ms: int
    last_ms: int


class _Packet:
    """One line of tshark's."""

    def __init__(self, line: str) -> None:
        self._values = dict(zip(FIELDS, line.split("\t")))
        self.version = self.number("ip.version")  # IPv6 has this field, too

    def numbers(self, name: str) -> list[int]:
        return [int(value, 0) for value in self._values[name].split(",") if value]

    def number(self, name: str, default: int = 0) -> int:
        """The outermost occurrence."""
        return next(iter(self.numbers(name)), default)

    def text(self, name: str) -> str:
        return self._values[name].split(",")[0]

    @property
    def time_ms(self) -> int:
        seconds, fraction = self.text("frame.time_epoch").split(".")
        return int(seconds) * 1000 + int(fraction[:3])

    @property
    def protocol(self) -> int:
        if self.version == 4:
            return self.number("ip.proto")
        protocol = self.number("ipv6.nxt")
        if protocol not in EXTENSION_HEADERS:
            return protocol
        values = [value for name in NEXT_HEADERS for value in self.numbers(name)]
        (transport,) = {value for value in values if value not in EXTENSION_HEADERS}
        return transport

    @property
    def octets(self) -> int:
        if self.version == 4:
            return self.number("ip.len")
        return 40 + (self.number("ipv6.plen") or self.number("ipv6.opt.jumbo"))

    @property
    def vlan(self) -> int:
        return self.number("ieee8021ad.id" if self.text("eth.type") == "0x88a8" else "vlan.id", -1)

    @property
    def datagram(self) -> tuple[str, str, int, int]:
        """What fragments of one datagram have in common."""
        if self.version == 4:
            return self.text("ip.src"), self.text("ip.dst"), self.number("ip.id"), self.protocol
        return self.text("ipv6.src"), self.text("ipv6.dst"), self.number("ipv6.fraghdr.ident"), 0

    @property
    def is_late_fragment(self) -> bool:
        return self.number("ip.frag_offset" if self.version == 4 else "ipv6.fraghdr.offset") > 0

    @property
    def transport(self) -> tuple[int, int, int, int]:
        """Protocol, ports, ICMP type and code."""
        protocol = self.protocol
        if protocol in PORTS:
            name = PORTS[protocol]
            return protocol, self.number(f"{name}.srcport"), self.number(f"{name}.dstport"), 0
        if protocol == ICMP[self.version]:
            name = "icmp" if self.version == 4 else "icmpv6"
            return protocol, 0, 0, self.number(f"{name}.type") << 8 | self.number(f"{name}.code")
        return protocol, 0, 0, 0


def count(capture: Path) -> dict[Key, Flow]:
    """The flows of a capture in which every packet is IP."""
    command: list[str | Path] = ["tshark", "-n", "-r", capture, "-T", "fields", "-E", "occurrence=a"]
    for preference in PREFERENCES:
        command += ["-o", preference]
    for field in FIELDS:
        command += ["-e", field]
    flows: dict[Key, Flow] = {}
    first_fragments: dict[tuple[str, str, int, int], tuple[int, int, int, int]] = {}
    for line in run(command).splitlines():
        packet = _Packet(line)
        transport = packet.transport
        if packet.is_late_fragment:
            transport = first_fragments.get(packet.datagram, (transport[0], 0, 0, 0))
        else:
            first_fragments[packet.datagram] = transport
        family = "ip" if packet.version == 4 else "ipv6"
        key = Key(packet.text(f"{family}.src"), packet.text(f"{family}.dst"), *transport, packet.vlan)
        flags = packet.number("tcp.flags") & 0x1FF if transport[0] == TCP else 0
        now = Flow(1, packet.octets, flags, packet.time_ms, packet.time_ms)
        flows[key] = _plus(flows[key], now) if key in flows else now
    return flows


def _plus(one: Flow, other: Flow) -> Flow:
    return Flow(
        one.packets + other.packets, one.octets + other.octets, one.tcp_flags | other.tcp_flags,
        min(one.first_ms, other.first_ms), max(one.last_ms, other.last_ms),
    )  # fmt: skip
