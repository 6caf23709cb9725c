# SPDX-License-Identifier: GPL-2.0-or-later
"""--filter as users run it: `dump` of a running exporter's table, and `collect` of what that exports."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import pytest
from lab import needs
from lab.collectors import udp_sockets
from lab.flowexp import COMMAND, Exporter
from lab.netns import Namespace, namespaces, veth
from lab.process import Process
from lab.traffic import Capture, make_capture, replay
from lab.wait import wait_for

PACKETS, FLOWS = 20_000, 2_000
EXPRESSION = "tcp and net 198.18.0.0/15 and not vlan"


class Running(NamedTuple):
    """An exporter that has metered all of a capture and exported nothing yet, and a filtering Collector."""

    exporter: Exporter
    namespace: Namespace
    collector: Process
    capture: Capture


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    needs.need(needs.kernel(), needs.tools("tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        left, _ = veth(sender, meter)
        macs = (left.mac, "02:00:00:00:00:99")
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=macs)
        port = meter.free_udp_port()
        url, timeouts = f"udp://127.0.0.1:{port}", {"timeouts": {"idle": 600, "linger": 600}}
        collect = ["collect", "--listen", url, "--format", "json", "--filter", EXPRESSION]
        collector = meter.start(COMMAND, *collect, directory=tmp_path, name="collect")
        try:
            wait_for("the Collector to listen", lambda: collector.is_alive() and port in udp_sockets(meter))
            with Exporter(meter, tmp_path, collectors=[url], configuration=timeouts) as exporter:
                assert replay(left, capture) == PACKETS
                yield Running(exporter, meter, collector, capture)
                if exporter.process.status is None:
                    exporter.stop()
        finally:
            collector.kill()


def check(lines: str, capture: Capture) -> None:
    """The records are those of the flows that EXPRESSION takes, and no others."""
    shown: List[Dict[str, Any]] = [json.loads(line) for line in lines.splitlines()]
    wanted = {
        key: flow
        for key, flow in capture.flows.items()
        if key.protocol == 6 and key.src_addr.startswith("198.18.") and not key.vlan_id
    }
    assert len(shown) == len(wanted) > 0
    assert sum(record["packetDeltaCount"] for record in shown) == sum(flow.packets for flow in wanted.values())
    assert {record["sourceIPv4Address"] for record in shown} == {key.src_addr for key in wanted}
    assert all("vlanId" not in record for record in shown)


@pytest.mark.kernel
def test_dump_of_the_running_table_shows_the_flows_that_the_filter_takes(running: Running) -> None:
    config = running.exporter.configuration
    lines = running.namespace.run(COMMAND, "dump", "-c", config, "--format", "json", "--filter", EXPRESSION)
    check(lines, running.capture)


@pytest.mark.kernel
def test_collect_prints_the_records_that_the_filter_takes_and_counts_them_all(running: Running) -> None:
    assert running.exporter.stop() == 0, running.exporter.log
    assert running.collector.stop() == 0
    check(running.collector.stdout, running.capture)
    assert f"with {FLOWS} Data Records; by Sequence Number 0 records" in running.collector.stderr


@pytest.mark.parametrize("command", ["dump", "collect"])
def test_a_filter_that_is_wrong_ends_the_command_with_status_2_and_a_caret(command: str) -> None:
    done = subprocess.run([COMMAND, command, "--filter", "port 65536"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "flowexp: filter: 65536 is above 65535, the most that sourceTransportPort can be\n  port 65536\n       ^\n"
    )


@pytest.mark.parametrize(("command", "status"), [("dump", 2), ("collect", 1)])
def test_collect_takes_elements_that_are_not_measured_here_and_dump_does_not(command: str, status: int) -> None:
    """collect then fails for another reason: an address that this machine does not have."""
    listen = ["--listen", "udp://192.0.2.1"] if command == "collect" else []
    words = [COMMAND, command, *listen, "--filter", "bgpNextAdjacentAsNumber = 64512"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert ("not measured here" in done.stderr) == (command == "dump")
