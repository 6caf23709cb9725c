# SPDX-License-Identifier: GPL-2.0-or-later
"""All the Collectors of one exporter: who gets which records, and what becomes of their Sequence Numbers.

The rule: what one Collector's path does not allow does not hold up the others (courier.py). Here is decided, in the
exporter's thread; encoded and sent is in the Collector's own.

- A Collector is known by its key: where it is, and the Observation Domain that it is told. Its Sequence Numbers
  are kept under that key, so they go on whatever else is added, removed or put into another order.
- Each sampling interval that interfaces have for themselves is another Observation Domain of the same Collector, in
  the same Transport Session (member.py).
- A change of configuration leaves alone what it does not concern. Where only what a Collector is told changes,
  its Transport Session goes on with other Templates.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from functools import partial
from typing import Any, Callable, Collection, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np

from .config import Config
from .errors import FlowexpError
from .kernel.table import FlowTable
from .member import Member, export_time_s, select_of
from .metering.share import shares
from .protocol.elements import Columns
from .protocol.encoder import Encoder, MessageSizeError
from .protocol.options import Facts
from .protocol.template import TemplateIds
from .rates import Rates
from .session import CollectorSession
from .terms import Terms, terms_of
from .transport.base import OwnSocket
from .transports import transport_for, try_transport

_log = logging.getLogger(__name__)

_PROBE_PERIOD_NS = 10**9
"""How often one that is out of reach is sent Templates, to see whether an error comes back."""
_RETURN_NS = 3 * 10**9
"""So long one must have been in reach before it is sent records again; for UDP on top of CALM_NS (transport/udp.py)."""
_CLOSE_S = 5.0
"""As long a Collector that is behind may take for what waits, when the exporter leaves or it is removed."""


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

        FlowexpError for what waiting cannot mend. Nearly always it is found before anything is changed: a session that
        has ended cannot be taken up again. Else some are missing, until another call.
        """
        wanted = terms_of(config)
        ways = {terms.key: terms.way for terms in wanted}
        leaving = [member for member in self._members if ways.get(member.terms.key) != member.terms.way]
        stay = {member.terms.key for member in self._members if member not in leaving}
        ours = [member.terms.way.collector for member in self._members]
        in_use = {path for each in ours for path in (each.url.path, each.spool_path)}
        for terms in wanted:
            select_of(terms.filter)
            if leaving and terms.key not in stay:
                try_transport(terms.way.collector, in_use=in_use)
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
            for interval, session in member.sessions.items():
                encoder = self._encoder(terms, interval, member.transport.max_message_octets(), 0)
                change = partial(session.change, encoder, refresh_ns=terms.content.refresh_ns)
                member.courier.give(partial(change, export_time_s=export_time_s()))
        member.follow(terms)

    def _opened(self, terms: Terms, wanted: Collection[int]) -> Member:
        place, sequence_number = self._place(terms.key, wanted)
        transport = transport_for(*terms.way, announce=partial(self._announce_socket, place))
        transport.open()
        member = Member(terms, transport, place)
        try:
            member.open(0, self._session(member, 0, sequence_number))
        except FlowexpError:
            member.courier.close(0)
            transport.close()
            raise
        return member

    def _session(self, member: Member, interval: int, sequence_number: int) -> CollectorSession:
        """That of one of its Observation Domains: beside the first one, with Messages for which its path was wide
        enough; what it has become since is the session's."""
        transport = member.transport
        octets = member.sessions[0].max_message_octets if interval else transport.max_message_octets()
        return CollectorSession(
            transport,
            self._encoder(member.terms, interval, octets, sequence_number),
            refresh_ns=member.terms.content.refresh_ns,
            facts=lambda: self._facts()._replace(exporter_address=transport.local_address()),
            withdraws=member.terms.is_reliable,
            templates_due=member.templates_due(interval),
        )

    def _announce_socket(self, place: int, own: OwnSocket) -> None:
        with self._announcing:
            self._kept().set_own_socket(place, *own)

    def _kept(self) -> FlowTable:
        if self._table is None:
            raise RuntimeError("no table to keep Sequence Numbers in")
        return self._table

    def _encoder(self, terms: Terms, interval: int, max_message_octets: int, sequence_number: int) -> Encoder:
        try:
            return terms.content.of(interval).encoder(max_message_octets, self._template_ids, sequence_number)
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
        place = min(free, key=lambda place: kept[place][0] != 0)  # rather nobody's than that of one who may return
        table.forget_own_sequences(place)
        return place, 0

    def _close(self, members: Sequence[Member]) -> None:
        until_s = time.monotonic() + _CLOSE_S
        for member in members:
            member.close(until_s)
            self._keep_sequence_numbers(member)

    def close(self) -> None:
        """Ends every session, and says what became of it."""
        self._close(self._members)

    # Use

    def tell_sampling(self, rates: Rates) -> None:
        """What is sent from now on was sampled so; who does not know is told first.

        There is an Observation Domain for each own interval, and none any more for any other.
        """
        for member in self._members:
            for interval in member.sessions.keys() - {0, *rates.own}:
                self._keep_sequence_number(member, interval)
                member.retire(interval)
            for interval in rates.own:
                if interval not in member.sessions:
                    number = self._kept().own_sequence(member.place, interval)
                    member.open(interval, self._session(member, interval, number))
            member.tell_sampling(rates)

    def hurry(self, on: bool) -> None:
        """Whether the flow table is overflowing: then sending must not take longer than it has to."""
        if on != self._hurried:
            self._hurried = on
            for member in self._members:
                member.courier.give(partial(member.transport.hurry, on))

    def send(self, columns: Columns, interval: int, now_ns: int) -> None:
        """Data Records of every row of `columns`, to whom they are for; returns when they are sent, but see courier.py.

        interval: the own one under which all of them were sampled, or 0. now_ns: boot time, for when Templates are due.
        """
        self._distribute(partial(Member.send, interval=interval), columns, now_ns)

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
            member.announce_if_due(now_ns, export_time_s())
            member.courier.wait(began_s)
            self._look(member, now_ns)
            if now_ns >= member.out_until_ns:
                return member
        return members[0]

    def _look(self, member: Member, now_ns: int) -> None:
        """Whether it is in reach."""
        if member.is_in_reach and not member.courier.is_behind:
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
                member.announce_if_due(now_ns, export_time_s())
                self._look(member, now_ns)

    def _wait(self, since_s: float) -> None:
        for member in self._members:
            is_waited_for = member.terms.is_reliable or member.is_in_reach
            if is_waited_for and not member.courier.wait(since_s):
                member.warn("behind", f"{member.terms.way.collector.url}: takes long; others do not wait for it")

    def announce_if_due(self, now_ns: int) -> None:
        """Templates and Options to those that are due for them."""
        for member in self._members:
            member.announce_if_due(now_ns, export_time_s())
        self._wait(time.monotonic())

    def tell_changes(self) -> None:
        """What has become otherwise of what Options Records tell, interfaces above all."""
        for member in self._members:
            member.tell_changes(export_time_s())
        self._wait(time.monotonic())

    def keep_sequence_numbers(self) -> None:
        """Where the next exporter looks: in the table that packets go to, whichever is being exported."""
        for member in self._members:
            self._keep_sequence_numbers(member)

    def _keep_sequence_numbers(self, member: Member) -> None:
        for interval in member.sessions:
            self._keep_sequence_number(member, interval)

    def _keep_sequence_number(self, member: Member, interval: int) -> None:
        table, number = self._kept(), member.sequence_number(interval)
        if interval:
            table.set_own_sequence(member.place, interval, number, needed=member.sessions)
        else:
            table.set_sequence(member.place, member.terms.key, number)


def _rows(columns: Columns, rows: Any) -> Columns:
    return {name: column[rows] for name, column in columns.items()}
