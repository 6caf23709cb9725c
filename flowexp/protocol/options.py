# SPDX-License-Identifier: GPL-2.0-or-later
"""Options Records: what Collectors are told beside flows (RFC 7011 §3.4.2, §4; RFC 3954 §6).

KINDS is the whole of it, one row a kind of record: its scope, its fields and where their values come from. The
same rows serve every protocol; what a protocol cannot carry, it is not sent. To add a kind: one row here, and a
field of Facts if it tells what is not known yet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Callable, NamedTuple, Union

from flowexp.protocol import typeinfo
from flowexp.protocol.datatypes import VARIABLE_LENGTH, single
from flowexp.protocol.elements import FLOW_KEY
from flowexp.protocol.registry import BY_NAME, IANA
from flowexp.protocol.template import Dialect, Templates

Value = Union[int, str, bytes]
Row = Sequence[Value]

_PROCESS_ID = 1  # meteringProcessId and exportingProcessId: there is one of each
_DOMAIN, _METERING = ("observationDomainId",), ("observationDomainId", "meteringProcessId")
_EXPORTING = ("observationDomainId", "exportingProcessId")


class InterfaceFacts(NamedTuple):
    """A network device. `description`: its alias; `vrf`, `vrf_table`: of the VRF that it is in, "" and 0 if in none."""

    ifindex: int
    name: str
    description: str = ""
    vrf: str = ""
    vrf_table: int = 0


class AnomalyFacts(NamedTuple):
    """What is odd at an Observation Point (metering/anomalies.py): totals, and the most of one source in a minute."""

    ifindex: int
    is_egress: bool
    unanswered_flows: int
    undersized_packets: int
    jumbo_packets: int
    destinations: int
    ports: int


class MeteringFacts(NamedTuple):
    """The Metering Process since its counters began; the figures of RFC 7011 §4.1 and §4.2."""

    flows: int  # observed
    ignored_packets: int  # IP packets that it did not process
    ignored_octets: int


class ExportingFacts(NamedTuple):
    """The Exporting Process, to one Collector, since it began (RFC 7011 §4.1, §4.3)."""

    messages: int = 0
    octets: int = 0
    flow_records: int = 0
    not_sent_flows: int = 0
    not_sent_packets: int = 0
    not_sent_octets: int = 0


class Facts(NamedTuple):
    """What there is to tell, as plain values; None: it is not known, and Collectors are not told."""

    sampling_interval: int = 1  # one packet of so many is metered
    sampling_random: bool = False  # any one of them; else always the last
    active_timeout_s: int | None = None
    idle_timeout_s: int | None = None
    metering: MeteringFacts | None = None
    exporting: ExportingFacts | None = None
    exporter_address: bytes = b""  # 4 or 16 octets, from which Messages come
    interfaces: tuple[InterfaceFacts, ...] = ()
    applications: tuple[tuple[bytes, str, str], ...] = ()  # applicationId, name and description of each there is
    anomalies: tuple[AnomalyFacts, ...] = ()


class Told(NamedTuple):
    """What a Kind's rows are made of."""

    domain: int  # Observation Domain ID
    init_ms: int  # Unix time that relative times in these Messages count from
    facts: Facts
    templates: Templates


class Kind(NamedTuple):
    """One kind of Options Data Record.

    - rows: the values of `scopes` and then `fields`, for each record.
    - is_state: a change is told at once; else these are figures, which are told with the Templates.
    """

    scopes: tuple[str, ...]
    fields: tuple[str, ...]
    rows: Callable[[Told], Iterable[Row]]
    is_state: bool = True


def _timeouts(told: Told) -> Iterable[Row]:
    active_s, idle_s = told.facts.active_timeout_s, told.facts.idle_timeout_s
    return [] if active_s is None or idle_s is None else [(told.domain, _PROCESS_ID, active_s, idle_s)]


def _exporting(*names: str) -> Callable[[Told], Iterable[Row]]:
    def rows(told: Told) -> Iterable[Row]:
        facts = told.facts.exporting
        return [] if facts is None else [(told.domain, _PROCESS_ID, *(getattr(facts, name) for name in names))]

    return rows


def _metering(*names: str) -> Callable[[Told], Iterable[Row]]:
    def rows(told: Told) -> Iterable[Row]:
        facts = told.facts.metering
        return [] if facts is None else [(told.domain, _PROCESS_ID, *(getattr(facts, name) for name in names))]

    return rows


def _address(octets: int) -> Callable[[Told], Iterable[Row]]:
    def rows(told: Told) -> Iterable[Row]:
        address = told.facts.exporter_address
        return [(told.domain, _PROCESS_ID, address)] if len(address) == octets else []

    return rows


def _flow_keys(told: Told) -> Iterable[Row]:
    for template in told.templates.all():
        bits = sum(1 << place for place, name in enumerate(template.names) if name in FLOW_KEY)
        yield template.template_id, bits


def _applications(told: Told) -> Iterable[Row]:
    is_told = any("applicationId" in template.names for template in told.templates.all())
    return told.facts.applications if is_told else ()


_ANOMALIES = (
    "unansweredTcpFlowTotalCount",
    "undersizedPacketTotalCount",
    "jumboPacketTotalCount",
    "maximumDestinationsOfOneSource",
    "maximumPortsOfOneSource",
)


def _anomalies(*, at_egress: bool) -> Callable[[Told], Iterable[Row]]:
    return lambda told: [
        (ifindex, *figures) for ifindex, is_egress, *figures in told.facts.anomalies if is_egress == at_egress
    ]


def _element_types(told: Told) -> Iterable[Row]:
    elements = set(told.templates.enterprise_elements())
    if told.facts.anomalies:
        elements |= {told.templates.element(name) for name in _ANOMALIES}
    return map(typeinfo.values, sorted(elements))


# With any other sampling element beside it some Collectors scale by the wrong number.
_SAMPLING = (Kind(_DOMAIN, ("samplingInterval",), lambda told: [(told.domain, told.facts.sampling_interval)]),)

_SYSTEMATIC, _RANDOM_N_OUT_OF_N = 1, 3  # selectorAlgorithm (RFC 5477 §8.2.1)
_SELECTOR_ID = 1  # there is one Selector


def _systematic(told: Told) -> Iterable[Row]:
    interval = told.facts.sampling_interval
    return [] if _is_random(told) else [(_SELECTOR_ID, _SYSTEMATIC, 1, interval - 1)]


def _random(told: Told) -> Iterable[Row]:
    return [(_SELECTOR_ID, _RANDOM_N_OUT_OF_N, 1, told.facts.sampling_interval)] if _is_random(told) else []


def _is_random(told: Told) -> bool:
    return told.facts.sampling_random and told.facts.sampling_interval > 1


# The same by PSAMP's elements (RFC 5476 §6.5.2.1, §6.5.2.3).
_PSAMP = (
    Kind(("selectorId",), ("selectorAlgorithm", "samplingPacketInterval", "samplingPacketSpace"), _systematic),
    Kind(("selectorId",), ("selectorAlgorithm", "samplingSize", "samplingPopulation"), _random),
)

KINDS = (
    # RFC 5610.
    Kind(typeinfo.SCOPES, typeinfo.FIELDS, _element_types),
    # RFC 7011 §4.4.
    Kind(("templateId",), ("flowKeyIndicator",), _flow_keys),
    # What flowStartSysUpTime and flowEndSysUpTime count from, should a Template have them.
    Kind(_EXPORTING, ("systemInitTimeMilliseconds",), lambda told: [(told.domain, _PROCESS_ID, told.init_ms)]),
    Kind(_EXPORTING, ("exporterIPv4Address",), _address(4)),
    Kind(_EXPORTING, ("exporterIPv6Address",), _address(16)),
    Kind(_METERING, ("flowActiveTimeout", "flowIdleTimeout"), _timeouts),
    # RFC 7011 §4.1, §4.2, §4.3.
    Kind(
        _METERING,
        ("exportedMessageTotalCount", "exportedFlowRecordTotalCount", "exportedOctetTotalCount"),
        _exporting("messages", "flow_records", "octets"),
        is_state=False,
    ),
    Kind(
        _METERING,
        ("observedFlowTotalCount", "ignoredPacketTotalCount", "ignoredOctetTotalCount"),
        _metering("flows", "ignored_packets", "ignored_octets"),
        is_state=False,
    ),
    Kind(
        _EXPORTING,
        ("notSentFlowTotalCount", "notSentPacketTotalCount", "notSentOctetTotalCount"),
        _exporting("not_sent_flows", "not_sent_packets", "not_sent_octets"),
        is_state=False,
    ),
    Kind(
        ("ingressInterface",),
        ("interfaceName", "interfaceDescription"),
        lambda told: [(each.ifindex, each.name, each.description) for each in told.facts.interfaces],
    ),
    Kind(
        ("ingressInterface",),
        ("ingressVRFID", "VRFname"),
        lambda told: [(each.ifindex, each.vrf_table, each.vrf) for each in told.facts.interfaces if each.vrf],
    ),
    # RFC 6759.
    Kind(("applicationId",), ("applicationName", "applicationDescription"), _applications),
    # Where the field group `integrity` is on.
    Kind(("ingressInterface",), _ANOMALIES, _anomalies(at_egress=False)),
    Kind(("egressInterface",), _ANOMALIES, _anomalies(at_egress=True)),
)


class OptionsTemplate:
    """A Kind as one protocol has it."""

    def __init__(self, kind: Kind, dialect: Dialect, templates: Templates) -> None:
        self.is_state = kind.is_state
        self._rows = kind.rows
        self._omitted = 0  # how many of a row's first values the protocol has no scope for
        names, scopes = (*kind.scopes, *kind.fields), len(kind.scopes)
        octets = [_octets(name) for name in names]
        specifiers = [templates.element(name).specifier(length) for name, length in zip(names, octets)]
        if dialect.scopes is not None:  # one scope stands for all of them
            self._omitted, scopes = scopes - 1, 1
            octets = [octets[0], *octets[1 + self._omitted :]]
            specifier = struct.pack(">HH", dialect.scopes[kind.scopes], octets[0])
            specifiers = [specifier, *specifiers[1 + self._omitted :]]
        self._field_octets = octets
        layout = struct.pack(">HH", *dialect.options_counts(scopes, len(kind.fields))) + b"".join(specifiers)
        self.template_id = templates.ids.id_of(b"options" + layout)
        self.record = struct.pack(">H", self.template_id) + layout
        """The Options Template Record's octets."""

    def data_records(self, told: Told) -> list[bytes]:
        """The octets of each Options Data Record that there is to send."""
        return [
            b"".join(map(single, (row[0], *row[1 + self._omitted :]), self._field_octets)) for row in self._rows(told)
        ]


def _octets(name: str) -> int:
    return BY_NAME[name].type.octets or _FIXED_OCTETS.get(name, VARIABLE_LENGTH)


_FIXED_OCTETS = {
    "interfaceName": 32, "interfaceDescription": 64, "VRFname": 32,
    "applicationId": 4, "applicationName": 24, "applicationDescription": 55,
}  # fmt: skip
"""Of texts in every protocol: NetFlow v9 has no variable length, and some readers of IPFIX have none."""

_LAST_OF_NETFLOW9 = 127  # elements that RFC 3954 §8 has


def options_templates(templates: Templates, *, psamp: bool = False) -> list[OptionsTemplate]:
    """One for each Kind that the protocol of these Templates can carry. psamp: sampling is told by PSAMP's elements."""
    dialect, kinds = templates.dialect, (*(_PSAMP if psamp else _SAMPLING), *KINDS)
    return [OptionsTemplate(kind, dialect, templates) for kind in kinds if _can_carry(dialect, kind)]


def _can_carry(dialect: Dialect, kind: Kind) -> bool:
    if dialect.scopes is None:
        return True
    elements = [BY_NAME[name] for name in kind.fields]
    is_known = all(each.enterprise == IANA and each.element_id <= _LAST_OF_NETFLOW9 for each in elements)
    return kind.scopes in dialect.scopes and is_known
