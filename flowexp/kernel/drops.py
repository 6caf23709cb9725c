# SPDX-License-Identifier: GPL-2.0-or-later
"""Field group `drops`: the program at skb:kfree_skb (bpf/drops.bpf.c), and what its reasons are called.

Reasons are numbers of the running kernel, which has their names in its BTF and no other kernel's.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Dict, Mapping

import numpy as np

from ..errors import FlowexpError
from . import libbpf
from .layout import Array
from .loader import Prebuilt, data_path

_BTF = Path("/sys/kernel/btf/vmlinux")
_PROGRAM = "count_drops"
_PREFIX = "SKB_DROP_REASON_"
_NAME_OCTETS = 32

# forwardingStatus (IANA 89) of packets that are not forwarded: 128 and up.
_DROPPED = 128
_STATUS = {
    "NETFILTER_DROP": 130,  # ACL drop
    "IP_INNOROUTES": 131,  # unroutable
    "IP_OUTNOROUTES": 131,
    "NEIGH_CREATEFAIL": 132,  # adjacency
    "NEIGH_FAILED": 132,
    "NEIGH_QUEUEFULL": 132,
    "NEIGH_DEAD": 132,
    "PKT_TOO_BIG": 133,  # fragmentation, and DF is set
    "IP_CSUM": 134,
    "IP_RPFILTER": 140,  # RPF
}


class DropWatch:
    """Counts drops from now on until close()."""

    def __init__(self, maps: Mapping[str, int], settings: Array) -> None:
        """`maps`, `settings`: as for the packet path's programs. FlowexpError where this kernel lacks what it needs."""
        if not _BTF.exists():
            raise FlowexpError(f'[fields] groups: "drops" needs kernel BTF, and there is no {_BTF}; leave it out')
        settings = settings.copy()
        settings["netns_inode"] = os.stat("/proc/thread-self/ns/net").st_ino & 0xFFFFFFFF
        loaded = Prebuilt(data_path("drops.bpf.o")).load(names=(_PROGRAM,), maps=maps, settings=settings)
        try:
            self._attachment = libbpf.attach_tracing(loaded[_PROGRAM])
        except OSError as error:
            reason = f"skb:kfree_skb cannot be watched: {error.strerror}"
            raise FlowexpError(f'[fields] groups: "drops": {reason}') from error
        finally:
            os.close(loaded[_PROGRAM])

    def close(self) -> None:
        os.close(self._attachment)


@lru_cache(maxsize=None)
def reason_names() -> Dict[int, str]:
    """This kernel's reasons by number, less their common prefix; empty where it does not tell."""
    names = libbpf.kernel_enumerators("skb_drop_reason")
    return {number: name[len(_PREFIX) :] for number, name in names.items() if name.startswith(_PREFIX)}


def reason_columns(reasons: Array) -> Dict[str, Array]:
    """The reasons' names (as octets, zeros behind them), and the forwardingStatus of packets dropped so."""
    different, which = np.unique(reasons, return_inverse=True)
    names = [reason_names().get(number, str(number)) if number else "" for number in different.tolist()]
    octets = np.array([name.encode() for name in names], f"S{_NAME_OCTETS}").view(np.uint8)
    statuses = np.array([_STATUS.get(name, _DROPPED) for name in names], np.uint32)
    return {
        "drop_reason": octets.reshape(-1, _NAME_OCTETS)[which],
        "drop_status": statuses[which],
    }
