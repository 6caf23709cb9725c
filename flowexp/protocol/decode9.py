# SPDX-License-Identifier: GPL-2.0-or-later
"""NetFlow v9 packets (RFC 3954) for the Decoder: Packet > FlowSet > Record.

Field Types are IANA's Information Elements; there is no enterprise bit and no variable length. Times of
elements 21 and 22 stay what they are: milliseconds since the exporter's start.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable

from flowexp.protocol.datatypes import VARIABLE_LENGTH
from flowexp.protocol.record import FieldSpecifier, Layout, RecordError
from flowexp.protocol.session import Decoded, Domain, Sessions

VERSION = 9

_PACKET_HEADER = struct.Struct(">HHIIII")  # Version, Count, System Uptime, UNIX Seconds, Sequence, Source ID
_TEMPLATE_FLOWSET_ID = 0
_OPTIONS_FLOWSET_ID = 1
_FIRST_TEMPLATE_ID = 256
_SCOPES = {1: "scopeSystem", 2: "scopeInterface", 3: "scopeLineCard", 4: "scopeCache", 5: "scopeTemplate"}


def decode_packet(octets: memoryview, session: Hashable, sessions: Sessions, decoded: Decoded) -> None:
    """Decode one packet into `decoded`. Never raises."""
    if len(octets) < _PACKET_HEADER.size:
        decoded.problem(f"NetFlow v9 packet of {len(octets)} octets: no whole header")
        return
    header = _PACKET_HEADER.unpack_from(octets)
    _, _, _, decoded.export_time_s, decoded.sequence, decoded.observation_domain_id = header
    domain = Domain(session, VERSION, decoded.observation_domain_id)
    octets = octets[_PACKET_HEADER.size :]
    while len(octets) >= 4:  # else padding
        flowset_id, length = struct.unpack_from(">HH", octets)
        if not 4 <= length <= len(octets):
            decoded.problem(f"FlowSet {flowset_id}: Length {length}, but {len(octets)} octets are left")
            break
        _decode_flowset(flowset_id, octets[4:length], domain, sessions, decoded)
        octets = octets[length:]
    lost = sessions.lost(domain, decoded.sequence, 1)
    decoded.lost_packets = lost or 0
    if lost is None:
        decoded.problem(f"Sequence Number went back to {decoded.sequence}: the exporter began anew")


def _decode_flowset(flowset_id: int, octets: memoryview, domain: Domain, sessions: Sessions, decoded: Decoded) -> None:
    where = f"FlowSet {flowset_id}"
    layout = sessions.layout(domain, flowset_id)
    try:
        if flowset_id in (_TEMPLATE_FLOWSET_ID, _OPTIONS_FLOWSET_ID):
            _define(octets, domain, sessions, decoded, is_options=flowset_id == _OPTIONS_FLOWSET_ID)
        elif flowset_id < _FIRST_TEMPLATE_ID:
            raise RecordError("this FlowSet ID is reserved (RFC 3954 §5.2)")
        elif layout is None:
            decoded.sets_without_template += 1
            raise RecordError(f"no Template yet for its {len(octets)} octets")
        else:
            decoded.take(layout, octets, where)
    except RecordError as error:
        decoded.problem(f"{where}: {error}")


def _define(octets: memoryview, domain: Domain, sessions: Sessions, decoded: Decoded, *, is_options: bool) -> None:
    """Take the Templates of a FlowSet (RFC 3954 §5.2, §6.1). Raises RecordError where one cannot be."""
    header_octets = 6 if is_options else 4
    while len(octets) >= header_octets and any(octets):  # else padding
        template_id, count = struct.unpack_from(">HH", octets)
        scopes = 0
        if is_options:
            scope_octets, option_octets = struct.unpack_from(">HH", octets, 2)
            scopes, count = scope_octets // 4, (scope_octets + option_octets) // 4
        octets = octets[header_octets:]
        if template_id < _FIRST_TEMPLATE_ID:
            raise RecordError(f"Template ID {template_id} is below {_FIRST_TEMPLATE_ID} (RFC 3954 §5.2)")
        if len(octets) < 4 * count:
            raise RecordError(f"Template {template_id} ends before its {count} fields")
        specifiers = []
        for number, (kind, length) in enumerate(struct.iter_unpack(">HH", octets[: 4 * count])):
            if length == VARIABLE_LENGTH:
                raise RecordError(f"Template {template_id}: field of {length} octets")
            scope = _SCOPES.get(kind, f"scope{kind}") if number < scopes else ""
            specifiers.append(FieldSpecifier(kind, length, scope=scope))
        octets = octets[4 * count :]
        sessions.withdraw(domain, template_id)
        layout = Layout(specifiers, is_options=is_options)
        sessions.define(domain, template_id, layout)
        decoded.templates.append((template_id, layout.names))
