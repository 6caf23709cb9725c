# SPDX-License-Identifier: GPL-2.0-or-later
"""What connection tracking says as translated connections begin and end, read from its netlink events.

Nothing is kept here: a connection that is not translated, or of a protocol without ports, is passed over. Events
that nobody read in time the kernel drops; how often that happened is known, how many they were is not.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Dict, Iterator, List, Tuple

import numpy as np

from ..errors import FlowexpError
from ..protocol.elements import Columns as EventColumns
from ..protocol.natevents import event_columns
from .conntrack import differ, tuple_columns, tuples_of, turned
from .flows import Columns
from .inquiry import messages

_NETFILTER = 12  # NETLINK_NETFILTER
_NEW_GROUP, _DESTROY_GROUP = 1, 3  # NFNLGRP_CONNTRACK_NEW, NFNLGRP_CONNTRACK_DESTROY
_NEW, _DELETE = 1 << 8, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW and _DELETE
_VERSIONS = {int(socket.AF_INET): 4, int(socket.AF_INET6): 6}
_SO_RCVBUFFORCE = 33
_BUFFER_OCTETS = 8 << 20  # some ten thousand events, or a tenth of a second of a hundred thousand a second
_EVENT_OCTETS = 16384
_AT_ONCE = 1 << 16


class NatEvents:
    """Sessions that were created and deleted, from now on, in this network namespace."""

    def __init__(self) -> None:
        """FlowexpError where the kernel has no such events."""
        self.created = self.deleted = 0
        self.overruns = 0
        """How often events came faster than they were read."""
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, _NETFILTER
            )
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_OCTETS)
            self._socket.bind((0, 1 << (_NEW_GROUP - 1) | 1 << (_DESTROY_GROUP - 1)))
        except OSError as error:
            advice = {errno.EPERM: "CAP_NET_ADMIN is needed"}.get(
                error.errno or 0, "load the module nf_conntrack_netlink"
            )
            raise FlowexpError(f"[export] nat_events: {error.strerror}; {advice}, or leave it out") from error

    def close(self) -> None:
        self._socket.close()

    def read(self) -> Iterator[EventColumns]:
        """What has happened since the last call, in order: columns of events (protocol/natevents.py) of one family."""
        found: Dict[int, Tuple[List[bool], List[bytes]]] = {}
        for kind, body in self._bodies():
            version = _VERSIONS.get(body[0]) if body else None
            if version is not None:
                is_new, bodies = found.setdefault(version, ([], []))
                is_new.append(kind == _NEW)
                bodies.append(body)
        now_ms = time.time_ns() // 1_000_000
        for version, (is_new, bodies) in found.items():
            known, original, reply = tuples_of(version).read(bodies)
            sessions = _translated(tuple_columns(original[known]), tuple_columns(reply[known]))
            created = np.array(is_new, bool)[known][sessions.pop("row")]
            if len(created):
                self.created += int(created.sum())
                self.deleted += int((~created).sum())
                yield event_columns(sessions, is_new=created, time_ms=now_ms)

    def _bodies(self) -> Iterator[Tuple[int, bytes]]:
        """Type and body of each event that waits, as many as one look may take: where they come faster than they are
        read, there would be no end."""
        for _ in range(_AT_ONCE):
            try:
                octets = self._socket.recv(_EVENT_OCTETS)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overruns += 1
                continue
            yield from (event for event in messages(octets) if event[0] in (_NEW, _DELETE))


def _translated(original: Columns, reply: Columns) -> Columns:
    """Of these connections those whose answers do not come from where their packets went to, or not to where they came
    from: addresses and ports before and after, and the number of each one's row."""
    after = turned(reply, np.ones(len(reply["protocol"]), bool))
    rows = np.flatnonzero(differ(original, after, tuple(original)))
    before = {name: column[rows] for name, column in original.items()}
    others = {f"other_{name}": column[rows] for name, column in after.items() if name != "protocol"}
    return {**before, **others, "row": rows}
