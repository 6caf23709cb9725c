# SPDX-License-Identifier: GPL-2.0-or-later
"""The Prometheus endpoint: it says what `flowexp status` says, and packaging/ asks for nothing that it lacks."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Dict, FrozenSet, Tuple

import pytest
from lab import needs
from lab.collectors import Recorder
from lab.flowexp import COMMAND, Exporter
from lab.netns import Namespace, namespaces, veth
from lab.traffic import make_capture, replay
from lab.wait import wait_for
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sample_status import SAMPLE

from flowexp.config import Config
from flowexp.config_load import read
from flowexp.errors import FlowexpError, UsageError
from flowexp.metrics import families, serve
from flowexp.status import Status

PACKAGING = Path(__file__).parents[2] / "packaging"
RULES_TEST = Path(__file__).with_name("alerts_test.yml")
PACKETS, FLOWS = 20_000, 2_000

Samples = Dict[Tuple[str, FrozenSet[Tuple[str, str]]], float]


def parse(text: str) -> Samples:
    """Every sample of the exposition format by name and labels; none may be there twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"flowexp_{name}", frozenset(labels.items())]


class _Registered:
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        return families(self._status)


def exposition(status: Status) -> str:
    registry = CollectorRegistry()
    registry.register(_Registered(status))  # type: ignore[arg-type]
    return generate_latest(registry).decode()


@pytest.fixture(scope="module")
def samples() -> Samples:
    return parse(exposition(SAMPLE))


# What a status becomes


def test_the_ledger_is_there_part_by_part(samples: Samples) -> None:
    assert value(samples, "seen_packets_total") == 1115
    assert value(samples, "seen_octets_total") == 111500
    assert value(samples, "exported_packets_total") == 1000
    assert value(samples, "exported_octets_total") == 100000
    assert value(samples, "table_packets") == 100
    assert value(samples, "table_octets") == 10000
    assert value(samples, "not_metered_packets_total", reason="not_ip") == 10
    assert value(samples, "not_metered_octets_total", reason="not_ip") == 1000
    assert value(samples, "not_metered_packets_total", reason="table_full") == 0
    assert value(samples, "ledger_missing_packets") == 5
    assert value(samples, "ledger_missing_octets") == 500


def test_table_and_records_are_there(samples: Samples) -> None:
    assert value(samples, "table_flows", family="ipv4") == 26214
    assert value(samples, "table_flows", family="ipv6") == 3
    assert value(samples, "table_max_flows") == 262144
    assert value(samples, "table_memory_octets") == 127329376
    assert value(samples, "payloads_lost_total") == 17
    assert value(samples, "nat_events_total", event="created") == 61
    assert value(samples, "nat_events_total", event="deleted") == 62
    assert value(samples, "nat_event_overruns_total") == 63
    assert value(samples, "last_sweep_flows") == 26217
    for reason, count in SAMPLE["exportedRecords"].items():
        assert value(samples, "exported_records_total", reason=reason) == count
    assert value(samples, "build_info", version="1.2.3") == 1
    assert value(samples, "uptime_seconds") == 93784.5


def test_durations_are_histograms(samples: Samples) -> None:
    assert value(samples, "sweep_duration_seconds_bucket", le="0.001") == 1
    assert value(samples, "sweep_duration_seconds_bucket", le="0.01") == 3
    assert value(samples, "sweep_duration_seconds_bucket", le="+Inf") == 4
    assert value(samples, "sweep_duration_seconds_count") == 4
    assert value(samples, "sweep_duration_seconds_sum") == 0.5
    assert value(samples, "send_duration_seconds_sum") == 0.25


def test_each_collector_has_its_counters_and_state(samples: Samples) -> None:
    udp, file = "udp://192.0.2.1:4739", "file:///tmp/x"
    assert value(samples, "collector_up", collector=udp) == 0
    assert value(samples, "collector_up", collector=file) == 1
    assert value(samples, "collector_state", collector=udp, state="refused") == 1
    expected = {
        "messages_sent": 21, "octets_sent": 22000, "records_sent": 23, "messages_failed": 24, "records_failed": 25,
        "refused": 26, "unreachable": 27, "flows_not_representable": 30,
    }  # fmt: skip
    for name, count in expected.items():
        assert value(samples, f"collector_{name}_total", collector=udp) == count
    assert value(samples, "collector_template_age_seconds", collector=udp) == 31.5
    assert ("flowexp_collector_template_age_seconds", frozenset({("collector", file)})) not in samples


def test_interfaces_say_how_they_are_attached_and_what_they_count(samples: Samples) -> None:
    assert value(samples, "attached", interface="wg0", direction="egress", how="clsact") == 1
    assert value(samples, "device_packets_total", interface="eth0", direction="ingress") == 1234567
    labels = frozenset({("interface", "wg0"), ("direction", "egress")})
    assert ("flowexp_device_packets_total", labels) not in samples


def test_each_observation_point_says_what_is_odd_there(samples: Samples) -> None:
    labels = {"interface": "eth0", "direction": "ingress"}
    names = ("unanswered_flows_total", "undersized_packets_total", "jumbo_packets_total")
    gauges = ("source_destinations_max", "source_ports_max")
    assert [value(samples, name, **labels) for name in (*names, *gauges)] == [51, 52, 53, 54, 1055]
    assert value(samples, "source_ports_max", interface="wg0", direction="egress") == 0


def test_collectors_at_one_address_are_told_apart() -> None:
    first = SAMPLE["collectors"][0]
    status: Status = {**SAMPLE, "collectors": [first, {**first, "refused": 3}, {**first, "refused": 4}]}
    samples, url = parse(exposition(status)), "udp://192.0.2.1:4739"
    refused = [value(samples, "collector_refused_total", collector=name) for name in (url, f"{url} 2", f"{url} 3")]
    assert refused == [26, 3, 4]


def test_a_status_without_collector_interface_or_sweep_makes_metrics_too() -> None:
    status: Status = {**SAMPLE, "collectors": [], "attached": [], "anomalies": [], "lastSweep": None}
    assert value(parse(exposition(status)), "table_max_flows") == 262144


# What packaging/ asks for


def asked_for(*texts: str) -> set[str]:
    return {name for text in texts for name in re.findall(r"\bflowexp_\w+", text)}


def expressions() -> Sequence[str]:
    dashboard = json.loads((PACKAGING / "grafana-dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if "refId" in variable["query"]
    ]
    return found


def names(samples: Samples) -> set[str]:
    return {name for name, _ in samples} | {"flowexp_up"}  # held by the live test below


def test_the_dashboard_asks_for_metrics_that_there_are(samples: Samples) -> None:
    wanted = asked_for(*expressions())
    assert len(wanted) > 15
    assert wanted <= names(samples)


def test_the_alerts_ask_for_metrics_that_there_are(samples: Samples) -> None:
    rules = (PACKAGING / "alerts.yml").read_text()
    assert len(re.findall(r"^ +expr: ", rules, re.MULTILINE)) == 8
    assert asked_for(rules) <= names(samples)
    assert asked_for(RULES_TEST.read_text()) <= asked_for(rules)


def test_panels_have_numbers_titles_and_places_of_their_own() -> None:
    panels = json.loads((PACKAGING / "grafana-dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def run_promtool(*arguments: object, stdin: str = "") -> None:
    needs.need(needs.tools("promtool"))
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_each_fires_when_it_should() -> None:
    run_promtool("check", "rules", PACKAGING / "alerts.yml")
    run_promtool("test", "rules", RULES_TEST)


def test_promtool_accepts_the_metrics() -> None:
    run_promtool("check", "metrics", stdin=exposition(SAMPLE))


def test_promtool_parses_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "5m")}
        for number, expr in enumerate(expressions())
        if not expr.startswith("label_values")
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    run_promtool("check", "rules", path)


# The endpoint


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("", None),
        ("127.0.0.1:9745", ("127.0.0.1", 9745)),
        ("[::1]:9745", ("::1", 9745)),
        ("metrics.example:1", ("metrics.example", 1)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_where_it_listens_is_configured_and_nowhere_by_default(tmp_path: Path, listen: str, address: Any) -> None:
    path = tmp_path / "flowexp.toml"
    path.write_text(f'[metrics]\nlisten = "{listen}"\n')
    assert read(path).metrics.address == address
    assert Config().metrics.address is None


@pytest.mark.parametrize("listen", ['"9745"', '":9745"', '"h:0"', '"h:65536"', '"::1:9745"', '"http://h:1"', "9745"])
def test_an_address_that_is_none_is_named_with_what_is_allowed(tmp_path: Path, listen: str) -> None:
    path = tmp_path / "flowexp.toml"
    path.write_text(f"[metrics]\nlisten = {listen}\n")
    with pytest.raises(UsageError) as raised:
        read(path)
    assert str(raised.value) == (
        f"{path}: [metrics] listen: {listen} is no address to listen on; "
        'allowed: "" (nowhere) or HOST:PORT, as in "127.0.0.1:9745"'
    )


def fetch(namespace: Namespace, port: int) -> str:
    with namespace.entered():
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())


def free_tcp_port(namespace: Namespace) -> int:
    with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.kernel
def test_the_endpoint_says_what_was_sent_while_the_exporter_runs(tmp_path: Path) -> None:
    needs.need(needs.kernel(), needs.tools("tcpreplay"))
    with namespaces("sender", "meter") as (sender, meter):
        left, right = veth(sender, meter)
        capture = make_capture(
            tmp_path / "sent.pcap", packets=PACKETS, flows=FLOWS, macs=(left.mac, "02:00:00:00:00:99")
        )
        port = free_tcp_port(meter)
        configuration = {
            "metrics": {"listen": f"127.0.0.1:{port}"},
            "timeouts": {"idle": 600, "linger": 600},
            "fields": {"groups": ["integrity"]},
        }
        with (
            Recorder(meter) as recorder,
            Exporter(meter, tmp_path, collectors=[recorder.url], configuration=configuration) as exporter,
        ):
            assert replay(left, capture) == PACKETS
            wait_for("a sweep", lambda: value(parse(fetch(meter, port)), "sweep_duration_seconds_count") > 0)
            samples = parse(fetch(meter, port))
            assert exporter.stop() == 0, exporter.log
    assert value(samples, "up") == 1
    assert value(samples, "seen_packets_total") == value(samples, "table_packets") == PACKETS
    assert value(samples, "table_octets") == sum(flow.octets for flow in capture.flows.values())
    assert value(samples, "table_flows", family="ipv4") + value(samples, "table_flows", family="ipv6") == FLOWS
    assert value(samples, "ledger_missing_packets") == value(samples, "ledger_missing_octets") == 0
    assert value(samples, "device_packets_total", interface="eth0", direction="ingress") == PACKETS
    assert value(samples, "collector_up", collector=recorder.url) == 1
    assert samples["process_cpu_seconds_total", frozenset()] > 0
    assert asked_for(*expressions()) <= {name for name, _ in samples}


@pytest.mark.kernel
def test_without_a_configured_endpoint_nothing_listens(tmp_path: Path) -> None:
    needs.need(needs.kernel())
    with namespaces("sender", "meter") as (sender, meter):
        veth(sender, meter)
        with Recorder(meter) as recorder, Exporter(meter, tmp_path, collectors=[recorder.url]) as exporter:
            assert meter.read_proc_net("tcp").count("\n") == meter.read_proc_net("tcp6").count("\n") == 1
            assert exporter.stop() == 0


@pytest.mark.kernel
def test_an_address_that_another_has_is_one_line_and_nothing_is_left_behind(tmp_path: Path) -> None:
    needs.need(needs.kernel())
    with namespaces("sender", "meter") as (sender, meter):
        veth(sender, meter)
        with meter.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            pins = f"/sys/fs/bpf/fxt-metrics-{port}"
            config = tmp_path / "flowexp.toml"
            config.write_text(f'[metrics]\nlisten = "127.0.0.1:{port}"\n[table]\npin_path = "{pins}"\n')
            command = meter.inside([COMMAND, "run", "-c", config, "-i", "eth0", "--collector", "udp://127.0.0.1:9"])
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        f"flowexp: [metrics] listen: 127.0.0.1 port {port}: Address already in use; choose another\n"
    )
    assert not Path(pins).exists()


def test_a_scrape_says_so_where_the_exporter_does_not_answer() -> None:
    def ask() -> Status:
        raise FlowexpError("it is leaving")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    serve(("127.0.0.1", port), ask)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        samples = parse(answer.read().decode())
    assert value(samples, "up") == 0
    assert not [name for name, _ in samples if name.startswith("flowexp_") and name != "flowexp_up"]


def test_without_the_library_one_line_names_its_package() -> None:
    program = (
        "import sys\nsys.modules['prometheus_client'] = None\nfrom flowexp.errors import FlowexpError\n"
        "try:\n    import flowexp.metrics\nexcept FlowexpError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[metrics] listen: the Python package prometheus_client is missing; install it")
    assert "python3-prometheus-client" in done.stdout
    assert done.stdout.count("\n") == 1
