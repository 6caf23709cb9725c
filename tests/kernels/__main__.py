# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m kernels [NAME...]`: boots the kernels, prints the table, and puts it into packaging/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from lab import markdown

from .machine import KERNELS, ROOT, boot, support

README = ROOT / "packaging" / "README.md"


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """In Markdown: a row for each check, a column for each kernel."""
    found = {name: {result["check"]: result for result in run} for name, run in runs.items()}
    checks = max((list(results) for results in found.values()), key=len)
    rows = [[check, *(cell(results.get(check)) for results in found.values())] for check in checks]
    return markdown.table(["", *found], rows)


def cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not reached"
    return result["detail"] if result["verdict"] == "ok" else f"{result['verdict']}: {result['detail']}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make test-kernels")
    names = [kernel.name for kernel in KERNELS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}")
    chosen = parser.parse_args().names or names
    reason = support()
    if reason is not None:
        sys.exit(reason)
    runs = {}
    for kernel in KERNELS:
        if kernel.name in chosen:
            began_s = time.monotonic()
            runs[kernel.name] = boot(kernel)
            print(f"{kernel.name}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    print(table(runs), end="")
    if set(chosen) == set(names):
        markdown.put_into(README, "kernels", table(runs))
    if any(result["verdict"] == "FAILED" for run in runs.values() for result in run):
        sys.exit("some checks failed")


if __name__ == "__main__":
    main()
