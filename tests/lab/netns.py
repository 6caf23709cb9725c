# SPDX-License-Identifier: GPL-2.0-or-later
"""Network namespaces and the links between them: silent unless a test speaks, and gone when it ends.

Commands enter with `nsenter --net`, never with `ip netns exec`: that one mounts a /sys of its own, in which
pins in bpffs vanish. Neighbours are static, and IPv6 is off unless asked for, so that counts can be exact.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .process import SESSION, CommandFailed, Process, run
from .wait import wait_for

PREFIX = f"fxt-{SESSION}-"
RUN_NETNS = Path("/run/netns")
CLONE_NEWNET = 0x40000000
RTM_NEWLINK, NLM_F_REQUEST, NLM_F_ACK = 16, 1, 4
BIG_TCP_ATTRIBUTES = (
    41,
    58,
    63,
    64,
)  # IFLA_GSO_MAX_SIZE, _GRO_MAX_SIZE, _GSO_IPV4_MAX_SIZE, _GRO_IPV4_MAX_SIZE
TCX_ATTACH_TYPES = {"ingress": 46, "egress": 47}

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)

left_attached: list[str] = []
"""What was still attached to a link when its namespace was removed; the session fails if there is any."""


class Namespace:
    """One network namespace, by its name under /run/netns."""

    def __init__(self, label: str, *, ipv6: bool) -> None:
        self.name = f"{PREFIX}{next(_numbers)}-{label}"
        run(["ip", "netns", "add", self.name])
        self._quieten(ipv6=ipv6)
        self.ip("link", "set", "lo", "up")

    @property
    def path(self) -> Path:
        return RUN_NETNS / self.name

    def _quieten(self, *, ipv6: bool) -> None:
        for key in ("accept_dad", "dad_transmits", "router_solicitations", "accept_ra", "autoconf"):
            self.sysctl(f"net.ipv6.conf.default.{key}", 0)
        self.sysctl("net.ipv6.conf.default.addr_gen_mode", 1)
        self.sysctl("net.ipv6.conf.default.disable_ipv6", int(not ipv6))
        for scope in ("all", "default"):
            self.sysctl(f"net.ipv4.conf.{scope}.rp_filter", 0)

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        """`command` as it has to be run from outside to run inside."""
        return ["nsenter", f"--net={self.path}", *(str(word) for word in command)]

    def run(self, *command: str | Path, timeout_s: float = 60.0, stdin: str = "") -> str:
        """Standard output of a command run inside, which must succeed."""
        return run(self.inside(command), timeout_s=timeout_s, stdin=stdin)

    def start(self, *command: str | Path, directory: Path, name: str) -> Process:
        """A process inside, in the background."""
        return Process(self.inside(command), directory=directory, name=name)

    def ip(self, *words: str) -> str:
        return run(["ip", "-n", self.name, *words])

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is inside; sockets and /proc/net files opened now stay there."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._switch_to(self.path)
            yield
        finally:
            self._switch_to(Path(f"/proc/self/fd/{home}"))
            os.close(home)

    @staticmethod
    def _switch_to(path: Path) -> None:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(target, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        finally:
            os.close(target)

    def sysctl(self, key: str, value: int | str) -> None:
        with self.entered():
            Path("/proc/sys", *key.split(".")).write_text(f"{value}\n")

    def read_proc_net(self, name: str) -> str:
        """/proc/net/`name` as seen inside."""
        with self.entered():
            return Path("/proc/thread-self/net", name).read_text()

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM, protocol: int = 0) -> socket.socket:
        """A socket that lives inside, whoever uses it."""
        with self.entered():
            return socket.socket(family, kind, protocol)

    def free_udp_port(self, address: str = "127.0.0.1") -> int:
        """A UDP port of `address` that nobody had a moment ago."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.socket(family) as probe:
            probe.bind((address, 0))
            return int(probe.getsockname()[1])

    def link_names(self) -> list[str]:
        return [str(link["ifname"]) for link in json.loads(self.ip("-j", "link", "show"))]

    def inspect(self) -> None:
        """Notes in `left_attached` what is attached to the links."""
        for name in self.link_names():
            left_attached.extend(f"{self.name}: {what}" for what in attached(Link(self, name)))

    def remove(self) -> None:
        """Removes the namespace and all links in it."""
        run(["ip", "netns", "del", self.name])


@dataclass(frozen=True)
class Link:
    """One network interface inside a namespace."""

    namespace: Namespace
    name: str

    def _show(self, *options: str) -> dict[str, object]:
        shown: dict[str, object] = json.loads(self.namespace.ip("-j", *options, "link", "show", "dev", self.name))[0]
        return shown

    @property
    def ifindex(self) -> int:
        return int(str(self._show()["ifindex"]))

    @property
    def mac(self) -> str:
        return str(self._show()["address"])

    def set(self, *words: str) -> None:
        self.namespace.ip("link", "set", "dev", self.name, *words)

    def add_address(self, address: str) -> None:
        """`address` with its prefix length, of either family."""
        options = ["nodad"] if ":" in address else []
        self.namespace.ip("address", "add", address, "dev", self.name, *options)

    def add_neighbour(self, address: str, mac: str) -> None:
        self.namespace.ip("neighbour", "replace", address, "lladdr", mac, "dev", self.name, "nud", "permanent")

    def set_offloads(self, **features: bool) -> None:
        """ethtool's short names, such as tso, gso, gro, tx, rxvlan."""
        words = [word for name, on in features.items() for word in (name, "on" if on else "off")]
        self.namespace.run("ethtool", "-K", self.name, *words)

    def add_filter(self, direction: str, *, priority: int) -> None:
        """Somebody's classic filter, `filter bpf (pref N)`, which lets everything pass; it goes with the qdisc."""
        passes = ("bpf", "bytecode", "1,6 0 0 0", "classid", "1:1")
        words = ("tc", "filter", "add", "dev", self.name, direction, "pref", str(priority), *passes)
        self.namespace.run("tc", "qdisc", "replace", "dev", self.name, "clsact")
        self.namespace.run(*words)

    def remove_filters(self) -> None:
        self.namespace.run("tc", "qdisc", "del", "dev", self.name, "clsact")

    def set_big_tcp(self, octets: int) -> None:
        """The largest super-packet to send and to merge, of both IP versions (iproute2 6.1 lacks IPv4's).

        A kernel that does not know an attribute ignores it; OSError where it refuses one.
        """
        attributes = b"".join(struct.pack("=HHI", 8, kind, octets) for kind in BIG_TCP_ATTRIBUTES)
        body = struct.pack("=BxHiII", 0, 0, self.ifindex, 0, 0) + attributes
        request = struct.pack("=IHHII", 16 + len(body), RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body
        with self.namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
            netlink.send(request)
            (error,) = struct.unpack_from("=i", netlink.recv(4096), 16)
        if error:
            raise OSError(-error, os.strerror(-error), self.name)

    def can_send(self) -> bool:
        """False while the kernel's link watch has not yet come to it: until then what is sent is dropped unsaid."""
        shown = self._show()
        return shown["operstate"] == "UP" and shown["qdisc"] != "noop"

    def counters(self) -> dict[str, int]:
        """The link's own figures (`ip -s link`), as rx_packets, tx_dropped and so on: skbs, not segments."""
        statistics = self._show("-s")["stats64"]
        assert isinstance(statistics, dict)
        return {f"{way}_{what}": int(n) for way in ("rx", "tx") for what, n in statistics[way].items()}


@contextmanager
def namespaces(*labels: str, ipv6: bool = False) -> Iterator[tuple[Namespace, ...]]:
    """As many namespaces as there are labels, inspected and then removed at the end, come what may."""
    made = []
    with ExitStack() as removals, ExitStack() as inspections:
        for label in labels:
            made.append(Namespace(label, ipv6=ipv6))
            removals.callback(made[-1].remove)
            inspections.callback(made[-1].inspect)
        yield tuple(made)


def veth(left: Namespace, right: Namespace, *, names: tuple[str, str] = ("eth0", "eth0")) -> tuple[Link, Link]:
    """A veth pair between two namespaces, both ends up and able to send."""
    left.ip("link", "add", names[0], "type", "veth", "peer", "name", names[1], "netns", right.name)
    return bring_up(Link(left, names[0]), Link(right, names[1]))


def bring_up(left: Link, right: Link) -> tuple[Link, Link]:
    """Both ends of a veth pair, up and able to send."""
    for end in (left, right):
        end.set("up")
    for end in (left, right):
        wait_for(f"{end.name} in {end.namespace.name} to be able to send", end.can_send)
    return left, right


def connect(left: Link, right: Link, *networks: tuple[str, str]) -> None:
    """Gives both ends their addresses (`a/len`, `b/len`), and each the other as a static neighbour."""
    for ours, theirs in networks:
        left.add_address(ours)
        right.add_address(theirs)
        left.add_neighbour(theirs.split("/")[0], right.mac)
        right.add_neighbour(ours.split("/")[0], left.mac)


def masquerade(namespace: Namespace, out: str) -> None:
    """Hides the sources of all IPv4 packets that leave through the link `out` behind its address."""
    namespace.run(
        "nft",
        "add table ip nat; "
        "add chain ip nat postrouting { type nat hook postrouting priority 100; }; "
        f"add rule ip nat postrouting oifname {out} masquerade",
    )


def tcx_programs(link: Link, direction: str) -> int:
    """How many programs are attached through TCX; 0 where the kernel has no TCX."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    attach_flags, count = ctypes.c_uint32(), ctypes.c_uint32(64)
    ids = (ctypes.c_uint32 * 64)()
    with link.namespace.entered():
        ifindex = socket.if_nametoindex(link.name)
        answer = libbpf.bpf_prog_query(
            ifindex, TCX_ATTACH_TYPES[direction], 0, ctypes.byref(attach_flags), ids, ctypes.byref(count)
        )
    return count.value if answer == 0 else 0


def tc_filters(link: Link, direction: str) -> str:
    """The classic filters of one direction as tc shows them; empty when there are none."""
    try:
        return run(["tc", "-n", link.namespace.name, "filter", "show", "dev", link.name, direction]).strip()
    except CommandFailed:
        return ""


def attached(link: Link) -> list[str]:
    """Everything that looks at the link's packets: TCX programs, classic filters, XDP."""
    found = []
    for direction in TCX_ATTACH_TYPES:
        count = tcx_programs(link, direction)
        if count:
            found.append(f"{link.name} {direction}: {count} TCX program(s)")
        filters = tc_filters(link, direction)
        if filters:
            found.append(f"{link.name} {direction}: tc filter {filters.splitlines()[0]}")
    if "xdp" in link._show("-d"):
        found.append(f"{link.name}: XDP program")
    return found


def forgotten() -> list[str]:
    """Namespaces of this session that still exist."""
    if not RUN_NETNS.is_dir():
        return []
    return sorted(entry.name for entry in RUN_NETNS.iterdir() if entry.name.startswith(PREFIX))
