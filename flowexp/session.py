# SPDX-License-Identifier: GPL-2.0-or-later
"""One Collector's Transport Session: an encoder, a transport, and when Templates are due.

Nothing is sent twice and nothing is forgotten: Messages that no longer fit the path are encoded
again, smaller, from the rows that were not sent; what the transport could not send is counted there
as failed, and its Sequence Numbers are used up, so that the Collector sees the gap.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Any, Callable, Collection, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np

from .errors import FlowexpError
from .protocol.biflow import REVERSE
from .protocol.elements import Columns
from .protocol.encoder import Encoder, MessageSizeError
from .protocol.framing import Burst
from .protocol.options import ExportingFacts, Facts
from .transport.base import QuietLog, Sent, Transport, warnings_of

_log = logging.getLogger(__name__)


class PathTooNarrow(FlowexpError):
    """Not even one record fits a Message that the path carries."""


class Unsent(NamedTuple):
    """What no Data Record will tell of. NAT events are records without flows."""

    records: int = 0
    flows: int = 0
    packets: int = 0
    octets: int = 0

    @classmethod
    def of(cls, columns: Columns, rows: Any = slice(None)) -> Unsent:
        """All of these columns, or these rows of them."""
        records = len(columns["src_addr"][rows])
        if "packets" not in columns:
            return cls(records)
        return cls(records, records, _sum(columns, "packets", rows), _sum(columns, "octets", rows))

    def plus(self, other: Unsent) -> Unsent:
        return Unsent(*map(sum, zip(self, other)))


_OUT_OF_REACH = frozenset(("closed", "refused", "unreachable", "unresolved", "untrusted"))


class CollectorSession:
    """Sends columns to one Collector. Templates go first, and again every `refresh_ns`.

    facts: asked for what Options Records tell, each time that they are due.
    withdraws: whether Templates that are not used any more are withdrawn (RFC 7011 section 8.1: not over UDP).
    templates_due: whether Templates may be lacking; None: the transport, which is nobody else's, knows.
    """

    def __init__(
        self,
        transport: Transport,
        encoder: Encoder,
        *,
        refresh_ns: int,
        facts: Callable[[], Facts] = Facts,
        withdraws: bool = False,
        warn: Callable[[str], None] = warnings_of(__name__),
        templates_due: Optional[Callable[[], bool]] = None,
    ) -> None:
        self.transport = transport
        self._withdraws = withdraws
        self._encoder = encoder
        self._refresh_ns = refresh_ns
        self._facts = facts
        self._exporting = ExportingFacts()
        self._templates_due = templates_due or transport.take_templates_due
        self._sampling_interval, self._sampling_random = 1, False
        self._warn = QuietLog(warn)
        self.trouble: Optional[FlowexpError] = None
        """The last thing that the transport could not do; its Messages count as failed."""
        self._announced_ns: Optional[int] = None

    @property
    def sequence_number(self) -> int:
        """That of the next Message."""
        return self._encoder.sequence_number

    def sequence_after(self, data_records: int) -> int:
        """That of the next Message behind so many more Data Records."""
        return self._encoder.sequence_after(data_records)

    @property
    def is_in_reach(self) -> bool:
        """Whether nothing says that Messages do not arrive."""
        return self.transport.status()["state"] not in _OUT_OF_REACH

    @property
    def announced_ns(self) -> Optional[int]:
        """When Templates went last, boot time; None: never yet."""
        return self._announced_ns

    @property
    def max_message_octets(self) -> int:
        """What the path carried last."""
        return self._encoder.max_message_octets

    @property
    def flows_not_representable(self) -> int:
        """Of which the protocol could not tell."""
        return self._encoder.flows_not_representable

    def tell_sampling(self, interval: int, is_random: bool = False) -> None:
        """Records from now on are of one packet in so many, any one of them or always the last. What changes is
        announced before the next of them."""
        if (interval, is_random) != (self._sampling_interval, self._sampling_random):
            self._sampling_interval, self._sampling_random = interval, is_random
            self._announced_ns = None

    def announce_if_due(self, now_ns: int, export_time_s: int) -> None:
        """Templates and Options, if their time has come (`now_ns`: boot time) or the transport asks for them."""
        asked = self._templates_due()
        age_ns = None if self._announced_ns is None else now_ns - self._announced_ns
        if not asked and age_ns is not None and age_ns < self._refresh_ns:
            self._tell(self._encoder.changes(export_time_s))
            return
        self._announced_ns = None  # until all has gone
        self._look()
        while not self._announce(export_time_s):
            pass
        self._announced_ns = now_ns

    def send(self, columns: Columns, now_ns: int, export_time_s: int) -> None:
        """Data Records for every row of `columns`, Templates before them where due. FlowexpError: they have failed."""
        records = self._as_records(columns)
        self._send(records, self._encoder.encode, now_ns, export_time_s)

    def send_events(self, columns: Columns, now_ns: int, export_time_s: int) -> None:
        """Likewise for NAT events; nothing where the protocol cannot tell of them."""
        self._send(columns, self._encoder.encode_events, now_ns, export_time_s)

    def _send(
        self, columns: Columns, encode: Callable[[Columns, int], List[Burst]], now_ns: int, export_time_s: int
    ) -> None:
        left, more = columns, True
        try:
            self.announce_if_due(now_ns, export_time_s)
            while more:
                self._fit()
                left, more = self._send_once(encode(left, export_time_s), left)
        except PathTooNarrow:
            self.skip(Unsent.of(left))
            raise

    def facts_changed(self, export_time_s: int) -> None:
        """Tells at once what has changed, if anything has been told before."""
        if self._announced_ns is not None:
            self._look()
            self._tell(self._encoder.changes(export_time_s))

    def _look(self) -> None:
        self._encoder.facts = self._facts()._replace(
            exporting=self._exporting, sampling_interval=self._sampling_interval, sampling_random=self._sampling_random
        )

    def _tell(self, bursts: Iterable[Burst]) -> None:
        for burst in bursts:
            if self._hand_over(burst).too_big:
                self._announced_ns = None  # the path has just narrowed: all of it goes again, smaller
                return
            self._encoder.commit(burst)

    def skip(self, unsent: Unsent) -> None:
        """These Data Records count as failed, and the Collector sees a gap."""
        self.transport.counters.records_failed += unsent.records
        self._encoder.skip(unsent.records)
        self._count_unsent(unsent)

    def _count_unsent(self, unsent: Unsent) -> None:
        before = self._exporting
        self._exporting = before._replace(
            not_sent_flows=before.not_sent_flows + unsent.flows,
            not_sent_packets=before.not_sent_packets + unsent.packets,
            not_sent_octets=before.not_sent_octets + unsent.octets,
        )

    def change(self, encoder: Encoder, *, refresh_ns: int, export_time_s: int) -> None:
        """From now on this encoder, in the same Transport Session; its Templates go before all else."""
        self._withdraw(encoder.template_ids, export_time_s)
        encoder.sequence_number = self._encoder.sequence_number
        encoder.flows_not_representable = self._encoder.flows_not_representable
        self._encoder, self._refresh_ns, self._announced_ns = encoder, refresh_ns, None

    def retire(self, export_time_s: int) -> None:
        """There will be no more records: Templates are withdrawn, and nobody is told of them again."""
        self._withdraw((), export_time_s)
        with self._announcement():
            pass

    def _withdraw(self, kept: Collection[int], export_time_s: int) -> None:
        if self._withdraws:
            for burst in self._encoder.withdraw(kept, export_time_s):
                self._hand_over(burst)

    def _announce(self, export_time_s: int) -> bool:
        """Sends Templates and Options; False where the path has just narrowed: they go again, smaller."""
        self._fit()
        with self._announcement():
            for burst in self._encoder.announce(export_time_s):
                if self._hand_over(burst).too_big:
                    return False
                self._encoder.commit(burst)
        return True

    @contextmanager
    def _announcement(self) -> Iterator[None]:
        self.transport.announces(self._encoder.observation_domain_id)
        try:
            yield
        finally:
            self.transport.announces(None)

    def status(self) -> Dict[str, Union[str, int]]:
        """The transport's, and how many flows the protocol could not tell of."""
        return {**self.transport.status(), "flows_not_representable": self.flows_not_representable}

    def _as_records(self, columns: Columns) -> Columns:
        """What the protocol can tell of; the first flow of which it cannot is worth a warning, the rest a count."""
        before = self._encoder.flows_not_representable
        records = self._encoder.as_records(columns)
        if not before and self._encoder.flows_not_representable:
            name = self.transport.status()["collector"]
            _log.warning("%s: its protocol has no IPv6: such flows are counted and not sent", name)
        return records

    def _send_once(self, bursts: List[Burst], columns: Columns) -> Tuple[Columns, bool]:
        """Sends as long as Messages fit the path. The rows that did not, and whether there are any."""
        for number, burst in enumerate(bursts):
            sent = self._hand_over(burst)
            self._count(columns, burst, sent)
            if not sent.too_big:
                self._encoder.commit(burst)
                continue
            pieces = list(burst.split(sent.messages)) if sent.messages else [burst]
            if sent.messages:
                self._encoder.commit(pieces.pop(0))
            rows = [left.rows for left in pieces + bursts[number + 1 :]]
            remaining = np.concatenate(rows)
            return {name: column[remaining] for name, column in columns.items()}, True
        return columns, False

    def _count(self, columns: Columns, burst: Burst, sent: Sent) -> None:
        """Flows that were sent, and those that were not and will not be."""
        flows = len(burst.rows) // burst.count * sent.messages
        if "packets" in columns:
            self._exporting = self._exporting._replace(flow_records=self._exporting.flow_records + flows)
        if flows < len(burst.rows) and not sent.too_big:
            self._count_unsent(Unsent.of(columns, burst.rows[flows:]))

    def _hand_over(self, burst: Burst) -> Sent:
        """Sends a Burst. What the transport cannot do (its disk is full) it has counted; the next may go again."""
        try:
            sent = self.transport.send(burst)
        except FlowexpError as error:
            self.trouble = error
            self._warn("transport", str(error))
            return Sent(0)
        if not sent.is_kept:
            self._exporting = self._exporting._replace(
                messages=self._exporting.messages + sent.messages,
                octets=self._exporting.octets + sent.messages * burst.message_octets,
            )
        return sent

    def _fit(self) -> None:
        """Messages as large as the path carries now."""
        octets = self.transport.max_message_octets()
        if octets != self._encoder.max_message_octets:
            try:
                self._encoder.max_message_octets = octets
            except MessageSizeError as error:
                raise PathTooNarrow(
                    f"{self.transport.status()['collector']}: its path is too narrow: {error}"
                ) from error


def _sum(columns: Columns, counter: str, rows: Any) -> int:
    """A counter's sum over these rows, both directions of a Biflow."""
    return sum(int(columns[name][rows].sum()) for name in (counter, REVERSE + counter) if name in columns)
