"""Store: what a run keeps on disk while it goes on, written by a thread, and how it is taken up again."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..runs import checkpoints
from ..runs.recorder import Recorder
from . import data, distributed
from .writer import Writer

logger = logging.getLogger(__name__)


class Store:
    """resume.pt and, with `keep`, the history and the checkpoints of a run; only the first process reads and writes.

    Parameters
    ----------
    run_dir : Path
    model : nn.Module
    keep, half, forward_fn
        As `Recorder`; keep=None: no history and no checkpoints.
    disk_wait : float
        Seconds to wait for room on a full disk.

    Attributes
    ----------
    recorder : Recorder or None
    peak : float
        max_e F_e of what is written.
    """

    def __init__(
        self,
        run_dir: Path,
        model: nn.Module,
        keep: str | None = None,
        *,
        half: bool = False,
        forward_fn: data.Forward | None = None,
        disk_wait: float,
    ) -> None:
        self.path, self.previous = run_dir / "resume.pt", run_dir / "resume.previous.pt"
        self.disk_wait, self.peak = disk_wait, 0.0
        self._all, self._half, self._weights = keep == "all", half, dict[str, Any]()
        self.recorder: Recorder | None = None
        if keep is not None and distributed.rank() == 0:
            self.recorder = Recorder(run_dir, model, keep, save=self._save, forward_fn=forward_fn)

    def _save(self, path: Path) -> None:
        checkpoints.save_weights(self._weights, path, half=self._half)

    def final_checkpoint(self, epochs: int) -> Path | None:
        """Of a complete run that somebody has tidied up: nothing to resume from, the last checkpoint there."""
        if self.recorder is None or self.path.exists() or self.previous.exists() or self.recorder.next_epoch != epochs:
            return None
        return self.recorder.run.checkpoints[-1]

    def load(self, names: set[str]) -> dict[str, Any] | None:
        """The newest whole state {"epoch", *names}, with the history put back to it; None for a new run.

        A damaged resume.pt is named in the log, and the state before it is taken. A damaged checkpoint is named and set
        aside, so that `Run.kept` goes without it.

        Raises
        ------
        ValueError
            No state is whole, or it does not go with the history; nothing is changed.
        """
        state, faults = None, list[str]()
        for path in (self.path, self.previous):
            if state is None and path.exists():
                try:
                    state = _state(path, names)
                except ValueError as error:
                    faults.append(str(error))
        if faults and state is None:
            raise ValueError("; ".join(faults))
        for fault in faults:
            logger.error("%s; going on from the state of the epoch before", fault)
        if self.recorder is not None:
            self._rewind(self.recorder, None if state is None else state["epoch"] + 1)
        return state

    def _rewind(self, recorder: Recorder, start: int | None) -> None:
        """Put the history back to where the state is: at most two epochs, if nobody meddled."""
        found = "missing" if start is None else f"after {start} epochs"
        start = start or 0
        if not start <= recorder.next_epoch <= (start + 2 if start else 1):
            raise ValueError(f"{self.path}: is {found}, but the history has {recorder.next_epoch}; restore either file")
        recorder.rewind(start)
        for path in recorder.run.checkpoints if recorder.next_epoch else []:
            try:
                if path.exists() or self._all:
                    checkpoints.load(path)
            except FileNotFoundError:
                logger.error("%s: missing; fuse `run.kept`, which goes without it", path)
            except ValueError as error:
                path.replace(path.with_suffix(".damaged"))
                logger.error("%s; renamed to %s.damaged: fuse `run.kept`, which goes without it", error, path.stem)

    def write(self, writer: Writer, state: dict[str, Any], outcome: Any) -> None:
        """Have the checkpoint written, the history's row, then resume.pt. The state is copied first, so that the next
        epoch can begin.

        state : {"epoch": number, name: state_dict, ...}, what `load` gives back
        outcome : (correct (n,), labels (n,)), or None without recorder
        """
        state = checkpoints.snapshot(state)

        def record() -> None:
            if self.recorder is not None:
                self._weights = state["average"]["weights"] if "average" in state else state["model"]
                self.recorder.record_correct(state["epoch"], *outcome)
                self.peak = self.recorder.peak_forget_fraction

        def leave_state() -> None:
            content = checkpoints.to_cpu(state)
            if self.path.exists():
                os.replace(self.path, self.previous)
            checkpoints.save(content, self.path)

        writer.put(record, leave_state)


def _state(path: Path, names: set[str]) -> dict[str, Any]:
    state = checkpoints.load(path)
    if not isinstance(state, dict) or state.keys() != {"epoch", *names} or not isinstance(state["epoch"], int):
        raise ValueError(f"{path}: not what train or distill left to resume from")
    return state
