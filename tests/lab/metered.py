# SPDX-License-Identifier: GPL-2.0-or-later
"""A sender, and the machine that meters what it sends: what a test of the whole exporter begins with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from .netns import Link, Namespace, namespaces, veth


class Lab(NamedTuple):
    """`directory` is for the exporter's files, and the Collectors'."""

    sender: Link
    meter: Namespace
    directory: Path


@contextmanager
def metered(directory: Path) -> Iterator[Lab]:
    with namespaces("sender", "meter") as (sender, meter):
        left, _ = veth(sender, meter)
        yield Lab(left, meter, directory)


def packet(port: int) -> bytes:
    """A frame of the flow that `port` tells apart."""
    return bytes(Ether(dst="ff:ff:ff:ff:ff:ff") / IP(src="10.1.0.1", dst="10.9.0.9") / UDP(sport=port, dport=9))
