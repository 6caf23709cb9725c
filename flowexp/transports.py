# SPDX-License-Identifier: GPL-2.0-or-later
"""Which transport carries Messages to a Collector, as its section of the configuration says."""

from __future__ import annotations

from typing import Callable, Collection

from .config import Collector, Export
from .transport.base import OwnSocket, Transport, warnings_of
from .transport.connection import Tls
from .transport.file import FileTransport
from .transport.spool import Spool
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


def try_transport(collector: Collector, *, in_use: Collection[str]) -> None:
    """FlowexpError for what opening it would find that waiting cannot mend: a file, a folder, a certificate.

    in_use: paths of files and spools that somebody writes to, who will leave them: what is wrong there is known.
    """
    tls, folder = tls_of(collector), collector.spool_path
    if collector.url.transport == "file" and collector.url.path not in in_use:
        file = FileTransport(collector.url.path)
        file.open()
        file.close()
    if tls is not None:
        tls.context()
    if folder and folder not in in_use:
        Spool(folder, size_octets=collector.spool_size * _MIB, complain=warnings_of(__name__)).close()


def tls_of(collector: Collector) -> Tls | None:
    """Its files for TLS; None where the Collector is reached without."""
    if collector.url.transport != "tls":
        return None
    return Tls(collector.ca_file, collector.cert_file, collector.key_file)
