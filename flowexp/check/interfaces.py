# SPDX-License-Identifier: GPL-2.0-or-later
"""The interfaces that would be metered: who is at their hooks before us, and what never gets there."""

from __future__ import annotations

from typing import Iterator, List

from ..config import Config
from ..kernel import libbpf, netlink, offloads
from ..kernel.attach import HOOK_PROGRAMS
from ..kernel.capabilities import not_permitted
from ..kernel.netlink import Interface
from .finding import OK, WARNING, Finding

_HOOKS = {"ingress": libbpf.TCX_INGRESS, "egress": libbpf.TCX_EGRESS}
_NAME_OCTETS = 15  # of a program's name, as the kernel keeps it
_OURS = frozenset(name[:_NAME_OCTETS] for name in HOOK_PROGRAMS)


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
        yield from _hooks(interface)


def _offloads(interface: Interface, config: Config) -> Iterator[Finding]:
    """What the device does to packets before a hook sees them."""
    name, flags = interface.name, offloads.flags(interface.name)
    if flags & offloads.LRO:
        yield Finding(WARNING, name, f"LRO joins packets, which are counted as one: ethtool -K {name} lro off")
    if config.hook != "xdp":
        return
    if flags & offloads.RX_VLAN:
        yield Finding(WARNING, name, f"XDP sees no VLAN tag that the device takes away: ethtool -K {name} rxvlan off")
    if offloads.has_gro(name) and not config.xdp_force:
        yield Finding(WARNING, name, f"GRO is on: generic XDP would refuse (ethtool -K {name} gro off)")


def _hooks(interface: Interface) -> Iterator[Finding]:
    """Who sees packets before us: what they drop or redirect is not metered. We go last in a hook."""
    xdp = [_program(program) for program in interface.xdp_programs]
    yield from _before_us(interface, "XDP", xdp)
    for hook, attach_type in _HOOKS.items():
        try:
            programs = [_program(each) for each in libbpf.attached_programs(interface.ifindex, attach_type)]
        except PermissionError:
            yield Finding(WARNING, interface.name, f"who is at its hooks cannot be asked: {not_permitted()}")
            return
        if _OURS.isdisjoint(programs):
            yield from _before_us(interface, hook, programs)
        else:
            yield Finding(OK, interface.name, f"{hook}: an exporter is attached; the order is {', '.join(programs)}")


def _before_us(interface: Interface, hook: str, programs: List[str]) -> Iterator[Finding]:
    if programs:
        them = ", ".join(programs)
        yield Finding(WARNING, interface.name, f"{hook}: {them} before us: what they drop or redirect is not metered")


def _program(program_id: int) -> str:
    return libbpf.program_name(program_id) or f"program {program_id}"


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
