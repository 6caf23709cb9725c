# SPDX-License-Identifier: GPL-2.0-or-later
"""Field group `application`: flows of real clients and servers are named as tshark names the same packets.

tshark goes by ports where it knows no better: it is told which protocol is spoken at an odd one, and we are not.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import Run
from lab import needs
from lab.certificates import Authority
from lab.collectors import MessageFile
from lab.flowexp import Exporter
from lab.netns import Namespace, connect, namespaces, veth
from lab.process import CommandFailed, run
from lab.wait import wait_for
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from flowexp.protocol.decode import Decoder

pytestmark = pytest.mark.kernel

CLIENT, SERVER = {4: "10.1.0.1", 6: "fd01::1"}, {4: "10.1.0.2", 6: "fd01::2"}
HTTP_PORTS, TLS_PORTS, SSH_PORTS, DNS_PORTS, NTP_PORTS = (80, 8765), (443, 9999), (22, 2200), (53, 5300), (123, 1123)
QUIC_PORTS, BITTORRENT_PORTS, STRANGE_PORTS = (443, 4433), (6881, 50000), (7, 40000)
NAME = "www.example.org"


class Network(NamedTuple):
    client: Namespace
    server: Namespace


@pytest.fixture
def network() -> Iterator[Network]:
    needs.need(needs.kernel(), needs.tools("curl", "openssl", "ssh", "tshark"))
    with namespaces("client", "server", ipv6=True) as (client, server):
        left, right = veth(client, server)
        connect(left, right, ("10.1.0.1/24", "10.1.0.2/24"), ("fd01::1/64", "fd01::2/64"))
        yield Network(client, server)


def family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def bracketed(version: int) -> str:
    return SERVER[version] if version == 4 else f"[{SERVER[version]}]"


def listens(server: Namespace, port: int) -> bool:
    return f":{port:04X} " in server.read_proc_net("tcp") + server.read_proc_net("tcp6")


@contextmanager
def web(network: Network, directory: Path, port: int, version: int) -> Iterator[None]:
    process = network.server.start(
        sys.executable, "-m", "http.server", "--bind", SERVER[version], "--directory", directory, str(port),
        directory=directory, name=f"http-{port}",
    )  # fmt: skip
    try:
        wait_for("http.server to listen", lambda: process.is_alive() and listens(network.server, port))
        yield
    finally:
        process.stop()


@contextmanager
def tls(network: Network, directory: Path, port: int, version: int, authority: Authority) -> Iterator[None]:
    made = authority.sign(f"server-{port}", alternatives=f"DNS:{NAME}")
    process = network.server.start(
        "openssl", "s_server", "-accept", f"{bracketed(version)}:{port}", "-cert", made.path, "-key", made.key,
        "-alpn", "h2,http/1.1", "-www", directory=directory, name=f"s_server-{port}",
    )  # fmt: skip
    try:
        wait_for("s_server to listen", lambda: process.is_alive() and listens(network.server, port))
        yield
    finally:
        process.kill()


@contextmanager
def answering(network: Network, version: int, ports: Sequence[int], answer: bytes) -> Iterator[None]:
    """TCP servers that say so as soon as somebody comes, and hear him out; each serves one."""
    with ExitStack() as stack:
        threads = []
        for port in ports:
            listening = stack.enter_context(network.server.socket(family(version), socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((SERVER[version], port))
            listening.listen()
            listening.settimeout(20)
            threads.append(threading.Thread(target=_serve_one, args=(listening, answer)))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.join()


def _serve_one(listening: socket.socket, answer: bytes) -> None:
    talking, _ = listening.accept()
    with talking:
        talking.sendall(answer)
        talking.recv(100)


def exchange(network: Network, version: int, port: int, question: bytes, answer: bytes) -> None:
    """A datagram to the server, and one back."""
    with (
        network.server.socket(family(version)) as server,
        network.client.socket(family(version)) as client,
    ):
        server.bind((SERVER[version], port))
        server.settimeout(20)
        client.settimeout(20)
        client.sendto(question, (SERVER[version], port))
        _, back = server.recvfrom(4096)
        server.sendto(answer, back)
        assert client.recv(4096) == answer


def dns(name: str, *, is_answer: bool) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    header = struct.pack("!6H", 0x1234, 0x8180 if is_answer else 0x0100, 1, int(is_answer), 0, 0)
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\1" if is_answer else b""
    return header + labels + b"\0\0\1\0\1" + answer


def ntp(mode: int) -> bytes:
    times = [0, 0, 0, 0xE8000000_00000000] if mode == 3 else [0xE8000000_00000000] * 4
    return struct.pack("!BBbb3I4Q", 4 << 3 | mode, 0 if mode == 3 else 2, 6, -20, 0, 0, 0, *times)


QUIC_INITIAL = bytes.fromhex("c300000001088394c8f03e5157080000449e") + bytes(range(256)) * 4 + bytes(158)
BITTORRENT = b"\x13BitTorrent protocol" + bytes(8) + b"i" * 20 + b"-FX0001-" + b"p" * 12
LAST = b"the last packet of all"
SSH_BANNER = b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"


def call(network: Network, version: int, directory: Path) -> None:
    """All there is to be heard, one after the other."""
    authority = Authority(directory)
    client = network.client
    for port in HTTP_PORTS:
        with web(network, directory, port, version):
            host = f"Host: {NAME}:{port}"
            client.run("curl", "--silent", "-o", "/dev/null", "-H", host, f"http://{bracketed(version)}:{port}/")
    for port in TLS_PORTS:
        with tls(network, directory, port, version, authority):
            client.run(
                "openssl", "s_client", "-connect", f"{bracketed(version)}:{port}", "-servername", NAME, "-alpn",
                "h2,http/1.1", stdin="Q\n",
            )  # fmt: skip
    with answering(network, version, SSH_PORTS, SSH_BANNER):
        for port in SSH_PORTS:
            options = ("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-F", "/dev/null", "-p", str(port))
            with pytest.raises(CommandFailed):  # the server is gone after the banners
                client.run("ssh", *options, f"nobody@{SERVER[version]}")
    with answering(network, version, BITTORRENT_PORTS, BITTORRENT):
        for port in BITTORRENT_PORTS:
            with client.socket(family(version), socket.SOCK_STREAM) as peer:
                peer.settimeout(20)
                peer.connect((SERVER[version], port))
                peer.sendall(BITTORRENT)
                assert peer.recv(100) == BITTORRENT
    for port in DNS_PORTS:
        exchange(network, version, port, dns(NAME, is_answer=False), dns(NAME, is_answer=True))
    for port in NTP_PORTS:
        exchange(network, version, port, ntp(3), ntp(4))
    for port in QUIC_PORTS:
        exchange(network, version, port, QUIC_INITIAL, QUIC_INITIAL)
    for port in STRANGE_PORTS:
        exchange(network, version, port, b"\x07" * 900, b"nothing that has a name")
    exchange(network, version, STRANGE_PORTS[0] + 1, b"nor this", LAST)


@contextmanager
def captured(namespace: Namespace, path: Path) -> Iterator[None]:
    """All packets on eth0, into `path`, up to the one that says LAST."""
    process = namespace.start("tshark", "-q", "-i", "eth0", "-w", path, directory=path.parent, name="capture")
    try:
        wait_for("tshark to capture", lambda: process.is_alive() and "Capturing on" in process.stderr and path.exists())
        yield
        wait_for("tshark to have written the last packet", lambda: LAST in path.read_bytes())
    finally:
        process.stop()


Key = tuple[int, int, int]
"""Protocol and ports."""


class Name(NamedTuple):
    application: str
    server_name: str = ""


# What tshark calls protocols, and what we call those of them that can be the same.
_TSHARK = {"tls": "tls", "http": "http", "dns": "dns", "ssh": "ssh", "ntp": "ntp", "quic": "quic",
           "bittorrent": "bittorrent"}  # fmt: skip
_DECODE_AS = {
    "tcp": {HTTP_PORTS[1]: "http", TLS_PORTS[1]: "tls", SSH_PORTS[1]: "ssh", BITTORRENT_PORTS[1]: "bittorrent"},
    "udp": {DNS_PORTS[1]: "dns", NTP_PORTS[1]: "ntp", QUIC_PORTS[1]: "quic"},
}
_AS_TSHARK = {"https": "tls"}  # what is in TLS shows by ALPN and port
_NAMES = ("tls.handshake.extensions_server_name", "http.host", "dns.qry.name")


def by_tshark(capture: Path) -> dict[Key, Name]:
    """Of each flow: the protocol of its first payload, and the name in it."""
    words = [f"{over}.port=={port},{name}" for over, ports in _DECODE_AS.items() for port, name in ports.items()]
    fields = ["ip.proto", "ipv6.nxt", "tcp.srcport", "tcp.dstport", "udp.srcport", "udp.dstport", "tcp.len",
              "frame.protocols", *_NAMES]  # fmt: skip
    shown = run(
        ["tshark", "-n", "-r", capture, *(word for each in words for word in ("-d", each)), "-T", "fields", "-o",
         "tcp.desegment_tcp_streams:false", *(word for each in fields for word in ("-e", each))],
    )  # fmt: skip
    found: dict[Key, Name] = {}
    for line in shown.splitlines():
        ip4, ip6, tcp_source, tcp_to, udp_source, udp_to, octets, protocols, *names = line.split("\t")
        if not (tcp_source or udp_source) or tcp_source and octets == "0":
            continue
        key = (int(ip4 or ip6), int(tcp_source or udp_source), int(tcp_to or udp_to))
        last = [_TSHARK[each] for each in protocols.split(":") if each in _TSHARK]
        found.setdefault(key, Name(last[0] if last else "", next(filter(None, names), "")))
    return found


def by_us(file: MessageFile) -> dict[Key, Name]:
    """Of each flow that its payload has named, with names from the Options Records."""
    decoder = Decoder()
    decoded = [decoder.decode(message, None) for message in file.messages()]
    told: list[Mapping[str, Any]] = [record for message in decoded for record in message.options_records]
    names = {each["applicationId"]: each["applicationName"] for each in told if "applicationName" in each}
    flows = [each for message in decoded for each in message.records if each.get("sourceTransportPort")]
    found = {}
    for flow in flows:
        identifier = flow["applicationId"]
        key = (flow["protocolIdentifier"], flow["sourceTransportPort"], flow["destinationTransportPort"])
        server = [flow[each] for each in ("TLS_SERVER_NAME", "httpRequestHost", "DNS_QUERY") if each in flow]
        if identifier.startswith("06"):
            found[key] = Name(names[identifier], server[0] if server else "")
        else:
            assert not server and (identifier == "00000000" or names[identifier])
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_flows_are_named_as_tshark_names_the_same_packets(network: Network, version: int, tmp_path: Path) -> None:
    file, capture = MessageFile(tmp_path / "flows.ipfix"), tmp_path / "all.pcapng"
    configuration = {"fields": {"groups": ["application"]}}
    with (
        Exporter(network.server, tmp_path, collectors=[file.url], configuration=configuration) as exporter,
        captured(network.server, capture),
    ):
        call(network, version, tmp_path)
        assert exporter.stop() == 0
    assert exporter.ledger().closes
    ours, theirs = by_us(file), by_tshark(capture)
    assert {key: name._replace(application=_AS_TSHARK.get(name.application, name.application)) for key, name in
            ours.items()} == {key: name for key, name in theirs.items() if name.application}  # fmt: skip
    assert len(ours) == 2 * 2 * 7  # two ports and two directions of each application, and none of what has no name
    asked = {(protocol, to): name for (protocol, _, to), name in ours.items() if to < 32768}
    assert [asked[6, port] for port in TLS_PORTS] == [Name("https", NAME)] * 2
    assert [asked[6, port] for port in HTTP_PORTS] == [Name("http", f"{NAME}:{port}") for port in HTTP_PORTS]
    assert [asked[17, port] for port in DNS_PORTS] == [Name("dns", NAME)] * 2


# How long answers of DNS take


DELAY_S = 0.3


@pytest.mark.parametrize("version", [4, 6])
def test_a_dns_answer_took_as_long_as_its_server(network: Network, version: int, tmp_path: Path) -> None:
    """No less than the server waited, no more than the client did, whoever runs late."""
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"fields": {"groups": ["application"]}}
    with (
        Exporter(network.server, tmp_path, collectors=[file.url], configuration=configuration) as exporter,
        network.server.socket(family(version)) as server,
        network.client.socket(family(version)) as client,
    ):
        server.bind((SERVER[version], 53))
        for each in (server, client):
            each.settimeout(20)
        began_ns = time.monotonic_ns()
        client.sendto(dns(NAME, is_answer=False), (SERVER[version], 53))
        _, back = server.recvfrom(4096)
        time.sleep(DELAY_S)
        server.sendto(dns(NAME, is_answer=True), back)
        client.recv(4096)
        most_us = (time.monotonic_ns() - began_ns) // 1000
        assert exporter.stop() == 0
    decoder = Decoder()
    flows = [flow for message in file.messages() for flow in decoder.decode(message, None).records]
    flows = [flow for flow in flows if "DNS_QUERY" in flow]
    took_us = {flow["sourceTransportPort"]: flow["dnsResponseTimeMicroseconds"] for flow in flows}
    assert len(took_us) == 2 and took_us.pop(53) in range(int(DELAY_S * 1e6), most_us + 1)
    assert list(took_us.values()) == [0]


def test_answers_of_a_capture_took_as_long_as_tshark_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A and AAAA from one port, an answer that is not the query's, one that nobody gives, and one over TCP."""
    needs.need(needs.bpf(), needs.tools("tshark"))
    question, rest = DNSQR(qname=NAME), IP(src=CLIENT[4], dst=SERVER[4])
    answered = IP(src=SERVER[4], dst=CLIENT[4])
    packets = [
        (0, rest / UDP(sport=4001, dport=53) / DNS(id=1, qd=question)),
        (5, rest / UDP(sport=4001, dport=53) / DNS(id=2, qd=question)),
        (20_123, answered / UDP(sport=53, dport=4001) / DNS(id=1, qr=1, qd=question)),
        (20_500, answered / UDP(sport=53, dport=4001) / DNS(id=2, qr=1, qd=question)),
        (30_000, rest / UDP(sport=4002, dport=53) / DNS(id=3, qd=question)),
        (31_000, answered / UDP(sport=53, dport=4002) / DNS(id=4, qr=1, qd=question)),
        (32_000, rest / UDP(sport=4003, dport=53) / DNS(id=5, qd=question)),
        (40_000, rest / TCP(sport=4004, dport=53, flags="PA") / DNS(id=6, qd=question)),
        (47_777, answered / TCP(sport=53, dport=4004, flags="PA") / DNS(id=6, qr=1, qd=question)),
    ]
    capture, configuration = tmp_path / "dns.pcap", tmp_path / "groups.toml"
    frames = [Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / packet for _, packet in packets]
    for (us, _), frame in zip(packets, frames):
        frame.time = 1_700_000_000 + us / 1e6
    wrpcap(str(capture), frames)
    configuration.write_text('[fields]\ngroups = ["application"]\n')
    dumped = Run(capsys)("dump", "--read", capture, "-c", configuration, "--format", "json")
    flows = [json.loads(line) for line in dumped.stdout.splitlines()]
    ours = {flow["destinationTransportPort"]: flow["dnsResponseTimeMicroseconds"] for flow in flows}
    assert ours == {53: 0, 4001: 20_123, 4002: 0, 4004: 7_777}
    assert [flow["dnsResponseTimeMicroseconds"] for flow in flows if flow["destinationTransportPort"] == 53] == [0] * 4
    fields = ("udp.dstport", "tcp.dstport", "dns.time")
    shown = run(["tshark", "-n", "-r", capture, "-Y", "dns.time", "-T", "fields", *(f"-e{each}" for each in fields)])
    lines = (line.split("\t") for line in shown.splitlines())
    theirs = [(int(udp or tcp), round(float(seconds) * 1e6)) for udp, tcp, seconds in lines]
    assert dict(reversed(theirs)) == {port: us for port, us in ours.items() if us}
