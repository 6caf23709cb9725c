# SPDX-License-Identifier: GPL-2.0-or-later
"""BCC compiles the packet path on the target, from the source that the prebuilt object is made of.

For other architectures, site-specific builds and development. The maps are those of table.py: the
source is given their descriptors, and its settings, as macros (bpf/dialect.h).

The layout comes from BTF here, too, and bpf/flow.h stays its only source: BCC compiles that header by
itself first and hands its BTF to the kernel, where we read it. It takes a quarter of a second, asks for
no other compiler and no prebuilt object, and cannot differ from the programs, which have the same header
and the same compiler. Unchanged, it equals the prebuilt object's: each loader takes over the other's table.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from ..errors import FlowexpError
from . import libbpf
from .groups import groups_mask
from .layout import SHARED, Array, Layout, read_layout
from .loader import data_path, why

_log = logging.getLogger(__name__)

_SOURCE = "bpf/flowexp.bpf.c"
_PACKAGES = "python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora, RHEL)"
_HEADER_PACKAGES = "linux-headers-{release} (Debian, Ubuntu) or kernel-devel-{release} (Fedora, RHEL)"
_LAYOUT_SOURCE = '#include "flow.h"\nstruct layout {{ {members} }};\nint layout(struct layout *all) {{ return 0; }}\n'
_BTF_LINK = "anon_inode:btf"
# Groups for which 512 octets of stack are not enough, alone or with others: its compiler would end this process
# without a word.
_TOO_LARGE = ("tcp", "tunnels")


class Bcc:
    """As loader.Loader has it."""

    def __init__(self) -> None:
        self._layout: Optional[Layout] = None

    def layout(self) -> Layout:
        if self._layout is None:
            self._layout = _compile_layout(source_path())
        return self._layout

    def load(self, *, names: Iterable[str], maps: Mapping[str, int], settings: Array) -> Dict[str, int]:
        path = source_path()
        for group in _TOO_LARGE:
            if int(settings["groups"][0]) & groups_mask(self.layout(), [group]):
                raise FlowexpError(
                    f'[fields] groups: BCC cannot compile "{group}"; leave it out, or set loader = "prebuilt"'
                )
        macros = [f"FD_{name}={fd}" for name, fd in maps.items()] + list(_settings_macros(settings))
        with _compiled(path.read_text(), path, macros) as module:
            fds: Dict[str, int] = {}
            try:
                for name in names:
                    fds[name] = os.dup(_load_function(module, name, path))
            except FlowexpError:
                for fd in fds.values():
                    os.close(fd)
                raise
            return fds


def source_path() -> Path:
    """Where the source of the packet path is; FlowexpError where the package came without it."""
    path = data_path(_SOURCE)
    if not path.is_file():
        raise FlowexpError(f"{path}: no source for BCC here; 'make build' puts it there")
    return path


def _compile_layout(path: Path) -> Layout:
    """From the BTF that BCC makes of the header beside the source at `path`."""
    text = _LAYOUT_SOURCE.format(members=" ".join(f"struct {name} {name}_;" for name in SHARED))
    before = _btf_descriptors()
    with _compiled(text, path, []):
        made = _btf_descriptors() - before
        if len(made) != 1:
            raise FlowexpError(
                f"{path}: compiled by BCC, but its BTF did not reach the kernel; run as root, or with CAP_BPF, "
                "CAP_NET_ADMIN and CAP_PERFMON (else this BCC is too old to make any)"
            )
        return read_layout(libbpf.btf_octets(made.pop()))


def _settings_macros(settings: Array) -> Iterator[str]:
    """SETTING_name=value for each member of struct settings; what has elements becomes an array of constants."""
    for name in settings.dtype.names or ():
        value = settings[name][0]
        if value.ndim:
            elements = ", ".join(f"{element}ull" for element in value.tolist())
            yield f"SETTING_{name}=((const __u64[]) {{ {elements} }})"
        else:
            yield f"SETTING_{name}={int(value)}"


def _bcc() -> Any:
    """The module `bcc`; FlowexpError says what to install where it is missing, or is another one."""
    try:
        import bcc
    except ModuleNotFoundError as error:
        raise FlowexpError(
            f"BCC is not installed for {sys.executable}: install {_PACKAGES}; "
            "a virtual environment sees it only with --system-site-packages"
        ) from error
    except Exception as error:  # libbcc.so does not fit: OSError, AttributeError
        raise FlowexpError(f"BCC cannot be loaded: {error}; install {_PACKAGES} again") from error
    if not hasattr(bcc, "BPF"):
        where = getattr(bcc, "__file__", None) or "bcc"
        raise FlowexpError(
            f"{where}: this `bcc` is PyPI's, which has nothing to do with BPF; "
            f"remove it with '{sys.executable} -m pip uninstall bcc' and install {_PACKAGES}"
        )
    return bcc


@contextlib.contextmanager
def _compiled(text: str, path: Path, macros: Iterable[str]) -> Iterator[Any]:
    """BCC's module of the source `text`, which lies at `path`; its memory and descriptors go at the end."""
    bpf = _bcc().BPF
    flags = [f"-I{path.parent}", "-DFLOWEXP_BCC", *(f"-D{macro}" for macro in macros)]
    module, said = _listen(lambda: bpf(text=text.encode(), cflags=flags))
    if isinstance(module, Exception):
        raise FlowexpError(_why_not_compiled(path, said)) from module
    try:
        yield module
    finally:
        module.cleanup()


def _load_function(module: Any, name: str, path: Path) -> int:
    kind = _bcc().BPF.XDP if name.startswith("xdp") else _bcc().BPF.SCHED_CLS
    ctypes.set_errno(0)
    function, said = _listen(lambda: module.load_func(name.encode(), kind))
    if not isinstance(function, Exception):
        return int(function.fd)
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise FlowexpError(f"loading {name} of {path}: {why(code)}") from function
    log = [line for line in said if line and not line.startswith("processed ")]
    last = log[-1] if log else "nothing"
    raise FlowexpError(f"loading {name} of {path}: {os.strerror(code)}; BCC: {last}") from function


def _why_not_compiled(path: Path, said: List[str]) -> str:
    """One line out of what BCC and its compiler have said."""
    if any("Unable to find kernel headers" in line for line in said):
        release = platform.release()
        packages = _HEADER_PACKAGES.format(release=release)
        return f"/lib/modules/{release}/build: BCC finds no kernel headers there; install {packages}"
    for line in said:
        found = re.match(r"(.+:\d+:\d+): (?:fatal )?error: (.+)", line)
        if found:
            return f"{found[1].replace('/virtual/main.c', str(path))}: {found[2]} (compiling with BCC)"
    return f"{path}: BCC does not compile it: {said[-1] if said else 'and does not say why'}"


def _listen(call: Callable[[], Any]) -> Tuple[Any, List[str]]:
    """What `call` returns, or the Exception that it raises, and the lines that BCC has written meanwhile.

    It writes its reasons to descriptors 1 and 2, past sys.stdout (where data may go) and sys.stderr, and raises
    an Exception that does not have them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {fd: os.dup(fd) for fd in (1, 2)}
    with os.fdopen(os.memfd_create("bcc"), "rb") as heard:
        try:
            for fd in kept:
                os.dup2(heard.fileno(), fd)
            result = call()
        except Exception as error:
            result = error
        finally:
            ctypes.CDLL(None).fflush(None)  # of the C library, whose buffers BCC writes to
            for fd, copy in kept.items():
                os.dup2(copy, fd)
                os.close(copy)
        heard.seek(0)
        lines = heard.read().decode(errors="replace").splitlines()
    for line in lines:
        _log.debug("BCC: %s", line)
    return result, lines


def _btf_descriptors() -> set[int]:
    """This process's descriptors of BTF; BCC does not tell its own."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == _BTF_LINK:
                found.add(int(name))
    return found
