# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP of the machine's own stack, between two namespaces, with the sender's own word on what went over the wire.

Segments are always OutSegs + RetransSegs of the sender's namespace, which must send nothing else.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from .netns import Namespace
from .wait import wait_for

TIME_WAIT, LISTEN = "06", "0A"
IP_HEADER = {4: 20, 6: 40}
TCP_HEADER = 32  # with timestamps, and without what only a receiver has to say (SACK)
SYN_OCTETS_MORE = 8  # maximum segment size, window scale and SACK permitted, padded
CHUNK = bytes(1 << 20)
TCP_INFO_SIZE, TCP_INFO_BYTES_SENT = 232, 200  # struct tcp_info: payload octets, those sent again included


class Sent(NamedTuple):
    """What the sender says it sent: TCP segments and their IP octets, and in how many packets of how many octets
    on average its stack handed them to the device."""

    segments: int
    octets: int
    ip_packets: int
    ip_packet_octets: float


class Books(NamedTuple):
    """The counters of one namespace and IP version."""

    segments: int
    ip_packets: int
    ip_octets: int

    def since(self, before: Books) -> Books:
        return Books(*(now - then for now, then in zip(self, before)))


def books(namespace: Namespace, ip_version: int) -> Books:
    """The books as they are now; `segments` is OutSegs + RetransSegs, of both IP versions together."""
    figures = _columns(namespace.read_proc_net("snmp")) | _columns(namespace.read_proc_net("netstat"))
    figures |= dict(line.split() for line in namespace.read_proc_net("snmp6").splitlines())
    packets, octets = {4: ("Ip.OutRequests", "IpExt.OutOctets"), 6: ("Ip6OutRequests", "Ip6OutOctets")}[ip_version]
    segments = int(figures["Tcp.OutSegs"]) + int(figures["Tcp.RetransSegs"])
    return Books(segments, int(figures[packets]), int(figures[octets]))


def _columns(text: str) -> dict[str, str]:
    """/proc/net/snmp and its like: a line of names, a line of values, each beginning with the protocol."""
    lines = text.splitlines()
    return {
        f"{names.split(':')[0]}.{name}": value
        for names, values in zip(lines[::2], lines[1::2])
        for name, value in zip(names.split()[1:], values.split()[1:])
    }


def _ip_version(address: str) -> int:
    return 6 if ":" in address else 4


def iperf3(client: Namespace, server: Namespace, directory: Path, *, to: str, octets: str) -> Sent:
    """One run of iperf3 from client to server, done when both ends have ended; `octets` in iperf3's words.

    IP octets are IP's own count, and for each segment beyond the first of a super-packet its headers again:
    only data come in super-packets, and these have timestamps and no other option.
    """
    version = _ip_version(to)
    before = books(client, version)
    with contextlib.ExitStack() as stack:
        listener = server.start("iperf3", "--server", "--one-off", directory=directory, name="iperf3-server")
        stack.callback(listener.kill)
        wait_for("iperf3 to listen", lambda: listener.is_alive() and _states(server) == {LISTEN})
        client.run("iperf3", "--client", to, "--bytes", octets, "--length", "512K", timeout_s=60)
        listener.wait()
    _wait_until_closed(client, server)
    sent = books(client, version).since(before)
    repeated = (sent.segments - sent.ip_packets) * (IP_HEADER[version] + TCP_HEADER)
    return Sent(sent.segments, sent.ip_octets + repeated, sent.ip_packets, sent.ip_octets / sent.ip_packets)


def stream(client: Namespace, server: Namespace, *, to: str, octets: int) -> Sent:
    """One connection that carries at least so much from client to server.

    IP octets are the socket's count of payload sent, and the headers of every segment: figures in which no
    super-packet occurs.
    """
    version = _ip_version(to)
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    before = books(client, version)
    with server.socket(family, socket.SOCK_STREAM) as listener, client.socket(family, socket.SOCK_STREAM) as sender:
        listener.bind((to, 0))
        listener.listen()
        sender.connect((to, listener.getsockname()[1]))
        reader = threading.Thread(target=_read_to_end, args=[listener.accept()[0]])
        reader.start()
        for _ in range(-(-octets // len(CHUNK))):
            sender.sendall(CHUNK)
        sender.shutdown(socket.SHUT_WR)
        reader.join()
        payload = _payload_octets_sent(sender)
    _wait_until_closed(client, server)
    sent = books(client, version).since(before)
    headers = sent.segments * (IP_HEADER[version] + TCP_HEADER) + SYN_OCTETS_MORE
    return Sent(sent.segments, headers + payload, sent.ip_packets, sent.ip_octets / sent.ip_packets)


def _read_to_end(connection: socket.socket) -> None:
    with connection:
        while connection.recv(len(CHUNK)):
            pass


def _payload_octets_sent(sender: socket.socket) -> int:
    info = sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    return int.from_bytes(info[TCP_INFO_BYTES_SENT : TCP_INFO_BYTES_SENT + 8], sys.byteorder)


def _states(namespace: Namespace) -> set[str]:
    """The states of all TCP sockets of a namespace, as /proc/net/tcp has them."""
    tables = [namespace.read_proc_net(name) for name in ("tcp", "tcp6")]
    return {line.split()[3] for table in tables for line in table.splitlines()[1:]}


def _wait_until_closed(*namespaces: Namespace) -> None:
    """The last segment has been sent once no socket waits for anything but time."""
    for namespace in namespaces:
        wait_for(f"TCP in {namespace.name} to close", lambda: _states(namespace) <= {TIME_WAIT})  # noqa: B023
