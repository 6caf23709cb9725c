# SPDX-License-Identifier: GPL-2.0-or-later
"""The bpffs folder in which a table's maps and links are pinned, and its lock.

What is pinned outlives the process: a killed exporter's flows are found by the next one, and
`dump` finds those of a running one. One exporter at a time holds the lock; readers take none.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import Dict, List, Optional

from ..errors import FlowexpError
from . import libbpf

_BPFFS = Path("/sys/fs/bpf")


def mount_bpffs() -> None:
    """Mounts the BPF file system in its usual place if no one has; FlowexpError where that is not permitted."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    if any(line.split()[1:3] == [str(_BPFFS), "bpf"] for line in mounts):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", str(_BPFFS).encode(), b"bpf", ctypes.c_ulong(0), None):
        reason = os.strerror(ctypes.get_errno())
        raise FlowexpError(f"{_BPFFS}: no BPF file system, and mounting it failed ({reason}); mount it as root")


class PinFolder:
    """One folder under bpffs. Create it with `hold`, look at someone else's with `find_maps`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._lock: Optional[int] = None

    def hold(self) -> None:
        """Creates the folder if need be and takes its lock; FlowexpError where another exporter has it."""
        if str(self.path).startswith(str(_BPFFS)):
            mount_bpffs()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise FlowexpError(
                f"{self.path}: {error.strerror}; [table] pin_path must be on a BPF file system"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise FlowexpError(
                f"{self.path}: another exporter is running on this flow table; stop it, or set another [table] pin_path"
            ) from error
        self._lock = lock

    def is_held(self) -> bool:
        """Whether some exporter holds the lock right now."""
        try:
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError:
            return True
        finally:
            os.close(lock)

    def find_maps(self, names: List[str]) -> Optional[Dict[str, int]]:
        """A descriptor for each of these maps; None unless all of them are pinned here."""
        fds: Dict[str, int] = {}
        try:
            for name in names:
                fds[name] = libbpf.get_pinned(str(self.path / name))
        except OSError as error:
            for fd in fds.values():
                os.close(fd)
            if error.errno == errno.ENOENT:
                return None
            raise FlowexpError(f"{self.path}: {error.strerror}; run as root, or as the exporter's user") from error
        return fds

    def pin(self, name: str, fd: int) -> None:
        """Pins a map or a link under `name`; FlowexpError where the folder is not on a BPF file system."""
        try:
            libbpf.pin(fd, str(self.path / name))
        except OSError as error:
            raise FlowexpError(
                f"{self.path / name}: {error.strerror}; [table] pin_path must be on a BPF file system"
            ) from error

    def unpin(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def names(self) -> List[str]:
        """What is pinned here; nothing where the folder does not exist."""
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []

    def clear(self) -> None:
        """Unpins everything and removes the folder."""
        for name in self.names():
            self.unpin(name)
        if self.path.is_dir():
            self.path.rmdir()

    def release(self) -> None:
        """Gives the lock back; pins stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
