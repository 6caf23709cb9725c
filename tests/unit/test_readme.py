# SPDX-License-Identifier: GPL-2.0-or-later
"""The README's generated parts are what the code says."""

from __future__ import annotations

from pathlib import Path

from flowexp.protocol.catalogue import field_table

README = Path(__file__).parents[2] / "README.md"
MATRIX = Path(__file__).parents[1] / "interop" / "matrix.md"


def test_the_field_table_is_the_one_of_the_default_templates() -> None:
    between = README.read_text(encoding="utf-8").split("<!-- fields -->")[1].split("<!-- /fields -->")[0]
    assert between.strip() == field_table().strip()


def test_the_table_of_collectors_is_the_one_that_their_tests_found() -> None:
    between = README.read_text(encoding="utf-8").split("<!-- matrix -->\n")[1].split("<!-- /matrix -->")[0]
    assert between == MATRIX.read_text(encoding="utf-8")
