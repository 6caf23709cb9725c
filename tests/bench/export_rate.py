# SPDX-License-Identifier: GPL-2.0-or-later
"""3. What a flow costs from its timeout to its datagram: CPU time of the one process that does it all.

Ours: a table full of flows that have all timed out; one sweep finds and ends them, waits the grace period, encodes,
sends without a pace, and marks them exported. What making them cost, in the kernel, is the packet cost's matter.

Peers read a capture in which each packet is a flow, and one with as many packets of one flow: the difference is what
they pay to make, end and send a flow. Both ways to a socket that nobody reads.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowexp.metering.sweep import CLASSES, Timeouts
from flowexp.protocol.encoders import encoder_for
from flowexp.session import CollectorSession
from flowexp.transport.udp import UdpTransport

from . import peers
from .figures import US, Figure
from .kernel import Meter, meter

GROUP = "Export: from a flow's timeout to its record in a datagram, sent over loopback"
ALL_IDLE = Timeouts(dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 10**18), 0)
NONE_DUE = Timeouts(dict.fromkeys(CLASSES, 10**18), dict.fromkeys(CLASSES, 10**18), 10**18)


@contextmanager
def sink() -> Iterator[int]:
    """The port of a UDP socket on loopback that nobody reads."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        yield int(receiver.getsockname()[1])


def measure(*, rounds: int, flows: int, directory: Path) -> list[Figure]:
    """Ours with `flows` flows; softflowd with as many, pmacctd (slow) with a tenth."""
    figures = ours(flows, rounds=rounds)
    with sink() as port:
        for peer, its_flows in ((peers.softflowd_file, flows), (peers.pmacctd_file, flows // 10)):
            many_cpu_s = [peer(directory, port, flows=its_flows, packets=its_flows) for _ in range(rounds)]
            one_cpu_s = [peer(directory, port, flows=1, packets=its_flows) for _ in range(rounds)]
            costs_us = [(m - o) / its_flows * 1e6 for m, o in zip(many_cpu_s, one_cpu_s)]
            figures.append(Figure(GROUP, COST, "us", peer.__name__.split("_")[0], costs_us))
            rates = [1e6 / cost_us for cost_us in costs_us]
            figures.append(Figure(GROUP, RATE, "flows/s", peer.__name__.split("_")[0], rates))
    return figures


COST = "CPU time a flow (peers: making it included)"
RATE = "flows a second and CPU"


def ours(flows: int, *, rounds: int) -> list[Figure]:
    """A table of `flows` flows, ended and sent `rounds` times."""
    with meter(flows) as full, sink() as port:
        spent = [_end_and_send(full, flows, port) for _ in range(rounds)]
    return [
        Figure(GROUP, COST, "us", US, [cpu_s / flows * 1e6 for cpu_s, _ in spent]),
        Figure(GROUP, RATE, "flows/s", US, [flows / cpu_s for cpu_s, _ in spent]),
        Figure(GROUP, f"{flows:,} flows, wall clock", "s", US, [wall_s for _, wall_s in spent]),
    ]


def _end_and_send(full: Meter, flows: int, port: int) -> tuple[float, float]:
    """Seconds of CPU and of wall clock that it took."""
    full.fill(flows)
    transport = UdpTransport("127.0.0.1", port, messages_per_s=0)
    transport.open()
    encoder = encoder_for(
        "ipfix", observation_domain_id=1, max_message_octets=transport.max_message_octets(),
        tcp_control_bits_octets=1, sequence_number=0,
    )  # fmt: skip
    session = CollectorSession(transport, encoder, refresh_ns=10**18)
    cpu_s, wall_s = time.process_time(), time.monotonic()
    records = 0
    for batch in full.process.sweep(ALL_IDLE, time.monotonic_ns()):
        session.send(batch.columns, time.monotonic_ns(), time.time_ns() // 10**9)
        batch.done()
        records += batch.records
    spent = time.process_time() - cpu_s, time.monotonic() - wall_s
    transport.close()
    full.empty()
    if records != flows:
        raise RuntimeError(f"{records} records of {flows} flows")
    return spent


def sweep_ms(full: Meter, *, wake: bool = False) -> float:
    """Wall clock of one sweep in which no flow is due; wake: it looks at every flow all the same."""
    now_ns = time.monotonic_ns()
    for family in full.table.families if wake else ():
        family.wake_all(now_ns)
    began_ns = time.perf_counter_ns()
    for batch in full.process.sweep(NONE_DUE, now_ns):
        batch.done()
    return (time.perf_counter_ns() - began_ns) / 1e6
