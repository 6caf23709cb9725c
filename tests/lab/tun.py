# SPDX-License-Identifier: GPL-2.0-or-later
"""Tap and tun devices: what a test writes comes in, as from a guest or a tunnel.

A tap with vnet headers takes super-packets, and hands them on with gso_size set but gso_segs 0.
"""

from __future__ import annotations

import fcntl
import os
import struct
from types import TracebackType
from typing import TYPE_CHECKING

from .netns import Link, Namespace

if TYPE_CHECKING:
    from typing_extensions import Self

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x0002, 0x1000, 0x4000
NEEDS_CHECKSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 4, 5, 0x80
CHECKSUM_OFFSET = {GSO_TCPV4: 16, GSO_TCPV6: 16, GSO_UDP_L4: 6}


class Device:
    """A tap (Ethernet frames) or tun (IP packets) device inside a namespace, up."""

    def __init__(self, namespace: Namespace, name: str, *, ethernet: bool = False, vnet_header: bool = False) -> None:
        flags = (IFF_TAP if ethernet else IFF_TUN) | IFF_NO_PI | (IFF_VNET_HDR if vnet_header else 0)
        with namespace.entered():
            self._file = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            fcntl.ioctl(self._file, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        self._vnet_header = struct.pack("=BBHHHH", 0, GSO_NONE, 0, 0, 0, 0) if vnet_header else b""
        self.link = Link(namespace, name)
        self.link.set("up")

    def write(self, packet: bytes) -> None:
        """One packet comes in."""
        os.write(self._file, self._vnet_header + packet)

    def write_super(self, packet: bytes, *, kind: int, segment_octets: int, transport_at: int, headers: int) -> None:
        """A super-packet comes in: segments carry `segment_octets` of payload each.

        `transport_at` is where the transport header begins in the packet, `headers` where the payload does.
        """
        checksum_offset = CHECKSUM_OFFSET[kind & ~GSO_ECN]
        header = struct.pack("=BBHHHH", NEEDS_CHECKSUM, kind, headers, segment_octets, transport_at, checksum_offset)
        os.write(self._file, header + packet)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
