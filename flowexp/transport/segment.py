# SPDX-License-Identifier: GPL-2.0-or-later
"""The octets of a spool's segment: Messages in groups, and marks between them (spool.py says what for)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flowexp.protocol.ipfix import MESSAGE_HEADER, OPTIONS_TEMPLATE_SET_ID, SET_HEADER, TEMPLATE_SET_ID, VERSION

HEADER_OCTETS, SEQUENCE_AT = MESSAGE_HEADER.size, 8
NUMBER = struct.Struct(">I")

_FIELDS_AT, _WITHDRAWAL_OCTETS = {TEMPLATE_SET_ID: 4, OPTIONS_TEMPLATE_SET_ID: 6}, 4
"""How long a record's header is (RFC 7011 sections 3.4.1, 3.4.2.2). A Template Withdrawal has the first four octets
alone (section 8.1)."""
_FIELD_OCTETS, _ENTERPRISE_OCTETS = 4, 4

MAX_GROUP_OCTETS = 1 << 16
"""A write, and a read: Messages of more than that are split into groups (one Message may have as much alone)."""
MOST_READ_OCTETS = MAX_GROUP_OCTETS + 0xFFFF + 2 * HEADER_OCTETS
"""Enough for one group."""


class Position(NamedTuple):
    """A place between two groups. Positions are ordered as the Messages are."""

    segment: int
    offset: int


@dataclass
class Group:
    """Messages of one Observation Domain, one behind the other."""

    octets: bytearray
    messages: list[tuple[int, int]]
    """Where each begins, and how many Data Records it has."""
    domain: int
    end: Position
    """Where the next group begins."""

    @property
    def records(self) -> int:
        return sum(records for _, records in self.messages)

    def templates(self) -> Iterator[Template]:
        """Those of Messages without a Data Record, in their order."""
        for at, records in self.messages:
            if not records:
                _, length, *_ = MESSAGE_HEADER.unpack_from(self.octets, at)
                yield from templates_in(self.octets[at : at + length])


class Template(NamedTuple):
    """A Template Record or an Options Template Record; without fields it is a Template Withdrawal."""

    set_id: int
    template_id: int
    octets: bytes

    @property
    def is_withdrawal(self) -> bool:
        return len(self.octets) == _WITHDRAWAL_OCTETS


class Head(NamedTuple):
    """What a Collector must know first, of one Observation Domain: each Message, and its Data Records."""

    domain: int
    messages: tuple[tuple[bytes, int], ...]

    def says_the_same(self, other: Head) -> bool:
        """Whether the two differ in Export Time and Sequence Number at most."""
        return self._said() == other._said()

    def templates(self) -> Iterator[Template]:
        """Those of Messages without a Data Record, in their order."""
        for message, records in self.messages:
            if not records:
                yield from templates_in(message)

    def _said(self) -> tuple[int, list[bytes]]:
        return self.domain, [message[:4] + message[HEADER_OCTETS:] for message, _ in self.messages]


def mark(message: bytes | bytearray, sequence: int) -> bytes:
    """The mark behind a group that begins with `message`."""
    _, _, export_time_s, _, domain = MESSAGE_HEADER.unpack_from(message)
    return MESSAGE_HEADER.pack(VERSION, HEADER_OCTETS, export_time_s, sequence, domain)


def number(octets: bytearray, message_octets: int, records: int, sequence: int) -> int:
    """Give the Messages, equally long, Sequence Numbers from this one on. Returns the one after them."""
    for at in range(0, len(octets), message_octets):
        NUMBER.pack_into(octets, at + SEQUENCE_AT, sequence)
        sequence = (sequence + records) & 0xFFFFFFFF
    return sequence


def head_octets(heads: Sequence[Head]) -> tuple[bytes, dict[int, int]]:
    """A segment's beginning, and the Sequence Numbers that come next."""
    content, numbers = bytearray(), dict[int, int]()
    ending = MESSAGE_HEADER.pack(VERSION, HEADER_OCTETS, 0, 0, 0)
    for head in heads:
        sequence = 0
        for message, records in head.messages:
            numbered = bytearray(message)
            sequence = number(numbered, len(message), records, sequence)
            content += numbered
            ending = mark(message, sequence)
        content += ending
        numbers[head.domain] = sequence
    return bytes(content + ending), numbers


def first_group(octets: bytes | memoryview, begin: Position) -> Group | None:
    """The group that `octets` begin with, whose place is `begin`; None if it is not whole."""
    messages: list[tuple[int, int]] = []
    at, number = 0, 0
    while at + HEADER_OCTETS <= len(octets):
        version, length, _, sequence, domain = MESSAGE_HEADER.unpack_from(octets, at)
        if version != VERSION or length < HEADER_OCTETS:
            return None
        if messages:
            messages[-1] = messages[-1][0], (sequence - number) & 0xFFFFFFFF
        if length == HEADER_OCTETS:
            end = Position(begin.segment, begin.offset + at + HEADER_OCTETS)
            return Group(bytearray(octets[:at]), messages, domain, end)
        messages.append((at, 0))
        number = sequence
        at += length
    return None


def groups_in(content: memoryview, begin: Position) -> Iterator[Group]:
    while True:
        group = first_group(content[begin.offset : begin.offset + MOST_READ_OCTETS], begin)
        if group is None:
            return
        yield group
        begin = group.end


def heads_in(content: memoryview) -> tuple[tuple[Head, ...], int]:
    """The heads of a segment, and where they end; () and 0 if it does not begin as one."""
    heads: list[Head] = []
    for group in groups_in(content, Position(0, 0)):
        if not group.messages:
            return tuple(heads), group.end.offset
        starts = [at for at, _ in group.messages]
        ends = [*starts[1:], len(group.octets)]
        parts = [bytes(group.octets[at:end]) for at, end in zip(starts, ends)]
        heads.append(Head(group.domain, tuple((part, records) for part, (_, records) in zip(parts, group.messages))))
    return (), 0


def templates_in(message: bytes | bytearray) -> Iterator[Template]:
    """Every Template, Options Template and Template Withdrawal in a Message."""
    at = HEADER_OCTETS
    while at + SET_HEADER.size <= len(message):
        set_id, octets = SET_HEADER.unpack_from(message, at)
        if octets < SET_HEADER.size:
            return
        if set_id in _FIELDS_AT:
            yield from _templates(set_id, bytes(message[at + SET_HEADER.size : at + octets]))
        at += octets


def _templates(set_id: int, content: bytes) -> Iterator[Template]:
    while len(content) >= _WITHDRAWAL_OCTETS:
        template_id, fields = SET_HEADER.unpack_from(content)
        end = _FIELDS_AT[set_id] if fields else _WITHDRAWAL_OCTETS
        for _ in range(fields):
            is_enterprises = end + _FIELD_OCTETS <= len(content) and NUMBER.unpack_from(content, end)[0] >> 31
            end += _FIELD_OCTETS + (_ENTERPRISE_OCTETS if is_enterprises else 0)
        if end > len(content) or not template_id:
            return
        yield Template(set_id, template_id, content[:end])
        content = content[end:]


def message_of(template: Template, like: bytes) -> bytearray:
    """A Message that holds nothing else; Export Time and Observation Domain are those of `like`."""
    octets = SET_HEADER.size + len(template.octets)
    _, _, export_time_s, _, domain = MESSAGE_HEADER.unpack_from(like)
    header = MESSAGE_HEADER.pack(VERSION, HEADER_OCTETS + octets, export_time_s, 0, domain)
    return bytearray(header + SET_HEADER.pack(template.set_id, octets) + template.octets)


def is_damaged(rest: memoryview) -> bool:
    """Whether what follows the last mark is something else than the beginning of a group that a kill cut off."""
    at = 0
    while at + HEADER_OCTETS <= len(rest):
        version, length, *_ = MESSAGE_HEADER.unpack_from(rest, at)
        if version != VERSION or length < HEADER_OCTETS:
            return True
        at += length
    return False
