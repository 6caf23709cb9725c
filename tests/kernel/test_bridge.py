# SPDX-License-Identifier: GPL-2.0-or-later
"""A bridge, its ports and a route out of it, all metered: each packet is counted once, if the operator says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from lab import needs
from lab.collectors import MessageFile
from lab.flowexp import Exporter
from lab.netns import Link, Namespace, bring_up, namespaces
from lab.traffic import send_frames
from lab.wait import wait_for
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from storm import records

pytestmark = pytest.mark.kernel

BRIDGED, TO_THE_BRIDGE, ROUTED, OWN = range(1, 5)  # source ports
TIMES = 7


class Lab(NamedTuple):
    """Two hosts on a bridge, a third one behind its router; each host's end, and the router's."""

    router: Namespace
    left: Link
    right: Link
    away: Link
    bridge: Link

    def send_all(self) -> None:
        """Each way a packet can take, TIMES packets."""
        for port, mac, to in (
            (BRIDGED, self.right.mac, "10.0.0.2"),
            (TO_THE_BRIDGE, self.bridge.mac, "10.0.0.254"),
            (ROUTED, self.bridge.mac, "10.1.0.1"),
        ):
            frame = Ether(src=self.left.mac, dst=mac) / IP(src="10.0.0.1", dst=to) / UDP(sport=port, dport=9)
            send_frames(self.left, [bytes(frame)] * TIMES)
        with self.router.socket() as sender:
            sender.bind(("", OWN))
            for _ in range(TIMES):
                sender.sendto(b"", ("10.0.0.1", 9))


@pytest.fixture
def lab() -> Iterator[Lab]:
    needs.need(needs.kernel(), needs.bridge())
    with namespaces("router", "left", "right", "away") as (router, *hosts):
        router.ip("link", "add", "br0", "type", "bridge")
        bridge, ends = Link(router, "br0"), []
        for number, host in enumerate(hosts, 1):
            router.ip("link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            if host is not hosts[-1]:
                router.ip("link", "set", f"port{number}", "master", "br0")
            ends.append(bring_up(Link(host, "eth0"), Link(router, f"port{number}"))[0])
        bridge.set("up")
        wait_for("the bridge to be able to send", bridge.can_send)
        left, right, away = ends
        bridge.add_address("10.0.0.254/24")
        bridge.add_neighbour("10.0.0.1", left.mac)
        Link(router, "port3").add_address("10.1.0.254/24")
        Link(router, "port3").add_neighbour("10.1.0.1", away.mac)
        router.sysctl("net.ipv4.ip_forward", 1)
        yield Lab(router, left, right, away, bridge)


ONCE = {BRIDGED: 1, TO_THE_BRIDGE: 1, ROUTED: 1, OWN: 1}


@pytest.mark.parametrize(
    ("interfaces", "skip_stacked", "expected"),
    [
        ("br0 port*", False, {BRIDGED: 1, TO_THE_BRIDGE: 2, ROUTED: 2, OWN: 2}),
        ("br0 port*", True, ONCE),
        ("port*", False, ONCE),  # though the kernel says of what is routed that it came in at br0
    ],
)
def test_a_packet_is_counted_at_every_layer_or_once(
    lab: Lab, tmp_path: Path, interfaces: str, skip_stacked: bool, expected: dict[int, int]
) -> None:
    file, configuration = MessageFile(tmp_path / "flows.ipfix"), {"skip_stacked": skip_stacked}
    with Exporter(lab.router, tmp_path, interfaces=interfaces.split(), collectors=[file.url],
                  configuration=configuration) as exporter:  # fmt: skip
        lab.send_all()
        assert exporter.stop() == 0
    assert exporter.ledger().closes
    assert ("br0 lies on metered interfaces" in exporter.log) == skip_stacked
    rows = records(file.messages())
    packets = np.bincount(rows["port"], rows["packets"], minlength=5)
    assert {port: packets[port] / TIMES for port in expected} == expected
