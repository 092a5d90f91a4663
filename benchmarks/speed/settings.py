"""A setting of the training benchmark: data, network, device and recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import fmn_ref as fmn

from ..experiments import datasets, networks

SHAPES = {"digits": (1, 8, 10), "mnist": (1, 28, 10), "cifar100": (3, 32, 100)}  # channels, pixels, classes


class Setting(NamedTuple):
    """Data, network, device and recipe of one training.

    `compile` holds for `fmn.train` and for the step alone; the plain loop compiles nothing.
    """

    dataset: str
    device: str
    network: str = "small_cnn"
    batch_size: int = 128
    augmented: bool = False
    amp: bool = False
    compile: str = "none"
    n_train: int = 5_000
    n_val: int = 1_000
    n_test: int = 2_500
    epochs: int = 4
    lr: float = 0.05

    @property
    def name(self) -> str:
        """Name of the row, for `--only`."""
        options = ("-augmented" if self.augmented else "") + (f"-{self.compile}" if self.compile != "none" else "")
        return f"{self.dataset}-{self.network}-{self.batch_size}{options}"

    @property
    def recipe(self) -> dict[str, Any]:
        """Keywords of `fmn.train`."""
        return {name: getattr(self, name) for name in ("batch_size", "amp", "compile", "lr")}

    @property
    def augment(self) -> Callable[[Tensor], Tensor] | None:
        """Crop and flip, or None."""
        return fmn.crop_flip(4) if self.augmented else None

    def make_model(self, seed: int = 0) -> nn.Module:
        """Make the network with the weights of a seed, on the device."""
        torch.manual_seed(seed)
        channels, size, n_classes = SHAPES[self.dataset]
        small = self.network == "small_cnn"
        model: Any = networks.small_cnn(channels, size, n_classes) if small else networks.resnet18(channels, n_classes)
        return cast(nn.Module, model.to(self.device, memory_format=torch.contiguous_format))

    def split(self, root: str | None, seed: int = 0) -> datasets.Split:
        """Draw the three sets from the data under `root`; without `root`, random data of the same shape."""
        sizes = self.n_train, self.n_val, self.n_test
        if root is None and self.dataset != "digits":
            torch.manual_seed(seed)
            train, select, test = (self.random_data(n) for n in sizes)
            return datasets.Split(train, select, test, SHAPES[self.dataset][2], 0.0)
        source = datasets.SOURCES[self.dataset](Path(root or "."))
        return datasets.split(source, "clean", seed, *sizes, pooled=self.dataset == "digits")

    def random_data(self, n: int) -> datasets.Data:
        """Draw `n` random images and labels."""
        channels, size, n_classes = SHAPES[self.dataset]
        return torch.randn(n, channels, size, size), torch.randint(n_classes, (n,))
