# SPDX-License-Identifier: GPL-2.0-or-later
"""IPFIX Files (RFC 5655): Messages one behind the other in a file, as they would go over a wire.

The rule: the file always ends with a whole Message. What a failed write left of a batch is taken back first; what
a killed process left of one, when the file is opened again (a kill can end a write between two pages).

A file that has become large or old enough is put aside, whole, under a name with the time of its first Message:
flows.ipfix becomes flows-20261125T230000Z.ipfix, and another flows.ipfix begins with Templates. What is in the way
of that (permissions, a full disk) is told, and the file goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
from dataclasses import asdict
from typing import Callable

from flowexp.errors import FlowexpError
from flowexp.protocol.ipfix import MESSAGE_HEADER, VERSION
from flowexp.transport.base import Batch, Counters, QuietLog, Sent, warnings_of

MAX_MESSAGE_OCTETS = 65_535
"""A Message's Length field has 16 bits (RFC 7011 section 3.1); a file asks for nothing smaller."""

HEADER_START = struct.Struct(">HH")
FILE_START = struct.Struct(">HHI")
"""Version, Length and Export Time of the first Message."""
_APPENDING = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


class FileTransport:
    """Appends to the file at `path`, created if need be. A batch is one write; nothing is held back.

    - most_octets, most_s: with the batch that makes it so large, or once it is so old, a file with records is put
      aside; 0: never. Asked for at each sweep, before a batch.
    - clock_s: Unix time.
    """

    def __init__(
        self, path: str, *, most_octets: int = 0, most_s: float = 0, clock_s: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self.counters = Counters()
        self._most_octets, self._most_s, self._clock_s = most_octets, most_s, clock_s
        self._warn = QuietLog(warnings_of(__name__))
        self._has_records = True
        """Or may have: what an earlier process left."""
        self._announces = False
        self._files_completed = 0
        self._fd: int | None = None
        self._templates_due = True

    def open(self) -> None:
        """Open or create the file. Raises FlowexpError: no such directory, no permission, ..."""
        try:
            self._fd = os.open(self.path, _APPENDING, 0o640)
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
                if version != VERSION or length < MESSAGE_HEADER.size:
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
        """True once a file: the Templates go in front, also where an earlier run's part ends."""
        if self._fd is not None and (self._most_octets or self._most_s):
            self._put_aside_if_due(self._fd)
        due, self._templates_due = self._templates_due, False
        return due

    def _put_aside_if_due(self, fd: int) -> None:
        status = os.fstat(fd)
        if not self._has_records or not stat.S_ISREG(status.st_mode) or status.st_size < FILE_START.size:
            return
        try:
            following = self._following(status)
        except OSError as error:
            self._warn("aside", f"{self.path}: cannot be put aside: {error.strerror}; it goes on")
            return
        if following is None:
            return
        os.close(fd)
        self._fd = following
        self._files_completed += 1
        self._templates_due, self._has_records = True, False

    def _following(self, status: os.stat_result) -> int | None:
        """The file that is written from now on, if it is another one. Somebody else may have put ours aside."""
        if not self._is_there(status):
            return os.open(self.path, _APPENDING, 0o640)
        with open(self.path, "rb") as file:
            *_, begun_s = FILE_START.unpack(file.read(FILE_START.size))
        too_large = 0 < self._most_octets <= status.st_size
        if not too_large and not 0 < self._most_s <= self._clock_s() - begun_s:
            return None
        return self._begin_another(self._free_name(begun_s))

    def _is_there(self, status: os.stat_result) -> bool:
        """Whether the file that we write is still the one of this name."""
        try:
            return os.path.samestat(os.stat(self.path), status)
        except FileNotFoundError:
            return False

    def _begin_another(self, aside: str) -> int:
        """An empty file at `path`; what was there is `aside`. OSError: nothing has changed."""
        following = f"{self.path}.next"
        fd = os.open(following, _APPENDING | os.O_TRUNC, 0o640)
        try:
            os.rename(self.path, aside)
            os.rename(following, self.path)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(following)
            raise
        return fd

    def _free_name(self, begun_s: int) -> str:
        stem, suffix = os.path.splitext(self.path)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(begun_s))
        name, number = f"{stem}-{stamp}{suffix}", 1
        while os.path.exists(name):
            number += 1
            name = f"{stem}-{stamp}-{number}{suffix}"
        return name

    def hurry(self, on: bool) -> None:
        """A file has no pace."""

    def announces(self, domain: int | None) -> None:
        """A file with nothing but announcements is not put aside."""
        self._announces = domain is not None

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
        self._has_records |= not self._announces
        return Sent(batch.count)

    def local_address(self) -> bytes:
        """None: a file has no address."""
        return b""

    def status(self) -> dict[str, str | int]:
        """For `flowexp status`: path, state and counters."""
        state = "closed" if self._fd is None else "up"
        return {"collector": f"file://{self.path}", "state": state, **asdict(self.counters), **self._completed()}

    def _completed(self) -> dict[str, str | int]:
        return {"files_completed": self._files_completed} if self._most_octets or self._most_s else {}
