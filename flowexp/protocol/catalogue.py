# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be exported, element by element, as data: for `flowexp elements` and the table of records.md."""

from __future__ import annotations

from typing import Any

from flowexp.protocol.elements import MEASURED, Measured
from flowexp.protocol.netflow5 import ELEMENTS as OF_NETFLOW5
from flowexp.protocol.registry import IANA
from flowexp.protocol.template import DEFAULT, build_templates

Row = dict[str, Any]

_PEN_TEXT = "{}.{}"  # 29305.1: enterprise number and number


def catalogue() -> list[Row]:
    """Each measured element, by enterprise number and number: what `flowexp elements --format json` prints."""
    by_default = {field.name for template in build_templates(DEFAULT).all() for field in template.fields}
    ordered = sorted(MEASURED.values(), key=lambda each: each.element.key)
    return [_row(each, is_default=each.element.name in by_default) for each in ordered]


def _row(each: Measured, *, is_default: bool) -> Row:
    element = each.element
    return {
        "name": element.name,
        "enterprise": element.enterprise,
        "id": element.element_id,
        "type": element.data_type,
        "octets": each.octets,
        "allowedOctets": [*element.type.shorter, element.type.octets],
        "units": element.units,
        "flows": flows_of(each),
        "source": list(each.columns),
        "default": is_default,
        "protocols": _protocols(each),
        "meaning": each.meaning,
    }


def _protocols(each: Measured) -> list[str]:
    """Those that can carry it."""
    also = ["netflow9"] if each.element.enterprise == IANA else []
    return ["ipfix", *also, *(["netflow5"] if each.element.name in OF_NETFLOW5 else [])]


def number_text(enterprise: int, element_id: int) -> str:
    """1 of IANA's, 29305.1 of another enterprise's."""
    return str(element_id) if enterprise == IANA else _PEN_TEXT.format(enterprise, element_id)


def flows_of(each: Measured) -> str:
    """Whose records have it."""
    return ", ".join(filter(None, (each.family and f"{each.family} flows", each.only))) or "all flows"


def field_table() -> str:
    """What records carry by default, as Markdown: one line an element."""
    lines = ["| Information Element | ID | Octets | In records of | Meaning |", "|---|---|---|---|---|"]
    richest = [templates[-1] for _, templates in sorted(build_templates(DEFAULT).of_family.items())]
    for name, (each, octets) in {field.name: field for template in richest for field in template.fields}.items():
        number = number_text(*each.element.key)
        lines.append(f"| {name} | {number} | {octets} | {flows_of(each)} | {each.meaning} |")
    return "\n".join(lines) + "\n"
