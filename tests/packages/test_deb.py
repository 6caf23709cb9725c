# SPDX-License-Identifier: GPL-2.0-or-later
"""The .deb on a fresh Debian with systemd: installed, configured, started, upgraded under traffic, removed, purged."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from debian import Machine, build, next_version, root_folder, shared_files, support
from lab import needs
from lab.collectors import Nfcapd
from lab.flowexp import read_ledger_line
from lab.flows import total
from lab.netns import Link, namespaces, tcx_programs, veth
from lab.process import CommandFailed, run
from lab.traffic import send_frames
from lab.wait import wait_for
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

pytestmark = [pytest.mark.kernel, pytest.mark.interop]

CONFIGURATION = "etc/flowexp/flowexp.toml"
CAPABILITIES = {"CAP_BPF": 39, "CAP_PERFMON": 38, "CAP_NET_ADMIN": 12}
NOT_FOR_ROUTERS = ("clang", "gcc", "linux-headers", "llvm", "python3-pip")


@dataclass
class Router:
    """The machine, its interface eth0 with a sender at the other end, and two versions of the package."""

    machine: Machine
    sender: Link
    eth0: Link
    this: Path
    next: Path
    frames_sent: int = 0

    def install(self, package: Path) -> None:
        """Stops the service; `package` is then installed, with the configuration as it was shipped."""
        if "/usr/bin/flowexp" in self.machine.named("flowexp"):
            self.machine.systemctl("stop", "flowexp")
            self.machine.run("dpkg", "--purge", "flowexp")
        self.dpkg_install(package)

    def dpkg_install(self, package: Path) -> None:
        shutil.copy(package, self.machine.root / "root")
        self.machine.run("dpkg", "--install", f"/root/{package.name}", timeout_s=120)

    def configure(self, **values: str) -> None:
        """Edits the configuration: each key at its one place in the file."""
        file = self.machine.root / CONFIGURATION
        text = file.read_text()
        for key, value in values.items():
            text, places = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
            assert places == 1, key
        file.write_text(text)

    def send(self, frames: int) -> None:
        """One-packet flows and long ones, ports by the number of the frame."""
        ethernet = Ether(src=self.sender.mac, dst=self.eth0.mac) / IP(src="10.1.0.1", dst="10.1.0.9")
        packets = [bytes(ethernet / UDP(sport=1000 + n % 40, dport=9)) for n in range(frames)]
        send_frames(self.sender, packets)
        self.frames_sent += frames

    def main_process(self) -> int:
        return int(self.machine.systemctl("show", "--property=MainPID", "--value", "flowexp"))


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    needs.need(support(), needs.tools("nfcapd", "nfdump"))
    directory = tmp_path_factory.mktemp("deb")
    package = build("deb")
    with namespaces("sender", "router") as (outside, inside):
        ends = veth(outside, inside)
        with root_folder(directory / "root", package) as root, Machine(root, inside, directory) as machine:
            yield Router(machine, *ends, package, next_version(package, directory))


def test_installed_by_apt_it_brings_no_compiler_and_starts_nothing_by_itself(router: Router) -> None:
    router.install(router.this)
    installed = router.machine.run("dpkg-query", "--show", "--showformat", "${Package}\n").split()
    assert [name for name in installed if name.startswith(NOT_FOR_ROUTERS)] == ["gcc-12-base"]
    with pytest.raises(CommandFailed):
        router.machine.systemctl("is-enabled", "flowexp")
    assert router.main_process() == 0


def test_it_has_man_pages_completions_unit_and_user_and_its_configuration_is_a_conffile(router: Router) -> None:
    listed = run(["dpkg-deb", "--contents", router.this]).splitlines()
    files = {line.split()[5].lstrip(".") for line in listed}
    assert shared_files("vendor-completions") | {"/lib/systemd/system/flowexp.service"} <= files
    assert run(["dpkg-deb", "--info", router.this, "conffiles"]).split() == [f"/{CONFIGURATION}"]


def test_its_commands_work_from_a_users_shell(router: Router, tmp_path: Path) -> None:
    machine = router.machine
    router.install(router.this)
    assert "Commands:" in machine.run("flowexp", "--help")
    router.configure(interfaces='["eth0"]')
    assert "FAILED" not in machine.run("flowexp", "check")
    words = ("env", "_FLOWEXP_COMPLETE=bash_complete", "COMP_WORDS=flowexp du", "COMP_CWORD=1", "flowexp")
    assert machine.run(*words).split() == ["plain,dump"]
    dump = ("flowexp", "dump", "-i", "eth0", "--duration", "2s", "--format", "json")
    process = machine.start(*dump, directory=tmp_path, name="dump")
    wait_for("dump to meter", lambda: process.is_alive() and tcx_programs(router.eth0, "ingress") == 1)
    router.send(80)
    assert process.wait() == 0
    flows = [json.loads(line) for line in process.stdout.splitlines()]
    assert sum(flow["packetDeltaCount"] for flow in flows) == 80


def test_the_service_exports_as_a_user_with_three_capabilities_and_no_more(router: Router, tmp_path: Path) -> None:
    machine = router.machine
    router.install(router.this)
    with Nfcapd(machine.network, tmp_path) as nfcapd:
        router.configure(interfaces='["eth0"]', url=f'"{nfcapd.url}"')
        machine.systemctl("start", "flowexp")
        status = dict(
            line.split(":\t", 1) for line in machine.run("cat", f"/proc/{router.main_process()}/status").splitlines()
        )
        router.send(4000)
        assert "4,000 packets" in machine.run("flowexp", "status")
        flows = [json.loads(line) for line in machine.run("flowexp", "dump", "--format", "json").splitlines()]
        assert sum(flow["packetDeltaCount"] for flow in flows) == 4000
        assert "40 flows" in machine.run("flowexp", "top", "--count", "1")
        machine.systemctl("stop", "flowexp")
        nfcapd.finish()
    assert machine.run("id", "--user", "flowexp").strip() in status["Uid"].split()
    assert "0" not in status["Uid"].split()
    only = sum(1 << bit for bit in CAPABILITIES.values())
    for kind in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == only
    assert nfcapd.losses() == []
    assert total(nfcapd.flows()).packets == 4000


@pytest.mark.parametrize("missing", CAPABILITIES)
def test_without_one_of_them_it_ends_with_a_line_that_names_it(router: Router, missing: str) -> None:
    machine = router.machine
    router.install(router.this)
    router.configure(interfaces='["eth0"]')
    left = " ".join(name for name in CAPABILITIES if name != missing)
    drop_in = "/run/systemd/system/flowexp.service.d/less.conf"
    text = f"AmbientCapabilities=\\nAmbientCapabilities={left}\\nCapabilityBoundingSet=\\nCapabilityBoundingSet={left}"
    machine.run("sh", "-c", f"mkdir -p {Path(drop_in).parent}; printf '[Service]\\nRestart=no\\n{text}\\n' >{drop_in}")
    try:
        machine.systemctl("daemon-reload")
        before = machine.journal()
        with pytest.raises(CommandFailed):
            machine.systemctl("start", "flowexp")
        lines = machine.journal()[len(before) :]
    finally:
        machine.run("rm", "-r", str(Path(drop_in).parent))
        machine.systemctl("daemon-reload")
    assert len(lines) == 1
    assert re.findall(r"CAP_\w+", lines[0]) == [missing]
    assert machine.run("find", "/sys/fs/bpf/flowexp", "-mindepth", "1") == ""


def test_an_upgrade_under_traffic_misses_no_packet(router: Router, tmp_path: Path) -> None:
    machine = router.machine
    router.install(router.this)
    enough = threading.Event()

    def keep_sending() -> None:
        while not enough.is_set():
            router.send(200)

    with Nfcapd(machine.network, tmp_path) as nfcapd:
        router.configure(interfaces='["eth0"]', url=f'"{nfcapd.url}"')
        machine.systemctl("start", "flowexp")
        before, router.frames_sent = router.main_process(), 0
        traffic = threading.Thread(target=keep_sending)
        traffic.start()
        try:
            wait_for("traffic", lambda: router.frames_sent > 0)
            router.dpkg_install(router.next)
            sent_meanwhile = router.frames_sent
        finally:
            enough.set()
            traffic.join()
        assert machine.run("flowexp", "--version").strip().endswith("99.0")
        assert router.main_process() not in (0, before)
        machine.systemctl("stop", "flowexp")
        nfcapd.finish()
    ledger = read_ledger_line("\n".join(machine.journal()))
    assert ledger.closes
    assert ledger.seen == router.frames_sent
    assert nfcapd.drops == 0  # nfcapd 1.7.1 takes each Options Data Record but the first for a gap in the sequence
    assert total(nfcapd.flows()).packets == router.frames_sent
    assert sent_meanwhile > 1000


def test_removed_it_leaves_the_configuration_and_purged_nothing(router: Router) -> None:
    machine = router.machine
    router.install(router.this)
    router.configure(interfaces='["eth0"]')
    machine.systemctl("enable", "--now", "flowexp")
    router.send(40)
    assert tcx_programs(router.eth0, "ingress") == 1
    machine.run("dpkg", "--remove", "flowexp")
    assert tcx_programs(router.eth0, "ingress") == tcx_programs(router.eth0, "egress") == 0
    not_ours = ("/root/", "/etc/systemd/system/", "/var/lib/dpkg/info/", "/var/lib/systemd/deb-systemd-helper-enabled/")
    ours = [path for path in machine.named("flowexp") if not path.startswith(not_ours)]
    assert ours == ["/etc/flowexp", "/etc/flowexp/flowexp.toml"]
    machine.run("dpkg", "--purge", "flowexp")
    assert [path for path in machine.named("flowexp") if not path.startswith("/root/")] == []
    assert "flowexp" not in machine.run("cat", "/etc/passwd", "/etc/group")


def test_lintian_finds_nothing_that_is_not_explained(router: Router) -> None:
    needs.need(needs.tools("lintian"))
    assert run(["lintian", "--allow-root", "--pedantic", "--display-info", router.this]) == ""
