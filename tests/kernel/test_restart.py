# SPDX-License-Identifier: GPL-2.0-or-later
"""An exporter that is killed, and the next one: nothing is lost but what passed while no program was attached."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.collectors import Recorder
from lab.flowexp import BPFFS, COMMAND, PIN_PREFIX, Exporter
from lab.netns import Link, Namespace, namespaces, tcx_programs, veth
from lab.process import CommandFailed, run
from lab.traffic import Stack, make_capture, replay, send_frames
from lab.wait import wait_for
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from flowexp.kernel.pins import PinFolder
from flowexp.kernel.table import FlowTable
from flowexp.meter import this_layout
from flowexp.protocol.decode import Decoder
from flowexp.protocol.session import Decoded
from flowexp.status import ask

pytestmark = pytest.mark.kernel

UDP_STACKS = (Stack(4, 17), Stack(6, 17))
BATCH_RECORDS = 16_384  # as many may arrive twice after a kill
Record = dict[str, Any]


@pytest.fixture(autouse=True)
def live_metering() -> None:
    needs.need(needs.kernel())


class Lab(NamedTuple):
    """A sender, the machine that meters it, a Collector there, and the pin folder that outlives exporters."""

    sender: Link
    metered: Link
    recorder: Recorder
    pins: Path

    @property
    def meter(self) -> Namespace:
        return self.metered.namespace

    def send(self, *packets: Packet, times: int = 1) -> None:
        ethernet = Ether(src=self.sender.mac, dst=self.metered.mac)
        send_frames(self.sender, [bytes(ethernet / packet) for packet in packets] * times)

    def messages(self) -> list[Decoded]:
        decoder = Decoder()
        return [decoder.decode(message, "session") for message in self.recorder.messages()]

    def records(self) -> list[Record]:
        return [record for message in self.messages() for record in message.records]

    def packets_of(self, port: int) -> int:
        return sum(record["packetDeltaCount"] for record in self.records() if record["sourceTransportPort"] == port)

    def wait_for_marker(self, port: int) -> None:
        """Sends a TCP flow that ends at once; when its record has come, all sent before it has been metered."""
        self.send(IP(src="10.1.0.1", dst="10.1.0.9") / TCP(sport=port, dport=9, flags="R"))
        wait_for(f"the record of port {port}", lambda: self.packets_of(port))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    pins = BPFFS / f"{PIN_PREFIX}restart-{tmp_path.name}"
    try:
        with namespaces("host", "meter") as (host, meter), Recorder(meter) as recorder:
            yield Lab(*veth(host, meter), recorder, pins)
    finally:
        shutil.rmtree(pins, ignore_errors=True)


@contextmanager
def exporting(
    lab: Lab, directory: Path, *arguments: str, max_flows: int = 131_072, hook: str = "tc", **others: Any
) -> Iterator[Exporter]:
    """`flowexp run` with the common pin folder. Flows stay in the table until a RST or the end."""
    timeouts = {"idle": 600, "active": 600, "linger": 0, "sweep_interval": 0.05}
    table = {"pin_path": str(lab.pins), "max_flows": max_flows}
    configuration = {"timeouts": timeouts, "table": table, "hook": hook}
    options = {"collectors": [lab.recorder.url], **others}
    with Exporter(lab.meter, directory, *arguments, configuration=configuration, **options) as exporter:
        yield exporter


def kill(exporter: Exporter, link: Link) -> None:
    """kill -9; its programs go with it."""
    assert exporter.process.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_for("the programs to go", lambda: tcx_programs(link, "ingress") == 0)


def udp(port: int) -> Packet:
    return IP(src="10.1.0.1", dst="10.1.0.9") / UDP(sport=port, dport=9)


def buckets_before(pins: Path) -> list[int]:
    """Of each family, those in use before the change that is under way."""
    maps = PinFolder(str(pins)).tables()[-1].find_maps(FlowTable.map_names(this_layout()))
    assert maps is not None
    table = FlowTable.adopt(this_layout(), maps)
    before = [family.extent.before for family in table.families]
    table.close()
    return before


FLOWS = [udp(port) for port in range(1, 11)]


def test_flows_of_a_killed_exporter_are_exported_by_the_next_one(lab: Lab, tmp_path: Path) -> None:
    with exporting(lab, tmp_path) as first:
        lab.send(*FLOWS, times=3)
        lab.wait_for_marker(101)
        kill(first, lab.metered)
    assert lab.pins.is_dir()
    lab.send(*FLOWS, times=2)  # nobody looks
    with exporting(lab, tmp_path) as second:
        lab.send(*FLOWS, times=4)
        lab.wait_for_marker(102)
        assert second.stop() == 0
    assert {port: lab.packets_of(port) for port in range(1, 11)} == dict.fromkeys(range(1, 11), 3 + 4)
    ledger = second.ledger()
    assert ledger.closes
    assert (ledger.seen, ledger.exported) == (72, 72)
    assert not lab.pins.exists()


def test_the_sequence_number_goes_on_after_a_kill(lab: Lab, tmp_path: Path) -> None:
    for number in range(3):
        with exporting(lab, tmp_path) as exporter:
            lab.wait_for_marker(100 + number)
            ask(str(lab.pins))  # it answers when all is done that belongs to sending
            if number < 2:
                kill(exporter, lab.metered)
            else:
                assert exporter.stop() == 0
    messages = lab.messages()
    assert [problem for message in messages for problem in message.problems] == []
    assert sum(message.lost_records for message in messages) == 0
    assert [record["sourceTransportPort"] for record in lab.records()] == [100, 101, 102]
    assert sum(bool(message.templates) for message in messages) == 3


def test_a_clean_stop_leaves_nothing_and_the_next_exporter_begins_anew(lab: Lab, tmp_path: Path) -> None:
    for _ in range(2):
        with exporting(lab, tmp_path) as exporter:
            lab.send(*FLOWS)
            lab.wait_for_marker(101)
            assert exporter.stop() == 0
        assert exporter.ledger().seen == 11
        assert not lab.pins.exists()


def test_a_killed_exporters_flows_survive_a_start_that_fails(lab: Lab, tmp_path: Path) -> None:
    with exporting(lab, tmp_path) as first:
        lab.send(*FLOWS, times=3)
        lab.wait_for_marker(101)
        kill(first, lab.metered)
    with pytest.raises(CommandFailed, match="cannot write the IPFIX File"):
        with exporting(lab, tmp_path, collectors=[f"file://{tmp_path}/no/such/folder/flows"]):
            pass
    with exporting(lab, tmp_path) as second:
        assert second.stop() == 0
    assert {port: lab.packets_of(port) for port in range(1, 11)} == dict.fromkeys(range(1, 11), 3)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"collectors": ["file:///no/such/folder/flows"]}, "cannot write the IPFIX File"),
        ({"interfaces": ["eth0", "lo"], "hook": "xdp"}, "lo: its driver has no XDP"),  # eth0 is attached already
    ],
)
def test_flows_in_a_table_of_another_size_survive_a_start_that_fails(
    lab: Lab, tmp_path: Path, others: dict[str, Any], reason: str
) -> None:
    with exporting(lab, tmp_path) as first:
        lab.send(*FLOWS, times=3)
        lab.wait_for_marker(101)
        kill(first, lab.metered)
    with pytest.raises(CommandFailed, match=reason) as refused:
        with exporting(lab, tmp_path, max_flows=65_536, **others):
            pass
    assert "flows of 30 packets are left for the next start" in str(refused.value)
    with exporting(lab, tmp_path, max_flows=65_536) as second:
        assert second.stop() == 0
    assert {port: lab.packets_of(port) for port in range(1, 11)} == dict.fromkeys(range(1, 11), 3)
    assert (second.ledger().closes, second.ledger().exported) == (True, 31)
    assert not lab.pins.exists()


def test_a_kill_amid_an_export_repeats_one_batch_at_most_and_loses_nothing(lab: Lab, tmp_path: Path) -> None:
    flows = 60_000
    capture = make_capture(tmp_path / "x.pcap", packets=flows, flows=flows, macs=(lab.sender.mac, lab.metered.mac))
    with exporting(lab, tmp_path) as first:
        assert replay(lab.sender, capture) == flows
        lab.wait_for_marker(1)
        os.kill(first.process.pid, signal.SIGTERM)
        wait_for("half of the records", lambda: len(lab.recorder.messages()) > flows // 25)
        kill(first, lab.metered)
    heard = len(lab.recorder.messages())
    with exporting(lab, tmp_path) as second:
        assert second.stop() == 0
    before, after = lab.messages()[:heard], lab.messages()[heard:]
    assert 0 < sum(len(message.records) for message in before) < flows
    arrived = len(lab.records())
    assert flows + 1 <= arrived <= flows + 1 + BATCH_RECORDS
    keys = {tuple(str(record.get(name)) for name in (
        "sourceIPv4Address", "sourceIPv6Address", "sourceTransportPort", "protocolIdentifier", "vlanId",
        "icmpTypeCodeIPv4", "icmpTypeCodeIPv6",
    )) for record in lab.records()}  # fmt: skip
    assert len(keys) == flows + 1
    last = before[-1].sequence + len(before[-1].records)
    assert last - after[0].sequence <= BATCH_RECORDS
    if arrived > flows + 1:
        assert "may arrive twice" in second.log
    assert second.ledger().closes


def test_flows_are_found_again_after_a_kill_while_more_of_the_table_comes_into_use(lab: Lab, tmp_path: Path) -> None:
    flows = 60_000
    capture = make_capture(
        tmp_path / "x.pcap", packets=flows, flows=flows, macs=(lab.sender.mac, lab.metered.mac), stacks=UDP_STACKS
    )
    with exporting(lab, tmp_path) as first:
        assert replay(lab.sender, capture) == flows
        lab.wait_for_marker(1)
        wait_for("more of the table to be used", lambda: all(before for before in buckets_before(lab.pins)))
        kill(first, lab.metered)
    assert all(buckets_before(lab.pins))
    with exporting(lab, tmp_path) as second:
        assert replay(lab.sender, capture) == flows
        lab.wait_for_marker(1)
        assert second.stop() == 0
    assert (second.ledger().closes, second.ledger().exported) == (True, 2 * flows + 2)
    assert len(lab.records()) == flows + 2  # one a flow, and the markers


def test_an_interface_that_is_no_longer_metered_no_longer_counts_as_seen_at_ingress(tmp_path: Path) -> None:
    pins = BPFFS / f"{PIN_PREFIX}restart-ingress"
    try:
        with namespaces("a", "router", "b") as (a, router, b), Recorder(router) as recorder:
            host, left = veth(a, router, names=("eth0", "left"))
            right, _ = veth(router, b, names=("right", "eth0"))
            left.add_address("10.1.0.254/24")
            right.add_address("10.2.0.254/24")
            right.add_neighbour("10.2.0.2", "02:00:00:00:00:0b")
            router.sysctl("net.ipv4.ip_forward", 1)
            lab = Lab(host, left, recorder, pins)
            with exporting(lab, tmp_path, interfaces=["left", "right"]) as first:
                kill(first, left)
            with exporting(lab, tmp_path, interfaces=["right"]) as second:
                lab.send(IP(src="10.1.0.2", dst="10.2.0.2") / UDP(sport=5, dport=9), times=4)
                assert second.stop() == 0
            assert second.ledger().not_metered == {}
            (record,) = lab.records()
            assert (record["flowDirection"], record["packetDeltaCount"]) == (1, 4)
    finally:
        shutil.rmtree(pins, ignore_errors=True)


def test_a_second_exporter_on_the_same_table_refuses_and_leaves_the_first_alone(lab: Lab, tmp_path: Path) -> None:
    with exporting(lab, tmp_path) as first:
        command = [COMMAND, "run", "-c", first.configuration, "-i", "eth0", "--collector", lab.recorder.url]
        with pytest.raises(CommandFailed) as refused:
            lab.meter.run(*command)
        assert str(refused.value).endswith(
            f"ended with 1: flowexp: {lab.pins}: another exporter is running on this flow table;"
            " stop it, or set another [table] pin_path"
        )
        lab.send(*FLOWS)
        lab.wait_for_marker(101)
        assert first.stop() == 0
    assert first.ledger().exported == 11
    assert not lab.pins.exists()


def test_pins_are_for_the_exporters_user_alone(lab: Lab, tmp_path: Path) -> None:
    with exporting(lab, tmp_path) as exporter:
        assert os.stat(lab.pins).st_mode & 0o777 == 0o700
        assert exporter.stop() == 0


@contextmanager
def mounted(place: Path, *words: str | Path) -> Iterator[None]:
    place.mkdir()
    run(["mount", *words, place])
    try:
        yield
    finally:
        run(["umount", place])


def test_a_pin_path_may_be_a_mount_of_a_folder_in_a_bpf_file_system(lab: Lab, tmp_path: Path) -> None:
    folder, own = BPFFS / f"{PIN_PREFIX}mounted-{tmp_path.name}", tmp_path / "pins"
    folder.mkdir()
    with mounted(own, "--bind", folder):
        with exporting(lab._replace(pins=own), tmp_path, "--persist") as exporter:
            assert exporter.stop() == 0, exporter.log
        assert list(folder.iterdir())
        lab.meter.run(COMMAND, "detach", "-c", exporter.configuration)
    assert not list(folder.iterdir())
    folder.rmdir()


def test_a_pin_path_that_is_all_of_a_bpf_file_system_is_refused(lab: Lab, tmp_path: Path) -> None:
    own = tmp_path / "bpffs"
    with mounted(own, "-t", "bpf", "bpf"):
        with pytest.raises(CommandFailed, match="pin_path must be a folder in a BPF file system"):
            with exporting(lab._replace(pins=own), tmp_path):
                pass


def test_a_pin_path_outside_a_bpf_file_system_is_an_error_that_says_so(lab: Lab, tmp_path: Path) -> None:
    elsewhere = tmp_path / "pins"
    with pytest.raises(CommandFailed, match="pin_path must be a folder in a BPF file system"):
        with exporting(lab._replace(pins=elsewhere), tmp_path):
            pass
    assert tcx_programs(lab.metered, "ingress") == 0


def test_pins_that_go_with_the_command_are_warned_of(tmp_path: Path) -> None:
    """`ip netns exec` has a /sys of its own, and a BPF file system in there is nobody else's."""
    needs.need(needs.kernel())
    configuration = tmp_path / "flowexp.toml"
    configuration.write_text('[table]\npin_path = "/sys/fs/bpf/fxt-for-one-command"\n')
    with namespaces("inside") as (inside,):
        command = ["ip", "netns", "exec", inside.name, COMMAND, "detach", "-c", configuration]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "mounted for this command alone" in done.stderr
    assert f"use `nsenter --net=/run/netns/{inside.name}`" in done.stderr
