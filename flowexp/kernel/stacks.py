# SPDX-License-Identifier: GPL-2.0-or-later
"""Interfaces that are stacked: which of them see nothing that a metered one beneath does not see, too.

The rule: what passes an interface passes those beneath it. Beneath a VLAN device is its parent; beneath a bridge, bond,
team or VRF are its ports, all of them. A veth's ends in one namespace are one wire: the younger counts as lying on the
older. An interface is covered where all that lie beneath it are metered or covered themselves.
"""

from __future__ import annotations

from typing import Dict, Iterable, List, Set

from .netlink import Interface

_OVER_PORTS = ("bridge", "bond", "team", "vrf")


def covered(metered: Iterable[Interface], present: Iterable[Interface], *, both_ways: bool) -> Set[int]:
    """ifindexes of those of `present` that need no metering of their own; some may be in `metered`, some not.

    both_ways: whether ingress and egress are metered. Else a veth's ends are both needed, as one's ingress is the
    other's egress.
    """
    beneath = _beneath(list(present), both_ways=both_ways)
    seen = {interface.ifindex for interface in metered}
    found: Set[int] = set()
    while True:
        more = {upper for upper, lower in beneath.items() if lower <= seen | found} - found
        if not more:
            return found
        found |= more


def _beneath(present: List[Interface], *, both_ways: bool) -> Dict[int, Set[int]]:
    """Of each interface that lies on others, these."""
    beneath: Dict[int, Set[int]] = {}
    for interface in present:
        if interface.kind in _OVER_PORTS:
            ports = {port.ifindex for port in present if port.master == interface.ifindex}
        elif interface.kind == "vlan":
            ports = {interface.link} - {0}
        elif interface.kind == "veth" and both_ways and interface.link < interface.ifindex:
            ports = {interface.link} - {0}
        else:
            continue
        if ports:
            beneath[interface.ifindex] = ports
    return beneath
