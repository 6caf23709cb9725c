# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line as a new user meets it: help, exit statuses, and errors of one line that say what to do."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import List

import pytest
from commands import DONE, FAILED, WRONG_USAGE, Run
from lab import needs
from lab.flowexp import COMMAND

from flowexp import __version__
from flowexp.cli import cli

COLLECTOR = "udp://127.0.0.1:4739"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


# Help


def test_help_lists_every_command_with_its_purpose(run: Run) -> None:
    shown = run("--help")
    assert (shown.status, shown.stderr) == (DONE, "")
    for name in cli.commands:
        assert f"\n  {name} " in shown.stdout
    assert "..." not in shown.stdout.split("Commands:")[1]


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_has_help(command: str, run: Run) -> None:
    shown = run(command, "--help")
    assert (shown.status, shown.stderr) == (DONE, "")
    assert f" {command} [OPTIONS]" in shown.stdout
    assert shown.stdout == run(command, "-h").stdout


def test_the_commands_of_the_contract_are_there() -> None:
    assert {"run", "dump", "collect", "check"} <= set(cli.commands)


def test_help_needs_neither_numpy_nor_root() -> None:
    without = "import sys; sys.modules['numpy'] = None; from flowexp.cli import main; main(['run', '--help'])"
    interpreter = COMMAND.parent / "python"
    shown = subprocess.run([interpreter, "-c", without], capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (DONE, "")


def test_no_command_at_all_shows_the_help(run: Run) -> None:
    shown = run()
    assert "\nCommands:\n" in shown.stdout + shown.stderr


def test_version_is_on_standard_output(run: Run) -> None:
    assert run("--version") == (DONE, f"flowexp, version {__version__}\n", "")


# Wrong usage: status 2


def test_an_unknown_command_is_named(run: Run) -> None:
    shown = run("fly")
    assert shown.status == WRONG_USAGE
    assert "No such command 'fly'" in shown.error


def test_an_unknown_option_is_named(run: Run) -> None:
    shown = run("run", "--interval", "5")
    assert shown.status == WRONG_USAGE
    assert "--interval" in shown.error


def test_a_direction_that_is_none_gets_the_four_that_are(run: Run) -> None:
    shown = run("run", "--direction", "sideways")
    assert shown.status == WRONG_USAGE
    assert all(word in shown.error for word in ("sideways", "once", "ingress", "egress", "both"))


def test_no_configuration_and_no_collector_names_both(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Path("/nonexistent/flowexp.toml")
    monkeypatch.setattr("flowexp.config_load.DEFAULT_PATH", missing)
    shown = run("run")
    assert shown.status == WRONG_USAGE
    assert shown.error == f"there is no {missing}; write it, or give -c FILE or --collector URL"


def test_a_configuration_without_a_collector_says_how_to_name_one(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "flowexp.toml"
    file.write_text('interfaces = ["lo"]\n')
    shown = run("run", "-c", file)
    assert shown.status == WRONG_USAGE
    assert shown.error == f"{file}: no [[collector]]; add one with its url, or give --collector URL"


@pytest.mark.parametrize("duration", ["soon", "", "-1s", "10d", "1e9", "nan", "inf", "10 s m", "ms"])
def test_a_duration_that_is_no_time_gets_the_ways_to_write_one(duration: str, run: Run) -> None:
    shown = run("dump", "--duration", duration)
    assert shown.status == WRONG_USAGE
    assert shown.error == f"--duration {duration}: not a time; write 500ms, 10s, 5m or 1h"


def test_a_capture_has_interfaces_of_its_own(run: Run, tmp_path: Path) -> None:
    shown = run("dump", "--read", tmp_path / "x.pcap", "-i", "lo")
    assert shown.status == WRONG_USAGE
    assert shown.error.startswith("--read and --interface cannot go together")


def test_a_format_that_is_none_gets_those_that_are(run: Run) -> None:
    shown = run("dump", "--format", "xml")
    assert shown.status == WRONG_USAGE
    assert all(word in shown.error for word in ("xml", "table", "json", "csv", "ipfix"))


@pytest.mark.parametrize(("options", "error"), [
    (["--totals"], "--totals is of a running exporter's table; elsewhere nothing was exported before"),
    (["--top", "3", "--sort", "start"], "--top is --sort and --limit in one: give either"),
    (["--names", "--format", "csv"],
     "--names is for --format table: csv has numbers, which every program understands"),
    (["--aggregate", "octetDeltaCount"], "--aggregate octetDeltaCount: octetDeltaCount is summed, and no key"),
])  # fmt: skip
def test_what_dump_cannot_do_together_is_told(options: List[str], error: str, run: Run, tmp_path: Path) -> None:
    shown = run("dump", "--read", tmp_path / "none.pcap", *options)
    assert (shown.status, shown.error, shown.stdout) == (WRONG_USAGE, error, "")


# Done: status 0


def test_check_reports_what_it_found_and_ends_with_0(run: Run) -> None:
    needs.need(needs.namespace_support(), needs.bpf())
    shown = run("check", "-i", "lo", "--collector", COLLECTOR)
    assert (shown.status, shown.stderr) == (DONE, "")
    assert {line.split()[0] for line in shown.stdout.splitlines()} <= {"ok", "warning"}
    assert "configuration" in shown.stdout.splitlines()[0]


def test_check_says_what_would_keep_the_exporter_from_working_and_ends_with_1(run: Run, tmp_path: Path) -> None:
    needs.need(needs.namespace_support(), needs.bpf())
    shown = run("check", "-i", "lo", "--collector", f"file://{tmp_path}/no/such/folder/flows")
    assert shown.status == FAILED
    assert sum(line.startswith("FAILED") for line in shown.stdout.splitlines()) == 1
    assert shown.stderr == "flowexp: check: 1 of these would keep the exporter from working\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    needs.need(needs.exporter())
    with subprocess.Popen([COMMAND, "run", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        status = process.wait()
    assert b"Traceback" not in said
    assert status in (DONE, FAILED)
