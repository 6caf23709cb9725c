# SPDX-License-Identifier: GPL-2.0-or-later
"""`make run`: real Flows on the screen of any machine, and nothing left behind.

demo.py [SECONDS] makes a network namespace that answers ping, HTTP and DNS, starts `flowexp collect` and
`flowexp run` on all interfaces that are up, and makes traffic; until Ctrl-C, SIGTERM, or that many seconds.
demo.py serve is what it runs in the namespace.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Iterator, List

ROOT = Path(__file__).resolve().parents[1]
FLOWEXP = str(ROOT / ".venv" / "bin" / "flowexp")
CONFIGURATION = str(ROOT / "conf" / "demo.toml")
NAMESPACE = "flowexp-demo"
LINK, PEER = "flowexp-demo0", "flowexp-demo1"
HOST4, SERVER4 = "198.18.47.1", "198.18.47.2"  # networks set apart for benchmarks (RFC 2544, RFC 5180)
HOST6, SERVER6 = "2001:2:0:4739::1", "2001:2:0:4739::2"
DOWNLOAD_OCTETS = 300_000
PAUSE_S = 0.5
PATIENCE_S = 10.0  # for what takes milliseconds


class Failed(Exception):
    """The demo cannot go on: one line that says why."""


# The servers, in the namespace


class Download(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(DOWNLOAD_OCTETS))
        self.end_headers()
        self.wfile.write(bytes(DOWNLOAD_OCTETS))

    def log_message(self, *_: object) -> None:
        pass


def serve() -> None:
    """HTTP on port 80 and DNS on port 53, until killed."""
    web = http.server.ThreadingHTTPServer((SERVER4, 80), Download)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as names:
        names.bind((SERVER4, 53))
        print("ready", flush=True)
        while True:
            query, client = names.recvfrom(512)
            names.sendto(dns_answer(query), client)


def dns_query(query_id: int) -> bytes:
    """A standard query for flowexp.example, type A (RFC 1035 section 4.1)."""
    header = struct.pack("!6H", query_id, 0x0100, 1, 0, 0, 0)
    return header + b"\x07flowexp\x07example\x00" + struct.pack("!2H", 1, 1)


def dns_answer(query: bytes) -> bytes:
    """The same question with one answer, whose name points to the question's: the server's own address."""
    header = query[:2] + struct.pack("!5H", 0x8580, 1, 1, 0, 0)
    return header + query[12:] + struct.pack("!3HIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(SERVER4)


# The traffic, from the host


def make_traffic(round_number: int) -> None:
    """A ping over IPv4 and one over IPv6, a DNS query, a download. What is lost is lost."""
    for address in (SERVER4, SERVER6):
        subprocess.run(["ping", "-n", "-q", "-c", "1", "-W", "1", address], stdout=subprocess.DEVNULL, check=False)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.sendto(dns_query(round_number & 0xFFFF), (SERVER4, 53))
        client.recv(512)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError), direct.open(f"http://{SERVER4}/", timeout=1) as page:
        page.read()


# The stage


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    with open(CONFIGURATION, encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Failed("another 'make run' is under way here; end that one first") from error
        yield


@contextlib.contextmanager
def namespace() -> Iterator[None]:
    """A namespace behind a pair of veth interfaces, with an IPv4 and an IPv6 address at either end."""
    take_down()  # of a run that was killed
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", LINK, "type", "veth", "peer", "name", PEER, "netns", NAMESPACE)
        in_namespace = ("-n", NAMESPACE)
        for where, link, address4, address6 in (((), LINK, HOST4, HOST6), (in_namespace, PEER, SERVER4, SERVER6)):
            ip(*where, "address", "add", f"{address4}/30", "dev", link)
            with contextlib.suppress(Failed):  # IPv6 may be switched off
                ip(*where, "address", "add", f"{address6}/126", "dev", link, "nodad")
            ip(*where, "link", "set", link, "up")
        yield
    finally:
        take_down()


def take_down() -> None:
    """Removes link and namespace where they are. The link by itself: a namespace takes its time to go."""
    if Path("/sys/class/net", LINK).exists():
        ip("link", "delete", LINK)
    if Path("/run/netns", NAMESPACE).exists():
        ip("netns", "delete", NAMESPACE)


@contextlib.contextmanager
def running(*command: str, pipe: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A child in a session of its own, that leaves when the demo is killed.

    Ctrl-C is for the demo alone, which ends its children in their order.
    """
    guarded = ("setpriv", "--pdeathsig", "TERM", *command)
    stdout = subprocess.PIPE if pipe else None
    child = subprocess.Popen(guarded, stdout=stdout, text=True, start_new_session=True)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_taken(port: int, collector: subprocess.Popen[str]) -> None:
    """Returns once the Collector listens."""
    deadline = time.monotonic() + PATIENCE_S
    while collector.poll() is None and time.monotonic() < deadline:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            return
        time.sleep(0.02)
    raise Failed(f"the Collector does not listen on UDP port {port}")


def interfaces_up() -> List[str]:
    """All that are up, but loopback, where the demo's own Messages go."""
    found = []
    for link in sorted(Path("/sys/class/net").iterdir()):
        with contextlib.suppress(OSError):  # it may have gone
            flags = int((link / "flags").read_text(), 16)
            if flags & 0x1 and not flags & 0x8:  # IFF_UP, IFF_LOOPBACK
                found.append(link.name)
    return found


def demo(ending: threading.Event, duration_s: float) -> None:
    with contextlib.ExitStack() as stage:
        stage.enter_context(only_one())
        stage.enter_context(namespace())
        serve_there = ("ip", "netns", "exec", NAMESPACE, sys.executable, __file__, "serve")
        server = stage.enter_context(running(*serve_there, pipe=True))
        if server.stdout is None or server.stdout.readline() != "ready\n":
            raise Failed("the servers in the namespace did not start")
        url = f"udp://127.0.0.1:{free_udp_port()}"
        collector = stage.enter_context(running(FLOWEXP, "collect", "--listen", url, "--format", "table"))
        wait_until_taken(int(url.rpartition(":")[2]), collector)
        options = [word for name in interfaces_up() for word in ("-i", name)]
        exporter = stage.enter_context(running(FLOWEXP, "run", "-c", CONFIGURATION, "--collector", url, *options))
        deadline = time.monotonic() + duration_s
        round_number = 0
        while not ending.is_set() and time.monotonic() < deadline:
            for name, child in (("flowexp run", exporter), ("flowexp collect", collector)):
                if child.poll() is not None:
                    raise Failed(f"{name} ended with status {child.returncode}")
            make_traffic(round_number)
            round_number += 1
            ending.wait(PAUSE_S)


def main(arguments: List[str]) -> int:
    if arguments == ["serve"]:
        serve()
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ending.set())
    try:
        demo(ending, float(arguments[0]) if arguments else float("inf"))
    except Failed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
