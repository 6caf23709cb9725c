# SPDX-License-Identifier: GPL-2.0-or-later
"""`flowexp top` as users run it: beside an exporter, in a pipe and on a terminal, and where no exporter runs."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shlex
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import List, NamedTuple

import pytest
from lab import needs
from lab.collectors import Recorder
from lab.flowexp import COMMAND, Exporter
from lab.netns import Namespace, connect, namespaces, veth
from lab.process import environment
from lab.wait import wait_for

PINGS = 7
ECHO_OCTETS = 84  # of IPv4: ping's 56, ICMP and IP header
OURS, THEIRS = "192.0.2.1", "192.0.2.2"


class Running(NamedTuple):
    """An exporter that has metered echo requests and replies, and exported none of them."""

    exporter: Exporter
    namespace: Namespace

    def command(self, *options: str) -> List[str]:
        return self.namespace.inside([COMMAND, "top", "-c", self.exporter.configuration, *options])

    def rows(self, *options: str) -> List[List[str]]:
        """The words of each line of the last look."""
        done = self.namespace.run(COMMAND, "top", "-c", self.exporter.configuration, *options)
        return [line.split() for line in done.strip().split("\n\n")[-1].splitlines()[3:]]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    needs.need(needs.kernel(), needs.tools("ping"))
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        connect(left, right, (f"{OURS}/24", f"{THEIRS}/24"))
        timeouts = {"timeouts": {"idle": 600, "linger": 600}}
        with (
            Recorder(meter) as recorder,
            Exporter(meter, tmp_path, collectors=[recorder.url], configuration=timeouts) as exporter,
        ):
            sender.run("ping", "-q", "-i", "0.01", "-c", str(PINGS), THEIRS)
            yield Running(exporter, meter)
            if exporter.process.status is None:
                assert exporter.stop() == 0, exporter.log


@pytest.mark.kernel
def test_top_shows_flows_with_their_packets_and_consumes_none(running: Running) -> None:
    counts = ["0", "0", str(PINGS * ECHO_OCTETS), str(PINGS)]
    ends = [(OURS, THEIRS, "in"), (THEIRS, OURS, "out")]
    wanted = [["ICMP", source, destination, "eth0", way, *counts] for source, destination, way in ends]
    assert sorted(running.rows("--count", "2", "--interval", "100ms")) == sorted(wanted)
    assert running.exporter.stop() == 0, running.exporter.log
    ledger = running.exporter.ledger()
    assert ledger.closes
    assert (ledger.seen, ledger.exported) == (2 * PINGS, 2 * PINGS)


@pytest.mark.kernel
def test_top_groups_filters_and_chooses_interfaces(running: Running) -> None:
    once = ("--count", "1", "--interval", "100ms")
    both = ["0", "0", "1.18k", str(2 * PINGS), "2"]  # 14 of 84 octets
    assert sorted(running.rows(*once, "--by", "host")) == [[OURS, *both], [THEIRS, *both]]
    assert [row[1] for row in running.rows(*once, "--filter", f"src host {OURS} and packets = {PINGS}")] == [OURS]
    assert running.rows(*once, "-i", "lo") == []


@pytest.mark.kernel
def test_rates_are_those_of_the_packets_between_two_looks(running: Running) -> None:
    """Requests every 10 ms, so 84 octets 100 times a second at most."""
    with subprocess.Popen(
        running.namespace.inside(["ping", "-q", "-i", "0.01", "-c", "100000", OURS]), stdout=subprocess.DEVNULL
    ) as pinging:
        try:
            rows = running.rows("--count", "2", "--interval", "1s", "--filter", f"src host {THEIRS}")
        finally:
            pinging.terminate()
    assert 1 <= int(rows[0][6]) <= 110, rows


class Terminal:
    """A pseudo-terminal of 80x24 with a command on it."""

    def __init__(self, command: List[str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before, self._slave = termios.tcgetattr(slave), slave
        environment = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        self.output = ""

    def wait_for(self, text: str) -> None:
        """Until the command has written `text`, from here on."""
        start, deadline_s = len(self.output), time.monotonic() + 20
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        while text not in self.output[start:]:
            ready = poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
            assert ready, f"waited in vain for {text!r}; got {self.output[-3000:]!r}"
            self.output += os.read(self._master, 65536).decode("utf-8", "replace")

    def press(self, key: str) -> None:
        os.write(self._master, key.encode())

    def is_restored(self) -> bool:
        return termios.tcgetattr(self._slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def terminal(running: Running) -> Iterator[Terminal]:
    shown = Terminal(running.command("--interval", "200ms"))
    yield shown
    shown.close()


@pytest.mark.kernel
def test_on_a_terminal_keys_group_sort_pause_and_quit_and_the_terminal_is_put_back(terminal: Terminal) -> None:
    terminal.wait_for("by flow, most bit/s first")
    assert not terminal.is_restored()
    for key, text in {"h": "by host, most bit/s", "o": "by host, most octets", " ": "PAUSED", "P": "by port"}.items():
        terminal.press(key)
        terminal.wait_for(text)
    terminal.press("q")
    terminal.wait_for("\x1b[?1049l")  # leaves the screen of its own
    assert terminal.process.wait(20) == 0
    assert terminal.is_restored()


class Screen:
    """A tmux session of its own with a command in it; `lines` are what a person sees.

    Its environment tells another size, as that of a shell does whose window was resized since.
    """

    def __init__(self, command: List[str], directory: Path, *, columns: int, lines: int) -> None:
        self._tmux = ["tmux", "-S", str(directory / "tmux"), "-f", "/dev/null"]
        size = ["-x", str(columns), "-y", str(lines)]
        words = " ".join(shlex.quote(str(word)) for word in command)
        self._run("new-session", "-d", *size, f"{words}; exec sleep 600")

    def _run(self, *words: str) -> str:
        elsewhere = environment({"COLUMNS": "132", "LINES": "43"})
        done = subprocess.run([*self._tmux, *words], capture_output=True, text=True, check=True, env=elsewhere)
        return done.stdout

    @property
    def lines(self) -> List[str]:
        return self._run("capture-pane", "-p").rstrip("\n").split("\n")

    def press(self, key: str) -> None:
        self._run("send-keys", key)

    def type(self, text: str) -> None:
        self._run("send-keys", "-l", text)

    def wait_for(self, text: str) -> List[str]:
        """The screen, as soon as its first line has the text."""
        wait_for(f"{text!r} on the screen", lambda: text in self.lines[0], timeout_s=60)
        return self.lines

    def close(self) -> None:
        self._run("kill-server")


@pytest.mark.kernel
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 50)])
def test_the_screen_of_top_fits_and_its_rows_are_what_the_keys_ask_for(
    running: Running, tmp_path: Path, columns: int, lines: int
) -> None:
    needs.need(needs.tools("tmux"))
    pinging = running.namespace.start("ping", "-q", "-i", "0.05", OURS, directory=tmp_path, name="ping")
    screen = Screen(running.command("--interval", "200ms"), tmp_path, columns=columns, lines=lines)
    try:
        interface = "" if columns == 80 else "interface "
        titles = f"proto source destination {interface}bit/s pkt/s octets packets"
        wait_for("the columns", lambda: " ".join("".join(screen.lines[2:3]).split()) == titles, timeout_s=60)
        shown = screen.wait_for("by flow, most bit/s first")
        assert len(shown) == lines and max(map(len, shown)) <= columns
        assert shown[-1].startswith("show: f flow") and shown[-1].endswith("q quit")
        assert any(row.split()[:3] == ["ICMP", OURS, THEIRS] for row in shown[3:-1])
        hosts = {"h": ("by host", {OURS, THEIRS}), "i": ("by interface", {"eth0"}), "P": ("by port", {"ICMP"})}
        for key, (title, first_words) in hosts.items():
            screen.press(key)
            rows = screen.wait_for(title)[3:-1]
            assert {row.split()[0] for row in rows if row} == first_words
        screen.press("o")
        screen.wait_for("most octets first")
        screen.press("Space")
        paused = screen.wait_for("PAUSED")
        assert screen.lines == paused
        screen.press("Space")
        wait_for("the screen to go on", lambda: "PAUSED" not in screen.lines[0], timeout_s=60)
        screen.press("h")
        screen.wait_for("by host")
        screen.type("/src host nowhere")
        screen.press("Enter")
        wait_for("a caret under what is wrong", lambda: "^" in screen.lines[-1], timeout_s=60)
        what, typed, caret = screen.lines[-3:]
        assert "nowhere" in what and typed == "/ src host nowhere"
        assert typed[caret.index("^") :] == "nowhere"
        screen.press("C-u")
        screen.type(f"dst host {THEIRS} q")
        screen.press("BSpace")
        screen.press("Enter")
        wait_for("the filter", lambda: f"filter: dst host {THEIRS}" in screen.lines[-2], timeout_s=60)
        assert "2 flows" in screen.lines[0]  # of four
        assert {row.split()[0] for row in screen.lines[3:-2] if row} == {OURS, THEIRS}
        screen.type("/nothing of this counts")
        wait_for("what is typed", lambda: screen.lines[-2].endswith("nothing of this counts_"), timeout_s=60)
        screen.press("Escape")
        wait_for("the help", lambda: screen.lines[-1].endswith("q quit"), timeout_s=60)
        assert f"filter: dst host {THEIRS}" in screen.lines[-2]
        screen.press("q")
        wait_for("the terminal's own screen", lambda: "flowexp top" not in screen.lines[0], timeout_s=60)
    finally:
        screen.close()
        pinging.kill()


@pytest.mark.kernel
def test_sigterm_puts_the_terminal_back(terminal: Terminal) -> None:
    terminal.wait_for("by flow")
    terminal.process.terminate()
    assert terminal.process.wait(20) == 0
    terminal.wait_for("\x1b[?1049l")
    assert terminal.is_restored()


@pytest.mark.kernel
def test_top_ends_with_one_line_when_the_exporter_does(running: Running) -> None:
    with subprocess.Popen(
        running.command("--interval", "100ms"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("flowexp top: 2 flows")
        assert running.exporter.stop() == 0
        _, error = watching.communicate(timeout=30)
    assert watching.returncode == 1
    assert error.startswith(f"flowexp: no exporter runs on {running.exporter.pins}; start one with `flowexp run`")
    assert error.count("\n") == 1


@pytest.mark.parametrize("interval", ["0", "50ms", "soon"])
def test_an_interval_that_is_none_is_wrong_usage(interval: str) -> None:
    done = subprocess.run([COMMAND, "top", "--interval", interval], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"flowexp: --interval {interval}: ") and done.stderr.count("\n") == 1
