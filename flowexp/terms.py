# SPDX-License-Identifier: GPL-2.0-or-later
"""What the configuration says of each Collector, in parts: a part that has not changed needs no change elsewhere."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import FrozenSet, List, NamedTuple, Set

from .config import Collector, Config, Export
from .protocol.encoder import Encoder
from .protocol.encoders import encoder_for
from .protocol.template import TemplateIds, TemplateSpec, build_templates
from .rates import domain_of


class Way(NamedTuple):
    """How to get to a Collector, and nothing else: another one is another transport."""

    collector: Collector
    export: Export


def _way_of(collector: Collector, export: Export) -> Way:
    return Way(
        replace(collector, group="", filter="", template="", biflow=False, psamp=False, observation_domain_id=0),
        Export(mtu=export.mtu, source_port=export.source_port, mark=export.mark),
    )


class Content(NamedTuple):
    """What a Collector is told: something else is another encoder."""

    protocol: str
    observation_domain_id: int
    template: TemplateSpec
    tcp_control_bits_octets: int
    enterprise_number: int
    refresh_ns: int
    biflow: bool
    psamp: bool
    nat_events: bool

    def reverse_columns(self) -> FrozenSet[str]:
        """What Biflows need of the reverse direction."""
        return build_templates(self.template, biflow=True).reverse_columns if self.biflow else frozenset()

    def of(self, interval: int) -> Content:
        """In the Observation Domain of an own sampling interval; 0: as it is."""
        return self._replace(observation_domain_id=domain_of(self.observation_domain_id, interval))

    def encoder(self, max_message_octets: int, ids: TemplateIds, sequence_number: int) -> Encoder:
        return encoder_for(
            self.protocol,
            observation_domain_id=self.observation_domain_id,
            max_message_octets=max_message_octets,
            tcp_control_bits_octets=self.tcp_control_bits_octets,
            template=self.template,
            enterprise_number=self.enterprise_number,
            template_ids=ids,
            sequence_number=sequence_number,
            biflow=self.biflow,
            psamp=self.psamp,
            nat_events=self.nat_events,
        )


class Terms(NamedTuple):
    """All that the configuration says of one Collector. Equal terms: nothing has changed for it."""

    key: int
    way: Way
    content: Content
    group: str
    filter: str

    @property
    def is_reliable(self) -> bool:
        """Whether a batch goes to a file or a queue, which take it whether the Collector is in reach or not."""
        return self.way.collector.url.transport != "udp"


def terms_of(config: Config) -> List[Terms]:
    """For each Collector, in the order of the configuration."""
    export = config.export
    terms: List[Terms] = []
    seen: Set[int] = set()
    for collector in config.collectors:
        domain = config.observation_domain_id(collector)
        key = zlib.crc32(f"{collector.url} {domain}".encode()) or 1
        while key in seen:  # the same once more
            key = (key + 1) & 0xFFFFFFFF or 1
        seen.add(key)
        content = Content(
            collector.url.protocol,
            domain,
            config.template(collector.template or export.template),
            export.tcp_control_bits_octets,
            export.enterprise_number,
            export.template_refresh_ns,
            collector.biflow,
            collector.psamp,
            export.nat_events,
        )
        terms.append(Terms(key, _way_of(collector, export), content, collector.group, collector.filter))
    return terms
