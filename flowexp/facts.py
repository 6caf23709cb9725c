# SPDX-License-Identifier: GPL-2.0-or-later
"""What the exporter tells Collectors of itself, of its table and of this machine: protocol/options.py's Facts."""

from __future__ import annotations

from typing import Iterable, Mapping, Optional, Tuple

from .config import Config
from .kernel.netlink import Interface
from .kernel.payloads import application_names
from .kernel.table import FlowTable
from .metering.anomalies import Anomalies
from .protocol.options import AnomalyFacts, Facts, InterfaceFacts, MeteringFacts

_IGNORED = ("truncated", "malformed", "unknown_gso", "table_full", "no_exporter")
"""Why an IP packet is not metered that should have been; the ledger's other reasons are somebody's choice."""

_MOST_NESTED = 8  # MAX_NEST_DEV: so many masters one above the other
_MOST_SECONDS = 0xFFFF  # flowActiveTimeout and flowIdleTimeout have two octets


def facts_of(
    config: Config, table: FlowTable, interfaces: Iterable[Interface], anomalies: Optional[Anomalies]
) -> Facts:
    """All but what only a Collector's session knows."""
    counters = table.counters()
    ignored = [counters[f"not_metered_{reason}"] for reason in _IGNORED]
    return Facts(
        active_timeout_s=_whole_seconds(config.timeouts.active),
        idle_timeout_s=_whole_seconds(config.timeouts.idle),
        metering=MeteringFacts(
            flows=counters["flows_created"][0],
            ignored_packets=sum(packets for packets, _ in ignored),
            ignored_octets=sum(octets for _, octets in ignored),
        ),
        interfaces=interface_facts(interfaces),
        applications=application_names() if "application" in config.fields.groups else (),
        anomalies=() if anomalies is None else _anomaly_facts(anomalies),
    )


def _anomaly_facts(anomalies: Anomalies) -> Tuple[AnomalyFacts, ...]:
    """Asked in a courier's thread: the points are copied at one go."""
    return tuple(
        AnomalyFacts(
            ifindex=ifindex,
            is_egress=bool(egress),
            unanswered_flows=figures.unanswered_flows,
            undersized_packets=figures.undersized_packets,
            jumbo_packets=figures.jumbo_packets,
            destinations=figures.recent_destinations.targets,
            ports=figures.recent_ports.targets,
        )
        for (ifindex, egress), figures in sorted(anomalies.figures.items())
    )


def _whole_seconds(seconds: float) -> int:
    return min(max(1, round(seconds)), _MOST_SECONDS)


def interface_facts(interfaces: Iterable[Interface]) -> Tuple[InterfaceFacts, ...]:
    """Each device with its alias and the VRF that it is in, by ifindex."""
    found = {interface.ifindex: interface for interface in interfaces}
    facts = []
    for interface in found.values():
        vrf = _vrf_of(interface, found)
        name, table = (vrf.name, vrf.vrf_table) if vrf is not None else ("", 0)
        facts.append(InterfaceFacts(interface.ifindex, interface.name, interface.alias, name, table))
    return tuple(facts)


def _vrf_of(interface: Interface, found: Mapping[int, Interface]) -> Optional[Interface]:
    """As kernel/vrfs.py has it of flows: the port of a bridge is where the bridge is, and a VRF is in itself."""
    at: Optional[Interface] = interface
    for _ in range(_MOST_NESTED):
        if at is None or at.vrf_table:
            return at
        at = found.get(at.master)
    return None
