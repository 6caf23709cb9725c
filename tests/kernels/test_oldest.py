# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian 12's kernel, the oldest that the .deb meets, emulated; `make test-kernels` boots others, too."""

from __future__ import annotations

import pytest
from lab import needs

from kernels.machine import KERNELS, boot, support

pytestmark = pytest.mark.kernel


def test_what_is_metered_here_is_metered_by_kernel_6_1() -> None:
    needs.need(needs.namespace_support(), needs.bpf(), support())
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "6.1")
    results = boot(kernel)
    print(*(f"{each['check']}: {each['verdict']} {each['detail']} ({each['seconds']} s)" for each in results), sep="\n")
    assert [each["check"] for each in results if each["verdict"] == "FAILED"] == []
    assert {each["check"] for each in results if each["verdict"] == "ok"} >= {
        "loads without kernel BTF", "field groups", "sampling by interface", "as on the host", "clsact",
        "another's filter", "XDP", "super-packets", "restart", "VRF", "tunnels by kernel devices",
        "GTP-U by a kernel device",
    }  # fmt: skip
