"""Find the checkpoints of a training in a folder, and number them by epoch or step. Standard library only.

Numbers come from the names, in natural order. A file that cannot be placed is left out with a word, and two files that
claim the same number are refused.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import _files
from . import distributed_files, foreign
from .folder import AnyPath, RunFolder
from .torch_files import HDF5, KERAS, OF_KERAS

logger = logging.getLogger(__name__)
_COPIES = {"last", "latest", "best", "final", "newest"}  # of an epoch that has a file of its own
_NO_WEIGHTS = {"optimizer", "optim", "scheduler", "scaler", "rng", "training_args", "random_states"}
_UNFINISHED = re.compile(r"\.(tmp|temp|part|partial|incomplete|crdownload|download|lock)\b|~$", re.IGNORECASE)
_LABELS = {"epoch": "epoch|ep", "step": "global_step|steps?|iter|iteration|update", "checkpoint": "checkpoint|ckpt"}
_NUMBER = r"(?:(?<==)[-+])?\d+(?:\.\d+)?(?:e[-+]?\d+(?![a-z0-9]))?"
_KNOWN: tuple[str, ...] = ("model.safetensors.index.json", "model.safetensors")
_KNOWN += ("pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_A_SHARD = "a shard, by its name"
_SEVERAL = "holds "  # begins the reason why a folder is not one checkpoint
_SHOWN = 8  # files in a message


class _Checkpoint(NamedTuple):
    name: str  # what differs between the checkpoints' paths
    path: Path


def find_checkpoints(
    source: AnyPath | Iterable[AnyPath],
    counter: Callable[[Path, str], Any] = lambda path, name: None,
    endings: tuple[str, ...] = foreign.ENDINGS,
) -> dict[int, Path]:
    """Find checkpoints and their numbers, ascending.

    Parameters
    ----------
    source : path, pattern or list of paths
        A folder is searched one level deep; links in it, and names that say "last", "best" or "optimizer", are left
        out. A text with \\*, ? or [ that is no file is a pattern of `glob`. A list is taken as it is.
    counter : callable(path, name)
        Reads the number that a container holds under a name. Used where file names have no numbers. Default: none.
    endings : tuple of str
        How the names of checkpoints end.

    Returns
    -------
    dict of int to Path
        Files, indexes of shards, or folders of torch.distributed.checkpoint.

    Raises
    ------
    FileNotFoundError
        Nothing is there, or all is left out.
    ValueError
        No numbers, two files of the same number, or names of two schemes.
    """
    if isinstance(source, (str, os.PathLike)):
        found, left_out = _search(source, endings)
    elif isinstance(source, Iterable) and not isinstance(source, bytes):
        source = list(source)
        found, left_out = _listed(source, endings), {}
    else:
        raise TypeError(f"source: expected a folder, a pattern or a list of paths, got {type(source).__name__}")
    if not found:
        unfit = not all(word.startswith(_SEVERAL) for word in left_out.values())
        reasons = f"; left out: {_some(left_out)}" if unfit else _hint(source, endings)
        raise FileNotFoundError(f"{source}: no checkpoints there{reasons}")
    left_out = {name: word for name, word in left_out.items() if word != _A_SHARD}  # the index stands for them
    if left_out:
        logger.warning("%s: left out: %s", source, _some(left_out))
    return dict(sorted(_numbered(found, counter).items()))


def _some(words: Mapping[str, str]) -> str:
    shown = [f"{name} ({word})" for name, word in sorted(words.items())[:_SHOWN]]
    more = [f"and {len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return ", ".join(shown + more)


def _hint(source: Any, endings: tuple[str, ...]) -> str:
    """Say which folder below holds checkpoints, or that those in the folder are of Keras."""
    if isinstance(source, (str, os.PathLike)):
        top = _files.absolute(source)
        if any(name.endswith(KERAS) for name in (os.listdir(top) if top.is_dir() else glob.glob(str(top)))):
            return f"; {OF_KERAS}"
        for pattern in ("*/*", "*/*/*", "*/*/*/*"):
            for path in sorted(top.glob(pattern)):
                if path.name.endswith(endings):
                    return f"; there are some in {Path(source, path.parent.relative_to(top))}"
    return f" (files that end in {', '.join(endings)}, or folders with one of them)"


# --- files ---


def _search(source: AnyPath, endings: tuple[str, ...]) -> tuple[list[_Checkpoint], dict[str, str]]:
    """Find the checkpoints of a folder or a pattern, and what is left out with the reason."""
    top = _files.absolute(source)
    if top.is_dir():
        paths = [Path(entry.path) for entry in os.scandir(top)]
    elif glob.has_magic(str(source)) and not top.exists():
        paths = [Path(path) for path in glob.glob(str(top))]
        top = _shared_folder(paths) if paths else top
    elif top.exists():
        return _listed([top], endings), {}
    else:
        raise FileNotFoundError(f"{source}: no such folder")
    found, left_out = list[_Checkpoint](), dict[str, str]()
    for path in paths:
        name = path.relative_to(top).as_posix()
        word, inside = _verdict(path, name, endings)
        if word:
            left_out[name] = word
        elif inside is not None:
            found.append(_Checkpoint(name, inside))
    alone = len(found) == 1 and found[0].path == _inside(top, endings) and not re.search(r"\d", found[0].name, re.ASCII)
    if alone and _labelled(top.name):  # the folder of one checkpoint has its number
        return _listed([top], endings), left_out
    return found, left_out


def _shared_folder(paths: list[Path]) -> Path:
    """The folder from which the paths' names differ; of a single path, one level higher if that one names an epoch."""
    alone = len(paths) == 1 and not re.search(r"\d", paths[0].name, re.ASCII) and _labelled(paths[0].parent.name)
    return paths[0].parent.parent if alone else Path(os.path.commonpath([path.parent for path in paths]))


def _verdict(path: Path, name: str, endings: tuple[str, ...]) -> tuple[str, Path | None]:
    """Why a path is left out, or the checkpoint that it is; neither for what has nothing to do with checkpoints."""
    folder = path.is_dir()
    relevant = path.name.endswith(endings) or path.name.endswith(foreign.INDEX)
    words = set(re.split(r"[^a-z]+", name.lower()))
    if path.is_symlink():
        return ("a link", None) if folder or relevant else ("", None)
    if folder:
        inside = None if RunFolder(path).run_json.exists() or path.name.startswith(".") else _inside(path, endings)
        if inside is None or isinstance(inside, str):
            return inside or "", None
    else:
        inside = path
        if _UNFINISHED.search(path.name) or path.name.startswith("."):
            return ("unfinished, by its name", None) if any(e in path.name for e in endings) else ("", None)
        if not relevant:
            return "", None
        if not path.is_file():
            return "no regular file", None
    if _has_no_weights(name):
        return "no weights, by its name", None
    if words & _COPIES:
        return "a copy, by its name", None
    if _SHARD.search(path.name) and any(path.parent.glob(f"*{foreign.INDEX}")):
        return _A_SHARD, None
    return _torn(inside), inside


def _has_no_weights(name: str) -> bool:
    return bool(_NO_WEIGHTS & {*re.split(r"[^a-z]+", name.lower()), *re.findall("[a-z]+_[a-z]+", name.lower())})


def _inside(folder: Path, endings: tuple[str, ...]) -> Path | str | None:
    """The checkpoint in a folder of its own; the reason if it cannot be told; None if there is none."""
    if (folder / distributed_files.METADATA).is_file():
        return folder
    if not os.access(folder, os.R_OK | os.X_OK):
        return "may not be read"
    for name in _KNOWN:
        if (folder / name).is_file():
            return "a link inside" if (folder / name).is_symlink() else folder / name
    paths = [p for p in folder.iterdir() if p.name.endswith(endings) and not _has_no_weights(p.name)]
    indexes = [p for p in folder.glob(f"*{foreign.INDEX}") if not p.is_symlink()]
    if len(indexes) == 1:
        return indexes[0]
    files = [p for p in paths if p.is_file() and not p.is_symlink()]
    return files[0] if len(files) == 1 else (f"{_SEVERAL}{len(files)} checkpoints" if files else None)


def _torn(path: Path) -> str:
    """Tell a file that is only half written."""
    if path.is_dir() or path.name.endswith(foreign.INDEX):
        return ""
    size = path.stat().st_size
    if size == 0:
        return "empty"
    with _files.opened(path) as file:
        head = file.read(8)
        file.seek(max(0, size - (1 << 17)))
        if head.startswith(b"PK\3\4"):
            return "" if b"PK\5\6" in file.read() else "half-written"
        if head == HDF5:
            file.seek(0)
            start = file.read(48)  # of versions 0 and 1: the end of the file is in the bytes from 40 on
            end = start[40:48] if start[8] < 2 else start[28:36]
            return "half-written" if size < int.from_bytes(end, "little") else ""
        if path.suffix == ".safetensors":
            return "half-written" if len(head) < 8 or int.from_bytes(head, "little") + 8 > size else ""
    return ""


def _listed(paths: Iterable[AnyPath], endings: tuple[str, ...]) -> list[_Checkpoint]:
    """Name the paths of a list; FileNotFoundError for one that is not there."""
    found = list[tuple[Path, Path]]()
    for given in paths:
        path = _files.absolute(given)
        inside = _inside(path, endings) if path.is_dir() else path
        if not path.exists() or inside is None or isinstance(inside, str):
            raise FileNotFoundError(f"{given}: no such checkpoint{f' ({inside})' if inside and path.exists() else ''}")
        found.append((path, inside))
    top = _shared_folder([path for path, _ in found]) if found else Path()
    return [_Checkpoint(path.relative_to(top).as_posix(), inside) for path, inside in found]


# --- numbers ---


def _numbered(found: list[_Checkpoint], counter: Callable[[Path, str], Any]) -> dict[int, Path]:
    """Give each checkpoint its number."""
    placed = sorted(c for c in found if re.search(r"\d", _stem(c.name), re.ASCII))
    if not placed:
        return _by_content(found, counter)
    unplaced = {c.name: "no number in its name" for c in found if c not in placed}
    if unplaced:
        logger.warning("left out: %s", _some(unplaced))
    labelled = [_labelled(c.name) for c in placed]
    shared = [label for label in _LABELS if all(label in numbers for numbers in labelled)]
    columns = [(label, [numbers[label] for numbers in labelled]) for label in shared]
    if not columns:
        columns = _varying(placed)
    for what, numbers in columns:
        if len(set(numbers)) == len(numbers):
            _check_frames(placed)
            if not shared and len(columns) > 1:
                logger.warning("%s: took %s for the epoch", placed[0].name, what)
            return {_checked(n, c.name): c.path for n, c in zip(numbers, placed, strict=True)}
    what, numbers = columns[0]
    twice = next(n for n, count in Counter(numbers).items() if count > 1)
    first, second, *_ = (c.name for n, c in zip(numbers, placed, strict=True) if n == twice)
    raise ValueError(f"{first} and {second}: both claim {what} {twice}; choose with a pattern or a list")


def _checked(number: int, name: str) -> int:
    if not 0 <= number < 2**62:
        raise ValueError(f"{name}: expected an epoch or a step in [0, 2^62), got {number}")
    return number


def _stem(name: str) -> str:
    return next((name[: -len(e)] for e in (*KERAS, *foreign.ENDINGS, foreign.INDEX) if name.endswith(e)), name)


def _labelled(name: str) -> dict[str, int]:
    """Numbers that a name labels as epoch, step or checkpoint."""
    found = {}
    for label, words in _LABELS.items():
        match = re.search(rf"(?<![a-z])(?:{words})[^a-z0-9./]{{0,2}}(\d+)(?!\d|\.\d)", _stem(name), re.I | re.A)
        if match:
            found[label] = int(match[1])
    return found


def _varying(placed: list[_Checkpoint]) -> list[tuple[str, list[int]]]:
    """Whole numbers, by their place in the name, that differ between the names."""
    rows = [re.findall(_NUMBER, _stem(c.name), re.I | re.A) for c in placed]
    _check_frames(placed)
    columns = [list(column) for column in zip(*rows, strict=True)]
    whole = [(i, list(map(int, column))) for i, column in enumerate(columns) if all(n.isdigit() for n in column)]
    varying = [(f"number {i + 1} of the name", numbers) for i, numbers in whole if len(set(numbers)) > 1]
    if not varying and len(placed) == 1 and whole:
        varying = [(f"number {i + 1} of the name", numbers) for i, numbers in whole][-1:]
    if not varying:
        raise ValueError(f"{placed[0].name}: no epoch or step in the names; name files like epoch_12.pt")
    return varying


def _check_frames(placed: list[_Checkpoint]) -> None:
    """Refuse names that differ in more than numbers: two series may lie in one folder."""
    frames = {re.sub(_NUMBER, "\0", c.name, flags=re.I | re.A): c.name for c in reversed(placed)}  # no name holds \0
    if len(frames) > 1:
        first, second, *_ = sorted(frames.values())
        raise ValueError(f"{first} and {second}: names of two schemes; choose one with a pattern or a list")


def _by_content(found: list[_Checkpoint], counter: Callable[[Path, str], Any]) -> dict[int, Path]:
    """Number checkpoints by what they hold."""
    for name in foreign.COUNTERS:
        numbers = [counter(c.path, name) for c in found]
        if None not in numbers and len(set(numbers)) == len(numbers):
            logger.warning("%s: took %r in the files for the epoch", found[0].name, name)
            return {_checked(n, c.name): c.path for n, c in zip(numbers, found, strict=True)}
    names = ", ".join(sorted(c.name for c in found)[:_SHOWN])
    raise ValueError(f"{names}: no epoch or step, neither in the names nor in the files; name files like epoch_12.pt")
