# SPDX-License-Identifier: GPL-2.0-or-later
"""Records for people and programs: JSON lines, CSV, or a table, written as they come; and the screens of `top`.

Every writing function takes an iterable of records (dicts from IANA name to JSON form) and a text stream. JSON and
CSV are the contract that scripts rely on; the table is for eyes: it fits the terminal and has colours there.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from itertools import chain, zip_longest
from typing import IO, Callable, NamedTuple

from flowexp.protocol.datatypes import Json
from flowexp.protocol.template import default_templates

_Record = Mapping[str, Json]
_Paint = Callable[[str, str], str]  # text, style -> text for the terminal
Records = Iterable[_Record]

_PROTOCOLS = {
    1: "ICMP",
    2: "IGMP",
    4: "IPIP",
    6: "TCP",
    17: "UDP",
    33: "DCCP",
    41: "IPv6",
    47: "GRE",
    50: "ESP",
}
_PROTOCOLS.update({51: "AH", 58: "ICMPv6", 89: "OSPF", 103: "PIM", 112: "VRRP", 132: "SCTP", 136: "UDP-L"})
_END_REASONS = {1: "idle", 2: "active", 3: "end", 4: "forced", 5: "lack"}
_TCP_FLAGS = "FSRPAUECN"  # bit 0 first
_ADDRESS_WIDTH = 21  # any IPv4 address with its port; more where there is room
_TIME_UNITS = {"Milliseconds": 10**3, "Microseconds": 10**6, "Nanoseconds": 10**9, "Seconds": 1}


def write_json(records: Records, stream: IO[str]) -> None:
    """One JSON object a line."""
    for record in records:
        stream.write(json.dumps(record) + "\n")


def write_csv(records: Records, stream: IO[str]) -> None:
    """A header and one line a record; elements that the default Templates lack are JSON in the last field."""
    names = list(dict.fromkeys(name for template in default_templates().all() for name in template.names))
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*names, "otherElements"])
    for record in records:
        others = {name: value for name, value in record.items() if name not in names}
        writer.writerow([*(record.get(name, "") for name in names), json.dumps(others) if others else ""])


class _Column(NamedTuple):
    """A column of the table; where the terminal is narrow, the highest rank is left out first."""

    title: str
    width: int
    text: Callable[[_Record], str]
    style: str = ""
    rank: int = 0
    right: bool = False


def write_table(records: Records, stream: IO[str], *, width: int | None = None, zone: tzinfo | None = None) -> None:
    """A header line, then each record in columns as it comes; flushed record by record.

    width: columns of the terminal (None: as it is; where the stream is none, lines are as long as they need
    be); zone: of the times (None: the machine's). An address that is too long goes on in the next line.
    """
    on_terminal = stream.isatty()
    if width is None and on_terminal:
        width = shutil.get_terminal_size().columns
    paint = _painter(stream) if on_terminal else _plain
    columns = _fitting(_columns(zone), width)
    fold = width is not None
    stream.write(_lines([column.title for column in columns], columns, fold=fold, paint=_plain))
    for record in records:
        stream.write(_lines([column.text(record) for column in columns], columns, fold=fold, paint=paint))
        stream.flush()


FORMATS: dict[str, Callable[[Records, IO[str]], None]] = {
    "table": write_table,
    "json": write_json,
    "csv": write_csv,
}


def screen(
    head: Sequence[str], by: str, records: Iterable[_Record], foot: Sequence[str], *, size: os.terminal_size | None
) -> str:
    """Lines above, a table of `top`'s rows by flow, host, port or interface, and lines below, as one text.

    records: columns by their titles. size: of the terminal; no line is wider, and rows that find no room are left
    out. None: lines are as long as they need be.
    """
    rates = _RATES[:-1] if by == "flow" else _RATES
    columns = _fitting([*_ROWS[by], *rates], None if size is None else size.columns)
    lines = [*head, *_lines([column.title for column in columns], columns, fold=False, paint=_plain).splitlines()]
    rows = (
        _lines([column.text(record) for column in columns], columns, fold=size is not None, paint=_plain).splitlines()
        for record in records
    )
    if size is None:
        return "\n".join([*lines, *chain.from_iterable(rows), *foot]) + "\n"
    room = size.lines - len(foot)
    for row in rows:
        if len(lines) + len(row) > room:
            break
        lines += row
    return "\n".join(line[: size.columns] for line in [*lines, *[""] * (room - len(lines)), *foot][: size.lines])


def _label(title: str, width: int, rank: int = 0) -> _Column:
    return _Column(title, width, lambda record: str(record.get(title, "")), rank=rank)


def _counted(title: str, width: int) -> _Column:
    return _Column(title, width, lambda record: human(_number(record, title)), right=True)


_ROWS = {
    "flow": [
        _label("proto", 6),
        _label("source", _ADDRESS_WIDTH),
        _label("destination", _ADDRESS_WIDTH),
        _label("interface", 19, rank=1),
    ],
    "host": [_label("host", 39)],
    "port": [_label("proto", 6), _label("port", 5)],
    "interface": [_label("interface", 19)],
}
_RATES = [
    _counted("bit/s", 6),
    _counted("pkt/s", 6),
    _counted("octets", 6),
    _counted("packets", 7),
    _counted("flows", 6),
]


@contextmanager
def live(stream: IO[str]) -> Iterator[Callable[[str], None]]:
    """The whole screen of the terminal behind `stream`: what it gives shows a text on it. Put back at the end."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(file=stream), screen=True, auto_refresh=False) as whole_screen:
        yield lambda text: whole_screen.update(Text(text, no_wrap=True, overflow="crop", end=""), refresh=True)


def protocol_name(number: int) -> str:
    """TCP for 6; the number itself where there is no short name."""
    return _PROTOCOLS.get(number, str(number))


def _number(record: _Record, name: str) -> int:
    """An element as a number; 0 if it is not there, or of a length that its type cannot have."""
    value = record.get(name, 0)
    return value if isinstance(value, int) else 0


def _columns(zone: tzinfo | None) -> list[_Column]:
    def named(names: Mapping[int, str], name: str) -> Callable[[_Record], str]:
        return lambda record: names.get(_number(record, name), str(_number(record, name)))

    def index(name: str) -> Callable[[_Record], str]:
        return lambda record: _unless_zero(record, name)

    def count(name: str) -> Callable[[_Record], str]:
        return lambda record: human(_number(record, name))

    return [
        _Column("date", 10, lambda record: _start(record, zone, "%Y-%m-%d"), "dim", 7),
        _Column("start", 12, lambda record: _start(record, zone, "%H:%M:%S.%f")[:12], "dim"),
        _Column("duration", 8, _duration, "dim", 3, right=True),
        _Column("proto", 6, named(_PROTOCOLS, "protocolIdentifier"), "cyan"),
        _Column("source", _ADDRESS_WIDTH, lambda record: _end_point(record, "source"), "bold"),
        _Column("destination", _ADDRESS_WIDTH, lambda record: _end_point(record, "destination"), "bold"),
        _Column("vlan", 9, _vlan, "magenta", 4),
        _Column("flags", 9, _flags, "yellow", 2),
        _Column("tos", 4, lambda record: _unless_zero(record, "ipClassOfService", "0x{:02x}"), "", 6),
        _Column("packets", 7, count("packetDeltaCount"), "green", right=True),
        _Column("octets", 6, count("octetDeltaCount"), "green", right=True),
        _Column("in", 4, index("ingressInterface"), "", 5, right=True),
        _Column("out", 4, index("egressInterface"), "", 5, right=True),
        _Column("end", 6, named(_END_REASONS, "flowEndReason"), "dim", 1),
    ]


def _fitting(columns: list[_Column], width: int | None) -> list[_Column]:
    """The columns that fit, with what room is left given to the two addresses."""
    if width is None:
        return columns
    while _room(columns, width) < 0 and any(column.rank for column in columns):
        highest = max(column.rank for column in columns)
        columns = [column for column in columns if column.rank != highest]
    longest = len("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535")
    address_width = min(longest, _ADDRESS_WIDTH + max(0, _room(columns, width)) // 2)
    return [
        column._replace(width=address_width) if column.title in ("source", "destination") else column
        for column in columns
    ]


def _room(columns: list[_Column], width: int) -> int:
    return width + 1 - sum(column.width + 1 for column in columns)


def _lines(texts: list[str], columns: list[_Column], *, fold: bool, paint: _Paint) -> str:
    """The lines of one record: its own, and more where something is too long for its column."""
    cells = [_folded(text, column.width) if fold else [text] for text, column in zip(texts, columns)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        aligned = [part.rjust(c.width) if c.right else part.ljust(c.width) for part, c in zip(parts, columns)]
        lines.append(" ".join(paint(part, c.style) for part, c in zip(aligned, columns)).rstrip() + "\n")
    return "".join(lines)


def _folded(text: str, width: int) -> list[str]:
    """Text in pieces of at most `width`, behind a colon where there is one."""
    pieces = []
    while len(text) > width:
        end = text.rfind(":", 1, width) + 1 or width
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def _plain(text: str, _style: str) -> str:
    return text


def _painter(stream: IO[str]) -> _Paint:
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    console = Console(file=stream)
    if console.color_system is None or console.no_color:
        return _plain
    return lambda text, style: Style.parse(style).render(text, color_system=ColorSystem.STANDARD)


def _unless_zero(record: _Record, name: str, form: str = "{}") -> str:
    value = _number(record, name)
    return form.format(value) if value else ""


def _time_s(record: _Record, which: str) -> float | None:
    """Unix time of flowStart... or flowEnd..., in whatever unit the record has it."""
    for unit, per_second in _TIME_UNITS.items():
        if f"{which}{unit}" in record:
            return _number(record, f"{which}{unit}") / per_second
    return None


def _start(record: _Record, zone: tzinfo | None, form: str) -> str:
    time_s = _time_s(record, "flowStart")
    if time_s is None:
        return ""
    try:
        return datetime.fromtimestamp(time_s, zone).strftime(form)
    except (OverflowError, ValueError, OSError):  # no year that there is
        return "?"


def _duration(record: _Record) -> str:
    start_s, end_s = _time_s(record, "flowStart"), _time_s(record, "flowEnd")
    if start_s is None or end_s is None:
        return ""
    return f"{end_s - start_s:.3f}"[:8].rstrip(".")


def _end_point(record: _Record, which: str) -> str:
    """Address, and port if there is one: 192.0.2.1:53, [2001:db8::1]:53."""
    port = _unless_zero(record, f"{which}TransportPort", ":{}")
    if f"{which}IPv6Address" in record:
        address = str(record[f"{which}IPv6Address"])
        return f"[{address}]{port}" if port else address
    return str(record.get(f"{which}IPv4Address", "")) + port


def _vlan(record: _Record) -> str:
    return ".".join(str(record[name]) for name in ("vlanId", "dot1qCustomerVlanId") if name in record)


def _flags(record: _Record) -> str:
    """TCP flags as letters, dots for those not seen; of ICMP type/code."""
    protocol = _number(record, "protocolIdentifier")
    if protocol in (1, 58):
        type_code = _number(record, "icmpTypeCodeIPv4") or _number(record, "icmpTypeCodeIPv6")
        return f"{type_code >> 8}/{type_code & 0xFF}"
    if protocol != 6:
        return ""
    bits = _number(record, "tcpControlBits")
    letters = (letter if bits >> bit & 1 else "." for bit, letter in enumerate(_TCP_FLAGS))
    return "".join(reversed(list(letters)))


def human(count: int) -> str:
    """Four digits and more as thousands (k), millions (M), ...: 1500 -> 1.50k."""
    if count < 1000:
        return str(count)
    unit, scaled = 0, count / 1000
    while scaled >= 999.5:
        unit, scaled = unit + 1, scaled / 1000
    return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{'kMGTPE'[unit]}"
