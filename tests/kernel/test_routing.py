# SPDX-License-Identifier: GPL-2.0-or-later
"""Field group `routing`: prefix lengths are those of the routes that `ip route` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lab import needs
from lab.collectors import MessageFile
from lab.flowexp import Exporter
from lab.netns import connect, namespaces, veth
from lab.traffic import send_frames
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from flowexp.protocol.decode import Decoder

pytestmark = pytest.mark.kernel

PREFIX_LENGTHS = {
    4: {"10.1.0.2": 24, "10.1.0.1": 32, "10.9.1.1": 16, "10.9.8.7": 29, "10.20.0.1": 12, "192.0.2.7": 0},
    6: {"fd01::2": 64, "fd01::1": 128, "fd09:1:1::1": 32, "fd09:1:0:5::1": 60, "fd20::1": 16, "2001:db8::7": 0},
}
ROUTES = {4: ("10.9.0.0/16", "10.9.8.0/29", "10.16.0.0/12"), 6: ("fd09:1::/32", "fd09:1::/60", "fd20::/16")}
FROM = {4: "10.1.0.2", 6: "fd01::2"}


def _packet(version: int, destination: str) -> Packet:
    ip = IP(src=FROM[4], dst=destination) if version == 4 else IPv6(src=FROM[6], dst=destination)
    return ip / UDP(sport=1, dport=2)


def test_prefix_lengths_are_those_of_the_longest_matches(tmp_path: Path) -> None:
    needs.need(needs.kernel())
    file = MessageFile(tmp_path / "flows.ipfix")
    with namespaces("host", "router", ipv6=True) as (host, router):
        far, near = veth(host, router)
        connect(far, near, ("10.1.0.2/24", "10.1.0.1/24"), ("fd01::2/64", "fd01::1/64"))
        for version, prefixes in ROUTES.items():
            for prefix in prefixes:
                router.ip(f"-{version}", "route", "add", prefix, "via", FROM[version])
        configuration = {"fields": {"groups": ["routing"]}}
        with Exporter(router, tmp_path, collectors=[file.url], configuration=configuration) as exporter:
            send_frames(
                far,
                [
                    bytes(Ether(src=far.mac, dst=near.mac) / _packet(version, destination))
                    for version, expected in PREFIX_LENGTHS.items()
                    for destination in expected
                ],
            )
            assert exporter.stop() == 0
    for version, expected in PREFIX_LENGTHS.items():
        found = {each[f"destinationIPv{version}Address"]: each for each in _records(file, version)}
        assert {to: each[f"destinationIPv{version}PrefixLength"] for to, each in found.items()} == expected
        lengths = {each[f"sourceIPv{version}PrefixLength"] for each in found.values()}
        assert lengths == {expected[FROM[version]]}
        assert {(each["ingressVRFID"], each["egressVRFID"]) for each in found.values()} == {(0, 0)}


def _records(file: MessageFile, version: int) -> list[dict[str, Any]]:
    decoder = Decoder()
    records = [record for message in file.messages() for record in decoder.decode(message, None).records]
    return [each for each in records if each.get(f"sourceIPv{version}Address") == FROM[version] and
            each["destinationTransportPort"] == 2]  # fmt: skip
