"""Checks of what a network returns: logits, one row for each label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import _check

TAKE_FORWARD = "train, from_checkpoints and Run.open take it; --forward-fn"  # for messages
Step = Callable[[nn.Module, Any], tuple[Tensor, Any]]  # (model, batch) -> outputs, targets


def check_pair(logits: Tensor, labels: Any) -> None:
    """Raise a ValueError unless a batch has one row of logits for each label."""
    shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
    if logits.ndim != 2 or shape != (len(logits),):
        expected = "expected logits (n, n_classes) and labels (n,), which a forward_fn may make"
        raise ValueError(f"model: {expected}, got shapes {tuple(logits.shape)} and {shape}")


def check_logits(logits: Any, hint: str) -> None:
    """Raise a ValueError, which ends with the hint, where logits have a wrong shape or are probabilities.

    Probabilities that were changed, so that no rounding explains their sums, are not noticed.
    """
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[-1] < 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits (n, n_classes), got {got}; {hint}")
    if logits.numel() and (logits >= 0).all() and _check.sums_to_one(logits.detach()):
        raise ValueError(f"model: expected logits or log-probabilities, got probabilities; {hint}")


def conversion_hint(labels: Any, logits: Any) -> str:
    """What makes classes of labels in another form."""
    shape: Any = getattr(labels, "shape", ())
    if len(shape) == 2 and shape[1] == 1:
        return "; labels[:, 0] has it"
    if len(shape) == 2 and shape == getattr(logits, "shape", ()):
        return "; one-hot? labels.argmax(1) are classes"
    return "; of tokens? forward_fn=causal_lm_forward" if len(shape) == 2 else ""


def predicted_classes(logits: Tensor) -> Tensor:
    """Return the likeliest class of each sample; ValueError where a logit is NaN."""
    highest, classes = logits.max(1)
    if highest.isnan().any():
        raise ValueError("model: expected numbers as logits, got NaN")
    return classes


def checked_step(step: Step) -> Step:
    """Check the first logits of a student that takes this step."""
    unchecked = [True]

    def checked(student: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        logits, targets = step(student, batch)
        if unchecked:
            check_logits(logits, "the student needs a forward_fn that converts them")
            unchecked.clear()
        return logits, targets

    return checked
