# SPDX-License-Identifier: GPL-2.0-or-later
"""Field groups: elements that flows carry beyond the default ones, where an operator switches the group on.

What a group's elements are made of is counted only while the group is on, so that one that is off costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

AS_NUMBERS = "routing, with as_table"
"""What belongs to `routing` only where the operator has a file for it."""

GROUPS: dict[str, tuple[str, ...]] = {
    name: tuple(elements.split())
    for name, elements in {
        "sizes": """
            octetDeltaSumOfSquares packetsUpTo64OctetsDeltaCount NUM_PKTS_UP_TO_128_BYTES NUM_PKTS_128_TO_256_BYTES
            NUM_PKTS_256_TO_512_BYTES NUM_PKTS_512_TO_1024_BYTES NUM_PKTS_1024_TO_1514_BYTES NUM_PKTS_OVER_1514_BYTES
            fragmentDeltaCount
        """,
        "timing": """
            meanInterArrivalTimeNanoseconds maximumInterArrivalTimeNanoseconds rfc3550JitterNanoseconds
            meanForwardingTimeNanoseconds maximumForwardingTimeNanoseconds
            firstHardwareReceiveNanoseconds lastHardwareReceiveNanoseconds
        """,
        "tcp": """
            tcpConnectionState tcpHandshakeTimeMicroseconds tcpSynTotalCount tcpFinTotalCount tcpRstTotalCount
            RETRANSMITTED_IN_PKTS tcpRetransmittedOctetDeltaCount OOORDER_IN_PKTS tcpOutOfOrderOctetDeltaCount
            tcpZeroWindowPacketDeltaCount tcpWindowSize tcpWindowScale tcpMaximumSegmentSize
        """,
        "congestion": """
            ecnEct0PacketDeltaCount ecnEct1PacketDeltaCount ecnCePacketDeltaCount
            tcpEcePacketDeltaCount tcpCwrPacketDeltaCount dscpChangePacketDeltaCount
        """,
        "l2": "ethernetType dot1qPriority dot1qDEI dot1qCustomerPriority dot1qCustomerDEI",
        "nat": """
            postNATSourceIPv4Address postNATDestinationIPv4Address
            postNATSourceIPv6Address postNATDestinationIPv6Address
            postNAPTSourceTransportPort postNAPTDestinationTransportPort
            preNATSourceIPv4Address preNATDestinationIPv4Address
            preNATSourceIPv6Address preNATDestinationIPv6Address
            preNAPTSourceTransportPort preNAPTDestinationTransportPort
        """,
        "routing": """
            ingressVRFID egressVRFID
            sourceIPv4PrefixLength destinationIPv4PrefixLength sourceIPv6PrefixLength destinationIPv6PrefixLength
        """,
        AS_NUMBERS: "bgpSourceAsNumber bgpDestinationAsNumber",
        "application": "applicationId httpRequestHost TLS_SERVER_NAME DNS_QUERY dnsResponseTimeMicroseconds",
        "tunnels": """
            tunnelType outerSourceIPv4Address outerDestinationIPv4Address outerSourceIPv6Address
            outerDestinationIPv6Address layer2SegmentId greKey gtpuTEid mplsTopLabelStackSection
            mplsLabelStackSection2 mplsLabelStackSection3 mplsLabelStackSection4 pppoeSessionId
        """,
        "drops": "droppedPacketDeltaCount droppedOctetDeltaCount forwardingStatus packetDropReason",
        "integrity": """
            badIpv4ChecksumPacketDeltaCount badLengthPacketDeltaCount expiringPacketDeltaCount
            landPacketDeltaCount impossibleTcpFlagsPacketDeltaCount undersizedPacketDeltaCount jumboPacketDeltaCount
        """,
    }.items()
}
"""The elements of each group."""

NAMES = tuple(name for name in GROUPS if name != AS_NUMBERS)
"""The groups that an operator switches on by name."""

ALWAYS_KEPT = ("l2",)
"""Groups that have no counts of their own: what they tell is kept of every flow, group or not."""


def elements_of(groups: Iterable[str]) -> list[str]:
    """The elements of these groups, each group's together."""
    return [element for group in groups for element in GROUPS[group]]


def group_of(element: str) -> str:
    """The group that has to be on for an element to be known; "": none has."""
    needed = (group for group, elements in GROUPS.items() if element in elements and group not in ALWAYS_KEPT)
    return next(needed, "")
