# SPDX-License-Identifier: GPL-2.0-or-later
"""What `flowexp check` finds: one line each, and the same for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Iterator

from ..errors import FlowexpError

OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Finding:
    """One line of the report: how it is, what was looked at, and what that means."""

    verdict: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict:8}{self.what}: {self.detail}"

    def json(self) -> Dict[str, str]:
        """One object of `--format json`."""
        return {"verdict": self.verdict.lower(), "what": self.what, "detail": self.detail}


def tried(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What `look` finds; what goes wrong in it is a finding, too."""
    try:
        yield from look()
    except FlowexpError as error:
        yield Finding(FAILED, what, str(error))
