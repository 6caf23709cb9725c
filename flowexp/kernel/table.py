# SPDX-License-Identifier: GPL-2.0-or-later
"""The flow table as user space sees it: the kernel's arrays, mapped into memory as numpy arrays.

Who may write what, and in which order, is the table's protocol. A slot goes FREE -> LIVE by
the packet path, and from there by this file alone: LIVE -> CLOSING -> RETIRED -> FREE, with a
grace period after CLOSING (a program that saw LIVE may still be adding) and another before
FREE (a program may still hold the slot for free that another has claimed). Every store is an
aligned 64-bit one through a u64 view, but for the tags (16 bits): numpy's order of stores to a
structured array is its own.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import numpy as np

from ..errors import FlowexpError
from . import libbpf
from .capabilities import not_permitted
from .journal import Entry, Journal
from .layout import Array as Array
from .layout import Layout

U64 = np.uint64

FAMILIES = (4, 6)
LOAD = 0.7  # max_flows is this part of the slots: up to here a flow finds room in its two buckets
_FRAGMENTS = 16384  # datagrams whose first fragment is remembered
_INTERFACES = 4096
_MEMBARRIER_CMD_GLOBAL = 1
_MEMBARRIER_CALLS = {
    "x86_64": 324,
    "aarch64": 283,
    "riscv64": 283,
    "armv7l": 389,
    "ppc64le": 365,
    "s390x": 356,
}
_libc = ctypes.CDLL(None, use_errno=True)


def wait_grace_period() -> None:
    """Returns when every packet program that was running at the call has ended (membarrier, synchronize_rcu).

    Never a time: a paused virtual CPU outlasts any. FlowexpError where the kernel refuses (nohz_full).
    """
    number = _MEMBARRIER_CALLS.get(os.uname().machine)
    if number is None or _libc.syscall(ctypes.c_long(number), _MEMBARRIER_CMD_GLOBAL, 0, 0):
        reason = os.strerror(ctypes.get_errno()) if number else "system call number not known"
        raise FlowexpError(f"membarrier on {os.uname().machine}: {reason}; flows cannot be ended safely here")


class Member:
    """One 64-bit member of a struct over all slots, read and written with one aligned access each.

    Never through a strided view: numpy's take would copy the whole column first.
    """

    def __init__(self, memory: Array, struct: np.dtype[Any], name: str) -> None:
        fields: Any = struct.fields
        self._flat = memory
        self._words, self._word = struct.itemsize // 8, fields[name][1] // 8

    def take(self, slots: Array) -> Array:
        """Its values (u64) in these slots."""
        values: Array = self._flat.take(slots * self._words + self._word)
        return values

    def put(self, slots: Array, values: Any) -> None:
        """Stores values (u64) in these slots."""
        self._flat[slots * self._words + self._word] = values

    def everywhere(self) -> Array:
        """The values of all slots."""
        return self._flat[self._word :: self._words].copy()


class Family:
    """The flows of one address family.

    `tags` u16 (slots,) is the shared memory itself, as are the rows of u64 behind all that is asked here.
    """

    def __init__(self, version: int, maps: Mapping[str, Mapped], layout: Layout) -> None:
        constants = layout.constants
        self.version = version
        self.hot_type, self.cold_type = layout.structs[f"flow_hot{version}"], layout.structs["flow_cold"]
        word = np.dtype(U64)
        self.tags = maps[f"tags{version}"].array(np.dtype(np.uint16))
        self.slots = len(self.tags)
        hot, cold = maps[f"hot{version}"].array(word), maps[f"cold{version}"].array(word)
        self._hot_rows, self._cold_rows = hot.reshape(self.slots, -1), cold.reshape(self.slots, -1)
        self._ctl, self._packets, self._octets = (
            Member(hot, self.hot_type, name) for name in ("ctl", "packets", "octets")
        )
        self._first, self._exported_packets, self._exported_octets, self._exported_ns = (
            Member(cold, self.cold_type, name)
            for name in ("first_ns", "exported_packets", "exported_octets", "exported_ns")
        )
        self._shift, self._reason_shift = (U64(constants[f"FLOW_{what}_SHIFT"]) for what in ("STATE", "REASON"))
        self._live, self._closing, self._retired = (
            U64(constants[f"FLOW_{state}"]) for state in ("LIVE", "CLOSING", "RETIRED")
        )
        self._bias = U64(constants["FLOW_CLAIM_BIAS"])
        self._to_free = np.empty(0, np.int64)
        # Start of the record under way, boot time, for each slot; 0: not looked up yet. Saves the
        # sweep a line of cold memory a flow.
        self._start = np.zeros(self.slots, np.int64)

    def occupied(self) -> Array:
        """Numbers (i64, ascending) of the slots that are not free. Reads the tags alone."""
        return np.flatnonzero(self.tags != 0)

    def _state(self, ctl: Array) -> Array:
        state: Array = ctl >> self._shift & U64(0xFF)
        return state

    def is_live(self, ctl: Array) -> Array:
        """Of ctl words: whether packets find the flow in the slot."""
        live: Array = self._state(ctl) == self._live
        return live

    def holds_flow(self, ctl: Array) -> Array:
        """Of ctl words: whether a flow is in the slot, one that packets find or one that is being ended."""
        state = self._state(ctl)
        holds: Array = (state == self._live) | (state == self._closing)
        return holds

    def starts(self, slots: Array) -> Array:
        """Start (i64, boot ns) of the record that each of these flows is collecting."""
        starts = self._start.take(slots)
        unknown = np.flatnonzero(starts == 0)
        if len(unknown):
            new = slots[unknown]
            starts[unknown] = np.maximum(self._first.take(new), self._exported_ns.take(new)).view(np.int64)
            self._start[new] = starts[unknown]
        return starts

    def hot(self, slots: Array) -> Array:
        """Copies of flow_hot* in these slots, as a structured array."""
        copies: Array = np.take(self._hot_rows, slots, axis=0).view(self.hot_type).reshape(-1)
        return copies

    def close(self, slots: Array, reasons: Array) -> None:
        """CLOSING, with each flow's flowEndReason: no packet finds them any more. A grace period must follow."""
        self._ctl.put(slots, self._closing << self._shift | reasons.astype(U64) << self._reason_shift | self._bias)

    def read(self, slots: Array) -> Tuple[Array, Array]:
        """Copies of the slots as structured arrays: flow_hot*, flow_cold.

        A flow may grow meanwhile. The packet path adds octets before packets; packets are read first
        here, so that octets not read yet always belong to packets not read yet: no flow can end with
        octets left over and no packet to carry them.
        """
        packets = self._packets.take(slots)
        hot = self.hot(slots)
        # The few that have grown in between are read again, alone: packets and octets then lie nanoseconds apart.
        grown = np.flatnonzero(packets != hot["packets"])
        packets[grown] = self._packets.take(slots[grown])
        hot[grown] = self.hot(slots[grown])
        cold = np.take(self._cold_rows, slots, axis=0).view(self.cold_type).reshape(-1)
        hot["packets"] = packets
        return hot, cold

    def unexported(self) -> Tuple[int, int]:
        """Packets and octets in the table that no Data Record has carried yet."""
        slots = self.occupied()
        packets = self._packets.take(slots) - self._exported_packets.take(slots)
        octets = self._octets.take(slots) - self._exported_octets.take(slots)
        return int(packets.sum(dtype=U64)), int(octets.sum(dtype=U64))

    def mark_exported(self, slots: Array, packets: Array, octets: Array, end_ns: Array) -> None:
        """What Data Records have carried up to `end_ns` (boot time): the next record starts there."""
        self._exported_packets.put(slots, packets)
        self._exported_octets.put(slots, octets)
        self._exported_ns.put(slots, end_ns.view(U64))
        self._start[slots] = end_ns

    def retire(self, slots: Array) -> None:
        """RETIRED and zeroed; free after the next grace period. Their finals were exported."""
        self._ctl.put(slots, self._retired << self._shift | self._bias)
        self._hot_rows[slots, 1:] = 0
        self._cold_rows[slots] = 0
        self._start[slots] = 0
        self._to_free = np.concatenate((self._to_free, slots))

    def has_retired(self) -> bool:
        """Whether slots wait to be freed."""
        return len(self._to_free) > 0

    def free_retired(self) -> None:
        """RETIRED slots to FREE: all there are, so a grace period must have passed since the last retire()."""
        self._ctl.put(self._to_free, 0)
        self.tags[self._to_free] = 0
        self._to_free = np.empty(0, np.int64)

    def recover(self) -> Array:
        """Puts right what a killed exporter left; returns the slots that it left CLOSING, to be exported.

        Packets may be metered meanwhile, so only slots are stored to that no program can write to. RETIRED is
        zeroed again and never exported. A claim that is seen before and after two grace periods is an orphan.
        A tag without a flow was left between the two stores of free_retired(). Killed in here, the next
        recover() finds nothing that this one could not.
        """
        ctl = self._ctl.everywhere()
        claimed = np.flatnonzero((ctl != 0) & (self._state(ctl) == 0))
        self.retire(np.flatnonzero(self._state(ctl) == self._retired))
        wait_grace_period()  # also the one that CLOSING needs, if the kill came before it
        claimed = self._still_claimed(claimed)
        self.free_retired()
        wait_grace_period()
        self._ctl.put(self._still_claimed(claimed), 0)
        # Tags first, then ctl: creation stores in the other order, so a flow in the making is not taken for none.
        tagged = self.occupied()
        self.tags[tagged[self._ctl.take(tagged) == 0]] = 0
        # And here ctl first: creation stores the tag before it makes the flow LIVE.
        ctl = self._ctl.everywhere()
        hidden = np.flatnonzero((self._state(ctl) == self._live) & (self.tags == 0))
        self.tags[hidden] = 1  # any tag: a packet that then misses makes a second slot, which is harmless
        return np.flatnonzero(self._state(ctl) == self._closing)

    def _still_claimed(self, slots: Array) -> Array:
        """Those of these slots that are claimed and hold no flow."""
        ctl = self._ctl.take(slots)
        claimed: Array = slots[(ctl != 0) & (self._state(ctl) == 0)]
        return claimed


class Mapped:
    """One mmapable BPF array: its memory. The mapping holds the map, whatever becomes of the descriptor."""

    def __init__(self, fd: int, octets: int) -> None:
        self._octets = octets
        rounded = -(-octets // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(fd, rounded, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def array(self, dtype: np.dtype[Any]) -> Array:
        return np.frombuffer(self._memory, dtype, self._octets // dtype.itemsize)


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


def table_specs(layout: Layout, buckets: Mapping[int, int]) -> Dict[str, MapSpec]:
    """Every map of a table by name, all of them arrays in memory. `buckets` by family."""

    def array(struct: str, entries: int) -> MapSpec:
        return MapSpec(libbpf.ARRAY, 4, layout.structs[struct].itemsize, entries, libbpf.MMAPABLE)

    ways = layout.constants["FLOW_WAYS"]
    specs = {name: array(name, 1) for name in ("control", "journal")}
    specs["counters"] = array("counters", possible_cpus())
    for family in FAMILIES:
        specs[f"tags{family}"] = array("bucket_tags", buckets[family])
        specs[f"hot{family}"] = array(f"flow_hot{family}", buckets[family] * ways)
        specs[f"cold{family}"] = array("flow_cold", buckets[family] * ways)
    return specs


def auxiliary_maps(layout: Layout) -> Dict[str, int]:
    """Descriptors, by name, of what programs need beside the table: new with each load, as nobody misses them."""
    fragment = [layout.structs[f"fragment_{part}"].itemsize for part in ("key", "value")]
    return _create(
        {
            "fragments": MapSpec(libbpf.LRU_HASH, fragment[0], fragment[1], _FRAGMENTS, 0),
            "ingress": MapSpec(libbpf.HASH, 4, 4, _INTERFACES, 0),
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
        self.families = tuple(Family(version, mapped, layout) for version in FAMILIES)

    @classmethod
    def create(cls, layout: Layout, max_flows: int) -> FlowTable:
        """A new, empty table for max_flows of each family, with a secret of its own."""
        buckets = buckets_for(max_flows, layout)
        specs = table_specs(layout, dict.fromkeys(FAMILIES, buckets))
        table = cls(layout, _create(specs), specs)
        table.set_control(layout=layout.digest, buckets4=buckets, buckets6=buckets)
        table._control["secret"] = np.frombuffer(secrets.token_bytes(len(table.secret)), U64)
        return table

    @classmethod
    def adopt(cls, layout: Layout, fds: Mapping[str, int]) -> FlowTable:
        """The table behind existing maps; FlowexpError where another version of the layout made it."""
        octets = layout.structs["control"].itemsize
        control = Mapped(fds["control"], octets).array(layout.structs["control"])[0]
        if int(control["layout"]) != layout.digest:
            raise LayoutDiffers("the pinned flow table has another layout than this version's")
        return cls(layout, fds, table_specs(layout, {family: int(control[f"buckets{family}"]) for family in FAMILIES}))

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
        """The ledger's exported side: `packets`, `octets` and `records` that Data Records ever carried, or were."""
        return {name: self.control(f"exported_{name}") for name in ("packets", "octets", "records")}

    def settle(self) -> None:
        """Moves slots and ledger on as the journal's batch says, and clears the journal.

        Stores nothing that depends on what was there before: a successor of an exporter that was killed in here
        does all of it again. No slot has been freed by then, for that takes a sweep, and a sweep follows this.
        """
        entry: Entry = self.journal.entry()
        family = self.families[FAMILIES.index(entry.ip_version)]
        if entry.ends:
            family.retire(entry.slots)
        else:
            family.mark_exported(entry.slots, entry.packets, entry.octets, entry.end_ns.view(np.int64))
        self.set_control(**{f"exported_{name}": total for name, total in entry.exported.items()})
        self.journal.clear()

    def sequence(self, collector: int) -> int:
        """Next Sequence Number of a Collector, by its place in the configuration."""
        return int(self._control["sequence"][0][collector])

    def set_sequence(self, collector: int, value: int) -> None:
        self._control["sequence"][0][collector] = value

    @property
    def collectors(self) -> int:
        """How many Collectors' Sequence Numbers there is room for."""
        return int(self._control["sequence"].shape[1])

    def counters(self) -> Dict[str, Tuple[int, int]]:
        """Packets and octets by counter name (Layout.counter_names), summed over the CPUs."""
        packets, octets = (self._counts[what].sum(axis=0, dtype=U64) for what in ("packets", "octets"))
        return {name: (int(packets[i]), int(octets[i])) for i, name in enumerate(self.layout.counter_names())}

    def count(self, name: str, packets: int, octets: int) -> None:
        """Adds to a counter in the packet path's stead, on CPU 0: only where no program runs meanwhile."""
        counter = self._counts[0, self.layout.counter_names().index(name)]
        counter["packets"] += packets
        counter["octets"] += octets

    def flows_created(self) -> int:
        """Flows the packet path has made since the table was; cheap, to be asked many times a second."""
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
