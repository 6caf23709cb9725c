# SPDX-License-Identifier: GPL-2.0-or-later
"""From a file and the options of a command to the configuration.

What is wrong in either is a UsageError of one line: where, which key, what, what is allowed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

from flowexp.config import EVERYTHING, Collector, Config, directions
from flowexp.config_check import check_together
from flowexp.config_values import Interfaces, Url
from flowexp.errors import UsageError
from flowexp.keys import UnknownKeyError, fill
from flowexp.toml_file import parse, read_text

DEFAULT_PATH = Path("/etc/flowexp/flowexp.toml")


def load(
    path: Optional[Path],
    *,
    interfaces: Sequence[str] = (),
    collectors: Sequence[str] = (),
    direction: Optional[str] = None,
    persist: bool = False,
) -> Config:
    """The configuration in the file at `path`, or else in DEFAULT_PATH if that exists, with options on top.

    An option that is given takes the place of the file's key; `collectors` are URLs. At least one Collector
    must be named, there or here. UsageError where anything is wrong.
    """
    source, config = _find(path, may_be_missing=bool(collectors))
    config = _override(config, interfaces=interfaces, collectors=collectors, direction=direction, persist=persist)
    if not config.collectors:
        raise UsageError(f"{source}: no [[collector]]; add one with its url, or give --collector URL")
    try:
        check_together(config)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    return config


def find(path: Optional[Path]) -> Config:
    """The configuration in the file at `path`, or else in DEFAULT_PATH, or else the defaults; for commands
    that need no Collector. UsageError where anything is wrong."""
    return _find(path, may_be_missing=True)[1]


def find_place(path: Optional[Path]) -> Tuple[Config, Optional[UsageError]]:
    """As find(). Of a file with a wrong key or value: its [table] pin_path alone, and what is wrong; who asks how an
    exporter is, or takes away what it has left, needs no more."""
    try:
        return find(path), None
    except UsageError as error:
        wanted = path or DEFAULT_PATH
        if not wanted.is_file():
            raise
        table = parse(read_text(wanted), wanted).get("table", {})  # UsageError where it is no TOML
        if not isinstance(table, dict):
            raise
        try:
            return fill(EVERYTHING, {"table": {name: table[name] for name in table.keys() & {"pin_path"}}}), error
        except ValueError:
            raise error from None


def read(path: Path) -> Config:
    """The configuration in the file at `path`; FileNotFoundError, or UsageError for all else."""
    document = parse(read_text(path), path)
    try:
        config: Config = fill(EVERYTHING, document)
    except UnknownKeyError as error:
        raise UsageError(f"{path}: {error}; the nearest is {error.nearest(EVERYTHING)}") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    return config


def _find(path: Optional[Path], *, may_be_missing: bool) -> Tuple[str, Config]:
    """Where the configuration comes from, for messages, and what it is."""
    wanted = path or DEFAULT_PATH
    try:
        return str(wanted), read(wanted)
    except FileNotFoundError as error:
        if path is not None:
            raise UsageError(f"{path}: there is no such file") from error
        if not may_be_missing:
            advice = "write it, or give -c FILE or --collector URL"
            raise UsageError(f"there is no {DEFAULT_PATH}; {advice}") from error
        return "command line", Config()


def _override(
    config: Config,
    *,
    interfaces: Sequence[str],
    collectors: Sequence[str],
    direction: Optional[str],
    persist: bool,
) -> Config:
    given: Dict[str, Any] = {}
    try:
        if interfaces:
            given["interfaces"] = Interfaces().read(interfaces, "-i")
        if direction is not None:
            given["direction"] = directions.read(direction, "--direction")
        if collectors:
            given["collectors"] = tuple(Collector(url=Url().read(url, "--collector")) for url in collectors)
        if persist:
            given["table"] = dataclasses.replace(config.table, persist=True)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return dataclasses.replace(config, **given)
