# SPDX-License-Identifier: GPL-2.0-or-later
"""What `flowexp check` says of Collectors over TCP and TLS, and of their spools."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from lab import needs
from lab.certificates import Authority, server_context
from lab.streams import StreamCollector, free_port

from flowexp.check.collectors import _stream
from flowexp.check.finding import FAILED, OK, Finding
from flowexp.collector_url import parse_collector_url
from flowexp.config import Collector


def test_a_tcp_collector_is_reached_or_said_not_to_listen(tmp_path: Path) -> None:
    with closing(StreamCollector()) as peer:
        url = f"tcp://127.0.0.1:{peer.port}"
        spool = tmp_path / "new" / "spool"
        found = list(_stream(Collector(url=parse_collector_url(url), spool_path=str(spool))))
    assert found == [Finding(OK, url, "connected"), Finding(OK, str(spool), "room for a spool of 1024 MiB at most")]
    assert not spool.parent.exists()
    url = f"tcp://127.0.0.1:{free_port()}"
    found = list(_stream(Collector(url=parse_collector_url(url), spool_path="/dev/null/spool")))
    assert found == [
        Finding(FAILED, url, "nothing listens there"),
        Finding(FAILED, "/dev/null/spool", "cannot be the spool: /dev/null cannot be written"),
    ]


def test_the_verdict_of_a_tls_handshake_is_one_line(tmp_path: Path) -> None:
    needs.need(needs.tools("openssl"))
    authority = Authority(tmp_path)
    certificate, expired = authority.sign("collector"), authority.sign("expired", days=-1)
    ca_file = str(authority.ca_file)
    for context, verdict, detail in (
        (server_context(certificate), OK, "TLSv1.3, the certificate of localhost, 127.0.0.1 is good until "),
        (server_context(expired), FAILED, "the Collector's certificate has expired; renew it there"),
        (
            server_context(certificate, client_ca=authority.ca_file),
            FAILED,
            "the Collector wants a certificate of ours; name one with cert_file and key_file",
        ),
    ):
        with closing(StreamCollector(tls=context)) as peer:
            url = f"tls://localhost:{peer.port}"
            (found,) = _stream(Collector(url=parse_collector_url(url), ca_file=ca_file))
        assert (found.verdict, found.what) == (verdict, url)
        assert found.detail.startswith(detail)
