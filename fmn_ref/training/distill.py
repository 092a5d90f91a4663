"""distill: train one model of the original size on the soft targets of an ensemble.

student = fmn.distill(make_model(), fmn.FusedModel(plan, run), (x_train, y_train), epochs=40)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from ..runs.checkpoints import parameter_names
from ..runs.folder import AnyPath, RunFolder
from ..runs.run import Run
from . import data, distributed
from .agreement import Agreement
from .engine import Average, EarlyStopping, fit, shown
from .logits import checked_step
from .order import Order
from .recipe import Recipe
from .soft_targets import SoftTargets, Targets
from .store import IN_FULL, Store, base_digest

RULED_OUT = -1e30  # a log-probability below it is that of a class which the network masks


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train_data: Any,
    *,
    epochs: int,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    augment: data.Augment | None = None,
    forward_fn: data.Forward | None = None,
    run_dir: AnyPath | None = None,
    val_data: Any = None,
    keep: str = "all",
    half: bool = False,
    targets: str = "auto",
    views: int = 8,
    top_k: int | None = None,
    targets_dir: AnyPath | None = None,
    ema_decay: float | None = None,
    patience: int | None = None,
    resume: bool = True,
    disk_wait: float = 3600.0,
    progress: bool | None = None,
    **recipe: Any,
) -> nn.Module:
    """Train `student` on the soft targets of `teacher`.

    loss = kd_weight * temperature^2 * KL(teacher || student) + (1 - kd_weight) * cross-entropy(labels)

    The temperature softens both distributions; KL is summed over classes and averaged over samples. The papers give
    neither number. The defaults use the soft targets alone, which suits noisy labels.

    A warning is logged if the student rarely chooses the teacher's class on the last training batches: it then ends
    near chance, or far below its teacher.

    Parameters
    ----------
    student : nn.Module
        Trained in place, on the device where its parameters are. Returns logits or log-probabilities.
    teacher : nn.Module
        Returns logits or log-probabilities (as `FusedModel` does), not probabilities. It runs in evaluation mode,
        without gradients, on the student's device; afterwards its mode and its device are restored.
    train_data : (inputs, labels), torch Dataset or DataLoader
        As in `train`.
    epochs : int
        Number of passes over `train_data`, at least 1.
    temperature : float, default 1.0
        Above 0; larger values flatten both distributions.
    kd_weight : float, default 1.0
        Weight of the soft targets, in [0, 1]; the labels have the rest.
    augment : callable, optional
        As in `train`. With "cached-views" it must draw from torch's generators alone, and keep no state.
    forward_fn : callable(model, batch) -> (logits, labels), optional
        As in `train`; called for the student and for the teacher (for a `FusedModel`: for each member).
    run_dir : path, optional
        Folder for the state after each epoch, from which a killed distillation resumes, and for the soft targets. It
        belongs to the options, to each weight and buffer of the teacher, and for arrays to every input and to the
        teacher's first answers. Not compared: Datasets, DataLoaders, and the initial weights of the student.
    val_data : (inputs, labels), torch Dataset or DataLoader, optional
        Record the student on these samples, as `train` does; needs `run_dir`. ``Run.open(run_dir, student)`` can then
        be fused and distilled again.
    keep : str, default "all"
        Which checkpoints to keep, as in `Recorder`; only with `val_data`.
    half : bool, default False
        Store checkpoints in 16 bits, as in `Recorder`; only with `val_data`.
    targets : {"auto", "cached", "cached-views", "online"}, default "auto"
        When the teacher predicts. "cached": once for each sample; arrays without `augment` only. "cached-views": once
        for each of `views` augmented versions of the samples; epoch e trains on version e mod `views`, drawn again from
        its seed. "online": for every batch of the student. "auto": "cached" where it is possible, else "online".
    views : int, default 8
        Number of versions for "cached-views". The teacher makes one pass over the data for each.
    top_k : int, optional
        Cache only the k most likely classes of each sample, in 16 bits; the other classes share the rest equally.
        Default: cache all classes in 32 bits.
    targets_dir : path, optional
        Folder for cached soft targets; default: targets/ in `run_dir`, or memory without `run_dir`. Distillations of
        one teacher on the same data may share it.
    ema_decay : float, optional
        In [0, 1]. The student becomes the exponential moving average of its weights over the steps, and is recorded as
        such. Usual values: 0.99 to 0.999.
    patience : int, optional
        Stop when the accuracy on `val_data` has not risen for this many epochs; the student gets the weights of the
        best epoch.
    resume : bool, default True
        As in `train`.
    disk_wait : float, default 3600.0
        As in `train`.
    progress : bool, optional
        As in `train`.
    **recipe
        Fields of `Recipe`.

    Returns
    -------
    nn.Module
        `student`, in evaluation mode.

    Raises
    ------
    TypeError, ValueError
        An argument out of range, or one that does not fit the others; teacher and student with different numbers of
        classes; a teacher that answers "online" and shares a trained weight with the student; a `run_dir` or
        `targets_dir` that was made with another configuration.
    FileExistsError
        `run_dir` holds a run and `resume` is False.
    FloatingPointError
        The loss became NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(64, 8); y = (x[:, 0] > 0).long()
    >>> student = distill(torch.nn.Linear(8, 2), torch.nn.Linear(8, 2), (x, y), epochs=2, temperature=2.0)

    References
    ----------
    arXiv 2507.08686, Section V ("distilled KF"); Hinton et al. 2015, arXiv 1503.02531 (temperature and its square).
    """
    data.check_module(student, "student")
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("student: no parameter requires a gradient; the order is distill(student, teacher, ...)")
    settings = Recipe.of(recipe)
    setup = asdict(settings) | _checked_setup(epochs, temperature, kd_weight, ema_decay, patience, val_data, run_dir)
    folder = RunFolder(run_dir).targets if targets_dir is None and run_dir is not None else targets_dir
    options = targets, views, top_k, augment, forward_fn, folder
    source = _soft_targets(teacher, train_data, setup["epochs"], settings, *options)
    stored = None if val_data is None else keep, resume, half and parameter_names(student), disk_wait
    config = {} if run_dir is None else setup | source.identity | source.identity_in_full | base_digest(student)
    files = nullcontext() if run_dir is None else Store(run_dir, config, *stored)
    with files as store:
        if store is None or not store.load_final(student, setup["epochs"]):
            _fit_student(student, source, setup, val_data, store, progress)
    return student.eval()


def _soft_targets(
    teacher: Any, train_data: Any, epochs: int, recipe: Recipe, targets: str = "auto", views: int = 8, *options: Any
) -> SoftTargets:
    """Options of `distill` for its soft targets; a sweep gives them in place of the teacher."""
    if isinstance(teacher, SoftTargets):
        return teacher
    data.check_module(teacher, "teacher")
    views = min(_check.number(views, 1, 2**20, "views", int), epochs)
    return SoftTargets(teacher, train_data, recipe, targets, views, *options)


def _checked_setup(
    epochs: Any, temperature: Any, kd_weight: Any, ema_decay: Any, patience: Any, val_data: Any, run_dir: Any
) -> dict[str, Any]:
    """Check the options that decide, beside the recipe, how the student is trained; return them for run.json."""
    if val_data is not None and run_dir is None:
        raise ValueError("val_data: needs run_dir, where the history and the checkpoints go")
    if ema_decay is not None:
        ema_decay = _check.number(ema_decay, 0, 1, "ema_decay")
    if patience is not None:
        patience = _check.number(patience, 1, 2**31, "patience", int)
        if val_data is None:
            raise ValueError("patience: needs val_data, whose accuracy decides")
    checked = {
        "epochs": _check.number(epochs, 1, 2**31, "epochs", int),
        "temperature": _check.number(temperature, 1e-3, 1e3, "temperature"),
        "kd_weight": _check.number(kd_weight, 0, 1, "kd_weight"),
        "ema_decay": ema_decay,
        "patience": patience,
    }
    if val_data is None:
        return checked
    Order(val_data, "val_data")  # refuses a loader that shuffles
    return {**checked, "val_data": data.arrays_digest(val_data), f"val_data{IN_FULL}": data.full_digest(val_data)}


def _fit_student(
    student: nn.Module, source: SoftTargets, setup: dict[str, Any], val_data: Any, store: Any, progress: bool | None
) -> None:
    """Train the student in place, with the teacher on its device."""
    if source.targets == "online":
        _check_apart(student, source.teacher)
    device, evaluate, notes = data.device_of(student), None, {}
    decay, patience = setup["ema_decay"], setup["patience"]
    with data.evaluating(source.teacher, device):
        if val_data is not None:
            val = data.Batches(val_data, 256, device, split=True)
            predict = partial(data.predict, data=val, forward_fn=source.forward_fn)
            evaluate = partial(predict, order=Order(val_data, "val_data"))
            if distributed.broadcast(shown(progress)):  # every process predicts its part
                probs, labels = predict(source.teacher)
                notes = {"teacher": f"{(probs.argmax(1) == labels).double().mean():.2%}"}
        targets = source.open(device)
        loss_fn = Agreement(partial(distillation_loss, temperature=setup["temperature"], kd_weight=setup["kd_weight"]))
        fit(
            student,
            targets.batches,
            setup["epochs"],
            source.recipe,
            step=checked_step(targets.step),
            loss_fn=loss_fn,
            augment=targets.augment,
            evaluate=evaluate,
            store=store,
            average=None if decay is None else Average(student, decay),
            stopping=None if patience is None else EarlyStopping(patience),
            progress=progress,
            names=("distill", "student"),
            notes=notes,
        )
    if setup["kd_weight"] > 0:
        loss_fn.warn(source.recipe, setup["epochs"])


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that would change while it teaches."""
    theirs = set(map(id, teacher.parameters()))
    for name, p in student.named_parameters():
        if p.requires_grad and id(p) in theirs:
            raise ValueError(
                f"teacher: shares {name} with the student, which trains it; give it a copy (copy.deepcopy)"
            )


def distillation_loss(logits: Tensor, targets: Targets, *, temperature: float, kd_weight: float) -> Tensor:
    """Compute the loss of `distill`.

    A class that the student rules out, by a logit of -inf or near the smallest float, has no gradient: the student
    approaches the teacher's distribution over the other classes.

    Parameters
    ----------
    logits : (B, K) float tensor
        The student's.
    targets : tuple of (labels (B,), log-probabilities (B, K))
        The log-probabilities are the teacher's.
    temperature : float
    kd_weight : float

    Returns
    -------
    scalar tensor

    Raises
    ------
    ValueError
        Teacher and student have different numbers of classes.
    """
    labels, teacher_log_probs = targets
    if logits.shape != teacher_log_probs.shape:
        expected, got = tuple(logits.shape), tuple(teacher_log_probs.shape)
        raise ValueError(f"teacher: expected outputs of the student's shape {expected}, got shape {got}")
    student_logits = logits
    if temperature != 1:
        student_logits, teacher_log_probs = logits / temperature, teacher_log_probs / temperature
    log_probs = F.log_softmax(student_logits, 1).clamp_min(RULED_OUT)  # 0 * -inf would be NaN
    kd = F.kl_div(log_probs, teacher_log_probs.softmax(1), reduction="batchmean") * temperature**2
    if kd_weight == 1:
        return kd
    return kd_weight * kd + (1 - kd_weight) * F.cross_entropy(logits, labels)


class Sweep(NamedTuple):
    """Result of `tune_distillation`.

    Attributes
    ----------
    temperature, kd_weight : float
        The setting with the best accuracy on the selection set.
    run : Run
        Its run; ``run.model`` is the student.
    rows : list of dict
        Temperature, kd_weight and accuracy of every trial, in the order of trial.
    """

    temperature: float
    kd_weight: float
    run: Run
    rows: list[dict[str, float]]


def tune_distillation(
    make_student: Callable[[], nn.Module],
    teacher: nn.Module,
    train_data: Any,
    val_data: Any,
    *,
    epochs: int,
    run_dir: AnyPath,
    temperatures: Sequence[float] = (1.0, 2.0, 4.0),
    kd_weights: Sequence[float] = (1.0, 0.7),
    **options: Any,
) -> Sweep:
    """Distil with every pair of temperature and kd_weight; choose the pair with the best selection accuracy.

    The accuracy of a trial is that of its last epoch (with `patience`: of its best epoch). Of equal trials, the first
    wins. The defaults make six trials. Cached soft targets are computed once for all trials. A killed sweep resumes.

    Parameters
    ----------
    make_student : callable() -> nn.Module
        Returns a new network. torch's generator is seeded with `seed` before each call, so that all trials start from
        the same weights.
    teacher : nn.Module
        As in `distill`.
    train_data : (inputs, labels), torch Dataset or DataLoader
        As in `distill`.
    val_data : (inputs, labels), torch Dataset or DataLoader
        The selection set. Its accuracy decides, so the winner's is biased upwards: score on other samples.
    epochs : int
        Of each trial.
    run_dir : path
        Each trial is a run in a subfolder.
    temperatures : sequence of float, default (1.0, 2.0, 4.0)
    kd_weights : sequence of float, default (1.0, 0.7)
    **options
        Further keywords of `distill`.

    Returns
    -------
    Sweep
        ``sweep.run.model`` is the best student, in evaluation mode.

    Raises
    ------
    TypeError, ValueError
        As `distill`; no temperature or no kd_weight.

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
    options = {"targets_dir": RunFolder(run_dir).targets, **options, "epochs": epochs, "val_data": val_data}
    source = _shared_targets(teacher, train_data, **options)
    rows = list[dict[str, float]]()
    for temperature, kd_weight in trials:
        folder = RunFolder(run_dir).path / f"temperature_{temperature:g}_kd_weight_{kd_weight:g}"
        options |= {"temperature": temperature, "kd_weight": kd_weight, "run_dir": folder}
        with torch.random.fork_rng():
            torch.manual_seed(options.get("seed", 0))
            student = make_student()
        distill(student, source, train_data, **options)
        run = Run.open(folder, student, options.get("forward_fn"))
        accuracies = run.history.correct().mean(1)
        accuracy = float(accuracies.max() if options.get("patience") else accuracies[-1])
        if all(accuracy > row["accuracy"] for row in rows):
            best = Sweep(temperature, kd_weight, run, rows)
        rows.append({"temperature": temperature, "kd_weight": kd_weight, "accuracy": accuracy})
    return best


def _shared_targets(teacher: Any, train_data: Any, *, epochs: Any, targets_dir: AnyPath, **options: Any) -> Any:
    """Soft targets for all trials of a sweep, which read them once."""
    recipe = Recipe(**{f.name: options[f.name] for f in fields(Recipe) if f.name in options})
    n_epochs = _check.number(epochs, 1, 2**31, "epochs", int)
    names = {"targets": "auto", "views": 8, "top_k": None, "augment": None, "forward_fn": None}
    chosen = (options.get(name, default) for name, default in names.items())
    return _soft_targets(teacher, train_data, n_epochs, recipe, *chosen, targets_dir)
