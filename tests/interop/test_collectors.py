# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job: a million packets in ten thousand flows at full speed, and every Collector has them all.

One run feeds nfcapd, nfacctd and a Recorder (over IPv6) at once; the tests are what each has to say of it.
A figure too low is the exporter's fault only where the Collector lost nothing itself: that is asked first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from lab import decoders, framing, needs
from lab.collectors import Collector, Nfacctd, Nfcapd, Recorder
from lab.flowexp import Exporter, LogLedger
from lab.flows import FlowTable, add_up, differences, total
from lab.netns import namespaces, veth
from lab.traffic import make_capture, replay

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

PACKETS, FLOWS = 1_000_000, 10_000
SOMEBODY_ELSE = "02:00:00:00:00:99"


@dataclass(frozen=True)
class Run:
    """One run, seen from all sides."""

    sent: FlowTable
    frames_sent: int
    exit_status: int
    log: str
    ledger: LogLedger
    ifindex: int
    began_ms: int
    ended_ms: int
    nfcapd: Nfcapd
    nfacctd: Nfacctd
    messages: list[bytes]
    recorder_drops: int

    @cached_property
    def records(self) -> list[decoders.Record]:
        """Every Data Record, as scapy decodes the Messages."""
        return decoders.records(self.messages)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "nfacctd", "tcpreplay", "tshark"))
    directory = tmp_path_factory.mktemp("interop")
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        meter.sysctl("net.ipv6.conf.lo.disable_ipv6", 0)
        capture = make_capture(directory / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, SOMEBODY_ELSE))
        with (
            Nfcapd(meter, directory) as nfcapd,
            Nfacctd(meter, directory) as nfacctd,
            Recorder(meter, address="::1") as recorder,
        ):
            began_ms = time.time_ns() // 1_000_000
            urls = [nfcapd.url, nfacctd.url, recorder.url]
            with Exporter(meter, directory, collectors=urls) as exporter:
                frames_sent = replay(left, capture)
                exit_status = exporter.stop()
                log = exporter.log
            ended_ms = time.time_ns() // 1_000_000
            nfcapd.finish()
            nfacctd.finish()
            yield Run(
                capture.flows,
                frames_sent,
                exit_status,
                log,
                exporter.ledger(),
                right.ifindex,
                began_ms,
                ended_ms,
                nfcapd,
                nfacctd,
                recorder.messages(),
                recorder.drops,
            )


def _check_flows(run: Run, collector: Collector) -> None:
    assert collector.losses() == [], "the Collector itself lost something; its figures prove nothing"
    assert differences(run.sent, collector.flows()) == []


def test_all_frames_were_sent_and_the_exporter_left_in_peace(run: Run) -> None:
    assert run.frames_sent == PACKETS
    assert run.exit_status == 0, run.log
    assert run.log.count(" 0 Data Records not sent") == 3, run.log


def test_the_ledger_closes(run: Run) -> None:
    assert run.ledger.closes, run.ledger.line
    assert run.ledger.seen == run.ledger.exported == PACKETS
    assert run.ledger.in_table == 0
    assert run.ledger.not_metered == {}


def test_nfcapd_reports_exactly_the_packets_and_octets_sent(run: Run) -> None:
    _check_flows(run, run.nfcapd)


def test_nfacctd_reports_exactly_the_packets_and_octets_sent(run: Run) -> None:
    _check_flows(run, run.nfacctd)


def test_scapy_decodes_exactly_the_packets_and_octets_sent(run: Run) -> None:
    assert run.recorder_drops == 0, "the Recorder lost datagrams; the figures prove nothing"
    assert differences(run.sent, add_up(map(decoders.flow_of, run.records))) == []


def test_tshark_dissects_every_datagram_without_objection(run: Run, tmp_path: Path) -> None:
    dissection = decoders.dissect(run.messages, tmp_path)
    assert dissection.objections == []
    assert dissection.records == len(run.records)
    assert (dissection.packets, dissection.octets) == total(run.sent)[:2]


def test_every_message_is_framed_as_rfc_7011_has_it_and_templates_come_first(run: Run) -> None:
    session = framing.Session()
    read = [session.read(message) for message in run.messages]
    assert read[0].set_ids[0] == framing.TEMPLATE_SET
    assert len({message.observation_domain_id for message in read}) == 1
    assert read[0].observation_domain_id != 0


def test_sequence_numbers_count_the_data_records_before_each_message(run: Run) -> None:
    """RFC 7011 section 3.1."""
    session = framing.Session()
    expected = 0
    for message in map(session.read, run.messages):
        assert message.sequence_number == expected
        expected += message.data_records


def test_every_record_names_the_interface_and_ends_within_the_run(run: Run) -> None:
    for record in run.records:
        assert decoders.number(record, decoders.INGRESS_INTERFACE) == run.ifindex
        assert decoders.number(record, decoders.EGRESS_INTERFACE) == 0
        assert decoders.number(record, decoders.FLOW_DIRECTION) == 0
        start_ms = decoders.number(record, decoders.FLOW_START_MS)
        end_ms = decoders.number(record, decoders.FLOW_END_MS)
        assert run.began_ms <= start_ms <= end_ms <= run.ended_ms
        assert decoders.number(record, decoders.PACKETS) > 0
