# SPDX-License-Identifier: GPL-2.0-or-later
"""Who meets a packet before us, and who behind us: XDP, then programs at TCX, then filters on clsact."""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import Dict, Iterable, List, NamedTuple, Tuple

from . import features, libbpf, netlink
from .attach import HOOK_PROGRAMS
from .netlink import Filter, Interface

EXPORTER = "flowexp"

_ATTACH_TYPES = {"ingress": libbpf.TCX_INGRESS, "egress": libbpf.TCX_EGRESS}
_NAME_OCTETS = 15  # of a program's name, as the kernel keeps it
_OURS = frozenset(name[:_NAME_OCTETS] for name in HOOK_PROGRAMS)


class Order(NamedTuple):
    """Those whom a packet meets on its way in or out, EXPORTER among them: where it is, or would be."""

    names: List[str]
    is_attached: bool

    @property
    def before_us(self) -> List[str]:
        return self.names[: self.names.index(EXPORTER)]

    @property
    def behind_us(self) -> List[str]:
        return self.names[self.names.index(EXPORTER) + 1 :]


def order(interface: Interface, direction: str, *, hook: str = "tc") -> Order:
    """What is at an interface now; `hook`: as configured, for an exporter that is not there yet.

    PermissionError where it may not be asked. Programs have names only for CAP_SYS_ADMIN, else numbers.
    """
    filters = netlink.filters(interface.ifindex, direction)
    parts = [
        [_program("XDP", each) for each in interface.xdp_programs] if direction == "ingress" else [],
        [_program("TCX", each) for each in libbpf.attached_programs(interface.ifindex, _ATTACH_TYPES[direction])],
        _names(each for each in filters if each.priority <= netlink.PRIORITY),
        _names(each for each in filters if each.priority > netlink.PRIORITY),
    ]
    is_attached = any(EXPORTER in part for part in parts)
    if not is_attached:
        first = hook == "xdp" and direction == "ingress"
        parts.insert(0 if first else 2 if features.has_tcx() else 3, [EXPORTER])
    return Order(list(chain(*parts)), is_attached)


def look_at(points: Iterable[Tuple[int, str]]) -> Dict[Tuple[int, str], List[str]]:
    """Order.names by ifindex and direction, where an exporter is seen to be attached."""
    present = {interface.ifindex: interface for interface in netlink.interfaces()}
    found = {}
    for ifindex, direction in points:
        if ifindex in present:
            with contextlib.suppress(PermissionError):
                there = order(present[ifindex], direction)
                if there.is_attached:
                    found[ifindex, direction] = there.names
    return found


def _names(filters: Iterable[Filter]) -> List[str]:
    """One for all the rules of a filter."""
    names = (EXPORTER if each.is_ours else f"filter {each.name} (pref {each.priority})" for each in filters)
    return list(dict.fromkeys(names))


def _program(where: str, program_id: int) -> str:
    name = libbpf.program_name(program_id)
    return EXPORTER if name in _OURS else f"{where} {name or f'program {program_id}'}"
