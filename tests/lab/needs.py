# SPDX-License-Identifier: GPL-2.0-or-later
"""What a test needs of the machine, found out by trying it, never by a version number.

Each probe returns None when all is there, else the reason why not, as the operator would put it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from functools import cache
from pathlib import Path

import pytest

from .flowexp import COMMAND
from .netns import masquerade, namespaces, veth
from .process import CommandFailed


def need(*reasons: str | None) -> None:
    """Skips the test for the first reason there is; in continuous integration (CI=true) it fails instead."""
    for reason in reasons:
        if reason is not None and os.environ.get("CI") == "true":
            pytest.fail(f"needed under CI=true: {reason}", pytrace=False)
        elif reason is not None:
            pytest.skip(reason)


def tools(*names: str) -> str | None:
    """Programs that must be in the path."""
    missing = [name for name in names if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@cache
def namespace_support() -> str | None:
    """Root, network namespaces, veth pairs and nsenter."""
    if os.geteuid() != 0:
        return "not root"
    try:
        with namespaces("probe-a", "probe-b") as (a, b):
            veth(a, b)
            a.run("true")
    except (CommandFailed, OSError) as error:
        return f"no network namespaces or no veth: {error}"
    return None


@cache
def bpf() -> str | None:
    """libbpf and the bpf system call: asks for the first program there is (BPF_PROG_GET_NEXT_ID)."""
    try:
        libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        return f"no libbpf: {error}"
    if libbpf.bpf_prog_get_next_id(0, ctypes.byref(ctypes.c_uint32())) == 0 or ctypes.get_errno() == 2:
        return None
    return f"no bpf: {os.strerror(ctypes.get_errno())}"


@cache
def tun() -> str | None:
    """Tun and tap devices."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    return None


@cache
def bridge() -> str | None:
    """Bridges."""
    try:
        with namespaces("probe-bridge") as (namespace,):
            namespace.ip("link", "add", "br0", "type", "bridge")
    except CommandFailed as error:
        return f"no bridges: {error}"
    return None


@cache
def nat() -> str | None:
    """Masquerading with nftables."""
    missing = tools("nft")
    if missing:
        return missing
    try:
        with namespaces("probe-nat") as (namespace,):
            masquerade(namespace, "lo")
    except CommandFailed as error:
        return f"no NAT: {error}"
    return None


@cache
def kernel_btf() -> str | None:
    """What a program needs that looks into the kernel's own structs."""
    return None if Path("/sys/kernel/btf/vmlinux").exists() else "no kernel BTF"


@cache
def big_tcp() -> str | None:
    """TCP super-packets beyond 65,536 octets."""
    try:
        with namespaces("probe-a", "probe-b") as (a, b):
            veth(a, b)[0].set_big_tcp(150_000)
    except OSError as error:
        return f"no BIG TCP: {error}"
    return None


def scapy_names_fields() -> str | None:
    """A scapy whose names of NetFlow fields can be attributes: 2.5 has spaces in some, and builds no record."""
    from scapy.layers.netflow import NetflowV910TemplateFieldTypes

    minimum_ttl = NetflowV910TemplateFieldTypes[52]
    return None if minimum_ttl.isidentifier() else f'this scapy names an Information Element "{minimum_ttl}"'


def exporter() -> str | None:
    """The command under test."""
    return None if os.access(COMMAND, os.X_OK) else f"{COMMAND} is not there; `make build` makes it"


@cache
def kernel() -> str | None:
    """What every test of the exporter on live traffic needs."""
    return namespace_support() or bpf() or exporter()
