"""Run: a recorded run, read back. NumPy only: `probabilities` alone needs torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ..metrics.history import CorrectnessHistory
from . import references
from .folder import AnyPath, RunFolder


class Run:
    """A finished or unfinished run: its correctness history and its checkpoints.

    Attributes
    ----------
    run_dir : Path
    folder : RunFolder
        Paths of the run's files.
    config : dict
        How the run was made, as run.json keeps it.
    suffix : str
        How the names of checkpoints end: ".pt", or the suffix of another framework.
    history : CorrectnessHistory
    model : torch.nn.Module or None
        A network that the checkpoints fit. Evaluating them needs it; reading the history does not.
    forward_fn : callable or None
        See `train`.
    """

    evaluate: ClassVar[Callable[..., Any]]  # (run, data, **options); the package sets it, from a room above this one

    def __init__(
        self, run_dir: AnyPath, history: CorrectnessHistory, model: Any = None, forward_fn: Any = None
    ) -> None:
        self.folder = RunFolder(run_dir)
        self.run_dir, self.history, self.model, self.forward_fn = self.folder.path, history, model, forward_fn
        self.config, self.suffix, _ = self.folder.read()

    @classmethod
    def open(cls, run_dir: AnyPath, model: Any = None, forward_fn: Any = None) -> Run:
        """Open a run folder for reading.

        Raises
        ------
        FileNotFoundError
            The folder holds no run.
        ValueError
            A file of the run is damaged; the message names it.
        """
        folder = RunFolder(run_dir)
        folder.check_recorded()
        return cls(folder, CorrectnessHistory.open(folder.history), model, forward_fn)

    @property
    def checkpoints(self) -> list[Path]:
        """Path of each row's checkpoint, in order. Those that `keep` deleted do not exist (see `kept`)."""
        return [self.folder.checkpoint(e, self.suffix) for e in self.history.epochs]

    def checkpoint(self, row: int) -> Path:
        """Path of one row's checkpoint.

        Raises
        ------
        FileNotFoundError
            The checkpoint does not exist: `keep`, or somebody, deleted it.
        """
        path = self.checkpoints[row]
        if not references.exists(path):
            gone = references.target_of(path) if path.exists() else path
            moved = "if it moved, give from_checkpoints its new folder; " if gone != path else ""
            kept = "run.kept is the run with only those that are there"
            raise FileNotFoundError(f"{gone}: no such checkpoint; {moved}{kept}")
        return path

    @property
    def kept(self) -> Run:
        """The run reduced to the epochs whose checkpoints exist; fuse this one after keep="budget:n".

        Its rows, and so the epochs of plans made with it, count the kept epochs only: `run.kept.history.epochs` gives
        their numbers. Windows reach to the kept neighbours.

        Raises
        ------
        FileNotFoundError
            No checkpoint exists.
        """
        rows = [i for i, path in enumerate(self.checkpoints) if references.exists(path)]
        if not rows:
            hint = "; if they moved, give from_checkpoints their new folder" * (self.suffix == references.SUFFIX)
            raise FileNotFoundError(f"{self.folder.checkpoints}: no checkpoint of the run is there{hint}")
        if len(rows) == len(self.history):
            return self
        return Run(self.folder, self.history.select(rows), self.model, self.forward_fn)

    def probabilities(self, data: Any, *, batch_size: int = 256, amp: bool = False, split: bool = False) -> Any:
        """Predict `data` with every epoch's checkpoint; epochs are computed when they are read.

        Parameters
        ----------
        data
            As in `train`.
        batch_size : int, default 256
        amp : bool, default False
            Evaluate the networks in bfloat16.
        split : bool, default False
            Let each of several processes evaluate its part.

        Returns
        -------
        Probabilities
            A sequence of (n_samples, n_classes) float32 arrays, one per row of the history.

        Raises
        ------
        ValueError
            The run has no model.
        """
        return Run.evaluate(self, data, batch_size=batch_size, amp=amp, split=split)

    def __repr__(self) -> str:
        return f"Run({str(self.folder.given)!r}, n_epochs={len(self.history)}, n_samples={self.history.n_samples})"
