# SPDX-License-Identifier: GPL-2.0-or-later
"""Field group `timing`: how long forwarded packets take from the ingress hook to the egress hook."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from lab import needs
from lab.collectors import MessageFile
from lab.flowexp import Exporter
from lab.netns import Link, Namespace, connect, namespaces, veth
from lab.traffic import send_frames
from lab.wait import wait_for
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from flowexp.kernel import libbpf
from flowexp.kernel.features import has_hardware_times
from flowexp.meter import MeteringProcess, new_table
from flowexp.protocol.decode import Decoder

pytestmark = pytest.mark.kernel

HOST = {4: "10.1.0.2", 6: "fd01::2"}
ROUTER = {4: "10.1.0.1", 6: "fd01::1"}
BEYOND = {4: "10.2.0.2", 6: "fd02::2"}
UNKNOWN = "10.2.0.77"
FORWARDED, LOCAL, HELD = 1001, 1002, 1003
PACKETS = 10
HELD_S = 0.3


class Lab(NamedTuple):
    router: Namespace
    host: Link
    near: Link
    beyond: Link

    def send(self, version: int, port: int, to: str, packets: int = 1) -> None:
        ip = IP(src=HOST[4], dst=to) if version == 4 else IPv6(src=HOST[6], dst=to)
        frame = bytes(Ether(src=self.host.mac, dst=self.near.mac) / ip / UDP(sport=port, dport=9))
        send_frames(self.host, [frame] * packets)


@pytest.fixture
def lab() -> Iterator[Lab]:
    needs.need(needs.kernel())
    with namespaces("host", "router", "beyond", ipv6=True) as (host, router, beyond):
        far, near = veth(host, router)
        out, there = veth(router, beyond, names=("eth1", "eth0"))
        connect(far, near, ("10.1.0.2/24", "10.1.0.1/24"), ("fd01::2/64", "fd01::1/64"))
        connect(out, there, ("10.2.0.1/24", "10.2.0.2/24"), ("fd02::1/64", "fd02::2/64"))
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            router.sysctl(key, 1)
        yield Lab(router, far, near, there)


def times(file: MessageFile, *, direction: int = 0) -> dict[tuple[int, int], tuple[int, int]]:
    """Mean and maximum of each flow that was metered in this direction, by IP version and source port."""
    decoder = Decoder()
    records: list[dict[str, Any]] = [
        each for message in file.messages() for each in decoder.decode(message, None).records
    ]
    names = ("meanForwardingTimeNanoseconds", "maximumForwardingTimeNanoseconds")
    return {
        (each["ipVersion"], each["sourceTransportPort"]): (each[names[0]], each[names[1]])
        for each in records
        if each["flowDirection"] == direction
    }


@pytest.mark.parametrize("direction", ["once", "both", "ingress"])
def test_the_time_from_hook_to_hook_is_that_of_forwarded_packets(lab: Lab, direction: str, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"fields": {"groups": ["timing"]}, "direction": direction}
    with Exporter(
        lab.router, tmp_path, interfaces=("eth0", "eth1"), collectors=[file.url], configuration=configuration
    ) as exporter:
        began_ns = time.monotonic_ns()
        for version in (4, 6):
            lab.send(version, FORWARDED, BEYOND[version], PACKETS)
            lab.send(version, LOCAL, ROUTER[version], PACKETS)
        wait_for("all to be forwarded", lambda: lab.beyond.counters()["rx_packets"] >= 2 * PACKETS)
        took_ns = time.monotonic_ns() - began_ns
        assert exporter.stop() == 0, exporter.log
        assert exporter.ledger().closes
    found = times(file)
    for version in (4, 6):
        mean, longest = found[version, FORWARDED]
        # Where only ingress is metered no program is at egress.
        assert (0 < mean <= longest < took_ns) == (direction != "ingress"), (mean, longest)
        assert found[version, LOCAL] == (0, 0)
    at_egress = times(file, direction=1)
    assert set(at_egress.values()) <= {(0, 0)}
    assert ((4, FORWARDED) in at_egress) == (direction == "both")


def test_a_packet_that_waits_for_its_neighbours_address_takes_as_long(lab: Lab, tmp_path: Path) -> None:
    file = MessageFile(tmp_path / "flows.ipfix")
    with Exporter(
        lab.router, tmp_path, interfaces=("eth0", "eth1"), collectors=[file.url],
        configuration={"fields": {"groups": ["timing"]}},
    ) as exporter:  # fmt: skip
        sent_ns = time.monotonic_ns()
        before = lab.near.counters()["rx_packets"]
        lab.send(4, HELD, UNKNOWN)
        wait_for("the packet to come in", lambda: lab.near.counters()["rx_packets"] > before)
        waits_ns = time.monotonic_ns()
        time.sleep(HELD_S)
        known_ns = time.monotonic_ns()
        forwarded = lab.beyond.counters()["rx_packets"]
        lab.router.ip("neighbour", "replace", UNKNOWN, "lladdr", lab.beyond.mac, "dev", "eth1")
        wait_for("the packet to be forwarded", lambda: lab.beyond.counters()["rx_packets"] > forwarded)
        gone_ns = time.monotonic_ns()
        assert exporter.stop() == 0, exporter.log
    mean, longest = times(file)[4, HELD]
    assert mean == longest
    assert known_ns - waits_ns < longest < gone_ns - sent_ns


# Hardware time stamps


FIRST_NS, SECOND_NS, LAST_NS = 1_000, 1_700_000_000_000_000_000, 1 << 63  # by whatever clock the device has


@pytest.mark.parametrize("program", ["ingress_ethernet", "egress_ethernet"])
@pytest.mark.parametrize("version", [4, 6])
def test_the_devices_own_times_are_those_of_the_first_and_the_last_packet_that_has_one(
    program: str, version: int
) -> None:
    """No device here stamps: the kernel is told what one would have said."""
    needs.need(needs.bpf())
    if not has_hardware_times():
        needs.need("programs see no hardware time stamps in this kernel")
    process = MeteringProcess(new_table(64, groups=["timing"]), programs=(program,), max_flows=64)
    context = np.zeros(1, process.table.layout.structs["__sk_buff"])
    run = libbpf.TestRun(process.programs[program], context.view(np.uint8)).run
    ip = IP() if version == 4 else IPv6()
    for port, stamps_ns in ((1, (0, FIRST_NS, SECOND_NS, 0, LAST_NS, 0)), (2, (0, 0)), (3, (SECOND_NS,))):
        for stamp_ns in stamps_ns:
            context["hwtstamp"] = stamp_ns
            run(bytes(Ether() / ip / UDP(sport=port, dport=9)))
    names = ("src_port", "timing_first_received_ns", "timing_last_received_ns")
    found = {}
    for batch in process.drain():
        found.update({port: stamps for port, *stamps in zip(*(batch.columns[name].tolist() for name in names))})
        batch.done()
    process.close()
    assert found == {1: [FIRST_NS, LAST_NS], 2: [0, 0], 3: [SECOND_NS, SECOND_NS]}
