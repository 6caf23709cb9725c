# SPDX-License-Identifier: GPL-2.0-or-later
"""RFC 7011's wire rules, and RFC 3954's, for Templates of any choice, any values and any number of flows.

Framing is checked by the laboratory's own reader, the records' octets are what scapy cuts out of the Messages, and
what they should be is made here, one value at a time. Fields of variable length, which scapy does not know, are read
by tshark.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from columns import DTYPES, flows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import decoders, framing, needs

from flowexp.metering.biflow import paired
from flowexp.protocol.decode import Decoder
from flowexp.protocol.elements import MEASURED, Columns
from flowexp.protocol.encoder import MessageSizeError, system_init_s
from flowexp.protocol.encoders import encoder_for
from flowexp.protocol.ipfix import MessageEncoder
from flowexp.protocol.netflow9 import NETFLOW9_DIALECT
from flowexp.protocol.registry import IANA, OWN_ENTERPRISE, ElementError
from flowexp.protocol.template import IPFIX_DIALECT, Field, Templates, TemplateSpec, build_templates, template_spec

EXPORT_TIME_S = 1_790_000_000
MODULUS = 1 << 32
DIALECTS = {"ipfix": IPFIX_DIALECT, "netflow9": NETFLOW9_DIALECT}
KNOWN = {name for names in DTYPES.values() for name in names.split()} | {
    "src_addr", "dst_addr", "next_hop", "src_mac", "dst_mac", "system_init_ns", "export_ns"
}  # fmt: skip
NAMES = sorted(
    name for name, each in MEASURED.items() if each.element.enterprise == IANA and KNOWN.issuperset(each.columns)
)
unhurried = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def specs(draw: st.DrawFn) -> TemplateSpec:
    """Any elements in any order, in any length that they may have."""
    texts = []
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=25, unique=True)):
        lengths = [each for each in (*MEASURED[name].element.type.shorter, MEASURED[name].octets) if each >= 4]
        texts.append(f"{name}/{draw(st.sampled_from(lengths))}" if lengths and draw(st.booleans()) else name)
    return template_spec("own", ["packetDeltaCount", *(text for text in texts if "packetDeltaCount" not in text)])


def random_flows(count: int, version: int, seed: int) -> Columns:
    """Any value in every column, small ones often; times are within those that any element can have."""
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = dict(flows(count, version=version))
    for name, column in columns.items():
        if column.dtype.kind == "u":
            values = random.integers(0, np.iinfo(column.dtype).max, column.shape, column.dtype, endpoint=True)
            columns[name] = values >> random.integers(0, 8 * column.itemsize, column.shape, column.dtype)
    for name in ("packets", "octets"):  # more would be thousands of records a flow
        columns[name] = columns[name] % np.uint64(1 << 34)
    for name in ("vlan_tagged", "inner_tagged"):
        columns[name] = random.integers(0, 2, count).astype(bool)
    columns["direction"] = columns["direction"] & 1
    columns["ip_version"][:] = version
    columns["start_ns"] = EXPORT_TIME_S * 10**9 - random.integers(0, 10**14, count)
    columns["end_ns"] = columns["start_ns"] + random.integers(0, 10**12, count)
    columns["began_ns"] = columns["start_ns"]
    half = count // 2  # the answers of the first ones
    for one, other in (("src", "dst"), ("dst", "src")):
        for what in ("addr", "port"):
            columns[f"{one}_{what}"][half : 2 * half] = columns[f"{other}_{what}"][:half]
    columns["protocol"][half : 2 * half] = columns["protocol"][:half]
    return columns


def octets_of(field: Field, columns: Columns) -> list[bytes]:
    """A field of each row, as RFC 7011 section 6 has it."""
    values = field.measured.element.type.wire(field.measured.values(columns))
    if values.dtype.kind == "V":
        return [value.tobytes() for value in values]
    most, semantics = (1 << 8 * field.octets) - 1, field.measured.element.semantics
    shorten = {"flags": lambda value: value & most, "identifier": lambda value: 0 if value > most else value}
    short = shorten.get(semantics, lambda value: min(value, most))
    return [short(int(value)).to_bytes(field.octets, "big") for value in values.tolist()]


def expected(templates: Templates, columns: Columns) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    """Template ID and fields of every Data Record."""
    same = {"system_init_ns": system_init_s(EXPORT_TIME_S), "export_ns": EXPORT_TIME_S}
    wide = {name: np.full(len(columns["packets"]), s * 10**9, np.int64) for name, s in same.items()}
    for template, rows in templates.partition(columns):
        chosen = {name: column[rows] for name, column in {**columns, **wide}.items()}
        for record in zip(*(octets_of(field, chosen) for field in template.fields)):
            yield template.template_id, record


def check_ipfix(messages: Sequence[bytes], sequence_number: int) -> None:
    """Sections 3.1 to 3.4: Lengths, Set IDs, padding; and the Sequence Number counts the Data Records before."""
    session = framing.Session()
    for message in map(session.read, messages):
        assert message.sequence_number == sequence_number
        sequence_number = (sequence_number + message.data_records) % MODULUS


def check_netflow9(messages: Sequence[bytes], sequence_number: int) -> None:
    """RFC 3954 section 5: the Sequence Number counts the Packets before, and FlowSets end at 32 bits."""
    for number, message in enumerate(messages):
        assert int.from_bytes(message[12:16], "big") == (sequence_number + number) % MODULUS
        at = 20
        while at < len(message):
            length = int.from_bytes(message[at + 2 : at + 4], "big")
            assert length % 4 == 0 and 4 < length <= len(message) - at
            at += length
        assert at == len(message)


@pytest.mark.parametrize(("protocol", "biflow"), [("ipfix", False), ("ipfix", True), ("netflow9", False)])
@given(
    spec=specs(),
    count=st.one_of(st.integers(0, 5), st.integers(0, 400)),
    version=st.sampled_from([4, 6]),
    seed=st.integers(0, MODULUS - 1),
    max_message_octets=st.integers(512, 9000),
    sequence_number=st.one_of(st.integers(0, MODULUS - 1), st.integers(MODULUS - 50, MODULUS - 1)),
)
@unhurried
def test_any_templates_and_flows_make_messages_that_others_read_exactly(
    protocol: str,
    biflow: bool,
    spec: TemplateSpec,
    count: int,
    version: int,
    seed: int,
    max_message_octets: int,
    sequence_number: int,
) -> None:
    try:
        templates = build_templates(spec, DIALECTS[protocol], biflow=biflow)
        encoder = encoder_for(
            protocol, observation_domain_id=7, max_message_octets=max_message_octets, template=spec,
            sequence_number=sequence_number, biflow=biflow,
        )  # fmt: skip
    except (ElementError, MessageSizeError):
        return  # refused at start
    columns = random_flows(count, version, seed)
    if biflow:
        columns = paired(columns, templates.reverse_columns)
    rows = encoder.as_records(columns)
    for name in ("packets", "octets"):
        assert rows[name].sum() == columns[name].sum()
    messages = []
    for make in (encoder.announce, lambda time_s: encoder.encode(rows, time_s)):
        for burst in make(EXPORT_TIME_S):
            for message in burst.split(1):
                encoder.commit(message)
                messages.append(bytes(message.octets))
    assert all(len(message) <= max_message_octets for message in messages)
    (check_ipfix if protocol == "ipfix" else check_netflow9)(messages, sequence_number)
    assert Counter(decoders.octets_of(messages)) == Counter(expected(templates, rows))


CHARACTERS = "aZ09 äß€𝄞"  # of one to four octets
SHORT_FORM_OCTETS, MOST_TOLD_OCTETS = 254, 255
ANY_TEXT = st.one_of(
    st.text(CHARACTERS, max_size=20),
    st.builds(lambda length, end: "x" * length + end, st.integers(245, 260), st.text(CHARACTERS, max_size=5)),
)
LONG_TEXT = st.one_of(ANY_TEXT, st.integers(255, 900).map("y".__mul__))


def variable(text: str, *, long: bool = False) -> bytes:
    """Section 7: an octet with the length or, which any length may have, 255 and two octets."""
    content = text.encode()
    is_long = long or len(content) > SHORT_FORM_OCTETS
    return (b"\xff" + struct.pack(">H", len(content)) if is_long else bytes([len(content)])) + content


def cut(text: str) -> str:
    """As many whole characters as there is room for."""
    while len(text.encode()) > MOST_TOLD_OCTETS:
        text = text[:-1]
    return text


def test_texts_of_any_length_are_written_in_the_form_for_their_length_and_others_read_them(tmp_path: Path) -> None:
    """By what is told of elements of enterprises (RFC 5610): their names and descriptions."""
    needs.need(needs.tools("tshark"))
    own = next(each for each in MEASURED.values() if each.element.enterprise == OWN_ENTERPRISE)
    sent: list[bytes] = []
    told: list[str] = []

    @given(descriptions=st.lists(ANY_TEXT, min_size=1, max_size=12), max_message_octets=st.integers(512, 1500))
    @unhurried
    def check(descriptions: list[str], max_message_octets: int) -> None:
        elements = [
            own.element._replace(element_id=number, name=f"own{number}", description=text)
            for number, text in enumerate(descriptions, 1)
        ]
        fields = [Field(own._replace(element=element), own.octets) for element in elements]
        encoder = MessageEncoder(
            observation_domain_id=len(sent),
            max_message_octets=max_message_octets,
            templates=Templates({4: fields, 6: fields}, IPFIX_DIALECT),
        )
        messages = [bytes(each.octets) for burst in encoder.announce(EXPORT_TIME_S) for each in burst.split(1)]
        assert all(len(message) <= max_message_octets for message in messages)
        check_ipfix(messages, 0)
        decoder, expected = Decoder(), [cut(text) for text in descriptions]
        records = [record for each in messages for record in decoder.decode(each, "session").options_records]
        found = [each["informationElementDescription"] for each in records if "informationElementDescription" in each]
        assert found == expected
        for number, text in enumerate(expected, 1):
            assert any(variable(f"own{number}") + variable(text) in message for message in messages)
        sent.extend(messages)
        told.extend(expected)

    check()
    assert decoders.dissect(sent, tmp_path).objections == []
    assert decoders.texts(sent, tmp_path, "cflow.information_element_description") == [*filter(None, told)]


def test_texts_of_any_length_are_read_in_either_form_as_others_read_them(tmp_path: Path) -> None:
    needs.need(needs.tools("tshark"))
    sent: list[bytes] = []
    told: list[str] = []
    template = struct.pack(">8H", 400, 3, 371, 65535, 1, 3, 82, 65535)  # userName, octetDeltaCount, interfaceName

    @given(
        records=st.lists(
            st.tuples(LONG_TEXT, st.booleans(), st.integers(0, (1 << 24) - 1), LONG_TEXT, st.booleans()),
            min_size=1,
            max_size=12,
        ),
        padding=st.integers(0, 3),  # less than a record's shortest, 5 octets
    )
    @unhurried
    def check(records: list[tuple[str, bool, int, str, bool]], padding: int) -> None:
        content = b"".join(
            variable(user, long=user_long) + octets.to_bytes(3, "big") + variable(interface, long=interface_long)
            for user, user_long, octets, interface, interface_long in records
        ) + bytes(padding)
        sets = [struct.pack(">2H", set_id, 4 + len(each)) + each for set_id, each in ((2, template), (400, content))]
        body = b"".join(sets)
        message = struct.pack(">2H3I", 10, 16 + len(body), EXPORT_TIME_S, 0, len(sent)) + body
        assert framing.Session().read(message).data_records == len(records)
        decoded = Decoder().decode(message, "session")
        assert decoded.problems == []
        assert decoded.records == [
            {"userName": user, "octetDeltaCount": octets, "interfaceName": interface}
            for user, _, octets, interface, _ in records
        ]
        sent.append(message)
        told.extend(user for user, *_ in records)

    check()
    assert decoders.texts(sent, tmp_path, "cflow.user_name") == [*filter(None, told)]
