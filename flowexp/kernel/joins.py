# SPDX-License-Identifier: GPL-2.0-or-later
"""Field groups of which packets are not asked but the kernel is, as a flow's record is due."""

from __future__ import annotations

from typing import Callable, Iterable, List

from .conntrack import Translations
from .flows import Columns
from .routes import Routes

Join = Callable[[Columns], Columns]
"""Columns of flows of one family -> these, and what the kernel says of the flows."""


class Prefixes:
    """Joins to flows how long the prefixes are that their addresses are routed by."""

    def __init__(self) -> None:
        self._routes = Routes()

    def __call__(self, columns: Columns) -> Columns:
        lengths = {f"{side}_prefix_length": self._routes.prefix_lengths(columns[f"{side}_addr"]) for side in _SIDES}
        return {**columns, **lengths}


_SIDES = ("src", "dst")
_JOINS: dict[str, Callable[[], Join]] = {"nat": Translations, "routing": Prefixes}


def is_asked(group: str) -> bool:
    """Whether it is the kernel that knows, and so nobody once the packets are in a capture."""
    return group in _JOINS


def joins_for(groups: Iterable[str]) -> List[Join]:
    """Those that these field groups need. FlowexpError where this kernel cannot be asked."""
    return [_JOINS[name]() for name in groups if name in _JOINS]
