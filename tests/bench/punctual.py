# SPDX-License-Identifier: GPL-2.0-or-later
"""4. and 6. How long things take for who waits: a record after its flow's timeout, a command, a first packet."""

from __future__ import annotations

import itertools
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import lab.flowexp
from lab.netns import Link, namespaces, veth
from lab.process import Process, environment
from lab.traffic import send_frames

from flowexp.protocol.decode import Decoder

from .figures import US, Figure
from .kernel import FRAMES

LATE, START = "Punctuality", "Start"
IDLE_S = 1.0
FRAME = FRAMES["IPv4 UDP"]
SOURCE_PORT_AT = 34


def _from_port(port: int) -> bytes:
    return FRAME[:SOURCE_PORT_AT] + port.to_bytes(2, "big") + FRAME[SOURCE_PORT_AT + 2 :]


def lateness(*, flows: int, directory: Path) -> list[Figure]:
    """Time from a flow's idle timeout to its record's datagram at the Collector, sweeps every second (the default)."""
    with namespaces("send", "meter") as (sending, metering):
        source, target = veth(sending, metering)
        with metering.socket() as collector:
            collector.bind(("127.0.0.1", 0))
            with lab.flowexp.Exporter(
                metering, directory, interfaces=(target.name,), configuration={"timeouts": {"idle": IDLE_S}},
                collectors=[f"udp://127.0.0.1:{collector.getsockname()[1]}"],
            ) as running:  # fmt: skip
                late_ms = _lateness(source, collector, flows)
                running.stop()
    return [Figure(LATE, "from idle timeout to record, default sweep", "ms", US, late_ms)]


def _lateness(source: Link, collector: socket.socket, flows: int) -> list[float]:
    """One packet a flow, sent evenly over some sweeps, in milliseconds."""
    decoder, sent_s, late_ms = Decoder(), {}, []
    poll = select.poll()
    poll.register(collector, select.POLLIN)
    deadline_s = time.monotonic() + 3 * IDLE_S + 0.07 * flows + 5
    while len(late_ms) < flows:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{len(late_ms)} records of {flows} flows came in time")
        if len(sent_s) < flows:
            port = 1024 + len(sent_s)
            send_frames(source, [_from_port(port)])
            sent_s[port] = time.monotonic()
        if poll.poll(70):
            datagram, now_s = collector.recv(65535), time.monotonic()
            for record in decoder.decode(datagram, 0).records:
                port = record.get("sourceTransportPort")
                if port in sent_s:
                    late_ms.append((now_s - sent_s[port] - IDLE_S) * 1e3)
    return late_ms


def commands(*, rounds: int) -> list[Figure]:
    """Wall clock of commands that only look, and of what they import."""
    flowexp, python = str(lab.flowexp.COMMAND), sys.executable
    lines = {
        "flowexp --help": [flowexp, "--help"],
        "flowexp check": [flowexp, "check", "-i", "lo", "--collector", "udp://127.0.0.1:9"],
        "import of flowexp.exporter": [python, "-c", "import flowexp.exporter"],
        "Python itself": [python, "-c", ""],
    }
    values: dict[str, list[float]] = {name: [] for name in lines}
    for _, (name, line) in itertools.product(range(rounds), lines.items()):
        began_s = time.monotonic()
        subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), check=False)
        values[name].append((time.monotonic() - began_s) * 1e3)
    return [Figure(START, name, "ms", US, numbers) for name, numbers in values.items()]


def first_packet(*, rounds: int, directory: Path) -> list[Figure]:
    """From the start of `flowexp run` to the first packet that it meters: one a millisecond is sent all the time."""
    values = []
    for number in range(rounds):
        own = directory / f"first-{number}"
        own.mkdir()
        with namespaces("send", "meter") as (sending, metering):
            source, target = veth(sending, metering)
            values.append(_first_packet(source, target, own))
    return [Figure(START, "flowexp run to the first packet metered", "ms", US, values)]


def _first_packet(source: Link, target: Link, directory: Path) -> float:
    file, pins = directory / "flows.ipfix", lab.flowexp.BPFFS / f"{lab.flowexp.PIN_PREFIX}{directory.name}"
    configuration = directory / "flowexp.toml"
    configuration.write_text(f'interfaces = ["{target.name}"]\n[table]\npin_path = "{pins}"\n')
    command = [lab.flowexp.COMMAND, "run", "-c", configuration, "--collector", file.as_uri()]
    with source.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((source.name, 0))
        began_ns = time.time_ns()
        running = Process(target.namespace.inside(command), directory=directory, name="run")
        try:
            while time.time_ns() - began_ns < 3e9 and "metering" not in running.stderr:
                sender.send(FRAME)
                time.sleep(0.001)
            sender.send(FRAME)
            running.stop()
        finally:
            running.kill()
            lab.flowexp.remove_pins(pins)
    return _first_start_ns(file.read_bytes()) / 1e6 - began_ns / 1e6


def _first_start_ns(content: bytes) -> float:
    """The least flowStartMilliseconds of an IPFIX File."""
    decoder, starts = Decoder(), []
    while content:
        octets = int.from_bytes(content[2:4], "big")
        starts += [r["flowStartMilliseconds"] for r in decoder.decode(content[:octets], 0).records
                   if "flowStartMilliseconds" in r]  # fmt: skip
        content = content[octets:]
    return min(starts) * 1e6
