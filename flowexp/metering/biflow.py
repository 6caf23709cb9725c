# SPDX-License-Identifier: GPL-2.0-or-later
"""Biflows (RFC 5103): which flows are the two directions of one conversation, and who began it.

Two flows are a pair if what one has as source the other has as destination, address and port; of ICMP, if one asks
what the other answers (echo, timestamp). Where a conversation was metered more than twice, those become a pair that
were metered

1. at the same interface in opposite directions: at a host, or at one side of a router;
2. in the same direction, each going out where the other came in: at both sides of a router;
3. at any two places: asymmetric paths, on which the answer has interfaces of its own.

Among equals the first flow goes with the first. What finds no partner stays a flow of its own. The forward direction
is that of who began: the one with the SYN if only one has it, the ICMP message that asks, else whose first packet
came first.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterable, Mapping, NamedTuple, Protocol, Tuple

import numpy as np

from .share import conversations, end_of, mixed
from .sweep import ACTIVE, IDLE, Array, Due

Columns = Mapping[str, Array]

REVERSE = "reverse_"
"""Before the name of a column: the same of the reverse direction. Counters of flows without one are 0 there."""
ARBITRARY, INITIATOR = 0, 1  # biflowDirection (IANA 239)
_TCP, _SYN, _ICMPS = 6, 0x02, (1, 58)
_ANSWERS = {8: 0, 13: 14, 15: 16, 17: 18, 128: 129, 139: 140}  # ICMP types, of both families: who asks, who answers
ICMP_QUESTIONS = tuple(_ANSWERS)
_QUESTION_OF = np.arange(256)  # the type that asks, of both
_QUESTION_OF[list(_ANSWERS.values())] = list(_ANSWERS)
_IS_ANSWER = np.isin(np.arange(256), list(_ANSWERS.values()))
_IS_SOLE = ~np.isin(np.arange(256), [*_ANSWERS, *_ANSWERS.values()])


class _Places(NamedTuple):
    """What pairing looks at, computed once for all flows."""

    conversation: Array  # u64
    side: Array  # of the conversation's two, by its source; bool
    metered: Array  # ifindex of the Observation Point
    ways: Tuple[Array, Array]  # where it came in and went out; for the other side out and in
    egress: Array  # bool


def paired(columns: Columns, needed: Iterable[str]) -> Columns:
    """Flows of one family: those that belong together as one row, that of the forward direction.

    Beside the columns there are is_biflow (bool), biflow_direction, and `needed` of the reverse direction. Each flow
    is in exactly one row; rows stand in the order of the flows.
    """
    forward, reverse = _oriented(columns, *_pairs(columns))
    count = len(columns["packets"])
    partner = np.full(count, -1, np.intp)
    partner[forward] = reverse
    began_first = np.zeros(count, np.uint8)
    began_first[forward] = np.where(columns["began_ns"][forward] == columns["began_ns"][reverse], ARBITRARY, INITIATOR)
    rows = np.setdiff1d(np.arange(count), reverse, assume_unique=True)
    is_biflow = partner[rows] >= 0
    other = np.where(is_biflow, partner[rows], rows)
    made: Dict[str, Array] = {name: column[rows] for name, column in columns.items()}
    for name in {"packets", "octets", *needed}:
        made[REVERSE + name] = columns[name][other]
    for name in ("packets", "octets"):
        made[REVERSE + name] = made[REVERSE + name] * is_biflow
    return {**made, "is_biflow": is_biflow, "biflow_direction": began_first[rows]}


def _pairs(columns: Columns) -> Tuple[Array, Array]:
    """Row numbers: each flow of one side, and its partner."""
    places = _places(columns)
    left = np.arange(len(places.side))
    ones, others = [left[:0]], [left[:0]]
    for place in (_same_interface, _mirrored, _anywhere):
        if len(left) < 2:
            break
        one, other = _matched(
            mixed(places.conversation ^ place(places))[left], places.side[left], columns["began_ns"][left]
        )
        is_pair = _is_reverse(columns, left[one], left[other])
        one, other = left[one[is_pair]], left[other[is_pair]]
        ones.append(one)
        others.append(other)
        left = np.setdiff1d(left, np.concatenate((one, other)), assume_unique=True)
    return np.concatenate(ones), np.concatenate(others)


def _places(columns: Columns) -> _Places:
    ingress, egress = (columns[f"{way}_ifindex"].astype(np.uint64) for way in ("ingress", "egress"))
    is_egress = columns["direction"].astype(bool)
    side = end_of(columns, "src") > end_of(columns, "dst")
    tags = columns["vlan_tagged"].astype(np.uint64) + columns["inner_tagged"].astype(np.uint64)
    return _Places(
        conversations(columns) ^ mixed(_icmp(columns, side) << np.uint64(2) | tags),
        side,
        np.where(is_egress, egress, ingress),
        (np.where(side, ingress, egress), np.where(side, egress, ingress)),
        is_egress,
    )


def _icmp(columns: Columns, side: Array) -> Array:
    """What tells ICMP conversations of two ends apart: what is asked, and which end asks. 0 for other protocols."""
    types = columns["icmp_type_code"] >> 8
    which = np.where(_IS_SOLE[types], 2 + side, side ^ _IS_ANSWER[types])
    codes = _QUESTION_OF[types] << 8 | columns["icmp_type_code"] & 0xFF
    is_icmp = np.isin(columns["protocol"], _ICMPS)
    numbers: Array = np.where(is_icmp, codes << 2 | which, 0).astype(np.uint64)
    return numbers


_Place = Callable[[_Places], Array]


def _same_interface(places: _Places) -> Array:
    opposite = (places.egress ^ places.side).astype(np.uint64)
    return mixed(places.metered << np.uint64(1) | opposite)


def _mirrored(places: _Places) -> Array:
    one, other = places.ways
    return mixed(mixed(one << np.uint64(1) | places.egress.astype(np.uint64)) ^ other)


def _anywhere(places: _Places) -> Array:
    return np.zeros(1, np.uint64)


def _matched(places: Array, side: Array, began_ns: Array) -> Tuple[Array, Array]:
    """Of flows at the same place the first of one side with the first of the other, the second with the second, ..."""
    order = np.lexsort((began_ns, side, places))
    ordered = places[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    sizes = np.diff(np.concatenate((starts, [len(order)])))
    others = np.add.reduceat(side[order].astype(np.intp), starts)
    pairs = np.minimum(others, sizes - others)
    first = np.repeat(starts, pairs) + np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    return order[first], order[first + np.repeat(sizes - others, pairs)]


def _is_reverse(columns: Columns, one: Array, other: Array) -> Array:
    """Whether these are two directions indeed: hashes may lie, where somebody wants them to."""
    same: Array = columns["protocol"][one] == columns["protocol"][other]
    for source, destination in (("src", "dst"), ("dst", "src")):
        same &= columns[f"{source}_port"][one] == columns[f"{destination}_port"][other]
        same &= (columns[f"{source}_addr"][one] == columns[f"{destination}_addr"][other]).all(axis=1)
    return same


def _oriented(columns: Columns, one: Array, other: Array) -> Tuple[Array, Array]:
    """The forward direction of each pair, and the reverse one."""
    flags = columns["tcp_flags"] & _SYN != 0
    syn = flags & (columns["protocol"] == _TCP)
    answers = np.isin(columns["protocol"], _ICMPS) & _IS_ANSWER[columns["icmp_type_code"] >> 8]
    later = columns["began_ns"][one] > columns["began_ns"][other]
    swap = np.select(
        [syn[one] != syn[other], answers[one] != answers[other]], [syn[other], answers[one]], later
    ).astype(bool)
    return np.where(swap, other, one), np.where(swap, one, other)


class Flows(Protocol):
    """What is asked here of a family's flow table."""

    def conversations(self, slots: Array) -> Array:
        """conversations_of() these slots."""


def together(flows: Flows, plan: Due) -> Due:
    """What is due, so that both directions of a conversation have their records together.

    Where one ends the other one ends, too, though it may have been heard of since (reason 2, or that for which the
    first one ended); where one is reported, so is the other. They stand side by side: pairs first, so that no even
    number of flows at a time parts them.
    """
    if not len(plan.ending) and not len(plan.active):
        return plan
    ending, active, living = (flows.conversations(each) for each in (plan.ending, plan.active, plan.living))
    follows = among(ending, living)
    order = np.argsort(ending)
    reasons = plan.reasons[order][np.searchsorted(ending[order], living[follows])]
    reasons = np.concatenate((plan.reasons, np.where(reasons == IDLE, ACTIVE, reasons).astype(np.uint8)))
    slots = np.concatenate((plan.ending, plan.living[follows]))
    order = _side_by_side(np.concatenate((ending, living[follows])))
    stays = np.delete(plan.living, follows)
    living = np.delete(living, follows)
    owes = among(active, living)
    return Due(slots[order], reasons[order], stays[owes][_side_by_side(living[owes])], stays)


def among(some: Array, hashes: Array) -> Array:
    """Which of the hashes (row numbers) are among some: a look at their upper bits spares most of them the search."""
    seen = np.zeros(1 << 20, bool)
    seen[(some >> np.uint64(44)).astype(np.intp)] = True
    maybe = np.flatnonzero(seen[(hashes >> np.uint64(44)).astype(np.intp)])
    found: Array = maybe[np.isin(hashes[maybe], some)]
    return found


def _side_by_side(hashes: Array) -> Array:
    """An order in which equal ones are neighbours, those that come twice before all others."""
    _, number, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return np.lexsort((number, counts[number] != 2))


def conversations_of(hot: Array) -> Array:
    """Of copies of slots a hash (u64, never 0) that both directions of a conversation have alike. All ICMP of two hosts
    is one here."""
    is_icmp = np.isin(hot["protocol"], _ICMPS)
    key = {name: hot[name] for name in ("src_addr", "dst_addr", "protocol")}
    ports = {"src_port": hot["src_port_be"], "dst_port": np.where(is_icmp, 0, hot["dst_port_be"])}
    hashes = conversations({**key, **ports})
    return np.maximum(hashes, np.uint64(1))
