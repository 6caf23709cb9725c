# SPDX-License-Identifier: GPL-2.0-or-later
"""What a Collector's URL means, and what is said of one that is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowexp.collector_url import CollectorUrl, parse_collector_url
from flowexp.errors import UsageError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("udp://192.0.2.1", CollectorUrl("udp", "ipfix", "192.0.2.1", 4739, "")),
        ("udp://192.0.2.1:9995", CollectorUrl("udp", "ipfix", "192.0.2.1", 9995, "")),
        ("udp://192.0.2.1:9995/", CollectorUrl("udp", "ipfix", "192.0.2.1", 9995, "")),
        ("udp://nfdump.example:1?protocol=ipfix", CollectorUrl("udp", "ipfix", "nfdump.example", 1, "")),
        ("udp://192.0.2.1?protocol=netflow9", CollectorUrl("udp", "netflow9", "192.0.2.1", 2055, "")),
        ("udp://[2001:db8::1]:9995?protocol=netflow5", CollectorUrl("udp", "netflow5", "2001:db8::1", 9995, "")),
        ("udp://[2001:db8::1]:65535", CollectorUrl("udp", "ipfix", "2001:db8::1", 65535, "")),
        ("udp://[::1]", CollectorUrl("udp", "ipfix", "::1", 4739, "")),
        ("udp://[fe80::1%eth0]:4739", CollectorUrl("udp", "ipfix", "fe80::1%eth0", 4739, "")),
        ("UDP://192.0.2.1", CollectorUrl("udp", "ipfix", "192.0.2.1", 4739, "")),
        ("tcp://h", CollectorUrl("tcp", "ipfix", "h", 4739, "")),
        ("tls://h", CollectorUrl("tls", "ipfix", "h", 4740, "")),
        ("file:///var/tmp/flows.ipfix", CollectorUrl("file", "ipfix", "", 0, "/var/tmp/flows.ipfix")),
        ("file:///a%20b%3F", CollectorUrl("file", "ipfix", "", 0, "/a b?")),
    ],
)
def test_a_collector_url_is_taken_apart_and_its_text_means_the_same(url: str, expected: CollectorUrl) -> None:
    assert parse_collector_url(url) == expected
    assert parse_collector_url(str(expected)) == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "it begins with one of udp://, tcp://, tls://, file://"),
        ("192.0.2.1:4739", "it begins with one of udp://, tcp://, tls://, file://"),
        ("http://192.0.2.1", "it begins with one of udp://, tcp://, tls://, file://"),
        ("udp://", "it names no host"),
        ("udp://:4739", "it names no host"),
        ("udp://h:0", "its port is no number from 1 to 65535"),
        ("udp://h:65536", "its port is no number from 1 to 65535"),
        ("udp://h:ipfix", "its port is no number from 1 to 65535"),
        ("udp://2001:db8::1", "an IPv6 address stands in brackets, as in udp://[2001:db8::1]:4739"),
        ("udp://::1:4739", "an IPv6 address stands in brackets, as in udp://[2001:db8::1]:4739"),
        ("udp://h/path", '"/path" follows the address; only ?protocol=... may'),
        ("udp://user@h", "it has more than transport, address and ?protocol=..."),
        ("udp://h#here", "it has more than transport, address and ?protocol=..."),
        ("udp://h?proto=ipfix", 'only protocol=... may follow the question mark, not "proto=ipfix"'),
        ("udp://h?protocol=sflow", "protocol is one of ipfix, netflow9, netflow5"),
        ("tcp://h?protocol=netflow9", "netflow9 goes over udp:// only"),
        ("dtls://h", "DTLS is not in this version; tls:// protects Messages as well, and loses none"),
        ("sctp://h", "SCTP is not in this version, as few kernels have it; tcp:// and tls:// lose no Message either"),
        ("file://var/tmp/x", "a file is named by three slashes and its whole path"),
        ("file:///", "a file is named by three slashes and its whole path"),
        ("file:///x%00", "a file is named by three slashes and its whole path"),
    ],
)
def test_a_wrong_collector_url_is_named_with_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_collector_url(url)
    assert str(raised.value).startswith(f'"{url}": {message}')


@given(st.text() | st.from_regex(r"(udp|tcp|tls|file)://[\[\]0-9a-z:/?%@#=.\\]*", fullmatch=True))
def test_any_text_is_a_collector_url_or_a_usage_error_of_one_line(url: str) -> None:
    try:
        parsed = parse_collector_url(url)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert parse_collector_url(str(parsed)) == parsed
