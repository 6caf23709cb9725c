# SPDX-License-Identifier: GPL-2.0-or-later
"""In which VRF an interface is, by what the kernel answers of links; tests/kernels/devices.py has real ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest

from flowexp.facts import interface_facts
from flowexp.kernel import vrfs
from flowexp.kernel.inquiry import Inquiry
from flowexp.kernel.netlink import Interface, LinkWatch
from flowexp.kernel.vrfs import Vrfs
from flowexp.protocol.options import InterfaceFacts

ETH0, BR0, ETH1, RED, BLUE, ETH2 = range(1, 7)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def link(about: bytes = b"", *, master: int = 0) -> bytes:
    """An ifinfomsg and IFLA_IFNAME, IFLA_MASTER, IFLA_LINKINFO."""
    return bytes(16) + attribute(3, b"a\0") + (number(10, master) if master else b"") + attribute(18, about)


def vrf(table: int) -> bytes:
    return link(attribute(1, b"vrf\0") + attribute(2, number(1, table)))


def port(kind: bytes, data: bytes, *, master: int) -> bytes:
    """Of a bridge, of a VRF."""
    return link(attribute(1, b"veth\0") + attribute(4, kind + b"\0") + attribute(5, data), master=master)


class Kernel:
    """What it answers of each link, how often it was asked, and whether it has told of a change."""

    def __init__(self) -> None:
        self.links = {
            ETH0: port(b"vrf", number(1, 10), master=RED),
            BR0: port(b"vrf", number(1, 20), master=BLUE),
            ETH1: port(b"bridge", bytes(8), master=BR0),
            RED: vrf(10),
            BLUE: vrf(20),
            ETH2: link(attribute(1, b"veth\0")),
        }
        self.asked = 0
        self.has_told = False

    def ask(self, _: Inquiry, kind: int, bodies: Sequence[bytes]) -> list[bytes | None]:
        assert kind == 18  # RTM_GETLINK
        self.asked += len(bodies)
        return [self.links.get(struct.unpack_from("=i", body, 4)[0]) for body in bodies]

    def changed(self, _: LinkWatch) -> bool:
        told, self.has_told = self.has_told, False
        return told


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(Inquiry, "ask", lambda *words: made.ask(*words))
    monkeypatch.setattr(LinkWatch, "changed", lambda watch: made.changed(watch))
    return made


def of(found: Vrfs, *ifindexes: int) -> list[tuple[int, int]]:
    devices, tables = found.of(np.array(ifindexes, np.uint32))
    assert (devices.dtype, tables.dtype) == (np.uint32, np.uint32)
    return list(zip(devices.tolist(), tables.tolist()))


def test_an_interface_is_in_the_vrf_that_it_or_its_bridge_is_a_port_of(kernel: Kernel) -> None:
    found = Vrfs()
    assert of(found, ETH1, ETH0, ETH2, 0, ETH0) == [(BLUE, 20), (RED, 10), (0, 0), (0, 0), (RED, 10)]
    assert of(found, RED, BR0) == [(RED, 10), (BLUE, 20)]
    assert of(found) == []


def test_the_kernel_is_asked_again_once_a_link_has_changed(kernel: Kernel) -> None:
    found = Vrfs()
    assert of(found, ETH0) == of(found, ETH0) == [(RED, 10)]
    assert kernel.asked == 1
    kernel.links[ETH0], kernel.has_told = port(b"vrf", number(1, 20), master=BLUE), True
    assert of(found, ETH0) == [(BLUE, 20)]
    kernel.links[ETH0], kernel.has_told = link(), True
    assert of(found, ETH0) == [(0, 0)]


def test_of_an_interface_that_has_gone_the_last_is_kept(kernel: Kernel) -> None:
    found = Vrfs()
    assert of(found, ETH0, 99) == [(RED, 10), (0, 0)]
    del kernel.links[ETH0]
    for _ in range(2):
        kernel.has_told = True
        assert of(found, ETH0) == [(RED, 10)]


def test_so_many_are_remembered_and_no_more(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vrfs, "_MOST_REMEMBERED", 3)
    found = Vrfs()
    assert of(found, *range(7)) == [(0, 0), (RED, 10), (BLUE, 20), (BLUE, 20), (RED, 10), (BLUE, 20), (0, 0)]


def test_options_records_tell_the_same_vrf_as_flows() -> None:
    made = [
        Interface("eth0", ETH0, 1, True, "veth", master=RED),
        Interface("br0", BR0, 1, True, "bridge", master=BLUE),
        Interface("eth1", ETH1, 1, True, "veth", master=BR0),
        Interface("red", RED, 1, True, "vrf", vrf_table=10),
        Interface("blue", BLUE, 1, True, "vrf", vrf_table=20),
        Interface("eth2", ETH2, 1, True, "veth"),
    ]
    assert [(each.vrf, each.vrf_table) for each in interface_facts(made)] == [
        ("red", 10), ("blue", 20), ("blue", 20), ("red", 10), ("blue", 20), ("", 0),
    ]  # fmt: skip
    assert interface_facts([made[0]]) == (InterfaceFacts(ETH0, "eth0"),)
