# SPDX-License-Identifier: GPL-2.0-or-later
"""A thread for each Collector: one whose path is slow, full or dead does not hold up the others.

Each batch is given to all couriers at once and waited for, so that it has been sent when the journal says so. Who
takes longer than its patience is waited for no more, until it has caught up. Meanwhile what it is given waits in a
bounded queue: if the exporter is killed just then, these records are lost to that Collector, and the Sequence
Numbers show it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Callable, Deque, Optional, Tuple

PATIENCE_S = 0.5
"""For one batch: longer than the proof of a path (transport/udp.py), shorter than a full queue is tried for."""
DISK_PATIENCE_S = 5.0
"""Where a batch goes to a file or a spool, and no Collector can delay it: what is there survives a kill."""
MAX_RECORDS_WAITING = 131_072
"""Some 50 MB of columns. What is beyond has failed."""

Job = Callable[[], None]


class Courier:
    """Does jobs in the order in which they were given, in a thread of its own."""

    def __init__(self, name: str, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._jobs: Deque[Tuple[Job, int]] = deque()
        self._is_working = self._is_closing = False
        self._failure: Optional[BaseException] = None
        self.records_waiting = 0
        """Given and not done yet."""
        self.is_behind = False
        """Whether a batch took longer than its patience, and what has been given since is not all done."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether all that was given is done."""
        return not self._jobs and not self._is_working

    def give(self, job: Job, records: int = 0) -> bool:
        """To be done after all that was given before. False: there is no room for so many records."""
        with self._changed:
            if records and self.records_waiting and self.records_waiting + records > MAX_RECORDS_WAITING:
                return False
            self._jobs.append((job, records))
            self.records_waiting += records
            self._changed.notify_all()
            return True

    def wait(self, since_s: float) -> bool:
        """Until all is done, or patience ends that began at this monotonic time; whether all is done.

        One that is behind is not waited for.
        """
        if not self.is_behind:
            self.is_behind = not self._wait(since_s + self._patience_s)
        if self._failure is not None:
            raise self._failure
        return not self.is_behind

    def _wait(self, until_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.is_idle, max(0.0, until_s - time.monotonic()))

    def close(self, until_s: float) -> int:
        """Ends the thread when all is done, or at that time. Returns how many records it did not get to."""
        self._wait(until_s)
        with self._changed:
            left = sum(records for _, records in self._jobs)
            self._jobs.clear()
            self.records_waiting -= left
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(max(0.0, until_s - time.monotonic()))
        return left

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closing)
                if not self._jobs:
                    return
                job, records = self._jobs.popleft()
                self._is_working = True
            began_s = time.monotonic()
            try:
                job()
            except BaseException as error:  # a fault of ours: the exporter's thread raises it
                self._failure = error
            with self._changed:
                self._is_working = False
                self.records_waiting -= records
                if not self._jobs and time.monotonic() - began_s < self._patience_s:
                    self.is_behind = False
                self._changed.notify_all()
