# SPDX-License-Identifier: GPL-2.0-or-later
"""Field groups: what the packet path keeps of a flow beyond the default fields, where it is asked for (bpf/flow.h).

Each group has an array of its own, by slot number, IPv6's slots behind IPv4's. Which groups there are, and what is
in them, is bpf/flow.h's alone: a member of `now`, which grows, becomes two columns here, `<group>_<member>` (since the
flow's last record) and `<group>_<member>_total` (since it began); any other member becomes `<group>_<member>`.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping

import numpy as np

from .layout import Array, Layout

Rows = Dict[str, Array]
"""By group: copies of its structs, one a flow."""

_PREFIX = "GROUP_"


def group_names(layout: Layout) -> List[str]:
    """Every group that the packet path knows, by its bit."""
    found = sorted((bit, name) for name, bit in layout.constants.items() if name.startswith(_PREFIX))
    return [name[len(_PREFIX) :].lower() for _, name in found]


def groups_mask(layout: Layout, names: Iterable[str]) -> int:
    """The bits of these groups, as settings and control have them; a group of which nothing is counted has none."""
    return sum(layout.constants.get(_PREFIX + name.upper(), 0) for name in names)


def groups_in(layout: Layout, mask: int) -> List[str]:
    """The groups whose bits are set."""
    return [name for name in group_names(layout) if mask & layout.constants[_PREFIX + name.upper()]]


def struct_of(group: str) -> str:
    """The struct that a group keeps of a flow."""
    return f"flow_{group}"


class Groups:
    """The rows of one family's flows, for the groups that are on. `memory`: by group, all its array's words (u64)."""

    def __init__(self, memory: Mapping[str, Array], layout: Layout, *, first_slot: int, slots: int) -> None:
        self._types = {name: layout.structs[struct_of(name)] for name in memory}
        self._rows = {
            name: words.reshape(-1, self._types[name].itemsize // 8)[first_slot : first_slot + slots]
            for name, words in memory.items()
        }

    def read(self, slots: Array) -> Rows:
        """Copies of the rows in these slots; flows may grow meanwhile."""
        return {
            name: np.take(rows, slots, axis=0).view(self._types[name]).reshape(-1) for name, rows in self._rows.items()
        }

    def mark_exported(self, slots: Array, carried: Rows) -> None:
        """What Data Records have carried: `carried`, as read() gave it of these slots."""
        for name, rows in carried.items():
            if "exported" not in (rows.dtype.names or ()):
                continue  # it counts nothing
            first, end = _words(rows.dtype, "exported")
            counts = np.ascontiguousarray(rows["now"]).view(np.uint64).reshape(len(slots), -1)
            self._rows[name][slots, first:end] = counts

    def store(self, name: str, slots: Array, structs: Array, *, where: str) -> None:
        """What user space has found out of these flows, into those rows whose member `where` is set."""
        rows, struct = self._rows[name], self._types[name]
        is_set = np.take(rows, slots, axis=0).view(struct).reshape(-1)[where] != 0
        rows[slots[is_set]] = structs[is_set].view(np.uint64).reshape(-1, struct.itemsize // 8)

    def clear(self, slots: Array) -> None:
        """All zero, for another flow."""
        for rows in self._rows.values():
            rows[slots] = 0


def _words(struct: np.dtype[Any], member: str) -> tuple[int, int]:
    """Where a member lies in a struct, in words of 64 bits: [first, end)."""
    fields: Any = struct.fields
    dtype, offset = fields[member][:2]
    return offset // 8, (offset + dtype.itemsize) // 8


def group_columns(rows: Rows) -> Dict[str, Array]:
    """Columns of these flows (see the top of this file)."""
    columns: Dict[str, Array] = {}
    for name, structs in rows.items():
        members = structs.dtype.names or ()
        if "now" in members:
            now, exported = structs["now"], structs["exported"]
            for counter in now.dtype.names or ():
                columns[f"{name}_{counter}_total"] = now[counter]
                columns[f"{name}_{counter}"] = now[counter] - exported[counter]
        for member in members:
            if member not in ("now", "exported"):
                columns[f"{name}_{member}"] = structs[member]
    return columns
