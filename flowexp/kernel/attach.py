# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the packet path runs: TC (a TCX link, or a filter on clsact), or XDP for ingress on request.

A link goes away with its last descriptor or pin; a filter has to be taken away. In both cases
only what is ours is ever touched: links are our own, and the filter has its own priority and handle.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from typing import Dict, Iterator, List, Mapping, Optional, Set, Tuple

from ..errors import FlowexpError
from . import libbpf, netlink, offloads, stacks
from .capabilities import not_permitted
from .loader import Programs
from .netlink import Interface
from .pins import PinFolder

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

    @property
    def pin_name(self) -> str:
        return _pin_name(self.point, self.how)


def _pin_name(point: ObservationPoint, how: str) -> str:
    return f"{how}_{point.interface.ifindex}_{point.direction}"


def programs_for(interfaces: List[Interface], *, direction: str, hook: str) -> Tuple[str, ...]:
    """The programs that these interfaces need, those of Ethernet where there is none yet."""
    points = _points(interfaces, direction)
    return tuple(sorted({_program(point, hook) for point in points})) or ("ingress_ethernet", "egress_ethernet")


def _points(interfaces: List[Interface], direction: str) -> Iterator[ObservationPoint]:
    """Ingress first: what it counts, egress leaves. On loopback all that goes out comes in again."""
    for way in _DIRECTIONS[direction]:
        for interface in interfaces:
            if not (direction == "once" and way == "egress" and interface.is_loopback):
                yield ObservationPoint(interface, way)


def _program(point: ObservationPoint, hook: str) -> str:
    if hook == "xdp" and point.direction == "ingress":
        return "xdp_ethernet"
    return f"{point.direction}_{'ethernet' if point.interface.has_ethernet else 'no_link'}"


class Attacher:
    """Keeps the programs attached to the interfaces that the configuration names, as these come and go.

    `programs`: descriptors by name. `ingress_map`: descriptor of the map of interfaces metered at ingress.
    `handle`: that of its filters, where there are no links (owners.py).
    `pins`: where links of an earlier exporter may be, which are taken over with their programs replaced;
    with `persist` new ones are pinned there, too. `skip_stacked`: leave out what others beneath cover (stacks.py).
    """

    def __init__(
        self,
        programs: Programs,
        ingress_map: int,
        *,
        handle: int,
        direction: str,
        hook: str,
        xdp_force: bool,
        pins: Optional[PinFolder] = None,
        persist: bool = False,
        skip_stacked: bool = False,
    ) -> None:
        self._programs = programs
        self._pins = pins
        self._persist = persist
        self._found = pins.links() if pins else {}
        self._ingress_map = ingress_map
        self._handle = handle
        self.direction = direction
        """What to meter; to be followed by follow()."""
        self.skip_stacked = skip_stacked
        """To be followed by follow(), too."""
        self._covered: Dict[int, str] = {}  # names by ifindex
        self._own_qdiscs: Set[int] = set()  # devices whose clsact we have made
        self._hook = hook
        self._xdp_force = xdp_force
        self.attached: Dict[Tuple[int, str], Attachment] = {}

    def follow(self, wanted: List[Interface]) -> None:
        """Attaches to what is wanted and not attached yet; lets go of what is gone.

        FlowexpError, after all the others have been tried, names those that cannot be metered.
        """
        covered = self._find_covered(wanted)
        if self.skip_stacked:
            wanted = [interface for interface in wanted if interface.ifindex not in covered]
        points = {(point.interface.ifindex, point.direction) for point in _points(wanted, self.direction)}
        for key in [key for key in self.attached if key not in points or not self._is_attached(key)]:
            _log.info("no longer metering %s %s", self.attached[key].point.interface.name, key[1])
            self._detach(key)
        failures = []
        for point in _points(wanted, self.direction):
            attachment = self.attached.get((point.interface.ifindex, point.direction))
            if attachment is not None:
                attachment.point = point  # it may have another name now
                continue
            try:
                self._attach(point)
            except FlowexpError as error:
                failures.append(str(error))
        for name in list(self._found):  # of interfaces that are not metered any more
            self._drop_link(name, self._found.pop(name))
        self._cover(covered)
        if failures:
            raise FlowexpError("; ".join(failures))

    def _find_covered(self, wanted: List[Interface]) -> Dict[int, str]:
        """What lies on metered interfaces, metered itself or not: the kernel says that a packet came in there."""
        if not self.skip_stacked and self.direction != "once":
            return {}
        present = netlink.interfaces()
        is_one_wire = self.skip_stacked and len(_DIRECTIONS[self.direction]) == 2
        found = stacks.covered(wanted, present, both_ways=is_one_wire)
        return {interface.ifindex: interface.name for interface in present if interface.ifindex in found}

    def _cover(self, covered: Dict[int, str]) -> None:
        """What came in there was counted as it came in beneath: egress leaves it."""
        for ifindex in set(self._covered) - set(covered):
            if (ifindex, "ingress") not in self.attached:
                libbpf.delete(self._ingress_map, ifindex)
        for ifindex, name in covered.items():
            libbpf.update(self._ingress_map, ifindex, 1)
            if self.skip_stacked and ifindex not in self._covered:
                _log.info("%s lies on metered interfaces, which see all that passes it", name)
        self._covered = covered

    def _attach(self, point: ObservationPoint) -> None:
        ifindex = point.interface.ifindex
        try:
            if point.direction == "ingress":
                libbpf.update(self._ingress_map, ifindex, 1)
            attachment = self._attachment(point)
        except (OSError, FlowexpError) as error:
            if point.direction == "ingress":
                libbpf.delete(self._ingress_map, ifindex)
            if isinstance(error, FlowexpError):
                raise
            raise FlowexpError(f"{point.interface.name} {point.direction}: {_why(error, self._hook)}") from error
        self.attached[ifindex, point.direction] = attachment
        _log.info("metering %s %s (%s, ifindex %d)", point.interface.name, point.direction, attachment.how, ifindex)

    def _attachment(self, point: ObservationPoint) -> Attachment:
        interface = point.interface
        if self._hook == "xdp" and point.direction == "ingress":
            return self._xdp(point)
        program = self._programs[_program(point, self._hook)]
        try:
            return self._link(point, "tcx", program, _TCX[point.direction])
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        if netlink.make_clsact(interface.ifindex):
            self._own_qdiscs.add(interface.ifindex)
        netlink.add_filter(interface.ifindex, point.direction, self._handle, program)
        return Attachment(point, "clsact", None)

    def _xdp(self, point: ObservationPoint) -> Attachment:
        """Native where the driver has it. Generic XDP sees what GRO has merged, without the count of segments."""
        interface = point.interface
        if not interface.has_ethernet:
            raise FlowexpError(f'{interface.name}: XDP is for Ethernet devices; use hook = "tc" here')
        program = self._programs[_program(point, self._hook)]
        try:
            if interface.kind == "tun" and not self._xdp_force:
                raise FlowexpError(
                    f"{interface.name}: a tap hands super-packets to XDP, which has no count of their segments: "
                    'hook = "tc" here, or xdp_force = true'
                )
            attachment = self._link(point, "xdp", program, libbpf.XDP, flags=_XDP_NATIVE)
            _log.warning("%s: XDP runs before VLAN offload and GRO; a veth peer loses TSO by it", interface.name)
            return attachment
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        if "rx-gro" in offloads.features(interface.name) and not self._xdp_force:
            raise FlowexpError(
                f"{interface.name}: its driver has no XDP, and generic XDP miscounts while GRO is on: "
                f"'ethtool -K {interface.name} gro off', hook = \"tc\", or xdp_force = true"
            )
        return self._link(point, "xdp-generic", program, libbpf.XDP, flags=_XDP_GENERIC)

    def _link(self, point: ObservationPoint, how: str, program: int, kind: int, flags: int = 0) -> Attachment:
        """The link that an earlier exporter has left here, with our program in it, or a new one."""
        name = _pin_name(point, how)
        found = self._found.pop(name, None)
        if found is not None:
            if libbpf.link_ifindex(found) == point.interface.ifindex:
                libbpf.update_link(found, program)
                return Attachment(point, how, found)
            self._drop_link(name, found)
        link = libbpf.create_link(program, point.interface.ifindex, kind, flags=flags)
        if self._pins and self._persist:
            self._pins.pin_link(name, link)
        return Attachment(point, how, link)

    def _drop_link(self, name: str, link: int) -> None:
        """A link goes with its last descriptor and its pin."""
        if self._pins:
            self._pins.unpin_link(name)
        os.close(link)

    def _is_attached(self, key: Tuple[int, str]) -> bool:
        """False where the device has gone meanwhile, even if another one has its index now."""
        link = self.attached[key].link
        return netlink.has_filter(*key, self._handle) if link is None else libbpf.link_ifindex(link) == key[0]

    def _detach(self, key: Tuple[int, str]) -> None:
        attachment = self.attached.pop(key)
        if attachment.link is not None:
            self._drop_link(attachment.pin_name, attachment.link)
        else:
            netlink.remove_filter(*key, self._handle)
            if key[0] in self._own_qdiscs and not any(netlink.filters(key[0], way) for way in _TCX):
                netlink.remove_clsact(key[0])
        if key[1] == "ingress":
            libbpf.delete(self._ingress_map, key[0])

    def replace(self, programs: Programs, ingress_map: int) -> None:
        """Other programs in place of those that are attached, at each of them without a gap.

        They find in `ingress_map` what the others found: it is another descriptor of the same map. FlowexpError, and
        nothing is replaced, where one cannot be loaded. What cannot be replaced is detached, for follow() to find.
        """
        wanted = [(key, each, programs[_program(each.point, self._hook)]) for key, each in self.attached.items()]
        self._programs, self._ingress_map = programs, ingress_map
        for key, attachment, program in wanted:
            try:
                if attachment.link is None:
                    netlink.add_filter(*key, self._handle, program)
                else:
                    libbpf.update_link(attachment.link, program)
            except OSError as error:
                _log.debug("%s: %s; to be attached again", attachment.pin_name, error.strerror)
                self._detach(key)

    def detach_all(self) -> None:
        for key in list(self.attached):
            self._detach(key)


def _why(error: OSError, hook: str) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return not_permitted()
    if error.errno in (errno.EBUSY, errno.EEXIST) and hook == "xdp":
        return 'another XDP program is attached; it is left alone: use hook = "tc" here'
    if error.errno == errno.E2BIG:
        return "more interfaces than the packet path has room for"
    return f"attaching failed: {error.strerror}"
