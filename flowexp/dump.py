# SPDX-License-Identifier: GPL-2.0-or-later
"""One-shot flow dumps: from the running exporter's table, from a capture, or by metering for a while.

Nothing of a running exporter is consumed or changed: its table is read where it is pinned.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from .as_table import AsNumbers, as_table_of
from .capture import CutOff, read_capture
from .config import Config
from .errors import UsageError
from .kernel import netlink
from .kernel.attach import Attacher, programs_for
from .kernel.family import Family
from .kernel.flows import Columns, columns
from .kernel.joins import is_asked, joins_for
from .kernel.layout import Layout
from .kernel.loader import loader_named
from .kernel.owners import handle_for_once
from .kernel.pins import PinFolder
from .kernel.replay import Frames
from .kernel.table import FlowTable
from .listing import Listing, Shape
from .meter import Batch, MeteringProcess, new_table, this_layout, unix_offset_ns
from .metering.sweep import ACTIVE
from .output import Destination
from .protocol.fieldgroups import AS_NUMBERS
from .until_told import until_told
from .view import human

_log = logging.getLogger(__name__)

_SECOND_NS = 1_000_000_000
_PROGRESS_S = 0.5


def dump(
    *,
    interfaces: Sequence[str],
    duration_s: float,
    capture: Optional[Path],
    form: str,
    output: Optional[Path],
    config: Config,
    chosen: Optional[Callable[[Columns], Columns]],
    shape: Shape,
) -> None:
    """Writes flows to `output` (None: standard output) in the format `form`.

    `chosen`: takes some of the flows, None: all. `config`: timeouts, table size and where a running
    exporter's table is pinned. FlowexpError for what goes wrong, UsageError for what cannot be asked together.
    SIGINT and SIGTERM end the metering or the reading: what there is then is shown. What there is of a capture that
    is cut off is shown, too, before that is an error.
    """
    if capture is not None and interfaces:
        raise UsageError("--read and --interface cannot go together: a capture has interfaces of its own")
    if capture is not None and output is not None and _is_same(capture, output):
        raise UsageError(f"{output}: cannot be written: it is the capture that --read reads")
    cut_off: List[CutOff] = []

    def source() -> Tuple[Iterator[Columns], Sequence[str]]:
        pins = PinFolder(config.table.pin_path)
        if capture is None and pins.is_held():
            layout = this_layout(loader_named(config.loader))
            return from_exporter(pins, interfaces, layout, totals=shape.totals)
        if shape.totals:
            raise UsageError("--totals is of a running exporter's table; elsewhere nothing was exported before")
        if capture is None:
            return from_interfaces(interfaces, duration_s, config), config.fields.groups
        groups = [name for name in config.fields.groups if not is_asked(name)]
        return from_capture(capture, config, cut_off.append), groups

    is_plain = form == "table" and shape.aggregate is None and chosen is None
    as_table = None if is_plain else as_table_of(config.fields)  # a large file takes seconds, and that shows none of it
    listing = Listing(form, shape, to_file=output is not None, of_here=capture is None)
    with nullcontext() if output is None else Destination(output) as destination:
        flows, groups = source()
        if as_table is not None:
            flows, groups = map(AsNumbers(as_table), flows), [*groups, AS_NUMBERS]
        listing.write(flows if chosen is None else map(chosen, flows), groups, destination)
    for error in cut_off:
        raise error


def _is_same(capture: Path, output: Path) -> bool:
    try:
        return capture.samefile(output)
    except OSError:  # what is wrong with either is told where it is opened
        return False


def from_capture(path: Path, config: Config, cut_off: Callable[[CutOff], None]) -> Iterator[Columns]:
    """Every packet of a capture through the packet path; flows expire on the capture's clock.

    cut_off: is told if the capture ends before its time; the flows of all packets before that come still.
    """
    meter = MeteringProcess(
        new_table(config.table.max_flows, loader_named(config.loader), config.fields.groups),
        loader=loader_named(config.loader),
        programs=("replay",),
        max_flows=config.table.max_flows,
        unix_offset=lambda: 0,
        wait=lambda: None,  # no program runs beside us
    )
    timeouts, interval_ns = config.timeouts.for_sweep, config.timeouts.sweep_interval_ns
    feed = meter.replay().feed
    next_sweep_ns: Optional[int] = None
    progress, packets = _Progress(path), 0
    with until_told() as wait:
        for frames in _until(read_capture(path), cut_off):
            if next_sweep_ns is None:
                next_sweep_ns = int(frames.time_ns[0]) + interval_ns
            while (is_due := frames.time_ns >= next_sweep_ns).any():
                due = int(is_due.argmax())
                feed(frames[:due])
                now_ns = int(frames.time_ns[due])
                yield from _taken(meter.sweep(timeouts, now_ns))
                next_sweep_ns = now_ns + interval_ns
                frames, packets = frames[due:], packets + due
            feed(frames)
            meter.look()
            packets += len(frames)
            progress.show(packets)
            if wait(0):
                _log.warning("%s: told to end after %d packets", path, packets)
                break
    progress.end()
    yield from _taken(meter.drain())
    _log.info("%s: %s", path, meter.ledger())
    meter.close()


def _until(capture: Iterator[Frames], cut_off: Callable[[CutOff], None]) -> Iterator[Frames]:
    try:
        yield from capture
    except CutOff as error:
        cut_off(error)


class _Progress:
    """How far a capture has been read, on a terminal: nothing in the first second, then twice a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._due_s = time.monotonic() + 2 * _PROGRESS_S if sys.stderr.isatty() else math.inf
        self._is_shown = False

    def show(self, packets: int) -> None:
        """So many have been read."""
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _PROGRESS_S
            self._is_shown = True
            sys.stderr.write(f"\r\x1b[Kflowexp: {self._path}: {human(packets)} packets so far")
            sys.stderr.flush()

    def end(self) -> None:
        """Leaves an empty line behind."""
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")


def from_interfaces(patterns: Sequence[str], duration_s: float, config: Config) -> Iterator[Columns]:
    """Meters for `duration_s`, or until told to end, over a table of its own; leaves nothing behind."""
    wanted = netlink.resolve_at_start(patterns or config.interfaces)
    if not wanted:
        raise UsageError(f"interfaces {', '.join(patterns or config.interfaces)}: none is here; name one with -i")
    meter = MeteringProcess(
        new_table(config.table.max_flows, loader_named(config.loader), config.fields.groups),
        loader=loader_named(config.loader),
        programs=programs_for(wanted, direction=config.direction, hook=config.hook),
        max_flows=config.table.max_flows,
        egress_once=config.direction == "once",
        joins=joins_for(config.fields.groups),
    )
    timeouts, interval_ns = config.timeouts.for_sweep, config.timeouts.sweep_interval_ns
    with handle_for_once() as handle:
        attacher = Attacher(
            meter.programs,
            meter.ingress_map,
            handle=handle,
            direction=config.direction,
            hook=config.hook,
            xdp_force=config.xdp_force,
            skip_stacked=config.skip_stacked,
        )
        try:
            attacher.follow(wanted)
            end_ns = time.monotonic_ns() + int(duration_s * _SECOND_NS)
            with until_told() as wait:
                told = False
                while not told and (left_ns := end_ns - time.monotonic_ns()) > 0:
                    told = wait(min(left_ns, interval_ns) / _SECOND_NS)
                    yield from _taken(meter.sweep(timeouts, time.monotonic_ns()))
        finally:
            attacher.detach_all()
    yield from _taken(meter.drain())
    _log.info("%s", meter.ledger())
    meter.close()


def _taken(batches: Iterable[Batch]) -> Iterator[Columns]:
    for batch in batches:
        yield batch.columns
        batch.done()


def from_exporter(
    pins: PinFolder, patterns: Sequence[str], layout: Layout, *, totals: bool = False
) -> Tuple[Iterator[Columns], Sequence[str]]:
    """What the running exporter has not exported yet, of all its interfaces or of those named; its field groups.

    totals: all that its flows have counted since they began.
    """
    maps = pins.newest().find_maps(FlowTable.map_names(layout))
    if maps is None:
        raise pins.no_table()
    table = FlowTable.adopt(layout, maps)
    only = [interface.ifindex for interface in netlink.resolve_at_start(patterns)] if patterns else None
    return (_snapshot(table, family, only, totals) for family in table.families), table.groups


def _snapshot(table: FlowTable, family: Family, ifindexes: Optional[List[int]], totals: bool) -> Columns:
    """Flows as they are now."""
    slots, hot, cold = family.look()
    chosen = np.ones(len(slots), bool)
    if not totals:
        chosen &= (hot["packets"] > cold["exported_packets"]) & (hot["octets"] > cold["exported_octets"])
    if ifindexes is not None:
        chosen &= np.isin(hot["ifindex"], ifindexes)
    hot, cold = hot[chosen], cold[chosen]
    return columns(
        family.version,
        hot,
        cold,
        layout=table.layout,
        reasons=np.full(len(hot), ACTIVE, np.uint8),
        unix_offset_ns=unix_offset_ns(),
        groups=family.groups.read(slots[chosen]),
        since_birth=totals,
    )
