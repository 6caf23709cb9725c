# SPDX-License-Identifier: GPL-2.0-or-later
"""The exporter: metering and exporting in one loop. The only place where the parts meet.

    every tick:  signals, devices that came or went, how full the table is
    every sweep: what is due -> Data Records -> every Collector

A tick is short, so that a flood is met before the table is full; a sweep is only as often as configured.
"""

from __future__ import annotations

import logging
import select
import signal
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, Callable, Iterable, List, Optional, Tuple, TypeVar

from .accounts import Accounts
from .as_table import AsNumbers, AsTable, as_table_of
from .collectors import Collectors
from .config import Config
from .errors import FlowexpError
from .facts import facts_of
from .kernel import netlink
from .kernel.attach import Attacher, programs_for
from .kernel.joins import Join, joins_for
from .kernel.loader import loader_named
from .kernel.natevents import NatEvents
from .kernel.owners import handle_of
from .kernel.pins import PinFolder, TablePins
from .kernel.table import FlowTable
from .meter import Batch, MeteringProcess, read_ledger
from .protocol.options import Facts
from .publishing import Publishing
from .rates import Rates
from .reload import Reloads, read_again
from .service import Wakeup, give_memory_back, notify
from .status import Status
from .tables import Pinned, find_tables, new_table
from .transport.base import QuietLog, warnings_of

Loaded = TypeVar("Loaded")

_log = logging.getLogger(__name__)

_TICK_S = 0.1
_LONG_TICK_S = 0.2  # at rest ticks are most of what the exporter costs, and each costs what it takes to wake up
_SHORT_TICK_S = 0.01  # once half of max_flows are there, and what is left of them could come in a tick
_MOST_NEW_FLOWS_PER_S = 1_000_000
_PRESSURE = 0.95  # of max_flows: from here on a sweep does not wait for its time, and ends the idlest early


class Exporter:
    """Runs from start() to stop(); run() does both around the loop."""

    def __init__(self, config: Config, reload: Optional[Callable[[], Config]] = None) -> None:
        """reload: reads the configuration again; None: SIGHUP changes nothing."""
        self._config = config
        self._reload = reload or (lambda: config)
        self._timeouts = config.timeouts.for_sweep
        self._pins = PinFolder(config.table.pin_path)
        self._collectors = Collectors(self._facts)
        self._warn = QuietLog(warnings_of(__name__))
        self._stopping = self._reloading = False
        self._reloads = Reloads(time.monotonic_ns())
        self._recovered = False
        self._next_sweep_ns = 0  # boot time
        self._as_numbers = AsNumbers()
        self._joins: List[Join] = [self._as_numbers]
        self._older: List[Pinned] = []  # of earlier exporters, oldest first, whose flows are still to be exported
        self._meter: Optional[MeteringProcess] = None
        self._attacher: Optional[Attacher] = None
        self._accounts = Accounts(time.monotonic_ns())
        self._publishing = Publishing()
        self._nat_events: Optional[NatEvents] = None

    # Life cycle

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then everything is exported and taken away."""
        wakeup = Wakeup(
            {signal.SIGTERM: self._ask_to_stop, signal.SIGINT: self._ask_to_stop, signal.SIGHUP: self._ask_to_reload}
        )
        give_memory_back()
        try:
            self.start()
            notify("READY=1")
            self._loop(wakeup)
        finally:
            notify("STOPPING=1")
            self.stop()
            wakeup.close()

    def start(self) -> None:
        """Table, programs, Collectors, then the hooks; FlowexpError leaves nothing behind (call stop())."""
        config = self._config
        wanted = netlink.resolve_at_start(config.interfaces)
        if not wanted:
            _tell_absent(config)
        self._take_as_table(as_table_of(config.fields))
        self._joins += joins_for(config.fields.groups)
        self._pins.hold()
        self._older, goes_on = find_tables(self._pins, config, self._warn)
        if goes_on:
            _, table = self._older.pop()
        else:
            table = new_table(config, self._older[-1][1] if self._older else None)
        self._publishing.open(config)  # not before what may not be permitted at all
        self._meter = self._metering(config, table, programs_for(wanted, direction=config.direction, hook=config.hook))
        if not goes_on:
            self._pins.next_table().pin(table.fds)
        self._collectors.keep_in(table)
        self._collectors.configure(config)
        self._hear_of_nat(config)
        self._recover(self._meter)
        self._recovered = True
        self._keep_alive(self._meter, time.monotonic_ns())
        self._attacher = Attacher(
            self._meter.programs,
            self._meter.ingress_map,
            handle=handle_of(config.table.pin_path),
            direction=config.direction,
            hook=config.hook,
            xdp_force=config.xdp_force,
            pins=self._pins,
            persist=config.table.persist,
            skip_stacked=config.skip_stacked,
        )
        self._sample(self._meter, config)
        self._attach(self._attacher, wanted)
        while self._older:
            pins, old = self._older[0]
            meter = self._metering(config, old, ())
            self._recover(meter)
            self._end_table(pins, meter, self._older[1][1] if len(self._older) > 1 else table)
            del self._older[0]

    def stop(self) -> None:
        """Exports what is left and says how the ledger stands. What persists goes on metering; else it goes."""
        self._publishing.close()
        persists = self._config.table.persist and self._attacher is not None
        if self._attacher is not None and not persists:
            self._attacher.detach_all()
        if self._meter is not None and self._recovered:
            self._export(self._meter, self._meter.report() if persists else self._meter.drain())
            _log.info("%s", self._meter.ledger())
        if self._nat_events is not None:
            self._tell_nat_events(time.monotonic_ns())
            self._nat_events.close()
        if self._meter is not None:
            self._collectors.close()
            tables = [table for _, table in self._older] + [self._meter.table]
            left_packets = sum(read_ledger(table).in_table[0] for table in tables)
            self._meter.close()
            # After a start that failed these are an earlier exporter's.
            is_needed = left_packets or (not self._recovered and self._pins.has_links())
            if is_needed and not persists:
                _log.warning("%s: flows of %d packets are left for the next start", self._pins.path, left_packets)
            elif not persists:
                self._pins.clear()
        self._pins.release()

    # Tables

    def _metering(
        self, config: Config, table: FlowTable, programs: Tuple[str, ...], *, before: Optional[MeteringProcess] = None
    ) -> MeteringProcess:
        return MeteringProcess(
            table,
            loader=loader_named(config.loader),
            programs=programs,
            max_flows=config.table.max_flows,
            own_mark=config.export.mark,
            own_sockets=not config.export.mark,
            egress_once=config.direction == "once",
            pairs=config.pairs,
            before=before,
            joins=self._joins,
        )

    def _end_table(self, pins: TablePins, meter: MeteringProcess, successor: FlowTable) -> None:
        """Exports all of a table that no packet goes to any more, and unpins it. Its ledger goes on in the next one."""
        self._export(meter, meter.drain())
        successor.go_on_from(meter.table)
        _log.info("%s: %s", pins.path, meter.ledger())
        meter.close()
        pins.clear()

    def _recover(self, meter: MeteringProcess) -> None:
        """Exports what a killed exporter left half done; its last batch may then arrive twice."""
        doubtful = meter.table.journal.doubtful()
        if doubtful is not None and doubtful.records:
            _log.warning("the last exporter was stopped while sending: %d records may arrive twice", doubtful.records)
        self._export(meter, meter.recover())

    def _successor(self, wanted: Config) -> Optional[MeteringProcess]:
        """What will meter at the rate that is wanted, loaded and pinned; None where the rate stays."""
        assert self._attacher is not None
        before, after = self._config.sampling, wanted.sampling
        if before == after or before.rates == after.rates == Rates():
            return None
        running = self._running()
        points = [each.point.interface for each in self._attacher.attached.values()]
        programs = programs_for(points, direction=self._attacher.direction, hook=wanted.hook)
        table = new_table(wanted, running.table)
        pins = self._pins.next_table()
        successor: Optional[MeteringProcess] = None
        try:
            successor = self._meanwhile(partial(self._metering, wanted, table, programs, before=running))
            self._sample(successor, wanted)
            table.take_collectors(running.table)  # it has exported meanwhile
            pins.pin(table.fds)
        except FlowexpError:
            pins.clear()
            (successor or table).close()
            raise
        return successor

    def _meanwhile(self, load: Callable[[], Loaded]) -> Loaded:
        """What `load` returns. Verifier and AS table may take seconds: flows that are due do not wait for them."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            loading = pool.submit(load)
            while not wait([loading], timeout=self._tick_s()).done:
                self._tend(self._running())
        return loading.result()

    def _take_as_table(self, table: Optional[AsTable]) -> None:
        self._as_numbers.table = table
        if table is not None:
            _log.info("%s", table)

    def _give_up(self, successor: MeteringProcess) -> None:
        self._pins.tables()[-1].clear()
        successor.close()

    def _switch_to(self, successor: MeteringProcess) -> None:
        """Packets go to its table from now on. Flows of the one before are exported at the rate that they have."""
        assert self._attacher is not None
        before, pins = self._running(), self._pins.tables()[-2]
        self._keep_alive(successor, time.monotonic_ns())
        with self._collectors.moving_to(successor.table):
            self._attacher.replace(successor.programs, successor.ingress_map)
        successor.table.go_on_from(before.table)
        self._meter = successor
        self._end_table(pins, before, successor.table)

    def _facts(self) -> Facts:
        meter = self._running()
        return facts_of(self._config, meter.table, netlink.interfaces(), meter.anomalies)

    # Status

    def _snapshot(self) -> Status:
        assert self._attacher is not None
        return self._accounts.snapshot(
            config=self._config,
            table=self._running().table,
            anomalies=self._running().anomalies,
            attachments=self._attacher.attached,
            configuration=self._reloads.status(time.monotonic_ns()),
            nat_events=self._nat_events,
            collectors=self._collectors,
            packets=netlink.packets(),
            now_ns=time.monotonic_ns(),
        )

    # NAT events

    def _hear_of_nat(self, config: Config) -> None:
        """From now on, if that configuration says so. FlowexpError leaves all as it is."""
        if config.export.nat_events and self._nat_events is None:
            self._nat_events = NatEvents()
        elif not config.export.nat_events and self._nat_events is not None:
            self._nat_events.close()
            self._nat_events = None

    def _tell_nat_events(self, now_ns: int) -> None:
        if self._nat_events is None:
            return
        before = self._nat_events.overruns
        for columns in self._nat_events.read():
            self._collectors.send_events(columns, now_ns)
        if self._nat_events.overruns != before:
            self._warn("nat", "NAT events came faster than they could be read: some are lost (see status)")

    # The loop

    def _loop(self, wakeup: Wakeup) -> None:
        with netlink.LinkWatch() as watch:
            poll = select.poll()
            for source in (wakeup, watch, self._publishing.socket):
                if source is not None:
                    poll.register(source, select.POLLIN)
            self._next_sweep_ns = time.monotonic_ns() + self._config.timeouts.sweep_interval_ns
            while not self._stopping:
                wait_ns = max(0, min(self._next_sweep_ns - time.monotonic_ns(), int(self._tick_s() * 1e9)))
                if poll.poll(wait_ns / 1e6):  # mostly nobody calls, and asking each costs a third of a tick
                    wakeup.clear()
                    self._listen(watch)
                self._tend(self._running())

    def _listen(self, watch: netlink.LinkWatch) -> None:
        """Somebody has called: a signal, the kernel, or one who wants to know how things are."""
        if watch.changed():
            self._follow_interfaces()
        if self._reloading:
            self._reloading = False
            self._read_again()
            soonest_ns = time.monotonic_ns() + self._config.timeouts.sweep_interval_ns
            self._next_sweep_ns = min(self._next_sweep_ns, soonest_ns)
        self._publishing.answer(self._snapshot)

    def _tick_s(self) -> float:
        max_flows, flows = self._config.table.max_flows, self._running().flows_expected(time.monotonic_ns())
        room = max_flows - min(flows, max_flows)
        fills_up_s = room / _MOST_NEW_FLOWS_PER_S
        if room <= max_flows / 2 and fills_up_s <= _TICK_S:
            return _SHORT_TICK_S
        is_heard_from = self._nat_events is not None or self._running().names_flows
        return _TICK_S if is_heard_from else max(_TICK_S, min(fills_up_s, _LONG_TICK_S))

    def _tend(self, meter: MeteringProcess) -> None:
        """One tick's look at the table; a sweep, where it is time for one."""
        now_ns = time.monotonic_ns()
        meter.look()
        meter.fit(now_ns)
        self._collectors.probe(now_ns)
        self._tell_nat_events(now_ns)
        if now_ns >= self._next_sweep_ns or self._fullness(meter, now_ns) > _PRESSURE:
            self._keep_alive(meter, now_ns)
            self._sweep(meter, now_ns)
            period_ns = self._config.timeouts.sweep_interval_ns
            self._next_sweep_ns = max(self._next_sweep_ns + period_ns, time.monotonic_ns())
            notify("WATCHDOG=1")

    def _sweep(self, meter: MeteringProcess, now_ns: int) -> None:
        crowded = self._fullness(meter, now_ns) > _PRESSURE
        self._collectors.hurry(crowded)
        if meter.anomalies is not None and meter.anomalies.tick(now_ns):
            self._collectors.tell_changes()
        self._accounts.sweep_begins()
        self._export(meter, meter.sweep(self._timeouts, now_ns, is_crowded=crowded))
        self._accounts.sweep_ended(began_ns=now_ns, now_ns=time.monotonic_ns(), flows=meter.flows_swept)

    def _read_again(self) -> None:
        """The configuration as it is now in its file takes effect, or, with anything wrong in it, changes nothing."""
        assert self._attacher is not None
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        running = self._config
        try:
            wanted, need_restart = read_again(self._reload, running)
            as_table = self._meanwhile(partial(as_table_of, wanted.fields))
            successor = self._successor(wanted)
            try:
                self._collectors.configure(wanted)
                self._hear_of_nat(wanted)
                self._publishing.serve_metrics(wanted)
            except FlowexpError:
                self._hear_of_nat(running)
                if successor is not None:
                    self._give_up(successor)
                self._collectors.configure(running)
                raise
        except FlowexpError as error:
            self._reloads.refused(time.monotonic_ns(), str(error))
            _log.error("the configuration stays as it was: %s", error)
        else:
            self._take_as_table(as_table)
            if successor is not None:
                self._switch_to(successor)
            self._config, self._timeouts = wanted, wanted.timeouts.for_sweep
            self._running().pairs = wanted.pairs
            self._attacher.direction = wanted.direction
            self._attacher.skip_stacked = wanted.skip_stacked
            logging.getLogger(__package__).setLevel(wanted.log_level.upper())
            self._follow_interfaces()
            _tell_absent(wanted)
            self._export(self._running(), ())  # another rate is announced at once
            self._reloads.loaded(time.monotonic_ns(), need_restart)
            rest = f"; these need a restart: {', '.join(need_restart)}" if need_restart else ""
            _log.info("the configuration has been read again%s", rest)
        notify("READY=1")

    def _follow_interfaces(self) -> None:
        """Devices come and go; one that cannot be metered does not stop the others."""
        assert self._attacher is not None
        try:
            wanted = netlink.resolve(self._config.interfaces)
            self._sample(self._running(), self._config)
            self._attach(self._attacher, wanted)
        except FlowexpError as error:
            self._warn("attach", str(error))
        self._collectors.tell_changes()
        self._collectors.keep_sequence_numbers()

    def _sample(self, meter: MeteringProcess, config: Config) -> None:
        """Interfaces have their intervals, each before a packet of it is seen: it has been found before this."""
        meter.sample(netlink.first_of(config.sampling.by_interface))

    def _attach(self, attacher: Attacher, wanted: List[netlink.Interface]) -> None:
        before = netlink.packets()
        try:
            attacher.follow(wanted)
        finally:
            self._accounts.attached(attacher.attached, before)

    def _fullness(self, meter: MeteringProcess, now_ns: int) -> float:
        """How full the table will be in a moment, as a part of max_flows."""
        return meter.flows_expected(now_ns) / self._config.table.max_flows

    def _keep_alive(self, meter: MeteringProcess, now_ns: int) -> None:
        """Lets a packet path that outlives its exporter make flows for so much longer, and no longer."""
        limit_ns = self._config.table.no_exporter_ns
        persists = self._config.table.persist and limit_ns
        meter.table.set_control(deadline_ns=now_ns + limit_ns if persists else 0)

    def _export(self, meter: MeteringProcess, batches: Iterable[Batch]) -> None:
        """Sends what is due to every Collector. A batch is in the journal from before it goes out until it is done.

        Killed before done(), it goes out again, with the same Sequence Numbers or (the batch was sent whole) with
        the next ones. Killed in done(), the next exporter does the rest of that.
        """
        now_ns = time.monotonic_ns()
        self._collectors.tell_sampling(meter.table.rates)
        for batch in batches:
            if batch.records:
                began_ns = time.monotonic_ns()
                for interval, columns in batch.by_interval():
                    self._collectors.send(columns, interval, now_ns)
                self._accounts.sent(batch.columns["end_reason"], time.monotonic_ns() - began_ns)
                self._collectors.keep_sequence_numbers()
            batch.done()
        self._collectors.announce_if_due(now_ns)
        self._collectors.keep_sequence_numbers()

    def _running(self) -> MeteringProcess:
        if self._meter is None:
            raise RuntimeError("the exporter has not been started")
        return self._meter

    def _ask_to_stop(self, *_: Any) -> None:
        self._stopping = True

    def _ask_to_reload(self, *_: Any) -> None:
        self._reloading = True


def _tell_absent(config: Config) -> None:
    """A pattern for which there is no device may be a mistake."""
    with suppress(FlowexpError):  # devices come and go too fast to be listed: then nothing is certain
        absent = [pattern for pattern in config.interfaces if not netlink.resolve((pattern,))]
        if absent:
            _log.warning("interfaces %s: none is there yet; waiting for one", ", ".join(absent))
