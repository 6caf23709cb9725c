# SPDX-License-Identifier: GPL-2.0-or-later
"""How many slots of a flow table packets should use, so that what they cost follows the flows that live.

Up to all at once, as soon as half of the slots in use are taken: a flood does not wait, and a table that is too
large is only slow. Down after a quiet time, so that a number of flows that swings does not move them about.
Plain arithmetic; time is an argument.
"""

from __future__ import annotations

# What their packets touch lies in 512 pages (IPv4: 2 MiB), a part of what a second-level TLB covers.
LEAST_SLOTS = 32_768
SLOTS_A_FLOW = 4  # at least: nearly every flow then lies in the slot that its packets try first
CALM_NS = 60 * 1_000_000_000


def slots_for(flows: int, all_slots: int) -> int:
    """Slots for so many flows: a power of two, or all of them where half would do no longer."""
    wanted = max(LEAST_SLOTS, 1 << (SLOTS_A_FLOW * flows - 1).bit_length())
    return wanted if wanted <= all_slots // 2 else all_slots


class Fitting:
    """Decides for one family, sweep by sweep."""

    def __init__(self, all_slots: int) -> None:
        self._all = all_slots
        self._most = 0  # flows at once, since:
        self._since_ns = 0

    def is_crowded(self, flows: int, in_use: int) -> bool:
        """Whether so many flows need more slots than are in use."""
        return flows > in_use // 2 and in_use < self._all

    def slots(self, flows: int, in_use: int, now_ns: int) -> int:
        """Slots to use from now on, with so many flows in those in use."""
        self._most = max(self._most, flows)
        if self.is_crowded(flows, in_use):
            return self._all
        if now_ns - self._since_ns < CALM_NS:
            return in_use
        fitting = slots_for(self._most, self._all)
        self._most, self._since_ns = 0, now_ns
        return min(fitting, in_use)
