# SPDX-License-Identifier: GPL-2.0-or-later
"""By which interfaces default routes lead out, in all routing tables, and word of it when that changes.

A router may have a million routes. pyroute2 reads four thousand of them in a second; here one that is no default route
is passed over after a look at one octet, and when it changes nobody is woken.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import Iterator, Set

from .inquiry import HEADER, attributes, messages

_NEW_ROUTE, _DELETE_ROUTE, _GET_ROUTE = 24, 25, 26  # RTM_*
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST, NLM_F_DUMP
_ERROR, _DONE = 2, 3  # NLMSG_*
_ROUTE = struct.Struct("=BB5xB4x")  # struct rtmsg: family, length of the destination's prefix, ..., type, flags
_UNICAST = 1  # RTN_UNICAST
_OUTPUT, _MULTIPATH = 4, 9  # RTA_OIF, RTA_MULTIPATH
_NEXT_HOP = struct.Struct("=HxxI")  # struct rtnexthop: length, ..., ifindex

_GROUPS = (7, 11)  # RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE
_SOL_NETLINK, _ADD_MEMBERSHIP, _ATTACH_FILTER = 270, 1, 26
_TYPE_AT, _PREFIX_LENGTH_AT = 4, HEADER.size + 1
_LOAD_HALF, _LOAD_OCTET, _IF_EQUAL, _RETURN = 0x28, 0x30, 0x15, 0x06  # of classic BPF


def interfaces() -> Set[int]:
    """Their ifindexes."""
    return {ifindex for family in (socket.AF_INET, socket.AF_INET6) for ifindex in _interfaces(family)}


def _interfaces(family: int) -> Iterator[int]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        length = HEADER.size + _ROUTE.size
        kernel.send(HEADER.pack(length, _GET_ROUTE, _REQUEST_DUMP, 0, 0) + _ROUTE.pack(family, 0, 0))
        while True:
            for kind, body in messages(kernel.recv(1 << 16)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -int(struct.unpack_from("=i", body)[0])
                    raise OSError(number, os.strerror(number))
                if not body[1]:
                    yield from _way_out(body)


def _way_out(route: bytes) -> Iterator[int]:
    _, _, kind = _ROUTE.unpack_from(route)
    found = attributes(route[_ROUTE.size :])
    if kind == _UNICAST and _OUTPUT in found:
        yield int.from_bytes(found[_OUTPUT], "little" if struct.pack("=H", 1)[0] else "big")
    hops = found.get(_MULTIPATH, b"")
    while len(hops) >= _NEXT_HOP.size:
        octets, ifindex = _NEXT_HOP.unpack_from(hops)
        yield ifindex
        hops = hops[max(_NEXT_HOP.size, octets + -octets % 4) :]


def hear_of_changes(listener: socket.socket) -> None:
    """Has a socket of NETLINK_ROUTE told of default routes that come and go, and of no others. What else it is told
    of it is told as before."""
    instructions = (
        (_LOAD_HALF, 0, 0, _TYPE_AT),
        (_IF_EQUAL, 1, 0, socket.htons(_NEW_ROUTE)),
        (_IF_EQUAL, 0, 2, socket.htons(_DELETE_ROUTE)),
        (_LOAD_OCTET, 0, 0, _PREFIX_LENGTH_AT),
        (_IF_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, 0xFFFFFFFF),
        (_RETURN, 0, 0, 0),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", len(instructions), ctypes.addressof(code)))
    for group in _GROUPS:
        listener.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
