# SPDX-License-Identifier: GPL-2.0-or-later
"""What network address translation makes of flows: the kernel's connection tracking is asked for each of them.

It is asked as a flow's record is due: packets cost nothing, nothing is kept here, no event can be lost. A flow's
record is due long before conntrack forgets its connection, unless [timeouts] are longer than conntrack's own; a
connection that is refused at once is forgotten at once.

A connection is two tuples, as its packets are before translation, one for each direction. At ingress a flow is one
of them, and leaves as the other one turned round. At egress it is one of them turned round, and came as the other.

ICMP has connections of questions and their answers (ping): each by its identifier, which is no Flow Key, so that they
cannot be asked for one by one. All that there are now are listed where a record of such a flow is due; what a flow's
connections do not agree on, its record does not tell. ICMP errors belong to other connections.
"""

from __future__ import annotations

import errno
import struct
from typing import Dict, List, Tuple

import numpy as np

from ..errors import FlowexpError
from .flows import Columns
from .inquiry import Inquiry
from .layout import Array
from .routes import Routes

_NETFILTER = 12  # NETLINK_NETFILTER
_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_NESTED = 0x8000  # NLA_F_NESTED
_FILTER, _BY_PROTOCOL = 25, 8  # CTA_FILTER, CTA_FILTER_F_CTA_PROTO_NUM
_ORIGINAL, _REPLY = 1, 2  # CTA_TUPLE_ORIG, CTA_TUPLE_REPLY
_FAMILIES = {4: (2, 4), 6: (10, 16)}  # AF_INET, AF_INET6; octets of an address
_WITH_PORTS = (6, 17, 33, 132, 136)  # TCP, UDP, DCCP, SCTP, UDP-Lite
_ICMP = {4: 1, 6: 58}
_QUERIES = {4: (0, 8, 13, 14, 15, 16, 17, 18), 6: (128, 129, 139, 140)}  # types that conntrack has connections of

# Attributes of CTA_TUPLE_PROTO behind CTA_PROTO_NUM: name, type, what it holds.
_PORTS = (("src_port", 2, ">u2"), ("dst_port", 3, ">u2"))
_QUERY = {
    version: (("identifier", first, ">u2"), ("type", first + 1, "u1"), ("code", first + 2, "u1"))
    for version, first in ((4, 4), (6, 7))  # CTA_PROTO_ICMP_ID, CTA_PROTO_ICMPV6_ID
}


def _attribute(kind: int, octets: int) -> bytes:
    return struct.pack("=HH", 4 + octets, kind)


class _Tuples:
    """Tuples of one address family as netlink has them: in requests, and both of them at the head of each answer.

    `told_by`: what tells connections of two addresses apart, as in _PORTS.
    """

    def __init__(self, version: int, told_by: Tuple[Tuple[str, int, str], ...]) -> None:
        family, address = _FAMILIES[version]
        self.general = struct.pack("=BBH", family, 0, 0)  # struct nfgenmsg
        members: List[Tuple[object, ...]] = [
            ("tuple", "u4"), ("ip", "u4"),
            ("src_head", "u4"), ("src_addr", "u1", (address,)), ("dst_head", "u4"), ("dst_addr", "u1", (address,)),
            ("told_by", "u4"), ("protocol_head", "u4"), ("protocol", "u1"), ("pad", "V3"),
        ]  # fmt: skip
        for name, _, kind in told_by:
            members += [(f"{name}_head", "u4"), (name, kind), (f"{name}_pad", f"V{4 - np.dtype(kind).itemsize}")]
        self.dtype = np.dtype(members)
        addresses, octets = 2 * (4 + address), self.dtype.itemsize
        first = 1 if version == 4 else 3  # CTA_IP_V4_SRC, CTA_IP_V6_SRC
        heads = {
            "ip": _attribute(1 | _NESTED, addresses),
            "src_head": _attribute(first, address),
            "dst_head": _attribute(first + 1, address),
            "told_by": _attribute(2 | _NESTED, octets - 12 - addresses),
            "protocol_head": _attribute(1, 1),
            **{f"{name}_head": _attribute(number, np.dtype(kind).itemsize) for name, number, kind in told_by},
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


_TUPLES = {version: _Tuples(version, _PORTS) for version in _FAMILIES}
_QUERY_TUPLES = {version: _Tuples(version, _QUERY[version]) for version in _FAMILIES}


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
        joined = {
            **columns,
            "translated": np.zeros(len(is_egress), bool),
            **{f"other_{name}": np.zeros_like(columns[name]) for name in _KEY if name != "protocol"},
        }
        for find in (self._by_ports, self._queries):
            rows, other = find(version, columns, is_egress)
            joined["translated"][rows] = True
            for name, column in other.items():
                joined[f"other_{name}"][rows] = column
        self._redirect(joined, np.flatnonzero(joined["translated"] & ~is_egress))
        return joined

    def _by_ports(self, version: int, columns: Columns, is_egress: Array) -> Tuple[Array, Columns]:
        """Which flows are translated, and the addresses and ports of those on the other side."""
        asked = np.flatnonzero(np.isin(columns["protocol"], _WITH_PORTS) & (columns["src_port"] != 0))
        key = turned({name: columns[name][asked] for name in _KEY}, is_egress[asked])
        found, other = _other_sides(self._conntrack, _TUPLES[version], key)
        rows = asked[found]
        other = turned(other, ~is_egress[rows])
        seen = turned({name: column[found] for name, column in key.items()}, is_egress[rows])
        changed = differ(other, seen, _KEY)
        return rows[changed], {name: other[name][changed] for name in _KEY[:-1]}

    def _queries(self, version: int, columns: Columns, is_egress: Array) -> Tuple[Array, Columns]:
        """The same of ICMP: addresses alone."""
        is_query = np.isin(columns["icmp_type_code"] >> 8, _QUERIES[version])
        rows = np.flatnonzero((columns["protocol"] == _ICMP[version]) & is_query)
        octets = columns["src_addr"].shape[1]
        pairs: List[bytes] = []
        if len(rows):
            sides = _sides_of_queries(self._conntrack.dump(_GET, _all_queries(version)), version)
            flows = {name: columns[name][rows] for name in ("src_addr", "dst_addr", "icmp_type_code")}
            seen = _rows_of(flows, is_egress[rows])
            pairs = [sides.get(each, b"") for each in seen]
            changed = np.array([bool(pair) and pair != each[: 2 * octets] for pair, each in zip(pairs, seen)], bool)
            rows, pairs = rows[changed], [pair for pair, is_other in zip(pairs, changed) if is_other]
        others = np.frombuffer(b"".join(pairs), np.uint8).reshape(-1, 2 * octets)
        return rows, {"src_addr": others[:, :octets], "dst_addr": others[:, octets:]}

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


def _all_queries(version: int) -> bytes:
    """A request for all connections of ICMP. Kernels before 5.8 list those of other protocols, too."""
    protocol = _attribute(1, 1) + bytes((_ICMP[version], 0, 0, 0))
    protocol = _attribute(_ORIGINAL | _NESTED, 4 + len(protocol)) + _attribute(2 | _NESTED, len(protocol)) + protocol
    flags = _attribute(1, 4) + struct.pack("=I", _BY_PROTOCOL)  # CTA_FILTER_ORIG_FLAGS
    return _QUERY_TUPLES[version].general + protocol + _attribute(_FILTER | _NESTED, len(flags)) + flags


def _sides_of_queries(answers: List[bytes], version: int) -> Dict[bytes, bytes]:
    """By what is seen of a flow (_rows_of), both addresses on the other side, b"" where connections do not agree."""
    known, original, reply = _QUERY_TUPLES[version].read(answers)
    sides: Dict[bytes, bytes] = {}
    for these, those in ((original[known], reply[known]), (reply[known], original[known])):
        type_code = {"icmp_type_code": these["type"].astype(np.uint16) << 8 | these["code"]}
        came = {"src_addr": these["src_addr"], "dst_addr": these["dst_addr"], **type_code}
        left = {"src_addr": those["dst_addr"], "dst_addr": those["src_addr"], **type_code}
        is_egress = np.zeros(len(these), bool)
        for seen, other in ((_rows_of(came, is_egress), left), (_rows_of(left, ~is_egress), came)):
            addresses = np.concatenate([other["src_addr"], other["dst_addr"]], axis=1)
            for key, pair in zip(seen, map(bytes, addresses)):
                sides[key] = pair if sides.setdefault(key, pair) == pair else b""
    return sides


def _rows_of(queries: Columns, is_egress: Array) -> List[bytes]:
    """For each, as octets: source, destination, type and code, direction."""
    type_code = queries["icmp_type_code"].astype(">u2").view(np.uint8).reshape(-1, 2)
    rows = [queries["src_addr"], queries["dst_addr"], type_code, is_egress[:, np.newaxis]]
    return [bytes(row) for row in np.concatenate(rows, axis=1).astype(np.uint8)]
