# SPDX-License-Identifier: GPL-2.0-or-later
"""Who this exporter is to its Collectors: an Observation Domain ID that outlives restarts and reinstallations."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

_MACHINE_ID = Path("/etc/machine-id")


def observation_domain_id(configured: int) -> int:
    """The configured one, or else one derived from the host: 1 to 4,294,967,295, always the same.

    Collectors key Templates and sampling by it, so two hosts should not share one: it is a hash of
    the machine id (the host's name where there is none), not a counter.
    """
    if configured:
        return configured
    try:
        host = _MACHINE_ID.read_text(encoding="ascii").strip()
    except OSError:
        host = ""
    digest = hashlib.sha256(b"flowexp observation domain " + (host or socket.gethostname()).encode()).digest()
    return int.from_bytes(digest[:4], "big") or 1
