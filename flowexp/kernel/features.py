# SPDX-License-Identifier: GPL-2.0-or-later
"""What this kernel can do for the packet path, found out by trying it: versions say little (RHEL 9's 5.14).

A probe asks for the thing itself, on a device that cannot exist or in a program of a few instructions. It never
changes anything, and leaves nothing behind.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, List, Sequence, Tuple

from . import libbpf

_NO_INTERFACE = 0x7FFFFFFF
_Instruction = Tuple[int, int, int, int, int]  # code, destination, source, offset, immediate

# linux/bpf.h: 64-bit instructions of the probes.
_MOVE, _COPY, _ADD, _LOAD, _STORE, _IF_LESS, _CALL, _EXIT = 0xB7, 0xBF, 0x07, 0x79, 0x7A, 0xA5, 0x85, 0x95
_RESULT, _CONTEXT, _FRAME = 0, 1, 10
_DONE: List[_Instruction] = [(_MOVE, _RESULT, 0, 0, 0), (_EXIT, 0, 0, 0, 0)]
_COARSE_CLOCK, _FIB_LOOKUP = 160, 69  # enum bpf_func_id
_HARDWARE_TIME = 184  # where struct __sk_buff has it
_LOOP: List[_Instruction] = [(_MOVE, 0, 0, 0, 0), (_ADD, 0, 0, 0, 1), (_IF_LESS, 0, 0, -2, 8)]
_LOOK_UP_ROUTE: List[_Instruction] = [
    *((_STORE, _FRAME, 0, -offset, 0) for offset in range(64, 0, -8)),
    (_COPY, 2, _FRAME, 0, 0),
    (_ADD, 2, 0, 0, -64),
    (_MOVE, 3, 0, 0, 64),
    (_MOVE, 4, 0, 0, 0),
    (_CALL, 0, 0, 0, _FIB_LOOKUP),
]


@dataclass(frozen=True)
class Feature:
    """Something a kernel may lack. `instead`: what happens without it; empty where the packet path needs it."""

    name: str
    since: str
    instead: str
    is_there: Callable[[], bool]


def _load(instructions: Sequence[_Instruction]) -> int:
    """Descriptor of a TC program of these instructions."""
    little = sys.byteorder == "little"
    code = b""
    for operation, to, by, offset, value in [*instructions, *_DONE]:
        registers = by << 4 | to if little else to << 4 | by
        code += struct.pack("=BBhi", operation, registers, offset, value)
    return libbpf.load_program(libbpf.SCHED_CLS, code)


def _takes(instructions: Sequence[_Instruction]) -> bool:
    """Whether the verifier takes a TC program of these instructions."""
    try:
        os.close(_load(instructions))
    except OSError as error:
        if error.errno == errno.EPERM:
            raise
        return False
    return True


@lru_cache(maxsize=None)
def has_tcx() -> bool:
    """A kernel with TCX looks for the device; one without does not know the kind of link."""
    program = _load(())
    try:
        os.close(libbpf.create_link(program, _NO_INTERFACE, libbpf.TCX_INGRESS))
    except OSError as error:
        return error.errno == errno.ENODEV
    finally:
        os.close(program)
    return True


def _has_mmapable_arrays() -> bool:
    return _can_create(libbpf.ARRAY, key_octets=4, value_octets=8, entries=1, flags=libbpf.MMAPABLE)


def _can_create(kind: int, **sizes: int) -> bool:
    try:
        os.close(libbpf.create_map(kind, "probe", **sizes))
    except OSError as error:
        if error.errno == errno.EPERM:
            raise
        return False
    return True


def _has_ring_buffers() -> bool:
    return _can_create(libbpf.RINGBUF, key_octets=0, value_octets=0, entries=mmap.PAGESIZE)


@lru_cache(maxsize=None)
def has_coarse_clock() -> bool:
    """Whether programs may ask the coarse clock. Such a kernel also charges BPF memory to the cgroup, not to the
    limit on locked memory: both came with Linux 5.11, and libbpf tells the one by the other, too."""
    return _takes([(_CALL, 0, 0, 0, _COARSE_CLOCK)])


@lru_cache(maxsize=None)
def has_hardware_times() -> bool:
    """Whether programs see when the device itself got a packet (__sk_buff.hwtstamp)."""
    return _takes([(_LOAD, 0, _CONTEXT, _HARDWARE_TIME, 0)])


FEATURES = (
    Feature("arrays in memory (BPF_F_MMAPABLE)", "5.5", "", _has_mmapable_arrays),
    Feature("ring buffers (BPF_MAP_TYPE_RINGBUF)", "5.8", "", _has_ring_buffers),
    Feature("bounded loops", "5.3", "", lambda: _takes(_LOOP)),
    Feature("bpf_fib_lookup", "4.18", "", lambda: _takes(_LOOK_UP_ROUTE)),
    Feature("bpf_ktime_get_coarse_ns", "5.11", "the precise clock, some 20 ns a packet", has_coarse_clock),
    Feature("hardware time stamps (hwtstamp)", "5.16", 'none of them in field group "timing"', has_hardware_times),
    Feature("TCX links", "6.6", "filters on clsact", has_tcx),
    Feature("kernel BTF", "5.2", 'no field group "drops"', lambda: Path("/sys/kernel/btf/vmlinux").exists()),
)


def missing() -> List[Feature]:
    """The features that this kernel lacks; PermissionError where it cannot be asked."""
    return [feature for feature in FEATURES if not feature.is_there()]
