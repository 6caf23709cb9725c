# SPDX-License-Identifier: GPL-2.0-or-later
"""NetFlow v9 packets octet by octet, their sizes and Sequence Numbers, and that they are read back."""

from __future__ import annotations

import functools
import struct

import numpy as np
import pytest
from columns import random_columns
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ipfix import EXPORT_TIME_S, messages, one_flow, two_tags
from wire import golden

from flowexp.protocol.decode import Decoder
from flowexp.protocol.encoder import UP_TIME_PERIOD_S, Encoder, MessageSizeError, system_init_s
from flowexp.protocol.encoders import encoder_for
from flowexp.protocol.netflow9 import NETFLOW9_DIALECT
from flowexp.protocol.record import columns_to_records
from flowexp.protocol.registry import BY_NAME, IANA
from flowexp.protocol.template import default_templates

INIT_MS = 1000 * system_init_s(EXPORT_TIME_S)
LEFT_OUT = {"fragmentFlags", "dot1qCustomerVlanId"}


def encoder(*, max_message_octets: int = 1452, sequence_number: int = 0, tcp_octets: int = 1) -> Encoder:
    return encoder_for(
        "netflow9",
        observation_domain_id=7,
        max_message_octets=max_message_octets,
        tcp_control_bits_octets=tcp_octets,
        sequence_number=sequence_number,
    )


def recent_columns(rows: int, *, ip_version: int, seed: int, tags: bool = True) -> dict[str, np.ndarray]:
    """Any flows of the last ten days, with ICMP as the meter has it: no ports, or no type."""
    columns = random_columns(rows, ip_version=ip_version, seed=seed, tags=tags)
    for name in ("start_ns", "end_ns"):
        columns[name] = EXPORT_TIME_S * 10**9 - columns[name] % (UP_TIME_PERIOD_S * 10**9)
    is_icmp = columns["icmp_type_code"] % 2 == 0
    columns["icmp_type_code"][~is_icmp] = 0
    columns["src_port"][is_icmp] = columns["dst_port"][is_icmp] = 0
    return columns


def as_netflow9(record: dict[str, object]) -> dict[str, object]:
    """A flow in JSON form with what NetFlow v9 says of it, and how."""
    icmp = [record.pop(name) for name in ("icmpTypeCodeIPv4", "icmpTypeCodeIPv6") if name in record]
    first_ms, last_ms = record.pop("flowStartMilliseconds"), record.pop("flowEndMilliseconds")
    changed = {
        "icmpTypeCodeIPv4": icmp[0],
        "destinationTransportPort": record["destinationTransportPort"] or icmp[0],
        "flowStartSysUpTime": first_ms - INIT_MS,
        "flowEndSysUpTime": last_ms - INIT_MS,
        "minimumIpTotalLength": min(record["minimumIpTotalLength"], 0xFFFF),
        "maximumIpTotalLength": min(record["maximumIpTotalLength"], 0xFFFF),
    }
    return {name: value for name, value in {**record, **changed}.items() if name not in LEFT_OUT}


def header(packet: bytes) -> tuple[int, ...]:
    """Version, Count, System Uptime, UNIX Seconds, Sequence Number, Source ID."""
    return struct.unpack_from(">HHIIII", packet)


def test_packet_of_one_ipv4_flow_is_the_golden_one():
    (burst,) = encoder(sequence_number=2**32 - 1).encode(one_flow(), EXPORT_TIME_S)
    assert bytes(burst.octets).hex() == golden("netflow9_ipv4.txt").hex()


def test_announcement_ends_with_the_golden_options_template_and_sampling_record():
    templates, sampling = messages(encoder(sequence_number=5).announce(EXPORT_TIME_S))
    options_template = golden("netflow9_options_template.txt").hex()
    assert templates.hex().endswith(options_template)
    assert sampling.hex() == golden("netflow9_sampling.txt").hex()
    assert header(templates) == (9, 7, 1_376_000_000, EXPORT_TIME_S, 5, 7)


def test_templates_have_ids_of_their_own_and_no_enterprise_element():
    decoder = Decoder()
    decoded = [decoder.decode(packet, "s") for packet in messages(encoder().announce(EXPORT_TIME_S))]
    assert len(decoded[0].templates) == 6 + 1
    assert not {number for number, _ in decoded[0].templates} & {each.template_id for each in default_templates().all()}
    assert {BY_NAME[name].enterprise for _, names in decoded[0].templates[:6] for name in names} == {IANA}


def test_icmp_is_told_in_the_destination_port_and_in_element_32_for_both_ip_versions():
    decoder, meter = Decoder(), encoder()
    for packet in messages(meter.announce(EXPORT_TIME_S)):
        decoder.decode(packet, "s")
    echo = one_flow(protocol=1, src_port=0, dst_port=0, icmp_type_code=0x0801)
    for columns, type_code in ((echo, 0x0801), (two_tags(), 0x8000)):
        (packet,) = messages(meter.encode(columns, EXPORT_TIME_S))
        (record,) = decoder.decode(packet, "s").records
        assert (record["icmpTypeCodeIPv4"], record["destinationTransportPort"]) == (type_code, type_code)


def test_each_flowset_ends_with_zeros_on_a_multiple_of_four_octets():
    columns = recent_columns(3, ip_version=4, seed=0)
    columns["vlan_tagged"][:], columns["inner_tagged"][:] = [False, True, True], False
    columns["direction"][:] = [0, 0, 1]
    (packet,) = messages(encoder().encode(columns, EXPORT_TIME_S))
    flowsets, at = [], 20
    for record_octets in (75, 77, 79):
        flowset_id, length = struct.unpack_from(">HH", packet, at)
        flowsets.append((flowset_id, length, packet[at + 4 + record_octets : at + length].hex()))
        at += length
    untagged, tagged, tagged_egress = default_templates(dialect=NETFLOW9_DIALECT).of_family[4]
    assert flowsets == [
        (untagged.template_id, 80, "00"),
        (tagged.template_id, 84, "000000"),
        (tagged_egress.template_id, 84, "00"),
    ]
    assert at == len(packet)
    assert header(packet)[1] == 3


def test_full_packets_are_one_burst_and_the_sequence_number_counts_packets():
    meter = encoder(sequence_number=2**32 - 2)
    full, rest = meter.encode(recent_columns(100, ip_version=4, seed=0, tags=False), EXPORT_TIME_S)
    assert [(burst.count, burst.message_octets, burst.records) for burst in (full, rest)] == [
        (5, 20 + 4 + 19 * 75 + 3, 95),
        (1, 20 + 4 + 5 * 75 + 1, 5),
    ]
    packets = messages([full, rest])
    assert [header(packet)[4] for packet in packets] == [2**32 - 2, 2**32 - 1, 0, 1, 2, 3]
    assert [header(packet)[1] for packet in packets] == [19] * 5 + [5]
    assert [part.sequence for part in full.split(2)] == [2**32 - 2, 0, 2]
    meter.commit(next(full.split(2)))
    assert meter.sequence_number == 0


def test_uptime_moves_on_every_ten_days_and_never_wraps():
    moves_at_s = 1968 * UP_TIME_PERIOD_S
    uptimes = []
    for export_time_s in (moves_at_s - 1, moves_at_s, moves_at_s + UP_TIME_PERIOD_S - 1):
        flow = one_flow(start_ns=(export_time_s - UP_TIME_PERIOD_S) * 10**9, end_ns=export_time_s * 10**9)
        (packet,) = messages(encoder().encode(flow, export_time_s))
        _, _, uptime_ms, unix_s, _, _ = header(packet)
        first_ms, last_ms = struct.unpack_from(">II", packet, 24 + 39)
        assert unix_s * 1000 - uptime_ms + last_ms == export_time_s * 1000
        assert last_ms - first_ms == UP_TIME_PERIOD_S * 1000
        uptimes.append(uptime_ms)
    assert uptimes == [2 * 864_000_000 - 1000, 864_000_000, 2 * 864_000_000 - 1000]
    assert max(uptimes) < 2**31


def test_flow_that_claims_to_be_older_than_the_uptime_begins_with_it():
    (packet,) = messages(encoder().encode(one_flow(start_ns=0), EXPORT_TIME_S))
    assert struct.unpack_from(">I", packet, 24 + 39) == (0,)


def test_packet_size_that_a_record_does_not_fit_is_refused():
    with pytest.raises(MessageSizeError) as error:
        encoder(max_message_octets=100)
    assert str(error.value) == "Messages of 100 octets: not within 144 and 65535"


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
    columns = recent_columns(rows, ip_version=ip_version, seed=seed, tags=tags)
    meter = encoder(max_message_octets=max_message_octets, sequence_number=sequence_number, tcp_octets=tcp_octets)
    assert meter.as_records(columns) is columns
    expected = [as_netflow9(record) for record in columns_to_records(columns)]
    for record in expected:
        record["tcpControlBits"] &= 0xFF if tcp_octets == 1 else 0xFFFF
    decoder, found, packets = Decoder(), {}, 0
    for produce in (meter.announce, functools.partial(meter.encode, columns)):
        for burst in produce(EXPORT_TIME_S):
            assert len(burst.octets) == burst.count * burst.message_octets
            assert burst.message_octets <= max_message_octets
            assert burst.message_octets % 4 == 0
            records, packets = [], packets + burst.count
            for part in burst.split(1):
                decoded = decoder.decode(part.octets, "s")
                assert (decoded.problems, decoded.lost_packets) == ([], 0)
                assert header(bytes(part.octets))[1] == sum(
                    map(len, (decoded.records, decoded.options_records, decoded.templates))
                )
                records += decoded.records
            found.update(zip(burst.rows.tolist(), records))
            meter.commit(burst)
    assert [found[row] for row in range(rows)] == expected
    assert meter.sequence_number == (sequence_number + packets) % 2**32
