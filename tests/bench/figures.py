# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures and their table. A figure is all values of one measurement of one subject; what is shown is computed here."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

US = "flowexp"


@dataclass(frozen=True)
class Figure:
    """`subject`'s `values` of `what`, in `unit`; several of one `what` are compared with each other."""

    group: str
    what: str
    unit: str
    subject: str
    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        """Median and, where there are several values that differ, the least and the greatest."""
        least, greatest = shown(min(self.values)), shown(max(self.values))
        spread = f" ({least} to {greatest})" if least != greatest else ""
        return f"{shown(self.median)}{spread}"


def shown(value: float) -> str:
    """Three digits, or all before the point: 0.0123, 1.23, 12.3, 123, 1,234,567."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value else "0"


@dataclass
class Report:
    """One run of the benchmark."""

    machine: str
    figures: list[Figure] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON, with medians beside the values."""
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = [{**asdict(figure), "median": figure.median} for figure in self.figures]
        path.write_text(json.dumps({"machine": self.machine, "figures": figures}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` wrote."""
        content = json.loads(path.read_text())
        names = ("group", "what", "unit", "subject", "values")
        return cls(content["machine"], [Figure(*(figure[name] for name in names)) for figure in content["figures"]])

    def markdown(self) -> str:
        """One table a group: a row for what is measured, a column for who."""
        spread = "Medians, in brackets the least and the greatest value"
        parts = [f"On {self.machine}. {spread}; behind ×, the multiple of {US}'s median.\n"]
        for group in dict.fromkeys(figure.group for figure in self.figures):
            parts += [f"**{group}**\n", _table([figure for figure in self.figures if figure.group == group])]
        return "\n".join(parts)


def _table(figures: Sequence[Figure]) -> str:
    subjects = sorted(dict.fromkeys(figure.subject for figure in figures), key=lambda subject: subject != US)
    rows = dict.fromkeys((figure.what, figure.unit) for figure in figures)
    ours = {(figure.what, figure.unit): figure.median for figure in figures if figure.subject == US}
    cells = {
        (figure.what, figure.unit, figure.subject): f"{figure}{_ratio(figure, ours.get((figure.what, figure.unit)))}"
        for figure in figures
    }
    lines = [["", *subjects], ["---"] * (len(subjects) + 1)]
    for what, unit in rows:
        lines.append([f"{what}, {unit}", *(cells.get((what, unit, subject), "") for subject in subjects)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ratio(figure: Figure, ours: float | None) -> str:
    return f" ×{figure.median / ours:.2f}" if ours and figure.subject != US else ""


def this_machine() -> str:
    """Processor, number of CPUs, kernel, Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    virtual = ", virtual" if any("hypervisor" in line for line in lines if line.startswith("flags")) else ""
    return (
        f"{len(os.sched_getaffinity(0))} CPUs ({processor}{virtual}), Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def minus(values: Iterable[float], others: Sequence[float]) -> list[float]:
    """Each value less the median of the others."""
    base = statistics.median(others)
    return [value - base for value in values]
