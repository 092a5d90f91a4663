"""Make a run of checkpoints that exist: which of them are new, and one pass over those. NumPy only."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from .. import _files, _stderr
from . import references
from .folder import AnyPath, RunFolder
from .recorder import Recorder

_SHARE = 20  # of the time of a pass, at most a twentieth goes into what its bar shows


def check_apart(run_dir: AnyPath, files: dict[int, Path]) -> None:
    """Raise a ValueError if a run is to lie in the folder of the checkpoints."""
    if _files.absolute(run_dir).resolve() == next(iter(files.values())).parent.resolve():
        raise ValueError(f"run_dir: {run_dir} is the folder of the checkpoints; choose another one")


def unrecorded(recorder: Recorder, files: dict[int, Path]) -> dict[int, Path]:
    """Select the checkpoints that are not recorded yet. References to the others follow them where they were moved.

    Raises
    ------
    ValueError
        A recorded file changed, or a new one lies between the recorded ones.
    """
    history = recorder.run.history.epochs if recorder.next_epoch else ()
    new = {epoch: path for epoch, path in files.items() if epoch not in history}
    for epoch, path in new.items():
        if epoch < recorder.next_epoch:
            raise refusal(recorder.folder, f"{path}, which comes before epoch {recorder.next_epoch - 1}")
    for epoch in files.keys() & set(history):
        stored = recorder.folder.checkpoint(epoch, recorder.run.suffix)
        if references.is_reference(stored) and stored.exists():
            references.follow(stored, files[epoch])
    return new


def refusal(folder: RunFolder, what: str) -> ValueError:
    """The error for a run of other checkpoints than `what`."""
    return ValueError(f"run_dir: {folder.given} holds a run of other checkpoints than {what}; choose another folder")


def record_each(
    recorder: Recorder, new: dict[int, Path], record: Callable[[int, Path], float], progress: bool | None
) -> None:
    """Call `record(epoch, path)`, which returns the accuracy, for each checkpoint, with one progress bar.

    The peak forget fraction needs the whole history each time: it is computed as often as the time of the pass allows,
    and after the last checkpoint.
    """
    with _stderr.progress_bar(new.items(), "checkpoints", progress=progress if new else False) as bar:
        due = peak = 0.0
        for n_done, (epoch, path) in enumerate(bar, 1):
            accuracy, now = record(epoch, path), time.monotonic()
            if (now >= due or n_done == len(new)) and not bar.disable:
                peak, due = recorder.peak_forget_fraction, (1 + _SHARE) * time.monotonic() - _SHARE * now
            bar.set_postfix_str(f"epoch {epoch}, accuracy {accuracy:.1%}, peak F_e {peak:.1%}")
