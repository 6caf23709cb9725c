# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter language of `dump`, `top`, `collect` and a Collector's `filter`: an expression says which flows are meant.

    either    tests joined by `and` (&&), `or` (||), `not` (!) and parentheses; `and` binds closer than `or`
    a test    TERM [= != < <= > >=] VALUE; without an operator it is =

One rule for every test: it asks for one or more Information Elements, and holds where any that the flow has
does. `x != y` is `not x = y`; any other comparison fails where the flow lacks the element.

| TERM                                             | VALUE                                                    |
|--------------------------------------------------|----------------------------------------------------------|
| host, src host, dst host; also ip, net, src, dst | address or network: 192.0.2.1, 10.0.0.0/8, 2001:db8::/32 |
| mac, src mac, dst mac                            | MAC address                                              |
| port, src port, dst port                         | number                                                   |
| proto                                            | tcp, udp, icmp, icmp6, gre, ...; number                  |
| iface, in iface, out iface; also if, interface   | name of a device of this machine; ifindex                |
| vlan                                             | id of the outer or the inner tag                         |
| flags                                            | letters of FSRPAUECN or a number: at least these are set |
|                                                  | (with = or !=: exactly these)                            |
| packets, octets (bytes), tos, dscp               | number                                                   |
| any Information Element by its IANA name         | number, address, or "text"                               |

Numbers may be hexadecimal (0x1f) or have a unit: 1k is 1,000, then M, G, T. Alone stand tcp, udp, icmp, icmp6
and the other protocols, ipv4, ipv6, and `vlan` or an IANA name for flows that have it.

This is the only importer of lark. One evaluation serves columns (many flows at once) and records (dicts in
JSON form): a test is an operation that numbers and arrays of numbers share.
"""

from __future__ import annotations

import difflib
import operator
import re
import socket
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import numpy as np
from lark import Lark, Token, Transformer, UnexpectedInput

from flowexp.errors import UsageError
from flowexp.protocol.elements import MEASURED, Columns
from flowexp.protocol.registry import BY_NAME
from flowexp.protocol.template import CONDITIONS

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array, Json

_GRAMMAR = r"""
?start: either
?either: both | either _OR both -> any_of
?both: one | both _AND one -> all_of
?one: _NOT one -> none_of | "(" either ")" | test
test: WORD+ [OPERATOR (WORD | TEXT)]
_OR: /or(?![^\s()!=<>&|"])|\|\|/i
_AND: /and(?![^\s()!=<>&|"])|&&/i
_NOT: /not(?![^\s()!=<>&|"])|!(?!=)/i
OPERATOR: /[<>!=]=|<>|[<>=]/
WORD.-1: /[^\s()!=<>&|"]+/
TEXT: /"[^"]*"/
%ignore /\s+/
"""

_OPERATORS = {
    "=": operator.eq, "==": operator.eq, "!=": operator.eq, "<>": operator.eq,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_NEGATED = ("!=", "<>")

_SOURCE_OR_DESTINATION = {
    "host": ("sourceIPv4Address sourceIPv6Address", "destinationIPv4Address destinationIPv6Address"),
    "port": ("sourceTransportPort udpSourcePort tcpSourcePort",
             "destinationTransportPort udpDestinationPort tcpDestinationPort"),
    "mac": ("sourceMacAddress", "destinationMacAddress"),
}  # fmt: skip
_TERMS = {
    "iface": "ingressInterface egressInterface",
    "in iface": "ingressInterface",
    "out iface": "egressInterface",
    "proto": "protocolIdentifier",
    "vlan": "vlanId dot1qVlanId dot1qCustomerVlanId",
    "flags": "tcpControlBits",
    "packets": "packetDeltaCount",
    "octets": "octetDeltaCount",
    "tos": "ipClassOfService",
    "dscp": "ipDiffServCodePoint",
}
for _noun, (_source, _destination) in _SOURCE_OR_DESTINATION.items():
    _TERMS.update({_noun: f"{_source} {_destination}", f"src {_noun}": _source, f"dst {_noun}": _destination})
_TERMS.update({way: _TERMS[f"{way} host"] for way in ("src", "dst")})
_SYNONYMS = {"ip": "host", "net": "host", "if": "iface", "interface": "iface", "bytes": "octets"}
_FAMILIES = {"ipv4": "sourceIPv4Address", "ipv6": "sourceIPv6Address"}

_PROTOCOLS = {
    name[len("IPPROTO_") :].lower(): int(getattr(socket, name)) for name in dir(socket) if name.startswith("IPPROTO_")
}
_PROTOCOLS["icmp6"] = socket.IPPROTO_ICMPV6
_TCP_FLAGS = "FSRPAUECN"  # bit 0 first
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

_ADDRESSES = ("ipv4Address", "ipv6Address", "macAddress")

Pattern = Sequence[tuple[int, int]]
"""Of an address: mask and value of each of its 16-bit words, the first one first."""
Flow = Callable[[str], Optional[tuple[Any, Any]]]
"""An element of one flow, or of many as arrays: its value, and where it is there; None: nowhere.
Addresses are sequences of 16-bit words."""
Step = Callable[[list[Any], Flow], None]


class FilterError(UsageError):
    """One line about what is wrong, the expression, and a caret under the place."""

    def __init__(self, what: str, expression: str, place: int) -> None:
        super().__init__(f"filter: {_printable(what)}\n  {_printable(expression)}\n  {' ' * place}^")


def _printable(text: str) -> str:
    """As long as `text`, on one line."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


class Filter:
    """A compiled expression. elements: what flows can have; another Information Element in it is an error.

    Raises FilterError (a UsageError).
    """

    def __init__(self, expression: str, *, elements: Collection[str] = MEASURED) -> None:
        compiler = _Compiler(expression, elements)
        try:
            Lark(_GRAMMAR, parser="lalr", lexer="basic", transformer=compiler).parse(expression)
        except UnexpectedInput as error:
            raise _unexpected(error, expression) from error
        self._steps = compiler.steps

    def rows(self, columns: Columns) -> Array:
        """Which flows it holds for: n bool."""
        return np.broadcast_to(np.asarray(self._evaluate(_of_columns(columns)), bool), len(columns["packets"]))

    def select(self, columns: Columns) -> dict[str, Array]:
        """The flows it holds for."""
        rows = self.rows(columns)
        return dict(columns) if rows.all() else {name: column[rows] for name, column in columns.items()}

    def matches(self, record: Mapping[str, Json]) -> bool:
        """Whether it holds for a record in JSON form."""
        return bool(self._evaluate(_of_record(record)))

    def _evaluate(self, flow: Flow) -> Any:
        stack: list[Any] = []
        for step in self._steps:
            step(stack, flow)
        return stack.pop()


def _unexpected(error: UnexpectedInput, expression: str) -> FilterError:
    token = getattr(error, "token", None)
    if not expression.strip():
        return FilterError("the expression is empty", expression, 0)
    if token is not None and token.type == "$END":
        return FilterError("something is missing at the end", expression, len(expression))
    place = error.pos_in_stream or 0
    return FilterError(f'"{token or expression[place]}" does not belong here', expression, place)


# What a flow has


def _of_columns(columns: Columns) -> Flow:
    """Elements as the flows' Records would have them: what a flow's Template lacks is not there."""
    other_family = "IPv6" if columns["src_addr"].shape[1] == 4 else "IPv4"

    def element(name: str) -> Optional[tuple[Any, Any]]:
        measured = MEASURED.get(name)
        if measured is None or measured.family == other_family or not columns.keys() >= set(measured.columns):
            return None
        values = measured.values(columns)
        present = CONDITIONS[measured.only].of(columns) if measured.only in CONDITIONS else True
        if values.ndim == 1:
            return values, present
        words = np.ascontiguousarray(values).view(">u2")
        return [words[:, number] for number in range(words.shape[1])], present

    return element


def _of_record(record: Mapping[str, Json]) -> Flow:
    def element(name: str) -> Optional[tuple[Any, Any]]:
        value = _test_form(name, record.get(name))
        return None if value is None else (value, True)

    return element


def _test_form(name: str, value: Optional[Json]) -> Any:
    """An element's JSON form as tests take it; None for what has a form that its type should not have."""
    data_type = BY_NAME[name].data_type
    if data_type in _ADDRESSES:
        octets = _octets(str(value), data_type)
        return None if octets is None else _words(octets)
    return value if isinstance(value, str) == _is_text(name) else None


def _is_text(name: str) -> bool:
    """Whether the element's JSON form is text of any length, and no address."""
    return not BY_NAME[name].type.octets


def _octets(text: str, data_type: str) -> Optional[bytes]:
    """An address in network order."""
    try:
        if data_type != "macAddress":
            return socket.inet_pton(socket.AF_INET if data_type == "ipv4Address" else socket.AF_INET6, text)
        return bytes.fromhex(text.replace(":", "")) if re.fullmatch("(?i)[0-9a-f]{2}(:[0-9a-f]{2}){5}", text) else None
    except (OSError, ValueError):
        return None


def _words(octets: bytes) -> list[int]:
    return [int.from_bytes(octets[place : place + 2], "big") for place in range(0, len(octets), 2)]


# From the expression to steps


class _Wanted(NamedTuple):
    """The right side of a test: of which elements, and what is asked of the value of one."""

    names: Sequence[str]
    holds: Callable[[Any], Any]


class _Compiler(Transformer[Token, None]):
    """Writes a step whenever the parser has seen the end of a rule: that is postfix order, so a stack evaluates
    the steps, and no depth of parentheses is too deep."""

    def __init__(self, expression: str, elements: Collection[str]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._expression = expression
        self._elements = elements

    def any_of(self, _: object) -> None:
        self.steps.append(lambda stack, _: stack.append(stack.pop() | stack.pop()))

    def all_of(self, _: object) -> None:
        self.steps.append(lambda stack, _: stack.append(stack.pop() & stack.pop()))

    def none_of(self, _: object) -> None:
        self.steps.append(lambda stack, _: stack.append(stack.pop() ^ True))

    def test(self, tokens: Sequence[Optional[Token]]) -> None:
        *words, compare, value = tokens
        names, holds = self._wanted([word for word in words if word], compare, value)
        negated = compare in _NEGATED

        def step(stack: list[Any], flow: Flow) -> None:
            result: Any = False
            for name in names:
                found = flow(name)
                if found is not None:
                    result = result | (holds(found[0]) & found[1])
            stack.append(result ^ negated)

        self.steps.append(step)

    def _wanted(self, words: list[Token], compare: Optional[Token], value: Optional[Token]) -> _Wanted:
        term, names = self._term(words)
        rest = words[len(term.split()) :]
        surplus = rest[0] if rest else compare
        if surplus and not names:
            raise self._error(f'"{term}" stands alone; join it with "and" or "or"', surplus)
        if value is None and rest:
            value = rest.pop(0)
        if rest:
            raise self._error('"and" or "or" is missing before this', rest[0])
        if value is not None:
            return self._comparison(term, names, compare, value)
        if term in _TERMS and term != "vlan":
            raise self._error(f'a value is missing after "{" ".join(words)}"', words[-1], behind=True)
        if names or term in _FAMILIES:
            return _Wanted(names or [_FAMILIES[term]], lambda _: True)
        return self._comparison("proto", [_TERMS["proto"]], None, words[0])

    def _term(self, words: Sequence[Token]) -> tuple[str, list[str]]:
        """The longest term that the words begin with, and its elements: none where it stands alone."""
        plain = [_SYNONYMS.get(word, str(word)) for word in words]
        for count in (2, 1):
            term = " ".join(plain[:count])
            if term in _TERMS and len(plain) >= count:
                return term, _TERMS[term].split()
        if plain[0] in _FAMILIES or plain[0] in _PROTOCOLS:
            return plain[0], []
        return plain[0], [self._element(words[0])]

    def _element(self, word: Token) -> str:
        if word in self._elements:
            return str(word)
        if word in BY_NAME:
            raise self._error(f"{word} is an Information Element that is not measured here", word)
        near = difflib.get_close_matches(word, [*_TERMS, *_SYNONYMS, *_FAMILIES, "tcp", "udp", *self._elements], n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise self._error(f'"{word}" is no term and no Information Element{hint}', word)

    def _comparison(self, term: str, names: Sequence[str], compare: Optional[Token], value: Token) -> _Wanted:
        types = {BY_NAME[name].data_type for name in names}
        is_ordered = not (term == "flags" or types <= set(_ADDRESSES) or _is_text(names[0]))
        compares = _OPERATORS[compare or "="]
        if compares is not operator.eq and not is_ordered:
            raise self._error(f"{term} has no order: only = and != compare it", compare or value)
        if term == "flags":
            bits = self._flags(value)
            return _Wanted(names, (lambda seen: seen == bits) if compare else lambda seen: seen & bits == bits)
        if types <= set(_ADDRESSES):
            return self._address(names, value)
        right = str(value).strip('"') if _is_text(names[0]) else self._number(names, value)
        return _Wanted(names, lambda seen: compares(seen, right))

    def _address(self, names: Sequence[str], value: Token) -> _Wanted:
        for data_type in _ADDRESSES:
            pattern = _pattern(value, data_type)
            of_type = [name for name in names if BY_NAME[name].data_type == data_type]
            if pattern is not None and of_type:
                return _Wanted(of_type, partial(_in_network, pattern))
        kinds = sorted({BY_NAME[name].data_type.replace("Address", "").replace("ip", "IP") for name in names})
        raise self._error(f"{value} is no {' or '.join(kinds)} address", value)

    def _number(self, names: Sequence[str], value: Token) -> float:
        number = self._named_number(names[0], value)
        element = min((BY_NAME[name] for name in names), key=lambda element: element.type.octets)
        most = (1 << 8 * element.type.octets) - 1
        if number is None:
            raise self._error(f"{value} is no number", value)
        if number > most and not element.data_type.startswith("float"):
            raise self._error(f"{value} is above {most}, the most that {element.name} can be", value)
        return number

    def _named_number(self, name: str, value: Token) -> Optional[float]:
        if name == "protocolIdentifier" and value in _PROTOCOLS:
            return _PROTOCOLS[value]
        number = _number(value)
        if number is None and name in ("ingressInterface", "egressInterface"):
            try:
                return socket.if_nametoindex(value)
            except (OSError, ValueError) as error:
                raise self._error(f'there is no device "{value}" here; its ifindex will do', value) from error
        return number

    def _flags(self, value: Token) -> int:
        if set(value.upper()) <= set(_TCP_FLAGS):
            return sum(1 << _TCP_FLAGS.index(letter) for letter in set(value.upper()))
        number = _number(value)
        if number is None or number != int(number) or number >= 1 << len(_TCP_FLAGS):
            raise self._error(f"{value} is no TCP flags: letters of {_TCP_FLAGS}, or a number up to 0x1ff", value)
        return int(number)

    def _error(self, what: str, token: Token, *, behind: bool = False) -> FilterError:
        place = token.start_pos or 0
        return FilterError(what, self._expression, place + len(token) if behind else place)


def _number(text: str) -> Optional[float]:
    """12, 0x1f, 1.5k; None for what is no number."""
    if re.fullmatch("(?i)0x[0-9a-f]{1,16}", text):
        return int(text, 16)
    found = re.fullmatch(r"(?i)(\d{1,20}(?:\.\d{1,20})?)([kmgt]?)", text, re.ASCII)
    if found is None:
        return None
    unit = _UNITS[found[2].lower()]
    if "." not in found[1]:
        return int(found[1]) * unit
    number = float(found[1]) * unit
    return int(number) if number.is_integer() else number


def _pattern(text: str, data_type: str) -> Optional[Pattern]:
    """An address, or with a prefix length a network; None where it is none of that type."""
    if data_type == "macAddress":
        octets = _octets(text, data_type)
        return None if octets is None else [(0xFFFF, word) for word in _words(octets)]
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return None
    if data_type != f"ipv{network.version}Address":
        return None
    return list(zip(_words(network.netmask.packed), _words(network.network_address.packed)))


def _in_network(pattern: Pattern, words: Sequence[Any]) -> Any:
    """Whether an address, or which of many, fit the pattern."""
    result: Any = True
    for word, (mask, wanted) in zip(words, pattern):
        if mask:
            result = result & (word & mask == wanted)
    return result
