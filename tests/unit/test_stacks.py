# SPDX-License-Identifier: GPL-2.0-or-later
"""Which interfaces are covered by others beneath them; bonds and VLANs as no test machine needs to have them."""

from __future__ import annotations

from typing import Set

import pytest

from flowexp.kernel.netlink import Interface
from flowexp.kernel.stacks import covered


def device(name: str, ifindex: int, kind: str = "", *, master: int = 0, link: int = 0) -> Interface:
    return Interface(name, ifindex, 1, is_up=True, kind=kind, master=master, link=link)


PRESENT = {each.name: each for each in (
    device("lo", 1),
    device("eth0", 2, master=4), device("eth1", 3, master=4), device("bond0", 4, "bond"),
    device("bond0.5", 5, "vlan", link=4), device("bond0.5.6", 6, "vlan", link=5),
    device("eth2", 7), device("port", 8, "veth", master=9, link=10), device("br0", 9, "bridge"),
    device("guest", 10, "veth", link=8), device("empty", 11, "bridge"), device("far", 12, "veth"),
    device("elsewhere", 13, "vlan"), device("tunnel", 14, "vxlan", link=7),
)}  # fmt: skip


@pytest.mark.parametrize(
    ("metered", "expected"),
    [
        ("eth2", ""),
        ("eth0 bond0", "bond0.5 bond0.5.6"),  # of eth1, bond0 sees what eth0 does not
        ("eth0 eth1", "bond0 bond0.5 bond0.5.6"),
        ("eth0 eth1 bond0 bond0.5.6", "bond0 bond0.5 bond0.5.6"),
        ("bond0.5 bond0.5.6", "bond0.5.6"),
        ("bond0 bond0.5", "bond0.5 bond0.5.6"),
        ("port br0 guest", "br0 guest"),
        ("guest br0", ""),  # the port is older than the guest's end, and not metered
        ("empty far elsewhere", ""),
        ("eth2 tunnel", ""),  # what a tunnel carries is another packet
    ],
)
def test_what_lies_wholly_on_metered_interfaces_is_covered(metered: str, expected: str) -> None:
    found = covered([PRESENT[name] for name in metered.split()], PRESENT.values(), both_ways=True)
    assert names(found) == set(expected.split())


def test_both_ends_of_a_veth_are_needed_where_one_direction_is_metered() -> None:
    ends = [PRESENT["port"], PRESENT["guest"]]
    assert names(covered(ends, PRESENT.values(), both_ways=False)) == {"br0"}


def names(ifindexes: Set[int]) -> Set[str]:
    return {each.name for each in PRESENT.values() if each.ifindex in ifindexes}
