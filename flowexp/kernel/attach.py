# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the packet path runs: TC (a TCX link, or a filter on clsact), or XDP for ingress on request.

A link goes away with its last descriptor or pin; a filter has to be taken away. In both cases
only what is ours is ever touched: links are our own, and the filter has its own priority.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Tuple

from ..errors import FlowexpError
from . import libbpf, netlink
from .loader import Programs
from .netlink import Interface

_log = logging.getLogger(__name__)

HOOK_PROGRAMS = ("ingress_ethernet", "ingress_no_link", "egress_ethernet", "egress_no_link", "xdp_ethernet")

_XDP_GENERIC, _XDP_NATIVE = 2, 4  # XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE
_TCX = {"ingress": libbpf.TCX_INGRESS, "egress": libbpf.TCX_EGRESS}
_DIRECTIONS: Mapping[str, Tuple[str, ...]] = {
    "once": ("ingress", "egress"),
    "both": ("ingress", "egress"),
    "ingress": ("ingress",),
    "egress": ("egress",),
}


@dataclass(frozen=True)
class ObservationPoint:
    """Interface and direction: where packets are observed."""

    interface: Interface
    direction: str


@dataclass
class Attachment:
    """One program at one Observation Point. `how` is tcx, clsact, xdp or xdp-generic."""

    point: ObservationPoint
    how: str
    link: Optional[int]  # descriptor; None for a filter

    def detach(self) -> None:
        if self.link is not None:
            os.close(self.link)
            self.link = None
        else:
            netlink.remove_filter(self.point.interface.ifindex, self.point.direction)


class Attacher:
    """Keeps the programs attached to the interfaces that the configuration names, as these come and go.

    `programs`: descriptors by name. `ingress_map`: descriptor of the map of interfaces metered at ingress.
    """

    def __init__(self, programs: Programs, ingress_map: int, *, direction: str, hook: str, xdp_force: bool) -> None:
        self._programs = programs
        self._ingress_map = ingress_map
        self._directions = _DIRECTIONS[direction]
        self._hook = hook
        self._xdp_force = xdp_force
        self.attached: Dict[Tuple[int, str], Attachment] = {}

    def follow(self, wanted: List[Interface]) -> None:
        """Attaches to what is wanted and not attached yet; lets go of what is gone."""
        ifindexes = {interface.ifindex for interface in wanted}
        for key in [key for key in self.attached if key[0] not in ifindexes]:
            self._detach(key)
        for direction in self._directions:  # ingress first: what it counts, egress leaves
            for interface in wanted:
                if (interface.ifindex, direction) not in self.attached:
                    self._attach(ObservationPoint(interface, direction))

    def _attach(self, point: ObservationPoint) -> None:
        ifindex = point.interface.ifindex
        try:
            attachment = self._attachment(point)
            if point.direction == "ingress":
                libbpf.update(self._ingress_map, ifindex, 1)
        except OSError as error:
            raise FlowexpError(f"{point.interface.name} {point.direction}: {_why(error, self._hook)}") from error
        self.attached[ifindex, point.direction] = attachment
        _log.info("metering %s %s (%s, ifindex %d)", point.interface.name, point.direction, attachment.how, ifindex)

    def _attachment(self, point: ObservationPoint) -> Attachment:
        interface = point.interface
        if self._hook == "xdp" and point.direction == "ingress":
            return self._xdp(point)
        kind = "ethernet" if interface.has_ethernet else "no_link"
        program = self._programs[f"{point.direction}_{kind}"]
        try:
            return Attachment(point, "tcx", libbpf.create_link(program, interface.ifindex, _TCX[point.direction]))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        netlink.add_filter(interface.ifindex, point.direction, program)
        return Attachment(point, "clsact", None)

    def _xdp(self, point: ObservationPoint) -> Attachment:
        """Native where the driver has it. Generic XDP sees what GRO has merged, without the count of segments."""
        interface = point.interface
        if not interface.has_ethernet:
            raise FlowexpError(f'{interface.name}: XDP is for Ethernet devices; use hook = "tc" here')
        program = self._programs["xdp_ethernet"]
        try:
            link = libbpf.create_link(program, interface.ifindex, libbpf.XDP, flags=_XDP_NATIVE)
            _log.warning("%s: XDP runs before VLAN offload and GRO; a veth peer loses TSO by it", interface.name)
            return Attachment(point, "xdp", link)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        if netlink.has_gro(interface.name) and not self._xdp_force:
            raise FlowexpError(
                f"{interface.name}: its driver has no XDP, and generic XDP miscounts while GRO is on: "
                f"'ethtool -K {interface.name} gro off', hook = \"tc\", or xdp_force = true"
            )
        link = libbpf.create_link(program, interface.ifindex, libbpf.XDP, flags=_XDP_GENERIC)
        return Attachment(point, "xdp-generic", link)

    def _detach(self, key: Tuple[int, str]) -> None:
        attachment = self.attached.pop(key)
        attachment.detach()
        if key[1] == "ingress":
            libbpf.delete(self._ingress_map, key[0])
        _log.info("no longer metering %s %s", attachment.point.interface.name, key[1])

    def detach_all(self) -> None:
        for key in list(self.attached):
            self._detach(key)


def _why(error: OSError, hook: str) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "not permitted to attach; run as root, or with CAP_BPF and CAP_NET_ADMIN"
    if error.errno == errno.EBUSY and hook == "xdp":
        return 'another XDP program is attached; it is left alone: use hook = "tc" here'
    if error.errno == errno.E2BIG:
        return "more interfaces than the packet path has room for"
    return f"attaching failed: {error.strerror}"
