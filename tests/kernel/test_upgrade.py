# SPDX-License-Identifier: GPL-2.0-or-later
"""A new exporter takes over from one that persists, under traffic as fast as it goes: every packet is metered once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from lab import needs
from lab.collectors import MessageFile
from lab.flowexp import BPFFS, PIN_PREFIX, Exporter
from lab.netns import Link, namespaces, tcx_programs, veth
from lab.wait import wait_for
from storm import expected_octets, flow_sums, records, sending, write_capture

from flowexp.metering.sweep import ACTIVE

pytestmark = pytest.mark.kernel

PORTS = 250  # of four flows each
MAX_FLOWS = 16_384
PACKETS = 200_000  # at least, before each change, and while there is no exporter


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    needs.need(needs.kernel(), needs.tools("tcpreplay", "taskset"))
    with namespaces("sender", "meter") as (sender, meter):
        yield veth(sender, meter)


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Path]:
    folder = BPFFS / f"{PIN_PREFIX}upgrade-{tmp_path.name}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(metered: Link, directory: Path, pins: Path, file: MessageFile, max_flows: int) -> Exporter:
    configuration = {
        "timeouts": {"idle": 600, "active": 0.3, "linger": 0, "sweep_interval": 0.05},
        "table": {"pin_path": str(pins), "persist": True, "max_flows": max_flows},
        "direction": "ingress",
    }
    return Exporter(metered.namespace, directory, configuration=configuration, collectors=[file.url])


def wait_for_packets(link: Link) -> None:
    goal = link.counters()["rx_packets"] + PACKETS
    wait_for(f"{PACKETS} packets to pass", lambda: link.counters()["rx_packets"] >= goal)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([MAX_FLOWS] * 4, id="of the same size"),
        pytest.param([MAX_FLOWS, 2 * MAX_FLOWS, MAX_FLOWS, 3 * MAX_FLOWS], id="of another size each time"),
    ],
)
def test_no_packet_is_missed_or_counted_twice_while_programs_and_tables_are_replaced(
    links: tuple[Link, Link], pins: Path, tmp_path: Path, sizes: Sequence[int]
) -> None:
    source, metered = links
    file = MessageFile(tmp_path / "flows.ipfix")
    capture = write_capture(tmp_path / "flows.pcap", ports=PORTS)
    exporters = [start(metered, tmp_path, pins, file, sizes[0])]
    with sending(source, capture):
        began_s = time.monotonic()
        for max_flows in sizes[1:]:
            wait_for_packets(metered)
            assert exporters[-1].stop() == 0, exporters[-1].log
            wait_for_packets(metered)  # with no exporter
            exporters.append(start(metered, tmp_path, pins, file, max_flows))
            assert tcx_programs(metered, "ingress") == 1
        wait_for_packets(metered)
        packets_per_s = metered.counters()["rx_packets"] / (time.monotonic() - began_s)
    assert exporters[-1].stop() == 0, exporters[-1].log
    assert exporters[-1].ledger().closes, exporters[-1].log
    assert len([path for path in pins.iterdir() if path.is_dir()]) == 1  # what was replaced is gone

    rows = records(file.messages())
    print(f"{metered.counters()['rx_packets']} packets, {packets_per_s:,.0f} a second")
    assert int(rows["packets"].sum()) == metered.counters()["rx_packets"]
    octets, expected = flow_sums(rows)
    assert np.array_equal(octets, expected)
    ended = rows[rows["reason"] != ACTIVE]
    assert np.array_equal(ended["octets"], expected_octets(ended))
