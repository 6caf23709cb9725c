# SPDX-License-Identifier: GPL-2.0-or-later
"""What a Collector keeps of its Transport Sessions, bounded, whatever they send; and what one datagram gave.

Templates of at most MAX_FIELDS Field Specifiers (a Template itself counts as three), MAX_ELEMENTS elements learned
from RFC 5610 records and MAX_DOMAINS Sequence Numbers are kept, for all senders together; the ones defined or heard
longest ago are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from flowexp.protocol import typeinfo
from flowexp.protocol.record import Layout, Record
from flowexp.protocol.registry import BY_ID, Element, ElementKey

MAX_FIELDS = 1 << 17  # 75 MiB at worst; 400 exporters like this one have no more, or one with every field group
MAX_ELEMENTS = 1 << 12
MAX_DOMAINS = 1 << 14
MAX_PROBLEMS = 16  # in one datagram; the rest is only counted

_SEQUENCE_MODULUS = 1 << 32


class Domain(NamedTuple):
    """Whose Templates and Sequence Numbers: one Observation Domain (v9: Source ID) of one session."""

    session: Hashable
    version: int
    domain_id: int


@dataclass
class Decoded:
    """What one datagram gave."""

    version: int = 0
    observation_domain_id: int = 0
    export_time_s: int = 0
    sequence: int = 0
    records: list[Record] = field(default_factory=list)
    options_records: list[Record] = field(default_factory=list)  # Options Data Records
    templates: list[tuple[int, list[str]]] = field(default_factory=list)  # Template ID, element names
    problems: list[str] = field(default_factory=list)  # one line each
    problems_left_out: int = 0
    sets_without_template: int = 0
    lost_records: int = 0  # by gaps in the Sequence Numbers; negative: some that were counted came late
    lost_packets: int = 0  # the same for NetFlow v9, which counts packets

    def problem(self, text: str) -> None:
        """Complain in one line."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)
        else:
            self.problems_left_out += 1

    def take(self, layout: Layout, octets: memoryview, where: str) -> int:
        """Read a Set of Data Records and return their number."""
        records, fault = layout.read(octets)
        (self.options_records if layout.is_options else self.records).extend(records)
        if fault:
            self.problem(f"{where}: {fault}")
        return len(records)


class Sessions:
    """Templates and Sequence Numbers of every session."""

    def __init__(self) -> None:
        self._layouts: OrderedDict[tuple[Domain, int], Layout] = OrderedDict()
        self._sequences: OrderedDict[Domain, tuple[int | None, int]] = OrderedDict()  # expected, missing
        self._ids: dict[tuple[Domain, bool], set[int]] = {}  # of the Templates kept, and of the Options Templates
        self._elements: OrderedDict[tuple[Domain, ElementKey], Element] = OrderedDict()
        self._waiting: dict[tuple[Domain, ElementKey], set[int]] = {}  # IDs of Templates that lack an element
        self.fields_held = 0

    def layout(self, domain: Domain, template_id: int) -> Layout | None:
        """The Template that was defined last under this ID."""
        return self._layouts.get((domain, template_id))

    def define(self, domain: Domain, template_id: int, layout: Layout) -> None:
        """Keep a Template, in place of an older one."""
        self.withdraw(domain, template_id)
        self._layouts[domain, template_id] = layout
        self.fields_held += layout.weight
        self._ids.setdefault((domain, layout.is_options), set()).add(template_id)
        for key in layout.unknown:
            self._waiting.setdefault((domain, key), set()).add(template_id)
        while self.fields_held > MAX_FIELDS:
            self.withdraw(*next(iter(self._layouts)))

    def withdraw(self, domain: Domain, template_id: int) -> None:
        """Forget a Template, if it is known."""
        layout = self._layouts.pop((domain, template_id), None)
        if layout is None:
            return
        self.fields_held -= layout.weight
        ids = self._ids[domain, layout.is_options]
        ids.remove(template_id)
        if not ids:
            del self._ids[domain, layout.is_options]
        for key in layout.unknown:
            waiting = self._waiting[domain, key]
            waiting.remove(template_id)
            if not waiting:
                del self._waiting[domain, key]

    def element(self, domain: Domain, key: ElementKey) -> Element | None:
        """The element as it is known here, or as that domain has told."""
        return BY_ID.get(key) or self._elements.get((domain, key))

    def learn(self, domain: Domain, records: Iterable[Record]) -> None:
        """Take what Options Data Records tell of elements (RFC 5610), for Templates that are here and that come.

        An element that is told of again, otherwise, is another one for Templates that come after that.
        """
        for element in filter(None, map(typeinfo.element_of, records)):
            if element.key in BY_ID:
                continue
            self._elements.pop((domain, element.key), None)
            self._elements[domain, element.key] = element
            for template_id in self._waiting.pop((domain, element.key), ()):
                self._layouts[domain, template_id].learn(element)
            if len(self._elements) > MAX_ELEMENTS:
                self._elements.popitem(last=False)

    def withdraw_all(self, domain: Domain, *, is_options: bool) -> None:
        """Forget a domain's Templates, or its Options Templates."""
        for template_id in tuple(self._ids.get((domain, is_options), ())):
            self.withdraw(domain, template_id)

    def forget(self, session: Hashable) -> None:
        """A Transport Session has ended, and with it what it has told (RFC 7011 section 8.1)."""
        for domain, is_options in [each for each in self._ids if each[0].session == session]:
            self.withdraw_all(domain, is_options=is_options)
        for key in [each for each in self._elements if each[0].session == session]:
            del self._elements[key]
        for domain in [each for each in self._sequences if each.session == session]:
            del self._sequences[domain]

    def lost(self, domain: Domain, sequence: int, units: int | None) -> int | None:
        """How many units are missing before this datagram, which brings `units` (None: it cannot be known).

        Negative: these units had been counted as missing. None: the numbers began anew.
        """
        expected, missing = self._sequences.pop(domain, (None, 0))
        gap = 0 if expected is None else (sequence - expected) % _SEQUENCE_MODULUS
        restarted = False
        if gap < _SEQUENCE_MODULUS // 2:
            expected = None if units is None else (sequence + units) % _SEQUENCE_MODULUS
        elif units is not None and 0 < units <= missing:
            gap = -units
        else:
            gap, missing, restarted = 0, 0, True
            expected = None if units is None else (sequence + units) % _SEQUENCE_MODULUS
        self._sequences[domain] = (expected, missing + gap)
        if len(self._sequences) > MAX_DOMAINS:
            self._sequences.popitem(last=False)
        return None if restarted else gap
