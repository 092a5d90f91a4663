"""Hugging Face PEFT: fused models and averages of adapters, with the base in memory once and in no file.

    model = PeftModel.from_pretrained(base, "out/checkpoint-500")
    run = fmn.from_checkpoints("out", model, val_set, "runs/lora")
    plan = fmn.fuse(run.probabilities(val_set), labels, correct=run.history)
    save_fused("lora-fused", plan, run)

`fmn.from_checkpoints`, `RecorderCallback` and `fmn.FusedModel` take a PeftModel as any other network; runs/adapters.py
says which of its weights are a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _check, _files
from ..fusion.plan import FusionPlan
from ..runs import adapters, checkpoints, foreign
from ..runs.run import Run
from ..training import data
from ..training.averages import shares_of
from ..training.copies import duplicate, independent
from ..training.ensemble import FusedModel, attached_model, plan_checkpoints
from .transformers_checkpoints import write_fused

try:
    from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
except ImportError as error:
    raise ImportError(f'{error}; pip install "fmn_ref[peft]"') from error

__all__ = ["averaged_adapter", "load_fused", "save_fused"]
_WEIGHTS = "adapter_model.safetensors"
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to initialise LoRA


def save_fused(folder: _files.AnyPath, plan: FusionPlan, run: Run, processing_class: Any = None) -> None:
    """Write a fused model: plan.json, and a subfolder for each of its adapters that `from_pretrained` loads.

    The base is in no file.

    Parameters
    ----------
    folder : path
        A fused model in it is replaced, once the new one is complete; other files stay. member_00003 is row 3 of the
        run.
    plan : FusionPlan
    run : Run
        With its model attached, a PeftModel.
    processing_class : optional
        Tokenizer or processor, saved in `folder` by its `save_pretrained`.

    Raises
    ------
    TypeError
        The run's model is no PeftModel, or more than an adapter of it is trained.
    ValueError, FileNotFoundError
        As `FusedModel`; another tool's files have the names of those to write. What was in the folder stays.
    """
    original, paths = plan_checkpoints(plan, run)
    name, network = _name_of(original, "run"), independent(original)

    def save(path: Path, member: Path) -> None:
        _save_adapter(checkpoints.load_into(network, path), name, member)

    write_fused(folder, plan, paths, save, processing_class)


def _member(folder: Path, row: int) -> Path:
    return folder / f"member_{row:05d}"


def _save_adapter(network: Any, name: str, folder: Path) -> None:
    network.save_pretrained(folder, selected_adapters=[name])
    if name != "default":  # which peft puts into a subfolder
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        (folder / name).rmdir()


def load_fused(folder: _files.AnyPath, base: nn.Module) -> FusedModel:
    """Load a fused model that `save_fused` wrote.

    Parameters
    ----------
    folder : path
    base : nn.Module
        The network without adapter on which the adapters were trained. It gets the layers of an adapter, and the fused
        model uses its weights: move or change it no more.

    Raises
    ------
    TypeError
        `base` is no module, or has an adapter.
    FileNotFoundError
        `folder` contains no plan.json, or an adapter is missing.
    ValueError
        A file is damaged, or an adapter does not fit the base. The message names it.
    """
    data.check_module(base, "base")
    if isinstance(base, PeftModel) or hasattr(base, "peft_config"):
        raise TypeError("base: expected a network without adapter, got one that has an adapter")
    source = _files.absolute(folder)
    plan = FusionPlan.load(source / "plan.json")
    paths = [_member(source, row) / _WEIGHTS for row in plan.weights]
    for path in paths:
        for file in (path, path.parent / adapters.CONFIG):  # from_pretrained would search the hub
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file")
    try:
        model = _loaded(base, paths[0])
    except Exception as error:  # of any file, and any base
        raise ValueError(f"{paths[0].parent}: not an adapter of this base: {error}") from None
    return FusedModel.of_members(_load_members(model, paths), plan)


def _loaded(base: nn.Module, path: Path) -> Any:
    """Load an adapter. Sizes in its settings take no memory: its weights get theirs from the file."""
    config = PeftConfig.from_pretrained(str(path.parent))
    changing = _changes_base(config)  # peft computes such adapters from the base first, at their full size
    if changing and max([config.r, *config.rank_pattern.values()]) > path.stat().st_size:
        raise ValueError("a rank is larger than the file")
    return PeftModel.from_pretrained(base, str(path.parent), low_cpu_mem_usage=not changing)


def _changes_base(config: Any) -> bool:
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(_CHANGING_BASE)


def _load_members(model: nn.Module, paths: list[Path]) -> Iterator[nn.Module]:
    network = independent(model)
    for path in paths:
        checkpoints.load_weights(network, foreign.read_state(path, network)[0], path)
        yield duplicate(network)


def averaged_adapter(run: Run, weights: dict[int, float], *, rank: int | None = None) -> nn.Module:
    """Average the weights that LoRA adapters add to the base into one adapter, by peft's `add_weighted_adapter`.

    The factors A and B of LoRA are not averaged apart, since the product of means is no mean of products.

    Parameters
    ----------
    run : Run
        With its model attached, a PeftModel with LoRA.
    weights : dict of {int: float}
        Weight of each row of the history, at least 0; scaled to sum 1. For averaged KF: ``plan.weights``.
    rank : int, optional
        Rank of the average, by singular value decomposition. Default: the sum of the ranks, which is exact.

    Returns
    -------
    PeftModel
        In evaluation mode, with one adapter, "default". It uses the base of the run's model.

    Raises
    ------
    TypeError
        `run` is not a Run with a PeftModel, or `weights` is not a dict of numbers.
    ValueError
        Adapters whose mean peft would compute wrongly: those with rsLoRA, DoRA, trained biases, modules or tokens, or
        weights that the initialisation took from the base (PiSSA, OLoRA, CorDA, LoftQ). A `FusedModel` takes them all.
        No weight above 0; an epoch out of range; a checkpoint that does not fit.
    FileNotFoundError
        A checkpoint is missing.

    References
    ----------
    arXiv 2507.08686 ("averaged KF"); the documentation of `add_weighted_adapter` ("cat" and "svd") in peft.
    """
    original: Any = attached_model(run)
    name = _name_of(original, "run")
    config = original.peft_config[name]
    _check_averageable(config)
    rank = None if rank is None else _check.number(rank, 1, 2**31, "rank", int)
    shares = {f"row_{row}": (run.checkpoint(row), share) for row, share in shares_of(weights, len(run.history))}
    network: Any = independent(original)
    for row, (path, _) in shares.items():
        state = adapters.state_of(checkpoints.load_into(network, path))
        network.add_adapter(row, replace(config, init_lora_weights=True))
        set_peft_model_state_dict(network, state, adapter_name=row)
    network.set_adapter(next(iter(shares)))
    for other in [n for n in network.peft_config if n not in shares]:
        network.delete_adapter(other)
    with torch.no_grad():
        options = {"combination_type": "cat"} if rank is None else {"combination_type": "svd", "svd_rank": rank}
        network.add_weighted_adapter(list(shares), [share for _, share in shares.values()], "default", **options)
    network.set_adapter("default")
    for row in shares:
        network.delete_adapter(row)
    return network.eval()  # type: ignore[no-any-return]


def _check_averageable(config: Any) -> None:
    """Refuse settings with which the mean of the adapters is not the mean of the products."""
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        raise ValueError(f"run: expected LoRA adapters to average, got {config.peft_type}")
    faults = {n: getattr(config, n, None) for n in ("use_rslora", "use_dora", "modules_to_save", "target_parameters")}
    faults |= {n: getattr(config, n, None) for n in ("trainable_token_indices", "lora_bias")}
    faults["bias"] = config.bias != "none" and config.bias
    faults["init_lora_weights"] = _changes_base(config) and config.init_lora_weights
    found = [f"{n}={value}" for n, value in faults.items() if value]
    if found:
        raise ValueError(f"run: peft would average adapters with {', '.join(found)} wrongly; use FusedModel")


def _name_of(model: nn.Module, argument: str) -> str:
    name = adapters.adapter_of(model)
    if name is None:
        what = "more than its adapter is trained" if isinstance(model, PeftModel) else f"got {type(model).__name__}"
        raise TypeError(f"{argument}: expected a PeftModel with an adapter that alone is trained; {what}")
    return name
