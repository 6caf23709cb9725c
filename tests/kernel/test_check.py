# SPDX-License-Identifier: GPL-2.0-or-later
"""What `flowexp check` says of a machine: who is at the hooks, what the hooks cannot see, and the same as JSON."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Dict, List

import pytest
from lab import needs
from lab.flowexp import COMMAND, Exporter
from lab.netns import Link, Namespace, namespaces, veth

from flowexp.check.finding import WARNING
from flowexp.check.interfaces import of_interfaces
from flowexp.config import Config
from flowexp.kernel import features, hooks, inquiry, libbpf, netlink, offloads

pytestmark = pytest.mark.kernel

KEPT = "what they drop, redirect or end with TC_ACT_OK is not metered"
FILTER = "filter bpf (pref 10)"


def lines(host: Namespace, what: str, *words: str) -> List[str]:
    """What `flowexp check` says of one thing."""
    command = (COMMAND, "check", "-i", "eth0", "--collector", "udp://127.0.0.1:9", *words, "--format", "json")
    found = [json.loads(line) for line in host.run(*command).splitlines()]
    return [f"{each['verdict']}: {each['detail']}" for each in found if each["what"] == what]


@pytest.fixture
def host() -> Iterator[Namespace]:
    """With an eth0."""
    needs.need(needs.kernel())
    with namespaces("a", "b") as (other, host):
        veth(other, host)
        host.ip("link", "set", "lo", "up")
        yield host


def test_a_filter_of_others_is_named_behind_us_with_tcx_and_before_us_without(
    host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    Link(host, "eth0").add_filter("egress", priority=10)
    Link(host, "eth0").add_filter("egress", priority=5000)
    try:
        assert lines(host, "eth0")[1:] == [f"ok: egress: {FILTER}, filter bpf (pref 5000) behind us"]
        monkeypatch.setattr(features, "has_tcx", lambda: False)  # as on 6.1, where `make test-kernels` asks, too
        with host.entered():
            order = hooks.order(netlink.resolve(["eth0"])[0], "egress")
        assert (order.before_us, order.behind_us) == ([FILTER], ["filter bpf (pref 5000)"])
        assert not order.is_attached
    finally:
        Link(host, "eth0").remove_filters()


def test_who_is_at_the_hooks_is_told_of_an_exporter_that_runs(host: Namespace, tmp_path: Path) -> None:
    Link(host, "eth0").add_filter("ingress", priority=10)
    try:
        with Exporter(host, tmp_path, interfaces=("eth0",), collectors=[f"file://{tmp_path}/flows.ipfix"]) as exporter:
            status = (COMMAND, "status", "-c", exporter.configuration)
            attached = json.loads(host.run(*status, "--format", "json"))["attached"]
            orders = {each["direction"]: each["order"] for each in attached}
            assert orders == {"ingress": ["flowexp", FILTER], "egress": ["flowexp"]}
            assert f"in this order: flowexp, {FILTER}\n" in host.run(*status)
            assert lines(host, "eth0")[1:] == [
                f"ok: ingress: an exporter is attached; {FILTER} behind us",
                "ok: egress: an exporter is attached, and nobody else",
            ]
    finally:
        Link(host, "eth0").remove_filters()


def test_offloads_that_xdp_sees_the_work_of_are_named_with_the_command_that_ends_it(
    host: Namespace, tmp_path: Path
) -> None:
    file = tmp_path / "xdp.toml"
    file.write_text('hook = "xdp"\n')
    link = Link(host, "eth0")
    link.set_offloads(rxvlan=True, gro=True)
    with host.entered():
        assert {"rx-vlan-hw-parse", "rx-gro"} <= offloads.features("eth0")
    assert [line for line in lines(host, "eth0", "-c", str(file)) if line.startswith("warning")] == [
        "warning: XDP sees no VLAN tag that the device takes away: ethtool -K eth0 rxvlan off",
        "warning: GRO is on: generic XDP would refuse (ethtool -K eth0 gro off)",
    ]
    link.set_offloads(rxvlan=False, gro=False)
    with host.entered():
        assert not {"rx-vlan-hw-parse", "rx-gro"} & offloads.features("eth0")
    assert [line for line in lines(host, "eth0", "-c", str(file)) if line.startswith("warning")] == []


@pytest.mark.parametrize("feature", ["rx-lro", "hw-tc-offload", "rx-gro-hw"])
def test_what_only_hardware_does_is_named_too(host: Namespace, monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    """No device here has these."""
    monkeypatch.setattr(offloads, "features", lambda _: frozenset({feature}))
    with host.entered():
        config = Config(interfaces=("eth0",), hook="xdp")
        (finding,) = [each for each in of_interfaces(config) if each.verdict == WARNING and each.what == "eth0"]
    short = {"rx-lro": "lro"}.get(feature, feature)
    assert finding.detail.endswith(f"ethtool -K eth0 {short} off")


def test_programs_before_us_and_rules_with_marks_are_named_in_one_line_each() -> None:
    needs.need(needs.kernel())
    with namespaces("a", "b") as (other, host):
        _, right = veth(other, host)
        words = (COMMAND, "check", "-i", "eth0", "--collector", "udp://127.0.0.1:9", "--format", "json")
        host.ip("link", "set", "lo", "up")
        before = [json.loads(line) for line in host.run(*words).splitlines()]
        host.ip("rule", "add", "fwmark", "1", "lookup", "main", "pref", "77")
        program = features._load(())
        with host.entered():
            link = libbpf.create_link(program, right.ifindex, libbpf.TCX_INGRESS)
        try:
            after = [json.loads(line) for line in host.run(*words).splitlines()]
        finally:
            os.close(link)
            os.close(program)
    assert all(each.keys() == {"verdict", "what", "detail"} for each in before)
    assert {each["verdict"] for each in before} <= {"ok", "warning"}

    def of(found: List[Dict[str, str]], what: str) -> List[str]:
        return [f"{each['verdict']}: {each['detail']}" for each in found if each["what"] == what]

    assert of(before, "eth0") == ["ok: Ethernet, up"]
    assert of(after, "eth0")[1:] == [f"warning: ingress: TCX probe before us: {KEPT}"]
    assert of(before, "routing") == ["ok: no rule asks for a mark"]
    (rule,) = of(after, "routing")
    assert rule.startswith("warning: ip rule 77 asks for a mark, which the lookup of the output interface cannot see")


def test_a_field_group_that_the_kernel_cannot_have_is_named(host: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "groups.toml"
    file.write_text('[fields]\ngroups = ["drops", "sizes"]\n')
    (taken,) = lines(host, "kernel", "-c", str(file))
    assert taken.endswith("takes the BPF programs, with field groups sizes, drops")
    hide = 'mount -t tmpfs none /sys/kernel && exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "-", COMMAND, "check"]
    words = ["-c", file, "-i", "eth0", "--collector", "udp://127.0.0.1:9"]
    shown = subprocess.run(host.inside([*command, *words]), capture_output=True, text=True, check=False)
    assert 'FAILED  kernel: [fields] groups: "drops" needs kernel BTF' in shown.stdout
    assert shown.stderr == "flowexp: check: 1 of these would keep the exporter from working\n"


def test_a_flowtable_in_hardware_is_told_from_one_in_software(monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def message(name: bytes, flags: int) -> bytes:
        body = attribute(1, b"filter\0") + attribute(2, name) + attribute(7, struct.pack(">I", flags))
        return struct.pack("=IHHII", 20 + len(body), 10 << 8 | 22, 2, 1, 0) + b"\1\0\0\0" + body

    octets = message(b"soft\0", 2) + message(b"fast\0", 3)
    found = [offloads._flowtable(body[4:]) for _, body in inquiry.messages(octets)]
    assert found == [("filter soft", 2), ("filter fast", 3)]
    monkeypatch.setattr(offloads, "flowtables", lambda: found)
    assert offloads.hardware_flowtables() == ["filter fast"]


def test_nat_events_that_the_kernel_does_not_tell_are_named(host: Namespace, tmp_path: Path) -> None:
    needs.need(needs.nat())
    configuration = tmp_path / "nat.toml"
    configuration.write_text('[export]\nnat_events = true\n[[collector]]\nurl = "udp://127.0.0.1:9"\n')
    host.run("nft", "add table ip t; add chain ip t c { type nat hook postrouting priority srcnat; }")
    for value, expected in (("1", "ok      NAT events: "), ("0", "warning NAT events: none will come; sysctl")):
        host.sysctl("net.netfilter.nf_conntrack_events", value)
        said = host.run(COMMAND, "check", "-c", configuration, "-i", "lo")
        assert expected in said, said
