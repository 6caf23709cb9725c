# SPDX-License-Identifier: GPL-2.0-or-later
"""What of a configuration goes together: the rules that no key can say alone.

What breaks one is a ValueError of one line: which key, what, and what is allowed.
"""

from __future__ import annotations

import dataclasses
from typing import Dict, Sequence, Tuple

from flowexp.config import MAX_COLLECTORS, Collector, Config
from flowexp.keys import show
from flowexp.protocol.encoders import check_template
from flowexp.protocol.fieldgroups import AS_NUMBERS, group_of
from flowexp.protocol.netflow5 import ENGINES, MAX_SAMPLING_INTERVAL
from flowexp.protocol.registry import ElementError
from flowexp.protocol.template import DEFAULT, TemplateSpec
from flowexp.rates import MAX_INTERVALS, domain_of


def check_together(config: Config) -> None:
    """ValueError for what no key can say alone."""
    if config.hook == "xdp" and config.direction == "egress":
        raise ValueError('hook: "xdp" sees ingress only, and direction is "egress"; set hook = "tc"')
    if len(config.collectors) > MAX_COLLECTORS:
        count = len(config.collectors)
        raise ValueError(f"[[collector]]: {count} are too many; allowed: 1 to {MAX_COLLECTORS}")
    _check_sampling(config)
    for collector in config.collectors:
        _check_collector(collector)
    _check_templates(config)
    if config.sampling.rates.own:
        _check_domains(config)
    _check_distinct("spool_path", [each.spool_path for each in config.collectors])
    _check_distinct("url", [str(each.url) for each in config.collectors if each.url.transport == "file"])


def _check_distinct(key: str, places: Sequence[str]) -> None:
    """Two Collectors that write to one place would spoil each other's Messages."""
    for place in filter(None, places):
        if places.count(place) > 1:
            raise ValueError(f"[[collector]] {key}: {show(place)} is that of two Collectors; give each its own")


def _check_sampling(config: Config) -> None:
    intervals = config.sampling.rates.intervals
    if len(intervals) > MAX_INTERVALS:
        raise ValueError(
            f"[sampling]: {len(intervals)} different intervals are too many; allowed: 1 to {MAX_INTERVALS}"
        )
    for interval in intervals:
        if interval > 1:
            _check_interval(config, interval)


def _check_interval(config: Config, interval: int) -> None:
    for group in ("timing", "tcp", "drops"):
        if group in config.fields.groups:
            raise ValueError(f"[fields] groups: {show(group)} needs every packet; [sampling] interval is {interval}")
    for url in (collector.url for collector in config.collectors if collector.url.protocol == "netflow5"):
        if interval > MAX_SAMPLING_INTERVAL:
            limit = f"NetFlow v5 has room for up to {MAX_SAMPLING_INTERVAL}"
            raise ValueError(f"[sampling] interval: {interval} cannot be told to {url}: {limit}")


def _check_domains(config: Config) -> None:
    """Own intervals have computed Observation Domains: none of them may be another one's, or 0."""
    whose: Dict[Tuple[bool, int], int] = {}
    for interval in (0, *config.sampling.rates.own):
        for collector in config.collectors:
            own, is_netflow5 = config.observation_domain_id(collector), collector.url.protocol == "netflow5"
            domain = domain_of(own, interval)
            told = domain % ENGINES if is_netflow5 else domain
            if whose.setdefault((is_netflow5, told), own) != own and interval or domain == 0:
                raise ValueError(
                    f"[sampling] by_interface: Observation Domain {domain}, of interval {interval} for"
                    f" {collector.url}, is taken; set another observation_domain_id"
                )


def _check_templates(config: Config) -> None:
    names = [DEFAULT.name, *(template.name for template in config.templates)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"[[template]] name: {show(name)} is there twice; {DEFAULT.name!r} is flowexp's own")
    _check_template(config, "[export]", config.export.template)
    for collector in (each for each in config.collectors if each.url.protocol != "netflow5"):
        spec = _check_template(config, "[[collector]]", collector.template or config.export.template)
        try:
            check_template(spec, collector.url.protocol, biflow=collector.biflow)
        except ElementError as error:
            raise ValueError(f"[[template]] {show(spec.name)} cannot go to {collector.url}: {error}") from error


def _check_template(config: Config, header: str, name: str) -> TemplateSpec:
    try:
        spec = config.template(name)
    except ValueError as error:
        raise ValueError(f"{header} template: {error}") from error
    for field in spec.fields:
        group = group_of(field.name)
        if group and group not in config.fields.told:
            needed = f"needs the group {show(group)} in [fields] groups"
            if group == AS_NUMBERS:
                needed = 'needs [fields] as_table, and the group "routing" in [fields] groups'
            raise ValueError(f"[[template]] {show(spec.name)}: {field.name} {needed}")
    return spec


def _check_collector(collector: Collector) -> None:
    for field in dataclasses.fields(Collector):
        transports = field.metadata.get("transports", (collector.url.transport,))
        if collector.url.transport not in transports and getattr(collector, field.name) != field.default:
            allowed = " and ".join(f"{each}://" for each in transports)
            raise ValueError(f"[[collector]] {field.name}: only {allowed} can use it, not {collector.url}")
    if collector.psamp and collector.url.protocol != "ipfix":
        raise ValueError(f"[[collector]] psamp: only IPFIX has PSAMP's elements, not {collector.url}")
    if collector.biflow and collector.url.protocol != "ipfix":
        raise ValueError(f"[[collector]] biflow: only IPFIX has elements of the reverse direction, not {collector.url}")
    if collector.key_file and not collector.cert_file:
        raise ValueError("[[collector]] key_file: there is no cert_file that it could belong to")
