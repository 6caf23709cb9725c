# SPDX-License-Identifier: GPL-2.0-or-later
"""{IPFIX, NetFlow v9, v5} x {nfcapd, nfacctd, tshark, scapy} x kinds of traffic: every record, exactly.

Each run of the exporter tells three Recorders of the same flows, one in each protocol; every judge is then given the
datagrams themselves. What was sent is known from the capture; the times are those that scapy reads in IPFIX, which
lie within the run, and all others must agree to the millisecond. What a protocol or a judge cannot carry is a Limit:
it changes what is expected, so it is probed with everything else, and it stands in the table.

The table is tests/interop/matrix.md, and part of packaging/docs/collectors.md; `make matrix` writes both anew.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab import needs
from lab.collectors import Recorder
from lab.flowexp import COMMAND, Exporter
from lab.flows import Counts, FlowKey, FlowTable, add_up, differences, total
from lab.judges import COLLECTORS, DECODERS, Told, Verdict, icmp_in_port
from lab.netns import Namespace, namespaces, veth
from lab.process import CommandFailed, run
from lab.traffic import make_capture, replay, send_frames
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from flowexp.protocol.decode import Decoder

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

JUDGES = {**COLLECTORS, **DECODERS}
PROTOCOLS = {"ipfix": "IPFIX", "netflow9": "NetFlow v9", "netflow5": "NetFlow v5"}
PACKETS, FLOWS, INTERVAL, CONVERSATIONS = 6_000, 540, 10, 60
SOMEBODY_ELSE = "02:00:00:00:00:99"
TABLE = Path(__file__).with_name("matrix.md")
PAGE = Path(__file__).parents[2] / "packaging" / "docs" / "collectors.md"


class Run(NamedTuple):
    """One run of the exporter. `sent`: forward and reverse counts; verdicts by protocol and judge."""

    sent: dict[FlowKey, tuple[Counts, Counts]]
    ifindex: int
    began_ms: int
    ended_ms: int
    log: str
    messages: dict[str, list[bytes]]
    verdicts: dict[tuple[str, str], Verdict]


def is_icmp(key: FlowKey) -> bool:
    return key.protocol in (1, 58)


def is_ipv6(key: FlowKey) -> bool:
    return ":" in key.src_addr


ROWS: dict[str, tuple[str, Callable[[FlowKey], bool]]] = {
    "IPv4": ("plain", lambda key: not (is_ipv6(key) or is_icmp(key) or key.vlan_id)),
    "IPv6": ("plain", lambda key: is_ipv6(key) and not (is_icmp(key) or key.vlan_id)),
    "VLAN": ("plain", lambda key: key.vlan_id > 0),
    "ICMP": ("plain", lambda key: is_icmp(key) and not key.vlan_id),
    "biflow": ("biflow", lambda key: True),
    "sampled": ("sampled", lambda key: True),
}
"""Each row's run, and its flows of that."""


class Limit(NamedTuple):
    """What a cell cannot carry. `change`: what of the expected records is left."""

    row: str
    protocols: Sequence[str]
    judges: Sequence[str]
    says: str
    change: Callable[[Told], Told | None]


def only_ipv4(told: Told) -> Told | None:
    return None if is_ipv6(told.key) else told


def whole_seconds(told: Told) -> Told:
    return told._replace(start=-(-told.start // 1000) * 1000, end=-(-told.end // 1000) * 1000)


def scaled(told: Told) -> Told:
    packets, octets, flags = told.counts
    return told._replace(counts=Counts(packets * INTERVAL, octets * INTERVAL, flags))


NETFLOW, EVERYONE = ("netflow9", "netflow5"), tuple(JUDGES)
LIMITS = (
    Limit("*", ["netflow5"], EVERYONE, "", only_ipv4),
    Limit("*", ["netflow5"], EVERYONE, "", lambda told: told._replace(key=told.key._replace(vlan_id=0))),
    Limit("VLAN", ["netflow5"], EVERYONE, "IPv4 only, no tag", lambda told: told),
    Limit("ICMP", ["netflow5"], EVERYONE, "IPv4 only", lambda told: told),
    Limit("sampled", ["netflow5"], EVERYONE, "IPv4 only", lambda told: told),
    Limit("*", NETFLOW, ["nfacctd"], "whole seconds", whole_seconds),
    Limit("ICMP", ["ipfix"], ["nfacctd"], "by `aggregate_primitives`", lambda told: told),
    Limit("biflow", ["ipfix"], ["nfacctd"], "forward only", lambda told: told._replace(reverse=Counts(0, 0))),
    Limit("sampled", tuple(PROTOCOLS), ["nfcapd", "nfacctd"], "scaled", scaled),
)


def limits_of(row: str, protocol: str, judge: str) -> list[Limit]:
    return [each for each in LIMITS if each.row in ("*", row) and protocol in each.protocols and judge in each.judges]


def expected(limits: Iterable[Limit], told: Iterable[Told]) -> Iterator[Told]:
    for record in told:
        left: Told | None = record
        for limit in limits:
            left = limit.change(left) if left is not None else None
        if left is not None:
            yield left


# The runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Run]]:
    needs.need(needs.kernel(), needs.tools("nfcapd", "nfdump", "nfacctd", "tcpreplay", "tshark"))
    with namespaces("sender", "meter", "answers") as (sender, meter, other):
        left, right = veth(sender, meter)
        answering, _ = veth(other, meter, names=("eth0", "eth1"))
        directory = tmp_path_factory.mktemp("matrix")

        def send_capture() -> dict[FlowKey, tuple[Counts, Counts]]:
            macs = (left.mac, SOMEBODY_ELSE)
            capture = make_capture(directory / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=macs)
            assert replay(left, capture) == PACKETS
            return {icmp_in_port(key): (counts, Counts(0, 0)) for key, counts in capture.flows.items()}

        def send_conversations() -> dict[FlowKey, tuple[Counts, Counts]]:
            """Each with an answer of more packets than it has itself, through another interface."""
            sent = {}
            for number in range(1, CONVERSATIONS + 1):
                ip, (a, b) = (IP, ("10.1.0.1", "10.2.0.2")) if number % 3 else (IPv6, ("fd01::1", "fd02::2"))
                is_tcp, asks, answers = bool(number % 2), number % 3 + 1, number % 3 + 2
                octets = (20 if ip is IP else 40) + (20 if is_tcp else 8) + number
                kind = partial(TCP, flags="S") if is_tcp else UDP
                ask = ip(src=a, dst=b) / kind(sport=number, dport=443) / Raw(bytes(number))
                answer = ip(src=b, dst=a) / kind(sport=443, dport=number) / Raw(bytes(number))
                for link, datagram, count in ((left, ask, asks), (answering, answer, answers)):
                    send_frames(link, [bytes(Ether(src=link.mac, dst=SOMEBODY_ELSE) / datagram)] * count)
                key = FlowKey(a, b, 6 if is_tcp else 17, number, 443)
                sent[key] = (Counts(asks, asks * octets, 2 * is_tcp), Counts(answers, answers * octets))
            return sent

        @lru_cache
        def made(name: str) -> Run:
            sampling = {"interval": INTERVAL if name == "sampled" else 1, "mode": "count"}
            protocols = ["ipfix"] if name == "biflow" else list(PROTOCOLS)
            recorders = {protocol: Recorder(meter) for protocol in protocols}
            collectors = [
                {"url": f"{each.url}?protocol={protocol}", "biflow": name == "biflow"}
                for protocol, each in recorders.items()
            ]
            configuration: dict[str, Any] = {
                "collector": collectors, "sampling": sampling, "timeouts": {"idle": 600, "active": 600}
            }  # fmt: skip
            began_ms = now_ms()
            with Exporter(meter, directory, interfaces=("eth0", "eth1"), configuration=configuration) as exporter:
                sent = send_conversations() if name == "biflow" else send_capture()
                assert exporter.stop() == 0, exporter.log
            assert exporter.ledger().closes and "Traceback" not in exporter.log
            messages = {protocol: each.messages() for protocol, each in recorders.items()}
            for each in recorders.values():
                assert each.drops == 0
                each.__exit__(None, None, None)
            verdicts = judged(meter, directory / name, messages)
            return Run(sent, right.ifindex, began_ms, now_ms(), exporter.log, messages, verdicts)

        yield made


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def judged(meter: Namespace, directory: Path, messages: dict[str, list[bytes]]) -> dict[tuple[str, str], Verdict]:
    """Collectors all at once: they mostly wait. Then the decoders, so that nobody waits in vain for a CPU."""
    directory.mkdir(exist_ok=True)
    found = {}
    for judges in (COLLECTORS, DECODERS):
        with ThreadPoolExecutor(len(judges) * len(messages)) as pool:
            for protocol, name in itertools.product(messages, judges):
                found[protocol, name] = pool.submit(judges[name], meter, directory, messages[protocol])
    return {cell: future.result() for cell, future in found.items()}


# The cells


def reference(run: Run, row: str) -> list[Told]:
    return [told for told in run.verdicts["ipfix", "scapy"].told if ROWS[row][1](told.key)]


def check(runs: Callable[[str], Run], row: str, protocol: str, judge: str) -> str:
    """What stands in the table; fails where it is not so."""
    run = runs(ROWS[row][0])
    if protocol not in run.messages:
        return "refused at start"
    limits = limits_of(row, protocol, judge)
    verdict = run.verdicts[protocol, judge]
    assert verdict.objections == []
    reads = reference(run, row)
    conversations = {each.key[:2] for each in reads}  # each kind of traffic has addresses of its own
    told = [each for each in verdict.told if each.key[:2] in conversations]
    wanted = list(expected(limits, reads))
    assert summed(told, judge) == summed(wanted, judge)
    if not wanted:
        return "none: counted"
    return "; ".join(dict.fromkeys(["exact", *(limit.says for limit in limits if limit.says)]))


def summed(told: Iterable[Told], judge: str) -> Counter[Told] | dict[Told, Counts]:
    """How often each record is there. Of records that differ in their counters alone, print plugins make one."""
    if judge != "nfacctd":
        return Counter(told)
    sums: dict[Told, Counts] = {}
    for each in told:
        place = each._replace(counts=Counts(0, 0))
        sums[place] = sums.get(place, Counts(0, 0)).plus(each.counts)
    return sums


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("row", ROWS)
def test_every_record_is_read_exactly(runs: Callable[[str], Run], row: str, protocol: str, judge: str) -> None:
    check(runs, row, protocol, judge)


@pytest.mark.parametrize("name", ["plain", "biflow"])
def test_what_scapy_reads_in_ipfix_is_what_was_sent_within_the_run(runs: Callable[[str], Run], name: str) -> None:
    run = runs(name)
    told = run.verdicts["ipfix", "scapy"].told
    forward: FlowTable = {key: counts for key, (counts, _) in run.sent.items()}
    assert differences(forward, add_up((each.key, each.counts) for each in told)) == []
    back: FlowTable = {key: counts for key, (_, counts) in run.sent.items()}
    assert differences(back, add_up((each.key, each.reverse) for each in told)) == []
    assert {(each.ingress_ifindex, each.egress_ifindex) for each in told} == {(run.ifindex, 0)}
    assert all(run.began_ms <= each.start <= each.end <= run.ended_ms for each in told)


def test_what_was_sampled_times_the_interval_is_what_was_sent(runs: Callable[[str], Run]) -> None:
    """Each CPU may have a window open."""
    run = runs("sampled")
    found = sum(each.counts.packets for each in run.verdicts["ipfix", "scapy"].told)
    sent = total({key: counts for key, (counts, _) in run.sent.items()}).packets
    assert 0 <= sent - found * INTERVAL <= INTERVAL * (os.cpu_count() or 1)


def test_ipv6_flows_are_counted_as_not_representable_for_a_netflow5_collector(runs: Callable[[str], Run]) -> None:
    run = runs("plain")
    assert f", {sum(map(is_ipv6, run.sent))} flows not representable" in run.log
    assert run.log.count("its protocol has no IPv6") == 1


def test_our_own_decoder_reads_as_many_records_and_misses_no_message(runs: Callable[[str], Run]) -> None:
    run = runs("plain")
    for protocol, messages in run.messages.items():
        if protocol == "netflow5":
            continue
        decoder = Decoder()
        decoded = [decoder.decode(message, "here") for message in messages]
        assert [problem for each in decoded for problem in each.problems] == []
        assert sum(each.lost_packets for each in decoded) == sum(each.lost_records for each in decoded) == 0
        read = [record for each in decoded for record in each.records if "packetDeltaCount" in record]
        assert len(read) == len(run.verdicts[protocol, "scapy"].told)


@pytest.mark.parametrize("protocol", ["netflow9", "netflow5"])
def test_netflow_refuses_biflow_by_name(protocol: str, tmp_path: Path) -> None:
    file = tmp_path / "flowexp.toml"
    file.write_text(f"[[collector]]\nurl = 'udp://127.0.0.1?protocol={protocol}'\nbiflow = true\n")
    with pytest.raises(CommandFailed, match=f"biflow: only IPFIX has .*{protocol}"):
        run([COMMAND, "run", "-c", file])


def table(runs: Callable[[str], Run]) -> str:
    lines = [f"| | | {' | '.join(JUDGES)} |", f"|---|---|{'---|' * len(JUDGES)}"]
    for row in ROWS:
        for protocol, name in PROTOCOLS.items():
            cells = [check(runs, row, protocol, judge) for judge in JUDGES]
            lines.append(f"| {row} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_what_was_found(runs: Callable[[str], Run]) -> None:
    found = table(runs)
    if os.environ.get("WRITE_MATRIX"):
        TABLE.write_text(found)
        before, mark, rest = PAGE.read_text().partition("<!-- matrix -->\n")
        PAGE.write_text(f"{before}{mark}{found}<!-- /matrix -->{rest.partition('<!-- /matrix -->')[2]}")
    assert TABLE.read_text() == found
