# SPDX-License-Identifier: GPL-2.0-or-later
"""Data Records as people and programs read them: dicts from IANA name to JSON form.

`Layout` reads them off the wire under one received Template, whose word it does not trust: each record
read consumes at least one octet, and so does each value. `columns_to_records` makes the same dicts from
columns, without a wire between; `columns_to_values` leaves them columns, which is quick.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple

from flowexp.protocol.datatypes import VARIABLE_LENGTH, Json, read_hexadecimal, read_unsigned
from flowexp.protocol.elements import Columns, measured
from flowexp.protocol.registry import BY_ID, IANA, Element, ElementKey
from flowexp.protocol.template import Templates, default_templates

Record = dict[str, Json]

_LONG_LENGTH = 255  # a variable length of 255 octets and more: two octets follow (RFC 7011 §7)
_OWN_WEIGHT = 3
"""What a Layout takes in memory beside its fields, in fields."""
_NUMBER_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


class RecordError(ValueError):
    """Octets that are no Data Records of this Template."""


class FieldSpecifier(NamedTuple):
    """A received Field Specifier; `scope` names what is no Information Element (NetFlow v9's scopes)."""

    element_id: int
    octets: int
    enterprise: int = IANA
    scope: str = ""

    @property
    def key(self) -> ElementKey:
        """Its element's place in BY_ID."""
        return self.enterprise, self.element_id

    def name(self, element: Element | None) -> str:
        """The element's name; enterprise<PEN>.<id> or element<id> of one that is not known."""
        if element is not None:
            return element.name
        unknown = f"enterprise{self.enterprise}." if self.enterprise else "element"
        return self.scope or f"{unknown}{self.element_id}"

    def read(self, element: Element | None) -> Callable[[bytes], Json]:
        """What turns the field's octets into JSON form: hexadecimal text for whatever is not known."""
        if self.scope:
            return read_unsigned
        if element is None:
            return read_hexadecimal
        known = element.type
        if self.octets == VARIABLE_LENGTH:
            return lambda octets: (known.read if known.allows(len(octets)) else read_hexadecimal)(octets)
        return known.read if known.allows(self.octets) else read_hexadecimal


class Layout:
    """How the Data Records of one Template are read. Raises RecordError if no record can be.

    find: the element of a key, or None; what it does not find may be learned later.
    """

    def __init__(
        self,
        specifiers: list[FieldSpecifier],
        *,
        is_options: bool = False,
        find: Callable[[ElementKey], Element | None] = BY_ID.get,
    ) -> None:
        self.is_options = is_options
        self.weight = len(specifiers) + _OWN_WEIGHT
        self.unknown: dict[ElementKey, list[int]] = {}
        """The enterprise-specific elements that were not found, and which fields they are."""
        elements = [None if specifier.scope else find(specifier.key) for specifier in specifiers]
        named = _distinct([specifier.name(element) for specifier, element in zip(specifiers, elements)])
        self.names = named
        fields = [
            (name, specifier, element)
            for name, specifier, element in zip(named, specifiers, elements)
            if specifier.octets  # a field of no octets has no value, and could be had for nothing
        ]
        self._specifiers = [specifier for _, specifier, _ in fields]
        self._fields = [(name, each.octets, each.read(element)) for name, each, element in fields]
        for place, (_, specifier, element) in enumerate(fields):
            if element is None and specifier.enterprise:
                self.unknown.setdefault(specifier.key, []).append(place)
        self._least_octets = sum(1 if octets == VARIABLE_LENGTH else octets for _, octets, _ in self._fields)
        if not self._least_octets:
            raise RecordError("its records would have no octets")
        self._has_variable = any(octets == VARIABLE_LENGTH for _, octets, _ in self._fields)
        self._steps: list[tuple[str, Callable[[Any], Json] | None]] = []
        if not self._has_variable:
            codes, steps = zip(*(self._compiled(*field) for field in self._fields))
            self._struct, self._steps = struct.Struct(">" + "".join(codes)), list(steps)

    @staticmethod
    def _compiled(
        name: str, octets: int, read: Callable[[bytes], Json]
    ) -> tuple[str, tuple[str, Callable[[Any], Json] | None]]:
        if read is read_unsigned and octets in _NUMBER_CODES:
            return _NUMBER_CODES[octets], (name, None)
        return f"{octets}s", (name, read)

    def learn(self, element: Element) -> None:
        """Name and type of an element that was not found before. Costs as much as it has fields here."""
        places = self.unknown.pop(element.key, ())
        taken = {name for name, _, _ in self._fields} if places else set()
        number, name = 1, element.name
        for place in places:
            while name in taken:
                number += 1
                name = f"{element.name}#{number}"
            taken.add(name)
            specifier = self._specifiers[place]
            self._fields[place] = name, specifier.octets, specifier.read(element)
            if self._steps:
                self._steps[place] = name, specifier.read(element)

    def read(self, octets: memoryview) -> tuple[list[Record], str]:
        """The Data Records in a Set's content, and what is wrong with the rest of it ("" if nothing).

        A rest shorter than the shortest record is padding (RFC 7011 §3.3.1).
        """
        if len(octets) < self._least_octets:
            return [], f"its {len(octets)} octets hold no record of {self._least_octets}" if octets else ""
        return self._read_variable(octets) if self._has_variable else (self._read_fixed(octets), "")

    def _read_fixed(self, octets: memoryview) -> list[Record]:
        whole = len(octets) - len(octets) % self._struct.size
        return [
            {name: value if read is None else read(value) for (name, read), value in zip(self._steps, values)}
            for values in self._struct.iter_unpack(octets[:whole])
        ]

    def _read_variable(self, octets: memoryview) -> tuple[list[Record], str]:
        records: list[Record] = []
        position = 0
        while len(octets) - position >= self._least_octets:
            record: Record = {}
            for name, length, read in self._fields:
                if length == VARIABLE_LENGTH:
                    position, length = _variable_length(octets, position)
                if position + length > len(octets):
                    return records, f"{name} in record {len(records) + 1} goes beyond the end"
                record[name] = read(bytes(octets[position : position + length]))
                position += length
            records.append(record)
        return records, ""


def _variable_length(octets: memoryview, position: int) -> tuple[int, int]:
    """Where the content of a variable-length field begins, and its length; beyond the end if cut off."""
    header = bytes(octets[position : position + 3])
    if header[:1] == bytes([_LONG_LENGTH]):
        return position + 3, int.from_bytes(header[1:], "big") if len(header) == 3 else len(octets)
    return position + 1, header[0] if header else len(octets)


def _distinct(names: list[str]) -> list[str]:
    """An element that comes again in a Template is `name#2` then, `name#3`, ..."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return distinct


_EVERYTHING = default_templates(tcp_control_bits_octets=2)


class Alike(NamedTuple):
    """Data Records with the same elements, column by column."""

    values: Mapping[str, Sequence[Json]]
    """Each element's, in JSON form, one a record."""
    places: Sequence[int]
    """Which of the flows these are."""


def columns_to_values(columns: Columns, templates: Templates = _EVERYTHING) -> Iterator[Alike]:
    """Flows of one address family in JSON form, those of each Template together.

    Values are as they were measured: no element is cut to its length in Messages.
    """
    for template, rows in templates.partition(columns):
        chosen = {name: columns[name][rows] for name in template.columns}
        values = {field.name: measured(field.name).json(chosen) for field in template.fields}
        yield Alike(values, rows.tolist())


def columns_to_records(columns: Columns, templates: Templates = _EVERYTHING) -> list[Record]:
    """The same, flow by flow in their order."""
    records: list[Record] = [{}] * len(columns["packets"])
    for values, places in columns_to_values(columns, templates):
        for place, row in zip(places, zip(*values.values())):
            records[place] = dict(zip(values, row))
    return records
