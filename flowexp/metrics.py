# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics for Prometheus, made of the same status that `flowexp status` shows.

The rule: every scrape asks the exporter's loop as `flowexp status` does (status.py). The thread that serves HTTP
never sees the table, and nothing is measured that status does not say. This is the only importer of
prometheus_client; importing this module without that library is a FlowexpError.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple, Type

from .errors import FlowexpError
from .status import Histogram, Status

try:
    from prometheus_client import CollectorRegistry, Metric, ProcessCollector, start_http_server
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    advice = "install it (Debian: python3-prometheus-client, pip: flowexp[metrics]), or leave listen empty"
    raise FlowexpError(f"[metrics] listen: the Python package prometheus_client is missing; {advice}") from error


def serve(address: Tuple[str, int], ask: Callable[[], Status]) -> Callable[[], None]:
    """Serves metrics at host and port, from a thread of its own. Returns what ends it.

    ask: fetches a status; FlowexpError where none is to be had. FlowexpError where the address cannot be had.
    """
    host, port = address
    registry = CollectorRegistry()
    registry.register(_Exporter(ask))
    ProcessCollector(registry=registry)
    try:
        server = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise FlowexpError(f"[metrics] listen: {host} port {port}: {error.strerror}; choose another") from error

    def end() -> None:
        if server is None:  # prometheus_client before 0.19 cannot
            _log.warning("[metrics] listen: %s port %d answers until the next restart, too", host, port)
            return
        server[0].shutdown()
        server[0].server_close()

    return end


_log = logging.getLogger(__name__)


class _Exporter(Collector):
    def __init__(self, ask: Callable[[], Status]) -> None:
        self._ask = ask

    def describe(self) -> Iterator[Metric]:
        """Nothing: whoever registers this must not have to wait for a status."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        try:
            status = self._ask()
        except FlowexpError:  # it is starting, or leaving, or takes longer than a scrape may
            yield _gauge("up", "Whether the exporter answers; nothing else is known where it does not.", ((), 0))
            return
        yield _gauge("up", "Whether the exporter answers; nothing else is known where it does not.", ((), 1))
        yield from families(status)


def families(status: Status) -> Iterator[Metric]:
    """Every metric that a status makes."""
    version = (("version", status["version"]),)
    yield _gauge("build_info", "The version that runs, as a label.", (version, 1))
    yield _gauge("uptime_seconds", "Since the exporter started.", ((), status["uptimeSeconds"]))
    yield from _ledger(status["ledger"])
    yield from _table(status)
    yield from _nat(status)
    yield _histogram("sweep_duration_seconds", "One sweep of the table, sending included.", status["sweepDurations"])
    yield _histogram("send_duration_seconds", "What of one sweep was sending, all Collectors.", status["sendDurations"])
    yield from _collectors(status)
    yield from _interfaces(status)
    yield from _anomalies(status)


Labels = Tuple[Tuple[str, str], ...]
Sample = Tuple[Labels, float]


def _gauge(name: str, meaning: str, *samples: Sample) -> Metric:
    return _family(GaugeMetricFamily, name, meaning, *samples)


def _counter(name: str, meaning: str, *samples: Sample) -> Metric:
    return _family(CounterMetricFamily, name, meaning, *samples)


def _family(kind: Type[Any], name: str, meaning: str, *samples: Sample) -> Metric:
    """A metric and its samples, all of which have the same label names."""
    names = [label for label, _ in samples[0][0]] if samples else []
    family: Any = kind(f"flowexp_{name}", meaning, labels=names)
    for labels, value in samples:
        family.add_metric([text for _, text in labels], value)
    metric: Metric = family
    return metric


def _histogram(name: str, meaning: str, histogram: Histogram) -> Metric:
    buckets = [(bound, float(count)) for bound, count in histogram["buckets"]]
    return HistogramMetricFamily(f"flowexp_{name}", meaning, buckets=buckets, sum_value=histogram["sumSeconds"])


def _ledger(ledger: Mapping[str, Any]) -> Iterator[Metric]:
    """Packets and octets of each part: seen = exported + in the table + not metered, since the ledger began."""
    for unit in ("packets", "octets"):
        yield _counter(f"seen_{unit}", f"{unit.capitalize()} that the hook saw.", ((), ledger["seen"][unit]))
        exported = ledger["exported"][unit]
        yield _counter(f"exported_{unit}", f"{unit.capitalize()} that Data Records have carried.", ((), exported))
        in_table = ledger["inTable"][unit]
        yield _gauge(f"table_{unit}", f"{unit.capitalize()} in the table, in no Data Record yet.", ((), in_table))
        reasons = (((("reason", reason),), count[unit]) for reason, count in ledger["notMetered"].items())
        yield _counter(f"not_metered_{unit}", f"{unit.capitalize()} that are in no flow, by reason.", *reasons)
        missing = ledger["missing"][unit]
        yield _gauge(f"ledger_missing_{unit}", f"{unit.capitalize()} that the ledger does not explain.", ((), missing))


def _table(status: Status) -> Iterator[Metric]:
    table = status["table"]
    flows = (((("family", family),), count) for family, count in table["flows"].items())
    yield _gauge("table_flows", "Flows in the table, by address family.", *flows)
    yield _gauge("table_max_flows", "Room for so many flows, of each address family.", ((), table["maxFlows"]))
    yield _gauge("table_memory_octets", "Memory of the table.", ((), table["octets"]))
    lost = "Flows whose application is not known, as too many began at once."
    yield _counter("payloads_lost", lost, ((), table["payloadsLost"]))
    records = (((("reason", reason),), count) for reason, count in status["exportedRecords"].items())
    yield _counter("exported_records", "Data Records since the exporter started, by flowEndReason.", *records)
    sweep = status["lastSweep"]
    if sweep is not None:
        yield _gauge("last_sweep_flows", "Flows that the last sweep looked at.", ((), sweep["flows"]))


def _nat(status: Status) -> Iterator[Metric]:
    events = status["natEvents"]
    if events is None:
        return
    kinds = (((("event", name),), events[name]) for name in ("created", "deleted"))
    yield _counter("nat_events", "Translated connections that began and that ended.", *kinds)
    lost = "How often such events came faster than they were read, and some were lost."
    yield _counter("nat_event_overruns", lost, ((), events["overruns"]))


_COLLECTOR_COUNTERS = {
    "messages_sent": ("messagesSent", "Messages that the kernel took."),
    "records_sent": ("recordsSent", "Data Records in them."),
    "octets_sent": ("octetsSent", "Octets in them, without UDP and IP headers."),
    "messages_failed": ("messagesFailed", "Messages that the kernel did not take."),
    "records_failed": ("recordsFailed", "Data Records in them."),
    "refused": ("refused", "ICMP answers that nobody listens there."),
    "unreachable": ("unreachable", "Other ICMP answers: host or network unreachable, prohibited."),
    "flows_not_representable": ("flowsNotRepresentable", "Flows that the Collector's protocol cannot tell of."),
    "records_dropped": ("recordsDropped", "Data Records that had to make room in a full queue or spool."),
    "records_resent": ("recordsResent", "Data Records sent again over a new connection; they may arrive twice."),
}
_COLLECTOR_GAUGES = {
    "records_queued": ("recordsQueued", "Data Records that the Collector's host has not acknowledged."),
    "queue_octets": ("octetsQueued", "Size of the queue or spool."),
}


def _collectors(status: Status) -> Iterator[Metric]:
    """One sample for each Collector; of several at the same URL the second has a 2 behind it, and so on."""
    collectors: Dict[str, Mapping[str, Any]] = {}
    for each in status["collectors"]:
        url = str(each["collector"])
        names = itertools.chain([url], (f"{url} {number}" for number in itertools.count(2)))
        collectors[next(name for name in names if name not in collectors)] = each
    if not collectors:
        return
    labels: Mapping[str, Labels] = {url: (("collector", url),) for url in collectors}
    up = ((labels[url], float(each["state"] == "up")) for url, each in collectors.items())
    yield _gauge("collector_up", "Whether Messages go out and nothing says that they do not arrive.", *up)
    states = (((("collector", url), ("state", str(each["state"]))), 1.0) for url, each in collectors.items())
    yield _gauge("collector_state", "The Collector's state, as a label.", *states)
    for name, (key, meaning) in _COLLECTOR_COUNTERS.items():
        counts = ((labels[url], float(each.get(key) or 0)) for url, each in collectors.items())
        yield _counter(f"collector_{name}", meaning, *counts)
    for name, (key, meaning) in _COLLECTOR_GAUGES.items():
        gauges = [(labels[url], float(each[key] or 0)) for url, each in collectors.items() if key in each]
        if gauges:
            yield _gauge(f"collector_{name}", meaning, *gauges)
    ages = {url: each["templateAgeSeconds"] for url, each in collectors.items()}
    known = ((labels[url], float(age)) for url, age in ages.items() if age is not None)
    yield _gauge("collector_template_age_seconds", "Since Templates went last.", *known)


def _interfaces(status: Status) -> Iterator[Metric]:
    programs = [
        ((("interface", each["interface"]), ("direction", each["direction"])), each) for each in status["attached"]
    ]
    attached = ((labels + (("how", each["how"]),), 1.0) for labels, each in programs)
    yield _gauge("attached", "Where a program is attached, and how.", *attached)
    counts = ((labels, float(each["devicePackets"])) for labels, each in programs if each["devicePackets"] is not None)
    yield _counter("device_packets", "Packets that the device itself has counted since.", *counts)


_ANOMALY_COUNTERS = {
    "unanswered_flows": ("unansweredFlows", "TCP flows with SYN that ended and to which nothing came back."),
    "undersized_packets": ("undersizedPackets", "Packets that came in as a frame shorter than Ethernet's shortest."),
    "jumbo_packets": ("jumboPackets", "Packets of more than 1500 octets of IP on the wire."),
}
_ANOMALY_GAUGES = {
    "source_destinations_max": ("destinations", "Destinations of one source, the most within a minute."),
    "source_ports_max": ("ports", "Destination ports of one source, the most within a minute."),
}


def _anomalies(status: Status) -> Iterator[Metric]:
    """Where the field group `integrity` is on."""
    found: List[Tuple[Labels, Mapping[str, Any]]] = [
        ((("interface", each["interface"]), ("direction", each["direction"])), each) for each in status["anomalies"]
    ]
    for make, metrics in ((_counter, _ANOMALY_COUNTERS), (_gauge, _ANOMALY_GAUGES)):
        for name, (key, meaning) in metrics.items():
            if found:
                yield make(name, meaning, *((labels, float(each[key])) for labels, each in found))
