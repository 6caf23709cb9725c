# SPDX-License-Identifier: GPL-2.0-or-later
"""Which capabilities the packet path needs, and which of them this process lacks: for messages, never to decide."""

from __future__ import annotations

from pathlib import Path
from typing import List

_SYS_ADMIN = 21  # has been CAP_BPF and CAP_PERFMON in one, and still stands for both
_NEEDED = {"CAP_BPF": (39, _SYS_ADMIN), "CAP_NET_ADMIN": (12,), "CAP_PERFMON": (38, _SYS_ADMIN)}


def missing_capabilities() -> List[str]:
    """The names of those that this thread does not have in effect."""
    status = Path("/proc/thread-self/status").read_text(encoding="ascii", errors="replace")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return [name for name, bits in _NEEDED.items() if not any(effective >> bit & 1 for bit in bits)]


def not_permitted() -> str:
    """What EPERM means, in the operator's words."""
    missing = " and ".join(missing_capabilities())
    if missing:
        return f"not permitted without {missing}; run as root, or grant that"
    return "not permitted, though no capability is missing; a container or a security module may forbid it"
