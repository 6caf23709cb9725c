# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP transport against Collectors that close, stop reading, are killed and come back."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Callable

import pytest
from columns import flows
from exporting import EXPORT_TIME_S, SECOND_NS, Sending
from lab.streams import SourcePorts, StreamCollector, free_port, messages_in
from lab.wait import wait_for

from flowexp.protocol.decode import Decoder
from flowexp.protocol.ipfix import MessageEncoder
from flowexp.protocol.options import Facts, InterfaceFacts
from flowexp.protocol.session import Decoded
from flowexp.protocol.template import TemplateIds, default_templates
from flowexp.session import CollectorSession
from flowexp.transport.connection import Connection
from flowexp.transport.stream import StreamTransport


def stream(port: int, **options: Any) -> StreamTransport:
    return StreamTransport("127.0.0.1", port, **options)


def sending(port: int, **options: Any) -> Any:
    found = Sending(stream(port, **options))
    return found, closing(found.transport)


def got(peer: StreamCollector) -> list[int]:
    """What came in all Transport Sessions, one after the other."""
    return [number for octets in list(peer.sessions) for number in SourcePorts(bytes(octets))]


@pytest.fixture
def peer() -> Iterator[StreamCollector]:
    with closing(StreamCollector()) as found:
        yield found


def test_messages_arrive_in_order_each_once_after_the_templates(peer: StreamCollector) -> None:
    exporter, ending = sending(peer.port)
    with ending:
        numbers = exporter.send(1000) + exporter.send(1) + exporter.send(2500)
        wait_for("all to be acknowledged", lambda: exporter.figure("records_sent") == 3501)
        assert exporter.figure("state") == "up"
        assert exporter.figure("records_queued") == 0
    wait_for("all to be read", lambda: len(got(peer)) == 3501)
    assert got(peer) == numbers
    assert len(peer.sessions) == 1


def test_what_was_sent_before_the_collector_is_there_waits_and_arrives(peer: StreamCollector) -> None:
    port = free_port()
    exporter, ending = sending(port)
    with ending:
        numbers = exporter.send(3000)
        wait_for("the refusal", lambda: exporter.figure("state") == "refused")
        assert exporter.figure("records_queued") == 3000
        with closing(StreamCollector(port=port)) as late:
            wait_for("all to be read", lambda: got(late) == numbers)
            wait_for("all to be acknowledged", lambda: exporter.figure("records_queued") == 0)


def test_an_address_of_a_family_that_this_kernel_lacks_is_passed_over(
    peer: StreamCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ::1 of localhost where IPv6 is compiled out, or off since boot."""
    lacking = (255, socket.SOCK_STREAM, 0, "", ("::1", peer.port))
    there = socket.getaddrinfo("127.0.0.1", peer.port, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [lacking, *there])
    exporter, ending = sending(peer.port)
    with ending:
        exporter.send(1)
        wait_for("it to be acknowledged", lambda: exporter.figure("records_sent") == 1)


def test_closing_sends_what_is_left() -> None:
    with closing(StreamCollector()) as peer:
        exporter, ending = sending(peer.port)
        with ending:
            numbers = exporter.send(20_000)
        wait_for("all to be read", lambda: len(got(peer)) == 20_000)
        assert got(peer) == numbers
        assert exporter.figure("records_sent") == 20_000
        assert exporter.figure("records_failed") == 0


def test_closing_without_a_collector_counts_what_waits_in_memory_as_not_sent() -> None:
    exporter, ending = sending(free_port())
    with ending:
        exporter.send(100)
    assert (exporter.figure("records_failed"), exporter.figure("records_queued")) == (100, 0)


def test_a_reconnect_is_a_new_transport_session_and_an_end_in_order_repeats_nothing() -> None:
    peer = StreamCollector()
    exporter, ending = sending(peer.port)
    with ending:
        first = exporter.send(500)
        wait_for("the first to be acknowledged", lambda: exporter.figure("records_queued") == 0)
        wait_for("the first to be read", lambda: got(peer) == first)
        peer.close()
        wait_for("the end to be noticed", lambda: exporter.figure("state") != "up")
        second = exporter.send(700)
        with closing(StreamCollector(port=peer.port)) as again:
            wait_for("the second to be read", lambda: got(again) == second)
            assert exporter.figure("records_resent") == 0
            assert len(SourcePorts(bytes(again.sessions[0])).templates) > 2


def test_a_collector_that_is_killed_before_it_read_gets_it_again_and_the_log_says_how_much(
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer = StreamCollector(reading=False)
    exporter, ending = sending(peer.port)
    with ending:
        numbers = exporter.send(100)
        wait_for("the host to acknowledge", lambda: exporter.figure("records_queued") == 0)
        peer.close(abort=True)
        with closing(StreamCollector(port=peer.port)) as again:
            wait_for("all to come again", lambda: got(again) == numbers)
        assert exporter.figure("records_resent") == 100
        assert exporter.figure("records_sent") == 100
    assert f"tcp://127.0.0.1:{peer.port}: 100 records had been sent when it ended, and may arrive twice" in caplog.text


def test_what_was_not_acknowledged_goes_again_in_order() -> None:
    peer = StreamCollector(reading=False)
    exporter, ending = sending(peer.port)
    with ending:
        numbers = [n for _ in range(20) for n in exporter.send(3000)]
        wait_for("some to be on their way", lambda: exporter.figure("records_sent") > 0)
        assert exporter.figure("records_queued") > 0
        peer.close(abort=True)
        with closing(StreamCollector(port=peer.port)) as again:
            wait_for("all to come", lambda: len(got(again)) == len(numbers), timeout_s=30)
            assert got(again) == [n % 65536 for n in numbers]


def test_a_spool_is_free_for_the_next_transport_while_the_one_before_still_tries_to_connect(tmp_path: Path) -> None:
    with ExitStack() as stack, socket.socket() as full:  # who listens with no room for another connection
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        port = full.getsockname()[1]
        exporter, ending = sending(port, spool_folder=str(tmp_path))
        with ending:
            numbers = exporter.send(1000)
        assert exporter.transport._thread.is_alive()
        assert exporter.figure("records_queued") == 1000
        again, ending = sending(port, spool_folder=str(tmp_path))
        with ending:
            full.close()
            with closing(StreamCollector(port=port)) as peer:
                wait_for("all to be read", lambda: got(peer) == numbers, timeout_s=60)
                wait_for("all to be acknowledged", lambda: again.figure("records_sent") == 1000)


def test_a_collector_that_does_not_read_costs_bounded_memory_and_delays_nobody() -> None:
    with closing(StreamCollector(reading=False)) as peer:
        exporter, ending = sending(peer.port, spool_octets=1 << 20)
        with ending:
            for _ in range(40):
                exporter.send(3000)
            assert exporter.figure("octets_queued") <= 1 << 20
            dropped, queued = exporter.figure("records_dropped"), exporter.figure("records_queued")
            assert dropped > 0
            assert dropped + queued + exporter.figure("records_sent") == 120_000


def test_options_that_change_go_again_and_templates_that_are_new_go_once(peer: StreamCollector) -> None:
    exporter, ending = sending(peer.port)
    with ending:
        for minute in range(3):
            exporter.session.announce_if_due(minute * 61 * SECOND_NS, EXPORT_TIME_S)
            exporter.send(100)
            wait_for("all to be acknowledged", lambda: exporter.figure("records_queued") == 0)
        change_a_template(exporter)
        exporter.send(100)
        wait_for("all to be acknowledged", lambda: exporter.figure("records_queued") == 0)
    wait_for("all to be read", lambda: sum(len(each.records) for each in decoded(peer)) == 400)
    messages = decoded(peer)
    assert [problem for each in messages for problem in each.problems] == []
    assert_templates_came_once(peer)
    assert len(peer.sessions) == 1
    assert sum(len(each.options_records) for each in messages) >= 4


def test_an_options_template_that_comes_later_needs_no_new_transport_session(peer: StreamCollector) -> None:
    exporter, ending = sending(peer.port)
    with ending:
        exporter.send(100)
        for minute in range(1, 4):
            if minute == 2:  # among the Data Records, and from then on at the beginning of all
                exporter.facts = Facts(exporter_address=bytes(4))
                exporter.session.facts_changed(EXPORT_TIME_S)
            exporter.session.announce_if_due(minute * 61 * SECOND_NS, EXPORT_TIME_S)
            exporter.send(100)
            wait_for("all to be acknowledged", lambda: exporter.figure("records_queued") == 0)
    wait_for("all to be read", lambda: sum(len(each.records) for each in decoded(peer)) == 400)
    assert [problem for each in decoded(peer) for problem in each.problems] == []
    assert_templates_came_once(peer)
    assert len(peer.sessions) == 1
    told = {name for each in decoded(peer) for record in each.options_records for name in record}
    assert "exporterIPv4Address" in told


def test_templates_are_due_again_when_the_own_address_is_known() -> None:
    port = free_port()
    exporter, ending = sending(port)
    with ending:
        exporter.send(100)
        assert not exporter.transport.take_templates_due()
        for _ in range(2):
            with closing(StreamCollector(port=port)) as peer:
                wait_for("a connection", lambda: len(peer.connections) > 0)
            wait_for("the end to be noticed", lambda: exporter.figure("state") != "up")
        assert exporter.transport.take_templates_due()
        assert not exporter.transport.take_templates_due()


@pytest.mark.parametrize("on_disk", [False, True])
def test_another_template_with_the_same_id_needs_another_transport_session_also_when_closing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_disk: bool
) -> None:
    monkeypatch.setattr(TemplateIds, "id_of", numbered)
    port = free_port()
    exporter, ending = sending(port, spool_folder=str(tmp_path) if on_disk else None)
    with ending:
        numbers = exporter.send(100)
        change_a_template(exporter)
        numbers += exporter.send(100)
        wait_for("the refusal", lambda: exporter.figure("state") == "refused")
        peer = StreamCollector(port=port)
        wait_for("a connection", lambda: len(peer.connections) > 0)
    peer.close()
    assert got(peer) == numbers
    assert len(peer.sessions) == 2
    assert (exporter.figure("records_sent"), exporter.figure("records_queued")) == (200, 0)


def numbered(ids: Any, layout: bytes) -> int:
    """An ID that another encoder's other Template has, too: of hashes two may be equal."""
    number: int = ids._layouts.setdefault(layout, 256 + len(ids._layouts))
    return number


def change_a_template(exporter: Sending) -> None:
    """From now on another encoder, which withdraws nothing."""
    other = MessageEncoder(
        observation_domain_id=1,
        max_message_octets=exporter.transport.max_message_octets(),
        templates=default_templates(tcp_control_bits_octets=2),
    )
    exporter.session.change(other, refresh_ns=60 * SECOND_NS, export_time_s=EXPORT_TIME_S)


def assert_templates_came_once(peer: StreamCollector) -> None:
    for session in peer.sessions:
        templates = [template for each in decode(bytes(session)) for template, _ in each.templates]
        assert len(templates) == len(set(templates))


def decoded(peer: StreamCollector) -> list[Decoded]:
    return [each for session in list(peer.sessions) for each in decode(bytes(session))]


def decode(octets: bytes) -> list[Decoded]:
    """One Transport Session."""
    decoder = Decoder()
    return [decoder.decode(message, "session") for message in messages_in(octets)]


class Reluctant(Connection):
    """The kernel takes a few octets of it at once."""

    def flush(self) -> None:
        taken, left = self._pending[:5000], self._pending[5000:]
        self._pending = taken
        super().flush()
        self._pending = memoryview(bytes(self._pending) + bytes(left))


def session_of(transport: StreamTransport, domain: int, facts: Facts) -> CollectorSession:
    encoder = MessageEncoder(
        observation_domain_id=domain, max_message_octets=transport.max_message_octets(), templates=default_templates()
    )
    return CollectorSession(
        transport, encoder, refresh_ns=60 * SECOND_NS, facts=lambda: facts, withdraws=True, templates_due=lambda: False
    )


def all_read(peer: StreamCollector, records: int) -> Callable[[], bool]:
    return lambda: sum(len(each.records) for each in decoded(peer)) == records


def domains_told_of(octets: bytes) -> list[int]:
    """Observation Domains in the order in which their Templates came first."""
    assert [problem for each in decode(octets) for problem in each.problems] == []
    return list(dict.fromkeys(each.observation_domain_id for each in decode(octets) if each.templates))


def test_templates_of_many_domains_arrive_whole_though_the_kernel_takes_little_at_once() -> None:
    facts = Facts(interfaces=tuple(InterfaceFacts(number, f"eth{number}", "x" * 100, "", 0) for number in range(500)))
    port = free_port()
    transport = stream(port, connect=Reluctant)
    with closing(transport):
        transport.open()
        sessions = [session_of(transport, domain, facts) for domain in range(1, 6)]
        for session in sessions:
            session.announce_if_due(0, EXPORT_TIME_S)
        for session in sessions:
            session.send(flows(10), 0, EXPORT_TIME_S)
        peer = StreamCollector(port=port)
        wait_for("all to be read", all_read(peer, 50))
    peer.close()
    (octets,) = peer.sessions
    assert domains_told_of(octets) == [1, 2, 3, 4, 5]


def test_a_domain_that_has_retired_is_not_told_of_again() -> None:
    port = free_port()
    transport = stream(port)
    with closing(transport):
        transport.open()
        goes, stays = (session_of(transport, domain, Facts()) for domain in (1, 2))
        for sending, told_of in ([stays, goes], [2, 1]), ([stays], [2]):
            with closing(StreamCollector(port=port)) as peer:
                for session in sending:
                    session.send(flows(10), 0, EXPORT_TIME_S)
                if goes in sending:
                    goes.retire(EXPORT_TIME_S)
                wait_for("all to be read", all_read(peer, 10 * len(sending)))
            wait_for("the end to be noticed", lambda: transport.status()["state"] != "up")
            (octets,) = peer.sessions
            assert domains_told_of(octets) == told_of
