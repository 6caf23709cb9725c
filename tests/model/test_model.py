# SPDX-License-Identifier: GPL-2.0-or-later
"""The protocol of the flow table's slots in every interleaving, checked by spin; broken, spin has to see it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import needs

MODEL = Path(__file__).with_name("slots.pml")
SEARCH_S = 300
MEMORY_MIB = 4096


class World(NamedTuple):
    """How large the model is; all that matters happens in small ones."""

    slots: int
    packets: tuple[int, int]
    kills: int

    @property
    def definitions(self) -> list[str]:
        values = {"SLOTS": self.slots, "PACKETS_0": self.packets[0], "PACKETS_1": self.packets[1], "KILLS": self.kills}
        return [f"-D{name}={value}" for name, value in values.items()]


SLOTS_AND_KILL = World(slots=2, packets=(1, 1), kills=1)  # a batch of two flows, half done
OWNERS_AND_KILL = World(slots=1, packets=(2, 1), kills=1)  # a late packet, and a slot's next owner
KILLS = World(slots=1, packets=(1, 1), kills=2)  # a recovery that is killed
LONG = World(slots=2, packets=(2, 1), kills=0)


class Search(NamedTuple):
    """What spin says at the end."""

    errors: int
    unreached: int
    violated: str


def search(directory: Path, world: World, mutants: Iterable[str] = ()) -> Search:
    """Goes through all states of the model, or until one is wrong."""
    defined = [*world.definitions, *(f"-D{mutant}" for mutant in mutants)]
    for command in (
        ["spin", *defined, "-a", MODEL],
        ["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}", "-o", "pan", "pan.c"],
    ):
        subprocess.run(command, cwd=directory, check=True, capture_output=True)
    done = subprocess.run(["./pan", "-m100000"], cwd=directory, check=True, capture_output=True, timeout=SEARCH_S)
    said = done.stdout.decode()
    assert "max search depth too small" not in said
    (errors,) = re.findall(r"errors: (\d+)", said)
    assert int(errors) or "Search not completed" not in said, said
    unreached = sum(int(count) for count in re.findall(r"\((\d+) of \d+ states\)", said))
    violated = re.search(r"pan:\d+: (.*) \(at depth", said)
    return Search(int(errors), unreached, violated[1] if violated else "")


@pytest.fixture(autouse=True)
def spin() -> None:
    needs.need(needs.tools("spin", "gcc"))


@pytest.mark.parametrize("world", [SLOTS_AND_KILL, OWNERS_AND_KILL, KILLS, LONG], ids=str)
def test_nothing_is_lost_counted_twice_or_added_to_another_flow_in_any_interleaving(
    tmp_path: Path, world: World
) -> None:
    found = search(tmp_path, world)
    assert (found.errors, found.violated) == (0, "")
    if world == SLOTS_AND_KILL:
        assert found.unreached == 0  # every line of the model was executed


@pytest.mark.parametrize(
    ("mutant", "world"),
    [
        pytest.param("NO_GRACE", OWNERS_AND_KILL, id="a sweep without a grace period"),
        pytest.param("NO_CLOSING", OWNERS_AND_KILL, id="an end without closing the slot first"),
        pytest.param("ZERO_LAST", OWNERS_AND_KILL, id="a slot freed before it is zeroed"),
        pytest.param("NO_BACK_OFF", SLOTS_AND_KILL, id="a claim that does not look again"),
        pytest.param("NO_COMMIT", SLOTS_AND_KILL, id="slots and ledger moved on without the journal"),
        pytest.param("CTL_BEFORE_TAG", SLOTS_AND_KILL, id="a recovery that takes a flow in the making for none"),
    ],
)
def test_a_broken_protocol_is_found_out(tmp_path: Path, mutant: str, world: World) -> None:
    found = search(tmp_path, world, [mutant])
    assert found.errors == 1
    assert "assertion violated" in found.violated
