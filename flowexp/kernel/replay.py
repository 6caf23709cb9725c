# SPDX-License-Identifier: GPL-2.0-or-later
"""Captured frames through the packet path itself: BPF_PROG_TEST_RUN of the replay program.

It takes the place of a hook: same parsing, same table, but the times and lengths are the capture's. A system call
costs more than a packet, so frames go by the hundred: into a map, from which the program takes one each time it runs.
"""

from __future__ import annotations

import errno
from typing import Sequence, Tuple

import numpy as np

from . import libbpf
from .family import Mapped
from .table import FlowTable

_ETHERNET_OCTETS = 14
_HEADERS_OCTETS = 512  # of each frame, where nobody looks at payloads

CapturedFrame = Tuple[int, bytes, int, int]
"""Unix time in nanoseconds; an Ethernet frame, as far as it was captured; octets of the whole frame; interface."""


class Replay:
    """Feeds frames to the replay program, whose descriptor is `program_fd`, over `table`.

    frames_fd: of the map `replay_frames`.
    """

    def __init__(self, table: FlowTable, program_fd: int, frames_fd: int) -> None:
        self._table = table
        struct = table.layout.structs["replay_frames"]
        self._map = Mapped(frames_fd, struct.itemsize).array(struct)
        frames = self._map["frame"][0]
        self._at_once, most_octets = frames["data"].shape
        self._octets = most_octets if "application" in table.groups else _HEADERS_OCTETS
        self._place = [frames[name] for name in ("time_ns", "wire_octets", "ifindex", "octets")]
        # As bytes to be stored into. (A view of a part as another type is numpy's since 1.23 only.)
        self._data = frames.getfield(f"S{most_octets}", frames.dtype.fields["data"][1])
        context = np.zeros(1, table.layout.structs["__sk_buff"])
        # The packet that the frames take the place of; as long as any of them, so that it never has to grow.
        self._packet = bytes(most_octets)
        self._run = libbpf.TestRun(program_fd, context.view(np.uint8)).run

    def feed(self, frame: bytes, *, time_ns: int, wire_octets: int, interface: int = 0) -> None:
        """One frame."""
        self.feed_all([(time_ns, frame, wire_octets, interface)])

    def feed_all(self, frames: Sequence[CapturedFrame]) -> None:
        """Frames in their order. One that has no whole Ethernet header is not metered: truncated."""
        for begin in range(0, len(frames), self._at_once):
            self._feed(frames[begin : begin + self._at_once])

    def _feed(self, some: Sequence[CapturedFrame]) -> None:
        times, headers, wire, interfaces = zip(*some)
        lengths = list(map(len, headers))
        if min(lengths) < _ETHERNET_OCTETS:
            self._leave_short(some)
            return
        if max(lengths) > self._octets:
            headers = tuple(frame[: self._octets] for frame in headers)
            lengths = list(map(len, headers))
        count = len(some)
        for place, values in zip(self._place, (times, wire, interfaces, lengths)):
            place[:count] = values
        self._data[:count] = headers
        taken = self._map["taken"]
        taken[0] = 0
        while (done := int(taken[0])) < count:
            try:
                self._run(self._packet, count - done)
            except InterruptedError:  # by a signal, between two frames
                continue
            if taken[0] != count:
                raise OSError(errno.EIO, f"the replay program has stopped at frame {taken[0]} of {count}")

    def _leave_short(self, some: Sequence[CapturedFrame]) -> None:
        whole = [each for each in some if len(each[1]) >= _ETHERNET_OCTETS]
        for _, frame, wire_octets, _ in some:
            if len(frame) < _ETHERNET_OCTETS:
                for counter in ("seen", "not_metered_truncated"):
                    self._table.count(counter, 1, wire_octets)
        if whole:
            self._feed(whole)
