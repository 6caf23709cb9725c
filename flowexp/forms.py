# SPDX-License-Identifier: GPL-2.0-or-later
"""Records as lines of text: JSON and CSV, the contract that scripts rely on, or view.py's table for eyes.

A form makes lines of records that have the same elements, column by column: a hundred thousand flows take a fraction
of a second. Each element looks the same whether its records came in columns or, off the wire, one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import IO, Any, Callable, Protocol

from flowexp.protocol.datatypes import Json
from flowexp.protocol.template import default_templates
from flowexp.view import TableForm, Values


class Form(Protocol):
    """How records become text."""

    head: str
    """What stands before the first."""

    def lines(self, values: Values) -> list[str]:
        """Each record's line or lines, with their ends."""


class _Line:
    """What records with the same elements have in common of their lines, and where they differ."""

    def __init__(self, text: Callable[[Any], str], *, plain: Callable[[str], str]) -> None:
        """text: of a value. plain: the form of texts that stand in a line as they are, "" where one of all these
        (put together) cannot."""
        self._text, self._plain = text, plain
        self._form = ""
        self._columns: list[Sequence[Json]] = []

    def add(self, literal: str, column: Sequence[Json] = ()) -> None:
        """Goes on with a text and, behind it, each record's value. One that all have is made text once."""
        self._form += literal.replace("%", "%%")
        if not column:
            return
        if len(column) > 1 and column.count(column[0]) == len(column):
            self._form += self._text(column[0]).replace("%", "%%")
            return
        kind = type(column[0])  # of the others, too: a column has one type
        form = "%d" if kind is int else self._plain("".join(column)) if kind is str else ""  # type: ignore[arg-type]
        self._form += form or "%s"
        self._columns.append(column if form else list(map(self._text, column)))

    def of_each(self, count: int) -> list[str]:
        """The lines of so many records."""
        return list(map(self._form.__mod__, zip(*self._columns))) if self._columns else [self._form % ()] * count


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


class JsonForm:
    """One JSON object a line."""

    head = ""

    def lines(self, values: Values) -> list[str]:
        """Each record's line."""
        line, before = _Line(_json_text, plain=_json_plain), "{"
        for name, column in values.items():
            line.add(f"{before}{json.dumps(name)}: ", column)
            before = ", "
        line.add("}\n")
        return line.of_each(_count(values))


def _json_text(value: Json) -> str:
    return encode_basestring_ascii(value) if type(value) is str else json.dumps(value)


def _json_plain(texts: str) -> str:
    return "" if len(encode_basestring_ascii(texts)) > len(texts) + len('""') else '"%s"'


class CsvForm:
    """A header and one line a record; elements that have no field of their own are JSON in the last one.

    elements: whose fields there are; None: those of the default Templates.
    """

    def __init__(self, elements: Iterable[str] | None = None) -> None:
        if elements is None:
            elements = (name for template in default_templates().all() for name in template.names)
        self._names = list(dict.fromkeys(elements))
        self.head = ",".join([*self._names, "otherElements"]) + "\n"

    def lines(self, values: Values) -> list[str]:
        """Each record's line."""
        line = _Line(_csv_text, plain=_csv_plain)
        for name in self._names:
            line.add("", values.get(name, ()))
            line.add(",")
        others = {name: column for name, column in values.items() if name not in self._names}
        if others:
            line.add("", [text.rstrip("\n") for text in JsonForm().lines(others)])
        line.add("\n")
        return line.of_each(_count(values))


def _csv_text(value: Json) -> str:
    """A field, in quotes where it has to be (RFC 4180)."""
    text = str(value)
    return text if _csv_plain(text) else '"' + text.replace('"', '""') + '"'


def _csv_plain(texts: str) -> str:
    return "" if any(each in texts for each in ',"\r\n') else "%s"


FORMS: dict[str, Callable[[IO[str]], Form]] = {
    "table": TableForm,
    "json": lambda stream: JsonForm(),
    "csv": lambda stream: CsvForm(),
}
"""By what --format calls them; each is made for the stream that it will be written to."""


def write(records: Iterable[Mapping[str, Json]], form: Form, stream: IO[str]) -> None:
    """Records (IANA name to JSON form) one by one, as they come."""
    stream.write(form.head)
    for record in records:
        stream.writelines(form.lines({name: [value] for name, value in record.items()}))
