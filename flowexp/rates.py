# SPDX-License-Identifier: GPL-2.0-or-later
"""Sampling intervals: those of a table, and the Observation Domain of each.

Flow Records carry what was metered, unscaled, and Collectors hold one interval for an Observation Domain. So a flow
keeps by which of its table's intervals its packets were selected (bpf/flow.h, `rate`), and each interval that some
interfaces have for themselves is told in a domain of its own.
"""

from __future__ import annotations

from typing import NamedTuple, Tuple

MAX_INTERVALS = 8
"""In one table (bpf/flow.h, SAMPLING_RATES)."""

_STEP = 2654435769  # odd: no two intervals up to 65535 are alike in the last 16 bits, which NetFlow v5 has for a domain


class Rates(NamedTuple):
    """By which intervals a table's packets are selected, and how. By default every packet is."""

    intervals: Tuple[int, ...] = (1,)
    """First that of interfaces with none of their own; the others ascending."""
    is_random: bool = False
    """Whether any packet of an interval may be the one, or always the last is; False where every packet is."""

    @property
    def own(self) -> Tuple[int, ...]:
        """Those that interfaces have for themselves."""
        return self.intervals[1:]


def domain_of(domain: int, interval: int) -> int:
    """The Observation Domain ID of an own interval, beside a Collector's `domain`; an interval of 0 is no own one.

    Computed, not drawn, so that it is the same for ever and anybody can tell it. The step spreads the IDs: small
    numbers, one after the other, are what people give to domains.
    """
    return (domain + interval * _STEP) & 0xFFFFFFFF
