# SPDX-License-Identifier: GPL-2.0-or-later
"""What packets amount to, in the one form in which senders, Collectors and decoders are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class FlowKey(NamedTuple):
    """Addresses as the shortest text; 0 stands for what the flow does not have; ICMP: type * 256 + code."""

    src_addr: str
    dst_addr: str
    protocol: int
    src_port: int = 0
    dst_port: int = 0
    icmp_type_code: int = 0
    vlan_id: int = 0


class Counts(NamedTuple):
    """packets; octets of IP, headers included; the OR of eight bits of TCP flags."""

    packets: int
    octets: int
    tcp_flags: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(self.packets + other.packets, self.octets + other.octets, self.tcp_flags | other.tcp_flags)


FlowTable = dict[FlowKey, Counts]


def add_up(records: Iterable[tuple[FlowKey, Counts]]) -> FlowTable:
    """One entry a flow, however many records told of it."""
    table: FlowTable = {}
    for key, counts in records:
        table[key] = table[key].plus(counts) if key in table else counts
    return table


def total(table: FlowTable) -> Counts:
    """Packets, octets and flags of all flows together."""
    result = Counts(0, 0)
    for counts in table.values():
        result = result.plus(counts)
    return result


def differences(expected: FlowTable, got: FlowTable, *, show: int = 5) -> list[str]:
    """What is wrong with `got`, a line a kind with a few examples; empty when they are equal."""
    missing = sorted(expected.keys() - got.keys())
    foreign = sorted(got.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & got.keys() if expected[key] != got[key])
    lines = []
    if missing:
        lines.append(f"{len(missing)} flows missing: {[tuple(key) for key in missing[:show]]}")
    if foreign:
        lines.append(f"{len(foreign)} flows nobody sent: {[tuple(key) for key in foreign[:show]]}")
    if wrong:
        examples = [(tuple(key), "sent", tuple(expected[key]), "got", tuple(got[key])) for key in wrong[:show]]
        lines.append(f"{len(wrong)} flows with wrong counts: {examples}")
    if lines:
        lines.append(f"total sent {tuple(total(expected))}, got {tuple(total(got))}")
    return lines
