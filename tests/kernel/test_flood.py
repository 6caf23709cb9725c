# SPDX-License-Identifier: GPL-2.0-or-later
"""A flood of spoofed sources, far more flows than the table holds: what was there before stays exact.

How many new flows a second find room is a figure for the README, and depends on the machine; nothing here does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lab import needs
from lab.collectors import MessageFile
from lab.flowexp import Exporter
from lab.netns import Link, namespaces, veth
from lab.process import Process
from lab.traffic import replay
from lab.wait import wait_for
from storm import UDP, Array, expected_octets, frame, records

from flowexp.metering.sweep import IDLE, LACK_OF_RESOURCES
from flowexp.status import Status, ask

pytestmark = pytest.mark.kernel

MAX_FLOWS = 16_384
FLOOD_FLOWS = 400_000
FLOOD_PORT = 9  # of all of them
KNOWN_PORT, KNOWN_FLOWS, KNOWN_PASSES, KNOWN_PER_S = 2000, 100, 1000, 25_000
RSS_GROWTH = 1.05


def write_pcap(path: Path, frames: list[bytes]) -> Path:
    with path.open("wb") as out:
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        out.writelines(struct.pack("<IIII", 0, 0, len(each), len(each)) + each for each in frames)
    return path


def flood(path: Path) -> Path:
    """One packet of each flow; they differ in the source address."""
    packet = frame(4, UDP, FLOOD_PORT)
    address = 14 + 12
    sources = np.random.default_rng(2).permutation(FLOOD_FLOWS) + (1 << 24)
    return write_pcap(
        path, [packet[:address] + struct.pack(">I", source) + packet[address + 4 :] for source in sources.tolist()]
    )


def known(path: Path, passes: int) -> Path:
    """So many packets of each flow that has to stay exact, evenly spread."""
    return write_pcap(path, [frame(4, UDP, KNOWN_PORT + number) for number in range(KNOWN_FLOWS)] * passes)


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    needs.need(needs.kernel(), needs.tools("tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        yield veth(sender, meter)


def resident_kib(process: Process) -> int:
    (found,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    return int(found)


def status_when_empty(exporter: Exporter) -> Status:
    def answer() -> Status | None:
        status = ask(str(exporter.pins))
        return status if not any(status["table"]["flows"].values()) else None

    return wait_for("every flow to have ended", answer, timeout_s=30)


def of_port(rows: Array, first: int, count: int = 1) -> Array:
    return rows[(rows["port"] >= first) & (rows["port"] < first + count)]


def test_flows_that_were_there_stay_exact_and_those_idle_longest_make_room(
    links: tuple[Link, Link], tmp_path: Path
) -> None:
    source, metered = links
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"direction": "ingress", "timeouts": {"idle": 1.5}, "table": {"max_flows": MAX_FLOWS}}
    first, steady = known(tmp_path / "first.pcap", 1), known(tmp_path / "steady.pcap", KNOWN_PASSES)
    spoofed = flood(tmp_path / "flood.pcap")
    with Exporter(metered.namespace, tmp_path, configuration=configuration, collectors=[file.url]) as exporter:
        resident = []
        for number in range(2):
            assert replay(source, first) == KNOWN_FLOWS
            command = ["tcpreplay", "-i", source.name, f"--pps={KNOWN_PER_S}", "--preload-pcap", steady]
            beside = source.namespace.start(*command, directory=tmp_path, name=f"steady-{number}")
            replay(source, spoofed)
            assert beside.wait() == 0
            ledger = status_when_empty(exporter)["ledger"]  # all is normal again
            assert ledger["missing"] == {"packets": 0, "octets": 0}
            resident.append(resident_kib(exporter.process))
        refused = ledger["notMetered"]["table_full"]["packets"]
        assert replay(source, first) == KNOWN_FLOWS
        assert exporter.stop() == 0
    ended = exporter.ledger()
    assert ended.closes
    passed = 2 * (FLOOD_FLOWS + KNOWN_FLOWS * (1 + KNOWN_PASSES)) + KNOWN_FLOWS
    assert ended.seen == metered.counters()["rx_packets"] == passed
    assert ended.not_metered.get("table full", 0) == refused  # none after the flood

    rows = records(file.messages())
    assert np.array_equal(rows["octets"], expected_octets(rows))
    exact = of_port(rows, KNOWN_PORT, KNOWN_FLOWS)
    packets = np.bincount(exact["port"] - KNOWN_PORT, exact["packets"])
    assert (packets == 2 * (1 + KNOWN_PASSES) + 1).all()
    spoofed_rows = of_port(rows, FLOOD_PORT)
    assert (spoofed_rows["packets"] == 1).all()
    assert len(spoofed_rows) + refused == 2 * FLOOD_FLOWS
    reasons = np.bincount(spoofed_rows["reason"], minlength=8)
    assert reasons[LACK_OF_RESOURCES] > MAX_FLOWS
    assert reasons[IDLE] > 0
    assert reasons.sum() == reasons[LACK_OF_RESOURCES] + reasons[IDLE]
    assert resident[1] < resident[0] * RSS_GROWTH
    print(f"{refused} of {2 * FLOOD_FLOWS} refused; resident {resident} KiB")
