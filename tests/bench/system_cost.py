# SPDX-License-Identifier: GPL-2.0-or-later
"""2. What metering costs the machine: tcpreplay sends at full speed over a veth pair, somebody meters the other end.

CPU is that of the whole machine, softirq included, less what it spends when idle and less other people's processes.
The sender's part is in it, and is what "nothing" shows; a second after the last packet is in it, too, for who lags
behind. Everybody in turn, in rounds; the frames are for another station (a mirror port). The last row is the part of
the packets that is in the records, as nfdump reads them: who loses packets saves their cost.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import lab.flowexp
from lab.collectors import Nfcapd
from lab.netns import Link, namespaces, veth
from lab.process import run

from flowexp.kernel import libbpf

from .figures import US, Figure
from .kernel import floor
from .peers import PEERS, Peer, capture
from .probes import Stopwatch, idle_share

NOTHING, EMPTY = "nothing", "empty program"
LAG_S = 1.0
_numbers = itertools.count()


class Bench:
    """Two namespaces, a veth pair, a capture, and a folder for what the subjects write."""

    def __init__(self, sender: Link, receiver: Link, file: Path, directory: Path) -> None:
        self.sender, self.receiver, self.capture = sender, receiver, file
        self.directory = directory

    def own_directory(self) -> Path:
        path = self.directory / f"{next(_numbers)}"
        path.mkdir()
        return path


@contextmanager
def bench(directory: Path, *, packets: int, flows: int) -> Iterator[Bench]:
    """The bench with a capture of its own."""
    file = capture(directory, packets=packets, flows=flows)
    with namespaces("send", "meter") as (sending, metering):
        source, target = veth(sending, metering)
        yield Bench(source, target, file, directory)


# Each subject meters while its context is open, and yields how many packets its records show, to be asked afterwards.
Subject = Callable[[Bench], AbstractContextManager[Callable[[], int]]]


@contextmanager
def _nothing(where: Bench) -> Iterator[Callable[[], int]]:
    yield lambda: 0


@contextmanager
def _empty(where: Bench) -> Iterator[Callable[[], int]]:
    with floor() as programs:
        link = _attached(where.receiver, programs.programs["empty_tc"])
        try:
            yield lambda: 0
        finally:
            os.close(link)


def _attached(link: Link, program: int) -> int:
    with link.namespace.entered():
        return libbpf.create_link(program, link.ifindex, libbpf.TCX_INGRESS)


@contextmanager
def _ours(where: Bench) -> Iterator[Callable[[], int]]:
    directory = where.own_directory()
    with Nfcapd(where.receiver.namespace, directory) as collector:
        exporter = lab.flowexp.Exporter(where.receiver.namespace, directory, collectors=[collector.url])
        with exporter:
            yield lambda: _packets_of(collector.directory / "flows")
            exporter.stop()
        collector.finish()


def _peer(peer: Peer) -> Subject:
    @contextmanager
    def metering(where: Bench) -> Iterator[Callable[[], int]]:
        directory, namespace = where.own_directory(), where.receiver.namespace
        with Nfcapd(namespace, directory) as collector:
            process = peer.start(namespace, directory, collector.port)
            try:
                yield lambda: _packets_of((collector.directory if peer.exports else directory) / "flows")
                peer.stop(process, directory)
            finally:
                process.kill()
            collector.finish()

    return metering


def _packets_of(folder: Path) -> int:
    """What nfdump finds in the files of a folder."""
    shown = run(["nfdump", "-C", "none", "-R", folder, "-q", "-N", "-A", "proto", "-o", "fmt:%pkt"])
    return sum(int(word) for word in shown.split() if word.isdigit())


def subjects() -> dict[str, Subject]:
    """Everybody, those peers that are installed."""
    peers: dict[str, Subject] = {peer.name: _peer(peer) for peer in PEERS if peer.is_there}
    return {NOTHING: _nothing, EMPTY: _empty, US: _ours, **peers}


def _send(where: Bench, loops: int) -> tuple[int, float]:
    """How many packets tcpreplay has sent, and how many a second; loading the capture is not in that."""
    report = where.sender.namespace.run(
        "tcpreplay", "-i", where.sender.name, "--topspeed", "--preload-pcap", "--no-flow-stats", f"--loop={loops}",
        where.capture,
    )  # fmt: skip
    sent, rate = re.search(r"Actual: (\d+) packets", report), re.search(r"([\d.]+) pps", report)
    if sent is None or rate is None:
        raise RuntimeError(f"tcpreplay's report is not understood: {report}")
    return int(sent[1]), float(rate[1])


def measure(*, rounds: int, packets: int, flows: int, loops: int, directory: Path) -> list[Figure]:
    """`packets` packets of `flows` flows, sent `loops` times a trial."""
    group = f"System cost: {packets * loops:,} packets of {flows:,} flows at full rate over veth, TC ingress"
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    idle = idle_share()
    with bench(directory, packets=packets, flows=flows) as where:
        for _ in range(rounds):
            for name, subject in subjects().items():
                with subject(where) as packets_seen:
                    watch = Stopwatch()
                    sent, rate = _send(where, loops)
                    time.sleep(LAG_S)
                    spent = watch.read()
                values["rate", name].append(rate / 1e6)
                cpu_s = (spent.cpu_s - idle * spent.wall_s) / sent * 1e6
                values["cpu", name].append(cpu_s)
                values["more", name].append(cpu_s - values["cpu", NOTHING][-1])
                values["seen", name].append(packets_seen() / sent * 100)
    return _figures(group, values)


def _figures(group: str, values: dict[tuple[str, str], list[float]]) -> list[Figure]:
    rows = (
        ("rate", "the sender's rate", "million packets/s", ()),
        ("cpu", "CPU of the whole machine", "s/million packets", ()),
        ("more", "the same, more than nothing", "s/million packets", (NOTHING,)),
        ("seen", "packets in the records", "%", (NOTHING, EMPTY)),
    )
    names = dict.fromkeys(name for _, name in values)
    return [
        Figure(group, what, unit, name, values[row, name])
        for row, what, unit, without in rows
        for name in names
        if name not in without
    ]
