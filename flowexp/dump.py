# SPDX-License-Identifier: GPL-2.0-or-later
"""One-shot flow dumps: from the running exporter's table, from a capture, or by metering for a while.

Nothing of a running exporter is consumed or changed: its table is read where it is pinned.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Callable, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .arrange import aggregate_spec, aggregated, first, in_order, only
from .capture import read_capture
from .config import Config
from .errors import UsageError
from .exporter import timeouts_of
from .forms import CsvForm, Form, JsonForm
from .identity import observation_domain_id
from .kernel import netlink
from .kernel.attach import Attacher, programs_for
from .kernel.family import Family
from .kernel.flows import Columns, columns
from .kernel.joins import is_asked, joins_for
from .kernel.layout import Array, Layout
from .kernel.loader import loader_named
from .kernel.pins import PinFolder
from .kernel.table import FlowTable
from .meter import Batch, MeteringProcess, new_table, this_layout, unix_offset_ns
from .metering.sweep import ACTIVE
from .output import discard, put
from .protocol.ipfix import MessageEncoder
from .protocol.record import columns_to_values
from .protocol.template import DEFAULT, Templates, TemplateSpec, build_templates, template_spec, with_groups
from .session import CollectorSession
from .transport.file import FileTransport
from .until_told import until_told
from .view import TableForm, human

_log = logging.getLogger(__name__)

IPFIX = "ipfix"
_SECOND_NS = 1_000_000_000
_PROGRESS_S = 0.5
_AT_ONCE = 16384  # flows that become text together: more of it would wait for memory longer than it takes to make


class Shape(NamedTuple):
    """What becomes of the flows before they are shown."""

    aggregate: Optional[str] = None  # the keys to sum over, as --aggregate has them
    sort: Optional[str] = None  # by one of arrange.ORDERS
    limit: Optional[int] = None
    totals: bool = False  # what flows count since their birth, and those that owe no record, too
    names: bool = False  # of services and interfaces


AS_THEY_ARE = Shape()


def dump(
    *,
    interfaces: Sequence[str],
    duration_s: float,
    capture: Optional[Path],
    form: str,
    output: Optional[Path],
    config: Config,
    chosen: Optional[Callable[[Columns], Columns]] = None,
    shape: Shape = AS_THEY_ARE,
) -> None:
    """Writes flows to `output` (None: standard output) in the format `form`.

    `chosen`: takes some of the flows, None: all. `config`: timeouts, table size and where a running
    exporter's table is pinned. FlowexpError for what goes wrong, UsageError for what cannot be asked together.
    SIGINT and SIGTERM end the metering or the reading: what there is then is shown.
    """
    if capture is not None and interfaces:
        raise UsageError("--read and --interface cannot go together: a capture has interfaces of its own")
    if form == IPFIX and output is None:
        raise UsageError("--format ipfix is binary; name a file for it with -o FILE")
    if shape.names and form != "table":
        raise UsageError(f"--names is for --format table: {form} has numbers, which every program understands")
    spec = None if shape.aggregate is None else aggregate_spec(shape.aggregate)
    groups: Sequence[str] = config.fields.groups
    if capture is not None:
        groups = [name for name in groups if not is_asked(name)]
    pins = PinFolder(config.table.pin_path)
    if capture is None and pins.is_held():
        layout = this_layout(loader_named(config.loader))
        flows, groups = from_exporter(pins, interfaces, layout, totals=shape.totals)
    elif shape.totals:
        raise UsageError("--totals is of a running exporter's table; elsewhere nothing was exported before")
    elif capture is not None:
        flows = from_capture(capture, config)
    else:
        flows = from_interfaces(interfaces, duration_s, config)
    flows = flows if chosen is None else map(chosen, flows)
    if spec is not None:
        flows = aggregated(flows, spec)
    else:
        spec = _TOTALS if shape.totals else with_groups(DEFAULT, groups)
    ordered = _Ordered.of(flows, shape)
    if form == IPFIX:
        assert output is not None
        _write_ipfix(ordered.in_families(), output, build_templates(spec))
    else:
        _write(ordered, build_templates(spec, tcp_control_bits_octets=2), _form_maker(form, spec, shape.names), output)


_TOTALS = template_spec("totals", (str(field).replace("DeltaCount", "TotalCount") for field in DEFAULT.fields))


def from_capture(path: Path, config: Config) -> Iterator[Columns]:
    """Every packet of a capture through the packet path; flows expire on the capture's clock."""
    meter = MeteringProcess(
        new_table(config.table.max_flows, loader_named(config.loader), config.fields.groups),
        loader=loader_named(config.loader),
        programs=("replay",),
        max_flows=config.table.max_flows,
        unix_offset=lambda: 0,
        wait=lambda: None,  # no program runs beside us
    )
    timeouts, interval_ns = timeouts_of(config), config.timeouts.sweep_interval_ns
    feed = meter.replay().feed
    next_sweep_ns: Optional[int] = None
    progress, packets = _Progress(path), 0
    with until_told() as wait:
        for frames in read_capture(path):
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
    attacher = Attacher(
        meter.programs,
        meter.ingress_map,
        direction=config.direction,
        hook=config.hook,
        xdp_force=config.xdp_force,
        skip_stacked=config.skip_stacked,
    )
    timeouts, interval_ns = timeouts_of(config), config.timeouts.sweep_interval_ns
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
    maps = pins.tables()[-1].find_maps(FlowTable.map_names(layout))
    if maps is None:
        return iter(()), ()
    table = FlowTable.adopt(layout, maps)
    only = [interface.ifindex for interface in netlink.resolve_at_start(patterns)] if patterns else None
    return (_snapshot(table, family, only, totals) for family in table.families), table.groups


def _snapshot(table: FlowTable, family: Family, ifindexes: Optional[List[int]], totals: bool) -> Columns:
    """Flows as they are now, while packets and sweeps go on: a slot that was given back meanwhile is left out."""
    slots = family.occupied()
    hot, cold = family.read(slots)
    chosen = family.holds_flow(hot["ctl"]) & (family.hot(slots)["ctl"] == hot["ctl"])
    if not totals:
        chosen &= (hot["packets"] > cold["exported_packets"]) & (hot["octets"] > cold["exported_octets"])
    if ifindexes is not None:
        chosen &= np.isin(hot["ifindex"], ifindexes)
    hot, cold = hot[chosen], cold[chosen]
    first_ns = cold["first_ns"] if totals else np.maximum(cold["first_ns"], cold["exported_ns"])
    flows = columns(
        family.version,
        hot,
        cold,
        layout=table.layout,
        start_ns=first_ns.view(np.int64),
        reasons=np.full(len(hot), ACTIVE, np.uint8),
        unix_offset_ns=unix_offset_ns(),
        groups=family.groups.read(slots[chosen]),
    )
    return {**flows, "octets": flows["octets_total"], "packets": flows["packets_total"]} if totals else flows


class _Ordered(NamedTuple):
    """Flows, and the numbers of those that are shown, in their order; None: all as they come."""

    parts: Iterable[Columns]
    order: Optional[Array]

    @classmethod
    def of(cls, flows: Iterable[Columns], shape: Shape) -> _Ordered:
        """What is wrong with the flows' source shows here, before anything is written."""
        if shape.sort is not None:
            return cls(*in_order(flows, shape.sort, shape.limit))
        flows = iter(flows if shape.limit is None else first(flows, shape.limit))
        return cls(chain(list(islice(flows, 1)), flows), None)

    def in_families(self) -> Iterable[Columns]:
        """Them as Columns, so that only each address family is in order."""
        return self.parts if self.order is None else only(self.parts, self.order)[0]

    def text(self, templates: Templates, form: Form) -> Iterator[str]:
        """Their lines, _AT_ONCE flows in each; where they come as they come, as soon as they are there."""
        for parts, order in self._pieces():
            lines = list(chain.from_iterable(_lines(part, templates, form) for part in parts))
            yield "".join(lines if order is None else map(lines.__getitem__, order.tolist()))

    def _pieces(self) -> Iterator[Tuple[Sequence[Columns], Optional[Array]]]:
        if self.order is not None:
            for begin in range(0, len(self.order), _AT_ONCE):
                yield only(self.parts, self.order[begin : begin + _AT_ONCE])
            return
        for part in self.parts:
            for begin in range(0, len(part["packets"]), _AT_ONCE):
                yield [{name: column[begin : begin + _AT_ONCE] for name, column in part.items()}], None


def _lines(flows: Columns, templates: Templates, form: Form) -> List[str]:
    """Each flow's, in their order."""
    lines = [""] * len(flows["packets"])
    for values, places in columns_to_values(flows, templates):
        for place, line in zip(places, form.lines(values)):
            lines[place] = line
    return lines


def _form_maker(form: str, spec: TemplateSpec, names: bool) -> Callable[[IO[str]], Form]:
    if form == "json":
        return lambda stream: JsonForm()
    elements = [name for template in build_templates(spec).all() for name in template.names]
    if form == "csv":
        return lambda stream: CsvForm(elements)
    return partial(TableForm, names=names, elements=None if spec.name == DEFAULT.name else elements)


def _write(flows: _Ordered, templates: Templates, make_form: Callable[[IO[str]], Form], output: Optional[Path]) -> None:
    with ExitStack() as stack:
        stream: IO[str] = sys.stdout
        if output is not None:
            try:
                stream = stack.enter_context(output.open("w", encoding="utf-8"))
            except OSError as error:
                raise UsageError(f"{output}: cannot be written: {error.strerror}") from error
        form = make_form(stream)
        try:
            for text in chain([form.head], flows.text(templates, form)):
                put(text, stream, str(output or "standard output"))
        except BrokenPipeError:
            discard(stream)


def _write_ipfix(flows: Iterable[Columns], path: Path, templates: Templates) -> None:
    """An IPFIX File (RFC 5655); one that is there is written anew."""
    try:
        path.open("wb").close()
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    transport = FileTransport(str(path))
    transport.open()
    encoder = MessageEncoder(
        observation_domain_id=observation_domain_id(0),
        max_message_octets=transport.max_message_octets(),
        templates=templates,
    )
    session = CollectorSession(transport, encoder, refresh_ns=sys.maxsize)
    for part in flows:
        session.send(part, 0, -(-time.time_ns() // _SECOND_NS))
        if session.trouble is not None:
            raise session.trouble
    transport.close()
