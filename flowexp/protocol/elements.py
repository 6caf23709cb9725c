# SPDX-License-Identifier: GPL-2.0-or-later
"""The one table of the Information Elements that flowexp measures.

Names, numbers and types are registry.py's. MEASURED says where each measured element comes from, IANA's and
enterprise-specific ones alike; encoder, decoder, JSON and the table of records.md all read it. NETFLOW9 is
what its protocol and NetFlow v5 have otherwise. To add an element: one row here, and its name in
template.py if every flow shall carry it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import numpy as np

from flowexp.protocol.datatypes import NUMPY_LENGTHS, last_octets
from flowexp.protocol.registry import BY_NAME, Element, ElementError

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array

Columns = Mapping[str, "Array"]
"""Flows of one address family: column name -> array of n rows, host byte order; addresses and MACs are
(n, 4), (n, 16) or (n, 6) octets in network order; times are Unix nanoseconds. An encoder adds two that are the
same in each row: system_init_ns, what a Message's relative times count from, and export_ns, its Export Time."""

RECORD_WIDE = frozenset(("system_init_ns", "export_ns"))
"""These two."""


_AS_TRANS = 23456  # stands for AS numbers that two octets have no room for (RFC 6793)


class Measured(NamedTuple):
    """An element that flowexp measures."""

    element: Element
    columns: tuple[str, ...]  # what it is computed from
    compute: Callable[..., Array]  # these columns -> values in JSON form, one a row
    octets: int  # its length in Messages, unless told otherwise
    meaning: str
    only: str = ""  # which flows have it: those of one of template.py's CONDITIONS; "": all
    family: str = ""  # and of which address family, "IPv4" or "IPv6"; "": both

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

        Where `octets` are too few a flags element loses its upper bits, an identifier is 0 (not known: the largest
        that fits would be somebody else's; AS numbers have one that is nobody's), and any other number stays at the
        largest that fits.
        """
        values = self.element.type.wire(self.values(columns))
        if values.dtype.kind == "V":
            return values
        if values.dtype.itemsize > octets and self.element.semantics != "flags":
            most = values.dtype.type((1 << 8 * octets) - 1)
            is_name = self.element.semantics == "identifier"
            unknown = _AS_TRANS if "AsNumber" in self.element.name and most >= _AS_TRANS else 0
            values = np.where(values > most, unknown, values) if is_name else np.minimum(values, most)
        return values if octets in NUMPY_LENGTHS else last_octets(values, octets)


def _row(
    name: str,
    columns: str,
    meaning: str = "",
    compute: Callable[..., Array] = lambda column: column,
    octets: int | None = None,
    only: str = "",
    family: str | None = None,
) -> tuple[str, Measured]:
    """`meaning` is IANA's elements' only: an enterprise-specific one has its description in data/.

    family: "" where the name has one that is not that of the flow's own addresses.
    """
    element = BY_NAME[name]
    octets = octets or element.type.octets
    if family is None:
        family = next((family for family in ("IPv4", "IPv6") if family in name), "")
    meaning = meaning or element.description
    return name, Measured(element, tuple(columns.split()), compute, octets, meaning, only, family)


def _unix(column_ns: Array, unit_ns: int) -> Array:
    times: Array = column_ns // column_ns.dtype.type(unit_ns)
    return times


def _up_time_ms(column_ns: Array, system_init_ns: Array) -> Array:
    times: Array = np.maximum(_unix(column_ns - system_init_ns, 10**6), 0)
    return times


def _before_us(column_ns: Array, export_ns: Array) -> Array:
    times: Array = np.maximum(_unix(export_ns - column_ns, 10**3), 0)
    return times


def _duration(unit_ns: int) -> Callable[[Array, Array], Array]:
    return lambda start_ns, end_ns: np.maximum(_unix(end_ns - start_ns, unit_ns), 0)


def _up_to(size_class: int) -> Callable[[Array], Array]:
    """Packets of that size class and the smaller ones."""
    return lambda column: column[:, : size_class + 1].sum(axis=1, dtype=column.dtype)


def _of(size_class: int) -> Callable[[Array], Array]:
    return lambda column: column[:, size_class]


def _mean(total: Array, count: Array) -> Array:
    means: Array = total // np.maximum(count, 1)
    return means


def _boolean(bits: Array) -> Array:
    """Bits as booleans have them: 1 is true, 2 is false (RFC 7011 §6.1.5)."""
    octets: Array = (2 - bits).astype(np.uint8)[:, np.newaxis]
    return octets


def _forwarding_status(packets: Array, dropped: Array, status: Array, egress: Array) -> Array:
    """forwardingStatus: what became of the packets, all of them or at least one (IANA 89)."""
    statuses: Array = np.where(dropped >= np.maximum(packets, 1), status, np.where(egress != 0, 64, 0))
    return statuses.astype(np.uint32)


def _connection_state(flags: Array, packets: Array, syns: Array) -> Array:
    """tcpConnectionState of a flow with these TCP flags in all, of whose packets so many were a SYN."""
    syn, ack, fin, rst = (flags & bit != 0 for bit in (0x02, 0x10, 0x01, 0x04))
    half_open = syn & (~ack | (packets == syns))
    states: Array = np.select([rst, fin, half_open, syn], [4, 3, 1, 2], 0).astype(np.uint8)
    return states


def _translated(prefix: str, only: str, how: str) -> Iterator[tuple[str, Measured]]:
    """Both addresses and both ports on the other side of a translation."""
    for side, column in (("Source", "src"), ("Destination", "dst")):
        meaning = f"{side.lower()} address {how}"
        yield _row(f"{prefix}NAT{side}IPv4Address", f"other_{column}_addr", meaning, only=only)
        yield _row(f"{prefix}NAT{side}IPv6Address", f"other_{column}_addr", meaning, only=only)
        yield _row(f"{prefix}NAPT{side}TransportPort", f"other_{column}_port", f"{side.lower()} port {how}", only=only)


_TRANSLATED = (
    *_translated("post", "translated, ingress", "as the packets left"),
    *_translated("pre", "translated, egress", "as the packets came in"),
)

_GRE, _VXLAN, _GENEVE, _GTPU, _MPLS, _PPPOE = 2, 3, 4, 5, 6, 7  # enum tunnel_kind, tunnelType
_IS_VXLAN = np.uint64(1 << 56)  # what IANA 351 has in its first octet; it has nothing there for Geneve


def _of_tunnel(*kinds: int) -> Callable[[Array, Array], Array]:
    """The identifier of tunnels of these kinds; 0 of others."""
    return lambda kind, identifier: np.where(np.isin(kind, kinds), identifier, 0).astype(identifier.dtype)


def _segment(kind: Array, identifier: Array) -> Array:
    segments: Array = _of_tunnel(_VXLAN, _GENEVE)(kind, identifier.astype(np.uint64))
    return segments | np.where(kind == _VXLAN, _IS_VXLAN, np.uint64(0))


def _label_entry(kind: Array, identifier: Array) -> Array:
    """Label, Exp and S as the three octets that they are on the wire."""
    entries = _of_tunnel(_MPLS)(kind, identifier).astype(">u4")
    octets: Array = entries.view(np.uint8).reshape(-1, 4)[:, 1:]
    return octets


def labels_of(kind: Array, stack: Array) -> Array:
    """Entries of a tunnel's MPLS stack, the last of them with the S bit; 0: no MPLS.

    stack: (n, 16) octets, four entries as on the wire; behind the last one they are something else's.
    """
    is_bottom = (stack[:, 2::4] & 1).astype(bool)
    return np.where(kind == _MPLS, is_bottom.argmax(axis=1) + 1, 0)


def _entry(number: int) -> Callable[[Array, Array], Array]:
    """Label, Exp and S of that entry of the stack, as the three octets that they are on the wire; zeros: none."""

    def octets_of(kind: Array, stack: Array) -> Array:
        octets: Array = stack[:, 4 * number - 4 : 4 * number - 1]
        return octets * (labels_of(kind, stack) >= number)[:, np.newaxis]

    return octets_of


def _outer(side: str, column: str) -> Iterator[tuple[str, Measured]]:
    """One of the tunnel's addresses, which may be of the other version than the flow's own."""
    of_ipv4, of_ipv6 = (f"outer{side}IPv{version}Address" for version in (4, 6))
    yield _row(of_ipv4, column, compute=lambda column: column[:, :4], only="tunnel over IPv4", family="")
    yield _row(of_ipv6, column, only="tunnel over IPv6", family="")


_TUNNELLED = (
    _row("tunnelType", "tunnels_kind", only="tunnelled"),
    *_outer("Source", "tunnels_src_addr"),
    *_outer("Destination", "tunnels_dst_addr"),
    _row("layer2SegmentId", "tunnels_kind tunnels_id", "VNI of VXLAN (behind a 1 for it) or Geneve; else 0", _segment,
         only="tunnelled"),
    _row("greKey", "tunnels_kind tunnels_id", "key of GRE; 0 if there is none", _of_tunnel(_GRE), only="tunnelled"),
    _row("gtpuTEid", "tunnels_kind tunnels_id", "TEID of GTP-U; else 0", _of_tunnel(_GTPU), only="tunnelled"),
    _row("mplsTopLabelStackSection", "tunnels_kind tunnels_id", "top label of MPLS, with Exp and S; else 0",
         _label_entry, octets=3, only="tunnelled"),
    *(
        _row(f"mplsLabelStackSection{number}", "tunnels_kind tunnels_src_addr",
             f"entry {number} of MPLS from the top, likewise; 0 if there are fewer", _entry(number), octets=3,
             only="two labels")
        for number in (2, 3, 4)
    ),
    _row("pppoeSessionId", "tunnels_kind tunnels_id", compute=_of_tunnel(_PPPOE), only="tunnelled"),
)  # fmt: skip

# What flows have where its field group is on (fieldgroups.py).
_GROUPED = (
    _row("octetDeltaSumOfSquares", "sizes_octets_squared", "sum of the squares of IP lengths since the last record"),
    _row("packetsUpTo64OctetsDeltaCount", "sizes_packets", compute=_of(0)),
    _row("NUM_PKTS_UP_TO_128_BYTES", "sizes_packets", compute=_up_to(1)),
    _row("NUM_PKTS_128_TO_256_BYTES", "sizes_packets", compute=_of(2)),
    _row("NUM_PKTS_256_TO_512_BYTES", "sizes_packets", compute=_of(3)),
    _row("NUM_PKTS_512_TO_1024_BYTES", "sizes_packets", compute=_of(4)),
    _row("NUM_PKTS_1024_TO_1514_BYTES", "sizes_packets", compute=_of(5)),
    _row("NUM_PKTS_OVER_1514_BYTES", "sizes_packets", compute=_of(6)),
    _row("fragmentDeltaCount", "sizes_fragments"),
    _row("meanInterArrivalTimeNanoseconds", "timing_gaps_ns timing_gaps", compute=_mean),
    _row("maximumInterArrivalTimeNanoseconds", "timing_max_gap_ns"),
    _row("rfc3550JitterNanoseconds", "timing_jitter_16ns", "smoothed change from gap to gap",
         lambda column: column >> 4),
    _row("meanForwardingTimeNanoseconds", "timing_transits_ns timing_transits", compute=_mean),
    _row("maximumForwardingTimeNanoseconds", "timing_max_transit_ns"),
    _row("firstHardwareReceiveNanoseconds", "timing_first_received_ns"),
    _row("lastHardwareReceiveNanoseconds", "timing_last_received_ns"),
    _row("tcpHandshakeTimeMicroseconds", "tcp_handshake_ns", compute=lambda column: column // 1000, only="TCP"),
    _row("tcpConnectionState", "tcp_flags packets_total tcp_syn_total", compute=_connection_state, only="TCP"),
    _row("tcpSynTotalCount", "tcp_syn_total", "segments with SYN since the flow began", octets=4, only="TCP"),
    _row("tcpFinTotalCount", "tcp_fin_total", "segments with FIN since the flow began", octets=4, only="TCP"),
    _row("tcpRstTotalCount", "tcp_rst_total", "segments with RST since the flow began", octets=4, only="TCP"),
    _row("RETRANSMITTED_IN_PKTS", "tcp_retransmitted", only="TCP"),
    _row("tcpRetransmittedOctetDeltaCount", "tcp_retransmitted_octets", only="TCP"),
    _row("OOORDER_IN_PKTS", "tcp_out_of_order", only="TCP"),
    _row("tcpOutOfOrderOctetDeltaCount", "tcp_out_of_order_octets", only="TCP"),
    _row("tcpZeroWindowPacketDeltaCount", "tcp_zero_windows", only="TCP"),
    _row("tcpWindowSize", "tcp_first_window", "window of the first segment", only="TCP"),
    _row("tcpMaximumSegmentSize", "tcp_mss", only="TCP"),
    _row("tcpWindowScale", "tcp_window_scale", "window scale option of the SYN; 0 if there was none",
         lambda column: np.maximum(column, 1) - 1, only="TCP"),
    _row("ecnEct0PacketDeltaCount", "congestion_ect0"),
    _row("ecnEct1PacketDeltaCount", "congestion_ect1"),
    _row("ecnCePacketDeltaCount", "congestion_ce"),
    _row("tcpEcePacketDeltaCount", "congestion_ece", only="TCP"),
    _row("tcpCwrPacketDeltaCount", "congestion_cwr", only="TCP"),
    _row("dscpChangePacketDeltaCount", "congestion_dscp_changes"),
    _row("ingressVRFID", "ingress_vrf", "routing table of the VRF that the input interface is in; 0: in none"),
    _row("egressVRFID", "egress_vrf", "routing table of the VRF that the output interface is in; 0: in none"),
    _row("sourceIPv4PrefixLength", "src_prefix_length", "of the source's route; 0: default, or none"),
    _row("sourceIPv6PrefixLength", "src_prefix_length", "of the source's route; 0: default, or none"),
    _row("destinationIPv4PrefixLength", "dst_prefix_length", "of the destination's route; 0: default, or none"),
    _row("destinationIPv6PrefixLength", "dst_prefix_length", "of the destination's route; 0: default, or none"),
    _row("bgpSourceAsNumber", "src_as", "by the file as_table: of the longest prefix that has the source; 0: none has"),
    _row("bgpDestinationAsNumber", "dst_as", "the same of the destination"),
    _row("droppedPacketDeltaCount", "drops_packets", "packets that the kernel dropped since the flow's last record"),
    _row("droppedOctetDeltaCount", "drops_octets", "their IP octets"),
    _row("forwardingStatus", "packets drops_packets drop_status egress_ifindex",
         "64 forwarded, 128 and up dropped: all packets of the record; 0 not known", _forwarding_status, octets=1),
    _row("packetDropReason", "drop_reason", octets=32),
    _row("applicationId", "application_id",
         "classification engine (6: by the payload, 3: by a port alone) and selector, named by an Options Record; 0: "
         "not known", octets=4),
    _row("httpRequestHost", "application_server_name", "Host of the flow's first request", octets=64, only="HTTP host"),
    _row("TLS_SERVER_NAME", "application_server_name", octets=64, only="TLS server name"),
    _row("DNS_QUERY", "application_server_name", octets=64, only="DNS name"),
    _row("dnsResponseTimeMicroseconds", "application_dns_response_us", only="DNS name"),
    _row("badIpv4ChecksumPacketDeltaCount", "integrity_bad_checksum"),
    _row("badLengthPacketDeltaCount", "integrity_bad_length"),
    _row("expiringPacketDeltaCount", "integrity_expiring"),
    _row("landPacketDeltaCount", "integrity_land"),
    _row("impossibleTcpFlagsPacketDeltaCount", "integrity_impossible_flags", only="TCP"),
    _row("undersizedPacketDeltaCount", "integrity_undersized"),
    _row("jumboPacketDeltaCount", "integrity_jumbo"),
    *_TRANSLATED,
    *_TUNNELLED,
    _row("ethernetType", "ether_type", "of the frame, behind its tags"),
    _row("dot1qPriority", "priorities", "PCP of the outer tag", lambda column: column >> 5, only="tagged"),
    _row("dot1qDEI", "priorities", "DEI of the outer tag", lambda column: _boolean(column >> 4 & 1),
         only="tagged"),
    _row("dot1qCustomerPriority", "priorities", "PCP of the inner tag", lambda column: column >> 1 & 7,
         only="two tags"),
    _row("dot1qCustomerDEI", "priorities", "DEI of the inner tag", lambda column: _boolean(column & 1),
         only="two tags"),
)  # fmt: skip

MEASURED: dict[str, Measured] = dict(
    (
        _row("octetDeltaCount", "octets", "IP octets, headers included, since the flow's last record"),
        _row("packetDeltaCount", "packets", "packets on the wire since the flow's last record"),
        _row("deltaFlowCount", "flows", "flows that the record tells of: 1, of an aggregate as many as it sums up"),
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
        _row("flowStartDeltaMicroseconds", "start_ns export_ns", "first packet, before the Export Time", _before_us),
        _row("flowEndDeltaMicroseconds", "end_ns export_ns", "last packet, before the Export Time", _before_us),
        _row("flowDurationMilliseconds", "start_ns end_ns", "from first to last packet", _duration(10**6)),
        _row("flowDurationMicroseconds", "start_ns end_ns", "from first to last packet", _duration(10**3)),
        _row(
            "systemInitTimeMilliseconds",
            "system_init_ns",
            "what flowStartSysUpTime and flowEndSysUpTime count from",
            lambda column: _unix(column, 10**6),
        ),
        _row("flowEndReason", "end_reason", "1 idle, 2 active, 3 end of flow, 4 forced, 5 lack of resources"),
        _row("ingressInterface", "ingress_ifindex", "index of the input interface; 0 if not known"),
        _row("egressInterface", "egress_ifindex", "index of the output interface; 0 if none or not known"),
        _row("flowDirection", "direction", "where it was metered: 0 ingress, 1 egress"),
        _row("vlanId", "vlan_id", "outer VLAN tag", only="tagged"),
        _row("postVlanId", "vlan_id", "outer VLAN tag, as the packets left", only="tagged, egress"),
        _row("dot1qVlanId", "vlan_id", "outer VLAN tag", only="tagged"),
        _row("dot1qCustomerVlanId", "inner_vlan_id", "inner VLAN tag", only="two tags"),
        _row("sourceMacAddress", "src_mac", "source MAC address; zeros on links without"),
        _row("destinationMacAddress", "dst_mac", "destination MAC address; zeros on links without"),
        _row("otherClassOfServicePacketTotalCount", "tos_changes"),
        *_GROUPED,
    )
)

FLOW_KEY = frozenset(
    """
    ipVersion protocolIdentifier sourceIPv4Address destinationIPv4Address sourceIPv6Address destinationIPv6Address
    sourceTransportPort destinationTransportPort icmpTypeCodeIPv4 icmpTypeIPv4 icmpCodeIPv4 icmpTypeCodeIPv6
    icmpTypeIPv6 icmpCodeIPv6 vlanId dot1qVlanId ingressInterface egressInterface flowDirection
    tunnelType outerSourceIPv4Address outerDestinationIPv4Address outerSourceIPv6Address outerDestinationIPv6Address
    layer2SegmentId greKey gtpuTEid mplsTopLabelStackSection mplsLabelStackSection2 mplsLabelStackSection3
    mplsLabelStackSection4 pppoeSessionId
    """.split()
)
"""What tells one flow from another (RFC 7011 §2); of the two interfaces the one where it was metered."""

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
"""Where NetFlow v9 differs: what takes an element's place; None: it is left out. NetFlow v5 differs alike."""


def measured(name: str) -> Measured:
    """The measured element of that name. Raises ElementError, with the nearest names there are."""
    if name in MEASURED:
        return MEASURED[name]
    near = difflib.get_close_matches(name, MEASURED, n=3, cutoff=0.5)
    fault = "is not measured" if name in BY_NAME else "is no Information Element"
    raise ElementError(f"{name} {fault}" + (f"; nearest to it: {', '.join(near)}" if near else ""))
