# SPDX-License-Identifier: GPL-2.0-or-later
"""CPU time and memory, as the kernel accounts for them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

_TICKS_S = os.sysconf("SC_CLK_TCK")
_IDLE_COLUMNS = (3, 4)  # idle, iowait


class Spent(NamedTuple):
    """Seconds of wall clock, and of CPU of the whole machine."""

    wall_s: float
    cpu_s: float


class Stopwatch:
    """From its making to `read`: user, system, irq and softirq time of all CPUs, but for other people's processes."""

    def __init__(self) -> None:
        self._wall_s, self._busy_s, self._others_s = time.monotonic(), _machine_busy_s(), _others_s()

    def read(self) -> Spent:
        others_s = max(0.0, _others_s() - self._others_s)
        return Spent(time.monotonic() - self._wall_s, _machine_busy_s() - self._busy_s - others_s)


def _machine_busy_s() -> float:
    """User, nice, system, irq and softirq time of all CPUs; time stolen by the hypervisor is nobody's."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    return sum(t for column, t in enumerate(ticks) if column not in _IDLE_COLUMNS) / _TICKS_S


def _others_s() -> float:
    """CPU time of all processes that we have not started, but kernel threads.

    With that of their children that have ended: who ends between two readings is found in its parent.
    """
    processes = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        processes[int(path.parent.name)] = int(words[1]), sum(map(int, words[11:15])) / _TICKS_S
    ours, kernel = {os.getpid()}, {2}
    for group in (ours, kernel):
        while more := {pid for pid, (parent, _) in processes.items() if parent in group} - group:
            group |= more
    return sum(s for pid, (_, s) in processes.items() if pid not in ours | kernel)


def idle_share(seconds: float = 1.0) -> float:
    """CPU seconds a second that the machine spends when nothing of ours runs."""
    watch = Stopwatch()
    time.sleep(seconds)
    spent = watch.read()
    return spent.cpu_s / spent.wall_s


def process_cpu_s(pid: int) -> float:
    """CPU time of all threads of a process so far, to the nanosecond (schedstat)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in descendants(int(child)))]


def rss_octets(pid: int) -> tuple[int, int]:
    """Resident memory of one process: of BPF maps, and of all else."""
    maps = rest = 0
    in_map = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            in_map = "bpf" in line
        elif words[0] == "Rss:":
            octets = int(words[1]) * 1024
            maps, rest = (maps + octets, rest) if in_map else (maps, rest + octets)
    return maps, rest
