# SPDX-License-Identifier: GPL-2.0-or-later
"""Records as JSON lines, CSV and a table, one by one and in columns."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from datetime import timezone
from functools import partial
from typing import IO

import pytest
from columns import random_columns

from flowexp.forms import CsvForm, Form, JsonForm, write
from flowexp.names import service_name
from flowexp.protocol.record import columns_to_records, columns_to_values
from flowexp.view import TableForm, can_be_live, terminal_size

IPV4 = {
    "sourceIPv4Address": "192.0.2.1", "destinationIPv4Address": "198.51.100.2", "sourceTransportPort": 49152,
    "destinationTransportPort": 443, "protocolIdentifier": 6, "tcpControlBits": 0x11B,
    "ipClassOfService": 0xB8,
    "octetDeltaCount": 5_000_000_000, "packetDeltaCount": 4_000, "flowStartMilliseconds": 1_699_999_990_123,
    "flowEndMilliseconds": 1_699_999_999_456, "flowEndReason": 3, "ingressInterface": 2, "egressInterface": 3,
    "vlanId": 100, "dot1qCustomerVlanId": 200,
}  # fmt: skip
IPV6 = {
    "sourceIPv6Address": "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff", "destinationIPv6Address": "2001:db8::1",
    "protocolIdentifier": 58, "icmpTypeCodeIPv6": 0x8000, "octetDeltaCount": 312, "packetDeltaCount": 3,
    "flowStartMilliseconds": 1_699_999_990_000, "flowEndMilliseconds": 1_699_999_992_000, "flowEndReason": 1,
    "sourceTransportPort": 0, "destinationTransportPort": 0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def table(*records: dict, width: int | None = None, stream: io.StringIO | None = None) -> list[str]:
    stream = stream or io.StringIO()
    write(records, TableForm(stream, width=width, zone=timezone.utc), stream)
    return stream.getvalue().splitlines()


def test_json_is_one_object_a_line():
    stream = io.StringIO()
    write([IPV4, IPV6], JsonForm(), stream)
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [IPV4, IPV6]


def test_csv_has_a_header_and_leaves_empty_what_a_record_lacks():
    stream = io.StringIO()
    write([IPV4, {**IPV6, "enterprise9.1": "ff"}], CsvForm(), stream)
    first, second = csv.DictReader(stream.getvalue().splitlines())
    assert {name: value for name, value in first.items() if value} == {k: str(v) for k, v in IPV4.items()}
    assert second["sourceIPv4Address"] == "" and second["sourceIPv6Address"] == IPV6["sourceIPv6Address"]
    assert json.loads(second["otherElements"]) == {"enterprise9.1": "ff"}


def test_table_shows_a_flow_in_one_line_where_there_is_no_terminal():
    header, row = table(IPV4)
    titles = "date start duration proto source destination vlan flags tos packets octets in out end"
    flow = "2023-11-14 22:13:10.123 9.333 TCP 192.0.2.1:49152 198.51.100.2:443 100.200 N...AP.SF"
    assert " ".join(header.split()) == titles
    assert " ".join(row.split()) == f"{flow} 0xb8 4.00k 5.00G 2 3 end"


@pytest.fixture
def terminal() -> Iterator[IO[str]]:
    """One that knows no size yet."""
    here, there = pty.openpty()
    with open(there, "w") as stream:
        yield stream
    os.close(here)


def test_a_terminal_that_knows_no_size_is_taken_for_80_by_24(terminal: IO[str]):
    assert terminal_size(terminal) == (80, 24)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 5, 20, 0, 0))
    assert terminal_size(terminal) == (20, 5)


def test_services_and_interfaces_go_by_name_on_request():
    def row(**named: bool) -> str:
        stream = io.StringIO()
        write([{**IPV4, "ingressInterface": 1}], TableForm(stream, zone=timezone.utc, **named), stream)
        return stream.getvalue().splitlines()[1]

    lo = socket.if_indextoname(1)
    https = service_name(443, 6)
    assert f"198.51.100.2:{https} " in row(services=True, interfaces=True) and f" {lo} " in row(interfaces=True)
    assert "198.51.100.2:443 " in row(interfaces=True) and f" {lo} " not in row(services=True)


@pytest.mark.parametrize(("kind", "can"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_a_dumb_terminal_gets_plain_lines(kind: str, can: bool, terminal: IO[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", kind)
    assert can_be_live(terminal) is can
    assert not can_be_live(io.StringIO())


@pytest.mark.parametrize("width", [80, 100, 132, 200])
def test_table_fits_the_terminal(width: int):
    lines = table(IPV4, IPV6, width=width)
    assert max(map(len, lines)) <= width
    assert "192.0.2.1:49152" in lines[1] and "198.51.100.2:443" in lines[1]


@pytest.mark.parametrize("width", range(58, 80))
def test_addresses_are_folded_where_the_terminal_is_narrow(width: int):
    lines = table(IPV4, IPV6, width=width)
    assert max(map(len, lines)) <= width
    assert "octets" in lines[0] and lines[1].split()[0] == "22:13:10.123"


def test_long_ipv6_address_goes_on_in_the_next_line_behind_a_colon():
    _, first, second = table(IPV6, width=80)
    assert first.split() == ["22:13:10.000", "ICMPv6", "2001:db8:aaaa:bbbb:", "2001:db8::1", "3", "312"]
    assert second.split() == ["cccc:dddd:eeee:ffff"]


def test_icmp_is_shown_by_type_and_code_and_a_missing_value_by_nothing():
    _, row = table(IPV6)
    assert "128/0" in row and "0x" not in row


def test_colours_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = "\n".join(table(IPV4, width=200, stream=Terminal()))
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == "\n".join(table(IPV4, width=200)).split()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in "\n".join(table(IPV4, width=200, stream=Terminal()))


def test_rows_are_written_as_they_come():
    stream, seen = io.StringIO(), []

    def coming():
        yield IPV4
        seen.append(stream.getvalue().count("\n"))
        yield IPV6

    write(coming(), TableForm(stream, zone=timezone.utc), stream)
    assert seen == [2]


def test_impossible_time_and_octets_that_are_no_number_do_not_stop_the_table():
    _, row = table({"flowStartMilliseconds": 2**64 - 1, "octetDeltaCount": "beef", "sourceIPv4Address": "ff"})
    assert row.split()[:2] == ["?", "?"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (9_996, "10.0k"), (999_499, "999k"), (999_500, "1.00M"),
     (2**64 - 1, "18.4E")],
)  # fmt: skip
def test_counts_have_three_digits_and_a_unit(count: int, shown: str):
    _, row = table({"octetDeltaCount": count})
    assert shown in row.split()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("make", [JsonForm, CsvForm, partial(TableForm, io.StringIO(), zone=timezone.utc, width=100)])
def test_flows_in_columns_look_as_they_do_one_by_one(version: int, make: Callable[[], Form]):
    columns = random_columns(200, ip_version=version, seed=version, tags=True)
    form, stream, lines = make(), io.StringIO(), [""] * 200
    write(columns_to_records(columns), form, stream)
    for values, places in columns_to_values(columns):
        for place, text in zip(places, form.lines(values)):
            lines[place] = text
    assert form.head + "".join(lines) == stream.getvalue()


def test_json_and_csv_are_what_the_standard_library_makes_of_whatever_came_off_the_wire():
    odd = {'a "name", 100 %s': 'a "text",\n100 %d', "b": True, "c": 1.5, "d": "nan", "e": 2**64 - 1, "f": "\u00e9\n"}
    assert JsonForm().lines({name: [value] for name, value in odd.items()}) == [json.dumps(odd) + "\n"]
    stream, expected = io.StringIO(), io.StringIO()
    write([odd], CsvForm(["b", "f", "nowhere"]), stream)
    others = {name: value for name, value in odd.items() if name not in "bf"}
    writer = csv.writer(expected, lineterminator="\n")
    writer.writerows([["b", "f", "nowhere", "otherElements"], [odd["b"], odd["f"], "", json.dumps(others)]])
    assert stream.getvalue() == expected.getvalue()
