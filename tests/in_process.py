# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet path within this process: frames go in by BPF_PROG_TEST_RUN, Books come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from reference import TAGGED, Books, Count, Flow, Key

from flowexp.kernel import libbpf
from flowexp.kernel.replay import CapturedPacket, Frames
from flowexp.meter import MeteringProcess, new_table

MAX_FLOWS = 20_000


class Feed:
    """The replay program, a packet at a time."""

    def __init__(self, process: MeteringProcess) -> None:
        self._replay = process.replay()

    def feed(self, frame: bytes, *, time_ns: int, wire_octets: int, interface: int = 0) -> None:
        """One Ethernet frame, as far as it was captured."""
        self.feed_all([CapturedPacket(time_ns, frame, wire_octets, interface)])

    def feed_all(self, packets: Iterable[CapturedPacket]) -> None:
        self._replay.feed(Frames.of(packets))


class Meter:
    """One program over a table of its own, which holds up to MAX_FLOWS flows of each family for certain."""

    def __init__(self, program: str) -> None:
        self._process = MeteringProcess(
            new_table(MAX_FLOWS), programs=(program,), max_flows=MAX_FLOWS, unix_offset=lambda: 0
        )
        self._counters = self._process.table.counters()
        self._fd = self._process.programs[program]

    def __del__(self) -> None:
        self._process.close()

    def replay(self) -> Feed:
        """Where frames with the times and lengths of a capture go in; of the program `replay`."""
        return Feed(self._process)

    def hook(self) -> Callable[[bytes], int]:
        """Where frames go in as if the loopback interface had them, and the verdict comes out; of a TC program."""
        context = np.zeros(1, self._process.table.layout.structs["__sk_buff"])
        return libbpf.TestRun(self._fd, context.view(np.uint8)).run

    def xdp_hook(self) -> Callable[[bytes], int]:
        """As `hook`, of an XDP program."""
        context = np.zeros(6, np.uint32)  # struct xdp_md: data, data_end, ...
        run = libbpf.TestRun(self._fd, context.view(np.uint8)).run

        def run_over_all(frame: bytes) -> int:
            context[1] = len(frame)
            return run(frame)

        return run_over_all

    def take(self) -> Books:
        """All since this was asked last; the ledger has to close."""
        flows: dict[Key, Flow] = {}
        for batch in self._process.drain():
            for key, flow in _flows(batch.columns):
                assert key not in flows, f"two records of one flow: {key}"
                flows[key] = flow
            batch.done()
        ledger = self._process.ledger()
        assert ledger.missing() == (0, 0), str(ledger)
        before, self._counters = self._counters, self._process.table.counters()
        added = {
            name: Count(packets - before[name][0], octets - before[name][1])
            for name, (packets, octets) in self._counters.items()
        }
        reasons = {name[len("not_metered_") :]: count for name, count in added.items() if name.startswith("not_")}
        books = Books(flows, {reason: count for reason, count in reasons.items() if count != (0, 0)})
        assert books.seen == added["seen"]
        return books


def _flows(columns: dict[str, np.ndarray]) -> list[tuple[Key, Flow]]:
    names = (
        "protocol", "src_port", "dst_port", "icmp_type_code", "vlan_tagged", "vlan_id", "direction",
        "ingress_ifindex", "egress_ifindex", "packets", "octets", "tcp_flags", "min_length", "max_length", "min_ttl",
        "max_ttl", "start_ns", "end_ns", "fragment_flags", "tos_changes", "tos", "flow_label", "inner_tagged",
        "inner_vlan_id",
    )  # fmt: skip
    rows = zip(*(columns[name].tolist() for name in names))
    octets = [[row.tobytes() for row in columns[name]] for name in ("src_addr", "dst_addr", "src_mac", "dst_mac")]
    found = []
    for row, (src_addr, dst_addr, src_mac, dst_mac) in zip(rows, zip(*octets)):
        tagged, vlan_id, egress, ingress_ifindex, egress_ifindex = row[4:9]
        inner_tagged, inner_vlan_id = row[22:]
        vlan = TAGGED | vlan_id if tagged else 0
        interface = egress_ifindex if egress else ingress_ifindex
        inner = TAGGED | inner_vlan_id if inner_tagged else 0
        key = Key(src_addr, dst_addr, *row[:4], vlan, interface)
        found.append((key, Flow(*row[9:22], inner, src_mac, dst_mac)))
    return found


def differences(expected: Books, got: Books, *, show: int = 5) -> list[str]:
    """What is wrong with `got`, a line each, no more than a few; empty when they are equal."""
    lines = []
    if expected.not_metered != got.not_metered:
        lines.append(f"not metered: expected {expected.not_metered}, got {got.not_metered}")
    lines += [f"missing: {key} {expected.flows[key]}" for key in expected.flows.keys() - got.flows.keys()][:show]
    lines += [f"foreign: {key} {got.flows[key]}" for key in got.flows.keys() - expected.flows.keys()][:show]
    both = expected.flows.keys() & got.flows.keys()
    wrong = [key for key in both if expected.flows[key] != got.flows[key]]
    lines += [f"differs: {key}: expected {expected.flows[key]}, got {got.flows[key]}" for key in wrong][:show]
    return lines
