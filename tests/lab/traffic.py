# SPDX-License-Identifier: GPL-2.0-or-later
"""Traffic whose every octet is known beforehand: captures made with numpy, and tcpreplay to send them.

A capture comes with the table of its flows, counted from the numbers that the frames were made of, not
from the frames. Flows of one stack differ in as little as one field: eight of them share their addresses
and tell themselves apart by source port, by ICMP type and code, or by VLAN id.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .flows import Counts, FlowKey, FlowTable
from .netns import Link

ETHERTYPE = {4: 0x0800, 6: 0x86DD}
TPID_8021Q = 0x8100
TPID_8021AD = 0x88A8
TCP, UDP = 6, 17
ICMP = {4: 1, 6: 58}
MIN_FRAME = 60
VARIANTS = 8
FIRST_PORT = 1024
FIRST_VLAN = 100
INNER_VLAN = 7
TCP_FLAGS = np.array([0x02, 0x12, 0x10, 0x10, 0x18, 0x18, 0x11, 0x14, 0x38, 0xC2, 0x50], dtype=np.uint8)

PCAP_HEADER = np.dtype(
    [("magic", "<u4"), ("major", "<u2"), ("minor", "<u2"), ("zone", "<u4"), ("sigfigs", "<u4"),
     ("snap", "<u4"), ("link_type", "<u4")]
)  # fmt: skip
PCAP_RECORD = np.dtype([("s", "<u4"), ("us", "<u4"), ("captured", "<u4"), ("length", "<u4")])
LINKTYPE_ETHERNET = 1

IP_HEADER = {
    4: np.dtype(
        [("version_ihl", "u1"), ("tos", "u1"), ("length", ">u2"), ("id", ">u2"), ("fragment", ">u2"),
         ("ttl", "u1"), ("protocol", "u1"), ("checksum", ">u2"), ("src", "u1", 4), ("dst", "u1", 4)]
    ),
    6: np.dtype(
        [("version_class_label", ">u4"), ("length", ">u2"), ("protocol", "u1"), ("ttl", "u1"),
         ("src", "u1", 16), ("dst", "u1", 16)]
    ),
}  # fmt: skip
ICMP_HEADER = np.dtype([("type", "u1"), ("code", "u1"), ("checksum", ">u2"), ("rest", ">u4")])
TRANSPORT_HEADER = {
    TCP: np.dtype(
        [("src_port", ">u2"), ("dst_port", ">u2"), ("sequence", ">u4"), ("ack", ">u4"), ("offset", "u1"),
         ("flags", "u1"), ("window", ">u2"), ("checksum", ">u2"), ("urgent", ">u2")]
    ),
    UDP: np.dtype([("src_port", ">u2"), ("dst_port", ">u2"), ("length", ">u2"), ("checksum", ">u2")]),
    ICMP[4]: ICMP_HEADER,
    ICMP[6]: ICMP_HEADER,
}  # fmt: skip
ICMP_TYPES = {4: (8, 0), 6: (128, 129)}


@dataclass(frozen=True)
class Stack:
    """What a frame is made of between Ethernet and payload; `tags` are TPIDs, the outer one first."""

    ip_version: int
    protocol: int
    tags: tuple[int, ...] = ()

    @property
    def header(self) -> np.dtype:
        """The frame up to its payload."""
        tags = [field for i in range(len(self.tags)) for field in ((f"tpid{i}", ">u2"), (f"tci{i}", ">u2"))]
        return np.dtype(
            [("dst_mac", "u1", 6), ("src_mac", "u1", 6), *tags, ("ethertype", ">u2"),
             ("ip", IP_HEADER[self.ip_version]), ("transport", TRANSPORT_HEADER[self.protocol])]
        )  # fmt: skip


STACKS = tuple(
    Stack(version, protocol, tags)
    for version in (4, 6)
    for protocol in (TCP, UDP, ICMP[version])
    for tags in ((), (TPID_8021Q,), (TPID_8021AD, TPID_8021Q))
)


@dataclass(frozen=True)
class Capture:
    """A pcap file of Ethernet frames, and what is in it."""

    path: Path
    flows: FlowTable


@dataclass(frozen=True)
class _Flows:
    """The flows of one stack, column by column."""

    stack: Stack
    src: np.ndarray
    dst: np.ndarray
    src_port: np.ndarray
    icmp_type_code: np.ndarray
    vlan_id: np.ndarray


def _flows_of(stack: Stack, *, number: int, count: int) -> _Flows:
    """`count` flows of the stack; `number` sets their addresses apart from those of other stacks."""
    index = np.arange(count)
    host, variant = index // VARIANTS, index % VARIANTS
    zero = np.zeros(count, dtype=np.int64)
    is_icmp = stack.protocol == ICMP[stack.ip_version]
    types = np.array(ICMP_TYPES[stack.ip_version])
    own = 0 if stack.tags else 1
    return _Flows(
        stack,
        src=_addresses(stack.ip_version, network=1, number=number, host=host),
        dst=_addresses(stack.ip_version, network=2, number=number, host=host),
        src_port=zero if is_icmp else FIRST_PORT + variant * own,
        icmp_type_code=(types[variant % 2 * own] * 256 + variant // 2 * own) if is_icmp else zero,
        vlan_id=FIRST_VLAN + variant if stack.tags else zero,
    )


def _addresses(version: int, *, network: int, number: int, host: np.ndarray) -> np.ndarray:
    """198.18.0.0/15 (RFC 2544) or fd00::/16 as an array (n, 4) or (n, 16) of octets, network order."""
    octets = np.zeros((len(host), 4 if version == 4 else 16), dtype=np.uint8)
    octets[:, :2] = (198, 17 + network) if version == 4 else (0xFD, network)
    octets[:, -1] = host % 256
    octets[:, -2] = (host // 256 + number * 8) % 256
    return octets


def _dst_port(stack: Stack) -> int:
    return {TCP: 443, UDP: 53}.get(stack.protocol, 0)


def _keys(flows: _Flows) -> list[FlowKey]:
    protocol, dst_port = flows.stack.protocol, _dst_port(flows.stack)
    return [
        FlowKey(str(ipaddress.ip_address(src.tobytes())), str(ipaddress.ip_address(dst.tobytes())), protocol,
                int(port), dst_port, int(type_code), int(vlan))
        for src, dst, port, type_code, vlan in zip(
            flows.src, flows.dst, flows.src_port, flows.icmp_type_code, flows.vlan_id
        )
    ]  # fmt: skip


def _mac(text: str) -> np.ndarray:
    return np.array([int(octet, 16) for octet in text.split(":")], dtype=np.uint8)


def _internet_checksum(headers: np.ndarray) -> np.ndarray:
    """RFC 1071 over each row; the rows are contiguous and of even length."""
    words = headers.view(np.uint8).reshape(len(headers), -1, 2).astype(np.uint32)
    sums = (words[:, :, 0] * 256 + words[:, :, 1]).sum(axis=1)
    for _ in range(2):
        sums = (sums & 0xFFFF) + (sums >> 16)
    return ~sums & 0xFFFF


def _ip_headers(flows: _Flows, which: np.ndarray, *, length: np.ndarray) -> np.ndarray:
    """The IP headers of packets of the flows `which`; `length` is what the packet's IP length shall be."""
    header = np.zeros(len(which), dtype=IP_HEADER[flows.stack.ip_version])
    header["protocol"] = flows.stack.protocol
    header["ttl"] = 64
    header["src"], header["dst"] = flows.src[which], flows.dst[which]
    if flows.stack.ip_version == 4:
        header["version_ihl"] = 0x45
        header["length"] = length
        header["checksum"] = _internet_checksum(header)
    else:
        header["version_class_label"] = 6 << 28
        header["length"] = length - header.dtype.itemsize
    return header


def _transport_headers(flows: _Flows, which: np.ndarray, *, length: np.ndarray, tcp_flags: np.ndarray) -> np.ndarray:
    """The transport headers, checksums left 0; `length` is theirs and their payload's."""
    stack = flows.stack
    header = np.zeros(len(which), dtype=TRANSPORT_HEADER[stack.protocol])
    if stack.protocol == ICMP[stack.ip_version]:
        header["type"], header["code"] = flows.icmp_type_code[which] >> 8, flows.icmp_type_code[which] & 255
        return header
    header["src_port"], header["dst_port"] = flows.src_port[which], _dst_port(stack)
    if stack.protocol == UDP:
        header["length"] = length
    else:
        header["offset"], header["flags"], header["window"] = 5 << 4, tcp_flags, 1024
    return header


def _frames(
    flows: _Flows, which: np.ndarray, *, payload: np.ndarray, tcp_flags: np.ndarray, macs: tuple[str, str]
) -> np.ndarray:
    """The frames' headers, one row a packet; `macs` are source and destination."""
    stack = flows.stack
    header = np.zeros(len(which), dtype=stack.header)
    header["src_mac"], header["dst_mac"] = _mac(macs[0]), _mac(macs[1])
    for i, tpid in enumerate(stack.tags):
        header[f"tpid{i}"] = tpid
        header[f"tci{i}"] = flows.vlan_id[which] if i == 0 else INNER_VLAN
    header["ethertype"] = ETHERTYPE[stack.ip_version]
    transport_length = payload + TRANSPORT_HEADER[stack.protocol].itemsize
    header["ip"] = _ip_headers(flows, which, length=transport_length + IP_HEADER[stack.ip_version].itemsize)
    header["transport"] = _transport_headers(flows, which, length=transport_length, tcp_flags=tcp_flags)
    return header


def _scatter(out: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> None:
    """Writes each row of a structured array to its own offset in `out`."""
    octets = rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
    out[offsets[:, None] + np.arange(rows.dtype.itemsize)] = octets


def make_capture(
    path: Path,
    *,
    packets: int,
    flows: int,
    macs: tuple[str, str],
    stacks: Sequence[Stack] = STACKS,
    seed: int = 1,
) -> Capture:
    """A capture of `packets` Ethernet frames in `flows` flows, in random order; `macs`: source, destination.

    Every flow has at least one packet, and the first flows have most. Payloads are 0 to 120 octets,
    one in fifty 1,400; short frames are padded to 60 octets. One packet a microsecond.
    """
    random = np.random.default_rng(seed)
    weight = 1 / np.sqrt(np.arange(1, flows + 1))
    flow = np.concatenate([np.arange(flows), random.choice(flows, packets - flows, p=weight / weight.sum())])
    random.shuffle(flow)
    payload = np.where(random.random(packets) < 0.02, 1400, random.integers(0, 121, packets))
    tcp_flags = random.choice(TCP_FLAGS, packets)

    stack_of = flow % len(stacks)
    header_size = np.array([stack.header.itemsize for stack in stacks])
    length = np.maximum(header_size[stack_of] + payload, MIN_FRAME)
    ends = PCAP_HEADER.itemsize + np.cumsum(length + PCAP_RECORD.itemsize)
    starts = ends - length

    out = np.zeros(int(ends[-1]), dtype=np.uint8)
    _scatter(out, np.zeros(1, dtype=np.int64), _pcap_header())
    _scatter(out, starts - PCAP_RECORD.itemsize, _pcap_records(length))
    table: FlowTable = {}
    for number, stack in enumerate(stacks):
        mine = np.flatnonzero(stack_of == number)
        which = flow[mine] // len(stacks)
        columns = _flows_of(stack, number=number, count=len(range(number, flows, len(stacks))))
        rows = _frames(columns, which, payload=payload[mine], tcp_flags=tcp_flags[mine], macs=macs)
        _scatter(out, starts[mine], rows)
        link_header = 14 + 4 * len(stack.tags)
        octets = header_size[number] - link_header + payload[mine]
        table.update(_count(columns, which, octets=octets, tcp_flags=tcp_flags[mine]))
    out.tofile(path)
    return Capture(path, table)


def _pcap_header() -> np.ndarray:
    return np.array([(0xA1B2C3D4, 2, 4, 0, 0, 65535, LINKTYPE_ETHERNET)], dtype=PCAP_HEADER)


def _pcap_records(length: np.ndarray) -> np.ndarray:
    records = np.zeros(len(length), dtype=PCAP_RECORD)
    records["s"], records["us"] = np.divmod(np.arange(len(length)), 1_000_000)
    records["captured"] = records["length"] = length
    return records


def _count(flows: _Flows, which: np.ndarray, *, octets: np.ndarray, tcp_flags: np.ndarray) -> dict[FlowKey, Counts]:
    """What the packets add up to, flow by flow."""
    keys = _keys(flows)
    packets = np.bincount(which, minlength=len(keys))
    sums = np.zeros(len(keys), dtype=np.int64)
    np.add.at(sums, which, octets)
    flags = np.zeros(len(keys), dtype=np.uint8)
    if flows.stack.protocol == TCP:
        np.bitwise_or.at(flags, which, tcp_flags)
    return {key: Counts(int(p), int(o), int(f)) for key, p, o, f in zip(keys, packets, sums, flags)}


def replay(link: Link, capture: Capture | Path) -> int:
    """Sends a capture from `link` as fast as it goes; returns how many frames the link says it sent."""
    path = capture.path if isinstance(capture, Capture) else capture
    before = link.counters()["tx_packets"]
    report = link.namespace.run(
        "tcpreplay", "-i", link.name, "--topspeed", "--preload-pcap", "--no-flow-stats", path, timeout_s=300
    )
    failed = re.search(r"Failed packets:\s+(\d+)", report)
    if failed is None or int(failed.group(1)):
        raise RuntimeError(f"tcpreplay could not send all of {path}: {report}")
    return link.counters()["tx_packets"] - before


def send_frames(link: Link, frames: Sequence[bytes]) -> None:
    """Sends Ethernet frames (on a device without Ethernet: packets) from `link`, one after the other."""
    with link.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((link.name, 0))
        for frame in frames:
            sender.send(frame)
