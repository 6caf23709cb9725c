# SPDX-License-Identifier: GPL-2.0-or-later
"""From copies of slots to Columns: what the protocols encode, one array a property, one address family at a time.

Host byte order but for addresses (u8, network order). `octets` and `packets` are what this
record carries; times are Unix nanoseconds (i64), made from boot time here, once.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional

import numpy as np

from .drops import reason_columns
from .groups import Rows, group_columns
from .layout import Array, Layout
from .payloads import application_ids

Columns = Dict[str, Array]

_ICMP = {4: 1, 6: 58}
_ETHER_TYPES, _MPLS, _PPPOE = {4: 0x0800, 6: 0x86DD}, 0x8847, 0x8864
_COUNTS = ("octets", "packets")
_IPV6_HEADER_OCTETS = 40
_DONT_FRAGMENT, _MORE_FRAGMENTS = 0x02, 0x04  # fragmentFlags (IANA 197), bit 0 is the least significant


def record_starts(cold: Array) -> Array:
    """Boot time (i64) at which what the next record of each flow carries begins, from its slot."""
    starts: Array = np.maximum(cold["first_ns"], cold["exported_ns"]).view(np.int64)
    return starts


def columns(
    version: int,
    hot: Array,
    cold: Array,
    *,
    layout: Layout,
    reasons: Array,
    unix_offset_ns: int,
    groups: Optional[Rows] = None,
    since_birth: bool = False,
) -> Columns:
    """Columns of n flows from their `hot` and `cold` slots (structured, n rows), and from their rows in `groups`.

    since_birth: all that there was of a flow, instead of what no record has carried yet. A record never ends before
    it starts: clocks of two kinds wrote its times.
    """
    constants, kept = layout.constants, group_columns(groups or {})
    is_icmp = hot["protocol"] == _ICMP[version]
    ports = hot["dst_port_be"].byteswap() if _is_little(hot) else hot["dst_port_be"]
    egress = hot["direction"] == constants["DIRECTION_EGRESS"]
    start_ns = cold["first_ns"].view(np.int64) if since_birth else record_starts(cold)
    end_ns = np.maximum(hot["last_ns"].view(np.int64), start_ns)
    counts = {what: hot[what] if since_birth else hot[what] - cold[f"exported_{what}"] for what in _COUNTS}
    lengths = _IPV6_HEADER_OCTETS if version == 6 else 0
    address_octets = hot["src_addr"].shape[1]
    vlan_id = constants["VLAN_PRESENT"] - 1
    made = {
        "ip_version": np.full(len(hot), version, np.uint8),
        "src_addr": hot["src_addr"],
        "dst_addr": hot["dst_addr"],
        "next_hop": cold["next_hop"][:, :address_octets],
        "src_port": hot["src_port_be"].byteswap() if _is_little(hot) else hot["src_port_be"],
        "dst_port": np.where(is_icmp, 0, ports).astype(np.uint16),
        "icmp_type_code": np.where(is_icmp, ports, 0).astype(np.uint16),
        "protocol": hot["protocol"],
        "translated": np.zeros(len(hot), bool),  # unless conntrack.py knows better
        "vlan_id": hot["vlan"] & vlan_id,
        "vlan_tagged": hot["vlan"] != 0,
        "inner_vlan_id": cold["inner_vlan"] & vlan_id,
        "inner_tagged": cold["inner_vlan"] != 0,
        "ingress_ifindex": np.where(egress, cold["other_ifindex"], hot["ifindex"]),
        "egress_ifindex": np.where(egress, hot["ifindex"], cold["other_ifindex"]),
        "direction": hot["direction"],
        "flows": np.ones(len(hot), np.uint64),
        **counts,
        "octets_total": hot["octets"],
        "packets_total": hot["packets"],
        "tcp_flags": _flags(cold, constants["FLAG_TCP_FIN"], constants["FLAG_TCP_NS"] + 1),
        "fragment_flags": (
            cold["flags"][:, constants["FLAG_IP_DF"]] * _DONT_FRAGMENT
            + cold["flags"][:, constants["FLAG_IP_MF"]] * _MORE_FRAGMENTS
        ).astype(np.uint8),
        "tos": hot["tos"],
        "tos_changes": cold["tos_changes"],
        "flow_label": cold["flow_label"],
        "min_length": hot["min_length"].astype(np.uint32) + np.uint32(lengths),
        "max_length": hot["max_length"].astype(np.uint32) + np.uint32(lengths),
        "min_ttl": hot["min_ttl"],
        "max_ttl": hot["max_ttl"],
        "began_ns": cold["first_ns"].view(np.int64) + unix_offset_ns,
        "start_ns": start_ns + unix_offset_ns,
        "end_ns": end_ns + unix_offset_ns,
        "end_reason": reasons,
        "src_mac": cold["src_mac"],
        "dst_mac": cold["dst_mac"],
        "priorities": cold["priorities"],
        "ether_type": _ether_types(version, kept, constants, len(hot)),
        **kept,
        **(reason_columns(kept["drops_reason"]) if "drops_reason" in kept else {}),
    }
    if "application_id" in kept:
        ports_of = made["src_port"], made["dst_port"]
        made["application_id"] = application_ids(kept["application_id"], made["protocol"], ports_of)
    return made


def _ether_types(version: int, kept: Columns, constants: Mapping[str, int], flows: int) -> Array:
    """Of the frames that flows come in: of what is around the tunnel, where there is one."""
    types = np.full(flows, _ETHER_TYPES[version], np.uint16)
    if "tunnels_kind" in kept:
        for outer, ether_type in _ETHER_TYPES.items():
            types[kept["tunnels_ip_version"] == outer] = ether_type
        types[kept["tunnels_kind"] == constants["TUNNEL_MPLS"]] = _MPLS
        types[kept["tunnels_kind"] == constants["TUNNEL_PPPOE"]] = _PPPOE
    return types


def _is_little(hot: Array) -> bool:
    """The machine's order: members named _be lie in network order whatever it is."""
    return bool(np.dtype(hot.dtype["src_port_be"]).newbyteorder("=") == np.dtype("<u2"))


def _flags(cold: Array, first: int, end: int) -> Array:
    """The octets of flags [first, end) as bits of one u16 each."""
    weights = (1 << np.arange(end - first)).astype(np.uint16)
    result: Any = cold["flags"][:, first:end].astype(np.uint16) @ weights
    return np.asarray(result, np.uint16)
