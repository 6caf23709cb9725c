# SPDX-License-Identifier: GPL-2.0-or-later
"""Information Elements: IANA's registry, and the one table of those that flowexp measures.

Names, numbers and types come from data/ipfix-information-elements.csv alone. MEASURED says where each
measured element comes from; encoder, decoder, JSON and the README's field table all read it. NETFLOW9 and
NETFLOW5 are what these protocols have otherwise. To add an element: one row here, and its name in
template.py if every flow shall carry it.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import numpy as np

from flowexp.protocol.datatypes import DATA_TYPES, NUMPY_LENGTHS, DataType, last_octets

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array

Columns = Mapping[str, "Array"]
"""Flows of one address family: column name -> array of n rows, host byte order; addresses and MACs are
(n, 4), (n, 16) or (n, 6) octets in network order; times are Unix nanoseconds. An encoder adds
system_init_ns, the same in each row: what a Message's relative times count from."""


class ElementError(ValueError):
    """An Information Element that does not exist, is not measured, or cannot have that length."""


class Element(NamedTuple):
    """One Information Element of the registry."""

    element_id: int
    name: str
    data_type: str
    semantics: str
    units: str

    @property
    def type(self) -> DataType:
        """How its abstract data type is written, read and shown."""
        return DATA_TYPES[self.data_type]


def _read_registry() -> tuple[Element, ...]:
    file = resources.files("flowexp.protocol") / "data" / "ipfix-information-elements.csv"
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return tuple(
        Element(int(row["elementId"]), row["name"], row["dataType"], row["dataTypeSemantics"], row["units"])
        for row in rows
    )


BY_NAME: dict[str, Element] = {element.name: element for element in _read_registry()}
BY_ID: dict[int, Element] = {element.element_id: element for element in BY_NAME.values()}


class Measured(NamedTuple):
    """An element that flowexp measures."""

    element: Element
    columns: tuple[str, ...]  # what it is computed from
    compute: Callable[..., Array]  # these columns -> values in JSON form, one a row
    octets: int  # its length in Messages, unless told otherwise
    meaning: str

    def values(self, columns: Columns) -> Array:
        """The element of every flow, in JSON form's unit; addresses and MACs as (n, k) octets."""
        return self.compute(*(columns[name] for name in self.columns))

    def json(self, columns: Columns) -> list[Any]:
        """The element of every flow, in JSON form."""
        return self.element.type.show(self.values(columns))

    def check_octets(self, octets: int) -> int:
        """`octets`, if the element can be encoded so (RFC 7011 §6.2).

        Raises ElementError naming the lengths that are allowed.
        """
        data_type = self.element.type
        if not data_type.allows(octets):
            allowed = ", ".join(map(str, (*data_type.shorter, data_type.octets)))
            raise ElementError(f"{self.element.name}: length {octets} is none of {allowed} (RFC 7011 §6.2)")
        return octets

    def wire(self, columns: Columns, octets: int) -> Array:
        """The element of every flow, as numpy can assign it to a field of `octets`.

        A flags element loses its upper bits if `octets` are too few; any other number stays at the largest
        value that fits.
        """
        values = self.element.type.wire(self.values(columns))
        if values.dtype.kind == "V":
            return values
        if values.dtype.itemsize > octets and self.element.semantics != "flags":
            values = np.minimum(values, values.dtype.type((1 << 8 * octets) - 1))
        return values if octets in NUMPY_LENGTHS else last_octets(values, octets)


def _row(
    name: str,
    columns: str,
    meaning: str,
    compute: Callable[..., Array] = lambda column: column,
    octets: int | None = None,
) -> tuple[str, Measured]:
    element = BY_NAME[name]
    return name, Measured(element, tuple(columns.split()), compute, octets or element.type.octets, meaning)


def _unix(column_ns: Array, unit_ns: int) -> Array:
    times: Array = column_ns // column_ns.dtype.type(unit_ns)
    return times


def _up_time_ms(column_ns: Array, system_init_ns: Array) -> Array:
    times: Array = np.maximum(_unix(column_ns - system_init_ns, 10**6), 0)
    return times


MEASURED: dict[str, Measured] = dict(
    (
        _row("octetDeltaCount", "octets", "IP octets, headers included, since the flow's last record"),
        _row("packetDeltaCount", "packets", "packets on the wire since the flow's last record"),
        _row("octetTotalCount", "octets_total", "IP octets, headers included, since the flow began"),
        _row("packetTotalCount", "packets_total", "packets on the wire since the flow began"),
        _row("ipVersion", "ip_version", "4 or 6"),
        _row("sourceIPv4Address", "src_addr", "source address"),
        _row("destinationIPv4Address", "dst_addr", "destination address"),
        _row("sourceIPv6Address", "src_addr", "source address"),
        _row("destinationIPv6Address", "dst_addr", "destination address"),
        _row("ipNextHopIPv4Address", "next_hop", "next router; 0.0.0.0 if there is none or it is not known"),
        _row("ipNextHopIPv6Address", "next_hop", "next router; :: if there is none or it is not known"),
        _row("protocolIdentifier", "protocol", "protocol behind the IP header and its extensions"),
        _row("sourceTransportPort", "src_port", "source port; 0 where there is none"),
        _row("destinationTransportPort", "dst_port", "destination port; 0 where there is none"),
        _row("icmpTypeCodeIPv4", "icmp_type_code", "ICMP type * 256 + code"),
        _row("icmpTypeCodeIPv6", "icmp_type_code", "ICMPv6 type * 256 + code"),
        _row("icmpTypeIPv4", "icmp_type_code", "ICMP type", lambda column: column >> 8),
        _row("icmpCodeIPv4", "icmp_type_code", "ICMP code", lambda column: column & 0xFF),
        _row("icmpTypeIPv6", "icmp_type_code", "ICMPv6 type", lambda column: column >> 8),
        _row("icmpCodeIPv6", "icmp_type_code", "ICMPv6 code", lambda column: column & 0xFF),
        _row("tcpControlBits", "tcp_flags", "all TCP flags seen; in Messages the lower eight", octets=1),
        _row("ipClassOfService", "tos", "ToS or Traffic Class of the first packet"),
        _row("ipDiffServCodePoint", "tos", "its upper six bits", lambda column: column >> 2),
        _row("ipPrecedence", "tos", "its upper three bits", lambda column: column >> 5),
        _row("flowLabelIPv6", "flow_label", "flow label of the first packet", octets=3),
        _row("fragmentFlags", "fragment_flags", "Don't Fragment of the first packet, More Fragments of any"),
        _row("minimumIpTotalLength", "min_length", "octets of the shortest packet", octets=4),
        _row("maximumIpTotalLength", "max_length", "octets of the longest packet", octets=4),
        _row("minimumTTL", "min_ttl", "lowest TTL or Hop Limit"),
        _row("maximumTTL", "max_ttl", "highest TTL or Hop Limit"),
        _row("flowStartSeconds", "start_ns", "first packet", lambda column: _unix(column, 10**9)),
        _row("flowEndSeconds", "end_ns", "last packet", lambda column: _unix(column, 10**9)),
        _row("flowStartMilliseconds", "start_ns", "first packet", lambda column: _unix(column, 10**6)),
        _row("flowEndMilliseconds", "end_ns", "last packet", lambda column: _unix(column, 10**6)),
        _row("flowStartMicroseconds", "start_ns", "first packet", lambda column: _unix(column, 10**3)),
        _row("flowEndMicroseconds", "end_ns", "last packet", lambda column: _unix(column, 10**3)),
        _row("flowStartNanoseconds", "start_ns", "first packet"),
        _row("flowEndNanoseconds", "end_ns", "last packet"),
        _row("flowStartSysUpTime", "start_ns system_init_ns", "first packet", _up_time_ms),
        _row("flowEndSysUpTime", "end_ns system_init_ns", "last packet", _up_time_ms),
        _row("flowEndReason", "end_reason", "1 idle, 2 active, 3 end of flow, 4 forced, 5 lack of resources"),
        _row("ingressInterface", "ingress_ifindex", "index of the input interface; 0 if not known"),
        _row("egressInterface", "egress_ifindex", "index of the output interface; 0 if none or not known"),
        _row("flowDirection", "direction", "where it was metered: 0 ingress, 1 egress"),
        _row("vlanId", "vlan_id", "outer VLAN tag"),
        _row("postVlanId", "vlan_id", "outer VLAN tag, as the packets left"),
        _row("dot1qVlanId", "vlan_id", "outer VLAN tag"),
        _row("dot1qCustomerVlanId", "inner_vlan_id", "inner VLAN tag"),
        _row("sourceMacAddress", "src_mac", "source MAC address; zeros on links without"),
        _row("destinationMacAddress", "dst_mac", "destination MAC address; zeros on links without"),
    )
)

NETFLOW9: dict[str, Measured | None] = dict(
    (
        # nfacctd looks for ICMP here, and nowhere else.
        _row(
            "destinationTransportPort",
            "dst_port icmp_type_code",
            "destination port, or ICMP type * 256 + code",
            np.bitwise_or,
        ),
        # nfcapd looks for ICMP there, for ICMPv6, too: RFC 3954 §8 has no IP version in its name.
        ("icmpTypeCodeIPv6", MEASURED["icmpTypeCodeIPv4"]),
        ("flowStartMilliseconds", MEASURED["flowStartSysUpTime"]),
        ("flowEndMilliseconds", MEASURED["flowEndSysUpTime"]),
        # As long as RFC 3954 §8 has them.
        _row("minimumIpTotalLength", "min_length", "octets of the shortest packet", octets=2),
        _row("maximumIpTotalLength", "max_length", "octets of the longest packet", octets=2),
        # RFC 3954's numbers end at 127, and Logstash drops a Template for a number that it does not know. It
        # does know flowEndReason (136) and ipDiffServCodePoint (195), but neither of these (197, 245).
        ("fragmentFlags", None),
        ("dot1qCustomerVlanId", None),
    )
)
"""Where NetFlow v9 differs: what takes an element's place; None: it is left out."""


def _ifindex_16(column: Array) -> Array:
    indexes: Array = np.where(column > 0xFFFF, 0, column)
    return indexes


NETFLOW5: dict[str, Measured | None] = {
    **NETFLOW9,
    **dict(
        (
            # 16 bits. 0, not known, is true of a larger index; 65535 would be another interface's.
            _row("ingressInterface", "ingress_ifindex", "index of the input interface", _ifindex_16, octets=2),
            _row("egressInterface", "egress_ifindex", "index of the output interface", _ifindex_16, octets=2),
        )
    ),
}
"""Where NetFlow v5 differs."""


def measured(name: str) -> Measured:
    """The measured element of that IANA name. Raises ElementError, with the nearest name there is."""
    if name in MEASURED:
        return MEASURED[name]
    fault = "is not measured" if name in BY_NAME else "is no Information Element"
    near = difflib.get_close_matches(name, MEASURED, n=1)
    raise ElementError(f"{name} {fault}" + (f"; did you mean {near[0]}?" if near else ""))
