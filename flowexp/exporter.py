# SPDX-License-Identifier: GPL-2.0-or-later
"""The exporter: metering and exporting in one loop. The only place where the parts meet.

    every tick:  signals, devices that came or went, how full the table is
    every sweep: what is due -> Data Records -> every Collector

A tick is short, so that a flood is met before the table is full; a sweep is only as often as configured.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from functools import partial
from typing import Any, Callable, Iterable, List, Optional, Tuple

from .accounts import Accounts
from .collector_url import CollectorUrl
from .config import Config
from .errors import FlowexpError
from .identity import observation_domain_id
from .kernel import netlink
from .kernel.attach import HOOK_PROGRAMS, Attacher
from .kernel.loader import loader_named
from .kernel.pins import PinFolder, TablePins
from .kernel.table import FlowTable, LayoutDiffers, buckets_for
from .meter import Batch, MeteringProcess, read_ledger, this_layout
from .metering.sweep import Timeouts
from .protocol.encoders import encoder_for
from .session import CollectorSession
from .status import Status, StatusSocket, ask, socket_path
from .transport.base import QuietLog, Transport, warnings_of
from .transport.file import FileTransport
from .transport.udp import MTU_OCTETS, UdpTransport

_log = logging.getLogger(__name__)

_TICK_S = 0.1
_SHORT_TICK_S = 0.01  # once half of max_flows are there: at 500,000 new flows a second 5,000 come meanwhile
_PRESSURE = 0.95  # of max_flows: from here on a sweep does not wait for its time, and ends the idlest early


def timeouts_of(config: Config) -> Timeouts:
    """The configured timeouts as the sweep takes them."""
    return Timeouts(
        idle_ns=config.timeouts.idle_ns,
        active_ns=config.timeouts.active_ns,
        linger_ns=config.timeouts.linger_ns,
    )


class Exporter:
    """Runs from start() to stop(); run() does both around the loop."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._timeouts = timeouts_of(config)
        self._pins = PinFolder(config.table.pin_path)
        self._sessions: List[CollectorSession] = []
        self._warn = QuietLog(warnings_of(__name__))
        self._stopping = False
        self._recovered = False
        self._meter: Optional[MeteringProcess] = None
        self._attacher: Optional[Attacher] = None
        self._accounts = Accounts(time.monotonic_ns())
        self._status: Optional[StatusSocket] = None

    # Life cycle

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then everything is exported and taken away."""
        wakeup = _Wakeup(self._ask_to_stop)
        try:
            self.start()
            _notify("READY=1")
            self._loop(wakeup)
        finally:
            _notify("STOPPING=1")
            self.stop()
            wakeup.close()

    def start(self) -> None:
        """Table, programs, Collectors, then the hooks; FlowexpError leaves nothing behind (call stop())."""
        config = self._config
        wanted = netlink.resolve_at_start(config.interfaces)
        if not wanted:
            _log.warning("interfaces %s: none is there yet; waiting for one", ", ".join(config.interfaces))
        self._pins.hold()
        self._offer_status()
        table, older, is_new = self._tables()
        self._meter = self._metering(table, HOOK_PROGRAMS)
        if is_new:
            self._pins.next_table().pin(table.fds)
        for number, collector in enumerate(config.collectors):
            self._sessions.append(self._session(number, collector.url))
        self._recover(self._meter)
        self._recovered = True
        self._keep_alive(self._meter, time.monotonic_ns())
        self._attacher = Attacher(
            self._meter.programs,
            self._meter.ingress_map,
            direction=config.direction,
            hook=config.hook,
            xdp_force=config.xdp_force,
            pins=self._pins,
            persist=config.table.persist,
        )
        self._attach(self._attacher, wanted)
        for pins, old in older:
            self._end_table(pins, old)

    def stop(self) -> None:
        """Exports what is left and says how the ledger stands. What persists goes on metering; else it goes."""
        if self._status is not None:
            self._status.close()
        persists = self._config.table.persist and self._attacher is not None
        if self._attacher is not None and not persists:
            self._attacher.detach_all()
        if self._meter is not None and self._recovered:
            self._export(self._meter, self._meter.report() if persists else self._meter.drain())
            _log.info("%s", self._meter.ledger())
        for session in self._sessions:
            _log.info("%s", _session_line(session))
            session.transport.close()
        if self._meter is not None:
            left_packets, _ = self._meter.ledger().in_table
            self._meter.close()
            # After a start that failed these are an earlier exporter's.
            is_needed = left_packets or (not self._recovered and self._pins.has_links())
            if is_needed and not persists:
                _log.warning("%s: flows of %d packets are left for the next start", self._pins.path, left_packets)
            elif not persists:
                self._pins.clear()
        self._pins.release()

    # Tables

    def _metering(self, table: FlowTable, programs: Tuple[str, ...]) -> MeteringProcess:
        config = self._config
        return MeteringProcess(
            table,
            loader=loader_named(config.loader),
            programs=programs,
            max_flows=config.table.max_flows,
            own_mark=config.export.mark,
            egress_once=config.direction == "once",
        )

    def _tables(self) -> Tuple[FlowTable, List[Tuple[TablePins, FlowTable]], bool]:
        """The table to meter into, and older ones whose flows are still to be exported.

        An earlier exporter's table is taken over if it has our layout and size. If not, a new one is made,
        to be pinned beside it: whatever happens until the programs have been swapped, both can be found.
        """
        layout, max_flows = this_layout(loader_named(self._config.loader)), self._config.table.max_flows
        found: List[Tuple[TablePins, FlowTable]] = []
        for pins in self._pins.tables():
            maps = pins.find_maps(FlowTable.map_names(layout))
            try:
                if maps is not None:
                    found.append((pins, FlowTable.adopt(layout, maps)))
                    continue
                self._warn("pins", f"{pins.path}: not a whole table; removed")
            except LayoutDiffers as error:
                self._warn("layout", f"{pins.path}: {error}; what it holds cannot be exported")
            pins.clear()
        if found and found[-1][1].buckets == buckets_for(max_flows, layout):
            return found[-1][1], found[:-1], False
        table = FlowTable.create(layout, max_flows)
        if found:
            for number in range(table.collectors):
                table.set_sequence(number, found[-1][1].sequence(number))
        return table, found, True

    def _end_table(self, pins: TablePins, table: FlowTable) -> None:
        """Exports all of a table that no packet goes to any more, and unpins it."""
        meter = self._metering(table, ())
        self._recover(meter)
        self._export(meter, meter.drain())
        _log.info("%s: %s", pins.path, meter.ledger())
        meter.close()
        pins.clear()

    def _recover(self, meter: MeteringProcess) -> None:
        """Exports what a killed exporter left half done; its last batch may then arrive twice."""
        records = meter.table.journal.records_in_doubt()
        if records:
            _log.warning("the last exporter was stopped while sending: %d records may arrive twice", records)
        self._export(meter, meter.recover())

    # Collectors

    def _session(self, number: int, url: CollectorUrl) -> CollectorSession:
        export = self._config.export
        transport: Transport
        if url.transport == "file":
            transport = FileTransport(url.path)
        else:
            transport = UdpTransport(
                url.host,
                url.port,
                mtu_octets=export.mtu or MTU_OCTETS,
                source_port=export.source_port or None,
                mark=export.mark,
            )
        transport.open()
        encoder = encoder_for(
            url.protocol,
            observation_domain_id=observation_domain_id(export.observation_domain_id),
            max_message_octets=transport.max_message_octets(),
            tcp_control_bits_octets=export.tcp_control_bits_octets,
            sequence_number=self._running().table.sequence(number),
        )
        return CollectorSession(transport, encoder, refresh_ns=export.template_refresh_ns)

    # Status and metrics

    def _offer_status(self) -> None:
        """Makes the status socket, and the metrics endpoint where one is configured."""
        pin_path, address = self._config.table.pin_path, self._config.metrics.address
        try:
            self._status = StatusSocket(pin_path)
        except OSError as error:
            reason = error.strerror or error
            _log.warning("%s: %s; there will be no status and no metrics", socket_path(pin_path), reason)
        if address is not None:
            from .metrics import serve  # a library that not everybody has

            serve(address, partial(ask, pin_path))

    def _snapshot(self) -> Status:
        assert self._attacher is not None
        return self._accounts.snapshot(
            config=self._config,
            table=self._running().table,
            attachments=self._attacher.attached,
            sessions=self._sessions,
            packets=netlink.packets(),
            now_ns=time.monotonic_ns(),
        )

    # The loop

    def _loop(self, wakeup: _Wakeup) -> None:
        meter, interval_ns = self._running(), self._config.timeouts.sweep_interval_ns
        with netlink.LinkWatch() as watch:
            poll = select.poll()
            for source in (wakeup, watch, self._status):
                if source is not None:
                    poll.register(source, select.POLLIN)
            next_sweep_ns = time.monotonic_ns() + interval_ns
            while not self._stopping:
                tick_s = _TICK_S if self._fullness(meter) < 0.5 else _SHORT_TICK_S
                wait_ns = max(0, min(next_sweep_ns - time.monotonic_ns(), int(tick_s * 1e9)))
                poll.poll(wait_ns / 1e6)
                wakeup.clear()
                if watch.changed():
                    self._follow_interfaces()
                if self._status is not None:
                    self._status.answer(self._snapshot)
                now_ns = time.monotonic_ns()
                if now_ns >= next_sweep_ns or self._fullness(meter) > _PRESSURE:
                    self._keep_alive(meter, now_ns)
                    self._sweep(meter, now_ns)
                    next_sweep_ns = max(next_sweep_ns + interval_ns, time.monotonic_ns())
                    _notify("WATCHDOG=1")

    def _sweep(self, meter: MeteringProcess, now_ns: int) -> None:
        crowded = self._fullness(meter) > _PRESSURE
        for session in self._sessions:
            session.transport.hurry(crowded)
        self._accounts.sweep_begins()
        self._export(meter, meter.sweep(self._timeouts, now_ns))
        self._accounts.sweep_ended(began_ns=now_ns, now_ns=time.monotonic_ns(), flows=meter.flows_looked_at)

    def _follow_interfaces(self) -> None:
        """Devices come and go; one that cannot be metered does not stop the others."""
        assert self._attacher is not None
        try:
            self._attach(self._attacher, netlink.resolve(self._config.interfaces))
        except FlowexpError as error:
            self._warn("attach", str(error))

    def _attach(self, attacher: Attacher, wanted: List[netlink.Interface]) -> None:
        before = netlink.packets()
        try:
            attacher.follow(wanted)
        finally:
            self._accounts.attached(attacher.attached, before)

    def _fullness(self, meter: MeteringProcess) -> float:
        """Flows, as a part of max_flows, if all that were made since the last sweep were of one family."""
        return (meter.flows_live + meter.flows_made_since_sweep()) / self._config.table.max_flows

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
        for batch in batches:
            if batch.records:
                export_time_s = -(-time.time_ns() // 1_000_000_000)  # rounded up: no flow ends after it
                began_ns = time.monotonic_ns()
                for session in self._sessions:
                    self._attempt(partial(session.send, batch.columns, now_ns, export_time_s))
                self._accounts.sent(batch.columns["end_reason"], time.monotonic_ns() - began_ns)
                self._keep_sequence_numbers()
            batch.done()
        for session in self._sessions:
            self._attempt(partial(session.announce_if_due, now_ns, -(-time.time_ns() // 1_000_000_000)))
        self._keep_sequence_numbers()

    def _keep_sequence_numbers(self) -> None:
        """In the table that packets go to, whichever is being exported: there the next exporter looks."""
        table = self._running().table
        for number, session in enumerate(self._sessions):
            table.set_sequence(number, session.sequence_number)

    def _attempt(self, send: Callable[[], None]) -> None:
        """What one Collector's path does not allow must not stop the others."""
        try:
            send()
        except FlowexpError as error:
            self._warn("collector", str(error))

    def _running(self) -> MeteringProcess:
        if self._meter is None:
            raise RuntimeError("the exporter has not been started")
        return self._meter

    def _ask_to_stop(self, *_: Any) -> None:
        self._stopping = True


def detach(config: Config) -> None:
    """Takes everything out of the kernel that an exporter with persist has left: programs, table, flows."""
    pins = PinFolder(config.table.pin_path)
    pins.hold()
    layout = this_layout(loader_named(config.loader))
    for pinned in pins.tables():
        maps = pinned.find_maps(FlowTable.map_names(layout))
        try:
            if maps is not None:
                _log.info("%s: %s", pinned.path, read_ledger(FlowTable.adopt(layout, maps)))
        except LayoutDiffers as error:
            _log.info("%s: %s", pinned.path, error)
    netlink.remove_filters()
    pins.clear()
    socket_path(config.table.pin_path).unlink(missing_ok=True)  # a killed exporter's
    pins.release()


class _Wakeup:
    """Lets a signal end a poll: Python writes each signal's number to a socket."""

    def __init__(self, on_stop: Any) -> None:
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_stop)

    def fileno(self) -> int:
        return self._read.fileno()

    def clear(self) -> None:
        try:
            self._read.recv(4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._read.close()
        self._write.close()


def _session_line(session: CollectorSession) -> str:
    """What became of one Collector's Messages, for the log."""
    status = session.status()
    lost = f", {status['flows_not_representable']} flows not representable" if status["flows_not_representable"] else ""
    return (
        f"{status['collector']}: {status['state']}, {status['messages_sent']} Messages with"
        f" {status['records_sent']} Data Records sent, {status['records_failed']} Data Records not sent{lost}"
    )


def _notify(state: str) -> None:
    """Tells the service manager (sd_notify(3)), if it asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    path = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.sendto(state.encode(), socket.MSG_DONTWAIT, path)  # one that does not read must not stop us
    except BlockingIOError:
        pass
    except OSError as error:
        _log.warning("NOTIFY_SOCKET %s: %s", address, error.strerror)
