# SPDX-License-Identifier: GPL-2.0-or-later
"""A picture of how cost grows with the number of flows: both axes logarithmic, as flows and costs span decades."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from . import growth
from .figures import Figure

INCHES = (18.0, 3.2)
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "flowexp", "font.family": "sans-serif", "font.size": 9}
"""Text stays text, and the same figures make the same file."""


def write(figures: Sequence[Figure], path: Path) -> None:
    """One panel for each thing that was measured: medians, and least and greatest value as a band."""
    shown = [figure for figure in figures if figure.group == growth.GROUP]
    rows = list(dict.fromkeys((figure.what, figure.unit) for figure in shown))
    with matplotlib.rc_context(STYLE):
        picture, panels = pyplot.subplots(1, len(rows), figsize=INCHES, layout="constrained", squeeze=False)
        for panel, (what, unit) in zip(panels[0], rows):
            _draw(panel, [figure for figure in shown if figure.what == what])
            panel.set(xscale="log", yscale="log", title=f"{what}, {unit}", xlabel="flows")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.4)
        picture.savefig(path, metadata={"Date": None})
        pyplot.close(picture)


def _draw(panel: pyplot.Axes, figures: Sequence[Figure]) -> None:
    flows = [growth.flows_of(figure) for figure in figures]
    panel.fill_between(flows, [min(f.values) for f in figures], [max(f.values) for f in figures], alpha=0.25)
    panel.plot(flows, [figure.median for figure in figures], marker="o", markersize=4)
