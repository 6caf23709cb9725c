# SPDX-License-Identifier: GPL-2.0-or-later
"""IPFIX Files (RFC 5655): Messages one behind the other in a file, as they would go over a wire.

The rule: the file always ends with a whole Message. What a failed write left of a batch is taken back first; what
a killed process left of one, when the file is opened again (a kill can end a write between two pages).
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from dataclasses import asdict

from flowexp.errors import FlowexpError
from flowexp.transport.base import Batch, Counters, Sent

MAX_MESSAGE_OCTETS = 65_535
"""A Message's Length field has 16 bits (RFC 7011 section 3.1); a file asks for nothing smaller."""

HEADER_START = struct.Struct(">HH")
IPFIX_VERSION, MESSAGE_HEADER_OCTETS = 10, 16


class FileTransport:
    """Appends to the file at `path`, created if need be. A batch is one write; nothing is held back."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.counters = Counters()
        self._fd: int | None = None
        self._templates_due = True

    def open(self) -> None:
        """Open or create the file. Raises FlowexpError: no such directory, no permission, ..."""
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            self._cut_back(self._fd)
        except OSError as error:
            raise FlowexpError(f"{self.path}: cannot write the IPFIX File: {error.strerror}") from error

    def _cut_back(self, fd: int) -> None:
        """Take away an unfinished Message at the file's end. A pipe, and what is no IPFIX File, is left alone."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return
        with open(self.path, "rb") as file:
            at = 0
            while at + HEADER_START.size <= status.st_size:
                file.seek(at)
                version, length = HEADER_START.unpack(file.read(HEADER_START.size))
                if version != IPFIX_VERSION or length < MESSAGE_HEADER_OCTETS:
                    return
                if at + length > status.st_size:
                    break
                at += length
        if at < status.st_size:
            os.ftruncate(fd, at)

    def close(self) -> None:
        """Close the file. Raises FlowexpError if the file system only now says that it lost something."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            os.close(fd)
        except OSError as error:
            raise FlowexpError(f"{self.path}: closing the IPFIX File failed: {error.strerror}") from error

    def max_message_octets(self) -> int:
        """65,535: what a Message's Length can say."""
        return MAX_MESSAGE_OCTETS

    def take_templates_due(self) -> bool:
        """True once: the Templates go in front, also where an earlier run's part ends."""
        due, self._templates_due = self._templates_due, False
        return due

    def hurry(self, on: bool) -> None:
        """A file has no pace."""

    def send(self, batch: Batch) -> Sent:
        """Append the batch: all of it, or nothing and FlowexpError (disk full, quota, pipe closed, ...)."""
        if self._fd is None:
            raise FlowexpError(f"{self.path}: the IPFIX File is not open")
        start_octets = os.fstat(self._fd).st_size
        try:
            written_octets = 0
            while written_octets < len(batch.octets):
                written_octets += os.write(self._fd, batch.octets[written_octets:])
        except OSError as error:
            with contextlib.suppress(OSError):  # a pipe cannot take back
                os.ftruncate(self._fd, start_octets)
            self.counters.add(batch, Sent(0))
            raise FlowexpError(f"{self.path}: cannot write the IPFIX File: {error.strerror}") from error
        self.counters.add(batch, Sent(batch.count))
        return Sent(batch.count)

    def status(self) -> dict[str, str | int]:
        """For `flowexp status`: path, state and counters."""
        state = "closed" if self._fd is None else "up"
        return {"collector": f"file://{self.path}", "state": state, **asdict(self.counters)}
