# SPDX-License-Identifier: GPL-2.0-or-later
"""`flowexp detach`: an exporter with `persist` leaves its programs metering; this takes them away."""

from __future__ import annotations

import logging

from .config import Config
from .errors import FlowexpError
from .kernel import netlink
from .kernel.capabilities import not_permitted
from .kernel.loader import loader_named
from .kernel.owners import handle_of, handles_left
from .kernel.pins import PinFolder
from .kernel.table import FlowTable, LayoutDiffers
from .meter import read_ledger, this_layout
from .status import socket_path

_log = logging.getLogger(__name__)


def detach(config: Config) -> None:
    """Takes everything out of the kernel that an exporter with persist has left: programs, table, flows.

    FlowexpError where that is not permitted, or while an exporter runs.
    """
    pins = PinFolder(config.table.pin_path)
    pins.hold()
    try:
        layout = this_layout(loader_named(config.loader))
        was_empty = not pins.tables() and not pins.has_links()
        for pinned in pins.tables():
            maps = pinned.find_maps(FlowTable.map_names(layout))
            try:
                if maps is not None:
                    _log.info("%s: %s", pinned.path, read_ledger(FlowTable.adopt(layout, maps)))
            except LayoutDiffers as error:
                _log.info("%s: %s", pinned.path, error)
        netlink.remove_filters(handle_of(config.table.pin_path), handles_left())
        pins.clear()
        socket_path(config.table.pin_path).unlink(missing_ok=True)  # a killed exporter's
        if was_empty:
            _log.info("%s: nothing had been left there", pins.path)
    except PermissionError as error:
        raise FlowexpError(f"{pins.path}: {not_permitted()}") from error
    finally:
        pins.release()
