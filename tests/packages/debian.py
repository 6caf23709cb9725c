# SPDX-License-Identifier: GPL-2.0-or-later
"""A fresh Debian to install packages in: a root folder, and a machine that boots from it.

The machine is systemd in namespaces of its own, and in a network namespace of the laboratory. It has a bpffs of its
own, so that what it pins is gone when it is. The root folder is unpacked from build/debian-12.tar, which debootstrap
makes where it is not there yet.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lab import needs
from lab.netns import Namespace
from lab.process import SESSION, Process, run
from lab.wait import wait_for

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
BASE = BUILD / "debian-12.tar"
TOOLS = ("dpkg-buildpackage", "dh_python3", "debootstrap", "unshare", "nsenter")
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEBOOTSTRAP_S, APT_S, BUILD_S, BOOT_S = 600.0, 300.0, 300.0, 60.0

# Mounts are private to each command: nothing is left mounted, however it ends.
IN_ROOT = """
set -e
cd "$1"; shift
mount --bind . .
cd "$PWD"
mount -t proc proc proc
mount -t sysfs sysfs sys
exec chroot . "$@"
"""
BOOT = """
set -e
root=$1 group=$2
mount --make-rprivate /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$group"
echo $$ >"/sys/fs/cgroup/$group/cgroup.procs"
mount --bind "$root" "$root"
cd "$root"
exec unshare --cgroup --pid --ipc --uts --fork --kill-child sh -ec '
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t bpf -o mode=0700 bpf sys/fs/bpf
    mount -t tmpfs -o mode=0755 tmpfs run
    mkdir -p old
    pivot_root . old
    umount --lazy old
    exec env -i container=other /lib/systemd/systemd --show-status=no systemd.unit=multi-user.target
'
"""
FORGET_GROUP = """
mount -t cgroup2 cgroup2 /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} \\;
"""

_numbers = itertools.count()


@cache
def support() -> str | None:
    """What building a package and booting a Debian needs; None when all is there."""
    return needs.namespace_support() or needs.bpf() or needs.tools(*TOOLS) or _mirror()


def _mirror() -> str | None:
    try:
        urllib.request.urlopen(f"{MIRROR}/dists/{SUITE}/InRelease", timeout=20).close()
    except OSError as error:
        return f"{MIRROR}: {error}"
    return None


def build(kind: str) -> Path:
    """The package that `packaging/build.sh deb`, `rpm` or `wheel` makes of this tree."""
    run([ROOT / "packaging/build.sh", kind], timeout_s=BUILD_S)
    suffix = {"wheel": "whl"}.get(kind, kind)
    return max(BUILD.glob(f"flowexp*.{suffix}"), key=lambda path: path.stat().st_mtime)


def shared_files(zsh: str) -> set[str]:
    """What both packages have beside the code; `zsh`: the distribution's folder for completions."""
    return {
        "/etc/flowexp/flowexp.toml",
        "/usr/bin/flowexp",
        "/usr/lib/sysusers.d/flowexp.conf",
        "/usr/share/bash-completion/completions/flowexp",
        "/usr/share/fish/vendor_completions.d/flowexp.fish",
        "/usr/share/man/man1/flowexp.1.gz",
        "/usr/share/man/man5/flowexp.toml.5.gz",
        f"/usr/share/zsh/{zsh}/_flowexp",
    }


def unpack(root: Path) -> None:
    """Fills a folder with a minimal Debian."""
    if not BASE.exists():
        fresh = root / "fresh"
        run(["debootstrap", "--variant=minbase", SUITE, fresh, MIRROR], timeout_s=DEBOOTSTRAP_S)
        BUILD.mkdir(exist_ok=True)
        run(["tar", "--create", "--numeric-owner", "--file", f"{BASE}.new", "--directory", fresh, "."])
        Path(f"{BASE}.new").rename(BASE)
        run(["rm", "--recursive", fresh])
    run(["tar", "--extract", "--numeric-owner", "--file", BASE, "--directory", root])


def in_root(root: Path, *command: str | Path, timeout_s: float = 60.0) -> str:
    """Standard output of a command in the root folder, where no machine runs, with the host's network."""
    words = ["unshare", "--mount", "sh", "-c", IN_ROOT, "in_root", root, "env", "-i", PATH, *command]
    return run(words, timeout_s=timeout_s)


def apt_install(root: Path, *packages: str) -> None:
    """Installs packages by name or by path in the root folder, without what they recommend."""
    apt = ("DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes")
    in_root(root, *apt, "update", timeout_s=APT_S)
    in_root(root, *apt, "install", "--no-install-recommends", *packages, timeout_s=APT_S)


def next_version(package: Path, folder: Path) -> Path:
    """The same .deb as its own successor."""
    tree = folder / "next"
    run(["dpkg-deb", "--raw-extract", package, tree])
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: .*$", "Version: 99.0-1", control.read_text(), flags=re.MULTILINE))
    init = tree / "usr/lib/python3/dist-packages/flowexp/__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "99.0"', init.read_text()))
    made = folder / "flowexp_99.0-1.deb"
    run(["dpkg-deb", "--build", "--root-owner-group", tree, made])
    return made


class Machine:
    """A Debian that runs from a root folder, in a network namespace; gone when the context is left."""

    def __init__(self, root: Path, network: Namespace, directory: Path) -> None:
        self.root = root
        self.network = network
        self._group = f"fxt-{SESSION}-{next(_numbers)}"
        boot = ["unshare", "--mount", "sh", "-c", BOOT, "boot", root, self._group]
        self._process = network.start(*boot, directory=directory, name=self._group)
        try:
            wait_for("systemd to be up", self._is_up, timeout_s=BOOT_S)
        except BaseException:
            self._power_off()
            raise

    def _is_up(self) -> bool:
        self._process.is_alive()
        asked = self._ask("systemctl", "is-system-running")
        return asked.stdout.strip() in ("running", "degraded")

    @property
    def _init(self) -> int:
        """The process id of its systemd; 0 while there is none."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _inside(self, command: Sequence[str | Path]) -> list[str]:
        words = ["nsenter", f"--target={self._init}", "--all", "env", "-i", PATH, *command]
        return [str(word) for word in words]

    def _ask(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        if not self._init:
            return subprocess.CompletedProcess(command, 1, "", "")
        return subprocess.run(self._inside(command), capture_output=True, check=False, text=True, timeout=60)

    def run(self, *command: str | Path, timeout_s: float = 60.0) -> str:
        """Standard output of a command in the machine, which must succeed."""
        return run(self._inside(command), timeout_s=timeout_s)

    def start(self, *command: str | Path, directory: Path, name: str) -> Process:
        return Process(self._inside(command), directory=directory, name=name)

    def systemctl(self, *words: str) -> str:
        return self.run("systemctl", *words).strip()

    def journal(self) -> list[str]:
        """The lines that the service has logged."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--quiet", "--output=cat", "--identifier=flowexp").splitlines()

    def named(self, name: str) -> list[str]:
        """Files and folders with `name` in their name, the kernel's and the journal's left out."""
        found = self.run("find", "/", "-xdev", "-name", f"*{name}*", "-not", "-path", "/var/log/*").split()
        return sorted(found + self.run("find", "/run", "/sys/fs/bpf", "-name", f"*{name}*").split())

    def _power_off(self) -> None:
        init = self._init
        self._process.kill()
        wait_for("the machine to be gone", lambda: not (init and os.path.exists(f"/proc/{init}")))
        run(["unshare", "--mount", "sh", "-c", FORGET_GROUP, "forget", self._group])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._power_off()


@contextmanager
def root_folder(path: Path, *packages: Path | str) -> Iterator[Path]:
    """A fresh Debian with some packages installed by apt; removed at the end."""
    path.mkdir()
    try:
        unpack(path)
        names = []
        for package in packages:
            if isinstance(package, Path):
                (path / "root" / package.name).write_bytes(package.read_bytes())
                package = f"/root/{package.name}"
            names.append(package)
        apt_install(path, *names)
        yield path
    finally:
        run(["rm", "--recursive", "--force", path])
