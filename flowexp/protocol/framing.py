# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protocol puts around its records, as data: Message Header, Set Header, alignment; and Messages made of it.

The words here are RFC 7011's: what it calls Message, Set and Observation Domain is a Packet, a FlowSet and a Source ID
to NetFlow v9.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array

MAX_MESSAGE_OCTETS = 0xFFFF
SEQUENCE_MODULUS = 1 << 32

Fields = tuple[tuple[str, str], ...]
"""Consecutive fields: names and numpy formats."""


def fields(layout: str, names: str) -> Fields:
    """The fields of a header in network byte order. `layout`: as `struct` has it, its ">" in front."""
    return tuple((name, f">{code}") for name, code in zip(names.split(), layout[1:]))


class Framing(NamedTuple):
    """What a protocol puts around its records. Header fields have the names in `Encoder._header_values`."""

    version: int
    header: Fields
    sequence_counts_records: bool  # else Messages
    set_header: Fields = fields(">HH", "set_id set_octets")  # () where there is one unnamed Set
    set_alignment_octets: int = 1  # Sets end with zeros up to a multiple of this
    template_set_id: int = 0
    options_template_set_id: int = 0
    max_records: int = MAX_MESSAGE_OCTETS

    @property
    def header_octets(self) -> int:
        """Length of the Message Header."""
        return octets_of(self.header)

    @property
    def set_header_octets(self) -> int:
        """Length of a Set Header."""
        return octets_of(self.set_header)

    def aligned(self, octets: int) -> int:
        """Where a Set ends whose last record ends at `octets` of a Message."""
        return octets + -octets % self.set_alignment_octets


@dataclass(frozen=True)
class Burst:
    """`count` Messages of `message_octets` each, one behind the other: as UDP_SEGMENT wants them."""

    octets: memoryview
    message_octets: int
    count: int
    sequence: int  # Sequence Number of the first Message
    sequence_step: int  # from each Message to the next
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
                sequence=(self.sequence + first * self.sequence_step) % SEQUENCE_MODULUS,
                sequence_step=self.sequence_step,
                records=count * each,
                rows=self.rows[first * each : (first + count) * each],
            )


@functools.cache
def message_dtype(framing: Framing, records_octets: int) -> np.dtype[Any]:
    """A Message with one Set of so many octets of records; at most 65,535 differ in each protocol."""
    parts = [*framing.header, *framing.set_header, ("records", f"V{records_octets}")]
    end_octets = octets_of(parts)
    if framing.aligned(end_octets) > end_octets:
        parts.append(("padding", f"({framing.aligned(end_octets) - end_octets},)u1"))
    return np.dtype(parts)


def octets_of(parts: Iterable[tuple[str, str]]) -> int:
    """Length of consecutive fields."""
    return sum(np.dtype(code).itemsize for _, code in parts)


def fill(messages: Array, **values: Any) -> None:
    """Write everything around the records; there may be more `values` than fields."""
    for name in messages.dtype.names or ():
        if name != "records":
            messages[name] = values[name]


def packed(header: Fields, **values: Any) -> bytes:
    """One header's octets."""
    record = np.empty(1, np.dtype(list(header)))
    fill(record, **values)
    return record.tobytes()
