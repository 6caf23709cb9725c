# SPDX-License-Identifier: GPL-2.0-or-later
"""RFC 7011's framing, checked by hand: Messages, Sets, Templates and how many Data Records there are.

No value is looked at. MalformedMessage says which rule a Message breaks, and where.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

VERSION = 10
TEMPLATE_SET, OPTIONS_TEMPLATE_SET, FIRST_DATA_SET = 2, 3, 256
ENTERPRISE_BIT, VARIABLE_LENGTH = 0x8000, 65535
_MESSAGE_HEADER, _SHORTS = struct.Struct("!HHIII"), struct.Struct("!HH")


class MalformedMessage(Exception):
    """A Message that no Collector has to accept."""


class Message(NamedTuple):
    """What the framing tells of one Message; `set_ids` in order, `data_records` Options included."""

    sequence_number: int
    observation_domain_id: int
    set_ids: list[int]
    data_records: int


class Session:
    """The Messages of one Transport Session, in order; it remembers the Templates."""

    def __init__(self) -> None:
        self.templates: dict[int, list[int]] = {}
        """Template ID to the lengths of its fields, 65535 for a variable one."""

    def read(self, datagram: bytes) -> Message:
        """Checks a Message that fills its datagram (section 3.1)."""
        version, length, _, sequence_number, domain = _MESSAGE_HEADER.unpack_from(datagram)
        _require(version == VERSION, f"Version {version} (section 3.1)")
        _require(length == len(datagram), f"Length {length} in a datagram of {len(datagram)} (section 3.1)")
        set_ids, count = [], 0
        for set_id, content in _sets(datagram):
            set_ids.append(set_id)
            if set_id >= FIRST_DATA_SET:
                count += self._count(set_id, content)
            else:
                self._learn(set_id, content)
        return Message(sequence_number, domain, set_ids, count)

    def _learn(self, set_id: int, content: bytes) -> None:
        """Template Records (section 3.4.1) and Options Template Records (section 3.4.2)."""
        _require(set_id in (TEMPLATE_SET, OPTIONS_TEMPLATE_SET), f"Set ID {set_id} (section 3.3.2)")
        header = 4 if set_id == TEMPLATE_SET else 6
        at = 0
        while at + header <= len(content):
            template_id, field_count = _SHORTS.unpack_from(content, at)
            _require(template_id >= FIRST_DATA_SET, f"Template ID {template_id} (section 3.4.1)")
            at += header
            lengths = []
            for _ in range(field_count):
                element, length = _SHORTS.unpack_from(content, at)
                lengths.append(length)
                at += 8 if element & ENTERPRISE_BIT else 4
            self.templates[template_id] = lengths
        _require(not any(content[at:]), f"padding {content[at:]!r} is not zero (section 3.3.1)")

    def _count(self, set_id: int, content: bytes) -> int:
        """Data Records in a Data Set; what is left must be padding shorter than any (section 3.3.1)."""
        _require(set_id in self.templates, f"Data Set {set_id} before its Template")
        lengths = self.templates[set_id]
        shortest = sum(1 if length == VARIABLE_LENGTH else length for length in lengths)
        at = count = 0
        while len(content) - at >= shortest:
            at = _record_end(content, at, lengths)
            count += 1
        _require(at <= len(content), f"a Data Record of Set {set_id} goes beyond its Set")
        _require(not any(content[at:]), f"padding {content[at:]!r} is not zero (section 3.3.1)")
        return count


def _require(fulfilled: bool, otherwise: str) -> None:
    if not fulfilled:
        raise MalformedMessage(otherwise)


def _sets(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Set ID and content of each Set (section 3.3)."""
    at = _MESSAGE_HEADER.size
    while at < len(datagram):
        set_id, length = _SHORTS.unpack_from(datagram, at)
        _require(_SHORTS.size < length <= len(datagram) - at, f"Set {set_id} at {at}: Length {length} (section 3.3.2)")
        yield set_id, datagram[at + _SHORTS.size : at + length]
        at += length


def _record_end(content: bytes, at: int, lengths: list[int]) -> int:
    """Where the Data Record that begins at `at` ends; variable lengths as in section 7."""
    for length in lengths:
        if length != VARIABLE_LENGTH:
            at += length
        elif content[at] < 255:
            at += 1 + content[at]
        else:
            at += 3 + int.from_bytes(content[at + 1 : at + 3], "big")
    return at
