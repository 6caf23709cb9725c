# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark runs and its table is what its JSON says. No figure decides anything here."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import sizing
from bench.__main__ import measurements
from bench.figures import Figure, Report, shown
from lab import needs
from lab.markdown import put_into

FIGURES = [
    Figure("Group", "cost", "ns", "other", [5, 7, 6]),
    Figure("Group", "cost", "ns", "flowexp", [1.25]),
    Figure("Group", "rate", "flows/s", "flowexp", [1234567, 1234567]),
]


def test_the_table_has_a_row_for_each_measurement_and_flowexp_in_its_first_column() -> None:
    assert Report("a machine", FIGURES).markdown().splitlines() == [
        "On a machine. Medians, in brackets the least and the greatest value; "
        "behind ×, the multiple of flowexp's median.",
        "",
        "**Group**",
        "",
        "|  | flowexp | other |",
        "| --- | --- | --- |",
        "| cost, ns | 1.25 | 6 (5 to 7) ×4.80 |",
        "| rate, flows/s | 1,234,567 |  |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (12.34, "12.3"), (-1.5, "-1.5"), (100, "100"), (99999.6, "100,000")],
)
def test_figures_are_shown_with_three_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert shown(value) == text


def test_a_report_that_was_written_is_read_back_whole(tmp_path: Path) -> None:
    Report("a machine", FIGURES).write(tmp_path / "build" / "bench.json")
    assert Report.read(tmp_path / "build" / "bench.json").markdown() == Report("a machine", FIGURES).markdown()


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n", encoding="utf-8")
    put_into(readme, "bench", "new\n")
    assert readme.read_text(encoding="utf-8") == "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter\n"


def test_a_file_without_markers_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no <!-- bench -->"):
        put_into(readme, "bench", "new")
    assert readme.read_text(encoding="utf-8") == "before\n<!-- bench -->\n"


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["packet", "growth", "lateness", "capture", "flood"])
def test_a_measurement_can_be_made_and_has_figures_of_us(name: str, tmp_path: Path) -> None:
    needs.need(needs.tools("clang", "gcc"), needs.kernel())
    figures = measurements(quick=True)[name](tmp_path)
    assert all(figure.values for figure in figures)
    assert Report("a machine", figures).markdown()


@pytest.mark.kernel
def test_sizing_measures_a_table(tmp_path: Path) -> None:
    needs.need(needs.tools("clang", "gcc"), needs.kernel())
    figures = sizing.column(4_096, tmp_path, packets=2_000, seconds=0.1)
    assert len(figures) == len(sizing.ROWS)
    assert figures[0] == "4,096"
