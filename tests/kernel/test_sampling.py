# SPDX-License-Identifier: GPL-2.0-or-later
"""Sampling: one packet in N of those on the wire, the others in the ledger, and Collectors that multiply by N.

Each CPU selects one packet in each N that it sees: of so many packets the number selected is known, but for the
windows that have not ended, one a CPU. Which ones is chance, and so are the octets.
"""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from lab import decoders, needs
from lab.collectors import MessageFile, Nfacctd, Nfcapd
from lab.flowexp import BPFFS, PIN_PREFIX, Exporter
from lab.flows import Counts, total
from lab.netns import connect, namespaces, veth
from lab.process import on_one_cpu
from lab.traffic import make_capture, replay

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

INTERVAL, PACKETS, FLOWS = 10, 20_000, 1_800
UDP_SEGMENT = 103
DEVIATION_OCTETS = 750  # no distribution of IP lengths up to 1500 has a larger standard deviation


class ScalingNfacctd(Nfacctd):
    """nfacctd, told to multiply by the sampling interval."""

    configuration = Nfacctd.configuration + "\nnfacctd_renormalize: true\n"


def check_scaled(scaled: Counts, sent: Counts, intervals: tuple[int, ...] = (INTERVAL,)) -> None:
    """Each CPU may have a window open, once for each interval that there was. The octets may differ by five standard
    deviations: less than once in a million runs."""
    assert scaled.packets % min(intervals) == 0
    assert abs(scaled.packets - sent.packets) <= sum(intervals) * (os.cpu_count() or 1)
    bound = 5 * sum(interval * math.sqrt(sent.packets / interval) for interval in intervals) * DEVIATION_OCTETS
    assert abs(scaled.octets - sent.octets) <= bound


@pytest.mark.parametrize(("mode", "hook"), [("random", "tc"), ("count", "tc"), ("random", "xdp")])
def test_collectors_show_what_was_sent_after_their_own_scaling(mode: str, hook: str, tmp_path: Path) -> None:
    """IPv4 and IPv6, without VLAN tags and with one and two."""
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "nfacctd", "tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        left, _ = veth(sender, meter)
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, left.mac))
        with (
            Nfcapd(meter, tmp_path) as nfcapd,
            Nfcapd(meter, tmp_path) as nfcapd9,
            ScalingNfacctd(meter, tmp_path) as nfacctd,
        ):
            collectors = (nfcapd, nfcapd9, nfacctd)
            configuration: dict[str, Any] = {
                "sampling": {"mode": mode, "interval": INTERVAL}, "hook": hook, "direction": "ingress"
            }  # fmt: skip
            urls = [nfcapd.url, f"{nfcapd9.url}?protocol=netflow9", nfacctd.url]
            with Exporter(meter, tmp_path, collectors=urls, configuration=configuration) as exporter:
                assert replay(left, capture) == PACKETS
                assert exporter.stop() == 0, exporter.log
            for collector in collectors:
                collector.finish()
                assert collector.losses() == []
                check_scaled(total(collector.flows()), total(capture.flows))
        ledger = exporter.ledger()
        assert ledger.closes
        assert (ledger.seen, ledger.not_metered["not selected"]) == (PACKETS, PACKETS - ledger.exported)


def test_what_was_metered_before_the_interval_changed_is_exported_under_the_old_one(tmp_path: Path) -> None:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "tcpreplay"))
    pins = BPFFS / f"{PIN_PREFIX}sampling"
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, left.mac))
        sent = total(capture.flows)
        with Nfcapd(meter, tmp_path) as nfcapd:
            for number, interval in enumerate((20, 5)):
                configuration = {
                    "sampling": {"interval": interval},
                    "direction": "ingress",
                    "table": {"pin_path": str(pins), "persist": number == 0},
                }
                with Exporter(meter, tmp_path, collectors=[nfcapd.url], configuration=configuration) as exporter:
                    if number:
                        assert replay(left, capture) == PACKETS
                    assert exporter.stop() == 0, exporter.log
                if not number:
                    assert replay(left, capture) == PACKETS  # into the table that waits for the next exporter
            nfcapd.finish()
            check_scaled(total(nfcapd.flows()), Counts(2 * sent.packets, 2 * sent.octets), (20, 5))
    assert not pins.exists() or not list(pins.glob("*/*"))


@pytest.mark.parametrize(("interval", "whole", "last"), [(41, 0, 50), (10, 200, 5), (82, 0, 25), (2, 1000, 25)])
def test_each_segment_of_a_super_packet_is_selected_or_not(
    interval: int, whole: int, last: int, tmp_path: Path
) -> None:
    """By count, on one CPU: of 50 super-packets of 40 whole segments and a short one each it is known which."""
    needs.need(needs.kernel())
    file = MessageFile(tmp_path / "flows.ipfix")
    configuration = {"sampling": {"mode": "count", "interval": interval}, "direction": "egress"}
    with namespaces("client", "server") as (client, server):
        ends = veth(client, server)
        connect(*ends, ("10.1.0.1/24", "10.1.0.2/24"))
        ends[0].set_offloads(tso=True, gso=True)
        with Exporter(client, tmp_path, collectors=[file.url], configuration=configuration) as exporter:
            with on_one_cpu(), server.socket(socket.AF_INET) as sink, client.socket(socket.AF_INET) as sender:
                sink.bind(("10.1.0.2", 9))
                sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1200)
                for _ in range(50):
                    sender.sendto(bytes(40 * 1200 + 100), ("10.1.0.2", 9))
            assert exporter.stop() == 0, exporter.log
    ledger = exporter.ledger()
    assert ledger.closes
    assert ledger.seen == 50 * 41
    counts = [decoders.flow_of(record)[1] for record in decoders.records(file.messages())]
    assert sum(each.packets for each in counts) == whole + last
    assert sum(each.octets for each in counts) == whole * 1228 + last * 128
