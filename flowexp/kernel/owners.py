# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose tc filter is whose, where there are no TCX links: a filter stays when the process that made it goes.

Each owner has a handle of its own under our priority, so that two on one device run one after the other, and whoever
comes again replaces what it left. An exporter is known by its pin_path, one at a time (pins.py). Whoever meters but
once takes a number that nobody has: the kernel gives an abstract socket's name back when its process ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
from typing import Iterator, List

from ..errors import FlowexpError

_MOST = 64  # who meter but once, at one time in one network namespace


def handle_of(pin_path: str) -> int:
    """That exporter's handle: 32 bits, of which 0 and the lowest _MOST are no exporter's."""
    digest = int.from_bytes(hashlib.sha256(pin_path.encode()).digest()[:4], "big")
    return max(digest, _MOST + 1)


@contextlib.contextmanager
def handle_for_once() -> Iterator[int]:
    """A handle that is nobody else's meanwhile; FlowexpError where there is none."""
    for number in range(1, _MOST + 1):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as place:
            if _take(place, number):
                yield number
                return
    raise FlowexpError(f"{_MOST} others meter in this network namespace already; end one of them")


def handles_left() -> List[int]:
    """The handles of all who may have metered once, and are gone."""
    left = []
    for number in range(1, _MOST + 1):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as place:
            if _take(place, number):
                left.append(number)
    return left


def _take(place: socket.socket, number: int) -> bool:
    try:
        place.bind(f"\0flowexp-once-{number}")
    except OSError:
        return False
    return True
