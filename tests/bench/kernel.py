# SPDX-License-Identifier: GPL-2.0-or-later
"""Our packet path and the floor, compiled for the benchmark, and timed by the kernel itself (BPF_PROG_TEST_RUN)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from flowexp.kernel import libbpf
from flowexp.kernel.layout import Layout
from flowexp.kernel.loader import Prebuilt, Programs
from flowexp.kernel.table import FlowTable
from flowexp.meter import MeteringProcess, new_table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "bench"
PROGRAMS = ("ingress_ethernet", "egress_ethernet", "xdp_ethernet", "varied")


def _frame(*layers: Packet) -> bytes:
    frame: Packet = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")
    for layer in (*layers, Raw(bytes(40))):
        frame /= layer
    return bytes(frame)


_V4, _V6 = IP(src="10.0.0.0", dst="198.18.0.1"), IPv6(src="fd01::1", dst="fd02::1")
_TCP, _UDP = TCP(sport=40000, dport=443, flags="A"), UDP(sport=40000, dport=53)
FRAMES = {
    "IPv4 TCP": _frame(_V4, _TCP),
    "IPv4 UDP": _frame(_V4, _UDP),
    "IPv6 TCP": _frame(_V6, _TCP),
    "IPv6, an extension header": _frame(_V6, IPv6ExtHdrDestOpt(), _UDP),
    "VLAN, IPv4 TCP": _frame(Dot1Q(vlan=5), _V4, _TCP),
}
VARIED = FRAMES["IPv4 TCP"]


def compiled(name: str) -> Path:
    """The object of bpf/`name`.bpf.c, made with the Makefile's own flags if it is older than what it is made of."""
    source, target = HERE / "bpf" / f"{name}.bpf.c", BUILD / f"{name}.bpf.o"
    inputs = [*(HERE / "bpf").iterdir(), *(ROOT / "bpf").iterdir()]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        BUILD.mkdir(parents=True, exist_ok=True)
        include = f"-I/usr/include/{_multiarch()}"
        flags = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", include]
        subprocess.run(["clang", *flags, "-c", source, "-o", target], check=True)
    return target


def _multiarch() -> str:
    return subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()


class Runs:
    """Runs of one program on a frame as it is. Their context is all 0 but for what an XDP frame needs."""

    def __init__(self, program: int, layout: Layout, *, xdp: bool) -> None:
        self._xdp = np.zeros(6, np.uint32) if xdp else None  # struct xdp_md: data, data_end, ...
        context = np.zeros(1, layout.structs["__sk_buff"]) if self._xdp is None else self._xdp
        self._run = libbpf.TestRun(program, context.view(np.uint8))

    def timed(self, frame: bytes, packets: int) -> float:
        """Nanoseconds a packet, after a few to warm up."""
        if self._xdp is not None:
            self._xdp[1] = len(frame)
        self._run.run(frame, 100)
        self._run.run(frame, packets)
        return float(self._run.duration_ns)


class Varied:
    """Runs of a program whose frame is of another flow each time (bpf/vary.h)."""

    def __init__(self, program: int, layout: Layout) -> None:
        context = np.zeros(1, layout.structs["__sk_buff"])
        self._cb = context["cb"][0]
        self._run = libbpf.TestRun(program, context.view(np.uint8))

    def random(self, flows: int, packets: int) -> float:
        """Nanoseconds a packet, each of one of `flows` flows."""
        return self._timed(flows, 0, packets)

    def sequence(self, first: int, flows: int) -> float:
        """Nanoseconds a packet, the first of as many flows."""
        return self._timed(0, first, flows)

    def _timed(self, flows: int, first: int, packets: int) -> float:
        self._cb[0], self._cb[1] = flows, first
        self._run.run(VARIED, packets)
        return float(self._run.duration_ns)


class Meter:
    """A table for `max_flows`, a new one with these field groups or `table`, and our programs over it.

    own_sockets: own packets are to be known by the sockets that the table names.
    """

    def __init__(
        self,
        max_flows: int,
        table: FlowTable | None = None,
        *,
        groups: Iterable[str] = (),
        own_sockets: bool = False,
    ) -> None:
        loader = Prebuilt(compiled("varied"))
        self.table = table or new_table(max_flows, loader, groups, begin_small=True)
        self.process = MeteringProcess(
            self.table, programs=PROGRAMS, max_flows=max_flows, loader=loader, own_sockets=own_sockets
        )
        self.layout = self.table.layout
        self.varied = Varied(self.process.programs["varied"], self.layout)

    def runs(self, program: str) -> Runs:
        return Runs(self.process.programs[program], self.layout, xdp=program.startswith("xdp"))

    def fill(self, flows: int, *, first: int = 0) -> None:
        """Makes flows, one packet each; the table grows for them, as it does between an exporter's sweeps."""
        self.varied.sequence(first, flows)
        self.process.fit(time.monotonic_ns())

    def empty(self) -> None:
        """Ends all flows, sends nothing, and frees their slots."""
        for _ in range(2):  # the second sweep frees what the first has retired
            for batch in self.process.drain():
                batch.done()

    def close(self) -> None:
        self.process.close()


@contextmanager
def meter(
    max_flows: int, table: FlowTable | None = None, *, groups: Iterable[str] = (), own_sockets: bool = False
) -> Iterator[Meter]:
    """A Meter, closed at the end."""
    made = Meter(max_flows, table, groups=groups, own_sockets=own_sockets)
    try:
        yield made
    finally:
        made.close()


class Floor:
    """The floor's and the empty programs, with maps of their own."""

    names = ("empty_tc", "empty_xdp", "empty_varied", "floor_tc", "floor_xdp", "floor_varied")

    def __init__(self) -> None:
        self.layout = Prebuilt(compiled("varied")).layout()
        settings = np.empty(0, np.uint8)
        self.programs = Programs(Prebuilt(compiled("floor")), names=self.names, maps={}, settings=settings)

    def runs(self, name: str) -> Runs:
        return Runs(self.programs[name], self.layout, xdp=name.endswith("xdp"))

    def varied(self, name: str) -> Varied:
        return Varied(self.programs[name], self.layout)

    def close(self) -> None:
        self.programs.close()


@contextmanager
def floor() -> Iterator[Floor]:
    """A Floor, with empty maps; closed at the end."""
    made = Floor()
    try:
        yield made
    finally:
        made.close()
