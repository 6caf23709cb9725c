# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP transport on real sockets of the loopback; clock and sleep are the test's, faults are injected."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.wait import wait_for

from flowexp.transport.base import MAX_KINDS, QuietLog, Sent
from flowexp.transport.pacer import Pacer
from flowexp.transport.resolver import LOOK_UP_PERIOD_NS
from flowexp.transport.udp import (
    CALM_NS,
    IP_MTU,
    REOPEN_PERIOD_NS,
    UDP_SEGMENT,
    UdpTransport,
    stable_source_port,
)

SO_NO_CHECK = 11
SECOND_NS = 10**9
NOT_ROOT = None if os.geteuid() == 0 else "not root"
RECORDS_PER_MESSAGE = 3


class Messages(NamedTuple):
    """A batch whose Messages begin with their number."""

    octets: memoryview
    message_octets: int
    count: int
    records: int


def messages(count: int, *, octets: int = 100, first: int = 0) -> Messages:
    content = b"".join(struct.pack(">I", first + i).ljust(octets, b"x") for i in range(count))
    return Messages(memoryview(content), octets, count, count * RECORDS_PER_MESSAGE)


class Clock:
    """A clock that only `sleep` and the test move."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.slept_s: list[float] = []

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_ns += round(seconds * 1e9)


class Faulty:
    """A socket whose next system calls fail as told; it notes what went out."""

    def __init__(self, real: socket.socket, faults: list[int], *, only_segmented: bool = False) -> None:
        self._real = real
        self.faults = faults
        self._only_segmented = only_segmented
        self.calls: list[tuple[int, int]] = []
        """Octets and segment size (0: none) of each successful call."""
        self.mtu: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _fail(self) -> None:
        if self.faults:
            number = self.faults.pop(0)
            raise OSError(number, os.strerror(number))

    def sendmsg(self, buffers: list[memoryview], ancillary: list[tuple[int, int, bytes]]) -> int:
        self._fail()
        ((_, kind, size),) = ancillary
        assert kind == UDP_SEGMENT
        self.calls.append((len(buffers[0]), struct.unpack("=H", size)[0]))
        return self._real.sendmsg(buffers, ancillary)

    def send(self, piece: memoryview) -> int:
        if not self._only_segmented:
            self._fail()
        self.calls.append((len(piece), 0))
        return self._real.send(piece)

    def getsockopt(self, level: int, option: int) -> int:
        if option == IP_MTU and level == socket.IPPROTO_IP and self.mtu is not None:
            return self.mtu
        return self._real.getsockopt(level, option)


@contextmanager
def receiver(address: str = "127.0.0.1", *, port: int = 0, buffer_octets: int = 1 << 22) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        if buffer_octets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_octets)
        sock.bind((address, port))
        sock.setblocking(False)
        yield sock


@contextmanager
def transport_to(sock: socket.socket, **options: Any) -> Iterator[UdpTransport]:
    host, port = sock.getsockname()[:2]
    with closing(UdpTransport(host, port, **{"messages_per_s": 0, **options})) as transport:
        transport.open()
        yield transport


def inject(transport: UdpTransport, *faults: int, only_segmented: bool = False) -> Faulty:
    assert transport._socket is not None
    faulty = Faulty(transport._socket, list(faults), only_segmented=only_segmented)
    transport._socket = faulty  # type: ignore[assignment]
    return faulty


def numbers(sock: socket.socket) -> list[int]:
    """The numbers of all Messages that have arrived (on the loopback: all that were sent)."""
    found = []
    while True:
        try:
            found.append(struct.unpack_from(">I", sock.recv(65_535))[0])
        except BlockingIOError:
            return found


def free_port() -> int:
    with receiver() as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000])
def test_messages_arrive_in_order_each_once_and_are_counted(address: str, count: int) -> None:
    with receiver(address) as sock, transport_to(sock) as transport:
        assert transport.send(messages(count)) == Sent(count)
        assert numbers(sock) == list(range(count))
        assert transport.counters.messages_sent == count
        assert transport.counters.octets_sent == 100 * count
        assert transport.counters.records_sent == 3 * count
        assert transport.counters.messages_failed == transport.counters.gso_fallbacks == 0


def test_each_datagram_is_one_message_octet_by_octet() -> None:
    batch = messages(5, octets=1472)
    with receiver() as sock, transport_to(sock) as transport:
        transport.send(batch)
        datagrams = [sock.recv(65_535) for _ in range(5)]
    assert datagrams == [bytes(batch.octets[i * 1472 : (i + 1) * 1472]) for i in range(5)]


@pytest.mark.parametrize(
    ("octets", "count", "calls"),
    [
        (100, 200, [6400, 6400, 6400, 800]),  # 64 segments
        (1472, 100, [44 * 1472, 44 * 1472, 12 * 1472]),  # 65,507 octets hold 44
        (65_000, 2, [65_000, 65_000]),
    ],
)
def test_a_system_call_carries_at_most_64_messages_and_one_ip_packet(octets: int, count: int, calls: list[int]) -> None:
    with receiver() as sock, transport_to(sock, mtu_octets=65_535) as transport:
        faulty = inject(transport)
        transport.send(messages(count, octets=octets))
        assert [sent for sent, _ in faulty.calls] == calls
        assert len(numbers(sock)) == count


@pytest.mark.parametrize(
    ("address", "mtu_octets", "expected"),
    [("127.0.0.1", 1500, 1472), ("::1", 1500, 1452), ("127.0.0.1", 9000, 8972), ("127.0.0.1", 65_535, 65_507)],
)
def test_messages_are_as_large_as_the_configured_mtu_allows(address: str, mtu_octets: int, expected: int) -> None:
    with receiver(address) as sock, transport_to(sock, mtu_octets=mtu_octets) as transport:
        assert transport.max_message_octets() == expected
        transport.send(messages(1, octets=expected))
        assert len(sock.recv(65_535)) == expected


def test_refused_messages_are_counted_and_what_comes_after_the_collector_arrives_once() -> None:
    with closing(UdpTransport("127.0.0.1", free_port(), messages_per_s=0, clock_ns=Clock())) as transport:
        transport.open()
        assert transport.take_templates_due()
        assert not transport.take_templates_due()
        for i in range(3):
            assert transport.send(messages(1, first=i)) == Sent(1)
        assert transport.counters.refused == 2  # the third is still pending
        assert transport.status()["state"] == "refused"
        assert transport.take_templates_due()
        assert transport.counters.refused == 3
        with receiver(port=transport._resolver._port) as sock:
            transport.send(messages(10, first=3))
            assert numbers(sock) == list(range(3, 13))
        assert transport.counters.messages_sent == 13
        assert transport.counters.messages_failed == 0


def test_a_batch_that_meets_an_earlier_refusal_goes_out_once_more_and_only_once() -> None:
    with receiver() as sock, transport_to(sock) as transport:
        inject(transport, errno.ECONNREFUSED)
        assert transport.send(messages(70)) == Sent(70)
        assert numbers(sock) == list(range(70))


def test_templates_are_due_until_no_refusal_came_for_three_seconds() -> None:
    clock = Clock()
    with closing(UdpTransport("127.0.0.1", free_port(), messages_per_s=0, clock_ns=clock)) as transport:
        transport.open()
        transport.take_templates_due()
        transport.send(messages(1))
        assert transport.take_templates_due()
        clock.now_ns += CALM_NS - 1
        assert transport.take_templates_due()
        clock.now_ns += 1
        assert not transport.take_templates_due()
        assert transport.status()["state"] == "up"


@pytest.mark.parametrize("fault", [errno.EIO, errno.EINVAL])
def test_refused_segmentation_sends_singly_from_then_on_and_loses_nothing(fault: int) -> None:
    with receiver() as sock, transport_to(sock) as transport:
        faulty = inject(transport, fault, fault, only_segmented=True)
        assert transport.send(messages(100)) == Sent(100)
        assert transport.send(messages(10, first=100)) == Sent(10)
        assert numbers(sock) == list(range(110))
        assert set(faulty.calls) == {(100, 0)}
        assert transport.counters.gso_fallbacks == 1


def test_segmentation_that_the_kernel_itself_refuses_falls_back_too() -> None:
    with receiver() as sock, transport_to(sock) as transport:
        assert transport._socket is not None
        transport._socket.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)  # EINVAL from udp_send_skb
        assert transport.send(messages(100)) == Sent(100)
        assert numbers(sock) == list(range(100))
        assert transport.counters.gso_fallbacks == 1


def test_segmentation_refused_in_the_middle_doubles_nothing() -> None:
    with receiver() as sock, transport_to(sock) as transport:
        transport.send(messages(64))
        inject(transport, errno.EIO, only_segmented=True)
        transport.send(messages(64, first=64))
        assert numbers(sock) == list(range(128))


@pytest.mark.parametrize("fault", [errno.EAGAIN, errno.ENOBUFS])
def test_a_full_queue_is_waited_for_with_doubling_pauses(fault: int) -> None:
    clock = Clock()
    with receiver() as sock, transport_to(sock, clock_ns=clock, sleep=clock.sleep) as transport:
        inject(transport, fault, fault, fault)
        assert transport.send(messages(64)) == Sent(64)
        assert clock.slept_s == [0.001, 0.002, 0.004]
        assert numbers(sock) == list(range(64))


def test_a_queue_that_stays_full_fails_the_batch_after_a_second() -> None:
    clock = Clock()
    with receiver() as sock, transport_to(sock, clock_ns=clock, sleep=clock.sleep) as transport:
        faulty = inject(transport, *[errno.ENOBUFS] * 100)
        assert transport.send(messages(64)) == Sent(0)
        assert sum(clock.slept_s) == pytest.approx(1.023)
        assert transport.counters.messages_failed == 64
        assert transport.counters.records_failed == 192
        faulty.faults.clear()
        assert transport.send(messages(3)) == Sent(3)
        assert numbers(sock) == [0, 1, 2]


@pytest.mark.parametrize("fault", [errno.EMSGSIZE, errno.EINVAL])
def test_a_path_that_shrinks_in_the_middle_says_how_many_messages_went_before(fault: int) -> None:
    with receiver() as sock, transport_to(sock) as transport:
        assert transport.max_message_octets() == 1472
        faulty = inject(transport)

        class ShrinksAfterOneCall(list):  # type: ignore[type-arg]
            def __bool__(self) -> bool:
                if faulty.calls:
                    faulty.mtu = 1400
                return bool(faulty.calls)

            def pop(self, _: Any = 0) -> int:
                return fault

        faulty.faults = ShrinksAfterOneCall()
        assert transport.send(messages(100, octets=1472)) == Sent(44, too_big=True)
        assert transport.max_message_octets() == 1372
        assert numbers(sock) == list(range(44))
        counters = transport.counters
        assert (counters.messages_sent, counters.messages_failed, counters.mtu_changes) == (44, 0, 1)


def test_what_cannot_be_sent_is_counted_as_failed_and_the_next_batch_is_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with receiver() as sock, transport_to(sock, clock_ns=clock) as transport:
        faulty = inject(transport, *[errno.ENETUNREACH] * 6)
        assert transport.send(messages(70)) == Sent(0)
        assert transport.send(messages(70)) == Sent(0)
        assert faulty.faults == []  # three tries a batch
        assert transport.send(messages(5, first=500)) == Sent(5)
        assert numbers(sock) == list(range(500, 505))
        assert transport.counters.messages_failed == 140
        assert transport.counters.records_failed == 420
    (line,) = [record.message for record in caplog.records]
    assert line.endswith("sending failed: Network is unreachable; a batch of records is lost")


def test_after_a_failure_there_is_a_new_socket_from_the_same_source_port() -> None:
    clock = Clock()
    with receiver() as sock, transport_to(sock, clock_ns=clock) as transport:
        inject(transport, *[errno.ENETUNREACH] * 3)
        transport.send(messages(1))
        transport.take_templates_due()
        clock.now_ns = REOPEN_PERIOD_NS - 1
        assert not transport.take_templates_due()
        clock.now_ns = REOPEN_PERIOD_NS
        assert transport.take_templates_due()
        transport.send(messages(1))
        _, (_, port) = sock.recvfrom(65_535)
        assert port == stable_source_port("127.0.0.1", sock.getsockname()[1])


def test_the_source_port_is_stable_and_below_the_ephemeral_ports() -> None:
    assert stable_source_port("192.0.2.1", 4739) == stable_source_port("192.0.2.1", 4739)
    assert stable_source_port("192.0.2.1", 4739) != stable_source_port("192.0.2.2", 4739)
    assert all(16_384 <= stable_source_port(f"192.0.2.{i}", 4739) < 32_768 for i in range(256))


def test_a_taken_source_port_is_told_and_another_one_used(caplog: pytest.LogCaptureFixture) -> None:
    with receiver() as sock, receiver() as holder:
        taken = holder.getsockname()[1]
        with transport_to(sock, source_port=taken) as transport:
            transport.send(messages(1))
            _, (_, port) = sock.recvfrom(65_535)
    assert port != taken
    assert f"source port {taken}: Address already in use; sending from another one" in caplog.text


def test_datagrams_carry_the_mark() -> None:
    needs.need(NOT_ROOT)
    with receiver() as sock, transport_to(sock, mark=0x2A) as transport:
        assert transport.marked
        assert transport._socket is not None
        assert transport._socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0x2A


def test_without_the_capability_for_a_mark_it_says_so_once_and_sends() -> None:
    needs.need(NOT_ROOT, needs.tools("setpriv"))
    program = (
        "from flowexp.transport.udp import UdpTransport\n"
        "t = UdpTransport('127.0.0.1', 9, mark=1); t.open(); t._connect()\n"
        "assert not t.marked and t._socket\n"
    )
    without = ["setpriv", "--bounding-set", "-net_admin,-net_raw", "--inh-caps", "-net_admin,-net_raw"]
    done = subprocess.run([*without, sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "udp://127.0.0.1:9: no CAP_NET_ADMIN for SO_MARK: own datagrams are metered too\n"


# Pace


def test_the_pace_lets_a_burst_go_and_then_as_many_as_time_has_earned() -> None:
    clock = Clock()
    pacer = Pacer(messages_per_s=1000, burst_messages=16, clock_ns=clock, sleep=clock.sleep)
    assert [pacer.take(40), pacer.take(24), pacer.take(8)] == [16, 16, 8]
    assert clock.slept_s == pytest.approx([0.016, 0.008])
    clock.now_ns += 10 * SECOND_NS
    assert [pacer.take(16), pacer.take(1)] == [16, 1]  # ten idle seconds earn one burst
    assert clock.slept_s == pytest.approx([0.016, 0.008, 0.001])


def test_no_pace_lets_everything_go() -> None:
    clock = Clock()
    assert Pacer(messages_per_s=0, clock_ns=clock, sleep=clock.sleep).take(1_000_000) == 1_000_000
    assert clock.slept_s == []


def test_a_paced_batch_takes_the_time_its_messages_earn() -> None:
    clock = Clock()
    options = {"messages_per_s": 10_000, "burst_messages": 32, "clock_ns": clock, "sleep": clock.sleep}
    with receiver() as sock, transport_to(sock, **options) as transport:
        faulty = inject(transport)
        transport.send(messages(320))
        assert numbers(sock) == list(range(320))
        assert [octets for octets, _ in faulty.calls] == [3200] * 10
        assert sum(clock.slept_s) == pytest.approx(0.0288)


def test_at_the_default_pace_an_untuned_reader_gets_the_records_of_ten_thousand_flows() -> None:
    """A reader that comes round every 4 ms of the pace's clock and has the default buffer, which holds 92."""
    clock, got, read_ns = Clock(), list[int](), 0
    with receiver(buffer_octets=0) as sock:

        def sleep(seconds: float) -> None:
            nonlocal read_ns
            clock.sleep(seconds)
            if clock.now_ns - read_ns >= 4_000_000:
                read_ns = clock.now_ns
                got.extend(numbers(sock))

        host, port = sock.getsockname()
        with closing(UdpTransport(host, port, clock_ns=clock, sleep=sleep)) as transport:
            transport.open()
            transport.send(messages(700, octets=1472))
        assert got + numbers(sock) == list(range(700))


def test_without_a_pace_the_same_batch_overflows_the_buffer_of_a_reader_that_pauses() -> None:
    with receiver(buffer_octets=0) as sock, transport_to(sock) as transport:
        assert transport.send(messages(700, octets=1472)) == Sent(700)
        assert len(numbers(sock)) < 200


# Names


def resolves_to(*answers: Any) -> Any:
    """getaddrinfo that gives each answer once and then the last one for ever; an answer is ports or an error."""
    left = list(answers)

    def getaddrinfo(_host: str, _port: int, **_: Any) -> list[Any]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", port)) for port in answer]

    return getaddrinfo


def test_a_name_that_resolves_later_is_found_while_sending(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    failure = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    with receiver() as sock:
        names = resolves_to(failure, [sock.getsockname()[1]])
        options: dict[str, Any] = {"messages_per_s": 0, "clock_ns": clock, "getaddrinfo": names}
        with closing(UdpTransport("collector.example", 4739, **options)) as transport:
            transport.open()
            assert transport.status()["state"] == "unresolved"
            assert "Temporary failure in name resolution" in caplog.text
            assert transport.send(messages(2)) == Sent(0)
            assert transport.counters.records_failed == 6
            clock.now_ns = LOOK_UP_PERIOD_NS
            transport.take_templates_due()  # begins a look-up
            wait_for("the name to be looked up", lambda: transport._resolver.addresses)
            assert transport.take_templates_due()
            assert transport.send(messages(2)) == Sent(2)
            assert numbers(sock) == [0, 1]
            assert transport.status()["state"] == "up"


def test_a_collector_that_moved_is_found_after_refusals() -> None:
    clock = Clock()
    with receiver() as sock:
        names = resolves_to([free_port()], [sock.getsockname()[1]])
        options: dict[str, Any] = {"messages_per_s": 0, "clock_ns": clock, "getaddrinfo": names}
        with closing(UdpTransport("collector.example", 4739, **options)) as transport:
            transport.open()
            old = transport._address
            transport.send(messages(1))
            clock.now_ns = LOOK_UP_PERIOD_NS
            transport.take_templates_due()
            wait_for("the name to lead elsewhere", lambda: transport._resolver.addresses[0] != old)
            assert transport.take_templates_due()
            transport.send(messages(1, first=7))
            assert numbers(sock) == [7]


def test_a_refusing_address_of_a_name_makes_way_for_the_next_at_once() -> None:
    clock = Clock()
    with receiver() as sock:
        names = resolves_to([free_port(), sock.getsockname()[1]])
        options: dict[str, Any] = {"messages_per_s": 0, "clock_ns": clock, "getaddrinfo": names}
        with closing(UdpTransport("localhost", 4739, **options)) as transport:
            transport.open()
            transport.send(messages(1))
            assert transport.take_templates_due()
            transport.send(messages(1, first=1))
            assert numbers(sock) == [1]


# Log


def test_lines_of_a_kind_are_written_once_a_minute_with_the_number_held_back() -> None:
    clock, lines = Clock(), []
    log = QuietLog(lines.append, clock_ns=clock)
    for second in range(121):
        clock.now_ns = second * SECOND_NS
        log("a", f"line {second}")
    log("b", "another kind")
    again = "(59 more like it since the last such line)"
    assert lines == ["line 0", f"line 60 {again}", f"line 120 {again}", "another kind"]


def test_no_number_of_kinds_makes_the_log_grow() -> None:
    clock, lines = Clock(), []
    log = QuietLog(lines.append, clock_ns=clock)
    for i in range(3 * MAX_KINDS):
        log(f"kind {i}", "line")
    assert len(lines) == MAX_KINDS + 1
    assert len(log._written_ns) + len(log._held_back) <= MAX_KINDS + 2
