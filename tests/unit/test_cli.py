# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line as a new user meets it: help, exit statuses, and errors of one line that say what to do."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import List, NamedTuple

import pytest
from lab import needs
from lab.flowexp import BPFFS, COMMAND

from flowexp import __version__
from flowexp.cli import cli, main

COLLECTOR = "udp://127.0.0.1:4739"
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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


def run_as_nobody(*arguments: str) -> Result:
    """The command itself, without any privilege."""
    needs.need(needs.exporter(), needs.tools("setpriv"))
    if os.geteuid() != 0:
        needs.need("not root")
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", str(COMMAND), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if "No module named" in done.stderr or "execution of" in done.stderr:
        needs.need(f"{COMMAND} cannot be run by nobody")
    return Result(done.returncode, done.stdout, done.stderr)


# Help


def test_help_lists_every_command_with_its_purpose(run: Run) -> None:
    shown = run("--help")
    assert (shown.status, shown.stderr) == (DONE, "")
    for name in cli.commands:
        assert f"\n  {name} " in shown.stdout


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


def test_no_such_interface_is_named_with_those_that_exist(run: Run) -> None:
    shown = run("run", "-i", "nosuch0", "--collector", COLLECTOR)
    assert shown.status == WRONG_USAGE
    assert shown.error.startswith("interface nosuch0: there is no such device here; there are: ")
    assert "lo" in shown.error.rpartition(": ")[2].split(", ")


def test_no_configuration_and_no_collector_names_both(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Path("/nonexistent/flowexp.toml")
    monkeypatch.setattr("flowexp.config.DEFAULT_PATH", missing)
    shown = run("run")
    assert shown.status == WRONG_USAGE
    assert shown.error == f"there is no {missing}; write it, or give -c FILE or --collector URL"


def test_a_configuration_without_a_collector_says_how_to_name_one(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "flowexp.toml"
    file.write_text('interfaces = ["lo"]\n')
    shown = run("run", "-c", file)
    assert shown.status == WRONG_USAGE
    assert shown.error == f"{file}: no [[collector]]; add one with its url, or give --collector URL"


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_configuration_that_is_not_there_is_named(command: str, run: Run, tmp_path: Path) -> None:
    shown = run(command, "-c", tmp_path / "none.toml")
    assert (shown.status, shown.error) == (WRONG_USAGE, f"{tmp_path}/none.toml: there is no such file")


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_directory_is_no_configuration(command: str, run: Run, tmp_path: Path) -> None:
    shown = run(command, "-c", tmp_path)
    assert (shown.status, shown.error) == (WRONG_USAGE, f"{tmp_path}: cannot be read: Is a directory")


def test_a_configuration_below_a_file_cannot_be_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = run("run", "-c", tmp_path / "file" / "flowexp.toml")
    assert (shown.status, shown.error) == (
        WRONG_USAGE,
        f"{tmp_path}/file/flowexp.toml: cannot be read: Not a directory",
    )


def test_a_configuration_that_is_not_toml_is_named_with_the_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "flowexp.toml"
    file.write_text('interfaces = ["lo"]\n\nhook tc\n')
    shown = run("run", "-c", file)
    assert shown.status == WRONG_USAGE
    assert shown.error.startswith(f'{file}:3: not TOML: "hook tc"')


@pytest.mark.parametrize("url", ["127.0.0.1:4739", "http://127.0.0.1", "udp://127.0.0.1:99999", "udp://", ""])
def test_a_collector_that_is_no_url_gets_an_error_of_one_line(url: str, run: Run) -> None:
    shown = run("run", "--collector", url)
    assert shown.status == WRONG_USAGE
    assert shown.error.startswith("--collector: ")


@pytest.mark.parametrize("duration", ["soon", "", "-1s", "10d", "1e9", "nan", "inf", "10 s m", "ms"])
def test_a_duration_that_is_no_time_gets_the_ways_to_write_one(duration: str, run: Run) -> None:
    shown = run("dump", "--duration", duration)
    assert shown.status == WRONG_USAGE
    assert shown.error == f"--duration {duration}: not a time; write 500ms, 10s, 5m or 1h"


def test_a_capture_has_interfaces_of_its_own(run: Run, tmp_path: Path) -> None:
    shown = run("dump", "--read", tmp_path / "x.pcap", "-i", "lo")
    assert shown.status == WRONG_USAGE
    assert shown.error.startswith("--read and --interface cannot go together")


def test_ipfix_does_not_go_to_a_terminal(run: Run) -> None:
    shown = run("dump", "--format", "ipfix", "--duration", "0")
    assert (shown.status, shown.error) == (
        WRONG_USAGE,
        "--format ipfix is binary; name a file for it with -o FILE",
    )


def test_a_format_that_is_none_gets_those_that_are(run: Run) -> None:
    shown = run("dump", "--format", "xml")
    assert shown.status == WRONG_USAGE
    assert all(word in shown.error for word in ("xml", "table", "json", "csv", "ipfix"))


@pytest.mark.parametrize("form", ["json", "ipfix"])
@pytest.mark.parametrize("where", ["", "no/such/folder/flows"])
def test_an_output_that_cannot_be_written_is_named(form: str, where: str, run: Run, tmp_path: Path) -> None:
    needs.need(needs.namespace_support(), needs.bpf())
    shown = run("dump", "-i", "lo", "--duration", "0", "--format", form, "-o", tmp_path / where)
    assert shown.status in (FAILED, WRONG_USAGE)
    errors = [line for line in shown.stderr.splitlines() if line.startswith(f"flowexp: {tmp_path / where}: ")]
    assert len(errors) == 1, shown.stderr
    assert "Traceback" not in shown.stderr


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


@pytest.mark.parametrize("command", ["status", "top"])
def test_without_a_running_exporter_one_line_says_how_to_start_one(command: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "flowexp.toml"
    file.write_text(f'[table]\npin_path = "{BPFFS}/fxt-no-such-exporter"\n')
    shown = run(command, "-c", file)
    assert (shown.status, shown.stdout) == (FAILED, "")
    assert "no exporter runs on" in shown.error and "flowexp run" in shown.error


@pytest.mark.parametrize("command", ["dump", "top", "status", "detach"])
def test_every_command_names_a_configuration_that_is_not_there(command: str, run: Run, tmp_path: Path) -> None:
    shown = run(command, "-c", tmp_path / "none.toml")
    assert (shown.status, shown.error) == (WRONG_USAGE, f"{tmp_path}/none.toml: there is no such file")


# Failed at run time: status 1


def test_a_capture_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    shown = run("dump", "--read", tmp_path / "none.pcap")
    assert shown.status in (FAILED, WRONG_USAGE)
    assert f"{tmp_path}/none.pcap" in shown.error
    assert "No such file" in shown.error or "no such file" in shown.error


def test_a_file_that_is_no_capture_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("This is not a capture.\n")
    shown = run("dump", "--read", tmp_path / "notes.txt")
    assert shown.status in (FAILED, WRONG_USAGE)
    assert f"{tmp_path}/notes.txt" in shown.error


def test_a_port_that_is_taken_is_named(run: Run) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        shown = run("collect", "--listen", f"udp://127.0.0.1:{port}")
    assert shown.status == FAILED
    assert str(port) in shown.error


@pytest.mark.parametrize("arguments", [
    ["run", "-i", "lo", "--collector", COLLECTOR],
    ["dump", "-i", "lo", "--duration", "0"],
])  # fmt: skip
def test_without_privileges_the_advice_is_to_run_as_root(arguments: List[str]) -> None:
    shown = run_as_nobody(*arguments)
    assert shown.status == FAILED
    assert "root" in shown.error
    assert not (BPFFS / "flowexp").exists()


def test_check_without_privileges_says_what_would_fail() -> None:
    shown = run_as_nobody("check", "-i", "lo", "--collector", COLLECTOR)
    assert shown.status == FAILED
    failed = [line for line in shown.stdout.splitlines() if line.startswith("FAILED")]
    assert any("run as root" in line for line in failed), shown.stdout
    assert shown.stderr == f"flowexp: check: {len(failed)} of these would keep the exporter from working\n"


def test_a_configuration_that_one_may_not_read_is_named(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"flowexp-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    try:
        file = folder / "flowexp.toml"
        file.touch(mode=0o600)
        shown = run_as_nobody("run", "-c", str(file))
    finally:
        shutil.rmtree(folder)
    assert shown.status == WRONG_USAGE
    assert str(file) in shown.error
    assert re.search("cannot be read: Permission denied|is not readable", shown.error)


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
