# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors as a new user meets them, in every command: one line that says what, where and what to do; status 1 where it
failed, 2 where it was asked for something that cannot be; nothing is left behind."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import captures
import pytest
from commands import FAILED, WRONG_USAGE, Run, run_as_nobody
from lab import needs
from lab.flowexp import BPFFS, COMMAND, PIN_PREFIX, RUNTIME
from lab.metered import packet
from lab.process import environment

COLLECTOR = "--collector udp://127.0.0.1:4739"
WITH_CONFIGURATION = ("run", "dump", "top", "status", "check", "detach")

PINS = BPFFS / f"{PIN_PREFIX}none"
CUT_OFF = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + bytes(8)  # within its first record's header

# What the user has in {here}.
FILES = {
    "alone.toml": f'[table]\npin_path = "{PINS}"\n',
    "broken.toml": 'interfaces = ["lo"]\n\nhook tc\n',
    "unknown.toml": 'intefaces = ["lo"]\n',
    "astray.toml": "",  # written anew, with {here} as the folder of its pins
    "whole.toml": f'[table]\npin_path = "{BPFFS}"\n',
    "metrics.toml": "",  # written anew, with a port that is taken
    "huge.toml": f'[table]\npin_path = "{PINS}"\nmax_flows = 67108864\n',
    "notes.txt": "This is not a capture.\n",
    "empty.pcap": "",
}

WRONG = [
    ("{command} -c {here}/none.toml", "{here}/none.toml: there is no such file"),
    ("{command} -c {here}", "{here}: cannot be read: Is a directory"),
    ("{command} -c {here}/notes.txt/flowexp.toml", "{here}/notes.txt/flowexp.toml: cannot be read: Not a directory"),
    ("{command} -c {here}/broken.toml", '{here}/broken.toml:3: not TOML: "hook tc"'),
    ("{command} -c {here}/latin1.toml", "{here}/latin1.toml:1: not UTF-8"),
    ("{command} -c {here}/unknown.toml", '{here}/unknown.toml: "intefaces" is not a key; the nearest is interfaces'),
]
WRONG = [(words.replace("{command}", name), error) for name in WITH_CONFIGURATION for words, error in WRONG]
WRONG += [
    (f"run -c {{here}}/alone.toml -i nosuch0 {COLLECTOR}", "interface nosuch0: there is no such device here; there"),
    ("dump -c {here}/alone.toml -i nosuch0", "interface nosuch0: there is no such device here; there"),
    *((f"{command} --collector {url}", f'--collector: "{url}": ') for command in ("run", "check")
      for url in ("127.0.0.1:4739", "gopher://127.0.0.1", "udp://127.0.0.1:99999", "udp://", "udp://h?protocol=sflow")),
    ("run --collector=", "--collector: "),
    ("collect --listen gopher://127.0.0.1", '"gopher://127.0.0.1": it begins with one of udp://, tcp://, tls://, file://'),
    ("collect --listen tls://127.0.0.1", '"tls://127.0.0.1": a Collector needs a certificate'),
    ("dump --read {here}/none.pcap", "{here}/none.pcap: cannot be read: No such file or directory"),
    ("dump --read {here}", "{here}: cannot be read: Is a directory"),
    ("dump --read {here}/notes.txt", "{here}/notes.txt: not a pcap or pcapng capture"),
    ("dump --read {here}/empty.pcap", "{here}/empty.pcap: not a pcap or pcapng capture"),
    *((f"dump --read {{here}}/cut.pcap --format {form} -o {{here}}{name}", f"{{here}}{name}: cannot be written: ")
      for form in ("json", "ipfix") for name in ("", "/no/such/folder/flows")),
    ("dump --read {here}/cut.pcap -o {here}/no/such/folder/flows --top 1", "{here}/no/such/folder/flows: cannot be"),
    ("dump --read {here}/none.pcap -o {here}/no/such/folder/flows", "{here}/no/such/folder/flows: cannot be written"),
    ("dump --read {here}/cut.pcap -o {here}/cut.pcap", "{here}/cut.pcap: cannot be written: it is the capture that"),
    *(("dump --read {here}/notes.txt -o {here}/new.json --format " + form, "{here}/notes.txt: not a pcap")
      for form in ("json", "ipfix")),
    ("dump --read {here}/cut.pcap --by packets", "--by is what --top goes by: "),
    ("dump --read {here}/cut.pcap --duration 5s", "--read and --duration cannot go together: "),
    ("dump --read {here}/cut.pcap --aggregate=", "--aggregate : a key is empty; short names are src, dst, "),
    *((f"collect --listen tls://127.0.0.1 --cert {{here}}{name}", f"--cert, --key: {{here}}{name}: {error}")
      for name, error in (("/none.pem", "No such file"), ("/notes.txt", "no PEM"), ("", "Is a directory"))),
    ("elements --format xml", "Invalid value for '--format': 'xml' is not one of 'table', 'json'."),
    ("elements tcp", "Got unexpected extra argument (tcp)"),
]  # fmt: skip

FAILS = [
    ("top -c {here}/alone.toml", "no exporter runs on {pins}; start one with `flowexp run`"),
    ("status -c {here}/alone.toml", "no exporter runs on {pins} "),
    (f"check -c {{here}}/alone.toml -i nosuch0 {COLLECTOR}", "check: 1 of these would keep the exporter from working"),
    ("run -c {here}/alone.toml -i lo --collector file://{here}/no/folder/flows", "{here}/no/folder/flows: cannot"),
    (f"run -c {{here}}/metrics.toml -i lo {COLLECTOR}", "[metrics] listen"),
    (f"run -c {{here}}/huge.toml -i lo {COLLECTOR}", "the table takes up to 31086 MiB of "),
    *((f"{command} -c {{here}}/{name}.toml", f"{folder}: [table] pin_path must be a folder in a BPF file system")
      for command in (f"run -i lo {COLLECTOR}", "detach") for name, folder in (("astray", "{here}"), ("whole", BPFFS))),
    ("collect --listen udp://127.0.0.1:{taken}", "cannot listen on udp://127.0.0.1:{taken}: Address already in use"),
    ("collect --listen tcp://127.0.0.1:{taken}", "cannot listen on tcp://127.0.0.1:{taken}: Address already in use"),
    ("collect --listen udp://192.0.2.99:9", "cannot listen on udp://192.0.2.99:9: Cannot assign requested address"),
]  # fmt: skip

FAILS_FOR_NOBODY = [
    (f"run -c {{here}}/alone.toml -i lo {COLLECTOR}", "run as root"),
    ("dump -c {here}/alone.toml -i lo --duration 0", "run as root"),
    ("dump -c {here}/alone.toml --read {here}/cut.pcap", "run as root"),
    ("dump -c {here}/alone.toml --read {here}/cut.pcap -o /dev/null", "run as root"),
    ("top -c {here}/alone.toml", "look as root"),
    ("status -c {here}/alone.toml", "start one with `flowexp run`"),
    ("detach -c {here}/alone.toml", "run as root"),
    (f"check -c {{here}}/alone.toml -i lo {COLLECTOR}", "would keep the exporter from working"),
]


@pytest.fixture
def here() -> Iterator[Path]:
    """A folder that everybody can look into. What a command leaves in it, of pins, or under /run fails the test."""
    with tempfile.TemporaryDirectory(prefix="flowexp-test-") as folder:
        here = Path(folder)
        here.chmod(0o755)
        for name, content in FILES.items():
            (here / name).write_text(content)
        (here / "latin1.toml").write_bytes(b'# \xfcber\ninterfaces = ["lo"]\n')
        (here / "cut.pcap").write_bytes(CUT_OFF)
        before = set(here.rglob("*"))
        yield here
        assert set(here.rglob("*")) == before
        assert not PINS.exists() and not list(RUNTIME.glob(f"{PINS.name}-*"))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 that others have, of UDP and of TCP."""
    with socket.socket() as stream, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        stream.bind(("127.0.0.1", 0))
        stream.listen()
        datagrams.bind(stream.getsockname())
        yield stream.getsockname()[1]


def run(words: str, *, stdout: IO[str] | int = subprocess.PIPE, shell: str = "") -> subprocess.CompletedProcess[str]:
    """The command itself, with a redirection of the shell's."""
    needs.need(needs.exporter(), needs.bpf())
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", COMMAND, *words.split()]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=30, check=False, env=environment()
    )


@pytest.mark.parametrize(("words", "error"), WRONG)
def test_what_cannot_be_is_wrong_usage(words: str, error: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Run(capsys)(*words.format(here=here).split())
    assert (shown.status, shown.stdout) == (WRONG_USAGE, "")
    assert shown.error.startswith(error.format(here=here))


@pytest.mark.parametrize(("words", "error"), FAILS)
def test_what_does_not_work_here_fails(
    words: str, error: str, here: Path, taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if words.startswith(("run", "check", "detach")):
        needs.need(needs.namespace_support(), needs.bpf())
    metrics = f'{FILES["alone.toml"]}[metrics]\nlisten = "127.0.0.1:{taken}"\n'
    (here / "metrics.toml").write_text(metrics)
    (here / "astray.toml").write_text(f'[table]\npin_path = "{here}"\n')
    shown = Run(capsys)(*words.format(here=here, taken=taken).split())
    assert shown.status == FAILED
    assert shown.error.startswith(error.format(here=here, taken=taken, pins=PINS))


def test_detach_says_so_where_nothing_has_been_left(here: Path) -> None:
    shown = run(f"detach -c {here}/alone.toml")
    assert (shown.returncode, shown.stderr) == (0, f"flowexp: {PINS}: nothing had been left there\n")


@pytest.mark.parametrize(("words", "advice"), FAILS_FOR_NOBODY)
def test_without_privileges_one_line_says_what_is_lacking(words: str, advice: str, here: Path) -> None:
    shown = run_as_nobody(*words.format(here=here).split())
    assert shown.status == FAILED
    assert advice in shown.error


@pytest.mark.parametrize("folder", ["", "/below"])
def test_a_folder_that_one_may_not_look_into_takes_no_output(folder: str, here: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="flowexp-test-") as closed:
        shown = run_as_nobody("dump", "--read", here / "cut.pcap", "-o", f"{closed}{folder}/flows")
        assert (shown.status, shown.error) == (
            WRONG_USAGE,
            f"{closed}{folder}/flows: cannot be written: Permission denied",
        )


def test_nobody_may_still_see_the_elements() -> None:
    shown = run_as_nobody("elements")
    assert (shown.status, shown.stderr) == (0, "")


def test_check_without_privileges_says_what_would_fail(here: Path) -> None:
    shown = run_as_nobody("check", "-c", here / "alone.toml", "-i", "lo", *COLLECTOR.split())
    failed = [line for line in shown.stdout.splitlines() if line.startswith("FAILED")]
    assert any("run as root" in line for line in failed), shown.stdout
    assert shown.error == f"check: {len(failed)} of these would keep the exporter from working"


@pytest.mark.parametrize("command", WITH_CONFIGURATION)
def test_a_configuration_that_one_may_not_read_is_named(command: str, here: Path) -> None:
    file = here / "alone.toml"
    file.chmod(0o600)
    shown = run_as_nobody(command, "-c", file)
    assert shown.status == WRONG_USAGE
    assert str(file) in shown.error
    assert re.search("cannot be read: Permission denied|is not readable", shown.error)


@pytest.mark.parametrize("form", ["json", "ipfix"])
def test_a_file_that_is_there_is_kept_until_there_is_something_to_write(form: str, here: Path) -> None:
    kept = here / "kept"
    for capture, status, left in (("notes.txt", WRONG_USAGE, "old"), ("cut.pcap", FAILED, "")):
        kept.write_text("old")
        assert run(f"dump --read {here}/{capture} --format {form} -o {kept}").returncode == status
        assert kept.read_text() == left
    kept.unlink()


def test_a_capture_that_is_cut_off_gives_what_is_there_and_says_so(here: Path) -> None:
    shown = run(f"dump --read {here}/cut.pcap --format json")
    assert (shown.returncode, shown.stdout) == (FAILED, "")
    ledger, error = shown.stderr.splitlines()
    assert ledger.endswith("the ledger closes")
    assert error == f"flowexp: {here}/cut.pcap: cut off after 0 packets: the file ends within a record"


FULL = [
    *((words, "standard output") for words in (
        "--help", "elements", "elements --format json", "dump --read {here}/cut.pcap",
        "dump --read {here}/cut.pcap -o -")),
    ("dump --read {here}/cut.pcap --format csv -o /dev/full", "/dev/full"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "name"), FULL)
def test_output_that_is_full_is_said_in_one_line(words: str, name: str, here: Path) -> None:
    with open("/dev/full", "w") as full:
        shown = run(words.format(here=here), stdout=full)
    assert shown.stderr.splitlines()[-1] == f"flowexp: {name}: cannot be written: No space left on device"
    assert (shown.returncode, "Traceback" in shown.stderr) == (FAILED, False)


def test_an_ipfix_file_that_is_full_is_said_once(here: Path) -> None:
    (here / "cut.pcap").write_bytes(captures.pcap([captures.Packet(packet(1))]))
    shown = run(f"dump --read {here}/cut.pcap --format ipfix -o /dev/full")
    said = [line for line in shown.stderr.splitlines() if "ledger" not in line]
    assert said == ["flowexp: /dev/full: cannot write the IPFIX File: No space left on device"]
    assert shown.returncode == FAILED


@pytest.mark.parametrize("words", ["--version", "elements", "dump --read {here}/cut.pcap"])
def test_standard_output_that_is_closed_is_said_in_one_line(words: str, here: Path) -> None:
    shown = run(words.format(here=here), shell=">&-")
    error = shown.stderr.splitlines()[-1]
    assert error == "flowexp: standard output: cannot be written: Bad file descriptor"
    assert (shown.returncode, "Traceback" in shown.stderr) == (FAILED, False)


def test_an_error_goes_nowhere_else_where_standard_error_is_closed() -> None:
    shown = run("nosuch", shell="2>&-")
    assert (shown.returncode, shown.stdout) == (WRONG_USAGE, "")


def test_a_dash_is_standard_input(here: Path) -> None:
    path = here / "cut.pcap"
    path.write_bytes(captures.pcap([captures.Packet(packet(1))]))
    shown = run("dump --read - --format json", shell=f"<{path}")
    assert shown.returncode == 0, shown.stderr
    assert [json.loads(line)["sourceTransportPort"] for line in shown.stdout.splitlines()] == [1]


def test_letters_that_the_terminals_encoding_lacks_are_no_error() -> None:
    words = "from flowexp.output import usable_streams; usable_streams(); print('\\u2581')"
    extra = environment({"PYTHONIOENCODING": "latin-1"})
    assert subprocess.check_output([sys.executable, "-c", words], env=extra, timeout=30) == b"?\n"


def test_ctrl_c_before_there_is_a_command_line_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    ended = subprocess.run(
        [sys.executable, "-c", "import flowexp.cli"], capture_output=True, timeout=30, check=False,
        env=environment({"PYTHONPATH": str(tmp_path)}),
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")
