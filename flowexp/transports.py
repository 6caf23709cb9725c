# SPDX-License-Identifier: GPL-2.0-or-later
"""Which transport carries Messages to a Collector, as its section of the configuration says."""

from __future__ import annotations

from typing import Callable

from .config import Collector, Export
from .transport.base import OwnSocket, Transport
from .transport.connection import Tls
from .transport.file import FileTransport
from .transport.stream import QUEUE_OCTETS, StreamTransport
from .transport.udp import MTU_OCTETS, UdpTransport

_MIB = 1 << 20


def transport_for(collector: Collector, export: Export, announce: Callable[[OwnSocket], None]) -> Transport:
    """A transport that has not been opened yet. `announce`: told of each socket before anything is sent from it,
    where no mark tells its packets from others."""
    url = collector.url
    if url.transport == "file":
        return FileTransport(url.path, most_octets=collector.file_size * _MIB, most_s=collector.file_seconds)
    if url.transport == "udp":
        return UdpTransport(
            url.host,
            url.port,
            mtu_octets=export.mtu or MTU_OCTETS,
            source_port=collector.source_port or export.source_port or None,
            mark=export.mark,
            announce=None if export.mark else announce,
            source_address=collector.source_address,
            dscp=collector.dscp,
            device=collector.device,
        )
    return StreamTransport(
        url.host,
        url.port,
        tls=tls_of(collector),
        mark=export.mark,
        announce=None if export.mark else announce,
        spool_folder=collector.spool_path or None,
        spool_octets=collector.spool_size * _MIB if collector.spool_path else QUEUE_OCTETS,
        backlog_octets_per_s=int(collector.backlog_rate * _MIB),
    )


def tls_of(collector: Collector) -> Tls | None:
    """Its files for TLS; None where the Collector is reached without."""
    if collector.url.transport != "tls":
        return None
    return Tls(collector.ca_file, collector.cert_file, collector.key_file)
