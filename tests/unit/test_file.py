# SPDX-License-Identifier: GPL-2.0-or-later
"""IPFIX Files: what is in them after success and after failure. Full is /dev/full, or the limit of a file's size."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from columns import flows
from lab import needs
from lab.streams import messages_in

from flowexp.errors import FlowexpError
from flowexp.protocol.decode import Decoder
from flowexp.protocol.ipfix import MessageEncoder
from flowexp.protocol.template import default_templates
from flowexp.session import CollectorSession
from flowexp.transport.base import Sent
from flowexp.transport.file import MAX_MESSAGE_OCTETS, FileTransport


class Messages(NamedTuple):
    octets: memoryview
    message_octets: int
    count: int
    records: int


def messages(count: int, *, octets: int = 1000, fill: bytes = b"m") -> Messages:
    return Messages(memoryview(fill * (count * octets)), octets, count, 2 * count)


@pytest.fixture
def limited_file_size() -> Iterator[int]:
    """No file of this process grows beyond so many octets: write() then writes less, and next raises EFBIG."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_500, hard))
    yield 10_500
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_messages_are_in_the_file_as_they_are_as_soon_as_they_are_sent(tmp_path: Path) -> None:
    path = tmp_path / "flows.ipfix"
    with closing(FileTransport(str(path))) as transport:
        transport.open()
        assert transport.send(messages(3)) == Sent(3)
        assert path.read_bytes() == b"m" * 3000
        assert transport.send(messages(1, octets=17, fill=b"n")) == Sent(1)
        assert path.read_bytes() == b"m" * 3000 + b"n" * 17
    counters = transport.counters
    assert (counters.messages_sent, counters.octets_sent, counters.records_sent) == (4, 3017, 8)


def test_an_existing_file_is_appended_to_and_templates_go_in_front_of_each_part(tmp_path: Path) -> None:
    path = tmp_path / "flows.ipfix"
    for _ in range(2):
        with closing(FileTransport(str(path))) as transport:
            transport.open()
            assert [transport.take_templates_due(), transport.take_templates_due()] == [True, False]
            transport.send(messages(1))
    assert path.stat().st_size == 2000


def test_a_message_may_have_the_largest_size_there_is(tmp_path: Path) -> None:
    assert FileTransport(str(tmp_path / "f")).max_message_octets() == 65_535


def test_a_batch_that_does_not_fit_is_taken_back_and_told(tmp_path: Path, limited_file_size: int) -> None:
    path = tmp_path / "flows.ipfix"
    with closing(FileTransport(str(path))) as transport:
        transport.open()
        transport.send(messages(8))
        with pytest.raises(FlowexpError, match=rf"^{path}: cannot write the IPFIX File: File too large$"):
            transport.send(messages(3))
        assert path.stat().st_size == 8000
        assert transport.counters.messages_failed == 3
        assert transport.counters.records_failed == 6
        assert transport.send(messages(2)) == Sent(2)
        assert path.stat().st_size == 10_000 < limited_file_size


def test_a_full_disk_is_told_in_one_line() -> None:
    with closing(FileTransport("/dev/full")) as transport:
        transport.open()
        with pytest.raises(FlowexpError, match=r"^/dev/full: cannot write the IPFIX File: No space left on device$"):
            transport.send(messages(1))
        assert transport.counters.messages_failed == 1


def test_a_pipe_whose_reader_left_is_told_in_one_line() -> None:
    readable, writable = os.pipe()
    with closing(FileTransport(f"/dev/fd/{writable}")) as transport:
        transport.open()
        os.close(readable)
        with pytest.raises(FlowexpError, match="Broken pipe$"):
            transport.send(messages(1))
    os.close(writable)


def test_a_folder_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "flows.ipfix"
    with pytest.raises(FlowexpError, match=rf"^{path}: cannot write the IPFIX File: No such file or directory$"):
        FileTransport(str(path)).open()


def test_a_file_that_may_not_be_written_is_told_in_one_line() -> None:
    path = "/sys/kernel/flows.ipfix"  # nobody may make a file there, not even root
    with pytest.raises(FlowexpError, match=rf"^{path}: cannot write the IPFIX File: (Permission|Operation)"):
        FileTransport(path).open()


def test_sending_before_open_is_told(tmp_path: Path) -> None:
    transport = FileTransport(str(tmp_path / "f"))
    with pytest.raises(FlowexpError, match="is not open$"):
        transport.send(messages(1))


def test_closing_twice_is_harmless_and_the_state_tells(tmp_path: Path) -> None:
    transport = FileTransport(str(tmp_path / "f"))
    transport.open()
    assert transport.status()["state"] == "up"
    transport.close()
    transport.close()
    assert transport.status()["state"] == "closed"
    assert transport.status()["collector"] == f"file://{tmp_path}/f"


@pytest.mark.parametrize("left_octets", [3, 15, 16, 999])
def test_a_message_that_a_kill_cut_off_is_taken_away_before_the_next_one(tmp_path: Path, left_octets: int) -> None:
    path, whole = tmp_path / "flows.ipfix", b"\0\x0a\x03\xe8" + bytes(996)
    path.write_bytes(2 * whole + whole[:left_octets])
    with closing(FileTransport(str(path))) as transport:
        transport.open()
        assert path.read_bytes() == 2 * whole
        transport.send(messages(1))
    assert path.read_bytes() == 2 * whole + b"m" * 1000


@pytest.mark.parametrize("content", [b"m" * 1000, b"\0\x0a\0\x0f" + bytes(11), b"\0\x0a\0\x10" + bytes(12) + b"mmmmm"])
def test_what_is_no_ipfix_file_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "flows.ipfix"
    path.write_bytes(content)
    with closing(FileTransport(str(path))) as transport:
        transport.open()
    assert path.read_bytes() == content


class Rotating:
    """A session over files that are put aside, on a clock that the test moves."""

    def __init__(self, path: Path, *, sequence_number: int = 0, **most: int) -> None:
        self.path, self.now_s, self.sent = path, float(BEGUN_S), 0
        self.transport = FileTransport(str(path), clock_s=lambda: self.now_s, **most)
        self.transport.open()
        encoder = MessageEncoder(
            observation_domain_id=1,
            max_message_octets=MAX_MESSAGE_OCTETS,
            templates=default_templates(),
            sequence_number=sequence_number,
        )
        self.session = CollectorSession(self.transport, encoder, refresh_ns=60 * 10**9)

    def send(self, count: int) -> None:
        columns = flows(count, first_port=self.sent + 1)
        self.session.send(columns, 0, int(self.now_s))
        self.sent += count

    def files(self) -> dict[str, list[int]]:
        """Source ports by name of the file; each is read by itself."""
        return {path.name: self._ports(path) for path in sorted(self.path.parent.iterdir())}

    @staticmethod
    def _ports(path: Path) -> list[int]:
        decoder, ports = Decoder(), []
        for message in messages_in(path.read_bytes()):
            decoded = decoder.decode(message, "file")
            assert decoded.problems == []
            ports += [record["sourceTransportPort"] for record in decoded.records]
        return sorted(ports)


BEGUN_S = 1_700_000_000
STAMP = "20231114T221320Z"


def test_a_file_is_put_aside_whole_with_the_batch_that_makes_it_so_large_and_each_has_its_templates(
    tmp_path: Path,
) -> None:
    it = Rotating(tmp_path / "flows.ipfix", most_octets=100_000)
    with closing(it.transport):
        for _ in range(30):
            it.send(100)
        assert it.transport.status()["files_completed"] == 2
    files = it.files()
    assert list(files) == [f"flows-{STAMP}-2.ipfix", f"flows-{STAMP}.ipfix", "flows.ipfix"]
    first, second, third = files[f"flows-{STAMP}.ipfix"], files[f"flows-{STAMP}-2.ipfix"], files["flows.ipfix"]
    assert first + second + third == list(range(1, 3001))
    assert 100_000 <= (tmp_path / f"flows-{STAMP}.ipfix").stat().st_size < 115_000


def test_a_file_is_put_aside_at_exactly_its_age_and_not_while_it_has_no_record(tmp_path: Path) -> None:
    it = Rotating(tmp_path / "flows.ipfix", most_s=60)
    with closing(it.transport):
        it.send(1)
        it.now_s += 59.9
        it.send(1)
        it.now_s += 0.1
        it.session.announce_if_due(0, int(it.now_s))
        assert it.files() == {f"flows-{STAMP}.ipfix": [1, 2], "flows.ipfix": []}
        it.now_s += 3600
        it.session.announce_if_due(61 * 10**9, int(it.now_s))
        assert len(it.files()) == 2
        it.send(1)
        assert it.files()["flows.ipfix"] == [3]


def test_a_restart_goes_on_with_the_file_and_its_age(tmp_path: Path) -> None:
    sequence_number = 0
    for number in range(2):
        it = Rotating(tmp_path / "flows.ipfix", most_s=60, sequence_number=sequence_number)
        it.sent, it.now_s = number, it.now_s + 40 * number
        with closing(it.transport):
            it.send(1)
            it.now_s += 30
            it.session.announce_if_due(0, int(it.now_s))
        sequence_number = it.session.sequence_number
    assert it.files() == {f"flows-{STAMP}.ipfix": [1, 2], "flows.ipfix": []}


def test_a_file_that_cannot_be_put_aside_goes_on_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    it = Rotating(tmp_path / "flows.ipfix", most_s=60)
    (tmp_path / "flows.ipfix.next").mkdir()
    with closing(it.transport):
        for _ in range(3):
            it.send(1)
            it.now_s += 61
    assert it._ports(tmp_path / "flows.ipfix") == [1, 2, 3]
    assert caplog.messages == [f"{tmp_path}/flows.ipfix: cannot be put aside: Is a directory; it goes on"]


@pytest.mark.parametrize("others", [None, b"", b"not ours"])
def test_a_file_that_somebody_else_has_put_aside_is_theirs_and_another_begins(
    tmp_path: Path, others: bytes | None
) -> None:
    it = Rotating(tmp_path / "flows.ipfix", most_s=60)
    with closing(it.transport):
        it.send(1)
        it.path.rename(tmp_path / "theirs.ipfix")
        if others is not None:
            it.path.write_bytes(others)
        it.send(2)
    assert it._ports(tmp_path / "theirs.ipfix") == [1]
    assert it.path.read_bytes().startswith(others or b"")
    it.path.write_bytes(it.path.read_bytes()[len(others or b"") :])
    assert it._ports(it.path) == [2, 3]


def test_tshark_reads_a_file_that_was_put_aside(tmp_path: Path) -> None:
    needs.need(needs.tools("tshark"))
    it = Rotating(tmp_path / "flows.ipfix", most_octets=50_000)
    with closing(it.transport):
        for _ in range(12):
            it.send(100)
    for path in tmp_path.iterdir():
        command = ["tshark", "-r", str(path), "-T", "fields", "-e", "cflow.srcport"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert sorted(map(int, re.findall(r"\d+", shown))) == it._ports(path)
