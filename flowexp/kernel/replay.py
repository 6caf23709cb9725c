# SPDX-License-Identifier: GPL-2.0-or-later
"""Captured frames through the packet path itself: BPF_PROG_TEST_RUN of the replay program.

It takes the place of a hook: same parsing, same table, but the times and lengths are the
capture's. Only headers are handed over, as the IP header tells how long the packet was, but where payloads count.

Frames lie in memory that the program shares, and each of its runs takes the next one: one system call a thousand
frames, 0.2 us a frame where a call for each took 6.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Iterable, Iterator, NamedTuple, Union

import numpy as np

from ..errors import FlowexpError
from . import libbpf
from .family import Mapped
from .layout import Array
from .table import FlowTable

_ETHERNET_OCTETS = 14
_HEADERS_OCTETS = 512  # of each frame, where nobody looks at payloads


class CapturedPacket(NamedTuple):
    """One packet of a capture."""

    time_ns: int  # Unix time
    frame: bytes  # Ethernet, network order, as far as it was captured; empty where its link header was cut
    wire_octets: int  # of the whole frame
    interface: int  # 0; pcapng: number of the interface in its section, plus one


@dataclass(frozen=True)
class Frames:
    """Packets of a capture, in its order: `octets` holds their frames, the rest has an element a packet.

    begin (ascending) and captured_octets say where in `octets` a frame is; the others are as in CapturedPacket.
    """

    octets: Union[bytes, memoryview]
    begin: Array  # i64
    captured_octets: Array  # i64
    time_ns: Array  # i64
    wire_octets: Array  # u32
    interface: Array  # u32

    @classmethod
    def of(cls, packets: Iterable[CapturedPacket]) -> Frames:
        times, frames, wire_octets, interfaces = list(zip(*packets)) or ((), (), (), ())
        captured = np.fromiter(map(len, frames), np.int64, len(frames))
        return cls(
            b"".join(frames),
            np.cumsum(captured) - captured,
            captured,
            np.array(times, np.int64),
            np.array(wire_octets, np.uint32),
            np.array(interfaces, np.uint32),
        )

    def __len__(self) -> int:
        return len(self.begin)

    def __iter__(self) -> Iterator[CapturedPacket]:
        columns = (self.time_ns, self.begin, self.captured_octets, self.wire_octets, self.interface)
        for time_ns, begin, captured, wire_octets, interface in zip(*(column.tolist() for column in columns)):
            yield CapturedPacket(time_ns, bytes(self.octets[begin : begin + captured]), wire_octets, interface)

    def __getitem__(self, chosen: Union[slice, Array]) -> Frames:
        return Frames(
            self.octets,
            self.begin[chosen],
            self.captured_octets[chosen],
            self.time_ns[chosen],
            self.wire_octets[chosen],
            self.interface[chosen],
        )


class Replay:
    """Feeds frames over `table` to the replay program, whose descriptor is `program_fd`, through its map `captured`."""

    def __init__(self, table: FlowTable, program_fd: int, captured_fd: int) -> None:
        layout = table.layout.structs["captured"]
        fields = layout.fields
        assert fields is not None
        mapped = Mapped(captured_fd, layout.itemsize)
        captured = mapped.array(layout)
        self._table = table
        self._next, self._frames = captured["next"], captured["frame"][0]
        self._octets = mapped.array(np.dtype(np.uint8))[fields["octets"][1] :]
        self._span_octets = fields["octets"][0].itemsize
        self._frame_octets = fields["beyond"][0].itemsize if "application" in table.groups else _HEADERS_OCTETS
        self._run = libbpf.TestRun(program_fd, np.zeros(table.layout.structs["__sk_buff"].itemsize, np.uint8)).run

    def feed(self, frames: Frames) -> None:
        """These frames, in their order. One that is too short for an Ethernet header is not metered: truncated."""
        is_cut = frames.captured_octets < _ETHERNET_OCTETS
        if is_cut.any():
            for counter in ("seen", "not_metered_truncated"):
                self._table.count(counter, int(is_cut.sum()), int(frames.wire_octets[is_cut].sum(dtype=np.uint64)))
            frames = frames[~is_cut]
        at = 0
        while at < len(frames):
            in_reach = int(np.searchsorted(frames.begin, frames.begin[at] + self._span_octets))
            end = min(in_reach, at + len(self._frames))
            self._feed(frames[at:end])
            at = end

    def _feed(self, frames: Frames) -> None:
        """As many as there is room for."""
        first, count = int(frames.begin[0]), len(frames)
        octets = np.minimum(frames.captured_octets, self._frame_octets)
        span = int(frames.begin[-1] + octets[-1]) - first
        self._octets[:span] = np.frombuffer(frames.octets, np.uint8, span, first)
        for name, column in (
            ("time_ns", frames.time_ns),
            ("wire_octets", frames.wire_octets),
            ("interface", frames.interface),
            ("begin", frames.begin - first),
            ("octets", octets),
        ):
            self._frames[name][:count] = column
        self._next[0] = done = 0
        while done < count:
            try:
                self._run(bytes(self._frame_octets), repeat=count - done)
            except OSError as error:
                if error.errno != errno.EINTR:  # a signal: the rest has to be asked for again
                    raise
            before, done = done, int(self._next[0])
            if done == before:
                raise FlowexpError(f"the kernel takes no frame of {octets[done]} octets from a capture")
