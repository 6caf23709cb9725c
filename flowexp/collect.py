# SPDX-License-Identifier: GPL-2.0-or-later
"""The built-in Collector: Messages in, records out as they come, a summary at the end.

The rule: whatever arrives, it goes on. What it cannot decode it says on standard error, at most once a minute
for a sender; memory is bounded by the decoder's limits and the log's, whoever sends what.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Callable

from flowexp.collector_url import parse_collector_url
from flowexp.errors import FlowexpError, UsageError
from flowexp.forms import FORMS, write
from flowexp.output import discard
from flowexp.protocol.decode import Decoder
from flowexp.protocol.record import Record
from flowexp.protocol.session import Decoded
from flowexp.transport.base import QuietLog
from flowexp.transport.connection import load_certificate
from flowexp.transport.receive import Arrival, Connections, Datagrams, Source

MAX_LAST_ARRIVALS = 1 << 17
"""Still read after a stop, more than the buffer holds: so that an end comes under a flood, too."""


@dataclass
class Summary:
    """What came. str() of it is the line printed at the end."""

    messages: int = 0
    """Of IPFIX, or packets of NetFlow; whatever else came counts, too."""
    records: int = 0
    """Data Records, those of Options left out."""
    lost_records: int = 0
    """Missing by the Sequence Numbers of IPFIX and NetFlow v5, less those that came late."""
    lost_packets: int = 0
    """The same for NetFlow v9, which counts packets."""
    problems: int = 0
    """What could not be decoded: Sets, Templates, whole Messages."""
    dropped: int = 0
    """Datagrams that this host threw away because the receive buffer was full."""

    def add(self, decoded: Decoded) -> None:
        """Count one Message."""
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
    """Receives from sources until told to stop.

    - stop: a file descriptor; once it is readable, `records` ends.
    - out: flushed whenever nothing more has arrived, so that a pipe's reader sees each record at once.
    - complain: takes each line about what cannot be decoded.
    """

    def __init__(self, sources: Sequence[Source], *, stop: int, out: IO[str], complain: QuietLog) -> None:
        self.summary = Summary()
        self._sources = sources
        self._stop = stop
        self._out = out
        self._complain = complain
        self._decoder = Decoder()

    def records(self) -> Iterator[Record]:
        """Data Records in the order in which they came, those included that are here when the stop comes."""
        poll = select.poll()
        watched: dict[int, int] = {}
        last_arrivals = MAX_LAST_ARRIVALS
        while last_arrivals:
            source_of = {fd: source for source in self._sources for fd in source.watched()}
            now = {fd: source.watched()[fd] for fd, source in source_of.items()}
            _watch(poll, watched, {**now, self._stop: select.POLLIN})
            ready = {fd for fd, _ in poll.poll(0)}
            if not ready:
                self._out.flush()
                ready = {fd for fd, _ in poll.poll()}
            if self._stop in ready:
                last_arrivals -= 1
                if len(ready) == 1:
                    return
            for fd in ready - {self._stop}:
                for arrival in source_of[fd].receive(fd):
                    yield from self._decode(arrival)

    def _decode(self, arrival: Arrival) -> list[Record]:
        if arrival.octets is None:
            self._decoder.forget(arrival.session)
            return []
        decoded = self._decoder.decode(arrival.octets, arrival.session)
        self.summary.add(decoded)
        self.summary.dropped = sum(source.dropped for source in self._sources)
        host, port = arrival.sender
        if decoded.problems:
            more = len(decoded.problems) - 1 + decoded.problems_left_out
            others = f" (and {more} more in this Message)" if more else ""
            self._complain(host, f"{host} port {port}: {decoded.problems[0]}{others}")
        return decoded.records


def _watch(poll: select.poll, watched: dict[int, int], wanted: dict[int, int]) -> None:
    """Have `poll` wait for `wanted`, of which it knows `watched`."""
    if watched == wanted:
        return
    for fd in watched.keys() - wanted.keys():
        poll.unregister(fd)
    for fd, events in wanted.items():
        poll.register(fd, events)
    watched.clear()
    watched.update(wanted)


def collect(
    listen_url: str,
    form: str,
    out: IO[str],
    *,
    chosen: Callable[[Record], bool] | None = None,
    errors: IO[str] | None = None,
    stop: int | None = None,
    cert_file: str = "",
    key_file: str = "",
) -> Summary:
    """Print what Exporters send until SIGINT, SIGTERM or `stop` is readable.

    - listen_url: udp://, tcp:// or tls://host:port.
    - form: one of forms.FORMS.
    - chosen: which records are printed, None: all; the summary is of all.
    - errors: for complaints and the summary; None: standard error.
    - stop: a file descriptor instead of the signals, which only the main thread can have.
    - cert_file, key_file: the Collector's certificate for tls://, in PEM; its key may be in the same file.

    Raises UsageError for a URL that is none, FlowexpError where the port cannot be had. That nobody reads `out`
    any more (`| head`) is an end like the others.
    """
    errors = errors or sys.stderr
    with contextlib.ExitStack() as stack:
        complain = QuietLog(lambda line: print(line, file=errors, flush=True))
        sources = _listen(listen_url, _tls(listen_url, cert_file, key_file), complain)
        for source in sources:
            stack.callback(source.close)
        collector = Collector(
            sources, stop=stack.enter_context(_signals()) if stop is None else stop, out=out, complain=complain
        )
        try:
            records = collector.records()
            wanted = records if chosen is None else (record for record in records if chosen(record))
            write(wanted, FORMS[form](out), out)
            out.flush()
        except BrokenPipeError:
            discard(out)
        finally:
            print(collector.summary, file=errors, flush=True)
        return collector.summary


def _tls(listen_url: str, cert_file: str, key_file: str) -> ssl.SSLContext | None:
    """What tls:// needs; None for the others."""
    if parse_collector_url(listen_url).transport != "tls":
        if cert_file or key_file:
            raise UsageError(f'"{listen_url}": only tls:// has a use for --cert and --key')
        return None
    if not cert_file:
        raise UsageError(f'"{listen_url}": a Collector needs a certificate for that; name it with --cert, --key')
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        load_certificate(context, cert_file, key_file, named="--cert, --key")
    except FlowexpError as error:
        raise UsageError(str(error)) from error
    return context


def _listen(listen_url: str, tls: ssl.SSLContext | None, complain: QuietLog) -> list[Source]:
    """One for each address of the URL's host."""
    url = parse_collector_url(listen_url)
    if url.transport == "file":
        raise UsageError(f'"{listen_url}": the built-in Collector listens on udp://, tcp:// and tls://')
    kind = socket.SOCK_DGRAM if url.transport == "udp" else socket.SOCK_STREAM
    sources: list[Source] = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(url.host, url.port, type=kind, flags=socket.AI_PASSIVE):
            if kind == socket.SOCK_DGRAM:
                sources.append(Datagrams(family, address))
            else:
                sources.append(Connections(family, address, tls=tls, complain=complain))
    except (OSError, UnicodeError) as error:
        for source in sources:
            source.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise FlowexpError(f"cannot listen on {url}: {reason}; choose another with --listen") from error
    return sources


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A file descriptor that is readable after SIGINT or SIGTERM, which then do nothing else.

    Nor do those that come behind it: `timeout` sends each twice, and the end is under way. A process that goes on
    has its handlers back if none came.
    """
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    wakeup = signal.set_wakeup_fd(writable)
    came = False

    def note(_number: int, _frame: object) -> None:
        nonlocal came
        came = True

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if came else handler)
        os.close(readable)
        os.close(writable)
