# SPDX-License-Identifier: GPL-2.0-or-later
"""One connection to a Collector, TCP (RFC 7011 section 10.4) or TLS over it (section 11): octets out, and how many
of them the other host has acknowledged.

The rule: connecting takes a bounded time, and everything after that takes none: the caller polls. What can go wrong
is a Trouble, whose text tells the operator what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import ssl
import struct
import termios
import time
from typing import Any, Callable, NamedTuple

from flowexp.errors import FlowexpError
from flowexp.transport.base import OwnSocket, own_socket

CONNECT_S = 10.0
"""For each address of the name; and as long again for a TLS handshake."""
USER_TIMEOUT_S = 30.0
"""What the other host has not acknowledged for so long ends the connection (TCP_USER_TIMEOUT)."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 15, 5, 3
"""An idle connection to a host that is gone is noticed after 30 s, too."""
VERDICT_S = 0.5
_DISCARD_OCTETS, _DISCARD_READS = 1 << 16, 16


class Trouble(Exception):
    """Why there is no connection (any more). `state`: in one word, for `flowexp status`."""

    def __init__(self, state: str, why: str, *, orderly: bool = False) -> None:
        super().__init__(why)
        self.state = state
        self.orderly = orderly
        """The Collector has closed, after it had read all that its host had acknowledged."""


class Tls(NamedTuple):
    """Files in PEM. ca_file: whose signature counts, "": those that the system trusts; cert_file and key_file: the
    certificate that the Collector may ask for, "" for none."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or later; certificate and name are checked. FlowexpError names the file that is no use."""
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca_file:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            _load("ca_file", self.ca_file, lambda: context.load_verify_locations(self.ca_file))
        if self.cert_file:
            load_certificate(context, self.cert_file, self.key_file)
        return context


def load_certificate(
    context: ssl.SSLContext, cert_file: str, key_file: str, *, named: str = "cert_file, key_file"
) -> None:
    """Our own certificate, and its key (in the same file where key_file is ""). named: where they were given."""
    _load(named, cert_file, lambda: context.load_cert_chain(cert_file, key_file or None, ""))


def _load(key: str, path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        reason = "they do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "no PEM of that kind in it"
        raise FlowexpError(f"{key}: {path}: {reason}") from error
    except OSError as error:
        raise FlowexpError(f"{key}: {path}: {error.strerror}") from error


class Connection:
    """Connected when it is made; Trouble if that cannot be. For TLS the handshake is done, too.

    announce: told of each socket before anything is sent from it; None: nobody.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        mark: int = 0,
        user_timeout_s: float = USER_TIMEOUT_S,
        announce: Callable[[OwnSocket], None] | None = None,
    ) -> None:
        self._socket = _connect(host, port, mark=mark, user_timeout_s=user_timeout_s, announce=announce)
        self._pending = memoryview(b"")
        self._taken = 0
        self._acknowledged = 0
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            self._tls = tls.wrap_bio(self._in, self._out, server_hostname=host)
            try:
                self._handshake(self._tls, time.monotonic() + CONNECT_S)
            except BaseException:
                self._socket.close()
                raise
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def local_address(self) -> bytes:
        """The IP address at this end: 4 or 16 octets."""
        return socket.inet_pton(self._socket.family, self._socket.getsockname()[0].partition("%")[0])

    def describe(self) -> str:
        """What was agreed on, for `flowexp check`; it waits a moment for what the Collector says to that."""
        if self._tls is None:
            return "connected"
        poll = select.poll()  # with TLS 1.3 a Collector that wants another certificate says so after the handshake
        poll.register(self._socket, select.POLLIN)
        poll.poll(1000 * VERDICT_S)
        self.discard()
        certificate: Any = self._tls.getpeercert() or {}
        names = [name for kind, name in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
        until = certificate.get("notAfter", "?")
        return f"{self._tls.version()}, the certificate of {', '.join(names[:3])} is good until {until}"

    # ---- out

    @property
    def is_full(self) -> bool:
        """Whether the kernel has not taken all yet: then nothing more should be written."""
        return len(self._pending) > 0

    def write(self, octets: bytes | bytearray) -> int:
        """Hand octets over. Returns how many have to be acknowledged until these are. Not while it `is_full`."""
        assert not self.is_full, "what is left of the octets before would be lost"
        if self._tls is None:
            self._pending = memoryview(octets)
        else:
            try:
                self._tls.write(octets)
            except ssl.SSLError as error:
                raise _tls_trouble(error) from error
            self._pending = memoryview(self._out.read())
        return self._taken + len(self._pending)

    def flush(self) -> None:
        """Give the kernel what it takes."""
        while self._pending:
            try:
                sent = self._socket.send(self._pending)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise _lost(error) from error
            self._taken += sent
            self._pending = self._pending[sent:]

    def acknowledged(self) -> int:
        """How many of the octets written the other host has for certain; also after the connection's end."""
        with contextlib.suppress(OSError, ValueError):
            answer = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))  # SIOCOUTQ: not yet acknowledged
            self._acknowledged = max(self._acknowledged, self._taken - struct.unpack("i", answer)[0])
        return self._acknowledged

    # ---- in

    def discard(self) -> None:
        """Read what the Collector sends, which is nothing to us; Trouble tells when it has closed."""
        for _ in range(_DISCARD_READS):
            try:
                octets = self._socket.recv(_DISCARD_OCTETS)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise _lost(error) from error
            if not octets:
                raise Trouble("closed", "the Collector has closed the connection", orderly=True)
            if self._tls is not None:
                self._in.write(octets)
                self._read_tls(self._tls)

    def _read_tls(self, tls: ssl.SSLObject) -> None:
        try:
            while tls.read(_DISCARD_OCTETS):
                pass
        except ssl.SSLWantReadError:
            return
        except ssl.SSLZeroReturnError as error:
            raise Trouble("closed", "the Collector has closed the connection", orderly=True) from error
        except ssl.SSLError as error:
            raise _tls_trouble(error) from error

    # ---- end

    def shut(self) -> None:
        """Say that nothing more comes, once all is written and flushed."""
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._pending = memoryview(bytes(self._pending) + self._out.read())
            self.flush()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()

    def _handshake(self, tls: ssl.SSLObject, until_s: float) -> None:
        """On a socket that still blocks."""
        while True:
            trouble: ssl.SSLError | None = None
            try:
                done = True
                tls.do_handshake()
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError as error:
                done, trouble = False, error  # the alert that says so goes out first
            self._socket.settimeout(max(0.001, until_s - time.monotonic()))
            try:
                octets = self._out.read()
                self._socket.sendall(octets)
                self._taken += len(octets)
                if trouble is not None:
                    raise _tls_trouble(trouble) from trouble
                if done:
                    return
                octets = self._socket.recv(_DISCARD_OCTETS)
            except socket.timeout as error:
                raise Trouble("untrusted", "no answer to the TLS handshake; is it tcp:// there?") from error
            except OSError as error:
                if trouble is not None:
                    raise _tls_trouble(trouble) from trouble
                self._read_alert(tls)
                raise Trouble("untrusted", f"the TLS handshake was cut off: {error.strerror}") from error
            if not octets:
                raise Trouble("untrusted", "the TLS handshake was cut off; is it tcp:// there?")
            self._in.write(octets)

    def _read_alert(self, tls: ssl.SSLObject) -> None:
        """A reset ends the connection; what the Collector said before is still there. Trouble if it says why."""
        try:
            self._in.write(self._socket.recv(_DISCARD_OCTETS))
            tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise _tls_trouble(error) from error
        except OSError:
            return


def _connect(
    host: str, port: int, *, mark: int, user_timeout_s: float, announce: Callable[[OwnSocket], None] | None
) -> socket.socket:
    """To the first address of the name that answers."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Trouble("unresolved", f"the name cannot be resolved: {reason}") from error
    trouble = Trouble("unresolved", "the name has no address")
    for family, _, _, _, address in found:
        try:
            with contextlib.ExitStack() as failing:
                sock = failing.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
                sock.settimeout(CONNECT_S)
                _set_options(sock, mark, user_timeout_s)
                if announce is not None:
                    sock.bind(("", 0))  # so that its port is known before its first packet
                    announce(own_socket(sock, address))
                sock.connect(address)
                failing.pop_all()
                return sock
        except socket.timeout:
            trouble = Trouble("unreachable", f"no answer within {CONNECT_S:g} s")
        except ConnectionRefusedError:
            trouble = Trouble("refused", "nothing listens there")
        except OSError as error:
            trouble = Trouble("unreachable", f"cannot connect: {error.strerror}")
    raise trouble


def _set_options(sock: socket.socket, mark: int, user_timeout_s: float) -> None:
    if mark:
        with contextlib.suppress(PermissionError):  # without CAP_NET_ADMIN the own packets are metered, too
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * user_timeout_s))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _lost(error: OSError) -> Trouble:
    """An error of an established connection. EPIPE: a reset after the Collector had closed with nothing unread."""
    if error.errno == errno.EPIPE:
        return Trouble("closed", "the Collector has closed the connection", orderly=True)
    if error.errno == errno.ETIMEDOUT:
        return Trouble("unreachable", "the Collector's host does not answer any more")
    return Trouble("closed", f"the connection was lost: {os.strerror(error.errno or 0)}")


# openssl/x509_vfy.h
_EXPIRED, _NOT_YET_VALID, _UNKNOWN_CA, _OTHER_NAME = (10,), (9,), (2, 18, 19, 20, 21), (62, 64)


def _tls_trouble(error: ssl.SSLError) -> Trouble:
    return Trouble("untrusted", _tls_sentence(error))


def _tls_sentence(error: ssl.SSLError) -> str:
    code = getattr(error, "verify_code", 0) if isinstance(error, ssl.SSLCertVerificationError) else 0
    if code in _EXPIRED:
        return "the Collector's certificate has expired; renew it there"
    if code in _NOT_YET_VALID:
        return "the Collector's certificate is not valid yet; compare the clocks"
    if code in _UNKNOWN_CA:
        return "the Collector's certificate is signed by no CA that is known here; name that CA with ca_file"
    if code in _OTHER_NAME:
        return "the Collector's certificate is for another name; put its name into the url"
    reason = (error.reason or "").upper()
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return "the Collector wants a certificate of ours; name one with cert_file and key_file"
    if "UNKNOWN_CA" in reason or "BAD_CERTIFICATE" in reason or "CERTIFICATE_UNKNOWN" in reason:
        return "the Collector does not accept our certificate (cert_file)"
    if "WRONG_VERSION_NUMBER" in reason or "PACKET_LENGTH" in reason or "RECORD_LAYER" in reason:
        return "what answers there does not speak TLS; is it tcp:// there?"
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return "the Collector has no TLS 1.2 or later"
    return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
