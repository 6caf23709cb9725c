# SPDX-License-Identifier: GPL-2.0-or-later
"""NetFlow v5 packets for the Decoder: one layout, without Templates (netflow5.py has it, too, as it is written).

Times are counted from the exporter's start, and the header tells what that is: records have them as IPFIX does, in
milliseconds of Unix time. What is counted in the header and not there is a problem, and so is what is there beyond.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable

from flowexp.protocol.record import FieldSpecifier, Layout, Record
from flowexp.protocol.session import Decoded, Domain, Sessions

VERSION = 5

# Version, Count, System Uptime, UNIX Seconds and Nanoseconds, Flow Sequence, Engine Type and ID, Sampling
_HEADER = struct.Struct(">HHIIIIHH")
_RECORD_OCTETS = 48
_PADDING = 210
_LAYOUT = Layout(
    [
        FieldSpecifier(element_id, octets)
        for element_id, octets in (
            (8, 4), (12, 4), (15, 4), (10, 2), (14, 2), (2, 4), (1, 4), (22, 4), (21, 4), (7, 2), (11, 2),
            (_PADDING, 1), (6, 1), (4, 1), (5, 1), (16, 2), (17, 2), (9, 1), (13, 1), (_PADDING, 2),
        )
    ]
)  # fmt: skip
_TIMES = {"flowStartSysUpTime": "flowStartMilliseconds", "flowEndSysUpTime": "flowEndMilliseconds"}


def decode_packet(octets: memoryview, session: Hashable, sessions: Sessions, decoded: Decoded) -> None:
    """Decode one packet into `decoded`. Never raises."""
    if len(octets) < _HEADER.size:
        decoded.problem(f"NetFlow v5 packet of {len(octets)} octets: no whole header")
        return
    header = _HEADER.unpack_from(octets)
    _, count, up_time_ms, decoded.export_time_s, nanoseconds, decoded.sequence, engine, _ = header
    decoded.observation_domain_id = engine
    content = octets[_HEADER.size :]
    if len(content) != count * _RECORD_OCTETS:
        decoded.problem(f"NetFlow v5 packet of {count} records: {len(content)} octets behind its header")
    whole = min(count, len(content) // _RECORD_OCTETS)
    taken = decoded.take(_LAYOUT, content[: whole * _RECORD_OCTETS], "NetFlow v5 packet")
    now_ms = decoded.export_time_s * 1000 + nanoseconds // 10**6
    if taken:
        decoded.records[-taken:] = [_told(record, now_ms, up_time_ms) for record in decoded.records[-taken:]]
    lost = sessions.lost(Domain(session, VERSION, engine), decoded.sequence, count)
    decoded.lost_records = lost or 0
    if lost is None:
        decoded.problem(f"Sequence Number went back to {decoded.sequence}: the exporter began anew")


def _told(record: Record, now_ms: int, up_time_ms: int) -> Record:
    """A record as IPFIX would have it: Unix times, and no padding."""
    told: Record = {}
    for name, value in record.items():
        if name in _TIMES and isinstance(value, int):
            name, value = _TIMES[name], max(now_ms + _signed(value - up_time_ms), 0)
        if not name.startswith("paddingOctets"):
            told[name] = value
    return told


def _signed(difference: int) -> int:
    """Of two counters of 32 bits: one of them may have begun anew meanwhile."""
    return (difference + (1 << 31)) % (1 << 32) - (1 << 31)
