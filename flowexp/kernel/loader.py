# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads the packet path: the prebuilt BPF object, with maps made here put in place of its own.

The maps are made first (table.py), so that programs can come and go over a table that stays.
"""

from __future__ import annotations

import ctypes
import errno
import os
from importlib import resources
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional

from ..errors import FlowexpError
from . import libbpf
from .layout import Layout, read_layout


def object_path() -> Path:
    """Where the prebuilt object is; FlowexpError where the package came without it."""
    path = Path(str(resources.files("flowexp"))) / "data" / "flowexp.bpf.o"
    if not path.is_file():
        raise FlowexpError(f"{path}: no BPF object here; build it with 'make build'")
    return path


def load_layout(path: Path) -> Layout:
    """The layout in the BTF of the object at `path`."""
    lib = libbpf.library()
    btf = lib.btf__parse(str(path).encode(), None)
    if not btf:
        raise FlowexpError(f"{path}: not a BPF object with BTF; build it again with 'make build'")
    try:
        octets = ctypes.c_uint32()
        data = lib.btf__raw_data(btf, ctypes.byref(octets))
        return read_layout(ctypes.string_at(data, octets.value))
    finally:
        lib.btf__free(btf)


class Programs:
    """Loaded programs by name. Closing it drops this process's hold; attached ones go on while their link does."""

    def __init__(self, path: Path, *, names: Iterable[str], maps: Mapping[str, int], settings: bytes) -> None:
        """Loads the programs `names`. `maps`: a descriptor for each map's name. `settings`: struct settings."""
        lib = libbpf.library()
        libbpf.take_messages()
        self._object = lib.bpf_object__open_file(str(path).encode(), None)
        if not self._object:
            raise FlowexpError(f"{path}: {_why(ctypes.get_errno())}")
        try:
            self._fds = self._load(set(names), maps, settings)
        except OSError as error:
            self.close()
            raise FlowexpError(f"loading {path}: {_why(error.errno)}") from error

    def _load(self, names: set[str], maps: Mapping[str, int], settings: bytes) -> Dict[str, int]:
        lib = libbpf.library()
        for each in self._each(lib.bpf_object__next_map):
            name = lib.bpf_map__name(each).decode()
            if name in maps:
                libbpf.check(lib.bpf_map__reuse_fd(each, maps[name]))
            elif name.endswith(".rodata"):
                libbpf.check(lib.bpf_map__set_initial_value(each, settings, len(settings)))
        programs = {lib.bpf_program__name(p).decode(): p for p in self._each(lib.bpf_object__next_program)}
        for name, program in programs.items():
            libbpf.check(lib.bpf_program__set_autoload(program, name in names))
        libbpf.check(lib.bpf_object__load(self._object))
        return {name: libbpf.check(lib.bpf_program__fd(programs[name])) for name in names}

    def _each(self, following: Any) -> Iterator[int]:
        found = following(self._object, None)
        while found:
            yield found
            found = following(self._object, found)

    def __getitem__(self, name: str) -> int:
        return self._fds[name]

    def close(self) -> None:
        if self._object:
            libbpf.library().bpf_object__close(self._object)
            self._object = None


def _why(code: Optional[int]) -> str:
    """What an errno of loading means, in the operator's words, with what libbpf said last."""
    if code == errno.EPERM:
        return "not permitted; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    said: List[str] = [line for line in libbpf.take_messages() if line]
    return f"{os.strerror(code or errno.EINVAL)}; libbpf: {said[-1] if said else 'nothing'}"
