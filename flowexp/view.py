# SPDX-License-Identifier: GPL-2.0-or-later
"""What eyes see: records as a table, the elements, and the screens of `top`. It fits the terminal, in colours there.

A table is made column by column: what is equal becomes text once.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from functools import lru_cache
from itertools import chain, zip_longest
from typing import IO, Any, Callable, NamedTuple

from flowexp.names import interface_name, protocol_name, service_name
from flowexp.protocol.datatypes import Json, Once

Values = Mapping[str, Sequence[Json]]
"""Records with the same elements, column by column: IANA name -> JSON form, one a record."""

_Record = Mapping[str, Json]
_Paint = Callable[[str, str], str]  # text, style -> text for the terminal

_END_REASONS = {1: "idle", 2: "active", 3: "end", 4: "forced", 5: "lack"}
_TCP_FLAGS = "FSRPAUECN"  # bit 0 first
_NO_TIME = "?"
_ADDRESS_WIDTH = 21  # any IPv4 address with its port; more where there is room, fewer where there is none
_LEAST_ADDRESS_WIDTH = len("destination")
_TIME_UNITS = {"Milliseconds": 10**3, "Microseconds": 10**6, "Nanoseconds": 10**9, "Seconds": 1}


class _Column(NamedTuple):
    """A column of the table; where the terminal is narrow, the highest rank is left out first."""

    title: str
    width: int
    texts: Callable[[Values], Sequence[str]]
    style: str = ""
    rank: int = 0
    right: bool = False


class TableForm:
    """For eyes: columns that fit the terminal and have colours there.

    stream: where it will be written; width: columns of the terminal (None: as it is; where the stream is none, lines
    are as long as they need be); zone: of the times (None: the machine's); services, interfaces: by name, in the place
    of numbers; elements: what the records have at most, None: what the default Templates have. An address
    that is too long goes on in the next line.
    """

    def __init__(
        self,
        stream: IO[str],
        *,
        width: int | None = None,
        zone: tzinfo | None = None,
        services: bool = False,
        interfaces: bool = False,
        elements: Collection[str] | None = None,
    ) -> None:
        on_terminal = stream.isatty()
        if width is None and on_terminal:
            width = terminal_size(stream).columns
        self._columns = _fitting(_columns(zone, services, interfaces, elements), width)
        self._fold = width is not None
        self._line = _line_form(self._columns, _painter(stream) if on_terminal else _plain)
        self.head = _titles(self._columns, fold=self._fold)

    def lines(self, values: Values) -> list[str]:
        """The lines of each record."""
        return _lines([column.texts(values) for column in self._columns], self._columns, self._line, fold=self._fold)


def catalogue_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `flowexp elements` shows of protocol/catalogue.py's rows; an element of the default Templates has a *."""
    titles = ("id", "", "element", "type", "octets", "v9", "v5", "flows", "from", "meaning")
    cells = [
        (
            f"{row['enterprise']}.{row['id']}" if row["enterprise"] else str(row["id"]),
            "*" if row["default"] else "",
            row["name"],
            row["type"],
            str(row["octets"]),
            *("yes" if protocol in row["protocols"] else "" for protocol in ("netflow9", "netflow5")),
            row["flows"],
            ", ".join(row["source"]),
            row["meaning"],
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (titles, *cells)]
    return "\n".join([*lines, "", "* in records by default. A [[template]] may name any, as in octetDeltaCount/4.", ""])


def screen(
    head: Sequence[str], by: str, records: Iterable[_Record], foot: Sequence[str], *, size: os.terminal_size | None
) -> str:
    """Lines above, a table of `top`'s rows by flow, host, port or interface, and lines below, as one text.

    records: columns by their titles. size: of the terminal; no line is wider, and rows that find no room are left
    out. None: lines are as long as they need be.
    """
    rates = _RATES[:-1] if by == "flow" else _RATES
    columns = _fitting([*_ROWS[by], *rates], None if size is None else size.columns)
    lines = [*head, *_titles(columns, fold=False).splitlines()]
    if size is not None:
        lines[-1] = lines[-1].ljust(size.columns)
    line, fold = _line_form(columns, _plain), size is not None
    each = ({title: [value] for title, value in record.items()} for record in records)
    rows = (
        _lines([column.texts(values) for column in columns], columns, line, fold=fold)[0].splitlines()
        for values in each
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
    return _Column(title, width, lambda values: _texts(values, title), rank=rank)


def _counted(title: str, width: int) -> _Column:
    return _Column(title, width, lambda values: _each(human, _numbers(values, title)), right=True)


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


_STYLES = {0: "bold", 1: "green", 2: "reverse", -1: "dim"}  # of the screen's lines


def terminal_size(terminal: IO[str]) -> os.terminal_size:
    """What it is now: COLUMNS and LINES say what it was when the shell began, or nothing true at all.

    A serial console knows no size, and is taken for 80 by 24.
    """
    size = os.get_terminal_size(terminal.fileno())
    return size if size.columns and size.lines else os.terminal_size((80, 24))


def can_be_live(stream: IO[str]) -> bool:
    """Whether it is a terminal on which a place can be written to once more."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def live(stream: IO[str]) -> Iterator[Callable[[str], None]]:
    """The whole screen of the terminal behind `stream`: what it gives shows a text of `screen` on it, its titles
    standing out. Put back at the end."""
    from rich.console import Console, ConsoleDimensions
    from rich.live import Live
    from rich.text import Text

    console = Console(file=stream)
    with Live(console=console, screen=True, auto_refresh=False) as whole_screen:

        def show(text: str) -> None:
            lines = [Text(line, no_wrap=True, overflow="crop") for line in text.split("\n")]
            for number, style in _STYLES.items():
                if -len(lines) <= number < len(lines):
                    lines[number].stylize(style)
            whole = Text("\n", no_wrap=True, overflow="crop", end="").join(lines)
            console.size = ConsoleDimensions(*terminal_size(stream))  # else rich believes COLUMNS and LINES
            whole_screen.update(whole, refresh=True)

        yield show


def _each(text: Callable[[Any], str], values: Sequence[Any]) -> list[str]:
    """The text of each value, made once for those that are equal."""
    return list(map(Once(text).__getitem__, values))


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


def _numbers(values: Values, name: str) -> Sequence[int]:
    """An element as numbers; 0 if it is not there, or of a length that its type cannot have."""
    column = values.get(name, ())
    if column and type(column[0]) is int:  # so are the others: a column has one type
        return column  # type: ignore[return-value]
    return [value if isinstance(value, int) else 0 for value in column] or [0] * _count(values)


def _texts(values: Values, name: str) -> Sequence[str]:
    return _each(str, values[name]) if name in values else [""] * _count(values)


def _end_reason(number: int) -> str:
    return _END_REASONS.get(number, str(number))


def _unless_zero(form: str) -> Callable[[int], str]:
    return lambda number: form.format(number) if number else ""


def _columns(zone: tzinfo | None, services: bool, interfaces: bool, elements: Collection[str] | None) -> list[_Column]:
    def shown(text: Callable[[int], str], name: str) -> Callable[[Values], Sequence[str]]:
        return lambda values: _each(text, _numbers(values, name))

    def count(name: str) -> Callable[[Values], Sequence[str]]:
        total = name.replace("Delta", "Total")
        return lambda values: _each(human, _numbers(values, name if name in values else total))

    interface = interface_name if interfaces else _unless_zero("{}")
    index_width = 10 if interfaces else 4
    every = [
        (_Column("date", 10, lambda values: _starts(values, _date(zone)), "dim", 7), "flowStart"),
        (_Column("start", 12, lambda values: _starts(values, _clock(zone)), "dim"), "flowStart"),
        (_Column("duration", 8, _durations, "dim", 3, right=True), "flowEnd"),
        (_Column("proto", 6, shown(protocol_name, "protocolIdentifier"), "cyan"), "protocolIdentifier"),
        (_end_point_column("source", services), "sourceIP sourceTransport"),
        (_end_point_column("destination", services), "destinationIP destinationTransport"),
        (_Column("vlan", 9, _vlans, "magenta", 4), "vlanId dot1qCustomerVlanId"),
        (_Column("flags", 9, _flags, "yellow", 2), "tcpControlBits icmpTypeCode"),
        (_Column("tos", 4, shown(_unless_zero("0x{:02x}"), "ipClassOfService"), "", 6), "ipClassOf"),
        (_Column("flows", 6, count("deltaFlowCount"), "green", right=True), "deltaFlowCount"),
        (_Column("packets", 7, count("packetDeltaCount"), "green", right=True), "packetDelta packetTotal"),
        (_Column("octets", 6, count("octetDeltaCount"), "green", right=True), "octetDelta octetTotal"),
        (
            _Column("in", index_width, shown(interface, "ingressInterface"), "", 5, right=not interfaces),
            "ingressInterface",
        ),
        (
            _Column("out", index_width, shown(interface, "egressInterface"), "", 5, right=not interfaces),
            "egressInterface",
        ),
        (_Column("end", 6, shown(_end_reason, "flowEndReason"), "dim", 1), "flowEndReason"),
    ]
    if elements is None:
        return [column for column, _ in every if column.title != "flows"]
    wanted = [column for column, of in every if any(name.startswith(tuple(of.split())) for name in elements)]
    known = tuple(beginning for _, of in every for beginning in of.split())
    others = [_element_column(name) for name in dict.fromkeys(elements) if not name.startswith(known)]
    return [*others, *wanted]


def _element_column(name: str) -> _Column:
    return _Column(name, max(len(name), len("02:00:00:00:00:01")), lambda values: _texts(values, name))


def _end_point_column(which: str, services: bool) -> _Column:
    return _Column(which, _ADDRESS_WIDTH, lambda values: _end_points(values, which, services=services), "bold")


def _fitting(columns: list[_Column], width: int | None) -> list[_Column]:
    """The columns that fit, with what room is left given to the two addresses."""
    if width is None:
        return columns
    while _room(columns, width) < 0 and any(column.rank for column in columns):
        highest = max(column.rank for column in columns)
        columns = [column for column in columns if column.rank != highest]
    longest = len("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535")
    address_width = min(longest, max(_LEAST_ADDRESS_WIDTH, _ADDRESS_WIDTH + _room(columns, width) // 2))
    return [
        column._replace(width=address_width) if column.title in ("source", "destination") else column
        for column in columns
    ]


def _room(columns: list[_Column], width: int) -> int:
    return width + 1 - sum(column.width + 1 for column in columns)


def _line_form(columns: list[_Column], paint: _Paint) -> str:
    """What `%` makes a line of, from a text for each column."""
    return " ".join(paint(f"%{'' if column.right else '-'}{column.width}s", column.style) for column in columns)


def _titles(columns: list[_Column], *, fold: bool) -> str:
    return _lines([[column.title] for column in columns], columns, _line_form(columns, _plain), fold=fold)[0]


def _lines(texts: list[Sequence[str]], columns: list[_Column], form: str, *, fold: bool) -> list[str]:
    """The lines of each record, `texts` by column: its own, and more where something is too long for its column."""
    if not fold or all(max(map(len, each)) <= column.width for each, column in zip(texts, columns)):
        return [(form % row).rstrip() + "\n" for row in zip(*texts)]
    widths = [column.width for column in columns]
    return ["".join((form % parts).rstrip() + "\n" for parts in _parts(row, widths)) for row in zip(*texts)]


def _parts(row: Sequence[str], widths: list[int]) -> Iterator[tuple[str, ...]]:
    return zip_longest(*map(_folded, row, widths), fillvalue="")


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


def _times(values: Values, which: str) -> tuple[Sequence[int], int] | None:
    """Unix times of flowStart... or flowEnd..., and how many of their unit a second has."""
    for unit, per_second in _TIME_UNITS.items():
        if f"{which}{unit}" in values:
            return _numbers(values, f"{which}{unit}"), per_second
    return None


_Time = Callable[[int, int], str]  # a time and how many of its unit a second has -> text


def _date(zone: tzinfo | None) -> _Time:
    at = _second(zone, "%Y-%m-%d")
    return lambda time, per_second: at(time // per_second)


def _clock(zone: tzinfo | None) -> _Time:
    at = _second(zone, "%H:%M:%S")

    def clock(time: int, per_second: int) -> str:
        seconds, rest = divmod(time, per_second)
        text = at(seconds)
        return text if text == _NO_TIME else f"{text}.{rest * 1000 // per_second:03}"

    return clock


def _second(zone: tzinfo | None, form: str) -> Callable[[int], str]:
    @lru_cache(maxsize=4096)
    def at(seconds: int) -> str:
        try:
            return datetime.fromtimestamp(seconds, zone).strftime(form)
        except (OverflowError, ValueError, OSError):  # no year that there is
            return _NO_TIME

    return at


def _starts(values: Values, text: _Time) -> Sequence[str]:
    found = _times(values, "flowStart")
    if found is None:
        return [""] * _count(values)
    times, per_second = found
    return _each(lambda time: text(time, per_second), times)


def _durations(values: Values) -> Sequence[str]:
    start, end = _times(values, "flowStart"), _times(values, "flowEnd")
    if start is None or end is None:
        return [""] * _count(values)
    (starts, start_per_s), (ends, end_per_s) = start, end
    unit = max(start_per_s, end_per_s)
    begin_by, end_by = unit // start_per_s, unit // end_per_s
    lasted = [last * end_by - first * begin_by for first, last in zip(starts, ends)]
    return _each(lambda time: f"{time / unit:.3f}"[:8].rstrip("."), lasted)


def _end_points(values: Values, which: str, *, services: bool) -> Sequence[str]:
    """Address, and port if there is one: 192.0.2.1:53, [2001:db8::1]:53; by name 192.0.2.1:domain."""
    numbers = _numbers(values, f"{which}TransportPort")
    if services:
        both = list(zip(numbers, _numbers(values, "protocolIdentifier")))
        ports = _each(lambda each: f":{service_name(*each)}" if each[0] else "", both)
    else:
        ports = _each(_unless_zero(":{}"), numbers)
    if f"{which}IPv6Address" in values:
        addresses = _texts(values, f"{which}IPv6Address")
        return [f"[{address}]{port}" if port else address for address, port in zip(addresses, ports)]
    return list(map(str.__add__, _texts(values, f"{which}IPv4Address"), ports))


def _vlans(values: Values) -> Sequence[str]:
    tags = [_texts(values, name) for name in ("vlanId", "dot1qCustomerVlanId") if name in values]
    return list(map(".".join, zip(*tags))) if tags else [""] * _count(values)


def _flags(values: Values) -> Sequence[str]:
    names = ("protocolIdentifier", "tcpControlBits", "icmpTypeCodeIPv4", "icmpTypeCodeIPv6")
    return _each(_flags_of, list(zip(*(_numbers(values, name) for name in names))))


def _flags_of(numbers: tuple[int, int, int, int]) -> str:
    """TCP flags as letters, dots for those not seen; of ICMP type/code."""
    protocol, bits, icmp4, icmp6 = numbers
    if protocol in (1, 58):
        type_code = icmp4 or icmp6
        return f"{type_code >> 8}/{type_code & 0xFF}"
    if protocol != 6:
        return ""
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
