# SPDX-License-Identifier: GPL-2.0-or-later
"""What a first payload is taken for: by what real programs and libraries say, and never by an exception."""

from __future__ import annotations

import ssl
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowexp.kernel.payloads import application_ids, application_names
from flowexp.metering.applications import APPLICATIONS, NOTHING, PORTS, Verdict, classify
from flowexp.metering.hellos import DNS_NAME, HTTP_NAME, NO_NAME, TLS_NAME

TCP, UDP = 6, 17
ODD = (40000, 50000)


def client_hello(name: str | None = "www.example.org", alpn: tuple[str, ...] = ()) -> bytes:
    """What OpenSSL sends first."""
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    context.verify_mode = ssl.CERT_NONE if name is None else ssl.CERT_REQUIRED
    if alpn:
        context.set_alpn_protocols(list(alpn))
    sent = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return sent.read()


def query(*labels: bytes, flags: int = 0x0100, kind: int = 1) -> bytes:
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return struct.pack("!6H", 7, flags, 1, 0, 0, 0) + name + struct.pack("!HH", kind, 1)


@pytest.mark.parametrize(
    ("payload", "port", "expected"),
    [
        (client_hello(), 50000, Verdict("tls", TLS_NAME, b"www.example.org")),
        (client_hello(), 443, Verdict("https", TLS_NAME, b"www.example.org")),
        (client_hello(), 993, Verdict("imaps", TLS_NAME, b"www.example.org")),
        (client_hello(alpn=("h2", "http/1.1")), 50000, Verdict("https", TLS_NAME, b"www.example.org")),
        (client_hello(alpn=("dot",)), 50000, Verdict("dns-over-tls", TLS_NAME, b"www.example.org")),
        (client_hello(name=None), 50000, Verdict("tls")),
        (b"\x17\x03\x03\x00\x20" + bytes(32), 50000, Verdict("tls")),
        (b"GET / HTTP/1.1\r\nhOST:  a.example:80 \r\n\r\n", 50000, Verdict("http", HTTP_NAME, b"a.example:80")),
        (b"POST /x HTTP/1.0\r\n\r\nHost: in.the.body\r\n", 80, Verdict("http")),
        (b"GET /" + b"a" * 600, 80, Verdict("http")),
        (b"HTTP/1.1 404 Not Found\r\n", 50000, Verdict("http")),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 50000, Verdict("http")),
        (b"GET /announce?peer_id=x&info_hash=%aa HTTP/1.1\r\n", 80, Verdict("bittorrent")),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 50000, Verdict("ssh")),
        (b"\x13BitTorrent protocol" + bytes(8), 50000, Verdict("bittorrent")),
        (b"220 mail.example.org ESMTP Postfix\r\n", 50000, Verdict("smtp")),
        (b"220 ProFTPD Server ready: FTP\r\n", 50000, Verdict("ftp")),
        (b"* OK [CAPABILITY IMAP4rev1] ready\r\n", 50000, Verdict("imap")),
        (b"\x00\x00\x00\x54\xfeSMB" + bytes(60), 50000, Verdict("smb")),
        (b"\x03\x00\x00\x13\x0e\xe0" + bytes(13), 50000, Verdict("rdp")),
        (b"\x10\x10\x00\x04MQTT\x04\x02", 50000, Verdict("mqtt")),
        (b"J\x00\x00\x00\x0a8.0.36\x00", 50000, Verdict("mysql")),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", 50000, Verdict("postgresql")),
        (b"*1\r\n$4\r\nPING\r\n", 50000, Verdict("redis")),
        (b"\xff" * 16 + b"\x00\x1d\x01\x04", 179, Verdict("bgp")),
        (b"INVITE sip:a@example.org SIP/2.0\r\n", 50000, Verdict("sip")),
        (struct.pack("!H", 29) + query(b"example", b"org"), 50000, Verdict("dns", DNS_NAME, b"example.org")),
        (b"", 80, NOTHING),
        (b"hello there", 80, NOTHING),
    ],
)
def test_first_payloads_over_tcp(payload: bytes, port: int, expected: Verdict) -> None:
    assert classify(payload, TCP, (ODD[0], port)) == expected
    assert classify(payload, TCP, (port, ODD[0])) == expected


@pytest.mark.parametrize(
    ("payload", "port", "expected"),
    [
        (query(b"www", b"example", b"org"), 50000, Verdict("dns", DNS_NAME, b"www.example.org")),
        (query(b"a.b", b"\xc3\xa9\n"), 53, Verdict("dns", DNS_NAME, b"a\\046b.\\195\\169\\010")),
        (query(flags=0, kind=2), 53, Verdict("dns", DNS_NAME, b".")),
        (query(b"printer", b"local"), 5353, Verdict("mdns", DNS_NAME, b"printer.local")),
        (query(b"www", b"example", b"org")[:-1], 50000, NOTHING),
        (query(b"www", b"example", b"org") + b"x", 50000, NOTHING),
        (bytes.fromhex("c30000000108") + bytes(8) + b"\0" + bytes(1200), 50000, Verdict("quic")),
        (bytes.fromhex("80000000000508") + bytes(8 + 4 + 4), 443, NOTHING),
        (bytes.fromhex("8000000000") + b"\0\x01x" + bytes.fromhex("00000001ff00001d"), 443, Verdict("quic")),
        (b"\x23" + bytes(47), 123, Verdict("ntp")),
        (b"\x23\x00\x06\xec" + bytes(36) + b"\xe8" + bytes(7), 50000, Verdict("ntp")),
        (b"\x23" + bytes(47), 50000, NOTHING),
        (b"\x00\x01\x00\x00\x21\x12\xa4\x42" + bytes(12), 50000, Verdict("stun")),
        (b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n\r\n", 1900, Verdict("ssdp")),
        (b"d1:ad2:id20:" + b"i" * 20 + b"e1:q4:ping1:t2:aa1:y1:qe", 50000, Verdict("bittorrent")),
        (b"\x16\xfe\xfd" + bytes(10), 50000, Verdict("dtls")),
        (b"\x01\x01\x06" + bytes(233) + b"\x63\x82\x53\x63", 67, Verdict("dhcp")),
        (b"\x30\x26\x02\x01\x01\x04\x06public", 50000, Verdict("snmp")),
        (b"\x01\x00\x00\x00" + bytes(144), 50000, Verdict("wireguard")),
        (b"", 53, NOTHING),
    ],
)
def test_first_payloads_over_udp(payload: bytes, port: int, expected: Verdict) -> None:
    assert classify(payload, UDP, (ODD[0], port)) == expected


def test_a_client_hello_that_is_cut_off_is_still_tls_and_never_half_a_name() -> None:
    whole = client_hello(alpn=("h2",))
    found = {classify(whole[:octets], TCP, ODD) for octets in range(6, len(whole))}
    assert {each.application for each in found} == {"tls", "https"}
    assert {each.name for each in found} == {b"", b"www.example.org"}


_SEEDS = (client_hello(alpn=("h2",)), query(b"www", b"example"), b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A good payload with some octets that are not."""
    octets = bytearray(draw(st.sampled_from(_SEEDS)))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8)):
        octets[at % len(octets)] = value
    return bytes(octets[: draw(st.integers(0, len(octets)))])


@given(st.one_of(st.binary(max_size=700), spoiled()), st.sampled_from((TCP, UDP, 132)), st.sampled_from((53, 123, 9)))
@example(b"\xc0\0\0\0\x01\xff", UDP, 9)
def test_no_payload_raises_and_no_name_is_anything_but_printable(payload: bytes, protocol: int, port: int) -> None:
    verdict = classify(payload, protocol, (ODD[0], port))
    assert verdict.application in APPLICATIONS or verdict == NOTHING
    assert (verdict.name_kind == NO_NAME) == (verdict.name == b"")
    assert all(33 <= octet <= 126 for octet in verdict.name)


def test_random_octets_have_no_application() -> None:
    generator = np.random.default_rng(7)
    payloads = [generator.bytes(200) for _ in range(20_000)]
    named = [classify(payload, protocol, ODD) for payload in payloads for protocol in (TCP, UDP)]
    assert sum(each != NOTHING for each in named) <= 2


def test_an_application_id_tells_how_it_is_known() -> None:
    numbers, protocols = np.array([0, 0, 0, 3, 0], np.uint32), np.array([6, 6, 1, 6, 17], np.uint8)
    ports = np.array([40000, 443, 443, 80, 8080], np.uint16), np.array([50000, 50000, 80, 50000, 53], np.uint16)
    ids = [octets.tobytes().hex() for octets in application_ids(numbers, protocols, ports)]
    assert ids == ["00000000", "030001bb", "00000000", "06000003", "03000035"]
    names = {identifier.hex(): name for identifier, name, _ in application_names()}
    assert (names["030001bb"], names["06000003"], names["03000035"]) == ("https", "http", "domain")
    assert len(names) == len(APPLICATIONS) + len(PORTS)
    assert len({each.number for each in APPLICATIONS.values()}) == len(APPLICATIONS)
