# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: every key is declared once, below, with its default, limits and meaning.

To add a key: one field with key(), and its lines in conf/flowexp.toml (a test holds the two together).
Durations are numbers of seconds in the file and nanoseconds (..._ns) for the rest of the program.
What is wrong in a file or an option is a UsageError of one line: where, which key, what, what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

from flowexp.collector_url import CollectorUrl
from flowexp.config_values import (
    DEFAULT_ROUTE,
    Address,
    Elements,
    Groups,
    Interfaces,
    Name,
    SourceAddress,
    Text,
    Url,
)
from flowexp.errors import UsageError
from flowexp.keys import (
    AbsolutePath,
    Choice,
    Key,
    Number,
    Section,
    Sections,
    UnknownKeyError,
    fill,
    key,
    keys_of,
    seconds,
    section_of,
    show,
    switch,
)
from flowexp.protocol.encoders import check_template
from flowexp.protocol.fieldgroups import group_of
from flowexp.protocol.netflow5 import MAX_SAMPLING_INTERVAL
from flowexp.protocol.registry import OWN_ENTERPRISE, ElementError
from flowexp.protocol.template import DEFAULT, FieldSpec, TemplateSpec, with_groups
from flowexp.toml_file import parse, read_text

DEFAULT_PATH = Path("/etc/flowexp/flowexp.toml")
MAX_COLLECTORS = 8  # Sequence Numbers that the table's control map has room for (bpf/flow.h)


_directions = Choice(("once", "ingress", "egress", "both"))


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


@dataclass(frozen=True)
class Sampling:
    """[sampling]: which packets are metered."""

    interval: int = key(1, Number(1, 1_000_000, "packets"), "One packet of so many is metered; 1: every packet.")
    mode: str = key(
        "random",
        Choice(("random", "count")),
        "Which one of them: any, drawn anew for each so many, or always the last.",
    )


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


@dataclass(frozen=True)
class Collector:
    """[[collector]]: one for each Collector; [export] distribution says who gets which records."""

    url: CollectorUrl = key(dataclasses.MISSING, Url(), "Where Messages go.")
    ca_file: str = key(
        "",
        AbsolutePath(empty="those that this system trusts"),
        "tls://: the CAs, in PEM, one of which has signed the Collector's certificate.",
    )
    cert_file: str = key("", AbsolutePath(empty="none"), "tls://: our own certificate, in PEM, if it wants one.")
    key_file: str = key("", AbsolutePath(empty="it is in cert_file"), "tls://: the key of that certificate, in PEM.")
    spool_path: str = key(
        "",
        AbsolutePath(empty="in memory, 32 MiB at most"),
        "tcp://, tls://: a directory where Messages wait for the Collector; there they outlive the exporter.",
    )
    spool_size: int = key(
        1024,
        Number(1, 1 << 30, "MiB"),
        "tcp://, tls://: the spool is never larger; the oldest Messages make room, and are counted.",
    )
    backlog_rate: float = key(
        16,
        Number(0.01, 65536, "MiB a second", whole=False),
        "tcp://, tls://: how fast what has waited goes out, beside what comes in.",
    )
    file_size: int = key(
        0, Number(1, 1 << 30, "MiB", zero="never"), "file://: a file is put aside as soon as it has this size."
    )
    file_seconds: float = key(
        0, seconds(1, 31536000, zero="never"), "file://: a file is put aside this long after its first Message."
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
    biflow: bool = key(
        False, switch, "IPFIX: whether both directions of a conversation are one record (RFC 5103)."
    )
    psamp: bool = key(False, switch, "IPFIX: whether sampling is told by PSAMP's elements, not samplingInterval.")
    observation_domain_id: int = key(
        0, Number(1, 0xFFFFFFFF, zero="as in [export]"), "The Observation Domain that it is told."
    )
    source_address: str = key("", SourceAddress(), "udp://: the address that Messages come from.")
    source_port: int = key(0, Number(1, 65535, zero="as in [export]"), "udp://: the port that Messages come from.")
    dscp: int = key(0, Number(0, 63), "udp://: the DSCP of its packets.")
    device: str = key(
        "",
        Text("from the route", 'the name of an interface or VRF, as in "mgmt"', r"[^\s/]{1,15}"),
        "udp://: the interface or VRF that Messages leave by.",
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration. Made by load(), every value is within its limits."""

    interfaces: Tuple[str, ...] = key((DEFAULT_ROUTE,), Interfaces(), "Interfaces to meter.")
    direction: str = key(
        "once",
        _directions,
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
        "Whether to leave out an interface whose packets all pass metered ones beneath it: VLAN, bridge, bond, team.",
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

    def template(self, name: str) -> TemplateSpec:
        """The template of that name. ValueError if there is none."""
        specs = {template.name: template.spec for template in self.templates}
        if name == DEFAULT.name:
            return with_groups(DEFAULT, self.fields.groups)
        if name not in specs:
            near = difflib.get_close_matches(name, [DEFAULT.name, *specs], n=1, cutoff=0)[0]
            raise ValueError(f"no [[template]] has the name {show(name)}; the nearest is {show(near)}")
        return specs[name]


_EVERYTHING = Section("", Config)


def keys() -> Iterator[Key]:
    """Every key there is, in the order of declaration."""
    return keys_of(_EVERYTHING)


def load(
    path: Optional[Path],
    *,
    interfaces: Sequence[str] = (),
    collectors: Sequence[str] = (),
    direction: Optional[str] = None,
    persist: bool = False,
) -> Config:
    """The configuration in the file at `path`, or else in DEFAULT_PATH if that exists, with options on top.

    An option that is given takes the place of the file's key; `collectors` are URLs. At least one Collector
    must be named, there or here. UsageError where anything is wrong.
    """
    source, config = _find(path, may_be_missing=bool(collectors))
    config = _override(config, interfaces=interfaces, collectors=collectors, direction=direction, persist=persist)
    if not config.collectors:
        raise UsageError(f"{source}: no [[collector]]; add one with its url, or give --collector URL")
    try:
        check_together(config)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    return config


def find(path: Optional[Path]) -> Config:
    """The configuration in the file at `path`, or else in DEFAULT_PATH, or else the defaults; for commands
    that need no Collector. UsageError where anything is wrong."""
    return _find(path, may_be_missing=True)[1]


def read(path: Path) -> Config:
    """The configuration in the file at `path`; FileNotFoundError, or UsageError for all else."""
    document = parse(read_text(path), path)
    try:
        config: Config = fill(_EVERYTHING, document)
    except UnknownKeyError as error:
        raise UsageError(f"{path}: {error}; the nearest is {error.nearest(_EVERYTHING)}") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    return config


def _find(path: Optional[Path], *, may_be_missing: bool) -> Tuple[str, Config]:
    """Where the configuration comes from, for messages, and what it is."""
    wanted = path or DEFAULT_PATH
    try:
        return str(wanted), read(wanted)
    except FileNotFoundError as error:
        if path is not None:
            raise UsageError(f"{path}: there is no such file") from error
        if not may_be_missing:
            advice = "write it, or give -c FILE or --collector URL"
            raise UsageError(f"there is no {DEFAULT_PATH}; {advice}") from error
        return "command line", Config()


def _override(
    config: Config,
    *,
    interfaces: Sequence[str],
    collectors: Sequence[str],
    direction: Optional[str],
    persist: bool,
) -> Config:
    given: Dict[str, Any] = {}
    try:
        if interfaces:
            given["interfaces"] = Interfaces().read(interfaces, "-i")
        if direction is not None:
            given["direction"] = _directions.read(direction, "--direction")
        if collectors:
            given["collectors"] = tuple(Collector(url=Url().read(url, "--collector")) for url in collectors)
        if persist:
            given["table"] = dataclasses.replace(config.table, persist=True)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return dataclasses.replace(config, **given)


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
    folders = [each.spool_path for each in config.collectors if each.spool_path]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"[[collector]] spool_path: {show(folder)} is that of two Collectors; give each its own")


def _check_sampling(config: Config) -> None:
    interval = config.sampling.interval
    if interval == 1:
        return
    for group in ("timing", "tcp"):
        if group in config.fields.groups:
            raise ValueError(f"[fields] groups: {show(group)} needs every packet; [sampling] interval is {interval}")
    for url in (collector.url for collector in config.collectors if collector.url.protocol == "netflow5"):
        if interval > MAX_SAMPLING_INTERVAL:
            limit = f"NetFlow v5 has room for up to {MAX_SAMPLING_INTERVAL}"
            raise ValueError(f"[sampling] interval: {interval} cannot be told to {url}: {limit}")


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
        if group and group not in config.fields.groups:
            needed = f"needs the group {show(group)} in [fields] groups"
            raise ValueError(f"[[template]] {show(spec.name)}: {field.name} {needed}")
    return spec


_OF_TRANSPORTS = {
    ("udp",): ("source_address", "source_port", "dscp", "device"),
    ("tls",): ("ca_file", "cert_file", "key_file"),
    ("tcp", "tls"): ("spool_path", "spool_size", "backlog_rate"),
    ("file",): ("file_size", "file_seconds"),
}
"""Which keys of [[collector]] only some transports have a use for."""


def _check_collector(collector: Collector) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Collector)}
    for transports, names in _OF_TRANSPORTS.items():
        for name in names:
            if collector.url.transport not in transports and getattr(collector, name) != defaults[name]:
                allowed = " and ".join(f"{each}://" for each in transports)
                raise ValueError(f"[[collector]] {name}: only {allowed} can use it, not {collector.url}")
    if collector.psamp and collector.url.protocol != "ipfix":
        raise ValueError(f"[[collector]] psamp: only IPFIX has PSAMP's elements, not {collector.url}")
    if collector.biflow and collector.url.protocol != "ipfix":
        raise ValueError(f"[[collector]] biflow: only IPFIX has elements of the reverse direction, not {collector.url}")
    if collector.key_file and not collector.cert_file:
        raise ValueError("[[collector]] key_file: there is no cert_file that it could belong to")


def _ns(seconds: float) -> int:
    return round(seconds * 1_000_000_000)
