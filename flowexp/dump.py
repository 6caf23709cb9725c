# SPDX-License-Identifier: GPL-2.0-or-later
"""One-shot flow dumps: from the running exporter's table, from a capture, or by metering for a while.

Nothing of a running exporter is consumed or changed: its table is read where it is pinned.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import IO, Callable, Iterable, Iterator, List, Optional, Sequence

import numpy as np

from .capture import read_capture
from .config import Config
from .errors import UsageError
from .exporter import timeouts_of
from .identity import observation_domain_id
from .kernel import netlink
from .kernel.attach import HOOK_PROGRAMS, Attacher
from .kernel.flows import Columns, columns
from .kernel.layout import Layout
from .kernel.loader import loader_named
from .kernel.pins import PinFolder
from .kernel.replay import Replay
from .kernel.table import Family, FlowTable
from .meter import Batch, MeteringProcess, new_table, this_layout, unix_offset_ns
from .metering.sweep import ACTIVE
from .protocol.ipfix import MessageEncoder
from .protocol.record import columns_to_records
from .protocol.template import default_templates
from .session import CollectorSession
from .transport.file import FileTransport
from .view import FORMATS

_log = logging.getLogger(__name__)

IPFIX = "ipfix"
_SECOND_NS = 1_000_000_000


def dump(
    *,
    interfaces: Sequence[str],
    duration_s: float,
    capture: Optional[Path],
    form: str,
    output: Optional[Path],
    config: Config,
    chosen: Optional[Callable[[Columns], Columns]] = None,
) -> None:
    """Writes flows to `output` (None: standard output) in the format `form`.

    `chosen`: takes some of the flows, None: all. `config`: timeouts, table size and where a running
    exporter's table is pinned. FlowexpError for what goes wrong, UsageError for what cannot be asked together.
    """
    if capture is not None and interfaces:
        raise UsageError("--read and --interface cannot go together: a capture has interfaces of its own")
    if form == IPFIX and output is None:
        raise UsageError("--format ipfix is binary; name a file for it with -o FILE")
    if capture is not None:
        flows = from_capture(capture, config)
    else:
        pins = PinFolder(config.table.pin_path)
        if pins.is_held():
            flows = from_exporter(pins, interfaces, this_layout(loader_named(config.loader)))
        else:
            flows = from_interfaces(interfaces, duration_s, config)
    _write(flows if chosen is None else map(chosen, flows), form, output)


def from_capture(path: Path, config: Config) -> Iterator[Columns]:
    """Every packet of a capture through the packet path; flows expire on the capture's clock."""
    meter = MeteringProcess(
        new_table(config.table.max_flows, loader_named(config.loader)),
        loader=loader_named(config.loader),
        programs=("replay",),
        max_flows=config.table.max_flows,
        unix_offset=lambda: 0,
        wait=lambda: None,  # no program runs beside us
    )
    timeouts, interval_ns = timeouts_of(config), config.timeouts.sweep_interval_ns
    feed = Replay(meter.table, meter.programs["replay"]).feed
    next_sweep_ns: Optional[int] = None
    for packet in read_capture(path):
        if next_sweep_ns is None:
            next_sweep_ns = packet.time_ns + interval_ns
        elif packet.time_ns >= next_sweep_ns:
            yield from _taken(meter.sweep(timeouts, packet.time_ns))
            next_sweep_ns = packet.time_ns + interval_ns
        feed(packet.frame, time_ns=packet.time_ns, wire_octets=packet.wire_octets, interface=packet.interface)
    yield from _taken(meter.drain())
    _log.info("%s: %s", path, meter.ledger())
    meter.close()


def from_interfaces(patterns: Sequence[str], duration_s: float, config: Config) -> Iterator[Columns]:
    """Meters for `duration_s`, or until Ctrl-C, over a table of its own; leaves nothing behind."""
    wanted = netlink.resolve_at_start(patterns or config.interfaces)
    if not wanted:
        raise UsageError(f"interfaces {', '.join(patterns or config.interfaces)}: none is here; name one with -i")
    meter = MeteringProcess(
        new_table(config.table.max_flows, loader_named(config.loader)),
        loader=loader_named(config.loader),
        programs=HOOK_PROGRAMS,
        max_flows=config.table.max_flows,
        egress_once=config.direction == "once",
    )
    attacher = Attacher(
        meter.programs,
        meter.ingress_map,
        direction=config.direction,
        hook=config.hook,
        xdp_force=config.xdp_force,
    )
    timeouts, interval_ns = timeouts_of(config), config.timeouts.sweep_interval_ns
    try:
        attacher.follow(wanted)
        end_ns = time.monotonic_ns() + int(duration_s * _SECOND_NS)
        while (left_ns := end_ns - time.monotonic_ns()) > 0:
            time.sleep(min(left_ns, interval_ns) / _SECOND_NS)
            yield from _taken(meter.sweep(timeouts, time.monotonic_ns()))
    except KeyboardInterrupt:
        pass
    finally:
        attacher.detach_all()
    yield from _taken(meter.drain())
    _log.info("%s", meter.ledger())
    meter.close()


def _taken(batches: Iterable[Batch]) -> Iterator[Columns]:
    for batch in batches:
        yield batch.columns
        batch.done()


def from_exporter(pins: PinFolder, patterns: Sequence[str], layout: Layout) -> Iterator[Columns]:
    """What the running exporter has not exported yet, of all its interfaces or of those named."""
    maps = pins.tables()[-1].find_maps(FlowTable.map_names(layout))
    if maps is None:
        return
    table = FlowTable.adopt(layout, maps)
    only = [interface.ifindex for interface in netlink.resolve_at_start(patterns)] if patterns else None
    for family in table.families:
        yield _snapshot(table, family, only)


def _snapshot(table: FlowTable, family: Family, ifindexes: Optional[List[int]]) -> Columns:
    """Flows as they are now, while packets and sweeps go on: a slot that was given back meanwhile is left out."""
    slots = family.occupied()
    hot, cold = family.read(slots)
    chosen = family.holds_flow(hot["ctl"]) & (family.hot(slots)["ctl"] == hot["ctl"])
    chosen &= (hot["packets"] > cold["exported_packets"]) & (hot["octets"] > cold["exported_octets"])
    if ifindexes is not None:
        chosen &= np.isin(hot["ifindex"], ifindexes)
    hot, cold = hot[chosen], cold[chosen]
    return columns(
        family.version,
        hot,
        cold,
        layout=table.layout,
        start_ns=np.maximum(cold["first_ns"], cold["exported_ns"]).view(np.int64),
        reasons=np.full(len(hot), ACTIVE, np.uint8),
        unix_offset_ns=unix_offset_ns(),
    )


def _write(flows: Iterable[Columns], form: str, output: Optional[Path]) -> None:
    flows = iter(flows)
    first = list(islice(flows, 1))  # what is wrong with the source shows before anything is written
    flows = chain(first, flows)
    if form == IPFIX:
        assert output is not None
        _write_ipfix(flows, output)
        return
    with ExitStack() as stack:
        stream: IO[str] = sys.stdout
        if output is not None:
            try:
                stream = stack.enter_context(output.open("w", encoding="utf-8"))
            except OSError as error:
                raise UsageError(f"{output}: cannot be written: {error.strerror}") from error
        try:
            FORMATS[form]((record for part in flows for record in columns_to_records(part)), stream)
            stream.flush()
        except BrokenPipeError:  # who reads our output has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write_ipfix(flows: Iterable[Columns], path: Path) -> None:
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
        templates=default_templates(),
    )
    session = CollectorSession(transport, encoder, refresh_ns=sys.maxsize)
    for part in flows:
        session.send(part, 0, -(-time.time_ns() // _SECOND_NS))
        if session.trouble is not None:
            raise session.trouble
    transport.close()
