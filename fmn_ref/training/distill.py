"""distill: one model of the original size that learns what an ensemble says.

student = fmn.distill(make_model(), fmn.FusedModel(plan, run), (x_train, y_train), epochs=40)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from ..runs.run import Run
from . import data, soft_targets
from .engine import Average, EarlyStopping, fit, hidden
from .recipe import Recipe
from .store import Store
from .train import data_digest, tensors_digest


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train_data: Any,
    *,
    epochs: int,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    augment: Callable[[Tensor], Tensor] | None = None,
    forward_fn: data.Forward | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    val_data: Any = None,
    keep: str = "all",
    half: bool = False,
    targets: str = "auto",
    views: int = 8,
    top_k: int | None = None,
    targets_dir: str | os.PathLike[str] | None = None,
    ema_decay: float | None = None,
    patience: int | None = None,
    resume: bool = True,
    disk_wait: float = 3600.0,
    progress: bool | None = None,
    **recipe: Any,
) -> nn.Module:
    """Train `student` on the soft targets of `teacher`.

    loss = kd_weight * temperature^2 * KL(teacher || student) + (1 - kd_weight) * cross-entropy(labels), both
    distributions softened by the temperature, the sum over classes, the mean over samples. The papers give neither
    number; the defaults are the plain soft targets without the given labels, which is what one wants where those are
    noisy.

    Parameters
    ----------
    student : nn.Module
        Trained in place, on the device where its parameters are.
    teacher : nn.Module
        Any module that gives logits or log-probabilities (FusedModel does), not probabilities; used in evaluation mode,
        without gradients, on the student's device, and left as it was.
    train_data
        As in `train`.
    epochs : int
    temperature : float > 0
    kd_weight : float in [0, 1]
    augment : callable, optional
        As in `train`.
    targets : str
        How the teacher is asked. "cached": once per sample, for arrays without `augment`. "cached-views": once for each
        of `views` augmented versions of the samples, which are drawn again from their stored seeds, one version an
        epoch in turn. "online": on every batch that the student sees. "auto": "cached" where it is possible, else
        "online".
    views : int
        For "cached-views"; more are more varied, and each costs the teacher one pass over the data.
    top_k : int, optional
        What is cached is the k likeliest classes in 16 bits; the rest is spread evenly over the others.
    targets_dir : path, optional
        Where to cache; default: targets/ in `run_dir`, and memory without one. Distillations of the same teacher on the
        same data may share it.
    ema_decay : float in [0, 1], optional
        The student is an exponential moving average over the steps (0.99 to 0.999 are usual), and is recorded as such.
    patience : int, optional
        Stop when the accuracy on `val_data` has not risen for so many epochs; the student is the best epoch's.
    forward_fn
        As in `train`; used for both models.
    run_dir : path, optional
        Keeps the state after each epoch there, so that a killed distillation continues, and in targets/ what the
        teacher said (memory-mapped).
    val_data, keep, half : optional
        With `run_dir`: record the student on these samples as `train` does, so that `Run.open(run_dir, student)` can be
        fused and distilled in its turn.
    resume, disk_wait, progress, **recipe
        As in `train`.

    Returns
    -------
    nn.Module
        The student, in evaluation mode.

    Raises
    ------
    ValueError, TypeError
        A value out of range; teacher and student that differ in their classes; a `run_dir` of something else.
    FloatingPointError
        The loss became NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(64, 8); y = (x[:, 0] > 0).long()
    >>> student = distill(torch.nn.Linear(8, 2), torch.nn.Linear(8, 2), (x, y), epochs=2, temperature=2.0)

    References
    ----------
    arXiv 2507.08686, Section V ("distilled KF"); Hinton et al. 2015 (temperature and its square).
    """
    settings = Recipe.of(recipe)
    epochs = _check.number(epochs, 1, 2**31, "epochs", int)
    temperature = _check.number(temperature, 1e-3, 1e3, "temperature")
    kd_weight = _check.number(kd_weight, 0, 1, "kd_weight")
    data.check_module(student, "student")
    data.check_module(teacher, "teacher")
    if val_data is not None and run_dir is None:
        raise ValueError("val_data: needs run_dir, where the history and the checkpoints go")
    way = _way(targets, views, top_k, train_data, augment)
    asked: dict[str, Any] = {"targets": way, "top_k": top_k, "data": data_digest(train_data)}
    asked["teacher"] = tensors_digest(teacher.state_dict().values())
    if way == "cached-views":
        asked["view_seeds"] = [soft_targets.view_seed(settings.seed, view) for view in range(min(views, epochs))]
    if targets_dir is None and run_dir is not None:
        targets_dir = Path(run_dir) / "targets"
    stopping = None if patience is None else EarlyStopping(_check.number(patience, 1, 2**31, "patience", int))
    if stopping is not None and val_data is None:
        raise ValueError("patience: needs val_data, whose accuracy it looks at")
    average = None if ema_decay is None else Average(student, _check.number(ema_decay, 0, 1, "ema_decay"))
    store = None
    if run_dir is not None:
        config = {"epochs": epochs, "temperature": temperature, "kd_weight": kd_weight, **asdict(settings)}
        config |= {"ema_decay": ema_decay, "patience": patience, **asked}
        if val_data is not None:
            config["val_data"] = data_digest(val_data)
        recorded = None if val_data is None else keep
        options: dict[str, Any] = {"half": half, "forward_fn": forward_fn, "disk_wait": disk_wait}
        store = Store(run_dir, config, student, recorded, resume=resume, **options)
        if store.load_final(student, epochs):
            store.__exit__(None, None, None)
            return student.eval()
    device = data.device_of(student)
    evaluate, notes = None, {}
    with _borrowed(teacher, device), store or nullcontext():
        if val_data is not None:
            val = data.Batches(val_data, 256, device, split=True)
            evaluate = partial(data.predict, data=val, forward_fn=forward_fn)
            if not hidden(progress):
                probs, labels = evaluate(teacher)
                notes = {"teacher": f"{(probs.argmax(1) == labels).double().mean():.2%}"}
        if way == "online":
            batches = data.Batches(train_data, settings.batch_size, device, shuffle=True, split=True)
            first = next(iter(data.Batches(train_data, settings.batch_size, device)), None)
            if first is not None:  # refused at once where it gives no logits
                data.predict(teacher, [first], forward_fn=forward_fn)
            source: Any = batches, partial(soft_targets.online, teacher, forward_fn), augment
        else:
            cached = soft_targets.Cached(
                teacher,
                train_data,
                settings.batch_size,
                device,
                augment=augment,
                view_seeds=asked.get("view_seeds", [0]),
                forward_fn=forward_fn,
                folder=None if targets_dir is None else Path(targets_dir),
                identity=asked,
                top_k=top_k,
            )
            source = cached.batches, cached.step, None
        fit(
            student,
            source[0],
            epochs,
            settings,
            step=source[1],
            loss_fn=partial(distillation_loss, temperature=temperature, kd_weight=kd_weight),
            augment=source[2],
            evaluate=evaluate,
            store=store,
            average=average,
            stopping=stopping,
            progress=progress,
            names=("distill", "student"),
            notes=notes,
        )
    return student.eval()


def _way(targets: str, views: int, top_k: int | None, train_data: Any, augment: Any) -> str:
    """The way to ask the teacher, checked against what is given."""
    _check.choice(targets, ("auto", "cached", "cached-views", "online"), "targets")
    if targets == "auto":
        targets = "cached" if augment is None and data.is_arrays(train_data) else "online"
    if targets != "online" and not data.is_arrays(train_data):
        raise ValueError(f"targets: {targets!r} needs train_data as arrays, in an order that does not change")
    if targets == "cached" and augment is not None:
        raise ValueError("targets: 'cached' knows nothing of augmented samples; use 'cached-views' or 'online'")
    if targets == "cached-views" and augment is None:
        raise ValueError("targets: 'cached-views' needs augment; without it, 'cached' is the same")
    _check.number(views, 1, 2**20, "views", int)
    if top_k is not None:
        _check.number(top_k, 1, 2**31, "top_k", int)
        if targets == "online":
            raise ValueError("top_k: compresses what is kept, and 'online' keeps nothing")
    return targets


@contextmanager
def _borrowed(teacher: nn.Module, device: torch.device) -> Iterator[None]:
    """The teacher on the device and in evaluation mode; afterwards as it was."""
    home = data.device_of(teacher)
    teacher.to(device)
    try:
        with data.evaluating(teacher):
            yield
    finally:
        teacher.to(home)


def distillation_loss(logits: Tensor, targets: soft_targets.Targets, *, temperature: float, kd_weight: float) -> Tensor:
    """The loss of `distill`, from logits (B, K) and labels (B,) with the teacher's log-probabilities (B, K)."""
    labels, teacher_log_probs = targets
    if logits.shape != teacher_log_probs.shape:
        shapes = tuple(teacher_log_probs.shape), tuple(logits.shape)
        raise ValueError(f"teacher: gives outputs of shape {shapes[0]}, student {shapes[1]}")
    soft = (teacher_log_probs / temperature).softmax(1)
    kd = F.kl_div(F.log_softmax(logits / temperature, 1), soft, reduction="batchmean") * temperature**2
    if kd_weight == 1:
        return kd
    return kd_weight * kd + (1 - kd_weight) * F.cross_entropy(logits, labels)


class Sweep(NamedTuple):
    """What `tune_distillation` found: the best setting and its run, and all that were tried."""

    temperature: float
    kd_weight: float
    run: Run
    rows: list[dict[str, float]]  # temperature, kd_weight, accuracy on the selection set; in the order of trial


def tune_distillation(
    make_student: Callable[[], nn.Module],
    teacher: nn.Module,
    train_data: Any,
    val_data: Any,
    *,
    epochs: int,
    run_dir: str | os.PathLike[str],
    temperatures: Sequence[float] = (1.0, 2.0, 4.0),
    kd_weights: Sequence[float] = (1.0, 0.7),
    **options: Any,
) -> Sweep:
    """Distil with every temperature and kd_weight; take what is best on the selection set.

    The accuracy of a trial is that of its last epoch (with `patience`, of its best), ties go to the earlier trial. The
    default is six trials; the teacher is asked once for all of them where its answers are cached. A killed sweep
    continues where it was.

    Parameters
    ----------
    make_student : callable() -> nn.Module
        A fresh network; torch's generator is seeded with `seed` before each call, so that all start alike.
    teacher, train_data, epochs
        As `distill`.
    val_data
        The selection set: its accuracy decides, so it flatters the result. Score on other samples.
    run_dir : path
        Each trial leaves a run in a folder of its own here.
    temperatures, kd_weights : sequences of float
    **options
        Further keywords of `distill`.

    Returns
    -------
    Sweep
        ``sweep.run.model`` is the best student, in evaluation mode.

    Raises
    ------
    ValueError, TypeError
        As `distill`; nothing to try.

    Examples
    --------
    >>> import tempfile, torch
    >>> x = torch.randn(64, 8); y = (x[:, 0] > 0).long()
    >>> teacher, make_student = torch.nn.Linear(8, 2), lambda: torch.nn.Linear(8, 2)
    >>> sweep = tune_distillation(make_student, teacher, (x, y), (x, y), epochs=1, run_dir=tempfile.mkdtemp())
    >>> len(sweep.rows)
    6
    """
    trials = [(float(t), float(w)) for t in temperatures for w in kd_weights]
    if not trials:
        raise ValueError("temperatures, kd_weights: expected at least one of each")
    folder = Path(run_dir)
    rows, best = list[dict[str, float]](), None
    for temperature, kd_weight in trials:
        with torch.random.fork_rng():
            torch.manual_seed(options.get("seed", 0))
            student = make_student()
        own = folder / f"temperature_{temperature:g}_kd_weight_{kd_weight:g}"
        settings = {"targets_dir": folder / "targets", **options, "temperature": temperature, "kd_weight": kd_weight}
        distill(student, teacher, train_data, epochs=epochs, val_data=val_data, run_dir=own, **settings)
        run = Run.open(own, student, options.get("forward_fn"))
        accuracy = run.history.correct().mean(1)
        score = float(accuracy.max() if options.get("patience") else accuracy[-1])
        rows.append({"temperature": temperature, "kd_weight": kd_weight, "accuracy": score})
        if best is None or score > best.rows[0]["accuracy"]:
            best = Sweep(temperature, kd_weight, run, rows[-1:])
    assert best is not None
    return best._replace(rows=rows)
