# SPDX-License-Identifier: GPL-2.0-or-later
"""A configuration that is read again: what of it takes effect at once, what needs a restart, and how that went.

The rule: a file with anything wrong in it changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Callable, List, Optional, Tuple

from .config import Config
from .config_check import check_together
from .errors import FlowexpError
from .status import Configuration

_FIXED = ("hook", "xdp_force", "loader")
_FIXED_SECTIONS = ("table",)
_SECOND_NS = 1_000_000_000


def merged(running: Config, wanted: Config) -> Tuple[Config, List[str]]:
    """`wanted`, but for what cannot change in a running exporter; and which keys these are."""
    kept = [name for name in _FIXED if getattr(running, name) != getattr(wanted, name)]
    values = {name: getattr(running, name) for name in kept}
    if "once" in (running.direction, wanted.direction) and running.direction != wanted.direction:
        kept.append("direction")  # the programs are made for it
        values["direction"] = running.direction
    for section in _FIXED_SECTIONS:
        before, after = getattr(running, section), getattr(wanted, section)
        differing = [
            each.name for each in dataclasses.fields(before) if getattr(before, each.name) != getattr(after, each.name)
        ]
        kept += [f"[{section}] {name}" for name in differing]
        values[section] = before
    for section, name in (("fields", "groups"), ("export", "mark")):
        before, after = getattr(running, section), getattr(wanted, section)
        if getattr(before, name) != getattr(after, name):
            kept.append(f"[{section}] {name}")
            values[section] = dataclasses.replace(after, **{name: getattr(before, name)})
    return dataclasses.replace(wanted, **values), kept


class Reloads:
    """When the configuration was read, and what became of it the last time. Times are boot time."""

    def __init__(self, now_ns: int) -> None:
        self._loaded_ns = now_ns
        self._reloads = 0
        self._need_restart: List[str] = []
        self._refused: Optional[Tuple[int, str]] = None

    def loaded(self, now_ns: int, need_restart: List[str]) -> None:
        self._loaded_ns, self._need_restart, self._refused = now_ns, need_restart, None
        self._reloads += 1

    def refused(self, now_ns: int, reason: str) -> None:
        self._refused = now_ns, reason

    def status(self, now_ns: int) -> Configuration:
        refused = self._refused
        return Configuration(
            ageSeconds=(now_ns - self._loaded_ns) / _SECOND_NS,
            reloads=self._reloads,
            needRestart=self._need_restart,
            refusal=None if refused is None else refused[1],
            refusalAgeSeconds=None if refused is None else (now_ns - refused[0]) / _SECOND_NS,
        )


def read_again(load: Callable[[], Config], running: Config) -> Tuple[Config, List[str]]:
    """What `load` reads, merged. FlowexpError, on one line, where it cannot be had."""
    try:
        config, need_restart = merged(running, load())
    except FlowexpError as error:
        raise FlowexpError(" ".join(str(error).split())) from error
    try:
        check_together(config)
    except ValueError as error:
        raise FlowexpError(f"{error}; that takes a restart ({', '.join(need_restart)})") from error
    try:
        check_together(dataclasses.replace(config, sampling=running.sampling))
    except ValueError as error:
        raise FlowexpError(f"{error}; change [sampling] first, with flows of that interval still to export") from error
    return config, need_restart
