# SPDX-License-Identifier: GPL-2.0-or-later
"""The generated parts of README.md and packaging/docs/ are what the code says, and what they point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowexp.protocol.catalogue import field_table

ROOT = Path(__file__).parents[2]
MATRIX = ROOT / "tests" / "interop" / "matrix.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("packaging/docs/*.md"), *ROOT.glob("packaging/*.md")])


def part(page: str, mark: str) -> str:
    """What stands on a page between the comments `mark` and `/mark`."""
    return (ROOT / page).read_text(encoding="utf-8").split(f"<!-- {mark} -->\n")[1].split(f"<!-- /{mark} -->")[0]


def test_the_field_table_is_the_one_of_the_default_templates() -> None:
    assert part("packaging/docs/records.md", "fields").strip() == field_table().strip()


def test_the_table_of_collectors_is_the_one_that_their_tests_found() -> None:
    assert part("packaging/docs/collectors.md", "matrix") == MATRIX.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
