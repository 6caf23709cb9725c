# SPDX-License-Identifier: GPL-2.0-or-later
"""What flows tell of an Observation Point only together: connections that nobody answers, and scans.

Each sweep looks once at the flows that are new, and at those of the same conversations, so the packet path knows
nothing of it. Who began a conversation is who was metered first. From then on it is known of each flow whether
anything came back.

- Unanswered: a TCP flow with a SYN and no ACK ends, and no flow of the other direction was metered, wherever. An
  answer may be a refusal (RST); an ICMP error is none. One flow is one attempt, however often its SYN was sent.
- Fan-out: how many destination addresses, and how many destination ports (of TCP or UDP, at any address), one source
  begins conversations with within a minute. A TCP flow without SYN, but with ACK or RST, goes on with what began
  before it was metered; of ICMP those that ask count. IPv4 addresses and ports are exact, of IPv6 addresses 32 bits of
  a hash.

Time is an argument: boot nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterable, List, Mapping, NamedTuple, Protocol, Tuple

import numpy as np

from .biflow import ICMP_QUESTIONS, among
from .share import mixed
from .sweep import ACTIVE, FORCED, Array, Due

INTERVAL_NS = 60 * 10**9
MAX_PAIRS = 1 << 18
"""Of a source and a destination, or port, that are remembered of a minute: 2 MiB. Sources with the fewest go first."""
MAX_NEW = 1 << 16
"""Flows that one look judges: a sweep must not take long. The rest are new in the next one still; what ends before
that, in a flood, is not counted."""

_NEW, _ASKS, _ANSWERED, _ANSWERS = 0, 1, 2, 3  # what is known of a flow; _ASKS: and nothing has come back
_TCP, _UDP, _ICMPS = 6, 17, (1, 58)
_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_AT_ONCE = 4096  # flows looked at together: their copies stay in the cache

Point = Tuple[int, int]
"""Observation Point: ifindex, and 1 at egress, else 0."""


class FanOut(NamedTuple):
    """The most that one source came to within a minute; source: its address, 4 or 16 octets (b"": there is none)."""

    targets: int = 0
    source: bytes = b""


@dataclass
class Figures:
    """Of one Observation Point. Three totals; and of the minute under way, and of the one before."""

    unanswered_flows: int = 0
    undersized_packets: int = 0
    jumbo_packets: int = 0
    destinations: FanOut = FanOut()
    ports: FanOut = FanOut()
    last_destinations: FanOut = FanOut()
    last_ports: FanOut = FanOut()

    @property
    def recent_destinations(self) -> FanOut:
        """The larger of both."""
        return max(self.destinations, self.last_destinations)

    @property
    def recent_ports(self) -> FanOut:
        """The larger of both."""
        return max(self.ports, self.last_ports)


class Flows(Protocol):
    """What is asked here of a family's flow table."""

    @property
    def slots(self) -> int:
        """How many there are."""

    def hot(self, slots: Array) -> Array:
        """Copies of these slots, with the Flow Key and flags_hint."""

    def began(self, slots: Array) -> Array:
        """When each of these flows began (i64)."""

    def conversations(self, slots: Array) -> Array:
        """conversations_of() these slots."""


class _Seen(NamedTuple):
    """The flows of some conversations, copied out of their slots."""

    slots: Array
    conversation: Array
    known: Array  # of _NEW, ...
    began_ns: Array
    point: Array  # u64: ifindex << 1 | egress
    is_first_end: Array  # whether its source is the conversation's lower end
    source: Array  # u32: a hash of the Observation Point and the source address
    destination: Array  # u32: the address of IPv4, a hash of it of IPv6
    port: Array  # u32: protocol and port; 0: it has none
    may_begin: Array  # bool: whether a conversation can begin so
    address: Array  # of the source


class _Pairs:
    """Which targets each source has had: as u64, in ascending order, source above target."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.uint64)

    def add(self, sources: Array, targets: Array) -> Tuple[Array, Array]:
        """These u32 have met. A row number of each of these sources, and how many targets it has had by now."""
        keys = sources.astype(np.uint64) << np.uint64(32) | targets
        order = np.argsort(keys)
        keys = keys[order]
        rows = order[_begins(keys >> np.uint64(32))]
        keys = keys[_begins(keys)]
        places = np.searchsorted(self._keys, keys)
        is_new = np.ones(len(keys), bool)
        inside = places < len(self._keys)
        is_new[inside] = self._keys[places[inside]] != keys[inside]
        self._keys = np.insert(self._keys, places[is_new], keys[is_new])
        least = sources[rows].astype(np.uint64) << np.uint64(32)
        most = least | np.uint64(0xFFFFFFFF)
        counts = np.searchsorted(self._keys, most, side="right") - np.searchsorted(self._keys, least)
        if len(self._keys) > MAX_PAIRS:
            self._forget_the_least()
        return rows, counts

    def _forget_the_least(self) -> None:
        sources = self._keys >> np.uint64(32)
        sizes = np.diff(np.append(_begins(sources), len(sources)))
        order = np.argsort(-sizes, kind="stable")
        stays = np.zeros(len(sizes), bool)
        stays[order] = np.cumsum(sizes[order]) <= MAX_PAIRS // 2
        self._keys = self._keys[np.repeat(stays, sizes)]


def _begins(ordered: Array) -> Array:
    """Where each value begins."""
    return np.flatnonzero(np.append([True], ordered[1:] != ordered[:-1])[: len(ordered)])


class Anomalies:
    """What is known since this was made, by Observation Point."""

    def __init__(self, families: Iterable[Flows]) -> None:
        self._known = [(flows, np.zeros(flows.slots, np.uint8)) for flows in families]
        self._destinations, self._ports = _Pairs(), _Pairs()
        self._minute_ends_ns = 0
        self.figures: Dict[Point, Figures] = {}

    def tick(self, now_ns: int) -> bool:
        """Before each sweep's look(). Whether a minute has ended with it."""
        if now_ns < self._minute_ends_ns:
            return False
        is_first, self._minute_ends_ns = not self._minute_ends_ns, now_ns + INTERVAL_NS
        self._destinations, self._ports = _Pairs(), _Pairs()
        for each in self.figures.values():
            each.last_destinations, each.last_ports = each.destinations, each.ports
            each.destinations = each.ports = FanOut()
        return not is_first

    def look(self, flows: Flows, plan: Due) -> None:
        """Before what is due is ended."""
        known = next(known for each, known in self._known if each is flows)
        slots = np.concatenate((plan.ending, plan.living))
        new = slots[known[slots] == _NEW]
        if len(new):
            self._judge(flows, known, slots, new[:MAX_NEW])
        ended = plan.ending[(plan.reasons != ACTIVE) & (plan.reasons != FORCED)]
        self._count_unanswered(flows, ended[known[ended] == _ASKS])
        known[plan.ending] = _NEW

    def count(self, columns: Mapping[str, Array]) -> None:
        """Of Data Records: the packets of odd sizes that they carry."""
        undersized, jumbo = columns["integrity_undersized"], columns["integrity_jumbo"]
        odd = np.flatnonzero(undersized | jumbo)
        if not len(odd):
            return
        egress = columns["direction"][odd].astype(np.uint64)
        ifindex = np.where(egress, columns["egress_ifindex"][odd], columns["ingress_ifindex"][odd]).astype(np.uint64)
        points, which = np.unique(ifindex << np.uint64(1) | egress, return_inverse=True)
        for number, point in enumerate(points.tolist()):
            figures = self._of(point)
            figures.undersized_packets += int(undersized[odd][which == number].sum(dtype=np.uint64))
            figures.jumbo_packets += int(jumbo[odd][which == number].sum(dtype=np.uint64))

    def _of(self, point: int) -> Figures:
        return self.figures.setdefault((point >> 1, point & 1), Figures())

    def _judge(self, flows: Flows, known: Array, slots: Array, new: Array) -> None:
        """Who asks and who answers, of the conversations that have a new flow."""
        hashes = flows.conversations(slots)
        rows = among(flows.conversations(new), hashes)
        seen = _seen(flows, slots[rows], hashes[rows], known)
        starts = _begins(seen.conversation)
        sizes = np.diff(np.append(starts, len(rows)))
        asks = seen.is_first_end == np.repeat(seen.is_first_end[starts], sizes)
        is_answered = np.repeat(np.add.reduceat((~asks).astype(np.intp), starts) > 0, sizes)
        # What has been answered once stays so, whatever has become of the answer.
        is_answered |= seen.known == _ANSWERED
        known[seen.slots] = np.where(asks, np.where(is_answered, _ANSWERED, _ASKS), _ANSWERS)
        # A table that was taken over holds some of many minutes; this minute's look may be the first at the last one's.
        is_recent = seen.began_ns >= self._minute_ends_ns - 2 * INTERVAL_NS
        self._fan_out(seen, np.flatnonzero(asks & seen.may_begin & (seen.known == _NEW) & is_recent))

    def _fan_out(self, seen: _Seen, asking: Array) -> None:
        self._add(seen, asking, "destinations", self._destinations, seen.destination)
        self._add(seen, asking[seen.port[asking] != 0], "ports", self._ports, seen.port)

    def _add(self, seen: _Seen, asking: Array, figure: str, pairs: _Pairs, targets: Array) -> None:
        rows, counts = pairs.add(seen.source[asking], targets[asking])
        rows = asking[rows]
        order = np.lexsort((counts, seen.point[rows]))
        largest_last = np.append(_begins(seen.point[rows][order])[1:], len(rows)) - 1 if len(rows) else order
        for place in order[largest_last].tolist():
            of_point = self._of(int(seen.point[rows[place]]))
            if counts[place] > getattr(of_point, figure).targets:
                setattr(of_point, figure, FanOut(int(counts[place]), seen.address[rows[place]].tobytes()))

    def _count_unanswered(self, flows: Flows, slots: Array) -> None:
        for first in range(0, len(slots), _AT_ONCE):
            hot = flows.hot(slots[first : first + _AT_ONCE])
            hot = hot[(hot["protocol"] == _TCP) & (hot["flags_hint"] & (_SYN | _ACK) == _SYN)]
            points, counts = np.unique(_points(hot), return_counts=True)
            for point, count in zip(points.tolist(), counts.tolist()):
                self._of(point).unanswered_flows += count


def _points(hot: Array) -> Array:
    points: Array = hot["ifindex"].astype(np.uint64) << np.uint64(1) | hot["direction"].astype(np.uint64)
    return points


def _seen(flows: Flows, slots: Array, hashes: Array, known: Array) -> _Seen:
    """These flows: conversation by conversation, in each who asks first of all."""
    parts: List[Tuple[Array, ...]] = [
        _read(flows.hot(slots[first : first + _AT_ONCE])) for first in range(0, len(slots), _AT_ONCE)
    ]
    before = known[slots]
    rank = np.select([before == _NEW, before == _ANSWERS], [1, 2], 0)
    began_ns = flows.began(slots)
    order = np.lexsort((began_ns, rank, hashes))
    columns = (slots, hashes, before, began_ns, *(np.concatenate(part) for part in zip(*parts)))
    return _Seen(*(column[order] for column in columns))


def _read(hot: Array) -> Tuple[Array, ...]:
    """The rest of _Seen."""
    points, protocol, flags = _points(hot), hot["protocol"], hot["flags_hint"]
    ends = [_words(hot[f"{which}_addr"]) for which in ("src", "dst")]
    source, destination = (_hashed(end, np.zeros(1, np.uint64)) for end in ends)
    ports = [hot[f"{which}_port_be"].astype(np.uint64) for which in ("src", "dst")]
    is_icmp = np.isin(protocol, _ICMPS)
    ports[1] = np.where(is_icmp, 0, ports[1])  # type and code
    is_first_end = mixed(source ^ mixed(ports[0])) > mixed(destination ^ mixed(ports[1]))
    has_port = ((protocol == _TCP) | (protocol == _UDP)) & (ports[1] != 0)
    may_begin = np.where(protocol == _TCP, (flags & _SYN != 0) | (flags & (_ACK | _RST) == 0), True)
    types = np.ascontiguousarray(hot["dst_port_be"]).view(np.uint8).reshape(-1, 2)[:, 0]
    may_begin &= ~is_icmp | np.isin(types, ICMP_QUESTIONS)
    return (
        points,
        is_first_end,
        _upper(_hashed(ends[0], points)),
        ends[1][:, 0].astype(np.uint32) if ends[1].shape[1] == 1 else _upper(destination),
        np.where(has_port, protocol.astype(np.uint64) << np.uint64(16) | ports[1], 0).astype(np.uint32),
        may_begin,
        hot["src_addr"],
    )


def _words(addresses: Array) -> Array:
    words: Array = np.ascontiguousarray(addresses).view("<u4").astype(np.uint64)
    return words


def _hashed(words: Array, first: Array) -> Array:
    hashes = mixed(np.broadcast_to(first, len(words)))
    for word in range(words.shape[1]):
        hashes = mixed(hashes ^ words[:, word])
    return hashes


def _upper(hashes: Array) -> Array:
    return (hashes >> np.uint64(32)).astype(np.uint32)
