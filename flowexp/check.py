# SPDX-License-Identifier: GPL-2.0-or-later
"""`flowexp check`: would `run` work here, and what would it not see? Tries things rather than compare versions."""

from __future__ import annotations

import errno
import platform
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator, List

from .collector_url import CollectorUrl
from .config import Config
from .errors import FlowexpError
from .kernel import libbpf, netlink
from .kernel.attach import HOOK_PROGRAMS
from .kernel.loader import loader_named
from .kernel.table import wait_grace_period
from .meter import MeteringProcess, new_table
from .transport.file import FileTransport
from .transport.udp import MTU_OCTETS, UdpTransport

OK, WARNING, FAILED = "ok", "warning", "FAILED"
_PROBE_FLOWS = 16
_NO_INTERFACE = 0x7FFFFFFF


@dataclass(frozen=True)
class Finding:
    """One line of the report: how it is, what was looked at, and what that means."""

    verdict: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict:8}{self.what}: {self.detail}"


def check(config: Config) -> Iterator[Finding]:
    """Findings as they are made. `config` has been read without an error, which is the first of them."""
    yield Finding(OK, "configuration", f"{len(config.collectors)} collectors, {config.table.max_flows} flows a family")
    yield from _tried("kernel", lambda: _kernel(config))
    yield from _tried("interfaces", lambda: _interfaces(config))
    for collector in config.collectors:
        yield from _tried(str(collector.url), partial(_collector, collector.url, config))


def _tried(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except FlowexpError as error:
        yield Finding(FAILED, what, str(error))


def _kernel(config: Config) -> Iterator[Finding]:
    """Makes a small table and loads the programs over it: permissions, memory and verifier in one go."""
    loader = loader_named(config.loader)
    meter = MeteringProcess(
        new_table(_PROBE_FLOWS, loader), loader=loader, programs=HOOK_PROGRAMS, max_flows=_PROBE_FLOWS
    )
    yield Finding(OK, "kernel", f"Linux {platform.release()} takes the BPF programs")
    yield Finding(OK, "hook", "TCX links" if _has_tcx(meter) else "no TCX in this kernel: filters on clsact")
    meter.close()
    wait_grace_period()
    yield Finding(OK, "membarrier", "flows can be ended safely")


def _has_tcx(meter: MeteringProcess) -> bool:
    """A kernel with TCX looks for the device; one without does not know the kind of link."""
    try:
        libbpf.create_link(meter.programs["ingress_ethernet"], _NO_INTERFACE, libbpf.TCX_INGRESS)
    except OSError as error:
        return error.errno == errno.ENODEV
    return True


def _interfaces(config: Config) -> Iterator[Finding]:
    found = netlink.resolve_at_start(config.interfaces)
    if config.hook == "xdp":
        yield Finding(WARNING, "hook", "XDP sees packets before VLAN offload; veth peers lose TSO by it")
    if not found:
        yield Finding(WARNING, "interfaces", f"{', '.join(config.interfaces)}: none is here yet; run waits for one")
    for interface in found:
        link = "Ethernet" if interface.has_ethernet else "no link header"
        details: List[str] = [link, "up" if interface.is_up else "down"]
        verdict = OK if interface.is_up else WARNING
        if config.hook == "xdp" and netlink.has_gro(interface.name) and not config.xdp_force:
            verdict = WARNING
            details.append(f"GRO is on: generic XDP would refuse (ethtool -K {interface.name} gro off)")
        yield Finding(verdict, interface.name, ", ".join(details))


def _collector(url: CollectorUrl, config: Config) -> Iterator[Finding]:
    """Opens the way to a Collector without sending anything: UDP cannot tell more than name and route."""
    if url.transport == "file":
        transport = FileTransport(url.path)
        transport.open()
        transport.close()
        yield Finding(OK, str(url), "can be written")
        return
    udp = UdpTransport(url.host, url.port, mtu_octets=config.export.mtu or MTU_OCTETS, source_port=0, mark=0)
    udp.open()
    state, octets = udp.status()["state"], udp.max_message_octets()
    udp.close()
    if state == "up":
        yield Finding(OK, str(url), f"there is a route; Messages of up to {octets} octets")
    else:
        yield Finding(FAILED, str(url), f"{state}; see to its name and the route to it")
