# SPDX-License-Identifier: GPL-2.0-or-later
"""TLS transport: who is trusted, what is refused, and in which words; Python's own TLS and openssl's are the ends."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from exporting import Sending
from lab.certificates import Authority, Certificate, server_context
from lab.process import Process
from lab.streams import SourcePorts, StreamCollector, free_port
from lab.wait import wait_for

from flowexp.errors import FlowexpError
from flowexp.transport.connection import Connection, Tls, Trouble
from flowexp.transport.stream import StreamTransport


@contextmanager
def exporting(port: int, tls: Tls, host: str = "localhost") -> Iterator[Sending]:
    sending = Sending(StreamTransport(host, port, tls=tls))
    with closing(sending.transport):
        yield sending


def refusal(port: int, tls: Tls, host: str = "localhost") -> str:
    with pytest.raises(Trouble) as raised, closing(Connection(host, port, tls=tls.context())) as connection:
        wait_for("the Collector's verdict", lambda: connection.discard())
    assert raised.value.state == "untrusted"
    return str(raised.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_messages_arrive_in_order_under_a_certificate_for_name_or_address(
    authority: Authority, certificate: Certificate, host: str
) -> None:
    with closing(StreamCollector(tls=server_context(certificate))) as peer:
        with exporting(peer.port, Tls(str(authority.ca_file)), host) as sending:
            numbers = sending.send(20_000)
            wait_for("all to be acknowledged", lambda: sending.figure("records_sent") == 20_000)
            assert sending.figure("collector") == f"tls://{host}:{peer.port}"
            assert sending.figure("octets_sent") < 3_000_000  # of Messages: without TLS
        wait_for("all to be read", lambda: len(SourcePorts(bytes(peer.sessions[0]))) == 20_000)
        assert SourcePorts(bytes(peer.sessions[0])) == numbers


def test_a_killed_tls_collector_gets_again_what_it_had_not_read(authority: Authority, certificate: Certificate) -> None:
    context = server_context(certificate)
    peer = StreamCollector(tls=context, reading=False)
    with exporting(peer.port, Tls(str(authority.ca_file))) as sending:
        numbers = sending.send(5000)
        wait_for("some to be acknowledged", lambda: sending.figure("records_sent") > 0)
        peer.close(abort=True)
        with closing(StreamCollector(port=peer.port, tls=context)) as again:
            wait_for("all to come", lambda: again.sessions and len(SourcePorts(bytes(again.sessions[0]))) == 5000)
            assert SourcePorts(bytes(again.sessions[0])) == numbers


def test_openssl_decodes_what_is_sent(authority: Authority, certificate: Certificate, tmp_path: Path) -> None:
    port = free_port()
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", certificate.path, "-key",
               certificate.key, "-quiet", "-tls1_2"]  # fmt: skip
    readable, writable = os.pipe()  # it leaves when its standard input ends
    process = Process(command, directory=tmp_path, name="openssl", stdin=readable)
    try:
        with exporting(port, Tls(str(authority.ca_file))) as sending:
            numbers = sending.send(3000)
            wait_for("all to be acknowledged", lambda: sending.figure("records_sent") == 3000)
        read = tmp_path / "openssl.stdout"
        wait_for("openssl to write all", lambda: len(SourcePorts(read.read_bytes())) == 3000)
        assert SourcePorts(read.read_bytes()) == numbers
    finally:
        process.kill()
        os.close(readable)
        os.close(writable)


def test_an_expired_certificate_is_told(authority: Authority) -> None:
    with closing(StreamCollector(tls=server_context(authority.sign("expired", days=-1)))) as peer:
        told = refusal(peer.port, Tls(str(authority.ca_file)))
    assert told == "the Collector's certificate has expired; renew it there"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_for_another_name_is_told(authority: Authority, host: str) -> None:
    other = authority.sign("other", alternatives="DNS:other.example")
    with closing(StreamCollector(tls=server_context(other))) as peer:
        told = refusal(peer.port, Tls(str(authority.ca_file)), host)
    assert told == "the Collector's certificate is for another name; put its name into the url"


def test_a_certificate_of_an_unknown_ca_is_told(certificate: Certificate) -> None:
    with closing(StreamCollector(tls=server_context(certificate))) as peer:
        told = refusal(peer.port, Tls())
    assert told == "the Collector's certificate is signed by no CA that is known here; name that CA with ca_file"


def test_a_collector_without_tls_is_told(authority: Authority) -> None:
    with closing(StreamCollector(greeting=b"220 mail.example ready\r\n")) as peer:
        told = refusal(peer.port, Tls(str(authority.ca_file)))
    assert told == "what answers there does not speak TLS; is it tcp:// there?"


def test_a_collector_of_old_tls_only_is_told(authority: Authority, certificate: Certificate, tmp_path: Path) -> None:
    port = free_port()
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", certificate.path, "-key",
               certificate.key, "-quiet", "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"]  # fmt: skip
    process = Process(command, directory=tmp_path, name="openssl")
    try:
        wait_for("openssl to listen", lambda: f":{port:04X} " in Path("/proc/net/tcp").read_text())
        assert refusal(port, Tls(str(authority.ca_file))) == "the Collector has no TLS 1.2 or later"
    finally:
        process.kill()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_collector_that_wants_a_certificate_gets_it_or_says_so(
    authority: Authority, certificate: Certificate, version: ssl.TLSVersion
) -> None:
    ours = authority.sign("exporter")
    context = server_context(certificate, client_ca=authority.ca_file)
    context.maximum_version = version
    ca_file = str(authority.ca_file)
    with closing(StreamCollector(tls=context)) as peer:
        wanted = "the Collector wants a certificate of ours; name one with cert_file and key_file"
        assert refusal(peer.port, Tls(ca_file)) == wanted
        with exporting(peer.port, Tls(ca_file, str(ours.path), str(ours.key))) as sending:
            sending.send(10)
            wait_for("all to be acknowledged", lambda: sending.figure("records_sent") == 10)


def test_a_certificate_of_ours_that_is_not_accepted_is_told(
    authority: Authority, certificate: Certificate, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path, "foreign").sign("exporter")
    context = server_context(certificate, client_ca=authority.ca_file)
    with closing(StreamCollector(tls=context)) as peer:
        told = refusal(peer.port, Tls(str(authority.ca_file), str(foreign.path), str(foreign.key)))
    assert told == "the Collector does not accept our certificate (cert_file)"


def test_files_that_are_no_use_are_named(authority: Authority, certificate: Certificate, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    other = authority.sign("another")
    for tls, message in (
        (Tls(str(tmp_path / "missing")), f"ca_file: {tmp_path}/missing: No such file or directory"),
        (Tls(str(tmp_path / "empty")), f"ca_file: {tmp_path}/empty: no PEM of that kind in it"),
        (Tls("", str(tmp_path / "empty")), f"cert_file, key_file: {tmp_path}/empty: no PEM of that kind in it"),
        (
            Tls("", str(certificate.path), str(other.key)),
            f"cert_file, key_file: {certificate.path}: they do not belong together",
        ),
    ):
        with pytest.raises(FlowexpError) as raised:
            tls.context()
        assert str(raised.value) == message
