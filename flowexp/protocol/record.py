# SPDX-License-Identifier: GPL-2.0-or-later
"""Data Records as people and programs read them: dicts from IANA name to JSON form.

`Layout` reads them off the wire under one received Template, whose word it does not trust: each record
read consumes at least one octet, and so does each value. `columns_to_records` makes the same dicts from
columns, without a wire between.
"""

from __future__ import annotations

import struct
from typing import Any, Callable, NamedTuple

from flowexp.protocol.datatypes import VARIABLE_LENGTH, Json, read_hexadecimal, read_unsigned
from flowexp.protocol.elements import BY_ID, BY_NAME, Columns, measured
from flowexp.protocol.template import Templates, default_templates

Record = dict[str, Json]

_LONG_LENGTH = 255  # a variable length of 255 octets and more: two octets follow (RFC 7011 §7)
_NUMBER_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


class RecordError(ValueError):
    """Octets that are no Data Records of this Template."""


class FieldSpecifier(NamedTuple):
    """A received Field Specifier; `name` is for what is no Information Element (NetFlow v9's scopes)."""

    element_id: int
    octets: int
    enterprise: int = 0
    scope: str = ""

    @property
    def name(self) -> str:
        """IANA's name; enterprise<PEN>.<id> or element<id> for what IANA's registry does not have."""
        if self.scope:
            return self.scope
        if self.enterprise:
            return f"enterprise{self.enterprise}.{self.element_id}"
        element = BY_ID.get(self.element_id)
        return element.name if element else f"element{self.element_id}"

    @property
    def read(self) -> Callable[[bytes], Json]:
        """What turns the field's octets into JSON form: hexadecimal text for whatever is not known."""
        element = BY_NAME.get(self.name)
        if self.scope:
            return read_unsigned
        if element is None:
            return read_hexadecimal
        known = element.type
        if self.octets == VARIABLE_LENGTH:
            return lambda octets: (known.read if known.allows(len(octets)) else read_hexadecimal)(octets)
        return known.read if known.allows(self.octets) else read_hexadecimal


class Layout:
    """How the Data Records of one Template are read. Raises RecordError if no record can be."""

    def __init__(self, specifiers: list[FieldSpecifier], *, is_options: bool = False) -> None:
        self.is_options = is_options
        self.weight = len(specifiers)
        self.names = _distinct([specifier.name for specifier in specifiers])
        self._fields = [
            (name, specifier.octets, specifier.read)
            for name, specifier in zip(self.names, specifiers)
            if specifier.octets  # a field of no octets has no value, and could be had for nothing
        ]
        self._least_octets = sum(1 if octets == VARIABLE_LENGTH else octets for _, octets, _ in self._fields)
        if not self._least_octets:
            raise RecordError("its records would have no octets")
        self._has_variable = any(octets == VARIABLE_LENGTH for _, octets, _ in self._fields)
        if not self._has_variable:
            codes, self._steps = zip(*(self._compiled(*field) for field in self._fields))
            self._struct = struct.Struct(">" + "".join(codes))

    @staticmethod
    def _compiled(
        name: str, octets: int, read: Callable[[bytes], Json]
    ) -> tuple[str, tuple[str, Callable[[Any], Json] | None]]:
        if read is read_unsigned and octets in _NUMBER_CODES:
            return _NUMBER_CODES[octets], (name, None)
        return f"{octets}s", (name, read)

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


def columns_to_records(columns: Columns, templates: Templates = _EVERYTHING) -> list[Record]:
    """Flows of one address family in JSON form, in their order, each with the elements of its Template.

    Values are as they were measured: no element is cut to its length in Messages.
    """
    records: list[Record] = [{}] * len(columns["packets"])
    for template, rows in templates.partition(columns):
        chosen = {name: columns[name][rows] for name in template.columns}
        values = zip(*(measured(field.name).json(chosen) for field in template.fields))
        for row, row_values in zip(rows.tolist(), values):
            records[row] = dict(zip(template.names, row_values))
    return records
