# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages over TCP as tshark reassembles them from packets, and as scapy decodes them from the stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from exporting import Sending
from lab import decoders, needs
from lab.netns import Namespace, connect, namespaces, veth
from lab.process import run
from lab.streams import SourcePorts, StreamCollector, messages_in
from lab.wait import wait_for

from flowexp.transport.connection import Connection
from flowexp.transport.stream import StreamTransport

pytestmark = pytest.mark.interop


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    needs.need(needs.namespace_support(), needs.tools("tshark"))
    with namespaces("streams") as (found,):
        yield found


def test_tshark_reassembles_two_transport_sessions_and_scapy_decodes_them(namespace: Namespace, tmp_path: Path) -> None:
    capture, first = tmp_path / "tcp.pcap", StreamCollector(namespace=namespace)
    command = ["tshark", "-i", "lo", "-w", capture, "-f", f"tcp port {first.port}"]
    tshark = namespace.start(*command, directory=tmp_path, name="tshark")
    try:
        wait_for("tshark to listen", lambda: "Capturing on" in tshark.stderr and capture.exists())
        with namespace.entered():  # its thread then is, too
            sending = Sending(StreamTransport("127.0.0.1", first.port))
        with closing(sending.transport):
            numbers = sending.send(1500)
            wait_for("the first to be acknowledged", lambda: sending.figure("records_queued") == 0)
            first.close()
            wait_for("the end to be noticed", lambda: sending.figure("state") != "up")
            numbers += sending.send(1500)
            second = StreamCollector(port=first.port, namespace=namespace)
            wait_for("the second to be acknowledged", lambda: sending.figure("records_sent") == 3000)
        second.close()
        wait_for("the capture to hold both sessions", lambda: len(ports_in(capture, first.port)) == 3000)
    finally:
        tshark.stop()
    assert ports_in(capture, first.port) == numbers
    for session in (*first.sessions, *second.sessions):
        found = decoders.records(messages_in(session))
        assert len(found) == 1500
        expected, numbers = numbers[:1500], numbers[1500:]
        assert [decoders.number(record, decoders.SOURCE_PORT) for record in found] == expected


def test_a_host_that_is_gone_without_a_word_is_noticed_and_gets_all_when_it_is_back(namespace: Namespace) -> None:
    with namespaces("collector") as (other,):
        near, far = veth(namespace, other)
        connect(near, far, ("192.0.2.1/24", "192.0.2.2/24"))
        collector = StreamCollector(address="192.0.2.2", namespace=other)
        with namespace.entered():
            impatient = partial(Connection, user_timeout_s=0.5)
            sending = Sending(StreamTransport("192.0.2.2", collector.port, connect=impatient))
        with closing(sending.transport):
            numbers = sending.send(100)
            wait_for("the first to be acknowledged", lambda: sending.figure("records_queued") == 0)
            far.set("down")
            numbers += sending.send(100)
            wait_for("the silence to be noticed", lambda: sending.figure("state") == "unreachable", timeout_s=30)
            assert sending.figure("records_queued") == 100
            far.set("up")
            far.add_neighbour("192.0.2.1", near.mac)
            wait_for("all to be read", lambda: list(dict.fromkeys(got(collector))) == numbers, timeout_s=30)
            assert len(got(collector)) - len(numbers) <= sending.figure("records_resent") == 200
        collector.close(abort=True)  # it has never heard of the end of the first connection


def got(collector: StreamCollector) -> list[int]:
    return [number for session in list(collector.sessions) for number in SourcePorts(bytes(session))]


def ports_in(capture: Path, port: int) -> list[int]:
    """Source ports of all flow records in a capture that may still grow, in their order."""
    words = ["-r", capture, "-d", f"tcp.port=={port},cflow", "-T", "fields", "-e", "cflow.srcport"]
    shown = run(["sh", "-c", 'tshark "$@" || true', "sh", *words])
    return [int(each) for line in shown.splitlines() for each in line.split(",") if each]
