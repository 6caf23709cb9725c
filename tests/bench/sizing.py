# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m bench.sizing`: what a size of the table costs, in figures that an operator chooses it by.

Each table is two fifths full, of IPv4 flows. Measured: its memory and the exporter's, the exporter's CPU while nothing
is due, a packet of any flow, and a flow from its timeout to its datagram. The rest follows from these.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from lab.markdown import put_into, table

from flowexp.config import Timeouts

from . import at_rest, export_rate
from .at_rest import MIB
from .figures import shown, this_machine
from .kernel import ROOT, floor, meter

PAGE = ROOT / "packaging" / "README.md"
SIZES = (65_536, 262_144, 1_000_000, 4_000_000)
FULL = 0.4
PACKET_OCTETS, OVERHEAD_OCTETS = 700, 24  # on the wire: a preamble, a checksum and a gap beside the frame
GBIT = 10**9
ROWS = (
    "`max_flows`",
    "flow table, MiB",
    "exporter without it, MiB",
    "exporter's CPU while no flow is due, %",
    "new flows a second that there is room for",
    "exporter's CPU to send as many, %",
    "a packet, ns",
    f"CPU for 1 Gbit/s, {PACKET_OCTETS} octets a packet, %",
)


def column(max_flows: int, directory: Path, *, packets: int, seconds: float) -> list[str]:
    """Of one size, as ROWS has it."""
    flows = int(max_flows * FULL)
    with meter(max_flows) as ours, floor() as theirs:
        ours.fill(flows)
        empty = theirs.varied("empty_varied")
        packet_ns = statistics.median(
            ours.varied.random(flows, packets) - empty.random(flows, packets) for _ in range(5)
        )
    cost, *_ = export_rate.ours(flows, rounds=2)
    shares, octets, rest = at_rest.watch(directory, flows=flows, max_flows=max_flows, seconds=seconds, rounds=1)
    packets_per_s = GBIT / 8 / (PACKET_OCTETS + OVERHEAD_OCTETS)
    new_flows_per_s = max_flows / Timeouts().idle
    return [
        f"{max_flows:,}",
        shown(octets / MIB),
        shown(rest / MIB),
        shown(statistics.median(shares)),
        f"{new_flows_per_s:,.0f}",
        shown(new_flows_per_s * cost.median / 1e6 * 100),
        shown(packet_ns),
        shown(packets_per_s * packet_ns / 1e9 * 100),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make sizing")
    parser.add_argument("--quick", action="store_true", help="only see whether it runs")
    quick = parser.parse_args().quick
    sizes, packets, seconds = ((4_096,), 2_000, 0.5) if quick else (SIZES, 1_000_000, 5)
    columns: list[list[str]] = []
    for max_flows in sizes:
        with tempfile.TemporaryDirectory(prefix="flowexp-sizing-") as folder:
            columns.append(column(max_flows, Path(folder), packets=packets, seconds=seconds))
        print(f"{max_flows:,} flows measured", file=sys.stderr)
    head, *rows = zip(ROWS, *columns)
    text = f"On {this_machine()}.\n\n{table(head, rows)}"
    print(text, end="")
    if not quick:
        put_into(PAGE, "sizing", text)


if __name__ == "__main__":
    main()
