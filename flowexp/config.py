# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: every key is declared once, below, with its default, limits and meaning.

To add a key: one field with key(), and its lines in conf/flowexp.toml (a test holds the two together).
Durations are numbers of seconds in the file and nanoseconds (..._ns) for the rest of the program.
config_check.py says what no key can say alone, config_load.py reads files and options.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Optional, Tuple

from flowexp.collector_url import CollectorUrl
from flowexp.config_values import (
    DEFAULT_ROUTE,
    MAX_INTERVAL,
    Address,
    Elements,
    Groups,
    Interfaces,
    Intervals,
    Name,
    SourceAddress,
    Text,
    Url,
)
from flowexp.identity import observation_domain_id
from flowexp.keys import (
    AbsolutePath,
    Choice,
    Key,
    Number,
    Section,
    Sections,
    key,
    keys_of,
    seconds,
    section_of,
    show,
    switch,
)
from flowexp.metering import sweep
from flowexp.protocol.fieldgroups import AS_NUMBERS, GROUPS
from flowexp.protocol.registry import OWN_ENTERPRISE
from flowexp.protocol.template import DEFAULT, FieldSpec, TemplateSpec, with_groups
from flowexp.rates import Rates

MAX_COLLECTORS = 8  # as many as the table has room for (COLLECTORS in bpf/flow.h)


directions = Choice(("once", "ingress", "egress", "both"))


def _ns(seconds: float) -> int:
    return round(seconds * 1_000_000_000)


@dataclass(frozen=True)
class ClassTimeouts:
    """[timeouts.tcp] and its like; None: as in [timeouts]."""

    idle: Optional[float] = key(None, seconds(0.1, 86400), "Idle timeout of this protocol class.")
    active: Optional[float] = key(None, seconds(0.1, 86400), "Active timeout of this protocol class.")


@dataclass(frozen=True)
class Timeouts:
    """[timeouts]: when the Metering Process ends a Flow, or reports on one that goes on. Seconds."""

    idle: float = key(15, seconds(0.1, 86400), "A Flow without a packet for this long ends (flowEndReason 1).")
    active: float = key(60, seconds(0.1, 86400), "A Flow that goes on is reported this often (flowEndReason 2).")
    linger: float = key(5, seconds(0, 600), "The idle timeout of a TCP Flow after FIN or RST (flowEndReason 3).")
    sweep_interval: float = key(1, seconds(0.05, 60), "How often the table is searched for Flows to report.")
    tcp: ClassTimeouts = section_of("[timeouts.tcp]", ClassTimeouts)
    udp: ClassTimeouts = section_of("[timeouts.udp]", ClassTimeouts)
    icmp: ClassTimeouts = section_of("[timeouts.icmp]", ClassTimeouts)
    other: ClassTimeouts = section_of("[timeouts.other]", ClassTimeouts)

    @property
    def idle_ns(self) -> Dict[str, int]:
        """By protocol class."""
        return {name: _ns(self.idle if own.idle is None else own.idle) for name, own in self._classes()}

    @property
    def active_ns(self) -> Dict[str, int]:
        """By protocol class."""
        return {name: _ns(self.active if own.active is None else own.active) for name, own in self._classes()}

    def _classes(self) -> Iterator[Tuple[str, ClassTimeouts]]:
        return ((name, own) for name, own in vars(self).items() if isinstance(own, ClassTimeouts))

    @property
    def linger_ns(self) -> int:
        return _ns(self.linger)

    @property
    def sweep_interval_ns(self) -> int:
        return _ns(self.sweep_interval)

    @property
    def for_sweep(self) -> sweep.Timeouts:
        """As the sweep takes them."""
        return sweep.Timeouts(idle_ns=self.idle_ns, active_ns=self.active_ns, linger_ns=self.linger_ns)


@dataclass(frozen=True)
class Table:
    """[table]: the flow table in the kernel."""

    max_flows: int = key(262144, Number(16, 67108864, "flows"), "Room for this many Flows, of IPv4 and of IPv6 each.")
    persist: bool = key(
        False,
        switch,
        "Whether table and programs stay when the exporter leaves, for the next one to take over.",
    )
    pin_path: str = key("/sys/fs/bpf/flowexp", AbsolutePath(), "Where the table is pinned, on a BPF file system.")
    no_exporter: float = key(
        600,
        seconds(10, 86400, zero="never"),
        "No new Flow is made once nobody has swept the table for this long.",
    )

    @property
    def no_exporter_ns(self) -> int:
        return _ns(self.no_exporter)


@dataclass(frozen=True)
class Fields:
    """[fields]: what is learned of a packet beyond the default."""

    groups: Tuple[str, ...] = key((), Groups(), "Field groups that Flow Records have beyond the default elements.")
    as_table: str = key(
        "", AbsolutePath(empty="none"), 'Of "routing": a file of prefixes and the AS numbers that records then have.'
    )

    @property
    def told(self) -> Tuple[str, ...]:
        """The groups, with AS_NUMBERS behind "routing" where there is a file of them."""
        known = {*self.groups, *([AS_NUMBERS] if self.as_table and "routing" in self.groups else [])}
        return tuple(name for name in GROUPS if name in known)


@dataclass(frozen=True)
class Sampling:
    """[sampling]: which packets are metered."""

    interval: int = key(1, Number(1, MAX_INTERVAL, "packets"), "One packet of so many is metered; 1: every packet.")
    by_interface: Tuple[Tuple[str, int], ...] = key(
        (), Intervals(), "Interfaces with another interval; where several fit, the first."
    )
    mode: str = key(
        "random",
        Choice(("random", "count")),
        "Which one of them: any, drawn anew for each so many, or always the last.",
    )

    @property
    def rates(self) -> Rates:
        """All intervals there are, whether an interface has them now or not."""
        intervals = (self.interval, *sorted({each for _, each in self.by_interface} - {self.interval}))
        return Rates(intervals, self.mode == "random" and max(intervals) > 1)


@dataclass(frozen=True)
class Export:
    """[export]: the Exporting Process."""

    observation_domain_id: int = key(
        0,
        Number(1, 0xFFFFFFFF, zero="derived from host and pin_path"),
        "The Observation Domain; unique for each exporter.",
    )
    template_refresh: float = key(60, seconds(1, 86400), "How often Templates are sent again over UDP.")
    mtu: int = key(
        0, Number(512, 65535, "octets", zero="from the route"), "The largest IP packet to send a Message in."
    )
    source_port: int = key(
        0, Number(1, 65535, zero="derived, always the same"), "The UDP port that Messages come from."
    )
    tcp_control_bits_octets: int = key(
        1,
        Choice((1, 2)),
        "Length of tcpControlBits; 2 adds the NS (AE) flag, which some Collectors cannot read.",
    )
    template: str = key(
        DEFAULT.name,
        Name('"default", or the name of a [[template]]'),
        "What records carry, in IPFIX and NetFlow v9.",
    )
    enterprise_number: int = key(
        OWN_ENTERPRISE,
        Number(1, 0xFFFFFFFF),
        "Private Enterprise Number for flowexp's own elements.",
    )
    distribution: str = key(
        "mirror",
        Choice(("mirror", "balance", "failover")),
        "Which Collectors get a record; mirror: all; balance: always the same one; failover: the first in reach.",
    )
    nat_events: bool = key(
        False,
        switch,
        "Whether records tell of each translated connection (NAT) as it begins and as it ends (RFC 8158).",
    )
    mark: int = key(
        0x2055,
        Number(1, 0xFFFFFFFF, zero="none; they are known by their addresses and ports"),
        "Mark (fwmark) on own packets, by which they are not metered; 0 where policy routing would act on it.",
    )

    @property
    def template_refresh_ns(self) -> int:
        return _ns(self.template_refresh)


@dataclass(frozen=True)
class Metrics:
    """[metrics]: figures for Prometheus."""

    listen: str = key("", Address(), "Where Prometheus may fetch the exporter's metrics, over HTTP.")

    @property
    def address(self) -> Optional[Tuple[str, int]]:
        """Host and port; None: no endpoint."""
        host, _, port = self.listen.rpartition(":")
        return (host.strip("[]"), int(port)) if self.listen else None


@dataclass(frozen=True)
class Template:
    """[[template]]: a choice of what records carry."""

    name: str = key(dataclasses.MISSING, Name("a name of your own"), "What [export] template calls it.")
    elements: Tuple[FieldSpec, ...] = key(
        dataclasses.MISSING,
        Elements(),
        "What records carry, in this order; `flowexp elements` lists what can be named.",
    )

    @property
    def spec(self) -> TemplateSpec:
        return TemplateSpec(self.name, self.elements)


def _key_of(transports: Tuple[str, ...], default: Any, kind: Any, meaning: str) -> Any:
    """A key of [[collector]] that only these transports have a use for."""
    named = ", ".join(f"{transport}://" for transport in transports)
    return key(default, kind, f"{named}: {meaning}", transports=transports)


@dataclass(frozen=True)
class Collector:
    """[[collector]]: one for each Collector; [export] distribution says who gets which records."""

    url: CollectorUrl = key(dataclasses.MISSING, Url(), "Where Messages go.")
    ca_file: str = _key_of(
        ("tls",),
        "",
        AbsolutePath(empty="those that this system trusts"),
        "the CAs, in PEM, one of which has signed the Collector's certificate.",
    )
    cert_file: str = _key_of(("tls",), "", AbsolutePath(empty="none"), "our own certificate, in PEM, if it wants one.")
    key_file: str = _key_of(
        ("tls",), "", AbsolutePath(empty="it is in cert_file"), "the key of that certificate, in PEM."
    )
    spool_path: str = _key_of(
        ("tcp", "tls"),
        "",
        AbsolutePath(empty="in memory, 32 MiB at most"),
        "a directory where Messages wait for the Collector; there they outlive the exporter.",
    )
    spool_size: int = _key_of(
        ("tcp", "tls"),
        1024,
        Number(1, 1 << 30, "MiB"),
        "the spool is never larger; the oldest Messages make room, and are counted.",
    )
    backlog_rate: float = _key_of(
        ("tcp", "tls"),
        16,
        Number(0.01, 65536, "MiB a second", whole=False),
        "how fast what has waited goes out, beside what comes in.",
    )
    file_size: int = _key_of(
        ("file",), 0, Number(1, 1 << 30, "MiB", zero="never"), "a file is put aside as soon as it has this size."
    )
    file_seconds: float = _key_of(
        ("file",), 0, seconds(1, 31536000, zero="never"), "a file is put aside this long after its first Message."
    )
    group: str = key(
        "",
        Name('"" (that of all which name none) or a name of your own', may_be_empty=True),
        "Collectors among which records are distributed; each group gets every record.",
    )
    filter: str = key(
        "",
        Text("all flows", 'an expression as for dump --filter, as in "not src net 10.0.0.0/8"', r"(?s).+"),
        "Which flows it is told of; the others are counted.",
    )
    template: str = key(
        "",
        Name('"" (as in [export]), "default", or the name of a [[template]]', may_be_empty=True),
        "What its records carry, in IPFIX and NetFlow v9.",
    )
    biflow: bool = key(False, switch, "IPFIX: whether both directions of a conversation are one record (RFC 5103).")
    psamp: bool = key(False, switch, "IPFIX: whether sampling is told by PSAMP's elements, not samplingInterval.")
    observation_domain_id: int = key(
        0, Number(1, 0xFFFFFFFF, zero="as in [export]"), "The Observation Domain that it is told."
    )
    source_address: str = _key_of(("udp",), "", SourceAddress(), "the address that Messages come from.")
    source_port: int = _key_of(
        ("udp",), 0, Number(1, 65535, zero="as in [export]"), "the port that Messages come from."
    )
    dscp: int = _key_of(("udp",), 0, Number(0, 63), "the DSCP of its packets.")
    device: str = _key_of(
        ("udp",),
        "",
        Text("from the route", 'the name of an interface or VRF, as in "mgmt"', r"[^\s/]{1,15}"),
        "the interface or VRF that Messages leave by.",
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration. Made by config_load.py, every value is within its limits."""

    interfaces: Tuple[str, ...] = key((DEFAULT_ROUTE,), Interfaces(), "Interfaces to meter.")
    direction: str = key(
        "once",
        directions,
        "What to meter; once: all ingress, and on egress what no metered interface saw coming in.",
    )
    hook: str = key(
        "tc",
        Choice(("tc", "xdp")),
        "Where ingress is seen: at TC, or by XDP, before GRO and TC. Egress is always seen at TC.",
    )
    xdp_force: bool = key(False, switch, "Whether to use generic XDP even where GRO makes its counts untrue.")
    skip_stacked: bool = key(
        False,
        switch,
        "Whether to leave out an interface whose packets all pass metered ones beneath it: VLAN, bridge, bond, VRF.",
    )
    loader: str = key(
        "prebuilt",
        Choice(("prebuilt", "bcc", "auto")),
        "Which programs run: those that came with flowexp, those that BCC compiles here, or BCC's where need be.",
    )
    log_level: str = key("info", Choice(("debug", "info", "warning", "error")), "The least level that is logged.")
    timeouts: Timeouts = section_of("[timeouts]", Timeouts)
    table: Table = section_of("[table]", Table)
    fields: Fields = section_of("[fields]", Fields)
    sampling: Sampling = section_of("[sampling]", Sampling)
    export: Export = section_of("[export]", Export)
    metrics: Metrics = section_of("[metrics]", Metrics)
    templates: Tuple[Template, ...] = dataclasses.field(
        default=(), metadata={"kind": Sections("[[template]]", Template), "name": "template"}
    )
    collectors: Tuple[Collector, ...] = dataclasses.field(
        default=(), metadata={"kind": Sections("[[collector]]", Collector), "name": "collector"}
    )

    @property
    def pairs(self) -> bool:
        """Whether any Collector wants both directions in one record."""
        return any(collector.biflow for collector in self.collectors)

    def observation_domain_id(self, collector: Collector) -> int:
        """That of one of `collectors`, derived where it is not configured."""
        configured = collector.observation_domain_id or self.export.observation_domain_id
        return observation_domain_id(configured, self.table.pin_path)

    def template(self, name: str) -> TemplateSpec:
        """The template of that name. ValueError if there is none."""
        specs = {template.name: template.spec for template in self.templates}
        if name == DEFAULT.name:
            return with_groups(DEFAULT, self.fields.told)
        if name not in specs:
            near = difflib.get_close_matches(name, [DEFAULT.name, *specs], n=1, cutoff=0)[0]
            raise ValueError(f"no [[template]] has the name {show(name)}; the nearest is {show(near)}")
        return specs[name]


EVERYTHING = Section("", Config)


def keys() -> Iterator[Key]:
    """Every key there is, in the order of declaration."""
    return keys_of(EVERYTHING)
