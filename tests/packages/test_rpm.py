# SPDX-License-Identifier: GPL-2.0-or-later
"""The .rpm, looked at with rpm's own tools, and installed into a root folder that has numpy and libbpf only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from debian import BUILD, ROOT, build, in_root, root_folder, shared_files, support
from lab import needs
from lab.process import run

pytestmark = pytest.mark.kernel

FILTERS = ROOT / "packaging/rpm/flowexp.rpmlintrc"
HOME = "usr/lib/flowexp"


class Installed(NamedTuple):
    package: Path
    root: Path

    def rpm(self, *words: str | Path) -> str:
        """rpm on this root folder: scriptlets run in it."""
        return run(["rpm", "--root", self.root, *words])

    def query(self, what: str) -> list[str]:
        return run(["rpm", "--query", "--package", f"--{what}", self.package]).splitlines()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    needs.need(support(), needs.tools("rpm", "rpmbuild"))
    package = build("rpm")
    root = tmp_path_factory.mktemp("rpm") / "root"
    # What the distribution has to bring: all else is in the package.
    with root_folder(root, "python3", "python3-numpy", "libbpf1", "systemd-standalone-sysusers"):
        found = Installed(package, root)
        found.rpm("--install", "--nodeps", package)
        yield found


def test_it_needs_numpy_and_libbpf_and_no_certain_python(installed: Installed) -> None:
    needed = {line.split()[0] for line in installed.query("requires")}
    assert {"libbpf", "python3", "python3-numpy", "/usr/bin/python3"} <= needed
    assert not [name for name in needed if name.startswith("python(abi)")]
    files = installed.query("list")
    assert not [path for path in files if "__pycache__" in path or re.search(r"/python3\.", path)]


def test_it_has_man_pages_completions_unit_and_user_and_its_configuration_is_kept(installed: Installed) -> None:
    unit = "/usr/lib/systemd/system/flowexp.service"
    assert shared_files("site-functions") | {unit} <= set(installed.query("list"))
    kept = run(["rpm", "--query", "--package", "--configfiles", installed.package]).split()
    assert kept == ["/etc/flowexp/flowexp.toml"]


def test_its_python_is_that_of_3_9(installed: Installed) -> None:
    modules = sorted((installed.root / HOME).rglob("*.py"))
    assert len(modules) > 300
    for module in modules:
        ast.parse(module.read_bytes(), module.name, feature_version=(3, 9))


def test_it_runs_with_what_it_brings_along(installed: Installed) -> None:
    assert "Commands:" in in_root(installed.root, "flowexp", "--help")
    checked = in_root(installed.root, "flowexp", "check", "--collector", "file:///tmp/flows.ipfix", "-i", "lo")
    assert "takes the BPF programs" in checked


def test_it_brings_the_libraries_that_it_pins_with_their_licences(installed: Installed) -> None:
    pinned = dict(re.findall(r"^(\w+)==(\S+) --hash", (ROOT / "packaging/rpm/vendored.txt").read_text(), re.MULTILINE))
    provided = re.findall(r"^bundled\(python3-(\w+)\) = (\S+)$", "\n".join(installed.query("provides")), re.MULTILINE)
    assert dict(provided) == pinned
    for name in pinned:
        assert (installed.root / HOME / name / "__init__.py").is_file()
        assert list((installed.root / "usr/share/licenses").glob(f"flowexp*/{name}/LICENSE*"))


def test_erased_it_leaves_nothing(installed: Installed) -> None:
    assert "flowexp:" in (installed.root / "etc/passwd").read_text()
    assert (installed.root / HOME / "flowexp/__pycache__").is_dir()
    installed.rpm("--erase", "flowexp")
    try:
        assert not (installed.root / HOME).exists()
        assert not (installed.root / "etc/flowexp").exists()
    finally:
        installed.rpm("--install", "--nodeps", installed.package)


def test_rpmlint_finds_nothing_that_is_not_explained(installed: Installed) -> None:
    needs.need(needs.tools("rpmlint"))
    said = run(["rpmlint", "--rpmlintrc", FILTERS, BUILD / "rpm/flowexp.spec", installed.package])
    assert "0 errors, 0 warnings" in said, said
