# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may import what: each outside library has one importer, and flowexp's parts import downwards only."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, Set, Tuple

import pytest
import toml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flowexp"

EVERYWHERE = {"numpy"}
ONE_IMPORTER = {
    "bcc": "flowexp.kernel.bcc_loader",
    "click": "flowexp.cli",
    "lark": "flowexp.filters",
    "prometheus_client": "flowexp.metrics",
    "pyroute2": "flowexp.kernel.netlink",
    "rich": "flowexp.view",
    "scapy": "flowexp.capture",
    "toml": "flowexp.toml_file",
}

# From the top down: a part imports only from below its own line. A new module needs a place here.
LAYERS: Tuple[Set[str], ...] = (
    {"cli"},
    {"check", "collect", "dump", "top"},
    {"detach", "exporter"},
    {"accounts", "facts", "publishing", "reload", "tables"},
    {"metrics"},
    {"collectors", "listing"},
    {"member"},
    {"courier", "meter", "session", "terms", "transports"},
    {"forms", "prompt"},
    {"arrange", "as_table", "capture", "filters", "service", "transport", "until_told", "view"},
    {"kernel"},
    {"config_load"},
    {"config_check"},
    {"config"},
    {"config_values", "toml_file"},
    {"collector_url", "identity", "keys", "rates", "status"},
    {"metering", "names", "output", "protocol"},
    {"errors"},
)
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every module that the file imports, by its whole name, those inside functions included."""
    package = name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


IMPORTS: Dict[str, Set[str]] = {
    name_of(path): set(imports_of(path)) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"
}


def part_of(module: str) -> str:
    """kernel of flowexp.kernel.table; "" of what the package itself holds, as flowexp.__version__."""
    part = module.split(".")[1]
    return part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file() else ""


def outside(module: str) -> Set[str]:
    return {name.split(".")[0] for name in IMPORTS[module]} - {"flowexp", "__future__"} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", IMPORTS)
def test_a_module_imports_only_the_outside_libraries_that_are_its_own(module: str) -> None:
    own = {library for library, importer in ONE_IMPORTER.items() if importer == module}
    assert outside(module) <= EVERYWHERE | own


@pytest.mark.parametrize("module", IMPORTS)
def test_a_module_imports_only_from_layers_below_its_own(module: str) -> None:
    own = part_of(module)
    assert own in LAYER_OF, f"{module} has no place in LAYERS"
    used = {part_of(name) for name in IMPORTS[module] if name.split(".")[0] == "flowexp"} - {own, ""}
    not_below = {part for part in used if LAYER_OF[part] <= LAYER_OF[own]}
    assert not not_below


@pytest.mark.parametrize("part", ["protocol", "metering"])
def test_protocol_and_metering_read_no_clock_and_draw_no_random_number(part: str) -> None:
    modules = [module for module in IMPORTS if part_of(module) == part]
    assert modules
    for module in modules:
        assert not {name.split(".")[0] for name in IMPORTS[module]} & {"time", "datetime", "random", "secrets"}, module


def test_only_one_module_names_the_libbpf_library() -> None:
    assert [name_of(p) for p in PACKAGE.rglob("*.py") if "libbpf.so" in p.read_text()] == ["flowexp.kernel.libbpf"]


def test_pip_installs_what_is_imported_and_never_the_bcc_of_pypi() -> None:
    project = toml.load(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["capture"] + extras["metrics"]
    names = {re.split(r"[^\w-]", each)[0].replace("-", "_") for each in wanted}
    assert names == EVERYWHERE | set(ONE_IMPORTER) - {"bcc"}
    assert "bcc" not in {re.split(r"[^\w-]", each)[0] for each in project["optional-dependencies"]["test"]}
