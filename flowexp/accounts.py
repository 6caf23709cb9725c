# SPDX-License-Identifier: GPL-2.0-or-later
"""What the exporter counts of itself, and the snapshot that it makes of that and of its parts (status.py).

Counting costs a few additions a sweep. A snapshot reads the whole table: it is made when somebody asks, by the
exporter's loop, between two sweeps. Time is an argument.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from dataclasses import replace
from ipaddress import ip_address
from itertools import accumulate
from typing import Dict, Iterable, List, Mapping, Optional, Tuple, Union

import numpy as np

from . import __version__
from .config import Config
from .kernel.attach import Attachment
from .kernel.layout import Array
from .kernel.natevents import NatEvents
from .kernel.netlink import Packets
from .kernel.table import FlowTable
from .member import Member
from .meter import read_ledger
from .metering.anomalies import Anomalies, Figures
from .metering.ledger import Ledger
from .metering.sweep import ACTIVE, END_OF_FLOW, FORCED, IDLE, LACK_OF_RESOURCES, report_all
from .status import NAT_EVENTS, Anomaly, AttachedProgram, Configuration, Histogram, Status, Sweep, Table

_SECOND_NS, _MILLISECOND_NS = 1_000_000_000, 1_000_000
_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

END_REASONS = {
    IDLE: "idle",
    ACTIVE: "active",
    END_OF_FLOW: "end_of_flow",
    FORCED: "forced",
    LACK_OF_RESOURCES: "lack_of_resources",
}
"""flowEndReason, as status and metrics name it."""

Attachments = Mapping[Tuple[int, str], Attachment]


class _Durations:
    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._sum_ns = 0

    def add(self, duration_ns: int) -> None:
        self._counts[bisect_left(_BOUNDS_S, duration_ns / _SECOND_NS)] += 1
        self._sum_ns += duration_ns

    def histogram(self) -> Histogram:
        bounds = [*map(str, _BOUNDS_S), "+Inf"]
        return Histogram(buckets=list(zip(bounds, accumulate(self._counts))), sumSeconds=self._sum_ns / _SECOND_NS)


class Accounts:
    """What only the exporter itself can count. Times are boot time."""

    def __init__(self, now_ns: int) -> None:
        self._started_ns = now_ns
        self._records = np.zeros(max(END_REASONS) + 1, np.int64)
        self._before_sweep = 0
        self._sending_ns = 0
        self._sweeps, self._sends = _Durations(), _Durations()
        self._last: Optional[Tuple[int, Sweep]] = None
        self._at_attach: Dict[Tuple[int, str], int] = {}

    def attached(self, attachments: Attachments, before: Mapping[str, Packets]) -> None:
        """These are attached now; `before`: what the devices had counted just before the new ones were."""
        self._at_attach = {
            key: self._at_attach.get(key, _device_packets(before, attachment) or 0)
            for key, attachment in attachments.items()
        }

    def sent(self, reasons: Array, duration_ns: int) -> None:
        """One batch went to every Collector: its records' flowEndReasons, and how long that took."""
        self._records += np.bincount(reasons, minlength=len(self._records))
        self._sending_ns += duration_ns

    def sweep_begins(self) -> None:
        self._before_sweep = int(self._records.sum())
        self._sending_ns = 0

    def sweep_ended(self, *, began_ns: int, now_ns: int, flows: int) -> None:
        """`flows`: how many there were as it began."""
        self._sweeps.add(now_ns - began_ns)
        self._sends.add(self._sending_ns)
        sweep = Sweep(
            ageSeconds=0.0,
            totalMilliseconds=(now_ns - began_ns) / _MILLISECOND_NS,
            sendingMilliseconds=self._sending_ns / _MILLISECOND_NS,
            flows=flows,
            records=int(self._records.sum()) - self._before_sweep,
        )
        self._last = now_ns, sweep

    def snapshot(
        self,
        *,
        config: Config,
        table: FlowTable,
        anomalies: Optional[Anomalies],
        attachments: Attachments,
        configuration: Configuration,
        nat_events: Optional[NatEvents],
        collectors: Iterable[Member],
        packets: Mapping[str, Packets],
        now_ns: int,
    ) -> Status:
        """All there is to say at this moment. `packets`: what each device has counted.

        Between two sweeps only: it reads the table.
        """
        return Status(
            version=__version__,
            loader=config.loader,
            pid=os.getpid(),
            pinPath=config.table.pin_path,
            uptimeSeconds=(now_ns - self._started_ns) / _SECOND_NS,
            configuration=configuration,
            attached=self._programs(attachments, packets),
            anomalies=[] if anomalies is None else _anomalies(anomalies, attachments),
            table=Table(
                flows={f"ipv{family.version}": len(report_all(family).living) for family in table.families},
                maxFlows=config.table.max_flows,
                octets=table.octets,
                payloadsLost=table.counters()["payloads_lost"][0],
            ),
            ledger=ledger_now(table).as_dict(),
            natEvents=None if nat_events is None else {name: getattr(nat_events, name) for name in NAT_EVENTS},
            exportedRecords={name: int(self._records[reason]) for reason, name in END_REASONS.items()},
            collectors=[{"protocol": each.protocol, **_collector_status(each, now_ns)} for each in collectors],
            lastSweep=self._last_sweep(now_ns),
            sweepDurations=self._sweeps.histogram(),
            sendDurations=self._sends.histogram(),
        )

    def _last_sweep(self, now_ns: int) -> Optional[Sweep]:
        if self._last is None:
            return None
        ended_ns, sweep = self._last
        return {**sweep, "ageSeconds": (now_ns - ended_ns) / _SECOND_NS}

    def _programs(self, attachments: Attachments, packets: Mapping[str, Packets]) -> List[AttachedProgram]:
        programs = []
        for key, attachment in sorted(attachments.items()):
            counted = _device_packets(packets, attachment)
            programs.append(
                AttachedProgram(
                    interface=attachment.point.interface.name,
                    ifindex=key[0],
                    direction=attachment.point.direction,
                    how=attachment.how,
                    devicePackets=None if counted is None else max(0, counted - self._at_attach.get(key, 0)),
                    order=[],
                )
            )
        return programs


def _anomalies(anomalies: Anomalies, attachments: Attachments) -> List[Anomaly]:
    """Of the Observation Points that are still there."""
    found = []
    for (ifindex, direction), attachment in sorted(attachments.items()):
        figures = anomalies.figures.get((ifindex, int(direction == "egress")), Figures())
        destinations, ports = figures.recent_destinations, figures.recent_ports
        found.append(
            Anomaly(
                interface=attachment.point.interface.name,
                direction=direction,
                unansweredFlows=figures.unanswered_flows,
                undersizedPackets=figures.undersized_packets,
                jumboPackets=figures.jumbo_packets,
                destinations=destinations.targets,
                destinationsSource=_address(destinations.source),
                ports=ports.targets,
                portsSource=_address(ports.source),
            )
        )
    return found


def _address(octets: bytes) -> str:
    return str(ip_address(octets)) if octets else ""


def _device_packets(packets: Mapping[str, Packets], attachment: Attachment) -> Optional[int]:
    counted = packets.get(attachment.point.interface.name)
    if counted is None:
        return None
    return counted.received if attachment.point.direction == "ingress" else counted.sent


def _collector_status(collector: Member, now_ns: int) -> Dict[str, Union[str, int, float, None]]:
    announced_ns = collector.announced_ns
    status = {_camel_case(name): value for name, value in collector.status().items()}
    return {**status, "templateAgeSeconds": None if announced_ns is None else (now_ns - announced_ns) / _SECOND_NS}


def _camel_case(name: str) -> str:
    return re.sub("_(.)", lambda found: found[1].upper(), name)


def ledger_now(table: FlowTable) -> Ledger:
    """The ledger under traffic: reading it takes a while, in which more packets are seen.

    So `seen` is asked before and after, and stands for the instant in between that fits the rest. What is
    missing then is missing, give or take the packets in flight; (0, 0) if there is such an instant.
    """
    ledger = read_ledger(table)
    after = table.counters()["seen"]
    became = [seen - missing for seen, missing in zip(ledger.seen, ledger.missing())]
    packets, octets = (min(max(rest, ledger.seen[i]), after[i]) for i, rest in enumerate(became))
    return replace(ledger, seen=(packets, octets))
