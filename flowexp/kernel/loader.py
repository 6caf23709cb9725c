# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads the packet path. The prebuilt BPF object is done here, BCC on the target in bcc_loader.py.

The maps are made first (table.py), so that programs can come and go over a table that stays, and
so that it makes no difference to the table who compiled the programs.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Protocol

import numpy as np

from ..errors import FlowexpError
from . import features, libbpf
from .capabilities import missing_capabilities, not_permitted
from .layout import Array, Layout, read_layout
from .table import FlowTable, auxiliary_maps

_log = logging.getLogger(__name__)

_PROBE_FLOWS = 16
_PROBE_PROGRAM = "ingress_ethernet"


class Programs:
    """Programs' descriptors by name. Closing drops this process's hold; attached ones go on with their link.

    `names` are loaded at once, any other one when it is asked for: the verifier takes a while for each.
    """

    def __init__(self, loader: Loader, *, names: Iterable[str], maps: Mapping[str, int], settings: Array) -> None:
        self._loader, self._maps, self._settings = loader, maps, settings
        self._fds = loader.load(names=names, maps=maps, settings=settings)

    def __getitem__(self, name: str) -> int:
        """FlowexpError where it has to be loaded and cannot be."""
        if name not in self._fds:
            self._fds.update(self._loader.load(names=(name,), maps=self._maps, settings=self._settings))
        return self._fds[name]

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


class Loader(Protocol):
    """Who turns bpf/ into programs. What layout() says is true of the programs that load() makes."""

    def layout(self) -> Layout:
        """What the programs share with us; FlowexpError where it cannot be had."""

    def load(self, *, names: Iterable[str], maps: Mapping[str, int], settings: Array) -> Dict[str, int]:
        """Loads the programs `names`, whose descriptors are the caller's; FlowexpError where that fails.

        `maps`: a descriptor for each map's name. `settings`: struct settings, an array of one.
        """


@lru_cache(maxsize=None)
def loader_named(name: str) -> Loader:
    """The loader that the key `loader` of the configuration names; one for the whole process."""
    from .bcc_loader import Bcc  # here, because it imports this module

    loaders: Mapping[str, Callable[[], Loader]] = {"prebuilt": Prebuilt, "bcc": Bcc, "auto": Auto}
    return loaders[name]()


class Prebuilt:
    """The object that clang built, loaded by libbpf."""

    def __init__(self, path: Optional[Path] = None) -> None:
        """`path`: of another object than the one that came with the package."""
        self._path = path

    def layout(self) -> Layout:
        return load_layout(self._path or object_path())

    def load(self, *, names: Iterable[str], maps: Mapping[str, int], settings: Array) -> Dict[str, int]:
        path = self._path or object_path()
        lib = libbpf.library()
        libbpf.take_messages()
        opened = lib.bpf_object__open_file(str(path).encode(), None)
        if not opened:
            raise FlowexpError(f"{path}: {why(ctypes.get_errno())}")
        try:
            return _load(opened, set(names), maps, settings.tobytes())
        except OSError as error:
            raise FlowexpError(f"loading {path}: {why(error.errno)}") from error
        finally:
            lib.bpf_object__close(opened)


class Auto:
    """The prebuilt object; where there is none or the kernel does not take it, BCC."""

    def __init__(self) -> None:
        self._chosen: Optional[Loader] = None

    def layout(self) -> Layout:
        return self._choice().layout()

    def load(self, *, names: Iterable[str], maps: Mapping[str, int], settings: Array) -> Dict[str, int]:
        return self._choice().load(names=names, maps=maps, settings=settings)

    def _choice(self) -> Loader:
        if self._chosen is None:
            self._chosen = loader_named("prebuilt")
            try:
                _try_out(self._chosen)
            except FlowexpError as error:
                _log.warning("the prebuilt BPF object does not fit: %s; compiling with BCC instead", error)
                self._chosen = loader_named("bcc")
        return self._chosen


def _try_out(loader: Loader) -> None:
    """Loads one program over a small table."""
    layout = loader.layout()
    table = FlowTable.create(layout, _PROBE_FLOWS)
    auxiliary = auxiliary_maps(layout)
    settings = np.zeros(1, layout.structs["settings"])
    try:
        Programs(loader, names=(_PROBE_PROGRAM,), maps={**table.fds, **auxiliary}, settings=settings).close()
    finally:
        for fd in auxiliary.values():
            os.close(fd)
        table.close()


def data_path(name: str) -> Path:
    """Where a file of this package's data is, whether it is there or not."""
    return Path(str(resources.files("flowexp"))) / "data" / name


def object_path() -> Path:
    """Where the prebuilt object is; FlowexpError where the package came without it."""
    path = data_path("flowexp.bpf.o")
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


def _load(opened: int, names: set[str], maps: Mapping[str, int], settings: bytes) -> Dict[str, int]:
    """Descriptors of our own, so that the object's memory need not be kept."""
    lib = libbpf.library()
    for each in _each(opened, lib.bpf_object__next_map):
        name = lib.bpf_map__name(each).decode()
        if name in maps:
            libbpf.check(lib.bpf_map__reuse_fd(each, maps[name]))
        elif name.endswith(".rodata"):
            libbpf.check(lib.bpf_map__set_initial_value(each, settings, len(settings)))
    programs = {lib.bpf_program__name(p).decode(): p for p in _each(opened, lib.bpf_object__next_program)}
    for name, program in programs.items():
        libbpf.check(lib.bpf_program__set_autoload(program, name in names))
    libbpf.check(lib.bpf_object__load(opened))
    return {name: os.dup(libbpf.check(lib.bpf_program__fd(programs[name]))) for name in names}


def _each(opened: int, following: Any) -> Iterator[int]:
    found = following(opened, None)
    while found:
        yield found
        found = following(opened, found)


def why(code: Optional[int]) -> str:
    """What an errno of loading means, in the operator's words, with what libbpf said last."""
    if code == errno.EPERM or code == errno.EACCES and missing_capabilities():  # EACCES: the verifier's, too
        return not_permitted()
    lacking = [f"{feature.name} (Linux {feature.since})" for feature in features.missing() if not feature.instead]
    if lacking:
        return f"this kernel has no {' and no '.join(lacking)}"
    return f"{os.strerror(code or errno.EINVAL)}; libbpf: {_reason(libbpf.take_messages())}"


def _reason(said: List[str]) -> str:
    """The verifier's last word, or else libbpf's."""
    for message in said:
        if "BEGIN PROG LOAD LOG" in message:
            log = [line for line in message.splitlines()[1:] if line and not line.startswith(("processed ", "-- END"))]
            if log:
                return log[-1]
    return next((message for message in reversed(said) if message), "nothing")
