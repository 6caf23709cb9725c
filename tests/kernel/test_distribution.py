# SPDX-License-Identifier: GPL-2.0-or-later
"""Several Collectors of one exporter: who gets which records, and that none waits for another."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab import needs
from lab.collectors import Collector, Nfcapd, Recorder
from lab.flowexp import BPFFS, COMMAND, PIN_PREFIX, Exporter
from lab.flows import FlowTable
from lab.metered import Lab, metered, packet
from lab.process import run
from lab.traffic import Capture, make_capture, replay, send_frames
from lab.wait import wait_for

from flowexp.protocol.decode import Decoder
from flowexp.status import Status, ask

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

TIMEOUTS = {"idle": 600, "active": 600, "linger": 0, "sweep_interval": 0.05}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "tcpreplay"))
    with metered(tmp_path) as lab:
        yield lab


def exporting(lab: Lab, *collectors: Mapping[str, Any], distribution: str = "mirror", **others: Any) -> Exporter:
    configuration = {
        "timeouts": TIMEOUTS,
        "export": {"distribution": distribution},
        "collector": [dict(each) for each in collectors],
        **others,
    }
    return Exporter(lab.meter, lab.directory, configuration=configuration)


def status(exporter: Exporter) -> Status:
    return ask(str(exporter.pins))


def of_collector(exporter: Exporter, url: str) -> Mapping[str, Any]:
    return next(each for each in status(exporter)["collectors"] if each["collector"] == url)


def captured(lab: Lab, *, packets: int, flows: int) -> Capture:
    macs = lab.sender.mac, "02:00:00:00:00:99"
    return make_capture(lab.directory / "sent.pcap", packets=packets, flows=flows, macs=macs)


@contextmanager
def nfcapds(lab: Lab, count: int) -> Iterator[list[Nfcapd]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Nfcapd(lab.meter, lab.directory)) for _ in range(count)]


def exported(exporter: Exporter) -> int:
    return sum(status(exporter)["exportedRecords"].values())


def finish(*collectors: Collector) -> list[FlowTable]:
    for each in collectors:
        each.finish()
        assert each.losses() == []
    return [each.flows() for each in collectors]


def test_balance_gives_each_flow_to_one_collector_and_nothing_is_missing(lab: Lab) -> None:
    capture = make_capture(
        lab.directory / "sent.pcap",
        packets=50_000,
        flows=3_000,
        macs=(lab.sender.mac, "02:00:00:00:00:99"),
    )
    with (
        Nfcapd(lab.meter, lab.directory) as a,
        Nfcapd(lab.meter, lab.directory) as b,
        Nfcapd(lab.meter, lab.directory) as c,
    ):
        with exporting(lab, {"url": a.url}, {"url": b.url}, {"url": c.url}, distribution="balance") as exporter:
            replay(lab.sender, capture)
            assert exporter.stop() == 0, exporter.log
        tables = finish(a, b, c)
    together: FlowTable = {}
    for table in tables:
        assert len(table) > 600
        assert not together.keys() & table.keys()
        together.update(table)
    assert together == capture.flows


def test_groups_get_every_record_each(lab: Lab) -> None:
    capture = captured(lab, packets=5_000, flows=500)
    with (
        Nfcapd(lab.meter, lab.directory) as a,
        Nfcapd(lab.meter, lab.directory) as b,
        Nfcapd(lab.meter, lab.directory) as c,
    ):
        collectors = {"url": a.url, "group": "pair"}, {"url": b.url, "group": "pair"}, {"url": c.url}
        with exporting(lab, *collectors, distribution="balance") as exporter:
            replay(lab.sender, capture)
            assert exporter.stop() == 0, exporter.log
        tables = finish(a, b, c)
    assert tables[0] and tables[1] and {**tables[0], **tables[1]} == tables[2] == capture.flows


def test_a_filter_chooses_and_the_rest_is_counted_and_each_has_a_domain_and_a_port_of_its_own(lab: Lab) -> None:
    with Recorder(lab.meter) as everything, Recorder(lab.meter) as some:
        collectors = (
            {"url": everything.url, "observation_domain_id": 11},
            {"url": some.url, "observation_domain_id": 22, "filter": "src port < 6", "source_port": 20_022,
             "source_address": "127.0.0.1", "dscp": 10, "device": "lo"},
        )  # fmt: skip
        with exporting(lab, *collectors) as exporter:
            send_frames(lab.sender, [packet(port) for port in range(1, 21)])
            wait_for("the flows", lambda: status(exporter)["table"]["flows"]["ipv4"] == 20)
            assert exporter.stop() == 0, exporter.log
        assert "0 Data Records not sent, 15 flows filtered out" in exporter.log
        ports = [sorted(_source_ports(each)) for each in (everything, some)]
        domains = [
            {int.from_bytes(message[12:16], "big") for message in each.messages()} for each in (everything, some)
        ]
    assert ports == [list(range(1, 21)), list(range(1, 6))]
    assert domains == [{11}, {22}]


def _source_ports(recorder: Recorder) -> list[int]:
    decoder = Decoder()
    decoded = [decoder.decode(message, "recorder") for message in recorder.messages()]
    return [record["sourceTransportPort"] for each in decoded for record in each.records]


def test_a_collector_that_takes_nothing_does_not_hold_up_another(lab: Lab) -> None:
    """The first is behind a pipe that nobody reads: writing to it blocks for good."""
    pipe = lab.directory / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    capture = captured(lab, packets=20_000, flows=5_000)
    timeouts = {**TIMEOUTS, "idle": 0.2}
    try:
        with Nfcapd(lab.meter, lab.directory) as nfcapd:
            with exporting(lab, {"url": pipe.as_uri()}, {"url": nfcapd.url}, timeouts=timeouts) as exporter:
                replay(lab.sender, capture)
                wait_for("all records at the other", lambda: of_collector(exporter, nfcapd.url)["recordsSent"] >= 5_000)
                blocked = of_collector(exporter, pipe.as_uri())
                assert blocked["recordsWaiting"] > 0
                began_s = time.monotonic()
                replay(lab.sender, capture)
                wait_for("all of them again", lambda: of_collector(exporter, nfcapd.url)["recordsSent"] >= 10_000)
                took_s = time.monotonic() - began_s
                assert exporter.stop() == 0, exporter.log
            (flows,) = finish(nfcapd)
    finally:
        os.close(reader)
    assert sum(counts.packets for counts in flows.values()) == 40_000
    assert "takes long; others do not wait for it" in exporter.log
    assert took_s < 30


def test_failover_goes_to_the_next_one_and_back_and_loses_what_was_sent_before_the_error_came(lab: Lab) -> None:
    timeouts = {**TIMEOUTS, "idle": 0.1}

    def meter_one(port: int) -> None:
        send_frames(lab.sender, [packet(port)])
        wait_for(f"record {port}", lambda: exported(exporter) == port)

    with Recorder(lab.meter) as second:
        first = Recorder(lab.meter)
        with exporting(
            lab, {"url": first.url}, {"url": second.url}, distribution="failover", timeouts=timeouts
        ) as exporter:
            for port in range(1, 11):
                meter_one(port)
            assert sorted(_source_ports(first)) == list(range(1, 11))
            assert _source_ports(second) == []
            first._socket.close()
            meter_one(11)  # the one that finds out
            for port in range(12, 31):
                meter_one(port)
            assert sorted(_source_ports(second)) in (list(range(11, 31)), list(range(12, 31)))
            returned = lab.meter.socket()
            returned.bind((first.address, first.port))
            returned.setblocking(False)
            first._socket = returned
            wait_for(
                "the first to be in reach", lambda: of_collector(exporter, first.url)["state"] == "up", timeout_s=20
            )
            numbers = iter(range(31, 1000))
            at = [30]

            def has_come_back() -> bool:
                at[0] = next(numbers)
                meter_one(at[0])
                return at[0] in _source_ports(first)

            wait_for("records at the first again", has_come_back, timeout_s=20)
            assert exporter.stop() == 0, exporter.log
        got = _source_ports(first)[10:], _source_ports(second)
        assert sorted(got[0] + got[1])[-(at[0] - 11) :] == list(range(12, at[0] + 1))
        assert exporter.log.count("out of reach; its records go to the next Collector") == 1
        returned.close()


def test_sequence_numbers_go_on_under_a_collectors_own_key_whatever_the_order(lab: Lab) -> None:
    pins = BPFFS / f"{PIN_PREFIX}order-{lab.directory.name}"
    table = {"pin_path": str(pins), "persist": True, "max_flows": 1000}
    frames = [packet(port) for port in (1, 2, 3)]
    try:
        with Recorder(lab.meter) as a, Recorder(lab.meter) as b, Recorder(lab.meter) as c:
            for urls in ([a.url, b.url], [c.url, b.url, a.url], [b.url], [a.url, b.url]):
                with exporting(lab, *({"url": url} for url in urls), table=table) as exporter:
                    send_frames(lab.sender, frames)
                    assert exporter.stop() == 0, exporter.log
            for recorder in (a, b, c):
                expected = 0
                decoder = Decoder()
                for message in recorder.messages():
                    decoded = decoder.decode(message, "recorder")
                    assert decoded.sequence == expected
                    expected += len(decoded.records) + len(decoded.options_records)
                assert expected > 0
    finally:
        run([COMMAND, "detach", "-c", exporter.configuration])
        shutil.rmtree(pins, ignore_errors=True)
