# SPDX-License-Identifier: GPL-2.0-or-later
"""Our own Collector reads what other exporters send: every packet and octet, in NetFlow v9 and IPFIX."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lab import needs
from lab.collectors import udp_sockets
from lab.flowexp import COMMAND
from lab.flows import Counts, FlowKey, FlowTable, add_up, differences
from lab.netns import namespaces
from lab.traffic import ICMP, Stack, make_capture
from lab.wait import wait_for

pytestmark = pytest.mark.interop

STACKS = tuple(Stack(version, protocol) for version in (4, 6) for protocol in (6, 17, ICMP[version]))
PACKETS, FLOWS = 3_000, 240
NFPROBE = """daemonize: false
plugins: nfprobe[p]
nfprobe_receiver: 127.0.0.1:{port}
nfprobe_version: {version}
plugin_pipe_size: 67108864
plugin_buffer_size: 65536
aggregate: src_host, dst_host, src_port, dst_port, proto, tos, tcpflags
"""


def softflowd(directory: Path, port: int, version: int) -> list[str]:
    """Short names: while it reads a file, 1.1.0 may wait for ever on its control socket with longer ones."""
    return ["softflowd", "-r", "p.pcap", "-p", "p", "-c", "c", "-n", f"127.0.0.1:{port}", "-v", str(version), "-d"]


def pmacctd(directory: Path, port: int, version: int) -> list[str]:
    (directory / "pmacctd.conf").write_text(NFPROBE.format(port=port, version=version))
    return ["pmacctd", "-f", "pmacctd.conf", "-I", "p.pcap"]


PEERS = {"softflowd": softflowd, "pmacctd": pmacctd}


def flow_of(record: Mapping[str, Any]) -> tuple[FlowKey, Counts]:
    """As NetFlow has it: ICMP type and code in the destination port, wherever else they are."""
    version = 6 if "sourceIPv6Address" in record else 4
    port = record.get("destinationTransportPort", 0) or record.get(f"icmpTypeCodeIPv{version}", 0)
    key = FlowKey(
        record[f"sourceIPv{version}Address"], record[f"destinationIPv{version}Address"], record["protocolIdentifier"],
        record.get("sourceTransportPort", 0), port,
    )  # fmt: skip
    return key, Counts(record["packetDeltaCount"], record["octetDeltaCount"])


@pytest.mark.parametrize("version", [9, 10])
@pytest.mark.parametrize("name", PEERS)
def test_collect_reads_every_packet_and_octet_of_other_exporters(name: str, version: int, tmp_path: Path) -> None:
    needs.need(needs.namespace_support(), needs.exporter(), needs.tools(name))
    macs = ("02:00:00:00:00:01", "02:00:00:00:00:02")
    capture = make_capture(tmp_path / "p.pcap", packets=PACKETS, flows=FLOWS, macs=macs, stacks=STACKS)
    with namespaces("peer") as (namespace,):
        port = namespace.free_udp_port()
        command = [COMMAND, "collect", "--listen", f"udp://127.0.0.1:{port}", "--format", "json"]
        process = namespace.start(*command, directory=tmp_path, name="collect")
        try:
            wait_for("collect to listen", lambda: port in udp_sockets(namespace))
            # What pmacctd's end of a capture is called depends on which of its processes ends first.
            namespace.run("sh", "-c", 'cd "$0"; "$@"; true', tmp_path, *PEERS[name](tmp_path, port, version))
            wait_for("collect to read all", lambda: udp_sockets(namespace)[port].queued_octets == 0)
            assert udp_sockets(namespace)[port].drops == 0
            process.stop(signal.SIGINT)
        finally:
            process.kill()
    records = [json.loads(line) for line in process.stdout.splitlines()]
    if (name, version) != ("softflowd", 10):  # whose Sequence Numbers are those behind the Message
        assert " 0 records and 0 NetFlow v9 packets are missing; 0 undecodable" in process.stderr
    sent: FlowTable = {
        key._replace(dst_port=key.dst_port or key.icmp_type_code, icmp_type_code=0): counts._replace(tcp_flags=0)
        for key, counts in capture.flows.items()
    }
    found = add_up(map(flow_of, records))
    if name == "softflowd":  # it counts the padding of short frames, which IPv6 does not have
        sent, found = _without_octets_of_ipv4(sent), _without_octets_of_ipv4(found)
    assert differences(sent, found) == []


def _without_octets_of_ipv4(table: FlowTable) -> FlowTable:
    return {key: counts if ":" in key.src_addr else counts._replace(octets=0) for key, counts in table.items()}
