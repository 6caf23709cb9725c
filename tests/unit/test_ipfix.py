# SPDX-License-Identifier: GPL-2.0-or-later
"""IPFIX Messages octet by octet, their sizes and Sequence Numbers, and what scapy and tshark make of them."""

from __future__ import annotations

import functools
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from columns import random_columns
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import needs
from wire import golden

from flowexp.protocol.decode import Decoder
from flowexp.protocol.encoder import MessageSizeError
from flowexp.protocol.framing import Burst
from flowexp.protocol.ipfix import MessageEncoder
from flowexp.protocol.record import columns_to_records
from flowexp.protocol.template import default_templates

EXPORT_TIME_S = 1_700_000_000
OPTIONS_RECORDS = 12
"""With no facts but what is always known: sampling, the flow keys of ten Templates, the time that times count from."""


def encoder(*, max_message_octets: int = 1452, sequence_number: int = 0, tcp_octets: int = 1) -> MessageEncoder:
    return MessageEncoder(
        observation_domain_id=7,
        max_message_octets=max_message_octets,
        sequence_number=sequence_number,
        templates=default_templates(tcp_control_bits_octets=tcp_octets),
    )


def address(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), dtype=np.uint8).reshape(1, -1)


def one_flow(**changed: object) -> dict[str, np.ndarray]:
    """The flow of data_ipv4.txt, with other values where they are given."""
    columns = random_columns(1, ip_version=4, seed=0, tags=False)
    values = {
        "src_addr": address("c0000201"), "dst_addr": address("c6336402"), "next_hop": address("cb0071fe"),
        "protocol": 6, "src_port": 49152, "dst_port": 443, "icmp_type_code": 0, "direction": 0,
        "ingress_ifindex": 2, "egress_ifindex": 3, "octets": 5_000_000_000, "packets": 4_000_000,
        "tcp_flags": 0x11B, "tos": 0xB8, "fragment_flags": 0x40, "min_length": 40, "max_length": 1500,
        "min_ttl": 63, "max_ttl": 64, "start_ns": 1_699_999_990_123_456_789,
        "end_ns": 1_699_999_999_456_000_000,
        "end_reason": 3, "src_mac": address("020000000001"), "dst_mac": address("020000000002"),
    }  # fmt: skip
    for name, value in {**values, **changed}.items():
        columns[name] = value if isinstance(value, np.ndarray) else np.array([value], dtype=columns[name].dtype)
    return columns


def two_tags() -> dict[str, np.ndarray]:
    """The flow of data_ipv6_two_tags.txt."""
    return one_flow(
        ip_version=6, src_addr=address("20010db8000000000000000000000001"),
        dst_addr=address("20010db8000000000000000000000002"),
        next_hop=address("fe800000000000000000000000000001"),
        protocol=58, src_port=0, dst_port=0, icmp_type_code=0x8000, flow_label=0xABCDE, tcp_flags=0, tos=0,
        octets=312, packets=3, start_ns=1_699_999_990_000_000_000, end_ns=1_699_999_992_000_000_000,
        end_reason=1,
        ingress_ifindex=0, egress_ifindex=5, direction=1, min_length=104, max_length=104, min_ttl=255,
        max_ttl=255,
        fragment_flags=0, src_mac=address("020000000003"), dst_mac=address("020000000004"),
        vlan_tagged=True, vlan_id=100, inner_tagged=True, inner_vlan_id=200,
    )  # fmt: skip


def messages(bursts: list[Burst]) -> list[bytes]:
    """Every Message, in order."""
    return [bytes(part.octets) for burst in bursts for part in burst.split(1)]


def sequences(octets: list[bytes]) -> list[int]:
    return [struct.unpack_from(">I", message, 8)[0] for message in octets]


def test_message_of_one_ipv4_flow_is_the_golden_one():
    (burst,) = encoder(sequence_number=2**32 - 1).encode(one_flow(), EXPORT_TIME_S)
    assert bytes(burst.octets).hex() == golden("data_ipv4.txt").hex()


def test_message_of_an_ipv6_flow_with_two_tags_at_egress_is_the_golden_one():
    (burst,) = encoder().encode(two_tags(), EXPORT_TIME_S)
    assert bytes(burst.octets).hex() == golden("data_ipv6_two_tags.txt").hex()


def test_announcement_is_the_golden_templates_and_then_the_golden_sampling_record():
    """What follows, of other kinds of Options, is in test_options.py."""
    header, options_header = 16, 4
    templates, *options = encoder(sequence_number=41).announce(EXPORT_TIME_S)
    golden_templates, golden_sampling = golden("announcement.txt"), golden("sampling.txt")
    octets, first = bytes(templates.octets), bytes(options[0].octets)
    end = header + int.from_bytes(golden_templates[header + 2 : header + 4], "big")
    assert octets[4:end].hex() == golden_templates[4:end].hex()  # but for the Message's length
    assert octets[end + options_header :].startswith(golden_templates[end + options_header :])
    assert first[4:].startswith(golden_sampling[4:])
    assert (templates.records, sum(burst.records for burst in options)) == (0, OPTIONS_RECORDS)


def test_announcement_is_divided_where_messages_are_small():
    octets = messages(encoder(max_message_octets=548).announce(EXPORT_TIME_S))
    decoder = Decoder()
    seen = [decoded for message in octets for decoded in [decoder.decode(message, "s")]]
    assert max(map(len, octets)) <= 548
    assert [problem for decoded in seen for problem in decoded.problems] == []
    announced = [number for decoded in seen for number, _ in decoded.templates]
    templates = [template.template_id for template in default_templates().all()]
    assert announced[: len(templates)] == templates
    records = [record for decoded in seen for record in decoded.options_records]
    assert records[0] == {"observationDomainId": 7, "samplingInterval": 1}
    assert len(records) == OPTIONS_RECORDS


def test_nothing_is_sent_for_no_flows():
    assert encoder().encode(random_columns(0, ip_version=4, seed=0), EXPORT_TIME_S) == []


def test_full_messages_are_one_burst_of_equal_size_and_the_rest_another():
    bursts = encoder().encode(random_columns(100, ip_version=4, seed=0, tags=False), EXPORT_TIME_S)
    assert [(burst.count, burst.message_octets, burst.records) for burst in bursts] == [
        (6, 16 + 4 + 16 * 88, 96),
        (1, 16 + 4 + 4 * 88, 4),
    ]
    assert [len(burst.octets) for burst in bursts] == [6 * 1428, 372]


def test_left_over_records_of_several_templates_share_a_message():
    columns = random_columns(3, ip_version=4, seed=0)
    columns["vlan_tagged"][:] = columns["inner_tagged"][:] = [False, True, True]
    columns["inner_tagged"][1], columns["direction"][:] = False, 0
    (burst,) = encoder().encode(columns, EXPORT_TIME_S)
    assert (burst.count, burst.records, burst.rows.tolist()) == (1, 3, [0, 1, 2])
    assert burst.message_octets == 16 + (4 + 88) + (4 + 90) + (4 + 92)


def test_sequence_number_is_that_of_the_data_records_before_and_goes_round():
    meter = encoder(sequence_number=2**32 - 20)
    octets = messages(meter.encode(random_columns(48, ip_version=4, seed=0, tags=False), EXPORT_TIME_S))
    assert sequences(octets) == [2**32 - 20, 2**32 - 4, 12]


def test_sequence_number_advances_by_what_is_committed_alone():
    meter = encoder()
    columns = random_columns(40, ip_version=4, seed=0, tags=False)
    first, second = meter.encode(columns, EXPORT_TIME_S)
    assert meter.sequence_number == 0
    meter.commit(first)
    assert meter.sequence_number == second.sequence == 32
    meter.commit(second)
    assert meter.sequence_number == 40


def test_options_data_record_counts_in_the_sequence_number_and_templates_do_not():
    meter = encoder()
    for burst in meter.announce(EXPORT_TIME_S):
        meter.commit(burst)
    assert meter.sequence_number == OPTIONS_RECORDS


def test_unsent_rows_are_encoded_again_in_smaller_messages_without_a_gap():
    columns = random_columns(1000, ip_version=6, seed=3)
    meter, decoder, received = encoder(), Decoder(), []

    def send(burst: Burst) -> None:
        decoded = decoder.decode(burst.octets, "s")
        assert (decoded.problems, decoded.lost_records) == ([], 0)
        received.extend(decoded.records)
        meter.commit(burst)

    for burst in meter.announce(EXPORT_TIME_S):
        send(burst)
    parts = [part for burst in meter.encode(columns, EXPORT_TIME_S) for part in burst.split(1)]
    sent, unsent = parts[:20], np.sort(np.concatenate([part.rows for part in parts[20:]]))
    for part in sent:
        send(part)
    meter.max_message_octets = 512
    for burst in meter.encode({name: column[unsent] for name, column in columns.items()}, EXPORT_TIME_S):
        assert burst.message_octets <= 512
        for part in burst.split(1):
            send(part)
    assert meter.sequence_number == OPTIONS_RECORDS + 1000
    assert len(received) == 1000
    assert {record["octetDeltaCount"] for record in received} == set(columns["octets"].tolist())


def test_message_size_that_a_record_does_not_fit_is_refused():
    least = encoder(max_message_octets=160)
    assert least.encode(two_tags(), EXPORT_TIME_S)[0].message_octets == 153
    with pytest.raises(MessageSizeError) as error:
        least.max_message_octets = 100
    assert str(error.value) == "Messages of 100 octets: not within 153 and 65535"
    with pytest.raises(MessageSizeError):
        least.max_message_octets = 65536


def test_split_burst_keeps_messages_rows_and_sequence_numbers():
    (burst,) = encoder(sequence_number=5).encode(random_columns(160, ip_version=4, seed=0, tags=False), EXPORT_TIME_S)
    parts = list(burst.split(4))
    assert [(part.count, part.sequence, part.records) for part in parts] == [
        (4, 5, 64),
        (4, 69, 64),
        (2, 133, 32),
    ]
    assert b"".join(part.octets for part in parts) == bytes(burst.octets)
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(160))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 400),
    ip_version=st.sampled_from([4, 6]),
    seed=st.integers(0, 2**32 - 1),
    tags=st.booleans(),
    max_message_octets=st.integers(160, 65535),
    sequence_number=st.integers(0, 2**32 - 1),
    tcp_octets=st.sampled_from([1, 2]),
)
def test_what_is_encoded_is_decoded_again(
    rows: int,
    ip_version: int,
    seed: int,
    tags: bool,
    max_message_octets: int,
    sequence_number: int,
    tcp_octets: int,
):
    columns = random_columns(rows, ip_version=ip_version, seed=seed, tags=tags)
    meter = encoder(max_message_octets=max_message_octets, sequence_number=sequence_number, tcp_octets=tcp_octets)
    decoder, expected = Decoder(), columns_to_records(columns)
    if tcp_octets == 1:
        for record in expected:
            record["tcpControlBits"] &= 0xFF
    found = {}
    for produce in (meter.announce, functools.partial(meter.encode, columns)):
        for burst in produce(EXPORT_TIME_S):
            assert len(burst.octets) == burst.count * burst.message_octets
            assert burst.message_octets <= max_message_octets
            records = []
            for part in burst.split(1):
                decoded = decoder.decode(part.octets, "s")
                assert (decoded.problems, decoded.lost_records, decoded.export_time_s) == (
                    [],
                    0,
                    EXPORT_TIME_S,
                )
                records += decoded.records
            found.update(zip(burst.rows.tolist(), records))
            meter.commit(burst)
    assert [found[row] for row in range(rows)] == expected
    assert meter.sequence_number == (sequence_number + rows + OPTIONS_RECORDS) % 2**32


def datagrams() -> tuple[list[bytes], list[dict[str, object]]]:
    """Announcement and flows of both families with every kind of tags, and the flows in JSON form."""
    meter, octets, flows = encoder(), [], []
    for burst in meter.announce(EXPORT_TIME_S):
        octets += messages([burst])
        meter.commit(burst)
    for ip_version in (4, 6):
        columns = random_columns(100, ip_version=ip_version, seed=ip_version)
        columns["start_ns"] %= EXPORT_TIME_S * 10**9
        columns["end_ns"] = columns["start_ns"] + 10**9
        records = columns_to_records(columns)
        for burst in meter.encode(columns, EXPORT_TIME_S):
            octets += messages([burst])
            flows += [records[row] for row in burst.rows]
            meter.commit(burst)
    return octets, flows


def test_scapy_reads_the_same_values():
    from scapy.layers.inet import IP, UDP
    from scapy.layers.netflow import NetflowDataflowsetV9, NetflowHeader, netflowv9_defragment

    needs.need(needs.scapy_names_fields())
    octets, flows = datagrams()
    packets = [IP(src="127.0.0.1", dst="127.0.0.1") / UDP() / NetflowHeader(message) for message in octets]
    netflowv9_defragment(packets, verb=0)
    records = []
    for packet in packets[2:]:
        layer = packet[NetflowDataflowsetV9]
        while isinstance(layer, NetflowDataflowsetV9):
            records += layer.records
            layer = layer.payload
    assert len(records) == len(flows) == 200
    names = {
        "IN_BYTES": "octetDeltaCount", "IN_PKTS": "packetDeltaCount", "PROTOCOL": "protocolIdentifier",
        "L4_SRC_PORT": "sourceTransportPort", "L4_DST_PORT": "destinationTransportPort",
        "TOS": "ipClassOfService",
        "IPV4_SRC_ADDR": "sourceIPv4Address", "IPV6_DST_ADDR": "destinationIPv6Address",
        "IPV6_FLOW_LABEL": "flowLabelIPv6", "INPUT_SNMP": "ingressInterface", "DIRECTION": "flowDirection",
        "SRC_MAC": "sourceMacAddress", "SRC_VLAN": "vlanId", "DST_VLAN": "postVlanId",
    }  # fmt: skip
    for record, flow in zip(records, flows):
        for scapy_name, name in names.items():
            assert record.fields.get(scapy_name) == flow.get(name), name
        if "dot1qCustomerVlanId" in flow:
            assert int.from_bytes(record.dot1qCustomerVlanId, "big") == flow["dot1qCustomerVlanId"]


def test_tshark_finds_nothing_malformed_and_reads_the_same_values(tmp_path: Path):
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether
    from scapy.utils import wrpcap

    needs.need(needs.tools("tshark"))
    octets, flows = datagrams()
    capture = tmp_path / "ipfix.pcap"
    wrpcap(str(capture), [Ether() / IP(dst="127.0.0.1") / UDP(sport=4739, dport=4739) / part for part in octets])

    def tshark(*arguments: str) -> str:
        command = ["tshark", "-n", "-r", str(capture), "-d", "udp.port==4739,cflow", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert tshark("-Y", "_ws.malformed || _ws.expert || !cflow") == ""
    fields = {
        "cflow.octets": "octetDeltaCount", "cflow.packets": "packetDeltaCount", "cflow.ttl_min": "minimumTTL",
        "cflow.srcport": "sourceTransportPort", "cflow.ipv6flowlabel": "flowLabelIPv6",
        "cflow.vlanid": "vlanId",
        "cflow.post_vlanid": "postVlanId", "cflow.dot1q_customer_vlan_id": "dot1qCustomerVlanId",
    }  # fmt: skip
    for field, name in fields.items():
        values = tshark("-T", "fields", "-e", field).replace(",", " ").split()
        assert [int(value) for value in values] == [flow[name] for flow in flows if name in flow], name
