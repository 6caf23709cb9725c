# SPDX-License-Identifier: GPL-2.0-or-later
"""What devices do with packets before a hook sees them: ethtool's flags, and nftables' flowtables in hardware."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from typing import Iterator, List, Optional, Tuple

LRO, RX_VLAN = 1 << 15, 1 << 8  # linux/ethtool.h: ETH_FLAG_LRO, ETH_FLAG_RXVLAN

_SIOCETHTOOL = 0x8946
_GET_FLAGS, _GET_GRO = 0x25, 0x2B  # ETHTOOL_GFLAGS, ETHTOOL_GGRO

# linux/netfilter/nf_tables.h
_NETFILTER = 12
_NEW_FLOWTABLE, _GET_FLOWTABLE = 10 << 8 | 22, 10 << 8 | 23
_TABLE, _NAME, _FLAGS = 1, 2, 7
_IN_HARDWARE = 1
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3


def flags(name: str) -> int:
    """Some of a device's offloads, as LRO and RX_VLAN; 0 where it does not say."""
    return _ask(name, _GET_FLAGS) or 0


def has_gro(name: str) -> Optional[bool]:
    """Whether generic receive offload is on; None where the device does not say."""
    answer = _ask(name, _GET_GRO)
    return None if answer is None else bool(answer)


def _ask(name: str, command: int) -> Optional[int]:
    value = array.array("I", [command, 0])  # struct ethtool_value: the question, the answer
    request = struct.pack("16sP", name.encode(), value.buffer_info()[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            fcntl.ioctl(probe, _SIOCETHTOOL, request)
    except OSError:
        return None
    return value[1]


def hardware_flowtables() -> List[str]:
    """The flowtables of this namespace whose flows are the devices' own; none where nftables cannot be asked."""
    return [name for name, flags in flowtables() if flags & _IN_HARDWARE]


def flowtables() -> List[Tuple[str, int]]:
    """Table and name of each flowtable of nftables, and its flags."""
    found: List[Tuple[str, int]] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as netlink:
            netlink.settimeout(1)
            netlink.send(struct.pack("=IHHIIBBH", 20, _GET_FLOWTABLE, _REQUEST_DUMP, 1, 0, 0, 0, 0))
            while True:
                for kind, body in _messages(netlink.recv(1 << 16)):
                    if kind in (_ERROR, _DONE):
                        return found
                    if kind == _NEW_FLOWTABLE:
                        found.append(_flowtable(body[4:]))
    except OSError:
        return found


def _messages(octets: bytes) -> Iterator[Tuple[int, bytes]]:
    while len(octets) >= 16:
        length, kind = struct.unpack_from("=IH", octets)
        yield kind, octets[16:length]
        octets = octets[max(16, length + -length % 4) :]


def _flowtable(octets: bytes) -> Tuple[str, int]:
    attributes = {}
    while len(octets) >= 4:
        length, kind = struct.unpack_from("=HH", octets)
        attributes[kind & 0x3FFF] = octets[4:length]
        octets = octets[max(4, length + -length % 4) :]
    names = (attributes.get(key, b"").rstrip(b"\0").decode(errors="replace") for key in (_TABLE, _NAME))
    return " ".join(names), int.from_bytes(attributes.get(_FLAGS, b""), "big")
