# SPDX-License-Identifier: GPL-2.0-or-later
"""Information Element type information (RFC 5610): what Exporters tell of elements that IANA does not have.

The numbers are those of IANA's registries of IPFIX data types, semantics and units (RFC 5610 §3.1, §3.2, §3.3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flowexp.protocol.registry import BY_NAME, IANA, OWN_ENTERPRISE, Element

SCOPES = ("privateEnterpriseNumber", "informationElementId")
FIELDS = (
    "informationElementDataType",
    "informationElementSemantics",
    "informationElementUnits",
    "informationElementName",
    "informationElementDescription",
)

_DATA_TYPES = """
    octetArray unsigned8 unsigned16 unsigned32 unsigned64 signed8 signed16 signed32 signed64 float32 float64 boolean
    macAddress string dateTimeSeconds dateTimeMilliseconds dateTimeMicroseconds dateTimeNanoseconds ipv4Address
    ipv6Address basicList subTemplateList subTemplateMultiList unsigned256
""".split()
_SEMANTICS = "default quantity totalCounter deltaCounter identifier flags list snmpCounter snmpGauge".split()
_UNITS = """
    none bits octets packets flows seconds milliseconds microseconds nanoseconds 4-octet_words messages hops entries
    frames ports inferred
""".replace("_", " ").split()
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,127}", re.ASCII)


def values(element: Element) -> tuple[int | str, ...]:
    """SCOPES and FIELDS of one element."""
    return (
        element.enterprise,
        element.element_id,
        _DATA_TYPES.index(element.data_type),
        _number(_SEMANTICS, element.semantics),
        _number(_UNITS, element.units),
        element.name,
        element.description,
    )


def _number(registry: list[str], name: str) -> int:
    return registry.index(name) if name in registry else 0


def element_of(record: Mapping[str, Any]) -> Element | None:
    """The element that an Options Data Record tells of; None if it tells of none that is worth knowing.

    Nobody may give IANA's elements another type, nor their names to elements of his own. flowexp's own names are
    taken under any number, as other exporters of this kind may have one.
    """
    if not {*SCOPES, "informationElementDataType", "informationElementName"} <= record.keys():
        return None
    enterprise, element_id, data_type = (record[name] for name in (*SCOPES, "informationElementDataType"))
    name = str(record["informationElementName"])
    if not all(type(number) is int for number in (enterprise, element_id, data_type)):
        return None
    if enterprise == IANA or not _NAME.fullmatch(name) or data_type >= len(_DATA_TYPES):
        return None
    known = BY_NAME.get(name)
    if known is not None and (known.enterprise, known.data_type) != (OWN_ENTERPRISE, _DATA_TYPES[data_type]):
        return None
    return Element(
        element_id & 0x7FFF,
        name,
        _DATA_TYPES[data_type],
        _named(_SEMANTICS, record.get("informationElementSemantics")),
        _named(_UNITS, record.get("informationElementUnits")),
        enterprise,
    )


def _named(registry: list[str], number: Any) -> str:
    return registry[number] if type(number) is int and number < len(registry) else ""
