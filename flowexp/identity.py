# SPDX-License-Identifier: GPL-2.0-or-later
"""Who this exporter is to its Collectors: an Observation Domain ID that outlives restarts and reinstallations."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

_MACHINE_ID = Path("/etc/machine-id")


def observation_domain_id(configured: int, table: str = "") -> int:
    """The configured one, or else one derived from the host and from `table`, which names one of its flow tables: 1 to
    4,294,967,295, always the same.

    Collectors key Templates and sampling by it, so two exporters should not share one, be they on two hosts or on
    one: it is a hash of the machine id (the host's name where there is none), not a counter.
    """
    if configured:
        return configured
    try:
        host = _MACHINE_ID.read_text(encoding="ascii").strip()
    except OSError:
        host = ""
    words = f"flowexp observation domain {host or socket.gethostname()} {table}".encode()
    digest = hashlib.sha256(words).digest()
    return int.from_bytes(digest[:4], "big") or 1
