# SPDX-License-Identifier: GPL-2.0-or-later
"""Templates as data: which elements a flow's Data Record carries, and its layout computed once.

What a flow does not have is absent, never zero: of one list of elements each address family has as many
Templates as its flows differ in what they have (CONDITIONS), and a vectorised classification picks one for
each flow. A Template ID stands for one layout for ever, so that a Collector that kept Templates over a
restart or a change of configuration reads no nonsense: see TemplateIds.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import numpy as np

from flowexp.protocol.biflow import BIFLOW, DIRECTION, REVERSE, reverse_of
from flowexp.protocol.elements import MEASURED, Columns, Measured, labels_of, measured
from flowexp.protocol.fieldgroups import elements_of
from flowexp.protocol.registry import BY_NAME, IANA, OWN_ENTERPRISE, REVERSE_ENTERPRISE, Element, ElementError

if TYPE_CHECKING:
    from flowexp.protocol.datatypes import Array

FAMILIES = {4: "IPv4", 6: "IPv6"}
"""The address families, as `Measured.family` and IANA's names have them."""

_TCP = 6
_FIRST_ID = 256
_MOST_FIELDS = 64  # a Template Record of so many fits the smallest path's Message
_LEAST_DELTA_OCTETS = 4  # a flow that counts more is told in several records: see `split_counters`


class Condition(NamedTuple):
    """What only some flows have. `Measured.only` names it for the elements that only they carry."""

    implies: str  # another condition that holds for all of these flows; "": none
    columns: tuple[str, ...]
    holds: Callable[..., Array]  # these columns -> for each flow whether it holds
    excludes: tuple[str, ...] = ()  # other conditions, above, that hold for none of these flows

    def of(self, columns: Columns) -> Array:
        """For each flow whether it holds."""
        return self.holds(*(columns[name] for name in self.columns))


def _any_tag(vlan_tagged: Array, inner_tagged: Array) -> Array:
    tagged: Array = vlan_tagged.astype(bool) | inner_tagged.astype(bool)
    return tagged


def _names(**kinds: str) -> dict[str, Condition]:
    """A flow has a name of one of these kinds, whose numbers begin at 1, or of none. What each implies."""

    def is_kind(number: int) -> Callable[[Array], Array]:
        return lambda kind: kind == number

    return {
        kind: Condition(implies, ("application_name_kind",), is_kind(number), excludes=tuple(kinds)[: number - 1])
        for number, (kind, implies) in enumerate(kinds.items(), 1)
    }


CONDITIONS = {
    "tagged": Condition("", ("vlan_tagged", "inner_tagged"), _any_tag),
    "tagged, egress": Condition(
        "tagged",
        ("vlan_tagged", "inner_tagged", "direction"),
        lambda vlan_tagged, inner_tagged, direction: _any_tag(vlan_tagged, inner_tagged) & direction.astype(bool),
    ),
    "translated, ingress": Condition(
        "",
        ("translated", "direction"),
        lambda translated, direction: translated & (direction == 0),
        excludes=("tagged, egress",),
    ),
    "translated, egress": Condition(
        "",
        ("translated", "direction"),
        lambda translated, direction: translated & (direction != 0),
        excludes=("translated, ingress",),
    ),
    "tunnelled": Condition("", ("tunnels_kind",), lambda kind: kind != 0),
    "tunnel over IPv4": Condition("tunnelled", ("tunnels_ip_version",), lambda version: version == 4),
    "tunnel over IPv6": Condition(
        "tunnelled", ("tunnels_ip_version",), lambda version: version == 6, excludes=("tunnel over IPv4",)
    ),
    "two labels": Condition(
        "tunnelled",
        ("tunnels_kind", "tunnels_src_addr"),
        lambda kind, stack: labels_of(kind, stack) > 1,
        excludes=("tunnel over IPv4", "tunnel over IPv6"),
    ),
    "TCP": Condition("", ("protocol",), lambda protocol: protocol == _TCP),
    "two tags": Condition("tagged", ("inner_tagged",), lambda inner_tagged: inner_tagged.astype(bool)),
    **_names(**{"TLS server name": "TCP", "HTTP host": "TCP", "DNS name": ""}),
    BIFLOW: Condition("", ("is_biflow",), lambda is_biflow: is_biflow),
}


class TemplateIds:
    """Template IDs of an exporter: each is a hash of the layout it stands for.

    So a layout has its ID after every restart, and another layout has another one. Where two layouts would have the
    same (five of the 780 of all field groups), the one that comes later gets the next hash, and depends on what else is
    configured: keep one of these for all Templates of a process, those included that it no longer uses.
    """

    def __init__(self) -> None:
        self._layouts: dict[int, bytes] = {}

    def id_of(self, layout: bytes) -> int:
        """The ID of a layout: 256 to 65,535."""
        for attempt in count():
            digest = hashlib.sha256(attempt.to_bytes(4, "big") + layout).digest()
            template_id = _FIRST_ID + int.from_bytes(digest[:8], "big") % (0x10000 - _FIRST_ID)
            if self._layouts.setdefault(template_id, layout) == layout:
                return template_id
        raise AssertionError("there are no more Template IDs")


class Field(NamedTuple):
    """One Field Specifier: an element and its length in the record."""

    measured: Measured
    octets: int

    @property
    def name(self) -> str:
        """The element's IANA name."""
        return self.measured.element.name

    @property
    def conditions(self) -> set[str]:
        """What must hold for a flow to have it. Both directions of a Biflow are alike in all else."""
        is_reverse = self.measured.element.enterprise == REVERSE_ENTERPRISE
        return {self.measured.only, BIFLOW} if is_reverse else {self.measured.only}

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

    def __init__(self, fields: tuple[Field, ...], ids: TemplateIds) -> None:
        super().__init__(fields, np.dtype([(field.name, field.storage) for field in fields]))
        specifiers = b"".join(field.measured.element.specifier(field.octets) for field in fields)
        self.template_id = ids.id_of(specifiers)
        self.record = struct.pack(">HH", self.template_id, len(fields)) + specifiers

    def __repr__(self) -> str:
        return f"<Template {self.template_id}: {len(self.fields)} fields, {self.record_octets} octets>"


class Dialect(NamedTuple):
    """What a protocol's Templates have of their own."""

    name: str
    instead: Mapping[str, Measured | None]
    """What takes an element's place; None: nothing does. Another element does so in DEFAULT only: who names elements
    himself gets those."""
    options_counts: Callable[[int, int], tuple[int, int]]
    """How an Options Template says how many scope fields and how many others it has."""
    scopes: Mapping[tuple[str, ...], int] | None
    """Its numbers for what Options Records are scoped by; None: any Information Elements."""
    has_enterprises: bool = False
    """Whether a Field Specifier has room for an enterprise number."""


IPFIX_DIALECT = Dialect(
    name="IPFIX",
    instead={},
    options_counts=lambda scopes, others: (scopes + others, scopes),  # RFC 7011 §3.4.2.2
    scopes=None,
    has_enterprises=True,
)


class FieldSpec(NamedTuple):
    """An element that a Template shall have, by name, and its length if not the usual one."""

    name: str
    octets: int | None = None

    def __str__(self) -> str:
        return self.name if self.octets is None else f"{self.name}/{self.octets}"


class TemplateSpec(NamedTuple):
    """What a Template shall carry, for both address families and every protocol.

    Of elements of one address family flows of the other have the twin (sourceIPv6Address for sourceIPv4Address) in
    that place, unless the list has that one, too, or there is none.
    """

    name: str
    fields: tuple[FieldSpec, ...]


def _adds_up(element: Measured) -> bool:
    """Whether it is one of the counters of which nothing may be lost, however short its fields are."""
    counters = ("octets", "packets", f"{REVERSE}octets", f"{REVERSE}packets")
    return element.element.semantics == "deltaCounter" and len(element.columns) == 1 and element.columns[0] in counters


def template_spec(name: str, elements: Iterable[str]) -> TemplateSpec:
    """From names of elements with their lengths where they are not the usual ones: octetDeltaCount/4.

    ElementError for what is not measured, cannot have that length, or stands there twice.
    """
    fields: list[FieldSpec] = []
    for text in elements:
        element_name, slash, length = text.partition("/")
        element = measured(element_name)
        octets = None
        if slash:
            if not length.isascii() or not length.isdigit():
                raise ElementError(f"{text}: a length is a number of octets, as in octetDeltaCount/4")
            octets = element.check_octets(int(length))
            if _adds_up(element) and octets < _LEAST_DELTA_OCTETS:
                least = _LEAST_DELTA_OCTETS
                raise ElementError(f"{text}: with less than {least} octets a flow would take too many records")
        if element_name in (field.name for field in fields):
            raise ElementError(f"{element_name} is there twice")
        fields.append(FieldSpec(element_name, octets))
    if not fields:
        raise ElementError("no element is named")
    if len(fields) > _MOST_FIELDS:
        raise ElementError(f"{len(fields)} elements are more than {_MOST_FIELDS}")
    return TemplateSpec(name, tuple(fields))


DEFAULT = template_spec(
    "default",
    """
    ipVersion protocolIdentifier
    sourceIPv4Address destinationIPv4Address ipNextHopIPv4Address icmpTypeCodeIPv4
    sourceIPv6Address destinationIPv6Address ipNextHopIPv6Address icmpTypeCodeIPv6 flowLabelIPv6
    sourceTransportPort destinationTransportPort tcpControlBits ipClassOfService ipDiffServCodePoint
    octetDeltaCount packetDeltaCount flowStartMilliseconds flowEndMilliseconds flowEndReason
    ingressInterface egressInterface flowDirection minimumIpTotalLength maximumIpTotalLength
    minimumTTL maximumTTL fragmentFlags sourceMacAddress destinationMacAddress
    vlanId postVlanId dot1qCustomerVlanId
    """.split(),
)
"""What records carry where nothing else is configured."""


def with_groups(spec: TemplateSpec, groups: Iterable[str]) -> TemplateSpec:
    """The spec, and what these field groups add to it: to DEFAULT all their elements, to one's own choice nothing."""
    if spec is not DEFAULT or not groups:
        return spec
    return TemplateSpec(spec.name, (*spec.fields, *map(FieldSpec, elements_of(groups))))


def _of_family(spec: TemplateSpec, ip_version: int) -> Iterator[FieldSpec]:
    """The spec's fields that flows of one address family have."""
    names = {field.name for field in spec.fields}
    other = FAMILIES[10 - ip_version]
    for field in spec.fields:
        if measured(field.name).family != other:
            yield field
            continue
        twin = field.name.replace(other, FAMILIES[ip_version])
        if twin != field.name and twin in MEASURED and twin not in names:
            octets = field.octets if MEASURED[twin].element.type is measured(field.name).element.type else None
            yield FieldSpec(twin, octets)


def _field(spec: FieldSpec, dialect: Dialect, enterprise_number: int, *, is_own_choice: bool) -> Field | None:
    """A field as a protocol has it; None if the protocol is better off without. ElementError if it cannot have it."""
    chosen: Measured | None = measured(spec.name)
    instead = dialect.instead.get(spec.name, chosen)
    if not is_own_choice or (instead is not None and instead.element.name == spec.name):
        chosen = instead
    if chosen is None:
        return None
    if chosen.element.enterprise != IANA and not dialect.has_enterprises:
        if is_own_choice:
            raise ElementError(f"{spec.name}: {dialect.name} has no enterprise-specific elements; IPFIX has")
        return None
    chosen = chosen._replace(element=chosen.element.under(enterprise_number))
    return Field(chosen, spec.octets or chosen.octets)


def _present(fields: Sequence[Field], absent: set[str], family: str) -> tuple[Field, ...]:
    """What flows have for which these conditions do not hold. ElementError if that is nothing."""
    present = tuple(field for field in fields if not field.conditions & absent)
    if not present:
        lacking = absent & {name for field in fields for name in field.conditions}
        which = "".join(f" that are not {name}" for name in sorted(lacking))
        raise ElementError(f"{family} flows{which} have none of the elements")
    return present


def _is_possible(condition: Condition, holding: set[str]) -> bool:
    """Whether it can hold where these do."""
    return {condition.implies} <= holding | {""} and holding.isdisjoint(condition.excludes)


class Templates:
    """All Templates of one spec in one protocol: in each family one for each set of conditions that can hold."""

    def __init__(
        self,
        of_family: Mapping[int, Sequence[Field]],
        dialect: Dialect,
        ids: TemplateIds | None = None,
        enterprise_number: int = OWN_ENTERPRISE,
    ) -> None:
        self.dialect = dialect
        self._enterprise_number = enterprise_number
        self.ids = ids or TemplateIds()
        """What Options Templates have their IDs from, too."""
        every = {name for fields in of_family.values() for field in fields for name in field.conditions}
        named = every & CONDITIONS.keys()
        conditions = [name for name in CONDITIONS if name in named | {CONDITIONS[each].implies for each in named}]
        self._conditions = {name: CONDITIONS[name] for name in conditions}
        self._variant = np.zeros(1 << len(conditions), np.intp)  # of a set of conditions, as bits
        variants: dict[tuple[tuple[Field, ...], ...], int] = {}
        for bits in range(len(self._variant)):
            holding = {name for bit, name in enumerate(conditions) if bits >> bit & 1}
            absent = {*conditions} - holding
            if all(_is_possible(CONDITIONS[name], holding) for name in holding):
                of_families = tuple(_present(fields, absent, FAMILIES[each]) for each, fields in of_family.items())
                self._variant[bits] = variants.setdefault(of_families, len(variants))
        self.of_family = {
            ip_version: tuple(Template(each[number], self.ids) for each in variants)
            for number, ip_version in enumerate(of_family)
        }
        """IP version -> a Template for each variant, those of the fewest conditions first."""

    def all(self) -> list[Template]:
        """Every Template, IPv4's first."""
        return [template for version in sorted(self.of_family) for template in self.of_family[version]]

    def element(self, name: str) -> Element:
        """An element as these Templates have it: flowexp's own under the number that was asked for."""
        return BY_NAME[name].under(self._enterprise_number)

    def enterprise_elements(self) -> list[Element]:
        """Every element that is neither IANA's nor the reverse of one, once."""
        elements = (field.measured.element for template in self.all() for field in template.fields)
        return sorted({element for element in elements if element.enterprise not in (IANA, REVERSE_ENTERPRISE)})

    @property
    def reverse_columns(self) -> frozenset[str]:
        """The columns that are needed of the reverse direction, by the names that they have of the forward one."""
        columns = {column for template in self.all() for column in template.columns}
        return frozenset(column[len(REVERSE) :] for column in columns if column.startswith(REVERSE))

    def counter_octets(self) -> dict[str, int]:
        """The columns of which some Template has fewer octets than they can need, by what `split_counters` takes."""
        fields = [field for template in self.all() for field in template.fields]
        short = {
            field for field in fields if _adds_up(field.measured) and field.octets < field.measured.element.type.octets
        }
        return {field.measured.columns[0]: field.octets for field in short}

    def counters(self) -> frozenset[str]:
        """The columns whose counts start anew with each record."""
        measured = (field.measured for template in self.all() for field in template.fields)
        return frozenset(name for each in measured if each.element.semantics == "deltaCounter" for name in each.columns)

    def classify(self, columns: Columns) -> Array:
        """Each flow's variant: its Template's place in its family."""
        bits = np.zeros(len(columns["src_addr"]), np.uint16)
        absent = set()
        for bit, (name, condition) in enumerate(self._conditions.items()):
            if condition.implies in absent:
                absent.add(name)
                continue
            holds = condition.of(columns)
            if holds.any():
                bits |= holds.astype(np.uint16) << np.uint16(bit)
            else:
                absent.add(name)
        variants: Array = self._variant[bits]
        return variants

    def partition(self, columns: Columns) -> Iterator[tuple[Template, Array]]:
        """The Templates these flows need, each with its flows' row numbers in ascending order."""
        family = self.of_family[4 if columns["src_addr"].shape[1] == 4 else 6]
        variants = self.classify(columns)
        for variant in np.flatnonzero(np.bincount(variants, minlength=1)):
            yield family[variant], np.flatnonzero(variants == variant)


def build_templates(
    spec: TemplateSpec,
    dialect: Dialect = IPFIX_DIALECT,
    *,
    tcp_control_bits_octets: int = 1,
    enterprise_number: int = OWN_ENTERPRISE,
    ids: TemplateIds | None = None,
    biflow: bool = False,
) -> Templates:
    """The Templates that a spec has in a protocol. ElementError names an element that the protocol cannot carry.

    - tcp_control_bits_octets: where the spec has no length for tcpControlBits. One by default: nfacctd 1.7.7
      shows 0 for two.
    - enterprise_number: for flowexp's own elements.
    - ids: the process's; Collectors that are told of several specs need one for all.
    - biflow: with Templates for both directions in one record; IPFIX alone can carry them.
    """
    usual = {"tcpControlBits": measured("tcpControlBits").check_octets(tcp_control_bits_octets)}
    is_own_choice = spec.name != DEFAULT.name
    make = partial(_field, dialect=dialect, enterprise_number=enterprise_number, is_own_choice=is_own_choice)
    of_family = {}
    for ip_version in FAMILIES:
        specs = (FieldSpec(name, octets or usual.get(name)) for name, octets in _of_family(spec, ip_version))
        fields = [field for field in map(make, specs) if field is not None]
        of_family[ip_version] = _both_directions(fields) if biflow else fields
    return Templates(of_family, dialect, ids, enterprise_number)


def _both_directions(fields: Sequence[Field]) -> list[Field]:
    """Those of the reverse direction, then these: nfdump takes for the forward one whichever comes last."""
    twins = [Field(twin, octets) for each, octets in fields if (twin := reverse_of(each)) is not None]
    if len(twins) + 1 + len(fields) > _MOST_FIELDS:
        raise ElementError(f"{len(fields)} elements and those of the reverse direction are more than {_MOST_FIELDS}")
    return [*twins, Field(DIRECTION, DIRECTION.octets), *fields]


def default_templates(
    *, tcp_control_bits_octets: int = 1, dialect: Dialect = IPFIX_DIALECT, groups: Iterable[str] = ()
) -> Templates:
    """The Templates of DEFAULT with these field groups. ElementError for a length that tcpControlBits cannot have."""
    spec = with_groups(DEFAULT, groups)
    return build_templates(spec, dialect, tcp_control_bits_octets=tcp_control_bits_octets)
