"""Recipe: the hyper-parameters that `train` and `distill` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .. import _check


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of `train` and `distill`, passed to them by keyword.

    The defaults are METHOD's recipe for CIFAR with ResNet-18 (the papers give none).
    """

    batch_size: int = 128  # over all processes
    optimizer: str = "sgd"  # "sgd" (Nesterov momentum) or "adamw"
    lr: float = 0.1
    momentum: float = 0.9  # sgd only
    weight_decay: float = 5e-4
    schedule: str = "cosine"  # "cosine" to 0, "step" or "constant"; changes between epochs
    milestones: tuple[int, ...] = ()  # epochs at which "step" multiplies lr by gamma
    gamma: float = 0.1
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = True  # the memory format of convolutions' weights and of the images that are on a GPU
    compile: str = "none"  # or a mode of torch.compile; "reduce-overhead" and "max-autotune" use CUDA graphs
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
            object.__setattr__(self, name, value)  # plain numbers, also where NumPy's were given

    @classmethod
    def of(cls, options: dict[str, Any]) -> Recipe:
        """A recipe from keywords; an unknown one is named, with those there are."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"{name}: not an option; there are {', '.join(known)}")
        return cls(**options)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """One kernel for all weights where torch has it (on the CPU and on CUDA)."""
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in model.parameters()) or None
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=self.weight_decay, fused=fused)
        options: dict[str, Any] = {"momentum": self.momentum, "nesterov": self.momentum > 0, "fused": fused}
        return torch.optim.SGD(model.parameters(), self.lr, weight_decay=self.weight_decay, **options)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        milestones = self.milestones if self.schedule == "step" else ()
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), self.gamma)
