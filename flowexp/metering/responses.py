# SPDX-License-Identifier: GPL-2.0-or-later
"""How long answers of DNS take: the first query of a flow, and the first answer of the flow that goes back.

The two belong together where addresses, ports and protocol are each other's turned round and the transaction ID is
the same (RFC 1035 section 4.1.1): a client that asks twice from one port may get its answers in any order. Interface
and VLAN may differ, as on a router; where that is metered on both sides, query and answer pass here twice, and the
answer goes back past the last query first. Of strangers' octets, however many, no more than MOST_QUERIES exchanges are
remembered, with MOST_ALIKE queries each.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import List, NamedTuple, Tuple

MOST_QUERIES = 32_768
"""Under way at once; beyond that the oldest are forgotten, and their answers have no time."""
MOST_ALIKE = 8
"""Of one exchange: a query that passes at so many interfaces."""
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
        # When each query passed. A plain dict would search longer for its oldest, the more have gone.
        self._asked: OrderedDict[Tuple[bytes, bytes, bytes, int, bytes], List[int]] = OrderedDict()

    def time_us(self, conversation: Conversation, payload: bytes) -> int:
        """What a DNS answer took since its query, 1 at least; 0 of a query, and where that is not known.

        payload: a flow's first, taken for DNS (applications.py); to be asked in the order in which they passed.
        """
        begin = _LENGTH_OCTETS if conversation.protocol == _TCP else 0
        header = payload[begin : begin + _HEADER_OCTETS]
        if len(header) < _HEADER_OCTETS:
            return 0
        identifier, is_answer = header[:2], header[2] & 0x80
        source, destination, ports, protocol, time_ns = conversation
        if not is_answer:
            key = source, destination, ports, protocol, identifier
            passed_ns = self._asked.setdefault(key, [])
            passed_ns.append(time_ns)
            del passed_ns[:-MOST_ALIKE]
            self._asked.move_to_end(key)
            if len(self._asked) > MOST_QUERIES:
                self._asked.popitem(last=False)
            return 0
        key = destination, source, ports[2:] + ports[:2], protocol, identifier
        if key not in self._asked:
            return 0
        passed_ns = self._asked[key]
        took_ns = time_ns - passed_ns.pop()
        if not passed_ns:
            del self._asked[key]
        return max(1, took_ns // 1000) if 0 <= took_ns <= _LONGEST_NS else 0
