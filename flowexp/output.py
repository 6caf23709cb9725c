# SPDX-License-Identifier: GPL-2.0-or-later
"""Where text goes that a command writes, and what happens once it goes nowhere."""

from __future__ import annotations

import errno
import os
from typing import IO

from .errors import FlowexpError

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
"""What writing fails with although the place could be opened."""


def put(text: str, stream: IO[str], name: str) -> None:
    """Write at once. BrokenPipeError: its reader has seen enough, as `head` has; FlowexpError: `name` is full."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(stream)
        raise FlowexpError(f"{name}: cannot be written: {error.strerror}") from error


def discard(stream: IO[str]) -> None:
    """Let what is left in `stream` go nowhere; else closing it, or the interpreter at its end, fails once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
