"""Writer: a thread that writes the state of one epoch while the next one trains, and waits on a full disk."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

logger = logging.getLogger(__name__)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSE = 1.0  # seconds between two attempts on a full disk
Job = Callable[[], object]


class Writer:
    """Run jobs in order, in a thread. `put` waits for the state before, so that memory stays bounded.

    Parameters
    ----------
    patience : float
        Seconds to wait for free space on a full disk before its error is raised.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._pool = ThreadPoolExecutor(1, "fmn-writer")
        self._last: Future[None] | None = None
        self._hurry = threading.Event()

    def put(self, *jobs: Job) -> None:
        """Queue jobs that run one after the other and may be tried again. Raises the error of an earlier one."""
        self.wait()
        self._last = self._pool.submit(self._run, jobs)

    def wait(self) -> None:
        """Wait until every job is done; raise its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Finish the queued jobs; after an error, without waiting for free space."""
        if kind is not None:
            self._hurry.set()
        try:
            self.wait()
        except BaseException:
            if kind is None:  # otherwise it would hide the first error
                raise
        finally:
            self._pool.shutdown()

    def _run(self, jobs: tuple[Job, ...]) -> None:
        for job in jobs:
            self._retry_while_full(job)

    def _retry_while_full(self, job: Job) -> None:
        end, logged = time.monotonic() + self._patience, False
        while True:
            try:
                job()
                return
            except OSError as error:
                if error.errno not in DISK_FULL or self._hurry.is_set() or time.monotonic() >= end:
                    raise
                if not logged:
                    logger.error("%s: %s; the run waits for free space", error.filename, error.strerror)
                    logged = True
                self._hurry.wait(PAUSE)
