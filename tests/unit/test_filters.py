# SPDX-License-Identifier: GPL-2.0-or-later
"""The filter language: every operator against the same predicate in plain Python, over columns and over records."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowexp.errors import UsageError
from flowexp.filters import Filter, FilterError
from flowexp.protocol.elements import Columns
from flowexp.protocol.record import Record, columns_to_records
from flowexp.protocol.registry import BY_NAME

FLOWS = 64
HOSTS = {
    4: ["10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.200"],
    6: ["fd00::1", "fd00::2", "fd00:0:0:1::1", "2001:db8::"],
}
NETS = ["10.0.0.0/24", "10.0.0.0/15", "0.0.0.0/0", "192.0.2.128/25", "fd00::/64", "fd00::/16", "::/0", "10.0.0.3/31"]
MACS = ["02:00:00:00:00:01", "02:00:00:00:00:02", "00:00:00:00:00:00"]
PORTS = [0, 53, 443, 65535]
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "icmp6": 58, "sctp": 132}
COUNTS = [1, 2, 999, 1000, 1001, 2**32, 2**63, 2**64 - 1]
VLANS = [0, 5, 4095]
LO = socket.if_nametoindex("lo")
FLAGS = "FSRPAUECN"


def columns_of(version: int, seed: int) -> Columns:
    """Random flows of one family, their values from so small a stock that every test is met by some of them."""
    random = np.random.default_rng(seed)

    def pick(values: List[Any], dtype: str) -> np.ndarray:
        return np.array([values[i] for i in random.integers(0, len(values), FLOWS)], dtype)

    def octets(values: List[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(pick(list(values), "O")), np.uint8).reshape(FLOWS, -1)

    hosts = [ip_address(host).packed for host in HOSTS[version]]
    macs = [bytes.fromhex(mac.replace(":", "")) for mac in MACS]
    numbers: Dict[str, Tuple[str, List[int]]] = {
        "protocol": ("u1", list(PROTOCOLS.values())),
        "src_port": ("u2", PORTS), "dst_port": ("u2", PORTS), "icmp_type_code": ("u2", [0, 0x0800]),
        "vlan_id": ("u2", VLANS), "inner_vlan_id": ("u2", VLANS), "vlan_tagged": ("?", [0, 1]),
        "inner_tagged": ("?", [0, 1]), "ingress_ifindex": ("u4", [0, LO, 7]), "egress_ifindex": ("u4", [0, LO, 7]),
        "direction": ("u1", [0, 1]), "octets": ("u8", COUNTS), "packets": ("u8", COUNTS),
        "tcp_flags": ("u2", [0, 0x02, 0x12, 0x10, 0x1FF]), "tos": ("u1", [0, 0xB8, 255]), "flow_label": ("u4", [0, 9]),
        "fragment_flags": ("u1", [0, 2]), "min_length": ("u4", [40]), "max_length": ("u4", [40, 1500]),
        "min_ttl": ("u1", [1, 64]), "max_ttl": ("u1", [64, 255]), "start_ns": ("i8", [10**18]),
        "end_ns": ("i8", [10**18, 2 * 10**18]), "end_reason": ("u1", [1, 2, 3, 4, 5]),
    }  # fmt: skip
    columns = {name: pick(values, dtype) for name, (dtype, values) in numbers.items()}
    columns["ip_version"] = np.full(FLOWS, version, "u1")
    columns.update({name: octets(hosts) for name in ("src_addr", "dst_addr", "next_hop")})
    columns.update({name: octets(macs) for name in ("src_mac", "dst_mac")})
    columns["vlan_id"] *= columns["vlan_tagged"]
    columns["inner_vlan_id"] *= columns["inner_tagged"]
    return columns


class Case(NamedTuple):
    """An expression, and what it means."""

    expression: str
    holds: Callable[[Record], bool]


COMPARE: Dict[str, Callable[[Any, Any], bool]] = {
    "": lambda a, b: a == b,
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def number_case(term: str, names: List[str], compare: str, text: str, value: float) -> Case:
    if compare in ("!=", "<>"):
        return Case(f"{term} {compare} {text}", lambda r: not any(r.get(name) == value for name in names))
    test = COMPARE[compare]
    return Case(f"{term} {compare} {text}", lambda r: any(name in r and test(r[name], value) for name in names))


def numbers(term: str, names: str, values: List[int]) -> st.SearchStrategy[Case]:
    compares = st.sampled_from([*COMPARE, "!=", "<>"])
    texts = st.sampled_from([*values]).flatmap(lambda n: st.sampled_from([(str(n), n), (hex(n), n)]))
    return st.builds(lambda compare, text: number_case(term, names.split(), compare, *text), compares, texts)


def address_case(term: str, ways: List[str], compare: str, net: str) -> Case:
    network = ip_network(net, strict=False)
    names = [f"{way}IPv{network.version}Address" for way in ways]
    inside = [str(host) for hosts in HOSTS.values() for host in hosts if ip_address(host) in network]
    return Case(f"{term} {compare} {net}", lambda r: any(r.get(name) in inside for name in names) ^ (compare == "!="))


def addresses(term: str, *ways: str) -> st.SearchStrategy[Case]:
    nets = st.sampled_from([*NETS, *HOSTS[4], *HOSTS[6]])
    return st.builds(
        lambda compare, net: address_case(term, list(ways), compare, net), st.sampled_from(["", "=", "!="]), nets
    )


def mac_case(term: str, names: List[str], compare: str, mac: str) -> Case:
    return Case(f"{term} {compare} {mac}", lambda r: any(r[name] == mac for name in names) ^ (compare == "!="))


def macs(term: str, *names: str) -> st.SearchStrategy[Case]:
    return st.builds(
        lambda compare, mac: mac_case(term, list(names), compare, mac),
        st.sampled_from(["", "!="]),
        st.sampled_from(MACS),
    )


def bits_of(letters: str) -> int:
    return sum(1 << FLAGS.index(letter) for letter in set(letters.upper()))


@st.composite
def flags(draw: Any) -> Case:
    letters = draw(st.text(FLAGS + FLAGS.lower(), min_size=1, max_size=9))
    bits = bits_of(letters)
    text = draw(st.sampled_from([letters, hex(bits), str(bits)]))
    return draw(
        st.sampled_from(
            [
                Case(f"flags {text}", lambda r: int(r["tcpControlBits"]) & bits == bits),
                Case(f"flags = {text}", lambda r: r["tcpControlBits"] == bits),
                Case(f"flags != {text}", lambda r: r["tcpControlBits"] != bits),
            ]
        )
    )


def protocol_case(expression: str, name: str) -> Case:
    return Case(expression, lambda r: r["protocolIdentifier"] == PROTOCOLS[name])


ALONE = [
    Case("ipv4", lambda r: r["ipVersion"] == 4),
    Case("ipv6", lambda r: r["ipVersion"] == 6),
    Case("vlan", lambda r: "vlanId" in r or "dot1qCustomerVlanId" in r),
    Case("postVlanId", lambda r: "postVlanId" in r),
    Case("flowLabelIPv6", lambda r: "flowLabelIPv6" in r),
    *(protocol_case(name, name) for name in PROTOCOLS),
]
SRC_PORT, DST_PORT = "sourceTransportPort", "destinationTransportPort"

CASES: Dict[str, st.SearchStrategy[Case]] = {
    "host": st.sampled_from(["host", "ip", "net"]).flatmap(lambda term: addresses(term, "source", "destination")),
    "src host": st.sampled_from(["src", "src host", "src ip"]).flatmap(lambda term: addresses(term, "source")),
    "dst host": st.sampled_from(["dst", "dst host", "dst net"]).flatmap(lambda term: addresses(term, "destination")),
    "sourceIPv4Address": st.builds(
        lambda net: address_case("sourceIPv4Address", ["source"], "=", net), st.sampled_from([*NETS[:4], *HOSTS[4]])
    ),
    "mac": macs("mac", "sourceMacAddress", "destinationMacAddress"),
    "src mac": macs("src mac", "sourceMacAddress"),
    "dst mac": macs("dst mac", "destinationMacAddress"),
    "port": numbers("port", f"{SRC_PORT} {DST_PORT}", PORTS),
    "src port": numbers("src port", SRC_PORT, PORTS),
    "dst port": numbers("dst port", DST_PORT, PORTS),
    "proto": numbers("proto", "protocolIdentifier", [*PROTOCOLS.values(), 0, 255]),
    "proto name": st.sampled_from([protocol_case(f"proto {name}", name) for name in PROTOCOLS]),
    "iface": st.sampled_from(["iface", "if", "interface"]).flatmap(
        lambda term: numbers(term, "ingressInterface egressInterface", [0, LO, 7, 8])
    ),
    "in iface": numbers("in iface", "ingressInterface", [0, LO, 7]),
    "out iface": numbers("out if", "egressInterface", [0, LO, 7]),
    "iface name": st.just(Case("in iface lo", lambda r: r["ingressInterface"] == LO)),
    "vlan": numbers("vlan", "vlanId dot1qCustomerVlanId", VLANS),
    "vlanId": numbers("vlanId", "vlanId", VLANS),
    "dot1qVlanId": numbers("postVlanId", "postVlanId", VLANS),
    "flags": flags(),
    "packets": numbers("packets", "packetDeltaCount", COUNTS),
    "octets": numbers("octets", "octetDeltaCount", COUNTS),
    "bytes": numbers("bytes", "octetDeltaCount", COUNTS),
    "unit": st.builds(
        lambda compare, text: number_case("octets", ["octetDeltaCount"], compare, text, 1000),
        st.sampled_from(list(COMPARE)), st.sampled_from(["1k", "1K", "1.0k", "0.001M"]),
    ),
    "tos": numbers("tos", "ipClassOfService", [0, 0xB8, 255]),
    "dscp": numbers("dscp", "ipDiffServCodePoint", [0, 46, 63]),
    "flowEndMilliseconds": numbers("flowEndMilliseconds", "flowEndMilliseconds", [10**12, 2 * 10**12]),
    "icmpTypeCodeIPv4": numbers("icmpTypeCodeIPv4", "icmpTypeCodeIPv4", [0, 0x0800]),
    "alone": st.sampled_from(ALONE),
}  # fmt: skip


def check(case: Case, version: int, seed: int) -> None:
    """Columns, records and the predicate say the same of every flow."""
    columns = columns_of(version, seed)
    records = columns_to_records(columns)
    expected = [case.holds(record) for record in records]
    chosen = Filter(case.expression)
    assert chosen.rows(columns).tolist() == expected, case.expression
    assert [chosen.matches(record) for record in records] == expected, case.expression


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), version=st.sampled_from([4, 6]), seed=st.integers(0, 2**32))
def test_a_test_holds_for_the_flows_that_its_predicate_holds_for(name: str, data: Any, version: int, seed: int) -> None:
    check(data.draw(CASES[name]), version, seed)


def joined(parts: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    def two(word: str, a: Case, b: Case) -> Case:
        text = f"({a.expression}) {word} ({b.expression})"
        if word in ("or", "||", "OR"):
            return Case(text, lambda r: a.holds(r) or b.holds(r))
        return Case(text, lambda r: a.holds(r) and b.holds(r))

    def negated(word: str, a: Case) -> Case:
        return Case(f"{word}({a.expression})", lambda r: not a.holds(r))

    return st.builds(two, st.sampled_from(["and", "&&", "AND", "or", "||", "OR"]), parts, parts) | st.builds(
        negated, st.sampled_from(["not ", "!", "not", "NOT "]), parts
    )


@settings(deadline=None, max_examples=100)
@given(st.recursive(st.one_of(*CASES.values()), joined, max_leaves=8), st.sampled_from([4, 6]), st.integers(0, 2**32))
def test_tests_are_joined_as_python_joins_predicates(case: Case, version: int, seed: int) -> None:
    check(case, version, seed)


def matches(expression: str, **record: Any) -> bool:
    return Filter(expression, elements=BY_NAME).matches(record)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("udp or tcp and port 1", True),  # udp or (tcp and port 1)
        ("(udp or tcp) and port 1", False),
        ("not udp or port 1", False),  # (not udp) or port 1
        ("not tcp and port 53", True),
        ("port 53 and not port 80 and udp", True),
        ("not not udp", True),
        ("! !udp&&port=53", True),
        ("udp\tand\n port 53", True),
    ],
)
def test_and_binds_closer_than_or_and_not_closest_of_all(expression: str, expected: bool) -> None:
    assert matches(expression, protocolIdentifier=17, sourceTransportPort=53) is expected


def test_depth_and_length_have_no_limit() -> None:
    assert matches("(" * 5000 + "udp" + ")" * 5000, protocolIdentifier=17)
    assert matches("!(" * 5000 + "udp" + ")" * 5000, protocolIdentifier=17)
    assert matches(" or ".join(f"port {port}" for port in range(5000)), sourceTransportPort=4999)


def test_records_of_other_exporters_are_asked_for_elements_that_this_one_does_not_measure() -> None:
    assert matches("bgpNextAdjacentAsNumber = 64512", bgpNextAdjacentAsNumber=64512)
    assert matches("interfaceName = eth0", interfaceName="eth0")
    assert matches('interfaceName = "the first"', interfaceName="the first")
    assert not matches("interfaceName != eth0", interfaceName="eth0")
    assert matches("src port 53", udpSourcePort=53)
    assert matches("vlan 5", dot1qVlanId=5)


def test_a_value_in_a_form_that_its_element_should_not_have_fulfils_no_comparison() -> None:
    assert not matches("packets >= 0", packetDeltaCount="00ff")
    assert not matches("host 0.0.0.0/0", sourceIPv4Address="c0a8")
    assert not matches("mac 02:00:00:00:00:01", sourceMacAddress="0200")
    assert not matches("interfaceName = 5", interfaceName=5)


def test_columns_have_elements_that_no_record_of_theirs_carries() -> None:
    columns = columns_of(4, 1)
    columns = {**columns, "packets_total": columns["packets"], "octets_total": columns["octets"]}
    assert Filter("packetTotalCount > 1000").rows(columns).tolist() == (columns["packets"] > 1000).tolist()
    tagged = columns["vlan_tagged"] | columns["inner_tagged"]
    assert Filter("dot1qVlanId >= 0").rows(columns).tolist() == tagged.tolist()
    assert not Filter("flowStartSysUpTime >= 0").rows(columns).any()  # needs what only an encoder knows


def test_select_keeps_the_rows_and_every_column() -> None:
    columns = columns_of(6, 2)
    chosen = Filter("udp").select(columns)
    rows = np.flatnonzero(columns["protocol"] == 17)
    assert chosen.keys() == columns.keys()
    assert all(np.array_equal(chosen[name], columns[name][rows]) for name in columns)
    assert all(Filter("ipv6").select(columns)[name] is columns[name] for name in columns)
    assert len(Filter("ipv4").select(columns)["packets"]) == 0


@pytest.mark.parametrize(
    ("expression", "what", "under"),
    [
        ("", "the expression is empty", 0),
        ("  ", "the expression is empty", 0),
        ("port", 'a value is missing after "port"', 4),
        ("tcp and src port", 'a value is missing after "src port"', 16),
        ("port >", "something is missing at the end", 6),
        ("(tcp", "something is missing at the end", 4),
        ("tcp and", "something is missing at the end", 7),
        ("tcp)", '")" does not belong here', 3),
        ("tcp & udp", '"&" does not belong here', 4),
        ("and tcp", '"and" does not belong here', 0),
        ("> 5", '">" does not belong here', 0),
        ("host 1.2.3", "1.2.3 is no IPv4 or IPv6 address", 5),
        ("host 10.0.0.0/33", "10.0.0.0/33 is no IPv4 or IPv6 address", 5),
        ("sourceIPv4Address = ::1", "::1 is no IPv4 address", 20),
        ("mac 02:00", "02:00 is no mac address", 4),
        ("host > 10.0.0.1", "host has no order: only = and != compare it", 5),
        ("port 65536", "65536 is above 65535, the most that sourceTransportPort can be", 5),
        ("port http", "http is no number", 5),
        ("packets > -1", "-1 is no number", 10),
        ("packets > 1kk", "1kk is no number", 10),
        ("packets > " + "9" * 5000, "9" * 5000 + " is no number", 10),
        ("proto nonsense", "nonsense is no number", 6),
        ("iface nonsense", 'there is no device "nonsense" here; its ifindex will do', 6),
        ("flags SX", "SX is no TCP flags: letters of FSRPAUECN, or a number up to 0x1ff", 6),
        ("flags 0x200", "0x200 is no TCP flags: letters of FSRPAUECN, or a number up to 0x1ff", 6),
        ("flags < S", "flags has no order: only = and != compare it", 6),
        ("tcp port 80", '"tcp" stands alone; join it with "and" or "or"', 4),
        ("host 10.0.0.1 10.0.0.2", '"and" or "or" is missing before this', 14),
        ("tcp = 6", '"tcp" stands alone; join it with "and" or "or"', 4),
        ("tcp and hots 1", '"hots" is no term and no Information Element; did you mean "host"?', 8),
        ("packetDelta > 1", '"packetDelta" is no term and no Information Element; did you mean "packetDeltaCount"?', 0),
        ("wlanSSID = 1", "wlanSSID is an Information Element that is not measured here", 0),
        ("iface \x1b[2J", 'there is no device " [2J" here; its ifindex will do', 6),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_a_caret_under_the_place(expression: str, what: str, under: int) -> None:
    with pytest.raises(FilterError) as raised:
        Filter(expression)
    first, shown, caret = str(raised.value).split("\n")
    assert first == f"filter: {what}"
    assert shown == "  " + expression.replace("\x1b", " ")
    assert caret == "  " + " " * under + "^"


@settings(deadline=None)
@given(
    st.text()
    | st.lists(st.sampled_from('tcp port 5 = ( ) and or not host ::1 flags S > < ! & " \0 vlan'.split(" "))).map(
        " ".join
    )
)
def test_any_text_is_a_filter_or_a_filter_error(expression: str) -> None:
    try:
        chosen = Filter(expression)
    except UsageError as error:
        assert str(error).count("\n") == 2
    else:
        chosen.rows(columns_of(4, 0))
        chosen.matches({})
