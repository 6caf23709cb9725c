# SPDX-License-Identifier: GPL-2.0-or-later
"""Columns of flows as the meter would hand them out, for tests of what comes behind it."""

from __future__ import annotations

from typing import Dict

import numpy as np

from flowexp.protocol.elements import Columns

DTYPES = {
    "u1": "ip_version protocol direction tos fragment_flags min_ttl max_ttl end_reason",
    "u2": "src_port dst_port icmp_type_code vlan_id inner_vlan_id tcp_flags",
    "u4": "ingress_ifindex egress_ifindex tos_changes flow_label min_length max_length",
    "u8": "octets packets octets_total packets_total",
    "i8": "start_ns end_ns",
    "?": "vlan_tagged inner_tagged",
}


def flows(count: int, *, version: int = 4, first_port: int = 1) -> Columns:
    """Flows that their source port tells apart; every third one has a VLAN tag, and so another Template."""
    columns: Dict[str, np.ndarray] = {
        name: np.zeros(count, dtype) for dtype, names in DTYPES.items() for name in names.split()
    }
    for name in ("src_addr", "dst_addr", "next_hop"):
        columns[name] = np.zeros((count, 4 if version == 4 else 16), "u1")
    for name in ("src_mac", "dst_mac"):
        columns[name] = np.zeros((count, 6), "u1")
    columns["ip_version"][:], columns["protocol"][:] = version, 17
    columns["packets"][:], columns["octets"][:] = 1, 40
    columns["src_port"] = np.arange(first_port, first_port + count).astype("u2")
    columns["vlan_tagged"] = np.arange(count) % 3 == 0
    return columns


def random_columns(rows: int, *, ip_version: int, seed: int, tags: bool = True) -> dict[str, np.ndarray]:
    """Any values that the columns can hold, times within what milliseconds on the wire can."""
    random = np.random.default_rng(seed)

    def octets(width: int) -> np.ndarray:
        return random.integers(0, 256, (rows, width), dtype=np.uint8)

    def whole(dtype: type, high: int | None = None) -> np.ndarray:
        return random.integers(0, high or np.iinfo(dtype).max, rows, dtype=dtype, endpoint=True)

    width = 4 if ip_version == 4 else 16
    columns = {
        "ip_version": np.full(rows, ip_version, dtype=np.uint8),
        "vlan_tagged": whole(np.uint8, 1).astype(bool) & tags,
        "direction": whole(np.uint8, 1),
        "tcp_flags": whole(np.uint16, 0x1FF),
        "flow_label": whole(np.uint32, 0xFFFFF),
        "start_ns": whole(np.int64),
        "end_ns": whole(np.int64),
    }
    columns["inner_tagged"] = columns["vlan_tagged"] & whole(np.uint8, 1).astype(bool)
    columns.update({name: octets(width) for name in ("src_addr", "dst_addr", "next_hop")})
    columns.update({name: octets(6) for name in ("src_mac", "dst_mac")})
    for dtype, names in {
        np.uint8: "protocol tos fragment_flags min_ttl max_ttl end_reason",
        np.uint16: "src_port dst_port icmp_type_code vlan_id inner_vlan_id",
        np.uint32: "ingress_ifindex egress_ifindex tos_changes min_length max_length",
        np.uint64: "octets packets octets_total packets_total",
    }.items():
        columns.update({name: whole(dtype) for name in names.split()})
    return columns
