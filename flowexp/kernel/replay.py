# SPDX-License-Identifier: GPL-2.0-or-later
"""Captured frames through the packet path itself: BPF_PROG_TEST_RUN of the replay program.

It takes the place of a hook: same parsing, same table, but the times and lengths are the
capture's. Only headers are handed over: the IP header tells how long the packet was.
"""

from __future__ import annotations

import errno

import numpy as np

from . import libbpf
from .table import FlowTable

_HEADER_OCTETS = 512  # of each frame; the kernel takes no frame of more than about 3,700


class Replay:
    """Feeds frames to the replay program, whose descriptor is `program_fd`, over `table`."""

    def __init__(self, table: FlowTable, program_fd: int) -> None:
        self._table = table
        context = np.zeros(1, table.layout.structs["__sk_buff"])
        self._cb, self._tstamp = context["cb"][0], context["tstamp"]
        self._run = libbpf.TestRun(program_fd, context.view(np.uint8)).run

    def feed(self, frame: bytes, *, time_ns: int, wire_octets: int, interface: int = 0) -> None:
        """One Ethernet frame, as far as it was captured; wire_octets is its whole length on the wire.

        A frame that the kernel refuses because it is too short for its headers is not metered: truncated.
        """
        self._cb[0], self._cb[1] = wire_octets, interface
        self._tstamp[0] = time_ns
        try:
            self._run(frame[:_HEADER_OCTETS])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            for counter in ("seen", "not_metered_truncated"):
                self._table.count(counter, 1, wire_octets)
