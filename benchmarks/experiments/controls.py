"""Controls that train differently: snapshots, FGE, SWA on its own schedule, EMA of every step, several networks.

Each gives networks; `Mean` makes one predictor of several. What a method calls an epoch here is one pass over the data.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training.data import predict

from . import datasets

if TYPE_CHECKING:
    from .suite import Piece

EMA_DECAYS = (0.98, 0.99, 0.995, 0.998)  # per step


class Mean(nn.Module):
    """log of the mean of the members' probabilities."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        p = sum(m(x).float().softmax(1) for m in self.members) / len(self.members)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def snapshots(piece: Piece, data: datasets.Split, folder: Path, cycles: int = 5) -> list[nn.Module]:
    """Snapshot ensemble (Huang et al. 2017): the epochs in cycles, each a cosine from the full rate to 0."""
    torch.manual_seed(piece.seed)
    model, found = piece.task.make_model(), []
    for i in range(cycles):
        recipe = piece.recipe(piece.seed + 100 * i, epochs=piece.task.epochs // cycles)
        fmn.train(model, data.train, data.select, run_dir=folder / f"snapshot_{i}", keep="every:1000", **recipe)
        found.append(copy.deepcopy(model))
    return found


def fge(piece: Piece, data: datasets.Split, folder: Path, run: fmn.Run) -> list[nn.Module]:
    """Fast geometric ensembling (Garipov et al. 2018): from four fifths of the run on, cycles of two epochs from half
    the rate to 0."""
    start = piece.task.epochs * 4 // 5
    model, found = checkpoints.load_into(piece.task.make_model(), run.checkpoints[start - 1]), []
    for i in range((piece.task.epochs - start) // 2):
        recipe = piece.recipe(piece.seed + 100 * i, epochs=2, lr=piece.task.recipe["lr"] / 2)
        fmn.train(model, data.train, data.select, run_dir=folder / f"fge_{i}", keep="every:1000", **recipe)
        found.append(copy.deepcopy(model))
    return found


def swa(piece: Piece, data: datasets.Split, folder: Path, run: fmn.Run) -> nn.Module:
    """SWA (Izmailov et al. 2018): from three quarters of the run on, half the rate held constant; the mean of the
    epochs' weights with BatchNorm recomputed."""
    start = piece.task.epochs * 3 // 4
    model = checkpoints.load_into(piece.task.make_model(), run.checkpoints[start - 1])
    changes = {"epochs": piece.task.epochs - start, "lr": piece.task.recipe["lr"] / 2, "schedule": "constant"}
    end = fmn.train(model, data.train, data.select, run_dir=folder / "swa", **piece.recipe(piece.seed, **changes))
    return fmn.averaged_model(end, dict.fromkeys(range(len(end.history)), 1.0), data.train)


def ema(piece: Piece, data: datasets.Split) -> nn.Module:
    """EMA of the weights after every step; decay and epoch chosen by selection accuracy, early stopping included."""
    torch.manual_seed(piece.seed)
    model = piece.task.make_model()
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d), use_buffers=True) for d in EMA_DECAYS]
    steps, best, found = 0, -1.0, copy.deepcopy(model)
    per_epoch = max(1, len(data.train[0]) // piece.task.recipe["batch_size"])

    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        nonlocal steps, best, found
        steps += 1
        for average in averages:
            average.update_parameters(model)
            if steps % per_epoch == 0:
                now = score(average.module, data.select)
                if now > best:
                    best, found = now, copy.deepcopy(average.module)

    handle = register_optimizer_step_post_hook(after_step)
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe = piece.recipe(piece.seed)
            fmn.train(model, data.train, data.select, run_dir=folder, keep="none", **recipe)
    finally:
        handle.remove()
    return found


def score(model: nn.Module, samples: datasets.Data) -> float:
    """Accuracy."""
    probs, labels = predict(model, samples)
    return float((probs.argmax(1) == labels).double().mean())


def caruana(probs: NDArray[Any], labels: NDArray[np.int64], rounds: int = 50) -> dict[int, float]:
    """Greedy selection with replacement (Caruana et al. 2004): the epoch that helps the plain mean most, again and
    again; the round with the best selection accuracy counts."""
    total = np.zeros(probs.shape[1:], np.float32)
    chosen: list[int] = []
    best, size = -1.0, 0
    for _ in range(rounds):
        scores = [((total + p).argmax(1) == labels).mean() for p in probs]
        chosen.append(int(np.argmax(scores)))
        total += probs[chosen[-1]]
        if max(scores) > best:
            best, size = max(scores), len(chosen)
    epochs, count = np.unique(chosen[:size], return_counts=True)
    return {int(e): int(c) / size for e, c in zip(epochs, count, strict=True)}
