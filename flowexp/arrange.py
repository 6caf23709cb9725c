# SPDX-License-Identifier: GPL-2.0-or-later
"""What `dump` does with flows before it shows them: sums over fewer keys, an order, the first so many.

All of it works on columns. Sums are those of aggregation in RFC 7015: packets, octets, deltaFlowCount, and from the
first start to the last end. An aggregate is Columns again, so that every format takes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Callable

import numpy as np

from flowexp.errors import UsageError
from flowexp.kernel.flows import Columns
from flowexp.kernel.layout import Array
from flowexp.protocol.elements import MEASURED, measured
from flowexp.protocol.registry import ElementError
from flowexp.protocol.template import CONDITIONS, FAMILIES, TemplateSpec, template_spec

SHORT_NAMES = {
    "src": "sourceIPv4Address", "dst": "destinationIPv4Address",
    "sport": "sourceTransportPort", "dport": "destinationTransportPort", "proto": "protocolIdentifier",
    "icmp": "icmpTypeCodeIPv4", "vlan": "vlanId", "tos": "ipClassOfService", "dscp": "ipDiffServCodePoint",
    "in": "ingressInterface", "out": "egressInterface",
    "smac": "sourceMacAddress", "dmac": "destinationMacAddress",
}  # fmt: skip
_SUMS = ("deltaFlowCount", "packetDeltaCount", "octetDeltaCount", "flowStartMilliseconds", "flowEndMilliseconds")
_SUMMED = {"flows": np.add, "packets": np.add, "octets": np.add, "start_ns": np.minimum, "end_ns": np.maximum}
_AT_ONCE = 1 << 17  # rows that are kept before they are summed, or cut, again


def _most(name: str) -> Callable[[Columns], Array]:
    return lambda columns: ~columns[name].astype(np.uint64)


ORDERS: dict[str, Callable[[Columns], Array]] = {
    "octets": _most("octets"),
    "packets": _most("packets"),
    "flows": _most("flows"),
    "duration": lambda columns: columns["start_ns"] - columns["end_ns"],
    "start": lambda columns: columns["start_ns"],
    "end": lambda columns: columns["end_ns"],
}
"""What flows can be sorted by: the most first, of times the earliest first."""


def aggregate_spec(keys: str) -> TemplateSpec:
    """What an aggregate over these keys carries: `src,dst`, or IANA's names. UsageError for what is no key."""
    names = [SHORT_NAMES.get(key.strip(), key.strip()) for key in keys.split(",")]
    if "" in names:
        raise UsageError(f"--aggregate {keys}: a key is empty; short names are {', '.join(SHORT_NAMES)}")
    try:
        spec = template_spec("aggregate", names)
    except ElementError as error:
        raise UsageError(f"--aggregate {keys}: {error}; short names are {', '.join(SHORT_NAMES)}") from error
    for name in names:
        if set(measured(name).columns) & {*_SUMMED, "octets_total", "packets_total"}:
            raise UsageError(f"--aggregate {keys}: {name} is summed, and no key")
    return template_spec("aggregate", [*map(str, spec.fields), *_SUMS])


def aggregated(parts: Iterable[Columns], spec: TemplateSpec) -> Iterator[Columns]:
    """One flow for all that are alike in the keys of `spec`; if no key is of one address family, over both."""
    keys = [field.name for field in spec.fields if field.name not in _SUMS]
    kept: dict[int, Columns] = {}
    waiting: dict[int, list[Columns]] = {}
    for part in parts:
        if len(part["packets"]):
            version, narrow = _narrowed(part, keys)
            waiting.setdefault(version, []).append(narrow)
        for version, some in waiting.items():
            if sum(len(each["packets"]) for each in some) > _AT_ONCE:
                kept[version] = _summed([*_known(kept, version), *some], _of_family(keys, version))
                some.clear()
    for version in sorted({*kept, *waiting}):
        yield _summed([*_known(kept, version), *waiting.get(version, ())], _of_family(keys, version))


def _known(kept: dict[int, Columns], version: int) -> list[Columns]:
    return [kept[version]] if version in kept else []


def _of_family(keys: Iterable[str], version: int) -> list[str]:
    """The keys as flows of one family have them: of the other family's elements their twins."""
    twins = (name.replace(FAMILIES[10 - version], FAMILIES[version]) for name in keys)
    return [name for name in dict.fromkeys(twins) if name in MEASURED]


def _narrowed(part: Columns, keys: Sequence[str]) -> tuple[int, Columns]:
    """Only the columns that the keys and the sums need. Where no key tells address families apart, IPv4's are no
    addresses at all."""
    version = 4 if part["src_addr"].shape[1] == 4 else 6
    of_family = _of_family(keys, version)
    conditions = [CONDITIONS[measured(key).only] for key in of_family if measured(key).only in CONDITIONS]
    needed = {column for key in of_family for column in measured(key).columns}
    needed |= {column for condition in conditions for column in condition.columns}
    absent = sorted(needed - part.keys())
    if absent:
        lacking = next(key for key in of_family if set(measured(key).columns) & set(absent))
        raise UsageError(f"--aggregate: {lacking} is not measured here; its field group is off")
    narrow = {name: part[name] for name in (*needed, *_SUMMED)}
    if any(family in key for key in keys for family in FAMILIES.values()):
        return version, {**narrow, "src_addr": part["src_addr"]}
    return 4, {**narrow, "src_addr": np.zeros((len(part["packets"]), 4), np.uint8)}


def _summed(parts: Sequence[Columns], keys: Sequence[str]) -> Columns:
    flows = joined(parts)
    columns: list[Array] = []
    for key in keys:
        element = measured(key)
        present = CONDITIONS[element.only].of(flows) if element.only in CONDITIONS else None
        values = element.values(flows)
        if present is not None:
            columns.append(present)
            values = np.where(present.reshape(-1, *[1] * (values.ndim - 1)), values, values.dtype.type(0))
        columns.append(values)
    _, first, row = np.unique(row_octets(columns), return_index=True, return_inverse=True)
    order = np.argsort(row, kind="stable")
    starts = np.searchsorted(row[order], np.arange(len(first)))
    sums = {name: how.reduceat(flows[name][order], starts) for name, how in _SUMMED.items()}
    return {**{name: column[first] for name, column in flows.items()}, **sums}


def row_octets(columns: Sequence[Array]) -> Array:
    """The octets of each row of all these arrays (n, ...) as one byte string (n,), n > 0."""
    rows = len(columns[0])
    octets = np.hstack([np.ascontiguousarray(each).view(np.uint8).reshape(rows, -1) for each in columns])
    return np.ascontiguousarray(octets).view(f"S{octets.shape[1]}").reshape(-1)


def joined(parts: Sequence[Columns]) -> Columns:
    """Flows of one address family in one."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def first(parts: Iterable[Columns], limit: int) -> Iterator[Columns]:
    """The first `limit` flows; no more of `parts` is asked for than that takes."""
    left = limit
    for part in parts:
        yield part if len(part["packets"]) <= left else {name: column[:left] for name, column in part.items()}
        left -= len(part["packets"])
        if left <= 0:
            return


def in_order(parts: Iterable[Columns], by: str, limit: int | None) -> tuple[list[Columns], Array]:
    """All flows, each family in one, and the numbers of the first `limit` among them in their order.

    Of flows that are alike in `by` those with the most octets come first. With a limit no more is kept than twice
    as many, or a few parts.
    """
    kept: list[Columns] = []
    order = np.empty(0, np.intp)
    parts = iter(parts)
    while some := list(islice(parts, 64)):
        families: dict[int, list[Columns]] = {}
        for part in [*kept, *some]:
            families.setdefault(part["src_addr"].shape[1], []).append(part)
        kept = [joined(each) for _, each in sorted(families.items())]
        order = _order(kept, by)[:limit]
        if limit is not None:
            kept, order = only(kept, order)
    return kept, order


def _order(parts: Sequence[Columns], by: str) -> Array:
    keys = [np.concatenate([ORDERS[name](part) for part in parts]) for name in ("octets", by)]
    ordered: Array = np.lexsort(keys)
    return ordered


def only(parts: Iterable[Columns], order: Array) -> tuple[list[Columns], Array]:
    """The chosen flows without the others, each family in their order, and that order."""
    chosen: list[Columns] = []
    place = np.empty(len(order), np.intp)
    begin = done = 0
    for part in parts:
        mine = np.flatnonzero((order >= begin) & (order < begin + len(part["packets"])))
        rows: Any = order[mine] - begin
        chosen.append({name: column[rows] for name, column in part.items()})
        place[mine] = done + np.arange(len(mine))
        begin, done = begin + len(part["packets"]), done + len(mine)
    return chosen, place
