# SPDX-License-Identifier: GPL-2.0-or-later
"""The recipe into Kafka and ClickHouse: nfacctd takes its configuration, and the SQL knows what nfacctd writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lab import needs
from lab.collectors import Nfacctd, Record
from lab.flowexp import Exporter
from lab.netns import namespaces, veth
from lab.pip import pip_install, support
from lab.process import Process, run
from lab.traffic import make_capture, replay
from lab.wait import wait_for

PIPELINE = Path(__file__).resolve().parents[2] / "packaging/pipeline"
SQL = (PIPELINE / "flows.sql").read_text()
PACKETS, FLOWS = 3_000, 200
OF_NO_USE = {"event_type"}  # always "purge"


class OfTheRecipe(Nfacctd):
    """nfacctd as the recipe has it, but for its address and port; `extra` goes behind."""

    extra = ""

    def start(self) -> Process:
        text = (PIPELINE / "nfacctd.conf").read_text()
        text = re.sub(r"(?m)^nfacctd_ip: .*$", f"nfacctd_ip: {self.address}", text)
        text = re.sub(r"(?m)^nfacctd_port: .*$", f"nfacctd_port: {self.port}", text)
        file = self.directory / "nfacctd.conf"
        file.write_text(self.adapt(text))
        return self.namespace.start("nfacctd", "-f", file, directory=self.directory, name=self.name)

    def adapt(self, text: str) -> str:
        """With a broker in librdkafka itself, which takes everything."""
        (self.directory / "librdkafka").write_text("global, test.mock.num.brokers, 1\n")
        return f"{text}kafka_config_file[flows]: {self.directory}/librdkafka\n"

    def delivered(self) -> list[tuple[int, int]]:
        """Of each purge that had any: what the broker has taken, and how many there were."""
        found = re.findall(r"Purging cache - END .*QN: (\d+)/(\d+)", self._log)
        return [(int(taken), int(there)) for taken, there in found if int(there)]


class Printing(OfTheRecipe):
    """The same with a file in Kafka's place."""

    def adapt(self, text: str) -> str:
        text = re.sub(r"(?m)^kafka_(broker|topic).*\n", "", text).replace("kafka", "print")
        return f"{text}print_output_file[flows]: {self.directory}/flows.json\n"


@pytest.mark.kernel
@pytest.mark.interop
def test_records_reach_kafka_and_have_the_columns_that_clickhouse_reads(tmp_path: Path) -> None:
    needs.need(needs.kernel(), needs.tools("nfacctd", "tcpreplay"))
    with namespaces("sender", "router") as (outside, inside):
        sender, metered = veth(outside, inside)
        capture = make_capture(tmp_path / "traffic.pcap", packets=PACKETS, flows=FLOWS, macs=(sender.mac, metered.mac))
        with OfTheRecipe(inside, tmp_path) as kafka, Printing(inside, tmp_path) as printing:
            urls = [kafka.url, printing.url]
            with Exporter(inside, tmp_path, collectors=urls, configuration={"direction": "ingress"}) as exporter:
                replay(sender, capture)
                exporter.stop()
                assert exporter.ledger().exported == PACKETS
            wait_for("Kafka to take the records", kafka.delivered, timeout_s=60)
            for each in (kafka, printing):
                each.finish()
    assert kafka.losses() == printing.losses() == []
    records = printing.records()
    assert sum(record["packets"] for record in records) == PACKETS
    assert [sum(column) for column in zip(*kafka.delivered())] == [len(records)] * 2
    queue = SQL[SQL.index("flows_queue\n(") : SQL.index("ENGINE = Kafka")]
    columns = dict(re.findall(r"(?m)^    (\w+) (\w+),?$", queue))
    assert [problem for record in records for problem in misfits(record, columns)] == []


def misfits(record: Record, columns: dict[str, str]) -> list[str]:
    """What of a JSON object ClickHouse has no column for, or one of another type."""
    kinds = {name: "String" if isinstance(value, str) else "UInt" for name, value in record.items()}
    found = {name: columns[name].rstrip("0123456789") for name in record.keys() & columns.keys()}
    wrong = [f"{name}: {json.dumps(record[name])}" for name, kind in found.items() if kinds[name] != kind]
    return [*wrong, *sorted(record.keys() - columns.keys() - OF_NO_USE), *sorted(columns.keys() - record.keys())]


def test_the_sql_is_clickhouses(tmp_path: Path) -> None:
    needs.need(support())
    library = pip_install(tmp_path, "sqlglot")
    program = (
        "import sys, sqlglot; made = sqlglot.parse(sys.stdin.read(), dialect='clickhouse');"
        "print(*(statement.key + ' ' + statement.args['kind'] for statement in made), sep='\\n')"
    )
    said = run(["env", f"PYTHONPATH={library}", "python3", "-c", program], stdin=SQL)
    assert said.splitlines() == ["create TABLE", "create TABLE", "create VIEW"]
