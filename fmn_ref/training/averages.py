"""Weighted means of checkpoints, tensor by tensor: the files are read in parts, so that memory stays small.

`average_checkpoints` writes the mean to disk without a network; `averaged_model` in ensemble.py makes a network of it.
"""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _check, _files
from .._stderr import progress_bar
from ..runs import checkpoints, references, tensors
from ..runs.run import Run

_FACTOR = re.compile(r"(^|\.)(lora|vera|oft|boft|hada|lokr)_")  # of adapters whose weight is a product of tensors
_KEPT_FILES = ("config.json", "generation_config.json")  # which from_pretrained needs beside the weights


class Source(NamedTuple):
    """The state_dict of a checkpoint, not read yet, and its share of the mean."""

    path: Path
    share: float
    state: dict[str, Any]


def average_checkpoints(
    run: Run | Sequence[_files.AnyPath],
    weights: dict[int, float],
    out: _files.AnyPath,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool | None = None,
) -> Path:
    """Average checkpoints on disk into a folder of safetensors, whatever their size.

    No network is made, and no checkpoint is read as a whole: 350 MB are enough, torch included. The mean is computed in
    float64. Each tensor keeps its type; where the checkpoints differ, it gets one that holds both. Weights that are
    tied in all checkpoints are stored once. Integers come from the latest checkpoint. Running statistics of BatchNorm
    are averaged too: `averaged_model` recomputes them, which is better.

    Parameters
    ----------
    run : Run or sequence of paths
        A run, or checkpoints in their order: files of torch.save that hold a state_dict, safetensors files, or folders
        with one of these under the names that `save_pretrained` gives, in shards or not. All of one network.
    weights : dict of {int: float}
        Weight of each row of the run, or of each path by its position, at least 0; scaled to sum 1. Checkpoints of
        weight 0 are not read. For averaged KF: ``plan.weights``.
    out : path
        Folder to make. It receives model.safetensors, or shards and model.safetensors.index.json. The config.json of a
        folder of checkpoints is copied, so that ``from_pretrained(out)`` works.
    max_shard_bytes : int, default 5_000_000_000
        Most bytes of a file; a larger tensor has a file of its own.
    progress : bool, optional
        Show a progress bar; default: if standard error is a terminal.

    Returns
    -------
    Path
        `out`, as an absolute path.

    Raises
    ------
    TypeError
        `run` or `weights` is of another type.
    ValueError
        No weight above 0; an epoch out of range; a checkpoint that is damaged, has other tensors than the latest one,
        or holds NaN; infinite, 8-bit or adapter weights that differ. The message names the file, and nothing is left.
    FileNotFoundError
        A checkpoint, a shard, or the folder in which to make `out`, is missing.
    FileExistsError
        `out` exists.

    Examples
    --------
    >>> import tempfile, torch, fmn_ref as fmn
    >>> folder = tempfile.mkdtemp()
    >>> for epoch in (1, 2):
    ...     torch.save({"weight": torch.tensor([float(epoch)])}, f"{folder}/epoch_{epoch}.pt")
    >>> files = [f"{folder}/epoch_1.pt", f"{folder}/epoch_2.pt"]
    >>> average_checkpoints(files, {0: 0.5, 1: 0.5}, f"{folder}/mean").name
    'mean'

    References
    ----------
    Izmailov et al. 2018, arXiv 1803.05407 (SWA); Wortsman et al. 2022, arXiv 2203.05482 (model soups).
    """
    most, target = _check.number(max_shard_bytes, 1, 2**62, "max_shard_bytes", int), _files.absolute(out)
    if os.path.lexists(target):
        raise FileExistsError(f"{out}: exists; choose a new folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {target.parent} does not exist")
    sources = open_sources(_chosen_paths(run, weights), getattr(run, "model", None))
    excluded = left_out(run.model) if isinstance(run, Run) and isinstance(run.model, nn.Module) else set()
    names, tied = _untied(sources)
    bar = progress_bar(None, "averaging", progress=progress, unit="B", unit_scale=True)
    new = [_new_tensor(name, sources, excluded, bar.update) for name in names]
    bar.total = sum(tensor.nbytes for tensor in new)
    _files.remove_leftovers(target.parent, target.name)
    temporary = _files.unpredictable(target)
    temporary.mkdir()
    try:
        with bar:
            tensors.write_shards(temporary, new, tied, most)
        for name in _KEPT_FILES:
            if (sources[-1].path / name).is_file():
                _files.write_bytes(temporary / name, _files.read_bytes(sources[-1].path / name))
        temporary.rename(target)
        _files.sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _chosen_paths(run: Any, weights: Any) -> Iterable[tuple[Path, float]]:
    """Check the arguments; yield path and share of each checkpoint with a weight above 0."""
    if isinstance(run, Run):
        return ((run.checkpoint(row), share) for row, share in shares_of(weights, len(run.history)))
    if not isinstance(run, (list, tuple)) or not all(isinstance(path, (str, os.PathLike)) for path in run):
        raise TypeError(f"run: expected a Run or a list of paths, got {type(run).__name__}")
    return ((_files.absolute(run[i]), share) for i, share in shares_of(weights, len(run)))


def shares_of(weights: Any, n_epochs: int) -> list[tuple[int, float]]:
    """Check the weights; return (row, weight) in order of rows, with weights of sum 1."""
    if not isinstance(weights, dict):
        raise TypeError(f"weights: expected {{epoch: weight}}, got {type(weights).__name__}")
    rows = [(_check.index(e, n_epochs, "epoch"), _check.number(w, 0, 1e300, "weights")) for e, w in weights.items()]
    total = sum(w for _, w in rows)
    if total == 0:
        raise ValueError("weights: expected at least one above 0")
    return [(row, weight / total) for row, weight in sorted(rows) if weight / total > 0]


def open_sources(chosen: Iterable[tuple[Path, float]], model: Any = None) -> list[Source]:
    """Open checkpoints; ValueError, which names the file, where one has other tensors than the latest."""
    sources = [Source(path, share, _read_state(path, model)) for path, share in chosen]
    latest = sources[-1]
    if not latest.state:
        raise ValueError(f"{latest.path}: holds no tensor")
    for source in sources[:-1]:
        names = sorted(map(str, source.state.keys() ^ latest.state.keys()))
        names = names or [n for n, value in source.state.items() if _form(value) != _form(latest.state[n])]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{source.path}: does not fit {latest.path}: they differ in {', '.join(names[:3])}{more}")
    return sources


def _read_state(path: Path, model: Any) -> dict[str, Any]:
    """Open a checkpoint; one that a run refers to has the names of the run's network, if there is one."""
    if references.is_reference(path) and isinstance(model, nn.Module):
        return references.load_state(path, checkpoints.unwrap(model), lazily=True)
    return tensors.read_state(references.check_unchanged(path) if references.is_reference(path) else path)


def _form(value: Any) -> tuple[Any, ...]:
    """Shape of a tensor, and whether it can be averaged."""
    return tuple(getattr(value, "shape", ())), _is_fraction(value)


def _is_fraction(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)


def _untied(sources: list[Source]) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors to store, and the other names of tied ones: {other name: stored name}."""
    first, tied = dict[Any, str](), dict[str, str]()
    for name, value in sources[-1].state.items():
        if not tensors.is_dense(value):
            hint = "give files that hold a state_dict alone, or a run of from_checkpoints"
            raise ValueError(f"{sources[-1].path}: expected tensors, but {name!r} is a {_kind(value)}; {hint}")
        places = tuple(_place(source.state[name]) for source in sources)
        kept = first.setdefault(places, name)
        if kept != name:
            tied[name] = kept
    return list(first.values()), tied


def _place(value: Any) -> Any:
    """Return what is equal for tensors that share their memory, as tied weights do."""
    if not isinstance(value, tensors.FileTensor):
        return checkpoints.memory(value)
    return value if math.prod(value.shape) else id(value)


def _kind(value: Any) -> str:
    return f"tensor of {value.layout}" if isinstance(value, Tensor) else type(value).__name__


def _new_tensor(
    name: str, sources: list[Source], excluded: Collection[str], done: Callable[[int], object]
) -> tensors.NewTensor:
    """Describe a tensor of the mean, which is computed when its parts are read."""
    values = [source.state[name] for source in sources]
    dtype = _common_dtype(values) if _is_averaged(name, sources, excluded) else values[-1].dtype

    def parts() -> Iterator[Tensor]:
        for part, _ in averaged_parts(name, sources, excluded):
            yield part
            done(part.numel() * dtype.itemsize)

    return tensors.NewTensor(name, dtype, tuple(values[-1].shape), parts)


def _common_dtype(values: list[Any]) -> torch.dtype:
    """Return the type of all tensors, or the narrowest one that holds the values of all."""
    dtypes: list[torch.dtype] = [value.dtype for value in values]
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return reduce(torch.promote_types, [torch.float32 if d.itemsize == 1 else d for d in dtypes])


def _is_averaged(name: str, sources: list[Source], excluded: Collection[str]) -> bool:
    return name not in excluded and _is_fraction(sources[-1].state[name])


def averaged_parts(name: str, sources: list[Source], excluded: Collection[str]) -> Iterator[tuple[Tensor, bool]]:
    """Yield a tensor of the mean in flat parts, and whether the part is the same in all checkpoints.

    A mean comes in 64-bit numbers. Integers, and buffers to exclude, are those of the latest checkpoint.
    """
    return (_mean_parts if _is_averaged(name, sources, excluded) else _latest_parts)(name, sources, excluded)


def _mean_parts(name: str, sources: list[Source], excluded: Collection[str]) -> Iterator[tuple[Tensor, bool]]:
    first, *others = (tensors.parts(source.state[name]) for source in sources)
    for part in first:
        total, same = sources[0].share * _wide(part), True
        for source, stream in zip(sources[1:], others, strict=True):
            other = next(stream)
            same = same and _is_same(part, other)
            total += source.share * _wide(other)
        if same:
            total = _wide(part)
        else:
            _check_averageable(name, part.dtype, sources[-1].path)
        if total.isnan().any() or not (same or total.isfinite().all()):
            _raise_not_finite(name, sources)
        yield total, same


def _latest_parts(name: str, sources: list[Source], excluded: Collection[str]) -> Iterator[tuple[Tensor, bool]]:
    *others, latest = (tensors.parts(source.state[name]) for source in sources)
    for part in latest:
        if part.dtype in (torch.int8, torch.uint8) and name not in excluded:
            for source, stream in zip(sources, others, strict=False):
                if not _is_same(part, next(stream)):
                    _check_averageable(name, part.dtype, source.path)
        yield part, True


def _wide(part: Tensor) -> Tensor:
    return part.to(torch.complex128 if part.is_complex() else torch.float64)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Compare bits: some types of 8 bits know no comparison."""
    return a.dtype == b.dtype and torch.equal(*(t.resolve_conj().contiguous().view(torch.uint8) for t in (a, b)))


def _check_averageable(name: str, dtype: torch.dtype, path: Path) -> None:
    """Refuse tensors that differ and whose mean would be wrong."""
    if dtype.itemsize == 1:
        hint = "scales beside them give their size; convert the checkpoints to 16 bits first"
        raise ValueError(f"{path}: {name} has weights of 8 bits, whose mean would be wrong: {hint}")
    if _FACTOR.search(name):
        hint = "merge each adapter into its base first"
        raise ValueError(f"{path}: {name} is a factor of a product, and factors cannot be averaged apart; {hint}")


def _raise_not_finite(name: str, sources: list[Source]) -> None:
    for source in sources:
        if not all(part.isfinite().all() for part in map(_wide, tensors.parts(source.state[name]))):
            fault = f"{source.path}: {name} holds NaN or infinity"
            raise ValueError(f"{fault}, which no average can have; leave the epoch out")


def left_out(model: nn.Module) -> set[str]:
    """Names, as in a checkpoint, of a network's buffers that no average averages: see `averaged_tensors`."""
    inner = checkpoints.unwrap(model)
    others = {name: b for name, b in inner.named_buffers() if not is_statistic(name)}
    ids = set(map(id, others.values()))
    renamed = (name for name, value in inner.state_dict(keep_vars=True).items() if id(value) in ids)
    return {checkpoints.uncompiled(name) for name in (*others, *renamed)}


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a network, by name, that an average of networks averages: parameters and running statistics.

    Running statistics are buffers with names that begin with "running_". Other buffers are not averaged, such as the
    unit vectors of a power iteration and counters; nor are integers.
    """
    named = chain(model.named_parameters(), ((n, b) for n, b in model.named_buffers() if is_statistic(n)))
    return {name: t for name, t in named if t.is_floating_point() or t.is_complex()}


def is_statistic(name: str) -> bool:
    return name.rpartition(".")[2].startswith("running_")


@torch.no_grad()
def load_mean(model: nn.Module, sources: list[Source]) -> set[str]:
    """Load the mean of checkpoints into a network.

    Returns
    -------
    set of str
        Names of the network's layers with the same running statistics in all checkpoints.
    """
    own = {checkpoints.uncompiled(name): (name, value) for name, value in model.state_dict().items()}
    excluded, latest, steady = left_out(model), sources[-1], dict[str, bool]()
    state = copy.copy(latest.state)  # with its _metadata
    for name, value in latest.state.items():
        is_mean = _is_averaged(name, sources, excluded)
        if is_mean and not tensors.is_dense(value):
            raise ValueError(f"{latest.path}: expected weights that are dense, but {name} is a {_kind(value)}")
        if tensors.is_dense(value):  # else an extra state, or a buffer
            known, target = own.get(name, (name, value))
            dtype = target.dtype if is_mean else value.dtype
            state[name], same = _whole(name, sources, excluded, dtype)
            if is_mean and not state[name].isfinite().all():  # equal infinities are refused too: it is no mask
                _raise_not_finite(name, sources)
            if is_statistic(name):
                layer = known.rpartition(".")[0]
                steady[layer] = steady.get(layer, True) and same
    checkpoints.load_weights(model, checkpoints.renamed(state, model.state_dict()), latest.path)
    return {layer for layer, same in steady.items() if same}


def _whole(name: str, sources: list[Source], excluded: Collection[str], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Compute a tensor of the mean in memory; tell whether it is the same in all checkpoints."""
    whole, at, steady = torch.empty(tuple(sources[-1].state[name].shape), dtype=dtype), 0, True
    for part, same in averaged_parts(name, sources, excluded):
        whole.view(-1)[at : at + len(part)] = part
        at, steady = at + len(part), steady and same
    return whole, steady
