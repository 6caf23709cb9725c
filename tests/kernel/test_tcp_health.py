# SPDX-License-Identifier: GPL-2.0-or-later
"""The field group `tcp` on real connections, over a path with known delay and losses, beside the kernel's own word."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.collectors import Recorder
from lab.flowexp import Exporter
from lab.netns import Namespace, connect, namespaces
from lab.path import Drop, nothing, path

from flowexp.protocol.decode import Decoder

pytestmark = pytest.mark.kernel

ADDRESSES = {4: ("10.9.0.1", "10.9.0.2"), 6: ("fd09::1", "fd09::2")}
PREFIX_LENGTH = {4: 24, 6: 64}
PORT = 5001
TCP_INFO_OCTETS = 232
TCPI_RTT_US, TCPI_TOTAL_RETRANS = 68, 100  # struct tcp_info
DATA_OCTETS = 1000  # of a frame: only data are as long
MS = 1_000
Record = dict[str, Any]


@pytest.fixture(autouse=True)
def live_metering() -> None:
    needs.need(needs.kernel(), needs.tools("ethtool"))


class Hosts(NamedTuple):
    client: Namespace
    middle: Namespace
    server: Namespace


class Transfer(NamedTuple):
    """What the client's stack says of a connection, and the record of each direction."""

    rtt_us: int
    retransmitted: int
    there: Record
    back: Record


def every(number: int) -> Drop:
    """Loses each frame with data whose number, from the first, is a multiple."""
    seen = iter(range(1, 1 << 30))
    return lambda frame: len(frame) >= DATA_OCTETS and next(seen) % number == 0


def _read_all(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        while connection.recv(1 << 20):
            pass


def _transfer(client: Namespace, server: Namespace, version: int, octets: int) -> tuple[int, int]:
    """Sends so much and closes; the smoothed RTT in us after the handshake, and segments sent again, by TCP_INFO."""
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    with server.socket(family, socket.SOCK_STREAM) as listener, client.socket(family, socket.SOCK_STREAM) as sender:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESSES[version][1], PORT))
        listener.listen()
        reader = threading.Thread(target=_read_all, args=[listener])
        reader.start()
        sender.connect((ADDRESSES[version][1], PORT))
        (rtt_us,) = struct.unpack_from("=I", _tcp_info(sender), TCPI_RTT_US)
        sender.sendall(bytes(octets))
        sender.shutdown(socket.SHUT_WR)
        assert sender.recv(1) == b""  # the server's FIN has come
        reader.join()
        (retransmitted,) = struct.unpack_from("=I", _tcp_info(sender), TCPI_TOTAL_RETRANS)
    return rtt_us, retransmitted


def _tcp_info(connection: socket.socket) -> bytes:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_OCTETS)


@pytest.fixture
def ends() -> Iterator[Hosts]:
    with namespaces("client", "middle", "server", ipv6=True) as made:
        yield Hosts(*made)


def observe(ends: Hosts, tmp_path: Path, *, at: int, version: int, delay_s: float, lost: Drop, octets: int) -> Transfer:
    """A transfer over a path, metered at the client (0) or the server (2)."""
    with path(*ends, delay_s=delay_s, lost_to_server=lost) as links, Recorder(ends[at]) as recorder:
        connect(*links, tuple(f"{address}/{PREFIX_LENGTH[version]}" for address in ADDRESSES[version]))
        configuration = {"fields": {"groups": ["tcp"]}, "timeouts": {"linger": 0.1, "sweep_interval": 0.1}}
        with Exporter(ends[at], tmp_path, collectors=[recorder.url], configuration=configuration) as exporter:
            figures = _transfer(ends.client, ends.server, version, octets)
            assert exporter.stop() == 0, exporter.log
            decoder = Decoder()
            flows = [r for message in recorder.messages() for r in decoder.decode(message, "session").records]
    there = [record for record in flows if record["destinationTransportPort"] == PORT]
    back = [record for record in flows if record["sourceTransportPort"] == PORT]
    return Transfer(*figures, _sum(there), _sum(back))


def _sum(records: list[Record]) -> Record:
    """One record of a flow that may have been told in several: counts added up, the rest as it was last."""
    total = dict(records[-1])
    for name in total:
        if name.endswith(("DeltaCount", "_PKTS")):
            total[name] = sum(record[name] for record in records)
    return total


def is_near(measured_us: int, true_us: int) -> bool:
    return abs(measured_us - true_us) <= max(1 * MS, true_us // 10)


@pytest.mark.parametrize("version", [4, 6])
def test_the_handshake_tells_the_path_that_tcp_itself_measures(version: int, ends: Hosts, tmp_path: Path) -> None:
    seen = observe(ends, tmp_path, at=0, version=version, delay_s=0.020, lost=nothing, octets=20_000)
    assert is_near(seen.back["tcpHandshakeTimeMicroseconds"], seen.rtt_us), seen
    assert seen.there["tcpHandshakeTimeMicroseconds"] < 10 * MS
    assert seen.there["tcpConnectionState"] == seen.back["tcpConnectionState"] == 3
    assert seen.there["RETRANSMITTED_IN_PKTS"] == seen.retransmitted == 0


def test_seen_from_the_server_the_client_is_as_far_away(ends: Hosts, tmp_path: Path) -> None:
    seen = observe(ends, tmp_path, at=2, version=4, delay_s=0.020, lost=nothing, octets=20_000)
    assert is_near(seen.there["tcpHandshakeTimeMicroseconds"], seen.rtt_us), seen


@pytest.mark.parametrize("at", [0, 2])
def test_segments_sent_again_are_those_that_tcp_itself_counts(at: int, ends: Hosts, tmp_path: Path) -> None:
    """At the client each is seen twice; at the server the first one never came."""
    seen = observe(ends, tmp_path, at=at, version=4, delay_s=0.010, lost=every(37), octets=1_000_000)
    assert seen.retransmitted >= 10
    assert seen.there["RETRANSMITTED_IN_PKTS"] == pytest.approx(seen.retransmitted, rel=0.1)
    assert seen.back["RETRANSMITTED_IN_PKTS"] == 0
