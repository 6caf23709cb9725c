# SPDX-License-Identifier: GPL-2.0-or-later
"""7. How packet cost, sweep and export grow with the number of flows, each in a table a little larger."""

from __future__ import annotations

from . import export_rate
from .figures import Figure
from .kernel import floor, meter

GROUP = "Growth: flows in a table with room for a quarter more"
_SUBJECT = "{:,} flows"


def flows_of(figure: Figure) -> int:
    """Of how many flows a figure of this group is."""
    return int(figure.subject.removesuffix(" flows").replace(",", ""))


def measure(*, rounds: int, packets: int, crowds: tuple[int, ...]) -> list[Figure]:
    """For each number of flows: a packet of any of them, a sweep in which nothing is due, the end of all."""
    figures = []
    for flows in crowds:
        with meter(flows * 5 // 4) as ours, floor() as theirs:
            ours.fill(flows)
            empty = theirs.varied("empty_varied")
            random_ns = [ours.varied.random(flows, packets) - empty.random(flows, packets) for _ in range(rounds)]
            export_rate.sweep_ms(ours)  # the first also looks up when flows began
            sweeps_ms = [export_rate.sweep_ms(ours) for _ in range(rounds)]
        exported, subject = export_rate.ours(flows, rounds=2), _SUBJECT.format(flows)
        figures += [
            Figure(GROUP, "a packet of any flow", "ns", subject, random_ns),
            Figure(GROUP, "a sweep, nothing due", "ms", subject, sweeps_ms),
            Figure(GROUP, "a flow from timeout to datagram, CPU", "us", subject, exported[0].values),
        ]
    return figures
