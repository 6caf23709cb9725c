# SPDX-License-Identifier: GPL-2.0-or-later
"""The layout of what kernel and exporter share, derived from the BPF object's BTF.

bpf/flow.h is its only source: no offset or size is typed here or anywhere else in Python. BTF is
described in the kernel's Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Tuple

import numpy as np

from ..errors import FlowexpError

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]
else:
    Array = np.ndarray  # numpy before 1.22 cannot be subscripted

_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF, _VOLATILE, _CONST = 1, 3, 4, 5, 6, 8, 9, 10
_FUNC_PROTO, _VAR, _DATASEC, _DECL_TAG, _ENUM64 = 13, 14, 15, 17, 19
_TRANSPARENT = (_TYPEDEF, _VOLATILE, _CONST)
# Octets that follow a type's first twelve: (once, for each of its members).
_TRAILER = {
    _INT: (4, 0),
    _ARRAY: (12, 0),
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    _FUNC_PROTO: (0, 8),
    _VAR: (4, 0),
    _DATASEC: (0, 12),
    _DECL_TAG: (4, 0),
    _ENUM64: (0, 12),
}
SHARED = ("flow_hot4", "flow_hot6", "flow_cold", "bucket_tags", "counters", "settings", "control", "journal",
          "flow_sizes", "flow_timing", "flow_tcp", "flow_congestion", "flow_integrity", "flow_drops",
          "flow_application", "flow_tunnels", "sampler", "payload", "fragment_key", "fragment_value", "handshake_key",
          "handshake", "arrival", "captured", "__sk_buff")  # fmt: skip
# What need not be equal for a table to be taken over, as it is not in the table.
_BESIDE_TABLE = ("settings", "sampler", "payload", "fragment_key", "fragment_value", "handshake_key", "handshake",
                 "arrival", "captured", "__sk_buff")  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Structs as numpy types and the enumerators of bpf/flow.h; `digest` tells layouts apart."""

    structs: Mapping[str, np.dtype[Any]]
    constants: Mapping[str, int]
    digest: int

    def counter_names(self) -> List[str]:
        """The names of `enum counter` in order, in lower case and less COUNT_."""
        found = sorted((n, name) for name, n in self.constants.items() if name.startswith("COUNT_"))
        return [name[len("COUNT_") :].lower() for _, name in found]


def read_layout(btf: bytes) -> Layout:
    """The layout in an object's BTF section, `btf`; FlowexpError where a struct of flow.h is missing."""
    types = _Btf(btf)
    structs = {}
    for name in SHARED:
        found = [t for t in types.types if t.kind == _STRUCT and t.name == name]
        if not found:
            raise FlowexpError(f"BPF object: struct {name} is not in its BTF; build it from this version's bpf/")
        structs[name] = types.dtype(found[0])
    constants = dict(types.enumerators())
    of_table = [(name, structs[name]) for name in SHARED if name not in _BESIDE_TABLE]
    table = repr(of_table) + repr(sorted(constants.items()))
    digest = int.from_bytes(hashlib.sha256(table.encode()).digest()[:8], "little")
    return Layout(structs, constants, digest)


@dataclass(frozen=True)
class _Type:
    name: str
    kind: int
    size: int  # octets; of a kind that refers to another type, that type's id
    trailer: bytes


class _Btf:
    """The types of one .BTF section, in the object's own byte order."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 24:
            raise FlowexpError("BPF object: its .BTF section is cut off; build it again")
        self._order = "<" if data[:2] == b"\x9f\xeb" else ">"
        header, type_at, type_octets, name_at, name_octets = struct.unpack_from(self._order + "4x5I", data)
        self._names = data[header + name_at :][:name_octets]
        self.types = [_Type("void", 0, 0, b"")]
        self.types += self._walk(data[header + type_at :][:type_octets])

    def _walk(self, data: bytes) -> Iterator[_Type]:
        at = 0
        while at < len(data):
            name, info, size = struct.unpack_from(self._order + "3I", data, at)
            kind = info >> 24 & 31
            once, each = _TRAILER.get(kind, (0, 0))
            end = at + 12 + once + each * (info & 0xFFFF)
            yield _Type(self._name(name), kind, size, data[at + 12 : end])
            at = end

    def _name(self, offset: int) -> str:
        return self._names[offset : self._names.index(b"\0", offset)].decode()

    def enumerators(self) -> Iterator[Tuple[str, int]]:
        for enum in self.types:
            if enum.kind == _ENUM:
                for name, value in struct.iter_unpack(self._order + "Ii", enum.trailer):
                    yield self._name(name), value

    def dtype(self, found: _Type) -> np.dtype[Any]:
        if found.kind in _TRANSPARENT:
            return self.dtype(self.types[found.size])
        if found.kind == _INT:
            return np.dtype(f"{self._order}u{found.size}")
        if found.kind == _ENUM:
            return np.dtype(f"{self._order}i4")
        if found.kind == _ARRAY:
            element, _, count = struct.unpack(self._order + "3I", found.trailer)
            return np.dtype((self.dtype(self.types[element]), (count,)))
        if found.kind == _STRUCT:
            return self._struct(found)
        if found.kind == _UNION:  # of the kernel's own; nobody looks into one
            return np.dtype(f"V{found.size}")
        raise FlowexpError(f"BPF object: BTF kind {found.kind} ({found.name}) has no numpy type")

    def _struct(self, found: _Type) -> np.dtype[Any]:
        members: Dict[str, Tuple[np.dtype[Any], int]] = {}
        for name, type_id, bits in struct.iter_unpack(self._order + "3I", found.trailer):
            dtype = self.dtype(self.types[type_id])
            if dtype.itemsize:
                members[self._name(name)] = (dtype, bits // 8)
        return np.dtype(
            {
                "names": list(members),
                "formats": [dtype for dtype, _ in members.values()],
                "offsets": [offset for _, offset in members.values()],
                "itemsize": found.size,
            }
        )
