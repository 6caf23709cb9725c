# SPDX-License-Identifier: GPL-2.0-or-later
"""No octets make the Decoder raise, stall or grow: FLOWEXP_FUZZ_SECONDS of random and of mutated Messages."""

from __future__ import annotations

import os
import resource
import socket
import struct
import time
from typing import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import NAMES, golden

from flowexp.protocol.decode import Decoder
from flowexp.protocol.session import MAX_FIELDS
from flowexp.transport.receive import _Connection, _Over

SECONDS = float(os.environ.get("FLOWEXP_FUZZ_SECONDS", "10"))
MOST_GROWTH_KIB = 100 * 1024
MOST_SECONDS_A_DATAGRAM = 2.0  # of CPU time: others may use the machine
VALID = [golden(name) for name in NAMES]

unhurried = settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def for_half_of_the_time(examples: Callable[[], None]) -> None:
    """Run new examples until the time is over; memory may grow by what the limits of session.py allow."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end:
        examples()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < MOST_GROWTH_KIB


def decode_all(decoder: Decoder, datagrams: list[bytes]) -> None:
    for datagram in datagrams:
        began = time.process_time()
        decoded = decoder.decode(datagram, "session")
        assert time.process_time() - began < MOST_SECONDS_A_DATAGRAM
        assert all("\n" not in problem for problem in decoded.problems)
        assert sum(map(len, decoded.records + decoded.options_records)) <= len(datagram)
        assert decoder.fields_held <= MAX_FIELDS


def message(body: bytes, version: int) -> bytes:
    """A header that is right before any body, so that the body is looked at."""
    if version == 9:
        return struct.pack(">HHIIII", 9, 1, 0, 0, 0, 0) + body
    if version == 5:
        return struct.pack(">HHIIIIHH", 5, len(body) // 48, 0, 0, 0, 0, 0, 0) + body
    return struct.pack(">HHIII", 10, 16 + len(body), 0, 0, 0) + body


random_set = st.builds(
    lambda set_id, body: struct.pack(">HH", set_id, 4 + len(body)) + body,
    st.sampled_from([0, 1, 2, 3, 4, 256, 257, 300]),
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 82, 255, 256, 257, 300, 0x8005, 0xFFFF]), max_size=60).map(
            lambda words: struct.pack(f">{len(words)}H", *words)
        ),
    ),
)
random_datagram = st.one_of(
    st.binary(max_size=300),
    st.builds(message, st.lists(random_set, max_size=8).map(b"".join), st.sampled_from([5, 9, 10])),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A golden Message with a few octets changed, cut out, put in or repeated."""
    octets = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(0, len(octets) - 1)))
        end = place + draw(st.integers(0, 8))
        octets[place:end] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(octets[place:end] * 2))))
    return bytes(octets)


def test_random_octets_do_no_harm():
    decoder = Decoder()

    @unhurried
    @given(st.lists(random_datagram, max_size=6))
    def examples(datagrams: list[bytes]) -> None:
        decode_all(decoder, datagrams)

    for_half_of_the_time(examples)


def test_mutated_messages_do_no_harm():
    decoder = Decoder()

    @unhurried
    @given(st.lists(mutated(), max_size=6))
    def examples(datagrams: list[bytes]) -> None:
        decode_all(decoder, datagrams)

    for_half_of_the_time(examples)


def test_random_streams_do_no_harm_however_they_are_cut():
    """Framing: octets come out as whole Messages, in their order, or the connection ends."""

    @unhurried
    @given(st.lists(st.one_of(mutated(), st.sampled_from(VALID)), max_size=6), st.lists(st.integers(1, 999)))
    def examples(messages: list[bytes], cuts: list[int]) -> None:
        octets, out = b"".join(messages), b""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            connection = _Connection(ours, "session", ("sender", 1))
            try:
                for cut in [*cuts, len(octets)]:
                    theirs.send(octets[:cut])
                    octets = octets[cut:]
                    for arrival in connection.receive():
                        assert int.from_bytes(arrival.octets[2:4], "big") == len(arrival.octets)
                        out += arrival.octets
                    assert len(connection._octets) <= 65_535
            except _Over:
                pass
        assert b"".join(messages).startswith(out)

    for_half_of_the_time(examples)


def test_largest_template_and_its_data_take_no_more_than_moments():
    fields = b"".join(struct.pack(">HH", 1 + number % 500, 0xFFFF) for number in range(16_000))
    template = struct.pack(">HHHH", 2, 8 + len(fields), 300, 16_000) + fields
    data = struct.pack(">HH", 300, 65_000) + bytes(64_996)
    decode_all(Decoder(), [message(template, 10), message(data, 10)] * 3)


def test_templates_withdrawn_and_defined_by_turns_take_no_more_than_moments():
    decoder = Decoder()
    many = b"".join(struct.pack(">HHHH", number, 1, 1, 4) for number in range(256, 8400))
    decoder.decode(message(struct.pack(">HH", 2, 4 + len(many)) + many, 10), "session")
    turns = struct.pack(">HH HHHHH", 3, 0, 300, 1, 1, 1, 4) * 4_600
    decode_all(decoder, [message(struct.pack(">HH", 3, 4 + len(turns)) + turns, 10)])
    assert decoder.fields_held == 8144 * 4


def test_templates_of_ever_new_domains_fill_no_more_than_the_limit():
    decoder = Decoder()
    fields = b"".join(struct.pack(">HH", 32_000 + number % 700, 4) for number in range(16_000))
    body = struct.pack(">HHHH", 2, 8 + len(fields), 300, 16_000) + fields
    for domain in range(12):
        decoder.decode(struct.pack(">HHIII", 10, 16 + len(body), 0, 0, domain) + body, "session")
    assert decoder.fields_held == MAX_FIELDS // 16_003 * 16_003
