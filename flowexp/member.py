# SPDX-License-Identifier: GPL-2.0-or-later
"""One Collector: its transport and courier, the flows it is told of, and its Observation Domains.

Each domain is a session of its own over the one transport, with Templates, Options and Sequence Numbers. A domain is
known by its sampling interval, where interfaces have it for themselves; 0: the Collector's own domain.
"""

from __future__ import annotations

import json
import logging
import time
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Union

from .courier import DISK_PATIENCE_S, PATIENCE_S, Courier
from .errors import FlowexpError, UsageError
from .metering.biflow import paired
from .protocol.elements import Columns
from .rates import Rates
from .session import CollectorSession, Unsent
from .terms import Terms
from .transport.base import QuietLog, Transport, warnings_of

_log = logging.getLogger(__name__)


class _Progress:
    """How far the rows of one domain came, a Data Record each. Each count has one thread that adds to it."""

    def __init__(self) -> None:
        self.given = self.begun = self.done = 0
        """To the courier; by the courier."""
        self.skipped = Unsent()
        """For which the courier had no room, and the Collector has not been shown a gap yet."""
        self.told = (1, False)
        """Sampling interval and whether at random: of the flows that are given now."""


class Member:
    """What becomes of one Collector's records. `sessions`: of each domain; open(0, ...) comes first."""

    def __init__(self, terms: Terms, transport: Transport, place: int) -> None:
        self.transport = transport
        self.place = place
        """Where its Sequence Numbers are kept."""
        self.sessions: Dict[int, CollectorSession] = {}
        self._progress: Dict[int, _Progress] = {}
        self._asked: Dict[int, int] = {}
        self._times_asked = 0
        self.flows_filtered = self.flows_paired = 0
        self._flows_not_representable = 0  # of domains that are no more
        self.out_until_ns = 0
        """Before this it is sent no records where another can have them, boot time."""
        self.warn = QuietLog(warnings_of(__name__))
        patience_s = DISK_PATIENCE_S if terms.is_reliable else PATIENCE_S
        self.courier = Courier(str(terms.way.collector.url), patience_s)
        self.follow(terms)

    @property
    def protocol(self) -> str:
        return self.terms.content.protocol

    @property
    def _can_tell_events(self) -> bool:
        return self.protocol != "netflow5"

    @property
    def is_in_reach(self) -> bool:
        return self.sessions[0].is_in_reach

    @property
    def announced_ns(self) -> Optional[int]:
        """When Templates of its own domain went last, boot time; None: never yet."""
        return self.sessions[0].announced_ns

    def follow(self, terms: Terms) -> None:
        """The terms have changed, but not the way."""
        self.terms, self._select = terms, select_of(terms.filter)
        if terms.content.nat_events and not self._can_tell_events:
            url = terms.way.collector.url
            _log.warning("%s: NetFlow v5 has no words for NAT events: they are not told there", url)
        self._reverse_columns = terms.content.reverse_columns()

    # Observation Domains

    def templates_due(self, interval: int) -> Callable[[], bool]:
        """For the session of one domain: whether the Collector may lack its Templates. The transport says so once,
        for all of them. In the courier's thread."""

        def is_due() -> bool:
            self._times_asked += self.transport.take_templates_due()
            is_new = self._asked.get(interval) != self._times_asked
            self._asked[interval] = self._times_asked
            return is_new

        return is_due

    def open(self, interval: int, session: CollectorSession) -> None:
        """One more domain."""
        self.sessions[interval], self._progress[interval] = session, _Progress()
        if interval:
            domain = self.terms.content.of(interval).observation_domain_id
            url = self.terms.way.collector.url
            _log.info("%s: Observation Domain %d is for one packet in %d", url, domain, interval)

    def retire(self, interval: int) -> None:
        """No more flows come in this domain. What waits for the courier goes."""
        session, progress = self.sessions.pop(interval), self._progress.pop(interval)
        if progress.skipped.records:
            self.courier.give(partial(session.skip, progress.skipped))
        self.courier.give(self._tried(session.retire, export_time_s()))
        self._flows_not_representable += session.flows_not_representable

    def tell_sampling(self, rates: Rates) -> None:
        """Of what is sent from now on; what waits for the courier keeps its own."""
        for interval, session in self.sessions.items():
            told = interval or rates.intervals[0], rates.is_random
            if told != self._progress[interval].told:
                self._progress[interval].told = told
                self.courier.give(partial(session.tell_sampling, *told))

    def sequence_number(self, interval: int) -> int:
        """That behind all which waits or had no room: if the exporter is killed now, the Collector sees a gap."""
        progress = self._progress[interval]
        return self.sessions[interval].sequence_after(progress.given - progress.done + progress.skipped.records)

    # Records

    def chosen(self, columns: Columns) -> Columns:
        """The flows that its filter lets through, in rows as it wants them; the others are counted."""
        chosen = columns if self._select is None else self._select(columns)
        self.flows_filtered += len(columns["packets"]) - len(chosen["packets"])
        if not self.terms.content.biflow:
            return chosen
        rows = paired(chosen, self._reverse_columns)
        self.flows_paired += len(chosen["packets"]) - len(rows["packets"])
        return rows

    def send(self, columns: Columns, now_ns: int, *, interval: int) -> None:
        """Give the flows to the courier; where it has no room for them, they have failed."""
        self._give(interval, self.sessions[interval].send, self.chosen(columns), now_ns)

    def send_events(self, columns: Columns, now_ns: int) -> None:
        """Likewise for NAT events, which no filter is for, and no sampling."""
        if self._can_tell_events:
            self._give(0, self.sessions[0].send_events, columns, now_ns)

    def _give(self, interval: int, send: Callable[..., None], columns: Columns, now_ns: int) -> None:
        rows = len(columns["src_addr"])
        if not rows:
            return
        session, progress = self.sessions[interval], self._progress[interval]
        attempt = self._tried(send, columns, now_ns, export_time_s())

        def job() -> None:
            progress.begun += rows
            attempt()
            progress.done += rows

        if not self.courier.give(job, rows):
            progress.skipped = progress.skipped.plus(Unsent.of(columns))
            return
        progress.given += rows
        if progress.skipped.records:
            skipped, progress.skipped = progress.skipped, Unsent()
            self.courier.give(partial(session.skip, skipped))

    def announce_if_due(self, now_ns: int, export_time_s: int) -> None:
        if self.courier.is_idle:  # else it is busy with what has Templates before it
            for session in self.sessions.values():
                self.courier.give(self._tried(session.announce_if_due, now_ns, export_time_s))

    def tell_changes(self, export_time_s: int) -> None:
        if self.courier.is_idle:
            for session in self.sessions.values():
                self.courier.give(self._tried(session.facts_changed, export_time_s))

    def close(self, until_s: float) -> None:
        """What waits is sent until then; the rest has failed."""
        self.courier.close(until_s)
        for interval, progress in self._progress.items():
            left = progress.given - progress.begun + progress.skipped.records
            if left:
                self.sessions[interval].skip(Unsent(left))
            progress.given, progress.skipped = progress.begun, Unsent()
        state = self.transport.status()["state"]
        self.transport.close()  # which may still send
        _log.info("%s", _session_line(self.status(), state))

    def status(self) -> Dict[str, Union[str, int]]:
        status = self.transport.status()
        sessions = self.sessions.values()
        skipped = sum(each.skipped.records for each in self._progress.values())
        return {
            **status,
            "records_failed": int(status["records_failed"]) + skipped,
            "flows_not_representable": self._flows_not_representable
            + sum(each.flows_not_representable for each in sessions),
            "records_waiting": self.courier.records_waiting,
            "flows_filtered": self.flows_filtered,
            "flows_paired": self.flows_paired,
        }

    def _tried(self, send: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        def attempt() -> None:
            try:
                send(*arguments)
            except FlowexpError as error:
                self.warn("collector", str(error))

        return attempt


def export_time_s() -> int:
    """Unix time now, rounded up: no flow ends after it."""
    return -(-time.time_ns() // 1_000_000_000)


def select_of(expression: str) -> Optional[Callable[[Columns], Columns]]:
    """A filter, compiled; None for none. FilterError."""
    if not expression:
        return None
    from .filters import Filter, FilterError  # a library that not everybody has use for

    try:
        return Filter(expression).select
    except FilterError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"[[collector]] {reason}, in {json.dumps(expression)}") from error


_LEFT = {
    "flows_not_representable": "flows not representable",
    "flows_filtered": "flows filtered out",
    "flows_paired": "flows in the record of their other direction",
    "records_dropped": "Data Records dropped",
    "records_resent": "Data Records sent again",
    "records_queued": "Data Records left in the spool",
}


def _session_line(status: Mapping[str, Union[str, int]], state: Union[str, int]) -> str:
    """What became of one Collector's Messages, for the log."""
    left = "".join(f", {status[name]} {what}" for name, what in _LEFT.items() if status.get(name))
    return (
        f"{status['collector']}: {state}, {status['messages_sent']} Messages with"
        f" {status['records_sent']} Data Records sent, {status['records_failed']} Data Records not sent{left}"
    )
