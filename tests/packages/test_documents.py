# SPDX-License-Identifier: GPL-2.0-or-later
"""Man pages, completions and unit: made from the program, and sound."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lab import needs
from lab.process import run

from flowexp.cli import cli
from flowexp.config import keys

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    run([sys.executable, PACKAGING / "documents.py", folder])
    return folder


def test_the_man_pages_name_every_command_and_every_key(documents: Path) -> None:
    commands = (documents / "flowexp.1").read_text()
    assert [name for name in cli.commands if f"\n.Ss flowexp {name}\n" not in commands] == []
    configuration = (documents / "flowexp.toml.5").read_text()
    assert [key.name for key in keys() if f"\n.It \\fB{key.name}\\fR\n" not in configuration] == []


@pytest.mark.parametrize("page", ["flowexp.1", "flowexp.toml.5"])
def test_a_man_page_is_without_a_warning(documents: Path, page: str) -> None:
    needs.need(needs.tools("mandoc"))
    assert run(["mandoc", "-T", "lint", "-W", "warning,stop", documents / page]) == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_asks_the_program_for_completions(documents: Path, shell: str) -> None:
    assert f"_FLOWEXP_COMPLETE={shell}_complete" in (documents / f"flowexp.{shell}").read_text()


def test_the_service_is_exposed_to_2_0_at_most() -> None:
    needs.need(needs.tools("systemd-analyze"))
    unit = PACKAGING / "flowexp.service"
    run(["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=20", unit])
