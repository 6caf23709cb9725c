# SPDX-License-Identifier: GPL-2.0-or-later
"""Templates as data: which elements a flow's Data Record carries, and its layout computed once.

What a flow does not have is absent, never zero: each address family has five Templates, by VLAN tags and
direction, and a vectorised classification picks one for each flow. A Template ID stands for one layout
for ever, so that a Collector that kept Templates over a restart or a change of options reads no nonsense.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowexp.protocol.elements import BY_NAME, Columns, Measured, measured

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array

_COMMON_BEFORE = "ipVersion protocolIdentifier"
_COMMON_AFTER = """
    sourceTransportPort destinationTransportPort tcpControlBits ipClassOfService ipDiffServCodePoint
    octetDeltaCount packetDeltaCount flowStartMilliseconds flowEndMilliseconds flowEndReason
    ingressInterface egressInterface flowDirection minimumIpTotalLength maximumIpTotalLength
    minimumTTL maximumTTL fragmentFlags sourceMacAddress destinationMacAddress
"""
_FAMILY = {
    4: "sourceIPv4Address destinationIPv4Address ipNextHopIPv4Address icmpTypeCodeIPv4",
    6: "sourceIPv6Address destinationIPv6Address ipNextHopIPv6Address icmpTypeCodeIPv6 flowLabelIPv6",
}

VARIANTS = {
    "untagged": "",
    "tagged": "vlanId",
    "tagged, egress": "vlanId postVlanId",
    "two tags": "vlanId dot1qCustomerVlanId",
    "two tags, egress": "vlanId postVlanId dot1qCustomerVlanId",
}
"""What flows carry beyond their family's elements; a variant's number is its place here (see `classify`)."""

# Added to a Dialect's first Template ID:
_FAMILY_IDS = {4: 0, 6: 8}  # of five each
_SAMPLING_ID = 16
_WIDE_FLAGS_IDS = 32  # where tcpControlBits has two octets, because that is another layout


class Field(NamedTuple):
    """One Field Specifier: an element and its length in the record."""

    measured: Measured
    octets: int

    @property
    def name(self) -> str:
        """The element's IANA name."""
        return self.measured.element.name

    @property
    def storage(self) -> np.dtype[Any]:
        """Its numpy type, in network byte order."""
        return self.measured.element.type.storage(self.octets)


class RecordLayout:
    """The layout of a Data Record: its elements, where they are, and what they are computed from."""

    template_id = 0
    record = b""
    """The Template Record's octets: none where Collectors know the layout."""

    def __init__(self, fields: tuple[Field, ...], dtype: np.dtype[Any]) -> None:
        self.fields = fields
        self.names = [field.name for field in fields]
        self.columns = frozenset(column for field in fields for column in field.measured.columns)
        self.dtype = dtype
        """A Data Record: packed, network byte order, its fields by the elements' names."""

    @property
    def record_octets(self) -> int:
        """Length of one Data Record."""
        return self.dtype.itemsize

    def fill(self, records: Array, columns: Columns) -> None:
        """Write one Data Record a row into `records`, an array of `dtype` as long as the columns."""
        for name, (element, octets) in zip(self.names, self.fields):
            records[name] = element.wire(columns, octets)


class Template(RecordLayout):
    """One Template: a layout that Collectors are told of (RFC 7011 §3.4.1, RFC 3954 §5.2)."""

    def __init__(self, template_id: int, fields: tuple[Field, ...]) -> None:
        super().__init__(fields, np.dtype([(field.name, field.storage) for field in fields]))
        self.template_id = template_id
        self.record = struct.pack(">HH", template_id, len(fields)) + b"".join(
            struct.pack(">HH", field.measured.element.element_id, field.octets) for field in fields
        )

    def __repr__(self) -> str:
        return f"<Template {self.template_id}: {len(self.fields)} fields, {self.record_octets} octets>"


class Dialect(NamedTuple):
    """What a protocol's Templates have of their own."""

    first_id: int  # Template IDs begin here
    instead: Mapping[str, Measured | None]  # what takes an element's place; None: nothing does
    options_counts: tuple[int, int]  # how an Options Template says that it has two fields, one of them scope
    domain_scope: int  # the scope field that stands for the whole Observation Domain


IPFIX_DIALECT = Dialect(
    first_id=256,
    instead={},
    options_counts=(2, 1),  # Field Count and Scope Field Count (RFC 7011 §3.4.2.2)
    domain_scope=BY_NAME["observationDomainId"].element_id,
)


class SamplingTemplate(NamedTuple):
    """Options Template and Options Data Record that announce: every packet is counted, 1:1.

    samplingInterval alone, scoped by the Observation Domain: with any other sampling element beside it
    some Collectors scale by the wrong number.
    """

    template_id: int
    dialect: Dialect

    @property
    def record(self) -> bytes:
        """The Options Template Record's octets."""
        scope, interval = self.dialect.domain_scope, BY_NAME["samplingInterval"].element_id
        return struct.pack(">HHH HHHH", self.template_id, *self.dialect.options_counts, scope, 4, interval, 4)

    def data_record(self, observation_domain_id: int) -> bytes:
        """The Options Data Record's octets."""
        return struct.pack(">II", observation_domain_id, 1)


def classify(columns: Columns) -> Array:
    """Each flow's variant: its place in VARIANTS, u8."""
    inner = columns["inner_tagged"].astype(bool)
    tagged = columns["vlan_tagged"].astype(bool) | inner
    variants: Array = tagged * (columns["direction"].astype(np.uint8) + np.uint8(1)) + inner * np.uint8(2)
    return variants


class Templates(NamedTuple):
    """All Templates of an Exporting Process."""

    of_family: Mapping[int, tuple[Template, ...]]  # IP version -> one a variant
    sampling: SamplingTemplate

    def all(self) -> list[Template]:
        """Every Template, by Template ID."""
        return [template for version in sorted(self.of_family) for template in self.of_family[version]]

    def partition(self, columns: Columns) -> Iterator[tuple[Template, Array]]:
        """The Templates these flows need, each with its flows' row numbers in ascending order."""
        family = self.of_family[4 if columns["src_addr"].shape[1] == 4 else 6]
        variants = classify(columns)
        for variant in np.flatnonzero(np.bincount(variants, minlength=1)):
            yield family[variant], np.flatnonzero(variants == variant)


def default_templates(*, tcp_control_bits_octets: int = 1, dialect: Dialect = IPFIX_DIALECT) -> Templates:
    """The Templates of this program; tcpControlBits in one octet or in two.

    One by default: nfacctd 1.7.7 shows 0 for two. Raises ElementError for any other length.
    """
    octets = {"tcpControlBits": measured("tcpControlBits").check_octets(tcp_control_bits_octets)}
    first_id = dialect.first_id + (_WIDE_FLAGS_IDS if tcp_control_bits_octets == 2 else 0)

    def template(template_id: int, names: str) -> Template:
        elements = [dialect.instead.get(name, measured(name)) for name in names.split()]
        return Template(
            template_id,
            tuple(
                Field(element, octets.get(element.element.name, element.octets))
                for element in elements
                if element is not None
            ),
        )

    of_family: dict[int, tuple[Template, ...]] = {
        ip_version: tuple(
            template(first_id + family_id + number, f"{_COMMON_BEFORE} {_FAMILY[ip_version]} {_COMMON_AFTER} {extra}")
            for number, extra in enumerate(VARIANTS.values())
        )
        for ip_version, family_id in _FAMILY_IDS.items()
    }
    return Templates(of_family, SamplingTemplate(first_id + _SAMPLING_ID, dialect))


def field_table(templates: Templates) -> str:
    """What records carry, as Markdown: one line an element."""
    lines = ["| Information Element | ID | Octets | In records of | Meaning |", "|---|---|---|---|---|"]
    seen: dict[str, Field] = {}
    families: dict[str, list[str]] = {}
    for ip_version, (*_, richest) in templates.of_family.items():
        for field in richest.fields:
            seen.setdefault(field.name, field)
            families.setdefault(field.name, []).append(f"IPv{ip_version}")
    extra = {name: variant for variant, names in reversed(VARIANTS.items()) for name in names.split()}
    for name, (element, octets) in seen.items():
        which = extra.get(name) or ("all flows" if len(families[name]) == 2 else f"{families[name][0]} flows")
        lines.append(f"| {name} | {element.element.element_id} | {octets} | {which} | {element.meaning} |")
    return "\n".join(lines) + "\n"
