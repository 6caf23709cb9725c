# SPDX-License-Identifier: GPL-2.0-or-later
"""The network devices of this namespace, and tc filters on them. The only importer of pyroute2."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import ipaddress
import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Dict, Iterable, Iterator, List, NamedTuple, Tuple

from ..errors import FlowexpError, UsageError
from . import default_routes

if TYPE_CHECKING:
    from pyroute2 import IPRoute

DEFAULT_ROUTE = "default route"
_GLOB = set("*?[")
_NOWHERE = "0.0.0.0"

# ARPHRD_* of devices whose frames start with an Ethernet header, and of those that start with IP.
_LOOPBACK = 772
_WITH_ETHERNET = {1: "Ethernet", _LOOPBACK: "loopback"}
_WITHOUT_LINK = {
    512: "PPP",
    519: "raw IP",
    65534: "none",
    768: "IPIP",
    769: "IP6 tunnel",
    776: "SIT",
    778: "GRE",
}

# Our filters' own place: nobody else's is looked at or touched. Their handles are those of owners.py.
PRIORITY, _NAME = 4739, "flowexp"
_PARENT = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_CLSACT = 0xFFFFFFF1
_ETH_P_ALL = 0x0003

_TRIES = 10  # for a list during which nothing changes


@dataclass(frozen=True)
class Interface:
    """A network device.

    `link_type` is ARPHRD_*; `kind` is what made it (veth, tun, vlan, ...), if anything did; `master` the ifindex of
    the bridge, bond or VRF that it is in, else 0; `link` that of a VLAN's parent or a veth's other end, 0
    where there is none in this namespace; `vrf_table` a VRF's routing table, else 0; `xdp_programs` their ids;
    `is_multipoint` is of GRE to no single remote end.
    """

    name: str
    ifindex: int
    link_type: int
    is_up: bool
    kind: str
    alias: str = ""
    master: int = 0
    link: int = 0
    vrf_table: int = 0
    xdp_programs: Tuple[int, ...] = ()
    is_multipoint: bool = False

    @property
    def is_loopback(self) -> bool:
        return self.link_type == _LOOPBACK

    @property
    def has_ethernet(self) -> bool:
        """Whether its frames start with an Ethernet header; FlowexpError where that is not known."""
        if self.link_type in _WITH_ETHERNET:
            return True
        if self.is_multipoint:  # for whom the outer header is the link's
            raise FlowexpError(
                f"{self.name}: GRE without a remote end hands out packets with their outer header; leave it out, and"
                ' meter the interface beneath, with field group "tunnels"'
            )
        if self.link_type in _WITHOUT_LINK:
            return False
        raise FlowexpError(
            f"{self.name}: link type {self.link_type} (ARPHRD) is not supported; leave this interface out"
        )


@contextlib.contextmanager
def _rtnl() -> Iterator[IPRoute]:
    """A socket for requests; what they are refused with inside is an OSError."""
    # As it is imported it warns that queues' rates cannot be told without /proc/net/psched, which the service is not
    # shown (ProcSubset=pid) and we do not need.
    logging.getLogger("pyroute2.netlink").setLevel(logging.ERROR)
    from pyroute2 import IPRoute  # here, as it takes longer than all else that most commands import
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as netlink:
        try:
            yield netlink
        except NetlinkError as error:
            raise OSError(error.code, str(error)) from error


def _list(get: str, *arguments: Any, **others: Any) -> List[Any]:
    """What the kernel lists, asked for by IPRoute's name for that. Older pyroute2 refuses a list during which something
    has changed: then it is asked for again. FlowexpError where it changes all the time."""
    with _rtnl() as netlink:
        from pyroute2.netlink.exceptions import NetlinkDumpInterrupted  # in here: _rtnl() keeps the import silent

        for _ in range(_TRIES):
            with contextlib.suppress(NetlinkDumpInterrupted):
                return list(getattr(netlink, get)(*arguments, **others))
    raise FlowexpError("network devices come and go faster than the kernel can list them; try again")


def interfaces() -> List[Interface]:
    """All devices of this network namespace, by ifindex."""
    links = _list("get_links")
    return sorted(map(_interface, links), key=lambda found: found.ifindex)


def _interface(link: Any) -> Interface:
    about = link.get_attr("IFLA_LINKINFO")
    kind = str(about.get_attr("IFLA_INFO_KIND") or "") if about else ""
    details = about.get_attr("IFLA_INFO_DATA") if kind in ("vrf", "gre") else None
    remote = str(details.get_attr("IFLA_GRE_REMOTE") or _NOWHERE) if kind == "gre" and details else ""
    return Interface(
        name=str(link.get_attr("IFLA_IFNAME")),
        ifindex=int(link["index"]),
        link_type=int(link["ifi_type"]),
        is_up=bool(link["flags"] & 1),
        kind=kind,
        alias=str(link.get_attr("IFLA_IFALIAS") or ""),
        master=int(link.get_attr("IFLA_MASTER") or 0),
        link=int(link.get_attr("IFLA_LINK") or 0) if link.get_attr("IFLA_LINK_NETNSID") is None else 0,
        xdp_programs=_xdp_programs(link),
        vrf_table=int(details.get_attr("IFLA_VRF_TABLE") or 0) if kind == "vrf" and details else 0,
        is_multipoint=bool(remote) and (remote == _NOWHERE or ipaddress.ip_address(remote).is_multicast),
    )


def _xdp_programs(link: Any) -> Tuple[int, ...]:
    about = link.get_attr("IFLA_XDP")
    kinds = ("SKB", "DRV", "HW")
    ids = [about.get_attr(f"IFLA_XDP_{kind}_PROG_ID") for kind in kinds] if about else []
    return tuple(int(each) for each in ids if each)


def resolve(patterns: Iterable[str]) -> List[Interface]:
    """The devices that names, globs and "default route" stand for; a pattern may match none."""
    present = interfaces()
    routed = default_routes.interfaces() if DEFAULT_ROUTE in patterns else set()
    return [
        found
        for found in present
        if found.ifindex in routed or any(fnmatch.fnmatchcase(found.name, pattern) for pattern in patterns)
    ]


def first_of(patterns: Iterable[Tuple[str, int]]) -> Dict[int, int]:
    """By ifindex, what belongs to the first pattern (as in resolve) that stands for the device."""
    found: Dict[int, int] = {}
    for pattern, value in patterns:
        for each in resolve((pattern,)):
            found.setdefault(each.ifindex, value)
    return found


def resolve_at_start(patterns: Iterable[str]) -> List[Interface]:
    """As resolve, but a name that no device has is a UsageError: it is a mistake, mostly."""
    names = {found.name for found in interfaces()}
    for pattern in patterns:
        if pattern != DEFAULT_ROUTE and not _GLOB & set(pattern) and pattern not in names:
            there_are = ", ".join(sorted(names))
            raise UsageError(f"interface {pattern}: there is no such device here; there are: {there_are}")
    return resolve(patterns)


def rules_with_marks() -> List[int]:
    """The priorities of the routing rules (`ip rule`) that ask for a packet's mark."""
    rules = [rule for family in (socket.AF_INET, socket.AF_INET6) for rule in _list("get_rules", family=family)]
    return sorted({int(rule.get_attr("FRA_PRIORITY") or 0) for rule in rules if rule.get_attr("FRA_FWMARK")})


class Packets(NamedTuple):
    """What a device has counted since it was made: its own figures, which `ip -s link` shows, too."""

    received: int
    sent: int


def packets() -> Dict[str, Packets]:
    """The packet counters of every device by its name; cheap, for it is one file of this thread's namespace."""
    lines = Path("/proc/thread-self/net/dev").read_text(encoding="utf-8").splitlines()[2:]
    named = (line.rpartition(":") for line in lines)  # a name may contain a colon
    return {name.strip(): Packets(int(counts.split()[1]), int(counts.split()[9])) for name, _, counts in named}


class LinkWatch:
    """Tells when devices or default routes have come, gone or changed. A descriptor to poll, emptied by changed()."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._socket.bind((0, 1))  # RTMGRP_LINK
        default_routes.hear_of_changes(self._socket)

    def fileno(self) -> int:
        return self._socket.fileno()

    def changed(self) -> bool:
        """Whether anything was told since the last call. An overrun (ENOBUFS) counts as a change."""
        heard = False
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return heard
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            heard = True

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> LinkWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_clsact(ifindex: int) -> bool:
    """Gives a device the qdisc for filters; False where it has it. FlowexpError where another one is in its place."""
    try:
        with _rtnl() as netlink:
            netlink.tc("add", "clsact", ifindex)
            return True
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    qdiscs = _list("get_qdiscs", ifindex)
    kinds = {qdisc.get_attr("TCA_KIND") for qdisc in qdiscs if qdisc["parent"] == _CLSACT}
    if "clsact" not in kinds:
        raise FlowexpError(f"ifindex {ifindex}: an ingress qdisc is in the place of clsact; replace it with clsact")
    return False


def remove_clsact(ifindex: int) -> None:
    """Takes the qdisc away that make_clsact made. A device that is gone is no error."""
    with contextlib.suppress(OSError), _rtnl() as netlink:
        netlink.tc("del", "clsact", ifindex)


class Filter(NamedTuple):
    """A filter on clsact or ingress; `name` is its kind, with the program's name if it has one."""

    priority: int
    handle: int
    name: str

    @property
    def is_ours(self) -> bool:
        """An exporter's, this one's or another's."""
        return (self.priority, self.name) == (PRIORITY, f"bpf {_NAME}")


def filters(ifindex: int, direction: str) -> List[Filter]:
    """Everybody's filters in the order in which packets meet them; none where there is no qdisc for them."""
    found = []
    with _unless_absent():
        for each in _list("get_filters", ifindex, parent=_PARENT[direction]):
            if not each["handle"]:  # stands for all of its kind and priority, which follow
                continue
            kind, options = str(each.get_attr("TCA_KIND")), each.get_attr("TCA_OPTIONS")
            program = options.get_attr("TCA_BPF_NAME") if kind == "bpf" and options else None
            name = f"{kind} {program}" if program else kind
            found.append(Filter(each["info"] >> 16, int(each["handle"]), name))
    return sorted(found, key=lambda each: each.priority)


def add_filter(ifindex: int, direction: str, handle: int, program_fd: int) -> None:
    """A program as a direct-action filter on clsact, replacing an older one of that handle. OSError if refused."""
    with _rtnl() as netlink:
        netlink.tc(
            "replace-filter", "bpf", ifindex, handle=handle, fd=program_fd, name=_NAME,
            parent=_PARENT[direction], prio=PRIORITY, protocol=_ETH_P_ALL, direct_action=True,
        )  # fmt: skip


def has_filter(ifindex: int, direction: str, handle: int) -> bool:
    """Whether our filter of that handle is there."""
    return any(each.is_ours and each.handle == handle for each in filters(ifindex, direction))


def remove_filters(handle: int, others: Collection[int]) -> None:
    """Takes our filters of that handle away from every device, and those of the others that are found there.

    PermissionError where that is not permitted, whether there is one or not.
    """
    for interface in interfaces():
        for direction in _PARENT:
            found = [each.handle for each in filters(interface.ifindex, direction) if each.is_ours]
            for each in {handle, *others}.intersection({handle, *found}):
                remove_filter(interface.ifindex, direction, each)


def remove_filter(ifindex: int, direction: str, handle: int) -> None:
    """Takes our filter of that handle away. A device or a filter that is gone is no error."""
    with _unless_absent(), _rtnl() as netlink:
        netlink.tc(
            "del-filter", "bpf", ifindex, handle=handle, parent=_PARENT[direction], prio=PRIORITY,
            protocol=_ETH_P_ALL,
        )  # fmt: skip


@contextlib.contextmanager
def _unless_absent() -> Iterator[None]:
    """Passes over what is refused because the device, its clsact or the filter is not there."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            raise
