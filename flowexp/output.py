# SPDX-License-Identifier: GPL-2.0-or-later
"""Where text goes that a command writes, and what happens once it goes nowhere."""

from __future__ import annotations

import errno
import os
import stat
import sys
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import IO, Optional, Type

from .errors import FlowexpError, UsageError

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF))
"""What writing fails with although the place could be opened."""


def usable_streams() -> None:
    """Standard output and error as they have to be, however we were started.

    Closed ones (`>&-`) become such that writing fails, or goes nowhere, and no file that is opened takes their place.
    Letters that the terminal's encoding lacks become question marks.
    """
    for number, name, mode in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class Destination:
    """The file of an -o. One that cannot be written is refused (UsageError) before there is anything to write.

    Until then it stays as it was: where nothing comes of the work, an old file keeps its content and a new one goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            try:
                self._fd, self._is_to_go = os.open(path, flags | os.O_EXCL, 0o666), True
            except FileExistsError:
                self._fd, self._is_to_go = os.open(path, flags, 0o666), False
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from error

    def begin(self) -> IO[str]:
        """Empty from now on, for text; it is closed with this."""
        self._is_to_go = False
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, 0)
        return open(self._fd, "w", encoding="utf-8", closefd=False)

    def __enter__(self) -> Destination:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        os.close(self._fd)
        if self._is_to_go:
            self.path.unlink()


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
