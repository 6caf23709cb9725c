# SPDX-License-Identifier: GPL-2.0-or-later
"""7. How packet cost, sweep and export grow with the number of flows, each in a table a little larger."""

from __future__ import annotations

from . import export_rate
from .figures import Figure
from .kernel import floor, meter

GROUP = "Growth: flows in a table with room for a quarter more"
_SUBJECT = "{:,} flows"
FEW = 10_000  # flows, in a table of whatever size


def flows_of(figure: Figure) -> int:
    """Of how many flows a figure of this group is."""
    return int(figure.subject.removesuffix(" flows").replace(",", ""))


def measure(*, rounds: int, packets: int, crowds: tuple[int, ...]) -> list[Figure]:
    """For each number of flows: a packet of any of them, and of a few in as large a table; a sweep in which nothing is
    due, where all flows sleep and where it looks at each (one in a `linger` does); the end of all."""
    figures = []
    for flows in crowds:
        with meter(flows * 5 // 4) as ours, floor() as theirs:
            ours.fill(flows)
            empty = theirs.varied("empty_varied")
            random_ns = [ours.varied.random(flows, packets) - empty.random(flows, packets) for _ in range(rounds)]
            export_rate.sweep_ms(ours)  # the first also looks up when flows began
            asleep_ms = [export_rate.sweep_ms(ours) for _ in range(rounds)]
            awake_ms = [export_rate.sweep_ms(ours, wake=True) for _ in range(rounds)]
        with meter(flows * 5 // 4) as ours, floor() as theirs:
            few = min(flows, FEW)
            ours.fill(few)
            empty = theirs.varied("empty_varied")
            few_ns = [ours.varied.random(few, packets) - empty.random(few, packets) for _ in range(rounds)]
        exported, subject = export_rate.ours(flows, rounds=2), _SUBJECT.format(flows)
        figures += [
            Figure(GROUP, "a packet of any flow", "ns", subject, random_ns),
            Figure(GROUP, f"a packet of any of {FEW:,}, in as large a table", "ns", subject, few_ns),
            Figure(GROUP, "a sweep, all flows asleep", "ms", subject, asleep_ms),
            Figure(GROUP, "a sweep that looks at all", "ms", subject, awake_ms),
            Figure(GROUP, "a flow from timeout to datagram, CPU", "us", subject, exported[0].values),
        ]
    return figures
