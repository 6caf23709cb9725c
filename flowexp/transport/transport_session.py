# SPDX-License-Identifier: GPL-2.0-or-later
"""One Transport Session of a stream: Messages from the spool into one connection, until it ends or the exporter does.

What the Collector must know first goes first, and Sequence Numbers begin with 0 in each Observation Domain (RFC 7011
section 3.1): they are put in as a Message leaves; nothing else in it changes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from typing import NamedTuple

from flowexp.transport.base import Counters
from flowexp.transport.connection import Connection, Trouble
from flowexp.transport.segment import (
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

BURST_OCTETS = 4 << 20
"""Less than that is no backlog."""
CLOSE_S, STUCK_S = 10.0, 2.0
"""At the end of the exporter: as long may sending the rest take, while it goes on; and so long without progress."""
POLL_S = 0.05
"""How often acknowledgements are looked at while some are outstanding."""
_MOST_UNACKNOWLEDGED = 1024
"""Groups on their way, each of at most 64 KiB: more than any socket buffer takes."""


class Bell:
    """How the exporter calls the thread that sends: Messages have come into the spool, or the end has."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.octets = 0
        """All that have ever come."""
        # Sockets, as these close by themselves once the thread, too, has no use for them any more.
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)

    def fileno(self) -> int:
        return self._read.fileno()

    def ring(self, octets: int = 0) -> None:
        self.octets += octets
        with contextlib.suppress(OSError):  # full: it has been heard
            self._write.send(b"w")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._read.recv(4096)


class _Flying(NamedTuple):
    """A group that the kernel has; `wire_end`: the acknowledgement by which the other host has it, too."""

    wire_end: int
    end: Position
    messages: int
    octets: int
    records: int


class TransportSession:
    """One Transport Session: from the spool's oldest Message that is not settled, until something goes wrong."""

    def __init__(
        self, spool: Spool, connection: Connection, bell: Bell, counters: Counters, *, backlog_octets_per_s: int,
        hold_s: float,
    ) -> None:  # fmt: skip
        """backlog_octets_per_s, hold_s: as of StreamTransport."""
        self._spool, self._connection, self._bell, self._counters = spool, connection, bell, counters
        self._backlog_octets_per_s, self._hold_s = backlog_octets_per_s, hold_s
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
        self._appended_then = bell.octets
        self._is_in_order = False

    def run(self) -> bool:
        """Until the connection ends (Trouble), or the exporter does and all is sent. True: another one is needed."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
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
            self._settle(time.monotonic() - self._hold_s)
            if self._bell.closing.is_set():
                now_s = time.monotonic()
                began_closing_s = began_closing_s or now_s
                stuck = now_s - max(progress_s, began_closing_s) > STUCK_S or now_s - began_closing_s > CLOSE_S
                if stuck or self._is_empty():
                    break
            events = select.POLLIN | (select.POLLOUT if connection.is_full else 0)
            poll.register(connection.fileno(), events)
            poll.poll(self._timeout_s() * 1000)
            self._bell.clear()
        self._end()
        return new_session

    def _timeout_s(self) -> float:
        if self._flying or self._held:
            return POLL_S
        return POLL_S if self._budget_octets <= 0 else 60.0

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
        now_s, appended = time.monotonic(), self._bell.octets
        self._budget_octets += (now_s - self._filled_s) * self._backlog_octets_per_s
        self._budget_octets += appended - self._appended_then
        self._budget_octets = min(self._budget_octets, float(BURST_OCTETS))
        self._filled_s, self._appended_then = now_s, appended

    def _tell(self, heads: tuple[Head, ...]) -> bool:
        """What the Collector must know first and has not been told. False: it knows another Template by that ID."""
        octets = bytearray()
        for head in heads:
            known = self._templates.setdefault(head.domain, {})
            if any(known.get(each.template_id, each) != each for each in head.templates()):
                return False
            octets += self._lacking(head, known)
        if octets:
            self._connection.write(octets)
            self._connection.flush()
        return True

    def _lacking(self, head: Head, known: dict[int, Template]) -> bytearray:
        """The Messages of a head, but for what the Collector knows."""
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
        return octets

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
        acknowledged, now_s, counters = self._connection.acknowledged(), time.monotonic(), self._counters
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
            poll.poll(1000 * POLL_S)
        self._collect()

    def records_to_repeat(self) -> int:
        """Settle the account at the end: how many records the Collector may have, and will get again."""
        if self._is_in_order:
            self._settle(time.monotonic())
        return sum(records for _, _, records in self._held) + sum(each.records for each in self._flying)
