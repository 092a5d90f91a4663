"""Throughput of training, of evaluating checkpoints and of distilling, beside the loops that everybody writes.

    fmn-ref bench training [--data ROOT] [--device cpu|cuda] [-o FOLDER]

An epoch counts with all that belongs to it: shuffling, training, validation, and what is recorded. It lasts until the
next one's first batch, the last one until everything is written. The programs of a row alternate in one process, from
the same initial weights; the first epoch of a call is dropped, the median of the others taken, and ratios are between
calls of the same repetition. Data are ROOT's (datasets.SOURCES), or random and of the same shape.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmn_ref as fmn
from fmn_ref import _files
from fmn_ref.training import engine
from fmn_ref.training.data import Batches, device_of, predict

from ..experiments import datasets, networks
from ..experiments.datasets import Split
from . import plain_loop
from .fusion import peak_kib
from .metric import machine
from .training_table import markdown

SHAPES = {"digits": (1, 8, 10), "mnist": (1, 28, 10), "cifar100": (3, 32, 100)}  # channels, pixels, classes


class Setting(NamedTuple):
    """What is trained, and how."""

    dataset: str
    device: str
    network: str = "small_cnn"
    batch_size: int = 128
    augmented: bool = False
    amp: bool = False
    compile: str = "none"  # of `fmn.train` and of the step alone
    n_train: int = 5_000
    n_val: int = 1_000
    n_test: int = 2_500
    epochs: int = 4
    lr: float = 0.05

    @property
    def recipe(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("batch_size", "amp", "compile", "lr")}

    @property
    def augment(self) -> Callable[[Tensor], Tensor] | None:
        return fmn.crop_flip(4) if self.augmented else None

    def make_model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        channels, size, n_classes = SHAPES[self.dataset]
        small = self.network == "small_cnn"
        model: Any = networks.small_cnn(channels, size, n_classes) if small else networks.resnet18(channels, n_classes)
        return cast(nn.Module, model.to(self.device, memory_format=torch.contiguous_format))

    def split(self, root: str | None, seed: int = 0) -> Split:
        if root is None and self.dataset != "digits":
            torch.manual_seed(seed)
            parts = [self.noise(n) for n in (self.n_train, self.n_val, self.n_test)]
            return Split(parts[0], parts[1], parts[2], SHAPES[self.dataset][2], 0.0)
        source, sizes = datasets.SOURCES[self.dataset](Path(root or ".")), (self.n_train, self.n_val, self.n_test)
        return datasets.split(source, "clean", seed, *sizes, pooled=self.dataset == "digits")

    def noise(self, n: int) -> datasets.Data:
        channels, size, n_classes = SHAPES[self.dataset]
        return torch.randn(n, channels, size, size), torch.randint(n_classes, (n,))


def epochs_of(call: Callable[[], Any]) -> list[float]:
    """Seconds until the first epoch of a call to `train`, `distill` or `fit` begins, then of each epoch."""
    stamps, one_pass = [time.perf_counter()], engine._pass

    def stamped(*args: Any) -> Tensor:
        stamps.append(time.perf_counter())
        return one_pass(*args)

    with mock.patch.object(engine, "_pass", stamped):
        call()
    return [end - start for start, end in pairwise([*stamps, time.perf_counter()])]


def recorded(model: nn.Module, s: Setting, split: Split, folder: Path, seed: int = 0) -> list[float]:
    """`fmn.train` as a user calls it: history, checkpoints, and the state to resume from."""
    options: dict[str, Any] = {**s.recipe, "epochs": s.epochs, "augment": s.augment, "seed": seed, "run_dir": folder}
    return epochs_of(partial(fmn.train, model, split.train, split.select, **options))[1:]


def unrecorded(model: nn.Module, s: Setting, split: Split, folder: Path) -> list[float]:
    """The same engine, validation included, with nothing written."""
    device = device_of(model)
    batches = Batches(split.train, s.batch_size, device, shuffle=True)
    evaluate = partial(predict, data=Batches(split.select, 256, device))
    options: dict[str, Any] = {"augment": s.augment, "evaluate": evaluate}
    return epochs_of(partial(engine.fit, model, batches, s.epochs, fmn.Recipe(**s.recipe), **options))[1:]


def step_alone(s: Setting, n_steps: int) -> float:
    """Images/s of the training step as the engine does it, on one batch that stays on the device: the ceiling."""
    model = s.make_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = fmn.Recipe().make_optimizer(model)
    stepped = model if s.compile == "none" else torch.compile(model, mode=s.compile)
    x, y = (t.to(s.device) for t in s.noise(s.batch_size))
    x = x.contiguous(memory_format=torch.channels_last)

    def steps(n: int) -> None:
        for _ in range(n):
            with torch.autocast(s.device, torch.bfloat16, enabled=s.amp):
                loss = F.cross_entropy(stepped(x), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        loss.item()  # waits for the device

    steps(5)
    return s.batch_size * n_steps / timed(lambda: steps(n_steps))[0]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def typical(calls: Iterable[Sequence[float]]) -> list[float]:
    """Seconds of an epoch, of each call."""
    return [statistics.median(epochs[1:]) for epochs in calls]


def relative(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Times of each repetition in units of another program's."""
    ratios = [t / b for t, b in zip(times, base, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def training(s: Setting, root: str | None, repetitions: int) -> dict[str, Any]:
    programs: dict[str, Any] = {"plain": plain_loop.train, "recorded": recorded, "unrecorded": unrecorded}
    split, took = s.split(root), {name: list[list[float]]() for name in programs}
    for _ in range(repetitions):
        trained = {}
        for name, program in programs.items():
            model = trained[name] = s.make_model()
            with tempfile.TemporaryDirectory() as folder:
                took[name].append(program(model, s, split, Path(folder)))
        states = [trained[name].state_dict().values() for name in ("recorded", "unrecorded")]
        if s.device == "cpu" and not all(map(torch.equal, *states)):
            raise AssertionError(f"{s}: recording changes what is learned")
    epoch = {name: typical(calls) for name, calls in took.items()}
    speeds = {name: s.n_train / statistics.median(times) for name, times in epoch.items()}
    return {
        **s._asdict(),
        "seconds": took,
        "images_per_second": {**speeds, "step_alone": step_alone(s, max(2, s.n_train // s.batch_size))},
        "relative": {name: relative(times, epoch["recorded"]) for name, times in epoch.items()},
    }


def nine_checkpoints(s: Setting, split: Split, folder: str) -> tuple[fmn.Run, fmn.FusionPlan]:
    """Of a short run, and the plan that weighs them equally."""
    few = [(x[:512], y[:512]) for x, y in (split.train, split.select)]
    run = fmn.train(s.make_model(), *few, epochs=9, run_dir=folder, **s.recipe)
    return run, fmn.FusionPlan.from_weights(dict.fromkeys(range(9), 1.0), 9)


def evaluation(s: Setting, root: str | None, repetitions: int) -> dict[str, Any]:
    """Seconds from nine files to probabilities in NumPy."""
    split = s.split(root)
    with tempfile.TemporaryDirectory() as folder:
        run, plan = nine_checkpoints(s, split, folder)

        ways: dict[str, Callable[[], Any]] = {
            "plain loop": partial(plain_loop.evaluate, s, run, split.test),
            "run.probabilities": lambda: np.stack(run.probabilities(split.test)[:]),
            "FusedModel": lambda: predict(fmn.FusedModel(plan, run), split.test)[0].cpu().numpy(),
        }
        expected = ways["plain loop"]()
        tolerance = 1e-4 if s.device == "cpu" else 1e-2  # a GPU's convolutions are in TF32
        for name, way in ways.items():  # also warms up
            found = way()
            if not np.allclose(found, expected if found.ndim == 3 else expected.mean(0), atol=tolerance):
                raise AssertionError(f"{name} differs from the plain loop")
        rounds = [{name: timed(way)[0] for name, way in ways.items()} for _ in range(repetitions)]
    took = {name: [seconds[name] for seconds in rounds] for name in ways}
    rates = {name: relative(times, took["plain loop"]) for name, times in took.items()}
    return {**s._asdict(), "seconds": took, "relative": rates}


def distillation(s: Setting, root: str | None, repetitions: int) -> dict[str, Any]:
    """Epochs of each way to ask a teacher, beside those of `train` with the same augmentation; all are recorded."""
    split, crop = s.split(root), {"augment": fmn.crop_flip(4)}
    with tempfile.TemporaryDirectory() as folder:
        run, plan = nine_checkpoints(s, split, folder)
        nine = fmn.FusedModel(plan, run)
        ways: dict[str, tuple[nn.Module | None, dict[str, Any]]] = {
            "train": (None, {}),
            "train, augmented": (None, crop),
            "cached": (nine, {"targets": "cached"}),
            "cached, top_k=10": (nine, {"targets": "cached", "top_k": 10}),
            "cached-views, views=4": (nine, {"targets": "cached-views", "views": 4, **crop}),
            "online, 1 teacher": (run.model, {"targets": "online", **crop}),
            "online, 9 members": (nine, {"targets": "online", **crop}),
        }
        took: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, (teacher, options) in ways.items():
                call: Any = partial(fmn.train, s.make_model(), split.train, split.select)
                if teacher is not None:
                    call = partial(fmn.distill, s.make_model(), teacher, split.train, val_data=split.select)
                with tempfile.TemporaryDirectory() as own:
                    took[name].append(epochs_of(partial(call, **s.recipe, **options, epochs=s.epochs, run_dir=own)))
        refuse_other_targets(s, nine, split)
    epoch = {name: typical(call[1:] for call in calls) for name, calls in took.items()}
    bases = {name: "train, augmented" if "augment" in options else "train" for name, (_, options) in ways.items()}
    return {
        **s._asdict(),
        "seconds": took,
        "epoch": {name: statistics.median(times) for name, times in epoch.items()},
        "relative": {name: relative(times, epoch[bases[name]]) for name, times in epoch.items()},
        "before_the_first_epoch": {name: statistics.median(call[0] for call in calls) for name, calls in took.items()},
    }


def refuse_other_targets(s: Setting, teacher: nn.Module, split: Split) -> None:
    """Cached targets and targets asked online must teach the same."""
    few, found = (split.train[0][:512], split.train[1][:512]), {}
    for targets in ("cached", "online"):
        student = fmn.distill(s.make_model(), teacher, few, targets=targets, epochs=1, **s.recipe)
        found[targets] = predict(student, split.select)[0]
    if not torch.allclose(found["cached"], found["online"], atol=1e-3 if s.device == "cpu" else 0.1):
        raise AssertionError("cached targets teach other things than the teacher online")


def memory(s: Setting, program: str) -> dict[str, Any]:
    """Peak memory of two epochs on random data, in a process of its own."""
    code = f"from fmn_ref.benchmarks import training as t; t.print_memory({tuple(s._replace(epochs=2))}, {program!r})"
    home = Path(fmn.__file__).parents[1]  # Python looks for modules in the current folder first
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=home)
    return {**s._asdict(), "program": program, **json.loads(done.stdout)}


def print_memory(fields: tuple[Any, ...], program: str) -> None:
    s = Setting(*fields)
    split, model = s.split(None), s.make_model()
    before = peak_kib() / 1024
    with tempfile.TemporaryDirectory() as folder:
        {"plain": plain_loop.train, "recorded": recorded}[program](model, s, split, Path(folder))
    on_gpu = torch.cuda.max_memory_allocated() / 2**20 if s.device == "cuda" else None
    print(json.dumps({"before_mib": before, "peak_mib": peak_kib() / 1024, "gpu_mib": on_gpu}))


def accuracy(s: Setting, root: str | None, n_seeds: int) -> dict[str, Any]:
    """On test data after the last epoch, from the same initial weights; the order of the samples differs."""
    scores: dict[str, list[float]] = {"plain": [], "recorded": []}
    for seed in range(n_seeds):
        split = s.split(root, seed)
        for name, program in (("plain", plain_loop.train), ("recorded", recorded)):
            model = s.make_model(seed)
            with tempfile.TemporaryDirectory() as folder:
                program(model, s, split, Path(folder), seed)
            probs, labels = predict(model, split.test)
            scores[name].append((probs.argmax(1) == labels).double().mean().item())
    columns = {**scores, "difference": list(np.subtract(scores["recorded"], scores["plain"]))}
    means = {k: (statistics.fmean(v), statistics.stdev(v) / n_seeds**0.5) for k, v in columns.items()}
    return {**s._asdict(), "accuracies": scores, "mean_and_error": means}


def settings(device: str, quick: bool) -> tuple[list[Setting], Setting]:
    """What is trained; what is evaluated and distilled."""
    base = Setting("cifar100", device)
    rows = [base, base._replace(augmented=True), Setting("mnist", device)]
    if device == "cuda":
        base = base._replace(network="resnet18", batch_size=512, amp=True, n_train=50_000)
        modes = (512, "none"), (1024, "none"), (1024, "default"), (1024, "max-autotune")
        rows += [base._replace(batch_size=size, compile=mode, augmented=True) for size, mode in modes]
    if quick:
        sizes: Any = {"batch_size": 32, "n_train": 64, "n_val": 32, "n_test": 32, "epochs": 2}
        rows = [row._replace(**sizes) for row in rows[:3]]
        base = rows[2]
    return rows, base


def benchmark(data: str | None, out: str | None, quick: bool = False, device: str | None = None) -> str:
    """Run everything; write training.json and training.md to `out`; the Markdown. quick: small, for the test."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    repetitions = 1 if quick else 3
    rows, base = settings(device, quick)
    learned = [Setting("digits", device, batch_size=64, n_train=800, n_val=297, n_test=700, epochs=40)]
    learned += [Setting("mnist", device, batch_size=64, n_train=2_000, epochs=10)] if data else []
    learned = [s._replace(n_train=64, epochs=2) for s in learned] if quick else learned
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result = {
        "format": "fmn_ref.training-benchmark",
        "version": 1,
        "command": f"fmn-ref bench training{' --data ROOT' if data else ''} --device {device}",
        "quick": quick,
        "machine": machine() | {"device": name, "threads": torch.get_num_threads()},
        "training": [training(s, data, repetitions) for s in rows],
        "evaluation": evaluation(base, data, repetitions),
        "distillation": distillation(base, data, repetitions),
        "memory": [memory(base, program) for program in ("plain", "recorded") if sys.platform == "linux"],
        "accuracy": [accuracy(s, data, 2 if quick else 5) for s in learned],
    }
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        _files.write_json(Path(out) / "training.json", result)
        (Path(out) / "training.md").write_text(markdown(result))
    return markdown(result)
