# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages over TCP and TLS (RFC 7011 sections 10.4 and 11), through a queue that an outage of the Collector fills.

The rule: `send` puts Messages into the queue (spool.py) and never waits for anybody; a thread of this transport's
own takes them out in their order. So one Collector delays neither the exporter nor another Collector.

- Each connection is a Transport Session: what a Collector must know first goes first, and Sequence Numbers begin with
  0 in each Observation Domain (RFC 7011 section 3.1). They are put in as a Message leaves; nothing else in it changes.
  A Template that changes without having been withdrawn begins a new Transport Session, too.
- What the Collector's host has acknowledged can still be lost with a Collector that is killed before it read it. So
  a Message is kept for HOLD_S after that, and goes again if the connection ends in disorder. The Collector may then
  have it twice; the log says how many records that concerns.
- An end in order (the Collector closes, with nothing left to read) repeats nothing but what was not acknowledged.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections import deque
from dataclasses import asdict
from typing import Callable, NamedTuple

from flowexp.errors import FlowexpError
from flowexp.transport.base import Batch, Counters, OwnSocket, QuietLog, Sent, warnings_of
from flowexp.transport.connection import Connection, Tls, Trouble
from flowexp.transport.segment import (
    HEADER,
    MAX_GROUP_OCTETS,
    NUMBER,
    SEQUENCE_AT,
    Group,
    Head,
    Position,
    Template,
    message_of,
    templates_in,
)
from flowexp.transport.spool import Spool

MESSAGE_OCTETS = 16_384
"""The largest Message: as much as a TLS record holds. Greater ones would save little."""
QUEUE_OCTETS = 32 << 20
"""What waits in memory where there is no spool: some 250,000 records."""
BACKLOG_OCTETS_PER_S = 16 << 20
"""By so much a second a backlog shrinks at most; what comes in meanwhile goes out beside."""
BURST_OCTETS = 4 << 20
"""Less than that is no backlog."""
HOLD_S = 2.0
"""So long after it was acknowledged a Message is kept; time enough for a Collector to read it."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
"""Between two tries to connect; doubled each time."""
CLOSE_S, STUCK_S = 10.0, 2.0
"""At the end of the exporter: as long may sending the rest take, while it goes on; and so long without progress."""
_MOST_UNACKNOWLEDGED = 1024
"""Groups on their way, each of at most 64 KiB: more than any socket buffer takes."""
_POLL_S = 0.05
"""How often acknowledgements are looked at while some are outstanding."""


class _Flying(NamedTuple):
    """A group that the kernel has; `wire_end`: the acknowledgement by which the other host has it, too."""

    wire_end: int
    end: Position
    messages: int
    octets: int
    records: int


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
        self._announcement: dict[int, list[tuple[bytes, int]]] | None = None
        self._templates_due = True
        self._octets_appended = 0
        self._state = "closed"
        self._local_address = b""
        self._closing = threading.Event()
        # Sockets, as these close by themselves once the thread, too, has no use for them any more.
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
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
        self._closing.set()
        self._wake()
        began_s = time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            if time.monotonic() - began_s > (CLOSE_S + STUCK_S if self._state == "up" else STUCK_S):
                break
            self._thread.join(_POLL_S)
        self._last_figures = self._figures()
        if self._spool_folder is None:
            self.counters.records_failed += self._spool.records
            self._last_figures["records_queued"] = 0
        self._state = "closed"
        spool, self._spool = self._spool, None
        spool.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake
            self._wake_write.send(b"w")

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

    def announces(self, on: bool) -> None:
        """What is sent in between is for the beginning of each Transport Session from now on, this one included."""
        if on:
            self._announcement = {}
            return
        announced, self._announcement = self._announcement or {}, None
        if self._spool is not None:
            self._spool.announce([Head(domain, tuple(messages)) for domain, messages in announced.items()])
            self._wake()

    def send(self, batch: Batch) -> Sent:
        """Put the Messages into the queue. What the disk does not take is a FlowexpError, and has failed."""
        if self._announcement is not None:
            for first in range(0, len(batch.octets), batch.message_octets):
                message = bytes(batch.octets[first : first + batch.message_octets])
                domain = HEADER.unpack_from(message)[-1]
                self._announcement.setdefault(domain, []).append((message, batch.records // batch.count))
            return Sent(batch.count)
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
            self._octets_appended += len(group)
        self._wake()
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
                    session = _Session(self, spool, connection)
                    try:
                        is_wanted_again = session.run()
                    finally:
                        self._records_resent += session.records_to_repeat()
            except Trouble as trouble:
                self._state = trouble.state
                if not self._closing.is_set():
                    self._warn(trouble.state, f"{self._name}: {trouble}; {self._waiting(spool)}; trying again")
            except OSError as error:
                self._state = "closed"
                self._warn("error", f"{self._name}: {error.strerror}; {self._waiting(spool)}; trying again")
            if is_wanted_again:
                continue
            if self._closing.wait(pause_s):
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _waiting(self, spool: Spool) -> str:
        return f"{spool.records} records wait {'in ' + self._spool_folder if self._spool_folder else 'in memory'}"


class _Session:
    """One Transport Session: from the spool's oldest Message that is not settled, until something goes wrong."""

    def __init__(self, transport: StreamTransport, spool: Spool, connection: Connection) -> None:
        self._transport, self._spool, self._connection = transport, spool, connection
        self._cursor = spool.begin()
        self._segment = -1
        self._told: dict[int, Head] = {}
        """The head that was told last, by Observation Domain."""
        self._templates: dict[int, dict[int, Template]] = {}
        """What the Collector knows, by Observation Domain and Template ID."""
        self._numbers: dict[int, int] = {}
        self._flying: deque[_Flying] = deque()
        self._held: deque[tuple[float, Position, int]] = deque()
        """Acknowledged: when, up to where, how many records."""
        self._budget_octets = float(BURST_OCTETS)
        self._filled_s = time.monotonic()
        self._appended_then = transport._octets_appended
        self._is_in_order = False

    def run(self) -> bool:
        """Until the connection ends (Trouble), or the exporter does and all is sent. True: another one is needed."""
        poll = select.poll()
        poll.register(self._transport._wake_read, select.POLLIN)
        progress_s = began_closing_s = 0.0
        new_session = False
        while not new_session:
            connection = self._connection
            try:
                connection.discard()
                connection.flush()
                new_session = self._fill()
            except Trouble as trouble:
                self._is_in_order = trouble.orderly
                self._collect()
                raise
            if self._collect():
                progress_s = time.monotonic()
            self._settle(time.monotonic() - self._transport._hold_s)
            if self._transport._closing.is_set():
                now_s = time.monotonic()
                began_closing_s = began_closing_s or now_s
                stuck = now_s - max(progress_s, began_closing_s) > STUCK_S or now_s - began_closing_s > CLOSE_S
                if stuck or self._is_empty():
                    break
            events = select.POLLIN | (select.POLLOUT if connection.is_full else 0)
            poll.register(connection.fileno(), events)
            poll.poll(self._timeout_s() * 1000)
            with contextlib.suppress(BlockingIOError):
                self._transport._wake_read.recv(4096)
        self._end()
        return new_session

    def _timeout_s(self) -> float:
        if self._flying or self._held:
            return _POLL_S
        return _POLL_S if self._budget_octets <= 0 else 60.0

    def _is_empty(self) -> bool:
        return not self._flying and not self._connection.is_full and self._spool.read(self._cursor) is None

    def _fill(self) -> bool:
        """Write as much as the kernel takes now. True: a Template has changed, a new Transport Session is needed."""
        self._refill_budget()
        while not self._connection.is_full and len(self._flying) < _MOST_UNACKNOWLEDGED and self._budget_octets > 0:
            group = self._spool.read(self._cursor)
            position = self._cursor if group is None else Position(group.end.segment, 0)
            if self._segment != position.segment or (group is None and not self._told):
                if not self._tell(self._spool.heads(position)):
                    return True
                self._segment = position.segment
                if self._connection.is_full:
                    return False
            if group is None:
                self._budget_octets = max(self._budget_octets, float(BURST_OCTETS))
                return False
            self._write_group(group)
        return False

    def _refill_budget(self) -> None:
        """What came in meanwhile may go out, and so much of the backlog as its rate allows."""
        now_s, appended = time.monotonic(), self._transport._octets_appended
        self._budget_octets += (now_s - self._filled_s) * self._transport._backlog_octets_per_s
        self._budget_octets += appended - self._appended_then
        self._budget_octets = min(self._budget_octets, float(BURST_OCTETS))
        self._filled_s, self._appended_then = now_s, appended

    def _tell(self, heads: tuple[Head, ...]) -> bool:
        """What the Collector must know first and has not been told. False: it knows another Template by that ID."""
        for head in heads:
            known = self._templates.setdefault(head.domain, {})
            if any(known.get(each.template_id, each) != each for each in head.templates()):
                return False
            self._write(head, known)
        return True

    def _write(self, head: Head, known: dict[int, Template]) -> None:
        told, octets = self._told.get(head.domain), bytearray()
        for message, records in head.messages:
            if records:
                if told is None or not told.says_the_same(head):
                    octets += self._with_number(bytearray(message), head.domain, records)
                continue
            unknown = [each for each in templates_in(message) if each.template_id not in known]
            # Each goes once in a Transport Session (RFC 7011 section 8): a Message with a known one is taken apart.
            whole = [message] if not known else [message_of(each, message) for each in unknown]
            for each in whole:
                octets += self._with_number(bytearray(each), head.domain, 0)
        known.update({each.template_id: each for each in head.templates()})
        self._told[head.domain] = head
        if octets:
            self._connection.write(octets)
            self._connection.flush()

    def _with_number(self, message: bytearray, domain: int, records: int) -> bytearray:
        sequence = self._numbers.get(domain, 0)
        NUMBER.pack_into(message, SEQUENCE_AT, sequence)
        self._numbers[domain] = (sequence + records) & 0xFFFFFFFF
        return message

    def _write_group(self, group: Group) -> None:
        sequence = self._numbers.get(group.domain, 0)
        for at, records in group.messages:
            NUMBER.pack_into(group.octets, at + SEQUENCE_AT, sequence)
            sequence = (sequence + records) & 0xFFFFFFFF
        self._numbers[group.domain] = sequence
        self._learn(group)
        self._spool.hand_over(group.end)
        wire_end = self._connection.write(group.octets)
        self._connection.flush()
        self._budget_octets -= len(group.octets)
        self._flying.append(_Flying(wire_end, group.end, len(group.messages), len(group.octets), group.records))
        self._cursor = group.end

    def _learn(self, group: Group) -> None:
        """Templates and Template Withdrawals that go on their way among Data Records."""
        known = self._templates.setdefault(group.domain, {})
        for template in group.templates():
            if template.is_withdrawal:
                known.pop(template.template_id, None)
            else:
                known[template.template_id] = template

    def _collect(self) -> bool:
        """Look at what has been acknowledged; whether that was anything new."""
        if not self._flying:
            return False
        acknowledged, now_s, counters = self._connection.acknowledged(), time.monotonic(), self._transport.counters
        before = len(self._flying)
        while self._flying and self._flying[0].wire_end <= acknowledged:
            group = self._flying.popleft()
            if self._spool.acknowledge(group.end, group.records):
                counters.messages_sent += group.messages
                counters.octets_sent += group.octets
                counters.records_sent += group.records
            self._held.append((now_s, group.end, group.records))
        return len(self._flying) < before

    def _settle(self, until_s: float) -> None:
        """What was acknowledged by then is not needed any more."""
        end = None
        while self._held and self._held[0][0] <= until_s:
            end = self._held.popleft()[1]
        if end is not None:
            self._spool.settle(end)

    def _end(self) -> None:
        """Close in order: the Collector reads all that its host has acknowledged before it sees our end."""
        self._connection.shut()
        until_s = time.monotonic() + STUCK_S
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        while time.monotonic() < until_s and not self._is_in_order:
            try:
                self._connection.flush()
                self._connection.discard()
            except Trouble as trouble:
                self._is_in_order = trouble.orderly
                break
            self._collect()
            if not self._flying and not self._connection.is_full:
                self._is_in_order = True  # it has all; that it closes, too, need not be waited for
            poll.poll(1000 * _POLL_S)
        self._collect()

    def records_to_repeat(self) -> int:
        """Settle the account at the end: how many records the Collector may have, and will get again."""
        if self._is_in_order:
            self._settle(time.monotonic())
        doubtful = sum(records for _, _, records in self._held) + sum(each.records for each in self._flying)
        if doubtful:
            transport = self._transport
            transport._warn(
                "again", f"{transport._name}: {doubtful} records had been sent when it ended, and may arrive twice"
            )
        return doubtful
