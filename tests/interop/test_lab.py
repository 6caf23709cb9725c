# SPDX-License-Identifier: GPL-2.0-or-later
"""The laboratory's own figures, against someone else's: a wrong ruler would make every other test worthless."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from lab import framing, needs
from lab.flows import Counts, FlowKey, FlowTable, add_up, differences, total
from lab.process import run
from lab.traffic import STACKS, TCP, make_capture

FIELDS = {
    "ip.src": "", "ip.dst": "", "ipv6.src": "", "ipv6.dst": "", "ip.len": "0", "ipv6.plen": "0",
    "ip.proto": "0", "ipv6.nxt": "0", "tcp.srcport": "0", "tcp.dstport": "0", "udp.srcport": "0",
    "udp.dstport": "0", "icmp.type": "0", "icmp.code": "0", "icmpv6.type": "0", "icmpv6.code": "0",
    "tcp.flags": "0", "vlan.id": "0", "ieee8021ad.id": "0", "ip.checksum.status": "1", "frame.len": "0",
}  # fmt: skip
"""tshark's fields, and what stands for one that a packet does not have."""
IPV6_HEADER = 40
GOOD = "1"


def _packets(capture: Path) -> list[dict[str, str]]:
    words = [word for name in FIELDS for word in ("-e", name)]
    options = ["-o", "ip.check_checksum:TRUE", "--disable-protocol", "dns", "-E", "occurrence=f"]
    shown = run(["tshark", "-n", "-r", capture, *options, "-T", "fields", *words])
    return [
        {name: value or FIELDS[name] for name, value in zip(FIELDS, line.split("\t"))} for line in shown.splitlines()
    ]


def _number(packet: dict[str, str], *names: str) -> int:
    return sum(int(packet[name], 0) for name in names)


def _count(packet: dict[str, str]) -> tuple[FlowKey, Counts]:
    key = FlowKey(
        packet["ip.src"] or packet["ipv6.src"],
        packet["ip.dst"] or packet["ipv6.dst"],
        _number(packet, "ip.proto", "ipv6.nxt"),
        _number(packet, "tcp.srcport", "udp.srcport"),
        _number(packet, "tcp.dstport", "udp.dstport"),
        _number(packet, "icmp.type", "icmpv6.type") * 256 + _number(packet, "icmp.code", "icmpv6.code"),
        _number(packet, "ieee8021ad.id") or _number(packet, "vlan.id"),
    )
    octets = _number(packet, "ip.len", "ipv6.plen") + (IPV6_HEADER if packet["ipv6.src"] else 0)
    return key, Counts(1, octets, _number(packet, "tcp.flags") & 0xFF)


@pytest.mark.interop
def test_a_made_capture_holds_what_its_table_says(tmp_path: Path) -> None:
    needs.need(needs.tools("tshark"))
    macs = ("02:00:00:00:00:01", "02:00:00:00:00:02")
    capture = make_capture(tmp_path / "made.pcap", packets=20_000, flows=2_000, macs=macs)
    packets = _packets(capture.path)
    assert differences(capture.flows, add_up(map(_count, packets))) == []
    assert len(packets) == total(capture.flows).packets == 20_000
    assert {packet["ip.checksum.status"] for packet in packets} == {GOOD}
    assert min(_number(packet, "frame.len") for packet in packets) == 60
    assert len(capture.flows) == 2_000


def test_a_made_capture_has_every_stack_and_flows_that_differ_in_one_field(tmp_path: Path) -> None:
    macs = ("02:00:00:00:00:01", "02:00:00:00:00:02")
    capture = make_capture(tmp_path / "made.pcap", packets=1_800, flows=180, macs=macs)
    kinds = {(":" in key.src_addr, key.protocol, key.vlan_id > 0) for key in capture.flows}
    assert kinds == {(s.ip_version == 6, s.protocol, bool(s.tags)) for s in STACKS}
    assert len({key[:2] for key in capture.flows}) < len(capture.flows) / 4
    assert {bool(counts.tcp_flags) for key, counts in capture.flows.items() if key.protocol == TCP} == {True}


def test_differences_name_what_is_missing_what_is_foreign_and_what_is_wrong() -> None:
    one, two, three = (FlowKey("a", "b", 17, port) for port in (1, 2, 3))
    sent: FlowTable = {one: Counts(1, 100), two: Counts(2, 200)}
    got: FlowTable = {two: Counts(2, 201), three: Counts(3, 300)}
    missing, foreign, wrong, totals = differences(sent, got)
    assert missing.startswith("1 flows missing")
    assert foreign.startswith("1 flows nobody sent")
    assert wrong.startswith("1 flows with wrong counts")
    assert totals == "total sent (3, 300, 0), got (5, 501, 0)"
    assert differences(sent, dict(sent)) == []


TEMPLATE = struct.pack("!HHHHHHHH", 2, 16, 256, 2, 1, 4, 2, 4)
DATA = struct.pack("!HHII", 256, 12, 7, 8)


def _message(*sets: bytes, length_off_by: int = 0) -> bytes:
    content = b"".join(sets)
    return struct.pack("!HHIII", 10, 16 + len(content) + length_off_by, 0, 0, 1) + content


def test_framing_counts_the_data_records_of_a_message() -> None:
    read = framing.Session().read(_message(TEMPLATE, DATA, DATA))
    assert read == framing.Message(0, 1, [2, 256, 256], 2)


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        (_message(TEMPLATE, DATA, length_off_by=1), "section 3.1"),
        (_message(DATA), "before its Template"),
        (_message(TEMPLATE, struct.pack("!HHII", 256, 16, 7, 8)), "section 3.3.2"),
        (_message(TEMPLATE, struct.pack("!HHIII", 256, 16, 7, 8, 9)), "padding"),
        (_message(struct.pack("!HHI", 4, 8, 0)), "section 3.3.2"),
    ],
    ids=["Message Length", "no Template", "Set Length", "half a record", "reserved Set ID"],
)
def test_framing_names_the_rule_that_a_message_breaks(message: bytes, rule: str) -> None:
    with pytest.raises(framing.MalformedMessage, match=rule):
        framing.Session().read(message)
