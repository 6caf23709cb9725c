# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a capture takes, from its file to flows: `dump --read` beside what else reads captures.

Each does what it is for: dump prints sums by protocol, nfpcapd writes its flow file, softflowd counts and forgets
(its expired flows go to a closed port), tshark prints conversations. Wall clock and CPU, start and end included.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from lab.flowexp import COMMAND
from lab.process import environment

from .figures import US, Figure
from .peers import MAX_FLOWS, capture

_PATIENCE_S = 600


def _commands(path: Path, directory: Path) -> dict[str, Callable[[], list[str]]]:
    def nfpcapd() -> list[str]:
        flows = directory / "nfpcapd"
        shutil.rmtree(flows, ignore_errors=True)
        flows.mkdir()
        return ["nfpcapd", "-r", str(path), "-w", str(flows), "-B", str(MAX_FLOWS)]

    return {
        US: lambda: [str(COMMAND), "dump", "--read", str(path), "--aggregate", "proto"],
        "nfpcapd": nfpcapd,
        "softflowd": lambda: ["softflowd", "-r", path.name, "-p", "p", "-c", "c", "-n", "127.0.0.1:9", "-d",
                              "-m", str(MAX_FLOWS)],
        "tshark": lambda: ["tshark", "-q", "-r", str(path), "-z", "conv,ip"],
    }  # fmt: skip


def measure(*, rounds: int, packets: int, flows: int, directory: Path) -> list[Figure]:
    """In turn, `rounds` times, over one capture; of those that are here."""
    path = capture(directory, packets=packets, flows=flows)
    wall_s: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, command in _commands(path, directory).items():
            words = command()
            if shutil.which(words[0]) is None:
                continue
            before, began_s = _children_s(), time.monotonic()
            subprocess.run(
                words, cwd=directory, env=environment(), timeout=_PATIENCE_S, check=False,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            wall_s.setdefault(name, []).append(time.monotonic() - began_s)
            cpu_s.setdefault(name, []).append(_children_s() - before)
    group = f"Reading a capture of {packets:,} packets, {flows:,} flows"
    return [
        *(Figure(group, "time", "s", name, values) for name, values in wall_s.items()),
        *(Figure(group, "packets a second", "1/s", name, [packets / s for s in each]) for name, each in wall_s.items()),
        *(Figure(group, "CPU", "s", name, values) for name, values in cpu_s.items()),
    ]


def _children_s() -> float:
    """CPU time of all that was started from here and has ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
