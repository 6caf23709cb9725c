# SPDX-License-Identifier: GPL-2.0-or-later
"""Collectors over TCP and TLS made of plain sockets, and an independent reader of what they got.

Such a Collector can stop reading, close, be killed (a reset with octets unread), and come back on the same port.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from contextlib import suppress

from .netns import Namespace

HEADER = struct.Struct(">HHIII")
SOURCE_PORT = (7, 2)


class StreamCollector:
    """A Collector: every connection's octets, kept apart."""

    def __init__(
        self,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        reading: bool = True,
        greeting: bytes = b"",
        namespace: Namespace | None = None,
    ) -> None:
        self._socket = socket.socket() if namespace is None else namespace.socket(kind=socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not reading:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self._socket.bind((address, port))
        self._socket.listen()
        self.port = int(self._socket.getsockname()[1])
        self._tls, self._reading, self._greeting = tls, reading, greeting
        self.sessions: list[bytearray] = []
        self.connections: list[socket.socket] = []
        self._readers: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                reader = threading.Thread(target=self._read, args=(connection,), daemon=True)
                reader.start()
                self._readers.append(reader)

    def _read(self, connection: socket.socket) -> None:
        with suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            connection.sendall(self._greeting)
            octets = bytearray()
            self.sessions.append(octets)
            self.connections.append(connection)
            while self._reading:
                octets += connection.recv(1 << 16) or self._end()
        if self._reading:
            connection.close()  # in order, if nothing has come meanwhile; else a reset, as from any program

    @staticmethod
    def _end() -> bytes:
        raise OSError("there is no more")

    def finish(self) -> None:
        """Wait until exporters have closed, and all has been read."""
        for reader in self._readers:
            reader.join(30)
            assert not reader.is_alive(), "an exporter has not closed"

    def close(self, *, abort: bool = False) -> None:
        """Stop listening, read what is there and close; `abort`: with a reset at once, as a kill does."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self.connections:
            with suppress(OSError):
                if abort or not self._reading:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()
                else:
                    socket.socket.shutdown(connection, socket.SHUT_RD)  # SSLSocket's own would forget its keys
        if self._reading and not abort:
            self.finish()


class SourcePorts(list):
    """Source ports of the Data Records of one Transport Session, in order; wire rules are checked on the way."""

    def __init__(self, octets: bytes) -> None:
        super().__init__()
        templates: dict[int, list[tuple[int, int]]] = {}
        expected, at = 0, 0
        self.templates: list[int] = []
        while at + 16 <= len(octets):
            version, length, _, sequence, _ = HEADER.unpack_from(octets, at)
            assert version == 10
            if at + length > len(octets):
                break
            assert sequence == expected, f"Sequence Number {sequence}, not {expected}"
            assert length > 16, "a Message without a Set"
            expected += self._sets(octets[at + 16 : at + length], templates)
            at += length

    def _sets(self, octets: bytes, templates: dict[int, list[tuple[int, int]]]) -> int:
        records = 0
        while octets:
            set_id, length = struct.unpack_from(">HH", octets)
            content, octets = octets[4:length], octets[length:]
            if set_id in (2, 3):
                self._define(content, templates, is_options=set_id == 3)
                continue
            assert set_id in templates, f"data of Template {set_id}, which has not come"
            size = sum(octets for _, octets in templates[set_id])
            for first in range(0, len(content) - size + 1, size):
                records += 1
                offset = first
                for field in templates[set_id]:
                    if field == SOURCE_PORT:
                        self.append(struct.unpack_from(">H", content, offset)[0])
                    offset += field[1]
        return records

    def _define(self, content: bytes, templates: dict[int, list[tuple[int, int]]], *, is_options: bool) -> None:
        while len(content) >= 4:
            template_id, count = struct.unpack_from(">HH", content)
            content = content[6 if is_options else 4 :]
            assert template_id not in templates, f"Template {template_id} comes twice in a Transport Session"
            self.templates.append(template_id)
            templates[template_id] = []
            for _ in range(count):
                element, length = struct.unpack_from(">HH", content)
                content = content[8 if element & 0x8000 else 4 :]
                templates[template_id].append((element, length))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def messages_in(octets: bytes) -> list[bytes]:
    """The whole Messages of one Transport Session; Sequence Numbers are for others to look at."""
    found, at = [], 0
    while at + HEADER.size <= len(octets):
        version, length, *_ = HEADER.unpack_from(octets, at)
        assert version == 10 and length >= HEADER.size, f"no Message at octet {at}"
        if at + length > len(octets):
            break
        found.append(bytes(octets[at : at + length]))
        at += length
    return found
