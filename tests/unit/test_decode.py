# SPDX-License-Identifier: GPL-2.0-or-later
"""What the Decoder makes of well-formed, odd and hostile datagrams."""

from __future__ import annotations

import struct

import pytest
from wire import golden

from flowexp.protocol import session as limits
from flowexp.protocol.decode import Decoder
from flowexp.protocol.fieldgroups import NAMES
from flowexp.protocol.ipfix import MessageEncoder
from flowexp.protocol.session import Decoded
from flowexp.protocol.template import default_templates


def ipfix_message(*sets: bytes, sequence: int = 0, domain: int = 7) -> bytes:
    body = b"".join(sets)
    return struct.pack(">HHIII", 10, 16 + len(body), 1_700_000_000, sequence, domain) + body


def ipfix_set(set_id: int, body: bytes) -> bytes:
    return struct.pack(">HH", set_id, 4 + len(body)) + body


def template(template_id: int, *fields: tuple[int, int]) -> bytes:
    """A Template Record of (element, length) fields."""
    specifiers = b"".join(struct.pack(">HH", *field) for field in fields)
    return struct.pack(">HH", template_id, len(fields)) + specifiers


OCTETS_TEMPLATE = ipfix_set(2, template(300, (1, 4)))


def octets_set(*counts: int, template_id: int = 300) -> bytes:
    return ipfix_set(template_id, b"".join(struct.pack(">I", count) for count in counts))


def decoded_of(*datagrams: bytes, decoder: Decoder | None = None) -> list[Decoded]:
    decoder = decoder or Decoder()
    return [decoder.decode(datagram, "session") for datagram in datagrams]


def test_golden_ipv4_flow_is_read_under_its_announced_template():
    *_, flow = decoded_of(golden("announcement.txt"), golden("sampling.txt"), golden("data_ipv4.txt"))
    assert flow.records == [
        {
            "ipVersion": 4, "protocolIdentifier": 6, "sourceIPv4Address": "192.0.2.1",
            "destinationIPv4Address": "198.51.100.2", "ipNextHopIPv4Address": "203.0.113.254",
            "icmpTypeCodeIPv4": 0, "sourceTransportPort": 49152, "destinationTransportPort": 443,
            "tcpControlBits": 27, "ipClassOfService": 184, "ipDiffServCodePoint": 46,
            "octetDeltaCount": 5_000_000_000, "packetDeltaCount": 4_000_000,
            "flowStartMilliseconds": 1_699_999_990_123, "flowEndMilliseconds": 1_699_999_999_456,
            "flowEndReason": 3, "ingressInterface": 2, "egressInterface": 3, "flowDirection": 0,
            "minimumIpTotalLength": 40, "maximumIpTotalLength": 1500, "minimumTTL": 63, "maximumTTL": 64,
            "fragmentFlags": 64, "sourceMacAddress": "02:00:00:00:00:01",
            "destinationMacAddress": "02:00:00:00:00:02",
        }
    ]  # fmt: skip
    assert (flow.version, flow.observation_domain_id, flow.sequence) == (10, 7, 2**32 - 1)


def test_options_data_record_is_kept_apart_from_flows():
    announcement, sampling = decoded_of(golden("announcement.txt"), golden("sampling.txt"))
    assert [names == ["observationDomainId", "samplingInterval"] for _, names in announcement.templates] == [
        *[False] * 10,
        True,
    ]
    assert (sampling.records, sampling.options_records) == (
        [],
        [{"observationDomainId": 7, "samplingInterval": 1}],
    )


def test_variable_length_enterprise_and_reduced_size_elements_are_read():
    (decoded,) = decoded_of(golden("variable_length.txt"))
    assert decoded.problems == []
    assert decoded.records == [
        {
            "sourceIPv4Address": "192.0.2.1", "interfaceName": "eth0",
            "enterprise9000.5": "beef", "octetDeltaCount": 65536,
        },
        {
            "sourceIPv4Address": "192.0.2.2", "interfaceName": "",
            "enterprise9000.5": "", "octetDeltaCount": 1,
        },
    ]  # fmt: skip


def test_netflow9_packet_is_read_with_its_options():
    (decoded,) = decoded_of(golden("netflow9.txt"))
    assert (decoded.version, decoded.problems) == (9, [])
    assert decoded.records == [{"sourceIPv4Address": "192.0.2.1", "octetDeltaCount": 1500, "flowEndSysUpTime": 60000}]
    assert decoded.options_records == [{"scopeInterface": 2, "samplingInterval": 100}]


def test_lost_netflow9_packets_are_counted():
    packet = golden("netflow9.txt")
    later = packet[:12] + struct.pack(">I", 9) + packet[16:]
    assert [decoded.lost_packets for decoded in decoded_of(packet, later)] == [0, 3]


def test_a_netflow5_packet_is_read_in_the_words_of_ipfix():
    (decoded,) = decoded_of(golden("netflow5.txt"))
    assert (decoded.version, decoded.observation_domain_id, decoded.problems) == (5, 0x203, [])
    flow = {
        "sourceIPv4Address": "192.0.2.1", "destinationIPv4Address": "198.51.100.2",
        "ipNextHopIPv4Address": "203.0.113.254", "ingressInterface": 2, "egressInterface": 3,
        "packetDeltaCount": 2_000_000, "octetDeltaCount": 2_500_000_000,
        "flowStartMilliseconds": 1_699_999_990_123, "flowEndMilliseconds": 1_699_999_999_456,
        "sourceTransportPort": 49152, "destinationTransportPort": 443, "tcpControlBits": 27, "protocolIdentifier": 6,
        "ipClassOfService": 184, "bgpSourceAsNumber": 0, "bgpDestinationAsNumber": 0,
        "sourceIPv4PrefixLength": 0, "destinationIPv4PrefixLength": 0,
    }  # fmt: skip
    assert decoded.records == [flow, flow]


def test_netflow5_counts_flows_so_missing_ones_are_counted():
    packet = golden("netflow5.txt")
    later = packet[:16] + struct.pack(">I", 11) + packet[20:]  # 2 ** 32 - 1, two flows, and ten that never came
    assert [decoded.lost_records for decoded in decoded_of(packet, later)] == [0, 10]


@pytest.mark.parametrize(("octets", "records"), [(24 + 47, 0), (24 + 48, 1), (24 + 95, 1), (24 + 96 + 48, 2)])
def test_of_a_netflow5_packet_of_another_length_whole_records_are_read(octets: int, records: int):
    packet = golden("netflow5.txt")
    (decoded,) = decoded_of((packet + packet)[:octets])
    assert len(decoded.records) == records
    assert decoded.problems == [f"NetFlow v5 packet of 2 records: {octets - 24} octets behind its header"]


def test_a_netflow5_exporter_whose_up_time_began_anew_tells_the_same_times():
    packet = golden("netflow5.txt")
    up_time_ms, first_ms = 1_000, 2**32 - 500
    up_time, first = struct.pack(">I", up_time_ms), struct.pack(">I", first_ms)
    (decoded,) = decoded_of(packet[:4] + up_time + packet[8:48] + first + packet[52:])
    assert decoded.records[0]["flowStartMilliseconds"] == 1_700_000_000_000 - 1_500


@pytest.mark.parametrize(
    ("datagram", "problem"),
    [
        (b"", "0 octets are no Message"),
        (b"\0\x07\0\x01", "unsupported version 7"),
        (b"\0\x05\0\x01", "NetFlow v5 packet of 4 octets: no whole header"),
        (b"\0\x0a\0\x04", "Message of 4 octets: its header alone has 16"),
        (b"\0\x09\0\x04", "NetFlow v9 packet of 4 octets: no whole header"),
    ],
)
def test_what_is_no_message_is_named(datagram: bytes, problem: str):
    assert decoded_of(datagram)[0].problems == [problem]


def test_set_without_template_is_counted_and_hides_no_later_set():
    (decoded,) = decoded_of(ipfix_message(octets_set(1, template_id=999), OCTETS_TEMPLATE, octets_set(5, 6)))
    assert decoded.sets_without_template == 1
    assert decoded.problems == ["Set 999: no Template yet for its 4 octets"]
    assert [record["octetDeltaCount"] for record in decoded.records] == [5, 6]


def test_templates_belong_to_one_session_and_one_observation_domain():
    decoder, data = Decoder(), octets_set(1)
    decoder.decode(ipfix_message(OCTETS_TEMPLATE, domain=1), "a")
    found = [
        len(decoder.decode(ipfix_message(data, domain=domain), session).records)
        for session, domain in (("a", 1), ("a", 2), ("b", 1))
    ]
    assert found == [1, 0, 0]


def test_redefined_template_replaces_the_old_one():
    *_, decoded = decoded_of(
        ipfix_message(OCTETS_TEMPLATE), ipfix_message(ipfix_set(2, template(300, (2, 4))), octets_set(9))
    )
    assert decoded.records == [{"packetDeltaCount": 9}]


@pytest.mark.parametrize(("set_id", "withdrawn"), [(300, True), (2, True), (3, False)])
def test_withdrawal_forgets_one_template_or_all_of_its_kind(set_id: int, withdrawn: bool):
    set_of = 3 if set_id == 3 else 2
    withdrawal = ipfix_set(set_of, struct.pack(">HH", set_id, 0))
    decoder = Decoder()
    *_, decoded = decoded_of(
        ipfix_message(OCTETS_TEMPLATE),
        ipfix_message(withdrawal),
        ipfix_message(octets_set(1)),
        decoder=decoder,
    )
    assert decoded.sets_without_template == withdrawn
    assert decoder.fields_held == (0 if withdrawn else 4)


def test_template_whose_records_would_be_empty_is_refused_and_its_data_does_not_loop():
    empty = ipfix_set(2, template(300, (82, 0), (1, 0)))
    (decoded,) = decoded_of(ipfix_message(empty, octets_set(1, 2, 3)))
    assert decoded.problems == [
        "Template 300: its records would have no octets",
        "Set 300: no Template yet for its 12 octets",
    ]


def test_field_of_no_octets_is_left_out():
    (decoded,) = decoded_of(ipfix_message(ipfix_set(2, template(300, (82, 0), (1, 4))), octets_set(8)))
    assert decoded.records == [{"octetDeltaCount": 8}]


def test_element_that_comes_twice_is_kept_twice():
    (decoded,) = decoded_of(ipfix_message(ipfix_set(2, template(300, (1, 4), (1, 4))), octets_set(8, 9)))
    assert decoded.records == [{"octetDeltaCount": 8, "octetDeltaCount#2": 9}]


def test_unknown_element_and_impossible_length_are_shown_as_hexadecimal():
    (decoded,) = decoded_of(ipfix_message(ipfix_set(2, template(300, (32000, 2), (8, 2))), octets_set(0x01020304)))
    assert decoded.records == [{"element32000": "0102", "sourceIPv4Address": "0304"}]


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ((ipfix_set(2, template(255, (1, 4))),), "Set 2: Template ID 255 is below 256 (RFC 7011 §3.4.1)"),
        ((ipfix_set(2, template(300, (1, 4))[:-2]),), "Set 2: Template 300 ends at field 1 of 1"),
        (
            (ipfix_set(3, bytes.fromhex("012c 0001 0000 00010004")),),
            "Set 3: Options Template 300: 0 scope fields of 1",
        ),
        ((ipfix_set(5, b"\1\1\1\1"),), "Set ID 5 is reserved (RFC 7011 §3.3.2)"),
        ((b"\1\x2c\0\2",), "Set 300: Length 2, but 4 octets are left"),
        ((b"\1\x2c\0\x10\0",), "Set 300: Length 16, but 5 octets are left"),
        ((b"\1\x2c\0",), "3 octets behind the last Set"),
        ((OCTETS_TEMPLATE, ipfix_set(300, b"\1\1")), "Set 300: its 2 octets hold no record of 4"),
        (
            (ipfix_set(2, template(300, (82, 65535))), ipfix_set(300, b"\x02a")),
            "Set 300: interfaceName in record 1 goes beyond the end",
        ),
        (
            (ipfix_set(2, template(300, (82, 65535))), ipfix_set(300, b"\xff\x01")),
            "Set 300: interfaceName in record 1 goes beyond the end",
        ),
    ],
)
def test_malformed_set_is_named(sets: tuple[bytes, ...], problem: str):
    assert decoded_of(ipfix_message(*sets))[0].problems == [problem]


def test_truncated_message_gives_its_whole_sets():
    whole = ipfix_message(OCTETS_TEMPLATE, octets_set(1), octets_set(2, 3))
    (decoded,) = decoded_of(whole[:-4])
    assert [record["octetDeltaCount"] for record in decoded.records] == [1]
    assert decoded.problems == [
        f"Message Length {len(whole)}, but {len(whole) - 4} octets came",
        "Set 300: Length 12, but 8 octets are left",
    ]


def test_padding_is_no_record():
    (decoded,) = decoded_of(
        ipfix_message(ipfix_set(2, template(300, (1, 4)) + bytes(4)), ipfix_set(300, b"\0\0\0\1" + bytes(3)))
    )
    assert (decoded.problems, len(decoded.records)) == ([], 1)


def test_gap_in_sequence_numbers_is_counted_as_lost_records():
    two = octets_set(1, 2)
    found = decoded_of(
        ipfix_message(OCTETS_TEMPLATE, two, sequence=2**32 - 1), ipfix_message(two, sequence=1),
        ipfix_message(two, sequence=13), ipfix_message(two, sequence=15),
    )  # fmt: skip
    assert [decoded.lost_records for decoded in found] == [0, 0, 10, 0]


def test_records_that_come_late_are_taken_back_from_the_lost():
    two = octets_set(1, 2)
    found = decoded_of(
        ipfix_message(OCTETS_TEMPLATE, two), ipfix_message(two, sequence=4), ipfix_message(two, sequence=2),
        ipfix_message(two, sequence=6),
    )  # fmt: skip
    assert [decoded.lost_records for decoded in found] == [0, 2, -2, 0]


def test_sequence_numbers_that_begin_anew_are_no_loss():
    two = octets_set(1, 2)
    found = decoded_of(
        ipfix_message(OCTETS_TEMPLATE, two, sequence=5000), ipfix_message(two), ipfix_message(two, sequence=2)
    )
    assert [decoded.lost_records for decoded in found] == [0, 0, 0]
    assert found[1].problems == ["Sequence Number went back to 0: the exporter began anew"]


def test_unknown_set_makes_the_next_sequence_number_unknowable():
    found = decoded_of(
        ipfix_message(octets_set(1, 2)), ipfix_message(OCTETS_TEMPLATE, sequence=2), ipfix_message(sequence=2)
    )
    assert [decoded.lost_records for decoded in found] == [0, 0, 0]


def test_oldest_templates_are_forgotten_beyond_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "MAX_FIELDS", 40)
    decoder = Decoder()
    for number in range(12):
        decoder.decode(ipfix_message(ipfix_set(2, template(300 + number, (1, 4)))), "session")
    assert decoder.fields_held == 40
    found = [
        decoder.decode(ipfix_message(octets_set(1, template_id=300 + number)), "session").sets_without_template
        for number in range(12)
    ]
    assert found == [1, 1] + [0] * 10


def test_problems_of_one_datagram_are_limited_and_the_rest_counted():
    (decoded,) = decoded_of(ipfix_message(*(octets_set(1) for _ in range(100))))
    assert (len(decoded.problems), decoded.problems_left_out) == (16, 84)


def test_a_session_that_ends_takes_its_templates_along_and_no_other_ones():
    decoder = Decoder()
    for session in "over", "other":
        decoder.decode(ipfix_message(ipfix_set(2, template(300, (1, 4)))), session)
    held = decoder.fields_held
    decoder.forget("over")
    assert decoder.fields_held == held // 2
    assert decoder.decode(ipfix_message(octets_set(7)), "other").records
    again = decoder.decode(ipfix_message(octets_set(7), sequence=99), "over")
    assert again.sets_without_template == 1
    assert again.lost_records == 0


def test_all_templates_of_an_exporter_with_every_field_group_are_kept():
    templates = default_templates(groups=NAMES)
    encoder = MessageEncoder(observation_domain_id=7, max_message_octets=1472, templates=templates)
    decoder = Decoder()
    for burst in encoder.announce(1_700_000_000):
        encoder.commit(burst)
        assert decoder.decode(burst.octets, "session").problems == []
    assert decoder.fields_held >= sum(len(each.fields) for each in templates.all())
