# SPDX-License-Identifier: GPL-2.0-or-later
"""The map of interfaces that have a sampling interval of their own (bpf/sampling.h)."""

from __future__ import annotations

import errno
from typing import Dict, Mapping

import numpy as np

from ..errors import FlowexpError
from ..rates import Rates
from . import libbpf
from .layout import Layout
from .table import possible_cpus


class Samplers:
    """`map_fd`: of the programs; `rates`: of the table that they fill. At first no interface is in the map."""

    def __init__(self, map_fd: int, layout: Layout, rates: Rates) -> None:
        self._map_fd, self._layout, self._rates = map_fd, layout, rates
        self._intervals: Dict[int, int] = {}

    def follow(self, intervals: Mapping[int, int]) -> None:
        """Interfaces, by ifindex, have these intervals, which are the table's; all others have its first.

        Whose interval stays goes on in its windows. FlowexpError where the map is full.
        """
        if not self._rates.own:
            return
        wanted = {ifindex: each for ifindex, each in intervals.items() if each != self._rates.intervals[0]}
        for ifindex in self._intervals.keys() - wanted.keys():
            libbpf.delete(self._map_fd, ifindex)
            del self._intervals[ifindex]
        for ifindex, interval in wanted.items():
            if self._intervals.get(ifindex) != interval:
                self._set(ifindex, interval)

    def _set(self, ifindex: int, interval: int) -> None:
        sampler = np.zeros(1, self._layout.structs["sampler"])
        sampler["interval"], sampler["rate"] = interval, self._rates.intervals.index(interval)
        try:
            libbpf.update_on_each_cpu(self._map_fd, ifindex, sampler.tobytes(), possible_cpus())
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            raise FlowexpError(
                "more interfaces have a sampling interval of their own than there is room for"
            ) from error
        self._intervals[ifindex] = interval
