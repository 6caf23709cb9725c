# SPDX-License-Identifier: GPL-2.0-or-later
"""Options Records, and enterprise-specific elements that a Collector learns from them."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from flowexp.protocol import netflow9, typeinfo
from flowexp.protocol import session as limits
from flowexp.protocol.decode import Decoder
from flowexp.protocol.elements import measured
from flowexp.protocol.encoder import TemplateEncoder
from flowexp.protocol.encoders import encoder_for
from flowexp.protocol.ipfix import MessageEncoder
from flowexp.protocol.netflow9 import NETFLOW9_DIALECT
from flowexp.protocol.options import ExportingFacts, Facts, InterfaceFacts, MeteringFacts
from flowexp.protocol.registry import BY_ID, BY_NAME, OWN_ENTERPRISE
from flowexp.protocol.session import Decoded
from flowexp.protocol.template import IPFIX_DIALECT, Field, Templates, default_templates

EXPORT_TIME_S = 1_700_000_000
OURS = "otherClassOfServicePacketTotalCount"


def encoder_of(*names: str, enterprise: int = OWN_ENTERPRISE) -> MessageEncoder:
    elements = [measured(name) for name in names]
    moved = [
        each._replace(element=each.element._replace(enterprise=enterprise)) if each.element.enterprise else each
        for each in elements
    ]
    fields = [Field(each, each.octets) for each in moved]
    templates = Templates({4: fields, 6: fields}, IPFIX_DIALECT)
    return MessageEncoder(observation_domain_id=7, max_message_octets=1452, templates=templates)


def flow(**columns: int) -> dict[str, np.ndarray]:
    names = {"packets": 1, "vlan_tagged": 0, "inner_tagged": 0, "direction": 0, **columns}
    return {
        "src_addr": np.zeros((1, 4), np.uint8),
        **{name: np.array([value], np.uint32) for name, value in names.items()},
    }


def messages(encoder: MessageEncoder) -> list[bytes]:
    """Announcement, then one flow."""
    found = []
    for burst in encoder.announce(EXPORT_TIME_S):
        encoder.commit(burst)
        found.append(bytes(burst.octets))
    found += [bytes(burst.octets) for burst in encoder.encode(flow(packets=5, tos_changes=3), EXPORT_TIME_S)]
    return found


def decoded(*datagrams: bytes, decoder: Decoder | None = None) -> list[Decoded]:
    decoder = decoder or Decoder()
    return [decoder.decode(datagram, "session") for datagram in datagrams]


def test_enterprise_element_is_written_with_bit_and_number_and_read_under_its_name():
    announced, *_, data = decoded(*messages(encoder_of("packetDeltaCount", OURS)))
    assert announced.templates[0][1] == ["packetDeltaCount", OURS]
    assert data.records == [{"packetDeltaCount": 5, OURS: 3}]
    assert data.problems == []


def test_each_enterprise_element_is_told_of_in_an_options_record_and_no_other():
    _, options, _ = decoded(*messages(encoder_of("packetDeltaCount", OURS, enterprise=9000)))
    own = BY_NAME[OURS]
    told = [record for record in options.options_records if "privateEnterpriseNumber" in record]
    assert told == [
        {
            "privateEnterpriseNumber": 9000, "informationElementId": own.element_id, "informationElementDataType": 3,
            "informationElementSemantics": 2, "informationElementUnits": 3, "informationElementName": OURS,
            "informationElementDescription": own.description,
        },
    ]  # fmt: skip


def test_no_options_template_is_announced_that_has_no_record():
    announced, *_ = decoded(*messages(encoder_of("packetDeltaCount")))
    assert [names for _, names in announced.templates] == [
        ["packetDeltaCount"],
        ["packetDeltaCount"],
        ["observationDomainId", "samplingInterval"],
        ["templateId", "flowKeyIndicator"],
        ["observationDomainId", "exportingProcessId", "systemInitTimeMilliseconds"],
    ]


def test_options_data_records_count_in_the_sequence_number():
    encoder = encoder_of("packetDeltaCount", OURS)
    records = 0
    for burst in encoder.announce(EXPORT_TIME_S):
        encoder.commit(burst)
        records += burst.records
    assert encoder.sequence_number == records > 2


FACTS = Facts(
    active_timeout_s=60,
    idle_timeout_s=15,
    metering=MeteringFacts(flows=9, ignored_packets=3, ignored_octets=300),
    exporting=ExportingFacts(2, 2000, 50, 4, 40, 4000),
    exporter_address=bytes([192, 0, 2, 1]),
    interfaces=(InterfaceFacts(2, "eth0", "to the north"), InterfaceFacts(3, "eth1", vrf="blue", vrf_table=10)),
)


def announced_with(encoder: TemplateEncoder, decoder: Decoder, facts: Facts) -> list[Decoded]:
    encoder.facts = facts
    bursts = encoder.announce(EXPORT_TIME_S)
    for burst in bursts:
        encoder.commit(burst)
    return [decoder.decode(bytes(burst.octets), "session") for burst in bursts]


def test_what_the_exporter_is_asked_to_tell_of_itself_is_told():
    seen = announced_with(encoder_of("packetDeltaCount", "protocolIdentifier"), Decoder(), FACTS)
    assert [problem for each in seen for problem in each.problems] == []
    told = [record for each in seen for record in each.options_records]
    metering = {"observationDomainId": 7, "meteringProcessId": 1}
    exporting = {"observationDomainId": 7, "exportingProcessId": 1}
    for expected in (
        {"observationDomainId": 7, "samplingInterval": 1},
        {**metering, "flowActiveTimeout": 60, "flowIdleTimeout": 15},
        {**exporting, "exporterIPv4Address": "192.0.2.1"},
        {**metering, "exportedMessageTotalCount": 2, "exportedFlowRecordTotalCount": 50,
         "exportedOctetTotalCount": 2000},
        {**metering, "observedFlowTotalCount": 9, "ignoredPacketTotalCount": 3, "ignoredOctetTotalCount": 300},
        {**exporting, "notSentFlowTotalCount": 4, "notSentPacketTotalCount": 40, "notSentOctetTotalCount": 4000},
        {"ingressInterface": 2, "interfaceName": "eth0", "interfaceDescription": "to the north"},
        {"ingressInterface": 3, "ingressVRFID": 10, "VRFname": "blue"},
    ):  # fmt: skip
        assert expected in told
    assert [record["flowKeyIndicator"] for record in told if "flowKeyIndicator" in record] == [0b10, 0b10]


def test_an_interface_that_changes_is_told_of_at_once_and_figures_are_not():
    encoder, decoder = encoder_of("packetDeltaCount"), Decoder()
    announced_with(encoder, decoder, FACTS)
    assert encoder.changes(EXPORT_TIME_S) == []
    renamed = InterfaceFacts(2, "wan0", "to the north")
    encoder.facts = FACTS._replace(
        interfaces=(renamed, FACTS.interfaces[1]), metering=MeteringFacts(flows=10, ignored_packets=3, ignored_octets=1)
    )
    told = [record for burst in encoder.changes(EXPORT_TIME_S)
            for record in decoder.decode(bytes(burst.octets), "session").options_records]  # fmt: skip
    assert told == [{"ingressInterface": 2, "interfaceName": "wan0", "interfaceDescription": "to the north"}]


def test_netflow9_is_told_what_it_has_elements_and_scopes_for():
    encoder = netflow9.PacketEncoder(
        observation_domain_id=7, max_message_octets=1452, templates=default_templates(dialect=NETFLOW9_DIALECT)
    )
    seen = announced_with(encoder, Decoder(), FACTS)
    assert [problem for each in seen for problem in each.problems] == []
    told = [record for each in seen for record in each.options_records]
    names = {name for record in told for name in record}
    assert {"samplingInterval", "flowActiveTimeout", "interfaceName", "exportedOctetTotalCount"} <= names
    assert not names & {"flowKeyIndicator", "systemInitTimeMilliseconds", "notSentFlowTotalCount", "VRFname"}


def test_collector_learns_an_unknown_element_whose_template_came_before():
    announced, options, data = decoded(*messages(encoder_of("packetDeltaCount", OURS, enterprise=9000)))
    assert announced.templates[0][1] == ["packetDeltaCount", "enterprise9000.1"]
    assert data.records == [{"packetDeltaCount": 5, OURS: 3}]


def test_collector_knows_a_learned_element_when_a_template_comes_later():
    decoder = Decoder()
    sent = messages(encoder_of("packetDeltaCount", OURS, enterprise=9000))
    *_, again, _, data = decoded(*sent, *sent, decoder=decoder)
    assert again.templates[0][1] == ["packetDeltaCount", OURS]
    assert data.records == [{"packetDeltaCount": 5, OURS: 3}]


def test_what_one_domain_tells_is_not_believed_of_another():
    decoder = Decoder()
    sent = messages(encoder_of("packetDeltaCount", OURS, enterprise=9000))
    decoded(*sent, decoder=decoder)
    assert decoder.decode(sent[0], "another session").templates[0][1] == ["packetDeltaCount", "enterprise9000.1"]


def type_information(**changed: object) -> dict[str, object]:
    names = (*typeinfo.SCOPES, *typeinfo.FIELDS)
    return {**dict(zip(names, (9000, 5, 3, 0, 0, "someCount", "how many"))), **changed}


def test_type_information_is_an_element():
    element = typeinfo.element_of(type_information())
    assert element is not None
    assert (element.key, element.name, element.data_type, element.semantics) == (
        (9000, 5),
        "someCount",
        "unsigned32",
        "default",
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"privateEnterpriseNumber": 0},
        {"informationElementName": "sourceIPv4Address"},
        {"informationElementName": "two words"},
        {"informationElementName": "x" * 129},
        {"informationElementDataType": 24},
        {"informationElementDataType": "03"},
    ],
)
def test_type_information_that_would_mislead_is_not_taken(changed: dict[str, object]):
    assert typeinfo.element_of(type_information(**changed)) is None


def test_every_element_of_the_registry_can_be_told_of():
    for element in BY_ID.values():
        told = typeinfo.element_of(
            dict(zip((*typeinfo.SCOPES, *typeinfo.FIELDS), typeinfo.values(element._replace(enterprise=1, name="x"))))
        )
        assert told is not None and told.data_type == element.data_type


def test_elements_learned_are_bounded_and_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "MAX_ELEMENTS", 2)
    sessions, domain = limits.Sessions(), limits.Domain("session", 10, 7)
    sessions.learn(domain, [type_information(informationElementId=number) for number in (1, 2, 3)])  # type: ignore[list-item]
    assert [sessions.element(domain, (9000, number)) is None for number in (1, 2, 3)] == [True, False, False]


def test_template_with_many_unknown_fields_is_not_read_anew_for_each_that_is_learned():
    specifiers = b"".join(struct.pack(">HHI", 0x8000 | number, 1, 9000) for number in range(1, 5001))
    template = struct.pack(">HH", 300, 5000) + specifiers
    body = struct.pack(">HH", 2, 4 + len(template)) + template
    decoder = Decoder()
    decoder.decode(struct.pack(">HHIII", 10, 16 + len(body), 0, 0, 7) + body, "s")
    sessions, domain = decoder._sessions, limits.Domain("s", 10, 7)
    layout = sessions.layout(domain, 300)
    assert layout is not None and len(layout.unknown) == 5000
    sessions.learn(domain, [type_information(informationElementId=number) for number in range(1, 5001)])  # type: ignore[misc]
    assert layout.unknown == {}
    ((record,), _) = layout.read(memoryview(bytes(5000)))
    assert len(record) == 5000 and "someCount#5000" in record


@pytest.mark.parametrize(
    ("is_random", "interval", "told"),
    [
        (False, 10, {"selectorAlgorithm": 1, "samplingPacketInterval": 1, "samplingPacketSpace": 9}),
        (True, 10, {"selectorAlgorithm": 3, "samplingSize": 1, "samplingPopulation": 10}),
        (True, 1, {"selectorAlgorithm": 1, "samplingPacketInterval": 1, "samplingPacketSpace": 0}),
    ],
)
def test_sampling_is_told_by_the_elements_of_psamp_alone_where_they_are_wanted(is_random, interval, told):
    """RFC 5476 section 6.5.2: scoped by the Selector."""
    encoder = encoder_for("ipfix", observation_domain_id=7, max_message_octets=1452, psamp=True)
    encoder.facts = Facts(sampling_interval=interval, sampling_random=is_random)
    records = [
        record
        for message in decoded(*(bytes(burst.octets) for burst in encoder.announce(EXPORT_TIME_S)))
        for record in message.options_records
    ]
    assert [record for record in records if "selectorId" in record] == [{"selectorId": 1, **told}]
    assert not [record for record in records if "samplingInterval" in record]
