# SPDX-License-Identifier: GPL-2.0-or-later
"""Man pages and shell completions, written from the program itself.

documents.py FOLDER writes flowexp.1 and flowexp.toml.5 (mdoc(7)), flowexp.bash, .zsh and .fish. Commands and
options are click's, keys are config.keys(): here stands only what the program does not say of itself.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from pathlib import Path
from typing import Iterator, List

import click
from click.shell_completion import get_completion_class

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flowexp import __version__  # noqa: E402
from flowexp.cli import cli  # noqa: E402
from flowexp.config import keys  # noqa: E402
from flowexp.config_load import DEFAULT_PATH  # noqa: E402
from flowexp.keys import Key, show  # noqa: E402

SHELLS = ("bash", "zsh", "fish")

BEGIN_1 = """\
.Dt FLOWEXP 1
.Os flowexp {version}
.Sh NAME
.Nm flowexp
.Nd IPFIX and NetFlow exporter with its flow table in the kernel
.Sh SYNOPSIS
.Nm
.Ar command
.Op Ar options
.Sh DESCRIPTION
.Nm
meters the packets of network interfaces in an eBPF program, and exports their Flows to Collectors as IPFIX (RFC 7011).
Every packet that the program saw is exported, still in the table, or counted under the reason why it was not metered.
.Sh COMMANDS
"""

END_1 = """\
.Sh SERVICE
The packages bring a service,
.Li flowexp.service ,
that runs
.Li flowexp run
as the user
.Li flowexp .
It is not started before it has been configured:
.Bd -literal -offset indent
editor {configuration}
flowexp check
systemctl enable --now flowexp
.Ed
.Pp
The configuration in the packages sets
.Li persist :
programs and table stay in the kernel while the service is stopped, so that a restart or an upgrade misses no packet.
.Li flowexp detach
takes them away; so does the removal of the package.
.Pp
Without systemd let another supervisor run
.Li flowexp run
as root: it stays in the foreground, logs to standard error, and leaves upon SIGTERM.
As a procd service, for one:
.Bd -literal -offset indent
{procd}
.Ed
.Sh FILES
.Bl -tag -width Ds
.It Pa {configuration}
the configuration, see
.Xr flowexp.toml 5
.It Pa /sys/fs/bpf/flowexp
the flow table and the programs' links
.It Pa /run/flowexp
the socket at which the exporter tells its state
.It Pa /var/lib/flowexp
the folder that the service may write in, for Collectors such as
.Li file:///var/lib/flowexp/flows.ipfix
.El
.Sh EXIT STATUS
0: done; 1: failed at run time; 2: wrong usage or configuration.
An error is one line on standard error.
.Sh EXAMPLES
.Dl flowexp run -i eth0 --collector udp://192.0.2.10:9995
.Dl flowexp dump -i eth0 --duration 5s --format json
.Sh SEE ALSO
.Xr nfcapd 1 ,
.Xr systemctl 1 ,
.Xr flowexp.toml 5
"""

BEGIN_5 = """\
.Dt FLOWEXP.TOML 5
.Os flowexp {version}
.Sh NAME
.Nm flowexp.toml
.Nd configuration of flowexp
.Sh SYNOPSIS
.Nm {configuration}
.Sh DESCRIPTION
The exporter's configuration, in TOML.
Each key may be left out unless it is said to be required.
A key that is not known and a value out of range are errors:
.Li flowexp check
tells.
Durations are numbers of seconds.
"""

END_5 = """\
.Sh EXAMPLES
.Bd -literal -offset indent
interfaces = ["eth0", "wg*"]

[timeouts]
active = 30

[[collector]]
url = "udp://192.0.2.10:9995"
.Ed
.Sh SEE ALSO
.Xr flowexp 1
"""


def text(words: str) -> str:
    """Words as they may stand in an mdoc page: nothing in them is a request."""
    escaped = words.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    escaped = re.sub(r"^(?=[.'])", r"\\&", escaped, flags=re.MULTILINE)
    return re.sub(r"\n{2,}", "\n.Pp\n", re.sub(r"(?<=[.:]) (?=[A-Z])", "\n", escaped))


def literal(words: str) -> str:
    return f"\\fB{text(words)}\\fR"


def page(begin: str, lines: Iterator[str], end: str) -> str:
    """A whole page, dated as its source is in a package build (SOURCE_DATE_EPOCH)."""
    facts = {"version": __version__, "configuration": DEFAULT_PATH, "procd": procd_service()}
    made = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    return (
        time.strftime(".Dd %B %d, %Y\n", made)
        + begin.format(**facts)
        + "".join(f"{line}\n" for line in lines)
        + end.format(**facts)
    )


def procd_service() -> str:
    """OpenWrt's, without what is for its readers here."""
    lines = (ROOT / "packaging" / "openwrt" / "flowexp.init").read_text(encoding="utf-8").splitlines()
    return "\n".join(line.expandtabs(4) for line in lines if not line.startswith("# "))


def commands() -> Iterator[str]:
    """Each command with its options, as click knows them."""
    context = click.Context(cli, info_name="flowexp")
    for name in cli.list_commands(context):
        command = cli.commands[name]
        yield f".Ss {text(f'flowexp {name}')}"
        yield text(command.help or "")
        yield ".Bl -tag -width Ds"
        for parameter in command.params:
            record = parameter.get_help_record(click.Context(command, info_name=name, parent=context))
            if record is not None:
                yield f".It {literal(record[0])}"
                yield text(record[1])
        yield ".El"


def described(each: Key) -> List[str]:
    if each.default is dataclasses.MISSING:
        default = "Required."
    elif each.default is None:
        default = "By default as in [timeouts]."
    else:
        default = f"Default: {show(each.default)}."
    return [f".It {literal(each.name)}", text(each.meaning), f"Allowed: {text(each.allowed)}.", text(default)]


def configuration() -> Iterator[str]:
    """Each section with its keys."""
    header = None
    for each in keys():
        if each.header != header:
            if header is not None:
                yield ".El"
            header = each.header
            yield f".Sh {text(header) or 'BEFORE THE FIRST SECTION'}"
            yield ".Bl -tag -width Ds"
        yield from described(each)
    yield ".El"


def completion(shell: str) -> str:
    """The script that has `flowexp` complete its own command line in this shell."""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(cli, {}, "flowexp", "_FLOWEXP_COMPLETE").source()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flowexp.1").write_text(page(BEGIN_1, commands(), END_1), encoding="utf-8")
    (folder / "flowexp.toml.5").write_text(page(BEGIN_5, configuration(), END_5), encoding="utf-8")
    for shell in SHELLS:
        (folder / f"flowexp.{shell}").write_text(completion(shell) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
