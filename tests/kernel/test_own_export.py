# SPDX-License-Identifier: GPL-2.0-or-later
"""Own packets that no mark tells from others, as policy routing would act on it: known by their addresses and ports.

Whoever else sends to the same Collector is metered.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import toml
from lab import needs
from lab.collectors import MessageFile, Recorder
from lab.flowexp import Exporter
from lab.netns import Link, connect, namespaces, veth
from lab.streams import StreamCollector
from lab.wait import wait_for
from storm import records

pytestmark = pytest.mark.kernel

ADDRESSES = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fd01::1", "fd01::2")}
PREFIX = {4: 24, 6: 64}
ICMPV6 = 58
QUICK = {"idle": 0.1, "active": 0.2, "sweep_interval": 0.05}


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    """The Collector's, and the exporter's; both with IPv4 and IPv6."""
    needs.need(needs.kernel())
    with namespaces("collector", "meter", ipv6=True) as (far, near):
        theirs, ours = veth(far, near)
        connect(theirs, ours, *((f"{a}/{PREFIX[v]}", f"{b}/{PREFIX[v]}") for v, (a, b) in ADDRESSES.items()))
        yield theirs, ours


def send_from(link: Link, to: tuple[str, int]) -> int:
    """One datagram from a port that the kernel chooses; which one."""
    with link.namespace.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET) as sender:
        sender.sendto(b"", to)
        return int(sender.getsockname()[1])


def ports(file: MessageFile) -> list[int]:
    """The source port of every flow that was exported; without ICMPv6's, which the kernel sends when it likes."""
    rows = records(file.messages())
    return [int(port) for port in rows["port"][rows["protocol"] != ICMPV6]]


@pytest.mark.parametrize("version", [4, 6])
def test_only_the_exporters_own_datagrams_are_left_out_also_after_a_reload(
    links: tuple[Link, Link], tmp_path: Path, version: int
) -> None:
    theirs, ours = links
    file, configuration = MessageFile(tmp_path / "flows.ipfix"), {"timeouts": QUICK, "export": {"mark": 0}}
    with (
        Recorder(theirs.namespace, address=ADDRESSES[version][0]) as first,
        Recorder(theirs.namespace, address=ADDRESSES[version][0]) as second,
    ):
        with Exporter(
            ours.namespace, tmp_path, "--direction", "egress",
            configuration={**configuration, "collector": [{"url": file.url}, {"url": first.url}]},
        ) as exporter:  # fmt: skip
            strangers = [send_from(ours, (first.address, first.port))]
            before = len(first.messages())
            wait_for("its record", lambda: len(first.messages()) > before)
            written = toml.loads(exporter.configuration.read_text())
            written["collector"][1]["url"] = second.url
            exporter.configuration.write_text(toml.dumps(written))
            os.kill(exporter.process.pid, signal.SIGHUP)
            wait_for("Templates for the other", second.messages)
            strangers.append(send_from(ours, (second.address, second.port)))
            before = len(second.messages())
            wait_for("its record, too", lambda: len(second.messages()) > before)
            assert exporter.stop() == 0
        ledger = exporter.ledger()
    assert sorted(ports(file)) == sorted(strangers)
    assert ledger.closes
    assert set(ledger.not_metered) == {"own export"}


def test_own_datagrams_are_left_out_by_the_programs_of_another_sampling_rate(
    links: tuple[Link, Link], tmp_path: Path
) -> None:
    theirs, ours = links
    file = MessageFile(tmp_path / "flows.ipfix")
    with Recorder(theirs.namespace, address=ADDRESSES[4][0]) as collector:
        configuration = {
            "timeouts": QUICK, "export": {"mark": 0}, "direction": "egress",
            "collector": [{"url": file.url}, {"url": collector.url}],
        }  # fmt: skip
        sampled = {**configuration, "sampling": {"interval": 1_000_000}}
        with Exporter(ours.namespace, tmp_path, configuration=sampled) as exporter:
            exporter.reload(configuration)
            before = len(collector.messages())
            stranger = send_from(ours, (collector.address, collector.port))
            wait_for("its record", lambda: len(collector.messages()) > before)
            assert exporter.stop() == 0
        ledger = exporter.ledger()
    assert ports(file) == [stranger]
    assert ledger.closes
    assert ledger.not_metered["own export"] > 0
    assert set(ledger.not_metered) <= {"own export", "not selected"}


def test_own_connections_are_left_out_each_from_its_first_packet(links: tuple[Link, Link], tmp_path: Path) -> None:
    theirs, ours = links
    file, address = MessageFile(tmp_path / "flows.ipfix"), ADDRESSES[4][0]
    collector = StreamCollector(address=address, namespace=theirs.namespace)
    url = f"tcp://{address}:{collector.port}"
    with Exporter(
        ours.namespace, tmp_path, "--direction", "egress", collectors=[file.url, url],
        configuration={"timeouts": QUICK, "export": {"mark": 0}},
    ) as exporter:  # fmt: skip
        wait_for("the first connection", lambda: collector.sessions)
        collector.close()
        send_from(ours, (address, 9))
        with closing(StreamCollector(address=address, port=collector.port, namespace=theirs.namespace)) as again:
            wait_for("the second", lambda: again.sessions and again.sessions[0], timeout_s=30)
            stranger = send_from(ours, (address, 9))
            before = len(again.sessions[0])
            wait_for("its record", lambda: len(again.sessions[0]) > before)
            assert exporter.stop() == 0
    ledger = exporter.ledger()
    assert ledger.closes
    assert ledger.not_metered["own export"] > 0
    assert ports(file)[-1] == stranger
    assert len(ports(file)) == 2
