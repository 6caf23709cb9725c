# SPDX-License-Identifier: GPL-2.0-or-later
"""Which flows end, why, and which long ones are due for a record (RFC 5470, section 5.1; RFC 7011).

Plain numpy over one family's flows: no clock, no kernel, no network. Times are boot
nanoseconds (i64); "now" is an argument. The packet path's last time may lag or, from the
coarse clock, lie before the first: differences are signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Protocol, Tuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

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

    def by_class(self) -> Tuple[Array, Array]:
        """Idle and active timeouts as arrays to be indexed by protocol class."""
        idle, active = ([table[name] for name in CLASSES] for table in (self.idle_ns, self.active_ns))
        return np.array(idle, np.int64), np.array(active, np.int64)


class Flows(Protocol):
    """What a sweep reads of a family's flow table; all by slot number (i64)."""

    def live(self) -> Array: ...
    def starts(self, slots: Array) -> Array: ...
    def member(self, name: str, slots: Array) -> Array: ...


@dataclass(frozen=True)
class Due:
    """Slots that end, with their flowEndReason (u8) each, and slots that live on but owe a record."""

    ending: Array
    reasons: Array
    active: Array
    live: int  # flows looked at


def due(flows: Flows, timeouts: Timeouts, now_ns: int, *, room_flows: int) -> Due:
    """What is due at `now_ns`. Above `room_flows` live flows the ones idle longest end early (reason 5)."""
    slots = flows.live()
    idle_ns = now_ns - flows.member("last_ns", slots).view(np.int64)
    classes = _CLASS_OF_PROTOCOL[flows.member("protocol", slots)]
    idle_after, active_after = timeouts.by_class()
    idle_after = idle_after[classes]
    ended = (flows.member("flags_hint", slots) & _FIN_OR_RST != 0) & (classes == CLASSES.index("tcp"))
    idle_after = np.where(ended, np.minimum(idle_after, timeouts.linger_ns), idle_after)

    reasons = np.where(idle_ns >= idle_after, np.where(ended, END_OF_FLOW, IDLE), 0).astype(np.uint8)
    surplus = len(slots) - int(np.count_nonzero(reasons)) - room_flows
    if surplus > 0:
        reasons[_idle_longest(idle_ns, reasons, surplus)] = LACK_OF_RESOURCES
    living = np.flatnonzero(reasons == 0)
    old = now_ns - flows.starts(slots[living]) >= active_after[classes[living]]
    ending = np.flatnonzero(reasons)
    return Due(slots[ending], reasons[ending], slots[living[old]], len(slots))


def everything(flows: Flows, reason: int) -> Due:
    """All flows end now, for one reason."""
    slots = flows.live()
    return Due(slots, np.full(len(slots), reason, np.uint8), np.empty(0, np.int64), len(slots))


def report_all(flows: Flows) -> Due:
    """No flow ends, and all owe a record."""
    slots = flows.live()
    none = np.empty(0, np.int64)
    return Due(none, none.astype(np.uint8), slots, len(slots))


def _idle_longest(idle_ns: Array, reasons: Array, count: int) -> Array:
    """Indexes of the `count` flows that have been idle longest among those that do not end anyway."""
    candidates = np.flatnonzero(reasons == 0)
    order = np.argpartition(-idle_ns[candidates], count - 1)
    return candidates[order[:count]]
