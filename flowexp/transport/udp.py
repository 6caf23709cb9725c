# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages over UDP (RFC 7011 section 10.3): one connected socket to one Collector.

The rule: a Message either went to the kernel once or did not, and `send` knows which. Nothing is fragmented,
nothing blocks for long (the pace apart), nothing here ends the exporter.

How errors reach a connected UDP socket decides the code below:
- An ICMP error belongs to an EARLIER datagram, but is raised by the next system call, which then sends
  nothing. So the error that a `sendmsg` raises is believed only when it is raised again.
- IP_RECVERR makes the kernel report more: unreachable hosts too, and ENOBUFS when a local queue drops, which
  would be silent. ICMP errors are queued as well: `refused` and `unreachable` count what is in that queue.
- A path's MTU is learned by losing a datagram that is too big for it. So where a size has not been tried on a
  path, one Message goes ahead alone and the ICMP error is waited for: if it comes, that Message was not sent.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Callable, NamedTuple

from flowexp.transport.base import Batch, Counters, OwnSocket, QuietLog, Sent, own_socket, warnings_of
from flowexp.transport.pacer import BURST_MESSAGES, Pacer
from flowexp.transport.resolver import Address, Resolver

# linux/in.h, in6.h, udp.h, icmp's errqueue.h: the socket module of Python 3.9 does not have them.
IP_MTU_DISCOVER, IP_RECVERR, IP_MTU = 10, 11, 14
IPV6_MTU_DISCOVER, IPV6_MTU, IPV6_RECVERR = 23, 24, 25
PMTUDISC_DO = 2
SOL_UDP, UDP_SEGMENT = 17, 103
SEGMENT_OCTETS = struct.Struct("=H")
MSG_ERRQUEUE = 0x2000
EXTENDED_ERR = struct.Struct("=IBBBBII")
"""struct sock_extended_err: ee_errno, ee_origin, ee_type, ee_code, ee_pad, ee_info, ee_data."""
ERR_ORIGIN_LOCAL = 1

MAX_SEGMENTS = 64
"""Datagrams of one sendmsg: the limit of kernels before 6.9 (UDP_MAX_SEGMENTS)."""
MTU_OCTETS = 1500
"""Default for `mtu_octets`. A wider path (loopback: 65,536) is not used unless asked for: Collectors read
into buffers made for Ethernet, and the further path may be narrower than the first link says."""
MESSAGES_PER_S = 20_000
"""Default pace, some 290,000 records a second. An untuned receiver's buffer (212,992 octets, into which the kernel
counts its own overhead, too) holds 92 full Messages: at this pace enough while the Collector does not run for
4.6 ms. Measured with nfcapd on two cores that others keep busy, 5,627 Messages in three bursts: without a pace
4,848 are dropped, at 50,000 a second 132, at 20,000 none (2 to 4 if 32 go at once)."""
HURRIED_MESSAGES_PER_S, HURRIED_BURST_MESSAGES = 100_000, 64
"""The pace while the flow table overflows: some records that a Collector drops, which it sees by the Sequence
Numbers, for many packets that would not be metered at all. And so many at once, as each pause takes longer than
it has to."""
PATH_PROOF_S = 0.25
"""How long the first Message of a new size waits alone for an ICMP error: longer than most round trips."""
FIRST_PAUSE_S = 0.001
FULL_TRIES = 10
"""A full send buffer or queue is waited for in pauses that double, 1.023 s in all; then the batch failed."""
TRIES = 3
"""How often one piece may meet an error that can be another datagram's, before the error is believed."""
CALM_NS = 3 * 10**9
"""So long after the last ICMP error the Collector counts as back: hosts send one such error a second at most,
so silence means something only after that. Until then Templates go before every batch."""
REOPEN_PERIOD_NS = 5 * 10**9
"""After a failure a new socket is made, which may get another source address or route: at most this often."""

_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger(__name__)


class _Family(NamedTuple):
    """How one IP version spells its socket options, and its headers' size."""

    level: int
    mtu_discover: int
    recverr: int
    mtu: int
    traffic_class: int
    headers_octets: int
    least_mtu_octets: int
    """No path is believed to be narrower: IPv4 the kernel's min_pmtu, IPv6 RFC 8200 section 5."""


_FAMILIES = {
    socket.AF_INET: _Family(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_RECVERR, IP_MTU, socket.IP_TOS, 20 + 8, 552),
    socket.AF_INET6: _Family(
        socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_RECVERR, IPV6_MTU, socket.IPV6_TCLASS, 40 + 8, 1280
    ),
}


def stable_source_port(host: str, port: int) -> int:
    """The source port for a Collector when none is configured.

    It is the same after each start, so that the Collector takes it for the same Transport Session; and below
    Linux's ephemeral ports, so that nobody else is given it by chance.
    """
    return 16_384 + zlib.crc32(f"{host} {port}".encode()) % 16_384


class UdpTransport:
    """Sends Messages to the Collector at `host` (a name, IPv4 or IPv6 address, no brackets) and `port`.

    - mtu_octets: Messages are made for paths of at most this MTU, however wide the path is.
    - source_port: None for one derived from the Collector's address, 0 for any.
    - mark: SO_MARK of the datagrams, by which the meter leaves them out; 0 for none.
    - announce: told of each socket before anything is sent from it; None: nobody.
    - source_address: where they come from; "" for what the route says. dscp: their DSCP.
    - device: the interface or VRF that they leave by; "" for what the route says.
    - messages_per_s, burst_messages: the pace, 0 for none (class Pacer).
    - clock_ns, sleep, getaddrinfo: the world, for tests.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        mtu_octets: int = MTU_OCTETS,
        source_port: int | None = None,
        mark: int = 0,
        announce: Callable[[OwnSocket], None] | None = None,
        source_address: str = "",
        dscp: int = 0,
        device: str = "",
        messages_per_s: int = MESSAGES_PER_S,
        burst_messages: int = BURST_MESSAGES,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
        getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo,
    ) -> None:
        self.counters = Counters()
        self.marked = False
        """Whether the datagrams carry the mark."""
        self._name = f"udp://[{host}]:{port}" if ":" in host else f"udp://{host}:{port}"
        self._mtu_octets = mtu_octets
        self._source_port = stable_source_port(host, port) if source_port is None else source_port
        self._mark = mark
        self._announce = announce
        self._source_address, self._dscp, self._device = source_address, dscp, device
        self._clock_ns = clock_ns
        self._sleep = sleep
        self._pace = messages_per_s, burst_messages
        self._pacer = Pacer(
            messages_per_s=messages_per_s, burst_messages=burst_messages, clock_ns=clock_ns, sleep=sleep
        )
        self._resolver = Resolver(host, port, getaddrinfo, now_ns=clock_ns())
        self._warn = QuietLog(warnings_of(__name__), clock_ns=clock_ns)
        self._socket: socket.socket | None = None
        self._address: Address | None = None
        self._untried: list[Address] = []
        self._family = _FAMILIES[socket.AF_INET]
        self._opened_ns = 0
        self._reopen_wanted = False
        self._state = "closed"
        self._trouble = ""
        self._trouble_until_ns = clock_ns()
        self._segmenting = True
        self._templates_due = True
        self._fits_octets = 0
        """The largest Message by the kernel's word, when last asked."""
        self._proven_octets = 0
        """Messages up to this size have passed the path (or every path carries them)."""

    # ---- life cycle

    def open(self) -> None:
        """Look the name up and connect. What fails here is logged and tried again while sending."""
        self._resolver.look_up()
        self._untried = list(self._resolver.addresses)
        self._connect()

    def close(self) -> None:
        """Close the socket. Counters stay."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._state = "closed"

    def _connect(self) -> None:
        """Make a new socket, for the next address not tried; if that fails there is none afterwards."""
        self.close()
        self._opened_ns = self._clock_ns()
        self._reopen_wanted = False
        self._templates_due = True
        self._segmenting = True
        if self._untried:
            self._address = self._untried.pop(0)
        if self._address is None:
            self._lose("unresolved", f"the name cannot be resolved: {self._resolver.error}")
            return
        number, address = self._address
        self._family = _FAMILIES[socket.AddressFamily(number)]
        try:
            self._socket = socket.socket(number, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._set_options(self._socket)
            self._bind(self._socket)
            self._socket.connect(address)
            if self._announce is not None:
                self._announce(own_socket(self._socket, address))
        except OSError as error:
            self.close()
            self._lose("unreachable", f"cannot connect: {error.strerror}")
            return
        self._state = "up"
        self._proven_octets = self._unproven_limit(self._socket)
        self.max_message_octets()

    def _lose(self, state: str, why: str) -> None:
        """There is no way to the Collector at the moment."""
        self._state = state
        self._reopen_wanted = True
        self._warn(state, f"{self._name}: {why}; its records are lost meanwhile; trying every 5 s")

    def _set_options(self, sock: socket.socket) -> None:
        family = self._family
        sock.setblocking(False)
        sock.setsockopt(family.level, family.mtu_discover, PMTUDISC_DO)
        sock.setsockopt(family.level, family.recverr, 1)
        if family.level == socket.IPPROTO_IPV6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if self._dscp:
            sock.setsockopt(family.level, family.traffic_class, self._dscp << 2)
        if self._device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._device.encode())
        if not self._mark:
            return
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            self.marked = True
        except PermissionError:
            self._mark = 0  # said once is enough
            self._warn("mark", f"{self._name}: no CAP_NET_ADMIN for SO_MARK: own datagrams are metered too")

    def _bind(self, sock: socket.socket) -> None:
        try:
            sock.bind((self._source_address, self._source_port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            self._warn(
                "source port",
                f"{self._name}: source port {self._source_port}: {error.strerror}; sending from another one: "
                "to the Collector each start is a new Transport Session",
            )
            sock.bind((self._source_address, 0))

    def _unproven_limit(self, sock: socket.socket) -> int:
        """The Message size that needs no proof: to this host itself any, else what every path carries."""
        if sock.getsockname()[0] == sock.getpeername()[0]:
            return 65_535
        return self._family.least_mtu_octets - self._family.headers_octets

    # ---- use

    def max_message_octets(self) -> int:
        """What fits one datagram on the path as the kernel knows it now, and the configured MTU."""
        path_octets = self._mtu_octets
        if self._socket is not None:
            try:
                path_octets = self._socket.getsockopt(self._family.level, self._family.mtu)
            except OSError:  # ENOTCONN: the route has gone; the next send will tell
                return self._fits_octets or path_octets - self._family.headers_octets
        fits_octets = min(path_octets, self._mtu_octets, 65_535) - self._family.headers_octets
        if self._fits_octets not in (0, fits_octets):
            self.counters.mtu_changes += 1
            _log.info("%s: Messages of %d octets at most, was %d", self._name, fits_octets, self._fits_octets)
        self._fits_octets = fits_octets
        return fits_octets

    def take_templates_due(self) -> bool:
        """True after a connect and while errors come back: who returns gets Templates before data.

        Ask before each batch: what earlier ones have met is learned here, and failures are mended here.
        """
        self._collect_errors()
        self._reopen_if_due()
        due, self._templates_due = self._templates_due, False
        return due or self._in_trouble()

    def hurry(self, on: bool) -> None:
        """A quicker pace, or the usual one."""
        messages_per_s, burst_messages = self._pace
        if on and messages_per_s:
            messages_per_s = max(messages_per_s, HURRIED_MESSAGES_PER_S)
            burst_messages = max(burst_messages, HURRIED_BURST_MESSAGES)
        self._pacer.set_pace(messages_per_s, burst_messages)

    def announces(self, domain: int | None) -> None:
        """Announcements are datagrams as all others."""

    def send(self, batch: Batch) -> Sent:
        """Send equal Messages, many a system call, at the pace set. Raises nothing: what fails is counted."""
        sent = self._send_all(batch.octets, batch.message_octets, batch.count)
        self.counters.add(batch, sent)
        return sent

    def local_address(self) -> bytes:
        """What the route has chosen as source; none while there is no route."""
        if self._socket is None:
            return b""
        return socket.inet_pton(self._socket.family, self._socket.getsockname()[0].partition("%")[0])

    def status(self) -> dict[str, str | int]:
        """For `flowexp status`: where to; up, refused, unreachable, unresolved or closed; the counters."""
        state = self._trouble if self._state == "up" and self._in_trouble() else self._state
        return {"collector": self._name, "state": state, **asdict(self.counters)}

    def _in_trouble(self) -> bool:
        return self._clock_ns() < self._trouble_until_ns

    # ---- sending

    def _send_all(self, octets: memoryview, message_octets: int, count: int) -> Sent:
        self._collect_errors()
        if self._socket is None:
            return Sent(0)
        sent = tries = 0
        while sent < count:
            alone = message_octets > self._proven_octets
            messages = 1 if alone else self._pacer.take(min(count - sent, self._at_once(message_octets)))
            piece = octets[sent * message_octets : (sent + messages) * message_octets]
            error = self._send_piece(piece, message_octets)
            if error == 0 and alone:
                error = self._prove(message_octets)
            if error == 0:
                sent, tries = sent + messages, 0
                continue
            if error in (errno.EMSGSIZE, errno.EINVAL) and message_octets > self.max_message_octets():
                return Sent(sent, too_big=True)
            tries += 1
            if not self._try_again(error, tries, several=messages > 1):
                return Sent(sent)
        return Sent(sent)

    def _at_once(self, message_octets: int) -> int:
        """How many Messages one sendmsg carries: together they must fit one IP packet's length field."""
        if not self._segmenting:
            return 1
        return max(1, min(MAX_SEGMENTS, (65_535 - self._family.headers_octets) // message_octets))

    def _send_piece(self, piece: memoryview, message_octets: int) -> int:
        """One system call. Returns 0 or the errno; after an error nothing of the piece has been sent."""
        assert self._socket is not None
        try:
            if len(piece) > message_octets:
                self._socket.sendmsg([piece], [(SOL_UDP, UDP_SEGMENT, SEGMENT_OCTETS.pack(message_octets))])
            else:
                self._socket.send(piece)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _prove(self, message_octets: int) -> int:
        """A Message of this size went ahead alone: wait whether a router calls it too big. 0 or EMSGSIZE."""
        assert self._socket is not None
        poller = select.poll()
        poller.register(self._socket, 0)  # POLLERR is always reported
        poller.poll(PATH_PROOF_S * 1000)
        if errno.EMSGSIZE in self._collect_errors():
            return errno.EMSGSIZE
        self._proven_octets = message_octets
        return 0

    def _try_again(self, error: int, tries: int, *, several: bool) -> bool:
        """Deal with `error`, which a piece met `tries` times in a row: whether to go on."""
        if error in _FULL and tries <= FULL_TRIES:
            self._sleep(FIRST_PAUSE_S * 2 ** (tries - 1))
            return True
        if several and error in (errno.EIO, errno.EINVAL):
            self._segmenting = False
            self.counters.gso_fallbacks += 1
            self._warn("gso", f"{self._name}: UDP_SEGMENT: {os.strerror(error)}; sending singly from now on")
            return True
        self._collect_errors()
        if tries < TRIES:
            return True
        self._reopen_wanted = True
        self._warn("send", f"{self._name}: sending failed: {os.strerror(error)}; a batch of records is lost")
        return self._reopen_if_due() and self._socket is not None

    def _reopen_if_due(self) -> bool:
        """Make a new socket if the name leads elsewhere now or a failure is due to be mended. Whether it did.

        After a failure the addresses of the name take turns; those not tried yet follow at once (localhost may
        be ::1 first, with the Collector on 127.0.0.1).
        """
        if self._state == "closed":
            return False
        addresses = self._resolver.addresses
        if addresses and self._address not in addresses:
            self._untried = list(addresses)
        elif not self._reopen_wanted:
            return False
        elif not self._untried:
            now_ns = self._clock_ns()
            if now_ns - self._opened_ns < REOPEN_PERIOD_NS:
                return False
            self._resolver.look_up_beside(now_ns)
            turn = addresses.index(self._address) + 1 if self._address else 0
            self._untried = addresses[turn:] + addresses[:turn]
        self._connect()
        return True

    def _collect_errors(self) -> list[int]:
        """Take and count what is queued about earlier datagrams, as errnos; nothing is pending afterwards."""
        if self._socket is None:
            return []
        errors = [error for error in (self._pending_error(),) if error]
        queued = list(self._queued_errors(self._socket))
        if queued:
            self._pending_error()  # taking one from the queue made the next one pending
        for error in queued or errors:
            self._count_error(error)
        return errors + queued

    def _pending_error(self) -> int:
        assert self._socket is not None
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def _queued_errors(self, sock: socket.socket) -> Iterator[int]:
        """The errno of each ICMP error in the socket's error queue (ip(7), IP_RECVERR)."""
        while True:
            try:
                _, ancillary, _, _ = sock.recvmsg(0, 512, MSG_ERRQUEUE)
            except OSError:  # EAGAIN: the queue is empty
                return
            for level, kind, data in ancillary:
                if (level, kind) == (self._family.level, self._family.recverr):
                    number, origin, *_ = EXTENDED_ERR.unpack_from(data)
                    if origin != ERR_ORIGIN_LOCAL:
                        yield number

    def _count_error(self, error: int) -> None:
        """`error` was reported for an earlier datagram."""
        if error == errno.EMSGSIZE:
            return  # max_message_octets() sees it
        self._reopen_wanted = True
        self._trouble_until_ns = self._clock_ns() + CALM_NS
        if error == errno.ECONNREFUSED:
            self.counters.refused += 1
            self._trouble = "refused"
            self._warn("refused", f"{self._name}: nothing listens there (ICMP port unreachable)")
        else:
            self.counters.unreachable += 1
            self._trouble = "unreachable"
            self._warn("icmp", f"{self._name}: the network says: {os.strerror(error)}")
