# SPDX-License-Identifier: GPL-2.0-or-later
"""Interfaces with a sampling interval each: an exporter for each interval, in an Observation Domain of its own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lab import needs
from lab.collectors import Nfcapd, Recorder
from lab.flowexp import Exporter
from lab.flows import total
from lab.netns import namespaces, veth
from lab.traffic import STACKS, make_capture, replay
from test_sampling import FLOWS, PACKETS, check_scaled

from flowexp.protocol.decode import Decoder

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

INTERVALS = {"lan": 10, "wan": 100}


@pytest.mark.parametrize("protocol", ["ipfix", "netflow9", "netflow5"])
def test_a_collector_scales_each_interface_by_its_own_interval(protocol: str, tmp_path: Path) -> None:
    """Nothing tells the exporters apart but their interface, their interval and where their table is.

    NetFlow v5 has the Observation Domain's last 16 bits as engine type and id, and no IPv6.
    """
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter), ExitStack() as running:
        links = {name: veth(sender, meter, names=(name, name)) for name in INTERVALS}
        mac = links["lan"][0].mac
        stacks = [stack for stack in STACKS if stack.ip_version == 4 or protocol != "netflow5"]
        capture = make_capture(tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(mac, mac), stacks=stacks)
        nfcapd, recorder = running.enter_context(Nfcapd(meter, tmp_path)), running.enter_context(Recorder(meter))
        exporters = {}
        for name, interval in INTERVALS.items():
            configuration: dict[str, Any] = {"sampling": {"interval": interval}, "direction": "ingress"}
            urls = [f"{nfcapd.url}?protocol={protocol}", recorder.url]
            exporters[name] = running.enter_context(
                Exporter(meter, tmp_path, interfaces=[name], collectors=urls, configuration=configuration)
            )
        for left, _ in links.values():
            assert replay(left, capture) == PACKETS
        for exporter in exporters.values():
            assert exporter.stop() == 0, exporter.log
            ledger = exporter.ledger()
            assert ledger.closes
            assert (ledger.seen, ledger.not_metered["not selected"]) == (PACKETS, PACKETS - ledger.exported)
        nfcapd.finish()
        assert nfcapd.losses() == []
        for name, interval in INTERVALS.items():
            ifindex = links[name][1].ifindex
            scaled = total(nfcapd.flows(lambda record: record["input_snmp"] == ifindex))  # noqa: B023
            assert scaled.packets == interval * exporters[name].ledger().exported
            check_scaled(scaled, total(capture.flows), (interval,))
        rates = told(recorder.messages())
    assert sorted(interval for _, interval in rates) == sorted(INTERVALS.values())
    assert len({domain for domain, _ in rates}) == len(INTERVALS)


def told(messages: list[bytes]) -> set[tuple[int, int]]:
    """Observation Domains and the intervals that were told of them."""
    decoder = Decoder()
    records = [record for each in messages for record in decoder.decode(each, "session").options_records]
    return {(each["observationDomainId"], each["samplingInterval"]) for each in records if "samplingInterval" in each}
