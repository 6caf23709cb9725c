# SPDX-License-Identifier: GPL-2.0-or-later
"""A flow table in this process, fed frame by frame through the replay program, on a clock that is the test's."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from flowexp.kernel.family import Family
from flowexp.kernel.layout import Array
from flowexp.kernel.replay import CapturedPacket, Frames
from flowexp.kernel.table import FlowTable
from flowexp.meter import Batch, MeteringProcess, new_table
from flowexp.metering.sweep import CLASSES, Timeouts

SECOND_NS = 10**9
NEVER_NS = 10**18
HEADERS = {4: 28, 6: 48}
FAMILIES = (4, 6)
PORTS = 50_000


def live(family: Family) -> Array:
    """The slots whose flow packets find."""
    slots = family.occupied()
    return slots[family.is_live(family.hot(slots)["ctl"])]


def frame(version: int, number: int) -> bytes:
    """The Ethernet frame of flow `number`: all that tells flows apart is in the source address and port."""
    udp = struct.pack(">HHHH", number % PORTS + 1, 9, 8, 0)
    host = struct.pack(">I", number // PORTS)
    if version == 4:
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, HEADERS[4], 0, 0, 64, 17, 0, host, bytes(4))
        return bytes(12) + b"\x08\x00" + ip + udp + bytes(18)
    ip = struct.pack(">IHBB16s16s", 6 << 28, 8, 17, 64, host + bytes(12), bytes(16))
    return bytes(12) + b"\x86\xdd" + ip + udp


class Meter:
    """A table with the replay program over it, on a clock that is the test's."""

    def __init__(self, max_flows: int, table: FlowTable | None = None) -> None:
        self.table = table or new_table(max_flows)
        self.process = MeteringProcess(self.table, programs=("replay",), max_flows=max_flows, unix_offset=lambda: 0)
        self._feed = self.process.replay().feed

    def family(self, version: int) -> Family:
        return self.table.families[FAMILIES.index(version)]

    def feed(self, version: int, numbers: Iterable[int], *, time_ns: int = SECOND_NS) -> None:
        """One packet of each of these flows."""
        octets = 14 + HEADERS[version]
        self._feed(Frames.of(CapturedPacket(time_ns, frame(version, number), octets, 0) for number in numbers))

    def count(self, name: str) -> int:
        """Packets of a counter."""
        return self.table.counters()[name][0]

    def close(self) -> None:
        self.process.close()


class Ended(NamedTuple):
    """What records say of one flow."""

    port: int
    packets: int
    octets: int
    reason: int


def take(batches: Iterable[Batch]) -> list[Ended]:
    """Every record of these batches, which are done with as they come."""
    found = []
    for batch in batches:
        columns = (batch.columns[name].tolist() for name in ("src_port", "packets", "octets", "end_reason"))
        found.extend(map(Ended._make, zip(*columns)))
        batch.done()
    return found


def timeouts(*, idle_ns: int = NEVER_NS, active_ns: int = NEVER_NS) -> Timeouts:
    return Timeouts(dict.fromkeys(CLASSES, idle_ns), dict.fromkeys(CLASSES, active_ns), NEVER_NS)
