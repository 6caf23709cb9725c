# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast Messages may go: a burst overflows a Collector that has not run for some milliseconds."""

from __future__ import annotations

import time
from typing import Callable

BURST_MESSAGES = 16
"""Default for what may go at once after a pause, and then in one system call while there is a pace."""


class Pacer:
    """A token bucket whose tokens are Messages: `burst_messages` at once, `messages_per_s` in the long run.

    `messages_per_s` 0: no limit.
    """

    def __init__(
        self,
        *,
        messages_per_s: int,
        burst_messages: int = BURST_MESSAGES,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._messages_per_s = messages_per_s
        self._burst_messages = burst_messages
        self._clock_ns = clock_ns
        self._sleep = sleep
        self._tokens = float(burst_messages)
        self._filled_ns = clock_ns()

    def set_pace(self, messages_per_s: int, burst_messages: int) -> None:
        """From now on."""
        self._fill()
        self._messages_per_s, self._burst_messages = messages_per_s, burst_messages

    def take(self, wanted: int) -> int:
        """Wait until some of the `wanted` Messages may go; return how many."""
        if not self._messages_per_s:
            return wanted
        granted = min(wanted, self._burst_messages)
        self._fill()
        while self._tokens < granted:
            self._sleep((granted - self._tokens) / self._messages_per_s)
            self._fill()
        self._tokens -= granted
        return granted

    def _fill(self) -> None:
        now_ns = self._clock_ns()
        gained = (now_ns - self._filled_ns) * self._messages_per_s / 1e9
        self._tokens = min(float(self._burst_messages), self._tokens + gained)
        self._filled_ns = now_ns
