# SPDX-License-Identifier: GPL-2.0-or-later
"""Which Template a flow gets, and that an ID stands for one layout."""

from __future__ import annotations

import numpy as np
import pytest

from flowexp.protocol.elements import ElementError
from flowexp.protocol.template import VARIANTS, classify, default_templates, field_table


def columns(*flows: tuple[bool, bool, int]) -> dict[str, np.ndarray]:
    """What classification reads: tagged, inner tag, direction of each flow."""
    tagged, inner, direction = zip(*flows)
    return {
        "vlan_tagged": np.array(tagged),
        "inner_tagged": np.array(inner),
        "direction": np.array(direction, dtype=np.uint8),
        "src_addr": np.zeros((len(flows), 4), dtype=np.uint8),
    }


def test_variant_follows_tags_and_direction():
    flows = columns(
        (False, False, 0),
        (False, False, 1),
        (True, False, 0),
        (True, False, 1),
        (True, True, 0),
        (True, True, 1),
    )
    names = [list(VARIANTS)[variant] for variant in classify(flows)]
    assert names == ["untagged", "untagged", "tagged", "tagged, egress", "two tags", "two tags, egress"]


def test_partition_gives_each_row_to_one_template_in_ascending_order():
    flows = columns((True, False, 0), (False, False, 0), (True, False, 0), (True, True, 1))
    parts = {template.template_id: rows.tolist() for template, rows in default_templates().partition(flows)}
    assert parts == {256: [1], 257: [0, 2], 260: [3]}


def test_partition_of_no_flows_is_empty():
    none = {name: column[:0] for name, column in columns((True, False, 0)).items()}
    assert list(default_templates().partition(none)) == []


def test_template_carries_only_what_its_flows_have():
    by_id = {template.template_id: set(template.names) for template in default_templates().all()}
    vlan = {"vlanId", "postVlanId", "dot1qCustomerVlanId"}
    assert [by_id[number] & vlan for number in range(256, 261)] == [set(names.split()) for names in VARIANTS.values()]
    assert [by_id[number] & vlan for number in range(264, 269)] == [set(names.split()) for names in VARIANTS.values()]
    assert "sourceIPv6Address" not in by_id[256] and "sourceIPv4Address" not in by_id[264]
    assert "flowLabelIPv6" not in by_id[256] and "flowLabelIPv6" in by_id[264]


def test_record_is_packed_in_network_byte_order():
    template = default_templates().of_family[4][0]
    assert template.record_octets == sum(field.octets for field in template.fields) == 88
    assert template.dtype.isalignedstruct is False
    assert template.dtype["octetDeltaCount"] == np.dtype(">u8")


def test_another_layout_has_another_template_id():
    one, two = default_templates(), default_templates(tcp_control_bits_octets=2)
    layouts = {template.record[2:]: template.template_id for template in (*one.all(), *two.all())}
    assert len(layouts) == len(set(layouts.values())) == 20
    assert {template.template_id for template in one.all()} == {*range(256, 261), *range(264, 269)}
    assert one.sampling.template_id == 272 and two.sampling.template_id == 304


def test_tcp_control_bits_of_three_octets_are_refused():
    with pytest.raises(ElementError):
        default_templates(tcp_control_bits_octets=3)


def test_field_table_tells_who_carries_an_element():
    lines = field_table(default_templates()).splitlines()
    assert lines[0] == "| Information Element | ID | Octets | In records of | Meaning |"
    assert "| ipVersion | 60 | 1 | all flows | 4 or 6 |" in lines
    assert any(line.startswith("| flowLabelIPv6 | 31 | 3 | IPv6 flows |") for line in lines)
    assert any(line.startswith("| postVlanId | 59 | 2 | tagged, egress |") for line in lines)
    assert len(lines) == 2 + 34
