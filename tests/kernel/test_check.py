# SPDX-License-Identifier: GPL-2.0-or-later
"""What `flowexp check` says of a machine: who is at the hooks, what the hooks cannot see, and the same as JSON."""

from __future__ import annotations

import json
import os
import struct
from typing import Dict, List

import pytest
from lab import needs
from lab.flowexp import COMMAND
from lab.netns import namespaces, veth

from flowexp.kernel import features, libbpf, offloads

pytestmark = pytest.mark.kernel


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
    assert of(after, "eth0")[1:] == [
        "warning: ingress: probe before us: what they drop or redirect is not metered"
    ]
    assert of(before, "routing") == ["ok: no rule asks for a mark"]
    (rule,) = of(after, "routing")
    assert rule.startswith("warning: ip rule 77 asks for a mark, which the lookup of the output interface cannot see")


def test_a_flowtable_in_hardware_is_told_from_one_in_software(monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def message(name: bytes, flags: int) -> bytes:
        body = attribute(1, b"filter\0") + attribute(2, name) + attribute(7, struct.pack(">I", flags))
        return struct.pack("=IHHII", 20 + len(body), 10 << 8 | 22, 2, 1, 0) + b"\1\0\0\0" + body

    octets = message(b"soft\0", 2) + message(b"fast\0", 3)
    found = [offloads._flowtable(body[4:]) for _, body in offloads._messages(octets)]
    assert found == [("filter soft", 2), ("filter fast", 3)]
    monkeypatch.setattr(offloads, "flowtables", lambda: found)
    assert offloads.hardware_flowtables() == ["filter fast"]
