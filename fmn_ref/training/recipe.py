"""Recipe: the hyper-parameters that `train` and `distill` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .. import _check


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of `train` and `distill`, which take them as keywords.

    The defaults are a common recipe for ResNets on CIFAR (see References); the papers on forgetting give none.

    Parameters
    ----------
    batch_size : int, default 128
        Samples in a step, over all processes.
    optimizer : {"sgd", "adamw"}, default "sgd"
        "sgd" uses Nesterov momentum. Neither takes sparse gradients, as of ``nn.Embedding(sparse=True)``.
    lr : float, default 0.1
        Learning rate at the start.
    momentum : float, default 0.9
        Only for "sgd".
    weight_decay : float, default 5e-4
    schedule : {"cosine", "step", "constant"}, default "cosine"
        How the learning rate changes between epochs. "cosine" falls to 0 at the last epoch.
    milestones : tuple of int, default ()
        Epochs at which "step" multiplies the learning rate by `gamma`.
    gamma : float, default 0.1
    amp : bool, default False
        Train in bfloat16 with autocast.
    channels_last : bool, default True
        Memory format of convolution weights, and of images that are on a GPU. A network that fails in it (in `view`)
        runs in the contiguous format.
    compile : {"none", "default", "reduce-overhead", "max-autotune"}, default "none"
        Mode of `torch.compile`. The last two use CUDA graphs.
    seed : int, default 0
        Decides all random numbers of the training, from torch's generators.

    Raises
    ------
    TypeError, ValueError
        A value of the wrong type or out of range.

    Examples
    --------
    >>> Recipe(lr=0.05, batch_size=64).schedule
    'cosine'

    References
    ----------
    Zagoruyko and Komodakis 2016, arXiv 1605.07146 (optimizer, learning rate, weight decay, batch size); Loshchilov and
    Hutter 2017, arXiv 1608.03983 (cosine schedule).
    """

    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    amp: bool = False
    channels_last: bool = True
    compile: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        number = {"batch_size": _check.number(self.batch_size, 1, 2**31, "batch_size", int)}
        _check.choice(self.optimizer, ("sgd", "adamw"), "optimizer")
        _check.choice(self.schedule, ("cosine", "step", "constant"), "schedule")
        _check.choice(self.compile, ("none", "default", "reduce-overhead", "max-autotune"), "compile")
        for name in ("lr", "momentum", "weight_decay", "gamma"):
            number[name] = _check.number(getattr(self, name), 0, 1e6, name)
        number["seed"] = _check.number(self.seed, 0, 2**32, "seed", int)
        for name in ("amp", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if not isinstance(self.milestones, (list, tuple)):
            raise TypeError(f"milestones: expected a tuple of epochs, got {self.milestones!r}")
        for epoch in self.milestones:
            _check.number(epoch, 0, 2**31, "milestones", int)
        for name, value in number.items():
            object.__setattr__(self, name, value)  # NumPy's numbers become Python's, which JSON can hold

    @classmethod
    def of(cls, options: dict[str, Any]) -> Recipe:
        """Make a recipe from keywords; an unknown keyword raises a TypeError that lists the known ones."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"{name}: unknown keyword; expected one of {', '.join(known)}")
        return cls(**options)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer; fused into one kernel where torch supports it (CPU and CUDA)."""
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in model.parameters()) or None
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay, fused=fused)
        options: dict[str, Any] = {"momentum": self.momentum, "nesterov": self.momentum > 0, "fused": fused}
        return torch.optim.SGD(model.parameters(), self.lr, weight_decay=self.weight_decay, **options)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule, which is stepped once an epoch."""
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        milestones = self.milestones if self.schedule == "step" else ()
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), self.gamma)


def take_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Step the optimizer; sparse gradients, which it does not take, are named."""
    try:
        optimizer.step()
    except RuntimeError as error:
        for name, p in model.named_parameters():
            if p.grad is not None and p.grad.layout != torch.strided:
                hint = "make the embedding with sparse=False"
                raise ValueError(f"model: expected dense gradients, got a sparse one for {name}; {hint}") from error
        raise
