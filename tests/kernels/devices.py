# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks with devices whose modules the host may lack: VRF, and tunnels that the kernel itself makes packets of.

`ip` has the kernel load their modules; where there is none the check is Missing.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lab.netns import Link, Namespace, connect, namespaces, veth
from lab.process import CommandFailed, run
from lab.traffic import send_frames
from lab.wait import wait_for

from flowexp.kernel import netlink
from flowexp.kernel.flows import Columns
from flowexp.kernel.inquiry import attributes
from flowexp.kernel.joins import Join, joins_for
from flowexp.kernel.routes import Routes

from .meter import Meter, Missing, frame

VRF_TABLE = 10
Ends = tuple[Link, Link]
EACH_WAY = (20, 10)  # packets from the left and from the right


@contextmanager
def metered(meter: Meter, place: Namespace) -> Iterator[None]:
    """All of a namespace's veth devices; threads and sockets in there meanwhile."""
    with place.entered():
        attacher = meter.attacher()
        attacher.follow(netlink.resolve(["eth*"]))
        try:
            yield
        finally:
            attacher.detach_all()


def ip(place: Namespace, *commands: str) -> None:
    """Commands of `ip`, at one go: under emulation each process takes a while."""
    run(["ip", "-n", place.name, "-batch", "-"], stdin="\n".join(commands) + "\n")


def make(place: Namespace, *commands: str) -> None:
    """Likewise; a kernel that cannot make one of the links lacks its module, or what the module was asked for."""
    try:
        ip(place, *commands)
    except CommandFailed as error:
        said = str(error)  # ...: RTNETLINK answers: Invalid argument\nCommand failed -:1
        failed = commands[int(said.rsplit(":", 1)[1]) - 1]
        if not failed.startswith("link add"):
            raise
        raise Missing(f"`ip {failed}`: {said.splitlines()[0].rsplit(': ', 1)[1]}") from error


def vrf(meter: Meter) -> str:
    """eth0 and eth1 are in the VRF, eth2 is in none; one route leads from either side to the other.

    Main table and VRF route the same addresses, by prefixes of different lengths.
    """
    with namespaces("around", "router", ipv6=True) as (around, router):
        make(router, f"link add red type vrf table {VRF_TABLE}", "link set red up")
        router.sysctl("net.ipv4.ip_forward", 1)
        names = ("eth0", "eth1", "eth2")
        links = [(Link(around, name), Link(router, name)) for name in names]
        ends = [(f"02:00:00:00:0{number}:01", f"02:00:00:00:0{number}:09") for number in (1, 2, 3)]
        for number, (name, (far, near)) in enumerate(zip(names, ends), 1):
            ip(
                router,
                f"link add name {name} address {near} type veth peer name {name} address {far} netns {around.name}",
                *([f"link set {name} master red"] if name != "eth2" else []),
                f"link set {name} up",
                f"address add 10.{number}.0.9/24 dev {name}",
                f"neighbour add 10.{number}.0.1 lladdr {far} dev {name}",
            )
        ip(around, *(f"link set {name} up" for name in names))
        for far_link, _ in links:
            wait_for(f"{far_link.name} to be able to send", far_link.can_send)
        ip(
            router,
            "route add 10.9.0.0/20 via 10.3.0.1 dev eth2 onlink",
            "route add 10.7.0.0/18 via 10.2.0.1 dev eth1 onlink",
            "route add 10.1.0.0/28 dev eth2",
            f"route add 10.9.0.0/16 via 10.2.0.1 dev eth1 table {VRF_TABLE}",
            f"route add 10.8.0.0/21 via 10.3.0.1 dev eth2 onlink table {VRF_TABLE}",
        )
        flows = [  # comes in by, destination, goes out by, VRFs, lengths of prefixes
            (0, "10.9.0.5", 1, (VRF_TABLE, VRF_TABLE), (24, 16)),
            (0, "10.8.0.5", 2, (VRF_TABLE, 0), (24, 21)),
            (2, "10.7.0.5", 1, (0, VRF_TABLE), (28, 18)),
        ]
        with metered(meter, router):
            for way_in, destination, *_ in flows:
                send_frames(links[way_in][0], [frame(*links[way_in], destination)] * 20)
            wait_for("60 packets", lambda: meter.in_table()[0] >= 60, timeout_s=60)
        with router.entered():
            indices = [socket.if_nametoindex(name) for name in names]
        expected = [
            (destination, indices[way_in], indices[way_out], f"10.{way_out + 1}.0.1", 20, *vrfs, *lengths)
            for way_in, destination, way_out, vrfs, lengths in flows
        ]
        with router.entered():
            (join,) = joins_for(["routing"])
            (columns,) = map(join, meter.drain())
            assert (found := _routed(columns)) == sorted(expected), str(found)
            _redirected_alike(columns)
            ip(  # not before: an address of IPv6 is announced to multicast routers
                router,
                "address add fd01::9/64 dev eth0 nodad",
                f"route add fd09::/32 dev eth1 table {VRF_TABLE}",
                "route add fd09::/24 dev eth2",
            )
            assert _lengths6(join, "fd01::1", "fd09::5", indices) == [(64, 32), (64, 32), (0, 24)]
            router.ip("link", "set", "eth0", "nomaster")
            assert {row[5] for row in _routed(join(columns))} == {0}
    return "3 flows of 20 packets, in, between and out of it"


def _routed(columns: Columns) -> list[tuple[object, ...]]:
    names = ("ingress_ifindex", "egress_ifindex", "next_hop", "packets", "ingress_vrf", "egress_vrf",
             "src_prefix_length", "dst_prefix_length")  # fmt: skip
    rows = zip(_addresses(columns["dst_addr"]), *(columns[name].tolist() for name in names))
    return sorted((row[0], *row[1:3], str(ipaddress.ip_address(bytes(row[3]))), *row[4:]) for row in rows)


def _addresses(octets: np.ndarray) -> list[str]:
    return [str(ipaddress.ip_address(row.tobytes())) for row in octets]


def _lengths6(join: Join, source: str, destination: str, ifindexes: list[int]) -> list[tuple[int, int]]:
    """Of the IPv6 prefixes that packets would be routed by which came in there."""
    addresses = {"src_addr": source, "dst_addr": destination}
    columns = {
        name: np.frombuffer(socket.inet_pton(socket.AF_INET6, address) * len(ifindexes), np.uint8).reshape(-1, 16)
        for name, address in addresses.items()
    }
    ifindex = np.array(ifindexes, np.uint32)
    joined = join({**columns, "ingress_ifindex": ifindex, "egress_ifindex": np.zeros_like(ifindex)})
    return list(zip(joined["src_prefix_length"].tolist(), joined["dst_prefix_length"].tolist()))


def _redirected_alike(columns: Columns) -> None:
    """Where routes lead what has been translated is where they led the packets, which were not."""
    routes = Routes()
    found, egress, next_hop = routes.onward(columns["src_addr"], columns["dst_addr"], columns["ingress_ifindex"])
    routes.close()
    assert found.all() and (egress == columns["egress_ifindex"]).all(), (found, egress)
    assert (next_hop == columns["next_hop"]).all(), next_hop


class Device(NamedTuple):
    """A kind of tunnel device, what `ip` is told of it at one end, and what flows in it have to tell."""

    name: str
    options: str
    kind: int  # enum tunnel_kind
    id: int = 0
    inner: int = 4


DEVICES = (
    Device("VXLAN", "vxlan id 5001 local {us} remote {them} dstport 4789", 3, 5001),
    Device("GRE", "gre local {us} remote {them} key 12648430", 2, 12648430),
    Device("Geneve", "geneve id 77 remote {them}", 4, 77),
    Device("IPIP", "ipip local {us} remote {them}", 1),
    Device("SIT", "sit local {us} remote {them}", 1, inner=6),
)
TEID = 0xC0FFEE
GTP = Device("GTP-U", "gtp role {role}", 5, TEID)
ENDS, ROLES = ("192.0.2.1", "192.0.2.2"), ("ggsn", "sgsn")


@contextmanager
def underlay() -> Iterator[Ends]:
    """What the tunnels lead over."""
    # Else there would be a gre0, a sit0 and so on in each namespace, to be inspected one by one when it goes.
    Path("/proc/sys/net/core/fb_tunnels_only_for_init_net").write_text("1\n")
    with namespaces("left", "right", ipv6=True) as (left, right):
        ends = veth(left, right)
        connect(*ends, (f"{ENDS[0]}/24", f"{ENDS[1]}/24"))
        yield ends


def tunnels(meter: Meter, ends: Ends) -> str:
    with _made(DEVICES, ends):
        _exchange(meter, ends, DEVICES)
    return f"{', '.join(device.name for device in DEVICES)}: {sum(EACH_WAY)} packets of {sum(EACH_WAY)} each"


def gtp_tunnel(meter: Meter, ends: Ends) -> str:
    """The left end is the gateway, and knows the right one as a mobile station's."""
    with _made((GTP,), ends):
        station = _inner(GTP, 0)[1]
        for end, peer in zip(ends, ENDS[::-1]):
            _add_pdp_context(end.namespace, peer=peer, station=station)
        _exchange(meter, ends, (GTP,))
    return f"{sum(EACH_WAY)} packets of {sum(EACH_WAY)}"


def _inner(device: Device, number: int) -> tuple[str, str]:
    """Addresses inside: the left one, the right one."""
    return (f"10.8.{number}.1", f"10.8.{number}.2") if device.inner == 4 else (f"fd08:{number}::1", f"fd08:{number}::2")


@contextmanager
def _made(devices: tuple[Device, ...], ends: Ends) -> Iterator[None]:
    """t0, t1 and so on in both namespaces."""
    places = [end.namespace for end in ends]
    for end, place in enumerate(places):
        commands: list[str] = []
        for number, device in enumerate(devices):
            mac, their_mac = (f"02:00:00:00:{number:02x}:0{which}" for which in (end, 1 - end))
            inner, name = _inner(device, number), f"t{number}"
            options = device.options.format(us=ENDS[end], them=ENDS[1 - end], role=ROLES[end])
            has_ethernet = device.name in ("VXLAN", "Geneve")
            commands += [
                f"link add {name} {f'address {mac} ' if has_ethernet else ''}type {options}",
                f"link set {name} up",
                f"address add {inner[end]} peer {inner[1 - end]} dev {name}{' nodad' if device.inner == 6 else ''}",
                *([f"neighbour add {inner[1 - end]} lladdr {their_mac} dev {name}"] if has_ethernet else []),
            ]
        make(place, *commands)
    yield
    for place in places:
        ip(place, *(f"link del t{number}" for number in range(len(devices))))


def _add_pdp_context(place: Namespace, *, peer: str, station: str) -> None:
    """Over generic netlink, as no daemon does: GTP_CMD_NEWPDP of GTP version 1."""
    with place.entered():
        device = socket.if_nametoindex("t0")
    values = {1: device, 2: 1, 8: TEID, 9: TEID}  # GTPA_LINK, GTPA_VERSION, GTPA_I_TEI, GTPA_O_TEI
    addresses = {4: peer, 5: station}  # GTPA_PEER_ADDRESS, GTPA_MS_ADDRESS
    octets = {**{kind: struct.pack("=I", value) for kind, value in values.items()},
              **{kind: socket.inet_aton(address) for kind, address in addresses.items()}}  # fmt: skip
    with place.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as kernel:  # NETLINK_GENERIC

        def ask(kind: int, command: int, attributes: dict[int, bytes], flags: int) -> bytes:
            body = struct.pack("=BBxx", command, 1)
            for number, value in attributes.items():
                body += struct.pack("=HH", 4 + len(value), number) + value
            kernel.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body)
            return kernel.recv(65536)[16:]

        family = attributes(ask(16, 3, {2: b"gtp\0"}, 1)[4:])[1]  # CTRL_CMD_GETFAMILY
        (error,) = struct.unpack_from("=i", ask(struct.unpack("=H", family)[0], 0, octets, 5))
    assert error == 0, f"GTP_CMD_NEWPDP: {error}"


def _exchange(meter: Meter, ends: Ends, devices: tuple[Device, ...]) -> None:
    """Datagrams without payload, both ways; metered where they come into the right end, and where they leave it."""
    expected, packets = [], sum(EACH_WAY) * len(devices)
    with ExitStack() as open_sockets, metered(meter, ends[1].namespace):
        for number, device in enumerate(devices):
            family = socket.AF_INET if device.inner == 4 else socket.AF_INET6
            octets = 28 if device.inner == 4 else 48
            inner, ports = _inner(device, number), (7000, 7001)
            sockets = [open_sockets.enter_context(end.namespace.socket(family)) for end in ends]
            for one, address, port in zip(sockets, inner, ports):
                one.bind((address, port))
            for end, count in enumerate(EACH_WAY):
                for _ in range(count):
                    sockets[end].sendto(b"", (inner[1 - end], ports[1 - end]))
                sockets[1 - end].settimeout(30)
                for _ in range(count):
                    sockets[1 - end].recv(1)
                expected.append((inner[end], inner[1 - end], ports[end], ports[1 - end], count, count * octets, end,
                                 device.kind, device.id, ENDS[end], ENDS[1 - end]))  # fmt: skip
    found = sorted(row for columns in meter.drain() for row in _tunnelled(columns))
    assert found == sorted(expected), f"{packets} packets: {found}"


def _tunnelled(columns: Columns) -> Iterator[tuple[object, ...]]:
    names = ("src_port", "dst_port", "packets", "octets", "direction", "tunnels_kind", "tunnels_id")
    inner = [_addresses(columns[f"{end}_addr"]) for end in ("src", "dst")]
    outer = [_addresses(columns[f"tunnels_{end}_addr"][:, :4]) for end in ("src", "dst")]
    yield from zip(*inner, *(columns[name].tolist() for name in names), *outer)
