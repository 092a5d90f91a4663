"""Controls that need a training of their own, and Caruana's selection.

`train_snapshots`, `train_fge`, `train_swa` and `train_ema` return networks. `Mean` makes one predictor of several.
An epoch is one pass over the training data.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

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
from .pieces import Piece

EMA_DECAYS = (0.98, 0.99, 0.995, 0.998)  # per step


class Mean(nn.Module):
    """Log of the members' mean probabilities."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        p = sum((m(x).float().softmax(1) for m in self.members), torch.zeros(())) / len(self.members)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def train_snapshots(piece: Piece, data: datasets.Split, folder: Path, cycles: int = 5) -> list[nn.Module]:
    """Train a snapshot ensemble (Huang et al. 2017).

    The epochs are divided into cycles. Each cycle is a cosine from the full learning rate to 0.
    """
    torch.manual_seed(piece.seed)
    model, found = piece.task.make_model(), []
    for i in range(cycles):
        recipe = piece.recipe(piece.seed + 100 * i, epochs=piece.task.epochs // cycles)
        fmn.train(model, data.train, data.select, run_dir=folder / f"snapshot_{i}", keep="every:1000", **recipe)
        found.append(copy.deepcopy(model))
    return found


def train_fge(piece: Piece, data: datasets.Split, folder: Path, run: fmn.Run) -> list[nn.Module]:
    """Train a fast geometric ensemble (Garipov et al. 2018).

    It starts from the checkpoint at four fifths of the run. Each cycle has two epochs, from half the rate to 0.
    """
    start = piece.task.epochs * 4 // 5
    model, found = checkpoints.load_into(piece.task.make_model(), run.checkpoints[start - 1]), []
    for i in range((piece.task.epochs - start) // 2):
        recipe = piece.recipe(piece.seed + 100 * i, epochs=2, lr=piece.task.recipe["lr"] / 2)
        fmn.train(model, data.train, data.select, run_dir=folder / f"fge_{i}", keep="every:1000", **recipe)
        found.append(copy.deepcopy(model))
    return found


def train_swa(piece: Piece, data: datasets.Split, folder: Path, run: fmn.Run) -> nn.Module:
    """Train for SWA (Izmailov et al. 2018) and average the weights.

    It starts from the checkpoint at three quarters of the run, with half the rate held constant. BatchNorm statistics
    are recomputed.
    """
    start = piece.task.epochs * 3 // 4
    model = checkpoints.load_into(piece.task.make_model(), run.checkpoints[start - 1])
    changes = {"epochs": piece.task.epochs - start, "lr": piece.task.recipe["lr"] / 2, "schedule": "constant"}
    end = fmn.train(model, data.train, data.select, run_dir=folder / "swa", **piece.recipe(piece.seed, **changes))
    return fmn.averaged_model(end, dict.fromkeys(range(len(end.history)), 1.0), data.train)


def train_ema(piece: Piece, data: datasets.Split) -> nn.Module:
    """Train with EMAs of the weights after every step; return the average with the best selection accuracy."""
    torch.manual_seed(piece.seed)
    model = piece.task.make_model()
    averages = StepAverages(model, data.select, max(1, len(data.train[0]) // piece.task.recipe["batch_size"]))
    handle = register_optimizer_step_post_hook(averages.after_step)
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe = piece.recipe(piece.seed)
            fmn.train(model, data.train, data.select, run_dir=folder, keep="none", **recipe)
    finally:
        handle.remove()
    return averages.best


class StepAverages:
    """Exponential moving averages of a model's weights, and the best of them at the end of any epoch."""

    def __init__(self, model: nn.Module, select: datasets.Data, steps_per_epoch: int) -> None:
        self.model, self.select, self.steps_per_epoch = model, select, steps_per_epoch
        self.averages = [self.average(decay) for decay in EMA_DECAYS]
        self.steps, self.accuracy, self.best = 0, -1.0, copy.deepcopy(model)

    def average(self, decay: float) -> AveragedModel:
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        return AveragedModel(self.model, multi_avg_fn=update, use_buffers=True)

    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Update the averages; at the end of an epoch keep a copy of the best one so far."""
        self.steps += 1
        for average in self.averages:
            average.update_parameters(self.model)
            if self.steps % self.steps_per_epoch == 0:
                accuracy = model_accuracy(average.module, self.select)
                if accuracy > self.accuracy:
                    self.accuracy, self.best = accuracy, copy.deepcopy(average.module)


def model_accuracy(model: nn.Module, samples: datasets.Data) -> float:
    """Share of the samples that the model classifies correctly."""
    probs, labels = predict(model, samples)
    return float((probs.argmax(1) == labels).double().mean())


def caruana(probs: NDArray[Any], labels: NDArray[np.int64], rounds: int = 50) -> dict[int, float]:
    """Select epochs greedily with replacement (Caruana et al. 2004); return {epoch: weight}.

    Each round adds the epoch that raises the plain mean's selection accuracy most. The round with the best selection
    accuracy counts.
    """
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
