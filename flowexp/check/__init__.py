# SPDX-License-Identifier: GPL-2.0-or-later
"""`flowexp check`: would `run` work here, and what would it not see? Tries things rather than compare versions."""

from __future__ import annotations

from functools import partial
from typing import Iterator

from ..config import Config
from .collectors import of_collector
from .finding import FAILED, OK, Finding, tried
from .host import of_as_table, of_host, of_kernel
from .interfaces import of_interfaces, of_routing

__all__ = ["FAILED", "Finding", "check"]


def check(config: Config) -> Iterator[Finding]:
    """Findings as they are made. `config` has been read without an error, which is the first of them."""
    yield Finding(OK, "configuration", f"{len(config.collectors)} collectors, {config.table.max_flows} flows a family")
    yield from tried("kernel", lambda: of_kernel(config))
    yield from tried("host", lambda: of_host(config))
    yield from tried("interfaces", lambda: of_interfaces(config))
    yield from tried("routing", of_routing)
    yield from tried("as_table", lambda: of_as_table(config))
    for collector in config.collectors:
        yield from tried(str(collector.url), partial(of_collector, collector, config))
