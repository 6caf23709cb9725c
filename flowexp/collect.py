# SPDX-License-Identifier: GPL-2.0-or-later
"""The built-in Collector: datagrams in, records out as they come, a summary at the end.

The rule: whatever arrives, it goes on. What it cannot decode it says on standard error, at most once a minute
for a sender; memory is bounded by the decoder's limits and the log's, whoever sends what.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Callable

from flowexp.collector_url import parse_collector_url
from flowexp.errors import FlowexpError, UsageError
from flowexp.protocol.decode import Decoder
from flowexp.protocol.record import Record
from flowexp.protocol.session import Decoded
from flowexp.transport.base import QuietLog
from flowexp.view import FORMATS

RECEIVE_BUFFER_OCTETS = 32 * 1024 * 1024
"""Asked for; without CAP_NET_ADMIN the kernel gives at most net.core.rmem_max."""
MAX_DATAGRAM_OCTETS = 65_535
MAX_LAST_DATAGRAMS = 1 << 17
"""Still read after a stop, more than the buffer holds: so that an end comes under a flood, too."""
SO_RCVBUFFORCE = 33
SO_RXQ_OVFL = 40
"""With each datagram comes how many were dropped so far because the receive buffer was full."""
_DROPPED = struct.Struct("=I")


@dataclass
class Summary:
    """What came. str() of it is the line printed at the end."""

    messages: int = 0
    """Of IPFIX, or packets of NetFlow v9; whatever else came counts, too."""
    records: int = 0
    """Data Records, those of Options left out."""
    lost_records: int = 0
    """Missing by IPFIX Sequence Numbers, less those that came late."""
    lost_packets: int = 0
    """The same for NetFlow v9, which counts packets."""
    problems: int = 0
    """What could not be decoded: Sets, Templates, whole datagrams."""
    dropped: int = 0
    """Datagrams that this host threw away because the receive buffer was full."""

    def add(self, decoded: Decoded) -> None:
        """Count one datagram."""
        self.messages += 1
        self.records += len(decoded.records)
        self.lost_records += decoded.lost_records
        self.lost_packets += decoded.lost_packets
        self.problems += len(decoded.problems) + decoded.problems_left_out

    def __str__(self) -> str:
        return (
            f"{self.messages} Messages with {self.records} Data Records; by Sequence Number {self.lost_records} "
            f"records and {self.lost_packets} NetFlow v9 packets are missing; {self.problems} undecodable; "
            f"{self.dropped} datagrams did not fit the receive buffer"
        )


class Collector:
    """Receives on sockets until told to stop.

    - stop: a file descriptor; once it is readable, `records` ends.
    - out: flushed whenever nothing more has arrived, so that a pipe's reader sees each record at once.
    - complain: takes each line about what cannot be decoded.
    """

    def __init__(self, sockets: Sequence[socket.socket], *, stop: int, out: IO[str], complain: QuietLog) -> None:
        self.summary = Summary()
        self._sockets = {sock.fileno(): sock for sock in sockets}
        self._stop = stop
        self._out = out
        self._complain = complain
        self._decoder = Decoder()
        self._dropped = dict.fromkeys(self._sockets, 0)

    def records(self) -> Iterator[Record]:
        """Data Records in the order in which they came, those included that are here when the stop comes."""
        poll = select.poll()
        for fd in (*self._sockets, self._stop):
            poll.register(fd, select.POLLIN)
        last_datagrams = MAX_LAST_DATAGRAMS
        while last_datagrams:
            ready = {fd for fd, _ in poll.poll(0)}
            if not ready:
                self._out.flush()
                ready = {fd for fd, _ in poll.poll()}
            if self._stop in ready:
                last_datagrams -= 1
                if len(ready) == 1:
                    return
            for fd in ready - {self._stop}:
                yield from self._receive(fd)

    def _receive(self, fd: int) -> list[Record]:
        try:
            datagram, ancillary, _, sender = self._sockets[fd].recvmsg(MAX_DATAGRAM_OCTETS, 64)
        except OSError:  # a bad checksum found late, an ICMP error: no datagram
            return []
        self._count_dropped(fd, ancillary)
        decoded = self._decoder.decode(datagram, (fd, sender))
        self.summary.add(decoded)
        host, port = sender[:2]
        if decoded.problems:
            more = len(decoded.problems) - 1 + decoded.problems_left_out
            others = f" (and {more} more in this Message)" if more else ""
            self._complain(host, f"{host} port {port}: {decoded.problems[0]}{others}")
        return decoded.records

    def _count_dropped(self, fd: int, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, SO_RXQ_OVFL):
                (self._dropped[fd],) = _DROPPED.unpack_from(content)
        self.summary.dropped = sum(self._dropped.values())


def collect(
    listen_url: str,
    form: str,
    out: IO[str],
    *,
    chosen: Callable[[Record], bool] | None = None,
    errors: IO[str] | None = None,
    stop: int | None = None,
) -> Summary:
    """Print what Exporters send to `listen_url` (udp://host:port) until SIGINT, SIGTERM or `stop` is readable.

    - form: one of view.FORMATS.
    - chosen: which records are printed, None: all; the summary is of all.
    - errors: for complaints and the summary; None: standard error.
    - stop: a file descriptor instead of the signals, which only the main thread can have.

    Raises UsageError for a URL that is none, FlowexpError where the port cannot be had. That nobody reads `out`
    any more (`| head`) is an end like the others.
    """
    errors = errors or sys.stderr
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in _listen(listen_url)]
        collector = Collector(
            sockets,
            stop=stack.enter_context(_signals()) if stop is None else stop,
            out=out,
            complain=QuietLog(lambda line: print(line, file=errors, flush=True)),
        )
        try:
            records = collector.records()
            FORMATS[form](records if chosen is None else (record for record in records if chosen(record)), out)
            out.flush()
        except BrokenPipeError:
            _discard(out)
        print(collector.summary, file=errors, flush=True)
        return collector.summary


def _listen(listen_url: str) -> list[socket.socket]:
    """A socket for each address of the URL's host."""
    url = parse_collector_url(listen_url)
    if url.transport != "udp":
        raise UsageError(f'"{listen_url}": the built-in Collector listens on udp:// only')
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            sockets.append(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
            _bind(sockets[-1], address)
    except (OSError, UnicodeError) as error:
        for sock in sockets:
            sock.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise FlowexpError(f"cannot listen on {url}: {reason}; choose another with --listen") from error
    return sockets


def _bind(sock: socket.socket, address: Any) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
    sock.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_OCTETS)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_OCTETS)
    sock.bind(address)
    sock.setblocking(False)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A file descriptor that is readable after SIGINT or SIGTERM, which then do nothing else."""
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    wakeup = signal.set_wakeup_fd(writable)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield readable
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(readable)
        os.close(writable)


def _discard(out: IO[str]) -> None:
    """Let what is left in `out` go nowhere, or the interpreter complains when it flushes it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out.fileno())
    os.close(nowhere)
