# SPDX-License-Identifier: GPL-2.0-or-later
"""A flood of spoofed sources, far more flows than the table holds: what was there before stays exact.

How many new flows a second find room is a figure for speed.md, and depends on the machine; nothing here does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
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
FLOOD_FLOWS = 120_000
FLOOD_PORT = 9  # of all of them
KNOWN_PORT, KNOWN_FLOWS = 2000, 30
FLOOD_BETWEEN = 40  # packets of the flood to one of a known flow: its turn comes long before it is among the idlest
FLOODED_PACKETS = FLOOD_FLOWS // FLOOD_BETWEEN // KNOWN_FLOWS  # of each known flow
RSS_GROWTH = 1.2  # batches differ in size


def write_pcap(path: Path, frames: Iterable[bytes]) -> Path:
    with path.open("wb") as out:
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        out.writelines(struct.pack("<IIII", 0, 0, len(each), len(each)) + each for each in frames)
    return path


def known() -> list[bytes]:
    """A packet of each flow that has to stay exact."""
    return [frame(4, UDP, KNOWN_PORT + number) for number in range(KNOWN_FLOWS)]


def flood() -> Iterator[bytes]:
    """One packet of each spoofed flow, which differ in the source address, and the known flows' in between."""
    packet, beside = frame(4, UDP, FLOOD_PORT), known()
    address = 14 + 12
    sources = np.random.default_rng(2).permutation(FLOOD_FLOWS) + (1 << 24)
    for number, source in enumerate(sources.tolist()):
        yield packet[:address] + struct.pack(">I", source) + packet[address + 4 :]
        if number % FLOOD_BETWEEN == 0:
            yield beside[number // FLOOD_BETWEEN % KNOWN_FLOWS]


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

    return wait_for("every flow to have ended", answer, timeout_s=120)


def of_port(rows: Array, first: int, count: int = 1) -> Array:
    return rows[(rows["port"] >= first) & (rows["port"] < first + count)]


def test_flows_that_were_there_stay_exact_and_those_idle_longest_make_room(
    links: tuple[Link, Link], tmp_path: Path
) -> None:
    source, metered = links
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"direction": "ingress", "timeouts": {"idle": 1.5}, "table": {"max_flows": MAX_FLOWS}}
    first, flooded = write_pcap(tmp_path / "first.pcap", known()), write_pcap(tmp_path / "flood.pcap", flood())
    with Exporter(metered.namespace, tmp_path, configuration=configuration, collectors=[file.url]) as exporter:
        resident = []
        for _ in range(2):
            assert replay(source, first) == KNOWN_FLOWS
            assert replay(source, flooded) == FLOOD_FLOWS + KNOWN_FLOWS * FLOODED_PACKETS
            ledger = status_when_empty(exporter)["ledger"]  # all is normal again
            assert ledger["missing"] == {"packets": 0, "octets": 0}
            resident.append(resident_kib(exporter.process))
        refused = ledger["notMetered"]["table_full"]["packets"]
        assert replay(source, first) == KNOWN_FLOWS
        assert exporter.stop() == 0
    ended = exporter.ledger()
    assert ended.closes
    passed = 2 * (FLOOD_FLOWS + KNOWN_FLOWS * (1 + FLOODED_PACKETS)) + KNOWN_FLOWS
    assert ended.seen == metered.counters()["rx_packets"] == passed
    assert ended.not_metered.get("table full", 0) == refused  # none after the flood

    rows = records(file.messages())
    assert np.array_equal(rows["octets"], expected_octets(rows))
    exact = of_port(rows, KNOWN_PORT, KNOWN_FLOWS)
    packets = np.bincount(exact["port"] - KNOWN_PORT, exact["packets"])
    assert (packets == 2 * (1 + FLOODED_PACKETS) + 1).all()
    spoofed_rows = of_port(rows, FLOOD_PORT)
    assert (spoofed_rows["packets"] == 1).all()
    assert len(spoofed_rows) + refused == 2 * FLOOD_FLOWS
    reasons = np.bincount(spoofed_rows["reason"], minlength=8)
    assert reasons[LACK_OF_RESOURCES] > 0
    assert reasons[IDLE] > 0
    assert reasons.sum() == reasons[LACK_OF_RESOURCES] + reasons[IDLE]
    assert resident[1] < resident[0] * RSS_GROWTH
    print(f"{refused} of {2 * FLOOD_FLOWS} refused; resident {resident} KiB")
