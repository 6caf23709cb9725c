# SPDX-License-Identifier: GPL-2.0-or-later
"""The lines at the foot of `top` where a filter is typed, with a caret under what is wrong with it."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

Select = Callable[[Dict[str, Any]], Dict[str, Any]]

ENTER, ESCAPE = "\n", "\x1b"
_BACKSPACE, _ERASE = ("\x7f", "\b"), "\x15"  # Ctrl-U
_MARK = "/ "  # as wide as what stands before an expression in a FilterError
_HELP = "Enter: only these flows (nothing typed: all)  Ctrl-U: erase  Esc: as before"


class FilterPrompt:
    """An expression as far as it is typed, and what was wrong with it."""

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self._wrong: List[str] = []

    def press(self, key: str) -> None:
        """A letter more, or fewer."""
        self._wrong = []
        if key in _BACKSPACE:
            self.expression = self.expression[:-1]
        elif key == _ERASE:
            self.expression = ""
        elif key.isascii() and key.isprintable():
            self.expression += key

    def refuse(self, error: Exception) -> None:
        """Shows a FilterError until the next key."""
        self._wrong = str(error).split("\n")

    @property
    def lines(self) -> List[str]:
        typed = f"{_MARK}{self.expression}"
        if not self._wrong:
            return [f"{typed}_", _HELP]
        what, _, caret = self._wrong
        return [what, typed, caret]


def selection(expression: str) -> Optional[Select]:
    """What takes the flows of a filter; None, for all of them, where there is no expression. FilterError."""
    if not expression.strip():
        return None
    from .filters import Filter  # only now: it needs lark

    return Filter(expression).select
