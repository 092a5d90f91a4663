"""RunFolder: the one owner of a run's folder, its layout, its run.json and its lock. NumPy only.

No other file joins paths inside a run folder. docs/reference/formats.md describes the files.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import _files
from .lock import RunLock

AnyPath = _files.AnyPath
RUN_FORMAT = "fmn_ref.run"
_FRAMEWORKS = ("lightning", "transformers", "keras", "jax")  # run.json keeps their versions where they are loaded

DOOR = (
    "; fmn_ref.from_checkpoints, or `fmn-ref import checkpoints`, makes one of checkpoints that were saved without it"
)


class RunInfo(NamedTuple):
    """Content of run.json."""

    config: dict[str, Any]
    suffix: str  # how the names of checkpoints end
    made_with: dict[str, Any]


class RunFolder:
    """Paths inside one run folder, and what may be done to them.

    Parameters
    ----------
    path : path
        The folder. It need not exist yet.

    Attributes
    ----------
    given : path
        The folder as it was given, for messages.
    path, run_json, history, checkpoints, resume, previous_resume, plan, targets, predictions : Path
        Absolute, so that they stay the same if the working directory changes.
    comparisons : tuple of Path
        Files in which a comparison may be stored; the first one that exists counts.
    """

    def __init__(self, path: AnyPath) -> None:
        self.given, self.path = getattr(path, "given", path), _files.absolute(path)
        self.run_json = self.path / "run.json"
        self.history = self.path / "history.fmnh"
        self.checkpoints = self.path / "checkpoints"
        self.resume = self.path / "resume.pt"
        self.previous_resume = self.path / "resume.previous.pt"
        self.plan = self.path / "plan.json"
        self.comparisons = self.path / "comparison.json", self.path / "cell.json"
        self.targets = self.path / "targets"
        self.predictions = self.path / "predictions"

    def __fspath__(self) -> str:
        return str(self.path)

    def check_recorded(self) -> None:
        """Raise FileNotFoundError, with a hint, unless the folder holds a run with a history."""
        if not self.run_json.is_file():
            below = [p.parent for pattern in ("*/run.json", "*/*/run.json") for p in sorted(self.path.glob(pattern))]
            hint = f"; there is one in {below[0]}" if below else DOOR if self.path.is_dir() else ""
            raise FileNotFoundError(f"{self.given}: no run there (run.json is missing){hint}")
        if not self.history.is_file():
            raise FileNotFoundError(f"{self.given}: nothing recorded yet (history.fmnh is missing)")

    # --- run.json ---

    def read(self) -> RunInfo:
        """Read run.json; ValueError that names the file where it is damaged."""
        content = _files.read_json(self.run_json, RUN_FORMAT)
        config, made_with = content.get("config"), content.get("made_with")
        if not isinstance(config, dict):
            raise ValueError(f"{self.run_json}: has no configuration")
        try:
            suffix = checked_suffix(content.get("checkpoint_suffix", ".pt"))
            return RunInfo(config, suffix, made_with if isinstance(made_with, dict) else {})
        except ValueError as error:
            raise ValueError(f"{self.run_json}: checkpoint_{error}") from None

    def claim(
        self, config: dict[str, Any] | None, *, resume: bool = True, suffix: str = ".pt", overwrite: bool = False
    ) -> RunLock:
        """Lock the folder for this process and write its run.json, or check the one that is there.

        Parameters
        ----------
        config : dict or None
            Configuration of the run; None accepts any.
        resume : bool, default True
            Whether a run that was begun here may go on.
        suffix : str, default ".pt"
            How the names of checkpoints end.
        overwrite : bool, default False
            Delete a run that is here first.

        Raises
        ------
        FileExistsError, FileNotFoundError
            A run is here and `resume` is False; checkpoints, or a history, are here without run.json.
        TypeError, ValueError
            The configuration is no dict that JSON can hold, or differs from the run's; another process writes here;
            run.json is another tool's, or damaged.
        """
        if config is not None and not isinstance(config, dict):
            raise TypeError(f"config: expected a dict, got {type(config).__name__}")
        try:
            plain = json.loads(json.dumps(config))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"config: expected a dict that JSON can hold ({error})") from None
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.given}: a file; expected a folder, or the name of a new one, for the run")
        if not self.run_json.exists():
            _files.make_folder(self.path)
        lock = RunLock.of(self.path)
        try:
            if overwrite:
                self._delete_run()
            self._settle(plain, resume, suffix)
            for folder in (self.path, self.checkpoints, self.targets, self.predictions):
                _files.remove_leftovers(folder)
        except BaseException:
            del lock  # the error's traceback holds this frame
            raise
        return lock

    def _settle(self, config: dict[str, Any] | None, resume: bool, suffix: str) -> None:
        """Write run.json of a run without epochs; compare the one of a run that was begun. Refuse another tool's."""
        found = self.read() if self.run_json.exists() else None
        begun = any(path.exists() for path in (self.history, self.resume, self.previous_resume))
        if found is None and begun:
            hint = "restore it or choose another folder"
            raise FileNotFoundError(f"{self.run_json}: missing, but the folder holds a run; {hint}")
        if found is None and (strange := self._checkpoint_files(suffix)):
            raise FileExistsError(f"{strange[0]}: belongs to no run (run.json is missing); choose another folder")
        if found is None or not begun:
            if found is None or config is not None or found.suffix != suffix:
                # An attempt that failed before its first epoch may have left another run.json.
                content = {"format": RUN_FORMAT, "version": 1, "config": config or {}, "made_with": versions()}
                extra = {} if suffix == ".pt" else {"checkpoint_suffix": suffix}
                _files.write_json(self.run_json, content | extra)
            return
        if not resume:
            raise FileExistsError(f"{self.path} holds a run; resume=True continues it, or choose another run_dir")
        if found.suffix != suffix:
            ends = f"holds a run whose checkpoints end in {found.suffix!r}, not {suffix!r}"
            raise ValueError(f"{self.given}: {ends}; choose another folder")
        if config is not None:
            check_same(f"the run in {self.given} was", found.config, config)

    def holds(self, path: AnyPath) -> bool:
        """Tell whether a path is that of a file of the run: its plan and its comparison too, not a report beside it."""
        real, top = _files.absolute(path).resolve(), self.path.resolve()
        files = (self.run_json, self.history, self.resume, self.previous_resume, self.plan, *self.comparisons)
        folders = {top / p.name for p in (self.checkpoints, self.targets, self.predictions)}
        return real in {top / p.name for p in files} or bool(folders & {real, *real.parents})

    @classmethod
    def of(cls, path: AnyPath) -> RunFolder | None:
        """The run folder that holds a file, or None."""
        for folder in map(cls, _files.absolute(path).resolve().parents):
            if (folder.run_json.is_file() or folder.history.is_file()) and folder.holds(path):
                return folder
        return None

    # --- checkpoints ---

    def checkpoint(self, epoch: int, suffix: str = ".pt") -> Path:
        """Path of one epoch's checkpoint, whether it exists or not."""
        return self.checkpoints / f"epoch_{epoch:05d}{suffix}"

    def prediction(self, epoch: int) -> Path:
        """Path of the kept predictions of one epoch, whether it exists or not."""
        return self.predictions / f"epoch_{epoch:05d}.npy"

    def discard(self, epoch: int, suffix: str) -> None:
        """Delete one epoch's checkpoint, and predictions that it made, so that they do not come back."""
        for path in (self.prediction(epoch), self.checkpoint(epoch, suffix)):
            if path.exists():
                remove_checkpoint(path)
                _files.sync(path.parent)

    def write_checkpoint(self, epoch: int, suffix: str, write: Callable[[Path], object]) -> None:
        """Have `write(path)` store one epoch's checkpoint, in place of what a crash left under its name."""
        path = self.checkpoint(epoch, suffix)
        remove_checkpoint(path)
        write(path)
        if not path.exists():
            hint = "`save` must not return before the file is written"
            raise FileNotFoundError(f"{path}: `save` returned, but there is no such file; {hint}")
        _files.sync_tree(path)  # of somebody who did not

    def remove_unrecorded(self, epochs: tuple[int, ...], suffix: str) -> None:
        """Delete checkpoints of epochs that are not among `epochs`: a crash left them."""
        for epoch, path in self.stored(suffix).items():
            if row_of(epoch, epochs) is None:
                remove_checkpoint(path)

    def stored(self, suffix: str) -> dict[int, Path]:
        """{epoch: path} of the checkpoints in the folder; a path for each recorded epoch would cost time and memory."""
        files = {int(p.name.removeprefix("epoch_").removesuffix(suffix)): p for p in self._checkpoint_files(suffix)}
        return {epoch: path for epoch, path in files.items() if path == self.checkpoint(epoch, suffix)}

    def _delete_run(self) -> None:
        """Delete the run's files: first what others begin with, so that a kill leaves no half of a run."""
        if self.run_json.exists() and not self.history.exists():
            self.read()  # raises for another tool's run.json
        self.delete(self.resume, self.previous_resume)
        self.clear()
        for path in self.checkpoints.glob("epoch_*") if self.checkpoints.is_dir() else ():
            if re.fullmatch(r"epoch_\d{5,}(\.\w+)+", path.name, re.ASCII):
                remove_checkpoint(path)
                _files.sync(self.checkpoints)
        self.delete(self.run_json)

    def _checkpoint_files(self, suffix: str) -> list[Path]:
        named = re.compile(r"epoch_\d{5,}" + re.escape(suffix))
        return sorted(p for p in self.checkpoints.glob("epoch_*") if named.fullmatch(p.name))

    def clear(self) -> None:
        """Delete the history, and the plan and the comparison that were made from it."""
        self.delete(self.plan, self.comparisons[0], self.history)

    def delete(self, *paths: Path) -> None:
        """Delete files of the folder before anything that follows: what was deleted does not come back."""
        for path in paths:
            path.unlink(missing_ok=True)
        _files.sync(self.path)


def checked_suffix(suffix: Any) -> str:
    """Check the end of a file's name. run.json may come from a stranger, and must not lead to another folder."""
    if not isinstance(suffix, str) or not re.fullmatch(r"(\.\w+)+", suffix, re.ASCII):
        raise ValueError(f"suffix: expected the end of a file's name, like '.pt', got {suffix!r}")
    return suffix


def check_same(what: str, found: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError, which names the key, where a stored configuration differs from the one that is given."""
    for key in sorted(given.keys() | found.keys()):
        if found.get(key) != given.get(key) and json.dumps(found.get(key)) != json.dumps(given.get(key)):  # NaN is NaN
            differ = f"{what} made with {found.get(key)!r}, not {given.get(key)!r}"
            if any(re.fullmatch("[0-9a-f]{16,}", str(content.get(key))) for content in (found, given)):
                differ = f"{what} made with other {key} (the digests differ; the order counts)"
            raise ValueError(f"{key}: {differ}; choose another folder")


def row_of(epoch: int, epochs: Sequence[int]) -> int | None:
    """Row of an epoch among ascending numbers; None if it is not there."""
    row = bisect_left(epochs, epoch)
    return row if row < len(epochs) and epochs[row] == epoch else None


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, a file or a folder, such that no half of it keeps its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path.rename(_files.unpredictable(path)))
    else:
        path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of what computes, read from the packages' metadata: importing torch for it would take a second."""
    from importlib import metadata  # slow to import, and needed once a run

    found = {"python": sys.version.split()[0]}
    for name in ("fmn_ref", "numpy", "torch", *(name for name in _FRAMEWORKS if name in sys.modules)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
