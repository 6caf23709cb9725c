# SPDX-License-Identifier: GPL-2.0-or-later
"""The flows of the running exporter as they grow: a snapshot of its table each interval, and rates between two.

Nothing of the exporter is consumed or changed: its table is read where it is pinned. Rates are of all flows;
what a filter leaves out is left out afterwards. Only the rows that are shown become text.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Callable, ContextManager, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from .arrange import row_octets
from .config import Config
from .errors import FlowexpError, UsageError
from .kernel import netlink
from .kernel.family import Family
from .kernel.flows import Columns, columns
from .kernel.layout import Array, Layout
from .kernel.loader import loader_named
from .kernel.pins import PinFolder
from .kernel.table import FlowTable
from .meter import this_layout, unix_offset_ns
from .metering.sweep import ACTIVE
from .names import protocol_name
from .output import discard, put
from .prompt import ENTER, ESCAPE, FilterPrompt, Select, selection
from .view import can_be_live, human, live, screen, terminal_size

GROUPS = {"f": "flow", "h": "host", "P": "port", "i": "interface"}
ORDERS = {"b": "bit/s", "r": "pkt/s", "o": "octets", "p": "packets", "n": "flows"}
_HELP = "show: f flow h host P port i iface  sort: bropn  / filter  space pause  q quit"
_HISTORY_S = 60
_PLAIN_ROWS = 50  # where there is no terminal whose height would say
_BARS = "▁▂▃▄▅▆▇█"
_EGRESS = 1


def top(
    *,
    interfaces: Sequence[str],
    config: Config,
    expression: str,
    by: str,
    interval_s: float,
    count: Optional[int],
) -> None:
    """Shows a screen each `interval_s`, `count` times or until it is told to end.

    On a terminal it takes the whole screen, and keys; elsewhere it writes plain text. `expression`: the filter, "":
    all flows. FilterError, and FlowexpError where no exporter runs on the table that `config` names.
    """
    watch = Watch(config, interfaces, selection(expression))
    display = Display(by, expression=expression, history=deque(maxlen=max(1, round(_HISTORY_S / interval_s))))
    display.add(watch.look(time.monotonic_ns()))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the terminal is put right whichever way it ends
    try:
        if can_be_live(sys.stdout):
            _show_live(watch, display, interval_s, count)
        else:
            _print(watch, display, interval_s, count)
    except KeyboardInterrupt:
        pass


def _print(watch: Watch, display: Display, interval_s: float, count: Optional[int]) -> None:
    printed = 0
    try:
        while count is None or printed < count:
            time.sleep(interval_s)
            display.add(watch.look(time.monotonic_ns()))
            put(display.text() + "\n", sys.stdout, "standard output")
            printed += 1
    except BrokenPipeError:
        discard(sys.stdout)


def _show_live(watch: Watch, display: Display, interval_s: float, count: Optional[int]) -> None:
    keys: ContextManager[Callable[[Optional[float]], str]] = _keys() if sys.stdin.isatty() else nullcontext(_no_keys)
    shown = 0
    with keys as next_key, live(sys.stdout) as show:
        while count is None or shown < count:
            due_s = time.monotonic() + interval_s
            show(display.text(terminal_size(sys.stdout)))
            while display.paused or time.monotonic() < due_s:
                key = next_key(None if display.paused else max(0.0, due_s - time.monotonic()))
                if key == "q" and display.prompt is None:
                    return
                if key:
                    _press(watch, display, key)
                    show(display.text(terminal_size(sys.stdout)))
            display.add(watch.look(time.monotonic_ns()))
            shown += 1


def _press(watch: Watch, display: Display, key: str) -> None:
    """Does what a key stands for. A new filter shows its flows at once."""
    prompt = display.prompt
    if prompt is None:
        display.press(key)
    elif key == ESCAPE:
        display.prompt = None
    elif key != ENTER:
        prompt.press(key)
    else:
        try:
            watch.chosen = selection(prompt.expression)
        except UsageError as error:
            prompt.refuse(error)
            return
        display.expression, display.prompt = prompt.expression.strip(), None
        display.add(watch.look(time.monotonic_ns()))


@contextmanager
def _keys() -> Iterator[Callable[[Optional[float]], str]]:
    """Waits for a key up to some seconds, or for ever (None); "" if there was none. Keys arrive without Enter."""
    terminal = sys.stdin.fileno()

    def next_key(timeout_s: Optional[float]) -> str:
        ready, _, _ = select.select([terminal], [], [], timeout_s)
        return (os.read(terminal, 1).decode("ascii", "replace") or "q") if ready else ""

    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield next_key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _no_keys(timeout_s: Optional[float]) -> str:
    time.sleep(timeout_s or 0)
    return ""


# From the table to rates


class Growth(NamedTuple):
    """The flows of a snapshot, as `joined`, and what each gained in `elapsed_s`; 0 s: there was no snapshot before."""

    flows: Columns
    elapsed_s: float


class Watch:
    """The running exporter's table, looked at again and again."""

    def __init__(self, config: Config, interfaces: Sequence[str], chosen: Optional[Select]) -> None:
        self._pins = PinFolder(config.table.pin_path)
        self._must_run()
        self._layout: Layout = this_layout(loader_named(config.loader))
        self.chosen = chosen
        self._ifindexes = [each.ifindex for each in netlink.resolve_at_start(interfaces)] if interfaces else None
        self._unix_offset_ns = unix_offset_ns()  # one for all snapshots: a flow is known by its start, too
        self._table: Optional[FlowTable] = None
        self._inode = 0
        self._before: Dict[int, Columns] = {}
        self._before_ns: Optional[int] = None

    def look(self, now_ns: int) -> Growth:
        """A snapshot, and what has grown since the last; FlowexpError where no exporter runs any more."""
        self._must_run()
        families = self._open()
        now = {family.version: self._snapshot(family) for family in families}
        elapsed_s = 0.0 if self._before_ns is None else (now_ns - self._before_ns) / 1e9
        parts = []
        for version, flows in now.items():
            octets, packets = grown(self._before.get(version), flows)
            if self._before_ns is None:
                octets, packets = np.zeros_like(octets), np.zeros_like(packets)
            shown = {**flows, "grown_octets": octets, "grown_packets": packets}
            parts.append(shown if self.chosen is None else self.chosen(shown))
        self._before, self._before_ns = now, now_ns
        return Growth(joined(parts), elapsed_s)

    def _must_run(self) -> None:
        if not self._pins.is_held():
            advice = "start one with `flowexp run`, name its configuration with -c FILE, or look as root"
            raise FlowexpError(f"no exporter runs on {self._pins.path}; {advice}")

    def _open(self) -> Sequence[Family]:
        """The families of the table that packets go to now."""
        newest = self._pins.newest()
        try:
            inode = newest.path.stat().st_ino  # a table made anew may have the old one's path
        except FileNotFoundError as error:
            raise self._pins.no_table() from error
        if self._table is None or inode != self._inode:
            maps = newest.find_maps(FlowTable.map_names(self._layout))
            if maps is None:
                raise self._pins.no_table()
            self._table, self._inode = FlowTable.adopt(self._layout, maps), inode
            self._table.close()  # its memory is all that is looked at
        return self._table.families

    def _snapshot(self, family: Family) -> Columns:
        """Flows as they are now, since their birth."""
        _, hot, cold = family.look()
        if self._ifindexes is not None:
            wanted = np.isin(hot["ifindex"], self._ifindexes)
            hot, cold = hot[wanted], cold[wanted]
        return columns(
            family.version,
            hot,
            cold,
            layout=self._layout,
            reasons=np.full(len(hot), ACTIVE, np.uint8),
            unix_offset_ns=self._unix_offset_ns,
            since_birth=True,
        )


_KEY = ("src_addr", "dst_addr", "src_port", "dst_port", "icmp_type_code", "protocol", "vlan_id", "vlan_tagged",
        "direction", "start_ns")  # fmt: skip


def _keys_of(flows: Columns) -> Array:
    """What tells a flow from all others, one byte string a flow: its Flow Key, Observation Point and start."""
    return row_octets([*(flows[name] for name in _KEY), _ifindexes(flows)])


def _ifindexes(flows: Columns) -> Array:
    """Where each flow was observed."""
    return np.where(flows["direction"] == _EGRESS, flows["egress_ifindex"], flows["ingress_ifindex"])


def grown(before: Optional[Columns], now: Columns) -> Tuple[Array, Array]:
    """Octets and packets (u64) that each flow of `now` has gained since `before`.

    A flow that is new has gained all it has. So has one whose totals are smaller: it is another with the same key.
    """
    octets, packets = now["octets_total"], now["packets_total"]
    if before is None or not len(before["octets_total"]) or not len(octets):
        return octets, packets
    old, new = _keys_of(before), _keys_of(now)
    if np.array_equal(old, new):
        place, same = np.arange(len(new)), np.ones(len(new), bool)
    else:
        order = np.argsort(old)
        place = order[np.minimum(np.searchsorted(old, new, sorter=order), len(old) - 1)]
        same = old[place] == new
    old_octets, old_packets = before["octets_total"][place], before["packets_total"][place]
    same &= (octets >= old_octets) & (packets >= old_packets)
    return octets - np.where(same, old_octets, 0), packets - np.where(same, old_packets, 0)


_SHOWN = ("ip_version", "src_port", "dst_port", "protocol", "direction", "octets_total", "packets_total",
          "grown_octets", "grown_packets")  # fmt: skip


def joined(parts: Sequence[Columns]) -> Columns:
    """Flows of both families in one: what is shown of them, with 16 octets an address (IPv4: the first four)."""
    flows = {name: np.concatenate([part[name] for part in parts]) for name in _SHOWN}
    flows["ifindex"] = np.concatenate([_ifindexes(part) for part in parts])
    for name in ("src_addr", "dst_addr"):
        flows[name] = np.concatenate([np.pad(part[name], ((0, 0), (0, 16 - part[name].shape[1]))) for part in parts])
    return flows


# From rates to rows


class Rows(NamedTuple):
    """Sums over the flows of each row. `flow`: the number of one of them; at its destination's side if `is_dst`."""

    flow: Array
    is_dst: Array
    sums: Dict[str, Array]


def grouped(growth: Growth, by: str) -> Rows:
    """A row for each flow, host, port (with its protocol) or Observation Point.

    A flow belongs to both its hosts and both its ports: their rows sum up to more than there is.
    """
    flows = growth.flows
    flow, is_dst, key = _members(flows, by)
    if key is None or not len(flow):
        first, row = np.arange(len(flow)), np.arange(len(flow))
    else:
        _, first, row = np.unique(key, return_index=True, return_inverse=True)

    def total(name: str) -> Array:
        return np.bincount(row, weights=flows[name][flow].astype(np.float64), minlength=len(first))

    per_s = 1 / growth.elapsed_s if growth.elapsed_s else 0.0
    sums = {
        "bit/s": total("grown_octets") * 8 * per_s,
        "pkt/s": total("grown_packets") * per_s,
        "octets": total("octets_total"),
        "packets": total("packets_total"),
        "flows": np.bincount(row, minlength=len(first)),
    }
    return Rows(flow[first], is_dst[first], sums)


def _members(flows: Columns, by: str) -> Tuple[Array, Array, Optional[Array]]:
    """Which flows belong to some row, on which of their sides, and the key of that row (None: each to its own)."""
    everyone = np.arange(len(flows["protocol"]))
    nowhere = np.zeros(len(everyone), bool)
    if by == "flow" or not len(everyone):
        return everyone, nowhere, None
    if by == "interface":
        return everyone, nowhere, row_octets([flows["ifindex"], flows["direction"]])
    kind = "ip_version" if by == "host" else "protocol"
    side = "addr" if by == "host" else "port"
    src, dst = (row_octets([flows[kind], flows[f"{way}_{side}"]]) for way in ("src", "dst"))
    other = everyone[src != dst]
    return (
        np.concatenate((everyone, other)),
        np.concatenate((nowhere, np.ones(len(other), bool))),
        np.concatenate((src, dst[other])),
    )


def ranked(rows: Rows, order: str, most: int) -> Array:
    """Numbers of the first rows, at most so many: the highest sums of `order` first, then those of octets."""
    return np.lexsort((-rows.sums["octets"], -rows.sums[order]))[:most]


def _named(flows: Columns, rows: Rows, number: int, by: str) -> Dict[str, str]:
    """What a row is called, by column."""
    flow = int(rows.flow[number])
    way = "dst" if rows.is_dst[number] else "src"
    protocol = protocol_name(int(flows["protocol"][flow]))
    if by == "host":
        return {"host": _address(flows, flow, way)}
    if by == "port":
        return {"proto": protocol, "port": str(flows[f"{way}_port"][flow] or "")}
    interface = _interface(int(flows["ifindex"][flow]), int(flows["direction"][flow]))
    if by == "interface":
        return {"interface": interface}
    ends = {title: _end_point(flows, flow, way) for title, way in (("source", "src"), ("destination", "dst"))}
    return {"proto": protocol, **ends, "interface": interface}


def _address(flows: Columns, flow: int, way: str) -> str:
    octets = flows[f"{way}_addr"][flow].tobytes()
    is_ipv4 = flows["ip_version"][flow] == 4
    return socket.inet_ntop(socket.AF_INET, octets[:4]) if is_ipv4 else socket.inet_ntop(socket.AF_INET6, octets)


def _end_point(flows: Columns, flow: int, way: str) -> str:
    address, port = _address(flows, flow, way), int(flows[f"{way}_port"][flow])
    if not port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _interface(ifindex: int, direction: int) -> str:
    try:
        name = socket.if_indextoname(ifindex)
    except OSError:  # of another namespace, or gone
        name = str(ifindex)
    return f"{name} {'out' if direction == _EGRESS else 'in'}"


# From rows to a screen


@dataclass
class Display:
    """What is shown, and how: the last growth, and bit/s of all looks of the last minute."""

    by: str
    history: Deque[float]
    expression: str = ""  # of the filter; "": none
    order: str = "bit/s"
    paused: bool = False
    prompt: Optional[FilterPrompt] = None  # while a filter is typed
    growth: Optional[Growth] = None

    def add(self, growth: Growth) -> None:
        self.growth = growth
        if growth.elapsed_s:
            self.history.append(_per_second(growth, "grown_octets") * 8)

    def press(self, key: str) -> None:
        """Does what the key stands for; other keys, and none (""), do nothing."""
        self.by = GROUPS.get(key, self.by)
        self.order = ORDERS.get(key, self.order)
        self.paused ^= key == " "
        if key == "/":
            self.prompt = FilterPrompt(self.expression)

    def text(self, size: Optional[os.terminal_size] = None) -> str:
        """The screen for a terminal of this size; None: for files and pipes."""
        assert self.growth is not None
        flows, rows = self.growth.flows, grouped(self.growth, self.by)
        head = self._head(60 if size is None else size.columns - 30)
        foot = [] if size is None else self._foot()
        most = _PLAIN_ROWS if size is None else size.lines
        records: List[Dict[str, Union[str, int]]] = [
            {**_named(flows, rows, number, self.by), **{name: int(sums[number]) for name, sums in rows.sums.items()}}
            for number in ranked(rows, self.order, most).tolist()
        ]
        return screen(head, self.by, records, foot, size=size)

    def _foot(self) -> List[str]:
        if self.prompt is not None:
            return self.prompt.lines
        return [f"filter: {self.expression}", _HELP] if self.expression else [_HELP]

    def _head(self, width: int) -> List[str]:
        assert self.growth is not None
        rates = {"bit/s": 8 * _per_second(self.growth, "grown_octets")}
        rates["pkt/s"] = _per_second(self.growth, "grown_packets")
        now = ", ".join(f"{human(int(rate))} {unit}" for unit, rate in rates.items())
        paused = " PAUSED" if self.paused else ""
        count = len(self.growth.flows["protocol"])
        peak = human(int(max(self.history, default=0)))
        return [
            f"flowexp top{paused}: {count:,} flows, {now}; by {self.by}, most {self.order} first",
            f"{sparkline(self.history, max(1, min(60, width)))} bit/s, at most {peak}",
        ]


def _per_second(growth: Growth, name: str) -> float:
    return float(growth.flows[name].sum(dtype=np.uint64)) / growth.elapsed_s if growth.elapsed_s else 0.0


def sparkline(values: Sequence[float], width: int) -> str:
    """A bar for each value, the highest as high as a line; of more than `width` values the highest of some each."""
    if not len(values):
        return ""
    heights = np.array([part.max() for part in np.array_split(np.array(values), min(width, len(values)))])
    levels = np.ceil(heights / (heights.max() or 1) * len(_BARS)).astype(int)
    return "".join(_BARS[max(1, level) - 1] for level in levels.tolist())
