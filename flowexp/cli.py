# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line. Each command imports what it needs when it runs: `--help` needs nothing.

Exit status: 0 done, 1 failed at run time, 2 wrong usage or configuration. Data goes to standard
output; errors and the log go to standard error, an error as one line.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Tuple

_INTERRUPT = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while this is imported is no traceback

import click  # noqa: E402

from . import __version__  # noqa: E402
from .errors import FlowexpError, UsageError  # noqa: E402
from .output import NO_ROOM, discard, usable_streams  # noqa: E402

signal.signal(signal.SIGINT, _INTERRUPT)

if TYPE_CHECKING:
    from .filters import Filter

_FAILED, _WRONG_USAGE = 1, 2
_ORDERS = ("octets", "packets", "flows", "duration", "start", "end")
_FILE = click.Path(path_type=Path)
_DASH = Path("-")  # a standard stream, by old custom

_config_option = click.option("-c", "--config", "config_file", type=_FILE, metavar="FILE",
                              help="Configuration; else /etc/flowexp/flowexp.toml.")  # fmt: skip
_interface_option = click.option("-i", "--interface", "interfaces", multiple=True, metavar="IFACE",
                                 help='Name, glob or "default route"; may be given again.')  # fmt: skip
_filter_option = click.option("--filter", "expression", metavar="EXPR",
                              help='Only flows such as "src net 10.0.0.0/8 and not (port 53 or flags S)".')  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flowexp")
def cli() -> None:
    """Exports the flows of this machine's interfaces to IPFIX Collectors, from a flow table in the kernel."""


@cli.command()
@_config_option
@_interface_option
@click.option("--collector", "collectors", multiple=True, metavar="URL",
              help="udp://, tcp:// or tls://HOST:PORT, or file:///PATH; may be given again.")  # fmt: skip
@click.option("--direction", type=click.Choice(["once", "ingress", "egress", "both"]), help="What to meter.")
@click.option("--persist", is_flag=True, help="Keep table and programs in the kernel when the exporter leaves.")
def run(config_file: Optional[Path], interfaces: Tuple[str, ...], collectors: Tuple[str, ...],
        direction: Optional[str], persist: bool) -> None:  # fmt: skip
    """Meter and export until told to end. In the foreground; SIGTERM and Ctrl-C: export all and leave; SIGHUP: read
    the configuration again."""
    from .config_load import load
    from .exporter import Exporter

    read = partial(load, config_file, interfaces=interfaces, collectors=collectors, direction=direction,
                   persist=persist)  # fmt: skip
    config = read()
    _log_to_stderr(config.log_level)
    Exporter(config, read).run()


@cli.command()
@_config_option
@_interface_option
@click.option("--duration", metavar="TIME", help="How long to meter where no exporter runs: 500ms, 5m; else 10s.")
@click.option("--read", "capture", type=_FILE, metavar="PCAP", help="From a pcap or pcapng capture; -: standard input.")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv", "ipfix"]), default="table",
              show_default=True)  # fmt: skip
@click.option("-o", "--output", type=_FILE, metavar="FILE", help="Instead of standard output.")
@_filter_option
@click.option("--aggregate", metavar="KEYS", help="Sum over fewer keys: src,dst or proto,dport or IANA's names.")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the N that have most, see --by.")
@click.option("--by", type=click.Choice(_ORDERS), help="What --top goes by; else octets.")
@click.option("--sort", type=click.Choice(_ORDERS), help="Most first; of times the earliest.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N.")
@click.option("--totals", is_flag=True, help="Counts since each flow began, not since its last record.")
@click.option("--names", is_flag=True, help="Names of services and interfaces in the table.")
def dump(config_file: Optional[Path], interfaces: Tuple[str, ...], duration: Optional[str], capture: Optional[Path],
         form: str, output: Optional[Path], expression: Optional[str], aggregate: Optional[str], top: Optional[int],
         by: Optional[str], sort: Optional[str], limit: Optional[int], totals: bool, names: bool) -> None:  # fmt: skip
    """Show flows once. Of the running exporter's table, of a capture, or metered here and now."""
    from .config_load import find
    from .dump import dump as write
    from .listing import Shape

    if top is not None and (sort or limit):
        raise UsageError("--top is --sort and --limit in one: give either")
    if by and top is None:
        raise UsageError("--by is what --top goes by: give --top N, too, or --sort")
    if duration is not None and capture:
        raise UsageError("--read and --duration cannot go together: a capture has an end of its own")
    capture = Path("/dev/stdin") if capture == _DASH else capture
    output = None if output == _DASH else output
    _log_to_stderr("info")
    where = _filter(expression)
    shape = Shape(aggregate, (by or "octets") if top else sort, top or limit, totals, names)
    duration_s = _seconds("10s" if duration is None else duration)
    write(interfaces=interfaces, duration_s=duration_s, capture=capture, form=form, output=output,
          config=find(config_file), chosen=None if where is None else where.select, shape=shape)  # fmt: skip


@cli.command()
@click.option("--listen", default="udp://127.0.0.1:4739", show_default=True, metavar="URL")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--cert", type=_FILE, metavar="PEM", help="Of this Collector, for --listen tls://...")
@click.option("--key", type=_FILE, metavar="PEM", help="Of that certificate, if it is in a file of its own.")
@_filter_option
def collect(listen: str, form: str, cert: Optional[Path], key: Optional[Path], expression: Optional[str]) -> None:
    """Print what exporters send. The built-in Collector, for a first look and for tests."""
    from .collect import collect as receive

    _log_to_stderr("info")
    where = _filter(expression, of_any_exporter=True)
    receive(listen, form, sys.stdout, chosen=None if where is None else where.matches,
            cert_file=str(cert or ""), key_file=str(key or ""))  # fmt: skip


@cli.command()
@_config_option
@_interface_option
@click.option("--collector", "collectors", multiple=True, metavar="URL", help="As for run.")
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", show_default=True)
def check(config_file: Optional[Path], interfaces: Tuple[str, ...], collectors: Tuple[str, ...], form: str) -> None:
    """Tell whether run would work here. And what it would not see: kernel, permissions, hooks, interfaces, Collectors,
    clock."""
    from .check import FAILED
    from .check import check as findings
    from .config_load import load

    failed = 0
    for finding in findings(load(config_file, interfaces=interfaces, collectors=collectors)):
        click.echo(json.dumps(finding.json()) if form == "json" else str(finding))
        failed += finding.verdict == FAILED
    if failed:
        raise FlowexpError(f"check: {failed} of these would keep the exporter from working")


@cli.command()
@_config_option
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", show_default=True)
def status(config_file: Optional[Path], form: str) -> None:
    """Show how the running exporter does. Its ledger, table, Collectors, last sweep, and where it is attached."""
    from .config_load import find_place
    from .kernel.hooks import look_at
    from .status import ask, describe

    config, trouble = find_place(config_file)
    try:
        answer = ask(config.table.pin_path)
    except FlowexpError as error:
        raise trouble or error from error
    if trouble is not None:  # the exporter has refused that file, and answers why
        print(f"flowexp: {trouble}", file=sys.stderr)
    orders = look_at((each["ifindex"], each["direction"]) for each in answer["attached"])
    for each in answer["attached"]:
        each["order"] = orders.get((each["ifindex"], each["direction"]), [])
    click.echo(json.dumps(answer) if form == "json" else describe(answer), nl=form == "json")


@cli.command()
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def elements(form: str) -> None:
    """List what records can carry. All Information Elements, for the elements of a [[template]]."""
    from .protocol.catalogue import catalogue
    from .view import catalogue_table

    rows = catalogue()
    click.echo("\n".join(map(json.dumps, rows)) if form == "json" else catalogue_table(rows), nl=form == "json")


@cli.command()
@_config_option
@_interface_option
@_filter_option
@click.option("--by", type=click.Choice(["flow", "host", "port", "interface"]), default="flow", show_default=True,
              help="What a row is.")  # fmt: skip
@click.option("--interval", default="1s", metavar="TIME", show_default=True, help="Between two looks: 500ms, 1s, 1m.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many looks.")
def top(config_file: Optional[Path], interfaces: Tuple[str, ...], expression: Optional[str], by: str, interval: str,
        count: Optional[int]) -> None:  # fmt: skip
    """Watch the running exporter's flows. Rates, the busiest first; q ends it."""
    from .config_load import find
    from .top import top as watch

    watch(interfaces=interfaces, config=find(config_file), expression=expression or "", by=by,
          interval_s=_seconds(interval, option="--interval", least_s=0.1), count=count)  # fmt: skip


@cli.command()
@_config_option
def detach(config_file: Optional[Path]) -> None:
    """Remove what `run --persist` has left. Programs, table and the flows in it."""
    from .config_load import find_place
    from .detach import detach as remove

    config, trouble = find_place(config_file)
    _log_to_stderr("info" if trouble is None else "error")
    remove(config)  # whatever else is wrong in that file
    if trouble is not None:
        raise trouble


def _filter(expression: Optional[str], *, of_any_exporter: bool = False) -> Optional[Filter]:
    """--filter compiled; flows of any exporter can have more Information Elements than are measured here."""
    if expression is None:
        return None
    from .filters import Filter
    from .protocol.elements import MEASURED
    from .protocol.registry import BY_NAME

    return Filter(expression, elements=BY_NAME if of_any_exporter else MEASURED)


def _log_to_stderr(level: str) -> None:
    """Plain lines: the journal and a terminal add what they need. Times only where neither does."""
    form = "%(message)s" if "JOURNAL_STREAM" in os.environ else "flowexp: %(message)s"
    logging.basicConfig(stream=sys.stderr, format=form)
    logging.getLogger(__package__).setLevel(level.upper())  # ours alone: the libraries' inner life is theirs


_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


def _seconds(text: str, *, option: str = "--duration", least_s: float = 0) -> float:
    """10, 10s, 500ms, 5m, 1h as seconds; UsageError else, or where that is less than `least_s`."""
    number = text.rstrip("msh")
    try:
        seconds = float(number) * _UNITS[text[len(number) :] or "s"]
    except (ValueError, KeyError):
        seconds = -1
    if not 0 <= seconds <= 1e6:
        raise UsageError(f"{option} {text}: not a time; write 500ms, 10s, 5m or 1h")
    if seconds < least_s:
        raise UsageError(f"{option} {text}: less than {least_s:g} s")
    return seconds


def main(arguments: Any = None) -> None:
    """The console script: turns every error that is foreseen into its line and exit status."""
    try:
        usable_streams()
        words = sys.argv[1:] if arguments is None else arguments
        cli.main(words or ["--help"], standalone_mode=False)
    except click.ClickException as error:
        _leave(error.format_message().replace("\n", " "), _WRONG_USAGE)
    except click.Abort:
        sys.exit(130)
    except FlowexpError as error:
        _leave(str(error), _WRONG_USAGE if isinstance(error, UsageError) else _FAILED)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        discard(sys.stdout)
        _leave(f"standard output: cannot be written: {error.strerror}", _FAILED)


def _leave(message: str, status: int) -> None:
    print(f"flowexp: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
