# SPDX-License-Identifier: GPL-2.0-or-later
"""Field groups of which packets are not asked but the kernel is, as a flow's record is due."""

from __future__ import annotations

from typing import Callable, Iterable, List

import numpy as np

from .conntrack import Translations
from .flows import Columns
from .routes import Routes
from .vrfs import Vrfs

Join = Callable[[Columns], Columns]
"""Columns of flows of one family -> these, and what the kernel says of the flows."""


class Routing:
    """Joins to flows the VRFs that they come in and go out by, and how long the prefixes are that their addresses are
    routed by: in the VRF that they came in by, as it is there that the kernel looks for their way out."""

    def __init__(self) -> None:
        self._routes = Routes()
        self._vrfs = Vrfs()

    def __call__(self, columns: Columns) -> Columns:
        ingress, ingress_table = self._vrfs.of(columns["ingress_ifindex"])
        egress, egress_table = self._vrfs.of(columns["egress_ifindex"])
        has_come_in = columns["ingress_ifindex"] != 0  # and was not sent by this host
        vrfs = np.where(has_come_in, ingress, egress)
        lengths = {
            f"{side}_prefix_length": self._routes.prefix_lengths(columns[f"{side}_addr"], vrfs) for side in _SIDES
        }
        return {**columns, "ingress_vrf": ingress_table, "egress_vrf": egress_table, **lengths}


_SIDES = ("src", "dst")
_JOINS: dict[str, Callable[[], Join]] = {"nat": Translations, "routing": Routing}
"""In the order in which they are made: translation may lead to another output interface."""


def is_asked(group: str) -> bool:
    """Whether it is the kernel that knows, and so nobody once the packets are in a capture."""
    return group in _JOINS


def joins_for(groups: Iterable[str]) -> List[Join]:
    """Those that these field groups need. FlowexpError where this kernel cannot be asked."""
    wanted = set(groups)
    return [join() for name, join in _JOINS.items() if name in wanted]
