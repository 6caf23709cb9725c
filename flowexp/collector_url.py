# SPDX-License-Identifier: GPL-2.0-or-later
"""A Collector's URL: transport, protocol, address. What there is, is one table, _WAYS."""

from __future__ import annotations

import ipaddress
import json
import urllib.parse
from typing import Mapping, NamedTuple, Tuple

from flowexp.errors import UsageError

_WAYS: Mapping[Tuple[str, str], int] = {  # the default port of (transport, protocol); 0: none
    ("udp", "ipfix"): 4739,
    ("tcp", "ipfix"): 4739,
    ("tls", "ipfix"): 4740,
    ("file", "ipfix"): 0,
    ("udp", "netflow9"): 2055,
    ("udp", "netflow5"): 2055,
}
_REFUSED: Mapping[str, str] = {
    "dtls": "DTLS is not in this version; tls:// protects Messages as well, and loses none",
    "sctp": "SCTP is not in this version, as few kernels have it; tcp:// and tls:// lose no Message either",
}


class CollectorUrl(NamedTuple):
    """Where Messages go, and in which protocol. str() of it is the whole URL, with port and protocol."""

    transport: str
    protocol: str
    host: str  # name or address, without brackets; "" for a file
    port: int  # 0 for a file
    path: str  # of a file, absolute; "" for the others

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        place = urllib.parse.quote(self.path) if self.transport == "file" else f"{host}:{self.port}"
        query = "" if self.protocol == "ipfix" else f"?protocol={self.protocol}"
        return f"{self.transport}://{place}{query}"


def parse_collector_url(url: str) -> CollectorUrl:
    """udp://host:port, tcp://, tls:// or file:///path, with ?protocol=ipfix|netflow9|netflow5.

    IPv6 addresses stand in brackets. UsageError says what is wrong with `url`.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        protocol = _protocol(parts.query)
        default_port = _default_port(parts.scheme, protocol)
        if parts.fragment or parts.username is not None:
            raise ValueError("it has more than transport, address and ?protocol=...")
        if parts.scheme == "file":
            return CollectorUrl("file", protocol, "", 0, _file_path(parts))
        return CollectorUrl(parts.scheme, protocol, _host(parts), _port(parts, default_port), "")
    except ValueError as error:
        raise UsageError(f"{json.dumps(url)}: {error}") from error


def _protocol(query: str) -> str:
    if not query:
        return "ipfix"
    name, _, protocol = query.partition("=")
    if name != "protocol":
        raise ValueError(f"only protocol=... may follow the question mark, not {json.dumps(query)}")
    return protocol


def _default_port(transport: str, protocol: str) -> int:
    transports = list(dict.fromkeys(each for each, _ in _WAYS))
    protocols = list(dict.fromkeys(each for _, each in _WAYS))
    if transport in _REFUSED:
        raise ValueError(_REFUSED[transport])
    if transport not in transports:
        raise ValueError(f"it begins with one of {', '.join(f'{each}://' for each in transports)}")
    if protocol not in protocols:
        raise ValueError(f"protocol is one of {', '.join(protocols)}")
    port = _WAYS.get((transport, protocol))
    if port is None:
        raise ValueError(f"{protocol} goes over udp:// only")
    return port


def _host(parts: urllib.parse.SplitResult) -> str:
    if parts.netloc.count(":") > 1 and "[" not in parts.netloc:
        raise ValueError("an IPv6 address stands in brackets, as in udp://[2001:db8::1]:4739")
    host = parts.hostname
    if not host:
        raise ValueError("it names no host")
    if parts.path not in ("", "/"):
        raise ValueError(f"{json.dumps(parts.path)} follows the address; only ?protocol=... may")
    if "[" in parts.netloc:
        ipaddress.IPv6Address(host)
    return host


def _port(parts: urllib.parse.SplitResult, default: int) -> int:
    try:
        port = default if parts.port is None else parts.port
    except ValueError:
        port = 0
    if not port:
        raise ValueError("its port is no number from 1 to 65535")
    return port


def _file_path(parts: urllib.parse.SplitResult) -> str:
    path = urllib.parse.unquote(parts.path)
    if parts.netloc or not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ValueError("a file is named by three slashes and its whole path, as in file:///var/tmp/flows.ipfix")
    return path
