# SPDX-License-Identifier: GPL-2.0-or-later
"""The wheel in virtual environments of its own: PyPI's newest libraries, and the oldest on the oldest Python."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import captures
import pytest
import toml
from debian import ROOT, build
from lab import needs, pip
from lab.netns import namespaces, tcx_programs, veth
from lab.process import CommandFailed, run
from lab.traffic import make_capture, send_frames
from lab.wait import wait_for

pytestmark = pytest.mark.kernel

PIP_S = 300.0
OLDEST = (3, 9)
PACKETS, FLOWS = 2_000, 50
DATAGRAM = "4500001c00000000401100000a0100010a010009"  # IPv4, UDP, 28 octets, 10.1.0.1 to 10.1.0.9


@dataclass
class Environment:
    """A virtual environment, with the wheel in it and no scapy."""

    folder: Path

    def pip_install(self, *words: str | Path) -> None:
        run([self.folder / "bin/python", "-m", "pip", "install", "--quiet", *words], timeout_s=PIP_S)

    @property
    def command(self) -> Path:
        return self.folder / "bin/flowexp"

    def flowexp(self, *words: str | Path) -> str:
        return run([self.command, *words])

    def version(self, library: str) -> str:
        program = f"from importlib.metadata import version; print(version({library!r}))"
        return run([self.folder / "bin/python", "-c", program]).strip()


def oldest_python() -> Path | None:
    """A Python 3.9, of the system or of pyenv."""
    name = "python{}.{}".format(*OLDEST)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [*map(Path, os.environ["PATH"].split(":")), *pyenv.glob("{}.{}.*/bin".format(*OLDEST))]
    found = (place / name for place in places if place.name != "shims")  # those may stand for nothing
    return next((path for path in found if os.access(path, os.X_OK)), None)


def oldest_libraries() -> list[str]:
    """The least that pyproject.toml asks for: numpy>=1.20 is numpy==1.20.*."""
    wanted = toml.load(ROOT / "pyproject.toml")["project"]["dependencies"]
    return [re.sub(">=(.*)", r"==\1.*", each) for each in wanted]


@pytest.fixture(scope="module", params=["newest", "oldest"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    needs.need(needs.kernel(), pip.support())
    python, libraries = Path(sys.base_prefix) / "bin/python3", []
    if request.param == "oldest":
        found = oldest_python()
        needs.need(None if found else "no Python {}.{}".format(*OLDEST))
        assert found is not None
        python, libraries = found, oldest_libraries()
    made = Environment(tmp_path_factory.mktemp(request.param) / "venv")
    run([python, "-m", "venv", made.folder])
    made.pip_install(build("wheel"), *libraries)
    yield made


def test_its_commands_run(environment: Environment) -> None:
    assert "Commands:" in environment.flowexp("--help")
    assert "octetDeltaCount" in environment.flowexp("elements")
    checked = environment.flowexp("check", "-i", "lo", "--collector", "file:///dev/null")
    assert "takes the BPF programs" in checked
    assert "FAILED" not in checked


def test_a_pcap_is_read_as_it_is_and_a_pcapng_once_scapy_is_there(environment: Environment, tmp_path: Path) -> None:
    pcap, pcapng = tmp_path / "traffic.pcap", tmp_path / "traffic.pcapng"
    make_capture(pcap, packets=PACKETS, flows=FLOWS, macs=("02:00:00:00:00:01", "02:00:00:00:00:02"))
    assert read(environment, pcap) == (PACKETS, FLOWS)
    frame = bytes.fromhex("0200000000020200000000010800" + DATAGRAM) + bytes(8)
    packets = [captures.enhanced(captures.Packet(frame))] * PACKETS
    pcapng.write_bytes(b"".join([captures.section(), captures.interface(), *packets]))
    with pytest.raises(CommandFailed, match="reading a pcapng needs scapy: install python3-scapy, or 'pip install"):
        read(environment, pcapng)
    environment.pip_install("scapy")
    assert read(environment, pcapng) == (PACKETS, 1)


def read(environment: Environment, capture: Path) -> tuple[int, int]:
    """Packets and flows of a capture."""
    said = environment.flowexp("dump", "--read", capture, "--format", "json")
    flows = [json.loads(line) for line in said.splitlines()]
    return sum(flow["packetDeltaCount"] for flow in flows), len(flows)


def test_traffic_is_metered_to_the_packet(environment: Environment, tmp_path: Path) -> None:
    with namespaces("sender", "meter") as (outside, inside):
        sender, metered = veth(outside, inside)
        words = (environment.command, "dump", "-i", "eth0", "--duration", "10m", "--format", "json")
        process = inside.start(*words, directory=tmp_path, name="dump")
        wait_for("dump to meter", lambda: process.is_alive() and tcx_programs(metered, "ingress") == 1)
        ethernet = bytes.fromhex(metered.mac.replace(":", "") + sender.mac.replace(":", "")) + b"\x08\x00"
        packet = bytes.fromhex(DATAGRAM) + bytes(8)
        send_frames(sender, [ethernet + packet] * 70)
        assert process.stop(signal.SIGINT) == 0
    (flow,) = (json.loads(line) for line in process.stdout.splitlines())
    assert (flow["packetDeltaCount"], flow["octetDeltaCount"]) == (70, 70 * 28)


def test_its_libraries_are_those_that_are_meant(environment: Environment) -> None:
    major, minor = environment.version("numpy").split(".")[:2]
    assert (int(major), int(minor)) == (1, 20) or int(major) >= 2
