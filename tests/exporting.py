# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that can be told apart, sent over a stream as the exporter would."""

from __future__ import annotations

from typing import Any

from columns import flows

from flowexp.protocol.ipfix import MessageEncoder
from flowexp.protocol.options import Facts
from flowexp.protocol.template import default_templates
from flowexp.session import CollectorSession
from flowexp.transport.stream import StreamTransport

SECOND_NS = 10**9
EXPORT_TIME_S = 1_700_000_000


class Sending:
    """A session over a transport; each flow's source port is its number."""

    def __init__(self, transport: StreamTransport) -> None:
        self.transport = transport
        transport.open()
        encoder = MessageEncoder(
            observation_domain_id=1,
            max_message_octets=transport.max_message_octets(),
            templates=default_templates(),
        )
        self.facts = Facts()
        self.session = CollectorSession(transport, encoder, refresh_ns=60 * SECOND_NS, facts=lambda: self.facts)
        self.sent = 0

    def send(self, count: int) -> list[int]:
        """So many flows; their numbers."""
        numbers = list(range(self.sent + 1, self.sent + 1 + count))
        columns = flows(count, first_port=self.sent + 1)
        columns["vlan_tagged"][:] = False  # one Template: so the order is that of the flows
        self.session.send(columns, 0, EXPORT_TIME_S)
        self.sent += count
        return numbers

    def figure(self, name: str) -> Any:
        return self.transport.status()[name]
