# SPDX-License-Identifier: GPL-2.0-or-later
"""What people call numbers: protocols, services and interfaces. A number without a name stays a number."""

from __future__ import annotations

import socket
from functools import lru_cache
from pathlib import Path

_PROTOCOLS = {
    1: "ICMP", 2: "IGMP", 4: "IPIP", 6: "TCP", 17: "UDP", 33: "DCCP", 41: "IPv6", 47: "GRE", 50: "ESP",
    51: "AH", 58: "ICMPv6", 89: "OSPF", 103: "PIM", 112: "VRRP", 132: "SCTP", 136: "UDP-L",
}  # fmt: skip
_WITH_SERVICES = {6: "tcp", 17: "udp", 33: "dccp", 132: "sctp"}  # as services(5) spells them
_SERVICES = Path("/etc/services")


def protocol_name(number: int) -> str:
    """TCP for 6; the number itself where there is no short name."""
    return _PROTOCOLS.get(number, str(number))


def service_name(port: int, protocol: int) -> str:
    """domain for port 53 of UDP."""
    return _services(_SERVICES).get((port, _WITH_SERVICES.get(protocol, "")), str(port))


@lru_cache(maxsize=1)
def _services(path: Path) -> dict[tuple[int, str], str]:
    """What services(5) says, by port and protocol; of several names the first.

    Read once: getservbyport(3) opens and reads the file for each port that it is asked for.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    names: dict[tuple[int, str], str] = {}
    for line in lines:
        name, place = (line.partition("#")[0].split() + ["", ""])[:2]
        port, _, protocol = place.partition("/")
        if port.isdecimal():
            names.setdefault((int(port), protocol), name)
    return names


@lru_cache(maxsize=4096)
def interface_name(ifindex: int) -> str:
    """This machine's; nothing for 0."""
    try:
        return socket.if_indextoname(ifindex) if ifindex else ""
    except OSError:
        return str(ifindex)
