# SPDX-License-Identifier: GPL-2.0-or-later
"""The README's generated parts are what the code says."""

from __future__ import annotations

from pathlib import Path

from flowexp.protocol.template import default_templates, field_table

README = Path(__file__).parents[2] / "README.md"


def test_the_field_table_is_the_one_of_the_default_templates() -> None:
    between = README.read_text(encoding="utf-8").split("<!-- fields -->")[1].split("<!-- /fields -->")[0]
    assert between.strip() == field_table(default_templates()).strip()
