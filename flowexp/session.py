# SPDX-License-Identifier: GPL-2.0-or-later
"""One Collector's Transport Session: an encoder, a transport, and when Templates are due.

Nothing is sent twice and nothing is forgotten: Messages that no longer fit the path are encoded
again, smaller, from the rows that were not sent; what the transport could not send is counted there
as failed, and its Sequence Numbers are used up, so that the Collector sees the gap.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from .protocol.elements import Columns
from .protocol.ipfix import MessageEncoder
from .transport.base import Transport


class CollectorSession:
    """Sends columns to one Collector. Templates go first, and again every `refresh_ns`."""

    def __init__(self, transport: Transport, encoder: MessageEncoder, *, refresh_ns: int) -> None:
        self.transport = transport
        self._encoder = encoder
        self._refresh_ns = refresh_ns
        self._announced_ns: Optional[int] = None

    @property
    def sequence_number(self) -> int:
        """That of the next Message."""
        return self._encoder.sequence_number

    def announce_if_due(self, now_ns: int, export_time_s: int) -> None:
        """Templates and Options, if their time has come (`now_ns`: boot time) or the transport asks for them."""
        asked = self.transport.take_templates_due()
        age_ns = None if self._announced_ns is None else now_ns - self._announced_ns
        if not asked and age_ns is not None and age_ns < self._refresh_ns:
            return
        self._announced_ns = now_ns
        self._fit()
        for burst in self._encoder.announce(export_time_s):
            self.transport.send(burst)
            self._encoder.commit(burst)

    def send(self, columns: Columns, now_ns: int, export_time_s: int) -> None:
        """Data Records for every row of `columns`, Templates before them where due."""
        self.announce_if_due(now_ns, export_time_s)
        rest: Optional[Columns] = columns
        while rest is not None:
            self._fit()
            rest = self._send_once(rest, export_time_s)

    def _send_once(self, columns: Columns, export_time_s: int) -> Optional[Columns]:
        """Sends as long as Messages fit the path. Returns the rows that did not, None if there are none."""
        bursts = self._encoder.encode(columns, export_time_s)
        for number, burst in enumerate(bursts):
            sent = self.transport.send(burst)
            if not sent.too_big:
                self._encoder.commit(burst)
                continue
            pieces = list(burst.split(sent.messages)) if sent.messages else [burst]
            if sent.messages:
                self._encoder.commit(pieces.pop(0))
            rows = [left.rows for left in pieces + bursts[number + 1 :]]
            remaining = np.concatenate(rows)
            return {name: column[remaining] for name, column in columns.items()}
        return None

    def _fit(self) -> None:
        """Messages as large as the path carries now."""
        octets = self.transport.max_message_octets()
        if octets != self._encoder.max_message_octets:
            self._encoder.max_message_octets = octets
