"""The experiment suite: which pieces there are, and how they are run and resumed.

    fmn-ref bench paper --scale cpu --data ROOT -o FOLDER

Each piece compares every method with every control on real data with wrong labels. Everything is chosen on the
selection set and scored on other samples. A finished piece leaves a JSON file and a finished run leaves its folder, so
an interrupted suite resumes. `--only` runs some of the pieces, `--jobs` runs several at once. docs/results.md discusses
the results.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmn_ref import _files

from . import figures, measurement, networks, tables
from .pieces import Piece, Task

SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}
WITH_HUMAN = ("clean", "sym20", "sym40", "asym40", "human")


def cpu_tasks() -> list[Task]:
    """Tasks for two cores: about five hours."""
    small = {**SGD, "batch_size": 64, "lr": 0.05}
    colour = {**SGD, "batch_size": 128, "lr": 0.02, "amp": True}  # the best of 0.02, 0.05, 0.1 by selection accuracy
    some: tuple[str, ...] = ("students", "ema", "averages")
    every = (*some, "networks", "trained_differently", "distilled_controls")
    augmented = {"": ("students",)}
    digits = augmented | dict.fromkeys(("sym20", "asym40"), every)
    digits |= dict.fromkeys(("clean", "sym40"), (*every, "temperatures"))
    mnist = augmented | {"clean": (*some, "temperatures"), "sym20": some, "asym40": some} | {"sym40": digits["sym40"]}
    cifar = {"": ("students",), "sym40": ("students", "ema", "networks", "trained_differently")}
    cifar |= {f"{noise}-augmented": () for noise in ("sym20", "asym40", "human")}  # a student takes ten minutes
    more: dict[str, Any] = {"stages": cifar, "noises": WITH_HUMAN}
    cnn = networks.small_cnn
    return [
        Task("digits", 800, 300, 697, 40, small, partial(cnn, 1, 8, 10), 1, pooled=True, stages=digits),
        Task("mnist", 2000, 1000, 5000, 40, small, partial(cnn, 1, 28, 10), 2, stages=mnist),
        Task("cifar100", 10_000, 3000, 5000, 30, colour, partial(cnn, 3, 32, 100), 4, True, **more),
    ]


def middle_tasks() -> list[Task]:
    """Tasks with the papers' kind of training on CPUs: CIFAR-100, random crops and flips, 60 epochs.

    Half-width ResNet-18, ViT and ConvNeXt each train in about an hour on one thread; all pieces take about 100 hours.
    The first task has all students. The tasks after it change one thing each: network, schedule, width, number of
    images, and a network that learned other classes first.
    """
    sgd: dict[str, Any] = {**SGD, "batch_size": 128, "lr": 0.1, "amp": True}
    adamw: dict[str, Any] = {**sgd, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    constant: dict[str, Any] = {**sgd, "lr": 0.02, "schedule": "constant"}
    few = ("clean", "sym40")

    def task(name: str, recipe: dict[str, Any], network: Callable[[], nn.Module], n_train: int, **more: Any) -> Task:
        sizes = {"n_train": n_train, "n_select": 2000, "n_test": 5000, "epochs": 60, "padding": 4, "flip": True}
        more = {**sizes, "stages": {"": ()}, "noises": few, "most_seeds": 1, **more}
        return Task("cifar100", recipe=recipe, network=network, name=f"cifar100_{name}", **more)

    def resnet(width: int) -> Callable[[], nn.Module]:
        return partial(networks.resnet18, 3, 100, width)

    noises = ("clean", "sym40", "sym20", "asym40", "human")
    most = ("students", "ema", "averages")
    full = {"": most, "sym40-augmented": (*most, "networks")}
    other: dict[str, Any] = {"noises": noises, "stages": {"": ("ema",), "sym40-augmented": ("students", "ema")}}
    vit, convnext = partial(networks.small_vit, 3, 32, 100), partial(networks.small_convnext, 3, 32, 100, width=64)
    old = task("old", sgd, resnet(32), 10_000, n_test=3000, epochs=30, classes=range(50))
    return [
        task("resnet18", sgd, resnet(32), 10_000, noises=noises, stages=full, most_seeds=2),
        task("vit", adamw, vit, 10_000, **other),
        task("convnext", adamw, convnext, 10_000, **other),
        task("resnet18_constant", constant, resnet(32), 10_000, stages={"": ("ema", "averages")}),
        task("resnet18_width16", sgd, resnet(16), 10_000),
        task("resnet18_images2500", sgd, resnet(32), 2500),
        task("resnet18_images5000", sgd, resnet(32), 5000),
        task(
            "resnet18_transfer", {**sgd, "lr": 0.02}, resnet(32), 2000, n_test=3000, classes=range(50, 100), before=old
        ),
        task("resnet18_images20000", sgd, resnet(32), 20_000),
        task("resnet18_width64", sgd, resnet(64), 10_000),
    ]


def gpu_tasks(root: Path) -> list[Task]:
    """Tasks for a GPU, with the protocol of arXiv 2507.08686: half of the test set selects, the other half is scored.

    The paper does not give its optimizer's settings; these are the usual ones for ResNet-18 on small images.
    """
    recipe = {**SGD, "batch_size": 128, "lr": 0.1, "amp": True}
    some = {"": ("students",), "clean-augmented": ("students", "networks")}
    more: dict[str, Any] = {"stages": some, "noises": ("clean", "sym40", "sym20", "asym40", "asym20")}
    tasks = [Task("cifar100", None, 5000, 5000, 200, recipe, partial(networks.resnet18, 3, 100), 4, True, **more)]
    if (root / "tiny-imagenet-200").is_dir():
        network = partial(networks.resnet18, 3, 200)
        tasks.append(Task("tinyimagenet", None, 5000, 5000, 200, recipe, network, 8, True, **more))
    return tasks


def all_pieces(scale: str, root: Path, n_seeds: int = 3, device: str | None = None) -> list[Piece]:
    """All pieces, in the order in which they run. `n_seeds` is an upper bound for tasks with `most_seeds`."""
    device = device or ("cuda" if scale == "gpu" else "cpu")
    if scale == "gpu":
        tasks = [task.on(device) for task in gpu_tasks(root)]
        return [Piece(task, noise, True, seed) for task in tasks for noise in task.noises for seed in range(n_seeds)]
    tasks, augmentations = (cpu_tasks(), (False, True)) if scale == "cpu" else (middle_tasks(), (True,))
    return [
        Piece(task.on(device), noise, augmented, seed)
        for seed in range(n_seeds)
        for augmented in augmentations
        for task in tasks
        if task.most_seeds is None or seed < task.most_seeds
        for noise in task.noises
    ]


def run_piece(piece: Piece, root: Path, out: Path) -> dict[str, Any]:
    """Read the piece's stored result, or measure and store it."""
    path = out / "pieces" / f"{piece.name}.json"
    if path.exists():
        return _files.read_json(path, tables.FORMAT)
    began = time.perf_counter()
    content = measurement.measure(piece, root, out / "runs" / piece.name)
    content["seconds"] = round(time.perf_counter() - began)  # of this attempt, if earlier ones were interrupted
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_json(path, {"format": tables.FORMAT, "version": 1, **content})
    return _files.read_json(path, tables.FORMAT)


def benchmark(
    scale: str,
    root: str,
    out: str,
    only: str = "",
    jobs: int = 1,
    n_seeds: int = 3,
    clean_up: bool = False,
    device: str | None = None,
    quick: bool = False,
) -> str:
    """Run pieces, then write tables and figures of all finished pieces; return the tables' text.

    Parameters
    ----------
    scale : {"cpu", "middle", "gpu"}
    root : str
        Folder of the data sets.
    out : str
        Folder of the results.
    only : str, default ""
        Regular expression: run the pieces whose names it matches.
    jobs : int, default 1
        Pieces that run at once.
    n_seeds : int, default 3
        Seeds of each setting; an upper bound at middle scale, whose tasks have two seeds or one.
    clean_up : bool, default False
        Delete the checkpoints of finished pieces.
    device : {"cpu", "cuda"}, optional
        Device of all networks. Default: "cuda" at scale gpu, else "cpu".
    quick : bool, default False
        Train for three epochs, without the stages, to try the suite. Use a folder of its own.
    """
    todo = [p for p in all_pieces(scale, Path(root), n_seeds, device) if re.search(only, p.name)]
    if quick:
        todo = [replace(p, task=replace(p.task, epochs=3, stages={"": ()})) for p in todo]
    if not todo:
        raise ValueError(f"--only: no piece matches {only!r}")
    if any(p.task.device == "cuda" for p in todo) and not torch.cuda.is_available():
        raise ValueError(f"--scale {scale}: torch finds no CUDA device here")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    job = partial(_run_job, root=Path(root), out=Path(out), threads=threads, clean_up=clean_up)
    if jobs == 1:
        for piece in todo:
            print(job(piece), flush=True)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(job, piece) for piece in todo]):
                print(done.result(), flush=True)
    return figures.write(Path(out))


def _run_job(piece: Piece, root: Path, out: Path, threads: int, clean_up: bool) -> str:
    torch.set_num_threads(threads)
    run_piece(piece, root, out)
    if clean_up:
        for path in (out / "runs" / piece.name).rglob("*.pt"):
            path.unlink()
    return f"{piece.name}: done"
