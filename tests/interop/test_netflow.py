# SPDX-License-Identifier: GPL-2.0-or-later
"""NetFlow v9 and v5 in Collectors that people run: record for record what IPFIX told of the same flows.

One run of the exporter feeds nfcapd, nfacctd and a Recorder in both protocols, and a Recorder in IPFIX, whose
records (as scapy reads them) are what the others are held against; the capture says what was sent. What a
protocol or a Collector cannot carry is taken off the expected records by a function named for it.
"""

from __future__ import annotations

import re
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from lab import decoders, needs
from lab.collectors import Collector, Nfacctd, Nfcapd, Recorder
from lab.collectors import Record as Json
from lab.flowexp import Exporter
from lab.flows import Counts, FlowKey, FlowTable, add_up, differences, total
from lab.netns import namespaces, veth
from lab.traffic import make_capture, replay

from flowexp.protocol.decode import Decoder
from flowexp.protocol.encoders import encoder_for

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

PACKETS, FLOWS = 20_000, 1_800
SOMEBODY_ELSE = "02:00:00:00:00:99"
PROTOCOL_NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58}


class Told(NamedTuple):
    """What one record tells; times in Unix milliseconds, or seconds where a Collector keeps no more."""

    key: FlowKey
    counts: Counts
    start: int
    end: int
    ingress_ifindex: int
    egress_ifindex: int


class Nfdump(Nfcapd):
    """nfcapd, with all that nfdump shows of a record that NetFlow v5 has, too."""

    def told(self) -> Iterator[Told]:
        for record in self.records():
            key, counts = self._flow(record)
            times = [round(datetime.fromisoformat(record[name]).timestamp() * 1000) for name in ("first", "last")]
            yield Told(key, counts, *times, record["input_snmp"], record["output_snmp"])


class NfacctdOfNetflow(Nfacctd):
    """nfacctd with its own idea of the protocol, as custom primitives find nothing in NetFlow v5."""

    configuration = (
        Nfacctd.configuration.replace("tcpflags,", "proto, tcpflags,")
        + """
        nfacctd_renormalize: true
        """
    )

    @staticmethod
    def _flow(record: Json) -> tuple[FlowKey, Counts]:
        ports = record["port_src"], record["port_dst"]
        protocol = PROTOCOL_NUMBERS[record["ip_proto"]]
        key = FlowKey(record["ip_src"], record["ip_dst"], protocol, *ports, vlan_id=record["vlan"])
        return key, Counts(record["packets"], record["bytes"], int(record["tcp_flags"]))

    def told(self) -> Iterator[Told]:
        for record in self.records():
            times = [float(record[name]) for name in ("timestamp_start", "timestamp_end")]
            assert all(time.is_integer() for time in times), "nfacctd keeps milliseconds now: ask for them"
            yield Told(*self._flow(record), *map(int, times), record["iface_in"], record["iface_out"])


class Run(NamedTuple):
    """One run, seen from all sides."""

    sent: FlowTable
    ifindex: int
    exit_status: int
    log: str
    ipfix: list[Told]
    nfcapd: dict[str, Nfdump]
    nfacctd: dict[str, NfacctdOfNetflow]
    packets: dict[str, list[bytes]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "nfacctd", "tcpreplay", "tshark"))
    directory = tmp_path_factory.mktemp("netflow")
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        capture = make_capture(directory / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, SOMEBODY_ELSE))
        with (
            Nfdump(meter, directory) as nfcapd9,
            Nfdump(meter, directory) as nfcapd5,
            NfacctdOfNetflow(meter, directory) as nfacctd9,
            NfacctdOfNetflow(meter, directory) as nfacctd5,
            Recorder(meter) as recorder9,
            Recorder(meter) as recorder5,
            Recorder(meter) as recorder10,
        ):
            by_protocol = {
                "netflow9": (nfcapd9, nfacctd9, recorder9),
                "netflow5": (nfcapd5, nfacctd5, recorder5),
                "ipfix": (recorder10,),
            }
            urls = [f"{each.url}?protocol={name}" for name, collectors in by_protocol.items() for each in collectors]
            with Exporter(meter, directory, collectors=urls) as exporter:
                assert replay(left, capture) == PACKETS
                exit_status = exporter.stop()
            for collector in (nfcapd9, nfcapd5, nfacctd9, nfacctd5):
                collector.finish()
            yield Run(
                capture.flows,
                right.ifindex,
                exit_status,
                exporter.log,
                [as_told(record) for record in decoders.records(recorder10.messages())],
                {"netflow9": nfcapd9, "netflow5": nfcapd5},
                {"netflow9": nfacctd9, "netflow5": nfacctd5},
                {"netflow9": recorder9.messages(), "netflow5": recorder5.messages()},
            )


def as_told(record: decoders.Record) -> Told:
    elements = (decoders.FLOW_START_MS, decoders.FLOW_END_MS, decoders.INGRESS_INTERFACE, decoders.EGRESS_INTERFACE)
    return Told(*decoders.flow_of(record), *(decoders.number(record, element) for element in elements))


# What is not carried: by the protocol, then by the Collector.


def in_netflow5(told: Iterable[Told]) -> Iterator[Told]:
    """No IPv6 and no VLAN."""
    return (each._replace(key=each.key._replace(vlan_id=0)) for each in told if ":" not in each.key.src_addr)


def in_either(protocol: str, told: Iterable[Told]) -> Iterator[Told]:
    return in_netflow5(told) if protocol == "netflow5" else iter(told)


def icmp_in_port(key: FlowKey) -> FlowKey:
    """Type and code are where NetFlow has them: in the destination port."""
    return key._replace(dst_port=key.dst_port or key.icmp_type_code, icmp_type_code=0)


def in_nfacctd(told: Iterable[Told]) -> Iterator[Told]:
    """Of relative times nfacctd keeps whole seconds, rounded up (pmacct 1.7.7, and its sources to this day)."""
    for each in told:
        yield each._replace(key=icmp_in_port(each.key), start=-(-each.start // 1000), end=-(-each.end // 1000))


def summed(told: Iterable[Told]) -> dict[Told, Counts]:
    """As print plugins have it: records that differ in their counters alone are one."""
    sums: dict[Told, Counts] = {}
    for each in told:
        place = each._replace(counts=Counts(0, 0))
        sums[place] = sums.get(place, Counts(0, 0)).plus(each.counts)
    return sums


def check_no_losses(collector: Collector) -> None:
    assert collector.losses() == [], "the Collector itself lost something; its figures prove nothing"


both = pytest.mark.parametrize("protocol", ["netflow9", "netflow5"])


def test_ipfix_told_exactly_what_was_sent(run: Run) -> None:
    assert run.exit_status == 0, run.log
    assert "Traceback" not in run.log
    assert differences(run.sent, add_up((each.key, each.counts) for each in run.ipfix)) == []
    assert {each.ingress_ifindex for each in run.ipfix} == {run.ifindex}


@both
def test_nfcapd_reads_each_record_as_ipfix_has_it_with_its_milliseconds(run: Run, protocol: str) -> None:
    check_no_losses(run.nfcapd[protocol])
    assert Counter(run.nfcapd[protocol].told()) == Counter(in_either(protocol, run.ipfix))


@both
def test_nfacctd_reads_each_record_as_ipfix_has_it_to_the_second(run: Run, protocol: str) -> None:
    check_no_losses(run.nfacctd[protocol])
    assert summed(run.nfacctd[protocol].told()) == summed(in_nfacctd(in_either(protocol, run.ipfix)))


@both
def test_tshark_dissects_every_packet_without_objection(run: Run, protocol: str, tmp_path: Path) -> None:
    dissection = decoders.dissect(run.packets[protocol], tmp_path)
    expected = list(in_either(protocol, run.ipfix))
    assert dissection.objections == []
    assert dissection.records == len(expected)
    assert dissection.packets == sum(each.counts.packets for each in expected)
    assert dissection.octets == sum(each.counts.octets for each in expected)


def test_scapy_reads_each_netflow9_record_as_ipfix_has_it(run: Run) -> None:
    expected = add_up((each.key._replace(dst_port=icmp_in_port(each.key).dst_port), each.counts) for each in run.ipfix)
    assert differences(expected, add_up(map(decoders.flow_of, decoders.records(run.packets["netflow9"])))) == []


def test_scapy_reads_each_netflow5_record_as_ipfix_has_it(run: Run) -> None:
    from scapy.layers.netflow import NetflowHeader, NetflowHeaderV5, NetflowRecordV5

    found = []
    for packet in map(NetflowHeader, run.packets["netflow5"]):
        header, layer = packet[NetflowHeaderV5], packet[NetflowHeaderV5].payload
        init_ms = int(header.unixSecs) * 1000 - header.sysUptime
        while isinstance(layer, NetflowRecordV5):
            key = FlowKey(layer.src, layer.dst, layer.prot, layer.srcport, layer.dstport)
            counts = Counts(layer.dpkts, layer.dOctets, int(layer.tcpFlags))
            found.append(Told(key, counts, init_ms + layer.first, init_ms + layer.last, layer.input, layer.output))
            layer = layer.payload
    expected = (each._replace(key=icmp_in_port(each.key)) for each in in_netflow5(run.ipfix))
    assert Counter(found) == Counter(expected)


def test_our_own_decoder_misses_no_netflow9_packet(run: Run) -> None:
    decoder = Decoder()
    decoded = [decoder.decode(packet, "s") for packet in run.packets["netflow9"]]
    assert [problem for each in decoded for problem in each.problems] == []
    assert sum(each.lost_packets for each in decoded) == 0
    assert sum(len(each.records) for each in decoded) == len(run.ipfix)


def test_ipv6_flows_are_counted_as_not_representable_for_each_netflow5_collector(run: Run) -> None:
    of_ipv6 = sum(":" in each.key.src_addr for each in run.ipfix)
    assert of_ipv6 > 0
    assert re.findall(r", (\d+) flows not representable", run.log) == [str(of_ipv6)] * 3
    assert run.log.count("its protocol has no IPv6") == 3


# What live traffic does not have: large counters, other sampling rates.


def one_flow(*, octets: int, packets: int) -> dict[str, np.ndarray]:
    """One TCP flow, now."""
    names = {
        "u1": "ip_version protocol direction tos fragment_flags min_ttl max_ttl end_reason",
        "u2": "src_port dst_port icmp_type_code vlan_id inner_vlan_id tcp_flags",
        "u4": "ingress_ifindex egress_ifindex tos_changes flow_label min_length max_length",
        "u8": "octets packets octets_total packets_total",
        "i8": "start_ns end_ns",
        "?": "vlan_tagged inner_tagged",
        "(4,)u1": "src_addr dst_addr next_hop",
        "(6,)u1": "src_mac dst_mac",
    }
    columns = {name: np.zeros(1, np.dtype(dtype)) for dtype, each in names.items() for name in each.split()}
    columns["ip_version"][:], columns["protocol"][:] = 4, 6
    columns["octets"][:], columns["packets"][:] = octets, packets
    columns["start_ns"][:] = columns["end_ns"][:] = 1_790_000_000 * 10**9
    return columns


def told_to(kind: type[Collector], directory: Path, packets: Iterable[bytes]) -> Counts:
    """What a Collector makes of these packets."""
    needs.need(needs.namespace_support(), needs.tools("nfcapd", "nfdump", "nfacctd"))
    with namespaces("collector") as (namespace,), kind(namespace, directory) as collector:
        with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for packet in packets:
                sender.sendto(packet, (collector.address, collector.port))
        collector.finish()
        check_no_losses(collector)
        return total(collector.flows())


def packets_of(protocol: str, *, octets: int, packets: int, sampling: int) -> Iterator[bytes]:
    """Announcement and flow, with another sampling interval than the 1 that the encoder writes."""
    encoder = encoder_for(
        protocol, observation_domain_id=7, max_message_octets=1472, tcp_control_bits_octets=1, sequence_number=0
    )
    flow = encoder.as_records(one_flow(octets=octets, packets=packets))
    interval = struct.pack(">I", sampling)
    for burst in encoder.announce(1_790_000_001):
        encoder.commit(burst)
        yield bytes(burst.octets[:-4]) + interval if burst.records else bytes(burst.octets)
    for burst in encoder.encode(flow, 1_790_000_001):
        packet = bytes(burst.octets)
        yield packet[:22] + interval[2:] + packet[24:] if protocol == "netflow5" else packet


@both
@pytest.mark.parametrize("kind", [Nfdump, NfacctdOfNetflow])
def test_a_flow_beyond_32_bits_arrives_whole(kind: type[Collector], protocol: str, tmp_path: Path) -> None:
    octets, packets = 3 * 2**32 + 1, 2**32 + 7
    sent = packets_of(protocol, octets=octets, packets=packets, sampling=1)
    assert told_to(kind, tmp_path, sent)[:2] == (packets, octets)


@both
@pytest.mark.parametrize("kind", [Nfdump, NfacctdOfNetflow])
def test_collectors_scale_by_the_sampling_interval_where_we_write_it(
    kind: type[Collector], protocol: str, tmp_path: Path
) -> None:
    sent = packets_of(protocol, octets=1000, packets=10, sampling=100)
    assert told_to(kind, tmp_path, sent)[:2] == (1000, 100_000)
