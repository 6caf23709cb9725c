# SPDX-License-Identifier: GPL-2.0-or-later
"""Traffic in which every packet's length follows from its flow's key, and what Collectors got, as arrays.

A total can be right by chance: what one flow lost, another got. Here octets = packets x length(key) of every flow.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from lab.netns import Link

Array = np.ndarray
TCP, UDP = 6, 17
PROTOCOL_OCTETS = {TCP: 20, UDP: 8}
FIN_ACK = 0x11
FIRST_PORT = 1024
TEMPLATE_SET_ID, OPTIONS_TEMPLATE_SET_ID = 2, 3

# Information Elements (IANA).
OCTETS, PACKETS, PROTOCOL, SOURCE_PORT, SOURCE_IPV4, INTERFACE, START_MS, END_MS, END_REASON = (
    1, 2, 4, 7, 8, 10, 152, 153, 136,
)  # fmt: skip


def payload_octets(port: int | Array) -> int | Array:
    """The payload of every packet from this port: what neighbours have differs."""
    return port * 7 % 61


def frame(version: int, protocol: int, port: int) -> bytes:
    """An Ethernet frame of the flow that version, protocol and source port tell apart. A TCP flow ends with it."""
    payload = bytes(payload_octets(port))
    length = PROTOCOL_OCTETS[protocol] + len(payload)
    if protocol == UDP:
        transport = struct.pack(">HHHH", port, 9, length, 0)
    else:
        transport = struct.pack(">HHIIBBHHH", port, 9, 0, 0, 5 << 4, FIN_ACK, 1024, 0, 0)
    if version == 4:
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0, 64, protocol, 0, bytes(4), bytes(4))
        return bytes(12) + b"\x08\x00" + ip + transport + payload
    ip = struct.pack(">IHBB16s16s", 6 << 28, length, protocol, 64, bytes(16), bytes(16))
    return bytes(12) + b"\x86\xdd" + ip + transport + payload


def write_capture(path: Path, *, ports: int, passes: int = 4) -> Path:
    """Some passes over all flows, each in an order of its own: four flows a port."""
    random = np.random.default_rng(1)
    kinds = [(version, protocol) for version in (4, 6) for protocol in (TCP, UDP)]
    frames = [frame(*kind, FIRST_PORT + port) for kind in kinds for port in range(ports)]
    with path.open("wb") as out:
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for _ in range(passes):
            for number in random.permutation(len(frames)).tolist():
                octets = frames[number]
                out.write(struct.pack("<IIII", 0, 0, len(octets), len(octets)) + octets)
    return path


@contextmanager
def sending(link: Link, capture: Path, *, packets_per_s: int = 0, until_gone: bool = False) -> Iterator[None]:
    """One tcpreplay on each CPU, over and over, until the end; packets_per_s of each, 0: as fast as it goes.

    until_gone: it may end by itself, as the link is deleted meanwhile.
    """
    pace = [f"--pps={packets_per_s}"] if packets_per_s else ["--topspeed"]
    command = ["tcpreplay", "-i", link.name, *pace, "--preload-pcap", "--no-flow-stats", "--loop=0", capture]
    started = [
        subprocess.Popen(
            ["taskset", "-c", str(cpu), *link.namespace.inside(command)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for cpu in sorted(os.sched_getaffinity(0))
    ]
    try:
        yield
        assert until_gone or all(process.poll() is None for process in started), "tcpreplay has ended by itself"
    finally:
        for process in started:
            process.terminate()
            process.wait()


def flow_ids(rows: Array) -> Array:
    """A number for each record's flow."""
    return (rows["version"] * 256 + rows["protocol"]) * 65536 + rows["port"]


def comes_again(rows: Array) -> Array:
    """Of each record: whether an equal one comes later.

    Unix time is made from boot time anew for each batch: it may be 1 ms apart.
    """
    order = np.lexsort((np.arange(len(rows)), rows["end_ms"], flow_ids(rows)))  # a flow's first two may start at once
    ordered = rows[order]
    same = flow_ids(ordered)[1:] == flow_ids(ordered)[:-1]
    for name, apart in (("packets", 0), ("octets", 0), ("start_ms", 1), ("end_ms", 1)):
        same &= np.abs(np.diff(ordered[name])) <= apart
    again = np.zeros(len(rows), bool)
    again[np.minimum(order[1:], order[:-1])[same]] = True
    return again


Templates = dict[int, np.dtype]


def records(messages: Iterable[bytes], templates: Templates | None = None) -> Array:
    """Every flow record in IPFIX Messages: message (its number), version, interface (at ingress), protocol, port,
    packets, octets, start_ms, end_ms, reason. Templates have no variable length and no enterprise's elements here;
    those in `templates` were heard before, and more are added to them."""
    found = _data_sets(messages, {} if templates is None else templates)
    parts = [_select(number, template, body) for number, template, body in found]
    return np.concatenate([np.empty(0, _RECORD), *parts])


def data_records(messages: Sequence[bytes]) -> Array:
    """How many Data Records each Message has, Options Data Records among them: what Sequence Numbers count."""
    counts = np.zeros(len(messages), np.int64)
    for number, template, body in _data_sets(messages, {}):
        counts[number] += len(body) // template.itemsize
    return counts


def _data_sets(messages: Iterable[bytes], templates: Templates) -> Iterator[tuple[int, np.dtype, bytes]]:
    """Each Data Set: its Message's number, its Template as a dtype with Information Elements for names, its records."""
    for number, message in enumerate(messages):
        for set_id, body in _sets(message):
            if set_id in (TEMPLATE_SET_ID, OPTIONS_TEMPLATE_SET_ID):
                templates.update(_templates(body, header_octets=4 if set_id == TEMPLATE_SET_ID else 6))
            else:
                yield number, templates[set_id], body


_RECORD = np.dtype([(name, np.int64) for name in (
    "message", "version", "interface", "protocol", "port", "packets", "octets", "start_ms", "end_ms", "reason"
)])  # fmt: skip
_COLUMNS = {
    "interface": INTERFACE, "protocol": PROTOCOL, "port": SOURCE_PORT, "packets": PACKETS, "octets": OCTETS,
    "start_ms": START_MS, "end_ms": END_MS, "reason": END_REASON,
}  # fmt: skip


def _sets(message: bytes) -> Iterator[tuple[int, bytes]]:
    at = 16
    while at < len(message):
        set_id, octets = struct.unpack_from(">HH", message, at)
        yield set_id, message[at + 4 : at + octets]
        at += octets


def _templates(body: bytes, *, header_octets: int) -> Mapping[int, np.dtype]:
    found, at = {}, 0
    kinds = {1: "u1", 2: ">u2", 4: ">u4", 8: ">u8"}
    while at + header_octets <= len(body):
        template_id, fields = struct.unpack_from(">HH", body, at)
        at += header_octets
        pairs = struct.iter_unpack(">HH", body[at : at + 4 * fields])
        found[template_id] = np.dtype([(str(element), kinds.get(octets, f"V{octets}")) for element, octets in pairs])
        at += 4 * fields
    return found


def _select(number: int, template: np.dtype, body: bytes) -> Array:
    names = template.names or ()
    found = np.frombuffer(body, template, len(body) // template.itemsize)
    selected = np.zeros(len(found) if str(SOURCE_PORT) in names else 0, _RECORD)
    if len(selected):
        selected["message"] = number
        selected["version"] = 4 if str(SOURCE_IPV4) in names else 6
        for name, element in _COLUMNS.items():
            selected[name] = found[str(element)]
    return selected


def expected_octets(rows: Array) -> Array:
    """What the packets of each record amount to."""
    headers = np.where(rows["version"] == 4, 20, 40) + np.where(rows["protocol"] == TCP, 20, 8)
    return rows["packets"] * (headers + payload_octets(rows["port"]))


def flow_sums(rows: Array) -> tuple[Array, Array]:
    """Octets there are, and octets there should be, summed by flow."""
    flow = (rows["version"] * 256 + rows["protocol"]) * 65536 + rows["port"]
    _, number = np.unique(flow, return_inverse=True)
    sums = [np.zeros(int(number.max(initial=-1)) + 1, np.int64) for _ in range(2)]
    for total, octets in zip(sums, (rows["octets"], expected_octets(rows))):
        np.add.at(total, number, octets)
    return sums[0], sums[1]


def sequence_numbers(messages: Sequence[bytes]) -> Array:
    """The Sequence Number of each Message."""
    return np.array([struct.unpack_from(">I", message, 8)[0] for message in messages], np.int64)


def observation_domains(messages: Iterable[bytes]) -> set[int]:
    """Every Observation Domain ID that a Message names."""
    return {struct.unpack_from(">I", message, 12)[0] for message in messages}
