# SPDX-License-Identifier: GPL-2.0-or-later
"""The replay program with field groups on, in this process: packets in, flows with all their columns out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import in_process
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from flowexp.kernel.flows import Columns
from flowexp.meter import MeteringProcess, new_table
from flowexp.metering.sweep import Timeouts

START_NS = 1_700_000_000_000_000_000
MAX_FLOWS = 64
_LONG_NS = dict.fromkeys(("tcp", "udp", "icmp", "other"), 10**18)
NEVER_IDLE_ALWAYS_ACTIVE = Timeouts(
    idle_ns=_LONG_NS, active_ns=dict.fromkeys(("tcp", "udp", "icmp", "other"), 0), linger_ns=10**18
)


class Meter:
    """The replay program with some field groups on."""

    def __init__(self, groups: Sequence[str], *, max_flows: int = MAX_FLOWS) -> None:
        self.process = MeteringProcess(
            new_table(max_flows, groups=groups), programs=("replay",), max_flows=max_flows, unix_offset=lambda: 0
        )
        self._replay = in_process.Feed(self.process)
        self._now_ns = START_NS

    def feed(self, packet: Packet, *, after_ns: int = 0) -> None:
        """One packet, so long after the one before."""
        self._now_ns += after_ns
        frame = bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / packet)
        self.feed_frame(frame, wire_octets=len(frame))

    def feed_frame(self, frame: bytes, *, wire_octets: int) -> None:
        """A frame as a capture has it: what was cut off is in `wire_octets` alone."""
        self._replay.feed(frame, time_ns=self._now_ns, wire_octets=wire_octets)

    @property
    def now_ns(self) -> int:
        """When the last packet came."""
        return self._now_ns

    def wait(self, time_ns: int) -> None:
        """Nothing comes for so long."""
        self._now_ns += time_ns

    def sweep(self, timeouts: Timeouts) -> list[dict[str, Any]]:
        """What is due by now."""
        return self._flows(self.process.sweep(timeouts, self._now_ns))

    def interim(self) -> list[dict[str, Any]]:
        """A record of each flow that has grown; the flows go on."""
        return self._flows(self.process.sweep(NEVER_IDLE_ALWAYS_ACTIVE, self._now_ns))

    def drain(self) -> list[dict[str, Any]]:
        """The last record of each flow, in order of their source addresses."""
        return self._flows(self.process.drain())

    @staticmethod
    def _flows(batches: Any) -> list[dict[str, Any]]:
        found = []
        for batch in batches:
            found += list(rows_of(batch.columns))
            batch.done()
        return sorted(found, key=lambda flow: bytes(flow["src_addr"]))


def rows_of(columns: Columns) -> Iterator[dict[str, Any]]:
    for row in range(len(columns["packets"])):
        yield {name: column[row].tolist() for name, column in columns.items()}
