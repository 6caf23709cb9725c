# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal: the batch of flows that is being exported, written down so that a kill at any instant can be mended.

Slots, ledger and Collectors cannot change in one instant. So a batch is written here first, whole, with
what slots and ledger are to hold when it is done, and then moves on in three single stores of `state`:

    EMPTY    what the other members hold means nothing
    SENDING  records may have been sent, some or all: nothing else has changed, the same will be sent again
    SENT     all records have been sent: slots and ledger are being changed; to begin again does no harm

A killed process has stored all it did up to some point of the program and nothing after it, whatever
the CPU's memory order: an interrupt is precise, and who maps the memory next does so after it.
"""

from __future__ import annotations

from typing import Mapping, NamedTuple, Optional

import numpy as np

from .layout import Array


class Entry(NamedTuple):
    """A batch of flows of one address family; slots (i64) and what is to be stored there (u64, boot time)."""

    ip_version: int
    ends: bool
    """Whether the flows end with these records."""
    records: int
    slots: Array
    packets: Array
    octets: Array
    end_ns: Array
    exported: Mapping[str, int]
    """The ledger when all is done: `packets`, `octets` and `records` that were ever exported."""


_COLUMNS = {"slot": "slots", "packets": "packets", "octets": "octets", "end_ns": "end_ns"}


class Journal:
    """One `struct journal` in the table's memory (a structured array of one element)."""

    def __init__(self, memory: Array, constants: Mapping[str, int]) -> None:
        self._memory = memory
        self._states = {name: constants[f"JOURNAL_{name}"] for name in ("EMPTY", "SENDING", "SENT")}

    def _move_to(self, state: str) -> None:
        self._memory["state"][0] = self._states[state]

    def begin(self, entry: Entry) -> None:
        """SENDING: its records may be sent from now on. At most JOURNAL_FLOWS flows."""
        self._move_to("EMPTY")
        memory, flows = self._memory, len(entry.slots)
        for name, value in (("ip_version", entry.ip_version), ("ends", entry.ends), ("flows", flows)):
            memory[name][0] = value
        memory["records"][0] = entry.records
        for name, total in entry.exported.items():
            memory[f"exported_{name}"][0] = total
        for name, field in _COLUMNS.items():
            memory[name][0, :flows] = getattr(entry, field)
        self._move_to("SENDING")

    def doubtful(self) -> Optional[Entry]:
        """The batch whose Data Records may have been sent, as far as the journal can tell."""
        return self.entry() if self._memory["state"][0] == self._states["SENDING"] else None

    def sent(self) -> None:
        """SENT: all records of the batch have been sent."""
        self._move_to("SENT")

    def to_settle(self) -> bool:
        """Whether a batch has been sent, and slots and ledger do not all say so yet."""
        return bool(self._memory["state"][0] == self._states["SENT"])

    def entry(self) -> Entry:
        """The batch, unless EMPTY."""
        memory = self._memory
        flows = int(memory["flows"][0])
        columns = {field: memory[name][0, :flows].copy() for name, field in _COLUMNS.items()}
        return Entry(
            ip_version=int(memory["ip_version"][0]),
            ends=bool(memory["ends"][0]),
            records=int(memory["records"][0]),
            slots=columns["slots"].view(np.int64),
            packets=columns["packets"],
            octets=columns["octets"],
            end_ns=columns["end_ns"],
            exported={name: int(memory[f"exported_{name}"][0]) for name in ("packets", "octets", "records")},
        )

    def clear(self) -> None:
        """EMPTY: the batch is done."""
        self._move_to("EMPTY")
