# SPDX-License-Identifier: GPL-2.0-or-later
"""BCC on the target makes of the same source what clang has made of it: the same layout, flows and records."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import stacks
from captures import Packet, pcap
from lab import needs, traffic
from lab.netns import attached, namespaces, veth
from lab.process import on_one_cpu
from lab.traffic import make_capture, send_frames
from lab.wait import wait_for

from flowexp.capture import read_capture
from flowexp.errors import FlowexpError
from flowexp.kernel import bcc_loader, libbpf, loader, netlink
from flowexp.kernel.attach import HOOK_PROGRAMS, Attacher
from flowexp.kernel.bcc_loader import Bcc
from flowexp.kernel.groups import group_names
from flowexp.kernel.loader import Auto, Loader, Prebuilt, loader_named
from flowexp.kernel.table import FlowTable
from flowexp.meter import MeteringProcess, new_table, this_layout
from flowexp.metering.ledger import Ledger
from flowexp.protocol.record import columns_to_records
from flowexp.rates import Rates

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
MAX_FLOWS = 20_000
START_NS, STEP_NS = 1_700_000_000_000_000_000, 1_234_567
MACS = ("02:00:00:00:00:0a", "02:00:00:00:00:0b")
CAPABILITIES = "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"


@cache
def bcc_works() -> str | None:
    """BCC, kernel headers, and the right to use them: compiles the layout."""
    try:
        loader_named("bcc").layout()
    except FlowexpError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def compilers() -> None:
    needs.need(needs.bpf(), bcc_works())


# One process for all: a compilation takes three seconds.
BOTH: tuple[Loader, Loader] = (loader_named("prebuilt"), loader_named("bcc"))


class Meter:
    """The programs of one loader, over a table of their own or over another's."""

    def __init__(self, made_by: Loader, *, programs: tuple[str, ...], table: FlowTable | None = None) -> None:
        self.process = MeteringProcess(
            table or new_table(MAX_FLOWS, made_by),
            loader=made_by,
            programs=programs,
            max_flows=MAX_FLOWS,
            own_mark=7,
            unix_offset=lambda: 0,
        )

    def feed(self, capture: Path) -> None:
        """Sends every packet of a capture through the replay program."""
        feed = self.process.replay().feed
        for frames in read_capture(capture):
            feed(frames)

    def take(self) -> list[str]:
        """All there is as Data Records, sorted, and what was not metered; the ledger closes."""
        records = []
        for batch in self.process.drain():
            records += [str(record) for record in columns_to_records(batch.columns)]
            batch.done()
        ledger = self.process.ledger()
        assert ledger.missing() == (0, 0), str(ledger)
        return [*sorted(records), str(ledger)]


@contextmanager
def metering(made_by: Loader, *programs: str, table: FlowTable | None = None) -> Iterator[Meter]:
    meter = Meter(made_by, programs=programs, table=table)
    try:
        yield meter
    finally:
        meter.process.close()


def records_of(made_by: Loader, capture: Path) -> list[str]:
    with metering(made_by, "replay") as meter:
        meter.feed(capture)
        return meter.take()


@pytest.fixture(scope="module")
def every_stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every header stack there is, whole and cut, with errors and without."""
    frames = [frame for frames in stacks.EVERYTHING.values() for frame in frames]
    packets = [Packet(frame[:cut], wire_octets=len(frame)) for frame in frames for cut in (len(frame), 60, 40)]
    packets = [packet._replace(time_ns=START_NS + number * STEP_NS) for number, packet in enumerate(packets)]
    path = tmp_path_factory.mktemp("stacks") / "stacks.pcap"
    path.write_bytes(pcap(packets))
    return path


@pytest.fixture(scope="module")
def much_traffic(tmp_path_factory: pytest.TempPathFactory) -> traffic.Capture:
    path = tmp_path_factory.mktemp("traffic") / "traffic.pcap"
    return make_capture(path, packets=30_000, flows=3_000, macs=MACS)


# The same as the prebuilt object


def test_the_layout_from_bccs_btf_is_the_prebuilt_objects() -> None:
    prebuilt, bcc = (each.layout() for each in BOTH)
    assert bcc.digest == prebuilt.digest
    assert bcc.constants == prebuilt.constants
    ours = set(prebuilt.structs) - {"__sk_buff"}  # the kernel's own: it grows with the headers
    assert {name: bcc.structs[name] for name in ours} == {name: prebuilt.structs[name] for name in ours}


def test_every_header_stack_gives_the_same_records(every_stack: Path) -> None:
    prebuilt, bcc = (records_of(each, every_stack) for each in BOTH)
    assert len(prebuilt) > len(stacks.METERED)
    assert bcc == prebuilt


def test_a_capture_of_many_flows_gives_the_same_records_and_they_are_right(much_traffic: traffic.Capture) -> None:
    prebuilt, bcc = (records_of(each, much_traffic.path) for each in BOTH)
    assert len(prebuilt) == len(much_traffic.flows) + 1
    assert bcc == prebuilt


@pytest.mark.parametrize("first", [0, 1], ids=["prebuilt first", "bcc first"])
def test_programs_of_one_loader_find_the_flows_that_the_others_have_made(
    first: int, much_traffic: traffic.Capture
) -> None:
    packets = sum(counts.packets for counts in much_traffic.flows.values())
    with metering(BOTH[first], "replay") as before:
        before.feed(much_traffic.path)
        table = before.process.table
        fds = {name: os.dup(fd) for name, fd in table.fds.items()}
        with metering(BOTH[1 - first], "replay", table=FlowTable.adopt(BOTH[1 - first].layout(), fds)) as after:
            after.feed(much_traffic.path)
        assert table.flows_created() == len(much_traffic.flows)
        assert sum(len(family.occupied()) for family in table.families) == len(much_traffic.flows)
        assert before.process.ledger().in_table[0] == 2 * packets


def test_field_groups_count_the_same(every_stack: Path) -> None:
    """Every column of every flow, the groups' included."""
    counted = []
    for each in BOTH:
        groups = [name for name in group_names(each.layout()) if name not in ("tcp", "tunnels")]
        table = new_table(MAX_FLOWS, each, groups)
        with metering(each, "replay", table=table) as meter:
            meter.feed(every_stack)
            columns = [batch.columns for batch in meter.process.drain()]
        assert any(part["integrity_expiring"].any() for part in columns)
        counted.append([{name: column.tobytes() for name, column in _sorted(part).items()} for part in columns])
    assert counted[0] == counted[1]


@pytest.mark.parametrize("group", ["tcp", "tunnels"])
def test_a_group_that_bcc_cannot_compile_is_refused_by_name(group: str) -> None:
    with pytest.raises(FlowexpError, match=f'BCC cannot compile "{group}"; leave it out, or set loader = "prebuilt"'):
        with metering(BOTH[1], "replay", table=new_table(64, BOTH[1], [group])):
            pass


def _sorted(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By all that tells a flow from another, as slots follow a secret that is each table's own."""
    names = ("src_addr", "dst_addr", "src_port", "dst_port", "icmp_type_code", "protocol", "vlan_id", "vlan_tagged")
    keys = [np.ascontiguousarray(columns[name]).reshape(len(columns["packets"]), -1).view(np.uint8) for name in names]
    rows = np.lexsort(np.concatenate(keys, axis=1).T)
    return {name: column[rows] for name, column in columns.items()}


def test_a_setting_reaches_the_programs() -> None:
    with metering(BOTH[1], "egress_ethernet") as meter:
        context = np.zeros(1, meter.process.table.layout.structs["__sk_buff"])
        run = libbpf.TestRun(meter.process.programs["egress_ethernet"], context.view(np.uint8)).run
        for mark in (7, 8, 0):
            context["mark"] = mark
            assert run(stacks.METERED["IPv6"][0]) == -1
        counters = meter.process.table.counters()
        assert (counters["seen"][0], counters["not_metered_own_export"][0]) == (3, 1)


@pytest.mark.parametrize(("rates", "own"), [(Rates((10,)), {}), (Rates((1, 10)), {1: 10}), (Rates((7, 10)), {1: 10})])
def test_sampling_by_count_selects_the_same_packets(rates: Rates, own: dict[int, int]) -> None:
    """Also where the interface, which is the loopback's, has an interval of its own."""
    frame = stacks.METERED["IPv6"][0]
    with on_one_cpu():
        for each in BOTH:
            layout = each.layout()
            table = FlowTable.create(layout, MAX_FLOWS, rates=rates)
            process = MeteringProcess(table, loader=each, programs=("egress_ethernet",), max_flows=MAX_FLOWS)
            try:
                process.sample(own)
                context = np.zeros(1, layout.structs["__sk_buff"])
                run = libbpf.TestRun(process.programs["egress_ethernet"], context.view(np.uint8)).run
                assert [run(frame) for _ in range(105)] == [-1] * 105
                ledger = process.ledger()
                assert (ledger.in_table[0], ledger.not_metered["not_selected"][0]) == (10, 95)
                assert ledger.missing() == (0, 0)
                (batch,) = (each for each in process.drain() if each.records)
                assert [interval for interval, _ in batch.by_interval()] == [own.get(1, 0)]
                batch.done()
            finally:
                process.close()


# On an interface


@pytest.mark.parametrize(("hook", "how"), [("tc", ["tcx", "tcx"]), ("xdp", ["xdp", "tcx"])])
def test_bccs_programs_meter_an_interface_exactly(hook: str, how: list[str]) -> None:
    needs.need(needs.namespace_support())
    with namespaces("host", "meter") as (host, meter_side):
        sender, metered = veth(host, meter_side)
        frame = stacks.build(lambda h: h.ipv4() / stacks.udp(), 1)[0]
        with meter_side.entered(), metering(BOTH[1], *HOOK_PROGRAMS) as meter:
            attacher = Attacher(
                meter.process.programs, meter.process.ingress_map, handle=1, direction="once", hook=hook,
                xdp_force=False,
            )  # fmt: skip
            try:
                attacher.follow(netlink.resolve(["eth0"]))
                assert [each.how for each in attacher.attached.values()] == how
                send_frames(sender, [frame] * 5)
                send_frames(metered, [frame] * 3)
                wait_for("8 packets to be metered", lambda: _ledger(meter).in_table[0] >= 8)
                assert _ledger(meter).in_table == (8, 8 * (len(frame) - 14))
            finally:
                attacher.detach_all()
        assert attached(metered) == []


def test_bccs_programs_count_a_capture_sent_at_full_speed(much_traffic: traffic.Capture) -> None:
    needs.need(needs.namespace_support(), needs.tools("tcpreplay"))
    expected = [sum(getattr(each, what) for each in much_traffic.flows.values()) for what in ("packets", "octets")]
    with namespaces("host", "meter") as (host, meter_side):
        sender, _ = veth(host, meter_side)
        with meter_side.entered(), metering(BOTH[1], *HOOK_PROGRAMS) as meter:
            attacher = Attacher(
                meter.process.programs, meter.process.ingress_map, handle=1, direction="ingress", hook="tc",
                xdp_force=False,
            )  # fmt: skip
            try:
                attacher.follow(netlink.resolve(["eth0"]))
                traffic.replay(sender, much_traffic)
                wait_for("all packets to be metered", lambda: _ledger(meter).in_table[0] >= expected[0])
                assert _ledger(meter).in_table == tuple(expected)
                assert meter.process.table.flows_created() == len(much_traffic.flows)
            finally:
                attacher.detach_all()


def _ledger(meter: Meter) -> Ledger:
    ledger = meter.process.ledger()
    assert ledger.missing() == (0, 0)
    return ledger


# Which one


def test_auto_takes_the_prebuilt_object_where_it_fits_and_asks_for_no_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    with metering(Auto(), "replay") as meter:
        assert meter.process.programs["replay"] > 0


def test_auto_compiles_with_bcc_where_the_object_does_not_fit_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, every_stack: Path
) -> None:
    expected = records_of(Prebuilt(loader.object_path()), every_stack)
    other = tmp_path / "flowexp.bpf.o"
    other.write_bytes(b"\x7fELF, but of another machine")
    monkeypatch.setattr(loader, "object_path", lambda: other)
    with caplog.at_level(logging.WARNING):
        records = records_of(Auto(), every_stack)
    assert f"does not fit: {other}: not a BPF object" in caplog.text
    assert records == expected


def test_a_loader_leaves_no_descriptor_when_its_programs_are_closed() -> None:
    for each in BOTH:
        each.layout()
        before = descriptors()
        with metering(each, "replay", "ingress_ethernet"):
            assert descriptors() > before
        assert descriptors() == before


def descriptors() -> set[str]:
    """What this process has open, by number and kind."""
    links = {number: Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    return {f"{number} {os.readlink(link)}" for number, link in links.items() if link.is_symlink()}


# What is said when it fails: one line


def error_of(made_by: Loader, *programs: str) -> str:
    with pytest.raises(FlowexpError) as raised, metering(made_by, *programs):
        pass
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_bcc_that_is_not_installed_is_named_by_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    assert error_of(Bcc(), "replay") == (
        f"BCC is not installed for {sys.executable}: install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
        "(Fedora, RHEL); a virtual environment sees it only with --system-site-packages"
    )


def test_the_bcc_of_pypi_is_told_from_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    crystals = ModuleType("bcc")
    crystals.__file__ = "/venv/site-packages/bcc/__init__.py"
    monkeypatch.setitem(sys.modules, "bcc", crystals)
    assert error_of(Bcc(), "replay") == (
        "/venv/site-packages/bcc/__init__.py: this `bcc` is PyPI's, which has nothing to do with BPF; remove it with "
        f"'{sys.executable} -m pip uninstall bcc' and install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
        "(Fedora, RHEL)"
    )


def test_a_bcc_whose_library_is_missing_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bcc.py").write_text("raise OSError('libbcc.so.0: cannot open shared object file')\n")
    monkeypatch.delitem(sys.modules, "bcc")
    monkeypatch.syspath_prepend(tmp_path)
    assert error_of(Bcc(), "replay").startswith("BCC cannot be loaded: libbcc.so.0: cannot open shared object file; ")


def outside(script: str, *wrapper: str) -> str:
    """The last line that another Python prints, run through `wrapper`, with the error of `script` as its output."""
    program = f"from flowexp.errors import FlowexpError\ntry:\n    {script}\nexcept FlowexpError as e: print(e)\n"
    command = [*wrapper, sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (shown.returncode, shown.stderr) == (0, "")
    (line,) = shown.stdout.splitlines()
    return line


LAYOUT = "from flowexp.kernel.bcc_loader import Bcc; Bcc().layout()"


def test_missing_kernel_headers_are_named_by_their_package() -> None:
    needs.need(needs.tools("unshare"), needs.namespace_support())
    hide = 'mount -t tmpfs none /lib/modules && mount -t tmpfs none /sys/kernel && exec "$@"'
    release = os.uname().release
    assert outside(LAYOUT, "unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "-") == (
        f"/lib/modules/{release}/build: BCC finds no kernel headers there; install linux-headers-{release} "
        f"(Debian, Ubuntu) or kernel-devel-{release} (Fedora, RHEL)"
    )


def test_a_user_without_capabilities_is_told_which_are_needed() -> None:
    needs.need(needs.tools("setpriv"))
    assert CAPABILITIES in outside(LAYOUT, "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


@pytest.fixture
def own_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of bpf/ that the loader takes for the source."""
    copy = tmp_path / "bpf"
    shutil.copytree(ROOT / "bpf", copy)
    monkeypatch.setattr(bcc_loader, "source_path", lambda: copy / "flowexp.bpf.c")
    return copy


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_a_compile_error_is_the_compilers_first_line_with_the_sources_path(own_source: Path) -> None:
    source = own_source / "flowexp.bpf.c"
    text = source.read_text()
    source.write_text(text + "static int broken(void) { return nothing; }\nint worse\n")
    line = text.count("\n") + 1
    error = error_of(Bcc(), "replay")
    assert error == f"{source}:{line}:34: use of undeclared identifier 'nothing' (compiling with BCC)"


def test_an_error_in_a_header_is_named_by_the_headers_path(own_source: Path) -> None:
    with (own_source / "flow.h").open("a") as file:
        file.write("#error site-specific\n")
    assert error_of(Bcc(), "replay").startswith(f"{own_source / 'flow.h'}:")


def test_a_program_that_the_verifier_refuses_is_named_with_the_verifiers_reason(own_source: Path) -> None:
    source = own_source / "flowexp.bpf.c"
    replace(source, "return account_captured(skb);", "return *(int *) (long) skb->data;")
    start, _, reason = error_of(Bcc(), "replay").partition("; BCC: ")
    assert start == f"loading replay of {source}: Permission denied"
    assert "outside of the packet" in reason


def test_a_source_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bcc_loader, "data_path", lambda name: tmp_path / name)
    path = tmp_path / "bpf" / "flowexp.bpf.c"
    assert error_of(Bcc(), "replay") == f"{path}: no source for BCC here; 'make build' puts it there"


def test_a_site_specific_slot_changes_the_layout_and_works(own_source: Path, every_stack: Path) -> None:
    replace(own_source / "flow.h", "\t__u64 exported_ns; ", "\t__u64 site[2];\n\t__u64 exported_ns; ")
    changed = Bcc()
    assert changed.layout().structs["flow_cold"].itemsize == this_layout().structs["flow_cold"].itemsize + 16
    assert changed.layout().digest != this_layout().digest
    assert records_of(changed, every_stack) == records_of(Prebuilt(), every_stack)
