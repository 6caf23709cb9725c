# SPDX-License-Identifier: GPL-2.0-or-later
"""First payloads that have to be read to be known: TLS, HTTP, DNS, QUIC and NTP. Strangers' octets, perhaps cut off.

Each function answers None, or False, where the octets are of something else. A name that is not wholly there, or not
printable, is no name; DNS escapes what is not (RFC 4343 section 2.1).
"""

from __future__ import annotations

import re
from typing import Iterator, List, NamedTuple, Tuple

NO_NAME, TLS_NAME, HTTP_NAME, DNS_NAME = range(4)
"""Kinds of names, numbered as protocol/template.py has their conditions."""


class Named(NamedTuple):
    """`name`: b"" if there is none. `alpn`: the protocols that a TLS hello offers, or the one that it accepts."""

    name: bytes
    alpn: Tuple[bytes, ...] = ()


_PRINTABLE = re.compile(rb"[!-~]{1,255}")


def _printable(name: bytes) -> bytes:
    return name if _PRINTABLE.fullmatch(name) else b""


def _number(octets: bytes) -> int:
    return int.from_bytes(octets, "big")


# TLS (RFC 8446 section 4.1, section 5.1; older versions are alike)

_HANDSHAKE, _CLIENT_HELLO, _SERVER_HELLO = 22, 1, 2
_RECORDS = (20, 21, _HANDSHAKE, 23)  # change_cipher_spec, alert, handshake, application_data
_MOST_RECORD_OCTETS = (1 << 14) + 2048
_SERVER_NAME, _ALPN = 0, 16  # extensions (RFC 6066 section 3, RFC 7301 section 3.1)


def tls(payload: bytes) -> Named | None:
    """A record of TLS; with what a hello says, if it begins with one."""
    if len(payload) < 5 or payload[0] not in _RECORDS or payload[1] != 3 or payload[2] > 4:
        return None
    octets = _number(payload[3:5])
    if not 0 < octets <= _MOST_RECORD_OCTETS:
        return None
    if payload[0] != _HANDSHAKE:
        is_whole = len(payload) <= 5 + octets or payload[5 + octets] in _RECORDS
        return Named(b"") if is_whole else None
    kind = payload[5:6]
    if kind not in (b"\x01", b"\x02"):
        return Named(b"") if kind and kind[0] < 25 else None
    return _hello(payload[9:], is_client=kind[0] == _CLIENT_HELLO)


def _hello(body: bytes, *, is_client: bool) -> Named:
    """A hello from its legacy_version on."""
    name, alpn = b"", []
    for extension, content in _extensions(body, is_client=is_client):
        if extension == _SERVER_NAME and content[2:3] == b"\0":
            octets = _number(content[3:5])
            name = _printable(content[5 : 5 + octets]) if len(content) >= 5 + octets else b""
        elif extension == _ALPN:
            alpn = list(_prefixed(content[2:]))
    return Named(name, tuple(alpn))


def _extensions(body: bytes, *, is_client: bool) -> Iterator[Tuple[int, bytes]]:
    """Type and content of each extension, as far as they are there."""
    at = 34  # legacy_version, random
    at += 1 + _number(body[at : at + 1])  # session id
    at += 2 + _number(body[at : at + 2]) if is_client else 2  # cipher suites, or the one
    at += 1 + _number(body[at : at + 1]) if is_client else 1  # compression
    at += 2  # the extensions' length
    while at + 4 <= len(body):
        octets = _number(body[at + 2 : at + 4])
        yield _number(body[at : at + 2]), body[at + 4 : at + 4 + octets]
        at += 4 + octets


def _prefixed(content: bytes) -> Iterator[bytes]:
    """What stands in there, an octet of length before each."""
    at = 0
    while at < len(content):
        yield content[at + 1 : at + 1 + content[at]]
        at += 1 + content[at]


# HTTP (RFC 9112; the preface of HTTP/2 is RFC 9113 section 3.4)

_REQUEST = re.compile(
    rb"(?:GET|HEAD|POST|PUT|DELETE|OPTIONS|PATCH|TRACE|CONNECT|PROPFIND|PROPPATCH|REPORT|MKCOL|MKCALENDAR|SEARCH) "
    rb"[!-~\x80-\xff]+(?: HTTP/1\.[01]\r?\n|\Z)"
)
_ANSWER = re.compile(rb"HTTP/1\.[01] [1-5][0-9]{2}[ \r\n]|PRI \* HTTP/2\.0\r\n\r\n")
_HOST = re.compile(rb"\nhost:[ \t]*([!-~]{1,255})[ \t]*\r?\n", re.IGNORECASE)
_END_OF_HEADERS = re.compile(rb"\r?\n\r?\n")


def http(payload: bytes) -> Named | None:
    """A request, with its Host, or an answer."""
    if _REQUEST.match(payload):
        end = _END_OF_HEADERS.search(payload)
        host = _HOST.search(payload, 0, end.start() + 2 if end else len(payload))
        return Named(host.group(1) if host else b"")
    return Named(b"") if _ANSWER.match(payload) else None


# DNS (RFC 1035 section 4.1)

_DNS_HEADER_OCTETS = 12
_DNS_CLASSES = (1, 3, 254, 255)
_MOST_NAME_OCTETS = 255


def dns(payload: bytes, *, is_likely: bool) -> Named | None:
    """A query or an answer, by its header and its one question. is_likely: a port says so, too."""
    if len(payload) < _DNS_HEADER_OCTETS:
        return None
    flags, questions, answers, authorities, additionals = (_number(payload[at : at + 2]) for at in range(2, 12, 2))
    is_answer, opcode, rcode = flags >> 15, flags >> 11 & 15, flags & 15
    if flags & 0x40 or opcode not in (0, 1, 2, 4, 5, 6):
        return None
    if is_likely and not questions:
        return Named(b"") if is_answer else None
    if questions != 1 and not (is_likely and questions < 32):
        return None
    if not is_answer and not is_likely and (rcode or opcode or answers or authorities or additionals > 2):
        return None
    name, end = _dns_name(payload)
    if end == 0 or len(payload) < end + 4:
        return Named(b"") if is_likely else None
    kind, of_class = _number(payload[end : end + 2]), _number(payload[end + 2 : end + 4]) & 0x7FFF
    if of_class not in _DNS_CLASSES or not kind:
        return None
    if not (is_likely or is_answer or additionals or len(payload) == end + 4):
        return None
    return Named(name)


def dns_over_tcp(payload: bytes, *, is_likely: bool) -> Named | None:
    """The same with its length before it (RFC 1035 section 4.2.2); it alone is in the segment."""
    octets = _number(payload[:2])
    if octets < _DNS_HEADER_OCTETS + 5 or len(payload) > 2 + octets and not is_likely:
        return None
    return dns(payload[2:], is_likely=is_likely)


def _dns_name(payload: bytes) -> Tuple[bytes, int]:
    """The name behind the header, in text, and where it ends; 0: nowhere. A question has no compression."""
    at = _DNS_HEADER_OCTETS
    labels: List[bytes] = []
    while at < len(payload) and at < _DNS_HEADER_OCTETS + _MOST_NAME_OCTETS:
        octets = payload[at]
        if not octets:
            return b".".join(labels) or b".", at + 1
        if octets > 63:
            break
        labels.append(_escaped(payload[at + 1 : at + 1 + octets]))
        at += 1 + octets
    return b"", 0


def _escaped(label: bytes) -> bytes:
    if _PRINTABLE.fullmatch(label) and b"." not in label and b"\\" not in label:
        return label
    return b"".join(bytes([c]) if 33 <= c <= 126 and c not in b".\\" else b"\\%03d" % c for c in label)


# QUIC (RFC 8999 section 5.1, RFC 9000 section 17.2)

_QUIC_VERSIONS = (1, 0x6B3343CF)  # RFC 9000, RFC 9369
_MOST_ID_OCTETS = 20


def is_quic(payload: bytes) -> bool:
    """By a long header of a version that there is, or is reserved to be refused."""
    if len(payload) < 7 or not payload[0] & 0x80:
        return False
    version = _number(payload[1:5])
    is_known = version in _QUIC_VERSIONS or version >> 8 == 0xFF0000 or version & 0x0F0F0F0F == 0x0A0A0A0A
    if not is_known and version != 0 or is_known and not payload[0] & 0x40:
        return False
    destination = payload[5]
    if destination > _MOST_ID_OCTETS or len(payload) < 7 + destination:
        return False
    source = payload[6 + destination]
    rest = len(payload) - 7 - destination - source
    # Version Negotiation: what is offered instead.
    return source <= _MOST_ID_OCTETS and (rest >= 4 and rest % 4 == 0 if version == 0 else rest > 0)


# NTP (RFC 5905 section 7.3)

_NTP_OCTETS = 48
_NTP_LONGEST_POLL, _NTP_WORST_PRECISION = 17, 0xE0


def is_ntp(payload: bytes, *, is_likely: bool) -> bool:
    """There is little to know it by: elsewhere than at its port it has to be a client's or a server's, and short."""
    if not payload:
        return False
    version, mode = payload[0] >> 3 & 7, payload[0] & 7
    if is_likely:
        return 1 <= version <= 4 and mode > 0 and (len(payload) >= _NTP_OCTETS or mode in (6, 7) and len(payload) >= 8)
    return (
        len(payload) == _NTP_OCTETS
        and version in (3, 4)
        and mode in (3, 4)
        and payload[1] <= 16
        and payload[2] <= _NTP_LONGEST_POLL
        and (payload[3] == 0 or payload[3] >= _NTP_WORST_PRECISION)
        and payload[40:44] != bytes(4)
    )
