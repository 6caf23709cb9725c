# SPDX-License-Identifier: GPL-2.0-or-later
"""Collectors that people run, as judges: each tells what it was told of and, apart, what it lost itself.

A Collector listens on a port found free, inside a namespace, with as large a receive buffer as it can
have. `finish` waits until its socket is read empty, and what was read is worked off, before it is
stopped: nfcapd forgets the datagram that it has just read when it is told to end.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from .flows import Counts, FlowKey, FlowTable, add_up
from .netns import Namespace
from .process import Process, run
from .wait import wait_for

if TYPE_CHECKING:
    from typing_extensions import Self

RECEIVE_BUFFER_OCTETS = 4 << 20
SO_RCVBUFFORCE = 33
TCP_FLAG_LETTERS = "CEUAPRSF"
Record = dict[str, Any]


class UdpSocket(NamedTuple):
    """A line of /proc/net/udp: octets not read yet, datagrams that found no room."""

    queued_octets: int
    drops: int


def udp_sockets(namespace: Namespace) -> dict[int, UdpSocket]:
    """The UDP sockets of a namespace by local port, both families."""
    sockets = {}
    for table in ("udp", "udp6"):
        for line in namespace.read_proc_net(table).splitlines()[1:]:
            words = line.split()
            port = int(words[1].split(":")[1], 16)
            sockets[port] = UdpSocket(int(words[4].split(":")[1], 16), int(words[-1]))
    return sockets


class Collector:
    """A Collector process inside a namespace; a subclass says how to start it and what it wrote."""

    name = ""
    stop_signal = signal.SIGTERM

    def __init__(self, namespace: Namespace, directory: Path, *, address: str = "127.0.0.1") -> None:
        self.namespace = namespace
        self.address = address
        self.port = namespace.free_udp_port(address)
        self.directory = directory / f"{self.name}-{self.port}"
        self.directory.mkdir(parents=True)
        self.drops = 0
        self.process = self.start()
        wait_for(f"{self.name} to be ready on port {self.port}", self._is_ready)

    def start(self) -> Process:
        raise NotImplementedError

    def flows(self) -> FlowTable:
        """What it was told, added up by flow; after `finish`."""
        raise NotImplementedError

    def complaints(self) -> list[str]:
        """What it says was missing or wrong; after `finish`."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"udp://{host}:{self.port}"

    def _is_ready(self) -> bool:
        return self.process.is_alive() and self.port in udp_sockets(self.namespace)

    def _has_read_all(self) -> bool:
        is_empty = self.process.is_alive() and udp_sockets(self.namespace)[self.port].queued_octets == 0
        return is_empty and self.process.is_asleep()

    def finish(self) -> None:
        """Stops it once it has read all that was sent to it; `drops` then counts what found no room."""
        wait_for(f"{self.name} to read what was sent", self._has_read_all)
        self.drops = udp_sockets(self.namespace)[self.port].drops
        self.process.stop(self.stop_signal)

    def losses(self) -> list[str]:
        """Why its figures may be too low through no fault of the exporter, or what it objects to."""
        dropped = [f"{self.name}: no room in its socket for {self.drops} datagrams"] if self.drops else []
        return dropped + [f"{self.name}: {text}" for text in self.complaints()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()


class Nfcapd(Collector):
    """nfdump's nfcapd; read back with nfdump."""

    name = "nfcapd"

    def start(self) -> Process:
        family = "-6" if ":" in self.address else "-4"
        (self.directory / "flows").mkdir()
        return self.namespace.start(
            "nfcapd", "-C", "none", family, "-b", self.address, "-p", str(self.port), "-t", "3600",
            "-w", self.directory / "flows", "-B", str(RECEIVE_BUFFER_OCTETS),
            directory=self.directory, name=self.name,
        )  # fmt: skip

    def records(self) -> list[Record]:
        """All records as nfdump's JSON has them; after `finish`."""
        shown = run(["nfdump", "-C", "none", "-R", self.directory / "flows", "-o", "json"])
        return list(json.loads(shown)) if shown.strip() else []

    def flows(self, wanted: Callable[[Record], bool] = bool) -> FlowTable:
        """`wanted`: which records."""
        return add_up(self._flow(record) for record in self.records() if wanted(record))

    @staticmethod
    def _flow(record: Record) -> tuple[FlowKey, Counts]:
        family = "6" if "src6_addr" in record else "4"
        key = FlowKey(
            record[f"src{family}_addr"],
            record[f"dst{family}_addr"],
            record["proto"],
            record.get("src_port", 0),
            record.get("dst_port", 0),
            record.get("icmp_type", 0) * 256 + record.get("icmp_code", 0),
            record.get("src_vlan", 0),
        )
        letters = record.get("tcp_flags", "........")
        flags = sum(0x80 >> i for i, letter in enumerate(letters) if letter == TCP_FLAG_LETTERS[i])
        return key, Counts(record["in_packets"], record["in_bytes"], flags)

    def complaints(self) -> list[str]:
        figures = re.findall(r"(Sequence Errors|Bad Packets): (\d+)", self.process.stdout + self.process.stderr)
        return [f"{what}: {n}" for what, n in figures if int(n)] if figures else ["no closing figures in its log"]


class Nfacctd(Collector):
    """pmacct's nfacctd with the print plugin; its queue to the plugin is wide enough for all at once.

    On SIGINT it flushes that queue, waits two seconds for the plugin to take it, and then ends the plugin.
    """

    name = "nfacctd"
    stop_signal = signal.SIGINT
    configuration = """
        daemonize: false
        plugins: print[flows]
        nfacctd_ip: {address}
        nfacctd_port: {port}
        nfacctd_pipe_size: {receive_buffer_octets}
        plugin_pipe_size: 67108864
        plugin_buffer_size: 65536
        aggregate_primitives: {directory}/primitives
        aggregate[flows]: src_host, dst_host, src_port, dst_port, protocol, icmp_v4, icmp_v6, vlan, \
            tcpflags, in_iface, out_iface, timestamp_start, timestamp_end
        print_output: json
        print_output_file: {directory}/flows.json
        print_refresh_time: 3600
        print_cache_entries: 32771
        timestamps_since_epoch: true
        """
    primitives = """
        name=protocol field_type=4   len=1 semantics=u_int
        name=icmp_v4  field_type=32  len=2 semantics=u_int
        name=icmp_v6  field_type=139 len=2 semantics=u_int
        """

    def start(self) -> Process:
        file = self.directory / "nfacctd.conf"
        self._write(file, self.configuration.format(
            address=self.address, port=self.port, directory=self.directory,
            receive_buffer_octets=RECEIVE_BUFFER_OCTETS,
        ))  # fmt: skip
        self._write(self.directory / "primitives", self.primitives)
        return self.namespace.start("nfacctd", "-f", file, directory=self.directory, name=self.name)

    @staticmethod
    def _write(file: Path, text: str) -> None:
        file.write_text("".join(f"{line.strip()}\n" for line in text.strip().splitlines()))

    @property
    def _log(self) -> str:
        return self.process.stdout + self.process.stderr

    def _is_ready(self) -> bool:
        """Its plugin starts by itself, and what it is sent before that is lost without a word."""
        return super()._is_ready() and "cache entries=" in self._log and "setting object handlers" in self._log

    def _has_written_all(self) -> bool:
        started, ended = (self._log.count(f"*** Purging cache - {word}") for word in ("START", "END"))
        return ended == started > 0

    def finish(self) -> None:
        super().finish()
        wait_for("nfacctd's print plugin to write its flows", self._has_written_all)

    def records(self) -> list[Record]:
        """All records as the print plugin wrote them; after `finish`."""
        file = self.directory / "flows.json"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def flows(self) -> FlowTable:
        return add_up(self._flow(record) for record in self.records())

    @staticmethod
    def _flow(record: Record) -> tuple[FlowKey, Counts]:
        protocol = int(record["protocol"])
        key = FlowKey(
            record["ip_src"],
            record["ip_dst"],
            protocol,
            record["port_src"],
            record["port_dst"],
            int(record["icmp_v4"]) + int(record["icmp_v6"]),
            record["vlan"],
        )
        return key, Counts(record["packets"], record["bytes"], int(record["tcp_flags"]))

    def complaints(self) -> list[str]:
        return [line for line in self._log.splitlines() if line.startswith(("WARN", "ERROR"))]


class Recorder:
    """A UDP socket that keeps every datagram, for decoders; its buffer is beyond what any test sends."""

    buffer_octets = 512 << 20

    def __init__(self, namespace: Namespace, *, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.namespace = namespace
        self._socket = namespace.socket(family)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self.buffer_octets)
        self._socket.bind((address, 0))
        self._socket.setblocking(False)
        self.address = address
        self.port = int(self._socket.getsockname()[1])
        self._messages: list[bytes] = []

    @property
    def url(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"udp://{host}:{self.port}"

    @property
    def drops(self) -> int:
        return udp_sockets(self.namespace)[self.port].drops

    def messages(self) -> list[bytes]:
        """Every datagram so far, in order."""
        self._messages.extend(self._read())
        return list(self._messages)

    def _read(self) -> Iterator[bytes]:
        while True:
            try:
                yield self._socket.recv(65535)
            except BlockingIOError:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


class MessageFile:
    """An IPFIX File (RFC 5655) for the exporter to write: a Collector without a packet on any network."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = path.as_uri()

    def messages(self) -> list[bytes]:
        """The Messages in the file; after the exporter has ended."""
        content, messages = self._path.read_bytes(), []
        while content:
            length = int.from_bytes(content[2:4], "big")
            assert 16 <= length <= len(content), f"{self._path}: Message Length {length} (RFC 7011 section 3.1)"
            messages.append(content[:length])
            content = content[length:]
        return messages


def write_pcap(path: Path, datagrams: list[bytes], *, port: int) -> None:
    """The datagrams as a capture of raw IPv4, as if sent to `port` of 127.0.0.1."""
    localhost = socket.inet_aton("127.0.0.1")
    with path.open("wb") as file:
        file.write(struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 101))
        for datagram in datagrams:
            udp = struct.pack("!HHHH", 50000, port, 8 + len(datagram), 0) + datagram
            ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, localhost, localhost)
            file.write(struct.pack("<IIII", 0, 0, len(ip + udp), len(ip + udp)) + ip + udp)
