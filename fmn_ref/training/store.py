"""Store: write a run's files while the next epoch trains, and load them when the run resumes.

A checkpoint makes two stops: the loop hands the state of an epoch to `Store.write`, which copies it and returns; the
writer thread gives it to the run's `Recorder`, which writes checkpoint and history, and then saves the resume state.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..runs import checkpoints
from ..runs.folder import RunFolder, RunLock
from ..runs.recorder import Recorder
from . import data, distributed
from .writer import Writer

logger = logging.getLogger(__name__)


class Store:
    """Files of a training or a distillation, and the thread that writes them; only rank zero reads and writes.

    It is a context manager: leaving it waits for the thread and releases the folder's lock.

    Parameters
    ----------
    run_dir : path
    config : dict
        Configuration of the run. A folder that holds a run with another one is refused.
    model : nn.Module
    keep : str or None
        As for `Recorder`; None records neither history nor checkpoints, and keeps the resume state alone.
    resume : bool
        Whether a run that is in the folder may go on.
    half, forward_fn
        As for `Recorder`.
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
        run_dir: str | os.PathLike[str],
        config: dict[str, Any],
        model: nn.Module,
        keep: str | None,
        *,
        resume: bool = True,
        half: bool = False,
        forward_fn: data.Forward | None = None,
        disk_wait: float = 3600.0,
    ) -> None:
        self.folder, self.peak = RunFolder(run_dir), 0.0
        self._all, self._writer = keep == "all", Writer(disk_wait)
        self.recorder: Recorder | None = None
        self._lock: RunLock | None = None
        if distributed.rank() == 0:
            self._lock = self.folder.claim(config, resume=resume)
            if keep is not None:
                self.recorder = Recorder(run_dir, model, keep, half=half, forward_fn=forward_fn)
        distributed.barrier()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._writer.__exit__(*error)
        finally:
            if self.recorder is not None:
                self.recorder.close()
            if self._lock is not None:
                self._lock.release()

    def load_final(self, model: nn.Module, epochs: int) -> bool:
        """Load the last checkpoint of a finished run whose resume files were deleted; return whether it is one."""
        path = None
        resumable = self.folder.resume.exists() or self.folder.previous_resume.exists()
        if self.recorder is not None and not resumable and self.recorder.next_epoch == epochs:
            path = self.recorder.run.checkpoints[-1]
        path = distributed.broadcast(path)
        if path is not None:
            checkpoints.load_into(model, path)
        return path is not None

    def load(self, names: set[str]) -> dict[str, Any] | None:
        """Load the newest intact resume state, and rewind the history to it.

        If resume.pt is damaged, an error is logged and the state of the epoch before is taken. A damaged checkpoint is
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
        state, faults = None, list[str]()
        for path in (self.folder.resume, self.folder.previous_resume):
            if state is None and path.exists():
                try:
                    state = _resume_state(path, names)
                except ValueError as error:
                    faults.append(str(error))
        if faults and state is None:
            raise ValueError("; ".join(faults))
        for fault in faults:
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
        """
        if distributed.rank() != 0:
            return
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
            os.replace(self.folder.resume, self.folder.previous_resume)
        checkpoints.save(content, self.folder.resume)


def _resume_state(path: Path, names: set[str]) -> dict[str, Any]:
    state = checkpoints.load(path)
    if not isinstance(state, dict) or state.keys() != {"epoch", *names} or not isinstance(state["epoch"], int):
        raise ValueError(f"{path}: not what train or distill left to resume from")
    return state
