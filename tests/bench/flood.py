# SPDX-License-Identifier: GPL-2.0-or-later
"""8. The highest rate of new flows a second at which an exporter as users run it refuses none.

Every packet is a flow of its own, so the table fills whatever its size, and flows have to go as fast as they come. They
are made by our programs over the running exporter's own pinned maps, on one CPU and at an even pace; the Collector is a
UDP socket that nobody reads. A rate counts if it was kept up for as long as fills the table several times. Of the rates
the limit is sought by halves; the lowest that failed, as something was refused or the generator did not reach it, is
shown with both.
"""

from __future__ import annotations

import time
from pathlib import Path

from lab.collectors import Recorder
from lab.flowexp import Exporter
from lab.netns import Link, namespaces, veth
from lab.process import on_one_cpu

from flowexp.kernel.pins import PinFolder
from flowexp.kernel.table import FlowTable
from flowexp.meter import this_layout

from .figures import US, Figure
from .kernel import Meter, meter

GROUP = "Flood: every packet a new flow, nothing refused"
PIECE_S = 0.002
KEPT_PACE = 0.98  # of the rate asked for


def measure(*, directory: Path, tables: tuple[int, ...], rates: tuple[int, ...], fills: float) -> list[Figure]:
    """For each table the highest of `rates`, in ascending order; `fills`: of the table, for a rate to count."""
    figures = []
    for max_flows in tables:
        what = f"table of {max_flows:,}"
        kept, beyond = 0, len(rates)  # so many rates are known to be kept up; the place of the lowest that is not
        failed: list[Figure] = []
        while kept < beyond:
            place = (kept + beyond) // 2
            rate = rates[place]
            seconds = fills * max_flows / rate
            made, refused = _pour(directory / f"{max_flows}-{rate}", max_flows, rate, seconds)
            if not refused and made >= KEPT_PACE * rate * seconds:
                kept = place + 1
                continue
            beyond, asked = place, f"{what}, at {rate:,} asked for"
            failed = [
                Figure(GROUP, asked, "made a second", US, [made / seconds]),
                Figure(GROUP, asked, "% of them refused", US, [100 * refused / made]),
            ]
        figures += [*failed, Figure(GROUP, what, "new flows a second", US, [rates[kept - 1] if kept else 0])]
    return figures


def _pour(directory: Path, max_flows: int, rate: int, seconds: float) -> tuple[int, int]:
    """How many flows were made at that rate, and how many of them found no room."""
    directory.mkdir()
    with namespaces("flood", "peer") as (here, there), Recorder(here) as recorder:
        link: Link = veth(here, there)[0]
        with Exporter(
            here, directory, interfaces=(link.name,), collectors=[recorder.url],
            configuration={"table": {"max_flows": max_flows}},
        ) as exporter:  # fmt: skip
            layout = this_layout()
            maps = PinFolder(str(exporter.pins)).tables()[-1].find_maps(FlowTable.map_names(layout))
            assert maps is not None
            with meter(max_flows, FlowTable.adopt(layout, maps)) as filling, on_one_cpu():
                made = _flood(filling, rate, seconds)
                refused = filling.table.counters()["not_metered_table_full"][0]
            exporter.stop()
    return made, refused


def _flood(filling: Meter, rate: int, seconds: float) -> int:
    """Makes flows at an even pace; returns how many."""
    began_s, made = time.perf_counter(), 0
    while (passed_s := time.perf_counter() - began_s) < seconds:
        due = int(rate * passed_s) - made
        if due > 0:
            filling.fill(due, first=made)
            made += due
        time.sleep(PIECE_S)
    return made
