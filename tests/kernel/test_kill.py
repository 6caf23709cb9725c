# SPDX-License-Identifier: GPL-2.0-or-later
"""Exporters that are killed, again and again, at any instant and under traffic on every CPU; the next one goes on.

What Collectors got is the judge. A batch that was being sent when the kill came may arrive twice, and the next
exporter says so in its log; no other record may. Ended flows show octets = packets x length(key) in each record;
flows that go on do so in sum, as an interim record's two counters are not read at one instant.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import toml
from lab import needs
from lab.collectors import SO_RCVBUFFORCE
from lab.flowexp import BPFFS, COMMAND, PIN_PREFIX, LogLedger, read_ledger_line
from lab.netns import Link, Namespace, namespaces, tcx_programs, veth
from lab.process import Process
from lab.wait import wait_for
from storm import (
    Array,
    comes_again,
    data_records,
    expected_octets,
    flow_sums,
    observation_domains,
    records,
    sending,
    sequence_numbers,
    write_capture,
)

from flowexp.metering.sweep import ACTIVE

pytestmark = pytest.mark.kernel

KILLS = int(os.environ.get("FLOWEXP_KILLS", "20"))
PACKETS = int(os.environ.get("FLOWEXP_KILL_PACKETS", "0"))  # at least, spread over the kills
SEED = int(os.environ.get("FLOWEXP_KILL_SEED", "0")) or random.randrange(1, 1 << 32)
PORTS = 6000  # of four flows each
PACKETS_PER_S = 60_000  # of each CPU: an exporter has to come up beside them
BATCH_RECORDS = 16_384
METERS_S = 60.0  # the deadline on a busy machine
PACKETS_S = 600.0
ANNOUNCED_RECORDS = 64  # at most, go out with the Templates: one for each device, and less than twenty others


class Listener:
    """A UDP socket that keeps every datagram, and every address that one came from."""

    def __init__(self, namespace: Namespace) -> None:
        self._socket = namespace.socket()
        self._socket.setsockopt(1, SO_RCVBUFFORCE, 512 << 20)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.url = f"udp://127.0.0.1:{self._socket.getsockname()[1]}"
        self.messages: list[bytes] = []
        self.senders: set[Any] = set()

    def read(self) -> int:
        """Takes what has come; how many there are in all."""
        while True:
            try:
                message, sender = self._socket.recvfrom(65535)
            except BlockingIOError:
                return len(self.messages)
            self.messages.append(message)
            self.senders.add(sender)

    def close(self) -> None:
        self._socket.close()


class File:
    """An IPFIX File, Message by Message; what a kill cut off is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = path.as_uri()
        self.messages: list[bytes] = []
        self._octets = 0

    def read(self) -> int:
        """Takes what has been written; how many Messages there are in all."""
        with self._path.open("rb") as file:
            file.seek(self._octets)
            rest = file.read()
        at = 0
        while at + 16 <= len(rest):
            length = int.from_bytes(rest[at + 2 : at + 4], "big")
            assert rest[at : at + 2] == b"\0\x0a", f"no Message at octet {self._octets + at}"
            if at + length > len(rest):
                break
            self.messages.append(rest[at : at + length])
            at += length
        self._octets += at
        return len(self.messages)


class Lab(NamedTuple):
    sender: Link
    metered: Link
    directory: Path
    pins: Path
    listener: Listener
    file: File

    def start(self, number: int) -> Process:
        """An exporter that persists, and ends flows and reports on others all the time."""
        configuration = self.directory / "flowexp.toml"
        timeouts = {"idle": 600, "active": 0.1, "linger": 0, "sweep_interval": 0.05}
        table = {"pin_path": str(self.pins), "persist": True, "max_flows": 65_536}
        configuration.write_text(toml.dumps({"timeouts": timeouts, "table": table}))
        command = [COMMAND, "run", "-c", configuration, "-i", "eth0", "--direction", "ingress"]
        for url in (self.file.url, self.listener.url):
            command += ["--collector", url]
        inside = self.metered.namespace.inside(command)
        return Process(inside, directory=self.directory, name=f"run-{number}")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    needs.need(needs.kernel(), needs.tools("tcpreplay", "taskset"))
    pins = BPFFS / f"{PIN_PREFIX}kill-{tmp_path.name}"
    with namespaces("sender", "meter") as (sending_side, metering):
        listener = Listener(metering)
        ends = veth(sending_side, metering)
        try:
            yield Lab(*ends, tmp_path, pins, listener, File(tmp_path / "flows.ipfix"))
        finally:
            listener.close()
            shutil.rmtree(pins, ignore_errors=True)


class Part(NamedTuple):
    """One exporter's part: where its Messages begin, and how many records it found in doubt."""

    udp_from: int
    file_from: int
    in_doubt: int


def in_doubt(log: str) -> int:
    found = re.search(r"while sending: (\d+) records may arrive twice", log)
    return int(found[1]) if found else 0


def is_metering(exporter: Process) -> bool:
    return exporter.is_alive() and "metering eth0" in exporter.stderr


def has_sent(exporter: Process, lab: Lab, before: int) -> bool:
    return exporter.is_alive() and lab.listener.read() > before


def has_passed(lab: Lab, packets: int) -> bool:
    lab.listener.read()
    return lab.metered.counters()["rx_packets"] >= packets


def storm(lab: Lab, chance: random.Random) -> tuple[list[Part], LogLedger]:
    """Kills KILLS exporters under traffic, some as they start; the next one ends by itself, after the traffic."""
    capture = write_capture(lab.directory / "flows.pcap", ports=PORTS)
    parts, begin = [], (0, 0)
    exporter = lab.start(0)
    try:
        wait_for("the first exporter to meter", lambda: is_metering(exporter), timeout_s=METERS_S)
        with sending(lab.sender, capture, packets_per_s=PACKETS_PER_S):
            for number in range(KILLS):
                if chance.random() < 0.5:
                    wait_for("the exporter to send", partial(has_sent, exporter, lab, begin[0]))
                if PACKETS:
                    goal = PACKETS * (number + 1) // KILLS
                    wait_for(f"{goal} packets", partial(has_passed, lab, goal), timeout_s=PACKETS_S)
                time.sleep(chance.uniform(0.0, 0.3))
                exporter.kill()
                assert exporter.status == -signal.SIGKILL, exporter.stderr
                parts.append(Part(*begin, in_doubt(exporter.stderr)))
                begin = lab.listener.read(), lab.file.read()
                exporter = lab.start(number + 1)
                if chance.random() < 0.7:
                    wait_for("the next exporter to meter", partial(is_metering, exporter), timeout_s=METERS_S)
        wait_for("the last exporter to meter", lambda: is_metering(exporter), timeout_s=METERS_S)
        assert exporter.stop() == 0, exporter.stderr
        parts.append(Part(*begin, in_doubt(exporter.stderr)))
        return parts, read_ledger_line(exporter.stderr)
    finally:
        exporter.kill()
        lab.listener.read()
        lab.file.read()


def without_repeats(rows: Array, messages: Sequence[bytes], firsts: Sequence[int], parts: Sequence[Part]) -> Array:
    """The records less those that a kill left in doubt and that came again as they were.

    Where Sequence Numbers went back, these are all from there on. Where they did not, a batch had been sent whole, and
    all of it came again, or nothing of it had been. (A flow may have two equal records: CPUs that make it at once.)
    """
    again, repeated, sequences = comes_again(rows), np.zeros(len(rows), bool), sequence_numbers(messages)
    for first, part in zip(firsts, parts):
        end = int(np.searchsorted(rows["message"], first))
        if 0 < first < len(messages) and (went_back := np.flatnonzero(sequences[:first] >= sequences[first])).size:
            begin = int(np.searchsorted(rows["message"], went_back[0]))
            assert again[begin:end].all()
        else:
            begin = end - part.in_doubt if again[max(0, end - part.in_doubt) : end].all() else end
        repeated[begin:end] = True
    return rows[~repeated]


def check(messages: Sequence[bytes], first_messages: Sequence[int], parts: Sequence[Part], ledger: LogLedger) -> str:
    """What one Collector got; returns it in a line."""
    rows = records(messages)
    ended = rows[rows["reason"] != ACTIVE]
    assert np.count_nonzero(ended["octets"] != expected_octets(ended)) == 0
    assert rows["packets"].min() > 0

    once = without_repeats(rows, messages, first_messages, parts)
    octets, expected = flow_sums(once)
    assert np.array_equal(octets, expected)
    assert int(once["packets"].sum()) == ledger.exported

    sequences, counts = sequence_numbers(messages), data_records(messages)
    steps = sequences[1:] - sequences[:-1] - counts[:-1]
    for first in {first for first in first_messages if 0 < first < len(messages)}:
        doubt = max(part.in_doubt for at, part in zip(first_messages, parts) if at == first)
        # It goes on where it was, or goes back for what is in doubt.
        assert -doubt - ANNOUNCED_RECORDS <= steps[first - 1] <= 0, f"Message {first}"
        steps[first - 1] = 0
    assert not steps.any()
    assert len(observation_domains(messages)) == 1
    return f"{len(rows)} records, {len(rows) - len(once)} of them twice; {len(ended)} of flows that ended"


def test_nothing_is_lost_and_only_what_was_in_doubt_is_repeated_however_often_exporters_are_killed(lab: Lab) -> None:
    print(f"FLOWEXP_KILL_SEED={SEED}")
    before = lab.metered.counters()["rx_packets"]
    parts, ledger = storm(lab, random.Random(SEED))
    passed = lab.metered.counters()["rx_packets"] - before
    print(f"{sum(part.in_doubt > 0 for part in parts)} of {KILLS} kills came while sending; {ledger.line}")
    assert ledger.closes
    assert (ledger.seen, ledger.exported, ledger.not_metered) == (passed, passed, {})
    assert max(part.in_doubt for part in parts) <= BATCH_RECORDS
    assert len(lab.listener.senders) == 1
    for name, messages, first_messages in (
        ("UDP", lab.listener.messages, [part.udp_from for part in parts]),
        ("file", lab.file.messages, [part.file_from for part in parts]),
    ):
        print(name, check(messages, first_messages, parts, ledger))
    assert tcx_programs(lab.metered, "ingress") == 1  # it persists
