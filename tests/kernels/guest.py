# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs in another kernel: the programs over one table at every hook, with exact totals.

One process and one load of each program, for the verifier takes seconds under emulation. Each check says what it
has seen, or raises; its line goes to the file `results` in the folder that is shared with the host.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from lab.netns import Link, attached, connect, namespaces, veth
from lab.process import CommandFailed
from lab.traffic import make_capture, send_frames
from lab.wait import wait_for

from flowexp.capture import read_capture
from flowexp.errors import FlowexpError
from flowexp.kernel import features, hooks, libbpf, netlink
from flowexp.kernel.attach import HOOK_PROGRAMS
from flowexp.kernel.groups import group_names
from flowexp.kernel.pins import PinFolder
from flowexp.kernel.replay import CapturedPacket, Frames
from flowexp.kernel.table import FlowTable
from flowexp.meter import new_table, real_time_kernel, this_layout
from flowexp.rates import Rates

from . import devices
from .meter import MAX_FLOWS, PACKET_OCTETS, Meter, Missing, frame

UDP_SEGMENT = 103
PINS = "/sys/fs/bpf/flowexp-guest"
PACKETS, FLOWS = 3_000, 144  # of the capture that is replayed
create_link = libbpf.create_link


def prepare(shared: Path) -> None:
    """On the host: the capture, and what the host's kernel makes of it."""
    capture = shared / "frames.pcap"
    make_capture(capture, packets=PACKETS, flows=FLOWS, macs=("02:00:00:00:00:01", "02:00:00:00:00:02"))
    packets = chain.from_iterable(read_capture(capture))
    frames = [(packet.frame.hex(), packet.time_ns, packet.wire_octets) for packet in packets]
    (shared / "frames").write_text(json.dumps(frames))
    (shared / "expected").write_text(json.dumps(replayed(Meter(("replay",)), shared)))


def replayed(meter: Meter, shared: Path) -> list[list[int]]:
    """The capture's flows, without their addresses and times."""
    packets = json.loads((shared / "frames").read_text())
    meter.process.replay().feed(
        Frames.of(
            CapturedPacket(time_ns, bytes.fromhex(frame), wire_octets, 0) for frame, time_ns, wire_octets in packets
        )
    )
    return [list(row) for row in meter.take()]


def load() -> tuple[Meter, str]:
    """All programs, where no BTF of the kernel can be seen."""
    began_s = time.monotonic()
    if os.path.isdir("/sys/kernel/btf"):
        mount = ctypes.CDLL(None, use_errno=True).mount
        assert mount(b"none", b"/sys/kernel/btf", b"tmpfs", ctypes.c_ulong(0), None) == 0
    assert not os.path.exists("/sys/kernel/btf/vmlinux")
    meter = Meter((*HOOK_PROGRAMS, "replay"))
    kind = "PREEMPT_RT, " if real_time_kernel() else ""
    return meter, f"{kind}{len(HOOK_PROGRAMS) + 1} programs in {time.monotonic() - began_s:.0f} s"


def load_groups() -> tuple[Meter, str]:
    """The programs at TC hooks again, with all that can be counted of a packet; `drops` has a program of its own."""
    groups = [name for name in group_names(this_layout()) if name != "drops"]
    programs = tuple(name for name in HOOK_PROGRAMS if not name.startswith("xdp"))
    return Meter(programs, new_table(MAX_FLOWS, groups=groups)), f"{len(groups)} together"


def sample_by_interface() -> str:
    """One packet in two of the loopback's, all of the others', by count."""
    meter = Meter(("ingress_ethernet",), FlowTable.create(this_layout(), MAX_FLOWS, rates=Rates((1, 2))))
    meter.process.sample({1: 2})
    context = np.zeros(1, meter.process.table.layout.structs["__sk_buff"])
    run = libbpf.TestRun(meter.process.programs["ingress_ethernet"], context.view(np.uint8)).run
    packet = bytes(12) + b"\x08\x00" + struct.pack("!BBHIBBH", 0x45, 0, PACKET_OCTETS, 0, 64, 17, 0) + bytes(16)
    for _ in range(10):
        run(packet)
    ledger = meter.process.ledger()
    meter.process.close()
    assert (ledger.seen[0], ledger.in_table[0], ledger.missing()) == (10, 5, (0, 0)), str(ledger)
    return "5 packets of 10"


@contextmanager
def without_tcx() -> Iterator[None]:
    def refuse(program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
        if attach_type in (libbpf.TCX_INGRESS, libbpf.TCX_EGRESS):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create_link(program_fd, ifindex, attach_type, flags)

    libbpf.create_link = refuse
    try:
        yield
    finally:
        libbpf.create_link = create_link


def hook(meter: Meter, ends: tuple[Link, Link], how: str) -> str:
    """Both directions of a veth device; at XDP the one that there is."""
    sender, metered = ends
    is_xdp = how == "xdp"
    with metered.namespace.entered():
        attacher = meter.attacher(hook="xdp" if is_xdp else "tc", direction="ingress" if is_xdp else "once")
        attacher.follow(netlink.resolve(["eth0"]))
        found = {attachment.how for attachment in attacher.attached.values()}
        try:
            if found != {how}:
                raise Missing(f"has {' and '.join(found)}")
            send_frames(sender, [frame(sender, metered)] * 500)
            send_frames(metered, [frame(metered, sender)] * 300)
            packets = 500 if is_xdp else 800
            meter.expect(packets)
        finally:
            attacher.detach_all()
    assert attached(metered) == []
    return f"{packets} packets of {packets}"


def clsact(meter: Meter, ends: tuple[Link, Link]) -> str:
    with without_tcx():
        return hook(meter, ends, "clsact")


def place(ends: tuple[Link, Link]) -> str:
    """Whether somebody else's filter is before us depends on TCX alone."""
    metered = ends[1]
    metered.add_filter("ingress", priority=10)
    try:
        with metered.namespace.entered():
            order = hooks.order(netlink.resolve(["eth0"])[0], "ingress")
    finally:
        metered.remove_filters()
    them = ["filter bpf (pref 10)"]
    before, behind = ([], them) if features.has_tcx() else (them, [])
    assert (order.before_us, order.behind_us) == (before, behind), str(order)
    return f"{them[0]} is {'behind' if behind else 'before'} us"


def super_packets(meter: Meter, ends: tuple[Link, Link]) -> str:
    """UDP GSO: 20 super-packets of 48,000 octets in segments of 1,200; what the link carries is counted."""
    sender, metered = ends
    with metered.namespace.entered():
        attacher = meter.attacher()
        attacher.follow(netlink.resolve(["eth0"]))
        with metered.namespace.socket() as sink, sender.namespace.socket() as source:
            sink.bind(("10.1.0.9", 9))
            source.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1_200)
            before = metered.counters()["rx_packets"]
            for _ in range(20):
                source.sendto(bytes(48_000), ("10.1.0.9", 9))
            wait_for("the segments", lambda: meter.in_table()[0] >= 800, timeout_s=60)
            frames = metered.counters()["rx_packets"] - before
        attacher.detach_all()
    assert meter.in_table() == (800, 800 * 1_228)
    meter.take()
    if frames >= 800:
        raise Missing("veth takes no super-packets of UDP; 800 frames counted as 800")
    return f"{frames} frames counted as 800"


def restart(ends: tuple[Link, Link]) -> str:
    """Table and links stay when the exporter is gone; the next one goes on with the same flow."""
    sender, metered = ends
    programs = ("ingress_ethernet", "egress_ethernet")
    pins = PinFolder(PINS)
    pins.hold()
    with metered.namespace.entered():
        first = Meter(programs)
        pins.next_table().pin(first.process.table.fds)
        killed = first.attacher(direction="ingress", pins=pins)
        killed.follow(netlink.resolve(["eth0"]))
        send_frames(sender, [frame(sender, metered)] * 100)
        for attachment in killed.attached.values():
            if attachment.link is not None:
                os.close(attachment.link)
        first.process.close()
        send_frames(sender, [frame(sender, metered)] * 100)
        maps = pins.tables()[0].find_maps(FlowTable.map_names(this_layout()))
        assert maps is not None
        second = Meter(programs, FlowTable.adopt(this_layout(), maps))
        assert second.in_table()[0] == 200, str(second.process.ledger())
        attacher = second.attacher(direction="ingress", pins=pins)
        attacher.follow(netlink.resolve(["eth0"]))
        how = " and ".join({attachment.how for attachment in attacher.attached.values()})
        send_frames(sender, [frame(sender, metered)] * 100)
        second.expect(300)
        attacher.detach_all()
    assert attached(metered) == []
    second.process.close()
    pins.clear()
    pins.release()
    return f"{how}: 300 packets of 300"


def as_on_the_host(meter: Meter, shared: Path) -> str:
    expected = json.loads((shared / "expected").read_text())
    found = replayed(meter, shared)
    assert found == expected
    return f"{len(found)} flows of {sum(row[5] for row in found):,} packets"


def lacking() -> str:
    return ", ".join(feature.name for feature in features.missing()) or "nothing"


class Results:
    """A line for each check, written as it is made."""

    def __init__(self, shared: Path) -> None:
        self._file = (shared / "results").open("w", buffering=1)

    def add(self, check: str, run: Callable[[], Any]) -> Any:
        """What `run` returns is the detail, or the last of what it returns."""
        began_s = time.monotonic()
        answer: Any = None
        try:
            answer = run()
            verdict, detail = "ok", answer[-1] if isinstance(answer, tuple) else answer
        except Missing as missing:
            verdict, detail = "-", str(missing)
        except (AssertionError, CommandFailed, FlowexpError, OSError, TimeoutError) as error:
            verdict, detail = "FAILED", f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - began_s, 1)
        line = {"check": check, "verdict": verdict, "detail": detail, "seconds": seconds}
        self._file.write(json.dumps(line) + "\n")
        print(line, flush=True)
        return answer


def main(shared: Path) -> None:
    results = Results(shared)
    results.add("kernel", lambda: os.uname().release)
    results.add("lacks", lacking)
    loaded = results.add("loads without kernel BTF", load)
    if loaded is not None:
        with_groups = results.add("field groups", load_groups)
        results.add("sampling by interface", sample_by_interface)
        meter_everywhere(results, loaded[0], shared)
        if with_groups is not None:
            results.add("VRF", lambda: devices.vrf(with_groups[0]))
            with devices.underlay() as ends:
                results.add("tunnels by kernel devices", lambda: devices.tunnels(with_groups[0], ends))
                results.add("GTP-U by a kernel device", lambda: devices.gtp_tunnel(with_groups[0], ends))
    (shared / "done").touch()


def meter_everywhere(results: Results, meter: Meter, shared: Path) -> None:
    results.add("as on the host", lambda: as_on_the_host(meter, shared))
    with namespaces("host", "meter") as (outside, inside):
        ends = veth(outside, inside)
        connect(*ends, ("10.1.0.1/24", "10.1.0.9/24"))
        results.add("TCX", lambda: hook(meter, ends, "tcx"))
        results.add("clsact", lambda: clsact(meter, ends))
        results.add("another's filter", lambda: place(ends))
        results.add("XDP", lambda: hook(meter, ends, "xdp"))
        results.add("super-packets", lambda: super_packets(meter, ends))
        results.add("restart", lambda: restart(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
