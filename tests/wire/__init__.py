# SPDX-License-Identifier: GPL-2.0-or-later
"""Golden Messages: one field a line, its octets in hexadecimal and then its label."""

from __future__ import annotations

from pathlib import Path

NAMES = sorted(path.name for path in Path(__file__).parent.glob("*.txt"))


def golden(name: str) -> bytes:
    """The octets of a file here."""
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return bytes.fromhex("".join(line.split()[0] for line in lines if line and not line.startswith("#")))
