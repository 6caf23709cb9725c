# SPDX-License-Identifier: GPL-2.0-or-later
"""IPFIX abstract data types (RFC 7012 §3.1): how values look on the wire and in JSON, and nowhere else.

One row a type. "JSON form" means: addresses and MACs as text, numbers as numbers, times as integers in
the unit of the type (Unix epoch), whatever has no such form as hexadecimal text. On the wire everything
is in network byte order (RFC 7011 §6).
"""

from __future__ import annotations

import math
import struct
from socket import AF_INET, AF_INET6, inet_ntop  # text conversion only
from typing import TYPE_CHECKING, Any, Callable, Dict, NamedTuple, Union

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

Json = Union[int, float, str, bool]

VARIABLE_LENGTH = 0xFFFF  # the Field Length that says so (RFC 7011 §7)

NUMPY_LENGTHS = (1, 2, 4, 8)  # of numbers that numpy can store; others are stored as octets

_UNIX_EPOCH_NTP_S = 2_208_988_800  # 1970 on a clock that starts in 1900
_NTP_ERA_S = 1 << 32
_MICROSECOND_FRACTION = 0xFFFFF800  # RFC 7011 §6.1.9: the lowest eleven bits are not used


class Once(Dict[Any, Any]):
    """What a function makes of each key, made once: values in columns come again and again."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: Any) -> Any:
        value = self[key] = self._make(key)
        return value


class DataType(NamedTuple):
    """How values of one abstract data type are stored, written, read and shown."""

    octets: int  # full length; 0: variable
    shorter: tuple[int, ...]  # lengths that reduced-size encoding allows beside it (RFC 7011 §6.2)
    read: Callable[[bytes], Json]  # the octets of one field -> JSON form
    show: Callable[[Array], list[Any]]  # a column -> JSON form
    wire: Callable[[Array], Array]  # a column -> what numpy can assign to a field of `storage`
    kind: str  # numpy kind on the wire: "u" big-endian number, "V" octets as they are

    def allows(self, length: int) -> bool:
        """Whether a field of this type may have `length` octets."""
        return self.octets in (0, length) or length in self.shorter

    def storage(self, length: int) -> np.dtype[Any]:
        """The numpy type of a field of `length` octets, in network byte order."""
        is_number = self.kind == "u" and length in NUMPY_LENGTHS
        return np.dtype(f">u{length}" if is_number else f"V{length}")


def read_unsigned(octets: bytes) -> int:
    """An unsigned number of any length, network byte order."""
    return int.from_bytes(octets, "big")


def read_hexadecimal(octets: bytes) -> str:
    """The fallback: what has no better form."""
    return octets.hex()


def _read_signed(octets: bytes) -> int:
    return int.from_bytes(octets, "big", signed=True)


def _read_float(octets: bytes) -> Json:
    (value,) = struct.unpack(">d" if len(octets) == 8 else ">f", octets)
    return float(value) if math.isfinite(value) else str(value)  # JSON has no NaN and no infinity


def _read_boolean(octets: bytes) -> Json:
    return {b"\x01": True, b"\x02": False}.get(octets, octets.hex())  # RFC 7011 §6.1.5


def _read_string(octets: bytes) -> str:
    return octets.rstrip(b"\0").decode("utf-8", "replace")


def _read_mac(octets: bytes) -> str:
    return octets.hex(":")


def _read_ipv4(octets: bytes) -> str:
    return inet_ntop(AF_INET, octets)


def _read_ipv6(octets: bytes) -> str:
    return inet_ntop(AF_INET6, octets)


def _read_ntp(units_per_second: int) -> Callable[[bytes], int]:
    def read(octets: bytes) -> int:
        seconds, fraction = divmod(read_unsigned(octets), 1 << 32)
        if units_per_second == 1_000_000:
            fraction &= _MICROSECOND_FRACTION
        era = 0 if seconds >> 31 else _NTP_ERA_S  # a clear top bit: 2036 and later
        units = (fraction * units_per_second + _NTP_ERA_S // 2) // _NTP_ERA_S
        return (seconds + era - _UNIX_EPOCH_NTP_S) * units_per_second + units

    return read


def _wire_ntp(units_per_second: int) -> Callable[[Array], Array]:
    mask = np.uint64(_MICROSECOND_FRACTION if units_per_second == 1_000_000 else 0xFFFFFFFF)

    def wire(unix_units: Array) -> Array:
        seconds, units = np.divmod(unix_units.astype(np.uint64), np.uint64(units_per_second))
        fraction = (units << np.uint64(32)) // np.uint64(units_per_second)
        ntp: Array = ((seconds + np.uint64(_UNIX_EPOCH_NTP_S)) << np.uint64(32)) | (fraction & mask)
        return ntp

    return wire


def _as_it_is(column: Array) -> Array:
    return column


def _as_octets(column: Array) -> Array:
    """A column of shape (n, k), one octet an item, as n items of k octets."""
    octets: Array = np.ascontiguousarray(column).view(f"V{column.shape[1]}")[:, 0]
    return octets


def last_octets(column: Array, length: int) -> Array:
    """Numbers as their last `length` octets in network byte order, n items."""
    octets = column.astype(">u8").view(np.uint8).reshape(-1, 8)
    return _as_octets(octets[:, 8 - length :])


def _show_numbers(column: Array) -> list[Any]:
    numbers: list[Any] = column.tolist()
    return numbers


def _show_octets(read: Callable[[bytes], Json]) -> Callable[[Array], list[Any]]:
    def show(column: Array) -> list[Any]:
        octets = _as_octets(column).tolist()
        return list(map(Once(read).__getitem__, octets))

    return show


def _show_ipv4(column: Array) -> list[Any]:
    return list(map("%d.%d.%d.%d".__mod__, zip(*column.T.tolist())))


def _number(octets: int, read: Callable[[bytes], Json] = read_unsigned) -> DataType:
    shorter = tuple(range(1, octets)) if octets <= 8 else ()
    return DataType(octets, shorter, read, _show_numbers, _as_it_is, "u")


def _time(octets: int) -> DataType:
    return DataType(octets, (), read_unsigned, _show_numbers, _as_it_is, "u")


def _ntp_time(units_per_second: int) -> DataType:
    return DataType(8, (), _read_ntp(units_per_second), _show_numbers, _wire_ntp(units_per_second), "u")


def _octets(octets: int, read: Callable[[bytes], Json]) -> DataType:
    return DataType(octets, (), read, _show_octets(read), _as_octets, "V")


def single(value: int | str | bytes, octets: int) -> bytes:
    """One value as a field of `octets` or, where that is VARIABLE_LENGTH, with its length before it (RFC 7011 §7).

    A text that is too long loses its end, one that is too short is followed by zeros.
    """
    if isinstance(value, int):
        return min(value, (1 << 8 * octets) - 1).to_bytes(octets, "big")
    content = value.encode() if isinstance(value, str) else value
    most = 255 if octets == VARIABLE_LENGTH else octets
    if len(content) > most:
        content = content[:most].decode("utf-8", "ignore").encode()
    if octets != VARIABLE_LENGTH:
        return content.ljust(octets, b"\0")
    length = bytes([len(content)]) if len(content) < 255 else b"\xff" + len(content).to_bytes(2, "big")
    return length + content


DATA_TYPES = {
    "unsigned8": _number(1),
    "unsigned16": _number(2),
    "unsigned32": _number(4),
    "unsigned64": _number(8),
    "unsigned256": _number(32),
    "signed8": _number(1, _read_signed),
    "signed16": _number(2, _read_signed),
    "signed32": _number(4, _read_signed),
    "signed64": _number(8, _read_signed),
    "float32": _octets(4, _read_float),
    "float64": _octets(8, _read_float)._replace(shorter=(4,)),
    "boolean": _octets(1, _read_boolean),
    "macAddress": _octets(6, _read_mac),
    "ipv4Address": _octets(4, _read_ipv4)._replace(show=_show_ipv4),
    "ipv6Address": _octets(16, _read_ipv6),
    "dateTimeSeconds": _time(4),
    "dateTimeMilliseconds": _time(8),
    "dateTimeMicroseconds": _ntp_time(1_000_000),
    "dateTimeNanoseconds": _ntp_time(1_000_000_000),
    "string": _octets(0, _read_string),
    "octetArray": _octets(0, read_hexadecimal),
    "basicList": _octets(0, read_hexadecimal),
    "subTemplateList": _octets(0, read_hexadecimal),
    "subTemplateMultiList": _octets(0, read_hexadecimal),
}
