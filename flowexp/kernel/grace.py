# SPDX-License-Identifier: GPL-2.0-or-later
"""The grace period that ends flows safely."""

from __future__ import annotations

import ctypes
import os

from ..errors import FlowexpError

_MEMBARRIER_CMD_GLOBAL = 1
_MEMBARRIER_CALLS = {
    "x86_64": 324,
    "aarch64": 283,
    "riscv64": 283,
    "armv7l": 389,
    "ppc64le": 365,
    "s390x": 356,
}
_libc = ctypes.CDLL(None, use_errno=True)


def wait_grace_period() -> None:
    """Returns when every packet program that was running at the call has ended (membarrier, synchronize_rcu).

    Never a time: a paused virtual CPU outlasts any. FlowexpError where the kernel refuses (nohz_full).
    """
    number = _MEMBARRIER_CALLS.get(os.uname().machine)
    if number is None or _libc.syscall(ctypes.c_long(number), _MEMBARRIER_CMD_GLOBAL, 0, 0):
        reason = os.strerror(ctypes.get_errno()) if number else "system call number not known"
        raise FlowexpError(f"membarrier on {os.uname().machine}: {reason}; flows cannot be ended safely here")
