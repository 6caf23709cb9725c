# SPDX-License-Identifier: GPL-2.0-or-later
"""Which table packets go to: an earlier exporter's, or a new one beside those that are still to be exported.

Whatever happens until the programs have been replaced, both are found by the next exporter.
"""

from __future__ import annotations

from typing import Callable, List, Optional, Tuple

from .config import Config
from .errors import FlowexpError
from .kernel.loader import loader_named
from .kernel.pins import PinFolder, TablePins
from .kernel.table import FlowTable, LayoutDiffers, table_octets
from .meter import this_layout
from .service import available_octets, memory_sentence

Pinned = Tuple[TablePins, FlowTable]


def find_tables(folder: PinFolder, config: Config, warn: Callable[[str, str], None]) -> Tuple[List[Pinned], bool]:
    """Those that earlier exporters have left, oldest first, and whether packets can go on into the newest.

    They can if it has our layout, size, field groups and sampling.
    """
    layout = this_layout(loader_named(config.loader))
    found: List[Pinned] = []
    for pins in folder.tables():
        maps = pins.find_maps(FlowTable.map_names(layout))
        try:
            if maps is not None:
                found.append((pins, FlowTable.adopt(layout, maps)))
                continue
            warn("pins", f"{pins.path}: not a whole table; removed")
        except LayoutDiffers as error:
            warn("layout", f"{pins.path}: {error}; what it holds cannot be exported")
        pins.clear()
    wanted = config.table.max_flows, config.fields.groups, config.sampling.rates
    return found, bool(found) and found[-1][1].is_for(*wanted)


def new_table(config: Config, before: Optional[FlowTable]) -> FlowTable:
    """Not pinned yet. All flows of the table before will come at once: then all of it is in use from the start."""
    layout = this_layout(loader_named(config.loader))
    needed, available = table_octets(layout, config.table.max_flows, config.fields.groups), available_octets()
    if available is not None and needed > available:  # which the kernel would find out by killing somebody
        raise FlowexpError(f"{memory_sentence(needed, available)}; lower [table] max_flows")
    table = FlowTable.create(
        layout,
        config.table.max_flows,
        config.fields.groups,
        rates=config.sampling.rates,
        begin_small=before is None,
    )
    if before is not None:
        table.take_collectors(before)
    return table
