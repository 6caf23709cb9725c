# SPDX-License-Identifier: GPL-2.0-or-later
"""`make picture`: packaging/top.svg, the screen of `flowexp top` as it is beside an exporter under traffic.

Some tcpreplays over a veth pair send the same flows at different rates; tmux is the terminal.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.peers import MIX
from lab.collectors import Recorder
from lab.flowexp import COMMAND, Exporter
from lab.netns import namespaces, veth
from lab.process import environment
from lab.traffic import make_capture
from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "packaging" / "top.svg"
COLUMNS, LINES = 92, 16
RATES = {4: 1_200, 8: 900, 12: 700, 400: 500}  # flows: packets a second
WATCHED_S = 45


def screen(command: list[str], directory: Path) -> str:
    """What a terminal shows of a command after WATCHED_S, with its colours as escape sequences."""
    tmux = ["tmux", "-S", str(directory / "tmux"), "-f", "/dev/null"]

    def run(*words: str) -> str:
        done = subprocess.run([*tmux, *words], capture_output=True, text=True, check=True, env=environment())
        return done.stdout

    run("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), *command)
    try:
        time.sleep(WATCHED_S)
        return run("capture-pane", "-e", "-p")
    finally:
        run("kill-server")


def draw(shown: str, path: Path) -> None:
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(shown.rstrip("\n")), soft_wrap=True)
    svg = console.export_svg(title="flowexp top", unique_id="top")
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")  # fonts from afar


def main() -> None:
    with contextlib.ExitStack() as stage:
        directory = Path(stage.enter_context(tempfile.TemporaryDirectory()))
        sender, meter = stage.enter_context(namespaces("sender", "meter"))
        left, right = veth(sender, meter)
        recorder = stage.enter_context(Recorder(meter))
        exporter = stage.enter_context(Exporter(meter, directory, collectors=[recorder.url]))
        for flows, rate in RATES.items():
            path = directory / f"{flows}.pcap"
            make_capture(path, packets=20 * flows, flows=flows, macs=(left.mac, right.mac), stacks=MIX)
            words = ["tcpreplay", "-q", "-i", left.name, f"--pps={rate}", "--loop=0", str(path)]
            stage.callback(sender.start(*words, directory=directory, name=f"tcpreplay-{flows}").kill)
        top = [COMMAND, "top", "-c", exporter.configuration]
        draw(screen([str(word) for word in meter.inside(top)], directory), PICTURE)
    print(f"{PICTURE} is new", file=sys.stderr)


if __name__ == "__main__":
    main()
