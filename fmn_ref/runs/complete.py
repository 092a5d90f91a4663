"""Check that checkpoints of a torch network will hold it: names that load again, and every weight that is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_complete(state: Any, model: nn.Module) -> None:
    """Raise a ValueError unless a state of the model can be loaded into it, and leaves out no weight that is trained.

    Where the state's names are not those of the model's tensors, a copy of the model loads it. What Python cannot copy
    is not tried.
    """
    for where in _trained_outside(model):
        hint = "keep it in an nn.ModuleList, an nn.ModuleDict or an nn.ParameterList"
        raise ValueError(f"model: {where} is trained, but no part of the state_dict; {hint}")
    if _has_own_names(state, model):
        return
    try:
        copied = copy.deepcopy(model)
    except Exception:  # of any object that somebody keeps on a module
        return
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    for name in trained:
        copied.get_parameter(name).data.fill_(float("nan"))
    try:
        copied.load_state_dict(copy.copy(state))
    except Exception as error:  # of somebody else's method
        raise ValueError(f"model: its state_dict cannot be loaded into it again: {error}") from None
    for name in trained:
        if copied.get_parameter(name).isnan().any() and not model.get_parameter(name).isnan().any():
            raise ValueError(f"model: {name} is trained, but its state_dict leaves it out")


def _has_own_names(state: Any, model: nn.Module) -> bool:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers, temporary, extra = set[str](), set[str](), set[str]()
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        buffers |= {start + name for name, _ in module.named_buffers(recurse=False)}
        temporary |= {start + name for name in getattr(module, "_non_persistent_buffers_set", ())}
        extra.add(f"{start}_extra_state")
    stored = parameters | (buffers - temporary)
    return isinstance(state, dict) and stored <= state.keys() <= stored | extra


def _trained_outside(model: nn.Module) -> Iterator[str]:
    """Name the weights with gradients that modules hold in plain lists and dicts, where no state_dict finds them."""
    own = set(map(id, model.parameters()))
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        kept = {name: value for name, value in vars(module).items() if isinstance(value, (list, tuple, dict))}
        for name in ("_parameters", "_buffers", "_modules"):
            kept.pop(name, None)
        for where, weight in _weights(kept, ""):
            if id(weight) not in own and weight.is_leaf and weight.grad is not None:
                yield start + where


def _weights(value: Any, where: str, depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors in nested lists and dicts, and the parameters of modules in them."""
    import torch

    if isinstance(value, torch.nn.Module):
        yield from ((f"{where}.{name}", p) for name, p in value.named_parameters())
    elif isinstance(value, torch.Tensor):
        yield where, value
    elif depth and isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _weights(part, f"{where}[{i}]", depth - 1)
    elif depth and isinstance(value, dict):
        for key, part in value.items():
            yield from _weights(part, f"{where}[{key!r}]" if where else str(key), depth - 1)
