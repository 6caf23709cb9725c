# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernel, permissions, memory and clock."""

from __future__ import annotations

import ctypes
import platform
import resource
from pathlib import Path
from typing import Iterator

from ..as_table import as_table_of
from ..config import Config
from ..kernel import features, libbpf
from ..kernel.attach import HOOK_PROGRAMS
from ..kernel.capabilities import missing_capabilities, not_permitted
from ..kernel.grace import wait_grace_period
from ..kernel.joins import joins_for
from ..kernel.loader import loader_named
from ..kernel.natevents import NatEvents
from ..kernel.pins import is_on_bpffs, may_be_mounted_for, not_a_pin_path
from ..kernel.table import table_octets
from ..meter import MeteringProcess, new_table, this_layout
from ..service import available_octets, memory_sentence
from .finding import FAILED, OK, WARNING, Finding

_PROBE_FLOWS = 16
_MIB = 1 << 20
_TIME_ERROR = 5  # what adjtimex returns where nothing disciplines the clock
_CONNTRACK_EVENTS = Path("/proc/sys/net/netfilter/nf_conntrack_events")
_TIMEX_OCTETS = 256  # struct timex and room to spare; all zero only asks


def of_kernel(config: Config) -> Iterator[Finding]:
    """Makes a small table and loads the programs over it, with the field groups that are wanted: permissions, memory
    and verifier in one go."""
    if missing_capabilities():
        yield Finding(FAILED, "capabilities", not_permitted())
    else:
        yield Finding(OK, "capabilities", "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are there")
    yield Finding(OK, "libbpf", libbpf.version())
    loader, groups = loader_named(config.loader), config.fields.groups
    meter = MeteringProcess(
        new_table(_PROBE_FLOWS, loader, groups),
        loader=loader,
        programs=HOOK_PROGRAMS,
        max_flows=_PROBE_FLOWS,
        joins=joins_for(groups),
    )
    wanted = f", with field groups {', '.join(groups)}" if groups else ""
    yield Finding(OK, "kernel", f"Linux {platform.release()} takes the BPF programs{wanted}")
    meter.close()
    missing = features.missing()
    there = ", ".join(feature.name for feature in features.FEATURES if feature not in missing)
    yield Finding(OK, "kernel features", there)
    for feature in missing:  # none that is needed: the programs were taken
        yield Finding(OK, "kernel features", f"no {feature.name} (Linux {feature.since}); {feature.instead}")
    wait_grace_period()
    yield Finding(OK, "membarrier", "flows can be ended safely")


def of_host(config: Config) -> Iterator[Finding]:
    """What a table needs of this machine beside the kernel, and what Collectors need of its clock."""
    octets = table_octets(this_layout(loader_named(config.loader)), config.table.max_flows, config.fields.groups)
    yield from _memory(octets)
    pin_path = Path(config.table.pin_path)
    if is_on_bpffs(pin_path):
        yield Finding(OK, "bpffs", f"{pin_path} is in one")
    elif may_be_mounted_for(pin_path):
        advice = "run as root mounts it, or: mount -t bpf bpf /sys/fs/bpf"
        yield Finding(WARNING, "bpffs", f"{pin_path} is in none; {advice}")
    else:
        yield Finding(FAILED, "bpffs", not_a_pin_path(pin_path))
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_OCTETS)) == _TIME_ERROR:
        yield Finding(WARNING, "clock", "nothing disciplines it: flows' times will drift; run chrony or ntpd")
    else:
        yield Finding(OK, "clock", "disciplined")
    if config.export.nat_events:
        yield from _nat_events()


def of_as_table(config: Config) -> Iterator[Finding]:
    """Whether the file can be read, and whether anybody asks for it."""
    table = as_table_of(config.fields)
    if table is not None:
        yield Finding(OK, "as_table", str(table))
    elif config.fields.as_table:
        yield Finding(WARNING, "as_table", f'{config.fields.as_table} is not read: "routing" is not in [fields] groups')


def _nat_events() -> Iterator[Finding]:
    """Whether connection tracking tells of connections. FlowexpError where the kernel has no such events."""
    NatEvents().close()
    try:
        is_on = _CONNTRACK_EVENTS.read_text().strip() != "0"
    except OSError:
        yield Finding(WARNING, "NAT events", "connections are not tracked: no rule of a firewall or of NAT wants it")
        return
    if is_on:
        yield Finding(OK, "NAT events", "connection tracking tells of connections")
    else:
        yield Finding(WARNING, "NAT events", "none will come; sysctl -w net.netfilter.nf_conntrack_events=1")


def _memory(octets: int) -> Iterator[Finding]:
    available = available_octets()
    needs = memory_sentence(octets, available)
    if available is None:
        yield Finding(OK, "memory", needs)
    elif octets > available:
        yield Finding(FAILED, "memory", f"{needs}; lower [table] max_flows")
    else:
        yield Finding(WARNING if octets > available // 2 else OK, "memory", needs)
    try:
        is_charged_to_cgroup = features.has_coarse_clock()
    except OSError:  # not permitted, which has been told
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if is_charged_to_cgroup:
        yield Finding(OK, "memlock", "this kernel charges BPF memory to the cgroup, not to that limit")
    elif limit == resource.RLIM_INFINITY or limit >= octets:
        yield Finding(OK, "memlock", "the limit has room for the table")
    else:
        yield Finding(WARNING, "memlock", f"{limit // _MIB} MiB; ulimit -l unlimited, or LimitMEMLOCK=infinity")
