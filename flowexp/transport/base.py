# SPDX-License-Identifier: GPL-2.0-or-later
"""What every transport offers: a life cycle, and one way to use it.

The rule: a transport carries finished Messages. It never looks into one, and never decides when one is due.
"""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Protocol

LOG_PERIOD_NS = 60 * 10**9
MAX_KINDS = 1024
"""Kinds of line that are held back one by one; whatever is beyond shares one. Senders may be such kinds."""


class Batch(Protocol):
    """Messages of equal size, one behind the other, with equally many Data Records in each."""

    @property
    def octets(self) -> memoryview:
        """`count` times `message_octets`, items of one octet."""

    @property
    def message_octets(self) -> int:
        """Size of each."""

    @property
    def count(self) -> int:
        """How many Messages."""

    @property
    def records(self) -> int:
        """Data Records in all of them."""


class Sent(NamedTuple):
    """How far a batch came. The Messages taken are always the first ones of the batch, each exactly once."""

    messages: int
    """So many of them were taken by the kernel."""
    too_big: bool = False
    """The rest no longer fits the path: encode it again for `max_message_octets()`. Not counted as failed."""
    is_kept: bool = False
    """They go as Transport Sessions begin, and where one knows them already not at all."""


class OwnSocket(NamedTuple):
    """How the packets that leave a socket are addressed: IP protocol, ports, destination (4 or 16 octets)."""

    protocol: int
    port: int
    to: bytes
    to_port: int


def own_socket(sock: socket.socket, address: Any) -> OwnSocket:
    """Of a bound socket that sends to `address` and nowhere else."""
    to = socket.inet_pton(sock.family, address[0].partition("%")[0])
    protocol = socket.IPPROTO_TCP if sock.type == socket.SOCK_STREAM else socket.IPPROTO_UDP
    return OwnSocket(protocol, sock.getsockname()[1], to, address[1])


@dataclass
class Counters:
    """What became of the Messages. `sent`: the kernel took them; not: the Collector has them."""

    messages_sent: int = 0
    octets_sent: int = 0
    """Of Messages: without UDP and IP headers."""
    records_sent: int = 0
    """Data Records."""
    messages_failed: int = 0
    """Given to the transport and not taken by the kernel."""
    records_failed: int = 0
    refused: int = 0
    """ICMP 'port unreachable' received: the Collector's host is there, the Collector is not."""
    unreachable: int = 0
    """Any other ICMP error received except 'too big': host or network unreachable, prohibited."""
    gso_fallbacks: int = 0
    """Times that UDP_SEGMENT was refused; from then on each Message is a datagram of its own."""
    mtu_changes: int = 0
    """Times that the largest Message for this path became another one."""

    def add(self, batch: Batch, sent: Sent) -> None:
        """Count what became of `batch`."""
        records = batch.records // batch.count * sent.messages
        self.messages_sent += sent.messages
        self.octets_sent += sent.messages * batch.message_octets
        self.records_sent += records
        if not sent.too_big:
            self.messages_failed += batch.count - sent.messages
            self.records_failed += batch.records - records


class Transport(Protocol):
    """One Collector. `open` first, `close` last; `send` in between, from one thread."""

    counters: Counters

    def open(self) -> None:
        """Make ready. Raises FlowexpError for what waiting cannot mend."""

    def close(self) -> None:
        """Give everything back. A second time is harmless."""

    def max_message_octets(self) -> int:
        """The largest Message that `send` takes at this moment, Message Header included."""

    def take_templates_due(self) -> bool:
        """Whether the Collector may lack our Templates: then they go before all else. Asking clears it."""

    def hurry(self, on: bool) -> None:
        """Whether the flow table is overflowing: then sending must not take longer than it has to."""

    def announces(self, domain: int | None) -> None:
        """From here to the next call, with None, what is sent is all that a Collector must know of this Observation
        Domain before any record of it; nothing sent: it has no records any more."""

    def send(self, batch: Batch) -> Sent:
        """Send the Messages in their order. Those not sent, and not too big, count as failed."""

    def local_address(self) -> bytes:
        """The IP address that Messages come from: 4 or 16 octets; none where there is none, or none yet."""

    def status(self) -> dict[str, str | int]:
        """For `flowexp status`: where it goes, how it is, and the counters."""


class QuietLog:
    """A line of one kind at most once a minute: the first at once, later ones with the number held back."""

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        period_ns: int = LOG_PERIOD_NS,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._write = write
        self._period_ns = period_ns
        self._clock_ns = clock_ns
        self._written_ns: dict[str, int] = {}
        self._held_back: dict[str, int] = {}

    def __call__(self, kind: str, line: str) -> None:
        """Write `line`, unless one of its `kind` was written within the period."""
        now_ns = self._clock_ns()
        if kind not in self._written_ns and len(self._written_ns) >= MAX_KINDS:
            kind = ""
        if kind in self._written_ns and now_ns - self._written_ns[kind] < self._period_ns:
            self._held_back[kind] = self._held_back.get(kind, 0) + 1
            return
        self._written_ns[kind] = now_ns
        again = self._held_back.pop(kind, 0)
        self._write(f"{line} ({again} more like it since the last such line)" if again else line)


def warnings_of(name: str) -> Callable[[str], None]:
    """The function that logs a warning in the name of module `name`."""
    return logging.getLogger(name).warning
