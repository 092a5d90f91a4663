"""References: small files in a run folder that stand for checkpoints which other programs wrote elsewhere.

A reference holds the checkpoint's path, size and time, and where its state_dict is. NumPy only: torch is loaded when
the checkpoint is.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .. import _files
from .folder import AnyPath, RunFolder

if TYPE_CHECKING:
    from torch import nn

SUFFIX = ".ref.json"
FORMAT = "fmn_ref.reference"


def is_reference(path: AnyPath) -> bool:
    """Tell a reference from a checkpoint, by its name."""
    return str(path).endswith(SUFFIX)


def write_reference(path: Path, *, target: Path, key: str, files: dict[str, Any]) -> None:
    """Write a reference to a checkpoint, with its `stamp` and the key that `foreign.read_state` returned."""
    content = {"format": FORMAT, "version": 1, "path": str(target), "key": key, "files": files}
    _files.write_json(path, content)


def read_reference(path: AnyPath) -> dict[str, Any]:
    """Read a reference; ValueError where it is damaged."""
    content = _files.read_json(path, FORMAT)
    target, key, files = content.get("path"), content.get("key"), content.get("files")
    if not (isinstance(target, str) and isinstance(key, str) and isinstance(files, dict)):
        raise ValueError(f"{path}: not a {FORMAT} file: it lacks path, key or files")
    if not PureWindowsPath(target).root:  # a run may have come from another system
        raise ValueError(f"{path}: expected an absolute path, got {target!r}")
    if not all(map(_is_stamp, files.values())):
        raise ValueError(f"{path}: not a {FORMAT} file: expected size and mtime_ns of each file as integers")
    return content


def _is_stamp(found: Any) -> bool:
    numbers = [found.get(name) for name in ("size", "mtime_ns")] if isinstance(found, dict) else [None]
    return all(type(n) is int and abs(n) < 2**63 for n in numbers)


def exists(path: Path) -> bool:
    """Tell whether a checkpoint is there: the file itself, or what it refers to."""
    return path.exists() and (not is_reference(path) or _is_there(target_of(path), path))


def _is_there(target: Path, reference: Path) -> bool:
    """Tell whether what a reference refers to is there; an OSError, as of too long a path, names both."""
    try:
        return target.exists()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {reference} refers to it", str(target)) from error


def target_of(path: Path) -> Path:
    """The file of a checkpoint: the path itself, or what it refers to."""
    return Path(read_reference(path)["path"]) if is_reference(path) else path


def file_of(folder: RunFolder, epoch: int) -> Path | None:
    """The file of an epoch's checkpoint, or what it refers to; None if the run has none, or it cannot be told."""
    with contextlib.suppress(OSError, ValueError):
        path = folder.checkpoint(epoch, folder.read().suffix)
        return target_of(path) if path.exists() else None
    return None


def check_unchanged(path: Path) -> Path:
    """Return what a reference refers to.

    Raises
    ------
    FileNotFoundError
        It is gone.
    ValueError
        Its size or its time changed.
    OSError
        The system refuses its path.
    """
    target = target_of(path)
    if not _is_there(target, path):
        raise FileNotFoundError(f"{target}: no such checkpoint; {path} refers to it")
    _compare(path, target)
    return target


def check_unless_gone(path: Path) -> None:
    """Raise a ValueError where a checkpoint is a reference to a file that changed."""
    if is_reference(path) and exists(path):
        check_unchanged(path)


def follow(path: Path, target: Path) -> None:
    """Let a reference refer to where its checkpoint was moved; ValueError if it is not the same checkpoint."""
    _compare(path, target)
    if target_of(path) != target:
        content = read_reference(path)
        write_reference(path, target=target, key=content["key"], files=content["files"])


def _compare(path: Path, target: Path) -> None:
    recorded, now = read_reference(path)["files"], stamp(target)
    for name in sorted(now.keys() | recorded.keys()):
        was, is_ = recorded.get(name), now.get(name)
        if was != is_:
            hint = "restore it, or evaluate the checkpoints again into another run_dir"
            if was and is_ and was["size"] == is_["size"]:
                hint = f"if it is a copy, copy it with its time (cp -p, rsync -t); otherwise {hint}"
            file = f"{name} " if name != target.name else ""
            words = f"{file}changed since it was recorded (then {_in_words(was)}, now {_in_words(is_)})"
            raise ValueError(f"{target}: {words}; {hint}")


def _in_words(stamp: Any) -> str:
    if stamp is None:
        return "not there"
    time = datetime.fromtimestamp(stamp["mtime_ns"] / 1e9, UTC).isoformat(" ", "milliseconds")
    return f"{stamp['size']} bytes of {time}"


def stamp(target: Path) -> dict[str, dict[str, int]]:
    """Size and time of each file of a checkpoint that is there, by name."""
    from . import foreign  # loaded late: opening a run needs none of it

    found = {path.name: path.stat() for path in foreign.files_of(target) if path.exists()}
    return {name: {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in found.items()}


def load_state(path: Path, model: nn.Module, lazily: bool = False) -> dict[str, Any]:
    """Read the weights that a reference stands for, under the names of the model."""
    from . import foreign

    return foreign.read_state(check_unchanged(path), model, read_reference(path)["key"], lazily)[0]
