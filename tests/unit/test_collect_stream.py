# SPDX-License-Identifier: GPL-2.0-or-later
"""The built-in Collector over TCP and TLS: what exporters send, and what those send who mean no good."""

from __future__ import annotations

import re
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from exporting import Sending
from lab.certificates import Authority, Certificate
from lab.streams import free_port
from lab.wait import wait_for
from test_collect import Running, data_set, message, template_set

from flowexp.collect import Summary, collect
from flowexp.errors import FlowexpError, UsageError
from flowexp.protocol.decode import Decoder
from flowexp.transport.connection import Tls
from flowexp.transport.receive import MAX_CONNECTIONS
from flowexp.transport.stream import StreamTransport


@pytest.fixture
def collector() -> Iterator[Running]:
    port = free_port()
    running = Running(f"tcp://127.0.0.1:{port}", port)
    yield running
    if running._thread.is_alive():
        running.stop()


def connect(collector: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", collector.port))


def packets(collector: Running) -> list[object]:
    return [record["packetDeltaCount"] for record in collector.records]


def arrived(collector: Running, count: int) -> None:
    wait_for(f"{count} records", lambda: len(collector.out.getvalue().splitlines()) == count)


def ended(sock: socket.socket) -> bool:
    """Whether the Collector has closed."""
    sock.settimeout(10)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("piece_octets", [1, 7, 1 << 16])
def test_messages_come_out_however_they_were_cut(collector: Running, piece_octets: int) -> None:
    octets = message(template_set()) + b"".join(message(data_set(i, i), sequence=2 * i) for i in range(50))
    with connect(collector) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for first in range(0, len(octets), piece_octets):
            sock.send(octets[first : first + piece_octets])
        arrived(collector, 100)
    collector.stop()
    assert packets(collector) == [i // 2 for i in range(100)]
    assert collector.summary == Summary(messages=51, records=100)


def test_each_connection_is_a_transport_session_of_its_own(collector: Running) -> None:
    with connect(collector) as one, connect(collector) as other:
        one.send(message(template_set(), data_set(1)))
        arrived(collector, 1)
        other.send(message(data_set(2)))
        wait_for("the complaint", lambda: "no Template yet" in collector.errors.getvalue())
        one.send(message(data_set(3), sequence=1))
        arrived(collector, 2)
    collector.stop()
    assert packets(collector) == [1, 3]
    assert collector.summary.lost_records == 0


@pytest.mark.parametrize(
    ("octets", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no IPFIX Message begins with version 18245 and Length 21536"),
        (struct.pack(">HH", 10, 15), "no IPFIX Message begins with version 10 and Length 15"),
        (bytes(100), "no IPFIX Message begins with version 0 and Length 0"),
        (message(template_set())[:-1], "it ended within a Message, after 35 octets"),
        (b"\0", "it ended within a Message, after 1 octets"),
    ],
)
def test_what_is_no_message_ends_its_connection_in_one_line_and_no_other(
    collector: Running, octets: bytes, why: str
) -> None:
    with connect(collector) as good, connect(collector) as bad:
        good.send(message(template_set()))
        bad.send(octets)
        bad.shutdown(socket.SHUT_WR)
        assert ended(bad)
        port = bad.getsockname()[1]
        good.send(message(data_set(9)))
        arrived(collector, 1)
    assert collector.errors.getvalue() == f"127.0.0.1 port {port}: {why}; the connection is closed\n"


def test_a_message_that_begins_and_does_not_go_on_delays_nobody(collector: Running) -> None:
    with connect(collector) as slow, connect(collector) as good:
        slow.send(struct.pack(">HH", 10, 65535))
        good.send(message(template_set(), data_set(1)))
        arrived(collector, 1)


def test_one_connection_too_many_ends_the_one_that_was_silent_for_longest(collector: Running) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(connect(collector))
        first.send(message(template_set(), data_set(0)))
        arrived(collector, 1)
        others = [stack.enter_context(connect(collector)) for _ in range(MAX_CONNECTIONS)]
        for number, sock in enumerate(others):
            sock.send(message(template_set(), data_set(number)))
        arrived(collector, 1 + MAX_CONNECTIONS)
        assert ended(first)
        assert f"silent for longest, and {MAX_CONNECTIONS} are enough; closed" in collector.errors.getvalue()


def test_the_largest_message_there_is_is_taken(collector: Running) -> None:
    numbers = range((65535 - 20) // 16)
    with connect(collector) as sock:
        sock.sendall(message(template_set()) + message(data_set(*numbers)))
        arrived(collector, len(numbers))


def test_our_own_exporter_is_understood_over_tcp(collector: Running) -> None:
    sending = Sending(StreamTransport("127.0.0.1", collector.port))
    with closing(sending.transport):
        numbers = sending.send(5000)
    arrived(collector, 5000)
    assert [record["sourceTransportPort"] for record in collector.records] == numbers
    assert "no Template" not in collector.errors.getvalue()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_our_own_exporter_is_understood_over_tls(
    authority: Authority, certificate: Certificate, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Tls(str(authority.ca_file)).context()
    context.maximum_version = version
    monkeypatch.setattr(Tls, "context", lambda _: context)
    port = free_port()
    running = Running(f"tls://127.0.0.1:{port}", port, cert_file=str(certificate.path), key_file=str(certificate.key))
    sending = Sending(StreamTransport("127.0.0.1", port, tls=Tls()))
    with closing(sending.transport):
        numbers = sending.send(5000)
    arrived(running, 5000)
    running.stop()
    assert [record["sourceTransportPort"] for record in running.records] == numbers
    assert running.errors.getvalue() == f"{running.summary}\n"


def test_who_does_not_speak_tls_is_told_of_and_delays_nobody(authority: Authority, certificate: Certificate) -> None:
    port = free_port()
    running = Running(f"tls://127.0.0.1:{port}", port, cert_file=str(certificate.path), key_file=str(certificate.key))
    with connect(running) as silent, connect(running) as plain:
        plain.send(message(template_set(), data_set(1)))
        with suppress(ConnectionResetError):  # or an alert
            plain.recv(100)
        sending = Sending(StreamTransport("127.0.0.1", port, tls=Tls(str(authority.ca_file))))
        with closing(sending.transport):
            sending.send(10)
        arrived(running, 10)
        assert silent.fileno() > 0
    running.stop()
    assert re.search(r"127\.0\.0\.1 port \d+: TLS: .*; the connection is closed", running.errors.getvalue())


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("tls://127.0.0.1", {}, '"tls://127.0.0.1": a Collector needs a certificate for that'),
        ("tcp://127.0.0.1", {"cert_file": "/c"}, '"tcp://127.0.0.1": only tls:// has a use for --cert and --key'),
    ],
)
def test_a_certificate_that_is_missing_or_has_no_use_is_wrong_usage(
    url: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        collect(url, "json", None, stop=0, **options)  # type: ignore[arg-type]


def test_a_certificate_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^--cert, --key: {tmp_path}/c: No such file or directory$"):
        collect("tls://127.0.0.1", "json", None, stop=0, cert_file=f"{tmp_path}/c")  # type: ignore[arg-type]


def test_a_tcp_port_in_use_is_told_in_one_line() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        url = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        expected = f"cannot listen on {url}: Address already in use; choose another with --listen"
        with pytest.raises(FlowexpError, match=f"^{re.escape(expected)}$"):
            collect(url, "json", None, stop=0)  # type: ignore[arg-type]


def test_a_connection_that_ends_takes_its_templates_along(collector: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[object] = []
    monkeypatch.setattr(Decoder, "forget", lambda _decoder, session: forgotten.append(session))
    for _ in range(3):
        with closing(connect(collector)) as sock:
            sock.sendall(message(template_set()))
    wait_for("their ends to be noticed", lambda: len(forgotten) == 3)
    assert len(set(forgotten)) == 3
