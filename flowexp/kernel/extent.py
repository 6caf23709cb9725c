# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of a family's table packets use (bpf/flow.h, enum flow_extent), and how that changes under way.

A change moves no flow. Packets look for theirs under both numbers of buckets until none is left that was made before
the change: each ends when it is idle, or at its active timeout, and its next packet makes it anew.
"""

from __future__ import annotations

from typing import Callable, Mapping, Optional

import numpy as np

from .layout import Array

U64 = np.uint64


class Extent:
    """The buckets in use of one family. `words`: u64, one a CPU; `tags`: u16, one a slot."""

    def __init__(self, words: Array, tags: Array, constants: Mapping[str, int]) -> None:
        self._words, self._tags = words, tags
        self._shift, self._ways = constants["BUCKETS_BEFORE_SHIFT"], constants["FLOW_WAYS"]
        self._left_behind: Optional[Array] = None  # bool, one a slot; None: no change is under way
        self.all_slots = len(tags)
        self.searched = self.all_slots
        """The first so many slots are those that may hold a flow."""
        # Where CPUs differ, one word leads to flows that the others do not: the one with the largest number before.
        self._word = int(words.max())

    @property
    def slots(self) -> int:
        """Slots in use."""
        return (self._word & (1 << self._shift) - 1) * self._ways

    @property
    def before(self) -> int:
        """Slots that were in use before the change that is under way; 0: none is."""
        return (self._word >> self._shift) * self._ways

    def is_overrun(self) -> bool:
        """Whether some CPU has gone on to all slots by itself."""
        return bool((self._words != U64(self._word)).any())

    def _store(self, slots: int, before: int) -> None:
        self._word = slots // self._ways | before // self._ways << self._shift
        self._words[:] = U64(self._word)

    def begin(self, slots: int) -> None:
        """For an empty table that no program sees yet: so many slots, a multiple of a bucket's, are in use."""
        self._store(slots, 0)
        self.searched = slots

    def change(self, slots: int, wait: Callable[[], None]) -> None:
        """From now on so many slots are in use; of this and the number before, one is all of them.

        `wait` returns when every program that saw the old number has ended: of the flows that are there then,
        some may lie where only the old number leads to.
        """
        self._go_on(slots, self.slots, wait)

    def recover(self, wait: Callable[[], None]) -> None:
        """Goes on where an exporter was killed, in a change or between two stores of one."""
        self._go_on(self.slots, self.before, wait)

    def _go_on(self, slots: int, before: int, wait: Callable[[], None]) -> None:
        self.searched = self.all_slots
        self._store(slots, before)
        if before:
            wait()
            self._left_behind = self._tags != 0

    def is_left_behind(self, slots: Array) -> Array:
        """Of slots: whether their flow was made before the change that is under way."""
        if self._left_behind is None:
            return np.zeros(len(slots), bool)
        left: Array = self._left_behind[slots]
        return left

    def freed(self, slots: Array) -> None:
        """What comes into these slots now is made where it belongs."""
        if self._left_behind is not None:
            self._left_behind[slots] = False

    def settle(self, wait: Callable[[], None]) -> None:
        """Ends the change, once no flow is left behind; then only slots in use are searched, if no others have a flow.

        `wait`: a CPU may be going on to all slots just now. After this such a step is seen (is_overrun) before
        anybody looks for its flows.
        """
        if self._left_behind is not None and not self._left_behind.any():
            self._store(self.slots, 0)
            self._left_behind = None
            wait()
        if self.searched > self.slots and not self.before and not self._tags[self.slots :].any():
            self.searched = self.slots
