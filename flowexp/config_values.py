# SPDX-License-Identifier: GPL-2.0-or-later
"""What the values of configuration keys may be, beside the kinds that any program has (keys.py).

str() says what is allowed; read() takes what a file or an option gives, or raises a ValueError of one line.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any, Tuple

from flowexp.collector_url import CollectorUrl, parse_collector_url
from flowexp.errors import UsageError
from flowexp.keys import Number, show
from flowexp.protocol import fieldgroups
from flowexp.protocol.registry import ElementError
from flowexp.protocol.template import FieldSpec, template_spec

DEFAULT_ROUTE = "default route"
MAX_INTERVAL = 1_000_000


@dataclass(frozen=True)
class Interfaces:
    def __str__(self) -> str:
        return f"names, globs or {show(DEFAULT_ROUTE)}"

    def read(self, value: Any, place: str) -> Tuple[str, ...]:
        is_list = isinstance(value, (list, tuple)) and len(value) > 0
        if not is_list or not all(isinstance(each, str) and each for each in value):
            raise ValueError(f"{place}: {show(value)} is not a list of {self}")
        return tuple(value)


@dataclass(frozen=True)
class Intervals:
    def __str__(self) -> str:
        return f"names, globs or {show(DEFAULT_ROUTE)}, each with 1 to {MAX_INTERVAL} packets"

    def read(self, value: Any, place: str) -> Tuple[Tuple[str, int], ...]:
        if not isinstance(value, dict) or not all(value):
            example = '{ eth1 = 100, "ppp*" = 1000 }'
            raise ValueError(f"{place}: {show(value)} is not {self}, as in {example}")
        packets = Number(1, MAX_INTERVAL, "packets")
        return tuple((pattern, packets.read(each, f"{place} {pattern}")) for pattern, each in value.items())


@dataclass(frozen=True)
class Groups:
    def __str__(self) -> str:
        return f"any of {', '.join(map(show, fieldgroups.NAMES))}"

    def read(self, value: Any, place: str) -> Tuple[str, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{place}: {show(value)} is not a list; allowed: {self}")
        for each in value:
            if each not in fieldgroups.NAMES:
                raise ValueError(f"{place}: {show(each)} is no field group; allowed: {self}")
        return tuple(name for name in fieldgroups.NAMES if name in value)


@dataclass(frozen=True)
class Url:
    def __str__(self) -> str:
        return "udp://HOST[:PORT], tcp://HOST[:PORT], tls://HOST[:PORT], file:///PATH"

    def read(self, value: Any, place: str) -> CollectorUrl:
        if not isinstance(value, str):
            raise ValueError(f"{place}: {show(value)} is not a text; allowed: {self}")
        try:
            return parse_collector_url(value)
        except UsageError as error:
            raise ValueError(f"{place}: {error}") from error


@dataclass(frozen=True)
class Address:
    def __str__(self) -> str:
        return '"" (nowhere) or HOST:PORT, as in "127.0.0.1:9745"'

    def read(self, value: Any, place: str) -> str:
        if isinstance(value, str):
            found = re.fullmatch(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s\[\]:/@]+):(\d{1,5})", value, re.ASCII)
            if not value or (found and 1 <= int(found[1]) <= 65535):
                return value
        raise ValueError(f"{place}: {show(value)} is no address to listen on; allowed: {self}")


@dataclass(frozen=True)
class Elements:
    def __str__(self) -> str:
        return 'names of Information Elements, with a length if not the usual one, as in ["octetDeltaCount/4"]'

    def read(self, value: Any, place: str) -> Tuple[FieldSpec, ...]:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{place}: {show(value)} is not a list of {self}")
        try:
            return template_spec("", value).fields
        except ElementError as error:
            raise ValueError(f"{place}: {error}; `flowexp elements` lists all that can be exported") from error


@dataclass(frozen=True)
class Text:
    empty: str  # what "" stands for
    otherwise: str
    pattern: str

    def __str__(self) -> str:
        return f'"" ({self.empty}) or {self.otherwise}'

    def read(self, value: Any, place: str) -> str:
        if not isinstance(value, str) or (value and not re.fullmatch(self.pattern, value)):
            raise ValueError(f"{place}: {show(value)} is not: {self}")
        return value


@dataclass(frozen=True)
class SourceAddress:
    def __str__(self) -> str:
        return '"" (from the route) or an address of this machine, as in "192.0.2.1"'

    def read(self, value: Any, place: str) -> str:
        try:
            if not isinstance(value, str):  # a number would be an address, too
                raise ValueError
            return str(ipaddress.ip_address(value)) if value else ""
        except ValueError as error:
            raise ValueError(f"{place}: {show(value)} is no address; allowed: {self}") from error


@dataclass(frozen=True)
class Name:
    of: str
    may_be_empty: bool = False

    def __str__(self) -> str:
        return f'{self.of}: letters, digits, "-", "_"'

    def read(self, value: Any, place: str) -> str:
        if self.may_be_empty and value == "":
            return ""
        if not isinstance(value, str) or not re.fullmatch(r"[\w-]{1,40}", value, re.ASCII):
            raise ValueError(f"{place}: {show(value)} is no name; allowed: {self}")
        return value
