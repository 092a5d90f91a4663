"""The experiment suite: every method on real data with wrong labels, beside every control.

    fmn-ref bench paper --scale cpu --data ROOT -o FOLDER

A piece is one data set, noise, augmentation and seed. Each finished piece leaves a JSON file and each finished run its
folder, so that the suite goes on where it stopped; `--only` takes part of it. Everything is chosen on the selection set
and scored on other samples. docs/results.md says what came out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fmn_ref as fmn

from . import datasets, models

SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}


@dataclass(frozen=True)
class Task:
    """A data set with the network and the recipe that go with it."""

    dataset: str
    n_train: int | None
    n_select: int
    n_test: int
    epochs: int
    recipe: dict[str, Any]
    network: Callable[[], nn.Module]
    padding: int
    flip: bool = False
    pooled: bool = False
    device: str = "cpu"

    def make_model(self) -> nn.Module:
        return self.network().to(self.device)

    @property
    def augment(self) -> Callable[[Tensor], Tensor]:
        return datasets.augmentation(self.padding, self.flip)


@dataclass(frozen=True)
class Piece:
    """One cell of the suite."""

    task: Task
    noise: str
    augmented: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task.dataset}-{self.noise}-{'augmented' if self.augmented else 'plain'}-{self.seed}"

    def split(self, root: Path) -> datasets.Split:
        t = self.task
        source = datasets.SOURCES[t.dataset](root)
        return datasets.split(source, self.noise, self.seed, t.n_train, t.n_select, t.n_test, pooled=t.pooled)

    def train(self, data: datasets.Split, folder: Path, network: int = 0) -> fmn.Run:
        """The run, or one of the independent networks on the same data: other weights, other order."""
        seed = self.seed + 1000 * network
        torch.manual_seed(seed)
        augment = self.task.augment if self.augmented else None
        recipe = {**self.task.recipe, "epochs": self.task.epochs, "seed": seed, "augment": augment}
        return fmn.train(
            self.task.make_model(),
            data.train,
            data.select,
            run_dir=folder / f"network_{network}",
            progress=False,
            **recipe,
        )


def _cpu_tasks() -> list[Task]:
    small = {**SGD, "batch_size": 64, "lr": 0.05}
    colour = {**SGD, "batch_size": 128, "lr": 0.02, "amp": True}  # the best of 0.02, 0.05, 0.1 by selection accuracy
    return [
        Task("digits", 800, 300, 697, 40, small, lambda: models.small_cnn(1, 8, 10), padding=1, pooled=True),
        Task("mnist", 2000, 1000, 5000, 40, small, lambda: models.small_cnn(1, 28, 10), padding=2),
        Task("cifar100", 10_000, 3000, 5000, 30, colour, lambda: models.small_cnn(3, 32, 100), padding=4, flip=True),
    ]


def pieces(scale: str, n_seeds: int = 3) -> list[Piece]:
    """All cells in the order in which they are done."""
    noises = ["clean", "sym20", "sym40", "asym40", "human"]
    return [
        Piece(task, noise, augmented, seed)
        for seed in range(n_seeds)
        for augmented in (False, True)
        for task in _cpu_tasks()
        for noise in noises
        if noise != "human" or task.dataset == "cifar100"
    ]
