# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages over TCP and TLS (RFC 7011 sections 10.4 and 11), through a queue that an outage of the Collector fills.

The rule: `send` puts Messages into the queue (spool.py) and never waits for anybody; a thread of this transport's
own takes them out in their order. So one Collector delays neither the exporter nor another Collector.

- Each connection is a Transport Session (transport_session.py). A Template that changes without having been withdrawn
  begins a new one, too.
- What the Collector's host has acknowledged can still be lost with a Collector that is killed before it read it. So
  a Message is kept for HOLD_S after that, and goes again if the connection ends in disorder. The Collector may then
  have it twice; the log says how many records that concerns.
- An end in order (the Collector closes, with nothing left to read) repeats nothing but what was not acknowledged.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from dataclasses import asdict
from typing import Callable

from flowexp.errors import FlowexpError
from flowexp.transport.base import Batch, Counters, OwnSocket, QuietLog, Sent, warnings_of
from flowexp.transport.connection import Connection, Tls, Trouble
from flowexp.transport.segment import MAX_GROUP_OCTETS, Head
from flowexp.transport.spool import Spool
from flowexp.transport.transport_session import CLOSE_S, POLL_S, STUCK_S, Bell, TransportSession

MESSAGE_OCTETS = 16_384
"""The largest Message: as much as a TLS record holds. Greater ones would save little."""
QUEUE_OCTETS = 32 << 20
"""What waits in memory where there is no spool: some 250,000 records."""
BACKLOG_OCTETS_PER_S = 16 << 20
"""By so much a second a backlog shrinks at most; what comes in meanwhile goes out beside."""
HOLD_S = 2.0
"""So long after it was acknowledged a Message is kept; time enough for a Collector to read it."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
"""Between two tries to connect; doubled each time."""


class StreamTransport:
    """Sends Messages to the Collector at `host` and `port`, over TLS where `tls` is given.

    - mark: SO_MARK of the packets, by which the meter leaves them out; 0 for none.
    - announce: told of each socket before anything is sent from it; None: nobody.
    - spool_folder: where Messages wait on disk, up to spool_octets; None: in memory, up to QUEUE_OCTETS.
    - backlog_octets_per_s: at what rate a backlog shrinks.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: Tls | None = None,
        mark: int = 0,
        announce: Callable[[OwnSocket], None] | None = None,
        spool_folder: str | None = None,
        spool_octets: int = QUEUE_OCTETS,
        backlog_octets_per_s: int = BACKLOG_OCTETS_PER_S,
        hold_s: float = HOLD_S,
        connect: Callable[..., Connection] = Connection,
    ) -> None:
        self.counters = Counters()
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._name = f"{'tcp' if tls is None else 'tls'}://{address}"
        self._host, self._port, self._tls, self._mark = host, port, tls, mark
        self._announce = announce
        self._spool_folder, self._spool_octets = spool_folder, spool_octets
        self._backlog_octets_per_s, self._hold_s, self._connect = backlog_octets_per_s, hold_s, connect
        self._warn = QuietLog(warnings_of(__name__))
        self._spool: Spool | None = None
        self._thread: threading.Thread | None = None
        self._announced: tuple[int, list[tuple[bytes, int]]] | None = None
        """What is being announced: of which Observation Domain, and its Messages so far."""
        self._templates_due = True
        self._bell = Bell()
        self._state = "closed"
        self._local_address = b""
        self._records_resent = self._sessions = 0

    # ---- life cycle

    def open(self) -> None:
        """Find what an earlier exporter has left, and begin to connect. FlowexpError: spool or PEM file is no use."""
        context = None if self._tls is None else self._tls.context()
        complain = QuietLog(warnings_of(__name__))
        self._spool = Spool(
            self._spool_folder,
            size_octets=self._spool_octets,
            complain=lambda line: complain(line, f"{self._name}: spool {line}"),
        )
        if self._spool.records:
            doubt = self._spool.records_in_doubt
            self._warn("left", f"{self._name}: {self._spool.records} records are left in the spool; they go first")
            if doubt:
                self._warn("doubt", f"{self._name}: {doubt} of them had been sent, and may arrive twice")
        self._state = "connecting"
        self._thread = threading.Thread(target=self._run, args=(context,), name=self._name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, as long as that goes on; what does not go stays in a spool on disk, or has failed.

        The spool is free then, for another transport, even where the thread is still waiting for a connection.
        """
        if self._spool is None:
            return
        self._bell.closing.set()
        self._bell.ring()
        began_s = time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            if time.monotonic() - began_s > (CLOSE_S + STUCK_S if self._state == "up" else STUCK_S):
                break
            self._thread.join(POLL_S)
        self._last_figures = self._figures()
        if self._spool_folder is None:
            self.counters.records_failed += self._spool.records
            self._last_figures["records_queued"] = 0
        self._state = "closed"
        spool, self._spool = self._spool, None
        spool.close()

    # ---- use

    def max_message_octets(self) -> int:
        """Always the same: a stream has no path MTU for Messages."""
        return MESSAGE_OCTETS

    def take_templates_due(self) -> bool:
        """True at first, and where our address has changed; each Transport Session is given what was announced last."""
        due, self._templates_due = self._templates_due, False
        return due

    def hurry(self, on: bool) -> None:
        """Sending waits for nothing here."""

    def announces(self, domain: int | None) -> None:
        """What is sent in between is for the beginning of each Transport Session from now on, this one included."""
        announced, self._announced = self._announced, None if domain is None else (domain, [])
        if announced is not None and self._spool is not None:
            self._spool.announce(Head(announced[0], tuple(announced[1])))
            self._bell.ring()

    def send(self, batch: Batch) -> Sent:
        """Put the Messages into the queue. What the disk does not take is a FlowexpError, and has failed."""
        if self._announced is not None:
            for first in range(0, len(batch.octets), batch.message_octets):
                message = bytes(batch.octets[first : first + batch.message_octets])
                self._announced[1].append((message, batch.records // batch.count))
            return Sent(batch.count, is_kept=True)
        if self._spool is None:
            raise FlowexpError(f"{self._name}: is not open")
        each, at_once = batch.records // batch.count, max(1, MAX_GROUP_OCTETS // batch.message_octets)
        for first in range(0, batch.count, at_once):
            group = batch.octets[first * batch.message_octets :][: at_once * batch.message_octets]
            try:
                self._spool.append(group, batch.message_octets, each)
            except OSError as error:
                self.counters.messages_failed += batch.count - first
                self.counters.records_failed += batch.records - first * each
                raise FlowexpError(f"{self._name}: spool {self._spool_folder}: {error.strerror}; not sent") from error
            self._bell.ring(len(group))
        return Sent(batch.count)

    def local_address(self) -> bytes:
        """That of the last connection; none before the first."""
        return self._local_address

    def status(self) -> dict[str, str | int]:
        """For `flowexp status`: where to, how it is, what waits, and the counters.

        Here records are sent when the Collector's host has acknowledged them; until then they are queued.
        """
        figures = self._figures() if self._spool is not None else self._last_figures
        return {"collector": self._name, "state": self._state, **asdict(self.counters), **figures}

    _last_figures: dict[str, str | int] = {}

    def _figures(self) -> dict[str, str | int]:
        assert self._spool is not None
        return {
            "transport_sessions": self._sessions,
            "records_queued": self._spool.records,
            "octets_queued": self._spool.octets,
            "records_dropped": self._spool.records_dropped,
            "records_resent": self._records_resent,
        }

    # ---- the thread

    def _run(self, context: ssl.SSLContext | None) -> None:
        assert self._spool is not None
        spool, pause_s = self._spool, FIRST_PAUSE_S
        while True:
            is_wanted_again = False
            try:
                with contextlib.closing(
                    self._connect(self._host, self._port, tls=context, mark=self._mark, announce=self._announce)
                ) as connection:
                    if self._spool is None:  # it has come too late
                        return
                    self._state, pause_s = "up", FIRST_PAUSE_S
                    address = connection.local_address()
                    if address != self._local_address:  # of which Options Records tell
                        self._local_address, self._templates_due = address, True
                    self._sessions += 1
                    session = TransportSession(
                        spool, connection, self._bell, self.counters,
                        backlog_octets_per_s=self._backlog_octets_per_s, hold_s=self._hold_s,
                    )  # fmt: skip
                    try:
                        is_wanted_again = session.run()
                    finally:
                        self._will_repeat(session.records_to_repeat())
            except Trouble as trouble:
                self._state = trouble.state
                if not self._bell.closing.is_set():
                    self._warn(trouble.state, f"{self._name}: {trouble}; {self._waiting(spool)}; trying again")
            except OSError as error:
                self._state = "closed"
                self._warn("error", f"{self._name}: {error.strerror}; {self._waiting(spool)}; trying again")
            if is_wanted_again:
                continue
            if self._bell.closing.wait(pause_s):
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _will_repeat(self, records: int) -> None:
        self._records_resent += records
        if records:
            self._warn("again", f"{self._name}: {records} records had been sent when it ended, and may arrive twice")

    def _waiting(self, spool: Spool) -> str:
        return f"{spool.records} records wait {'in ' + self._spool_folder if self._spool_folder else 'in memory'}"
