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
from typing import Any, Iterable, List, Optional

from .collector_url import CollectorUrl
from .config import Config
from .errors import FlowexpError
from .identity import observation_domain_id
from .kernel import netlink
from .kernel.attach import HOOK_PROGRAMS, Attacher
from .kernel.pins import PinFolder
from .kernel.table import FlowTable, LayoutDiffers, buckets_for
from .meter import Batch, MeteringProcess, this_layout
from .metering.sweep import Timeouts
from .protocol.ipfix import MessageEncoder
from .protocol.template import default_templates
from .session import CollectorSession
from .transport.base import QuietLog, Transport, warnings_of
from .transport.file import FileTransport
from .transport.udp import MTU_OCTETS, UdpTransport

_log = logging.getLogger(__name__)

_TICK_S = 0.1
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
        self._batch_number = 0
        self._meter: Optional[MeteringProcess] = None
        self._attacher: Optional[Attacher] = None

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
        table = self._table()
        self._meter = MeteringProcess(
            table,
            programs=HOOK_PROGRAMS,
            max_flows=config.table.max_flows,
            own_mark=config.export.mark,
            egress_once=config.direction == "once",
        )
        for number, collector in enumerate(config.collectors):
            self._sessions.append(self._session(number, collector.url))
        self._recover()
        self._attacher = Attacher(
            self._meter.programs,
            table.fds["ingress"],
            direction=config.direction,
            hook=config.hook,
            xdp_force=config.xdp_force,
        )
        self._attacher.follow(wanted)

    def stop(self) -> None:
        """Takes the programs away, exports what is left, and says how the ledger stands."""
        if self._attacher is not None:
            self._attacher.detach_all()
        if self._meter is not None and self._sessions:
            self._export(self._meter.drain())
            _log.info("%s", self._meter.ledger())
        for session in self._sessions:
            _log.info("%s", _session_line(session))
            session.transport.close()
        if self._meter is not None:
            self._meter.programs.close()
            self._meter.table.close()
            self._pins.clear()
        self._pins.release()

    # The table

    def _table(self) -> FlowTable:
        """The pinned table of an exporter that was killed, if it is of our kind and size; else a new one."""
        layout, max_flows = this_layout(), self._config.table.max_flows
        try:
            found = self._pins.find_maps(FlowTable.map_names(layout))
            if found is not None:
                table = FlowTable.adopt(layout, found)
                if table.control("buckets4") == buckets_for(max_flows, layout):
                    return table
                self._warn("size", f"{self._pins.path}: the table found there has another size: its flows are lost")
        except LayoutDiffers as error:
            self._warn("layout", f"{self._pins.path}: {error}: its flows are lost")
        for name in self._pins.names():
            self._pins.unpin(name)
        table = FlowTable.create(layout, max_flows)
        for name, fd in table.fds.items():
            self._pins.pin(name, fd)
        return table

    def _recover(self) -> None:
        """Exports what a killed exporter left half done; its last batch may then arrive twice."""
        meter = self._running()
        if meter.table.control("journal_batch"):
            records = meter.table.control("journal_records")
            self._warn("journal", f"the last exporter was stopped while sending: {records} records may arrive twice")
        for family in meter.table.families:
            slots = family.recover()
            if len(slots):
                self._export([meter.left_closing(family, slots)])
        meter.table.set_control(journal_batch=0)

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
        encoder = MessageEncoder(
            observation_domain_id=observation_domain_id(export.observation_domain_id),
            max_message_octets=transport.max_message_octets(),
            templates=default_templates(tcp_control_bits_octets=export.tcp_control_bits_octets),
            sequence_number=self._running().table.sequence(number),
        )
        return CollectorSession(transport, encoder, refresh_ns=export.template_refresh_ns)

    # The loop

    def _loop(self, wakeup: _Wakeup) -> None:
        meter, interval_ns = self._running(), self._config.timeouts.sweep_interval_ns
        with netlink.LinkWatch() as watch:
            poll = select.poll()
            for source in (wakeup, watch):
                poll.register(source, select.POLLIN)
            next_sweep_ns = time.monotonic_ns() + interval_ns
            while not self._stopping:
                wait_ns = max(0, min(next_sweep_ns - time.monotonic_ns(), int(_TICK_S * 1e9)))
                poll.poll(wait_ns / 1e6)
                wakeup.clear()
                if watch.changed():
                    self._follow_interfaces()
                now_ns = time.monotonic_ns()
                if now_ns >= next_sweep_ns or self._is_crowded(meter):
                    self._export(meter.sweep(self._timeouts, now_ns))
                    next_sweep_ns = max(next_sweep_ns + interval_ns, time.monotonic_ns())
                    _notify("WATCHDOG=1")

    def _follow_interfaces(self) -> None:
        """Devices come and go; one that cannot be metered does not stop the others."""
        assert self._attacher is not None
        try:
            self._attacher.follow(netlink.resolve(self._config.interfaces))
        except FlowexpError as error:
            self._warn("attach", str(error))

    def _is_crowded(self, meter: MeteringProcess) -> bool:
        """Whether flows have been made so fast since the last sweep that the table fills before the next."""
        return meter.flows_live + meter.flows_made_since_sweep() > _PRESSURE * self._config.table.max_flows

    def _export(self, batches: Iterable[Batch]) -> None:
        """Sends what is due to every Collector. A batch is in the journal from before it goes out until it is done."""
        table = self._running().table
        now_ns = time.monotonic_ns()
        for batch in batches:
            if batch.records:
                self._batch_number += 1
                table.set_control(journal_records=batch.records, journal_batch=self._batch_number)
                export_time_s = -(-time.time_ns() // 1_000_000_000)  # rounded up: no flow ends after it
                for session in self._sessions:
                    self._send(session, batch, now_ns, export_time_s)
            batch.done()
            table.set_control(journal_batch=0)
        for number, session in enumerate(self._sessions):
            session.announce_if_due(now_ns, -(-time.time_ns() // 1_000_000_000))
            table.set_sequence(number, session.sequence_number)

    def _send(self, session: CollectorSession, batch: Batch, now_ns: int, export_time_s: int) -> None:
        try:
            session.send(batch.columns, now_ns, export_time_s)
        except FlowexpError as error:  # a full disk, say: counted by the transport; the other Collectors go on
            self._warn("collector", str(error))

    def _running(self) -> MeteringProcess:
        if self._meter is None:
            raise RuntimeError("the exporter has not been started")
        return self._meter

    def _ask_to_stop(self, *_: Any) -> None:
        self._stopping = True


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
    status = session.transport.status()
    return (
        f"{status['collector']}: {status['state']}, {status['messages_sent']} Messages with"
        f" {status['records_sent']} Data Records sent, {status['records_failed']} Data Records not sent"
    )


def _notify(state: str) -> None:
    """Tells the service manager (sd_notify(3)), if it asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    path = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.sendto(state.encode(), path)
    except OSError as error:
        _log.warning("NOTIFY_SOCKET %s: %s", address, error.strerror)
