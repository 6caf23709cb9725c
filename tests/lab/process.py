# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes of the laboratory: each is started here, stopped by its own pid, and found if it was forgotten.

Every process gets MARK in its environment, which its children inherit: a daemon's helper that outlives
the daemon is found, too, and nobody else's process ever is.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .wait import wait_for

MARK = "FLOWEXP_LAB"
SESSION = f"{os.getpid()}"


class CommandFailed(Exception):
    """A command ended with a status that nobody expected; the text is what it said."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, the mark of the session, the C locale, UTC, and `extra`."""
    return {**os.environ, MARK: SESSION, "LC_ALL": "C", "TZ": "UTC", **(extra or {})}


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """This process alone: what is counted per CPU is then counted on one, the packets that it sends included."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run(command: Sequence[str | Path], *, timeout_s: float = 60.0, stdin: str = "") -> str:
    """Standard output of a command that must succeed."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        input=stdin,
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
        timeout=timeout_s,
        env=environment(),
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise CommandFailed(f"`{' '.join(words)}` ended with {done.returncode}: {said}")
    return done.stdout


class Process:
    """A process in the background, its standard output and error in files under `directory`."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        directory: Path,
        name: str,
        extra_environment: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.name = name
        self._stdout = directory / f"{name}.stdout"
        self._stderr = directory / f"{name}.stderr"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self._popen = self._spawn(command, stdin=stdin, out=out, err=err, extra=extra_environment)

    @staticmethod
    def _spawn(
        command: Sequence[str | Path],
        *,
        stdin: int,
        out: IO[bytes],
        err: IO[bytes],
        extra: Mapping[str, str] | None,
    ) -> subprocess.Popen[bytes]:
        options: dict[str, Any] = {"stdin": stdin, "stdout": out, "stderr": err}
        return subprocess.Popen([str(word) for word in command], env=environment(extra), **options)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def status(self) -> int | None:
        """The exit status; None while the process runs."""
        return self._popen.poll()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def is_alive(self) -> bool:
        """True; CommandFailed, with the last of what it said, once the process has ended."""
        if self.status is not None:
            said = (self.stderr + self.stdout).strip()[-2000:]
            raise CommandFailed(f"{self.name} ended with {self.status}: {said}")
        return True

    def is_asleep(self) -> bool:
        """Whether its main thread waits for something, a datagram for instance, rather than runs or could run."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def wait(self, *, timeout_s: float = 30.0) -> int:
        """The exit status, once there is one."""
        wait_for(f"{self.name} (pid {self.pid}) to end", lambda: self.status is not None, timeout_s=timeout_s)
        return self._popen.returncode

    def stop(self, with_signal: int = signal.SIGTERM, *, timeout_s: float = 30.0) -> int:
        """Asks the process to end and waits for it; it is killed, and TimeoutError raised, if it does not."""
        if self.status is None:
            self._popen.send_signal(with_signal)
        try:
            return self.wait(timeout_s=timeout_s)
        except TimeoutError:
            self.kill()
            raise

    def kill(self) -> None:
        """Ends the process for certain; nothing to do if it has ended."""
        if self.status is None:
            self._popen.kill()
            self._popen.wait()


def forgotten() -> list[str]:
    """Processes of this session that still run, as `pid command`."""
    mark = f"{MARK}={SESSION}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{entry.name} {words.strip()}")
        except OSError:
            continue
    return found
