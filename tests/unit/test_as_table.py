# SPDX-License-Identifier: GPL-2.0-or-later
"""AS numbers by a file of prefixes: every form of a line, longest matches held against `ipaddress`, what is wrong."""

from __future__ import annotations

import gzip
import ipaddress
import random
import socket
import time
from pathlib import Path
from typing import Callable, Dict, List, Union

import numpy as np
import pytest

from flowexp.as_table import AsNumbers, as_table_of, read_as_table
from flowexp.config import Fields
from flowexp.errors import UsageError
from flowexp.protocol.elements import MEASURED

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
BITS = {4: 32, 6: 128}


def octets_of(addresses: List[str]) -> np.ndarray:
    return np.array([list(ipaddress.ip_address(address).packed) for address in addresses], np.uint8)


def looked_up(path: Path, *addresses: str) -> List[int]:
    table = read_as_table(path)
    return [int(table.look_up(octets_of([address]))[0]) for address in addresses]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "as.tsv"


@pytest.mark.parametrize(
    "line",
    [
        "198.51.100.0/24 64500",
        "198.51.100.0/24\t64500",
        "198.51.100.0/24,64500",
        "  198.51.100.0/24 ,\t64500  \r",
        "198.51.100.0/24 64500 EXAMPLE, Inc",
        "198.51.100.0\t24\t64500",
        "198.51.100.0\t24\t64500_64501",
        "198.51.100.0\t24\t64500,64501",
        "198.51.100.0\t24\t64500_64501,64502",
    ],
)
def test_a_line_has_any_of_these_forms(file: Path, line: str) -> None:
    file.write_text(f"; a comment\n\n# another, é\n{line}\n")
    assert looked_up(file, "198.51.99.255", "198.51.100.0", "198.51.100.255", "198.51.101.0") == [0, 64500, 64500, 0]


def test_both_families_are_in_one_file_that_may_be_gzipped(file: Path) -> None:
    with gzip.open(file, "wt") as packed:
        packed.write("2001:db8::/32 64501\n198.51.100.0/24 64500\n2001:db8:0:1::7/128 4294967295\n")
    expected = [64500, 64501, 4294967295, 64501, 0]
    addresses = "198.51.100.9", "2001:db8:0:1::6", "2001:db8:0:1::7", "2001:db8:0:1::8", "2001:db9::"
    assert looked_up(file, *addresses) == expected
    assert str(read_as_table(file)) == f"{file}: AS numbers by 1 IPv4 and 2 IPv6 prefixes"


def test_a_family_without_prefixes_has_no_as_number(file: Path) -> None:
    file.write_text("0.0.0.0/0 1\n")
    assert looked_up(file, "0.0.0.0", "255.255.255.255", "::", "ffff::") == [1, 1, 0, 0]


def test_of_a_prefix_that_is_there_twice_the_first_as_number_holds(file: Path) -> None:
    file.write_text("10.0.0.0/8 1\n10.0.0.0/9 2\n10.0.0.0/8 3\n10.0.0.0/9 4\n")
    assert looked_up(file, "10.0.0.1", "10.128.0.1") == [2, 1]


def random_prefixes(rng: random.Random, version: int, count: int) -> Dict[Network, int]:
    """Many that nest or lie side by side: they differ in a few bits only, at either end of the addresses."""
    bits, prefixes = BITS[version], {}
    for _ in range(count):
        length = rng.choice([0, 1, 7, 8, 9, 16, bits // 2, bits - 9, bits - 2, bits - 1, bits])
        address = sum(rng.getrandbits(1) << bit for bit in (0, 1, 2, 8, bits // 2, bits - 9, bits - 8, bits - 1))
        whole = rng.choice([address, (1 << bits) - 1 - address])
        prefixes[ipaddress.ip_network((whole >> (bits - length) << (bits - length), length))] = rng.getrandbits(32)
    return prefixes


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(20))
def test_the_longest_match_is_that_of_ipaddress(file: Path, version: int, seed: int) -> None:
    rng = random.Random(seed)
    prefixes = random_prefixes(rng, version, rng.choice([1, 2, 10, 300]))
    file.write_text("".join(f"{prefix} {number}\n" for prefix, number in prefixes.items()))
    most = (1 << BITS[version]) - 1
    edges = {edge for each in prefixes for edge in (int(each[0]), int(each[-1]))}
    wanted = {min(max(edge + step, 0), most) for edge in edges for step in (-1, 0, 1)} | {rng.randint(0, most)}
    make = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
    addresses = [make(each) for each in wanted]
    found = read_as_table(file).look_up(octets_of(list(map(str, addresses))))
    expected = []
    for address in addresses:
        matches = [prefix for prefix in prefixes if address in prefix]
        expected.append(prefixes[max(matches, key=lambda prefix: prefix.prefixlen)] if matches else 0)
    assert found.dtype == np.uint32 and found.tolist() == expected


def test_in_a_large_table_each_host_has_its_own_number(
    file: Path, record_property: Callable[[str, object], None]
) -> None:
    """A tenth of the Internet's; how long it takes is told (--junitxml) and decides nothing."""
    rng = np.random.default_rng(1)
    hosts = {4: rng.integers(0, 256, (100_000, 4), np.uint8), 6: rng.integers(0, 256, (25_000, 16), np.uint8)}
    hosts = {version: np.unique(each, axis=0) for version, each in hosts.items()}
    with file.open("w") as text:
        text.write("0.0.0.0/0 4000000000\n::/0 4000000001\n")
        for version, each in hosts.items():
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            for number, host in enumerate(each, 1):
                text.write(f"{socket.inet_ntop(family, host.tobytes())}/{BITS[version]} {number}\n")
    began_s = time.process_time()
    table = read_as_table(file)
    record_property("cpu_seconds_of_reading", time.process_time() - began_s)
    for each in hosts.values():
        order = rng.permutation(len(each))
        assert (table.look_up(each[order]) == order + 1).all()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("64500 198.51.100.0/24", '"64500" is no address'),
        ("198.51.100/24 64500", '"198.51.100" is no address'),
        ("2001:db8::g/32 64500", '"2001:db8::g" is no address'),
        ("\x00\x1b[2J 64500", r'"\u0000\u001b[2J" is no address'),
        ("198.51.100.0/33 64500", '"33" is no prefix length of 0 to 32, as in 198.51.100.0/24'),
        ("198.51.100.0/ 64500", '"" is no prefix length of 0 to 32, as in 198.51.100.0/24'),
        ("198.51.100.0", '"" is no prefix length of 0 to 32, as in 198.51.100.0/24'),
        ("1.0.0.0 1.0.0.255 13335 US", '"1.0.0.255" is no prefix length of 0 to 32, as in 198.51.100.0/24'),
        ("2001:db8::/129 64500", '"129" is no prefix length of 0 to 128, as in 198.51.100.0/24'),
        ("198.51.100.7/24 64500", "198.51.100.7/24 has bits set behind its length"),
        ("198.51.100.0/24", '"" is no AS number of 0 to 4294967295, as in 198.51.100.0/24 64500'),
        ("198.51.100.0/24 AS64500", '"AS64500" is no AS number of 0 to 4294967295, as in 198.51.100.0/24 64500'),
        ("198.51.100.0/24 -1", '"-1" is no AS number of 0 to 4294967295, as in 198.51.100.0/24 64500'),
        ("198.51.100.0/24 4294967296", '"4294967296" is no AS number of 0 to 4294967295, as in 198.51.100.0/24 64500'),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(file: Path, line: str, fault: str) -> None:
    file.write_text(f"# two lines before\n10.0.0.0/8 1\n{line}\n10.0.0.0/8 1\n")
    with pytest.raises(UsageError) as error:
        read_as_table(file)
    assert str(error.value) == f"{file}:3: {fault}"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, file: Path) -> None:
    def fault(path: Path) -> str:
        with pytest.raises(UsageError) as error:
            read_as_table(path)
        return str(error.value)

    assert fault(file) == f"{file}: cannot be read: No such file or directory"
    assert fault(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    file.write_text("# nothing but this\n")
    assert fault(file) == f"{file}: there is no prefix in it"
    file.write_bytes(gzip.compress(b"10.0.0.0/8 1\n" * 1000)[:-20])
    assert fault(file).startswith(f"{file}: cannot be read: ")


def test_a_table_is_read_where_records_tell_of_it_alone(file: Path) -> None:
    file.write_text("10.0.0.0/8 1\n")
    assert as_table_of(Fields(groups=("routing",), as_table=str(file))) is not None
    assert as_table_of(Fields(groups=("nat",), as_table=str(file))) is None
    assert as_table_of(Fields(groups=("routing",))) is None


def test_flows_have_the_numbers_of_both_ends_while_there_is_a_table(file: Path) -> None:
    file.write_text("10.0.0.0/8 1\n10.2.0.0/16 70000\n")
    columns = {"src_addr": octets_of(["10.1.0.1"] * 2), "dst_addr": octets_of(["10.2.0.1", "192.0.2.1"])}
    assert AsNumbers()(columns) is columns
    joined = AsNumbers(read_as_table(file))(columns)
    assert (joined["src_as"].tolist(), joined["dst_as"].tolist()) == ([1, 1], [70000, 0])


@pytest.mark.parametrize(("octets", "expected"), [(4, 70000), (3, 70000), (2, 23456), (1, 0)])
def test_a_number_for_which_there_are_two_octets_only_is_as_trans(octets: int, expected: int) -> None:
    """RFC 6793."""
    wire = MEASURED["bgpSourceAsNumber"].wire({"src_as": np.array([70000, 255], np.uint32)}, octets)
    values = [int.from_bytes(bytes(each), "big") for each in wire.reshape(2, -1)] if octets == 3 else wire.tolist()
    assert values == [expected, 255]
