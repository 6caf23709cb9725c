# SPDX-License-Identifier: GPL-2.0-or-later
"""AS numbers of addresses, by a file of prefixes: one prefix and its AS number a line, of IPv4 and IPv6.

    198.51.100.0/24 64500            blanks, tabs or commas between; what follows is not looked at
    198.51.100.0    24    64500      as RouteViews' prefix2as has it; of 64500_64501 and 64500,64501 the first

However prefixes nest, they are flattened when the file is read: into ranges that follow one another, each with the AS
number of the longest prefix there. So the longest match of an address is one binary search, of many addresses at once.
"""

from __future__ import annotations

import ctypes
import gzip
import io
import socket
import zlib
from array import array
from pathlib import Path
from typing import List, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from .config import Fields
from .errors import UsageError
from .kernel.flows import Columns
from .kernel.layout import Array
from .keys import show
from .protocol.fieldgroups import AS_NUMBERS

_GZIP_MAGIC = b"\x1f\x8b"
_MOST = (1 << 32) - 1
_COMMENTS = "#;"
_FAMILIES = {4: socket.AF_INET, 16: socket.AF_INET6}  # by octets of an address


class Prefixes:
    """Prefixes of one address family, in the file's order."""

    def __init__(self, octets: int) -> None:
        """octets: of an address."""
        self._octets = octets
        self._first = bytearray()
        self._lengths = bytearray()
        self._numbers = array("I")

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, first: bytes, length: int, number: int) -> None:
        """first: the prefix's first address; number: of its AS."""
        self._first += first
        self._lengths.append(length)
        self._numbers.append(number)

    def flattened(self) -> Ranges:
        """Of a prefix that is there twice the first number holds."""
        lengths, numbers = np.frombuffer(self._lengths, np.uint8), np.frombuffer(self._numbers, np.uint32)
        first = np.frombuffer(self._first, np.uint8).reshape(-1, self._octets)
        zero = np.zeros((1, self._octets), np.uint8)
        addresses = _sortable(np.concatenate([zero, first, _behind(first, lengths)]))
        edges, places = np.unique(addresses, return_inverse=True)
        begin, end = places[1 : len(self) + 1], places[len(self) + 1 :]
        end = np.where(end == 0, len(edges), end)  # behind the last address there is
        known = np.zeros(len(edges), np.uint32)
        for length in np.unique(lengths):  # longer prefixes over shorter ones
            rows = np.flatnonzero(lengths == length)[::-1]
            counts = end[rows] - begin[rows]
            inside = np.repeat(begin[rows] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            known[inside] = np.repeat(numbers[rows], counts)
        is_edge = np.append(True, known[1:] != known[:-1])
        return Ranges(edges[is_edge], known[is_edge])


class Ranges(NamedTuple):
    """Ranges of addresses, each up to the next one; the first begins with the first address there is."""

    begin: Array  # ascending, as _sortable() has addresses
    numbers: Array  # u32, 0: no prefix has these addresses

    def look_up(self, addresses: Array) -> Array:
        """AS numbers (n,) of addresses (n, octets)."""
        wanted = _sortable(addresses)
        order = np.argsort(wanted)  # one near the other finds the way there in the cache: half the time
        found = np.empty(len(wanted), np.uint32)
        found[order] = self.numbers[np.searchsorted(self.begin, wanted[order], side="right") - 1]
        return found


def _sortable(addresses: Array) -> Array:
    """Addresses (n, 4 or 16) in network order as what numpy can put in order (n,)."""
    whole = np.ascontiguousarray(addresses)
    if whole.shape[1] == 4:
        return whole.view(">u4").reshape(-1).astype(np.uint32)
    return whole.view("S16").reshape(-1)


def _behind(first: Array, lengths: Array) -> Array:
    """The first addresses behind prefixes; 0 where there is none."""
    sums = first.astype(np.uint16)
    rows = np.flatnonzero(lengths)
    last_bit = lengths[rows] - 1
    sums[rows, last_bit >> 3] += np.right_shift(128, last_bit & 7, dtype=np.uint16)
    for octet in range(first.shape[1] - 1, 0, -1):
        sums[:, octet - 1] += sums[:, octet] >> 8
    return sums.astype(np.uint8)


class AsTable:
    """Which AS an address belongs to."""

    def __init__(self, source: Path, prefixes: Mapping[int, Prefixes]) -> None:
        """prefixes: by octets of an address, 4 and 16."""
        self._source = source
        self._families = {octets: each.flattened() for octets, each in prefixes.items()}
        self._counts = {octets: len(each) for octets, each in prefixes.items()}

    def __str__(self) -> str:
        return f"{self._source}: AS numbers by {self._counts[4]} IPv4 and {self._counts[16]} IPv6 prefixes"

    def look_up(self, addresses: Array) -> Array:
        """AS numbers (n,) u32 of addresses (n, 4 or 16) in network order; 0 where no prefix has them."""
        return self._families[addresses.shape[1]].look_up(addresses)


class AsNumbers:
    """Joins to flows the AS numbers of their addresses, while there is a table of them."""

    def __init__(self, table: Optional[AsTable] = None) -> None:
        self.table = table

    def __call__(self, columns: Columns) -> Columns:
        if self.table is None:
            return columns
        return {**columns, **{f"{side}_as": self.table.look_up(columns[f"{side}_addr"]) for side in ("src", "dst")}}


def as_table_of(fields: Fields) -> Optional[AsTable]:
    """Read anew; None where no record would tell of it. UsageError for what is wrong in the file."""
    if AS_NUMBERS not in fields.told:
        return None
    table = read_as_table(Path(fields.as_table))
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps most of what reading took, else
    if give_back is not None:
        give_back(0)
    return table


def read_as_table(path: Path) -> AsTable:
    """UsageError: the file, its line and what is wrong there."""
    prefixes = {octets: Prefixes(octets) for octets in _FAMILIES}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                words = line.replace(",", " ").split()
                if words and words[0][0] not in _COMMENTS:
                    try:
                        first, length, as_number = _parsed(words)
                    except ValueError as error:
                        raise UsageError(f"{path}:{number}: {error}") from error
                    prefixes[len(first)].add(first, length, as_number)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not any(map(len, prefixes.values())):
        raise UsageError(f"{path}: there is no prefix in it")
    return AsTable(path, prefixes)


def _lines(file: io.BufferedReader) -> io.TextIOWrapper:
    """Those of a file that may be gzipped."""
    is_gzipped = file.peek(2)[:2] == _GZIP_MAGIC
    return io.TextIOWrapper(gzip.GzipFile(fileobj=file) if is_gzipped else file, "ascii", "replace")


def _parsed(words: List[str]) -> Tuple[bytes, int, int]:
    """First address, length of the prefix, AS number. ValueError."""
    prefix, slash, length = words[0].partition("/")
    if not slash:
        length = words.pop(1) if len(words) > 1 else ""
    octets = 16 if ":" in prefix else 4
    try:
        first = socket.inet_pton(_FAMILIES[octets], prefix)
    except (OSError, ValueError) as error:
        raise ValueError(f"{show(prefix)} is no address") from error
    bits = 8 * octets
    if not length.isdigit() or int(length) > bits:
        raise ValueError(f"{show(length)} is no prefix length of 0 to {bits}, as in 198.51.100.0/24")
    if int.from_bytes(first, "big") << int(length) & (1 << bits) - 1:
        raise ValueError(f"{prefix}/{length} has bits set behind its length")
    as_number = words[1].partition("_")[0] if len(words) > 1 else ""
    if not as_number.isdigit() or int(as_number) > _MOST:
        raise ValueError(f"{show(as_number)} is no AS number of 0 to {_MOST}, as in 198.51.100.0/24 64500")
    return first, int(length), int(as_number)
