"""Writer: a thread that writes one state while the next epoch runs, and waits where the disk is full."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

logger = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSE = 1.0  # seconds between two looks at a full disk
Job = Callable[[], object]


class Writer:
    """Jobs are done in order, one state at a time: `put` waits for the one before, so that memory stays bounded.

    patience : seconds to wait for room on a full disk before its error is raised
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._pool = ThreadPoolExecutor(1, "fmn-writer")
        self._last: Future[None] | None = None
        self._hurry = threading.Event()

    def put(self, *jobs: Job) -> None:
        """Have the jobs done, one after the other; each may be tried again. Raises what an earlier one raised."""
        self.wait()
        self._last = self._pool.submit(self._run, jobs)

    def wait(self) -> None:
        """Until everything is written; raises what went wrong."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """What was put is finished in any case; after an error without waiting for room."""
        if kind is not None:
            self._hurry.set()
        try:
            self.wait()
        except BaseException:
            if kind is None:  # or it would hide the first error
                raise
        finally:
            self._pool.shutdown()

    def _run(self, jobs: tuple[Job, ...]) -> None:
        for job in jobs:
            self._patiently(job)

    def _patiently(self, job: Job) -> None:
        end, told = time.monotonic() + self._patience, False
        while True:
            try:
                job()
                return
            except OSError as error:
                if error.errno not in FULL or self._hurry.is_set() or time.monotonic() >= end:
                    raise
                if not told:
                    logger.error("%s: %s; the run waits for room", error.filename, error.strerror)
                    told = True
                self._hurry.wait(PAUSE)
