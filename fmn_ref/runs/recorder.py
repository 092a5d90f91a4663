"""Recorder: the correctness history and the checkpoints of one run, written as it goes; Run: the same, read back.

NumPy only: torch is loaded when a torch model is saved or evaluated, never otherwise. A run directory holds run.json,
history.fmnh and checkpoints/epoch_00000.pt, one for each row of the history (docs/formats.md); another framework's
checkpoints end as its files do (`suffix`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _check, _files
from ..metrics.history import CorrectnessHistory, labels_digest
from .retention import Keep
from ..metrics.curves import correctness, forget_fraction

if TYPE_CHECKING:
    from ..training.ensemble import Probabilities

Save = Callable[[Path], object]


class Run:
    """A finished or unfinished run: what was right at each epoch, and the weights.

    Attributes
    ----------
    run_dir : Path
    config : dict
        What run.json says about how the run was made.
    suffix : str
        How the names of checkpoints end: ".pt", or what another framework asks for.
    history : CorrectnessHistory
    model : torch.nn.Module or None
        The network that the checkpoints fit; needed to evaluate them, not to read the history.
    forward_fn : callable or None
        See `train`.
    """

    def __init__(self, run_dir: Path, history: CorrectnessHistory, model: Any = None, forward_fn: Any = None) -> None:
        self.run_dir, self.history, self.model, self.forward_fn = run_dir, history, model, forward_fn
        content = _read(run_dir)
        self.config, self.suffix = content["config"], content["checkpoint_suffix"]

    @classmethod
    def open(cls, run_dir: str | os.PathLike[str], model: Any = None, forward_fn: Any = None) -> Run:
        """Open a run directory.

        Raises
        ------
        FileNotFoundError
            No run there.
        ValueError
            A file of the run is damaged; the message names it.
        """
        folder = Path(run_dir)
        if not (folder / "run.json").is_file():
            below = [p.parent for pattern in ("*/run.json", "*/*/run.json") for p in sorted(folder.glob(pattern))]
            hint = f"; there is one in {below[0]}" if below else ""
            raise FileNotFoundError(f"{folder}: no run there (run.json is missing){hint}")
        if not (folder / "history.fmnh").is_file():
            raise FileNotFoundError(f"{folder}: nothing recorded yet (history.fmnh is missing)")
        return cls(folder, CorrectnessHistory.open(folder / "history.fmnh"), model, forward_fn)

    @property
    def checkpoints(self) -> list[Path]:
        """The file of each row's checkpoint, in order; those that `keep` dropped are not on disk (see `kept`)."""
        return [checkpoint_path(self.run_dir, e, self.suffix) for e in self.history.epochs]

    def checkpoint(self, row: int) -> Path:
        """The file of one row's checkpoint.

        Raises
        ------
        FileNotFoundError
            It is not on disk: `keep` dropped it, or somebody did.
        """
        path = self.checkpoints[row]
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such checkpoint; run.kept is the run with only those that are there")
        return path

    @property
    def kept(self) -> Run:
        """The same run with only the epochs whose checkpoints are on disk: what to fuse after keep="budget:n".

        Its rows, and so the epochs of plans made with it, count the kept epochs: `run.kept.history.epochs` says which
        they are. Windows reach to the neighbours among them.

        Raises
        ------
        FileNotFoundError
            There is none.
        """
        rows = [i for i, path in enumerate(self.checkpoints) if path.exists()]
        if not rows:
            raise FileNotFoundError(f"{self.run_dir / 'checkpoints'}: no checkpoint of the run is there")
        if len(rows) == len(self.history):
            return self
        return Run(self.run_dir, self.history.select(rows), self.model, self.forward_fn)

    def probabilities(
        self, data: Any, *, batch_size: int = 256, amp: bool = False, split: bool = False
    ) -> Probabilities:
        """What each epoch predicts on `data`: a sequence of (n_samples, n_classes) arrays, computed when read.

        amp: networks in bfloat16. split: each of several processes evaluates its part. See `Probabilities`.

        Raises
        ------
        ValueError
            The run has no model attached.
        """
        from ..training.ensemble import Probabilities

        return Probabilities(self, data, batch_size=batch_size, amp=amp, split=split)

    def __repr__(self) -> str:
        return f"Run({str(self.run_dir)!r}, n_epochs={len(self.history)}, n_samples={self.history.n_samples})"


class Recorder:
    """Three lines for one's own training loop.

    Parameters
    ----------
    run_dir : path
        Created if missing; a run that is already there is continued after its last epoch.
    model : torch.nn.Module, optional
        Its state is stored at each `record`.
    keep : str
        Which checkpoints to keep: "all"; "none", the history alone; "every:n", each n-th epoch; or "budget:n", the n
        epochs that are worth most by the history so far (a sample that an epoch gets right counts one, shared with the
        other kept epochs that get it right). The latest is always kept, beyond the n. Then fuse `run.kept`.
    half : bool
        Store floating-point weights in 16 bits (those that would overflow in 32): half the disk, and a rounding of
        2^-11 that `docs/results.md` measures.
    save : callable(path), optional
        Stores the weights of another framework at `path`, as a file or a folder, instead of `model`'s; all of it is
        there when it returns.
    suffix : str
        How the names of checkpoints end, with `save`: what the other framework asks for. run.json keeps it.
    config : dict, optional
        Written to run.json; anything that JSON can hold. A run that was made with another one is not continued.
    forward_fn : callable, optional
        Handed to `run`; see `train`.

    Raises
    ------
    ValueError
        Unknown `keep`; a run made with another `config`, or damaged.
    OSError
        The folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> recorder = Recorder(tempfile.mkdtemp())
    >>> for epoch, predictions in enumerate([[0, 1, 1], [0, 0, 1]]):
    ...     recorder.record(epoch, predictions, labels=[0, 1, 1])
    >>> recorder.peak_forget_fraction, recorder.next_epoch
    (0.3333333333333333, 2)
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        model: Any = None,
        keep: str = "all",
        *,
        half: bool = False,
        save: Save | None = None,
        suffix: str = ".pt",
        config: dict[str, Any] | None = None,
        forward_fn: Any = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.model, self.forward_fn = model, forward_fn
        if model is not None and not hasattr(model, "state_dict"):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if save is not None and not callable(save):
            raise TypeError(f"save: expected a function of a path, got {type(save).__name__}")
        self._keep = Keep.of(keep)
        self._save = None if self._keep.rule == "none" else _saver(model, save, half)
        self._history: CorrectnessHistory | None = None
        self._suffix = _checked_suffix(suffix)
        if suffix != ".pt" and save is None:
            raise ValueError(f"suffix: {suffix!r} needs `save`, which writes such files")
        claim(self.run_dir, config, suffix=suffix)
        (self.run_dir / "checkpoints").mkdir(exist_ok=True)
        if (self.run_dir / "history.fmnh").exists():
            self._history = CorrectnessHistory.open(self.run_dir / "history.fmnh")
            self.rewind(self.next_epoch)  # one without epochs, after a crash, makes room for a new one

    def record(self, epoch: int, scores_or_predictions: Any, labels: Any) -> None:
        """Store one epoch: the checkpoint first, then the correctness; a crash in between loses neither file.

        Parameters
        ----------
        epoch : int
            Above the last recorded one.
        scores_or_predictions, labels
            As `correctness`; the same samples in the same order at every epoch.

        Raises
        ------
        TypeError, ValueError
            As `correctness`; other labels than before; an epoch that is already there (`rewind` drops it).
        OSError
            A file cannot be written; everything recorded before is intact.
        """
        right = correctness(scores_or_predictions, labels)
        if right.ndim != 1:
            raise ValueError(f"scores_or_predictions: expected one epoch, got correctness of shape {right.shape}")
        self.record_correct(epoch, right, labels)

    def record_correct(self, epoch: int, correct: Any, labels: Any) -> None:
        """`record` for a loop that knows already which samples are right: correct (n_samples,) bool."""
        correct = _check.bool_matrix(_check.array(correct, "correct")[None])[0]
        _check.labels(labels, len(correct))
        epoch = _check.number(epoch, 0, 2**62, "epoch", int)
        if self._history is not None and self._history.digest != labels_digest(labels):
            was, now = self._history.n_samples, len(correct)
            counts = "" if was == now else f": {now} samples, not {was}"
            raise ValueError(f"labels: not the labels (or not in the order) that this run has recorded so far{counts}")
        if epoch < self.next_epoch:
            hint = f"go on with {self.next_epoch} (recorder.next_epoch), or drop it with recorder.rewind({epoch})"
            raise ValueError(f"epoch: {self.run_dir} is already recorded past {epoch}; {hint}")
        limited = self._save is not None and self._keep.rule in ("every", "budget")
        if limited:
            self._remove_leftovers()
        if self._save is not None:
            path = self._path(epoch)
            _remove(path)  # what a crash left, which not everybody writes over
            self._save(path)
            if not path.exists():
                raise FileNotFoundError(
                    f"{path}: nothing there after `save`; wait for one that goes on in the background"
                )
        if self._history is None:
            self._history = CorrectnessHistory(len(correct), self.run_dir / "history.fmnh", labels=labels)
        self._history.append(correct, epoch)
        if limited:
            kept = self.run.kept
            for dropped in self._keep.dropped(kept.history.epochs, kept.history.correct()):
                _remove(self._path(dropped))

    def _path(self, epoch: int) -> Path:
        return checkpoint_path(self.run_dir, epoch, self._suffix)

    def _remove_leftovers(self) -> None:
        """Checkpoints of epochs that are not in the history: what a crash left."""
        if self._history is None:
            return
        recorded = {self._path(e) for e in self._history.epochs}
        for path in list((self.run_dir / "checkpoints").iterdir()):
            if path not in recorded and re.fullmatch(r"epoch_\d{5,}" + re.escape(self._suffix), path.name):
                _remove(path)

    def rewind(self, epoch: int) -> list[int]:
        """Drop `epoch` and all later ones, with their checkpoints: what a loop needs that resumes from an earlier state
        than was recorded. Where none is left, the folder's plan.json and comparison.json go too.

        Returns
        -------
        list of int
            The epochs that were dropped.
        """
        epoch = _check.number(epoch, 0, 2**62, "epoch", int)
        if self._history is None:
            return []
        dropped = [e for e in self._history.epochs if e >= epoch]
        if dropped:
            self._history.truncate(len(self._history) - len(dropped))
        for e in dropped:  # or their checkpoints would stand for the epochs that are recorded next
            _remove(self._path(e))
        if not len(self._history):  # nothing left: other samples may be recorded, and what was fused is gone
            for name in ("plan.json", "comparison.json"):
                (self.run_dir / name).unlink(missing_ok=True)
            (self.run_dir / "history.fmnh").unlink()
            self._history = None
        return dropped

    @property
    def next_epoch(self) -> int:
        """One past the last recorded epoch; 0 for a new run."""
        return self._history.epochs[-1] + 1 if self._history is not None and len(self._history) else 0

    @property
    def peak_forget_fraction(self) -> float:
        """max_e F_e so far, against the latest epoch."""
        return float(forget_fraction(self._history).max()) if self.next_epoch else 0.0

    @property
    def run(self) -> Run:
        if self._history is None or not len(self._history):
            raise ValueError(f"{self.run_dir}: nothing recorded yet")
        return Run(self.run_dir, self._history, self.model, self.forward_fn)

    def __repr__(self) -> str:
        return f"Recorder({str(self.run_dir)!r}, next_epoch={self.next_epoch})"


def claim(run_dir: Path, config: dict[str, Any] | None, resume: bool = True, suffix: str = ".pt") -> Path:
    """Make the folder and its run.json, or check that what is there was made with this configuration (None: any) and
    that its checkpoints end in `suffix`."""
    if config is not None and not isinstance(config, dict):
        raise TypeError(f"config: expected a dict, got {type(config).__name__}")
    try:
        plain = None if config is None else json.loads(json.dumps(config))
    except TypeError as error:
        raise TypeError(f"config: {error}") from None
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "run.json"
    begun = any((run_dir / name).exists() for name in ("history.fmnh", "resume.pt"))
    if begun and not path.exists():
        raise FileNotFoundError(f"{path}: missing, but the folder holds a run; restore it or choose another folder")
    if begun and not resume:
        raise FileExistsError(f"{run_dir} holds a run; resume=True continues it, or choose another run_dir")
    if not begun:
        if plain is not None or not path.exists() or _read(run_dir)["checkpoint_suffix"] != suffix:
            # also where an attempt failed before its first epoch
            content = {"format": "fmn_ref.run", "version": 1, "config": plain or {}, "made_with": _versions()}
            _files.write_json(path, content if suffix == ".pt" else {**content, "checkpoint_suffix": suffix})
        return run_dir
    content = _read(run_dir)
    found = content["config"]
    if content["checkpoint_suffix"] != suffix:
        was = content["checkpoint_suffix"]
        raise ValueError(f"suffix: the checkpoints in {run_dir} end in {was!r}, not {suffix!r}; choose another folder")
    if plain is None:
        return run_dir
    for key in sorted(plain.keys() | found.keys()):
        if plain.get(key) != found.get(key):
            was, now = found.get(key), plain.get(key)
            raise ValueError(f"{key}: the run in {run_dir} was made with {was!r}, not {now!r}; choose another folder")
    return run_dir


def _read(run_dir: Path) -> dict[str, Any]:
    """What run.json says, with a "config" and a "checkpoint_suffix"."""
    content = {"checkpoint_suffix": ".pt", **_files.read_json(run_dir / "run.json", "fmn_ref.run")}
    if not isinstance(content.get("config"), dict):
        raise ValueError(f"{run_dir / 'run.json'}: has no configuration")
    try:
        _checked_suffix(content["checkpoint_suffix"])
    except ValueError as error:
        raise ValueError(f"{run_dir / 'run.json'}: checkpoint_{error}") from None
    return content


def _checked_suffix(suffix: Any) -> str:
    """The end of a file's name; run.json may come from a stranger, and must not lead elsewhere."""
    if not isinstance(suffix, str) or not re.fullmatch(r"(\.\w+)+", suffix, re.ASCII):
        raise ValueError(f"suffix: expected the end of a file's name, like '.pt', got {suffix!r}")
    return suffix


def checkpoint_path(run_dir: Path, epoch: int, suffix: str = ".pt") -> Path:
    return run_dir / "checkpoints" / f"epoch_{epoch:05d}{suffix}"


def _remove(checkpoint: Path) -> None:
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        going = checkpoint.with_name(f"{checkpoint.name}.tmp")  # never half a checkpoint under its name
        shutil.rmtree(going, ignore_errors=True)
        shutil.rmtree(checkpoint.rename(going))
    else:
        checkpoint.unlink(missing_ok=True)


def _saver(model: Any, save: Save | None, half: bool) -> Save | None:
    if save is not None or model is None:
        return save
    from .checkpoints import save_state

    return lambda path: save_state(model, path, half=half)


def _versions() -> dict[str, str]:
    """Of what computes; read from the metadata, so that torch is not loaded for it."""
    from importlib import metadata  # slow to import, and needed once a run

    versions = {"python": platform.python_version()}
    frameworks = [name for name in ("lightning", "transformers", "keras", "jax") if name in sys.modules]
    for name in ("fmn_ref", "numpy", "torch", *frameworks):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
