# SPDX-License-Identifier: GPL-2.0-or-later
"""Collectors over TCP and TLS that are away for a while, and exporters that are killed meanwhile: nothing is lost.

What the Collector got is the judge, read without the exporter's own decoder. Each record is a flow and its times:
one that came twice must be one of which the log says so. Every packet that was sent is in the others, in the order in
which it was metered. FLOWEXP_OUTAGE_SECONDS makes the outage longer than in the suite.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import toml
from lab import needs
from lab.certificates import Authority, server_context
from lab.flowexp import BPFFS, COMMAND, PIN_PREFIX, read_ledger_line, remove_pins
from lab.netns import Link, namespaces, veth
from lab.process import Process, run
from lab.streams import StreamCollector, messages_in
from lab.wait import wait_for
from storm import (
    Array,
    comes_again,
    data_records,
    expected_octets,
    flow_ids,
    records,
    sequence_numbers,
    write_capture,
)

pytestmark = pytest.mark.kernel

AWAY_S = float(os.environ.get("FLOWEXP_OUTAGE_SECONDS", "3"))
PORTS = 5000  # of four flows each
PACKETS_PER_S = 20_000  # almost every one makes a record: a flow's next packet comes a second later
MOST_GROWTH_KIB = 64 * 1024


class Lab(NamedTuple):
    sender: Link
    metered: Link
    directory: Path
    pins: Path

    @property
    def spool(self) -> Path:
        return self.directory / "spool"

    def configure(self, url: str, **collector: object) -> Path:
        """An exporter that persists, ends flows and reports on others all the time, and has a spool."""
        configuration = self.directory / "flowexp.toml"
        timeouts = {"idle": 600, "active": 0.1, "linger": 0, "sweep_interval": 0.05}
        table = {"pin_path": str(self.pins), "persist": True, "max_flows": 65_536}
        to = {"url": url, "spool_path": str(self.spool), **collector}
        configuration.write_text(toml.dumps({"timeouts": timeouts, "table": table, "collector": [to]}))
        return configuration

    def start(self, configuration: Path, name: str = "run") -> Process:
        command = [COMMAND, "run", "-c", configuration, "-i", "eth0", "--direction", "ingress"]
        exporter = Process(self.metered.namespace.inside(command), directory=self.directory, name=name)
        wait_for("the exporter to meter", lambda: exporter.is_alive() and "metering eth0" in exporter.stderr)
        return exporter

    def queued(self, configuration: Path) -> int:
        """Records that wait, as `flowexp status` has it."""
        answer = run([COMMAND, "status", "-c", configuration, "--format", "json"])
        found = re.search(r'"recordsQueued": (\d+)', answer)
        assert found, answer
        return int(found[1])

    @contextmanager
    def traffic(self) -> Iterator[None]:
        """From one sender, so that no flow is made twice at once."""
        capture = write_capture(self.directory / "flows.pcap", ports=PORTS)
        words = ["tcpreplay", "-i", self.sender.name, f"--pps={PACKETS_PER_S}", "--preload-pcap", "--no-flow-stats",
                 "--loop=0", capture]  # fmt: skip
        process = self.sender.namespace.start(*words, directory=self.directory, name="tcpreplay")
        try:
            wait_for("packets to arrive", lambda: self.packets() > 0)
            yield
            assert process.status is None, process.stderr
        finally:
            process.kill()

    def packets(self) -> int:
        return self.metered.counters()["rx_packets"]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    needs.need(needs.kernel(), needs.tools("tcpreplay", "openssl"))
    pins = BPFFS / f"{PIN_PREFIX}outage-{tmp_path.name}"
    with namespaces("sender", "meter") as (sending_side, metering):
        try:
            yield Lab(*veth(sending_side, metering), tmp_path, pins)
        finally:
            remove_pins(pins)


def has_got(collector: StreamCollector, octets: int) -> bool:
    return sum(map(len, list(collector.sessions))) > octets


def rows_of(sessions: Sequence[bytes]) -> Array:
    """All records, in the order in which they came; each Transport Session is right by itself."""
    parts = []
    for octets in sessions:
        messages = messages_in(octets)
        counts = data_records(messages)
        expected = np.concatenate(([0], np.cumsum(counts)[:-1])) if len(counts) else counts
        assert np.array_equal(sequence_numbers(messages), expected)
        parts.append(records(messages))
    return np.concatenate(parts)


def check(sessions: Sequence[bytes], exported: int) -> int:
    """How many records came twice; all else is as it must be."""
    rows = rows_of(sessions)
    assert np.array_equal(rows["octets"], expected_octets(rows))
    once = rows[~comes_again(rows)]
    assert int(once["packets"].sum()) == exported
    flow = flow_ids(once)
    by_flow = np.argsort(flow, kind="stable")
    same = flow[by_flow][1:] == flow[by_flow][:-1]
    # Two packets within a tick of the coarse clock have one time, and Unix time is made anew for each batch.
    assert (np.diff(once["end_ms"][by_flow])[same] >= -1).all(), "the order has changed"
    return len(rows) - len(once)


def may_be_twice(log: str) -> int:
    """Records of which an exporter has said that they may arrive twice."""
    return sum(map(int, re.findall(r"(\d+) (?:of them |records )(?:had been sent.* and )?may arrive twice", log)))


def most_memory_kib(exporter: Process) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{exporter.pid}/status").read_text())
    assert found
    return int(found[1])


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_a_collector_that_is_away_under_load_misses_nothing(lab: Lab, transport: str) -> None:
    namespace, tls, keys = lab.metered.namespace, None, {}
    if transport == "tls":
        authority = Authority(lab.directory)
        tls = server_context(authority.sign("collector"))
        keys = {"ca_file": str(authority.ca_file)}
    first = StreamCollector(namespace=namespace, tls=tls)
    configuration = lab.configure(f"{transport}://127.0.0.1:{first.port}", **keys)
    exporter, second = lab.start(configuration), first
    try:
        with lab.traffic():
            wait_for("records to arrive", partial(has_got, first, 1 << 20))
            before_kib = most_memory_kib(exporter)
            first.close()
            time.sleep(AWAY_S)
            waiting = lab.queued(configuration)
            assert waiting > AWAY_S * PACKETS_PER_S / 2
            second = StreamCollector(port=first.port, namespace=namespace, tls=tls)
            wait_for("the backlog to go", lambda: lab.queued(configuration) < PACKETS_PER_S / 2, timeout_s=120)
            grown_kib = most_memory_kib(exporter) - before_kib
        assert exporter.stop() == 0, exporter.stderr
        second.finish()
    finally:
        exporter.kill()
        for each in (first, second):
            each.close()
    ledger = read_ledger_line(exporter.stderr)
    assert ledger.closes
    assert "Data Records left in the spool" not in exporter.stderr
    repeats = check([*first.sessions, *second.sessions], ledger.exported)
    print(f"{waiting} records had waited, {repeats} came twice, memory grew by {grown_kib} KiB; {ledger.line}")
    assert repeats <= may_be_twice(exporter.stderr)
    assert grown_kib < MOST_GROWTH_KIB
    assert [path.name for path in lab.spool.iterdir()] == ["position"]


def test_an_exporter_that_is_killed_with_a_spool_loses_nothing(lab: Lab) -> None:
    namespace = lab.metered.namespace
    first = StreamCollector(namespace=namespace)
    configuration = lab.configure(f"tcp://127.0.0.1:{first.port}")
    exporter, second, logs = lab.start(configuration, "run-0"), first, []
    try:
        with lab.traffic():
            for number in range(1, 4):
                if number == 1:
                    wait_for("records to arrive", partial(has_got, first, 1 << 19))
                if number == 2:  # this one is killed with the Collector away
                    first.close()
                    wait_for("records to wait", lambda: lab.queued(configuration) > PACKETS_PER_S)
                if number == 3:  # and this one while it sends what the others have left
                    second = StreamCollector(port=first.port, namespace=namespace)
                    wait_for("some to arrive", partial(has_got, second, 1 << 18))
                exporter.kill()
                assert exporter.status == -signal.SIGKILL, exporter.stderr
                logs.append(exporter.stderr)
                exporter = lab.start(configuration, f"run-{number}")
        wait_for("the backlog to go", lambda: lab.queued(configuration) < PACKETS_PER_S / 2, timeout_s=120)
        assert exporter.stop() == 0, exporter.stderr
        second.finish()
        logs.append(exporter.stderr)
    finally:
        exporter.kill()
        for each in (first, second):
            each.close()
    ledger = read_ledger_line(exporter.stderr)
    assert ledger.closes
    print("".join(logs))
    assert "Data Records left in the spool" not in exporter.stderr
    repeats = check([*first.sessions, *second.sessions], ledger.exported)
    said = may_be_twice("".join(logs))
    print(f"{repeats} records came twice, {said} may have; {ledger.line}")
    assert repeats <= said
    assert "records are left in the spool; they go first" in logs[2]
