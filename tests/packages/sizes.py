# SPDX-License-Identifier: GPL-2.0-or-later
"""`python sizes.py`: what the packages bring along on a minimal Debian 12, into packaging/README.md.

The .deb is installed by apt without what is recommended, with systemd and without; the .rpm is only looked at.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from debian import ROOT, apt_install, build, in_root, root_folder, support
from lab.markdown import put_into, table
from lab.process import run

PAGE = ROOT / "packaging" / "README.md"
HEAD = ("", "To download, MB", "Installed, MB", "Packages")
SYSUSERS = "systemd-standalone-sysusers"
APT_PRINT = ("apt-get", "--quiet", "--yes", "--no-install-recommends", "--print-uris", "install")
LARGEST = 6


def megabytes(octets: float) -> str:
    return f"{octets / 1e6:.1f}" if octets < 1e7 else f"{octets / 1e6:.0f}"


def installed(root: Path) -> dict[str, int]:
    """Octets of each package, as dpkg counts them."""
    shown = in_root(root, "dpkg-query", "--show", "--showformat", "${Package} ${Installed-Size}\n")
    return {name: int(kib) * 1024 for name, kib in (line.split() for line in shown.splitlines())}


def closure(folder: Path, package: Path, *others: str) -> tuple[dict[str, int], int]:
    """What comes with the package: octets of each; and those to download."""
    with root_folder(folder) as root:
        name = f"/root/{package.name}"
        (root / name[1:]).write_bytes(package.read_bytes())
        in_root(root, "apt-get", "--quiet", "update")
        uris = in_root(root, *APT_PRINT, name, *others)
        before = installed(root)
        apt_install(root, name, *others)
        after = installed(root)
    fetched = sum(int(size) for size in re.findall(r"^'http\S+' \S+ (\d+) ", uris, re.MULTILINE))
    return {each: octets for each, octets in after.items() if each not in before}, fetched


def row(what: str, packages: dict[str, int], fetched: int) -> tuple[str, ...]:
    return what, megabytes(fetched), megabytes(sum(packages.values())), str(len(packages))


def main() -> None:
    reason = support()
    if reason is not None:
        sys.exit(reason)
    deb, rpm = build("deb"), build("rpm")
    rpm_octets, vendored = of_rpm(rpm)
    with tempfile.TemporaryDirectory(prefix="flowexp-sizes-") as folder:
        whole, whole_fetched = closure(Path(folder) / "systemd", deb, "systemd")
        least, least_fetched = closure(Path(folder) / "standalone", deb, SYSUSERS)
    own = deb.stat().st_size
    rows = [
        ("the .deb", megabytes(own), megabytes(whole["flowexp"]), "1"),
        row("with all that it needs, and systemd", whole, own + whole_fetched),
        row(f"without systemd ({SYSUSERS})", least, own + least_fetched),
        ("the .rpm", megabytes(rpm.stat().st_size), f"{megabytes(rpm_octets)}, libraries {megabytes(vendored)}", "1"),
    ]
    largest = sorted(least, key=lambda name: -least[name])[:LARGEST]
    said = ", ".join(f"{name} {megabytes(least[name])}" for name in largest)
    text = f"{table(HEAD, rows)}\nThe largest: {said}.\n"
    print(text, end="")
    put_into(PAGE, "sizes", text)


def of_rpm(package: Path) -> tuple[int, int]:
    """Octets of all files, and of the libraries that it brings along."""
    shown = run(["rpm", "--query", "--package", "--queryformat", "[%{FILENAMES} %{FILESIZES}\n]", package])
    sizes = {path: int(octets) for path, octets in (line.split() for line in shown.splitlines())}
    home = "/usr/lib/flowexp/"
    ours = (f"{home}flowexp/",)
    libraries = sum(n for path, n in sizes.items() if path.startswith(home) and not path.startswith(ours))
    return sum(sizes.values()), libraries


if __name__ == "__main__":
    main()
