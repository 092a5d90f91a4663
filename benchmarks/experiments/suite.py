"""The experiment suite: every method on real data with wrong labels, beside every control.

    fmn-ref bench paper --scale cpu --data ROOT -o FOLDER

A piece is one data set, noise, augmentation and seed. Each finished piece leaves a JSON file and each finished run its
folder, so that the suite goes on where it stopped; `--only` takes part of it, `--jobs` works on several at once.
Everything is chosen on the selection set and scored on other samples. docs/results.md says what came out.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fmn_ref as fmn
from fmn_ref import _files
from fmn_ref.training.augmentation import crop_flip

from . import datasets, measurement, networks, tables

SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}
FORMAT = "fmn_ref.paper-piece"


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
    stages: dict[str, tuple[str, ...]] | None = None  # per noise, "" for the others; None: all

    def make_model(self) -> nn.Module:
        return self.network().to(self.device)

    @property
    def augment(self) -> Callable[[Tensor], Tensor]:
        return crop_flip(self.padding, self.flip)


@dataclass(frozen=True)
class Piece:
    """One cell of the suite."""

    task: Task
    noise: str
    augmented: bool
    seed: int

    @property
    def setting(self) -> str:
        return f"{self.task.dataset}-{self.noise}-{'augmented' if self.augmented else 'plain'}"

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.seed}"

    @property
    def stages(self) -> tuple[str, ...]:
        """What is done beyond fusing: see `measurement.STAGES`."""
        stages = self.task.stages
        if stages is None:
            return tuple(measurement.STAGES)
        return stages.get(f"{self.noise}-augmented" if self.augmented else self.noise, stages[""])

    def split(self, root: Path) -> datasets.Split:
        t = self.task
        source = datasets.SOURCES[t.dataset](root)
        return datasets.split(source, self.noise, self.seed, t.n_train, t.n_select, t.n_test, pooled=t.pooled)

    def recipe(self, seed: int, **changes: Any) -> dict[str, Any]:
        """Keywords of `train` and `distill`."""
        augment = self.task.augment if self.augmented else None
        own = {"epochs": self.task.epochs, "seed": seed, "augment": augment, "progress": False}
        return {**self.task.recipe, **own, **changes}

    def train(self, data: datasets.Split, folder: Path, network: int = 0) -> fmn.Run:
        """The run, or one of the independent networks on the same data: other weights, other order."""
        seed = self.seed + 1000 * network
        torch.manual_seed(seed)
        model, run_dir = self.task.make_model(), folder / f"network_{network}"
        return fmn.train(model, data.train, data.select, run_dir=run_dir, **self.recipe(seed))


def cpu_tasks() -> list[Task]:
    """About five hours on two cores."""
    small = {**SGD, "batch_size": 64, "lr": 0.05}
    colour = {**SGD, "batch_size": 128, "lr": 0.02, "amp": True}  # the best of 0.02, 0.05, 0.1 by selection accuracy
    students = {f"{noise}-augmented": ("students",) for noise in NOISES}  # their teachers predict every augmented batch
    most = {"": tuple(measurement.STAGES)} | students
    some = {"": ("students",), "sym40": ("students", "networks", "trained_differently")}
    some |= {f"{noise}-augmented": () for noise in NOISES}
    cnn = networks.small_cnn
    return [
        Task("digits", 800, 300, 697, 40, small, partial(cnn, 1, 8, 10), 1, pooled=True, stages=most),
        Task("mnist", 2000, 1000, 5000, 40, small, partial(cnn, 1, 28, 10), 2, stages=most),
        Task("cifar100", 10_000, 3000, 5000, 30, colour, partial(cnn, 3, 32, 100), 4, True, stages=some),
    ]


def gpu_tasks(root: Path) -> list[Task]:
    """The papers' protocol with METHOD's recipe: half of the test set selects, half is scored."""
    recipe = {**SGD, "batch_size": 128, "lr": 0.1, "amp": True}
    some = {"": ("students",), "clean-augmented": ("students", "networks")}
    more: dict[str, Any] = {"stages": some, "device": "cuda"}
    tasks = [Task("cifar100", None, 5000, 5000, 200, recipe, partial(networks.resnet18, 3, 100), 4, True, **more)]
    if (root / "tiny-imagenet-200").is_dir():
        network = partial(networks.resnet18, 3, 200)
        tasks.append(Task("tinyimagenet", None, 5000, 5000, 200, recipe, network, 8, True, **more))
    return tasks


NOISES = ("clean", "sym20", "sym40", "asym20", "asym40", "human")


def pieces(scale: str, root: Path, n_seeds: int = 3) -> list[Piece]:
    """All cells in the order in which they are done."""
    if scale == "gpu":
        noises = ("clean", "sym40", "sym20", "asym40", "asym20")
        return [Piece(t, noise, True, s) for t in gpu_tasks(root) for noise in noises for s in range(n_seeds)]
    noises = ("clean", "sym20", "sym40", "asym40", "human")
    return [
        Piece(task, noise, augmented, seed)
        for seed in range(n_seeds)
        for augmented in (False, True)
        for task in cpu_tasks()
        for noise in noises
        if noise != "human" or task.dataset == "cifar100"
    ]


def run_piece(piece: Piece, root: Path, out: Path) -> dict[str, Any]:
    """The piece's result: what is stored, or made now and stored."""
    path = out / "pieces" / f"{piece.name}.json"
    if path.exists():
        return _files.read_json(path, FORMAT)
    began = time.perf_counter()
    content = measurement.measure(piece, root, out / "runs" / piece.name)
    content["seconds"] = round(time.perf_counter() - began)  # of this attempt, if earlier ones were interrupted
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_json(path, {"format": FORMAT, "version": 1, **content})
    return _files.read_json(path, FORMAT)


def benchmark(
    scale: str, root: str, out: str, only: str = "", jobs: int = 1, n_seeds: int = 3, clean_up: bool = False
) -> str:
    """Do the pieces whose names match `only`, then write tables and figures of all that are done; the tables' text.

    clean_up: remove the checkpoints of finished pieces.
    """
    todo = [p for p in pieces(scale, Path(root), n_seeds) if re.search(only, p.name)]
    if not todo:
        raise ValueError(f"--only: no piece matches {only!r}")
    if any(p.task.device == "cuda" for p in todo) and not torch.cuda.is_available():
        raise ValueError("--scale gpu: torch finds no CUDA device here")
    task = partial(
        _work, root=Path(root), out=Path(out), threads=max(1, (os.cpu_count() or 1) // jobs), clean_up=clean_up
    )
    if jobs == 1:
        for piece in todo:
            print(task(piece), flush=True)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(task, piece) for piece in todo]):
                print(done.result(), flush=True)
    return tables.write(Path(out))


def _work(piece: Piece, root: Path, out: Path, threads: int, clean_up: bool) -> str:
    torch.set_num_threads(threads)
    run_piece(piece, root, out)
    if clean_up:
        for path in (out / "runs" / piece.name).rglob("*.pt"):
            path.unlink()
    return f"{piece.name}: done"
