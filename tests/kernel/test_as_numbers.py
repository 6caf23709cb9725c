# SPDX-License-Identifier: GPL-2.0-or-later
"""Field group `routing` with `as_table`: AS numbers of both ends, as Collectors read them and as dumps show them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.collectors import MessageFile, Nfacctd, Nfcapd, Record
from lab.flowexp import COMMAND, Exporter
from lab.metered import Lab, metered
from lab.process import run
from lab.traffic import send_frames
from lab.wait import wait_for
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from flowexp.protocol.decode import Decoder

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

AS_TRANS = 23456
TABLE = """
# prefixes of documentation and of private use
192.0.2.0/24      64496
192.0.2.128/25    70000
10.0.0.0\t8\t64512_64513
2001:db8::/32     64497
2001:db8:1::/48   4200000000
"""


class Flow(NamedTuple):
    source: str
    source_as: int
    destination: str
    destination_as: int
    packets: int


FLOWS = [
    Flow("192.0.2.1", 64496, "10.9.9.9", 64512, 3),
    Flow("192.0.2.200", 70000, "203.0.113.1", 0, 4),
    Flow("10.0.0.1", 64512, "192.0.2.129", 70000, 5),
    Flow("2001:db8::1", 64497, "2001:db8:1::1", 4200000000, 6),
    Flow("2001:db9::1", 0, "2001:db8:2::1", 64497, 7),
]


def frames(macs: tuple[str, str]) -> list[bytes]:
    made = []
    for flow in FLOWS:
        ip = (IPv6 if ":" in flow.source else IP)(src=flow.source, dst=flow.destination)
        made += [bytes(Ether(src=macs[0], dst=macs[1]) / ip / UDP(sport=1000, dport=2000) / bytes(30))] * flow.packets
    return made


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "nfacctd"))
    with metered(tmp_path) as lab:
        (tmp_path / "as.tsv").write_text(TABLE)
        yield lab


def configuration(lab: Lab, **more: Any) -> dict[str, Any]:
    return {"fields": {"groups": ["routing"], "as_table": str(lab.directory / "as.tsv")}, **more}


def send(lab: Lab) -> None:
    send_frames(lab.sender, frames((lab.sender.mac, "02:00:00:00:00:99")))


class AsNfacctd(Nfacctd):
    """That writes AS numbers down."""

    configuration = Nfacctd.configuration.replace("src_host,", "src_as, dst_as, src_host,")


def of_nfcapd(records: list[Record]) -> list[Flow]:
    def ends(record: Record, side: str) -> Any:
        return record.get(f"{side}4_addr") or record[f"{side}6_addr"]

    return [
        Flow(ends(each, "src"), each.get("src_as", 0), ends(each, "dst"), each.get("dst_as", 0), each["in_packets"])
        for each in records
        if each.get("dst_port") == 2000
    ]


def of_nfacctd(records: list[Record]) -> list[Flow]:
    return [
        Flow(each["ip_src"], each["as_src"], each["ip_dst"], each["as_dst"], each["packets"])
        for each in records
        if each["port_dst"] == 2000
    ]


@pytest.mark.parametrize("protocol", ["ipfix", "netflow9", "netflow5"])
def test_collectors_read_the_as_numbers_of_each_flow(lab: Lab, protocol: str) -> None:
    with Nfcapd(lab.meter, lab.directory) as nfcapd, AsNfacctd(lab.meter, lab.directory) as nfacctd:
        collectors = [f"{each.url}?protocol={protocol}" for each in (nfcapd, nfacctd)]
        with Exporter(lab.meter, lab.directory, collectors=collectors, configuration=configuration(lab)) as exporter:
            send(lab)
            assert exporter.stop() == 0, exporter.log
        nfcapd.finish()
        nfacctd.finish()
    expected = FLOWS
    if protocol == "netflow5":
        short = [flow for flow in FLOWS if ":" not in flow.source]
        numbers = [[min(each, AS_TRANS) if each > 65535 else each for each in (a, b)] for _, a, _, b, _ in short]
        expected = [flow._replace(source_as=a, destination_as=b) for flow, (a, b) in zip(short, numbers)]
    assert sorted(of_nfcapd(nfcapd.records())) == sorted(expected)
    assert sorted(of_nfacctd(nfacctd.records())) == sorted(expected)


def test_a_reload_reads_the_file_again_and_a_broken_one_changes_nothing(lab: Lab) -> None:
    table, file = lab.directory / "as.tsv", MessageFile(lab.directory / "flows.ipfix")
    more = {"collector": [{"url": file.url}], "timeouts": {"idle": 0.1, "sweep_interval": 0.05}}
    without = {"fields": {"groups": ["routing"]}, **more}

    with Exporter(lab.meter, lab.directory, configuration=without) as exporter:

        def send_and_wait(rounds: int) -> None:
            send(lab)
            wait_for("the records", lambda: exporter.status()["exportedRecords"]["idle"] == rounds * len(FLOWS))

        send_and_wait(1)
        exporter.reload(configuration(lab, **more))
        assert f"{table}: AS numbers by 3 IPv4 and 2 IPv6 prefixes" in exporter.log
        send_and_wait(2)
        table.write_text("192.0.2.0/24 1\nnonsense\n")
        os.kill(exporter.process.pid, signal.SIGHUP)
        refusal = f'{table}:2: "nonsense" is no address'
        wait_for("the refusal", lambda: exporter.status()["configuration"]["refusal"] == refusal)
        assert f"the configuration stays as it was: {refusal}\n" in exporter.log
        send_and_wait(3)
        table.write_text("0.0.0.0/0 1\n::/0 2\n")
        exporter.reload(configuration(lab, **more))
        send_and_wait(4)
        exporter.reload(without)
        send_and_wait(5)
        assert exporter.stop() == 0, exporter.log
    numbers: list[Any] = [(flow.source_as, flow.destination_as) for flow in FLOWS]
    everywhere = [((2, 2) if ":" in flow.source else (1, 1)) for flow in FLOWS]
    rounds = [[None] * len(FLOWS), numbers, numbers, everywhere, [None] * len(FLOWS)]
    told = told_in(file)
    for flow, *expected in zip(FLOWS, *rounds):
        assert told[flow.source] == expected


def told_in(file: MessageFile) -> dict[str, list[Any]]:
    """Of each source, record by record, both AS numbers; None where the record has none."""
    decoder, told = Decoder(), defaultdict(list)
    for message in file.messages():
        decoded = decoder.decode(message, None)
        assert (decoded.problems, decoded.lost_records) == ([], 0)
        for each in decoded.records:
            if each.get("destinationTransportPort") == 2000:
                source = each.get("sourceIPv4Address") or each["sourceIPv6Address"]
                numbers = each.get("bgpSourceAsNumber"), each.get("bgpDestinationAsNumber")
                told[source].append(None if numbers == (None, None) else numbers)
    return told


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration."""
    (tmp_path / "as.tsv").write_text(TABLE)
    file = tmp_path / "flowexp.toml"
    file.write_text(f'[fields]\ngroups = ["routing"]\nas_table = "{tmp_path / "as.tsv"}"\n')
    return file


def test_a_capture_is_shown_with_as_numbers_and_summed_by_them(tmp_path: Path, file: Path) -> None:
    needs.need(needs.kernel())
    capture = tmp_path / "sent.pcap"
    wrpcap(str(capture), [Ether(frame) for frame in frames(("02:00:00:00:00:01", "02:00:00:00:00:02"))])

    def dump(*words: object) -> list[dict[str, Any]]:
        command = [COMMAND, "dump", "-c", file, "--read", capture, "--format", "json", *words]
        return [json.loads(line) for line in run(command).splitlines()]

    found = [
        (each["bgpSourceAsNumber"], each["bgpDestinationAsNumber"], each["packetDeltaCount"])
        for each in dump()
        if "sourceIPv4PrefixLength" not in each
    ]
    assert sorted(found) == sorted((flow.source_as, flow.destination_as, flow.packets) for flow in FLOWS)
    sums = dump("--aggregate", "bgpDestinationAsNumber")
    assert {each["bgpDestinationAsNumber"]: each["packetDeltaCount"] for each in sums} == {
        64512: 3, 0: 4, 70000: 5, 4200000000: 6, 64497: 7,
    }  # fmt: skip
    (one,) = dump("--filter", "bgpSourceAsNumber = 70000")
    assert one["sourceIPv4Address"] == "192.0.2.200"


def test_the_table_of_a_running_exporter_is_shown_with_them(lab: Lab) -> None:
    with Exporter(lab.meter, lab.directory, collectors=["udp://127.0.0.1:9"], configuration=configuration(lab)) as it:
        send(lab)
        words = (COMMAND, "dump", "-c", it.configuration, "--format", "json", "--aggregate", "bgpDestinationAsNumber")
        sums = [json.loads(line) for line in lab.meter.run(*words).splitlines()]
        assert it.stop() == 0, it.log
    told = {each["bgpDestinationAsNumber"]: each["packetDeltaCount"] for each in sums}
    assert {number: told[number] for number in (64512, 70000, 4200000000, 64497)} == {
        64512: 3, 70000: 5, 4200000000: 6, 64497: 7,
    }  # fmt: skip


def test_check_reads_the_file_and_says_where_nobody_asks_for_it(file: Path) -> None:
    def found(text: str) -> str:
        file.write_text(text)
        command = [COMMAND, "check", "-c", file, "-i", "lo", "--collector", "udp://127.0.0.1:9"]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return "".join(line for line in shown.splitlines() if "as_table" in line)

    right, table = file.read_text(), file.with_name("as.tsv")
    assert found(right) == f"ok      as_table: {table}: AS numbers by 3 IPv4 and 2 IPv6 prefixes"
    unused = right.replace('"routing"', "")
    assert found(unused) == f'warning as_table: {table} is not read: "routing" is not in [fields] groups'
    table.write_text("10.0.0.0/33 1\n")
    assert found(right).startswith(f'FAILED  as_table: {table}:1: "33" is no prefix length')


def test_an_exporter_does_not_start_with_a_broken_file(file: Path) -> None:
    file.with_name("as.tsv").write_text("10.0.0.0/8\n")
    command = [COMMAND, "run", "-c", file, "-i", "lo", "--collector", "udp://127.0.0.1:9"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f'flowexp: {file.with_name("as.tsv")}:1: "" is no AS number')
