"""Read the weights of a network from the checkpoints that other programs wrote; nothing from a file runs.

A checkpoint is a file of torch.save or safetensors, an index with its shards, or a folder of
torch.distributed.checkpoint. The state_dict in it is found by the names of the network's own weights.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _files
from . import adapters, distributed_files, torch_files
from .tensors import FileTensor, loaded, read_safetensors

if TYPE_CHECKING:
    from torch import nn

ENDINGS = (".pth.tar", ".pt", ".pth", ".ckpt", ".bin", ".safetensors")
INDEX = ".index.json"
PREFIXES = ("module", "_orig_mod", "model", "net")  # of wrappers: DDP, torch.compile, Lightning and others
COUNTERS = ("epoch", "global_step", "step", "iter", "iteration")  # names in containers
_DEPTH = 4  # levels of a container that are searched
_SHOWN = 5  # names in a message
_AVERAGED = {"ema", "averaged", "swa", "shadow"}


def files_of(path: Path) -> list[Path]:
    """List the files of a checkpoint; ValueError for an index that names a file elsewhere, or one that is missing."""
    if path.is_dir():
        return distributed_files.files_of(path)
    if not path.name.endswith(INDEX):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_weight_map(path).values())))]


def _weight_map(index: Path) -> dict[str, str]:
    """File of each tensor, by name."""
    with _files.reading(index, "the index of a checkpoint in shards") as file:
        content = json.loads(file.read())
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("it has no weight_map")
        for name in sorted(set(found.values())):
            shard = index.parent / name
            if Path(name).name != name or shard.is_symlink() or not shard.is_file():
                raise ValueError(f"its shard {name!r} is not in the folder")
        return found


def read_content(path: Path) -> Any:
    """Read what a checkpoint holds, to the CPU. Of a distributed one: meta tensors, for `read_state` to load."""
    if path.is_dir():
        return distributed_files.outline(path)
    if not path.name.endswith(INDEX):
        return _read_file(path)
    places, merged = _weight_map(path), {}
    for name in sorted(set(places.values())):
        shard = _read_file(path.parent / name)
        absent = [key for key, where in places.items() if where == name and key not in shard]
        if absent:
            raise ValueError(f"{path.parent / name}: lacks {_some(absent)}, which {path.name} says it holds")
        merged.update({key: shard[key] for key, where in places.items() if where == name})
    return merged


def _read_file(path: Path) -> Any:
    return (
        torch_files.load(path, foreign=True, mapped=True) if path.suffix != ".safetensors" else read_safetensors(path)
    )


def counter_of(content: Any, name: str) -> int | None:
    """The epoch or step that a container holds under a name, or in its "meta"; None if there is none."""
    for place in (content, content.get("meta") if isinstance(content, Mapping) else None):
        value = place.get(name) if isinstance(place, Mapping) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def read_state(
    path: Path, model: nn.Module, key: str | None = None, lazily: bool = False
) -> tuple[dict[str, Any], str]:
    """Read a network's weights from a checkpoint.

    Parameters
    ----------
    path : Path
    model : nn.Module
        Names of its weights and buffers decide which dict of the file is taken, and which prefixes are removed.
    key : str, optional
        Which dict, where several fit: "model_ema", or "a.b" for one inside another; "" is the whole file.
    lazily : bool, default False
        Leave tensors of safetensors files where they are, as FileTensors.

    Returns
    -------
    state : dict
        For `model.load_state_dict`.
    key : str

    Raises
    ------
    ValueError
        No dict fits, or several do; the message lists what is missing and left over.
    """
    content = read_content(path)
    found = {name: state for name, state in _states(content, "", _DEPTH) if key is None or name == key}
    if not found:
        known = [name for name, _ in _states(content, "", _DEPTH)]
        if known == [""] and key:
            raise ValueError(f"{path}: no state_dict at key {key!r}; the file itself is one, which needs no key")
        wanted = "a state_dict" if key is None else f"a state_dict at key {key!r}"
        places = [repr(name) if name else "the file itself (key '')" for name in known]
        raise ValueError(f"{path}: expected {wanted}, got {_some(places) or type(content).__name__}")
    adapters.check_config(model, path.parent)
    names = _Names(model)
    fitting = {name: fit for name, state in found.items() if (fit := names.fit(state)) is not None}
    if not fitting:
        raise ValueError(f"{path}: does not fit the model: {names.differences(found)}{adapters.hint(model, path)}")
    chosen = _choose(path, fitting) if key is None else key
    taken = {own: found[chosen][name] for own, name in fitting[chosen].items()}
    if path.is_dir():
        taken = distributed_files.read_tensors(path, taken)
    if not lazily:
        taken = {name: loaded(value) for name, value in taken.items()}
    return names.completed(taken), chosen


def _states(content: Any, name: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each dict that holds tensors, with its key."""
    if not isinstance(content, Mapping) or depth == 0:
        return
    texts = {key: value for key, value in content.items() if isinstance(key, str)}
    if _n_tensors(texts):
        yield name, texts
    for key, value in texts.items():
        yield from _states(value, f"{name}.{key}" if name else key, depth - 1)


def _n_tensors(state: Mapping[str, Any]) -> int:
    import torch

    return sum(isinstance(value, (torch.Tensor, FileTensor)) for value in state.values())


def _choose(path: Path, fitting: Mapping[str, Any]) -> str:
    """The only dict that fits, averaged copies apart."""
    plain = [name for name in fitting if not _AVERAGED & set(re.split("[^a-z]+", name.lower()))]
    if len(plain) == 1:
        return plain[0]
    what = "several state_dicts fit" if plain else "only averaged weights fit"
    raise ValueError(f"{path}: {what}: {_some(map(repr, fitting))}; choose with key=")


class _Names:
    """Names of a network's own weights, and how those of a file fit them."""

    def __init__(self, model: nn.Module) -> None:
        adapted = adapters.adapter_of(model) is not None
        self.state = adapters.state_of(model) if adapted else model.state_dict(keep_vars=True)
        known = self.state | (model.state_dict() if adapted else {})  # peft may store a part of the base too
        self.own = {_without(name, "_orig_mod"): name for name in known}
        first: dict[int, str] = {}
        self.same = {name: first.setdefault(id(t), name) for name, t in known.items()}  # of tied weights

    def fit(self, state: Mapping[str, Any]) -> dict[str, str] | None:
        """Names in the file by the network's own, or None where they do not fit exactly."""
        for names in _stripped(state):
            if len(set(names.values())) == len(names) and set(names.values()) <= set(self.own):
                found = {self.own[stripped]: name for name, stripped in names.items()}
                if not self.missing(found):
                    return found
        return None

    def missing(self, found: Mapping[str, Any]) -> list[str]:
        """Own names that are not found; not those tied to one that is, nor counters that old versions did not save."""
        there = {self.same[name] for name in found}
        return [n for n in self.state if self.same[n] not in there and not n.endswith("num_batches_tracked")]

    def completed(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add tied weights and counters that the file lacks."""
        there = {self.same[name]: value for name, value in state.items()}
        absent = {name: value for name, value in self.state.items() if name not in state}
        return state | {n: there.get(self.same[n], value.detach() * 0) for n, value in absent.items()}

    def differences(self, found: Mapping[str, Mapping[str, Any]]) -> str:
        """List what is missing and left over in the dict of the file that fits best."""

        def closeness(key: str, names: Mapping[str, str]) -> tuple[int, int]:
            return len(set(names.values()) & set(self.own)), _n_tensors(found[key])

        key, names = max(((k, n) for k, s in found.items() for n in _stripped(s)), key=lambda pair: closeness(*pair))
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        parts = {"missing": self.missing({self.own[n]: n for n in names.values() if n in self.own})}
        parts |= {"left over": [name for name, n in names.items() if n not in self.own], "there twice": twice}
        listed = "; ".join(f"{what} {_some(some)}" for what, some in parts.items() if some)
        return listed + (f" (in {key!r})" if key else "")


def _stripped(state: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the names of a file without the prefixes of wrappers, by the names themselves: less and less of them."""
    names = {name: _without(name, "_orig_mod") for name in state}
    yield names
    for part in ("", "module"):  # DataParallel may wrap a part of the network
        current = {name: _without(short, part) for name, short in names.items()} if part else names
        if part:
            yield current
        while current and (shared := {n.partition(".")[0] for n in current.values()}) and len(shared) == 1:
            if not shared <= set(PREFIXES):
                break
            current = {name: n.partition(".")[2] for name, n in current.items()}
            yield current


def _without(name: str, part: str) -> str:
    return ".".join(p for p in name.split(".") if p != part)


def _some(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
