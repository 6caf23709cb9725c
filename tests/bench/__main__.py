# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m bench`: measures, prints the table, writes the JSON. --page only renews speed.md and its picture."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lab.markdown import put_into

from . import at_rest, capture_read, export_rate, flood, growth, packet_cost, punctual, system_cost
from .figures import Figure, Report, this_machine
from .kernel import ROOT

RESULT = ROOT / "build" / "bench.json"
PAGE, PICTURE = ROOT / "packaging" / "docs" / "speed.md", ROOT / "packaging" / "docs" / "growth.svg"
Measurement = Callable[[Path], "list[Figure]"]


def measurements(*, quick: bool, agent: Path | None = None) -> dict[str, Measurement]:
    """By name, in the order of the table. Quick: numbers too small to mean anything. `agent`: see netobserv.py."""
    rounds, packets = (1, 2_000) if quick else (9, 1_000_000)
    live = (0, 1_000) if quick else (0, 10_000, 100_000, 1_000_000)
    some = (1_000,) if quick else (100_000, 1_000_000)
    grown = (1_000, 2_000) if quick else (1_000, 10_000, 100_000, 1_000_000, 4_000_000)
    floods, rates = ((1_000,), (5_000,)) if quick else ((262_144, 2_000_000), tuple(range(50_000, 1_000_001, 50_000)))
    crowd, load = (1_000, 10_000) if quick else (1_000_000, 200_000)
    return {
        "packet": lambda _: packet_cost.measure(rounds=rounds, packets=packets, crowds=some, agent=agent),
        "system": lambda folder: system_cost.measure(
            rounds=1 if quick else 5, packets=load, flows=min(load, 10_000), loops=1 if quick else 10, directory=folder
        ),
        "export": lambda folder: export_rate.measure(rounds=1 if quick else 3, flows=crowd, directory=folder),
        "rest": lambda folder: at_rest.measure(
            directory=folder, seconds=0.5 if quick else 10, rounds=1 if quick else 3, crowds=live
        ),
        "peers' memory": lambda folder: at_rest.peers(directory=folder, flows=min(crowd, 100_000)),
        "lateness": lambda folder: punctual.lateness(flows=3 if quick else 40, directory=folder),
        "start": lambda _: punctual.commands(rounds=1 if quick else 7),
        "first packet": lambda folder: punctual.first_packet(rounds=1 if quick else 5, directory=folder),
        "capture": lambda folder: capture_read.measure(
            rounds=1 if quick else 3, packets=packets, flows=packets // 100, directory=folder
        ),
        "flood": lambda folder: flood.measure(directory=folder, tables=floods, rates=rates, fills=0.5 if quick else 3),
        "growth": lambda _: growth.measure(rounds=rounds, packets=packets, crowds=grown),
    }


def measure(chosen: dict[str, Measurement]) -> Report:
    """All that is chosen, one after the other; progress on standard error."""
    report = Report(this_machine())
    for name, measurement in chosen.items():
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="flowexp-bench-") as folder:
            report.figures += measurement(Path(folder))
        print(f"{name}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    return report


def renew_page(report: Report) -> None:
    """The tables of speed.md and, of growth, the picture beside it."""
    from . import plot  # a library that only this needs

    put_into(PAGE, "bench", report.markdown())
    plot.write(report.figures, PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--only", action="append", metavar="NAME", help="one measurement; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only see whether it runs")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE", help="the JSON")
    parser.add_argument("--netobserv", type=Path, metavar="FILE", help="its agent's BPF object, bpf_x86_bpfel.o")
    parser.add_argument("--page", action="store_true", help="measure nothing: speed.md from the JSON")
    arguments = parser.parse_args()
    if arguments.page:
        renew_page(Report.read(arguments.output))
        return
    every = measurements(quick=arguments.quick, agent=arguments.netobserv)
    unknown = sorted(set(arguments.only or ()) - set(every))
    if unknown:
        parser.error(f"--only {unknown[0]}: not one of {', '.join(every)}")
    report = measure({name: every[name] for name in arguments.only or every})
    report.write(arguments.output)
    print(report.markdown())


if __name__ == "__main__":
    main()
