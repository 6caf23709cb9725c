# SPDX-License-Identifier: GPL-2.0-or-later
"""Every Information Element that has a name here: IANA's, their reverse twins, and flowexp's own.

Names, numbers and types are data, in data/; no number or name is typed a second time in the code. An
element is known by its enterprise number (0: IANA's) and its number within that.
"""

from __future__ import annotations

import csv
import struct
from importlib import resources
from typing import NamedTuple, Tuple

from flowexp.protocol.datatypes import DATA_TYPES, DataType

IANA = 0
ENTERPRISE_BIT = 0x8000
REVERSE_ENTERPRISE = 29305
"""Whose elements are IANA's, of the other direction of a Biflow (RFC 5103 §6.1)."""
OWN_ENTERPRISE = 32473
"""Under which flowexp's own elements stand in data/: the number that RFC 5612 keeps for examples. It belongs to
nobody, so templates can be built with another one."""

# RFC 5103 §6.1: identifiers of no one direction, and RFC 5102's process configuration and statistics, padding,
# biflowDirection.
_NOT_REVERSIBLE = frozenset(
    [137, 145, 148, 149, 130, 131, 173, *range(211, 218), 40, 41, 42, *range(163, 169), 210, 239]
)


ElementKey = Tuple[int, int]
"""Enterprise number and element number."""


class ElementError(ValueError):
    """An Information Element that does not exist, is not measured, or cannot have that length."""


class Element(NamedTuple):
    """One Information Element."""

    element_id: int
    name: str
    data_type: str
    semantics: str
    units: str
    enterprise: int = IANA
    description: str = ""

    @property
    def type(self) -> DataType:
        """How its abstract data type is written, read and shown."""
        return DATA_TYPES[self.data_type]

    @property
    def key(self) -> ElementKey:
        """Its place in BY_ID."""
        return self.enterprise, self.element_id

    def under(self, enterprise_number: int) -> Element:
        """The same; one of flowexp's own, under another number."""
        return self._replace(enterprise=enterprise_number) if self.enterprise == OWN_ENTERPRISE else self

    def specifier(self, octets: int) -> bytes:
        """The Field Specifier of a field of so many octets (RFC 7011 §3.2)."""
        if self.enterprise == IANA:
            return struct.pack(">HH", self.element_id, octets)
        return struct.pack(">HHI", ENTERPRISE_BIT | self.element_id, octets, self.enterprise)


def _read(name: str) -> list[Element]:
    file = resources.files("flowexp.protocol") / "data" / name
    return [
        Element(
            int(row["elementId"]),
            row["name"],
            row["dataType"],
            row["dataTypeSemantics"],
            row["units"],
            int(row.get("pen") or IANA),
            row.get("description") or "",
        )
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    ]


def _reversed(element: Element) -> Element:
    """reverseOctetDeltaCount of octetDeltaCount (RFC 5103 §6.2)."""
    name = f"reverse{element.name[0].upper()}{element.name[1:]}"
    return element._replace(enterprise=REVERSE_ENTERPRISE, name=name, description=f"{element.name}, reverse direction")


def _read_all() -> list[Element]:
    iana = _read("ipfix-information-elements.csv")
    reverse = [_reversed(element) for element in iana if element.element_id not in _NOT_REVERSIBLE]
    return [*iana, *reverse, *_read("enterprise-elements.csv")]


BY_NAME: dict[str, Element] = {element.name: element for element in _read_all()}
BY_ID: dict[ElementKey, Element] = {element.key: element for element in BY_NAME.values()}
