# SPDX-License-Identifier: GPL-2.0-or-later
"""How many slots packets should use: up at once, down after a quiet minute."""

from __future__ import annotations

import pytest

from flowexp.metering.fitting import CALM_NS, LEAST_SLOTS, SLOTS_A_FLOW, Fitting, slots_for

ALL = 5_991_872


@pytest.mark.parametrize(
    ("flows", "slots"),
    [(0, LEAST_SLOTS), (8192, LEAST_SLOTS), (8193, 65_536), (100_000, 524_288), (500_000, 2_097_152), (10**6, ALL)],
)
def test_slots_are_a_power_of_two_with_four_to_eight_a_flow_and_all_where_half_would_not_do(
    flows: int, slots: int
) -> None:
    assert slots_for(flows, ALL) == slots
    assert slots >= SLOTS_A_FLOW * flows


@pytest.mark.parametrize("all_slots", [16, 32, LEAST_SLOTS, 2 * LEAST_SLOTS - 16])
def test_a_small_table_is_used_whole(all_slots: int) -> None:
    assert slots_for(0, all_slots) == all_slots


def test_all_slots_are_used_at_once_when_more_than_half_of_those_in_use_are_taken() -> None:
    fitting = Fitting(ALL)
    assert fitting.slots(LEAST_SLOTS // 2, LEAST_SLOTS, 1) == LEAST_SLOTS
    assert fitting.slots(LEAST_SLOTS // 2 + 1, LEAST_SLOTS, 2) == ALL
    assert not fitting.is_crowded(ALL, ALL)


def test_fewer_slots_are_used_after_a_minute_for_the_most_flows_there_were_in_it() -> None:
    fitting = Fitting(ALL)
    assert fitting.slots(10, ALL, CALM_NS) == LEAST_SLOTS  # the first look, long after the clock began
    for flows, part in ((100_000, 1), (20_000, 2), (100, 3)):
        assert fitting.slots(flows, ALL, CALM_NS + part * CALM_NS // 4) == ALL
    assert fitting.slots(100, ALL, 2 * CALM_NS) == slots_for(100_000, ALL)
    assert fitting.slots(100, 524_288, 3 * CALM_NS - 1) == 524_288
    assert fitting.slots(100, 524_288, 3 * CALM_NS) == LEAST_SLOTS


def test_a_quiet_minute_never_makes_it_more() -> None:
    assert Fitting(ALL).slots(LEAST_SLOTS // 2, LEAST_SLOTS, CALM_NS) == LEAST_SLOTS
