# SPDX-License-Identifier: GPL-2.0-or-later
"""One Collector's session over a transport that does as it is told: nothing twice, nothing forgotten."""

from __future__ import annotations

from collections import Counter
from typing import Dict, Iterator, List, Union

import pytest
from columns import flows

from flowexp.errors import FlowexpError
from flowexp.protocol.decode import Decoder
from flowexp.protocol.ipfix import MessageEncoder
from flowexp.protocol.session import Decoded
from flowexp.protocol.template import default_templates
from flowexp.session import CollectorSession, Unsent
from flowexp.transport.base import Batch, Counters, Sent

SECOND_NS = 1_000_000_000
REFRESH_NS = 60 * SECOND_NS
EXPORT_TIME_S = 1_700_000_000
WIDE, NARROW, NARROWEST, TOO_NARROW = 1472, 1000, 512, 60


class FakeTransport:
    """Takes Messages of at most `limit_octets`; `narrow` has the path shrink as the n-th Message is sent."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.limit_octets = WIDE
        self.messages: List[bytes] = []
        self.templates_due = True
        self.is_up = True
        self._narrow: Dict[int, int] = {}

    def narrow(self, *, at_message: int, to_octets: int) -> None:
        self._narrow[at_message] = to_octets

    def open(self) -> None: ...

    def close(self) -> None: ...

    def max_message_octets(self) -> int:
        return self.limit_octets

    def take_templates_due(self) -> bool:
        due, self.templates_due = self.templates_due, False
        return due

    def announces(self, domain: int | None) -> None: ...

    def send(self, batch: Batch) -> Sent:
        sent = self._send(batch)
        self.counters.add(batch, sent)
        return sent

    def _send(self, batch: Batch) -> Sent:
        if not self.is_up:
            return Sent(0)
        for number in range(batch.count):
            self.limit_octets = self._narrow.pop(len(self.messages), self.limit_octets)
            if batch.message_octets > self.limit_octets:
                return Sent(number, too_big=True)
            octets = batch.octets[number * batch.message_octets :][: batch.message_octets]
            self.messages.append(bytes(octets))
        return Sent(batch.count)

    def status(self) -> Dict[str, Union[str, int]]:
        return {"collector": "udp://192.0.2.1:4739"}

    def decoded(self) -> Iterator[Decoded]:
        """Every Message, as a Collector that heard all of them understands it."""
        decoder = Decoder()
        return (decoder.decode(message, "session") for message in self.messages)


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def session(transport: FakeTransport) -> CollectorSession:
    encoder = MessageEncoder(observation_domain_id=1, max_message_octets=WIDE, templates=default_templates())
    return CollectorSession(transport, encoder, refresh_ns=REFRESH_NS)


def has_templates(transport: FakeTransport) -> List[bool]:
    """Whether each Message in turn defines Templates."""
    return [bool(message.templates) for message in transport.decoded()]


def is_announcement(message: Decoded) -> bool:
    return bool(message.templates or message.options_records)


def ports(transport: FakeTransport) -> Counter[int]:
    """How often a Data Record of each flow came."""
    return Counter(record["sourceTransportPort"] for message in transport.decoded() for record in message.records)


def check_sequence(transport: FakeTransport, session: CollectorSession, *, lost_records: int = 0) -> None:
    """No complaint and no gap but this one, up to the Sequence Number of the next Message."""
    total = lost = 0
    for message in transport.decoded():
        assert message.problems == []
        lost += message.lost_records
        total += len(message.records) + len(message.options_records)
    assert lost == lost_records
    assert session.sequence_number == total + lost


def test_templates_go_before_the_first_data_record(session: CollectorSession, transport: FakeTransport) -> None:
    session.send(flows(100), 0, EXPORT_TIME_S)
    first, *rest = transport.decoded()
    assert first.templates and not first.records
    assert sum(len(message.records) for message in rest) == 100
    assert all(message.sets_without_template == 0 for message in rest)


def test_templates_are_not_sent_again_within_the_refresh_time(
    session: CollectorSession, transport: FakeTransport
) -> None:
    for now_ns in (0, 1, REFRESH_NS - 1):
        session.send(flows(1), now_ns, EXPORT_TIME_S)
    assert sum(has_templates(transport)) == 1


def test_templates_are_sent_again_at_exactly_the_refresh_time(
    session: CollectorSession, transport: FakeTransport
) -> None:
    session.send(flows(1), 5, EXPORT_TIME_S)
    session.announce_if_due(5 + REFRESH_NS - 1, EXPORT_TIME_S)
    assert sum(has_templates(transport)) == 1
    session.announce_if_due(5 + REFRESH_NS, EXPORT_TIME_S)
    assert sum(has_templates(transport)) == 2
    check_sequence(transport, session)


def test_the_refresh_time_counts_from_the_last_announcement_whoever_asked_for_it(
    session: CollectorSession, transport: FakeTransport
) -> None:
    session.announce_if_due(0, EXPORT_TIME_S)
    transport.templates_due = True
    session.announce_if_due(10 * SECOND_NS, EXPORT_TIME_S)
    session.announce_if_due(REFRESH_NS, EXPORT_TIME_S)
    assert sum(has_templates(transport)) == 2
    session.announce_if_due(10 * SECOND_NS + REFRESH_NS, EXPORT_TIME_S)
    assert sum(has_templates(transport)) == 3


def test_templates_go_first_when_the_transport_asks_for_them(
    session: CollectorSession, transport: FakeTransport
) -> None:
    session.send(flows(1), 0, EXPORT_TIME_S)
    already = len(transport.messages)
    transport.templates_due = True
    session.send(flows(1), 1, EXPORT_TIME_S)
    assert has_templates(transport)[already:] == [True, False, False]
    check_sequence(transport, session)


def test_columns_without_a_row_send_no_data_record(session: CollectorSession, transport: FakeTransport) -> None:
    session.send(flows(0), 0, EXPORT_TIME_S)
    assert all(is_announcement(message) for message in transport.decoded())


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("at_message", [2, 3, 7, 20])
def test_a_path_that_narrows_within_a_burst_gets_each_flow_exactly_once_and_no_gap(
    session: CollectorSession, transport: FakeTransport, version: int, at_message: int
) -> None:
    transport.narrow(at_message=at_message, to_octets=NARROW)
    session.send(flows(1000, version=version), 0, EXPORT_TIME_S)
    assert ports(transport) == Counter(range(1, 1001))
    assert all(len(message) <= NARROW for message in transport.messages[at_message:])
    check_sequence(transport, session)


def test_a_path_that_narrows_twice_gets_each_flow_exactly_once_and_no_gap(
    session: CollectorSession, transport: FakeTransport
) -> None:
    transport.narrow(at_message=5, to_octets=NARROW)
    transport.narrow(at_message=9, to_octets=NARROWEST)
    session.send(flows(1000), 0, EXPORT_TIME_S)
    assert ports(transport) == Counter(range(1, 1001))
    assert all(len(message) <= NARROWEST for message in transport.messages[9:])
    check_sequence(transport, session)


def test_templates_that_do_not_fit_a_path_that_has_just_narrowed_go_again_smaller_before_data(
    session: CollectorSession, transport: FakeTransport
) -> None:
    transport.narrow(at_message=0, to_octets=NARROWEST)
    session.send(flows(100), 0, EXPORT_TIME_S)
    assert ports(transport) == Counter(range(1, 101))
    check_sequence(transport, session)


def test_a_path_that_widens_gets_larger_messages(session: CollectorSession, transport: FakeTransport) -> None:
    transport.limit_octets = NARROW
    session.send(flows(100), 0, EXPORT_TIME_S)
    already = len(transport.messages)
    transport.limit_octets = WIDE
    session.send(flows(100, first_port=101), 1, EXPORT_TIME_S)
    assert max(map(len, transport.messages[already:])) > NARROW
    assert ports(transport) == Counter(range(1, 201))
    check_sequence(transport, session)


def test_what_could_not_be_sent_leaves_a_gap_of_just_these_records(
    session: CollectorSession, transport: FakeTransport
) -> None:
    session.send(flows(100), 0, EXPORT_TIME_S)
    transport.is_up = False
    session.send(flows(70, first_port=101), 1, EXPORT_TIME_S)
    transport.is_up = True
    session.send(flows(30, first_port=171), 2, EXPORT_TIME_S)
    assert ports(transport) == Counter([*range(1, 101), *range(171, 201)])
    assert transport.counters.records_failed == 70
    check_sequence(transport, session, lost_records=70)


def test_a_session_goes_on_where_the_last_one_ended(transport: FakeTransport) -> None:
    last = 2**32 - 10
    encoder = MessageEncoder(
        observation_domain_id=1, max_message_octets=WIDE, templates=default_templates(), sequence_number=last
    )
    session = CollectorSession(transport, encoder, refresh_ns=REFRESH_NS)
    session.send(flows(100), 0, EXPORT_TIME_S)
    first, *_ = transport.decoded()
    assert first.sequence == last
    options = sum(len(decoded.options_records) for decoded in transport.decoded())
    assert session.sequence_number == (last + options + 100) % 2**32  # Options Data Records count, too


def test_another_sampling_interval_is_announced_before_the_next_records(
    session: CollectorSession, transport: FakeTransport
) -> None:
    for interval in (1, 100, 100, 7):
        session.tell_sampling(interval)
        session.send(flows(1), 0, EXPORT_TIME_S)
    told = [
        record.get("samplingInterval")
        for message in transport.decoded()
        for record in [*message.options_records, *message.records]
        if "samplingInterval" in record or "packetDeltaCount" in record
    ]
    assert told == [1, None, 100, None, None, 7, None]
    check_sequence(transport, session)


def test_a_path_that_carries_no_record_at_all_fails_them_shows_a_gap_and_has_templates_first_once_it_is_wider(
    session: CollectorSession, transport: FakeTransport
) -> None:
    transport.limit_octets = TOO_NARROW
    for second in range(2):
        with pytest.raises(FlowexpError, match="too narrow"):
            session.send(flows(70), second, EXPORT_TIME_S)
    assert transport.messages == []
    assert transport.counters.records_failed == 140
    transport.limit_octets = WIDE
    session.send(flows(30, first_port=71), 2, EXPORT_TIME_S)
    assert has_templates(transport)[0]
    assert ports(transport) == Counter(range(71, 101))
    (first, *_), told = transport.decoded(), told_not_sent(transport)
    assert first.sequence == 140
    packets, octets = (2 * int(flows(70)[name].sum()) for name in ("packets", "octets"))
    assert told == {"flows": 140, "packets": packets, "octets": octets}


def test_what_the_exporter_did_not_even_hand_over_is_told_as_not_sent(
    session: CollectorSession, transport: FakeTransport
) -> None:
    columns = flows(50)
    session.skip(Unsent.of(columns).plus(Unsent(records=3)))  # and three NAT events
    session.send(flows(1), 0, EXPORT_TIME_S)
    packets, octets = (int(columns[name].sum()) for name in ("packets", "octets"))
    assert told_not_sent(transport) == {"flows": 50, "packets": packets, "octets": octets}
    assert transport.counters.records_failed == 53


def told_not_sent(transport: FakeTransport) -> Dict[str, int]:
    """What Options Data Records say last of flows that were not sent, by kind of figure."""
    told = {}
    for message in transport.decoded():
        for record in message.options_records:
            if "notSentFlowTotalCount" in record:
                told = {what.lower() + "s": record[f"notSent{what}TotalCount"] for what in ("Flow", "Packet", "Octet")}
    return told
