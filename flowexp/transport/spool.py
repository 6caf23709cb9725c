# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages on their way to a Collector, in their order: in memory, or on disk, where a kill ends nothing.

The rule: what `append` has taken stays until it is settled, or until all is larger than the operator allows; then the
oldest goes first, and is counted. A spool is a row of IPFIX Files (RFC 5655), segments, each readable by itself:

    segment = head, group...         head:  what a Collector must know first (Templates, Options), a mark, a mark
    group   = Message..., mark       group: what one write brought; all of it is in force once its mark is there

A mark is a Message that is only a header. It carries the next Sequence Number: so the file alone tells how many
Data Records each Message has, and a group that a kill cut off is known by its missing mark. (Whoever wrote it has
not been told that it was taken.) Two marks in a row end the head.

Sequence Numbers in a segment begin with 0 in each Observation Domain; those of a Transport Session are put in as
the Messages leave (stream.py). On disk `position` holds how far the Collector is known to have come, and how far
it may have come.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from dataclasses import dataclass
from typing import Callable

from flowexp.errors import FlowexpError
from flowexp.protocol.ipfix import MESSAGE_HEADER
from flowexp.transport.segment import (
    HEADER_OCTETS,
    MOST_READ_OCTETS,
    Group,
    Head,
    Position,
    first_group,
    groups_in,
    head_octets,
    heads_in,
    is_damaged,
    mark,
    number,
)

LEAST_SEGMENT_OCTETS, MOST_SEGMENT_OCTETS = 1 << 17, 1 << 24
"""A sixteenth of the size, within these: as much is dropped at once when the spool is full."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SEGMENT_NAME = re.compile(r"(\d{10})\.ipfix")
_POSITION_NAME = "position"
_POSITION = "{:010d} {:010d} {:010d} {:010d}\n"


@dataclass
class _Segment:
    number: int
    fd: int
    path: str | None
    octets: int = 0
    records_left: int = 0
    """Data Records of which it is not known yet that the Collector has them."""
    heads: tuple[Head, ...] = ()
    body: int = 0
    """Where the first group begins."""
    is_damaged: bool = False
    """Whether more is in the file than can be read: then it is not removed but set aside, as NAME.damaged."""

    def close(self, *, remove: bool) -> None:
        if remove and self.path is not None:
            with contextlib.suppress(OSError):
                if self.is_damaged:
                    os.rename(self.path, f"{self.path}.damaged")
                else:
                    os.unlink(self.path)
        os.close(self.fd)


class Spool:
    """One Collector's Messages. `append` from one thread, all else from another.

    - folder: where the segments are, made if need be; None: in memory, for as long as this process lives.
    - size_octets: all of it is at most so large.
    - complain: takes a line about what cannot be read or had to be dropped.

    Raises FlowexpError if the folder cannot be had.
    """

    def __init__(self, folder: str | None, *, size_octets: int, complain: Callable[[str], None]) -> None:
        self.folder = folder
        self.records_dropped = 0
        """Data Records that had to make room before the Collector was known to have them."""
        self.records_in_doubt = 0
        """Data Records that an earlier process had handed to the kernel, and that go again."""
        self._size_octets = size_octets
        self._segment_octets = max(LEAST_SEGMENT_OCTETS, min(size_octets // 16, MOST_SEGMENT_OCTETS))
        self._complain = complain
        self._lock = threading.Lock()
        self._heads: dict[int, Head] = {}
        self._segments: list[_Segment] = []
        self._writing = False
        """Whether the last segment may grow."""
        self._next = 1
        self._numbers: dict[int, int] = {}
        """The next Sequence Number of each Observation Domain in the last segment."""
        self._acknowledged = self._settled = self._handed_over = Position(0, 0)
        self._position_fd = -1
        if folder is not None:
            self._adopt(folder)

    # ---- what waits

    @property
    def octets(self) -> int:
        """All that is kept."""
        return sum(segment.octets for segment in list(self._segments))

    @property
    def records(self) -> int:
        """Data Records of which it is not known yet that the Collector has them."""
        return sum(segment.records_left for segment in list(self._segments))

    # ---- in

    def announce(self, head: Head) -> None:
        """From now on this is what a Collector must know first of a domain; without a Message: nothing any more.

        Nothing changes where it says what it said before.
        """
        with self._lock:
            if self._heads.get(head.domain, Head(head.domain, ())).says_the_same(head):
                return
            self._heads[head.domain] = head
            if not head.messages:
                del self._heads[head.domain]
            self._writing = False

    def append(self, octets: memoryview, message_octets: int, records: int) -> None:
        """Takes a group of at most MAX_GROUP_OCTETS: Messages of equal length, so many Data Records in each.

        Raises OSError where it cannot be written; then nothing of it is there.
        """
        with self._lock:
            self._make_room(len(octets) + HEADER_OCTETS)
            while not self._append(bytearray(octets), message_octets, records):
                pass

    def _append(self, octets: bytearray, message_octets: int, records: int) -> bool:
        """False: there is no room on the disk; but the oldest segment has gone now."""
        *_, domain = MESSAGE_HEADER.unpack_from(octets)
        try:
            segment = self._last_segment(len(octets))
            after = number(octets, message_octets, records, self._numbers.get(domain, 0))
            _write(segment.fd, octets + mark(octets, after), segment.octets)
        except OSError as error:
            if error.errno not in _FULL or not self._drop_oldest():
                raise
            self._complain(f"{self.folder}: {error.strerror}: the oldest records make room")
            return False
        segment.octets += len(octets) + HEADER_OCTETS
        segment.records_left += records * (len(octets) // message_octets)
        self._numbers[domain] = after
        return True

    def _make_room(self, octets: int) -> None:
        while self.octets + octets > self._size_octets and self._drop_oldest():
            self._complain(f"{self.folder or 'memory'}: full: the oldest records make room")

    def _drop_oldest(self) -> bool:
        """Whether there is a segment to drop beside the one that grows."""
        if len(self._segments) < 2:
            return False
        oldest = self._segments.pop(0)
        self.records_dropped += oldest.records_left
        oldest.close(remove=True)
        return True

    def _last_segment(self, octets: int) -> _Segment:
        """The one that grows; a new one if what it would hold is too much, or begins with another head."""
        last = self._segments[-1] if self._segments else None
        if last is not None and self._writing and last.octets + octets <= self._segment_octets:
            return last
        segment = self._new_segment()
        try:
            content, self._numbers = head_octets(tuple(self._heads.values()))
            _write(segment.fd, content, 0)
        except OSError:
            segment.close(remove=True)
            raise
        segment.octets = segment.body = len(content)
        segment.heads = tuple(self._heads.values())
        self._segments.append(segment)
        self._writing = True
        self._next += 1
        return segment

    def _new_segment(self) -> _Segment:
        if self.folder is None:
            return _Segment(self._next, os.memfd_create("flowexp-queue", os.MFD_CLOEXEC), None)
        path = f"{self.folder}/{self._next:010d}.ipfix"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return _Segment(self._next, os.open(path, flags, 0o640), path)

    # ---- out

    def begin(self) -> Position:
        """Where a Transport Session begins: behind all that is settled."""
        return self._settled

    def heads(self, position: Position) -> tuple[Head, ...]:
        """What a Collector must know before the group at `position`."""
        with self._lock:
            found = next((segment for segment in self._segments if segment.number >= position.segment), None)
            if found is None or (position.offset >= found.octets and found is self._segments[-1]):
                return tuple(self._heads.values())
            return found.heads

    def read(self, position: Position) -> Group | None:
        """The group at `position`, or the first one behind it that has not been dropped; None: there is none yet."""
        while True:
            with self._lock:
                segment = self._segment_at(position)
                if segment is None:
                    return None
                offset = position.offset if segment.number == position.segment else 0
                offset = max(offset, segment.body)
                fd, most = os.dup(segment.fd), min(MOST_READ_OCTETS, segment.octets - offset)
            try:
                octets = os.pread(fd, most, offset)
            finally:
                os.close(fd)
            group = first_group(octets, Position(segment.number, offset))
            if group is not None:
                return group
            self._complain(f"{segment.path}: damaged at octet {offset}; {segment.records_left} records are lost")
            with self._lock:
                self.records_dropped += segment.records_left
                segment.records_left = 0
                segment.octets, segment.is_damaged = offset, True
                self._writing = self._writing and segment is not self._segments[-1]

    def _segment_at(self, position: Position) -> _Segment | None:
        """The segment of the next group from `position` on."""
        for segment in self._segments:
            behind = position.offset if segment.number == position.segment else 0
            if segment.number >= position.segment and max(behind, segment.body) < segment.octets:
                return segment
        return None

    def hand_over(self, end: Position) -> None:
        """All up to `end` is given to the kernel next: a kill leaves the Collector with it or without it."""
        with self._lock:
            if end > self._handed_over:
                self._handed_over = end
                self._keep_position()

    def acknowledge(self, end: Position, records: int) -> bool:
        """The Collector's host has the group that ends there. False: that is known, or it was dropped and counted."""
        with self._lock:
            if end <= self._acknowledged:
                return False
            self._acknowledged = end
            for segment in self._segments:
                if segment.number == end.segment:
                    segment.records_left -= records
                    return True
            return False

    def settle(self, end: Position) -> None:
        """All up to `end` will not be needed again."""
        with self._lock:
            if end <= self._settled:
                return
            self._settled = end
            self._keep_position()
            while self._segments and self._is_done(self._segments[0]):
                self._segments.pop(0).close(remove=True)
            if not self._segments:
                self._writing = False

    def _is_done(self, segment: _Segment) -> bool:
        return (segment.number, segment.octets) <= self._settled

    def _keep_position(self) -> None:
        if self._position_fd >= 0:
            with contextlib.suppress(OSError):  # then more goes again after a kill, and nothing is lost
                os.pwrite(self._position_fd, _POSITION.format(*self._settled, *self._handed_over).encode(), 0)

    def close(self) -> None:
        """Give everything back; what is on disk stays. Nothing is read or written any more."""
        with self._lock:
            for segment in self._segments:
                segment.close(remove=False)
            self._segments.clear()
            if self._position_fd >= 0:
                os.close(self._position_fd)
                self._position_fd = -1

    # ---- what an earlier process has left

    def _adopt(self, folder: str) -> None:
        try:
            os.makedirs(folder, mode=0o750, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._position_fd = os.open(f"{folder}/{_POSITION_NAME}", flags, 0o640)
            fcntl.flock(self._position_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read_position()
            found = sorted(int(name[1]) for name in map(_SEGMENT_NAME.fullmatch, os.listdir(folder)) if name)
            self._next = max([*found, self._settled.segment, self._handed_over.segment]) + 1
            for number in found:
                self._adopt_segment(number, f"{folder}/{number:010d}.ipfix")
        except OSError as error:
            in_use = error.errno == errno.EAGAIN and self._position_fd >= 0  # of flock
            self.close()
            why = "another exporter or Collector uses it" if in_use else error.strerror
            raise FlowexpError(f"{folder}: cannot be the spool: {why}") from error

    def _read_position(self) -> None:
        try:
            numbers = [int(word) for word in os.pread(self._position_fd, 100, 0).split()]
            self._settled = self._acknowledged = Position(*numbers[:2])
            self._handed_over = Position(*numbers[2:])
        except (ValueError, TypeError):  # new, or damaged: then more goes again
            self._settled = self._acknowledged = self._handed_over = Position(0, 0)

    def _adopt_segment(self, number: int, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        segment = _Segment(number, fd, path)
        with open(fd, "rb", closefd=False) as file:
            content = memoryview(file.read())
        segment.heads, segment.body = heads_in(content)
        segment.octets = segment.body
        for group in groups_in(content, Position(number, segment.body)):
            segment.octets = group.end.offset
            if group.end > self._settled:
                segment.records_left += group.records
                self.records_in_doubt += group.records if group.end <= self._handed_over else 0
        if is_damaged(content[segment.octets :]):
            segment.is_damaged = True
            left = len(content) - segment.octets
            self._complain(
                f"{path}: damaged from octet {segment.octets} on: {left} octets are left out, and kept as .damaged"
            )
        if segment.records_left:
            self._segments.append(segment)
        else:
            segment.close(remove=True)


def _write(fd: int, octets: bytes | bytearray, offset: int) -> None:
    """All of it, at the file's end; nothing and OSError if that cannot be."""
    written = 0
    try:
        while written < len(octets):
            written += os.pwrite(fd, memoryview(octets)[written:], offset + written)
    except OSError:
        os.ftruncate(fd, offset)
        raise
