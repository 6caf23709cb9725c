# SPDX-License-Identifier: GPL-2.0-or-later
"""One Collector's Transport Session: an encoder, a transport, and when Templates are due.

Nothing is sent twice and nothing is forgotten: Messages that no longer fit the path are encoded
again, smaller, from the rows that were not sent; what the transport could not send is counted there
as failed, and its Sequence Numbers are used up, so that the Collector sees the gap.
"""

from __future__ import annotations

import logging
from typing import Dict, Optional, Union

import numpy as np

from .errors import FlowexpError
from .protocol.elements import Columns
from .protocol.encoder import Burst, Encoder, MessageSizeError
from .transport.base import QuietLog, Sent, Transport, warnings_of

_log = logging.getLogger(__name__)


class CollectorSession:
    """Sends columns to one Collector. Templates go first, and again every `refresh_ns`."""

    def __init__(self, transport: Transport, encoder: Encoder, *, refresh_ns: int) -> None:
        self.transport = transport
        self._encoder = encoder
        self._refresh_ns = refresh_ns
        self._warn = QuietLog(warnings_of(__name__))
        self.trouble: Optional[FlowexpError] = None
        """The last thing that the transport could not do; its Messages count as failed."""
        self._announced_ns: Optional[int] = None

    @property
    def sequence_number(self) -> int:
        """That of the next Message."""
        return self._encoder.sequence_number

    @property
    def announced_ns(self) -> Optional[int]:
        """When Templates went last, boot time; None: never yet."""
        return self._announced_ns

    def announce_if_due(self, now_ns: int, export_time_s: int) -> None:
        """Templates and Options, if their time has come (`now_ns`: boot time) or the transport asks for them."""
        asked = self.transport.take_templates_due()
        age_ns = None if self._announced_ns is None else now_ns - self._announced_ns
        if not asked and age_ns is not None and age_ns < self._refresh_ns:
            return
        self._announced_ns = now_ns
        while not self._announce(export_time_s):
            pass

    def send(self, columns: Columns, now_ns: int, export_time_s: int) -> None:
        """Data Records for every row of `columns`, Templates before them where due."""
        self.announce_if_due(now_ns, export_time_s)
        rest: Optional[Columns] = self._as_records(columns)
        while rest is not None:
            self._fit()
            rest = self._send_once(rest, export_time_s)

    def _announce(self, export_time_s: int) -> bool:
        """Sends Templates and Options; False where the path has just narrowed: they go again, smaller."""
        self._fit()
        for burst in self._encoder.announce(export_time_s):
            if self._hand_over(burst).too_big:
                return False
            self._encoder.commit(burst)
        return True

    def status(self) -> Dict[str, Union[str, int]]:
        """The transport's, and how many flows the protocol could not tell of."""
        return {**self.transport.status(), "flows_not_representable": self._encoder.flows_not_representable}

    def _as_records(self, columns: Columns) -> Columns:
        """What the protocol can tell of; the first flow of which it cannot is worth a warning, the rest a count."""
        before = self._encoder.flows_not_representable
        records = self._encoder.as_records(columns)
        if not before and self._encoder.flows_not_representable:
            name = self.transport.status()["collector"]
            _log.warning("%s: its protocol has no IPv6: such flows are counted and not sent", name)
        return records

    def _send_once(self, columns: Columns, export_time_s: int) -> Optional[Columns]:
        """Sends as long as Messages fit the path. Returns the rows that did not, None if there are none."""
        bursts = self._encoder.encode(columns, export_time_s)
        for number, burst in enumerate(bursts):
            sent = self._hand_over(burst)
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

    def _hand_over(self, burst: Burst) -> Sent:
        """Sends a Burst. What the transport cannot do (its disk is full) it has counted; the next may go again."""
        try:
            return self.transport.send(burst)
        except FlowexpError as error:
            self.trouble = error
            self._warn("transport", str(error))
            return Sent(0)

    def _fit(self) -> None:
        """Messages as large as the path carries now."""
        octets = self.transport.max_message_octets()
        if octets != self._encoder.max_message_octets:
            try:
                self._encoder.max_message_octets = octets
            except MessageSizeError as error:
                raise FlowexpError(
                    f"{self.transport.status()['collector']}: its path is too narrow: {error}"
                ) from error
