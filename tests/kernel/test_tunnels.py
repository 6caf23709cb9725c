# SPDX-License-Identifier: GPL-2.0-or-later
"""Field group `tunnels`: of a packet in a tunnel the inner one is metered, and its record says which tunnel it was.

The other side: scapy, which built the packets; tshark's innermost headers; and the kernel's own VXLAN device.
"""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from group_meter import Meter
from lab import needs, tcp
from lab.collectors import MessageFile
from lab.flowexp import COMMAND, Exporter
from lab.flows import Counts
from lab.netns import connect, namespaces, veth
from lab.process import CommandFailed, environment, run
from scapy.contrib.geneve import GENEVE
from scapy.contrib.gtp import GTP_U_Header, GTPPDUSessionContainer
from scapy.contrib.mpls import MPLS
from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import ARP, GRE, Dot1Q, Ether
from scapy.layers.ppp import PPP, PPPoE
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw
from scapy.utils import wrpcap

from flowexp.protocol.decode import Decoder

pytestmark = pytest.mark.kernel

OUTER = {4: IP(src="192.0.2.1", dst="192.0.2.2"), 6: IPv6(src="2001:db8::1", dst="2001:db8::2")}
INNER = {
    4: IP(src="10.0.0.1", dst="10.0.0.2", ttl=33) / TCP(sport=40000, dport=443, flags="PA") / Raw(b"x" * 100),
    6: IPv6(src="fd00::1", dst="fd00::2", hlim=33) / UDP(sport=40000, dport=53) / Raw(b"x" * 60),
}
INNER_OCTETS = {4: 140, 6: 108}
LINK = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
BRIDGED = Ether(src="02:00:00:00:00:0a", dst="02:00:00:00:00:0b")
IP_IN_IP, OF_GRE, OF_VXLAN, OF_GENEVE, OF_GTPU, OF_MPLS, OF_PPPOE = range(1, 8)


class Tunnel(NamedTuple):
    headers: Packet
    kind: int
    id: int = 0
    element: str = ""
    value: Any = 0  # of the element in a record


def vxlan(vni: int, port: int = 4789) -> Packet:
    return UDP(sport=50000, dport=port) / VXLAN(vni=vni, flags="Instance") / BRIDGED


def gtpu(teid: int) -> Packet:
    return UDP(sport=2152, dport=2152) / GTP_U_Header(teid=teid)


OVER_IP = {
    "GRE": Tunnel(GRE(), OF_GRE),
    "GRE with key, checksum and sequence": Tunnel(
        GRE(chksum_present=1, key_present=1, seqnum_present=1, key=0xC0FFEE), OF_GRE, 0xC0FFEE, "greKey", 0xC0FFEE
    ),
    "GRE of Ethernet": Tunnel(GRE(proto=0x6558) / BRIDGED, OF_GRE),
    "VXLAN": Tunnel(vxlan(5001), OF_VXLAN, 5001, "layer2SegmentId", 1 << 56 | 5001),
    "VXLAN, Linux's port": Tunnel(vxlan(5001, 8472), OF_VXLAN, 5001, "layer2SegmentId", 1 << 56 | 5001),
    "Geneve": Tunnel(UDP(sport=50000) / GENEVE(vni=77) / BRIDGED, OF_GENEVE, 77, "layer2SegmentId", 77),
    "Geneve with options": Tunnel(
        UDP(sport=50000) / GENEVE(vni=77, optionlen=2, options=b"\1\2\3\4\0\0\0\0") / BRIDGED,
        OF_GENEVE, 77, "layer2SegmentId", 77,
    ),
    "GTP-U": Tunnel(gtpu(0xDEADBEEF), OF_GTPU, 0xDEADBEEF, "gtpuTEid", 0xDEADBEEF),
    "GTP-U of 5G": Tunnel(gtpu(7) / GTPPDUSessionContainer(), OF_GTPU, 7, "gtpuTEid", 7),
}  # fmt: skip
OVER_LINK = {
    "MPLS": Tunnel(MPLS(label=1000, cos=5, s=1), OF_MPLS, 1000 << 4 | 0xB, "mplsTopLabelStackSection", "003e8b"),
    "MPLS, three labels": Tunnel(
        MPLS(label=1, s=0) / MPLS(label=2, s=0) / MPLS(label=3, s=1), OF_MPLS, 1 << 4, "mplsTopLabelStackSection",
        "000010",
    ),
    "MPLS, two labels": Tunnel(
        MPLS(label=0xFFFFF, cos=7, s=0) / MPLS(label=0xABCDE, cos=2, s=1), OF_MPLS, 0xFFFFF << 4 | 0xE,
        "mplsTopLabelStackSection", "fffffe",
    ),
    "MPLS, four labels": Tunnel(
        MPLS(label=1, s=0) / MPLS(label=2, cos=1, s=0) / MPLS(label=3, s=0) / MPLS(label=4, cos=7, s=1),
        OF_MPLS, 1 << 4, "mplsTopLabelStackSection", "000010",
    ),
    "PPPoE": Tunnel(PPPoE(sessionid=9) / PPP(), OF_PPPOE, 9, "pppoeSessionId", 9),
    "PPPoE, tagged": Tunnel(Dot1Q(vlan=7) / PPPoE(sessionid=9) / PPP(), OF_PPPOE, 9, "pppoeSessionId", 9),
}  # fmt: skip


class Sample(NamedTuple):
    """A packet in a tunnel; inner and outer are IP versions, outer 0: none."""

    packet: Packet
    tunnel: Tunnel
    inner: int
    outer: int


def samples() -> Iterator[tuple[str, Sample]]:
    for inner, packet in INNER.items():
        for outer, ip in OUTER.items():
            plain = Tunnel(Packet(), IP_IN_IP)
            yield f"IPv{inner} in IPv{outer}", Sample(ip / packet, plain, inner, outer)
            for name, tunnel in OVER_IP.items():
                sample = Sample(ip / tunnel.headers / packet, tunnel, inner, outer)
                yield f"IPv{inner} in {name} over IPv{outer}", sample
        limited = OUTER[6] / IPv6ExtHdrDestOpt(options=[]) / packet  # where Linux has its encapsulation limit
        yield f"IPv{inner} in IPv6 with an option", Sample(limited, Tunnel(Packet(), IP_IN_IP), inner, 6)
        for name, tunnel in OVER_LINK.items():
            yield f"IPv{inner} in {name}", Sample(tunnel.headers / packet, tunnel, inner, 0)


SAMPLES = dict(samples())


@pytest.fixture(scope="module")
def opened() -> Iterator[Meter]:
    needs.need(needs.bpf())
    made = Meter(["tunnels", "tcp"])
    yield made
    made.process.close()


@pytest.fixture
def meter(opened: Meter) -> Meter:
    for _ in range(2):
        opened.drain()
    return opened


def address(octets: list[int]) -> str:
    return str(ipaddress.ip_address(bytes(octets)))


@pytest.mark.parametrize("name", SAMPLES)
def test_the_inner_packet_is_metered_and_the_tunnel_kept(name: str, meter: Meter) -> None:
    sample = SAMPLES[name]
    for _ in range(3):
        meter.feed(sample.packet)
    (flow,) = meter.drain()
    inner = INNER[sample.inner]
    assert (address(flow["src_addr"]), address(flow["dst_addr"])) == (inner.src, inner.dst)
    assert (flow["src_port"], flow["dst_port"]) == (inner.payload.sport, inner.payload.dport)
    assert (flow["packets"], flow["octets"], flow["max_ttl"]) == (3, 3 * INNER_OCTETS[sample.inner], 33)
    assert (flow["tunnels_kind"], flow["tunnels_id"]) == (sample.tunnel.kind, sample.tunnel.id)
    assert flow["tunnels_ip_version"] == sample.outer
    frame = LINK / sample.packet
    assert flow["ether_type"] == frame[Dot1Q if Dot1Q in frame else Ether].type
    if sample.outer:
        ends = [address(flow[f"tunnels_{end}_addr"][: 4 if sample.outer == 4 else 16]) for end in ("src", "dst")]
        assert ends == [OUTER[sample.outer].src, OUTER[sample.outer].dst]


def test_tunnels_that_differ_in_anything_are_different_flows(meter: Meter) -> None:
    inner = INNER[4]
    elsewhere = IP(src="192.0.2.1", dst="192.0.2.3")
    packets = [
        inner, OUTER[4] / inner, elsewhere / inner, OUTER[6] / inner, OUTER[4] / GRE() / inner,
        *(OUTER[4] / vxlan(vni) / inner for vni in (1, 2, 1 << 8, 1 << 16, 1 << 23)), elsewhere / vxlan(1) / inner,
        *(OUTER[4] / gtpu(teid) / inner for teid in (1, 1 << 24, 1 << 31)),
        *(MPLS(label=16, s=0) / MPLS(label=label, s=1) / inner for label in (100, 101)),
        *(MPLS(label=label, s=0) / MPLS(label=100, s=0) / MPLS(label=200, s=0) / MPLS(label=300, s=1) / inner
          for label in (16001, 24001)),
        *(PPPoE(sessionid=number) / PPP() / inner for number in (1, 2)),
    ]  # fmt: skip
    for packet in packets * 2:
        meter.feed(packet)
    assert [flow["packets"] for flow in meter.drain()] == [2] * len(packets)


def test_what_is_not_the_tunnels_name_makes_no_other_flow(meter: Meter) -> None:
    for ttl in (1, 64):
        meter.feed(MPLS(label=16, s=1, ttl=ttl, cos=ttl % 8) / INNER[4])
        meter.feed(IP(src="192.0.2.1", dst="192.0.2.2", ttl=ttl, tos=ttl) / UDP(sport=ttl, dport=4789)
                   / VXLAN(vni=3, flags="Instance") / BRIDGED / INNER[4])  # fmt: skip
    assert [flow["packets"] for flow in meter.drain()] == [2, 2]


LEFT_AS_THEY_ARE = {
    "a fragment": fragment(OUTER[4] / vxlan(1) / INNER[4], 64)[0],
    "no IP inside": OUTER[4] / vxlan(1) / ARP(),
    "a tag inside": OUTER[4] / vxlan(1) / Dot1Q(vlan=1) / INNER[4],
    "VXLAN without a VNI": OUTER[4] / UDP(dport=4789) / VXLAN(flags=0) / BRIDGED / INNER[4],
    "Geneve's own": OUTER[4] / UDP(sport=50000) / GENEVE(critical=0, reserved=0, proto=0x6558) / Raw(b"\0" * 3),
    "GTP-U's own": OUTER[4] / UDP(dport=2152) / GTP_U_Header(gtp_type=1) / Raw(bytes(40)),
    "PPTP": OUTER[4] / GRE(version=1, proto=0x880B, key_present=1, key=5) / Raw(bytes(40)),
    "cut": OUTER[4] / IP(src="10.0.0.1", dst="10.0.0.2", ihl=4, len=100) / Raw(bytes(10)),
    "nothing inside": OUTER[4] / GRE(proto=0x0800),
    "another port": OUTER[4] / vxlan(1, 4790) / INNER[4],
}


@pytest.mark.parametrize("name", LEFT_AS_THEY_ARE)
def test_what_is_not_certain_is_metered_as_it_is(name: str, meter: Meter) -> None:
    packet = LEFT_AS_THEY_ARE[name]
    meter.feed(packet)
    (flow,) = meter.drain()
    assert (address(flow["src_addr"]), flow["tunnels_kind"]) == ("192.0.2.1", 0)
    assert (flow["packets"], flow["octets"]) == (1, len(packet))


def test_a_tunnel_in_a_tunnel_is_metered_as_the_packet_that_it_is(meter: Meter) -> None:
    packet = OUTER[4] / gtpu(5) / IP(src="10.8.0.1", dst="10.8.0.2") / GRE() / INNER[4]
    meter.feed(packet)
    (flow,) = meter.drain()
    assert (address(flow["src_addr"]), flow["protocol"], flow["tunnels_kind"]) == ("10.8.0.1", 47, OF_GTPU)
    assert flow["octets"] == 20 + 4 + INNER_OCTETS[4]


def test_link_layer_tunnels_without_ip_are_not_ip(meter: Meter) -> None:
    before, _ = meter.process.ledger().not_metered["not_ip"]
    meter.feed(MPLS(label=16, s=1) / Raw(b"\0\0\0\1" + bytes(60)))  # a pseudowire's control word
    meter.feed(PPPoE(sessionid=1) / PPP(proto=0xC021) / Raw(bytes(60)))
    assert meter.drain() == []
    assert meter.process.ledger().not_metered["not_ip"][0] == before + 2


def test_a_frame_cut_at_any_octet_is_metered_inside_or_outside_or_counted(meter: Meter) -> None:
    frames = [bytes(LINK / sample.packet) for sample in SAMPLES.values()]
    for frame in frames:
        for cut in range(14, min(len(frame), 140), 3):
            meter.feed_frame(frame[:cut], wire_octets=len(frame))
    ends = {address(flow["src_addr"]) for flow in meter.drain()}
    assert ends == {"192.0.2.1", "2001:db8::1", "10.0.0.1", "fd00::1"}
    assert meter.process.ledger().missing() == (0, 0)


def test_off_the_outer_packet_is_metered() -> None:
    needs.need(needs.bpf())
    meter = Meter([])
    for name in ("IPv4 in VXLAN over IPv4", "IPv6 in GRE over IPv6", "IPv4 in IPv4"):
        meter.feed(SAMPLES[name].packet)
    assert sorted(flow["protocol"] for flow in meter.drain()) == [4, 17, 47]
    meter.process.close()


# Records, beside tshark's innermost headers


def of_tshark(capture: Path) -> Counter[tuple[str, ...]]:
    """Packets by what the innermost headers say: addresses, ports, IP length."""
    fields = "ip.src ipv6.src ip.dst ipv6.dst tcp.dstport udp.dstport ip.len ipv6.plen".split()
    command: list[str | Path] = ["tshark", "-n", "-r", capture, "-d", "udp.port==8472,vxlan", "-T", "fields"]
    command += ["-E", "occurrence=l", "-E", "separator=;"]
    for field in fields:
        command += ["-e", field]
    found: Counter[tuple[str, ...]] = Counter()
    for line in run(command).splitlines():
        src4, src6, dst4, dst6, tcp_port, udp_port, octets4, octets6 = line.split(";")
        if tcp_port:  # of the packets here only IPv4 has TCP inside
            found[src4, dst4, tcp_port, octets4] += 1
        else:
            found[src6, dst6, udp_port, str(int(octets6) + 40)] += 1
    return found


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The capture of all samples, and what `dump --read` makes of it."""
    needs.need(needs.bpf(), needs.exporter())
    folder = tmp_path_factory.mktemp("tunnels")
    capture, configuration = folder / "all.pcap", folder / "flowexp.toml"
    wrpcap(str(capture), [LINK / sample.packet for sample in SAMPLES.values()])
    configuration.write_text('[fields]\ngroups = ["tunnels"]\n')
    done = subprocess.run(
        [COMMAND, "dump", "-c", configuration, "--read", capture, "--format", "json"],
        capture_output=True, check=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    return capture, [json.loads(line) for line in done.stdout.splitlines()]


def test_inner_counts_equal_tsharks(records: tuple[Path, list[dict[str, Any]]]) -> None:
    needs.need(needs.tools("tshark"))
    capture, found = records
    ours: Counter[tuple[str, ...]] = Counter()
    for record in found:
        version, packets = record["ipVersion"], record["packetDeltaCount"]
        ends = [record[f"{end}IPv{version}Address"] for end in ("source", "destination")]
        octets = record["octetDeltaCount"] // packets
        ours[(*ends, str(record["destinationTransportPort"]), str(octets))] += packets
    assert ours == of_tshark(capture)


def test_records_name_the_tunnel_by_ianas_elements(records: tuple[Path, list[dict[str, Any]]]) -> None:
    of_kind = {"layer2SegmentId", "greKey", "gtpuTEid", "mplsTopLabelStackSection", "pppoeSessionId"}
    told = {
        (record["tunnelType"], record.get("outerSourceIPv4Address") or record.get("outerSourceIPv6Address"),
         *(record[name] for name in sorted(of_kind)))
        for record in records[1]
    }  # fmt: skip
    none = {name: "000000" if name == "mplsTopLabelStackSection" else 0 for name in of_kind}
    expected = set()
    for sample in SAMPLES.values():
        of = {**none, **({sample.tunnel.element: sample.tunnel.value} if sample.tunnel.element else {})}
        source = OUTER[sample.outer].src if sample.outer else None
        expected.add((sample.tunnel.kind, source, *(of[name] for name in sorted(of))))
    assert told == expected


LABELS = ["mplsTopLabelStackSection", *(f"mplsLabelStackSection{number}" for number in (2, 3, 4))]


def stacks_of_tshark(capture: Path) -> Counter[tuple[str, ...]]:
    """Packets by the entries of their stack: label, Exp and S of each, as hexadecimal digits."""
    fields = ("mpls.label", "mpls.exp", "mpls.bottom")
    command: list[str | Path] = ["tshark", "-n", "-r", capture, "-Y", "mpls", "-T", "fields", "-E", "separator=;"]
    for field in fields:
        command += ["-e", field]
    found: Counter[tuple[str, ...]] = Counter()
    for line in run(command).splitlines():
        columns = (column.replace("True", "1").replace("False", "0").split(",") for column in line.split(";"))
        found[tuple(f"{int(of, 0) << 4 | int(exp) << 1 | int(s):06x}" for of, exp, s in zip(*columns))] += 1
    return found


def test_label_stacks_are_tsharks(records: tuple[Path, list[dict[str, Any]]]) -> None:
    needs.need(needs.tools("tshark"))
    capture, found = records
    ours: Counter[tuple[str, ...]] = Counter()
    for record in found:
        if record.get("tunnelType") == OF_MPLS:
            stack = [record[name] for name in LABELS if name in record]
            assert len(stack) in (1, 4)
            ours[tuple(entry for entry in stack if entry != "000000")] += record["packetDeltaCount"]
        else:
            assert not record.keys() & {*LABELS[1:]}
    assert ours == stacks_of_tshark(capture)
    assert {len(stack) for stack in ours} == {1, 2, 3, 4}


def test_label_stacks_in_our_messages_are_those_that_tshark_reads(tmp_path: Path) -> None:
    needs.need(needs.bpf(), needs.exporter(), needs.tools("tshark"))
    capture, configuration, messages = (tmp_path / name for name in ("mpls.pcap", "flowexp.toml", "mpls.ipfix"))
    wrpcap(str(capture), [LINK / sample.packet for sample in SAMPLES.values() if sample.tunnel.kind == OF_MPLS])
    configuration.write_text('[fields]\ngroups = ["tunnels"]\n')
    run([COMMAND, "dump", "-c", configuration, "--read", capture, "--format", "ipfix", "-o", messages])
    told = run(["tshark", "-n", "-r", messages, "-V"])
    entry = re.compile(r"MPLS-Label(\d): (\d+) exp-bits: (\d) (bottom)?")
    stacks: list[list[str]] = []
    for number, label, exp, bottom in entry.findall(told):
        if number == "1":
            stacks.append([])
        if label != "0":
            stacks[-1].append(f"{int(label) << 4 | int(exp) << 1 | bool(bottom):06x}")
    assert Counter(map(tuple, stacks)) == stacks_of_tshark(capture)  # each flow has one packet


# The kernel's own VXLAN, with super-packets


def test_segments_in_the_kernels_vxlan_are_those_of_its_device_and_its_stack(tmp_path: Path) -> None:
    needs.need(needs.kernel(), needs.tools("iperf3", "ethtool"))
    with namespaces("client", "server") as (client, server):
        ends = veth(client, server)
        connect(*ends, ("192.0.2.1/24", "192.0.2.2/24"))
        ends[0].set_offloads(tso=True, gso=True)
        ends[1].set_offloads(gro=True)
        for here, other, inner in ((client, "192.0.2.2", "10.0.0.1/24"), (server, "192.0.2.1", "10.0.0.2/24")):
            try:
                here.ip(*f"link add vx type vxlan id 42 remote {other} dstport 4789 dev eth0".split())
            except CommandFailed as error:
                needs.need(f"no vxlan: {error}")
            here.ip("address", "add", inner, "dev", "vx")
            here.ip("link", "set", "vx", "up")
        at = {namespace: MessageFile(tmp_path / f"{namespace.name}.ipfix") for namespace in (client, server)}
        what: dict[str, Any] = {"interfaces": ["eth0", "vx"], "configuration": {"fields": {"groups": ["tunnels"]}}}
        with (
            Exporter(client, tmp_path, collectors=[at[client].url], **what) as egress,
            Exporter(server, tmp_path, collectors=[at[server].url], **what) as ingress,
        ):
            sent = tcp.iperf3(client, server, tmp_path, to="10.0.0.2", octets="50M")
            assert (egress.stop(), ingress.stop()) == (0, 0)
    assert sent.ip_packets * 5 < sent.segments, "no super-packets were sent; the test shows nothing"
    for exporter, namespace in ((egress, client), (ingress, server)):
        assert exporter.ledger().closes, exporter.log
        inside, outside = of_client(at[namespace])
        assert inside == outside  # on the VXLAN device itself there is no tunnel to be seen
        assert inside.packets == sent.segments


def of_client(file: MessageFile) -> tuple[Counts, Counts]:
    """The TCP packets from the client: those in the tunnel, and those without."""
    decoder, found = Decoder(), {True: Counts(0, 0), False: Counts(0, 0)}
    for message in file.messages():
        for record in decoder.decode(message, None).records:
            if record.get("sourceIPv4Address") != "10.0.0.1" or record["protocolIdentifier"] != 6:
                continue
            in_tunnel = "tunnelType" in record
            if in_tunnel:
                assert (record["layer2SegmentId"], record["tunnelType"]) == (1 << 56 | 42, OF_VXLAN)
                assert record["outerDestinationIPv4Address"] == "192.0.2.2"
            before = found[in_tunnel]
            found[in_tunnel] = Counts(
                before.packets + record["packetDeltaCount"], before.octets + record["octetDeltaCount"]
            )
    return found[True], found[False]
