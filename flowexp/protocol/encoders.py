# SPDX-License-Identifier: GPL-2.0-or-later
"""Which encoder speaks a protocol, by the name that the protocol has in a Collector's URL."""

from __future__ import annotations

from flowexp.protocol import ipfix, netflow5, netflow9
from flowexp.protocol.encoder import Encoder
from flowexp.protocol.netflow9 import NETFLOW9_DIALECT
from flowexp.protocol.template import IPFIX_DIALECT, default_templates


def encoder_for(
    protocol: str,
    *,
    observation_domain_id: int,
    max_message_octets: int,
    tcp_control_bits_octets: int,
    sequence_number: int,
) -> Encoder:
    """The encoder of "ipfix", "netflow9" or "netflow5" (whose tcpControlBits have one octet whatever is asked for)."""
    if protocol == "netflow5":
        return netflow5.PacketEncoder(
            observation_domain_id=observation_domain_id,
            max_message_octets=max_message_octets,
            sequence_number=sequence_number,
        )
    encoder, dialect = {
        "ipfix": (ipfix.MessageEncoder, IPFIX_DIALECT),
        "netflow9": (netflow9.PacketEncoder, NETFLOW9_DIALECT),
    }[protocol]
    return encoder(
        observation_domain_id=observation_domain_id,
        max_message_octets=max_message_octets,
        templates=default_templates(tcp_control_bits_octets=tcp_control_bits_octets, dialect=dialect),
        sequence_number=sequence_number,
    )
