# SPDX-License-Identifier: GPL-2.0-or-later
"""Which flows end, why, and which long ones are due for a record (RFC 5470, section 5.1; RFC 7011).

Plain numpy over one family's flows: no clock, no kernel, no network. Times are boot
nanoseconds (i64); "now" is an argument. The packet path's last time may lag or, from the
coarse clock, lie before the first: differences are signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Iterator, Mapping, NamedTuple, Protocol, Tuple

import numpy as np

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]
else:
    Array = np.ndarray  # numpy before 1.22 cannot be subscripted

# flowEndReason (IANA 136).
IDLE, ACTIVE, END_OF_FLOW, FORCED, LACK_OF_RESOURCES = 1, 2, 3, 4, 5

CLASSES = ("tcp", "udp", "icmp", "other")
_CLASS_OF_PROTOCOL = np.full(256, CLASSES.index("other"), np.int64)
_CLASS_OF_PROTOCOL[6] = CLASSES.index("tcp")
_CLASS_OF_PROTOCOL[17] = CLASSES.index("udp")
_CLASS_OF_PROTOCOL[[1, 58]] = CLASSES.index("icmp")
_FIN_OR_RST = 0x05


@dataclass(frozen=True)
class Timeouts:
    """Nanoseconds. `idle_ns` and `active_ns` by protocol class (CLASSES); linger is from the last
    packet of a flow in which FIN or RST was seen."""

    idle_ns: Mapping[str, int]
    active_ns: Mapping[str, int]
    linger_ns: int

    @cached_property
    def by_class(self) -> Tuple[Array, Array]:
        """Idle and active timeouts as arrays (i64) to be indexed by protocol class."""
        idle, active = ([table[name] for name in CLASSES] for table in (self.idle_ns, self.active_ns))
        return np.array(idle, np.int64), np.array(active, np.int64)


class Flows(Protocol):
    """What a sweep reads of a family's flow table; all by slot number (i64)."""

    def occupied(self) -> Array:
        """The slots that are not free."""

    def hot(self, slots: Array) -> Array:
        """Copies of these slots, with fields ctl, last_ns, flags_hint and protocol."""

    def is_live(self, ctl: Array) -> Array:
        """Of ctl words: whether packets find the flow."""

    def starts(self, slots: Array) -> Array:
        """Start (i64) of the record that each flow is collecting."""

    def is_left_behind(self, slots: Array) -> Array:
        """Whether each flow should end with its next record, to be made anew elsewhere."""

    def asleep(self, slots: Array, now_ns: int) -> Array:
        """Whether nothing is due of each flow, as sleep() was told; none is asleep that it was not told of."""

    def sleep(self, slots: Array, until_ns: Array) -> None:
        """Nothing will be due of these flows before then."""


class Due(NamedTuple):
    """Slots that end, with their flowEndReason (u8) each; slots that live on but owe a record; all that live on."""

    ending: Array
    reasons: Array
    active: Array
    living: Array


def due(flows: Flows, timeouts: Timeouts, now_ns: int, *, room_flows: int) -> Due:
    """What is due at `now_ns`. Above `room_flows` flows the ones that have been idle longest end early (reason 5).

    A flow that has been looked at sleeps until the first time at which anything of it could be due: its last packet
    can only become later. A crowd wakes all, as the idlest are sought.
    """
    slots = flows.occupied()
    asleep = _NO_SLOTS
    if len(slots) <= room_flows:
        sleeps = np.concatenate([np.empty(0, bool), *(flows.asleep(part, now_ns) for part in _parts(slots, _PEEKS))])
        if sleeps.any():
            slots, asleep = slots[~sleeps], slots[sleeps]
    parts = [_due(flows, part, timeouts, now_ns) for part in _parts(slots)]
    ending, reasons, living, owes, last_ns = (np.concatenate(arrays) for arrays in zip(_NO_PART, *parts))
    crowd = len(living) - room_flows
    if crowd <= 0:
        return Due(ending, reasons, living[owes], np.concatenate((asleep, living)))
    early = np.zeros(len(living), bool)
    early[np.argpartition(last_ns, crowd - 1)[:crowd]] = True
    ending = np.concatenate((ending, living[early]))
    reasons = np.concatenate((reasons, np.full(crowd, LACK_OF_RESOURCES, np.uint8)))
    return Due(ending, reasons, living[owes & ~early], living[~early])


def everything(flows: Flows, reason: int) -> Due:
    """All flows end now, for one reason."""
    slots = _live(flows)
    return Due(slots, np.full(len(slots), reason, np.uint8), _NO_SLOTS, _NO_SLOTS)


def report_all(flows: Flows) -> Due:
    """No flow ends, and all owe a record."""
    slots = _live(flows)
    return Due(_NO_SLOTS, np.empty(0, np.uint8), slots, slots)


_NO_SLOTS = np.empty(0, np.int64)
# Looked at together: their copies stay in the cache (a million flows: 13 ms, 31 ms if all at once).
_AT_ONCE = 4096
_PEEKS = 65536  # likewise, where a word a flow is looked at


def _parts(slots: Array, count: int = _AT_ONCE) -> Iterator[Array]:
    return (slots[first : first + count] for first in range(0, len(slots), count))


def _live(flows: Flows) -> Array:
    parts = [part[flows.is_live(flows.hot(part)["ctl"])] for part in _parts(flows.occupied())]
    return np.concatenate([_NO_SLOTS, *parts])


class _Part(NamedTuple):
    """What is due of some slots: those that end and why; those that live on, whether they owe a record, last time."""

    ending: Array
    reasons: Array
    living: Array
    owes: Array
    last_ns: Array


_NO_PART = _Part(_NO_SLOTS, np.empty(0, np.uint8), _NO_SLOTS, np.empty(0, bool), np.empty(0, np.int64))


def _due(flows: Flows, slots: Array, timeouts: Timeouts, now_ns: int) -> _Part:
    hot = flows.hot(slots)
    classes = _CLASS_OF_PROTOCOL[hot["protocol"]]
    idle_after, active_after = timeouts.by_class
    is_tcp = classes == CLASSES.index("tcp")
    ended = is_tcp & (hot["flags_hint"] & _FIN_OR_RST != 0)
    limit_ns = np.where(ended, np.minimum(idle_after[classes], timeouts.linger_ns), idle_after[classes])
    last_ns = hot["last_ns"].view(np.int64)
    idle = now_ns - last_ns >= limit_ns

    live = flows.is_live(hot["ctl"])
    ends, lives_on = np.flatnonzero(live & idle), np.flatnonzero(live & ~idle)
    reasons = np.where(ended[ends], END_OF_FLOW, IDLE).astype(np.uint8)
    living = slots[lives_on]
    active_ns = flows.starts(living) + active_after[classes[lives_on]]
    owes = active_ns <= now_ns
    ends_ns = last_ns + limit_ns
    still_open = np.flatnonzero(is_tcp & ~ended)  # a FIN may come at once
    ends_ns[still_open] = np.minimum(ends_ns[still_open], now_ns + timeouts.linger_ns)
    flows.sleep(living, np.minimum(active_ns, ends_ns[lives_on]))
    moves = owes & flows.is_left_behind(living)
    if not moves.any():
        return _Part(slots[ends], reasons, living, owes, last_ns[lives_on])
    reasons = np.concatenate((reasons, np.full(np.count_nonzero(moves), ACTIVE, np.uint8)))
    stays = ~moves
    return _Part(
        np.concatenate((slots[ends], living[moves])), reasons, living[stays], owes[stays], last_ns[lives_on[stays]]
    )
