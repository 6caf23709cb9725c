# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: every key is declared once, below, with its default, limits and meaning.

To add a key: one field with key(), and its lines in conf/flowexp.toml (a test holds the two together).
Durations are numbers of seconds in the file and nanoseconds (..._ns) for the rest of the program.
What is wrong in a file or an option is a UsageError of one line: where, which key, what, what is allowed.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import toml

from flowexp.collector_url import CollectorUrl, parse_collector_url
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

DEFAULT_PATH = Path("/etc/flowexp/flowexp.toml")
DEFAULT_ROUTE = "default route"
MAX_COLLECTORS = 8  # Sequence Numbers that the table's control map has room for (bpf/flow.h)


_directions = Choice(("once", "ingress", "egress", "both"))


@dataclass(frozen=True)
class _Interfaces:
    def __str__(self) -> str:
        return f"names, globs or {show(DEFAULT_ROUTE)}"

    def read(self, value: Any, place: str) -> Tuple[str, ...]:
        is_list = isinstance(value, (list, tuple)) and len(value) > 0
        if not is_list or not all(isinstance(each, str) and each for each in value):
            raise ValueError(f"{place}: {show(value)} is not a list of {self}")
        return tuple(value)


@dataclass(frozen=True)
class _Url:
    def __str__(self) -> str:
        return "udp://HOST[:PORT], file:///PATH"

    def read(self, value: Any, place: str) -> CollectorUrl:
        if not isinstance(value, str):
            raise ValueError(f"{place}: {show(value)} is not a text; allowed: {self}")
        try:
            return parse_collector_url(value)
        except UsageError as error:
            raise ValueError(f"{place}: {error}") from error


@dataclass(frozen=True)
class _Address:
    def __str__(self) -> str:
        return '"" (nowhere) or HOST:PORT, as in "127.0.0.1:9745"'

    def read(self, value: Any, place: str) -> str:
        if isinstance(value, str):
            found = re.fullmatch(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s\[\]:/@]+):(\d{1,5})", value, re.ASCII)
            if not value or (found and 1 <= int(found[1]) <= 65535):
                return value
        raise ValueError(f"{place}: {show(value)} is no address to listen on; allowed: {self}")


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
class Export:
    """[export]: the Exporting Process."""

    observation_domain_id: int = key(
        0,
        Number(1, 0xFFFFFFFF, zero="derived from the host"),
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
    mark: int = key(
        0x2055,
        Number(1, 0xFFFFFFFF, zero="none"),
        "Mark (fwmark) on own packets, by which they are not metered.",
    )

    @property
    def template_refresh_ns(self) -> int:
        return _ns(self.template_refresh)


@dataclass(frozen=True)
class Metrics:
    """[metrics]: figures for Prometheus."""

    listen: str = key("", _Address(), "Where Prometheus may fetch the exporter's metrics, over HTTP.")

    @property
    def address(self) -> Optional[Tuple[str, int]]:
        """Host and port; None: no endpoint."""
        host, _, port = self.listen.rpartition(":")
        return (host.strip("[]"), int(port)) if self.listen else None


@dataclass(frozen=True)
class Collector:
    """[[collector]]: one for each Collector; all get every Message."""

    url: CollectorUrl = key(dataclasses.MISSING, _Url(), "Where Messages go.")


@dataclass(frozen=True)
class Config:
    """The whole configuration. Made by load(), every value is within its limits."""

    interfaces: Tuple[str, ...] = key((DEFAULT_ROUTE,), _Interfaces(), "Interfaces to meter.")
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
    loader: str = key(
        "prebuilt",
        Choice(("prebuilt", "bcc", "auto")),
        "Which programs run: those that came with flowexp, those that BCC compiles here, or BCC's where need be.",
    )
    log_level: str = key("info", Choice(("debug", "info", "warning", "error")), "The least level that is logged.")
    timeouts: Timeouts = section_of("[timeouts]", Timeouts)
    table: Table = section_of("[table]", Table)
    export: Export = section_of("[export]", Export)
    metrics: Metrics = section_of("[metrics]", Metrics)
    collectors: Tuple[Collector, ...] = dataclasses.field(
        default=(), metadata={"kind": Sections("[[collector]]", Collector), "name": "collector"}
    )


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
        _check_together(config)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    return config


def find(path: Optional[Path]) -> Config:
    """The configuration in the file at `path`, or else in DEFAULT_PATH, or else the defaults; for commands
    that need no Collector. UsageError where anything is wrong."""
    return _find(path, may_be_missing=True)[1]


def read(path: Path) -> Config:
    """The configuration in the file at `path`; FileNotFoundError, or UsageError for all else."""
    document = _parse(_read_text(path), path)
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
            given["interfaces"] = _Interfaces().read(interfaces, "-i")
        if direction is not None:
            given["direction"] = _directions.read(direction, "--direction")
        if collectors:
            given["collectors"] = tuple(Collector(url=_Url().read(url, "--collector")) for url in collectors)
        if persist:
            given["table"] = dataclasses.replace(config.table, persist=True)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return dataclasses.replace(config, **given)


def _check_together(config: Config) -> None:
    """What no key can say alone."""
    if config.hook == "xdp" and config.direction == "egress":
        raise ValueError('hook: "xdp" sees ingress only, and direction is "egress"; set hook = "tc"')
    if len(config.collectors) > MAX_COLLECTORS:
        count = len(config.collectors)
        raise ValueError(f"[[collector]]: {count} are too many; allowed: 1 to {MAX_COLLECTORS}")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8; a configuration is text in UTF-8") from error


# toml 0.10.2 takes an array that the file's end cuts off, and drops the end of its last value.
# A section put behind the file then goes missing.
_LAST_SECTION = "end-of-file"


def _loads(text: str) -> Dict[str, Any]:
    document = toml.loads(f"{text}\n[{_LAST_SECTION}]\n")
    if document.pop(_LAST_SECTION, None) != {}:
        raise ValueError("the file ends within a value")
    return document


def _parse(text: str, path: Path) -> Dict[str, Any]:
    try:
        return _loads(text)
    except Exception as error:  # TomlDecodeError, and what else toml trips over, as IndexError
        lines = text.split("\n")
        number = _line_of_error(lines, error)
        why = error.msg.partition("{")[0] if isinstance(error, toml.TomlDecodeError) else ""
        detail = f" ({' '.join(why.split())})" if why else ""
        raise UsageError(f"{path}:{number}: not TOML: {show(lines[number - 1].strip())}{detail}") from error


def _line_of_error(lines: List[str], error: Exception) -> int:
    """The line, from 1, where the statement begins that toml does not take: all before it can be read."""
    known = error.lineno if isinstance(error, toml.TomlDecodeError) else len(lines)
    for before in range(min(known, len(lines)) - 1, 0, -1):
        try:
            _loads("\n".join(lines[:before]))
        except Exception:
            continue
        return before + 1
    return 1


def _ns(seconds: float) -> int:
    return round(seconds * 1_000_000_000)
