"""Forgotten and recovered: what a fused model or a student brings back, and what it newly loses. NumPy only."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..metrics.curves import correctness
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest

Bool = NDArray[np.bool_]
_COLUMNS = ("sample_id", "group", "final", "forgotten")  # of the table per sample, before the predictors


@dataclass(frozen=True, eq=False)
class Recovery:
    """Which samples the final model forgot and lost, and which of them other predictors get right.

    Attributes
    ----------
    final : (n_samples,) bool
        Right by the final model.
    forgotten : (n_samples,) bool
        Right at some epoch and wrong at the end.
    right : {name: (n_samples,) bool}
        Right by each of the other predictors.
    groups : (n_samples,) integers, or None
    sample_ids : list
    """

    final: Bool
    forgotten: Bool
    right: dict[str, Bool]
    groups: NDArray[np.int64] | None
    sample_ids: list[Any]

    def counts(self, group: int | None = None) -> dict[str, dict[str, int]]:
        """{name: counts} over all samples or one group: samples; forgotten; recovered, forgotten and now right; never
        right before and now right (new); lost, right by the final model and now wrong; right."""
        inside: Bool = np.ones(len(self.final), bool)
        if group is not None:
            if self.groups is None:
                raise ValueError("group: recovery was called without groups")
            inside = self.groups == group
        never = ~self.final & ~self.forgotten
        return {
            name: {
                "samples": int(inside.sum()),
                "final": int((self.final & inside).sum()),
                "forgotten": int((self.forgotten & inside).sum()),
                "recovered": int((self.forgotten & right & inside).sum()),
                "new": int((never & right & inside).sum()),
                "lost": int((self.final & ~right & inside).sum()),
                "right": int((right & inside).sum()),
            }
            for name, right in self.right.items()
        }

    def to_markdown(self) -> str:
        """A row per predictor, and per group if there are groups."""
        columns = ["samples", "final", "forgotten", "recovered", "new", "lost", "right"]
        head = ["predictor", *([] if self.groups is None else ["group"]), *columns]
        lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
        chosen: list[int | None] = [None, *([] if self.groups is None else np.unique(self.groups).tolist())]
        for name in self.right:
            for group in chosen:
                values = [str(self.counts(group)[name][c]) for c in columns]
                of = [] if self.groups is None else ["all" if group is None else str(group)]
                lines.append("| " + " | ".join([name, *of, *values]) + " |")
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """A row per sample: id, group, right by the final model, forgotten, right by each predictor (0 or 1)."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        of = {} if self.groups is None else {"group": self.groups}
        columns: dict[str, Any] = {**of, "final": self.final * 1, "forgotten": self.forgotten * 1}
        columns |= {name: right * 1 for name, right in self.right.items()}
        writer.writerow(["sample_id", *columns])
        writer.writerows(zip(self.sample_ids, *(c.tolist() for c in columns.values()), strict=True))
        return out.getvalue()


def recovery(
    correct: Any, predictions: dict[str, Any], labels: Any, *, groups: Any = None, sample_ids: Any = None
) -> Recovery:
    """Of what the final model forgot, what others bring back, and what they newly lose.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1, or a CorrectnessHistory
        The run's history on these samples.
    predictions : {name: array}
        Of each predictor to look at (the fused model, the student): classes (n_samples,) or scores (n_samples,
        n_classes).
    labels : (n_samples,) integers
    groups : (n_samples,) integers, optional
        Classes or any other groups; `groups=labels` for classes.
    sample_ids : sequence of n_samples, optional
        For the table per sample; default 0, 1, ...

    Returns
    -------
    Recovery

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit, values out of range; a history of other samples.

    Examples
    --------
    >>> r = recovery([[1, 1, 0], [1, 0, 0]], {"fused": [0, 1, 0]}, [0, 1, 1])
    >>> r.counts()["fused"]["recovered"], r.counts()["fused"]["lost"]
    (1, 0)

    References
    ----------
    arXiv 2507.08686, Section III: forgotten samples.
    """
    history = _check.bool_matrix(correct)
    n = history.shape[1]
    y = _check.labels(labels, n)
    if not isinstance(predictions, dict):
        raise TypeError(f"predictions: expected {{name: array}}, got {type(predictions).__name__}")
    if isinstance(correct, CorrectnessHistory) and correct.digest not in (NO_LABELS, labels_digest(y)):
        raise ValueError("correct: a history of other labels, or in another order")
    right = {}
    for name, p in predictions.items():
        if name in _COLUMNS:
            raise ValueError(f"predictions: {name!r} is the name of another column; choose another")
        right[name] = correctness(p, y)
        if right[name].shape != (n,):
            raise ValueError(f"predictions[{name!r}]: expected one prediction per sample, got {right[name].shape}")
    of = None if groups is None else _check.labels(groups, n, name="groups")
    ids = list(range(n)) if sample_ids is None else list(sample_ids)
    if len(ids) != n:
        raise ValueError(f"sample_ids: expected {n}, got {len(ids)}")
    final = history[-1]
    return Recovery(final, history.any(0) & ~final, right, of, ids)
