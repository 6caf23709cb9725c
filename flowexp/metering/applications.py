# SPDX-License-Identifier: GPL-2.0-or-later
"""Which application a flow's first payload is of, and the one name that it asks for in clear.

Payloads are strangers' octets: whatever they are, classify() answers and never raises. Nothing of them goes further but
the application's number and, of TLS, HTTP and DNS, the server's or queried name, in printable ASCII.

To add an application: a row in APPLICATIONS with a number that no other ever had, and what tells it: a pattern here, or
a function where its octets are to be read (metering/hellos.py).
"""

from __future__ import annotations

import re
from typing import Callable, Dict, NamedTuple, Tuple

from flowexp.metering import hellos
from flowexp.metering.hellos import DNS_NAME, HTTP_NAME, NO_NAME, TLS_NAME

__all__ = ["APPLICATIONS", "DNS_NAME", "HTTP_NAME", "NO_NAME", "NOTHING", "PORTS", "TLS_NAME", "Verdict", "classify"]

_TCP, _UDP = 6, 17


class Application(NamedTuple):
    """Its number is told to Collectors, who may keep it: it stays what it is."""

    number: int
    description: str


APPLICATIONS: Dict[str, Application] = {
    "tls": Application(1, "TLS of which no more is known"),
    "https": Application(2, "HTTP over TLS: by ALPN, or by port 443"),
    "http": Application(3, "HTTP/1 and HTTP/2 in clear"),
    "dns": Application(4, "DNS, over UDP or TCP"),
    "quic": Application(5, "QUIC, any version, by its long header"),
    "ssh": Application(6, "SSH"),
    "ntp": Application(7, "NTP"),
    "bittorrent": Application(8, "BitTorrent: peers, trackers, DHT"),
    "dns-over-tls": Application(9, "DNS over TLS: by ALPN, or by port 853"),
    "imaps": Application(10, "IMAP over TLS: by ALPN, or by port 993"),
    "pop3s": Application(11, "POP3 over TLS: by ALPN, or by port 995"),
    "submissions": Application(12, "mail submission over TLS, by port 465"),
    "ldaps": Application(13, "LDAP over TLS, by port 636"),
    "mqtts": Application(14, "MQTT over TLS: by ALPN, or by port 8883"),
    "dtls": Application(15, "DTLS"),
    "mdns": Application(16, "multicast DNS"),
    "llmnr": Application(17, "LLMNR"),
    "stun": Application(18, "STUN and TURN"),
    "ssdp": Application(19, "SSDP (UPnP)"),
    "sip": Application(20, "SIP"),
    "rtsp": Application(21, "RTSP"),
    "smtp": Application(22, "SMTP"),
    "ftp": Application(23, "FTP, its control connection"),
    "imap": Application(24, "IMAP"),
    "pop3": Application(25, "POP3"),
    "smb": Application(26, "SMB"),
    "rdp": Application(27, "Remote Desktop"),
    "vnc": Application(28, "VNC (RFB)"),
    "telnet": Application(29, "Telnet"),
    "mysql": Application(30, "MySQL and MariaDB"),
    "postgresql": Application(31, "PostgreSQL"),
    "redis": Application(32, "Redis"),
    "mqtt": Application(33, "MQTT"),
    "amqp": Application(34, "AMQP"),
    "xmpp": Application(35, "XMPP"),
    "bgp": Application(36, "BGP"),
    "snmp": Application(37, "SNMP"),
    "dhcp": Application(38, "DHCP"),
    "wireguard": Application(39, "WireGuard"),
}

PORTS: Dict[int, str] = {
    20: "ftp-data", 21: "ftp", 22: "ssh", 23: "telnet", 25: "smtp", 53: "domain", 67: "bootps", 68: "bootpc",
    69: "tftp", 80: "http", 88: "kerberos", 110: "pop3", 111: "sunrpc", 119: "nntp", 123: "ntp", 137: "netbios-ns",
    138: "netbios-dgm", 139: "netbios-ssn", 143: "imap", 161: "snmp", 162: "snmptrap", 179: "bgp", 389: "ldap",
    443: "https", 445: "microsoft-ds", 465: "submissions", 500: "isakmp", 514: "syslog", 546: "dhcpv6-client",
    547: "dhcpv6-server", 554: "rtsp", 587: "submission", 631: "ipp", 636: "ldaps", 853: "domain-s", 873: "rsync",
    993: "imaps", 995: "pop3s", 1194: "openvpn", 1812: "radius", 1813: "radius-acct", 1883: "mqtt", 2049: "nfs",
    2055: "iop", 3306: "mysql", 3389: "ms-wbt-server", 3478: "stun", 4500: "ipsec-nat-t", 4739: "ipfix",
    4789: "vxlan", 5060: "sip", 5061: "sips", 5222: "xmpp-client", 5353: "mdns", 5355: "llmnr", 5432: "postgresql",
    5672: "amqp", 5900: "rfb", 6081: "geneve", 6379: "redis", 8080: "http-alt", 8883: "secure-mqtt",
}  # fmt: skip
"""Services by port, as IANA names them: what is left to say of a flow whose payload says nothing."""


class Verdict(NamedTuple):
    """`application`: of APPLICATIONS, "" if none is known. `name`: printable ASCII; its kind as in hellos.py."""

    application: str
    name_kind: int = NO_NAME
    name: bytes = b""


NOTHING = Verdict("")

_BY_ALPN = {
    b"h2": "https", b"http/1.1": "https", b"http/1.0": "https", b"dot": "dns-over-tls", b"imap": "imaps",
    b"pop3": "pop3s", b"mqtt": "mqtts",
}  # fmt: skip
_BY_TLS_PORT = {
    443: "https", 465: "submissions", 636: "ldaps", 853: "dns-over-tls", 993: "imaps", 995: "pop3s", 8883: "mqtts"
}  # fmt: skip
_BY_DNS_PORT = {5353: "mdns", 5355: "llmnr"}

_OVER_TCP = {
    rb"SSH-[12]\.[0-9]": "ssh",
    rb"\x13BitTorrent protocol": "bittorrent",
    rb"GET /(?:announce|scrape)[^ ]{0,16}\?(?:[^ ]{0,512}&)?info_hash=": "bittorrent",
    rb"220[ -][^\r\n]{0,200}SMTP": "smtp",
    rb"(?:EHLO|HELO|LHLO) [!-~]{1,255}\r?\n": "smtp",
    rb"220[ -][^\r\n]{0,200}FTP": "ftp",
    rb"\* (?:OK|PREAUTH|BYE)[ \[][^\r\n]{0,500}IMAP": "imap",
    rb"\+OK[ \r][^\r\n]{0,200}(?:POP|ready|<[^>\r\n]+@[^>\r\n]+>)": "pop3",
    rb"\x00[\x00\x01]..[\xfe\xff]SMB": "smb",
    rb"\x03\x00\x00.[\x06-\xfe][\xe0\xd0]": "rdp",
    rb"RFB 00[0-9]\.00[0-9]\n": "vnc",
    rb"\xff[\xfb-\xfe][\x00-\x32]\xff[\xfa-\xfe]": "telnet",
    rb"..\x00\x00\x0a[1-9][0-9]?\.[0-9]{1,2}\.[0-9]": "mysql",
    rb"\x00\x00\x00\x08\x04\xd2\x16[\x2f\x30]|\x00\x00..\x00\x03\x00\x00(?:user|database)\x00": "postgresql",
    rb"\*[1-9][0-9]{0,3}\r\n\$[0-9]": "redis",
    rb"\x10.{1,4}\x00(?:\x04MQTT|\x06MQIsdp)": "mqtt",
    rb"AMQP[\x00-\x03]": "amqp",
    rb"<(?:\?xml[^>]{0,100}\?>\s{0,2}<)?stream:stream": "xmpp",
    rb"\xff{16}[\x00-\x10].[\x01-\x05]": "bgp",
    rb"[A-Z]{2,16} (?:rtsp://[!-~]{1,600}|\*) RTSP/1\.[01]|RTSP/[12]\.0 [1-9]": "rtsp",
}
_OVER_BOTH = {
    rb"[A-Z]{2,16} sips?:[!-~]{1,600} SIP/2\.0\r?\n|SIP/2\.0 [1-6][0-9]{2} ": "sip",
}
_OVER_UDP = {
    rb"(?:M-SEARCH|NOTIFY) \* HTTP/1\.[01]\r?\n|HTTP/1\.[01] 200 OK\r\n(?=.{0,400}\r\n(?:ST|USN): ?)": "ssdp",
    rb"d1:[are][di0-9l].{0,400}1:y1:[qre]": "bittorrent",
    rb"\x00\x00\x04\x17\x27\x10\x19\x80\x00\x00\x00\x00": "bittorrent",
    rb"[\x00-\x3f].[\x00-\xff][\x00-\xff]\x21\x12\xa4\x42": "stun",
    rb"[\x14-\x17]\xfe[\xff\xfd\xfc].{8}": "dtls",
    rb"\x30(?:[\x10-\x7f]|\x81.|\x82..)\x02\x01[\x00\x01\x03](?:\x04[\x00-\x7f]|\x30.)": "snmp",
    rb"[\x01\x02]\x01\x06.{233}\x63\x82\x53\x63": "dhcp",
    rb"\x01\x00\x00\x00.{144}\Z|\x02\x00\x00\x00.{88}\Z|\x03\x00\x00\x00.{60}\Z": "wireguard",
}


class _Patterns:
    """All patterns as one, each a group of it."""

    def __init__(self, rows: Dict[bytes, str]) -> None:
        self._all = re.compile(b"|".join(b"(" + pattern + b")" for pattern in rows), re.DOTALL)
        self._applications = ["", *rows.values()]

    def application(self, payload: bytes) -> str:
        """Whose pattern the payload begins with."""
        found = self._all.match(payload)
        return self._applications[found.lastindex or 0] if found else ""


_TCP_PATTERNS, _UDP_PATTERNS = _Patterns({**_OVER_TCP, **_OVER_BOTH}), _Patterns({**_OVER_UDP, **_OVER_BOTH})


def _tls(payload: bytes, ports: Tuple[int, int]) -> Verdict | None:
    hello = hellos.tls(payload)
    if hello is None:
        return None
    by_port = (_BY_TLS_PORT[port] for port in ports if port in _BY_TLS_PORT)
    by_alpn = (_BY_ALPN[name] for name in hello.alpn if name in _BY_ALPN)
    return _named(next(by_alpn, "") or next(by_port, "tls"), TLS_NAME, hello.name)


def _named(application: str, kind: int, name: bytes) -> Verdict:
    return Verdict(application, kind, name) if name else Verdict(application)


def _over_tcp(payload: bytes, ports: Tuple[int, int]) -> Verdict:
    found = _tls(payload, ports)
    if found is not None:
        return found
    application = _TCP_PATTERNS.application(payload)
    if application:
        return Verdict(application)
    http = hellos.http(payload)
    if http is not None:
        return _named("http", HTTP_NAME, http.name)
    dns = hellos.dns_over_tcp(payload, is_likely=53 in ports)
    return NOTHING if dns is None else _named("dns", DNS_NAME, dns.name)


def _over_udp(payload: bytes, ports: Tuple[int, int]) -> Verdict:
    likely = next((port for port in ports if port in (53, *_BY_DNS_PORT)), 0)
    if not likely and hellos.is_quic(payload):
        return Verdict("quic")
    dns = hellos.dns(payload, is_likely=likely != 0)
    if dns is not None:
        return _named(_BY_DNS_PORT.get(likely, "dns"), DNS_NAME, dns.name)
    if hellos.is_ntp(payload, is_likely=123 in ports):
        return Verdict("ntp")
    return Verdict(_UDP_PATTERNS.application(payload))


_OVER: Dict[int, Callable[[bytes, Tuple[int, int]], Verdict]] = {_TCP: _over_tcp, _UDP: _over_udp}


def classify(payload: bytes, protocol: int, ports: Tuple[int, int]) -> Verdict:
    """What a flow's first payload says, as far as it was copied. `ports`: source, destination."""
    look = _OVER.get(protocol)
    return NOTHING if look is None else look(payload, ports)
