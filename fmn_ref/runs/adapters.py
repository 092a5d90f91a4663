"""Adapters of PEFT: the weights of a network that its checkpoints hold, without the base.

A network of peft whose adapter alone is trained has checkpoints with the names of peft's own files. Any other network
has its whole state_dict. peft is used only where a network is of it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _files

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = "adapter_config.json"
_OF_TRAINING = re.compile("dropout|init|inference|total_step|orth_reg|low_cpu")  # settings without effect on outputs


def adapter_of(model: Any) -> str | None:
    """Name of the only part of a network that is trained: the active adapter; None if there is no such part.

    Running statistics of BatchNorm in the base are trained too, and peft does not store them. Prompts are no adapters
    here: peft stores neither two of them nor the network that makes one.

    Raises
    ------
    ValueError
        Several adapters are active, or one is merged into the base.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel) or model.active_peft_config.is_prompt_learning:
        return None
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(f"model: expected one active adapter, got {active}; choose one with set_adapter")
    merged = next((n for n, part in model.named_modules() if getattr(part, "merged_adapters", None)), None)
    if merged is not None:
        raise ValueError(f"model: an adapter is merged into {merged}, so that the base is another; unmerge it first")
    held = {t.data_ptr() for t in _adapter_state(model, active[0]).values()}
    return active[0] if all(t.data_ptr() in held for t in _changing(model)) else None


def _changing(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a training changes: parameters that have gradients, and running statistics."""
    yield from (p for p in model.parameters() if p.requires_grad)
    yield from (b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("running_"))


def _adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    """Weights that a checkpoint of a network holds: those of the adapter, if it alone is trained, or the state_dict."""
    name = adapter_of(model)
    return model.state_dict() if name is None else _adapter_state(model, name)


def base_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a network that its checkpoints do not hold, with their names; none if they hold all."""
    name = adapter_of(model)
    if name is not None:
        held = {t.data_ptr() for t in _adapter_state(model, name).values()}
        for part in (model.named_parameters(), model.named_buffers()):
            yield from ((n, t) for n, t in part if t.data_ptr() not in held)


def load_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load what `state_of` returned. The base never changes: other networks may share it.

    Raises
    ------
    RuntimeError
        The weights do not fit, or hold a base that is another than the network's.
    """
    name = adapter_of(model)
    if name is None:
        model.load_state_dict(state)
        return
    from peft import set_peft_model_state_dict

    own, whole = _adapter_state(model, name), model.state_dict()
    held = {t.data_ptr() for t in own.values()}
    base = {n: t for n, t in whole.items() if n not in own and getattr(t, "data_ptr", int)() not in held}
    for n in sorted(base.keys() & state.keys()):
        _check_same(n, base[n], state[n])
    weights = {n: value for n, value in state.items() if n not in base}
    if weights.keys() == own.keys():
        set_peft_model_state_dict(model, weights, adapter_name=name)
    elif weights.keys() == whole.keys() - base.keys():  # the whole network, as `train` stored it once
        model.load_state_dict(weights, strict=False)
    else:
        missing, left_over = sorted(own.keys() - weights.keys())[:5], sorted(map(str, weights.keys() - own.keys()))[:5]
        raise RuntimeError(f"missing {missing}; left over {left_over}")


def _check_same(name: str, own: Any, value: Any) -> None:
    """Refuse a tensor of the base that is another, apart from rounding to the file's precision."""
    import torch

    if isinstance(own, torch.Tensor) and (own.shape != value.shape or not torch.equal(own.to(value), value)):
        hint = "load one of the checkpoints first: PeftModel.from_pretrained(base, CHECKPOINT_FOLDER)"
        raise RuntimeError(f"{name} of the base is another than the model's; {hint}")


def hint(model: nn.Module, path: Path) -> str:
    """Say, if the checkpoint is an adapter, why it does not fit a network that has none or is trained elsewhere too."""
    if not (path.parent / CONFIG).is_file() or adapter_of(model) is not None:
        return ""
    if hasattr(model, "peft_config"):
        return "; it is an adapter, and more of the model is trained: weights that are not frozen, or BatchNorm"
    return "; it is an adapter, for PeftModel.from_pretrained(base, CHECKPOINT_FOLDER)"


def check_config(model: nn.Module, folder: Path) -> None:
    """Refuse an adapter whose settings are others than the model's: tensors of the same shapes would compute otherwise.

    Raises
    ------
    ValueError
        The message names the file and the settings.
    """
    path, name = folder / CONFIG, adapter_of(model)
    if name is None or not path.is_file():
        return
    with _files.reading(path, "the settings of an adapter") as file:
        stored = json.loads(file.read())
        if not isinstance(stored, dict):
            raise ValueError("it holds no object")
    own: dict[str, Any] = model.peft_config[name].to_dict()  # type: ignore[union-attr, index]
    own = json.loads(json.dumps(own, default=str))
    numbers = {n for n, value in own.items() if _is_setting(value) and not _OF_TRAINING.search(n)}
    different = [
        f"{n} {stored[n]} there, {own[n]} here" for n in sorted(numbers & stored.keys()) if stored[n] != own[n]
    ]
    if different:
        hint = "make the model with PeftModel.from_pretrained(base, CHECKPOINT_FOLDER)"
        raise ValueError(f"{path}: settings of another adapter than the model's: {', '.join(different)}; {hint}")


def _is_setting(value: Any) -> bool:
    """Tell a number, or a dict of numbers such as a pattern of ranks."""
    return isinstance(value, (bool, int, float)) or (isinstance(value, dict) and all(map(_is_setting, value.values())))
