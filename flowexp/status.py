# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running exporter says of itself, and how it is asked: one object for people, JSON and metrics.

The rule: only the exporter's loop looks at its table. Whoever wants to know connects to the exporter's socket;
the loop, between two sweeps, takes a snapshot, writes it in one go, and closes. It never waits for a reader:
one that does not take the whole answer at once is dropped. Nobody asks, nothing is spent.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, TypedDict, Union, cast

from .errors import FlowexpError

RUNTIME_FOLDER = Path("/run/flowexp")
_ANSWER_TIMEOUT_S = 15.0  # a sweep may wait for a file and for a spool, DISK_PATIENCE_S (courier.py) for each
_SO_SNDBUFFORCE = 32

# What travels, as JSON


class AttachedProgram(TypedDict):
    """One Observation Point. devicePackets: what the device itself has counted since; None: it does not say. order: who
    meets packets there, as Order.names (kernel/hooks.py); the exporter leaves it to `flowexp status` to look."""

    interface: str
    ifindex: int
    direction: str
    how: str
    devicePackets: Optional[int]
    order: List[str]


class Anomaly(TypedDict):
    """What is odd at one Observation Point, where the field group `integrity` is on (metering/anomalies.py): totals
    since the exporter started; destinations and ports are the most that one source came to within a minute, of this one
    and the one before. That source's address is "" where there is none."""

    interface: str
    direction: str
    unansweredFlows: int
    undersizedPackets: int
    jumboPackets: int
    destinations: int
    destinationsSource: str
    ports: int
    portsSource: str


class Table(TypedDict):
    """The flow table; maxFlows is for each address family, octets are all of its memory. payloadsLost: flows that the
    field group `application` could not look at."""

    flows: Dict[str, int]
    maxFlows: int
    octets: int
    payloadsLost: int


class Sweep(TypedDict):
    """The last sweep; sendingMilliseconds are part of totalMilliseconds, flows are those there were."""

    ageSeconds: float
    totalMilliseconds: float
    sendingMilliseconds: float
    flows: int
    records: int


class Configuration(TypedDict):
    """When it was read (ageSeconds), and how often since the start it was read again; what of it needs a restart. The
    last refusal, None if there was none."""

    ageSeconds: float
    reloads: int
    needRestart: List[str]
    refusal: Optional[str]
    refusalAgeSeconds: Optional[float]


class Histogram(TypedDict):
    """Durations since the exporter started. buckets: upper bound in seconds as text, and how many did not exceed it."""

    buckets: List[Tuple[str, int]]
    sumSeconds: float


NAT_EVENTS = ("created", "deleted", "overruns")
"""Translated connections that began and that ended, and how often such events came faster than they were read."""


class Status(TypedDict):
    """A snapshot. exportedRecords are by flowEndReason, since this exporter started; the ledger is since the
    table was made (Ledger.as_dict). loader: as configured. natEvents: by NAT_EVENTS; None: nobody wants to know.
    collectors: see Transport.status(); their other names are like these."""

    version: str
    loader: str
    pid: int
    pinPath: str
    uptimeSeconds: float
    configuration: Configuration
    attached: List[AttachedProgram]
    anomalies: List[Anomaly]
    table: Table
    ledger: Dict[str, Any]
    natEvents: Optional[Dict[str, int]]
    exportedRecords: Dict[str, int]
    collectors: List[Dict[str, Union[str, int, float, None]]]
    lastSweep: Optional[Sweep]
    sweepDurations: Histogram
    sendDurations: Histogram


# Asking and answering


def socket_path(pin_path: str) -> Path:
    """Where the exporter on the table at `pin_path` answers: in systemd's RUNTIME_DIRECTORY, or /run/flowexp."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    digest = hashlib.sha256(pin_path.encode()).hexdigest()[:8]
    return Path(given or RUNTIME_FOLDER) / f"{Path(pin_path).name[:40]}-{digest}.sock"


class StatusSocket:
    """The exporter's end. For its owner alone (mode 0600). Raises OSError where it cannot be made.

    The exporter holds the lock of `pin_path`, so a socket that is there already is a dead exporter's.
    """

    def __init__(self, pin_path: str) -> None:
        self.path = socket_path(pin_path)
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            os.fchmod(self._socket.fileno(), 0o600)  # what bind() makes has this mode from the start
            self._socket.bind(str(self.path))
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def answer(self, snapshot: Callable[[], Status]) -> None:
        """Answers one who waits, if anyone does."""
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return
        with connection:
            connection.setblocking(False)
            answer = json.dumps(snapshot()).encode()
            try:
                _make_room(connection, len(answer))
                connection.send(answer)
            except OSError:  # has left
                pass

    def close(self) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)


def _make_room(connection: socket.socket, octets: int) -> None:
    """A send buffer that the whole answer fits in."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * octets)
    except PermissionError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * octets)


def ask(pin_path: str) -> Status:
    """What the exporter on the table at `pin_path` says; FlowexpError where none answers."""
    path = socket_path(pin_path)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(_ANSWER_TIMEOUT_S)
            connection.connect(str(path))
            return cast(Status, json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b""))))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        advice = "start one with `flowexp run`, or name its configuration with -c FILE"
        raise FlowexpError(f"no exporter runs on {pin_path} (nobody answers at {path}); {advice}") from error
    except socket.timeout as error:
        raise FlowexpError(f"{path}: the exporter did not answer within {_ANSWER_TIMEOUT_S:g} s; try again") from error
    except OSError as error:
        raise FlowexpError(f"{path}: {error.strerror or error}; run as root, or as the exporter's user") from error
    except ValueError as error:
        raise FlowexpError(f"{path}: the exporter's answer was cut off; try again") from error


# For people

_DEVICES_DIFFER = """\
  A device's figure and the ledger differ for good reasons: it may count a super-packet (GSO, GRO) once, where the
  ledger counts each segment on the wire; it counts frames without IP, which are above as not metered; direction
  "once" leaves out at egress what was seen at ingress; and hardware offload may pass packets that no hook sees."""


def describe(status: Status) -> str:
    """The status as a text of lines no longer than they need be."""
    who = f"flowexp {status['version']}, loader {status['loader']}, pid {status['pid']}"
    lines = [f"{who}, up {_span(status['uptimeSeconds'])}"]
    lines += _configuration_lines(status["configuration"])
    lines += [*_table_lines(status["table"]), *_ledger_lines(status["ledger"])]
    if status["natEvents"] is not None:
        created, deleted, overruns = (status["natEvents"][name] for name in NAT_EVENTS)
        lost = f"; SOME LOST, {overruns:,} times too fast" if overruns else ""
        lines.append(f"NAT         {created:,} connections began, {deleted:,} ended{lost}")
    records = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in status["exportedRecords"].items())
    lines += [f"records     {records}", *_anomaly_lines(status["anomalies"]), *_collector_lines(status["collectors"])]
    lines += _sweep_lines(status["lastSweep"])
    return "\n".join([*lines, *_attached_lines(status["attached"])]) + "\n"


def _configuration_lines(configuration: Configuration) -> List[str]:
    again = f"reloaded {configuration['reloads']} times, last " if configuration["reloads"] else "read "
    lines = [f"configured  {again}{_span(configuration['ageSeconds'])} ago"]
    if configuration["needRestart"]:
        lines.append(f"  needs a restart: {', '.join(configuration['needRestart'])}")
    if configuration["refusal"] is not None:
        lines.append(f"  refused {_span(configuration['refusalAgeSeconds'] or 0)} ago: {configuration['refusal']}")
    return lines


def _table_lines(table: Table) -> List[str]:
    most = table["maxFlows"]
    flows = (f"{name.replace('ip', 'IP')} {count:,} ({count / most:.1%})" for name, count in table["flows"].items())
    lines = [f"table       {', '.join(flows)} of {most:,} flows each, {table['octets'] / 2**20:,.0f} MiB"]
    if table["payloadsLost"]:
        lost = "first payloads lost, as too many came at once: of these flows no application is known"
        lines.append(f"  {table['payloadsLost']:,} {lost}")
    return lines


def _ledger_lines(ledger: Mapping[str, Any]) -> List[str]:
    rows = [("seen", ledger["seen"]), ("exported", ledger["exported"]), ("in the table", ledger["inTable"])]
    rows += [(f"not metered: {reason.replace('_', ' ')}", count) for reason, count in ledger["notMetered"].items()]
    missing = ledger["missing"]
    closes = not (missing["packets"] or missing["octets"])
    off = f"DOES NOT CLOSE, off by {missing['packets']:,} packets, {missing['octets']:,} octets"
    shown = [(name, count) for name, count in rows if count["packets"] or not name.startswith("not")]
    return [
        f"ledger      {'closes' if closes else off}",
        *(f"  {name:<32} {count['packets']:>16,} packets {count['octets']:>20,} octets" for name, count in shown),
    ]


_SENT = {"messagesSent": "Messages", "recordsSent": "records", "octetsSent": "octets"}
_NOT_SENT = {
    "messagesFailed": "Messages failed",
    "recordsFailed": "records failed",
    "refused": "refused",
    "unreachable": "unreachable",
    "flowsNotRepresentable": "flows not representable",
    "flowsFiltered": "flows filtered out",
    "flowsPaired": "flows in the record of their other direction",
    "recordsWaiting": "records waiting",
}
_QUEUE = {
    "recordsQueued": "records queued",
    "octetsQueued": "octets of queue or spool",
    "recordsDropped": "records dropped",
    "recordsResent": "records sent again",
    "transportSessions": "Transport Sessions",
}
"""Of Collectors that are reached by streams."""


def _collector_lines(collectors: Sequence[Mapping[str, Any]]) -> List[str]:
    lines = []
    for each in collectors:
        lines.append(f"collector   {each['collector']} ({each['protocol']}) {each['state']}")
        counts = (f"{each[name]:,} {what}" for name, what in _SENT.items())
        lines.append(f"  {', '.join(counts)} sent")
        if "recordsQueued" in each:
            lines.append(f"  {', '.join(f'{each[name]:,} {what}' for name, what in _QUEUE.items())}")
        age_s = each["templateAgeSeconds"]
        said = (f"{each.get(name, 0):,} {what}" for name, what in _NOT_SENT.items())
        lines.append(f"  {', '.join(said)}; last Template {'never' if age_s is None else _span(age_s) + ' ago'}")
    return lines


def _sweep_lines(sweep: Optional[Sweep]) -> List[str]:
    if sweep is None:
        return ["last sweep  none yet"]
    took = f"{sweep['totalMilliseconds']:.1f} ms, {sweep['sendingMilliseconds']:.1f} of it sending"
    when = f"{_span(sweep['ageSeconds'])} ago"
    return [f"last sweep  {when}, {took}; {sweep['flows']:,} flows, {sweep['records']:,} records sent"]


def _anomaly_lines(anomalies: Sequence[Anomaly]) -> List[str]:
    lines = ["anomalies   (of one source: the most within a minute, this one or the one before)"] if anomalies else []
    for each in anomalies:
        totals = f"{each['unansweredFlows']:,} connections unanswered"
        totals += f", {each['undersizedPackets']:,} packets undersized, {each['jumboPackets']:,} jumbo"
        lines.append(f"  {each['interface'] + ' ' + each['direction']:<24} {totals}")
        of_one = [
            f"{count:,} {what} ({source})"
            for count, what, source in (
                (each["destinations"], "destinations", each["destinationsSource"]),
                (each["ports"], "ports", each["portsSource"]),
            )
            if count
        ]
        if of_one:
            lines.append(f"    one source: {', '.join(of_one)}")
    return lines


def _attached_lines(attached: Sequence[AttachedProgram]) -> List[str]:
    if not attached:
        return ["attached    nowhere: none of the interfaces is there"]
    lines = ["attached    (with the packets that the device itself has counted since)"]
    for each in attached:
        counted = "?" if each["devicePackets"] is None else f"{each['devicePackets']:,}"
        lines.append(f"  {each['interface'] + ' ' + each['direction']:<24} {each['how']:<11} {counted:>16}")
        if len(each["order"]) > 1:
            lines.append(f"    in this order: {', '.join(each['order'])}")
    return [*lines, _DEVICES_DIFFER]


def _span(seconds: float) -> str:
    """90061 -> 1 d 1 h; 61 -> 1 min 1 s."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((number for number, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])
