"""Speed of training, of evaluating checkpoints and of distilling, beside the loops that a user would write.

    fmn-ref bench training [--data ROOT] [--device cpu|cuda] [--only REGEX] [-o FOLDER]

An epoch includes shuffling, training, validation and recording. It lasts until the first batch of the next epoch; the
last one lasts until everything is written. The programs of a row alternate in one process and start from the same
weights. The first epoch of a call is dropped, the median of the others is taken, and ratios are between calls of the
same repetition. The data are those under ROOT (`experiments.datasets`), or random data of the same shape.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import fmn_ref as fmn
from fmn_ref.reporting.tables import mean_and_error
from fmn_ref.training import engine
from fmn_ref.training.data import Batches, device_of, predict
from fmn_ref.training.memory_format import set_channels_last

from ..common import check_device, device_name, in_new_process, machine, peak_kib, write_result
from ..experiments.datasets import Split
from . import plain_loop
from .settings import Setting
from .training_table import markdown


def epoch_seconds(call: Callable[[], Any]) -> list[float]:
    """Time the epochs of a call to `train`, `distill` or `fit`; the first value is the time before the first epoch."""
    stamps, one_pass = [time.perf_counter()], engine.train_one_epoch

    def stamped(*args: Any, **options: Any) -> Tensor:
        stamps.append(time.perf_counter())
        return one_pass(*args, **options)

    with mock.patch.object(engine, "train_one_epoch", stamped):
        call()
    return [end - start for start, end in pairwise([*stamps, time.perf_counter()])]


def train_recorded(model: nn.Module, s: Setting, split: Split, folder: Path, seed: int = 0) -> list[float]:
    """Train with `fmn.train` and its defaults: it writes history, checkpoints and resume files."""
    options: dict[str, Any] = {**s.recipe, "epochs": s.epochs, "augment": s.augment, "seed": seed, "run_dir": folder}
    return epoch_seconds(partial(fmn.train, model, split.train, split.select, **options))[1:]


def train_unrecorded(model: nn.Module, s: Setting, split: Split, folder: Path) -> list[float]:
    """Train with the engine of `fmn.train`, validation included, and write nothing."""
    device = device_of(model)
    batches = Batches(split.train, s.batch_size, device, shuffle=True)
    evaluate = partial(predict, data=Batches(split.select, 256, device))
    options: dict[str, Any] = {"augment": s.augment, "evaluate": evaluate}
    return epoch_seconds(partial(engine.fit, model, batches, s.epochs, fmn.Recipe(**s.recipe), **options))[1:]


def step_alone(s: Setting, n_steps: int) -> float:
    """Images per second of the engine's training step on one batch that stays on the device: an upper bound."""
    model = s.make_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = fmn.Recipe().make_optimizer(model)
    stepped = model if s.compile == "none" else torch.compile(model, mode=s.compile)
    x, y = (t.to(s.device) for t in s.random_data(s.batch_size))
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
    return s.batch_size * n_steps / seconds_of(lambda: steps(n_steps))


def seconds_of(call: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def typical(calls: Iterable[Sequence[float]]) -> list[float]:
    """Median seconds of an epoch for each call, without its first epoch."""
    return [statistics.median(epochs[1:]) for epochs in calls]


def relative(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Ratios of the times to another program's times in the same repetition."""
    ratios = [t / b for t, b in zip(times, base, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def time_training(s: Setting, root: str | None, repetitions: int) -> dict[str, Any]:
    """Time the plain loop, `fmn.train`, and the engine without recording; check that recording changes no weight."""
    programs: dict[str, Any] = {"plain": plain_loop.train, "recorded": train_recorded, "unrecorded": train_unrecorded}
    split, took = s.split(root), {name: list[list[float]]() for name in programs}
    for _ in range(repetitions):
        trained = {}
        for name, program in programs.items():
            model = trained[name] = s.make_model()
            with tempfile.TemporaryDirectory() as folder:
                took[name].append(program(model, s, split, Path(folder)))
        states = [trained[name].state_dict().values() for name in ("recorded", "unrecorded")]
        if s.device == "cpu" and not all(map(torch.equal, *states)):
            raise AssertionError(f"{s}: recording changes the weights")
    epoch = {name: typical(calls) for name, calls in took.items()}
    speeds = {name: s.n_train / statistics.median(times) for name, times in epoch.items()}
    return {
        **s._asdict(),
        "seconds": took,
        "images_per_second": {**speeds, "step_alone": step_alone(s, max(2, s.n_train // s.batch_size))},
        "relative": {name: relative(times, epoch["recorded"]) for name, times in epoch.items()},
    }


def nine_checkpoints(s: Setting, split: Split, folder: str) -> tuple[fmn.Run, fmn.FusionPlan]:
    """Train a short run of nine epochs; return it with a plan of equal weights."""
    few = [(x[:512], y[:512]) for x, y in (split.train, split.select)]
    run = fmn.train(s.make_model(), *few, epochs=9, run_dir=folder, **s.recipe)
    return run, fmn.FusionPlan.from_weights(dict.fromkeys(range(9), 1.0), 9)


def time_evaluation(s: Setting, root: str | None, repetitions: int) -> dict[str, Any]:
    """Time each way from nine checkpoint files to probabilities in NumPy; check that the ways agree."""
    split = s.split(root)
    with tempfile.TemporaryDirectory() as folder:
        run, plan = nine_checkpoints(s, split, folder)
        ways: dict[str, Callable[[], Any]] = {
            "plain loop": partial(plain_loop.evaluate, s, run, split.test),
            "forward passes alone": forward_passes(s, run, split.test[0]),
            "run.probabilities": lambda: np.stack(run.probabilities(split.test)[:]),
            "FusedModel": lambda: predict(fmn.FusedModel(plan, run), split.test)[0].cpu().numpy(),
        }
        compare_predictions(ways, 1e-4 if s.device == "cpu" else 1e-2)  # a GPU computes convolutions in TF32
        rounds = [{name: seconds_of(way) for name, way in ways.items()} for _ in range(repetitions)]
    took = {name: [seconds[name] for seconds in rounds] for name in ways}
    rates = {name: relative(times, took["plain loop"]) for name, times in took.items()}
    return {**s._asdict(), "seconds": took, "relative": rates}


def forward_passes(s: Setting, run: fmn.Run, images: Tensor) -> Callable[[], NDArray[np.float32]]:
    """Load all networks and images; return what then predicts with all of them, in channels_last: a lower bound."""
    nets = [fmn.checkpoints.load_into(s.make_model(), path).eval() for path in run.checkpoints]
    for net in nets:
        set_channels_last(net)
    batches = [x.to(s.device).contiguous(memory_format=torch.channels_last) for x in torch.split(images, 256)]

    @torch.inference_mode()
    def predict_all() -> NDArray[np.float32]:
        return torch.stack([torch.cat([net(x).softmax(1) for x in batches]) for net in nets]).cpu().numpy()

    return predict_all


def compare_predictions(ways: dict[str, Callable[[], Any]], tolerance: float) -> None:
    """Check that each way gives the plain loop's probabilities, or their mean over the checkpoints; also a warm-up."""
    expected = ways["plain loop"]()
    for name, way in ways.items():
        found = way()
        if not np.allclose(found, expected if found.ndim == 3 else expected.mean(0), atol=tolerance):
            raise AssertionError(f"{name} differs from the plain loop")


def time_distillation(s: Setting, root: str | None, repetitions: int) -> dict[str, Any]:
    """Time an epoch of `distill` for each kind of targets, beside `train` with the same augmentation; all record."""
    split = s.split(root)
    with tempfile.TemporaryDirectory() as folder:
        run, plan = nine_checkpoints(s, split, folder)
        ways = distillation_ways(run.model, fmn.FusedModel(plan, run))
        took: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, (teacher, options) in ways.items():
                took[name].append(train_or_distill(s, split, teacher, options))
        compare_targets(s, fmn.FusedModel(plan, run), split)
    epoch = {name: typical(call[1:] for call in calls) for name, calls in took.items()}
    bases = {name: "train, augmented" if "augment" in options else "train" for name, (_, options) in ways.items()}
    return {
        **s._asdict(),
        "seconds": took,
        "epoch": {name: statistics.median(times) for name, times in epoch.items()},
        "relative": {name: relative(times, epoch[bases[name]]) for name, times in epoch.items()},
        "before_the_first_epoch": {name: statistics.median(call[0] for call in calls) for name, calls in took.items()},
    }


def distillation_ways(one: nn.Module, nine: nn.Module) -> dict[str, tuple[nn.Module | None, dict[str, Any]]]:
    """Teacher and options of each way; teacher None: training without a teacher."""
    crop = {"augment": fmn.crop_flip(4)}
    return {
        "train": (None, {}),
        "train, augmented": (None, crop),
        "cached": (nine, {"targets": "cached"}),
        "cached, top_k=10": (nine, {"targets": "cached", "top_k": 10}),
        "cached-views, views=4": (nine, {"targets": "cached-views", "views": 4, **crop}),
        "online, 1 teacher": (one, {"targets": "online", **crop}),
        "online, 9 members": (nine, {"targets": "online", **crop}),
    }


def train_or_distill(s: Setting, split: Split, teacher: nn.Module | None, options: dict[str, Any]) -> list[float]:
    """Seconds before the first epoch, then of each epoch."""
    call: Any = partial(fmn.train, s.make_model(), split.train, split.select)
    if teacher is not None:
        call = partial(fmn.distill, s.make_model(), teacher, split.train, val_data=split.select)
    with tempfile.TemporaryDirectory() as folder:
        return epoch_seconds(partial(call, **s.recipe, **options, epochs=s.epochs, run_dir=folder))


def compare_targets(s: Setting, teacher: nn.Module, split: Split) -> None:
    """Check that cached targets and targets computed online give the same student."""
    few, found = (split.train[0][:512], split.train[1][:512]), {}
    for targets in ("cached", "online"):
        student = fmn.distill(s.make_model(), teacher, few, targets=targets, epochs=1, **s.recipe)
        found[targets] = predict(student, split.select)[0]
    if not torch.allclose(found["cached"], found["online"], atol=1e-3 if s.device == "cpu" else 0.1):
        raise AssertionError("cached targets and online targets give different students")


def memory_row(s: Setting, program: str) -> dict[str, Any]:
    """Peak memory of two epochs on random data, in a new process."""
    return {**s._asdict(), "program": program, **in_new_process(peak_memory, tuple(s._replace(epochs=2)), program)}


def peak_memory(fields: tuple[Any, ...], program: str) -> dict[str, float | None]:
    """Train in this process; its memory before and at most, in MiB."""
    s = Setting(*fields)
    split, model = s.split(None), s.make_model()
    before = peak_kib() / 1024
    with tempfile.TemporaryDirectory() as folder:
        {"plain": plain_loop.train, "recorded": train_recorded}[program](model, s, split, Path(folder))
    on_gpu = torch.cuda.max_memory_allocated() / 2**20 if s.device == "cuda" else None
    return {"before_mib": before, "peak_mib": peak_kib() / 1024, "gpu_mib": on_gpu}


def accuracy_row(s: Setting, root: str | None, n_seeds: int) -> dict[str, Any]:
    """Test accuracy of the plain loop and of `fmn.train`: the same first weights, another order of the samples."""
    scores: dict[str, list[float]] = {"plain": [], "recorded": []}
    for seed in range(n_seeds):
        split = s.split(root, seed)
        for name, program in (("plain", plain_loop.train), ("recorded", train_recorded)):
            model = s.make_model(seed)
            with tempfile.TemporaryDirectory() as folder:
                program(model, s, split, Path(folder), seed)
            probs, labels = predict(model, split.test)
            scores[name].append((probs.argmax(1) == labels).double().mean().item())
    columns = {**scores, "difference": list(np.subtract(scores["recorded"], scores["plain"]))}
    return {**s._asdict(), "accuracies": scores, "mean_and_error": {k: mean_and_error(v) for k, v in columns.items()}}


def training_settings(device: str, quick: bool) -> tuple[list[Setting], Setting]:
    """Settings that are trained, and the one that is evaluated and distilled."""
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


def accuracy_settings(device: str, quick: bool, with_mnist: bool) -> list[Setting]:
    """Settings whose accuracy is compared."""
    settings = [Setting("digits", device, batch_size=64, n_train=800, n_val=297, n_test=700, epochs=40)]
    settings += [Setting("mnist", device, batch_size=64, n_train=2_000, epochs=10)] if with_mnist else []
    return [s._replace(n_train=64, epochs=2) for s in settings] if quick else settings


def benchmark(data: str | None, out: str | None, quick: bool = False, device: str | None = None, only: str = "") -> str:
    """Run everything; write training.json and training.md into `out`; return the Markdown.

    Parameters
    ----------
    data : str or None
        Folder of the data sets; None: random data.
    out : str or None
    quick : bool, default False
        Use tiny data, for a test.
    device : {"cpu", "cuda"}, optional
        Default: "cuda" if there is a GPU.
    only : str, default ""
        Regular expression: run the parts whose names it matches. The parts are "training NAME" for each
        `Setting.name`, "evaluation", "distillation", "memory" and "accuracy".

    Raises
    ------
    ValueError
        There is no such device, or no such part.
    """
    check_device(device or "cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    todo = {name: part for name, part in parts(data, quick, device).items() if re.search(only, name)}
    if not todo:
        raise ValueError(f"--only: no part matches {only!r}")
    asked = f" --only '{only}'" if only else ""
    result: dict[str, Any] = {
        "format": "fmn_ref.training-benchmark",
        "version": 1,
        "command": f"fmn-ref bench training{' --data ROOT' if data else ''} --device {device}{asked}",
        "quick": quick,
        "machine": machine() | {"device": device_name(device), "threads": torch.get_num_threads()},
    }
    for name, part in todo.items():
        section, *setting = name.split(" ")
        if setting:
            result.setdefault(section, []).append(part())
        else:
            result[section] = part()
    text = markdown(result)
    if out is not None:
        write_result(out, "training", result, text)
    return text


def parts(data: str | None, quick: bool, device: str) -> dict[str, Callable[[], Any]]:
    """What the benchmark measures: a call for each part, by name."""
    rows, base = training_settings(device, quick)
    repetitions, n_seeds = (1, 2) if quick else (3, 5)
    programs = ("plain", "recorded") if sys.platform == "linux" else ()
    compared = accuracy_settings(device, quick, data is not None)
    return {
        **{f"training {s.name}": partial(time_training, s, data, repetitions) for s in rows},
        "evaluation": partial(time_evaluation, base, data, repetitions),
        "distillation": partial(time_distillation, base, data, repetitions),
        "memory": lambda: [memory_row(base, program) for program in programs],
        "accuracy": lambda: [accuracy_row(s, data, n_seeds) for s in compared],
    }
