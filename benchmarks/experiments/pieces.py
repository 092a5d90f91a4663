"""A piece of the experiment suite: which network is trained on which data, and how.

A piece is one data set, noise, augmentation and seed. A setting is a piece without its seed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training.augmentation import crop_flip

from . import datasets


@dataclass(frozen=True)
class Task:
    """A data set with its network and its recipe.

    Attributes
    ----------
    dataset : str
        A name in `datasets.SOURCES`.
    n_train : int or None
        Training images; None: all.
    n_select, n_test : int
        Images to select on, and to score.
    epochs : int
    recipe : dict
        Keywords of `fmn.train`.
    network : callable() -> nn.Module
    padding : int
        Width of the border of the crops, in pixels.
    flip : bool, default False
        Mirror half of the augmented images.
    pooled : bool, default False
        Draw all three sets from the same images.
    device : str, default "cpu"
    stages : dict or None
        Names in `measurement.STAGES` for each noise, with "-augmented" behind it for augmented pieces. The entry ""
        holds for all others. None: all stages.
    name : str, default `dataset`
        First part of the names of settings and pieces; without "-".
    classes : range or None
        Classes that take part; None: all.
    before : Task or None
        Task on which the network is trained first, with clean labels.
    noises : tuple of str
        As in `datasets.split`.
    most_seeds : int or None
        Seeds of each setting, if more are asked for; None: no limit.
    """

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
    stages: dict[str, tuple[str, ...]] | None = None
    name: str = ""
    classes: range | None = None
    before: Task | None = None
    noises: tuple[str, ...] = ("clean", "sym20", "sym40", "asym40")
    most_seeds: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.dataset)

    @property
    def amp(self) -> bool:
        """Whether the network computes in bfloat16."""
        return bool(self.recipe.get("amp", False))

    def on(self, device: str) -> Task:
        """The same task on a device."""
        return replace(self, device=device, before=self.before and self.before.on(device))

    def make_model(self) -> nn.Module:
        """Make the network with new weights, on the task's device."""
        return self.network().to(self.device)

    @property
    def augment(self) -> Callable[[Tensor], Tensor]:
        """Augmentation of the pieces that use one."""
        return crop_flip(self.padding, self.flip)


@dataclass(frozen=True)
class Piece:
    """One data set, noise, augmentation and seed."""

    task: Task
    noise: str
    augmented: bool
    seed: int

    @property
    def setting(self) -> str:
        """Name without the seed."""
        return f"{self.task.name}-{self.noise}-{'augmented' if self.augmented else 'plain'}"

    @property
    def name(self) -> str:
        """Name of the piece, and of its files."""
        return f"{self.setting}-{self.seed}"

    @property
    def stages(self) -> tuple[str, ...] | None:
        """Stages beyond the fusions; None: all."""
        stages = self.task.stages
        if stages is None:
            return None
        return stages.get(f"{self.noise}-augmented" if self.augmented else self.noise, stages[""])

    def split(self, root: Path) -> datasets.Split:
        """Draw the training, selection and test sets."""
        t = self.task
        source = datasets.SOURCES[t.dataset](root)
        sizes = t.n_train, t.n_select, t.n_test
        return datasets.split(source, self.noise, self.seed, *sizes, pooled=t.pooled, classes=t.classes)

    @property
    def before(self) -> Piece | None:
        """The piece on which the network is trained first."""
        task = self.task.before
        return None if task is None else Piece(task, "clean", self.augmented, self.seed)

    def recipe(self, seed: int, **changes: Any) -> dict[str, Any]:
        """Keywords of `train` and `distill`."""
        augment = self.task.augment if self.augmented else None
        own = {"epochs": self.task.epochs, "seed": seed, "augment": augment, "progress": False}
        return {**self.task.recipe, **own, **changes}

    def train(
        self,
        data: datasets.Split,
        folder: Path,
        network: int = 0,
        beside: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
        start: Path | None = None,
    ) -> fmn.Run:
        """Train a network. Networks of other numbers start from other weights and see the samples in another order.

        The context `beside(model)` is open while the network trains. `start` is a checkpoint to start from.
        """
        seed = self.seed + 1000 * network
        torch.manual_seed(seed)
        model = self.task.make_model()
        if start is not None:
            checkpoints.load_into(model, start)
        with beside(model):
            return fmn.train(model, data.train, data.select, run_dir=run_dir(folder, network), **self.recipe(seed))


def run_dir(folder: Path, network: int = 0) -> Path:
    """Run folder of a network, in the piece's folder."""
    return folder / f"network_{network}"
