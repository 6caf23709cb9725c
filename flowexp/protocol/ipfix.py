# SPDX-License-Identifier: GPL-2.0-or-later
"""IPFIX (RFC 7011 §3): what frames its Messages. How they are made is in encoder.py."""

from __future__ import annotations

import struct

from flowexp.protocol.encoder import TemplateEncoder
from flowexp.protocol.framing import Framing, fields

VERSION = 10
TEMPLATE_SET_ID = 2
OPTIONS_TEMPLATE_SET_ID = 3
MESSAGE_HEADER = struct.Struct(">HHIII")
"""Version, Length, Export Time, Sequence Number, Observation Domain ID."""
SET_HEADER = struct.Struct(">HH")  # Set ID, Length


class MessageEncoder(TemplateEncoder):
    """IPFIX Messages. The Sequence Number counts Data Records (RFC 7011 §3.1)."""

    framing = Framing(
        version=VERSION,
        header=fields(
            MESSAGE_HEADER.format,
            "version message_octets export_time_s sequence_number observation_domain_id",
        ),
        sequence_counts_records=True,
        template_set_id=TEMPLATE_SET_ID,
        options_template_set_id=OPTIONS_TEMPLATE_SET_ID,
    )
