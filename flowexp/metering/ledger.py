# SPDX-License-Identifier: GPL-2.0-or-later
"""The ledger: seen by the hook = exported + still in the table + not metered, by reason.

Packets and octets, exact whenever no packet is in flight. Pure numbers: who reads the
counters, and when, is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Tuple

Count = Tuple[int, int]  # packets, octets
_NOT_METERED = "not_metered_"


@dataclass(frozen=True)
class Ledger:
    """All counts since the first table was made whose ledger this one goes on with."""

    seen: Count
    exported: Count
    in_table: Count
    not_metered: Mapping[str, Count]

    @classmethod
    def from_counters(cls, counters: Mapping[str, Count], *, exported: Count, in_table: Count) -> Ledger:
        """`counters` as the packet path names them: `seen` and `not_metered_<reason>`; others are left out."""
        reasons = {
            name[len(_NOT_METERED) :]: count for name, count in counters.items() if name.startswith(_NOT_METERED)
        }
        return cls(counters["seen"], exported, in_table, reasons)

    def missing(self) -> Count:
        """Seen, less all that became of it: (0, 0) where the ledger closes."""
        parts = (self.exported, self.in_table, *self.not_metered.values())
        packets, octets = (self.seen[i] - sum(part[i] for part in parts) for i in (0, 1))
        return packets, octets

    def __str__(self) -> str:
        """One line for the log, in packets; reasons that did not occur are left out."""
        reasons = "".join(
            f" + {count[0]} not metered ({name.replace('_', ' ')})"
            for name, count in self.not_metered.items()
            if count[0]
        )
        missing = self.missing()
        verdict = "closes" if missing == (0, 0) else f"DOES NOT CLOSE, off by {missing[0]} packets, {missing[1]} octets"
        return (
            f"{self.seen[0]} packets seen = {self.exported[0]} exported + {self.in_table[0]} in the table"
            f"{reasons}; the ledger {verdict}"
        )

    def as_dict(self) -> Dict[str, Any]:
        """For JSON: packets and octets of each part, and what is missing."""

        def pair(count: Count) -> Dict[str, int]:
            return {"packets": count[0], "octets": count[1]}

        return {
            "seen": pair(self.seen),
            "exported": pair(self.exported),
            "inTable": pair(self.in_table),
            "notMetered": {name: pair(count) for name, count in self.not_metered.items()},
            "missing": pair(self.missing()),
        }
