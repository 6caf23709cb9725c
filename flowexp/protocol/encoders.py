# SPDX-License-Identifier: GPL-2.0-or-later
"""Which encoder speaks a protocol, by the name that the protocol has in a Collector's URL."""

from __future__ import annotations

from collections.abc import Mapping

from flowexp.protocol import ipfix, netflow5, netflow9
from flowexp.protocol.encoder import Encoder, TemplateEncoder
from flowexp.protocol.natevents import event_templates
from flowexp.protocol.netflow9 import NETFLOW9_DIALECT
from flowexp.protocol.registry import OWN_ENTERPRISE, ElementError
from flowexp.protocol.template import DEFAULT, IPFIX_DIALECT, Dialect, TemplateIds, TemplateSpec, build_templates

_ENCODERS: Mapping[str, tuple[type[TemplateEncoder], Dialect]] = {
    "ipfix": (ipfix.MessageEncoder, IPFIX_DIALECT),
    "netflow9": (netflow9.PacketEncoder, NETFLOW9_DIALECT),
}


def encoder_for(
    protocol: str,
    *,
    observation_domain_id: int,
    max_message_octets: int,
    tcp_control_bits_octets: int = 1,
    sequence_number: int = 0,
    template: TemplateSpec = DEFAULT,
    enterprise_number: int = OWN_ENTERPRISE,
    template_ids: TemplateIds | None = None,
    biflow: bool = False,
    psamp: bool = False,
    nat_events: bool = False,
) -> Encoder:
    """The encoder of "ipfix", "netflow9" or "netflow5" (which has one layout, whatever the template).

    template_ids: one for all encoders of a process. biflow: columns are those of metering/biflow.py. psamp: sampling
    is told by PSAMP's elements. nat_events: they are told, too (NetFlow v5 has none). ElementError if the protocol
    cannot carry the template.
    """
    if protocol == "netflow5":
        return netflow5.PacketEncoder(
            observation_domain_id=observation_domain_id,
            max_message_octets=max_message_octets,
            sequence_number=sequence_number,
        )
    encoder, dialect = _ENCODERS[protocol]
    templates = build_templates(
        template,
        dialect,
        tcp_control_bits_octets=tcp_control_bits_octets,
        enterprise_number=enterprise_number,
        ids=template_ids,
        biflow=biflow,
    )
    return encoder(
        observation_domain_id=observation_domain_id,
        max_message_octets=max_message_octets,
        templates=templates,
        sequence_number=sequence_number,
        psamp=psamp,
        events=event_templates(dialect, templates.ids) if nat_events else None,
    )


def check_template(template: TemplateSpec, protocol: str, *, biflow: bool = False) -> None:
    """ElementError if that protocol cannot carry the template, or not with both directions, with the reason."""
    if protocol in _ENCODERS:
        build_templates(template, _ENCODERS[protocol][1], biflow=biflow)
    elif template.name != DEFAULT.name:
        raise ElementError("NetFlow v5 has one layout and takes no template")
