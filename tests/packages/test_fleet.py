# SPDX-License-Identifier: GPL-2.0-or-later
"""What is offered for containers and routers: it can be read, and says what the program understands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from lab import needs
from lab.pip import pip_tool, support
from lab.process import CommandFailed

from flowexp.config import keys
from flowexp.config_load import load

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
CAPABILITIES = ["BPF", "PERFMON", "NET_ADMIN"]


def manifests() -> list[str]:
    return (PACKAGING / "container/daemonset.yaml").read_text().split("\n---\n")


def test_the_configmaps_configuration_is_one(tmp_path: Path) -> None:
    text = manifests()[0].partition("flowexp.toml: |\n")[2]
    file = tmp_path / "flowexp.toml"
    file.write_text("".join(f"{line.strip()}\n" for line in text.splitlines()))
    assert load(file).table.persist


def test_the_daemonset_asks_for_the_services_capabilities_and_no_more() -> None:
    _, daemon_set = map(yaml.safe_load, manifests())
    pod = daemon_set["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["hostNetwork"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": CAPABILITIES}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    unit = (PACKAGING / "flowexp.service").read_text()
    granted = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert granted is not None
    assert granted[1].split() == [f"CAP_{name}" for name in CAPABILITIES]


def test_the_manifests_are_valid_to_the_letter_of_kubernetes_schemas(tmp_path: Path) -> None:
    needs.need(support())
    validate = pip_tool(tmp_path, "kubernetes-validate")
    validate("--strict", "--quiet", PACKAGING / "container/daemonset.yaml")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((PACKAGING / "container/daemonset.yaml").read_text().replace("hostNetwork:", "hostNetwok:"))
    with pytest.raises(CommandFailed, match="hostNetwok"):
        validate("--strict", "--quiet", wrong)


def test_the_container_has_what_make_deb_makes_and_asks_for_the_services_capabilities() -> None:
    text = (PACKAGING / "container/Containerfile").read_text()
    assert f"--cap-drop all --cap-add {','.join(CAPABILITIES)} " in text
    assert "COPY build/flowexp_*.deb /tmp/\n" in text
    assert 'ENTRYPOINT ["/usr/bin/flowexp"]\nCMD ["run"]\n' in text
    command, *checks = re.findall(r"(?m)^RUN ((?:.*\\\n)*.*)$", text)
    assert not checks
    assert subprocess.run(["sh", "-n", "-c", command]).returncode == 0


def test_each_capability_of_the_service_has_its_reason() -> None:
    unit = (PACKAGING / "flowexp.service").read_text()
    assert re.findall(r"(?m)^# CAP_(\w+) +\w", unit) == CAPABILITIES


def test_the_procd_script_is_a_shells() -> None:
    assert subprocess.run(["sh", "-n", PACKAGING / "openwrt/flowexp.init"]).returncode == 0


def test_the_page_for_routers_names_only_keys_that_there_are() -> None:
    named = set(re.findall(r"`\[(?:\w+)\] (\w+)`", (PACKAGING / "routers.md").read_text()))
    assert named
    assert named <= {key.name for key in keys()}
