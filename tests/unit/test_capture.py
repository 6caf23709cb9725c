# SPDX-License-Identifier: GPL-2.0-or-later
"""Captures in all their forms become Ethernet frames; damaged and hostile ones end in one line."""

from __future__ import annotations

import gzip
import os
import struct
import sys
import tempfile
import tracemalloc
from itertools import chain
from pathlib import Path
from typing import List, Tuple

import captures
import pytest
from captures import Packet, enhanced, interface, obsolete, option, pcap, section, simple
from hypothesis import given, settings
from hypothesis import strategies as st

from flowexp.capture import CutOff, read_capture
from flowexp.errors import FlowexpError, UsageError
from flowexp.kernel.replay import CapturedPacket

TIME_NS = 1_700_000_000_123_456_789
MACS = bytes(range(12))
FRAME = MACS + b"\x08\x00" + b"payload"
PACKET = Packet(FRAME, TIME_NS)
ZERO_MACS = bytes(12)


def packets_of(path: Path) -> List[CapturedPacket]:
    return list(chain.from_iterable(read_capture(path)))


def read(content: bytes) -> List[CapturedPacket]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return packets_of(Path(file.name))


def until_cut_off(path: Path) -> Tuple[List[CapturedPacket], str]:
    """The packets of a capture, and what is said of its damage; "" where there is none."""
    packets: List[CapturedPacket] = []
    try:
        for frames in read_capture(path):
            packets += frames
    except CutOff as error:
        return packets, str(error)
    return packets, ""


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        packets_of(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# pcap


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_a_pcap_in_nanoseconds_keeps_each_of_them(order: str) -> None:
    assert read(pcap([PACKET], order=order)) == [CapturedPacket(TIME_NS, FRAME, len(FRAME), 0)]


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_a_pcap_in_microseconds_is_read_as_such(order: str) -> None:
    (packet,) = read(pcap([PACKET], order=order, nano=False))
    assert packet.time_ns == TIME_NS // 1000 * 1000


def test_packets_come_in_the_order_of_the_file() -> None:
    packets = [Packet(FRAME + bytes([i]), TIME_NS - i) for i in range(100)]
    assert [(p.frame, p.time_ns) for p in read(pcap(packets))] == [(p.data, p.time_ns) for p in packets]


def test_records_may_lie_anywhere_in_what_is_read_at_once() -> None:
    packets = [Packet(FRAME + os.urandom(octets), TIME_NS + octets) for octets in (*range(9_000, 9_300), 3_000_000, 7)]
    for pack in (bytes, gzip.compress):
        assert [(p.frame, p.time_ns) for p in read(pack(pcap(packets)))] == [(p.data, p.time_ns) for p in packets]


def test_a_packet_cut_by_the_snap_length_has_its_length_on_the_wire() -> None:
    (packet,) = read(pcap([Packet(FRAME, wire_octets=1514)]))
    assert (packet.frame, packet.wire_octets) == (FRAME, 1514)


def test_a_wire_length_below_what_was_captured_is_not_believed() -> None:
    (packet,) = read(pcap([Packet(FRAME, wire_octets=3)]))
    assert packet.wire_octets == len(FRAME)


def test_a_frame_check_sequence_noted_beside_the_link_type_is_no_part_of_it() -> None:
    assert len(read(pcap([PACKET], link_type=0x4400_0001))) == 1


def test_a_capture_without_packets_has_none() -> None:
    assert read(pcap([])) == []
    assert read(section()) == []


def test_a_gzipped_capture_is_read_as_if_it_were_not() -> None:
    assert read(gzip.compress(pcap([PACKET] * 3))) == read(pcap([PACKET] * 3))
    assert read(gzip.compress(section() + interface() + enhanced(PACKET))) != []


def test_a_capture_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pipe.open("r+b", buffering=0) as writer:
        writer.write(pcap([PACKET, PACKET]))
        packets = chain.from_iterable(read_capture(pipe))
        assert next(packets) == next(packets) == CapturedPacket(TIME_NS, FRAME, len(FRAME), 0)


# pcapng


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_a_pcapng_interface_has_its_number_plus_one(order: str) -> None:
    blocks = [interface(order=order), interface(order=order)]
    blocks += [enhanced(PACKET, number=number, order=order) for number in (1, 0)]
    time_ns = TIME_NS // 1000 * 1000
    assert read(section(order=order) + b"".join(blocks)) == [
        CapturedPacket(time_ns, FRAME, len(FRAME), 2),
        CapturedPacket(time_ns, FRAME, len(FRAME), 1),
    ]


@pytest.mark.parametrize(
    ("resolution", "ticks", "time_ns"),
    [
        (0, 1_700_000_000, 1_700_000_000_000_000_000),
        (3, 1_700_000_000_123, 1_700_000_000_123_000_000),
        (6, 1_700_000_000_123_456, 1_700_000_000_123_456_000),
        (9, 1_700_000_000_123_456_789, 1_700_000_000_123_456_789),
        (10, 17_000_000_001_234_567_899, 1_700_000_000_123_456_789),
        (0x80 | 1, 3, 1_500_000_000),
        (0x80 | 20, 1_700_000_000 << 20 | 1, 1_700_000_000_000_000_953),
        (127, 1 << 63, 0),
    ],
)
def test_times_of_a_pcapng_interface_are_in_its_own_resolution(resolution: int, ticks: int, time_ns: int) -> None:
    for end in (b"", option(captures.OPTION_END, b"")):
        options = [option(captures.OPTION_TIME_RESOLUTION, bytes([resolution])), end]
        (packet,) = read(section() + interface(options=options) + enhanced(Packet(FRAME, ticks), tick_ns=1))
        assert packet.time_ns == time_ns


def test_the_time_offset_of_a_pcapng_interface_is_added() -> None:
    for offset_s in (1_700_000_000, -1):
        options = [option(captures.OPTION_TIME_OFFSET, struct.pack("<q", offset_s))]
        (packet,) = read(section() + interface(options=options) + enhanced(Packet(FRAME, 5_000_000_000)))
        assert packet.time_ns == (5 + offset_s) * captures.SECOND_NS


def test_a_time_out_of_range_becomes_the_nearest_that_is_in_it() -> None:
    late = [option(captures.OPTION_TIME_RESOLUTION, b"\0")]
    early = [option(captures.OPTION_TIME_OFFSET, struct.pack("<q", -(1 << 62)))]
    blocks = [interface(options=late), interface(options=early)]
    blocks += [enhanced(Packet(FRAME, (1 << 64) - 1), number=number, tick_ns=1) for number in (0, 1)]
    assert [packet.time_ns for packet in read(section() + b"".join(blocks))] == [1 << 62, 0]


def test_a_new_section_has_interfaces_and_a_byte_order_of_its_own() -> None:
    options = [option(captures.OPTION_TIME_RESOLUTION, b"\x09")]
    first = section() + interface(options=options) + interface() + enhanced(PACKET, tick_ns=1)
    second = section(order=">") + interface(order=">") + enhanced(PACKET, order=">")
    assert [(p.time_ns, p.interface) for p in read(first + second)] == [(TIME_NS, 1), (TIME_NS // 1000 * 1000, 1)]


def test_a_simple_packet_is_the_first_interfaces_and_has_the_time_of_the_packet_before() -> None:
    frame = bytes(64)
    cut = interface(snap_octets=61) + interface()
    packets = read(section() + cut + simple(Packet(frame)) + enhanced(PACKET, number=1) + simple(Packet(frame)))
    assert [p.time_ns for p in packets] == [0, TIME_NS // 1000 * 1000, TIME_NS // 1000 * 1000]
    assert packets[2] == CapturedPacket(TIME_NS // 1000 * 1000, frame[:61], 64, 1)


def test_an_obsolete_packet_block_is_read() -> None:
    assert read(section() + interface() + obsolete(PACKET)) == read(section() + interface() + enhanced(PACKET))


def test_blocks_and_options_without_packets_are_passed_over() -> None:
    comment = option(captures.OPTION_COMMENT, b"a comment\n")
    unknown = captures.block(0x0BAD, b"anything") + captures.block(5, bytes(12))
    content = section(options=comment) + unknown + interface(options=[comment]) + enhanced(PACKET, options=comment)
    assert len(read(content + unknown)) == 1


# Link types

IPV4, IPV6, ARP, NOT_IP = b"\x08\x00", b"\x86\xdd", b"\x08\x06", b"\xff\xff"
IPV4_PACKET, IPV6_PACKET = b"\x45" + bytes(19), b"\x60" + bytes(39)
MAC = b"\x02\0\0\0\0\1"
COOKED = b"\0\0" + b"\0\1" + b"\0\6" + MAC + b"\0\0"
COOKED_NO_MAC = b"\0\0" + b"\3\4" + b"\0\0" + bytes(8)
COOKED2 = b"\0\0" + b"\0\0\0\7" + b"\0\1" + b"\0" + b"\6" + MAC + b"\0\0"
COOKED2_NO_MAC = b"\0\0" + b"\0\0\0\7" + b"\3\4" + b"\0" + b"\0" + bytes(8)
TAG = b"\0\x64"

LINK_HEADERS = [
    *(("raw IP", number, b"", ZERO_MACS + IPV4, IPV4_PACKET) for number in (101, 12, 14)),
    *(("raw IP", number, b"", ZERO_MACS + IPV6, IPV6_PACKET) for number in (101, 12, 14)),
    ("raw IP, version 5", 101, b"", ZERO_MACS + NOT_IP, b"\x55" + bytes(19)),
    ("IPv4", 228, b"", ZERO_MACS + IPV4, IPV4_PACKET),
    ("IPv6", 229, b"", ZERO_MACS + IPV6, IPV6_PACKET),
    ("cooked", 113, COOKED + IPV4, bytes(6) + MAC + IPV4, IPV4_PACKET),
    ("cooked, no address", 113, COOKED_NO_MAC + IPV6, ZERO_MACS + IPV6, IPV6_PACKET),
    ("cooked, a tag", 113, COOKED + b"\x81\0", bytes(6) + MAC + b"\x81\0", TAG + IPV4 + IPV4_PACKET),
    ("cooked, ARP", 113, COOKED + ARP, bytes(6) + MAC + ARP, bytes(28)),
    ("cooked 2", 276, IPV4 + COOKED2, bytes(6) + MAC + IPV4, IPV4_PACKET),
    ("cooked 2, no address", 276, IPV6 + COOKED2_NO_MAC, ZERO_MACS + IPV6, IPV6_PACKET),
    ("cooked 2, a tag", 276, b"\x81\0" + COOKED2, bytes(6) + MAC + b"\x81\0", TAG + IPV4 + IPV4_PACKET),
    ("cooked 2, ARP", 276, ARP + COOKED2, bytes(6) + MAC + ARP, bytes(28)),
    ("loopback, little-endian", 0, b"\2\0\0\0", ZERO_MACS + IPV4, IPV4_PACKET),
    ("loopback, big-endian", 0, b"\0\0\0\2", ZERO_MACS + IPV4, IPV4_PACKET),
    *(("loopback IPv6", 0, bytes([af, 0, 0, 0]), ZERO_MACS + IPV6, IPV6_PACKET) for af in (10, 24, 28, 30)),
    ("loopback, AppleTalk", 0, b"\x10\0\0\0", ZERO_MACS + NOT_IP, bytes(20)),
    ("OpenBSD loopback", 108, b"\0\0\0\2", ZERO_MACS + IPV4, IPV4_PACKET),
    ("OpenBSD loopback IPv6", 108, b"\0\0\0\x18", ZERO_MACS + IPV6, IPV6_PACKET),
    ("OpenBSD loopback, wrong order", 108, b"\2\0\0\0", ZERO_MACS + NOT_IP, IPV4_PACKET),
    *(("PPP", number, b"\xff\3\0\x21", ZERO_MACS + IPV4, IPV4_PACKET) for number in (9, 50)),
    *(("PPP IPv6", number, b"\xff\3\0\x57", ZERO_MACS + IPV6, IPV6_PACKET) for number in (9, 50)),
    *(("PPP, no address", number, b"\0\x21", ZERO_MACS + IPV4, IPV4_PACKET) for number in (9, 50)),
    *(("PPP, compressed", number, b"\x57", ZERO_MACS + IPV6, IPV6_PACKET) for number in (9, 50)),
    *(("PPP LCP", number, b"\xff\3\xc0\x21", ZERO_MACS + NOT_IP, bytes(20)) for number in (9, 50)),
    ("Cisco HDLC", 50, b"\x0f\0" + IPV4, ZERO_MACS + IPV4, IPV4_PACKET),
    ("Cisco HDLC, multicast", 50, b"\x8f\0" + IPV6, ZERO_MACS + IPV6, IPV6_PACKET),
    ("Cisco HDLC, SLARP", 50, b"\x8f\0\x80\x35", ZERO_MACS + b"\x80\x35", bytes(18)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("link_type", "header", "ethernet", "payload"),
    [case[1:] for case in LINK_HEADERS],
    ids=[f"{case[0]} ({case[1]})" for case in LINK_HEADERS],
)
def test_a_link_header_becomes_an_ethernet_header(
    link_type: int, header: bytes, ethernet: bytes, payload: bytes
) -> None:
    data = header + payload
    expected = CapturedPacket(0, ethernet + payload, len(ethernet) + 1400, 0)
    assert read(pcap([Packet(data, wire_octets=len(header) + 1400)], link_type=link_type)) == [expected]


@pytest.mark.parametrize(
    ("link_type", "octets"),
    [(0, 4), (9, 2), (12, 1), (14, 1), (50, 2), (101, 1), (108, 4), (113, 16), (276, 20)],
)
def test_a_frame_that_ends_within_its_link_header_becomes_an_empty_one(link_type: int, octets: int) -> None:
    for cut in range(octets):
        (packet,) = read(pcap([Packet(bytes(cut), wire_octets=100)], link_type=link_type))
        assert (packet.frame, packet.wire_octets) == (b"", 100 - cut)


def test_a_link_type_that_cannot_be_metered_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "radio.pcap"
    only = "only Ethernet, raw IP, Linux cooked, loopback and PPP can be metered"
    for link_type, name in ((127, "127 (IEEE802_11_RADIO)"), (189, "189 (USB_LINUX)"), (9999, "9999")):
        path.write_bytes(pcap([PACKET], link_type=link_type))
        assert refusal(path) == f"{path}: link type {name}; {only}"


def test_packets_before_that_of_a_refused_interface_are_read() -> None:
    blocks = [interface(), interface(link_type=127), enhanced(PACKET), enhanced(PACKET, number=1)]
    with tempfile.NamedTemporaryFile() as file:
        file.write(section() + b"".join(blocks))
        file.flush()
        packets = chain.from_iterable(read_capture(Path(file.name)))
        assert next(packets).frame == FRAME
        with pytest.raises(UsageError):
            next(packets)


# What is no capture


def test_what_is_no_capture_is_refused_in_one_line(tmp_path: Path) -> None:
    missing, text, empty = tmp_path / "missing", tmp_path / "text", tmp_path / "empty"
    text.write_text("not a capture\n")
    empty.write_bytes(b"")
    assert refusal(missing) == f"{missing}: cannot be read: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    assert refusal(text) == f"{text}: not a pcap or pcapng capture, plain or gzipped"
    assert refusal(empty) == f"{empty}: not a pcap or pcapng capture, plain or gzipped"


def test_a_gzip_file_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "none.gz"
    path.write_bytes(b"\x1f\x8b nothing of the kind")
    assert refusal(path).startswith(f"{path}: cannot be read: ")


def test_only_a_pcapng_needs_scapy_and_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "one.pcapng"
    path.write_bytes(section() + interface() + enhanced(PACKET))
    for name in [name for name in sys.modules if name.split(".")[0] == "scapy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scapy", None)
    with pytest.raises(FlowexpError, match="python3-scapy"):
        packets_of(path)
    assert len(read(pcap([PACKET]))) == 1
    path.write_bytes(pcap([PACKET], link_type=127))
    assert "link type 127; only " in refusal(path)


# Damage

FILES = {
    "pcap": (pcap([]), [pcap([PACKET])[24:]] * 3),
    "pcapng": (section() + interface(), [enhanced(PACKET), simple(PACKET), obsolete(PACKET)]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_anywhere_gives_the_packets_before_and_says_so(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    header, records = FILES[kind]
    content = header + b"".join(records)
    ends = [len(header + b"".join(records[:n])) for n in range(len(records) + 1)]
    for cut in range(len(header), len(content) + 1):
        path.write_bytes(content[:cut])
        packets, damage = until_cut_off(path)
        whole = sum(end <= cut for end in ends) - 1
        assert len(packets) == whole
        said = f"{path}: cut off after {whole} packets: the file ends within a record"
        assert damage == ("" if cut in ends else said)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_in_its_header_has_no_packets(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    for cut in range(4, len(section() if kind == "pcapng" else FILES[kind][0])):
        path.write_bytes(FILES[kind][0][:cut])
        assert until_cut_off(path) == ([], f"{path}: cut off after 0 packets: the file ends within a record")


def test_a_gzipped_file_cut_off_gives_the_packets_before(tmp_path: Path) -> None:
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(pcap([PACKET, Packet(os.urandom(50_000))]))[:-1000])
    packets, damage = until_cut_off(path)
    assert len(packets) == 1
    assert "cut off after 1 packets" in damage


DAMAGE = {
    "a packet of an interface that is not described": (
        enhanced(PACKET, number=1),
        "a packet of interface 1, which the file does not describe",
    ),
    "a packet longer than its block": (
        captures.block(6, struct.pack("<5I", 0, 0, 0, 9, 9) + bytes(8)),
        "a packet of 9 octets in a block that holds 8",
    ),
    "a simple packet longer than its block": (
        captures.block(3, struct.pack("<I", 9) + bytes(8)),
        "a packet of 9 octets in a block that holds 8",
    ),
    "a block too short for its fields": (captures.block(6, bytes(16)), "unpack_from requires a buffer"),
    "an interface with a time resolution of two octets": (
        interface(options=[option(captures.OPTION_TIME_RESOLUTION, b"\x06\x06")]),
        "the time resolution or offset of an interface has a wrong length",
    ),
    "a block whose lengths differ": (
        captures.block(5, bytes(12))[:-4] + b"\x19\0\0\0",
        "no record begins where the one before it ends",
    ),
    "a block shorter than its own header": (
        struct.pack("<II", 6, 8),
        "no record begins where the one before it ends",
    ),
    "a block of almost 4 GiB": (struct.pack("<II", 6, 0xFFFFFFFC), "a length of 4294967280 octets"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_in_a_pcapng_ends_it(kind: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[kind]
    path = tmp_path / "damaged"
    path.write_bytes(section() + interface() + enhanced(PACKET) + damage + enhanced(PACKET))
    packets, said = until_cut_off(path)
    assert len(packets) == 1
    assert said.startswith(f"{path}: cut off after 1 packets: {reason}")


@pytest.mark.parametrize(
    "content",
    [
        pcap([]) + struct.pack("<4I", 0, 0, 0xFFFFFFF0, 0xFFFFFFF0) + bytes(1000),
        section() + struct.pack("<II", 6, 0xFFFFFFF0) + bytes(1000),
        struct.pack("<III", captures.SECTION_BLOCK, 0xFFFFFFF0, captures.SECTION_MAGIC) + bytes(1000),
        section(options=b"\1\0\0\0" * 100_000),
        section() + interface(options=[b"\1\0\0\0" * 100_000]),
        section() + interface() * 500_000,
        gzip.compress(pcap([]) + struct.pack("<4I", 0, 0, 0xFFFFFFF0, 0xFFFFFFF0) + bytes(100_000_000)),
    ],
    ids=["pcap", "pcapng", "first section", "options of a section", "options of an interface", "interfaces", "gzip"],
)
def test_memory_is_bounded_whatever_lengths_a_file_claims(content: bytes, tmp_path: Path) -> None:
    read(pcap([PACKET]))  # imports
    path = tmp_path / "hostile"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert until_cut_off(path)[0] == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


WHOLE = [
    pcap([PACKET, Packet(FRAME, TIME_NS, 1514)]),
    pcap([PACKET, PACKET], order=">", nano=False, link_type=113),
    section() + interface() + interface(link_type=276) + enhanced(PACKET) + enhanced(PACKET, number=1),
    section(order=">") + interface(order=">") + obsolete(PACKET, order=">") + simple(PACKET, order=">"),
    gzip.compress(pcap([PACKET, PACKET])),
]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A capture in which octets were overwritten, cut out and put in."""
    content = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content)))
        gone = draw(st.integers(0, 8))
        content[at : at + gone] = draw(st.binary(max_size=8))
    return bytes(content)


@settings(max_examples=500, deadline=None)
@given(damaged_files())
def test_a_damaged_file_ends_in_packets_and_one_line_at_most(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            packets, said = until_cut_off(Path(file.name))
        except FlowexpError as error:
            packets, said = [], str(error)
    assert "\n" not in said
    for packet in packets:
        assert 0 <= packet.time_ns < 1 << 63
        assert len(packet.frame) <= packet.wire_octets < 1 << 32


def test_scapy_itself_says_nothing_of_a_damaged_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(section() + struct.pack("<II", 6, 8))
    assert until_cut_off(path)[1]
    assert capfd.readouterr() == ("", "")
