# SPDX-License-Identifier: GPL-2.0-or-later
"""The ledger's arithmetic, and the line that it leaves in the log."""

from __future__ import annotations

from typing import Dict

from lab.flowexp import read_ledger_line

from flowexp.metering.ledger import Count, Ledger

COUNTERS: Dict[str, Count] = {
    "seen": (100, 9000),
    "not_metered_not_ip": (7, 420),
    "not_metered_table_full": (0, 0),
    "not_metered_own_export": (3, 300),
    "flows_created": (12, 0),
}


def ledger(*, exported: Count = (80, 8000), in_table: Count = (10, 280), **counters: Count) -> Ledger:
    return Ledger.from_counters({**COUNTERS, **counters}, exported=exported, in_table=in_table)


def test_a_ledger_closes_when_all_that_was_seen_is_accounted_for() -> None:
    assert ledger().missing() == (0, 0)


def test_packets_that_nobody_accounts_for_are_missing() -> None:
    assert ledger(exported=(79, 7960)).missing() == (1, 40)


def test_packets_that_were_accounted_for_twice_are_missing_below_zero() -> None:
    assert ledger(exported=(82, 8100)).missing() == (-2, -100)


def test_octets_alone_may_be_missing() -> None:
    assert ledger(in_table=(10, 279)).missing() == (0, 1)


def test_every_reason_counts_and_what_is_no_reason_does_not() -> None:
    found = ledger(not_metered_malformed=(1, 60), seen=(101, 9060))
    assert found.missing() == (0, 0)
    assert list(found.not_metered) == ["not_ip", "table_full", "own_export", "malformed"]


def test_the_line_names_the_parts_in_packets_and_only_reasons_that_occurred() -> None:
    assert str(ledger()) == (
        "100 packets seen = 80 exported + 10 in the table + 7 not metered (not ip)"
        " + 3 not metered (own export); the ledger closes"
    )


def test_the_line_says_by_how_much_the_ledger_does_not_close() -> None:
    line = str(ledger(exported=(79, 7999)))
    assert line.endswith("; the ledger DOES NOT CLOSE, off by 1 packets, 1 octets")


def test_a_ledger_that_is_off_by_octets_alone_does_not_close() -> None:
    assert "DOES NOT CLOSE, off by 0 packets, 1 octets" in str(ledger(in_table=(10, 279)))


def test_an_empty_ledger_closes() -> None:
    empty = Ledger.from_counters({"seen": (0, 0)}, exported=(0, 0), in_table=(0, 0))
    assert str(empty) == "0 packets seen = 0 exported + 0 in the table; the ledger closes"


def test_the_line_reads_back_as_the_same_figures() -> None:
    read = read_ledger_line(f"flowexp: {ledger()}\n")
    assert read.closes
    assert (read.seen, read.exported, read.in_table) == (100, 80, 10)
    assert read.not_metered == {"not ip": 7, "own export": 3}


def test_json_has_packets_and_octets_of_every_part() -> None:
    assert ledger(exported=(79, 7960)).as_dict() == {
        "seen": {"packets": 100, "octets": 9000},
        "exported": {"packets": 79, "octets": 7960},
        "inTable": {"packets": 10, "octets": 280},
        "notMetered": {
            "not_ip": {"packets": 7, "octets": 420},
            "table_full": {"packets": 0, "octets": 0},
            "own_export": {"packets": 3, "octets": 300},
        },
        "missing": {"packets": 1, "octets": 40},
    }
