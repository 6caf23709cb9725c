# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting, for a condition and up to a deadline; never for a time."""

from __future__ import annotations

import time
from typing import Callable, TypeVar

T = TypeVar("T")

POLL_S = 0.01


def wait_for(what: str, condition: Callable[[], T], *, timeout_s: float = 10.0) -> T:
    """The first true value of `condition`; TimeoutError names `what` when none came in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(POLL_S)
