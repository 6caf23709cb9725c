# SPDX-License-Identifier: GPL-2.0-or-later
"""flowexp's commands, run in this process or by nobody: how they ended and what they said."""

from __future__ import annotations

import os
import subprocess
from typing import NamedTuple

import pytest
from lab import needs
from lab.flowexp import COMMAND

from flowexp.cli import main

DONE, FAILED, WRONG_USAGE = 0, 1, 2


class Result(NamedTuple):
    """How a command ended, and what it said."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line that it said on standard error, less its own name."""
        name, _, rest = self.stderr.partition(": ")
        assert name == "flowexp", self.stderr
        assert rest.endswith("\n") and rest.count("\n") == 1, self.stderr
        return rest.rstrip("\n")


class Run:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        status = DONE
        try:
            main([str(word) for word in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
        said = self._capsys.readouterr()
        return Result(status, said.out, said.err)


def run_as_nobody(*arguments: object) -> Result:
    """The command itself, without any privilege."""
    needs.need(needs.exporter(), needs.tools("setpriv"))
    if os.geteuid() != 0:
        needs.need("not root")
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", str(COMMAND), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if "No module named" in done.stderr or "execution of" in done.stderr:
        needs.need(f"{COMMAND} cannot be run by nobody")
    return Result(done.returncode, done.stdout, done.stderr)
