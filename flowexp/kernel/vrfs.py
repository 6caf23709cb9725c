# SPDX-License-Identifier: GPL-2.0-or-later
"""In which VRF an interface is: by itself, or with the bridge, bond or team that it is a port of.

The kernel is asked as flows of an interface are due, and again once any interface has changed.
"""

from __future__ import annotations

import socket
import struct
from typing import Dict, NamedTuple, Optional, Set, Tuple

import numpy as np

from .inquiry import Inquiry, attributes
from .layout import Array
from .netlink import LinkWatch

_GET_LINK = 18  # RTM_GETLINK
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, ifindex, flags, which of them change
_MASTER, _ABOUT, _WANTED = 10, 18, 29  # IFLA_MASTER, IFLA_LINKINFO, IFLA_EXT_MASK
_KIND, _DATA, _SLAVE_KIND, _SLAVE_DATA = 1, 2, 4, 5  # IFLA_INFO_*
_TABLE = 1  # IFLA_VRF_TABLE, IFLA_VRF_PORT_TABLE
_NO_STATISTICS = struct.pack("=HHI", 8, _WANTED, 1 << 3)  # RTEXT_FILTER_SKIP_STATS
_VRF = b"vrf\0"
_MOST_REMEMBERED = 16384


class Vrf(NamedTuple):
    """Its device and its routing table; 0 and 0: none."""

    ifindex: int
    table: int


_NO_VRF = Vrf(0, 0)


class Vrfs:
    """Those of interfaces. Of one that has gone, what was known of it last."""

    def __init__(self) -> None:
        self._inquiry = Inquiry(socket.NETLINK_ROUTE)
        self._watch = LinkWatch()
        self._known: Dict[int, Vrf] = {0: _NO_VRF}
        self._certain: Set[int] = {0}  # nothing has changed since they were asked for

    def close(self) -> None:
        self._inquiry.close()
        self._watch.close()

    def of(self, ifindexes: Array) -> Tuple[Array, Array]:
        """Of each interface the VRF's ifindex and its routing table (u32)."""
        if self._watch.changed():
            self._certain = {0}
        distinct, which = np.unique(ifindexes, return_inverse=True)
        found = np.array([self._of(ifindex) for ifindex in distinct.tolist()], np.uint32).reshape(-1, 2)[which]
        return found[:, 0], found[:, 1]

    def _of(self, ifindex: int) -> Vrf:
        if ifindex not in self._certain:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known, self._certain = {0: _NO_VRF}, {0}
            vrf = self._ask(ifindex)
            self._known[ifindex] = self._known.get(ifindex, _NO_VRF) if vrf is None else vrf
            self._certain.add(ifindex)
        return self._known[ifindex]

    def _ask(self, ifindex: int) -> Optional[Vrf]:
        """None where there is no such interface."""
        (answer,) = self._inquiry.ask(_GET_LINK, [_LINK.pack(0, 0, ifindex, 0, 0) + _NO_STATISTICS])
        if answer is None:
            return None
        found = attributes(answer[_LINK.size :])
        about, (master,) = attributes(found.get(_ABOUT, b"")), struct.unpack("=I", found.get(_MASTER, bytes(4)))
        if about.get(_SLAVE_KIND) == _VRF:
            return Vrf(master, _table(about[_SLAVE_DATA]))
        if about.get(_KIND) == _VRF:
            return Vrf(ifindex, _table(about[_DATA]))
        return (self._ask(master) if master else None) or _NO_VRF


def _table(data: bytes) -> int:
    return int(struct.unpack("=I", attributes(data)[_TABLE])[0])
