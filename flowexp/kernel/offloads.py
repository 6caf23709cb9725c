# SPDX-License-Identifier: GPL-2.0-or-later
"""What devices do with packets before a hook sees them: ethtool's features, and nftables' flowtables in hardware."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from typing import FrozenSet, List, Tuple

from .inquiry import attributes, messages

# linux/ethtool.h
_SIOCETHTOOL = 0x8946
_GET_STRINGS, _GET_SET_INFO, _GET_FEATURES = 0x1B, 0x37, 0x3A
_FEATURES = 4  # ETH_SS_FEATURES
_NAME_OCTETS = 32

# linux/netfilter/nf_tables.h
_NETFILTER = 12
_NEW_FLOWTABLE, _GET_FLOWTABLE = 10 << 8 | 22, 10 << 8 | 23
_TABLE, _NAME, _FLAGS = 1, 2, 7
_IN_HARDWARE = 1
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3


def features(name: str) -> FrozenSet[str]:
    """What device and kernel do for a device's packets now, as the kernel calls it (rx-lro, rx-gro); none where the
    device does not say."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            info = _ask(probe, name, struct.pack("=IIQI", _GET_SET_INFO, 0, 1 << _FEATURES, 0))
            (count,) = struct.unpack_from("=I", info, 16)
            names = _ask(probe, name, struct.pack("=III", _GET_STRINGS, _FEATURES, count) + bytes(_NAME_OCTETS * count))
            words = -(-count // 32)
            flags = _ask(probe, name, struct.pack("=II", _GET_FEATURES, words) + bytes(16 * words))
    except OSError:
        return frozenset()
    active = [struct.unpack_from("=I", flags, 8 + 16 * word + 8)[0] for word in range(words)]
    return frozenset(
        names[12 + _NAME_OCTETS * bit :][:_NAME_OCTETS].partition(b"\0")[0].decode()
        for bit in range(count)
        if active[bit // 32] >> bit % 32 & 1
    )


def _ask(probe: socket.socket, name: str, question: bytes) -> bytes:
    """The answer, which has the question's length."""
    answer = array.array("B", question)
    fcntl.ioctl(probe, _SIOCETHTOOL, struct.pack("16sP", name.encode(), answer.buffer_info()[0]))
    return answer.tobytes()


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
                for kind, body in messages(netlink.recv(1 << 16)):
                    if kind in (_ERROR, _DONE):
                        return found
                    if kind == _NEW_FLOWTABLE:
                        found.append(_flowtable(body[4:]))
    except OSError:
        return found


def _flowtable(octets: bytes) -> Tuple[str, int]:
    found = attributes(octets)
    names = (found.get(key, b"").rstrip(b"\0").decode(errors="replace") for key in (_TABLE, _NAME))
    return " ".join(names), int.from_bytes(found.get(_FLAGS, b""), "big")
