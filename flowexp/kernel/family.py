# SPDX-License-Identifier: GPL-2.0-or-later
"""The flows of one address family: the kernel's arrays, mapped into memory as numpy arrays.

Who may write what, and in which order, is the table's protocol. A slot goes FREE -> LIVE by
the packet path, and from there by this file alone: LIVE -> CLOSING -> RETIRED -> FREE, with a
grace period after CLOSING (a program that saw LIVE may still be adding) and another before
FREE (a program may still hold the slot for free that another has claimed). Every store is an
aligned 64-bit one through a u64 view, but for the tags (16 bits): numpy's order of stores to a
structured array is its own.
"""

from __future__ import annotations

import mmap
from typing import Any, Iterable, Mapping, Optional, Tuple

import numpy as np

from ..metering.biflow import conversations_of
from .extent import Extent
from .grace import wait_grace_period
from .groups import Groups
from .layout import Array, Layout

U64 = np.uint64

FAMILIES = (4, 6)
_NO_SLOTS = np.empty(0, np.int64)
_AT_ONCE = 4096  # slots looked at together: their copies stay in the cache
_MOMENT_SHIFT = 27  # 0.13 s, so that 32 bits hold 18 years


class Mapped:
    """One mmapable BPF array: its memory. The mapping holds the map, whatever becomes of the descriptor."""

    def __init__(self, fd: int, octets: int) -> None:
        self._octets = octets
        rounded = -(-octets // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(fd, rounded, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def array(self, dtype: np.dtype[Any]) -> Array:
        return np.frombuffer(self._memory, dtype, self._octets // dtype.itemsize)


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

    def __init__(self, version: int, maps: Mapping[str, Mapped], layout: Layout, groups: Iterable[str] = ()) -> None:
        constants, counters = layout.constants, layout.structs["counters"]
        self.version = version
        self.hot_type, self.cold_type = layout.structs[f"flow_hot{version}"], layout.structs["flow_cold"]
        word = np.dtype(U64)
        self.tags = maps[f"tags{version}"].array(np.dtype(np.uint16))
        self.slots = len(self.tags)
        words = maps["counters"].array(counters)["buckets"][:, FAMILIES.index(version)]
        self.extent = Extent(words, self.tags, constants)
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
        self.groups = Groups(
            {name: maps[name].array(word) for name in groups},
            layout,
            first_slot=FAMILIES.index(version) * self.slots,
            slots=self.slots,
        )
        self._to_free = _NO_SLOTS
        self._conversation = np.zeros(self.slots, U64)  # 0: not looked up yet; all 0 where nobody asks
        self.wake_all(0)

    def occupied(self) -> Array:
        """Numbers (i64, ascending) of the slots that are not free, as far as `extent` says. Reads the tags alone."""
        return np.flatnonzero(self.tags[: self.extent.searched] != 0)

    def is_left_behind(self, slots: Array) -> Array:
        """Of slots: whether packets should no longer have to look there; their flow ends at its active timeout."""
        return self.extent.is_left_behind(slots)

    def _state(self, ctl: Array) -> Array:
        state: Array = ctl >> self._shift & U64(0xFF)
        return state

    def is_live(self, ctl: Array) -> Array:
        """Of ctl words: whether packets find the flow in the slot."""
        live: Array = self._state(ctl) == self._live
        return live

    def _holds_flow(self, ctl: Array) -> Array:
        """Of ctl words: whether a flow is in the slot, one that packets find or one that is being ended."""
        state = self._state(ctl)
        holds: Array = (state == self._live) | (state == self._closing)
        return holds

    def starts(self, slots: Array) -> Array:
        """Start (i64, boot ns) of the record that each of these flows is collecting."""
        return np.maximum(self._first.take(slots), self._exported_ns.take(slots)).view(np.int64)

    def asleep(self, slots: Array, now_ns: int) -> Array:
        """Whether nothing is due of each of these flows, as sleep() was told. Some wake up to 0.13 s before that."""
        asleep: Array = self._wakes.take(slots) > max(now_ns - self._slept_since_ns, 0) >> _MOMENT_SHIFT
        return asleep

    def sleep(self, slots: Array, until_ns: Array) -> None:
        """Nothing will be due of these flows before then."""
        self._wakes[slots] = np.clip(until_ns - self._slept_since_ns >> _MOMENT_SHIFT, 0, np.iinfo(np.uint32).max)

    def wake_all(self, now_ns: int) -> None:
        """What sleep() was told does not hold any more. From now on time is counted from `now_ns`."""
        self._slept_since_ns = now_ns
        self._wakes = np.zeros(self.slots, np.uint32)  # the moment since then before which nothing of a flow is due

    def began(self, slots: Array) -> Array:
        """When each of these flows began (i64, boot ns)."""
        return self._first.take(slots).view(np.int64)

    def conversations(self, slots: Array) -> Array:
        """A hash (u64) that both directions of a conversation have alike, of each of these flows."""
        hashes = self._conversation.take(slots)
        unknown = np.flatnonzero(hashes == 0)
        for first in range(0, len(unknown), _AT_ONCE):
            some = unknown[first : first + _AT_ONCE]
            hashes[some] = conversations_of(self.hot(slots[some]))
        self._conversation[slots[unknown]] = hashes[unknown]
        return hashes

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

    def look(self) -> Tuple[Array, Array, Array]:
        """All flows, for one who reads another process's table while packets and sweeps go on: their slots, and copies
        as of read(). A slot that was given back meanwhile is left out."""
        slots = self.occupied()
        hot, cold = self.read(slots)
        there = self._holds_flow(hot["ctl"]) & (self._ctl.take(slots) == hot["ctl"])
        return slots[there], hot[there], cold[there]

    def unexported(self) -> Tuple[int, int]:
        """Packets and octets in the table that no Data Record has carried yet."""
        slots = np.flatnonzero(self.tags != 0)
        packets = self._packets.take(slots) - self._exported_packets.take(slots)
        octets = self._octets.take(slots) - self._exported_octets.take(slots)
        return int(packets.sum(dtype=U64)), int(octets.sum(dtype=U64))

    def mark_exported(self, slots: Array, packets: Array, octets: Array, end_ns: Array) -> None:
        """What Data Records have carried up to `end_ns` (boot time): the next record starts there."""
        self._exported_packets.put(slots, packets)
        self._exported_octets.put(slots, octets)
        self._exported_ns.put(slots, end_ns.view(U64))

    def retire(self, slots: Array) -> None:
        """RETIRED and zeroed; free after the next grace period. Their finals were exported."""
        self._ctl.put(slots, self._retired << self._shift | self._bias)
        self._hot_rows[slots, 1:] = 0
        self._cold_rows[slots] = 0
        self.groups.clear(slots)
        self._conversation[slots] = 0
        self._wakes[slots] = 0
        self._to_free = np.concatenate((self._to_free, slots))

    @property
    def retired(self) -> int:
        """How many slots wait to be freed."""
        return len(self._to_free)

    def free_retired(self, count: Optional[int] = None) -> None:
        """RETIRED slots to FREE: those that were retired first, or all; a grace period must have passed since."""
        slots, self._to_free = self._to_free[:count], self._to_free[count:] if count is not None else _NO_SLOTS
        self._ctl.put(slots, 0)
        self.tags[slots] = 0
        self.extent.freed(slots)

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
        self.extent.recover(wait_grace_period)
        return np.flatnonzero(self._state(ctl) == self._closing)

    def _still_claimed(self, slots: Array) -> Array:
        """Those of these slots that are claimed and hold no flow."""
        ctl = self._ctl.take(slots)
        claimed: Array = slots[(ctl != 0) & (self._state(ctl) == 0)]
        return claimed
