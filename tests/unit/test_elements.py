# SPDX-License-Identifier: GPL-2.0-or-later
"""The registry, and the table of measured elements."""

from __future__ import annotations

import numpy as np
import pytest

from flowexp.protocol.datatypes import DATA_TYPES
from flowexp.protocol.elements import MEASURED, measured
from flowexp.protocol.fieldgroups import GROUPS, group_of
from flowexp.protocol.registry import BY_ID, BY_NAME, IANA, OWN_ENTERPRISE, REVERSE_ENTERPRISE, ElementError


def test_registry_has_each_of_its_elements_under_one_number_and_one_name():
    assert len(BY_ID) == len(BY_NAME)
    assert sum(enterprise == IANA for enterprise, _ in BY_ID) == 502
    assert BY_ID[IANA, 1].name == "octetDeltaCount"
    assert BY_NAME["dot1qCustomerVlanId"].element_id == 245
    assert BY_NAME["flowStartMilliseconds"].units == "milliseconds"


def test_reverse_elements_follow_from_those_of_iana_that_are_reversible():
    reverse = BY_NAME["reverseOctetDeltaCount"]
    assert (reverse.key, reverse.units) == ((REVERSE_ENTERPRISE, 1), "octets")
    assert sum(enterprise == REVERSE_ENTERPRISE for enterprise, _ in BY_ID) == 502 - 25
    for name in ("Biflow Direction", "Observation Domain Id", "Flow Key Indicator", "Ignored Packet Total Count"):
        assert "reverse" + name.replace(" ", "") not in BY_NAME


def test_own_elements_are_described_for_those_who_receive_them():
    own = [element for element in BY_ID.values() if element.enterprise == OWN_ENTERPRISE]
    assert own
    assert all(element.description and len(element.description.encode()) <= 255 for element in own)


def test_field_specifier_has_enterprise_bit_and_number_where_the_element_is_not_ianas():
    assert BY_NAME["octetDeltaCount"].specifier(4).hex() == "00010004"
    assert BY_NAME["reverseOctetDeltaCount"].specifier(8).hex() == "8001" + "0008" + "00007279"


def test_every_data_type_of_the_registry_can_be_read():
    assert {element.data_type for element in BY_ID.values()} <= DATA_TYPES.keys()


def test_every_measured_element_has_a_length_that_its_type_allows():
    for name, element in MEASURED.items():
        assert element.check_octets(element.octets) == element.octets, name


def test_unknown_name_is_refused_with_the_nearest_measured_one():
    with pytest.raises(ElementError) as error:
        measured("octetDeltaCuont")
    assert str(error.value).startswith("octetDeltaCuont is no Information Element; nearest to it: octetDeltaCount, ")


def test_element_that_is_not_measured_is_told_from_one_that_does_not_exist():
    with pytest.raises(ElementError) as error:
        measured("bgpNextAdjacentAsNumber")
    assert str(error.value).startswith("bgpNextAdjacentAsNumber is not measured")


def test_length_that_the_type_does_not_allow_is_refused_with_those_that_it_does():
    assert MEASURED["tcpControlBits"].check_octets(2) == 2
    with pytest.raises(ElementError) as error:
        MEASURED["tcpControlBits"].check_octets(3)
    assert str(error.value) == "tcpControlBits: length 3 is none of 1, 2 (RFC 7011 §6.2)"
    with pytest.raises(ElementError):
        MEASURED["flowStartMilliseconds"].check_octets(4)


def test_number_too_large_for_its_reduced_length_stays_at_the_largest_that_fits():
    columns = {"octets": np.array([5, 2**32 - 1, 2**40], dtype=np.uint64)}
    assert MEASURED["octetDeltaCount"].wire(columns, 4).tolist() == [5, 2**32 - 1, 2**32 - 1]


def test_flags_keep_their_lower_bits_in_a_reduced_length():
    columns = {"tcp_flags": np.array([0x112], dtype=np.uint16)}
    record = np.zeros(1, dtype=np.uint8)
    record[:] = MEASURED["tcpControlBits"].wire(columns, 1)
    assert record.tolist() == [0x12]


def test_number_of_three_octets_is_written_as_its_last_three():
    columns = {"flow_label": np.array([0xABCDE, 1], dtype=np.uint32)}
    assert MEASURED["flowLabelIPv6"].wire(columns, 3).tobytes().hex() == "0abcde000001"


@pytest.mark.parametrize(
    ("name", "wire", "json"),
    [
        ("flowStartSeconds", "6553f100", 1_700_000_000),
        ("flowStartMilliseconds", "0000018bcfe5687b", 1_700_000_000_123),
        # 0xe8fe6f80 seconds since 1900; the fraction is counted in 2**-32 s (RFC 7011 §6.1.9)
        ("flowStartMicroseconds", "e8fe6f801f9ac800", 1_700_000_000_123_456),
        ("flowStartNanoseconds", "e8fe6f801f9add37", 1_700_000_000_123_456_789),
    ],
)
def test_times_are_written_and_read_back_in_their_own_unit(name: str, wire: str, json: int):
    columns = {"start_ns": np.array([1_700_000_000_123_456_789], dtype=np.int64)}
    element = MEASURED[name]
    written = np.empty(1, element.element.type.storage(element.octets))
    written[:] = element.wire(columns, element.octets)
    assert element.json(columns) == [json]
    assert written.tobytes().hex() == wire
    assert element.element.type.read(bytes.fromhex(wire)) == json


def test_ntp_time_after_2036_is_read_in_the_next_era():
    assert DATA_TYPES["dateTimeMicroseconds"].read(bytes.fromhex("0000000000000000")) == 2_085_978_496 * 10**6


def test_addresses_are_shown_as_the_shortest_text():
    columns = {
        "src_addr": np.frombuffer(bytes.fromhex("20010db8000000000000000000000001"), np.uint8).reshape(1, 16),
        "src_mac": np.frombuffer(bytes.fromhex("0200000000ff"), np.uint8).reshape(1, 6),
    }
    assert MEASURED["sourceIPv6Address"].json(columns) == ["2001:db8::1"]
    assert MEASURED["sourceMacAddress"].json(columns) == ["02:00:00:00:00:ff"]


@pytest.mark.parametrize(
    ("data_type", "octets", "json"),
    [
        ("boolean", "01", True),
        ("boolean", "02", False),
        ("boolean", "03", "03"),
        ("string", "657468300000", "eth0"),
        ("string", "ff", "\ufffd"),
        ("signed32", "fffe", -2),
        ("float64", "3ff8000000000000", 1.5),
        ("float64", "7ff8000000000000", "nan"),
        ("octetArray", "beef", "beef"),
    ],
)
def test_value_off_the_wire_takes_its_json_form(data_type: str, octets: str, json: object):
    assert DATA_TYPES[data_type].read(bytes.fromhex(octets)) == json


def test_every_element_of_a_field_group_is_measured_and_in_one_group_alone():
    elements = [element for group in GROUPS for element in GROUPS[group]]
    assert len(elements) == len(set(elements))
    assert {measured(element).element.name for element in elements} == set(elements)


def test_a_group_is_needed_for_what_is_counted_only_while_it_is_on():
    assert group_of("tcpHandshakeTimeMicroseconds") == "tcp"
    assert group_of("dot1qPriority") == group_of("octetDeltaCount") == ""


@pytest.mark.parametrize(
    ("flags", "packets", "syns", "state"),
    [(0x10, 5, 0, 0), (0x02, 3, 3, 1), (0x12, 2, 2, 1), (0x12, 9, 1, 2), (0x13, 9, 1, 3), (0x1F, 9, 1, 4)],
)
def test_state_of_a_connection_follows_from_its_flags(flags: int, packets: int, syns: int, state: int):
    columns = {
        "tcp_flags": np.array([flags], np.uint16),
        "packets_total": np.array([packets], np.uint64),
        "tcp_syn_total": np.array([syns], np.uint32),
    }
    assert MEASURED["tcpConnectionState"].json(columns) == [state]


def test_priorities_of_two_tags_are_told_apart():
    columns = {"priorities": np.array([0b1011_0110], np.uint8)}
    names = ("dot1qPriority", "dot1qDEI", "dot1qCustomerPriority", "dot1qCustomerDEI")
    assert [MEASURED[name].json(columns)[0] for name in names] == [5, True, 3, False]
