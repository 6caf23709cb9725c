# SPDX-License-Identifier: GPL-2.0-or-later
"""A long steady load: memory stays as it is, and every packet is exported. `make soak`; not part of `make test`."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from lab import needs
from lab.collectors import SO_RCVBUFFORCE
from lab.flowexp import Exporter
from lab.netns import Namespace, namespaces, veth
from lab.process import Process
from storm import Templates, expected_octets, records, sending, write_capture

from flowexp.metering.sweep import ACTIVE

pytestmark = pytest.mark.kernel

SECONDS = float(os.environ.get("FLOWEXP_SOAK_SECONDS", "60"))
WARM_UP_S = min(300.0, SECONDS / 4)  # by then the heap holds what the largest sweep needs; it grows 1 % until then
PACKETS_PER_S = 100_000
PORTS = 2500  # of four flows each
GROWTH = 0.02


class Counter:
    """A Collector that adds up what it is told, and keeps nothing else."""

    def __init__(self, namespace: Namespace) -> None:
        self._socket = namespace.socket()
        self._socket.setsockopt(1, SO_RCVBUFFORCE, 512 << 20)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self._templates: Templates = {}
        self.url = f"udp://127.0.0.1:{self._socket.getsockname()[1]}"
        self.packets = self.records = self.wrong = 0

    def read(self) -> None:
        rows = records(self._messages(), self._templates)
        ended = rows[rows["reason"] != ACTIVE]
        self.packets += int(rows["packets"].sum())
        self.records += len(rows)
        # A TCP flow ends before an interim record is due, which may have octets whose packets the last one has.
        at_once = ended[ended["protocol"] == 6]
        self.wrong += int(np.count_nonzero(at_once["octets"] != expected_octets(at_once)))

    def _messages(self) -> list[bytes]:
        messages = []
        while True:
            try:
                messages.append(self._socket.recv(65535))
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._socket.close()


def resident_kib(process: Process) -> int:
    (found,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    return int(found)


def test_memory_stays_flat_and_the_ledger_closes(tmp_path: Path) -> None:
    needs.need(needs.kernel(), needs.tools("tcpreplay", "taskset"))
    capture = write_capture(tmp_path / "flows.pcap", ports=PORTS)
    each_per_s = PACKETS_PER_S // len(os.sched_getaffinity(0))
    configuration = {"direction": "ingress", "timeouts": {"idle": 5, "active": 10, "linger": 0}}
    with namespaces("sender", "meter") as (sender, meter):
        source, metered = veth(sender, meter)
        counter = Counter(meter)
        with Exporter(meter, tmp_path, configuration=configuration, collectors=[counter.url]) as exporter:
            resident = []
            with sending(source, capture, packets_per_s=each_per_s):
                began_s = time.monotonic()
                while (passed_s := time.monotonic() - began_s) < SECONDS:
                    time.sleep(0.5)
                    counter.read()
                    if passed_s > WARM_UP_S:
                        resident.append(resident_kib(exporter.process))
            assert exporter.stop() == 0
            counter.read()
        counter.close()
        ledger, seen = exporter.ledger(), metered.counters()["rx_packets"]
        tenths = [resident[len(resident) * part // 10] for part in range(10)]
        print(f"{ledger.line}; {counter.records} records; resident {tenths} to {max(resident)} KiB")
        assert ledger.closes
        assert ledger.seen == ledger.exported == counter.packets == seen
        assert seen > 0.9 * PACKETS_PER_S * SECONDS
        assert counter.wrong == 0
        assert max(resident) <= min(resident) * (1 + GROWTH)
