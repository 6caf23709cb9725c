# SPDX-License-Identifier: GPL-2.0-or-later
"""What the checks in another kernel meter with."""

from __future__ import annotations

import socket
import struct

from lab.netns import Link
from lab.wait import wait_for

from flowexp.kernel.attach import Attacher
from flowexp.kernel.flows import Columns
from flowexp.kernel.pins import PinFolder
from flowexp.kernel.table import FlowTable
from flowexp.meter import MeteringProcess, new_table

MAX_FLOWS = 1024
PACKET_OCTETS = 28


class Missing(Exception):
    """This kernel has no such thing; the text is what there is instead."""


class Meter:
    """Programs over a table; what it has counted since it was asked last."""

    def __init__(self, programs: tuple[str, ...], table: FlowTable | None = None) -> None:
        self.process = MeteringProcess(
            table or new_table(MAX_FLOWS), programs=programs, max_flows=MAX_FLOWS, egress_once=True
        )

    def attacher(self, *, hook: str = "tc", direction: str = "once", pins: PinFolder | None = None) -> Attacher:
        return Attacher(
            self.process.programs, self.process.ingress_map, handle=1, direction=direction, hook=hook, xdp_force=False,
            pins=pins, persist=pins is not None,
        )  # fmt: skip

    def in_table(self) -> tuple[int, int]:
        return self.process.ledger().in_table

    def drain(self) -> list[Columns]:
        """Ends all flows, each family's by itself; the ledger closes."""
        found = []
        for batch in self.process.drain():
            found.append(batch.columns)
            batch.done()
        ledger = self.process.ledger()
        assert ledger.missing() == (0, 0), str(ledger)
        assert ledger.in_table == (0, 0), str(ledger)
        return found

    def take(self) -> list[tuple[int, ...]]:
        """Ends all flows: protocol, ports, packets, octets and so on of each, sorted."""
        names = ("protocol", "src_port", "dst_port", "icmp_type_code", "vlan_id", "packets", "octets", "tcp_flags",
                 "min_length", "max_length", "end_reason")  # fmt: skip
        return sorted(row for columns in self.drain() for row in zip(*(columns[name].tolist() for name in names)))

    def expect(self, packets: int) -> None:
        """So many packets of the smallest kind are in the table, and leave it."""
        wait_for(f"{packets} packets", lambda: self.in_table()[0] >= packets, timeout_s=60)
        assert self.in_table() == (packets, packets * PACKET_OCTETS), str(self.process.ledger())
        self.take()


def frame(sender: Link, to: Link, destination: str = "10.1.0.9") -> bytes:
    """A UDP datagram without payload."""
    ethernet = bytes.fromhex(to.mac.replace(":", "") + sender.mac.replace(":", "")) + b"\x08\x00"
    addresses = socket.inet_aton("10.1.0.1") + socket.inet_aton(destination)
    header = struct.pack("!BBHIBBH", 0x45, 0, PACKET_OCTETS, 0, 64, 17, 0) + addresses
    checksum = ~sum(struct.unpack("!10H", header)) % 0xFFFF  # without which nobody forwards it
    header = header[:10] + struct.pack("!H", checksum) + header[12:]
    return ethernet + header + bytes(6) + b"\0\x08"
