# SPDX-License-Identifier: GPL-2.0-or-later
"""The exporter under test, as its users run it: a command, a configuration file, signals, what it prints.

Every exporter gets a pin folder of its own, so that tests and exporters do not meet.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import toml

from flowexp.status import Status, ask

from .netns import Namespace
from .process import SESSION, Process
from .wait import wait_for

if TYPE_CHECKING:
    from typing_extensions import Self

COMMAND = Path(os.environ.get("FLOWEXP", Path(sys.executable).parent / "flowexp"))
BPFFS = Path("/sys/fs/bpf")
RUNTIME = Path("/run/flowexp")
PIN_PREFIX = f"fxt-{SESSION}-"
READY_S = 60.0
EXPORT_ALL_S = 60.0

_numbers = itertools.count()


class LogLedger(NamedTuple):
    """The ledger line at the end of the log, in packets."""

    line: str
    seen: int
    exported: int
    in_table: int
    not_metered: dict[str, int]

    @property
    def closes(self) -> bool:
        """By its own figures, and by what it says of itself."""
        sums = self.exported + self.in_table + sum(self.not_metered.values())
        return self.seen == sums and self.line.endswith("the ledger closes")


def read_ledger_line(log: str) -> LogLedger:
    """The last ledger line of a log; ValueError when there is none."""
    pattern = r"(\d+) packets seen = (\d+) exported \+ (\d+) in the table(.*); the ledger.*"
    lines = list(re.finditer(pattern, log))
    if not lines:
        raise ValueError(f"no ledger line in the log: {log[-2000:]}")
    last = lines[-1]
    reasons = {reason: int(n) for n, reason in re.findall(r"\+ (\d+) not metered \(([^)]*)\)", last[4])}
    return LogLedger(last[0], int(last[1]), int(last[2]), int(last[3]), reasons)


class Exporter:
    """`flowexp run` inside a namespace, from READY until it has exported all and left."""

    def __init__(
        self,
        namespace: Namespace,
        directory: Path,
        *arguments: str,
        interfaces: Sequence[str] = ("eth0",),
        collectors: Sequence[str] = (),
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        number = next(_numbers)
        self.namespace = namespace
        self.directory = directory / f"flowexp-{number}"
        self.directory.mkdir(parents=True)
        self.pins = BPFFS / f"{PIN_PREFIX}{number}"
        self.configuration = self.directory / "flowexp.toml"
        self.configuration.write_text(toml.dumps(self._with_pins(configuration or {})))
        options = [word for name in interfaces for word in ("-i", name)]
        options += [word for url in collectors for word in ("--collector", url)]
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.process = self._start([*options, *arguments])
        try:
            wait_for("flowexp to notify READY=1", self._is_ready, timeout_s=READY_S)
        except BaseException:
            self._give_up()
            raise

    def _with_pins(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        return {**configuration, "table": {"pin_path": str(self.pins), **configuration.get("table", {})}}

    def _start(self, options: Sequence[str]) -> Process:
        """Starts it; its service manager is this socket (sd_notify(3))."""
        path = self.directory / "notify"
        self._notify.bind(str(path))
        self._notify.setblocking(False)
        command = self.namespace.inside([COMMAND, "run", "-c", self.configuration, *options])
        environment = {"NOTIFY_SOCKET": str(path)}
        return Process(command, directory=self.directory, name="run", extra_environment=environment)

    def _is_ready(self) -> bool:
        try:
            return self.process.is_alive() and b"READY=1" in self._notify.recv(4096).split(b"\n")
        except BlockingIOError:
            return False

    @property
    def log(self) -> str:
        """All it said on standard error so far."""
        return self.process.stderr

    def ledger(self) -> LogLedger:
        """What it says as it leaves; after `stop`."""
        return read_ledger_line(self.log)

    def stop(self) -> int:
        """Asks it to export all and leave; the exit status."""
        return self.process.stop(timeout_s=EXPORT_ALL_S)

    def reload(self, configuration: Mapping[str, Any]) -> None:
        """Gives it another configuration and waits until that is in force."""
        reloads = self.status()["configuration"]["reloads"]
        new = self.configuration.with_suffix(".new")
        new.write_text(toml.dumps(self._with_pins(configuration)))
        new.rename(self.configuration)
        os.kill(self.process.pid, signal.SIGHUP)
        wait_for("the reload", lambda: self.status()["configuration"]["reloads"] > reloads, timeout_s=30)

    def status(self) -> Status:
        """What it says of itself now."""
        return ask(str(self.pins))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """One that a failed test left running is killed; one that has ended must have cleaned up by itself."""
        self._notify.close()
        if self.process.status is None:
            self._give_up()

    def _give_up(self) -> None:
        self.process.kill()
        remove_pins(self.pins)


def remove_pins(folder: Path) -> None:
    """Unpins everything in a folder under bpffs, and the folder; nothing where there is none. A killed exporter's
    status socket goes, too."""
    if folder.is_dir():
        shutil.rmtree(folder)
    for socket_left in RUNTIME.glob(f"{folder.name}-*.sock"):
        socket_left.unlink()


def forgotten() -> list[str]:
    """Pin folders of this session that still exist."""
    return sorted(str(pin) for pin in BPFFS.glob(f"{PIN_PREFIX}*")) if BPFFS.is_dir() else []
