# SPDX-License-Identifier: GPL-2.0-or-later
"""The Collector's side, sans-IO: datagrams from anybody in, records and complaints out.

Nothing here raises on input. A Set that cannot be read hides no other one. Templates belong to one
Observation Domain of one Transport Session (RFC 7011 §8); withdrawals are obeyed on every transport.
NetFlow v9 and v5 are in decode9.py and decode5.py; what is remembered, and its limits, in session.py.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterator
from functools import partial

from flowexp.protocol import decode5, decode9, ipfix
from flowexp.protocol.ipfix import MESSAGE_HEADER, OPTIONS_TEMPLATE_SET_ID, SET_HEADER, TEMPLATE_SET_ID
from flowexp.protocol.record import FieldSpecifier, Layout, RecordError
from flowexp.protocol.registry import ENTERPRISE_BIT
from flowexp.protocol.session import Decoded, Domain, Sessions

_FIRST_TEMPLATE_ID = 256


class Decoder:
    """Decodes the datagrams of any number of sessions."""

    def __init__(self) -> None:
        self._sessions = Sessions()

    @property
    def fields_held(self) -> int:
        """Field Specifiers kept, of all Templates of all sessions, as MAX_FIELDS counts them."""
        return self._sessions.fields_held

    def decode(self, datagram: bytes | memoryview, session: Hashable) -> Decoded:
        """One IPFIX Message or NetFlow packet of a session (for UDP: the sender's address and port).

        Never raises; what is wrong with the octets stands in the result's problems.
        """
        octets, decoded = memoryview(datagram), Decoded()
        if len(octets) < 2:
            decoded.problem(f"{len(octets)} octets are no Message")
            return decoded
        (decoded.version,) = struct.unpack_from(">H", octets)
        if decoded.version == ipfix.VERSION:
            _decode_message(octets, session, self._sessions, decoded)
        elif decoded.version == decode9.VERSION:
            decode9.decode_packet(octets, session, self._sessions, decoded)
        elif decoded.version == decode5.VERSION:
            decode5.decode_packet(octets, session, self._sessions, decoded)
        else:
            decoded.problem(f"unsupported version {decoded.version}")
        return decoded

    def forget(self, session: Hashable) -> None:
        """A session that has ended takes its Templates with it. Of datagrams nobody knows when that is."""
        self._sessions.forget(session)


def _decode_message(octets: memoryview, session: Hashable, sessions: Sessions, decoded: Decoded) -> None:
    if len(octets) < MESSAGE_HEADER.size:
        decoded.problem(f"Message of {len(octets)} octets: its header alone has {MESSAGE_HEADER.size}")
        return
    header = MESSAGE_HEADER.unpack_from(octets)
    _, length, decoded.export_time_s, decoded.sequence, decoded.observation_domain_id = header
    if length != len(octets):
        decoded.problem(f"Message Length {length}, but {len(octets)} octets came")
    domain = Domain(session, ipfix.VERSION, decoded.observation_domain_id)
    records: int | None = 0
    for set_id, content in _sets(octets[MESSAGE_HEADER.size : max(length, MESSAGE_HEADER.size)], decoded):
        if set_id in (TEMPLATE_SET_ID, OPTIONS_TEMPLATE_SET_ID):
            try:
                _define(content, domain, sessions, decoded, is_options=set_id == OPTIONS_TEMPLATE_SET_ID)
            except RecordError as error:
                decoded.problem(f"Set {set_id}: {error}")
            continue
        layout = sessions.layout(domain, set_id)
        if layout is not None:
            taken = decoded.take(layout, content, f"Set {set_id}")
            if taken and layout.is_options:
                sessions.learn(domain, decoded.options_records[-taken:])
            records = None if records is None else records + taken
            continue
        records = None
        if set_id < _FIRST_TEMPLATE_ID:
            decoded.problem(f"Set ID {set_id} is reserved (RFC 7011 §3.3.2)")
        else:
            decoded.sets_without_template += 1
            decoded.problem(f"Set {set_id}: no Template yet for its {len(content)} octets")
    lost = sessions.lost(domain, decoded.sequence, records)
    decoded.lost_records = lost or 0
    if lost is None:
        decoded.problem(f"Sequence Number went back to {decoded.sequence}: the exporter began anew")


def _sets(octets: memoryview, decoded: Decoded) -> Iterator[tuple[int, memoryview]]:
    """Set ID and content of each whole Set."""
    while octets:
        if len(octets) < SET_HEADER.size:
            decoded.problem(f"{len(octets)} octets behind the last Set")
            return
        set_id, length = SET_HEADER.unpack_from(octets)
        if not SET_HEADER.size <= length <= len(octets):
            decoded.problem(f"Set {set_id}: Length {length}, but {len(octets)} octets are left")
            return
        yield set_id, octets[SET_HEADER.size : length]
        octets = octets[length:]


def _define(octets: memoryview, domain: Domain, sessions: Sessions, decoded: Decoded, *, is_options: bool) -> None:
    """Take a Template Set's or Options Template Set's records. Raises RecordError where one cannot be."""
    while len(octets) >= 4 and any(octets):  # else padding
        template_id, count = struct.unpack_from(">HH", octets)
        octets = octets[4:]
        if count == 0 and template_id in (TEMPLATE_SET_ID, OPTIONS_TEMPLATE_SET_ID):
            sessions.withdraw_all(domain, is_options=is_options)
            continue
        if template_id < _FIRST_TEMPLATE_ID:
            raise RecordError(f"Template ID {template_id} is below {_FIRST_TEMPLATE_ID} (RFC 7011 §3.4.1)")
        sessions.withdraw(domain, template_id)
        if count == 0:
            continue
        if is_options:
            scopes = int.from_bytes(octets[:2], "big")
            octets = octets[2:]
            if not 1 <= scopes <= count:
                raise RecordError(f"Options Template {template_id}: {scopes} scope fields of {count}")
        specifiers, octets = _field_specifiers(octets, count, template_id)
        try:
            layout = Layout(specifiers, is_options=is_options, find=partial(sessions.element, domain))
        except RecordError as error:
            decoded.problem(f"Template {template_id}: {error}")
            continue
        sessions.define(domain, template_id, layout)
        decoded.templates.append((template_id, layout.names))


def _field_specifiers(octets: memoryview, count: int, template_id: int) -> tuple[list[FieldSpecifier], memoryview]:
    """So many Field Specifiers (RFC 7011 §3.2), and the octets behind them."""
    specifiers = []
    for number in range(1, count + 1):
        if len(octets) < 4:
            raise RecordError(f"Template {template_id} ends at field {number} of {count}")
        element_id, length = struct.unpack_from(">HH", octets)
        octets = octets[4:]
        enterprise = 0
        if element_id & ENTERPRISE_BIT:
            if len(octets) < 4:
                raise RecordError(f"Template {template_id} ends at field {number} of {count}")
            (enterprise,) = struct.unpack_from(">I", octets)
            octets = octets[4:]
        specifiers.append(FieldSpecifier(element_id & ~ENTERPRISE_BIT, length, enterprise))
    return specifiers, octets
