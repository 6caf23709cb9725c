# SPDX-License-Identifier: GPL-2.0-or-later
"""The built-in Collector on real sockets of the loopback, and as its users run it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.flowexp import COMMAND
from lab.process import Process
from lab.wait import wait_for

from flowexp.collect import Summary, collect
from flowexp.errors import UsageError

TEMPLATE_ID = 256
ELEMENTS = ((8, 4), (12, 4), (2, 8))  # sourceIPv4Address, destinationIPv4Address, packetDeltaCount


def message(*sets: bytes, sequence: int = 0, domain: int = 7) -> bytes:
    """RFC 7011 section 3.1: Version, Length, Export Time, Sequence Number, Observation Domain ID."""
    content = b"".join(sets)
    return struct.pack(">HHIII", 10, 16 + len(content), 1_700_000_000, sequence, domain) + content


def template_set() -> bytes:
    fields = b"".join(struct.pack(">HH", *element) for element in ELEMENTS)
    return struct.pack(">HHHH", 2, 8 + len(fields), TEMPLATE_ID, len(ELEMENTS)) + fields


def data_set(*packets: int, set_id: int = TEMPLATE_ID) -> bytes:
    records = b"".join(bytes([192, 0, 2, 1, 192, 0, 2, 2]) + struct.pack(">Q", number) for number in packets)
    return struct.pack(">HH", set_id, 4 + len(records)) + records


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 0))
        return int(sock.getsockname()[1])


class Running:
    """`collect` in a thread, ended by a pipe."""

    def __init__(self, url: str, port: int, form: str = "json", **options: str) -> None:
        self.port = port
        self.out = io.StringIO()
        self.errors = io.StringIO()
        self.summary = Summary()
        self._readable, self._writable = os.pipe()
        self._thread = threading.Thread(target=self._run, args=(url, form, options))
        self._thread.start()
        wait_for("the Collector to listen", lambda: f":{port:04X} " in self._sockets())

    @staticmethod
    def _sockets() -> str:
        return "".join(Path(f"/proc/net/{name}").read_text() for name in ("udp", "udp6", "tcp", "tcp6"))

    def _run(self, url: str, form: str, options: dict[str, str]) -> None:
        self.summary = collect(url, form, self.out, errors=self.errors, stop=self._readable, **options)

    def stop(self) -> None:
        os.write(self._writable, b"x")
        self._thread.join(10)
        assert not self._thread.is_alive(), "the Collector did not end"
        os.close(self._readable)
        os.close(self._writable)

    @property
    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


@pytest.fixture
def collector() -> Iterator[Running]:
    port = free_port()
    running = Running(f"udp://127.0.0.1:{port}", port)
    yield running
    if running._thread.is_alive():
        running.stop()


def sender(port: int, host: str = "127.0.0.1") -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((host, port))
    return sock


def test_records_come_out_in_their_order_and_the_summary_counts_them(collector: Running) -> None:
    with sender(collector.port) as sock:
        sock.send(message(template_set()))
        for i in range(100):
            sock.send(message(data_set(2 * i, 2 * i + 1), sequence=2 * i))
    collector.stop()
    assert [record["packetDeltaCount"] for record in collector.records] == list(range(200))
    assert collector.records[0]["sourceIPv4Address"] == "192.0.2.1"
    assert collector.summary == Summary(messages=101, records=200)
    assert collector.errors.getvalue() == f"{collector.summary}\n"


def test_what_has_arrived_before_the_stop_is_still_printed() -> None:
    port = free_port()
    running = Running(f"udp://127.0.0.1:{port}", port)
    with sender(port) as sock:
        sock.send(message(template_set()))
        for i in range(5000):
            sock.send(message(data_set(i), sequence=i))
        running.stop()
    assert len(running.records) == 5000


def test_records_missing_by_sequence_number_are_counted(collector: Running) -> None:
    with sender(collector.port) as sock:
        sock.send(message(template_set()))
        sock.send(message(data_set(1, 2), sequence=0))
        sock.send(message(data_set(3), sequence=12))
    collector.stop()
    assert collector.summary.lost_records == 10
    assert "10 records" in collector.errors.getvalue()


def test_data_without_a_template_is_told_once_for_a_sender_and_counted(collector: Running) -> None:
    with sender(collector.port) as sock:
        for _ in range(50):
            sock.send(message(data_set(1)))
        port = sock.getsockname()[1]
    collector.stop()
    first, summary = collector.errors.getvalue().splitlines()
    assert first == f"127.0.0.1 port {port}: Set 256: no Template yet for its 16 octets"
    assert "50 Messages with 0 Data Records" in summary
    assert "50 undecodable" in summary


def test_templates_of_one_sender_do_not_serve_another(collector: Running) -> None:
    with sender(collector.port) as one, sender(collector.port) as other:
        one.send(message(template_set()))
        other.send(message(data_set(1)))
        one.send(message(data_set(2)))
    collector.stop()
    assert [record["packetDeltaCount"] for record in collector.records] == [2]


@pytest.mark.parametrize("datagram", [b"", b"\x00", b"\x00\x0a", b"hello", bytes(65_507), message(b"\x01\x00\xff\xff")])
def test_rubbish_is_survived_and_told(collector: Running, datagram: bytes) -> None:
    with sender(collector.port) as sock:
        sock.send(datagram)
        sock.send(message(template_set(), data_set(9)))
    collector.stop()
    assert [record["packetDeltaCount"] for record in collector.records] == [9]
    assert collector.summary.problems >= 1
    assert collector.summary.messages == 2


def test_the_version_of_other_protocols_is_named(collector: Running) -> None:
    with sender(collector.port) as sock:
        sock.send(struct.pack(">H", 7) + bytes(22))
    collector.stop()
    assert "unsupported version 7" in collector.errors.getvalue()


@pytest.mark.parametrize("address", ["[::1]", "[::]", "0.0.0.0", "localhost"])
def test_it_listens_where_the_url_says(address: str) -> None:
    port = free_port()
    running = Running(f"udp://{address}:{port}", port)
    hosts = {"[::1]": ["::1"], "0.0.0.0": ["127.0.0.1"]}.get(address, ["127.0.0.1"])
    hosts += ["::1"] if address == "[::]" else []
    for number, host in enumerate(hosts):
        with sender(port, host) as sock:
            sock.send(message(template_set(), data_set(number)))
    running.stop()
    assert [record["packetDeltaCount"] for record in running.records] == list(range(len(hosts)))


@pytest.mark.parametrize(("form", "begins"), [("table", "date"), ("csv", "ipVersion"), ("json", '{"source')])
def test_each_format_is_written(form: str, begins: str) -> None:
    port = free_port()
    running = Running(f"udp://127.0.0.1:{port}", port, form)
    with sender(port) as sock:
        sock.send(message(template_set(), data_set(3)))
    running.stop()
    assert running.out.getvalue().startswith(begins)
    assert "192.0.2.1" in running.out.getvalue()


@pytest.mark.parametrize("url", ["127.0.0.1:4739", "udp://", "udp://127.0.0.1:0", "tls://127.0.0.1", "file:///tmp/x"])
def test_a_url_that_cannot_be_listened_on_is_wrong_usage(url: str) -> None:
    with pytest.raises(UsageError, match=re.escape(url)):
        collect(url, "json", io.StringIO(), stop=0)


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM])
def test_the_command_shows_records_at_once_and_ends_at_a_signal(tmp_path: Path, with_signal: int) -> None:
    port = free_port()
    process = Process(
        [COMMAND, "collect", "--listen", f"udp://127.0.0.1:{port}", "--format", "json"],
        directory=tmp_path,
        name="collect",
    )
    try:
        wait_for("the Collector to listen", lambda: f":{port:04X} " in Path("/proc/net/udp").read_text())
        with sender(port) as sock:
            sock.send(message(template_set(), data_set(5)))
        wait_for("the record to be in the file", lambda: '"packetDeltaCount": 5' in process.stdout)
        assert process.stop(with_signal) == 0
        assert process.stderr.startswith("1 Messages with 1 Data Records;")
    finally:
        process.kill()


def test_a_second_signal_behind_the_first_is_no_other_end(tmp_path: Path) -> None:
    port = free_port()
    process = Process([COMMAND, "collect", "--listen", f"udp://127.0.0.1:{port}"], directory=tmp_path, name="collect")
    try:
        wait_for("the Collector to listen", lambda: f":{port:04X} " in Path("/proc/net/udp").read_text())
        for _ in range(20):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            time.sleep(0.005)
        assert process.stop(signal.SIGINT) == 0
        assert process.stderr.startswith("0 Messages")
    finally:
        process.kill()


def test_the_command_ends_when_nobody_reads_its_output_any_more() -> None:
    port = free_port()
    command = [str(COMMAND), "collect", "--listen", f"udp://127.0.0.1:{port}", "--format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for("the Collector to listen", lambda: f":{port:04X} " in Path("/proc/net/udp").read_text())
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            with sender(port) as sock:
                sock.send(message(template_set(), data_set(5)))
            assert process.wait(10) == 0
            assert process.stderr.read().startswith("1 Messages with 1 Data Records;")
        finally:
            process.kill()
