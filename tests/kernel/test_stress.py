# SPDX-License-Identifier: GPL-2.0-or-later
"""The flow table under stress: packets on every CPU into a small table that is swept without a pause.

A total that closes does not prove the table right: an addition that comes too late is found again in
the slot's next owner. So each packet's length is a function of its flow's key, and every single record
has to show octets = packets x length(key). The object under test stops packets at random between
looking at a slot and writing to it. That the test can see a broken table is shown by mutants.
"""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from lab import needs
from lab.netns import namespaces, veth
from storm import sending

from flowexp import meter as meter_module
from flowexp.kernel import netlink
from flowexp.kernel.attach import HOOK_PROGRAMS, Attacher
from flowexp.kernel.family import Family
from flowexp.kernel.flows import Columns
from flowexp.kernel.grace import wait_grace_period
from flowexp.meter import MeteringProcess
from flowexp.metering.ledger import Ledger
from flowexp.metering.sweep import CLASSES, Timeouts

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("FLOWEXP_STRESS_SECONDS", "15"))
MUTANT_SECONDS = 180.0  # it ends as soon as something is wrong: at once, where nobody else wants the CPUs
MAX_FLOWS = 2048  # of the table; more are sent, so that slots change owners all the time
FLOWS = 1500  # of each family
PASSES = 4
IDLE_NS = 3_000_000
PART_SLOTS = 512  # of 2928; the flows that are sent crowd them
SWEEPS_A_CHANGE = 10


def length_of(port: int) -> int:
    """The UDP payload of every packet from this port, in octets: what neighbours have differs."""
    return port * 7 % 61


def frame(version: int, port: int) -> bytes:
    """An Ethernet frame of the flow that `port` tells apart."""
    length = 8 + length_of(port)
    udp = struct.pack(">HHHH", port, 9, length, 0) + bytes(length - 8)
    if version == 4:
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0, 64, 17, 0, bytes(4), bytes(4))
        return bytes(12) + b"\x08\x00" + ip + udp
    ip = struct.pack(">IHBB16s16s", 6 << 28, length, 17, 64, bytes(16), bytes(16))
    return bytes(12) + b"\x86\xdd" + ip + udp


def write_capture(path: Path) -> None:
    """Some passes over all flows of both families, each in an order of its own."""
    random = np.random.default_rng(1)
    with path.open("wb") as out:
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for _ in range(PASSES):
            for number in random.permutation(2 * FLOWS).tolist():
                octets = frame(4 + 2 * (number % 2), 1024 + number // 2)
                out.write(struct.pack("<IIII", 0, 0, len(octets), len(octets)) + octets)


@dataclass
class Outcome:
    """What a run has shown. `wrong`: records whose octets are not packets times the flow's length."""

    ledger: Ledger
    wrong: int
    records: int

    @property
    def is_right(self) -> bool:
        return self.wrong == 0 and self.ledger.missing() == (0, 0)


def wrong_records(columns: Columns) -> int:
    headers = np.where(columns["ip_version"] == 4, 28, 48)
    length = columns["src_port"].astype(np.int64) * 7 % 61 + headers
    return int(np.count_nonzero(columns["packets"].astype(np.int64) * length != columns["octets"].astype(np.int64)))


def run_stress(seconds: float, capture: Path, *, is_restless: bool) -> Outcome:
    """Meters a veth's ingress while every CPU sends into it, until `seconds` have passed or something is wrong.

    is_restless: packets use now all of the table, now a part.
    """
    with namespaces("sender", "meter", ipv6=False) as (sender, metering):
        source, _ = veth(sender, metering)
        with metering.entered():
            meter = MeteringProcess(meter_module.new_table(MAX_FLOWS), programs=HOOK_PROGRAMS, max_flows=MAX_FLOWS * 4)
            attacher = Attacher(
                meter.programs, meter.ingress_map, handle=1, direction="ingress", hook="tc", xdp_force=False
            )
            attacher.follow(netlink.resolve(["eth0"]))
            try:
                change = _change_extents if is_restless else _leave_extents
                return _sweep_without_pause(meter, attacher, sending(source, capture), seconds, change)
            finally:
                attacher.detach_all()
                meter.close()


def _leave_extents(meter: MeteringProcess, sweep: int) -> None:
    pass


def _change_extents(meter: MeteringProcess, sweep: int) -> None:
    for family in meter.table.families:
        extent = family.extent
        extent.settle(wait_grace_period)
        if sweep % SWEEPS_A_CHANGE == 0:
            extent.change(PART_SLOTS if extent.slots == family.slots else family.slots, wait_grace_period)


def _sweep_without_pause(
    meter: MeteringProcess,
    attacher: Attacher,
    traffic: AbstractContextManager[None],
    seconds: float,
    before_sweep: Callable[[MeteringProcess, int], None],
) -> Outcome:
    never = 10**18
    timeouts = Timeouts(dict.fromkeys(CLASSES, IDLE_NS), dict.fromkeys(CLASSES, never), never)
    wrong = records = 0

    def take(batches: Iterator[meter_module.Batch]) -> None:
        nonlocal wrong, records
        for batch in batches:
            wrong += wrong_records(batch.columns)
            records += batch.records
            batch.done()

    with traffic:
        end = time.monotonic() + seconds
        for sweep in itertools.count(1):
            if time.monotonic() > end or wrong:
                break
            before_sweep(meter, sweep)
            take(meter.sweep(timeouts, time.monotonic_ns()))
    attacher.detach_all()
    take(meter.drain())
    return Outcome(meter.ledger(), wrong, records)


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs.need(needs.tools("tcpreplay", "taskset", "clang"), needs.namespace_support(), needs.bpf())
    path = tmp_path_factory.mktemp("stress") / "flows.pcap"
    write_capture(path)
    return path


@pytest.fixture(scope="module")
def delaying_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packet path, built to stop at random between a look at a slot and a write to it."""
    path = tmp_path_factory.mktemp("object") / "flowexp.bpf.o"
    subprocess.run(["make", "-s", "-C", ROOT, path, f"DATA={path.parent}", "BPF_DEFINES=-DFLOWEXP_STRESS"], check=True)
    return path


@pytest.fixture
def stress(capture: Path, delaying_object: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.setattr(meter_module, "object_path", lambda: delaying_object)
    return lambda seconds, is_restless=False: run_stress(seconds, capture, is_restless=is_restless)


@pytest.mark.parametrize("is_restless", [False, True])
def test_every_record_and_the_ledger_are_exact_while_slots_change_owners(
    stress: Callable[..., Outcome], is_restless: bool
) -> None:
    outcome = stress(SECONDS / 2 if is_restless else SECONDS, is_restless)
    print(f"{outcome.records} records; {outcome.ledger}")
    assert outcome.wrong == 0
    assert outcome.ledger.missing() == (0, 0)
    assert outcome.records > 10 * MAX_FLOWS  # slots did change owners


def test_a_sweep_without_a_grace_period_is_caught(
    stress: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter_module, "wait_grace_period", lambda: None)
    assert not stress(MUTANT_SECONDS).is_right


def test_freeing_a_slot_before_zeroing_it_is_caught(
    stress: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def retire(family: Family, slots: np.ndarray) -> None:
        family._ctl.put(slots, 0)
        family.tags[slots] = 0
        time.sleep(0.001)
        family._hot_rows[slots, 1:] = 0
        family._cold_rows[slots] = 0

    monkeypatch.setattr(Family, "retire", retire)
    assert not stress(MUTANT_SECONDS).is_right


def test_ending_a_flow_without_closing_it_first_is_caught(
    stress: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Family, "close", lambda family, slots, reasons: None)
    assert not stress(MUTANT_SECONDS).is_right
