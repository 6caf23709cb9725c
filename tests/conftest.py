# SPDX-License-Identifier: GPL-2.0-or-later
"""For all tests: `need`, and the check that a session leaves the machine as it found it."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator

import pytest
from lab import flowexp, needs, netns, process
from lab.wait import wait_for


def pytest_configure() -> None:
    """Tests that meter in this process hold a dozen descriptors each until they are collected."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


LONG = ("kernels/", "model/", "packages/test_deb", "test_stress", "test_kill", "test_bench_smoke", "test_extent")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, files that take minutes are begun first."""
    places = [f"tests/{each}" if "/" in each else f"/{each}." for each in LONG]
    items.sort(key=lambda item: next((n for n, place in enumerate(places) if place in item.nodeid), len(places)))


@pytest.fixture
def need() -> Callable[..., None]:
    """Skips for the first reason given (see lab/needs.py); fails instead under CI=true."""
    return needs.need


def left_behind() -> list[str]:
    """Everything of this session that still exists though its test has ended."""
    return [
        *(f"namespace {name}" for name in netns.forgotten()),
        *(f"pins {path}" for path in flowexp.forgotten()),
        *(f"process {line}" for line in process.forgotten()),
        *(f"attached {line}" for line in netns.left_attached),
    ]


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails the session if a namespace, pin, program, filter or process of its own is left at its end."""
    yield
    with contextlib.suppress(TimeoutError):
        wait_for("everything to be cleaned up", lambda: not left_behind())
    if left_behind():
        pytest.fail("left behind: " + "; ".join(left_behind()), pytrace=False)
