# SPDX-License-Identifier: GPL-2.0-or-later
"""The Metering Process: a flow table, the packet path that fills it, and the sweep that empties it.

A sweep keeps the slots' protocol (kernel/family.py): close what ends, wait one grace period,
free what the sweep before has retired, hand out what is due in batches. Whoever takes a batch
calls its done() when its Data Records are on their way; only then do the slots move on.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Mapping, Optional, Tuple

import numpy as np

from .errors import FlowexpError
from .kernel.drops import DropWatch
from .kernel.family import Family
from .kernel.features import has_coarse_clock, has_hardware_times
from .kernel.flows import Columns, columns, record_starts
from .kernel.grace import wait_grace_period
from .kernel.joins import Join
from .kernel.journal import Entry
from .kernel.layout import Array, Layout
from .kernel.loader import Loader, Prebuilt, Programs, object_path
from .kernel.payloads import Naming
from .kernel.replay import Replay
from .kernel.samplers import Samplers
from .kernel.table import FlowTable, auxiliary_maps
from .metering.anomalies import Anomalies
from .metering.biflow import together
from .metering.fitting import Fitting
from .metering.ledger import Ledger
from .metering.sweep import ACTIVE, FORCED, LACK_OF_RESOURCES, Due, Timeouts, due, everything, report_all
from .rates import Rates

# Above these parts of max_flows the flows that have been idle longest end early, with reason 5.
_ROOM, _ROOM_IN_A_FLOOD = 0.9, 0.75
_SOON_NS = 100_000_000


@dataclass
class Batch:
    """Flows of one family that are due for Data Records; `columns` may have no row. It is in the journal.

    done(): these records are on their way (or are in a queue that outlives us); slots and ledger move on.
    """

    columns: Columns
    done: Callable[[], None]
    packets: int
    octets: int
    intervals: Array
    """Of each row: the sampling interval that its interface has for itself; 0: none, the table's first holds."""

    @property
    def records(self) -> int:
        return len(self.columns["packets"])

    def by_interval(self) -> Iterator[Tuple[int, Columns]]:
        """The rows of each of `intervals`, if there are any."""
        if not self.intervals.any():  # nearly always, and nothing needs to be sorted
            yield 0, self.columns
            return
        for interval in np.unique(self.intervals):
            rows = np.flatnonzero(self.intervals == interval)
            is_all = len(rows) == self.records
            yield int(interval), self.columns if is_all else {name: each[rows] for name, each in self.columns.items()}


def unix_offset_ns() -> int:
    """Unix time less boot time (CLOCK_MONOTONIC), now."""
    looks = []
    for _ in range(3):  # another process may run between two looks at clocks: the quickest is right
        before_ns, unix_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        looks.append((after_ns - before_ns, unix_ns - before_ns))
    return min(looks)[1]


def real_time_kernel() -> bool:
    """Whether programs on one CPU may interleave (PREEMPT_RT)."""
    try:
        with open("/sys/kernel/realtime", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


class MeteringProcess:
    """One table and the programs over it. unix_offset: added to the table's times, asked once a batch.

    own_mark, own_sockets: own packets are known by the mark, or by the sockets that the table's control names.
    before: whose programs these replace while packets pass; they go on with its fragments and ingress interfaces.
    pairs: whether both directions of a conversation have their records together (metering/biflow.py).
    joins: what the kernel is asked about flows that are due (kernel/joins.py).
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
        own_sockets: bool = False,
        egress_once: bool = False,
        pairs: bool = False,
        before: Optional[MeteringProcess] = None,
        unix_offset: Callable[[], int] = unix_offset_ns,
        joins: Iterable[Join] = (),
        loader: Optional[Loader] = None,
        wait: Optional[Callable[[], None]] = None,
    ) -> None:
        self.table = table
        self.pairs = pairs
        self._wait = wait or wait_grace_period
        self.flows_live = 0  # of the fuller family, at the last sweep
        self.flows_swept = 0  # of both, in the last sweep, asleep or not
        self._fittings = [Fitting(family.slots) for family in table.families]
        self._made_at_sweep = 0
        self._swept_ns = 0
        self._timeouts: Optional[Timeouts] = None  # of the last sweep
        self._waiting = ThreadPoolExecutor(1, "grace")
        self._grace: Optional[Future[None]] = None
        self._retired = 0  # when that one began
        self._max_flows = max_flows
        self._batch_flows = table.layout.constants["JOURNAL_FLOWS"]  # of one family; bounds memory, too
        self._unix_offset = unix_offset
        self._joins = tuple(joins)
        settings = np.zeros(1, table.layout.structs["settings"])
        settings["secret"] = np.frombuffer(table.secret, np.uint64)
        for name in ("buckets4", "buckets6"):
            settings[name] = table.control(name)
        settings["own_mark"] = own_mark
        settings["own_sockets"] = own_sockets
        rates = table.rates
        settings["sampling_interval"] = rates.intervals[0]
        settings["sampling_by_interface"] = bool(rates.own)
        settings["sampling"] = rates != Rates()
        settings["sampling_random"] = rates.is_random
        self._own_intervals = np.array([0, *rates.own], np.uint32)  # by a flow's `rate`
        settings["egress_once"] = egress_once
        settings["fib_lookup"] = 1
        settings["atomic_counters"] = real_time_kernel()
        settings["no_coarse_clock"] = not _has(has_coarse_clock)
        settings["hardware_times"] = "timing" in table.groups and _has(has_hardware_times)
        settings["groups"] = table.control("groups") & ~table.layout.constants["GROUP_DROPS"]  # not the packet path's
        settings["hash_of_more"] = bool(rates.own) or "tunnels" in table.groups
        self._auxiliary = auxiliary_maps(
            table.layout,
            table.control("groups"),
            samples_by_interface=bool(rates.own),
            replays="replay" in programs,
        )
        try:
            self._load(loader or _prebuilt(), programs, settings, before)
        except FlowexpError:
            self._close_auxiliary()
            raise
        # Of a conversation that is sampled nobody knows whether it was answered.
        is_whole = programs and "integrity" in table.groups and rates == Rates()
        self.anomalies = Anomalies(table.families) if is_whole else None
        """Where the field group `integrity` is on."""

    def _load(
        self, loader: Loader, programs: Tuple[str, ...], settings: Array, before: Optional[MeteringProcess]
    ) -> None:
        table = self.table
        self._samplers = Samplers(self._auxiliary["samplers"], table.layout, table.rates)
        if before is not None:
            for name in ("fragments", "ingress"):  # what depends on no table
                os.dup2(before._auxiliary[name], self._auxiliary[name], inheritable=False)
        maps = {**table.fds, **self._auxiliary}
        self.programs = Programs(loader, names=programs, maps=maps, settings=settings)
        is_live = bool({*programs} - {"replay"})
        try:
            self._drops = DropWatch(maps, settings) if is_live and "drops" in table.groups else None
        except FlowexpError:
            self.programs.close()
            raise
        is_named = programs and "application" in table.groups
        self._naming = Naming(self._auxiliary["payloads"], table.layout, table.families) if is_named else None

    @property
    def ingress_map(self) -> int:
        """Descriptor of the map of interfaces that are metered at ingress."""
        return self._auxiliary["ingress"]

    def sample(self, intervals: Mapping[int, int]) -> None:
        """Interfaces, by ifindex, that have another of the table's sampling intervals than its first."""
        self._samplers.follow(intervals)

    def replay(self) -> Replay:
        """Where a capture's frames go in, if the program `replay` is one of ours."""
        return Replay(self.table, self.programs["replay"], self._auxiliary["captured"])

    def close(self) -> None:
        """Drops programs, maps and memory; what is attached or pinned stays in the kernel."""
        self._watch_no_drops()
        self._waiting.shutdown()
        self.programs.close()
        self._close_auxiliary()
        self.table.close()

    def _close_auxiliary(self) -> None:
        for fd in self._auxiliary.values():
            os.close(fd)

    def _watch_no_drops(self) -> None:
        if self._drops is not None:
            self._drops.close()
            self._drops = None

    def sweep(self, timeouts: Timeouts, now_ns: int, *, is_crowded: bool = False) -> Iterator[Batch]:
        """What is due at `now_ns` of the table's clock. Batches must be taken, and done, in order.

        is_crowded: new flows come so fast that there has to be more room than usual.
        """
        self._swept_ns = now_ns
        if timeouts != self._timeouts:
            self._timeouts = timeouts
            for family in self.table.families:
                family.wake_all(now_ns)
        room_flows = int(self._max_flows * (_ROOM_IN_A_FLOOD if is_crowded else _ROOM))
        return self._sweep(lambda family: due(family, timeouts, now_ns, room_flows=room_flows))

    @property
    def names_flows(self) -> bool:
        """Whether look() has anything to do."""
        return self._naming is not None

    def look(self) -> None:
        """Names flows by the payloads that have come (kernel/payloads.py): before their ring is full, and by itself
        in each sweep. Nothing, where nobody asks for names."""
        if self._naming is not None:
            self._naming.look()

    def fit(self, now_ns: int) -> None:
        """Lets packets use as much of the table as its flows need (metering/fitting.py): before each sweep, and
        whenever it fills. Without it all that the table began with is used.

        How many flows have come since the last sweep is known, of both families together; where that would be
        too many for one, its flows are counted.
        """
        made = self.flows_made_since_sweep()
        for family, fitting in zip(self.table.families, self._fittings):
            extent, flows = family.extent, self.flows_live + made
            if fitting.is_crowded(flows, extent.slots):
                flows = len(family.occupied())
            slots = family.slots if extent.is_overrun() else fitting.slots(flows, extent.slots, now_ns)
            if slots > extent.slots or slots < extent.slots and not extent.before:
                extent.change(slots, self._wait)
            extent.settle(self._wait)

    def report(self) -> Iterator[Batch]:
        """An interim record of every flow that has not been reported in full; none ends."""
        self._search_all()
        return self._sweep(report_all)

    def drain(self) -> Iterator[Batch]:
        """Everything, ended with flowEndReason 4 (forced). No program may be attached any more."""
        self._watch_no_drops()  # another table's may have begun
        self._wait()  # a program that was running when it was taken away may be making a flow
        self._search_all()
        return self._sweep(lambda family: everything(family, FORCED))

    def recover(self) -> Iterator[Batch]:
        """Puts right what a killed exporter left half done, and hands out the flows that it was ending.

        Before anything else is done with the table, and to the end. A batch that had been sent is settled first,
        while its slots are still as they were. One that may have been sent comes again, record by record as it was,
        however its flows have grown: who has a record already has an equal one. Killed meanwhile, the next exporter
        finds it in the journal as this one did.
        """
        if self.table.journal.to_settle():
            self.table.settle()
        doubtful = self.table.journal.doubtful()
        closing = {family.version: family.recover() for family in self.table.families}
        if doubtful is not None:
            closing[doubtful.ip_version] = np.setdiff1d(closing[doubtful.ip_version], doubtful.slots)
            yield self._again(doubtful)
        for family in self.table.families:
            for slots in self._parts(closing[family.version]):
                yield self.left_closing(family, slots)

    def _search_all(self) -> None:
        for family in self.table.families:
            family.extent.searched = family.slots

    def flows_expected(self, now_ns: int) -> int:
        """Flows that there will be in a tenth of a second, if none ends and the new ones are all of the fuller
        family: a sweep may take so long."""
        made, elapsed_ns = self.flows_made_since_sweep(), max(now_ns - self._swept_ns, _SOON_NS)
        return self.flows_live + made + made * _SOON_NS // elapsed_ns

    def flows_made_since_sweep(self) -> int:
        """Flows that the packet path has made since the last sweep began."""
        return self.table.flows_created() - self._made_at_sweep

    def _sweep(self, what_is_due: Callable[[Family], Due]) -> Iterator[Batch]:
        self._made_at_sweep = self.table.flows_created()
        plans = [(family, what_is_due(family)) for family in self.table.families]
        if self.pairs:
            plans = [(family, together(family, plan)) for family, plan in plans]
        if self.anomalies is not None:
            for family, plan in plans:
                self.anomalies.look(family, plan)
        self.flows_live = max(len(plan.living) for _, plan in plans)
        self.flows_swept = sum(len(plan.living) + len(plan.ending) for _, plan in plans)
        for family, plan in plans:
            family.close(plan.ending, plan.reasons)
        if any(len(plan.ending) or family.retired for family, plan in plans):
            self._wait()
        self.look()  # behind the grace period: of flows that end, all payloads there are
        for family, _ in plans:
            family.free_retired()
        for family, plan in plans:
            is_crowded = LACK_OF_RESOURCES in plan.reasons
            for slots, reasons in zip(self._parts(plan.ending), self._parts(plan.reasons)):
                yield self._ending(family, slots, reasons)
                if is_crowded:  # new flows cannot wait for the next sweep
                    self._give_back(family)
            self._grace = None
            for slots in self._parts(plan.active):
                yield self._active(family, slots)

    def _give_back(self, family: Family) -> None:
        """Frees what had retired when the last grace period began, once it is over, and has another one begin.

        It passes in a thread while records are made: it takes as long as thousands of them.
        """
        if self._grace is not None:
            if not self._grace.done():
                return
            self._grace.result()
            family.free_retired(self._retired)
        self._retired, self._grace = family.retired, self._waiting.submit(self._wait)

    def _parts(self, flows: Array) -> Iterator[Array]:
        """As many at once as the journal has room for."""
        return (flows[first : first + self._batch_flows] for first in range(0, len(flows), self._batch_flows))

    def left_closing(self, family: Family, slots: Array) -> Batch:
        """Flows that a killed exporter was ending: their reasons are in the slots."""
        hot, _ = family.read(slots)
        return self._ending(family, slots, self._reasons(hot))

    def _reasons(self, hot: Array) -> Array:
        """flowEndReason of each of these slots, which are CLOSING."""
        reasons: Array = (hot["ctl"] >> np.uint64(self.table.layout.constants["FLOW_REASON_SHIFT"])).astype(np.uint8)
        return reasons

    def _ending(self, family: Family, slots: Array, reasons: Array) -> Batch:
        hot, cold = family.read(slots)
        return self._batch(family, slots, hot, cold, reasons, _not_all_exported(hot, cold), hot["last_ns"], ends=True)

    def _active(self, family: Family, slots: Array) -> Batch:
        """Interim records: only where both counters have grown, as they are not read at one instant."""
        hot, cold = family.read(slots)
        carried = (hot["packets"] > cold["exported_packets"]) & (hot["octets"] > cold["exported_octets"])
        end_ns = np.maximum(hot["last_ns"].view(np.int64), record_starts(cold)).view(np.uint64)
        reasons = np.full(len(slots), ACTIVE, np.uint8)
        return self._batch(family, slots, hot, cold, reasons, carried, end_ns, ends=False)

    def _batch(
        self, family: Family, slots: Array, hot: Array, cold: Array, reasons: Array, carried: Array, end_ns: Array,
        *, ends: bool,
    ) -> Batch:  # fmt: skip
        rows = np.flatnonzero(carried)
        moving = slice(None) if ends else rows  # what ends moves on, with a record or without
        batch = self._made(family, slots, hot, cold, reasons, rows, ends=ends)
        before = self.table.exported()
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
                    "packets": before["packets"] + batch.packets,
                    "octets": before["octets"] + batch.octets,
                    "records": before["records"] + batch.records,
                },
            )
        )
        return batch

    def _again(self, entry: Entry) -> Batch:
        """The batch that is in the journal, which stays as it is: what its records carried then they carry now."""
        family = next(family for family in self.table.families if family.version == entry.ip_version)
        hot, cold = family.read(entry.slots)
        hot["packets"], hot["octets"], hot["last_ns"] = entry.packets, entry.octets, entry.end_ns
        rows = np.flatnonzero(_not_all_exported(hot, cold))
        reasons = self._reasons(hot) if entry.ends else np.full(len(hot), ACTIVE, np.uint8)
        return self._made(family, entry.slots, hot, cold, reasons, rows, ends=entry.ends)

    def _made(
        self, family: Family, slots: Array, hot: Array, cold: Array, reasons: Array, rows: Array, *, ends: bool
    ) -> Batch:
        """The Data Records of these rows of the slots; the journal is the caller's."""
        carrying = (hot, cold) if len(rows) == len(slots) else (hot[rows], cold[rows])  # a copy is slow, and rare
        groups = family.groups.read(slots[rows])
        made = columns(
            family.version, *carrying, groups=groups, layout=self.table.layout,
            reasons=reasons[rows], unix_offset_ns=self._unix_offset(),
        )  # fmt: skip
        if self.anomalies is not None:
            self.anomalies.count(made)
        for join in self._joins:
            made = join(made)
        packets, octets = (int(made[what].sum(dtype=np.uint64)) for what in ("packets", "octets"))

        def done() -> None:
            self.table.journal.sent()
            if not ends:  # not in the journal: after a kill in here the next record carries these counts again
                family.groups.mark_exported(slots[rows], groups)
            self.table.settle()

        return Batch(made, done, packets, octets, self._own_intervals[carrying[1]["rate"]])

    def ledger(self) -> Ledger:
        """Exact when no packet is in flight."""
        return read_ledger(self.table)


def read_ledger(table: FlowTable) -> Ledger:
    """The ledger of any table, one that another process sweeps included (then give or take what is in flight)."""
    counters = table.counters()
    in_table = [family.unexported() for family in table.families]
    total = (sum(packets for packets, _ in in_table), sum(octets for _, octets in in_table))
    return Ledger.from_counters(counters, exported=table.exported_ever(), in_table=total)


def new_table(
    max_flows: int, loader: Optional[Loader] = None, groups: Iterable[str] = (), *, begin_small: bool = False
) -> FlowTable:
    """An empty table of this version's layout, with room for these field groups."""
    return FlowTable.create(this_layout(loader), max_flows, groups, begin_small=begin_small)


def this_layout(loader: Optional[Loader] = None) -> Layout:
    """The layout of the programs that `loader` makes; None: of the prebuilt object."""
    return (loader or _prebuilt()).layout()


def _not_all_exported(hot: Array, cold: Array) -> Array:
    """Of each flow: whether it has anything for a Data Record to carry."""
    left: Array = (hot["packets"] != cold["exported_packets"]) | (hot["octets"] != cold["exported_octets"])
    return left


def _has(feature: Callable[[], bool]) -> bool:
    try:
        return feature()
    except OSError:  # not permitted: loading the programs says so
        return True


def _prebuilt() -> Loader:
    return Prebuilt(object_path())
