# SPDX-License-Identifier: GPL-2.0-or-later
"""The interfaces that would be metered: who is at their hooks before us, and what never gets there."""

from __future__ import annotations

from typing import Iterator

from ..config import Config
from ..kernel import hooks, netlink, offloads
from ..kernel.capabilities import not_permitted
from ..kernel.netlink import Interface
from .finding import FAILED, OK, WARNING, Finding

_UNSEEN = {
    "rx-lro": "LRO joins packets, which are counted as one: ethtool -K {name} lro off",
    "hw-tc-offload": "flows that tc, a bridge or Open vSwitch hands to the device never reach a hook: "
    "ethtool -K {name} hw-tc-offload off",
}
_UNSEEN_BY_XDP = {
    "rx-gro-hw": "the device joins packets, which XDP counts as one: ethtool -K {name} rx-gro-hw off",
    "rx-vlan-hw-parse": "XDP sees no VLAN tag that the device takes away: ethtool -K {name} rxvlan off",
}
"""What an offload keeps from us, by the kernel's name for it."""


def of_interfaces(config: Config) -> Iterator[Finding]:
    """Each interface that is here, and what is special about it."""
    found = netlink.resolve_at_start(config.interfaces)
    if config.hook == "xdp":
        yield Finding(WARNING, "hook", "XDP sees packets before VLAN offload; veth peers lose TSO by it")
    if not found:
        yield Finding(WARNING, "interfaces", f"{', '.join(config.interfaces)}: none is here yet; run waits for one")
    for interface in found:
        link = "Ethernet" if interface.has_ethernet else "no link header"
        state = "up" if interface.is_up else "down"
        yield Finding(OK if interface.is_up else WARNING, interface.name, f"{link}, {state}")
        yield from _offloads(interface, config)
        yield from _hooks(interface, config)


def _offloads(interface: Interface, config: Config) -> Iterator[Finding]:
    """What the device does to packets before a hook sees them."""
    name, active = interface.name, offloads.features(interface.name)
    for feature, what in {**_UNSEEN, **(_UNSEEN_BY_XDP if config.hook == "xdp" else {})}.items():
        if feature in active:
            yield Finding(WARNING, name, what.format(name=name))
    if config.hook == "xdp" and "rx-gro" in active and not config.xdp_force:
        yield Finding(WARNING, name, f"GRO is on: generic XDP would refuse (ethtool -K {name} gro off)")


def _hooks(interface: Interface, config: Config) -> Iterator[Finding]:
    """Who sees packets before us: what they keep is not metered."""
    for direction in ("ingress", "egress"):
        try:
            order = hooks.order(interface, direction, hook=config.hook)
        except PermissionError:
            yield Finding(WARNING, interface.name, f"who is at its hooks cannot be asked: {not_permitted()}")
            return
        there = "an exporter is attached; " if order.is_attached else ""
        taken = [name for name in order.behind_us if name.startswith("XDP")]
        if taken:
            yield Finding(FAILED, interface.name, f'ingress: {taken[0]} has XDP\'s one place; use hook = "tc" here')
        elif order.before_us:
            them, kept = ", ".join(order.before_us), "what they drop, redirect or end with TC_ACT_OK is not metered"
            yield Finding(WARNING, interface.name, f"{direction}: {there}{them} before us: {kept}")
        elif order.behind_us:
            yield Finding(OK, interface.name, f"{direction}: {there}{', '.join(order.behind_us)} behind us")
        elif order.is_attached:
            yield Finding(OK, interface.name, f"{direction}: an exporter is attached, and nobody else")


def of_routing() -> Iterator[Finding]:
    """What the FIB lookup of a flow's output interface cannot see, and what no hook sees."""
    marked = netlink.rules_with_marks()
    if marked:
        rules = ", ".join(map(str, marked))
        blind = "the lookup of the output interface cannot see: it may name another"
        yield Finding(WARNING, "routing", f"ip rule {rules} asks for a mark, which {blind}")
    else:
        yield Finding(OK, "routing", "no rule asks for a mark")
    tables = offloads.hardware_flowtables()
    if tables:
        advice = "packets of their flows never reach us; take away 'flags offload'"
        yield Finding(WARNING, "flowtables", f"{', '.join(tables)} in hardware: {advice}")
