# SPDX-License-Identifier: GPL-2.0-or-later
"""1. What a packet costs: nanoseconds of our programs and of the floor, each less an empty program of its kind.

Hot: the same frame again and again, all in the cache. At random and new: the frame's source address is written before
the program runs; the empty program that is taken off writes it as well. All in turn, so that they share the noise.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from socket import IPPROTO_TCP

from flowexp.kernel.groups import group_names

from .figures import US, Figure, minus
from .kernel import FRAMES, Floor, Meter, Varied, floor, meter
from .netobserv import LEAVES as NETOBSERV_LEAVES
from .netobserv import NAME as NETOBSERV
from .netobserv import PROGRAMS as NETOBSERV_HOOKS
from .netobserv import netobserv

GROUP = "A packet's cost (BPF_PROG_TEST_RUN, less an empty program)"
UNIT = "ns"
HOOKS = {"TC ingress": "ingress_ethernet", "TC egress": "egress_ethernet", "XDP": "xdp_ethernet"}
DEFAULT_MAX_FLOWS = 262_144
OF_OTHER_PROGRAMS = ("drops",)
EXTRAS = "What is switched on adds to a hot IPv4 TCP packet (BPF_PROG_TEST_RUN, TC egress)"
EXTRAS_MAX_FLOWS = 16_384  # of each of their tables, which are there at once
FEW_AND_MANY = (1_000, 100_000)  # new flows: slots that are in the cache, and slots that are not


def measure(
    *, rounds: int, packets: int, crowds: tuple[int, ...] = (100_000, 1_000_000), agent: Path | None = None
) -> list[Figure]:
    """`packets` of each kind a round; `crowds`: numbers of flows that are hit at random; `agent`: see netobserv.py."""
    return [
        *_hot(rounds=rounds, packets=packets, agent=agent),
        *_extras(rounds=rounds, packets=packets),
        *(figure for flows in FEW_AND_MANY for figure in _new(flows, rounds=rounds)),
        *(figure for flows in crowds for figure in at_random(flows, rounds=rounds, packets=packets)),
    ]


def _hot(*, rounds: int, packets: int, agent: Path | None) -> list[Figure]:
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        ours, theirs = stack.enter_context(meter(DEFAULT_MAX_FLOWS)), stack.enter_context(floor())
        runs = {}
        for hook, program in HOOKS.items():
            kind = "xdp" if hook == "XDP" else "tc"
            runs["empty", hook], runs["floor", hook] = theirs.runs(f"empty_{kind}"), theirs.runs(f"floor_{kind}")
            runs[US, hook] = ours.runs(program)
        if agent is not None:
            other = stack.enter_context(netobserv(agent, max_flows=DEFAULT_MAX_FLOWS, layout=ours.layout))
            runs.update({(NETOBSERV, hook): other.runs(hook) for hook in NETOBSERV_HOOKS})
        for _ in range(rounds):
            for name, frame in FRAMES.items():
                for (subject, hook), run in runs.items():
                    values[subject, hook, name].append(run.timed(frame, packets))
    empty = {(hook, name): values["empty", hook, name] for hook in HOOKS for name in FRAMES}
    rows = ((subject, hook, name) for name in FRAMES for hook in HOOKS for subject in (US, "floor", NETOBSERV))
    return [
        Figure(GROUP, f"{name}, hot, {hook}", UNIT, subject, minus(values[subject, hook, name], empty[hook, name]))
        for subject, hook, name in rows
        if (subject, hook, name) in values and not (subject == NETOBSERV and name in NETOBSERV_LEAVES)
    ]


def _extras(*, rounds: int, packets: int) -> list[Figure]:
    """Each field group that the packet path counts for, and own packets known by their sockets (mark = 0)."""
    frame = FRAMES["IPv4 TCP"]
    with ExitStack() as stack:
        plain = stack.enter_context(meter(EXTRAS_MAX_FLOWS))
        extras = {
            f"group {name}": stack.enter_context(meter(EXTRAS_MAX_FLOWS, groups=[name]))
            for name in group_names(plain.layout)
            if name not in OF_OTHER_PROGRAMS
        }
        by_sockets = stack.enter_context(meter(EXTRAS_MAX_FLOWS, own_sockets=True))
        by_sockets.table.set_own_socket(0, IPPROTO_TCP, 4739, bytes([192, 0, 2, 1]), 4739)
        extras["[export] mark = 0"] = by_sockets
        runs = {name: each.runs(HOOKS["TC egress"]) for name, each in {"": plain, **extras}.items()}
        values: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                values[name].append(run.timed(frame, packets))
    return [Figure(EXTRAS, name, UNIT, US, minus(values[name], values[""])) for name in extras]


def _new(flows: int, *, rounds: int) -> list[Figure]:
    """Every packet makes a flow, in a table (and a hash) that is otherwise empty."""
    ours_ns, floor_ns, empty_ns = [], [], []
    with meter(DEFAULT_MAX_FLOWS) as ours:
        for _ in range(rounds):
            with floor() as theirs:
                empty_ns.append(theirs.varied("empty_varied").sequence(0, flows))
                floor_ns.append(theirs.varied("floor_varied").sequence(0, flows))
            ours_ns.append(ours.varied.sequence(0, flows))
            ours.empty()
    what = f"a new flow each packet, {flows:,} of them"
    return [
        Figure(GROUP, what, UNIT, US, minus(ours_ns, empty_ns)),
        Figure(GROUP, what, UNIT, "floor", minus(floor_ns, empty_ns)),
    ]


def at_random(flows: int, *, rounds: int, packets: int) -> list[Figure]:
    """Packets of `flows` flows in random order, in a table for max(flows, the default)."""
    with meter(max(flows, DEFAULT_MAX_FLOWS)) as ours, floor() as theirs:
        return _at_random(ours, theirs, flows, rounds=rounds, packets=packets)


def _at_random(ours: Meter, theirs: Floor, flows: int, *, rounds: int, packets: int) -> list[Figure]:
    subjects: dict[str, Varied] = {
        "empty": theirs.varied("empty_varied"),
        "floor": theirs.varied("floor_varied"),
        US: ours.varied,
    }
    for subject in subjects.values():
        subject.sequence(0, flows)
    values: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            values[name].append(subject.random(flows, packets))
    what = f"IPv4 TCP, {flows:,} flows at random"
    return [Figure(GROUP, what, UNIT, name, minus(values[name], values["empty"])) for name in (US, "floor")]
