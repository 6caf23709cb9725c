# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a running exporter says how it is: its status socket, and the metrics endpoint that asks there."""

from __future__ import annotations

import logging
from functools import partial
from typing import Callable, Optional, Tuple

from .config import Config
from .status import Status, StatusSocket, ask, socket_path

_log = logging.getLogger(__name__)


class Publishing:
    """Nothing is there before open(). What cannot be offered does not stop the exporter, but for a metrics endpoint
    that is configured."""

    def __init__(self) -> None:
        self.socket: Optional[StatusSocket] = None
        """What to wait for, to answer(); None: there is none."""
        self._metrics_address: Optional[Tuple[str, int]] = None
        self._end_metrics: Optional[Callable[[], None]] = None

    def open(self, config: Config) -> None:
        """Makes the status socket, and serves metrics where that is configured."""
        pin_path = config.table.pin_path
        try:
            self.socket = StatusSocket(pin_path)
        except OSError as error:
            reason = error.strerror or error
            _log.warning("%s: %s; there will be no status and no metrics", socket_path(pin_path), reason)
        self.serve_metrics(config)

    def serve_metrics(self, config: Config) -> None:
        """Where that configuration says, and nowhere else any more. FlowexpError leaves all as it is."""
        if config.metrics.address == self._metrics_address:
            return
        end = None
        if config.metrics.address is not None:
            from .metrics import serve  # a library that not everybody has

            end = serve(config.metrics.address, partial(ask, config.table.pin_path))
        if self._end_metrics is not None:
            self._end_metrics()
        self._metrics_address, self._end_metrics = config.metrics.address, end

    def answer(self, snapshot: Callable[[], Status]) -> None:
        """Answers one who waits for the status, if anyone does."""
        if self.socket is not None:
            self.socket.answer(snapshot)

    def close(self) -> None:
        """Nobody is answered any more; the metrics endpoint ends with the process, and says until then what is up."""
        if self.socket is not None:
            self.socket.close()
