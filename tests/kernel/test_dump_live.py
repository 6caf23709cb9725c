# SPDX-License-Identifier: GPL-2.0-or-later
"""`flowexp dump` beside a running exporter, where none runs, and told to end while it reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import pytest
from lab import needs
from lab.flowexp import BPFFS, COMMAND, PIN_PREFIX, Exporter
from lab.flows import total
from lab.netns import Link, Namespace, attached, namespaces, veth
from lab.process import environment
from lab.traffic import Capture, make_capture, replay
from lab.wait import wait_for

from flowexp.kernel.pins import PinFolder

pytestmark = pytest.mark.kernel

PACKETS, FLOWS = 20_000, 2_000
STILL = ("attached", "table", "ledger", "exportedRecords")  # what a status says that time alone does not change


class Running(NamedTuple):
    """An exporter that has metered all of a capture."""

    exporter: Exporter
    namespace: Namespace
    capture: Capture
    sender: Link

    def dump(self, *options: str) -> List[Dict[str, Any]]:
        command = (COMMAND, "dump", "-c", self.exporter.configuration, "--format", "json", *options)
        return [json.loads(line) for line in self.namespace.run(*command).splitlines()]

    def shown(self, *options: str) -> str:
        """As a table."""
        return str(self.namespace.run(COMMAND, "dump", "-c", self.exporter.configuration, *options))

    def status(self) -> Dict[str, Any]:
        answer: Dict[str, Any] = json.loads(
            self.namespace.run(COMMAND, "status", "-c", self.exporter.configuration, "--format", "json")
        )
        return answer


@pytest.fixture
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    """With the active timeout of `request`."""
    needs.need(needs.kernel(), needs.tools("tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        left, _ = veth(sender, meter)
        capture = make_capture(
            tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, "02:00:00:00:00:99")
        )
        timeouts = {"timeouts": {"idle": 600, "linger": 600, "active": request.param}}
        url = f"file://{tmp_path}/flows.ipfix"
        with Exporter(meter, tmp_path, collectors=[url], configuration=timeouts) as exporter:
            assert replay(left, capture) == PACKETS
            yield Running(exporter, meter, capture, left)
            assert exporter.stop() == 0, exporter.log
            ledger = exporter.ledger()
            assert ledger.closes and ledger.exported == PACKETS


def summed(records: List[Dict[str, Any]], *names: str) -> List[int]:
    return [sum(record[name] for record in records) for name in names]


@pytest.mark.parametrize("running", [600], indirect=True)
def test_a_dump_adds_up_to_the_ledger_and_changes_none_of_the_exporters_numbers(
    running: Running, tmp_path: Path
) -> None:
    before = running.status()
    in_table = before["ledger"]["inTable"]
    flows = running.dump()
    assert len(flows) == FLOWS
    assert summed(flows, "packetDeltaCount", "octetDeltaCount") == [in_table["packets"], in_table["octets"]]
    assert in_table["packets"] == PACKETS == before["ledger"]["seen"]["packets"]

    sent = total(running.capture.flows)
    for keys in ("proto", "src,dst", "dport"):
        some = running.dump("--aggregate", keys)
        assert summed(some, "packetDeltaCount", "octetDeltaCount", "deltaFlowCount") == [PACKETS, sent.octets, FLOWS]
    most = running.dump("--top", "3")
    assert [flow["octetDeltaCount"] for flow in most] == sorted((f["octetDeltaCount"] for f in flows), reverse=True)[:3]
    assert len(running.dump("--limit", "5")) == 5

    file = tmp_path / "dumped.ipfix"
    running.dump("--aggregate", "proto", "--format", "ipfix", "-o", str(file))
    assert file.stat().st_size > 0
    after = running.status()
    assert {name: after[name] for name in STILL} == {name: before[name] for name in STILL}


@pytest.mark.parametrize("running", [1], indirect=True)
def test_totals_are_since_a_flows_birth_whatever_has_been_exported(running: Running) -> None:
    wait_for("interim records of all", lambda: running.status()["ledger"]["inTable"]["packets"] == 0, timeout_s=60)
    assert running.dump() == []
    flows = running.dump("--totals")
    assert len(flows) == FLOWS
    sent = total(running.capture.flows)
    assert summed(flows, "packetTotalCount", "octetTotalCount") == [PACKETS, sent.octets]
    assert "octetDeltaCount" not in flows[0]
    head, *lines = running.shown("--totals").splitlines()
    assert "octets" in head.split() and "octetTotalCount" not in head
    assert len(lines) >= FLOWS
    most = running.dump("--totals", "--top", "1", "--by", "packets")
    assert most[0]["packetTotalCount"] == max(flow["packetTotalCount"] for flow in flows)


def test_where_no_exporter_runs_dump_meters_until_told_to_end_and_leaves_nothing_behind(tmp_path: Path) -> None:
    needs.need(needs.kernel(), needs.tools("tcpreplay"))
    pins = BPFFS / "fxt-no-such-exporter"
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        capture = make_capture(tmp_path / "sent.pcap", packets=1_000, flows=10, macs=(left.mac, right.mac))
        configuration = tmp_path / "flowexp.toml"
        configuration.write_text(f'[table]\npin_path = "{pins}"\n')
        words = ["dump", "-c", configuration, "-i", "eth0", "--duration", "1h", "--format", "json"]
        metering = meter.start(COMMAND, *words, directory=tmp_path, name="dump")
        try:
            wait_for("programs", lambda: metering.is_alive() and len(attached(right)) == 2, timeout_s=60)
            assert replay(left, capture) == 1_000
            assert metering.stop(signal.SIGINT) == 0, metering.stderr
        finally:
            metering.kill()
        records = [json.loads(line) for line in metering.stdout.splitlines()]
        sent = total(capture.flows)
        assert summed(records, "packetDeltaCount", "octetDeltaCount") == [1_000, sent.octets]
        assert metering.stderr.endswith("the ledger closes\n")
        assert attached(right) == []
    assert not pins.exists()


def test_told_to_end_while_it_reads_a_capture_dump_shows_what_there_is(tmp_path: Path) -> None:
    """The capture is a pipe that gives some of its packets and then no more, until dump has been told to end."""
    needs.need(needs.bpf(), needs.exporter())
    macs = ("02:00:00:00:00:01", "02:00:00:00:00:02")
    capture = make_capture(tmp_path / "sent.pcap", packets=100_000, flows=10, macs=macs).path
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    octets, half, told = capture.read_bytes(), threading.Event(), threading.Event()

    def feed() -> None:
        with pipe.open("wb") as stream:
            stream.write(octets[: len(octets) // 2])
            stream.flush()
            half.set()
            told.wait(60)
            try:
                stream.write(octets[len(octets) // 2 :])
            except BrokenPipeError:
                pass

    feeding = threading.Thread(target=feed)
    feeding.start()
    with subprocess.Popen(
        [COMMAND, "dump", "--read", pipe, "--format", "json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(),
    ) as reading:  # fmt: skip
        wait_for("the first half to be read", lambda: half.is_set() or reading.poll() is not None, timeout_s=60)
        reading.send_signal(signal.SIGINT)
        told.set()
        shown, said = reading.communicate(timeout=60)
    feeding.join()
    assert reading.returncode == 0, said
    packets = summed([json.loads(line) for line in shown.splitlines()], "packetDeltaCount")[0]
    assert 0 < packets < 100_000
    assert f"told to end after {packets} packets\n" in said and said.endswith("the ledger closes\n")


@pytest.mark.parametrize("words", [("dump",), ("top", "--count", "1")])
def test_an_exporter_that_has_no_table_yet_is_said_to_be_starting(words: tuple[str, ...], tmp_path: Path) -> None:
    needs.need(needs.kernel())
    pins = PinFolder(str(BPFFS / f"{PIN_PREFIX}starting"))
    file = tmp_path / "flowexp.toml"
    file.write_text(f'[table]\npin_path = "{pins.path}"\n')
    pins.hold()
    try:
        shown = subprocess.run([COMMAND, *words, "-c", file], capture_output=True, text=True, timeout=30, check=False)
    finally:
        pins.release()
    expected = f"flowexp: {pins.path}: the exporter is just starting or leaving; try again\n"
    assert (shown.returncode, shown.stderr) == (1, expected)
