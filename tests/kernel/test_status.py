# SPDX-License-Identifier: GPL-2.0-or-later
"""`flowexp status`: what it says is what happened, asking disturbs nobody, and its socket is the owner's alone."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Dict, NamedTuple, cast

import numpy as np
import pytest
from lab import needs
from lab.collectors import Recorder
from lab.flowexp import COMMAND, Exporter
from lab.netns import Link, Namespace, namespaces, veth
from lab.traffic import make_capture, replay
from lab.wait import wait_for
from sample_status import SAMPLE

from flowexp import status as module
from flowexp.accounts import END_REASONS, Accounts, ledger_now
from flowexp.config import Config
from flowexp.errors import FlowexpError
from flowexp.kernel.table import FlowTable
from flowexp.metering.ledger import Count, Ledger
from flowexp.reload import Reloads
from flowexp.status import Status, StatusSocket, ask, describe, socket_path

PINS = "/sys/fs/bpf/flowexp"
PACKETS, FLOWS = 20_000, 2_000
MILLISECOND_NS = 1_000_000


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder with a name short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("RUNTIME_DIRECTORY", f"{folder}/a:{folder}/b")
        yield Path(folder) / "a"


# The socket


def test_each_table_has_a_socket_of_its_own_under_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    paths = {socket_path(pins) for pins in (PINS, "/sys/fs/bpf/a/flowexp", "/sys/fs/bpf/a-flowexp", "/x" * 2000)}
    assert len(paths) == 4
    assert all(re.fullmatch(r"/run/flowexp/[\w-]{1,40}-[0-9a-f]{8}\.sock", str(path)) for path in paths)
    assert all(len(str(path)) < 108 for path in paths)


def test_the_socket_is_the_owners_alone_and_goes_with_it(runtime: Path) -> None:
    server = StatusSocket(PINS)
    assert server.path == socket_path(PINS)
    assert server.path.parent == runtime
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    server.close()
    assert not server.path.exists()


@pytest.mark.usefixtures("runtime")
def test_a_dead_exporters_socket_is_replaced() -> None:
    killed, server = StatusSocket(PINS), StatusSocket(PINS)
    assert answer_to_one(server, SAMPLE) == as_json(SAMPLE)
    server.close()
    killed.close()


def as_json(status: Status) -> Status:
    return cast(Status, json.loads(json.dumps(status)))


def connect(server: StatusSocket) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(server.path))
    return client


def read(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def answer_to_one(server: StatusSocket, status: Status) -> Status:
    client = connect(server)
    server.answer(lambda: status)
    return cast(Status, json.loads(read(client)))


@pytest.mark.usefixtures("runtime")
def test_where_nobody_waits_no_snapshot_is_made() -> None:
    server = StatusSocket(PINS)
    server.answer(lambda: pytest.fail("a snapshot was made"))
    server.close()


@pytest.mark.usefixtures("runtime")
def test_an_answer_of_a_megabyte_arrives_whole_though_its_reader_comes_late() -> None:
    server = StatusSocket(PINS)
    big: Status = {**SAMPLE, "version": "1" * 1_000_000}
    assert answer_to_one(server, big) == as_json(big)
    server.close()


@pytest.mark.usefixtures("runtime")
def test_readers_who_do_not_read_or_have_left_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_make_room", lambda connection, octets: None)
    server = StatusSocket(PINS)
    lazy, gone = connect(server), connect(server)
    gone.close()
    began_s = time.monotonic()
    for _ in range(2):
        server.answer(lambda: {**SAMPLE, "version": "1" * 10_000_000})
    assert time.monotonic() - began_s < 5
    assert 0 < len(read(lazy)) < 10_000_000
    assert answer_to_one(server, SAMPLE) == as_json(SAMPLE)
    server.close()


@pytest.mark.usefixtures("runtime")
def test_what_is_wrong_with_asking_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    path = socket_path(PINS)
    nobody = f"no exporter runs on {PINS} (nobody answers at {path}); start one with `flowexp run`, or name its"

    def error() -> str:
        with pytest.raises(FlowexpError) as raised:
            ask(PINS)
        return str(raised.value)

    assert error().startswith(nobody)
    server = StatusSocket(PINS)
    monkeypatch.setattr(module, "_ANSWER_TIMEOUT_S", 0.1)
    assert error() == f"{path}: the exporter did not answer within 0.1 s; try again"
    server.answer(lambda: SAMPLE)  # to the one who has left
    server.close()
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert error().startswith(nobody)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/tmp/" + "x" * 200)
    assert "AF_UNIX path too long; run as root" in error()


def answer_half(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(b'{"version": "1.')


@pytest.mark.usefixtures("runtime")
def test_an_answer_that_was_cut_off_is_one_line() -> None:
    path = socket_path(PINS)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=answer_half, args=(server,))
        thread.start()
        with pytest.raises(FlowexpError) as raised:
            ask(PINS)
        thread.join()
    assert str(raised.value) == f"{path}: the exporter's answer was cut off; try again"


# What the exporter counts


class BusyFamily:
    """Holds 5 packets, 500 octets that no record has carried."""

    def unexported(self) -> Count:
        return 5, 500


class BusyTable:
    """10 packets, 1,000 octets were exported, 1 packet of 60 octets was not metered; `seen` differs each time."""

    families = (BusyFamily(),)

    def __init__(self, *seen: Count) -> None:
        self._seen = iter(seen)

    def counters(self) -> Dict[str, Count]:
        return {"seen": next(self._seen), "not_metered_not_ip": (1, 60)}

    def exported_ever(self) -> Count:
        return 10, 1000


def ledger_of(before: Count, after: Count) -> Ledger:
    return ledger_now(cast(FlowTable, BusyTable(before, after)))


def test_a_ledger_read_under_traffic_closes_if_it_did_at_some_instant_meanwhile() -> None:
    assert ledger_of((16, 1560), (16, 1560)).missing() == (0, 0)
    assert ledger_of((14, 1400), (20, 1900)).missing() == (0, 0)
    assert ledger_of((14, 1400), (20, 1900)).seen == (16, 1560)


def test_a_ledger_that_closes_at_no_instant_is_off_by_what_is_missing() -> None:
    assert ledger_of((18, 1700), (30, 3000)).missing() == (2, 140)
    assert ledger_of((10, 1000), (15, 1500)).missing() == (-1, -60)


class EmptyTable:
    families = ()
    octets = 0

    def counters(self) -> Dict[str, Count]:
        return {"seen": (0, 0), "payloads_lost": (0, 0)}

    def exported_ever(self) -> Count:
        return 0, 0


def test_sweeps_are_timed_and_their_records_counted_by_reason() -> None:
    counts = Accounts(0)
    counts.sent(np.array([4, 4], np.uint8), 7)  # before the first sweep
    counts.sweep_begins()
    counts.sent(np.array([1, 3, 1], np.uint8), 2 * MILLISECOND_NS)
    counts.sent(np.array([2], np.uint8), 1 * MILLISECOND_NS)
    counts.sweep_ended(began_ns=10 * MILLISECOND_NS, now_ns=20 * MILLISECOND_NS, flows=9)
    status = counts.snapshot(
        config=Config(), table=cast(FlowTable, EmptyTable()), attachments={}, collectors=[], packets={}, anomalies=None,
        configuration=Reloads(0).status(0), nat_events=None,
        now_ns=1020 * MILLISECOND_NS,
    )  # fmt: skip
    assert status["exportedRecords"] == {
        "idle": 2, "active": 1, "end_of_flow": 1, "forced": 2, "lack_of_resources": 0
    }  # fmt: skip
    assert list(status["exportedRecords"]) == list(END_REASONS.values())
    assert status["lastSweep"] == {
        "ageSeconds": 1.0, "totalMilliseconds": 10.0, "sendingMilliseconds": 3.0, "flows": 9, "records": 4
    }  # fmt: skip
    assert status["uptimeSeconds"] == 1.02
    buckets = dict(status["sweepDurations"]["buckets"])
    assert (buckets["0.005"], buckets["0.01"], buckets["+Inf"]) == (0, 1, 1)
    assert status["sweepDurations"]["sumSeconds"] == 0.01
    assert status["sendDurations"]["sumSeconds"] == 0.003


# For people


def test_a_status_is_told_in_words() -> None:
    told = describe(SAMPLE)
    assert told.startswith("flowexp 1.2.3, loader prebuilt, pid 4711, up 1 d 2 h\n")
    assert "table       IPv4 26,214 (10.0%), IPv6 3 (0.0%) of 262,144 flows each, 121 MiB\n" in told
    assert "17 first payloads lost" in told
    assert "ledger      DOES NOT CLOSE, off by 5 packets, 500 octets\n" in told
    assert re.search(r"\n  not metered: not ip +10 packets +1,000 octets\n", told)
    assert "table full" not in told  # did not occur
    assert "records     11 idle, 12 active, 13 end of flow, 14 forced, 15 lack of resources\n" in told
    assert "collector   udp://192.0.2.1:4739 (ipfix) refused\n  21 Messages, 23 records, 22,000 octets sent\n" in told
    assert "24 Messages failed, 25 records failed, 26 refused, 27 unreachable, 30 flows not representable" in told
    assert "; last Template 31 s ago\n" in told
    assert "; last Template never\n" in told
    assert "last sweep  0 s ago, 12.3 ms, 5.7 of it sending; 26,217 flows, 99 records sent\n" in told
    assert "  eth0 ingress             51 connections unanswered, 52 packets undersized, 53 jumbo\n" in told
    assert "    one source: 54 destinations (192.0.2.7), 1,055 ports (2001:db8::7)\n  wg0 egress  " in told
    eth0, order, wg0 = told.partition("\nattached ")[2].partition("\n  eth0 ")[2].splitlines()[:3]
    assert eth0.split() == ["ingress", "tcx", "1,234,567"]
    assert order.strip() == "in this order: TCX probe, flowexp, filter u32 (pref 10)"
    assert wg0.split() == ["wg0", "egress", "clsact", "?"]


def test_a_status_of_nothing_is_told_in_words() -> None:
    ledger = {**SAMPLE["ledger"], "missing": {"packets": 0, "octets": 0}}
    told = describe({**SAMPLE, "collectors": [], "attached": [], "lastSweep": None, "ledger": ledger})
    assert "ledger      closes\n" in told
    assert "last sweep  none yet\nattached    nowhere: none of the interfaces is there\n" in told


# As users run it


class Running(NamedTuple):
    """An exporter that has metered all of a capture and exported nothing yet."""

    exporter: Exporter
    namespace: Namespace
    sender: Link
    link: Link
    recorder: Recorder
    capture: Any

    def status(self, *options: str) -> str:
        return self.namespace.run(COMMAND, "status", "-c", self.exporter.configuration, *options)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    needs.need(needs.kernel(), needs.tools("tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        capture = make_capture(
            tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, "02:00:00:00:00:99")
        )
        timeouts = {"timeouts": {"idle": 600, "linger": 600}}
        with (
            Recorder(meter) as recorder,
            Exporter(meter, tmp_path, collectors=[recorder.url], configuration=timeouts) as exporter,
        ):
            assert replay(left, capture) == PACKETS
            yield Running(exporter, meter, left, right, recorder, capture)
            if exporter.process.status is None:
                exporter.stop()


@pytest.mark.kernel
def test_status_says_what_was_sent_and_how_it_stands(running: Running) -> None:
    wait_for("a sweep", lambda: json.loads(running.status("--format", "json"))["lastSweep"] is not None)
    status: Status = json.loads(running.status("--format", "json"))
    octets = sum(flow.octets for flow in running.capture.flows.values())
    everything, nothing = {"packets": PACKETS, "octets": octets}, {"packets": 0, "octets": 0}
    ledger = status["ledger"]
    assert (ledger["seen"], ledger["inTable"]) == (everything, everything)
    assert ledger["exported"] == ledger["missing"] == nothing
    assert set(ledger["notMetered"]) >= {"not_ip", "table_full", "seen_at_ingress"}
    assert sum(status["table"]["flows"].values()) == FLOWS
    assert status["pid"] == running.exporter.process.pid
    points = {(each["direction"], each["interface"], each["ifindex"]) for each in status["attached"]}
    assert points == {(way, "eth0", running.link.ifindex) for way in ("ingress", "egress")}
    devices = {each["direction"]: each["devicePackets"] for each in status["attached"]}
    assert devices == {"ingress": running.link.counters()["rx_packets"], "egress": 0}
    (collector,) = status["collectors"]
    assert (collector["collector"], collector["state"]) == (running.recorder.url, "up")
    assert collector["messagesSent"] == len(running.recorder.messages()) > 0
    assert status["lastSweep"] is not None and status["lastSweep"]["flows"] == FLOWS
    assert f"{PACKETS:,} packets" in running.status()


@pytest.mark.kernel
def test_the_ledger_closes_whenever_it_is_asked_for_under_traffic(running: Running) -> None:
    worst = 0
    began_s = time.monotonic()
    with subprocess.Popen(
        running.sender.namespace.inside(
            ["tcpreplay", "--quiet", "--loop", "40", "--intf1", "eth0", running.capture.path]
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as sending:
        asked = 0
        while sending.poll() is None and time.monotonic() - began_s < 60:
            missing = ask(str(running.exporter.pins))["ledger"]["missing"]
            worst, asked = max(worst, abs(missing["packets"])), asked + 1
    assert asked > 5
    assert worst <= (os.cpu_count() or 1)
    assert ask(str(running.exporter.pins))["ledger"]["seen"]["packets"] == 41 * PACKETS


@pytest.mark.kernel
def test_after_the_end_the_socket_is_gone_and_status_is_one_line(running: Running) -> None:
    path = socket_path(str(running.exporter.pins))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert running.exporter.stop() == 0, running.exporter.log
    assert not path.exists()
    command = running.namespace.inside([COMMAND, "status", "-c", running.exporter.configuration])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"flowexp: no exporter runs on {running.exporter.pins} (nobody answers at {path})")
    assert done.stderr.count("\n") == 1


@pytest.mark.kernel
def test_an_exporter_that_can_have_no_socket_says_so_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs.need(needs.kernel())
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/proc/nowhere")
    with namespaces("sender", "meter") as (sender, meter):
        veth(sender, meter)
        with Recorder(meter) as recorder, Exporter(meter, tmp_path, collectors=[recorder.url]) as exporter:
            assert exporter.stop() == 0
    assert "No such file or directory; there will be no status and no metrics" in exporter.log
    assert exporter.ledger().closes
