# SPDX-License-Identifier: GPL-2.0-or-later
"""The Metering Process: a flow table, the packet path that fills it, and the sweep that empties it.

A sweep keeps the table's protocol (kernel/table.py): close what ends, wait one grace period,
free what the sweep before has retired, hand out what is due in batches. Whoever takes a batch
calls its done() when its Data Records are on their way; only then do the slots move on.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Callable, Iterator, Optional, Tuple

import numpy as np

from .kernel.flows import Columns, columns
from .kernel.journal import Entry
from .kernel.layout import Layout
from .kernel.loader import Loader, Prebuilt, object_path
from .kernel.table import Array, Family, FlowTable, auxiliary_maps, wait_grace_period
from .metering.ledger import Ledger
from .metering.sweep import ACTIVE, FORCED, Due, Timeouts, due, everything, report_all

# Above this part of max_flows the flows that have been idle longest end early, with reason 5.
_CROWDED = 0.9


@dataclass
class Batch:
    """Flows of one family that are due for Data Records; `columns` may have no row. It is in the journal.

    done(): these records are on their way (or are in a queue that outlives us); slots and ledger move on.
    """

    columns: Columns
    done: Callable[[], None]
    packets: int
    octets: int

    @property
    def records(self) -> int:
        return len(self.columns["packets"])


def unix_offset_ns() -> int:
    """Unix time less boot time (CLOCK_MONOTONIC), now."""
    return time.time_ns() - time.monotonic_ns()


def real_time_kernel() -> bool:
    """Whether programs on one CPU may interleave (PREEMPT_RT)."""
    try:
        with open("/sys/kernel/realtime", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


class MeteringProcess:
    """One table and the programs over it. unix_offset: added to the table's times, asked once a batch.

    loader: who makes the programs, and has made the table's layout; None: the prebuilt object.
    wait: returns when every program that was running has ended; None: the kernel's grace period.
    """

    def __init__(
        self,
        table: FlowTable,
        *,
        programs: Tuple[str, ...],
        max_flows: int,
        own_mark: int = 0,
        egress_once: bool = False,
        unix_offset: Callable[[], int] = unix_offset_ns,
        loader: Optional[Loader] = None,
        wait: Optional[Callable[[], None]] = None,
    ) -> None:
        self.table = table
        self._wait = wait or wait_grace_period
        self.flows_live = 0  # of the fuller family, at the last sweep
        self.flows_looked_at = 0  # of both, in the last sweep
        self._made_at_sweep = 0
        self._room_flows = int(max_flows * _CROWDED)
        self._batch_flows = table.layout.constants["JOURNAL_FLOWS"]  # of one family; bounds memory, too
        self._unix_offset = unix_offset
        settings = np.zeros(1, table.layout.structs["settings"])
        settings["secret"] = np.frombuffer(table.secret, np.uint64)
        for name in ("buckets4", "buckets6"):
            settings[name] = table.control(name)
        settings["own_mark"] = own_mark
        settings["egress_once"] = egress_once
        settings["fib_lookup"] = 1
        settings["atomic_counters"] = real_time_kernel()
        self._auxiliary = auxiliary_maps(table.layout)
        maps = {**table.fds, **self._auxiliary}
        self.programs = (loader or _prebuilt()).load(names=programs, maps=maps, settings=settings)

    @property
    def ingress_map(self) -> int:
        """Descriptor of the map of interfaces that are metered at ingress."""
        return self._auxiliary["ingress"]

    def close(self) -> None:
        """Drops programs, maps and memory; what is attached or pinned stays in the kernel."""
        self.programs.close()
        for fd in self._auxiliary.values():
            os.close(fd)
        self.table.close()

    def sweep(self, timeouts: Timeouts, now_ns: int) -> Iterator[Batch]:
        """What is due at `now_ns` of the table's clock. Batches must be taken, and done, in order."""
        return self._sweep(lambda family: due(family, timeouts, now_ns, room_flows=self._room_flows))

    def report(self) -> Iterator[Batch]:
        """An interim record of every flow that has not been reported in full; none ends."""
        return self._sweep(report_all)

    def drain(self) -> Iterator[Batch]:
        """Everything, ended with flowEndReason 4 (forced). No program may be attached any more."""
        self._wait()  # a program that was running when it was taken away may be making a flow
        return self._sweep(lambda family: everything(family, FORCED))

    def recover(self) -> Iterator[Batch]:
        """Puts right what a killed exporter left half done, and hands out the flows that it was ending.

        Before anything else is done with the table, and to the end. A batch that had been sent is settled first,
        while its slots are still as they were. One that may have been sent comes again: flows that were ending
        are CLOSING and come here, those that live on come in time.
        """
        if self.table.journal.to_settle():
            self.table.settle()
        for family in self.table.families:
            for slots in self._parts(family.recover()):
                yield self.left_closing(family, slots)
        self.table.journal.clear()

    def flows_made_since_sweep(self) -> int:
        """Flows that the packet path has made since the last sweep began."""
        return self.table.flows_created() - self._made_at_sweep

    def _sweep(self, what_is_due: Callable[[Family], Due]) -> Iterator[Batch]:
        self._made_at_sweep = self.table.flows_created()
        plans = [(family, what_is_due(family)) for family in self.table.families]
        self.flows_live = max(len(plan.living) for _, plan in plans)
        self.flows_looked_at = sum(len(plan.living) + len(plan.ending) for _, plan in plans)
        for family, plan in plans:
            family.close(plan.ending, plan.reasons)
        if any(len(plan.ending) or family.has_retired() for family, plan in plans):
            self._wait()
        for family, _ in plans:
            family.free_retired()
        for family, plan in plans:
            for slots, reasons in zip(self._parts(plan.ending), self._parts(plan.reasons)):
                yield self._ending(family, slots, reasons)
            for slots in self._parts(plan.active):
                yield self._active(family, slots)

    def _parts(self, flows: Array) -> Iterator[Array]:
        """As many at once as the journal has room for."""
        return (flows[first : first + self._batch_flows] for first in range(0, len(flows), self._batch_flows))

    def left_closing(self, family: Family, slots: Array) -> Batch:
        """Flows that a killed exporter was ending: their reasons are in the slots."""
        hot, _ = family.read(slots)
        shift = self.table.layout.constants["FLOW_REASON_SHIFT"]
        return self._ending(family, slots, (hot["ctl"] >> np.uint64(shift)).astype(np.uint8))

    def _ending(self, family: Family, slots: Array, reasons: Array) -> Batch:
        hot, cold = family.read(slots)
        carried = (hot["packets"] != cold["exported_packets"]) | (hot["octets"] != cold["exported_octets"])
        return self._batch(family, slots, hot, cold, reasons, carried, hot["last_ns"], ends=True)

    def _active(self, family: Family, slots: Array) -> Batch:
        """Interim records: only where both counters have grown, as they are not read at one instant."""
        hot, cold = family.read(slots)
        carried = (hot["packets"] > cold["exported_packets"]) & (hot["octets"] > cold["exported_octets"])
        end_ns = np.maximum(hot["last_ns"].view(np.int64), family.starts(slots)).view(np.uint64)
        reasons = np.full(len(slots), ACTIVE, np.uint8)
        return self._batch(family, slots, hot, cold, reasons, carried, end_ns, ends=False)

    def _batch(
        self, family: Family, slots: Array, hot: Array, cold: Array, reasons: Array, carried: Array, end_ns: Array,
        *, ends: bool,
    ) -> Batch:  # fmt: skip
        rows = np.flatnonzero(carried)
        carrying = (hot, cold) if len(rows) == len(slots) else (hot[rows], cold[rows])  # a copy is slow, and rare
        made = columns(
            family.version, *carrying, layout=self.table.layout, start_ns=family.starts(slots[rows]),
            reasons=reasons[rows], unix_offset_ns=self._unix_offset(),
        )  # fmt: skip
        packets, octets = (int(made[what].sum(dtype=np.uint64)) for what in ("packets", "octets"))
        before = self.table.exported()
        moving = slice(None) if ends else rows  # what ends moves on, with a record or without
        self.table.journal.begin(
            Entry(
                ip_version=family.version,
                ends=ends,
                records=len(rows),
                slots=slots[moving],
                packets=hot["packets"][moving],
                octets=hot["octets"][moving],
                end_ns=end_ns[moving],
                exported={
                    "packets": before["packets"] + packets,
                    "octets": before["octets"] + octets,
                    "records": before["records"] + len(rows),
                },
            )
        )

        def done() -> None:
            self.table.journal.sent()
            self.table.settle()

        return Batch(made, done, packets, octets)

    def ledger(self) -> Ledger:
        """Exact when no packet is in flight."""
        return read_ledger(self.table)


def read_ledger(table: FlowTable) -> Ledger:
    """The ledger of any table, one that another process sweeps included (then give or take what is in flight)."""
    counters = table.counters()
    in_table = [family.unexported() for family in table.families]
    exported = (table.control("exported_packets"), table.control("exported_octets"))
    total = (sum(packets for packets, _ in in_table), sum(octets for _, octets in in_table))
    return Ledger.from_counters(counters, exported=exported, in_table=total)


def new_table(max_flows: int, loader: Optional[Loader] = None) -> FlowTable:
    """An empty table of this version's layout."""
    return FlowTable.create(this_layout(loader), max_flows)


def this_layout(loader: Optional[Loader] = None) -> Layout:
    """The layout of the programs that `loader` makes; None: of the prebuilt object."""
    return (loader or _prebuilt()).layout()


def _prebuilt() -> Loader:
    return Prebuilt(object_path())
