# SPDX-License-Identifier: GPL-2.0-or-later
"""The spool: what is in it, in which order, after success, kills, damage, and where there is no room."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import needs

from flowexp.errors import FlowexpError
from flowexp.transport.segment import Group, Head, Position
from flowexp.transport.spool import LEAST_SEGMENT_OCTETS, Spool

HEADER = struct.Struct(">HHIII")
MIB = 1 << 20
MESSAGE_OCTETS = 1000
RECORDS = 7
"""In each Message."""


def message(number: int, *, domain: int = 1, octets: int = MESSAGE_OCTETS) -> bytes:
    """A Message that can be told by what it carries."""
    content = struct.pack(">HHI", 256, octets - 16, number).ljust(octets - 16, b"x")
    return HEADER.pack(10, octets, 5, 0, domain) + content


def template(number: int, *, domain: int = 1, export_time_s: int = 5) -> bytes:
    return HEADER.pack(10, 28, export_time_s, 0, domain) + struct.pack(">HHHHHH", 2, 12, 256, 1, number, 4)


def head(number: int = 8, *, domain: int = 1, export_time_s: int = 5) -> Head:
    """One Template and, in another Message, one Options Data Record."""
    options = HEADER.pack(10, 28, export_time_s, 0, domain) + struct.pack(">HHII", 300, 12, domain, 1)
    return Head(domain, ((template(number, domain=domain, export_time_s=export_time_s), 0), (options, 1)))


class Opened:
    def __init__(self, folder: Path | None, size_octets: int) -> None:
        self.complaints: list[str] = []
        path = None if folder is None else str(folder)
        self.spool = Spool(path, size_octets=size_octets, complain=self.complaints.append)
        self.spool.announce(head())
        self.cursor = self.spool.begin()

    def put(self, *numbers: int, domain: int = 1) -> None:
        """Each in a group of its own."""
        for number in numbers:
            self.spool.append(memoryview(message(number, domain=domain)), MESSAGE_OCTETS, RECORDS)

    def groups(self) -> Iterator[Group]:
        """From the cursor on."""
        while True:
            group = self.spool.read(self.cursor)
            if group is None:
                return
            self.cursor = group.end
            yield group

    def take(self) -> list[int]:
        """Numbers of the Messages from the cursor on."""
        return [number for group in self.groups() for number in numbers_of(group)]

    def done(self, group: Group) -> None:
        self.spool.hand_over(group.end)
        self.spool.acknowledge(group.end, group.records)
        self.spool.settle(group.end)


def numbers_of(group: Group) -> list[int]:
    assert all(records == RECORDS for _, records in group.messages)
    return [struct.unpack_from(">I", group.octets, at + 20)[0] for at, _ in group.messages]


@contextmanager
def opened(folder: Path | None, size_octets: int = 4 * MIB) -> Iterator[Opened]:
    found = Opened(folder, size_octets)
    yield found
    found.spool.close()


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "spool" if request.param == "disk" else None


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ipfix"))


def test_groups_come_out_as_they_went_in(folder: Path | None) -> None:
    with opened(folder) as it:
        it.put(1, 2)
        it.spool.append(memoryview(message(3) + message(4) + message(5)), MESSAGE_OCTETS, RECORDS)
        it.put(6, domain=2)
        assert [(group.domain, numbers_of(group)) for group in it.groups()] == [
            (1, [1]), (1, [2]), (1, [3, 4, 5]), (2, [6]),
        ]  # fmt: skip
        assert it.spool.records == 6 * RECORDS
        it.put(7)
        assert it.take() == [7]


def test_what_is_settled_is_gone_and_the_last_segment_with_it(folder: Path | None) -> None:
    with opened(folder) as it:
        it.put(*range(500))
        for group in it.groups():
            it.done(group)
        assert (it.spool.records, it.spool.octets, it.spool.records_dropped) == (0, 0, 0)
        assert not (folder and files(folder))
        it.put(500)
        assert it.take() == [500]


def test_over_its_size_the_oldest_make_room_and_are_counted(folder: Path | None) -> None:
    with opened(folder, size_octets=MIB) as it:
        it.put(*range(3000))
        assert it.spool.octets <= MIB
        kept = it.take()
        assert kept == list(range(3000 - len(kept), 3000))
        assert it.spool.records_dropped == (3000 - len(kept)) * RECORDS
        assert it.spool.records == len(kept) * RECORDS
        assert it.spool.octets > MIB - 2 * LEAST_SEGMENT_OCTETS


def test_what_the_collector_has_is_not_counted_as_dropped_nor_is_it_counted_twice(folder: Path | None) -> None:
    with opened(folder, size_octets=MIB) as it:
        it.put(*range(100))
        first = next(it.groups())
        assert it.spool.acknowledge(first.end, first.records)
        assert not it.spool.acknowledge(first.end, first.records)
        it.put(*range(100, 3000))
        assert it.spool.records_dropped + it.spool.records == 2999 * RECORDS
        dropped = Position(first.end.segment, first.end.offset + MESSAGE_OCTETS + 16)
        assert not it.spool.acknowledge(dropped, RECORDS)
        assert it.spool.records_dropped + it.spool.records == 2999 * RECORDS


def test_each_segment_begins_with_what_was_announced_last_and_the_same_again_begins_none(tmp_path: Path) -> None:
    with opened(tmp_path) as it:
        it.put(1)
        it.spool.announce(head(export_time_s=77))
        it.put(2)
        assert len(files(tmp_path)) == 1
        it.spool.announce(head(number=12))
        it.put(3)
        it.spool.announce(head(domain=2))
        it.put(4, domain=2)
        assert len(files(tmp_path)) == 3
        heads = [it.spool.heads(Position(group.end.segment, 0)) for group in it.groups()]
    assert [len(each) for each in heads] == [1, 1, 1, 2]
    assert heads[0][0].says_the_same(head())
    assert heads[2][0].says_the_same(head(number=12))
    assert list(heads[2][0].templates()) != list(heads[0][0].templates())
    assert heads[3][1].says_the_same(head(domain=2))


def test_every_segment_is_an_ipfix_file_that_tshark_reads_with_no_gap_in_its_sequence_numbers(tmp_path: Path) -> None:
    needs.need(needs.tools("tshark"))
    with opened(tmp_path) as it:
        it.put(*range(20))
        (file,) = files(tmp_path)
        command = ["tshark", "-r", str(file), "-T", "fields", "-e", "cflow.sequence", "-e", "cflow.len"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    rows = [tuple(map(int, line.split())) for line in shown.splitlines()]
    messages = [sequence for sequence, length in rows if length == MESSAGE_OCTETS]
    assert messages == [1 + RECORDS * number for number in range(20)]  # 1: the Options Data Record


def test_a_killed_exporters_messages_are_there_for_the_next_one(tmp_path: Path) -> None:
    it = Opened(tmp_path, 4 * MIB)
    it.put(*range(300))
    groups = it.groups()
    for _ in range(10):
        it.done(next(groups))
    it.spool.hand_over(next(groups).end)
    os.close(it.spool._position_fd)  # and with it the lock: no more is left of a killed process
    with opened(tmp_path) as after:
        assert after.spool.records == 290 * RECORDS
        assert after.spool.records_in_doubt == RECORDS
        assert after.complaints == []
        after.put(300)
        assert after.take() == list(range(10, 301))


@pytest.mark.parametrize("cut_octets", [1, 15, 16, 17, 500, 1015])
def test_a_group_that_a_kill_cut_off_was_never_taken(tmp_path: Path, cut_octets: int) -> None:
    with opened(tmp_path) as it:
        it.put(1, 2, 3)
    (file,) = files(tmp_path)
    os.truncate(file, file.stat().st_size - cut_octets)
    with opened(tmp_path) as after:
        assert after.take() == [1, 2]
        assert after.spool.records == 2 * RECORDS
        assert after.complaints == []


def test_a_damaged_segment_is_told_in_one_line_kept_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    with opened(tmp_path) as it:
        it.put(1, 2)
        it.spool.announce(head(number=12))
        it.put(3)
    damaged, whole = files(tmp_path)
    octets = bytearray(damaged.read_bytes())
    octets[-2 * 16 - MESSAGE_OCTETS + 16 :] = os.urandom(MESSAGE_OCTETS + 16)
    octets[-MESSAGE_OCTETS - 16] = 0xFF
    damaged.write_bytes(octets)
    with opened(tmp_path) as after:
        (line,) = after.complaints
        assert line.startswith(f"{damaged}: damaged from octet ")
        for group in after.groups():
            after.done(group)
        assert after.cursor.segment == int(whole.stem)
    assert [path.name for path in tmp_path.glob("*.ipfix*")] == [f"{damaged.name}.damaged"]


@pytest.mark.parametrize("content", [b"", b"hello", bytes(5000), b"\0\x0a" * 3000, HEADER.pack(10, 16, 0, 9, 1)])
def test_a_file_that_is_no_segment_does_no_harm(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0000000001.ipfix").write_bytes(content)
    (tmp_path / "position").write_bytes(content)
    with opened(tmp_path) as it:
        assert it.take() == []
        it.put(1)
        assert it.take() == [1]
        assert len(it.complaints) <= 1


def test_two_exporters_cannot_have_one_spool(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(FlowexpError, match=f"^{tmp_path}: cannot be the spool: another exporter or Collector uses"):
            Opened(tmp_path, MIB)


@pytest.mark.parametrize("path", ["/proc/spool", "/dev/null/spool"])
def test_a_folder_that_cannot_be_had_is_told_in_one_line(path: str) -> None:
    with pytest.raises(FlowexpError, match=f"^{path}: cannot be the spool: (No such file|Not a directory)"):
        Opened(Path(path), MIB)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        needs.need("not root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_makes_the_oldest_go_before_anything_new_is_refused(small_disk: Path) -> None:
    with opened(small_disk, size_octets=4 * MIB) as it:
        it.put(*range(3000))
        kept = it.take()
        assert kept == list(range(3000 - len(kept), 3000))
        assert len(kept) > 300
        assert it.spool.records_dropped == (3000 - len(kept)) * RECORDS
        assert set(it.complaints) == {f"{small_disk}: No space left on device: the oldest records make room"}


def test_a_disk_that_others_have_filled_refuses_and_takes_again_when_there_is_room(small_disk: Path) -> None:
    with opened(small_disk) as it:
        with (small_disk / "others").open("wb") as file, pytest.raises(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))
        with pytest.raises(OSError, match="No space left on device"):
            it.put(1)
        (small_disk / "others").unlink()
        it.put(2)
        assert it.take() == [2]
