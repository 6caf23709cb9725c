# SPDX-License-Identifier: GPL-2.0-or-later
"""How long answers of DNS take: the first query of a flow, and the first answer of the flow that goes back.

The two belong together where addresses, ports and protocol are each other's turned round and the transaction ID is
the same (RFC 1035 section 4.1.1): a client that asks twice from one port may get its answers in any order. Interface
and VLAN may differ, as on a router. Of strangers' octets, however many, no more than MOST_QUERIES are remembered.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Tuple

MOST_QUERIES = 32_768
"""Under way at once; beyond that the oldest are forgotten, and their answers have no time."""
LONGEST_S = 120
"""What comes later is no answer."""

_HEADER_OCTETS, _LENGTH_OCTETS = 4, 2
_TCP = 6
_LONGEST_NS = LONGEST_S * 10**9


class Conversation(NamedTuple):
    """Whose payload it is, and when it passed; addresses and ports in network order."""

    source: bytes
    destination: bytes
    ports: bytes
    protocol: int
    time_ns: int


class Responses:
    """Queries that are not answered yet."""

    def __init__(self) -> None:
        self._asked: Dict[Tuple[bytes, bytes, bytes, int], Tuple[bytes, int]] = {}

    def time_us(self, conversation: Conversation, payload: bytes) -> int:
        """What a DNS answer took since its query, 1 at least; 0 of a query, and where that is not known.

        payload: a flow's first, taken for DNS (applications.py).
        """
        begin = _LENGTH_OCTETS if conversation.protocol == _TCP else 0
        header = payload[begin : begin + _HEADER_OCTETS]
        if len(header) < _HEADER_OCTETS:
            return 0
        identifier, is_answer = header[:2], header[2] & 0x80
        source, destination, ports, protocol, time_ns = conversation
        if not is_answer:
            key = source, destination, ports, protocol
            self._asked.pop(key, None)  # the newest last
            self._asked[key] = identifier, time_ns
            if len(self._asked) > MOST_QUERIES:
                del self._asked[next(iter(self._asked))]
            return 0
        asked, asked_ns = self._asked.pop((destination, source, ports[2:] + ports[:2], protocol), (b"", 0))
        took_ns = time_ns - asked_ns
        return max(1, took_ns // 1000) if asked == identifier and 0 <= took_ns <= _LONGEST_NS else 0
