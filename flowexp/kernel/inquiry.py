# SPDX-License-Identifier: GPL-2.0-or-later
"""Many questions to the kernel over netlink, and their answers in order: a flow's routes, its translation.

Requests and answers are octets. pyroute2 reads any answer there is, in a tenth of a millisecond; of those that are
asked for here the exporter wants thousands each second, and each has one layout.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
REQUEST = 1  # NLM_F_REQUEST
_DUMP = 0x300  # NLM_F_DUMP

_LENGTH_AND_TYPE = struct.Struct("=IH")
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
_AT_ONCE = 32  # so many answers fit into a socket's buffer, whatever its size
_ANSWER_OCTETS = 16384


def messages(octets: bytes) -> Iterator[Tuple[int, bytes]]:
    """Type and body of each message in what was received."""
    at = 0
    while at + HEADER.size <= len(octets):
        length, kind = _LENGTH_AND_TYPE.unpack_from(octets, at)
        yield kind, octets[at + HEADER.size : at + length]
        at += max(HEADER.size, length + -length % 4)


def attributes(octets: bytes) -> Dict[int, bytes]:
    """Values by type (without NLA_F_NESTED and NLA_F_NET_BYTEORDER); of equal types the last."""
    found: Dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(octets):
        length, kind = struct.unpack_from("=HH", octets, at)
        found[kind & 0x3FFF] = octets[at + 4 : at + length]
        at += max(4, length + -length % 4)
    return found


def _socket(family: int) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
    made.bind((0, 0))
    return made


class Inquiry:
    """Asks one netlink family (NETLINK_*) of this network namespace. OSError where the kernel has it not."""

    def __init__(self, family: int) -> None:
        self._family = family
        self._socket = _socket(family)
        self._sequence = 0
        self._buffer = bytearray(_ANSWER_OCTETS)

    def ask(self, message_type: int, bodies: Sequence[bytes]) -> List[Optional[bytes]]:
        """The body of the answer to each request, None where the kernel has none: there is no such thing."""
        answers: List[Optional[bytes]] = [None] * len(bodies)
        for first in range(0, len(bodies), _AT_ONCE):
            some = bodies[first : first + _AT_ONCE]
            requests = [
                HEADER.pack(HEADER.size + len(body), message_type, REQUEST, self._sequence + number, 0) + body
                for number, body in enumerate(some)
            ]
            self._socket.send(b"".join(requests))
            for number, answer in self._answers(len(some)):
                answers[first + number] = answer
            self._sequence = (self._sequence + len(some)) & 0x7FFFFFFF
        return answers

    def dump(self, message_type: int, body: bytes) -> List[bytes]:
        """The bodies of all that the kernel lists for one request: none where it refuses it."""
        listed: List[bytes] = []
        with _socket(self._family) as asking:  # its own: a list that broke off would be in the way of the next
            asking.send(HEADER.pack(HEADER.size + len(body), message_type, REQUEST | _DUMP, 0, 0) + body)
            while True:  # the kernel goes on listing as it is read: what is to come is there
                try:
                    received = asking.recv(_ANSWER_OCTETS, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return listed
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    continue
                for kind, each in messages(received):
                    if kind in (_ERROR, _DONE):
                        return listed
                    listed.append(each)

    def error(self, message_type: int, body: bytes) -> int:
        """The errno with which the kernel refuses a request; 0 if it answers it."""
        self._socket.send(HEADER.pack(HEADER.size + len(body), message_type, REQUEST, 0, 0) + body)
        octets = self._socket.recv(_ANSWER_OCTETS)
        is_error = HEADER.unpack_from(octets)[1] == _ERROR
        return -int(struct.unpack_from("=i", octets, HEADER.size)[0]) if is_error else 0

    def _answers(self, count: int) -> Iterator[tuple[int, Optional[bytes]]]:
        """Which request is answered, and how. The kernel has answered them all by now."""
        while count:
            try:
                received = self._socket.recv_into(self._buffer, flags=socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue
            length, kind, _, sequence, _ = HEADER.unpack_from(self._buffer)
            number = sequence - self._sequence
            if 0 <= number < _AT_ONCE:  # else of an earlier question
                count -= 1
                if kind != _ERROR:
                    yield number, bytes(self._buffer[HEADER.size : min(length, received)])

    def close(self) -> None:
        self._socket.close()
