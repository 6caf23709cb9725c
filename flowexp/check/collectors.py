# SPDX-License-Identifier: GPL-2.0-or-later
"""The way to each Collector, and whether there can be a spool."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Iterator

from ..config import Collector, Config
from ..member import select_of
from ..transport.connection import Connection, Trouble
from ..transport.file import FileTransport
from ..transport.udp import MTU_OCTETS, UdpTransport
from ..transports import tls_of
from .finding import FAILED, OK, Finding


def of_collector(collector: Collector, config: Config) -> Iterator[Finding]:
    """Opens the way to a Collector without sending anything: UDP cannot tell more than name and route."""
    select_of(collector.filter)
    url = collector.url
    if url.transport in ("tcp", "tls"):
        yield from _stream(collector)
        return
    if url.transport == "file":
        transport = FileTransport(url.path)
        transport.open()
        transport.close()
        yield Finding(OK, str(url), "can be written")
        return
    udp = UdpTransport(
        url.host,
        url.port,
        mtu_octets=config.export.mtu or MTU_OCTETS,
        source_port=0,
        source_address=collector.source_address,
        device=collector.device,
    )
    udp.open()
    state, octets = udp.status()["state"], udp.max_message_octets()
    udp.close()
    if state == "up":
        yield Finding(OK, str(url), f"there is a route; Messages of up to {octets} octets")
    else:
        yield Finding(FAILED, str(url), f"{state}; see to its name and the route to it")


def _stream(collector: Collector) -> Iterator[Finding]:
    """Connects, and does the TLS handshake; looks whether there can be a spool."""
    url, tls = collector.url, tls_of(collector)
    try:
        connection = Connection(url.host, url.port, tls=None if tls is None else tls.context())
        with closing(connection):
            yield Finding(OK, str(url), connection.describe())
    except Trouble as trouble:
        yield Finding(FAILED, str(url), str(trouble))
    if collector.spool_path:
        folder = Path(collector.spool_path)
        place = next(each for each in (folder, *folder.parents) if each.exists())
        if place.is_dir() and os.access(place, os.W_OK):
            yield Finding(OK, str(folder), f"room for a spool of {collector.spool_size} MiB at most")
        else:
            yield Finding(FAILED, str(folder), f"cannot be the spool: {place} cannot be written")
