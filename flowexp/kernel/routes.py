# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's routes, for many packets at once: by which interface they would leave, to which next hop, and how long
the prefixes are that these routes are for."""

from __future__ import annotations

import socket
import struct
from typing import List, NamedTuple, Optional, Tuple

import numpy as np

from .inquiry import Inquiry, attributes
from .layout import Array

_GET_ROUTE = 26  # RTM_GETROUTE
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, lengths of the prefixes, ..., type, flags
_DESTINATION, _SOURCE, _INPUT, _OUTPUT, _GATEWAY, _VIA = 1, 2, 3, 4, 5, 18  # RTA_*
_UNICAST = 1  # RTN_UNICAST
_THE_ROUTE = 0x2000  # RTM_F_FIB_MATCH: the route itself is wanted, and not only where it leads
_FAMILIES = {4: socket.AF_INET, 16: socket.AF_INET6}


class Route(NamedTuple):
    """Where packets go: an interface, and the next hop's address (of either family), b"" if they are there then."""

    ifindex: int
    gateway: bytes


class Routes:
    """Asks the kernel, one question for each way: nothing is kept here that could be out of date."""

    def __init__(self) -> None:
        self._inquiry = Inquiry(socket.NETLINK_ROUTE)

    def close(self) -> None:
        self._inquiry.close()

    def onward(self, sources: Array, destinations: Array, ifindexes: Array) -> Tuple[Array, Array, Array]:
        """For packets that come in there: whether there is a way out, its ifindex, and the next hop.

        A next hop of the other address family is all zero.
        """
        octets = destinations.shape[1]
        ways = _side_by_side(destinations, ifindexes)
        _, first, which = np.unique(ways, axis=0, return_index=True, return_inverse=True)
        routes = self._ask(sources[first], destinations[first], ifindexes[first])
        found = np.array([route is not None for route in routes], bool)
        egress = np.array([route.ifindex if route else 0 for route in routes], np.uint32)
        hops = [
            bytes(octets) if route is None or len(route.gateway) not in (0, octets) else route.gateway or bytes(here)
            for route, here in zip(routes, destinations[first])
        ]
        next_hop = np.frombuffer(b"".join(hops), np.uint8).reshape(-1, octets)
        which = which.reshape(-1)
        return found[which], egress[which], next_hop[which]

    def prefix_lengths(self, addresses: Array, vrfs: Array) -> Array:
        """Of the longest prefix that each address is in; 0 where that is the default route, or none.

        In the tables of these VRFs, by their devices' ifindexes (u32); 0: where packets of no VRF are routed.
        """
        octets = addresses.shape[1]
        distinct, which = np.unique(_side_by_side(addresses, vrfs), axis=0, return_inverse=True)
        head = _ROUTE.pack(_FAMILIES[octets], 8 * octets, 0, 0, 0, 0, 0, 0, _THE_ROUTE)
        requests = [
            head
            + _attribute(_DESTINATION, place[:octets].tobytes())
            + (_attribute(_OUTPUT, place[octets:].tobytes()) if place[octets:].any() else b"")
            for place in distinct
        ]
        answers = self._inquiry.ask(_GET_ROUTE, requests)
        lengths = np.array([answer[1] if answer is not None else 0 for answer in answers], np.uint8)
        return lengths[which.reshape(-1)]

    def _ask(self, sources: Array, destinations: Array, ifindexes: Array) -> List[Optional[Route]]:
        family = _FAMILIES[destinations.shape[1]]
        bits = 8 * destinations.shape[1]
        head = _ROUTE.pack(family, bits, bits, 0, 0, 0, 0, 0, 0)
        requests = [
            head
            + _attribute(_DESTINATION, destination.tobytes())
            + _attribute(_SOURCE, source.tobytes())
            + _attribute(_INPUT, struct.pack("=I", ifindex))
            for source, destination, ifindex in zip(sources, destinations, ifindexes.tolist())
        ]
        return [None if answer is None else _read(answer) for answer in self._inquiry.ask(_GET_ROUTE, requests)]


def _side_by_side(addresses: Array, ifindexes: Array) -> Array:
    """Rows of octets: an address, and an ifindex as netlink has it."""
    return np.concatenate([addresses, ifindexes.astype(np.uint32).view(np.uint8).reshape(-1, 4)], axis=1)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value


def _read(answer: bytes) -> Optional[Route]:
    """None where the packets stay here, or are refused."""
    kind = _ROUTE.unpack_from(answer)[7]
    found = attributes(answer[_ROUTE.size :])
    if kind != _UNICAST or _OUTPUT not in found:
        return None
    gateway = found.get(_GATEWAY, found.get(_VIA, b"\0\0")[2:])
    return Route(struct.unpack("=I", found[_OUTPUT])[0], gateway)
