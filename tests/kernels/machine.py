# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels of Debian's suites, unpacked under build/kernels without being installed, and booted by virtme-ng.

The emulated machine reads the root file system over 9p, which is slow for many small files. So what Python has
loaded of flowexp and its libraries is carried along in one archive, and unpacked into the machine's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lab import needs
from lab.process import run

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "kernels"
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TOOLS = ("qemu-system-x86_64", "busybox", "depmod", "apt-get")
VNG = Path(sys.prefix) / "bin" / "vng"
CARRIED = "/run/carried"  # in the emulated machine
# Emulation is slow enough without: what protects against speculation, and what zeroes memory twice.
BOOT_OPTIONS = ("mitigations=off", "init_on_alloc=0", "nokaslr", "panic=-1")
BOOT_S = 600.0

# Prints every file that Python has loaded, byte code and libraries of extension modules included; numpy loads a part of
# itself as it is first needed.
LOADED = """
import os, sys
import kernels.guest, numpy.ma, pyroute2
files = {getattr(module, name, None) for module in list(sys.modules.values()) for name in ("__file__", "__cached__")}
maps = (line.split()[-1] for line in open("/proc/self/maps"))
files |= {path for path in maps if "-packages/" in path}
print("\\n".join(sorted(path for path in files if path and os.path.isfile(path))))
"""


@dataclass(frozen=True)
class Kernel:
    """The amd64 kernel of a Debian suite."""

    name: str
    suite: str

    @property
    def folder(self) -> Path:
        return BUILD / self.name

    @property
    def image(self) -> Path:
        return next((self.folder / "boot").glob("vmlinuz-*"))


KERNELS = (
    Kernel("6.1", "bookworm"),
    Kernel("6.12", "trixie"),
    Kernel("5.10", "bullseye"),
)


@cache
def support() -> str | None:
    """What booting another kernel needs; None when all is there."""
    if os.uname().machine != "x86_64":
        return f"no kernel to boot on {os.uname().machine}"
    return needs.tools(*TOOLS) or (None if VNG.exists() else "virtme-ng is not installed in .venv")


def fetch(kernel: Kernel) -> None:
    """Downloads and unpacks a kernel, unless it is there; apt's lists and state are of their own."""
    if (kernel.folder / "unpacked").exists():
        return
    run(["rm", "--recursive", "--force", kernel.folder])
    apt = kernel.folder / "apt"
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {kernel.suite} main\n")
    options = [f"Dir::State={apt}", "Dir::State::status=/dev/null", f"Dir::Cache={apt}",
               f"Dir::Etc::sourcelist={apt}/sources.list", "Dir::Etc::sourceparts=/dev/null",
               "APT::Sandbox::User=root"]  # fmt: skip
    words = [word for option in options for word in ("-o", option)]
    run(["apt-get", *words, "--quiet", "update"], timeout_s=300)
    depends = run(["apt-cache", *words, "depends", "linux-image-amd64"])
    (image,) = (line.split()[-1] for line in depends.splitlines() if line.strip().startswith("Depends: linux-image-"))
    run(["sh", "-c", 'cd "$0" && exec apt-get "$@"', apt, *words, "download", image], timeout_s=600)
    run(["dpkg-deb", "--extract", next(apt.glob("*.deb")), kernel.folder], timeout_s=300)
    if not (kernel.folder / "lib").exists():  # trixie has all in /usr
        (kernel.folder / "lib").symlink_to("usr/lib")
    run(["rm", "--recursive", apt])
    (kernel.folder / "unpacked").touch()


def _carry(shared: Path) -> list[str]:
    """Archives what guest.py loads; returns the command that unpacks it and runs guest.py from there."""
    search = f"{ROOT}:{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": search}
    for key in ("PYTHONDONTWRITEBYTECODE", "PYTHONHOME"):
        environment.pop(key, None)
    words = [sys.executable, "-c", LOADED]
    files = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    data = [str(path) for path in (ROOT / "flowexp/data").glob("*.o")]
    inputs = [*files, *data, str(ROOT / "flowexp/protocol/data")]
    run(["tar", "--create", "--absolute-names", "--file", shared / "carried.tar", *inputs])
    # What was not carried is still found in its place, slowly.
    path = [entry for entry in sys.path if entry and not entry.endswith(".zip")]
    places = [f"{ROOT}", f"{ROOT}/tests", *path]
    carried = ":".join([*(CARRIED + place for place in places), *places])
    script = shared / "guest.sh"  # a kernel's command line has no room for it
    script.write_text(
        f"""\
set -e
mkdir {CARRIED}
tar --extract --file {shared}/carried.tar --directory {CARRIED} --absolute-names --transform 's,^/,{CARRIED}/,'
cd /
export PYTHONHOME={CARRIED}{sys.base_prefix} PYTHONPATH={carried}
exec {sys.base_prefix}/bin/python3 -S -B -m kernels.guest {shared} >{shared}/log 2>&1
"""
    )
    return ["sh", str(script)]


def boot(kernel: Kernel) -> list[dict[str, Any]]:
    """Runs guest.py in a kernel; the results of its checks, in order."""
    fetch(kernel)
    shared = BUILD / f"run-{kernel.name}"
    run(["rm", "--recursive", "--force", shared])
    shared.mkdir(parents=True)
    from . import guest

    guest.prepare(shared)
    command = _carry(shared)
    options = [word for option in BOOT_OPTIONS for word in ("-a", option)]
    words = [VNG, "--run", kernel.image, "--disable-kvm", "--memory", "1G", "--cpus", "2", f"--rwdir={shared}",
             "--verbose", *options, "--", shlex.join(command)]  # fmt: skip
    path = f"{VNG.parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    with (shared / "console").open("wb") as console:  # its exit status is that of the emulator, and tells nothing
        started = subprocess.Popen(
            [str(word) for word in words], env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
            stdout=console, stderr=console, start_new_session=True,
        )  # fmt: skip
        try:
            started.wait(BOOT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)  # vng alone would leave its emulator
            started.wait()
    if not (shared / "done").exists():
        raise RuntimeError(f"{kernel.name}: did not come to its end; see {shared}/log and {shared}/console")
    return [json.loads(line) for line in (shared / "results").read_text().splitlines()]
