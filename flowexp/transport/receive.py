# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a Collector's Messages come from: datagrams, or connections over TCP and TLS (RFC 7011 sections 10 and 11).

The rule: whoever sends what, memory is bounded, and nobody is waited for. A connection has room for one Message and
what one read brings; when there are too many, the one that has been silent for longest goes. What cannot be the
beginning of a Message ends its connection, as nothing behind it can be found.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Callable, NamedTuple, Protocol

from flowexp.protocol.ipfix import MESSAGE_HEADER, VERSION

RECEIVE_BUFFER_OCTETS = 32 * 1024 * 1024
"""Asked for; without CAP_NET_ADMIN the kernel gives at most net.core.rmem_max."""
MAX_DATAGRAM_OCTETS = 65_535
MAX_CONNECTIONS = 64
_READ_OCTETS = 1 << 16
_MESSAGE_START = struct.Struct(">HH")
"""Version and Length."""
SO_RCVBUFFORCE = 33
SO_RXQ_OVFL = 40
"""With each datagram comes how many were dropped so far because the receive buffer was full."""
_DROPPED = struct.Struct("=I")


class Arrival(NamedTuple):
    """One Message, or what came for one; no octets: the Transport Session has ended."""

    octets: bytes | None
    session: Hashable
    """The Transport Session: who sends, over what."""
    sender: tuple[str, int]
    """Address and port."""


class Source(Protocol):
    """Sockets that a poll watches."""

    dropped: int
    """Datagrams that this host threw away because a receive buffer was full."""

    def watched(self) -> Mapping[int, int]:
        """File descriptors, and what to wait for."""

    def receive(self, fd: int) -> Iterator[Arrival]:
        """What there is on this one; it never blocks."""

    def close(self) -> None:
        """Give everything back."""


class Datagrams:
    """A UDP socket, bound to `address`. OSError if that cannot be had."""

    def __init__(self, family: int, address: Any) -> None:
        self.dropped = 0
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_OCTETS)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_OCTETS)
            _bind(self._socket, address)
        except OSError:
            self._socket.close()
            raise
        self._watched = {self._socket.fileno(): select.POLLIN}

    def watched(self) -> Mapping[int, int]:
        return self._watched

    def receive(self, fd: int) -> Iterator[Arrival]:
        try:
            datagram, ancillary, _, sender = self._socket.recvmsg(MAX_DATAGRAM_OCTETS, 64)
        except OSError:  # a bad checksum found late, an ICMP error: no datagram
            return
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, SO_RXQ_OVFL):
                (self.dropped,) = _DROPPED.unpack_from(content)
        yield Arrival(datagram, (fd, sender), sender[:2])

    def close(self) -> None:
        self._socket.close()


class Connections:
    """A TCP socket that listens at `address`, and who has connected to it. OSError if it cannot be had.

    - tls: over TLS, with this certificate.
    - complain: takes a kind and a line about a connection that ended otherwise than in order.
    """

    dropped = 0

    def __init__(
        self, family: int, address: Any, *, tls: ssl.SSLContext | None, complain: Callable[[str, str], None]
    ) -> None:
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(self._socket, address)
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise
        self._tls, self._complain = tls, complain
        self._connections: dict[int, _Connection] = {}
        self._accepted = 0

    def watched(self) -> Mapping[int, int]:
        watched = {fd: connection.events for fd, connection in self._connections.items()}
        return {self._socket.fileno(): select.POLLIN, **watched}

    def receive(self, fd: int) -> Iterator[Arrival]:
        if fd == self._socket.fileno():
            yield from self._accept()
            return
        connection = self._connections.get(fd)
        if connection is None:  # it had to go for another one
            return
        try:
            yield from connection.receive()
        except _Over as over:
            if str(over):
                host, port = connection.sender
                self._complain(host, f"{host} port {port}: {over}; the connection is closed")
            yield self._end(fd)

    def _accept(self) -> Iterator[Arrival]:
        try:
            sock, sender = self._socket.accept()
        except OSError:  # it has gone again, or there are no descriptors left
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            silent = min(self._connections, key=lambda fd: self._connections[fd].heard_s)
            host, port = self._connections[silent].sender
            self._complain(host, f"{host} port {port}: silent for longest, and {MAX_CONNECTIONS} are enough; closed")
            yield self._end(silent)
        self._accepted += 1
        sock.setblocking(False)
        if self._tls is not None:
            try:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except OSError:
                sock.close()
                return
        self._connections[sock.fileno()] = _Connection(sock, (id(self), self._accepted), sender[:2])

    def _end(self, fd: int) -> Arrival:
        connection = self._connections.pop(fd)
        connection.close()
        return Arrival(None, connection.session, connection.sender)

    def close(self) -> None:
        for fd in list(self._connections):
            self._end(fd)
        self._socket.close()


class _Over(Exception):
    """A connection has come to its end; the text says why, if that is worth a line."""


class _Connection:
    def __init__(self, sock: socket.socket, session: Hashable, sender: tuple[str, int]) -> None:
        self.sender = sender
        self.heard_s = time.monotonic()
        self.events = select.POLLIN
        self.session = session
        self._socket = sock
        self._octets = bytearray()

    def receive(self) -> Iterator[Arrival]:
        """Whole Messages; raises _Over behind the last one."""
        while True:
            octets = self._read()
            if octets is None:
                return
            if not octets:
                raise _Over(f"it ended within a Message, after {len(self._octets)} octets" if self._octets else "")
            self.heard_s = time.monotonic()
            self._octets += octets
            yield from self._messages()
            if not isinstance(self._socket, ssl.SSLSocket) or not self._socket.pending():
                return

    def _read(self) -> bytes | None:
        """What there is, b"" at the end; None: nothing yet."""
        self.events = select.POLLIN
        try:
            return self._socket.recv(_READ_OCTETS)
        except ssl.SSLWantWriteError:
            self.events = select.POLLOUT
            return None
        except (ssl.SSLWantReadError, BlockingIOError, InterruptedError):
            return None
        except ssl.SSLError as error:
            raise _Over(f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}") from error
        except OSError as error:
            raise _Over(f"{error.strerror}") from error

    def _messages(self) -> Iterator[Arrival]:
        at = 0
        while len(self._octets) - at >= _MESSAGE_START.size:
            version, length = _MESSAGE_START.unpack_from(self._octets, at)
            if version != VERSION or length < MESSAGE_HEADER.size:
                raise _Over(f"no IPFIX Message begins with version {version} and Length {length}")
            if len(self._octets) - at < length:
                break
            yield Arrival(bytes(self._octets[at : at + length]), self.session, self.sender)
            at += length
        del self._octets[:at]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


def _bind(sock: socket.socket, address: Any) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
    sock.bind(address)
    sock.setblocking(False)
