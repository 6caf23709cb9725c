# SPDX-License-Identifier: GPL-2.0-or-later
"""Between a service and who runs it: signals that wake it, memory, and what the service manager is told."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Callable, Mapping, Optional

_log = logging.getLogger(__name__)


class Wakeup:
    """Lets a signal end a poll: Python writes each signal's number to a socket."""

    def __init__(self, handlers: Mapping[int, Callable[..., None]]) -> None:
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def fileno(self) -> int:
        return self._read.fileno()

    def clear(self) -> None:
        try:
            self._read.recv(4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._read.close()
        self._write.close()


_MIB = 1 << 20


def available_octets() -> Optional[int]:
    """Memory that the kernel could hand out now (proc_meminfo(5), MemAvailable); None: a service may not know."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # ProcSubset=pid
        return None
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) * 1024


def memory_sentence(table_octets: int, available: Optional[int]) -> str:
    """How much of it a flow table needs."""
    of_so_much = "" if available is None else f" of {available // _MIB} that are available"
    return f"the table takes up to {table_octets // _MIB} MiB{of_so_much}"


_M_MMAP_THRESHOLD = -3  # mallopt(3)
_LARGE_OCTETS = 2 << 20


def give_memory_back() -> None:
    """Has what a sweep of many flows needed go back to the kernel after it.

    By itself glibc raises this threshold with every large array that is freed, and keeps ever larger ones.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none, and gives back
        mallopt(_M_MMAP_THRESHOLD, _LARGE_OCTETS)


def notify(state: str) -> None:
    """Tells the service manager (sd_notify(3)), if it asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    path = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.sendto(state.encode(), socket.MSG_DONTWAIT, path)  # one that does not read must not stop us
    except BlockingIOError:
        pass
    except OSError as error:
        _log.warning("NOTIFY_SOCKET %s: %s", address, error.strerror)
