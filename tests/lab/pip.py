# SPDX-License-Identifier: GPL-2.0-or-later
"""Tools of PyPI that one test alone asks, installed for as long as it runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .process import CommandFailed, run

INSTALL_S = 120.0


@cache
def support() -> str | None:
    """Whether pip gets anything from its index: None, or why not."""
    with tempfile.TemporaryDirectory(prefix="flowexp-pip-") as folder:
        try:
            run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "toml"])
        except (CommandFailed, subprocess.TimeoutExpired) as error:
            return f"pip gets nothing: {error}"
    return None


def pip_install(folder: Path, *packages: str) -> Path:
    """A folder for PYTHONPATH with these packages in it."""
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", folder / "pip", *packages]
    run(words, timeout_s=INSTALL_S)
    return folder / "pip"


def pip_tool(folder: Path, package: str) -> Callable[..., str]:
    """The command of the package's name: takes its words, returns what it prints."""
    installed = pip_install(folder, package)
    command = ["env", f"PYTHONPATH={installed}", installed / "bin" / package]
    return lambda *words: run([*command, *words])
