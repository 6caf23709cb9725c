# SPDX-License-Identifier: GPL-2.0-or-later
"""Which Template a flow gets, that an ID stands for one layout, and Templates of one's own choice."""

from __future__ import annotations

import numpy as np
import pytest

from flowexp.protocol.catalogue import catalogue, field_table
from flowexp.protocol.elements import MEASURED
from flowexp.protocol.encoders import check_template
from flowexp.protocol.netflow9 import NETFLOW9_DIALECT
from flowexp.protocol.registry import BY_NAME, ElementError
from flowexp.protocol.template import (
    CONDITIONS,
    DEFAULT,
    IPFIX_DIALECT,
    Dialect,
    TemplateIds,
    build_templates,
    default_templates,
    template_spec,
)

VARIANTS = ["", "vlanId", "vlanId postVlanId", "vlanId dot1qCustomerVlanId", "vlanId postVlanId dot1qCustomerVlanId"]


def columns(*flows: tuple[bool, bool, int]) -> dict[str, np.ndarray]:
    """What classification reads: tagged, inner tag, direction of each flow."""
    tagged, inner, direction = zip(*flows)
    return {
        "vlan_tagged": np.array(tagged),
        "inner_tagged": np.array(inner),
        "direction": np.array(direction, dtype=np.uint8),
        "src_addr": np.zeros((len(flows), 4), dtype=np.uint8),
    }


def names_of(*elements: str, ip_version: int = 4, dialect: Dialect = IPFIX_DIALECT) -> list[list[str]]:
    """The elements of each Template of one family that these make."""
    return [each.names for each in build_templates(template_spec("x", elements), dialect).of_family[ip_version]]


def test_variant_follows_tags_and_direction():
    flows = columns(
        (False, False, 0),
        (False, False, 1),
        (True, False, 0),
        (True, False, 1),
        (True, True, 0),
        (True, True, 1),
    )
    assert default_templates().classify(flows).tolist() == [0, 0, 1, 2, 3, 4]


def test_partition_gives_each_row_to_one_template_in_ascending_order():
    flows = columns((True, False, 0), (False, False, 0), (True, False, 0), (True, True, 1))
    templates = default_templates()
    parts = [(template, rows.tolist()) for template, rows in templates.partition(flows)]
    family = templates.of_family[4]
    assert parts == [(family[0], [1]), (family[1], [0, 2]), (family[4], [3])]


def test_partition_of_no_flows_is_empty():
    none = {name: column[:0] for name, column in columns((True, False, 0)).items()}
    assert list(default_templates().partition(none)) == []


def test_template_carries_only_what_its_flows_have():
    vlan = {"vlanId", "postVlanId", "dot1qCustomerVlanId"}
    for ip_version in (4, 6):
        found = [set(template.names) & vlan for template in default_templates().of_family[ip_version]]
        assert found == [set(names.split()) for names in VARIANTS]
    ipv4, ipv6 = (set(default_templates().of_family[ip_version][0].names) for ip_version in (4, 6))
    assert "sourceIPv6Address" not in ipv4 and "sourceIPv4Address" not in ipv6
    assert "flowLabelIPv6" not in ipv4 and "flowLabelIPv6" in ipv6


def test_record_is_packed_in_network_byte_order():
    template = default_templates().of_family[4][0]
    assert template.record_octets == sum(field.octets for field in template.fields) == 88
    assert template.dtype.isalignedstruct is False
    assert template.dtype["octetDeltaCount"] == np.dtype(">u8")


def test_tcp_control_bits_of_three_octets_are_refused():
    with pytest.raises(ElementError):
        default_templates(tcp_control_bits_octets=3)


# Template IDs


def test_another_layout_has_another_template_id():
    one, two = default_templates(), default_templates(tcp_control_bits_octets=2)
    layouts = {template.record[2:]: template.template_id for template in (*one.all(), *two.all())}
    assert len(layouts) == len(set(layouts.values())) == 20


def test_layout_has_its_id_whatever_else_there_is():
    wide = [each.template_id for each in default_templates(tcp_control_bits_octets=2).all()]
    ids = TemplateIds()
    build_templates(template_spec("x", ["octetDeltaCount"]), ids=ids)
    wide_default = ["tcpControlBits/2" if field.name == "tcpControlBits" else str(field) for field in DEFAULT.fields]
    spec = template_spec("default by another name", wide_default)
    assert [each.template_id for each in build_templates(spec, ids=ids).all()] == wide


def test_ids_of_two_layouts_that_would_be_one_are_two_and_stay():
    ids, seen = TemplateIds(), {}
    for number in range(1000):
        template_id = ids.id_of(number.to_bytes(4, "big"))
        assert 256 <= template_id <= 65535
        assert seen.setdefault(template_id, number) == number
    assert len(seen) == 1000
    assert [ids.id_of(number.to_bytes(4, "big")) for number in range(1000)] == list(seen)


# Templates of one's own choice


def test_template_has_the_named_elements_in_their_order_with_their_lengths():
    spec = template_spec("x", ["octetDeltaCount/4", "sourceIPv4Address", "flowStartMicroseconds"])
    (template,) = build_templates(spec).of_family[4]
    assert [(field.name, field.octets) for field in template.fields] == [
        ("octetDeltaCount", 4),
        ("sourceIPv4Address", 4),
        ("flowStartMicroseconds", 8),
    ]


def test_other_family_has_the_twin_in_an_elements_place_or_nothing():
    elements = "sourceIPv4Address", "flowLabelIPv6", "icmpTypeCodeIPv6", "packetDeltaCount"
    assert names_of(*elements) == [["sourceIPv4Address", "icmpTypeCodeIPv4", "packetDeltaCount"]]
    assert names_of(*elements, ip_version=6) == [
        ["sourceIPv6Address", "flowLabelIPv6", "icmpTypeCodeIPv6", "packetDeltaCount"]
    ]


def test_both_twins_stay_where_they_are_named():
    elements = "sourceIPv6Address", "packetDeltaCount", "sourceIPv4Address"
    assert names_of(*elements) == [["packetDeltaCount", "sourceIPv4Address"]]
    assert names_of(*elements, ip_version=6) == [["sourceIPv6Address", "packetDeltaCount"]]


def test_flows_without_a_tag_have_records_without_the_elements_of_tags():
    assert names_of("packetDeltaCount", "dot1qCustomerVlanId") == [
        ["packetDeltaCount"],
        ["packetDeltaCount", "dot1qCustomerVlanId"],
    ]


@pytest.mark.parametrize(
    ("elements", "fault"),
    [
        (["octetDeltaCuont"], "octetDeltaCuont is no Information Element; nearest to it: octetDeltaCount"),
        (["bgpNextAdjacentAsNumber"], "bgpNextAdjacentAsNumber is not measured"),
        (["octetDeltaCount/9"], "octetDeltaCount: length 9 is none of 1, 2, 3, 4, 5, 6, 7, 8 (RFC 7011 §6.2)"),
        (["octetDeltaCount/"], "octetDeltaCount/: a length is a number of octets, as in octetDeltaCount/4"),
        (["octetDeltaCount/2"], "octetDeltaCount/2: with less than 4 octets a flow would take too many records"),
        (["sourceIPv4Address/3"], "sourceIPv4Address: length 3 is none of 4 (RFC 7011 §6.2)"),
        (["packetDeltaCount", "packetDeltaCount/4"], "packetDeltaCount is there twice"),
        ([], "no element is named"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(elements: list[str], fault: str):
    with pytest.raises(ElementError) as error:
        template_spec("x", elements)
    assert str(error.value).startswith(fault)


@pytest.mark.parametrize(
    ("elements", "fault"),
    [
        (["flowLabelIPv6"], "IPv4 flows have none of the elements"),
        (["vlanId"], "IPv4 flows that are not tagged have none of the elements"),
    ],
)
def test_template_of_which_some_flows_have_nothing_is_refused(elements: list[str], fault: str):
    with pytest.raises(ElementError, match=fault):
        check_template(template_spec("x", elements), "ipfix")


def test_enterprise_element_is_refused_by_name_where_the_protocol_has_none():
    spec = template_spec("x", ["packetDeltaCount", "otherClassOfServicePacketTotalCount"])
    with pytest.raises(ElementError) as error:
        check_template(spec, "netflow9")
    assert str(error.value).startswith("otherClassOfServicePacketTotalCount: NetFlow v9 has no enterprise-specific")
    with pytest.raises(ElementError) as error:
        check_template(spec, "netflow5")
    assert str(error.value) == "NetFlow v5 has one layout and takes no template"


def test_own_elements_go_out_under_the_number_that_is_configured():
    spec = template_spec("x", ["packetDeltaCount", "otherClassOfServicePacketTotalCount"])
    templates = build_templates(spec, enterprise_number=9000)
    assert [element.key for element in templates.enterprise_elements()] == [(9000, 1)]
    assert templates.all()[0].record.hex().endswith("8001" + "0004" + "00002328")


def test_netflow9_keeps_the_elements_that_one_names_oneself():
    elements = "flowStartMilliseconds", "fragmentFlags", "minimumIpTotalLength", "destinationTransportPort"
    (template,) = build_templates(template_spec("x", elements), NETFLOW9_DIALECT).of_family[4]
    assert [(field.name, field.octets) for field in template.fields] == [
        ("flowStartMilliseconds", 8),
        ("fragmentFlags", 1),
        ("minimumIpTotalLength", 2),
        ("destinationTransportPort", 2),
    ]
    assert "icmp_type_code" in template.columns


@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_element_can_be_in_a_template(name: str):
    spec = template_spec("x", dict.fromkeys(["ipVersion", name]))
    (*_, richest) = build_templates(spec).of_family[6 if MEASURED[name].family == "IPv6" else 4]
    assert name in richest.names


def test_conditions_and_families_are_all_that_elements_may_depend_on():
    assert {each.only for each in MEASURED.values()} <= {"", *CONDITIONS}
    assert {each.family for each in MEASURED.values()} <= {"", "IPv4", "IPv6"}


# What people are told of it


def test_field_table_tells_who_carries_an_element():
    lines = field_table().splitlines()
    assert lines[0] == "| Information Element | ID | Octets | In records of | Meaning |"
    assert "| ipVersion | 60 | 1 | all flows | 4 or 6 |" in lines
    assert any(line.startswith("| flowLabelIPv6 | 31 | 3 | IPv6 flows |") for line in lines)
    assert any(line.startswith("| postVlanId | 59 | 2 | tagged, egress |") for line in lines)
    assert len(lines) == 2 + 34


def test_catalogue_has_every_element_once_with_what_each_protocol_can_carry():
    rows = {row["name"]: row for row in catalogue()}
    assert rows.keys() == MEASURED.keys()
    assert rows["octetDeltaCount"]["protocols"] == ["ipfix", "netflow9", "netflow5"]
    assert rows["flowStartSysUpTime"]["protocols"] == ["ipfix", "netflow9", "netflow5"]
    assert rows["otherClassOfServicePacketTotalCount"]["protocols"] == ["ipfix"]
    assert rows["vlanId"]["protocols"] == ["ipfix", "netflow9"]
    assert all(row["meaning"] and row["id"] == BY_NAME[name].element_id for name, row in rows.items())
