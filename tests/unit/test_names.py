# SPDX-License-Identifier: GPL-2.0-or-later
"""Names in the place of numbers: what getservbyport(3) says of a port, without a look at the file for each."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from flowexp import names

SERVICES = """\
# name  port/protocol  aliases
domain\t53/udp
domain 53/tcp nameserver  # of two lines the first counts
other 53/tcp
first 4739/sctp

no-port
port-only /tcp
broken many/tcp
h\xe9 99/udp
"""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "services"
    file.write_bytes(SERVICES.encode("latin-1"))
    monkeypatch.setattr(names, "_SERVICES", file)
    return file


@pytest.mark.parametrize(
    ("port", "protocol", "name"),
    [(53, 17, "domain"), (53, 6, "domain"), (4739, 132, "first"), (4739, 17, "4739"), (99, 17, "h\ufffd"),
     (53, 136, "53"), (53, 1, "53"), (7, 6, "7")],
)  # fmt: skip
def test_a_service_goes_by_port_and_protocol(services: Path, port: int, protocol: int, name: str) -> None:
    assert names.service_name(port, protocol) == name


def test_where_there_is_no_such_file_ports_are_numbers(services: Path) -> None:
    services.unlink()
    assert names.service_name(53, 17) == "53"


def test_this_machines_services_are_what_its_c_library_says() -> None:
    for protocol, word in ((6, "tcp"), (17, "udp")):
        for port in range(1, 1024):
            try:
                expected = socket.getservbyport(port, word)
            except OSError:
                expected = str(port)
            assert names.service_name(port, protocol) == expected


def test_protocols_and_interfaces_without_a_name_are_numbers() -> None:
    assert [names.protocol_name(number) for number in (6, 58, 255)] == ["TCP", "ICMPv6", "255"]
    assert [names.interface_name(number) for number in (0, socket.if_nametoindex("lo"), 4_000_000)] == [
        "", "lo", "4000000",
    ]  # fmt: skip
