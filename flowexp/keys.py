# SPDX-License-Identifier: GPL-2.0-or-later
"""How a configuration is declared: keys and sections as dataclass fields, and their filling from a file.

A kind of key says by str() what is allowed; its read() returns the value, or raises a ValueError that names
place, value and limit. Which keys there are is in config.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Tuple


@dataclass(frozen=True)
class Number:
    least: float
    most: float
    unit: str = ""
    zero: str = ""  # what 0 stands for, where it is allowed beside the limits
    whole: bool = True

    def __str__(self) -> str:
        limits = f"{self.least} to {self.most} {self.unit}".rstrip()
        return f"0 ({self.zero}) or {limits}" if self.zero else limits

    def read(self, value: Any, place: str) -> Any:
        if type(value) is not int and (self.whole or type(value) is not float):
            number = "whole number" if self.whole else "number"
            raise ValueError(f"{place}: {show(value)} is not a {number}; allowed: {self}")
        if not (self.zero and value == 0) and not self.least <= value <= self.most:
            raise ValueError(f"{place}: {show(value)} is out of range; allowed: {self}")
        return value


seconds = partial(Number, unit="seconds", whole=False)


@dataclass(frozen=True)
class Choice:
    choices: Tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(map(show, self.choices))

    def read(self, value: Any, place: str) -> Any:
        if not any(type(value) is type(each) and value == each for each in self.choices):
            raise ValueError(f"{place}: {show(value)} is not one of: {self}")
        return value


switch = Choice((False, True))


@dataclass(frozen=True)
class AbsolutePath:
    empty: str = ""  # what "" stands for, where it is allowed

    def __str__(self) -> str:
        return f'"" ({self.empty}) or an absolute path' if self.empty else "an absolute path"

    def read(self, value: Any, place: str) -> str:
        if self.empty and value == "":
            return ""
        if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
            raise ValueError(f"{place}: {show(value)} is not {self}")
        return value


@dataclass(frozen=True)
class Section:
    header: str
    content: type

    def read(self, value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{place}: {show(value)} is not a section; write {self.header}")
        return fill(self, value)


@dataclass(frozen=True)
class Sections(Section):
    def read(self, value: Any, place: str) -> Tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{place}: {show(value)} is not a list of sections; write {self.header}")
        return tuple(Section.read(self, each, place) for each in value)


def key(default: Any, kind: Any, meaning: str, **more: Any) -> Any:
    """A key as a dataclass field; `more` is what else its program wants to know of it, in the field's metadata."""
    return dataclasses.field(default=default, metadata={"kind": kind, "meaning": meaning, **more})


def section_of(header: str, content: type) -> Any:
    return dataclasses.field(default=content(), metadata={"kind": Section(header, content)})


class Key(NamedTuple):
    """What is known of one key: for documents, and for the test that holds conf/flowexp.toml to them."""

    header: str  # of its section, as in a file; "" before the first section
    name: str
    default: Any  # dataclasses.MISSING: must be given; None: as the section above has it
    allowed: str
    meaning: str


def keys_of(section: Section) -> Iterator[Key]:
    """Every key of `section` and of the sections within, in the order of declaration."""
    for field in dataclasses.fields(section.content):
        kind = field.metadata["kind"]
        if isinstance(kind, Section):
            yield from keys_of(kind)
        else:
            yield Key(section.header, field.name, field.default, str(kind), field.metadata["meaning"])


class UnknownKeyError(ValueError):
    """A name that no key of its section has."""

    def __init__(self, name: str, section: Section) -> None:
        super().__init__(f"{section.header} {show(name)} is not a key".lstrip())
        self._name = name
        self._section = section

    def nearest(self, root: Section) -> str:
        """The key of that very name elsewhere in `root`, else one that is much like it: of its section, or elsewhere;
        else the one of its section that is most like it."""
        here, elsewhere = [*_fields(self._section)], {each.name: each for each in reversed([*keys_of(root)])}
        similar = [] if self._name in elsewhere else difflib.get_close_matches(self._name, here, n=1)
        similar = similar or difflib.get_close_matches(self._name, elsewhere, n=1)
        found = similar or difflib.get_close_matches(self._name, here, n=1, cutoff=0)
        name = str(found[0])
        return name if name in here else f"{elsewhere[name].header} {name}".lstrip()


def _fields(section: Section) -> Dict[str, Any]:
    """The dataclass fields of `section` by their names in a file."""
    return {field.metadata.get("name", field.name): field for field in dataclasses.fields(section.content)}


def fill(section: Section, table: Mapping[str, Any]) -> Any:
    """The dataclass of `section` with the values of `table`; UnknownKeyError, or another ValueError."""
    fields = _fields(section)
    values = {}
    for name, value in table.items():
        if name not in fields:
            raise UnknownKeyError(name, section)
        field = fields[name]
        values[field.name] = field.metadata["kind"].read(value, f"{section.header} {name}".lstrip())
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"{section.header} {name}: missing; allowed: {field.metadata['kind']}".lstrip())
    return section.content(**values)


def show(value: Any) -> str:
    """A value as it may stand in the file, on one line and not too long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
