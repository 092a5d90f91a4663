"""distill: one model of the original size that learns what an ensemble says.

student = fmn.distill(make_model(), fmn.FusedModel(plan, run), (x_train, y_train), epochs=40)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, checkpoints, data
from .recorder import Recorder, claim
from .training import Recipe, data_digest, fit, recording_hooks, tensors_digest

Targets = tuple[Tensor, Tensor]  # labels (B,), the teacher's log-probabilities (B, K)


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
    resume: bool = True,
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
        As in `train`. Without it, and with data given as arrays, the teacher is asked once per sample; else on every
        batch.
    forward_fn
        As in `train`; used for both models.
    run_dir : path, optional
        Keeps the state after each epoch there, so that a killed distillation continues.
    val_data, keep, half : optional
        With `run_dir`: record the student on these samples as `train` does, so that `Run.open(run_dir, student)` can be
        fused and distilled in its turn.
    resume, progress, **recipe
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
    resume_path = None
    if val_data is not None and run_dir is None:
        raise ValueError("val_data: needs run_dir, where the history and the checkpoints go")
    recording: dict[str, Any] = {}
    if run_dir is not None:
        config = {"epochs": epochs, "temperature": temperature, "kd_weight": kd_weight, **asdict(settings)}
        config |= {"data": data_digest(train_data), "teacher": tensors_digest(teacher.state_dict().values())}
        if val_data is not None:
            config["val_data"] = data_digest(val_data)
        resume_path = claim(Path(run_dir), config, resume) / "resume.pt"
        if val_data is not None:
            recorder = Recorder(run_dir, student, keep, half=half, forward_fn=forward_fn)
            if recorder.next_epoch == epochs and not resume_path.exists():  # complete, and tidied up by somebody
                return checkpoints.load_into(student, recorder.run.checkpoints[-1]).eval()
            recording = recording_hooks(recorder, resume_path, student, val_data, forward_fn)
    cached = augment is None and data.is_arrays(train_data)
    with _borrowed(teacher, data.device_of(student)):
        if cached:
            soft, _ = data.predict(teacher, train_data, forward_fn=forward_fn, log=True)
            train_data = (*data.as_tensors(train_data), soft)
        else:
            first = next(data.batches(train_data, settings.batch_size, data.device_of(student)), None)
            if first is not None:  # refused at once where it gives no logits
                data.predict(teacher, [first], forward_fn=forward_fn)
        fit(
            student,
            train_data,
            epochs,
            settings,
            augment=augment,
            forward_fn=partial(_forward_cached if cached else _forward_online, teacher, forward_fn),
            loss_fn=partial(distillation_loss, temperature=temperature, kd_weight=kd_weight),
            progress=progress,
            description="distill",
            resume_path=resume_path,
            **recording,
        )
    return student.eval()


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


def _forward_cached(
    teacher: nn.Module, forward_fn: data.Forward | None, student: nn.Module, batch: Any
) -> tuple[Tensor, Targets]:
    """The student's logits, and targets of which the batch's last array is the teacher's part."""
    logits, labels = data.forward(student, batch[:-1], forward_fn)
    return logits, (labels, batch[-1])


def _forward_online(
    teacher: nn.Module, forward_fn: data.Forward | None, student: nn.Module, batch: Any
) -> tuple[Tensor, Targets]:
    """The student's logits, and targets with what the teacher says about the same batch."""
    logits, labels = data.forward(student, batch, forward_fn)
    with torch.no_grad():
        return logits, (labels, data.forward(teacher, batch, forward_fn)[0].float().log_softmax(1))


def distillation_loss(logits: Tensor, targets: Targets, *, temperature: float, kd_weight: float) -> Tensor:
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
