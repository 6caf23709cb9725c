# SPDX-License-Identifier: GPL-2.0-or-later
"""What network address translation makes of flows: the kernel's connection tracking is asked for each of them.

It is asked as a flow's record is due: packets cost nothing, nothing is kept here, no event can be lost. A flow's
record is due long before conntrack forgets its connection, unless [timeouts] are longer than conntrack's own; a
connection that is refused at once is forgotten at once. ICMP cannot be asked for: its identifier is no Flow Key.

A connection is two tuples, as its packets are before translation, one for each direction. At ingress a flow is one
of them, and leaves as the other one turned round. At egress it is one of them turned round, and came as the other.
"""

from __future__ import annotations

import errno
import struct
from typing import List, Tuple

import numpy as np

from ..errors import FlowexpError
from .flows import Columns
from .inquiry import Inquiry
from .layout import Array
from .routes import Routes

_NETFILTER = 12  # NETLINK_NETFILTER
_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_NESTED = 0x8000  # NLA_F_NESTED
_ORIGINAL, _REPLY = 1, 2  # CTA_TUPLE_ORIG, CTA_TUPLE_REPLY
_FAMILIES = {4: (2, 4), 6: (10, 16)}  # AF_INET, AF_INET6; octets of an address
_WITH_PORTS = (6, 17, 33, 132, 136)  # TCP, UDP, DCCP, SCTP, UDP-Lite


def _attribute(kind: int, octets: int) -> bytes:
    return struct.pack("=HH", 4 + octets, kind)


class _Tuples:
    """Tuples of one address family as netlink has them: in requests, and both of them at the head of each answer."""

    def __init__(self, version: int) -> None:
        family, address = _FAMILIES[version]
        self.general = struct.pack("=BBH", family, 0, 0)  # struct nfgenmsg
        members = [
            ("tuple", "u4"), ("ip", "u4"),
            ("src_head", "u4"), ("src_addr", "u1", (address,)), ("dst_head", "u4"), ("dst_addr", "u1", (address,)),
            ("ports", "u4"),
            ("protocol_head", "u4"), ("protocol", "u1"), ("pad", "V3"),
            ("src_port_head", "u4"), ("src_port", ">u2"), ("pad2", "V2"),
            ("dst_port_head", "u4"), ("dst_port", ">u2"), ("pad3", "V2"),
        ]  # fmt: skip
        self.dtype = np.dtype(members)
        addresses, octets = 2 * (4 + address), self.dtype.itemsize
        first = 1 if version == 4 else 3  # CTA_IP_V4_SRC, CTA_IP_V6_SRC
        heads = {
            "ip": _attribute(1 | _NESTED, addresses),
            "src_head": _attribute(first, address),
            "dst_head": _attribute(first + 1, address),
            "ports": _attribute(2 | _NESTED, octets - 12 - addresses),
            "protocol_head": _attribute(1, 1),
            "src_port_head": _attribute(2, 2),
            "dst_port_head": _attribute(3, 2),
        }
        self._heads = {name: np.frombuffer(head, "u4") for name, head in heads.items()}
        self._original, self._reply = (
            np.frombuffer(_attribute(kind | _NESTED, octets - 4), "u4") for kind in (_ORIGINAL, _REPLY)
        )

    def requests(self, flows: Columns) -> List[bytes]:
        """One for each flow: what tells its connection."""
        tuples = np.zeros(len(flows["protocol"]), self.dtype)
        tuples["tuple"] = self._original
        for name, head in self._heads.items():
            tuples[name] = head
        for name in ("src_addr", "dst_addr", "src_port", "dst_port", "protocol"):
            tuples[name] = flows[name]
        return [self.general + tuples[row].tobytes() for row in range(len(tuples))]

    def read(self, answers: List[bytes]) -> Tuple[Array, Array, Array]:
        """Which answers are of the layout that is known here, and of these both tuples."""
        first, octets = len(self.general), 2 * self.dtype.itemsize
        heads = b"".join(answer[first : first + octets].ljust(octets, b"\0") for answer in answers)
        both = np.frombuffer(heads, self.dtype).reshape(-1, 2)
        known = (both["tuple"][:, 0] == self._original) & (both["tuple"][:, 1] == self._reply)
        for name, expected in self._heads.items():
            known &= (both[name] == expected).all(axis=1)
        return known, both[:, 0], both[:, 1]


_TUPLES = {version: _Tuples(version) for version in _FAMILIES}


def tuples_of(version: int) -> _Tuples:
    """How netlink has connections of that IP version."""
    return _TUPLES[version]


class Translations:
    """Joins to flows what they are, or were, on the other side of a translation; and where they go then."""

    def __init__(self) -> None:
        """FlowexpError if this kernel cannot be asked."""
        self._conntrack = Inquiry(_NETFILTER)
        self._routes = Routes()
        nobody = {name: np.zeros((1, 4) if "addr" in name else 1, np.uint8) for name in _KEY}
        error = self._conntrack.error(_GET, _TUPLES[4].requests(nobody)[0])
        if error not in (0, errno.ENOENT):
            self.close()
            advice = {errno.EPERM: "CAP_NET_ADMIN is needed"}.get(error, "load the module nf_conntrack_netlink")
            reason = f"{errno.errorcode.get(error, error)}; {advice}, or leave it out"
            raise FlowexpError(f'[fields] groups: "nat": conntrack cannot be asked: {reason}')

    def close(self) -> None:
        self._conntrack.close()
        self._routes.close()

    def __call__(self, columns: Columns) -> Columns:
        """The columns of one family, and those of the group."""
        version = 4 if columns["src_addr"].shape[1] == 4 else 6
        is_egress = columns["direction"] != 0
        asked = np.flatnonzero(np.isin(columns["protocol"], _WITH_PORTS) & (columns["src_port"] != 0))
        key = turned({name: columns[name][asked] for name in _KEY}, is_egress[asked])
        found, other = _other_sides(self._conntrack, _TUPLES[version], key)
        rows = asked[found]
        other = turned(other, ~is_egress[rows])
        seen = turned({name: column[found] for name, column in key.items()}, is_egress[rows])
        changed = differ(other, seen, _KEY)
        rows, other = rows[changed], {name: column[changed] for name, column in other.items()}
        joined = {
            **columns,
            "translated": np.zeros(len(is_egress), bool),
            **{f"other_{name}": np.zeros_like(columns[name]) for name in _KEY if name != "protocol"},
        }
        joined["translated"][rows] = True
        for name in _KEY[:-1]:
            joined[f"other_{name}"][rows] = other[name]
        self._redirect(joined, rows[~is_egress[rows]])
        return joined

    def _redirect(self, columns: Columns, rows: Array) -> None:
        """Output interface and next hop of flows whose destination is another one from here on."""
        rows = rows[(columns["other_dst_addr"][rows] != columns["dst_addr"][rows]).any(axis=1)]
        if not len(rows):
            return
        found, egress, next_hop = self._routes.onward(
            columns["other_src_addr"][rows], columns["other_dst_addr"][rows], columns["ingress_ifindex"][rows]
        )
        for name, values in (("egress_ifindex", egress), ("next_hop", next_hop)):
            columns[name] = columns[name].copy()
            columns[name][rows[found]] = values[found]


_KEY = ("src_addr", "dst_addr", "src_port", "dst_port", "protocol")
_OPPOSITE = {"src_addr": "dst_addr", "dst_addr": "src_addr", "src_port": "dst_port", "dst_port": "src_port"}


def turned(flows: Columns, which: Array) -> Columns:
    """Flows, some of them as their answers are."""
    turned = {}
    for name, column in flows.items():
        mask = which[:, np.newaxis] if column.ndim == 2 else which
        turned[name] = np.where(mask, flows[_OPPOSITE.get(name, name)], column)
    return turned


def differ(these: Columns, those: Columns, names: Tuple[str, ...]) -> Array:
    """For each row whether any of the columns differs."""
    differ = np.zeros(len(these["protocol"]), bool)
    for name in names:
        unequal = these[name] != those[name]
        differ |= unequal.any(axis=1) if unequal.ndim == 2 else unequal
    return differ


def _other_sides(conntrack: Inquiry, tuples: _Tuples, key: Columns) -> Tuple[Array, Columns]:
    """Which of these are a tuple of a connection, and of those the connection's other one."""
    answers = conntrack.ask(_GET, tuples.requests(key))
    answered = np.array([row for row, answer in enumerate(answers) if answer is not None], np.intp)
    known, original, reply = tuples.read([answer for answer in answers if answer is not None])
    answered, ours, others = answered[known], tuple_columns(original[known]), tuple_columns(reply[known])
    asked = {name: column[answered] for name, column in key.items()}
    is_original = ~differ(asked, ours, _KEY)
    return answered, {
        name: np.where(is_original[:, np.newaxis] if column.ndim == 2 else is_original, others[name], column)
        for name, column in ours.items()
    }


def tuple_columns(tuples: Array) -> Columns:
    """One side of each connection, as flows have it."""
    return {name: tuples[name].astype(np.uint16 if "port" in name else np.uint8) for name in _KEY}
