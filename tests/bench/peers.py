# SPDX-License-Identifier: GPL-2.0-or-later
"""Other flow exporters of the distribution, as their documentation runs them: live on an interface, or over a capture.

Their tables are made large enough for all flows, so that they do the same work as we do.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.netns import Namespace
from lab.process import Process, environment
from lab.traffic import Stack, make_capture
from lab.wait import wait_for

from .probes import descendants

MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
MAX_FLOWS = 2_000_000
PATIENCE_S = 60.0
_IPV4_UDP, _IPV4_TCP, _IPV6_UDP = Stack(4, 17), Stack(4, 6), Stack(6, 17)
MIX = (_IPV4_TCP, _IPV4_UDP, _IPV4_TCP, _IPV6_UDP)

_NFPROBE = """daemonize: false
plugins: nfprobe[p]
nfprobe_receiver: 127.0.0.1:{port}
nfprobe_version: 10
nfprobe_maxflows: {flows}
plugin_pipe_size: 67108864
plugin_buffer_size: 65536
aggregate: src_host, dst_host, src_port, dst_port, proto, tos, tcpflags
"""


def capture(directory: Path, *, packets: int, flows: int) -> Path:
    """A capture of IPv4 and IPv6, TCP and UDP, made once."""
    path = directory / f"{packets}-{flows}.pcap"
    if not path.exists():
        make_capture(path, packets=packets, flows=flows, macs=MACS, stacks=MIX if flows >= len(MIX) else MIX[:1])
    return path


@dataclass(frozen=True)
class Peer:
    """A live exporter: how it is started on eth0 to send to a port of 127.0.0.1, and how it is asked to send all.

    softflowd 1.1.0 in the foreground sends what it has only if it is asked through its control socket.
    """

    name: str
    command: Callable[[Path, int], list[str]]
    stop_signal: int = signal.SIGTERM
    stop_command: tuple[str, ...] = ()  # in its folder, instead of the signal
    exports: bool = True  # nfpcapd writes files

    @property
    def is_there(self) -> bool:
        return shutil.which(self.name) is not None

    def start(self, namespace: Namespace, directory: Path, port: int) -> Process:
        """Running, its capture open."""
        directory.mkdir(parents=True, exist_ok=True)
        command = self.command(directory, port)
        process = namespace.start(*command, directory=directory, name=self.name)
        wait_for(f"{self.name} to capture", lambda: process.is_alive() and _has_packet_socket(namespace, process))
        return process

    def stop(self, process: Process, directory: Path) -> None:
        """Ended, all it had sent."""
        if self.stop_command:
            subprocess.run(self.stop_command, cwd=directory, env=environment(), capture_output=True, check=True)
            process.wait()
        else:
            process.stop(self.stop_signal)


def _has_packet_socket(namespace: Namespace, process: Process) -> bool:
    """Whether one of a process's descriptors is among the namespace's packet sockets."""
    inodes = {line.split()[-1] for line in namespace.read_proc_net("packet").splitlines()[1:]}
    for pid in descendants(process.pid):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(fd).strip("socket:[]") in inodes:
                    return True
            except FileNotFoundError:
                continue
    return False


def _softflowd(directory: Path, port: int) -> list[str]:
    files = ["-p", str(directory / "pid"), "-c", str(directory / "ctl")]
    return ["softflowd", "-i", "eth0", "-n", f"127.0.0.1:{port}", "-v", "10", "-m", str(MAX_FLOWS), "-6", "-d", *files]


def _pmacctd(directory: Path, port: int) -> list[str]:
    file = directory / "pmacctd.conf"
    file.write_text(_NFPROBE.format(port=port, flows=MAX_FLOWS) + "pcap_interface: eth0\n")
    return ["pmacctd", "-f", str(file)]


def _nfpcapd(directory: Path, port: int) -> list[str]:
    flows = directory / "flows"
    flows.mkdir(exist_ok=True)
    return ["nfpcapd", "-i", "eth0", "-w", str(flows), "-B", str(MAX_FLOWS)]


def _fprobe(directory: Path, port: int) -> list[str]:
    return ["fprobe", "-i", "eth0", "-l", f"2:{os.getpid()}", f"127.0.0.1:{port}"]


PEERS = (
    Peer("softflowd", _softflowd, stop_command=("softflowctl", "-c", "ctl", "shutdown")),
    Peer("pmacctd", _pmacctd, stop_signal=signal.SIGINT),
    Peer("nfpcapd", _nfpcapd, exports=False),
    Peer("fprobe", _fprobe),
)


def _cpu_s_of(command: list[str], directory: Path) -> float:
    """User and system time of a command, run in a directory, and of all that it waited for."""
    process = subprocess.Popen(
        command, env=environment(), cwd=directory,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _, status, usage = wait_for(f"{command[0]} to end", lambda: _ended(process.pid), timeout_s=PATIENCE_S)
    except TimeoutError:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return float(usage.ru_utime + usage.ru_stime)


def _ended(pid: int) -> tuple[int, int, resource.struct_rusage] | None:
    found = os.wait4(pid, os.WNOHANG)
    return found if found[0] else None


def softflowd_file(directory: Path, port: int, *, flows: int, packets: int) -> float:
    """CPU seconds of softflowd over a capture.

    Names are short: while it reads a file, 1.1.0 looks at a pollfd that it has not filled in, where the text of its
    first message has been, and with a long name waits for ever on its control socket.
    """
    path = capture(directory, packets=packets, flows=flows)
    files = ["-r", path.name, "-p", "p", "-c", "c"]
    return _cpu_s_of(
        ["softflowd", *files, "-n", f"127.0.0.1:{port}", "-v", "10", "-m", str(MAX_FLOWS), "-d"], directory
    )


def pmacctd_file(directory: Path, port: int, *, flows: int, packets: int) -> float:
    """CPU seconds of pmacctd and its nfprobe plugin over a capture."""
    (directory / "pmacctd.conf").write_text(_NFPROBE.format(port=port, flows=MAX_FLOWS))
    path = capture(directory, packets=packets, flows=flows)
    return _cpu_s_of(["pmacctd", "-f", "pmacctd.conf", "-I", path.name], directory)
