# SPDX-License-Identifier: GPL-2.0-or-later
"""The bpffs folder in which tables and links are pinned, and its lock.

What is pinned outlives the process: a killed exporter's flows are found by the next one, and
`dump` finds those of a running one. One exporter at a time holds the lock; readers take none.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from ..errors import FlowexpError
from . import libbpf

_log = logging.getLogger(__name__)

_BPFFS = Path("/sys/fs/bpf")
_NAMESPACES = Path("/run/netns")


def is_on_bpffs(path: Path) -> bool:
    """Whether `path` is, or would be, a folder in a BPF file system: the whole of one is not ours alone.

    The folder may be a mount of its own: the service sees nothing but that (flowexp.service).
    """
    folder = Path(os.path.realpath(path))
    return any(folder.is_relative_to(point) and (folder != point or root != "/") for point, root in _bpf_mounts())


def may_be_mounted_for(path: Path) -> bool:
    """Whether mounting the BPF file system in its usual place makes `path` a folder in it."""
    return path != _BPFFS and path.is_relative_to(_BPFFS)


def not_a_pin_path(path: Path) -> str:
    """What is wrong with it, and what would be right."""
    return f"{path}: [table] pin_path must be a folder in a BPF file system, below {_BPFFS}"


def _bpf_mounts() -> Iterator[Tuple[Path, str]]:
    """Where BPF file systems are mounted, and which folder of theirs."""
    return ((point, root) for kind, _, point, root in _mounts() if kind == "bpf")


def _mounts() -> Iterator[Tuple[str, str, Path, str]]:
    """File systems, their sources, where they are mounted, and which folder of theirs (proc_pid_mountinfo(5))."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words, _, filesystem = line.partition(" - ")
        kind, source = filesystem.split()[:2]
        root, point = words.split()[3:5]
        yield kind, source, Path(point), root


def mount_bpffs(path: Path) -> None:
    """Mounts the BPF file system in its usual place unless `path` is in one; FlowexpError where it may not."""
    if is_on_bpffs(path):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", str(_BPFFS).encode(), b"bpf", ctypes.c_ulong(0), None):
        reason = os.strerror(ctypes.get_errno())
        raise FlowexpError(f"{_BPFFS}: no BPF file system, and mounting it failed ({reason}); mount it as root")
    # `ip netns exec` mounts a /sys of its own, in the name of the namespace.
    name = next((source for kind, source, _, _ in _mounts() if kind == "sysfs" and (_NAMESPACES / source).exists()), "")
    if name:
        _log.warning(
            "%s: mounted for this command alone, as `ip netns exec` has a /sys of its own: what is pinned goes with it,"
            " and no other command finds it; use `nsenter --net=%s`", _BPFFS, _NAMESPACES / name,
        )  # fmt: skip


def _unlink_all(folder: Path) -> None:
    """Unpins everything in a folder of pins, and removes it, unless a file system is mounted there."""
    for path in folder.iterdir():
        path.unlink()
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise


class TablePins:
    """The folder of one table's maps. Tables of other sizes or layouts have folders of their own beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find_maps(self, names: Iterable[str]) -> Optional[Dict[str, int]]:
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

    def pin(self, maps: Mapping[str, int]) -> None:
        """Pins a table's maps, by name."""
        try:
            self.path.mkdir(mode=0o700)
            for name, fd in maps.items():
                libbpf.pin(fd, str(self.path / name))
        except OSError as error:
            raise FlowexpError(
                f"{self.path}: {error.strerror}; [table] pin_path must be on a BPF file system"
            ) from error

    def clear(self) -> None:
        """Unpins the maps and removes the folder."""
        if self.path.is_dir():
            _unlink_all(self.path)


class PinFolder:
    """All that one exporter pins: a folder for each table, and its links. Readers take no lock.

    Tables are numbered; the highest number is the one that packets go to.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._lock: Optional[int] = None

    def hold(self) -> None:
        """Creates the folder if need be and takes its lock; FlowexpError where another exporter has it.

        Only on a BPF file system: clear() unlinks whatever is in the folder.
        """
        if may_be_mounted_for(self.path):
            mount_bpffs(self.path)
        if not is_on_bpffs(self.path):
            raise FlowexpError(not_a_pin_path(self.path))
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError as error:
            raise FlowexpError(f"{self.path}: {error.strerror}; run as root, or as the exporter's user") from error
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

    def tables(self) -> List[TablePins]:
        """The folders of tables, oldest first."""
        numbers = sorted(int(name) for name in self._names() if name.isdigit())
        return [TablePins(self.path / str(number)) for number in numbers]

    def newest(self) -> TablePins:
        """The table that packets go to now; FlowexpError while an exporter that starts or leaves has none."""
        tables = self.tables()
        if not tables:
            raise self.no_table()
        return tables[-1]

    def no_table(self) -> FlowexpError:
        """What to raise where a running exporter's table is not there, or not whole."""
        return FlowexpError(f"{self.path}: the exporter is just starting or leaving; try again")

    def next_table(self) -> TablePins:
        """A folder for a table that packets will go to from now on; it is made by pin()."""
        tables = self.tables()
        return TablePins(self.path / str(int(tables[-1].path.name) + 1 if tables else 1))

    def links(self) -> Dict[str, int]:
        """A descriptor for each pinned link, by the name that it was pinned under."""
        return {name: libbpf.get_pinned(str(self.path / name)) for name in self._names() if not name.isdigit()}

    def has_links(self) -> bool:
        """Whether any link is pinned: then packets are being metered, exporter or not."""
        return any(not name.isdigit() for name in self._names())

    def pin_link(self, name: str, fd: int) -> None:
        libbpf.pin(fd, str(self.path / name))

    def unpin_link(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def _names(self) -> List[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def clear(self) -> None:
        """Unpins everything and removes the folder."""
        for table in self.tables():
            table.clear()
        if self.path.is_dir():
            _unlink_all(self.path)

    def release(self) -> None:
        """Gives the lock back; pins stay, and with them the folder."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            os.close(self._lock)
            self._lock = None
