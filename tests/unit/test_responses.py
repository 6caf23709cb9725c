# SPDX-License-Identifier: GPL-2.0-or-later
"""How long DNS answers take: pairs by addresses, ports, protocol and transaction ID; memory is bounded."""

from __future__ import annotations

import struct

import pytest

from flowexp.metering.responses import LONGEST_S, MOST_ALIKE, MOST_QUERIES, Conversation, Responses

CLIENT, SERVER = b"\xc0\0\2\1", b"\xc0\0\2\2"
UDP, TCP = 17, 6


def there(port: int = 40_000, *, us: int = 0, protocol: int = UDP) -> Conversation:
    return Conversation(CLIENT, SERVER, struct.pack("!HH", port, 53), protocol, us * 1000)


def back(port: int = 40_000, *, us: int, protocol: int = UDP) -> Conversation:
    return Conversation(SERVER, CLIENT, struct.pack("!HH", 53, port), protocol, us * 1000)


def message(identifier: int, *, is_answer: bool, over: int = UDP) -> bytes:
    header = struct.pack("!HH8x", identifier, 0x8180 if is_answer else 0x0100)
    return struct.pack("!H", len(header)) + header if over == TCP else header


QUERY, ANSWER = message(7, is_answer=False), message(7, is_answer=True)


@pytest.mark.parametrize("protocol", [UDP, TCP])
def test_an_answer_has_the_time_since_its_query_and_the_query_none(protocol: int) -> None:
    responses = Responses()
    query, answer = (message(7, is_answer=is_answer, over=protocol) for is_answer in (False, True))
    assert responses.time_us(there(us=100, protocol=protocol), query) == 0
    assert responses.time_us(back(us=1600, protocol=protocol), answer) == 1500
    assert responses.time_us(back(us=1700, protocol=protocol), answer) == 0  # it was answered


def test_what_came_back_at_once_took_a_microsecond_as_0_is_not_known() -> None:
    responses = Responses()
    responses.time_us(there(us=5), QUERY)
    assert responses.time_us(back(us=5), ANSWER) == 1


@pytest.mark.parametrize(
    ("answer", "payload"),
    [
        (back(us=50), message(8, is_answer=True)),
        (back(40_001, us=50), ANSWER),
        (back(us=50, protocol=TCP), message(7, is_answer=True, over=TCP)),
        (there(us=50), ANSWER),
        (back(us=50)._replace(source=b"\xc0\0\2\3"), ANSWER),
        (back(us=9)._replace(time_ns=0), ANSWER),
        (back(us=11 + LONGEST_S * 10**6), ANSWER),
        (back(us=50), ANSWER[:3]),
        (back(us=50), b""),
    ],
    ids=["identifier", "port", "protocol", "same way", "another server", "before", "too late", "cut off", "empty"],
)
def test_what_does_not_belong_to_a_query_has_no_time(answer: Conversation, payload: bytes) -> None:
    responses = Responses()
    responses.time_us(there(us=10), QUERY)
    assert responses.time_us(answer, payload) == 0


def test_of_two_queries_from_one_port_the_later_counts() -> None:
    """Each is the first of a flow: the one before had ended."""
    responses = Responses()
    responses.time_us(there(us=10), QUERY)
    responses.time_us(there(us=500), QUERY)
    assert responses.time_us(back(us=700), ANSWER) == 200


def test_a_flood_of_queries_makes_the_oldest_be_forgotten() -> None:
    responses = Responses()
    for number in range(MOST_QUERIES + 1):
        query = there()._replace(source=struct.pack("!I", number))
        assert responses.time_us(query, QUERY) == 0
    answers = [back(us=9)._replace(destination=struct.pack("!I", number)) for number in (0, 1, MOST_QUERIES)]
    assert [responses.time_us(each, ANSWER) for each in answers] == [0, 9, 9]


def test_what_passes_twice_on_a_router_has_a_time_at_either_side() -> None:
    """In at the left, out at the right, and back."""
    responses = Responses()
    assert [responses.time_us(there(us=us), QUERY) for us in (0, 10)] == [0, 0]
    assert [responses.time_us(back(us=us), ANSWER) for us in (510, 530)] == [500, 530]


def test_queries_of_one_exchange_are_forgotten_beyond_the_last_few() -> None:
    responses = Responses()
    for us in range(100):
        responses.time_us(there(us=us), QUERY)
    times_us = [responses.time_us(back(us=1000), ANSWER) for _ in range(MOST_ALIKE + 1)]
    assert times_us == [*range(901, 901 + MOST_ALIKE), 0]


def test_another_query_from_the_same_port_takes_nothing_from_the_first() -> None:
    responses = Responses()
    responses.time_us(there(us=10), QUERY)
    responses.time_us(there(us=20), message(8, is_answer=False))
    assert responses.time_us(back(us=300), ANSWER) == 290
