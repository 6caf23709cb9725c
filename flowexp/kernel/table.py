# SPDX-License-Identifier: GPL-2.0-or-later
"""The flow table as user space sees it: the kernel's arrays, mapped into memory as numpy arrays.

A table is a row of maps, made, found again and given up together: the flows of each address family (family.py),
control, counters and the exporter's journal.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Dict, Iterable, List, Mapping, Tuple

import numpy as np

from ..errors import FlowexpError
from ..metering.fitting import slots_for
from ..rates import MAX_INTERVALS, Rates
from . import libbpf
from .capabilities import not_permitted
from .family import FAMILIES, U64, Family, Mapped
from .groups import group_names, groups_in, groups_mask, struct_of
from .journal import Entry, Journal
from .layout import Array, Layout

LOAD = 0.7  # max_flows is this part of the slots: up to here a flow finds room in its two buckets
_FRAGMENTS = 16384  # datagrams whose first fragment is remembered
_HANDSHAKES = 65536  # of TCP under way, where the group `tcp` is on
_INTERFACES = 4096
RING_OCTETS = 1 << 23  # of first payloads, where the group `application` is on: some eight thousand between two looks


@dataclass(frozen=True)
class MapSpec:
    """What a map is created from; octets is all of a mapped array's memory."""

    kind: int
    key_octets: int
    value_octets: int
    entries: int
    flags: int

    @property
    def octets(self) -> int:
        return self.value_octets * self.entries


def buckets_for(max_flows: int, layout: Layout) -> int:
    """Buckets of a table in which max_flows find room."""
    return max(1, math.ceil(max_flows / LOAD / layout.constants["FLOW_WAYS"]))


def table_specs(layout: Layout, buckets: Mapping[int, int], groups: int = 0) -> Dict[str, MapSpec]:
    """Every map of a table by name, all of them arrays in memory. `buckets` by family; `groups`: bits of those on."""

    def array(struct: str, entries: int) -> MapSpec:
        return MapSpec(libbpf.ARRAY, 4, layout.structs[struct].itemsize, entries, libbpf.MMAPABLE)

    ways = layout.constants["FLOW_WAYS"]
    specs = {name: array(name, 1) for name in ("control", "journal")}
    specs["counters"] = array("counters", possible_cpus())
    for family in FAMILIES:
        specs[f"tags{family}"] = array("bucket_tags", buckets[family])
        specs[f"hot{family}"] = array(f"flow_hot{family}", buckets[family] * ways)
        specs[f"cold{family}"] = array("flow_cold", buckets[family] * ways)
    for name in group_names(layout):
        is_on = name in groups_in(layout, groups)
        specs[name] = array(struct_of(name), sum(buckets.values()) * ways if is_on else 1)
    return specs


def table_octets(layout: Layout, max_flows: int, groups: Iterable[str] = ()) -> int:
    """The memory of a table of max_flows of each family, with room for these field groups."""
    buckets = dict.fromkeys(FAMILIES, buckets_for(max_flows, layout))
    return sum(spec.octets for spec in table_specs(layout, buckets, groups_mask(layout, groups)).values())


def auxiliary_maps(
    layout: Layout, groups: int = 0, *, samples_by_interface: bool = False, replays: bool = False
) -> Dict[str, int]:
    """Descriptors, by name, of what programs need beside the table: new with each load, as nobody misses them.

    samples_by_interface: with room for interfaces that have a sampling interval of their own.
    replays: with room for the replay program's frames; no other program looks there.
    """

    def recent(key: str, value: str, entries: int) -> MapSpec:
        return MapSpec(libbpf.LRU_HASH, layout.structs[key].itemsize, layout.structs[value].itemsize, entries, 0)

    ring_octets = RING_OCTETS if groups & groups_mask(layout, ["application"]) else mmap.PAGESIZE  # the least there is
    return _create(
        {
            "fragments": recent("fragment_key", "fragment_value", _FRAGMENTS),
            "handshakes": recent(
                "handshake_key", "handshake", _HANDSHAKES if groups & groups_mask(layout, ["tcp"]) else 1
            ),
            "arrivals": MapSpec(
                libbpf.ARRAY,
                4,
                layout.structs["arrival"].itemsize,
                layout.constants["ARRIVALS"] if groups & groups_mask(layout, ["timing"]) else 1,
                0,
            ),
            "ingress": MapSpec(libbpf.HASH, 4, 4, _INTERFACES, 0),
            "samplers": MapSpec(
                libbpf.PERCPU_HASH, 4, layout.structs["sampler"].itemsize, _INTERFACES if samples_by_interface else 1, 0
            ),
            "captured": MapSpec(
                libbpf.ARRAY, 4, layout.structs["captured"].itemsize if replays else 4, 1, libbpf.MMAPABLE
            ),
            "payloads": MapSpec(libbpf.RINGBUF, 0, 0, ring_octets, 0),
        }
    )


def _create(specs: Mapping[str, MapSpec]) -> Dict[str, int]:
    """New maps' descriptors by name; FlowexpError, and none, where one is refused."""
    fds: Dict[str, int] = {}
    try:
        for name, spec in specs.items():
            fds[name] = libbpf.create_map(
                spec.kind,
                name,
                key_octets=spec.key_octets,
                value_octets=spec.value_octets,
                entries=spec.entries,
                flags=spec.flags,
            )
    except OSError as error:
        for fd in fds.values():
            os.close(fd)
        raise FlowexpError(f"BPF map {name} of {spec.octets} octets: {_why(error)}") from error
    return fds


def possible_cpus() -> int:
    """CPUs that the machine may ever have: per-CPU counters are indexed by their numbers."""
    path = Path("/sys/devices/system/cpu/possible")
    try:
        text = path.read_text().strip()
    except OSError as error:
        raise FlowexpError(f"{path}: {error.strerror}; mount /sys") from error
    return int(text.replace(",", "-").split("-")[-1]) + 1


class FlowTable:
    """All maps of one table, and its memory. `fds`: a descriptor a map, for the loader; close() drops them."""

    def __init__(self, layout: Layout, fds: Mapping[str, int], specs: Mapping[str, MapSpec]) -> None:
        self.layout = layout
        self.fds = dict(fds)
        self.octets = sum(spec.octets for spec in specs.values())
        self.buckets = specs["tags4"].entries
        mapped = {name: Mapped(fds[name], spec.octets) for name, spec in specs.items()}
        self._control = mapped["control"].array(layout.structs["control"])
        self._counts = mapped["counters"].array(layout.structs["counters"])["count"]
        self.journal = Journal(mapped["journal"].array(layout.structs["journal"]), layout.constants)
        self.groups = groups_in(layout, self.control("groups"))
        self.families = tuple(Family(version, mapped, layout, self.groups) for version in FAMILIES)

    @classmethod
    def create(
        cls,
        layout: Layout,
        max_flows: int,
        groups: Iterable[str] = (),
        *,
        rates: Rates = Rates(),  # noqa: B008
        begin_small: bool = False,
    ) -> FlowTable:
        """A new, empty table for max_flows of each family and for these field groups, with a secret of its own.

        rates: which packets are to be metered; each flow is exported under one of these.
        begin_small: of a large table packets use a part, until somebody gives them more (MeteringProcess.fit).
        """
        buckets, mask = buckets_for(max_flows, layout), groups_mask(layout, groups)
        specs = table_specs(layout, dict.fromkeys(FAMILIES, buckets), mask)
        fds = _create(specs)
        control = Mapped(fds["control"], specs["control"].octets).array(layout.structs["control"])
        control["groups"] = mask
        table = cls(layout, fds, specs)
        table.set_control(layout=layout.digest, buckets4=buckets, buckets6=buckets)
        table.set_control(sampling_random=rates.is_random)
        table._control["sampling_interval"][0, : len(rates.intervals)] = rates.intervals
        for family in table.families:
            family.extent.begin(slots_for(0, family.slots) if begin_small else family.slots)
        table._control["secret"] = np.frombuffer(secrets.token_bytes(len(table.secret)), U64)
        return table

    @classmethod
    def adopt(cls, layout: Layout, fds: Mapping[str, int]) -> FlowTable:
        """The table behind existing maps. LayoutDiffers, and they are closed, where another version has made it."""
        octets = layout.structs["control"].itemsize
        control = Mapped(fds["control"], octets).array(layout.structs["control"])[0]
        if int(control["layout"]) != layout.digest:
            for fd in fds.values():
                os.close(fd)
            raise LayoutDiffers("the pinned flow table is of another version of flowexp")
        buckets = {family: int(control[f"buckets{family}"]) for family in FAMILIES}
        return cls(layout, fds, table_specs(layout, buckets, int(control["groups"])))

    @property
    def rates(self) -> Rates:
        """Under which its flows are exported."""
        intervals = self._control["sampling_interval"][0].tolist()
        return Rates(tuple(filter(None, intervals)), bool(self.control("sampling_random")))

    def is_for(self, max_flows: int, groups: Iterable[str], rates: Rates) -> bool:
        """Whether create() would make one like it."""
        same_groups = groups_mask(self.layout, groups) == self.control("groups")
        return same_groups and rates == self.rates and self.buckets == buckets_for(max_flows, self.layout)

    @staticmethod
    def map_names(layout: Layout) -> List[str]:
        """The names under which a table's maps are pinned."""
        return list(table_specs(layout, dict.fromkeys(FAMILIES, 1)))

    @property
    def secret(self) -> bytes:
        return bytes(self._control["secret"].tobytes())

    def control(self, name: str) -> int:
        """One number of struct control."""
        return int(self._control[name][0])

    def set_control(self, **values: int) -> None:
        """Stores numbers of struct control, each with one store, in the order given."""
        for name, value in values.items():
            self._control[name][0] = value

    def exported(self) -> Dict[str, int]:
        """`packets`, `octets` and `records` that Data Records of this table ever carried, or were."""
        return {name: self.control(f"exported_{name}") for name in ("packets", "octets", "records")}

    def exported_ever(self) -> Tuple[int, int]:
        """The ledger's exported side: packets and octets, of the tables before this one, too."""
        own = self.exported()
        packets, octets = (self.control(f"before_exported_{name}") + own[name] for name in ("packets", "octets"))
        return packets, octets

    def go_on_from(self, older: FlowTable) -> None:
        """The ledger of an older table goes on in this one. Again, once the older one has exported more.

        Stores nothing that depends on what was there before: a successor of an exporter that was killed in here
        does all of it again.
        """
        for place, count in enumerate(older.counters().values()):
            self._control["before"][0, place] = count
        packets, octets = older.exported_ever()
        self.set_control(before_exported_packets=packets, before_exported_octets=octets)

    def take_collectors(self, older: FlowTable) -> None:
        """What is kept for Collectors in an older table is kept in this one, too."""
        for name in ("sequence", "own_socket"):
            self._control[name] = older._control[name]

    def settle(self) -> None:
        """Moves slots and ledger on as the journal's batch says, and clears the journal.

        Stores nothing that depends on what was there before: a successor of an exporter that was killed in here
        does all of it again. No slot has been freed by then: that waits for a grace period, which begins after this.
        """
        entry: Entry = self.journal.entry()
        family = self.families[FAMILIES.index(entry.ip_version)]
        if entry.ends:
            family.retire(entry.slots)
        else:
            family.mark_exported(entry.slots, entry.packets, entry.octets, entry.end_ns.view(np.int64))
        self.set_control(**{f"exported_{name}": total for name, total in entry.exported.items()})
        self.journal.clear()

    def sequence(self, place: int) -> Tuple[int, int]:
        """Whose Sequence Number is kept there (a Collector's key, 32 bits; 0: nobody's), and the next one."""
        return divmod(int(self._control["sequence"][0][place * MAX_INTERVALS]), 1 << 32)

    def set_sequence(self, place: int, key: int, value: int) -> None:
        """One store for both: a kill leaves no number under another's key."""
        self._control["sequence"][0][place * MAX_INTERVALS] = key << 32 | value

    def own_sequence(self, place: int, interval: int) -> int:
        """The next one in the same Collector's domain for an own sampling interval; 0 where none is kept."""
        kept = (divmod(int(word), 1 << 32) for word in self._own_sequences(place))
        return next((number for whose, number in kept if whose == interval), 0)

    def set_own_sequence(self, place: int, interval: int, value: int, *, needed: Collection[int]) -> None:
        """One store, as in set_sequence. needed: the intervals of that Collector whose numbers have to stay."""
        words = self._own_sequences(place)
        whose = [int(word) >> 32 for word in words]
        best = min(whose, key=lambda each: (each != interval, each != 0, each in needed))
        words[whose.index(best)] = interval << 32 | value

    def forget_own_sequences(self, place: int) -> None:
        """Another Collector is to be kept there."""
        self._own_sequences(place)[:] = 0

    def _own_sequences(self, place: int) -> Array:
        words: Array = self._control["sequence"][0][place * MAX_INTERVALS + 1 : (place + 1) * MAX_INTERVALS]
        return words

    def set_own_socket(self, place: int, protocol: int, port: int, to: bytes, to_port: int) -> None:
        """Packets of this protocol from and to these ports, to that address (4 or 16 octets), are own export from now
        on: those of the Collector at `place`. For programs that are loaded with own_sockets."""
        own = self._control["own_socket"][0, place : place + 1]
        own["protocol"] = 0  # nobody's, while it is half written
        own["to"] = np.frombuffer((to if len(to) == 16 else bytes(4) + to).ljust(16, b"\0"), U64)
        own["ports"] = np.frombuffer(struct.pack("!HH", port, to_port), np.uint32)
        own["protocol"] = protocol

    @property
    def collectors(self) -> int:
        """How many Collectors' Sequence Numbers there is room for."""
        return int(self._control["own_socket"].shape[1])

    def counters(self) -> Dict[str, Tuple[int, int]]:
        """Packets and octets by counter name (Layout.counter_names), summed over the CPUs and the tables before."""
        before = self._control["before"][0]
        packets, octets = (self._counts[what].sum(axis=0, dtype=U64) + before[what] for what in ("packets", "octets"))
        return {name: (int(packets[i]), int(octets[i])) for i, name in enumerate(self.layout.counter_names())}

    def count(self, name: str, packets: int, octets: int) -> None:
        """Adds to a counter in the packet path's stead, on CPU 0: only where no program runs meanwhile."""
        counter = self._counts[0, self.layout.counter_names().index(name)]
        counter["packets"] += packets
        counter["octets"] += octets

    def flows_created(self) -> int:
        """Flows the packet path has made in this table; cheap, to be asked many times a second."""
        return int(self._counts["packets"][:, self.layout.constants["COUNT_FLOWS_CREATED"]].sum())

    def close(self) -> None:
        """Drops the descriptors. The memory goes with the last view of it."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


class LayoutDiffers(FlowexpError):
    """A table exists, but this version cannot read it."""


def _why(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return not_permitted()
    if error.errno in (errno.ENOMEM, errno.E2BIG):
        return f"{error.strerror}; lower [table] max_flows"
    return str(error.strerror)
