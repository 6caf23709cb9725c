# SPDX-License-Identifier: GPL-2.0-or-later
"""4. and 5. The exporter as users run it, with live flows and no traffic: its CPU, its memory, and peers' beside it.

The flows are put into the running exporter's own pinned table, by our programs over the same maps. Memory is what is
resident; a BPF map that a process has mapped is shown apart, as it is the same memory in kernel and process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lab.flowexp
from lab.netns import Link, namespaces, veth
from lab.traffic import replay

from flowexp.kernel.pins import PinFolder
from flowexp.kernel.table import FlowTable
from flowexp.meter import this_layout

from .figures import US, Figure
from .kernel import meter
from .packet_cost import DEFAULT_MAX_FLOWS
from .peers import PEERS, capture
from .probes import descendants, process_cpu_s, rss_octets

REST, MEMORY = "At rest: live flows and no traffic, a sweep every second", "Memory"
FOREVER_S = 86_400
MIB = 1 << 20
SWEEPS_TO_SETTLE_S = 2.5


@contextmanager
def exporter(link: Link, directory: Path, *, max_flows: int) -> Iterator[lab.flowexp.Exporter]:
    """`flowexp run` on a link, its flows for ever; killed at the end."""
    configuration = {"timeouts": {"idle": FOREVER_S, "active": FOREVER_S}, "table": {"max_flows": max_flows}}
    with lab.flowexp.Exporter(
        link.namespace,
        directory,
        interfaces=(link.name,),
        collectors=[(directory / f"{max_flows}.ipfix").as_uri()],
        configuration=configuration,
    ) as running:
        yield running


def measure(*, directory: Path, seconds: float, rounds: int, crowds: tuple[int, ...]) -> list[Figure]:
    """CPU over `seconds`, `rounds` times, with each number of live flows, and what is resident then.

    seconds: some of the sweeps look at all flows, one in a `linger`, so a measurement has to last for several.
    """
    figures = []
    for flows in crowds:
        max_flows = max(flows * 5 // 4, DEFAULT_MAX_FLOWS)  # a table that is nearly full ends flows early
        shares, maps, rest = watch(directory, flows=flows, max_flows=max_flows, seconds=seconds, rounds=rounds)
        figures += [
            Figure(REST, f"exporter's CPU, {flows:,} flows", "% of a CPU", US, shares),
            Figure(MEMORY, f"{flows:,} live flows, without flow table", "MiB", US, [rest / MIB]),
            Figure(MEMORY, f"{flows:,} live flows, flow table (all of it)", "MiB", US, [maps / MIB]),
        ]
    return [figure for group in (REST, MEMORY) for figure in figures if figure.group == group]


def watch(directory: Path, *, flows: int, max_flows: int, seconds: float, rounds: int) -> tuple[list[float], int, int]:
    """The exporter's shares of a CPU in percent; octets of flow table, and resident without it."""
    with namespaces("rest", "peer") as (here, there):
        link, _ = veth(here, there)
        with exporter(link, directory, max_flows=max_flows) as running:
            _fill(running.pins, flows, max_flows)
            pid = running.process.pid
            table = FlowTable.adopt(this_layout(), _maps(running.pins))
            time.sleep(SWEEPS_TO_SETTLE_S)
            shares = []
            for _ in range(rounds):
                before_s = process_cpu_s(pid)
                time.sleep(seconds)
                shares.append((process_cpu_s(pid) - before_s) / seconds * 100)
            _, rest = rss_octets(pid)
            octets = table.octets
            table.close()
    return shares, octets, rest


def _fill(pins: Path, flows: int, max_flows: int) -> None:
    """Makes flows in a running exporter's table."""
    if not flows:
        return
    table = FlowTable.adopt(this_layout(), _maps(pins))
    with meter(max_flows, table) as filling:
        filling.fill(flows)


def _maps(pins: Path) -> dict[str, int]:
    maps = PinFolder(str(pins)).tables()[-1].find_maps(FlowTable.map_names(this_layout()))
    assert maps is not None, f"{pins}: no table is pinned there"
    return maps


def peers(*, directory: Path, flows: int) -> list[Figure]:
    """What peers have resident with `flows` flows of a capture, all their processes together."""
    file = capture(directory, packets=flows, flows=flows)
    figures = []
    for peer in (peer for peer in PEERS if peer.is_there):
        with namespaces("send", "meter") as (sending, metering):
            source, _ = veth(sending, metering)
            own = directory / f"memory-{peer.name}"
            process = peer.start(metering, own, metering.free_udp_port())
            try:
                replay(source, file)
                resident = sum(sum(rss_octets(pid)) for pid in descendants(process.pid))
                peer.stop(process, own)
            finally:
                process.kill()
        figures.append(Figure(MEMORY, f"{flows:,} live flows, everything", "MiB", peer.name, [resident / MIB]))
    return figures
