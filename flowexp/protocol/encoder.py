# SPDX-License-Identifier: GPL-2.0-or-later
"""Columns of flows in, Messages out, for every protocol, sans-IO: no clock, no socket.

What sets one protocol's Messages apart is data, a Framing (framing.py); ipfix.py, netflow9.py and netflow5.py have
one each.

The encoder does not count what it encodes but what the caller commits: send the Bursts in order and
`commit` each one that was sent. What was not sent keeps its Sequence Numbers free: encode those rows
again, after a change of `max_message_octets` if need be.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from flowexp.protocol.elements import Columns
from flowexp.protocol.framing import (
    MAX_MESSAGE_OCTETS,
    SEQUENCE_MODULUS,
    Burst,
    Framing,
    fill,
    message_dtype,
    packed,
)
from flowexp.protocol.options import Facts, OptionsTemplate, Told, options_templates
from flowexp.protocol.template import RecordLayout, Template, Templates

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array

UP_TIME_PERIOD_S = 10 * 86_400

_BATCH_RECORDS = 4000  # filled at a time: they stay in the cache (0.17 us a record if a million at once)


class MessageSizeError(ValueError):
    """A Message size that no Message, or not every Message, can have."""


class Layouts(Protocol):
    """The records that a protocol has."""

    def all(self) -> Sequence[RecordLayout]:
        """Every kind of record."""

    def partition(self, columns: Columns) -> Iterator[tuple[RecordLayout, Array]]:
        """The kinds these flows need, each with its flows' row numbers in ascending order, at least one."""


def system_init_s(export_time_s: int) -> int:
    """The Unix second that relative times in a Message of `export_time_s` count from.

    It lies 10 to 20 days back and moves on every 10 days, so that any flow began after it and milliseconds
    since then never wrap: not in 32 bits (49 days), nor in the 31 that nfacctd has for them. It is a whole
    second, which takes no millisecond from any time, and the same after a restart.
    """
    return (export_time_s // UP_TIME_PERIOD_S - 1) * UP_TIME_PERIOD_S


def split_counters(columns: Columns, octets: Mapping[str, int], others: Iterable[str] = ()) -> Columns:
    """Each flow in the fewest rows whose counters fit so many octets; they add up to the flow's exactly.

    others: the rest of the columns that count, and fit: what one row carries of them no other may. All else is the
    same in each of its rows, the times included: that is when these packets were seen.
    """
    most = {name: np.uint64((1 << 8 * length) - 1) for name, length in octets.items()}
    if not any(np.any(columns[name] > limit) for name, limit in most.items()):
        return columns
    parts = np.maximum.reduce([(np.maximum(columns[name], 1) - 1) // limit + 1 for name, limit in most.items()])
    rows = np.repeat(np.arange(len(parts)), parts.astype(np.intp))
    first_row = np.cumsum(parts) - parts
    number = np.arange(len(rows), dtype=np.uint64) - first_row[rows]
    split = {name: column[rows] for name, column in columns.items()}
    for name in {*most, *others}:
        counts = columns[name].reshape(len(parts), -1)  # of each size class, where there are any
        each, more = np.divmod(counts, parts[:, None].astype(counts.dtype))
        split[name] = (each[rows] + (number[:, None] < more[rows])).reshape(-1, *columns[name].shape[1:])
    return split


class Encoder:
    """Messages of one Observation Domain in one Transport Session.

    sequence_number: that of the next Message, which is the number of Data Records (or of Messages, see
    Framing) committed so far, modulo 2**32; a restart that continues a session passes its last one.
    """

    framing: ClassVar[Framing]

    def __init__(
        self,
        *,
        observation_domain_id: int,
        max_message_octets: int,
        layouts: Layouts,
        sequence_number: int = 0,
    ) -> None:
        self.observation_domain_id = observation_domain_id
        self.sequence_number = sequence_number % SEQUENCE_MODULUS
        self.flows_not_representable = 0
        """Flows of which the protocol can say nothing; `as_records` left them out."""
        self.facts = Facts()
        """What Collectors are told beside flows; set it before `announce`, or to have `changes`."""
        self._layouts = layouts
        self.max_message_octets = max_message_octets

    @property
    def max_message_octets(self) -> int:
        """No Message is longer. Setting it raises MessageSizeError if a record would fit no Message."""
        return self._max_message_octets

    @max_message_octets.setter
    def max_message_octets(self, octets: int) -> None:
        framing = self.framing
        largest = max(max(len(layout.record), layout.record_octets) for layout in self._layouts.all())
        least = framing.aligned(framing.header_octets + framing.set_header_octets + largest)
        if not least <= octets <= MAX_MESSAGE_OCTETS:
            raise MessageSizeError(f"Messages of {octets} octets: not within {least} and {MAX_MESSAGE_OCTETS}")
        self._max_message_octets = octets

    def commit(self, burst: Burst) -> None:
        """Count a Burst as sent. Bursts are committed in the order in which they were returned."""
        self.sequence_number = (burst.sequence + burst.count * burst.sequence_step) % SEQUENCE_MODULUS

    def skip(self, data_records: int) -> None:
        """Leave so many Data Records out (at least one Message), so that the Collector sees that they are missing."""
        self.sequence_number = self.sequence_after(data_records)

    def sequence_after(self, data_records: int) -> int:
        """The Sequence Number behind so many more Data Records; where it counts Messages, behind one at least."""
        step = self._sequence_step(data_records) if data_records else 0
        return (self.sequence_number + step) % SEQUENCE_MODULUS

    @property
    def template_ids(self) -> frozenset[int]:
        """Of all Templates and Options Templates that `announce` tells of."""
        return frozenset()

    def withdraw(self, kept: Collection[int], export_time_s: int) -> list[Burst]:
        """Template Withdrawals of all but these (RFC 7011 section 8.1). Not over UDP, and there are none in v9."""
        return []

    def as_records(self, columns: Columns) -> Columns:
        """These flows as the protocol can tell of them: a row for each Data Record. Before `encode`, once."""
        return columns

    def announce(self, export_time_s: int) -> list[Burst]:
        """What a Collector must know before any record: nothing, if the protocol has no Templates."""
        return []

    def changes(self, export_time_s: int) -> list[Burst]:
        """What has become otherwise in `facts` since it was told last, figures left out."""
        return []

    def encode(self, columns: Columns, export_time_s: int) -> list[Burst]:
        """Data Records of flows of one address family (see `as_records`), each in the layout for what it has."""
        return self._encode(self._layouts, columns, export_time_s)

    def encode_events(self, columns: Columns, export_time_s: int) -> list[Burst]:
        """Data Records of NAT events of one address family (natevents.py); none where they are not to be told."""
        return []

    def _encode(self, layouts: Layouts, columns: Columns, export_time_s: int) -> list[Burst]:
        """Data Records of these rows.

        First full Messages, a Burst for each layout; then what is left over from each, packed into
        shared Messages, a Burst for each.
        """
        instants_s = {"system_init_ns": system_init_s(export_time_s), "export_ns": export_time_s}
        same = {name: np.broadcast_to(np.int64(s * 10**9), len(columns["src_addr"])) for name, s in instants_s.items()}
        columns = {**columns, **same}
        sequence, bursts, left_over = self.sequence_number, [], []
        for layout, rows in layouts.partition(columns):
            per_message = min(self._room_octets // layout.record_octets, self.framing.max_records)
            full = len(rows) - len(rows) % per_message
            if full:
                burst = self._full(layout, columns, rows[:full], per_message, export_time_s, sequence)
                bursts.append(burst)
                sequence = (sequence + burst.count * burst.sequence_step) % SEQUENCE_MODULUS
            left_over.append((layout, rows[full:]))
        shared = _SharedMessages(self, export_time_s, sequence)
        for layout, rows in left_over:
            records = np.zeros(len(rows), layout.dtype)
            layout.fill(records, _select(columns, layout.columns, rows))
            octets = memoryview(records.tobytes())
            for number, row in enumerate(rows.tolist()):
                start = number * layout.record_octets
                shared.add(layout.template_id, octets[start : start + layout.record_octets], row=row)
        return bursts + shared.bursts()

    @property
    def _room_octets(self) -> int:
        """What a Message of one Set has for records."""
        room_octets = self._max_message_octets - self._max_message_octets % self.framing.set_alignment_octets
        return room_octets - self.framing.header_octets - self.framing.set_header_octets

    def _full(
        self,
        layout: RecordLayout,
        columns: Columns,
        rows: Array,
        per_message: int,
        export_time_s: int,
        sequence: int,
    ) -> Burst:
        count = len(rows) // per_message
        sequence_step = self._sequence_step(per_message)
        messages = np.empty(count, message_dtype(self.framing, layout.record_octets * per_message))
        fill(
            messages,
            set_id=layout.template_id,
            set_octets=messages.itemsize - self.framing.header_octets,
            padding=0,
            **self._header_values(
                message_octets=messages.itemsize,
                count=per_message,
                export_time_s=export_time_s,
                sequence_number=(sequence + sequence_step * np.arange(count)) % SEQUENCE_MODULUS,
            ),
        )
        step = max(1, _BATCH_RECORDS // per_message)
        records = np.zeros(step * per_message, layout.dtype)
        for first in range(0, count, step):
            batch = rows[first * per_message : (first + step) * per_message]
            layout.fill(records[: len(batch)], _select(columns, layout.columns, batch))
            filled = records[: len(batch)].view(messages.dtype["records"])
            messages["records"][first : first + len(filled)] = filled
        octets = memoryview(messages.view(np.uint8))  # type: ignore[arg-type]
        return Burst(octets, messages.itemsize, count, sequence, sequence_step, len(rows), rows)

    def _sequence_step(self, data_records: int) -> int:
        """By how much a Message with so many Data Records advances the Sequence Number."""
        return data_records if self.framing.sequence_counts_records else 1

    def _header_values(self, *, export_time_s: int, **values: Any) -> dict[str, Any]:
        """All that any protocol's header tells of a Message; `values` are each Message's own."""
        return {
            "version": self.framing.version,
            "export_time_s": export_time_s,
            "up_time_ms": 1000 * (export_time_s - system_init_s(export_time_s)),
            "observation_domain_id": self.observation_domain_id,
            "nanoseconds": 0,
            "sampling_interval": self.facts.sampling_interval,
            **values,
        }


class TemplateEncoder(Encoder):
    """Messages of a protocol that announces Templates."""

    def __init__(
        self,
        *,
        observation_domain_id: int,
        max_message_octets: int,
        templates: Templates,
        sequence_number: int = 0,
        psamp: bool = False,
        events: Templates | None = None,
    ) -> None:
        """events: what NAT events are told by; None: they are not told."""
        self._templates = templates
        self._events = events
        self._options = options_templates(templates, psamp=psamp)
        self._counter_octets, self._counters = templates.counter_octets(), templates.counters()
        self._told: Told | None = None
        self._records: dict[int, list[bytes]] = {}  # told last, by Template ID: those of states
        super().__init__(
            observation_domain_id=observation_domain_id,
            max_message_octets=max_message_octets,
            layouts=templates,
            sequence_number=sequence_number,
        )

    def as_records(self, columns: Columns) -> Columns:
        """Each flow in as many rows as its shortest counters need."""
        return split_counters(columns, self._counter_octets, self._counters)

    @property
    def template_ids(self) -> frozenset[int]:
        """Of all Templates and Options Templates that `announce` tells of."""
        return frozenset(template_id for ids in self._ids_by_set().values() for template_id in ids)

    def _ids_by_set(self) -> dict[int, list[int]]:
        return {
            self.framing.template_set_id: [each.template_id for each in self._all_templates()],
            self.framing.options_template_set_id: [each.template_id for each in self._options],
        }

    def withdraw(self, kept: Collection[int], export_time_s: int) -> list[Burst]:
        """Template Withdrawals of all but these, in as few Messages as hold them."""
        shared = _SharedMessages(self, export_time_s, self.sequence_number)
        for set_id, template_ids in self._ids_by_set().items():
            for template_id in sorted(set(template_ids) - set(kept)):
                shared.add(set_id, struct.pack(">HH", template_id, 0), is_data=False)
        return shared.bursts()

    def announce(self, export_time_s: int) -> list[Burst]:
        """All Templates and Options Templates, in as few Messages as hold them, then the Options Data Records.

        These have Messages of their own because scapy misreads what follows an Options Template Set.
        """
        self._told = self._now(export_time_s)
        records = {options: options.data_records(self._told) for options in self._options}
        self._records = {options.template_id: records[options] for options in self._options if options.is_state}
        return self._announcement(export_time_s, self._all_templates(), records)

    def _all_templates(self) -> list[Template]:
        return [*self._templates.all(), *(self._events.all() if self._events is not None else ())]

    def encode_events(self, columns: Columns, export_time_s: int) -> list[Burst]:
        return [] if self._events is None else self._encode(self._events, columns, export_time_s)

    def changes(self, export_time_s: int) -> list[Burst]:
        """Options Data Records of states that were not told before, after Options Templates that are new."""
        if self._told is None or self._told == self._now(export_time_s):
            return []
        self._told = self._now(export_time_s)
        changed = {}
        for options in self._options:
            if options.is_state:
                before, now = self._records[options.template_id], options.data_records(self._told)
                self._records[options.template_id] = now
                known = set(before)
                changed[options] = [record for record in now if record not in known]
        return self._announcement(export_time_s, (), changed)

    def _now(self, export_time_s: int) -> Told:
        init_ms = 1000 * system_init_s(export_time_s)
        return Told(self.observation_domain_id, init_ms, self.facts, self._templates)

    def _announcement(
        self, export_time_s: int, templates: Iterable[Template], records: Mapping[OptionsTemplate, list[bytes]]
    ) -> list[Burst]:
        shared = _SharedMessages(self, export_time_s, self.sequence_number)
        for template in templates:
            shared.add(self.framing.template_set_id, template.record, is_data=False)
        for options in records:
            if records[options]:
                shared.add(self.framing.options_template_set_id, options.record, is_data=False)
                shared.end_set()  # nfacctd 1.7.7 takes an Options Template Set with a second one for malformed
        shared.end()
        for options in records:
            for record in records[options]:
                shared.add(options.template_id, record)
        return shared.bursts()


class _SharedMessages:
    """Packs single records of any layout into Messages that may hold several Sets."""

    def __init__(self, encoder: Encoder, export_time_s: int, sequence: int) -> None:
        self._encoder, self._export_time_s, self._sequence = encoder, export_time_s, sequence
        self._framing = encoder.framing
        self._bursts: list[Burst] = []
        self._begin()

    def _begin(self) -> None:
        self._sets: list[tuple[int, bytearray]] = []
        self._octets = self._framing.header_octets
        self._records = self._data_records = 0
        self._rows: list[int] = []
        self._may_go_on = True

    def add(self, set_id: int, record: bytes | memoryview, *, is_data: bool = True, row: int | None = None) -> None:
        """One record; `row`: the flow it tells of."""
        if self._records == self._framing.max_records:
            self.end()
        end_octets = self._end_octets(set_id, record)
        if self._framing.aligned(end_octets) > self._encoder.max_message_octets:
            self.end()
            end_octets = self._end_octets(set_id, record)
        if not self._is_open(set_id):
            self._sets.append((set_id, bytearray()))
            self._may_go_on = True
        self._sets[-1][1].extend(record)
        self._octets = end_octets
        self._records += 1
        self._data_records += is_data
        if row is not None:
            self._rows.append(row)

    def end_set(self) -> None:
        """Finish the Set of the last record; one of the same ID begins another."""
        self._may_go_on = False

    def _is_open(self, set_id: int) -> bool:
        return self._may_go_on and bool(self._sets) and self._sets[-1][0] == set_id

    def _end_octets(self, set_id: int, record: bytes | memoryview) -> int:
        """Where in this Message `record` would end."""
        if self._is_open(set_id):
            return self._octets + len(record)
        return self._framing.aligned(self._octets) + self._framing.set_header_octets + len(record)

    def end(self) -> None:
        """Finish this Message, if there is one; what is added next goes into another."""
        if not self._sets:
            return
        encoder, framing = self._encoder, self._framing
        values = encoder._header_values(
            message_octets=framing.aligned(self._octets),
            count=self._records,
            export_time_s=self._export_time_s,
            sequence_number=self._sequence,
        )
        octets = packed(framing.header, **values) + b"".join(self._set(*each) for each in self._sets)
        rows = np.array(self._rows, dtype=np.intp)
        step = encoder._sequence_step(self._data_records)
        burst = Burst(memoryview(octets), len(octets), 1, self._sequence, step, self._data_records, rows)
        self._bursts.append(burst)
        self._sequence = (self._sequence + step) % SEQUENCE_MODULUS
        self._begin()

    def _set(self, set_id: int, records: bytearray) -> bytes:
        set_octets = self._framing.aligned(self._framing.set_header_octets + len(records))
        header = packed(self._framing.set_header, set_id=set_id, set_octets=set_octets)
        return (header + records).ljust(set_octets, b"\0")

    def bursts(self) -> list[Burst]:
        """Every Message so far, each a Burst of its own."""
        self.end()
        return self._bursts


def _select(columns: Columns, names: Iterable[str], rows: Array) -> Columns:
    """These rows (ascending numbers) of these columns; without a copy if they are neighbours."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return {name: columns[name][rows[0] : rows[-1] + 1] for name in names}
    return {name: np.take(columns[name], rows, axis=0) for name in names}
