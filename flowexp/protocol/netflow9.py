# SPDX-License-Identifier: GPL-2.0-or-later
"""NetFlow v9 (RFC 3954): what frames its Packets, and what its Templates have otherwise than IPFIX.

SysUptime and UNIX Seconds of a Packet tell the same instant, a whole second, so that a Collector that takes
one from the other gets every flow's times to the millisecond (see `system_init_s`).
"""

from __future__ import annotations

from flowexp.protocol.elements import NETFLOW9
from flowexp.protocol.encoder import TemplateEncoder
from flowexp.protocol.framing import Framing, fields
from flowexp.protocol.template import Dialect

NETFLOW9_DIALECT = Dialect(
    name="NetFlow v9",
    instead=NETFLOW9,
    # Option Scope Length and Option Length: octets of Field Specifiers (RFC 3954 §6.1).
    options_counts=lambda scopes, others: (4 * scopes, 4 * others),
    # System, and Interface (RFC 3954 §6.1).
    scopes={
        ("observationDomainId",): 1,
        ("observationDomainId", "meteringProcessId"): 1,
        ("observationDomainId", "exportingProcessId"): 1,
        ("ingressInterface",): 2,
    },
)


class PacketEncoder(TemplateEncoder):
    """NetFlow v9 Packets. The Sequence Number counts Packets, Count the records of all kinds (RFC 3954 §5.1)."""

    framing = Framing(
        version=9,
        header=fields(
            ">HHIIII",
            "version count up_time_ms export_time_s sequence_number observation_domain_id",
        ),
        sequence_counts_records=False,
        set_alignment_octets=4,
        template_set_id=0,
        options_template_set_id=1,
    )
