# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a Collector's name leads, asked again now and then beside the exporter."""

from __future__ import annotations

import socket
import threading
from typing import Any, Callable

LOOK_UP_PERIOD_NS = 30 * 10**9
"""A name is looked up again at most this often."""
Address = tuple[int, Any]
"""Address family and what connect() takes."""


class Resolver:
    """The Collector's addresses. Only the first look-up is waited for; later ones run beside the exporter."""

    def __init__(self, host: str, port: int, getaddrinfo: Callable[..., list[Any]], *, now_ns: int) -> None:
        self._host = host
        self._port = port
        self._getaddrinfo = getaddrinfo
        self._thread: threading.Thread | None = None
        self._looked_up_ns = now_ns
        self.addresses: list[Address] = []
        self.error = ""

    def look_up(self) -> None:
        """Set `addresses`, or leave them as they are and say in `error` why."""
        try:
            found = self._getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError) as error:
            self.error = getattr(error, "strerror", None) or str(error)
        else:
            self.addresses = [(int(family), address) for family, _, _, _, address in found]
            self.error = ""

    def look_up_beside(self, now_ns: int) -> None:
        """Begin a look-up that ends some time later, unless one is under way or was not long ago."""
        if now_ns - self._looked_up_ns < LOOK_UP_PERIOD_NS or (self._thread and self._thread.is_alive()):
            return
        self._looked_up_ns = now_ns
        self._thread = threading.Thread(target=self.look_up, name="resolver", daemon=True)
        self._thread.start()
