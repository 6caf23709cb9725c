# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile packets: whatever comes, the verdict is "go on", the ledger closes, and no key is made up.

Frames are the catalogue's (tests/stacks.py), cut, overwritten, spliced, or nothing but random octets. Each round
has a seed of its own, which a failure names. FLOWEXP_HOSTILE_FRAMES sets how many frames there are.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import in_process
import pytest
import reference
import stacks
from lab import decoders, needs, tun
from lab.collectors import MessageFile
from lab.flowexp import Exporter
from lab.flows import Counts, FlowKey, add_up, differences
from lab.netns import Namespace, namespaces, veth

pytestmark = pytest.mark.kernel

FRAMES = int(os.environ.get("FLOWEXP_HOSTILE_FRAMES") or (1_000_000 if os.environ.get("CI") == "true" else 100_000))
FRAMES_A_ROUND = 10_000  # fewer flows than the table holds, and fewer datagrams than it remembers fragments of
LIVE_FRAMES = 5_000
ETHERNET_OCTETS = 14
SOL_PACKET, PACKET_VNET_HDR = 263, 15
TC_GO_ON, XDP_PASS = -1, 2

CATALOGUE = list(stacks.EVERYTHING.values())
TELLING_OCTETS = bytes([0, 1, 4, 6, 17, 33, 43, 44, 51, 58, 59, 60, 132, 135, 136, 0x45, 0x4F, 0x60, 0x81, 0x88, 255])
HEADER_OCTETS = 64  # most damage is done here


def any_frame(rng: random.Random) -> bytes:
    """One of the catalogue, each stack as likely as any other."""
    return rng.choice(rng.choice(CATALOGUE))


def hostile(rng: random.Random) -> bytes:
    """One frame; its length is 0 to about 2,000 octets."""
    kind = rng.random()
    if kind < 0.05:
        return rng.randbytes(rng.randrange(200))
    frame = bytearray(any_frame(rng))
    if kind < 0.15:
        other, at = any_frame(rng), rng.randrange(80)
        frame[at:] = other[at:]
    for _ in range(rng.randrange(5)):
        at = rng.randrange(HEADER_OCTETS)
        if at < len(frame):
            frame[at] = rng.choice(TELLING_OCTETS) if rng.random() < 0.5 else rng.getrandbits(8)
    if kind > 0.7:
        del frame[rng.randrange(len(frame) + 1) :]
    elif kind > 0.65:
        frame += rng.randbytes(rng.randrange(60))
    return bytes(frame)


def rounds(hook: int) -> Iterator[tuple[int, list[bytes]]]:
    """The share of one of the hooks: seeds, and the frames of each."""
    for seed in range(hook, -(-FRAMES // FRAMES_A_ROUND), len(HOOKS) + 1):
        rng = random.Random(seed)
        yield seed, [hostile(rng) for _ in range(FRAMES_A_ROUND)]


@pytest.fixture(autouse=True)
def bpf() -> None:
    needs.need(needs.bpf())


# In this process


class Hook(NamedTuple):
    program: str
    verdict: int
    has_ethernet: bool


HOOKS = [
    Hook("ingress_ethernet", TC_GO_ON, True),
    Hook("egress_ethernet", TC_GO_ON, True),
    Hook("ingress_no_link", TC_GO_ON, False),
    Hook("egress_no_link", TC_GO_ON, False),
    Hook("xdp_ethernet", XDP_PASS, True),
]


def timeless(books: reference.Books) -> reference.Books:
    """Without the times, which are the hook's own."""
    flows = {key: flow._replace(first_ns=0, last_ns=0) for key, flow in books.flows.items()}
    return reference.Books(flows, books.not_metered)


def is_refused(frame: bytes, run: Callable[[bytes], int], verdict: int) -> bool:
    """Whether BPF_PROG_TEST_RUN takes no such frame; if it does, the verdict has to be the right one."""
    try:
        assert run(frame) == verdict
    except OSError:
        assert len(frame) < 14 + 40, f"{len(frame)} octets were refused"
        return True
    return False


@pytest.mark.parametrize("number", range(len(HOOKS)), ids=[hook.program for hook in HOOKS])
def test_hostile_packets_at_a_hook_pass_and_make_up_no_flow(number: int) -> None:
    program, verdict, has_ethernet = HOOKS[number]
    loopback = socket.if_nametoindex("lo")
    for seed, frames in rounds(number):
        meter = in_process.Meter(program)
        run = meter.xdp_hook() if program.startswith("xdp") else meter.hook()
        expected = reference.Meter(live=True, has_ethernet=has_ethernet)
        for frame in frames:
            packet = frame if has_ethernet else frame[ETHERNET_OCTETS:]
            if not is_refused(packet, run, verdict):
                expected.feed(packet, interface=loopback)
        wrong = in_process.differences(timeless(expected.take()), timeless(meter.take()))
        assert wrong == [], f"seed {seed}"


def test_hostile_packets_of_a_capture_make_up_no_flow() -> None:
    for seed, frames in rounds(len(HOOKS)):
        rng = random.Random(seed)
        meter, expected = in_process.Meter("replay"), reference.Meter()
        feed = meter.replay().feed
        for time_ns, frame in enumerate(frames):
            wire_octets = len(frame) + rng.choice((0, 0, 1, 1_500, 200_000))
            feed(frame, time_ns=time_ns, wire_octets=wire_octets)
            expected.feed(frame, time_ns=time_ns, wire_octets=wire_octets)
        wrong = in_process.differences(expected.take(), meter.take())
        assert wrong == [], f"seed {seed}"


@pytest.mark.parametrize("name", ["Ethernet II", "IPv6", "QinQ", "ARP"])
def test_a_capture_may_hold_frames_of_any_length(name: str) -> None:
    meter, expected = in_process.Meter("replay"), reference.Meter()
    feed = meter.replay().feed
    frame = stacks.EVERYTHING[name][0] + bytes(70_000)
    for octets in (*range(600), *range(3_600, 3_800), 9_014, 65_535, 65_549, 70_000):
        feed(frame[:octets], time_ns=0, wire_octets=octets)
        expected.feed(frame[:octets], wire_octets=octets)
    assert in_process.differences(expected.take(), meter.take()) == []


# Live: what BPF_PROG_TEST_RUN cannot make


def is_seen_as_it_was_sent(frame: bytes) -> bool:
    """Before any hook the kernel takes out the outer tag, and drops a frame that ends within two octets of it.

    With that tag beside the frame, the meter sees through one tag more than in a capture.
    """
    tags = 0
    while frame[12 + 4 * tags : 14 + 4 * tags] in reference.TPIDS:
        tags += 1
    return tags <= reference.MAX_TAGS and not (tags and len(frame) < 20)


def live_frames() -> list[bytes]:
    """The catalogue and as many hostile frames, as far as a device takes them."""
    rng = random.Random("live")
    frames = [frame for stack in CATALOGUE for frame in stack]
    frames += [hostile(rng) for _ in range(LIVE_FRAMES)]
    return [frame for frame in frames if len(frame) >= ETHERNET_OCTETS and is_seen_as_it_was_sent(frame)]


def flow_key(key: reference.Key) -> FlowKey:
    addresses = (str(ipaddress.ip_address(address)) for address in key[:2])
    return FlowKey(*addresses, *key[2:6], key.vlan & 0xFFF)


class Live:
    """An exporter on one interface, and the reference that is told of what comes in or goes out there."""

    def __init__(self, exporter: Exporter, file: MessageFile, *, has_ethernet: bool) -> None:
        self._exporter, self._file = exporter, file
        self._expected = reference.Meter(live=True, has_ethernet=has_ethernet)

    def expect(self, frame: bytes) -> None:
        self._expected.feed(frame)

    def check(self) -> None:
        """Stops the exporter; its records and its ledger have to say what the reference says."""
        assert self._exporter.stop() == 0, self._exporter.log
        books = self._expected.take()
        expected = add_up(
            (flow_key(key), Counts(flow.packets, flow.octets, flow.tcp_flags & 0xFF))
            for key, flow in books.flows.items()
        )
        records = decoders.records(self._file.messages())
        assert differences(expected, add_up(decoders.flow_of(record) for record in records)) == []
        ledger = self._exporter.ledger()
        assert ledger.closes, self._exporter.log
        assert ledger.seen == books.seen.packets
        reasons = {reason.replace("_", " "): count.packets for reason, count in books.not_metered.items()}
        assert ledger.not_metered == reasons


@contextmanager
def metering(
    namespace: Namespace, directory: Path, *, direction: str = "ingress", has_ethernet: bool = True
) -> Iterator[Live]:
    file = MessageFile(directory / f"{namespace.name}.ipfix")
    options = "--direction", direction
    with Exporter(namespace, directory, *options, interfaces=["eth0"], collectors=[file.url]) as exporter:
        yield Live(exporter, file, has_ethernet=has_ethernet)


@pytest.fixture
def live_metering() -> None:
    needs.need(needs.kernel(), needs.tun())


def test_hostile_frames_through_a_tap_make_up_no_flow(live_metering: None, tmp_path: Path) -> None:
    with namespaces("host") as (host,), tun.Device(host, "eth0", ethernet=True) as tap:
        with metering(host, tmp_path) as live:
            for frame in live_frames():
                tap.write(frame)
                live.expect(frame)
            live.check()


def test_hostile_packets_through_a_tun_make_up_no_flow(live_metering: None, tmp_path: Path) -> None:
    with namespaces("host") as (host,), tun.Device(host, "eth0") as device:
        with metering(host, tmp_path, has_ethernet=False) as live:
            for frame in live_frames():
                packet = frame[ETHERNET_OCTETS:]
                if packet and packet[0] >> 4 in (4, 6):  # a tun takes no other
                    device.write(packet)
                    live.expect(packet)
            live.check()


def send(sender: socket.socket, frames: Sequence[bytes], *, linear_octets: int = 0) -> None:
    """Sends frames by AF_PACKET; those of more than a page have only `linear_octets` in their linear part."""
    for frame in frames:
        sender.send(struct.pack("=BBHHHH", 0, 0, linear_octets, 0, 0, 0) + frame)


@pytest.mark.parametrize("paged", [False, True], ids=["linear", "paged"])
def test_hostile_frames_over_a_veth_make_up_no_flow_at_either_end(
    paged: bool, live_metering: None, tmp_path: Path
) -> None:
    """The sender's end has tags in the payload, the receiver's has the outer one beside it, in skb->vlan_tci.

    `paged`: frames of more than a page, whose headers lie in fragments of the skb.
    """
    with namespaces("sender", "receiver") as (sender, receiver), ExitStack() as open_things:
        for link in veth(sender, receiver):
            link.set("mtu", "9000")
        ends = [
            open_things.enter_context(metering(sender, tmp_path, direction="egress")),
            open_things.enter_context(metering(receiver, tmp_path)),
        ]
        frames = live_frames()
        if paged:
            frames = [frame + bytes(6_000) for frame in frames]
        raw = open_things.enter_context(sender.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        raw.bind(("eth0", 0))
        send(raw, frames, linear_octets=ETHERNET_OCTETS)
        for end in ends:
            for frame in frames:
                end.expect(frame)
            end.check()
