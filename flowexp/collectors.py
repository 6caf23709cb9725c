# SPDX-License-Identifier: GPL-2.0-or-later
"""All the Collectors of one exporter: who gets which records, and what becomes of their Sequence Numbers.

The rule: what one Collector's path does not allow does not hold up the others (courier.py). Here is decided, in the
exporter's thread; encoded and sent is in the Collector's own.

- A Collector is known by its key: where it is, and the Observation Domain that it is told. Its Sequence Numbers
  are kept under that key, so they go on whatever else is added, removed or put into another order.
- A change of configuration leaves alone what it does not concern. Where only what a Collector is told changes,
  its Transport Session goes on with other Templates.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from functools import partial
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

import numpy as np

from .config import Config
from .courier import DISK_PATIENCE_S, PATIENCE_S, Courier
from .errors import FlowexpError, UsageError
from .kernel.table import FlowTable
from .metering.biflow import paired
from .metering.share import shares
from .protocol.elements import Columns
from .protocol.encoder import Encoder, MessageSizeError
from .protocol.options import Facts
from .protocol.template import TemplateIds
from .session import CollectorSession
from .terms import Terms, terms_of
from .transport.base import OwnSocket, QuietLog, Transport, warnings_of
from .transports import transport_for

_log = logging.getLogger(__name__)

_PROBE_PERIOD_NS = 10**9
"""How often one that is out of reach is sent Templates, to see whether an error comes back."""
_RETURN_NS = 3 * 10**9
"""So long one must have been in reach before it is sent records again; for UDP on top of CALM_NS (transport/udp.py)."""
_CLOSE_S = 5.0
"""As long a Collector that is behind may take for what waits, when the exporter leaves or it is removed."""


class Member:
    """One Collector: its Transport Session, its courier, and the flows it is told of."""

    def __init__(self, terms: Terms, session: CollectorSession, place: int) -> None:
        self.terms = terms
        self.session = session
        self.place = place
        """Where its Sequence Number is kept."""
        self.flows_filtered = self.flows_paired = 0
        self.out_until_ns = 0
        """Before this it is sent no records where another can have them, boot time."""
        self.warn = QuietLog(warnings_of(__name__))
        patience_s = DISK_PATIENCE_S if terms.is_reliable else PATIENCE_S
        self.courier = Courier(str(terms.way.collector.url), patience_s)
        self._skipped = 0
        self._sampling_interval = 1
        self.follow(terms)

    @property
    def protocol(self) -> str:
        return self.terms.content.protocol

    def follow(self, terms: Terms) -> None:
        """The terms have changed, but not the way."""
        self.terms, self._select = terms, select_of(terms.filter)
        self._reverse_columns = terms.content.reverse_columns()

    def chosen(self, columns: Columns) -> Columns:
        """The flows that its filter lets through, in rows as it wants them; the others are counted."""
        chosen = columns if self._select is None else self._select(columns)
        self.flows_filtered += len(columns["packets"]) - len(chosen["packets"])
        if not self.terms.content.biflow:
            return chosen
        rows = paired(chosen, self._reverse_columns)
        self.flows_paired += len(chosen["packets"]) - len(rows["packets"])
        return rows

    def send(self, columns: Columns, now_ns: int) -> None:
        """Give the flows to the courier; where it has no room for them, they have failed."""
        self._give(self.session.send, self.chosen(columns), now_ns)

    def send_events(self, columns: Columns, now_ns: int) -> None:
        """Likewise for NAT events, which no filter is for."""
        if self.protocol != "netflow5":  # which has no words for them
            self._give(self.session.send_events, columns, now_ns)

    def _give(self, send: Callable[..., None], columns: Columns, now_ns: int) -> None:
        rows = len(columns["src_addr"])
        if not rows:
            return
        if not self.courier.give(self._tried(send, columns, now_ns, _export_time_s()), rows):
            self._skipped += rows
        elif self._skipped:
            skipped, self._skipped = self._skipped, 0
            self.courier.give(partial(self.session.skip, skipped))

    def tell_sampling(self, interval: int) -> None:
        """Of what is sent from now on; what waits for the courier keeps its own."""
        if interval != self._sampling_interval:
            self._sampling_interval = interval
            self.courier.give(partial(self.session.tell_sampling, interval))

    def announce_if_due(self, now_ns: int, export_time_s: int) -> None:
        if self.courier.is_idle:  # else it is busy with what has Templates before it
            self.courier.give(self._tried(self.session.announce_if_due, now_ns, export_time_s))

    def tell_changes(self, export_time_s: int) -> None:
        if self.courier.is_idle:
            self.courier.give(self._tried(self.session.facts_changed, export_time_s))

    def close(self, until_s: float) -> None:
        """What waits is sent until then; the rest has failed."""
        left = self.courier.close(until_s) + self._skipped
        if left:
            self.session.skip(left)
        state = self.session.status()["state"]
        self.session.transport.close()  # which may still send
        _log.info("%s", _session_line(self.status(), state))

    def status(self) -> Dict[str, Union[str, int]]:
        status = self.session.status()
        return {
            **status,
            "records_failed": int(status["records_failed"]) + self._skipped,
            "records_waiting": self.courier.records_waiting,
            "flows_filtered": self.flows_filtered,
            "flows_paired": self.flows_paired,
        }

    def sequence_number(self) -> int:
        """That behind all which waits or had no room: if the exporter is killed now, the Collector sees a gap."""
        return self.session.sequence_after(self.courier.records_waiting + self._skipped)

    def _tried(self, send: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        def attempt() -> None:
            try:
                send(*arguments)
            except FlowexpError as error:
                self.warn("collector", str(error))

        return attempt


class Collectors:
    """Those that the configuration names, in its order."""

    def __init__(self, facts: Callable[[], Facts]) -> None:
        """`facts`: what every Collector is told of the exporter; asked in the couriers' threads."""
        self._facts = facts
        self._members: List[Member] = []
        self._distribution = "mirror"
        self._table: Optional[FlowTable] = None
        self._announcing = threading.Lock()  # own sockets, in the couriers' threads
        self._template_ids = TemplateIds()
        self._hurried = False
        self._probed_ns = 0

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    # Configuration

    def keep_in(self, table: FlowTable) -> None:
        """Sequence Numbers and own sockets are found and kept in this table from now on."""
        self._table = table

    @contextlib.contextmanager
    def moving_to(self, table: FlowTable) -> Iterator[None]:
        """Likewise, from that table on that it was before. Until packets go to the new one no socket changes."""
        with self._announcing:
            table.take_collectors(self._kept())
            yield
            self._table = table

    def configure(self, config: Config) -> None:
        """Those of this configuration from now on.

        FlowexpError for what waiting cannot mend; then some are missing, until another call.
        """
        wanted = terms_of(config)
        for terms in wanted:
            select_of(terms.filter)  # before anything is changed
        ways = {terms.key: terms.way for terms in wanted}
        leaving = [member for member in self._members if ways.get(member.terms.key) != member.terms.way]
        self._close(leaving)
        staying = {member.terms.key: member for member in self._members if member not in leaving}
        self._members = list(staying.values())
        self._distribution, self._hurried = config.export.distribution, False
        for terms in wanted:
            if terms.key in staying:
                self._change(staying[terms.key], terms)
            else:
                self._members.append(self._opened(terms, ways))
        keys = list(ways)
        self._members.sort(key=lambda member: keys.index(member.terms.key))

    def _change(self, member: Member, terms: Terms) -> None:
        if terms.content != member.terms.content:
            encoder = self._encoder(terms, member.session.transport, 0)
            change = partial(member.session.change, encoder, refresh_ns=terms.content.refresh_ns)
            member.courier.give(partial(change, export_time_s=_export_time_s()))
        member.follow(terms)

    def _opened(self, terms: Terms, wanted: Collection[int]) -> Member:
        place, sequence_number = self._place(terms.key, wanted)
        transport = transport_for(*terms.way, announce=partial(self._announce_socket, place))
        transport.open()
        try:
            encoder = self._encoder(terms, transport, sequence_number)
        except FlowexpError:
            transport.close()
            raise
        session = CollectorSession(
            transport,
            encoder,
            refresh_ns=terms.content.refresh_ns,
            facts=lambda: self._facts()._replace(exporter_address=transport.local_address()),
            withdraws=terms.is_reliable,
        )
        return Member(terms, session, place)

    def _announce_socket(self, place: int, own: OwnSocket) -> None:
        with self._announcing:
            self._kept().set_own_socket(place, *own)

    def _kept(self) -> FlowTable:
        if self._table is None:
            raise RuntimeError("no table to keep Sequence Numbers in")
        return self._table

    def _encoder(self, terms: Terms, transport: Transport, sequence_number: int) -> Encoder:
        try:
            return terms.content.encoder(transport.max_message_octets(), self._template_ids, sequence_number)
        except MessageSizeError as error:
            url = terms.way.collector.url
            raise FlowexpError(f"{url}: its path is too narrow for these records: {error}") from error

    def _place(self, key: int, wanted: Collection[int]) -> Tuple[int, int]:
        """Where this Collector's Sequence Number is to be kept, and the number to begin with. `wanted`: all keys."""
        table = self._kept()
        kept = [table.sequence(place) for place in range(table.collectors)]
        for place, (whose, number) in enumerate(kept):
            if whose == key:
                return place, number
        taken: Set[int] = {member.place for member in self._members}
        free = [place for place, (whose, _) in enumerate(kept) if place not in taken and whose not in wanted]
        return min(free, key=lambda place: kept[place][0] != 0), 0  # rather nobody's than that of one who may return

    def _close(self, members: Sequence[Member]) -> None:
        until_s = time.monotonic() + _CLOSE_S
        for member in members:
            member.close(until_s)
            self._keep_sequence_number(member)

    def close(self) -> None:
        """Ends every session, and says what became of it."""
        self._close(self._members)

    # Use

    def tell_sampling(self, interval: int) -> None:
        """What is sent from now on was sampled one packet in so many; who does not know is told first."""
        for member in self._members:
            member.tell_sampling(interval)

    def hurry(self, on: bool) -> None:
        """Whether the flow table is overflowing: then sending must not take longer than it has to."""
        if on != self._hurried:
            self._hurried = on
            for member in self._members:
                member.courier.give(partial(member.session.transport.hurry, on))

    def send(self, columns: Columns, now_ns: int) -> None:
        """Data Records of every row of `columns`, to whom they are for; returns when they are sent, but see courier.py.

        now_ns: boot time, for when Templates are due.
        """
        self._distribute(Member.send, columns, now_ns)

    def send_events(self, columns: Columns, now_ns: int) -> None:
        """Likewise for NAT events of one address family."""
        self._distribute(Member.send_events, columns, now_ns)

    def _distribute(self, send: Callable[[Member, Columns, int], None], columns: Columns, now_ns: int) -> None:
        began_s = time.monotonic()
        for members in self._groups():
            if self._distribution == "failover":
                send(self._first_in_reach(members, now_ns, began_s), columns, now_ns)
            elif self._distribution == "balance" and len(members) > 1:
                owners = shares(columns, [member.terms.key for member in members])
                for number, member in enumerate(members):
                    send(member, _rows(columns, np.flatnonzero(owners == number)), now_ns)
            else:
                for member in members:
                    send(member, columns, now_ns)
        self._wait(began_s)

    def _groups(self) -> List[List[Member]]:
        """In each group the Collectors among which records are distributed."""
        groups: Dict[str, List[Member]] = {}
        for member in self._members:
            groups.setdefault(member.terms.group, []).append(member)
        return list(groups.values())

    def _first_in_reach(self, members: List[Member], now_ns: int, began_s: float) -> Member:
        """The first that is in reach, also after a look at what errors have come back; else the first of all."""
        for member in members:
            member.announce_if_due(now_ns, _export_time_s())
            member.courier.wait(began_s)
            self._look(member, now_ns)
            if now_ns >= member.out_until_ns:
                return member
        return members[0]

    def _look(self, member: Member, now_ns: int) -> None:
        """Whether it is in reach."""
        if member.session.is_in_reach and not member.courier.is_behind:
            return
        if now_ns >= member.out_until_ns:
            _log.warning("%s: out of reach; its records go to the next Collector", member.terms.way.collector.url)
        member.out_until_ns = now_ns + _RETURN_NS

    def probe(self, now_ns: int) -> None:
        """Each second, a look whether those that are out of reach have come back. Between two sends only."""
        if self._distribution != "failover" or now_ns - self._probed_ns < _PROBE_PERIOD_NS:
            return
        self._probed_ns = now_ns
        for member in self._members:
            if now_ns < member.out_until_ns:
                member.announce_if_due(now_ns, _export_time_s())
                self._look(member, now_ns)

    def _wait(self, since_s: float) -> None:
        for member in self._members:
            is_waited_for = member.terms.is_reliable or member.session.is_in_reach
            if is_waited_for and not member.courier.wait(since_s):
                member.warn("behind", f"{member.terms.way.collector.url}: takes long; others do not wait for it")

    def announce_if_due(self, now_ns: int) -> None:
        """Templates and Options to those that are due for them."""
        for member in self._members:
            member.announce_if_due(now_ns, _export_time_s())
        self._wait(time.monotonic())

    def tell_changes(self) -> None:
        """What has become otherwise of what Options Records tell, interfaces above all."""
        for member in self._members:
            member.tell_changes(_export_time_s())
        self._wait(time.monotonic())

    def keep_sequence_numbers(self) -> None:
        """Where the next exporter looks: in the table that packets go to, whichever is being exported."""
        for member in self._members:
            self._keep_sequence_number(member)

    def _keep_sequence_number(self, member: Member) -> None:
        self._kept().set_sequence(member.place, member.terms.key, member.sequence_number())


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


def _rows(columns: Columns, rows: Any) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _export_time_s() -> int:
    """Unix time now, rounded up: no flow ends after it."""
    return -(-time.time_ns() // 1_000_000_000)


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
