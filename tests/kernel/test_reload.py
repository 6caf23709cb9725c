# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGHUP: another configuration under traffic, without a gap; and a wrong one that changes nothing."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from lab import needs
from lab.collectors import MessageFile, Nfcapd, Recorder
from lab.flowexp import Exporter
from lab.metered import Lab, metered, packet
from lab.traffic import make_capture, replay, send_frames
from lab.wait import wait_for

from flowexp.protocol.decode import Decoder
from flowexp.status import ask

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

RELOADS = int(os.environ.get("FLOWEXP_RELOADS", "20"))
BASE = ["sourceIPv4Address", "destinationIPv4Address", "protocolIdentifier"]
BASE += ["sourceTransportPort", "destinationTransportPort"]
COUNTS = "octetDeltaCount packetDeltaCount tcpControlBits icmpTypeCodeIPv4 vlanId".split()
TIMES = [["flowStartMilliseconds", "flowEndMilliseconds"], ["flowStartSeconds", "flowEndSeconds"]]
MORE = ["minimumTTL", "maximumTTL", "ipClassOfService", "flowEndReason", "ingressInterface"]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "tcpreplay"))
    with metered(tmp_path) as lab:
        yield lab


def varied(number: int, always: Sequence[str], sometimes: str) -> dict[str, Any]:
    """A configuration in which all that can change is another one than in the one before."""
    elements = [*BASE, *COUNTS, *TIMES[number % 2], *MORE[: number % 5 + 1]]
    collectors: list[dict[str, Any]] = [{"url": each, "template": "varied"} for each in always]
    if number % 3:
        collectors.insert(number % 2, {"url": sometimes, "filter": f"src port > {number}", "dscp": number % 60})
    return {
        "interfaces": [["eth0"], ["eth0", "lo"], ["eth*"]][number % 3],
        "direction": ["ingress", "both"][number % 2],
        "log_level": ["info", "debug"][number % 2],
        "timeouts": {
            "idle": 0.1 + number % 7 / 10,
            "active": 1 + number % 5,
            "linger": number % 2,
            "sweep_interval": [0.05, 0.2][number % 2],
        },
        "template": [{"name": "varied", "elements": elements}],
        "collector": collectors,
    }


def test_after_many_reloads_under_traffic_nothing_is_missing_and_nothing_twice(lab: Lab) -> None:
    macs = lab.sender.mac, "02:00:00:00:00:99"
    capture = make_capture(lab.directory / "sent.pcap", packets=10_000, flows=500, macs=macs)
    sent = 0
    done = threading.Event()

    def send() -> None:
        nonlocal sent
        while not done.is_set():
            sent += replay(lab.sender, capture)

    with Nfcapd(lab.meter, lab.directory) as nfcapd, Recorder(lab.meter) as recorder, Recorder(lab.meter) as other:
        always = nfcapd.url, recorder.url
        first = varied(0, always, other.url)
        with Exporter(lab.meter, lab.directory, interfaces=(), configuration=first) as exporter:
            traffic = threading.Thread(target=send)
            traffic.start()
            try:
                for number in range(1, RELOADS + 1):
                    exporter.reload(varied(number, always, other.url))
            finally:
                done.set()
                traffic.join()
            assert exporter.stop() == 0, exporter.log
        nfcapd.finish()
        assert nfcapd.drops == 0
        decoder = Decoder()
        for message in recorder.messages():
            decoded = decoder.decode(message, "recorder")
            assert (decoded.problems, decoded.lost_records) == ([], 0)
        rounds, rest = divmod(sent, 10_000)
        assert rest == 0
        ours = {key: counts for key, counts in nfcapd.flows().items() if key in capture.flows}
    expected = {key: (rounds * counts.packets, rounds * counts.octets) for key, counts in capture.flows.items()}
    assert {key: (counts.packets, counts.octets) for key, counts in ours.items()} == expected
    assert exporter.ledger().closes
    assert exporter.log.count("the configuration has been read again\n") == RELOADS


def test_a_wrong_file_changes_nothing_and_says_why_in_one_line(lab: Lab) -> None:
    with Recorder(lab.meter) as recorder, closing(lab.meter.socket(kind=socket.SOCK_STREAM)) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        taken = listening.getsockname()[1]
        good = {"timeouts": {"idle": 0.1, "sweep_interval": 0.05}, "collector": [{"url": recorder.url}]}
        with Exporter(lab.meter, lab.directory, configuration=good) as exporter:
            text = exporter.configuration.read_text()
            filtered = text.replace("[[collector]]", "[[collector]]\nfilter = 'src prot 5'")
            wrongs = {
                text.replace("idle = 0.1", 'idle = "soon"'): 'idle: "soon" is not a number',
                filtered: 'filter: "and" or "or" is missing',
                f"{text}\n[[collector]]\nurl = 'file:///nowhere/x'\n": "/nowhere/x: cannot write the IPFIX File",
                f"{text}\n[export]\nnat_events = true\n[metrics]\nlisten = '127.0.0.1:{taken}'\n": "[metrics] listen",
                "[[": "flowexp.toml",
            }
            for number, (wrong, why) in enumerate(wrongs.items()):
                exporter.configuration.write_text(wrong)
                os.kill(exporter.process.pid, signal.SIGHUP)
                wait_for(f"refusal: {why}", lambda: why in (ask(str(exporter.pins))["configuration"]["refusal"] or ""))  # noqa: B023
                lines = [line for line in exporter.log.splitlines() if "the configuration stays as it was" in line]
                assert len(lines) == number + 1
                assert why in lines[-1]
            assert ask(str(exporter.pins))["configuration"]["reloads"] == 0
            assert ask(str(exporter.pins))["natEvents"] is None
            send_frames(lab.sender, [packet(1)])
            wait_for("the record", lambda: ask(str(exporter.pins))["exportedRecords"]["idle"] == 1)
            assert exporter.stop() == 0, exporter.log


def test_what_waits_for_a_collector_outlives_a_reload_that_is_refused(lab: Lab) -> None:
    url = f"tcp://127.0.0.1:{lab.meter.free_udp_port('127.0.0.1')}"  # where nobody listens
    collector, timeouts = {"url": url}, {"idle": 0.1, "sweep_interval": 0.05}
    with Exporter(lab.meter, lab.directory, configuration={"timeouts": timeouts, "collector": [collector]}) as exporter:
        send_frames(lab.sender, [packet(1)])
        wait_for("the record", lambda: ask(str(exporter.pins))["collectors"][0]["recordsQueued"] > 0)
        text = exporter.configuration.read_text()
        for change, more, why in (
            ("spool_path = '/proc/x'", "", "/proc/x: cannot be the spool"),
            ("backlog_rate = 9", "[[collector]]\nurl = 'tls://h'\nca_file = '/nowhere.pem'\n", "/nowhere.pem"),
        ):
            changed = text.replace("[[collector]]", f"[[collector]]\n{change}")
            exporter.configuration.write_text(f"{changed}\n{more}")
            os.kill(exporter.process.pid, signal.SIGHUP)
            wait_for(f"refusal: {why}", lambda: why in (ask(str(exporter.pins))["configuration"]["refusal"] or ""))  # noqa: B023
            assert ask(str(exporter.pins))["collectors"][0]["recordsQueued"] > 0
        told = exporter.log.count("Data Records not sent")
        exporter.configuration.write_text(text.replace("[timeouts]", "[timeouts]\nactive = 9"))
        os.kill(exporter.process.pid, signal.SIGHUP)
        wait_for("the reload", lambda: ask(str(exporter.pins))["configuration"]["reloads"] == 1)
        assert ask(str(exporter.pins))["configuration"]["refusal"] is None
        assert told == 0
        assert exporter.stop() == 0, exporter.log


def test_an_interface_that_a_reload_leaves_out_and_one_that_is_not_there_are_told(lab: Lab) -> None:
    configuration = {"interfaces": ["eth0"], "collector": [{"url": "udp://127.0.0.1:9"}]}
    with Exporter(lab.meter, lab.directory, interfaces=(), configuration=configuration) as exporter:
        text = exporter.configuration.read_text()
        exporter.configuration.write_text(text.replace('"eth0"', '"Eth0"'))
        os.kill(exporter.process.pid, signal.SIGHUP)
        wait_for("the reload", lambda: ask(str(exporter.pins))["configuration"]["reloads"] == 1)
        assert "no longer metering eth0 ingress" in exporter.log
        assert "interfaces Eth0: none is there yet; waiting for one" in exporter.log


def test_what_needs_a_restart_is_named_and_the_rest_takes_effect(lab: Lab) -> None:
    with Recorder(lab.meter) as recorder:
        first = {"timeouts": {"idle": 600}, "table": {"max_flows": 1000}, "collector": [{"url": recorder.url}]}
        with Exporter(lab.meter, lab.directory, configuration=first) as exporter:
            send_frames(lab.sender, [packet(1)])
            exporter.reload({**first, "timeouts": {"idle": 0.1}, "table": {"max_flows": 2000}})
            assert "read again; these need a restart: [table] max_flows" in exporter.log
            assert ask(str(exporter.pins))["configuration"]["needRestart"] == ["[table] max_flows"]
            wait_for("the flow to end", lambda: ask(str(exporter.pins))["exportedRecords"]["idle"] == 1)
            assert exporter.stop() == 0, exporter.log


def test_templates_that_are_retired_are_withdrawn_in_files_and_never_over_udp(lab: Lab) -> None:
    file = MessageFile(lab.directory / "flows.ipfix")

    def configuration(*more: str) -> dict[str, Any]:
        elements = [*BASE, *COUNTS, *more]
        return {
            "timeouts": {"idle": 0.1, "sweep_interval": 0.05},
            "export": {"template": "varied"},
            "template": [{"name": "varied", "elements": elements}],
            "collector": [{"url": file.url}, {"url": recorder.url}],
        }

    with Recorder(lab.meter) as recorder:
        with Exporter(lab.meter, lab.directory, configuration=configuration()) as exporter:
            send_frames(lab.sender, [packet(1)])
            wait_for("the record", lambda: ask(str(exporter.pins))["exportedRecords"]["idle"] == 1)
            exporter.reload(configuration("minimumTTL"))
            send_frames(lab.sender, [packet(2)])
            wait_for("the record", lambda: ask(str(exporter.pins))["exportedRecords"]["idle"] == 2)
            assert exporter.stop() == 0, exporter.log
        withdrawals = []
        for messages in (file.messages(), recorder.messages()):
            decoder, read = Decoder(), []
            for message in messages:
                decoded = decoder.decode(message, "one")
                assert decoded.problems == [] and decoded.lost_records == 0
                read += decoded.records
            assert [(each["sourceTransportPort"], "minimumTTL" in each) for each in read] == [(1, False), (2, True)]
            withdrawals.append(sum(message[16:24] == message[16:20] + message[20:22] + b"\0\0" for message in messages))
    assert withdrawals == [1, 0]
