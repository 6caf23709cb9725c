# SPDX-License-Identifier: GPL-2.0-or-later
"""IPFIX Messages (RFC 7011 §3), sans-IO: columns of flows in, Messages out; no clock, no socket.

The encoder does not count what it encodes but what the caller commits: send the Bursts in order and
`commit` each one that was sent. What was not sent keeps its Sequence Numbers free: encode those rows
again, after a change of `max_message_octets` if need be.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flowexp.protocol.elements import Columns
from flowexp.protocol.template import Template, Templates

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array

VERSION = 10
TEMPLATE_SET_ID = 2
OPTIONS_TEMPLATE_SET_ID = 3
MESSAGE_HEADER = struct.Struct(">HHIII")
"""Version, Length, Export Time, Sequence Number, Observation Domain ID."""
SET_HEADER = struct.Struct(">HH")  # Set ID, Length
MAX_MESSAGE_OCTETS = 0xFFFF

_BATCH_RECORDS = 4000  # filled at a time: they stay in the cache (0.17 us a record if a million at once)
_SEQUENCE_MODULUS = 1 << 32


class MessageSizeError(ValueError):
    """A Message size that no Message, or not every Message, can have."""


@dataclass(frozen=True)
class Burst:
    """`count` Messages of `message_octets` each, one behind the other: as UDP_SEGMENT wants them."""

    octets: memoryview
    message_octets: int
    count: int
    sequence: int  # Sequence Number of the first Message
    records: int  # Data Records in all Messages; the same number in each
    rows: Array  # the flows they carry, in order: row numbers of the encoded columns

    def split(self, max_messages: int) -> Iterator[Burst]:
        """The same Messages, at most `max_messages` in a Burst; nothing is copied."""
        each = self.records // self.count
        for first in range(0, self.count, max_messages):
            count = min(max_messages, self.count - first)
            yield Burst(
                octets=self.octets[first * self.message_octets : (first + count) * self.message_octets],
                message_octets=self.message_octets,
                count=count,
                sequence=(self.sequence + first * each) % _SEQUENCE_MODULUS,
                records=count * each,
                rows=self.rows[first * each : (first + count) * each],
            )


class MessageEncoder:
    """Messages of one Observation Domain in one Transport Session.

    sequence_number: that of the next Message, which is the number of Data Records committed so far,
    modulo 2**32 (RFC 7011 §3.1); a restart that continues a session passes its last one.
    """

    def __init__(
        self,
        *,
        observation_domain_id: int,
        max_message_octets: int,
        templates: Templates,
        sequence_number: int = 0,
    ) -> None:
        self.observation_domain_id = observation_domain_id
        self.sequence_number = sequence_number % _SEQUENCE_MODULUS
        self._templates = templates
        self.max_message_octets = max_message_octets

    @property
    def max_message_octets(self) -> int:
        """No Message is longer. Setting it raises MessageSizeError if a record would fit no Message."""
        return self._max_message_octets

    @max_message_octets.setter
    def max_message_octets(self, octets: int) -> None:
        largest = max(max(len(item.record), item.record_octets) for item in self._templates.all())
        least = MESSAGE_HEADER.size + SET_HEADER.size + largest
        if not least <= octets <= MAX_MESSAGE_OCTETS:
            raise MessageSizeError(
                f"Messages of {octets} octets: not within {least} and {MAX_MESSAGE_OCTETS}"
            )
        self._max_message_octets = octets

    def commit(self, burst: Burst) -> None:
        """Count a Burst as sent. Bursts are committed in the order in which they were returned."""
        self.sequence_number = (burst.sequence + burst.records) % _SEQUENCE_MODULUS

    def announce(self, export_time_s: int) -> list[Burst]:
        """All Templates and the Options Template, in as few Messages as hold them, then the sampling record.

        The record has a Message of its own because scapy misreads what follows an Options Template Set.
        """
        sampling = self._templates.sampling
        message = _SharedMessages(self, export_time_s, self.sequence_number)
        for template in self._templates.all():
            message.add(TEMPLATE_SET_ID, template.record)
        message.add(OPTIONS_TEMPLATE_SET_ID, sampling.record)
        message.end()
        message.add(sampling.template_id, sampling.data_record(self.observation_domain_id), records=1)
        return message.bursts()

    def encode(self, columns: Columns, export_time_s: int) -> list[Burst]:
        """Data Records of flows of one address family, each in the Template for what the flow has.

        First full Messages, a Burst for each Template; then what is left over from each, packed into
        shared Messages, a Burst for each.
        """
        sequence, bursts, left_over = self.sequence_number, [], []
        for template, rows in self._templates.partition(columns):
            per_message = self._room_octets // template.record_octets
            full = len(rows) - len(rows) % per_message
            if full:
                selected = rows[:full]
                bursts.append(self._full(template, columns, selected, per_message, export_time_s, sequence))
                sequence = (sequence + full) % _SEQUENCE_MODULUS
            left_over.append((template, rows[full:]))
        shared = _SharedMessages(self, export_time_s, sequence)
        for template, rows in left_over:
            records = np.empty(len(rows), template.dtype)
            template.fill(records, _select(columns, template.columns, rows))
            octets = memoryview(records.tobytes())
            for number, row in enumerate(rows.tolist()):
                start = number * template.record_octets
                record = octets[start : start + template.record_octets]
                shared.add(template.template_id, record, records=1, row=row)
        return bursts + shared.bursts()

    @property
    def _room_octets(self) -> int:
        """What a Message of one Set has for records."""
        return self._max_message_octets - MESSAGE_HEADER.size - SET_HEADER.size

    def _full(
        self,
        template: Template,
        columns: Columns,
        rows: Array,
        per_message: int,
        export_time_s: int,
        sequence: int,
    ) -> Burst:
        count = len(rows) // per_message
        messages = np.empty(count, _message_dtype(template.record_octets * per_message))
        messages["version"] = VERSION
        messages["length"] = messages.itemsize
        messages["export_time_s"] = export_time_s
        messages["sequence"] = (sequence + per_message * np.arange(count)) % _SEQUENCE_MODULUS
        messages["observation_domain_id"] = self.observation_domain_id
        messages["set_id"] = template.template_id
        messages["set_length"] = messages.itemsize - MESSAGE_HEADER.size

        step = max(1, _BATCH_RECORDS // per_message)
        records = np.empty(step * per_message, template.dtype)
        for first in range(0, count, step):
            batch = rows[first * per_message : (first + step) * per_message]
            template.fill(records[: len(batch)], _select(columns, template.columns, batch))
            filled = records[: len(batch)].view(messages.dtype["records"])
            messages["records"][first : first + len(filled)] = filled
        octets = memoryview(messages.view(np.uint8))  # type: ignore[arg-type]
        return Burst(octets, messages.itemsize, count, sequence, len(rows), rows)


@functools.cache
def _message_dtype(records_octets: int) -> np.dtype[Any]:
    """A Message with one Set of so many octets of records (RFC 7011 §3.1, §3.3.2); at most 65,535 differ."""
    return np.dtype(
        [
            ("version", ">u2"),
            ("length", ">u2"),
            ("export_time_s", ">u4"),
            ("sequence", ">u4"),
            ("observation_domain_id", ">u4"),
            ("set_id", ">u2"),
            ("set_length", ">u2"),
            ("records", f"V{records_octets}"),
        ]
    )


def _select(columns: Columns, names: Iterable[str], rows: Array) -> Columns:
    """These rows (ascending numbers) of these columns; without a copy if they are neighbours."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return {name: columns[name][rows[0] : rows[-1] + 1] for name in names}
    return {name: np.take(columns[name], rows, axis=0) for name in names}


class _SharedMessages:
    """Packs single records of any Template into Messages that may hold several Sets."""

    def __init__(self, encoder: MessageEncoder, export_time_s: int, sequence: int) -> None:
        self._encoder, self._export_time_s, self._sequence = encoder, export_time_s, sequence
        self._bursts: list[Burst] = []
        self._begin()

    def _begin(self) -> None:
        self._sets: list[tuple[int, bytearray]] = []
        self._octets = MESSAGE_HEADER.size
        self._records = 0
        self._rows: list[int] = []

    def add(
        self, set_id: int, record: bytes | memoryview, *, records: int = 0, row: int | None = None
    ) -> None:
        """One record; `records`: how many Data Records it is, which a Template Record is not."""
        new_set = not self._sets or self._sets[-1][0] != set_id
        if self._octets + SET_HEADER.size * new_set + len(record) > self._encoder.max_message_octets:
            self.end()
            new_set = True
        if new_set:
            self._sets.append((set_id, bytearray()))
        self._sets[-1][1].extend(record)
        self._octets += SET_HEADER.size * new_set + len(record)
        self._records += records
        if row is not None:
            self._rows.append(row)

    def end(self) -> None:
        """Finish this Message; what is added next goes into another."""
        header = MESSAGE_HEADER.pack(
            VERSION, self._octets, self._export_time_s, self._sequence, self._encoder.observation_domain_id
        )
        sets = (SET_HEADER.pack(set_id, SET_HEADER.size + len(body)) + body for set_id, body in self._sets)
        octets = memoryview(header + b"".join(sets))
        rows = np.array(self._rows, dtype=np.intp)
        self._bursts.append(Burst(octets, self._octets, 1, self._sequence, self._records, rows))
        self._sequence = (self._sequence + self._records) % _SEQUENCE_MODULUS
        self._begin()

    def bursts(self) -> list[Burst]:
        """Every Message so far, each a Burst of its own."""
        if self._sets:
            self.end()
        return self._bursts
