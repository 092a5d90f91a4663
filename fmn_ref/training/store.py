"""Store: write a run's files while the next epoch trains, and load them when the run resumes.

A checkpoint makes two stops: the loop hands the state of an epoch to `Store.write`, which copies it and returns; the
writer thread gives it to the run's `Recorder`, which writes checkpoint and history, and then saves the resume state.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from ..runs import adapters, checkpoints
from ..runs.folder import AnyPath, RunFolder
from ..runs.recorder import Recorder
from . import distributed
from .samples import named_digest

logger = logging.getLogger(__name__)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSE = 1.0  # seconds between two attempts on a full disk
IN_FULL = "_in_full"  # end of the names of digests that run.json of an earlier version may lack
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
        hidden = () if kind is None else (BaseException,)  # a later error would hide the first one
        with self._pool, contextlib.suppress(*hidden):
            self.wait()

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


def base_digest(model: nn.Module) -> dict[str, str]:
    """Entry of run.json for the weights of a network that its checkpoints do not hold: the base of an adapter."""
    base = {name: t for name, t in adapters.base_of(checkpoints.unwrap(model)) if isinstance(t, nn.Parameter)}
    return {f"base{IN_FULL}": named_digest(base)} if base else {}


class Store(contextlib.ExitStack):
    """Files of a training or a distillation, and the thread that writes them; only rank zero reads and writes.

    It is a context manager: leaving it waits for the thread and releases the folder's lock.

    Parameters
    ----------
    run_dir : path
    config : dict
        Configuration of the run. A folder that holds a run with another one is refused. Names that end in IN_FULL are
        compared if the run has them.
    keep : str or None
        As for `Recorder`; None records neither history nor checkpoints, and keeps the resume state alone.
    resume : bool
        Whether a run that is in the folder may go on.
    half : bool or set of str
        As for `Recorder`: the names of the parameters to store in 16 bits.
    disk_wait : float
        Seconds to wait for free space on a full disk.

    Attributes
    ----------
    recorder : Recorder or None
        None without history, and in other processes than rank zero.
    peak : float
        Peak forget fraction of the epochs on disk.
    """

    def __init__(
        self,
        run_dir: AnyPath,
        config: dict[str, Any],
        keep: str | None,
        resume: bool,
        half: bool | Set[str],
        disk_wait: float,
    ) -> None:
        super().__init__()
        self.folder, self.peak, self._all = RunFolder(run_dir), 0.0, keep == "all"
        self.recorder: Recorder | None = None
        if distributed.rank() == 0:
            self._lock = self.folder.claim(self._comparable(config), resume=resume)
            self.callback(setattr, self, "_lock", None)  # lets go of it
            if keep is not None:
                self.recorder = self.enter_context(Recorder(run_dir, keep=keep, half=half))
        self._writer = self.enter_context(Writer(disk_wait))
        distributed.barrier()

    def _comparable(self, config: dict[str, Any]) -> dict[str, Any]:
        """Leave out what the run in the folder was made without."""
        if not self.folder.run_json.exists() or not (self.folder.history.exists() or self.folder.resume.exists()):
            return config
        found = self.folder.read().config
        return {name: value for name, value in config.items() if name in found or not name.endswith(IN_FULL)}

    def load_final(self, model: nn.Module, epochs: int) -> bool:
        """Load the last checkpoint of a finished run whose resume files were deleted.

        Returns whether the run is such a one. A run of one epoch is trained again: it may have been killed between its
        history and its resume state.
        """
        path = None
        resumable = self.folder.resume.exists() or self.folder.previous_resume.exists()
        if self.recorder is not None and not resumable and self.recorder.next_epoch == epochs > 1:
            path = self.recorder.run.checkpoint(-1)
        path = distributed.broadcast(path)
        if path is not None:
            checkpoints.load_into(model, path)
        return path is not None

    def load(self, names: set[str]) -> dict[str, Any] | None:
        """Load the newest intact resume state, and rewind the history to it.

        A damaged resume.pt is logged and renamed, and the state of the epoch before is taken. A damaged checkpoint is
        logged and renamed, and `Run.kept` leaves it out.

        Parameters
        ----------
        names : set of str
            Keys that the state must have beside "epoch".

        Returns
        -------
        dict or None
            None for a new run.

        Raises
        ------
        ValueError
            No state is intact, or the history does not match it. Nothing is changed then.
        """
        state, faults = None, dict[Path, str]()
        for path in (self.folder.resume, self.folder.previous_resume):
            if state is None and path.exists():
                try:
                    state = _resume_state(path, names)
                except ValueError as error:
                    faults[path] = str(error)
        if faults and state is None:
            raise ValueError("; ".join(faults.values()))
        for path, fault in faults.items():
            path.replace(path.with_suffix(".damaged"))  # the next save would move it over the intact state
            logger.error("%s; going on from the state of the epoch before", fault)
        if self.recorder is not None:
            self._rewind(self.recorder, None if state is None else state["epoch"] + 1)
            self._check_checkpoints(self.recorder)
        return state

    def _rewind(self, recorder: Recorder, start: int | None) -> None:
        """Rewind the history to the state, at most two epochs: a larger gap means that files were exchanged."""
        found = "missing" if start is None else f"after {start} epochs"
        start = start or 0
        if not start <= recorder.next_epoch <= (start + 2 if start else 1):
            n = recorder.next_epoch
            raise ValueError(f"{self.folder.resume}: is {found}, but the history has {n}; restore either file")
        recorder.rewind(start)

    def _check_checkpoints(self, recorder: Recorder) -> None:
        for path in recorder.run.checkpoints if recorder.next_epoch else []:
            try:
                if path.exists() or self._all:
                    checkpoints.load(path)
            except FileNotFoundError:
                logger.error("%s: missing; fuse `run.kept`, which leaves it out", path)
            except ValueError as error:
                path.replace(path.with_suffix(".damaged"))
                logger.error("%s; renamed to %s.damaged: fuse `run.kept`, which leaves it out", error, path.stem)

    def write(self, state: dict[str, Any], outcome: Any) -> None:
        """Copy the state of an epoch and hand it to the writer thread: checkpoint, history, then resume state.

        Parameters
        ----------
        state : dict
            {"epoch": int, name: state_dict, ...}, which `load` returns.
        outcome : (correct, labels) or None
            Both (n_samples,); None without a recorder.

        Raises
        ------
        TypeError
            An entry of the state could not be read back. Nothing is written then.
        """
        if distributed.rank() != 0:
            return
        checkpoints.check_readable(state)
        state = checkpoints.snapshot(state)
        self._writer.put(lambda: self._record(state, outcome), lambda: self._save_resume(state))

    def wait(self) -> None:
        """Wait until everything is on disk; raise what went wrong."""
        self._writer.wait()

    def _record(self, state: dict[str, Any], outcome: Any) -> None:
        if self.recorder is not None:
            weights = state["average"]["weights"] if "average" in state else state["model"]
            self.recorder.record_correct(state["epoch"], *outcome, weights=weights)
            self.peak = self.recorder.peak_forget_fraction

    def _save_resume(self, state: dict[str, Any]) -> None:
        content = checkpoints.to_cpu(state)
        if self.folder.resume.exists():
            self.folder.resume.replace(self.folder.previous_resume)
        checkpoints.save(content, self.folder.resume)


def _resume_state(path: Path, names: set[str]) -> dict[str, Any]:
    state = checkpoints.load(path, scan=True)
    if not isinstance(state, dict) or state.keys() != {"epoch", *names} or type(state["epoch"]) is not int:
        raise ValueError(f"{path}: not what train or distill left to resume from")
    return state
