# SPDX-License-Identifier: GPL-2.0-or-later
"""A path with a known delay and known losses between two namespaces: there is no netem on every kernel.

A third namespace in the middle, without an address: frames that come in on one side go out on the other, later,
or not at all. One thread does it, so it is for a few thousand frames a second; offloads are off, so that a frame is
what is on the wire.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .netns import Link, Namespace, veth

ETH_P_ALL = 3
PACKET_OUTGOING = 4
MAX_FRAME_OCTETS = 65_535

Drop = Callable[[bytes], bool]
"""Whether a frame is lost; called once for each, in order."""


class Ends(NamedTuple):
    """The interfaces at both ends of a path, each in its own namespace."""

    client: Link
    server: Link


def nothing(_: bytes) -> bool:
    """No frame is lost."""
    return False


class _Relay:
    """Carries frames between two links of one namespace until it is closed."""

    def __init__(
        self, middle: Namespace, sides: tuple[Link, Link], *, delay_s: float, drops: tuple[Drop, Drop]
    ) -> None:
        self._delay_s, self._drops = delay_s, drops
        self._sockets = [self._open(middle, side) for side in sides]
        self._wake, self._stop = os.pipe()
        self._waiting: list[tuple[float, int, int, bytes]] = []  # when, number, to which side, what
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @staticmethod
    def _open(middle: Namespace, side: Link) -> socket.socket:
        opened = middle.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        opened.bind((side.name, ETH_P_ALL))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        opened.setblocking(False)
        return opened

    def _run(self) -> None:
        while True:
            wait_s = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            ready, _, _ = select.select([*self._sockets, self._wake], [], [], wait_s)
            if self._wake in ready:
                return
            for side, opened in enumerate(self._sockets):
                if opened in ready:
                    self._take(side, opened)
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                _, _, side, frame = heapq.heappop(self._waiting)
                self._sockets[side].send(frame)

    def _take(self, side: int, opened: socket.socket) -> None:
        while True:
            try:
                frame, address = opened.recvfrom(MAX_FRAME_OCTETS)
            except BlockingIOError:
                return
            if address[2] != PACKET_OUTGOING and not self._drops[side](frame):
                due = time.monotonic() + self._delay_s
                heapq.heappush(self._waiting, (due, next(self._numbers), 1 - side, frame))

    def close(self) -> None:
        os.close(self._stop)
        self._thread.join()
        os.close(self._wake)
        for opened in self._sockets:
            opened.close()


@contextmanager
def path(
    client: Namespace,
    middle: Namespace,
    server: Namespace,
    *,
    delay_s: float = 0.0,
    lost_to_server: Drop = nothing,
    lost_to_client: Drop = nothing,
) -> Iterator[Ends]:
    """A path between two namespaces through a third: each frame takes `delay_s`, in either direction, or is lost."""
    near, to_client = veth(client, middle)
    far, to_server = veth(server, middle, names=("eth0", "eth1"))
    for link in (near, far, to_client, to_server):
        link.set_offloads(tso=False, gso=False, gro=False, tx=False)
    relay = _Relay(middle, (to_client, to_server), delay_s=delay_s, drops=(lost_to_server, lost_to_client))
    try:
        yield Ends(near, far)
    finally:
        relay.close()
