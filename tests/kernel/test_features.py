# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel can do is found by trying, what it lacks is named, and its BTF is not among what is needed."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import in_process
import pytest
from lab import needs
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from flowexp.errors import FlowexpError
from flowexp.kernel import features, libbpf
from flowexp.meter import MeteringProcess, new_table

pytestmark = pytest.mark.kernel

FRAME = bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src="10.1.0.1", dst="10.1.0.9") / UDP())
ROOT = Path(__file__).parents[2]
LOAD = """
from pathlib import Path
from flowexp.kernel.attach import HOOK_PROGRAMS
from flowexp.meter import MeteringProcess, new_table
MeteringProcess(new_table(16), programs=(*HOOK_PROGRAMS, "replay"), max_flows=16).close()
print(Path("/sys/kernel/btf/vmlinux").exists())
"""


@pytest.fixture(autouse=True)
def bpf() -> None:
    needs.need(needs.bpf())


def test_this_kernel_has_all_that_the_packet_path_needs() -> None:
    assert [feature.name for feature in features.missing() if not feature.instead] == []


def test_every_program_loads_where_the_kernels_btf_cannot_be_seen() -> None:
    needs.need(needs.tools("unshare"), needs.namespace_support())
    hide = '[ ! -d /sys/kernel/btf ] || mount -t tmpfs none /sys/kernel/btf; exec "$@"'
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", hide, "-", sys.executable, "-c", LOAD]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (shown.returncode, shown.stdout.strip(), shown.stderr) == (0, "False", "")


def test_a_feature_that_is_needed_and_missing_is_named_with_the_release_that_brought_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (loops,) = (feature for feature in features.FEATURES if feature.name == "bounded loops")
    monkeypatch.setattr(features, "FEATURES", (dataclasses.replace(loops, is_there=lambda: False),))

    def refuse(_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(libbpf.library(), "bpf_object__load", refuse)
    with pytest.raises(FlowexpError, match=r"flowexp.bpf.o: this kernel has no bounded loops \(Linux 5.3\)$"):
        MeteringProcess(new_table(16), programs=("replay",), max_flows=16)


def test_without_the_coarse_clock_flows_have_the_precise_ones_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowexp.meter.has_coarse_clock", lambda: False)
    monkeypatch.setattr(in_process, "MAX_FLOWS", 16)
    meter = in_process.Meter("ingress_ethernet")
    run = meter.hook()
    began_ns = time.monotonic_ns()
    run(FRAME)
    between_ns = time.monotonic_ns()
    run(FRAME)
    ((_, flow),) = meter.take().flows.items()
    assert began_ns <= flow.first_ns <= between_ns <= flow.last_ns <= time.monotonic_ns()
