# SPDX-License-Identifier: GPL-2.0-or-later
"""netobserv's agent in the kernel: its own BPF object, which nobody packages, with all that it can switch off off.

Its maps are made as its agent makes them: room for so many flows, and hardly any for what is off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowexp.kernel import libbpf
from flowexp.kernel.layout import Layout

from .kernel import Runs

NAME = "netobserv"
PROGRAMS = {"TC ingress": "tc_ingress_flow_parse", "TC egress": "tc_egress_flow_parse"}
"""By hook; it has none for XDP."""
LEAVES = ("VLAN, IPv4 TCP",)
"""Frames that it passes without metering them: with a tag."""
_FLOWS = b"aggregated_flows"
_SCHED_CLS = 3  # BPF_PROG_TYPE_SCHED_CLS
_PAGE = 4096  # the least that a ring buffer may have


class Netobserv:
    """Its programs, loaded; `layout`: one that has struct __sk_buff."""

    def __init__(self, path: Path, *, max_flows: int, layout: Layout) -> None:
        self._layout = layout
        self._object = libbpf.library().bpf_object__open_file(str(path).encode(), None)
        if not self._object:
            raise FileNotFoundError(f"{path}: not a BPF object")
        try:
            self._size_maps(max_flows)
            programs = self._choose()
            libbpf.check(libbpf.library().bpf_object__load(self._object))
            self._fds = {name: libbpf.library().bpf_program__fd(program) for name, program in programs.items()}
        except BaseException:
            self.close()
            raise

    def runs(self, hook: str) -> Runs:
        return Runs(self._fds[PROGRAMS[hook]], self._layout, xdp=False)

    def close(self) -> None:
        libbpf.library().bpf_object__close(ctypes.c_void_p(self._object))

    def _size_maps(self, max_flows: int) -> None:
        """Unpinned: by itself libbpf would pin them in /sys/fs/bpf, and they would stay."""
        lib = libbpf.library()
        for each in self._all(lib.bpf_object__next_map):
            if not lib.bpf_map__name(each).startswith(b"."):
                libbpf.check(lib.bpf_map__set_pin_path(ctypes.c_void_p(each), None))
                if lib.bpf_map__max_entries(ctypes.c_void_p(each)) > _PAGE:
                    entries = max_flows if lib.bpf_map__name(each) == _FLOWS else _PAGE
                    libbpf.check(lib.bpf_map__set_max_entries(ctypes.c_void_p(each), ctypes.c_uint32(entries)))

    def _choose(self) -> dict[str, int]:
        lib = libbpf.library()
        programs = {lib.bpf_program__name(each).decode(): each for each in self._all(lib.bpf_object__next_program)}
        for name, program in programs.items():
            libbpf.check(lib.bpf_program__set_autoload(program, name in PROGRAMS.values()))
            lib.bpf_program__set_type(ctypes.c_void_p(program), _SCHED_CLS)  # by its section libbpf does not know it
        return {name: programs[name] for name in PROGRAMS.values()}

    def _all(self, following: ctypes._NamedFuncPointer) -> Iterator[int]:
        found = following(self._object, None)
        while found:
            yield found
            found = following(self._object, found)


@contextmanager
def netobserv(path: Path, *, max_flows: int, layout: Layout) -> Iterator[Netobserv]:
    """A Netobserv with empty maps; closed at the end."""
    made = Netobserv(path, max_flows=max_flows, layout=layout)
    try:
        yield made
    finally:
        made.close()
