# SPDX-License-Identifier: GPL-2.0-or-later
"""A TOML file: its text, and what is in it; what is wrong with it is a UsageError that names the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import toml

from flowexp.errors import UsageError
from flowexp.keys import show


def read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8; a configuration is text in UTF-8") from error


# toml 0.10.2 takes an array that the file's end cuts off, and drops the end of its last value.
# A section put behind the file then goes missing.
_LAST_SECTION = "end-of-file"


def _loads(text: str) -> Dict[str, Any]:
    document = toml.loads(f"{text}\n[{_LAST_SECTION}]\n")
    if document.pop(_LAST_SECTION, None) != {}:
        raise ValueError("the file ends within a value")
    return document


def parse(text: str, path: Path) -> Dict[str, Any]:
    try:
        return _loads(text)
    except Exception as error:  # TomlDecodeError, and what else toml trips over, as IndexError
        lines = text.split("\n")
        number = _line_of_error(lines, error)
        why = error.msg.partition("{")[0] if isinstance(error, toml.TomlDecodeError) else ""
        detail = f" ({' '.join(why.split())})" if why else ""
        raise UsageError(f"{path}:{number}: not TOML: {show(lines[number - 1].strip())}{detail}") from error


def _line_of_error(lines: List[str], error: Exception) -> int:
    """The line, from 1, where the statement begins that toml does not take: all before it can be read."""
    known = error.lineno if isinstance(error, toml.TomlDecodeError) else len(lines)
    for before in range(min(known, len(lines)) - 1, 0, -1):
        try:
            _loads("\n".join(lines[:before]))
        except Exception:
            continue
        return before + 1
    return 1
