# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of several Collectors a flow's records go to: always the same, and both directions of a conversation alike.

By rendezvous hashing: each Collector has a score for each conversation, the highest takes it. So when one comes or
goes, only the conversations that it takes or had move. The hash is the same in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .sweep import Array

_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


def shares(columns: Mapping[str, Array], keys: Sequence[int]) -> Array:
    """For each flow, which of the Collectors with these keys it belongs to: an index."""
    hashes = conversations(columns)
    best, owners = np.zeros(len(hashes), np.uint64), np.zeros(len(hashes), np.intp)
    for number, key in enumerate(keys):
        scores = mixed(hashes ^ mixed(np.full(1, key, np.uint64)))
        owners[scores > best] = number
        best = np.maximum(best, scores)
    return owners


def conversations(columns: Mapping[str, Array]) -> Array:
    """A hash of addresses, ports and protocol, in which source and destination may change places."""
    source, destination = end_of(columns, "src"), end_of(columns, "dst")
    hashes: Array = mixed(source + destination + columns["protocol"].astype(np.uint64))
    return hashes


def end_of(columns: Mapping[str, Array], which: str) -> Array:
    """A hash of address and port of one end: "src" or "dst"."""
    words = np.ascontiguousarray(columns[f"{which}_addr"]).view("<u4").astype(np.uint64)
    hashes = mixed(columns[f"{which}_port"].astype(np.uint64))
    for word in range(words.shape[1]):
        hashes = mixed(hashes ^ words[:, word])
    return hashes


def mixed(values: Array) -> Array:
    """Every bit of each value in every bit of the result (splitmix64's finish)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIERS[1]
    result: Array = mixed ^ (mixed >> np.uint64(31))
    return result
