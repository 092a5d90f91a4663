"""Count the forgotten samples that a fused model or a student recovers, and the samples it loses. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _check
from .._check import Bool, Int
from ..metrics.curves import correctness
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest
from .tables import csv_table, markdown_table

KINDS = ("samples", "final", "forgotten", "recovered", "new", "lost", "right")


@dataclass(frozen=True, eq=False)
class Recovery:
    """Samples that the final model forgot, and samples that other predictors classify correctly.

    Attributes
    ----------
    final : (n_samples,) bool
        Samples that the final model classifies correctly.
    forgotten : (n_samples,) bool
        Samples that are right at some epoch and wrong at the end.
    right : {name: (n_samples,) bool}
        Samples that each of the other predictors classifies correctly.
    groups : (n_samples,) integers, or None
    sample_ids : list
    """

    final: Bool
    forgotten: Bool
    right: dict[str, Bool]
    groups: Int | None
    sample_ids: list[Any]

    def counts(self, group: int | None = None) -> dict[str, dict[str, int]]:
        """Count samples for each predictor.

        Parameters
        ----------
        group : int, optional
            Count the samples of this group only. Default: all samples.

        Returns
        -------
        {name: {kind: int}}
            The kinds are:

            - samples: all samples;
            - final: right by the final model;
            - forgotten: right at some epoch, wrong by the final model;
            - recovered: forgotten, and right by this predictor;
            - new: right at no epoch, and right by this predictor;
            - lost: right by the final model, and wrong by this predictor;
            - right: right by this predictor.
        """
        inside: Bool = np.ones(len(self.final), bool)
        if group is not None:
            if self.groups is None:
                raise ValueError("group: recovery was called without groups")
            inside = self.groups == group
        final, forgotten = self.final & inside, self.forgotten & inside
        never = inside & ~final & ~forgotten
        found = {}
        for name, right in self.right.items():
            masks = (inside, final, forgotten, forgotten & right, never & right, final & ~right, right & inside)
            found[name] = {kind: int(mask.sum()) for kind, mask in zip(KINDS, masks, strict=True)}
        return found

    def to_markdown(self) -> str:
        """Table with a row per predictor and, if there are groups, per group."""
        groups = [] if self.groups is None else np.unique(self.groups).tolist()
        counts = {"all": self.counts()} | {str(group): self.counts(group) for group in groups}
        rows = []
        for name in self.right:
            for group, found in counts.items():
                label = [group] if groups else []
                rows.append([name, *label, *map(str, found[name].values())])
        return markdown_table(["predictor", *(["group"] if groups else []), *KINDS], rows)

    def to_csv(self) -> str:
        """Table with a row per sample: id, group, and 0 or 1 for final, forgotten and each predictor."""
        columns: dict[str, Any] = {} if self.groups is None else {"group": self.groups}
        columns |= {"final": self.final * 1, "forgotten": self.forgotten * 1}
        columns |= {name: right * 1 for name, right in self.right.items()}
        rows = zip(self.sample_ids, *(c.tolist() for c in columns.values()), strict=True)
        return csv_table(["sample_id", *columns], rows)


def recovery(
    correct: Any, predictions: dict[str, Any], labels: Any, *, groups: Any = None, sample_ids: Any = None
) -> Recovery:
    """Count the samples that the final model forgot, and those that other predictors recover or lose.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1, or a CorrectnessHistory
        Correctness history of the run on these samples.
    predictions : {name: array}
        Predictions of each predictor (fused model, student): classes (n_samples,) or scores (n_samples, n_classes).
    labels : (n_samples,) integers
    groups : (n_samples,) integers, optional
        Group of each sample; `groups=labels` counts per class.
    sample_ids : sequence of n_samples, optional
        Ids for the table per sample. Default: 0, 1, ...

    Returns
    -------
    Recovery

    Raises
    ------
    TypeError, ValueError
        Shapes that do not match, values out of range, or a history of other samples.

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
        if name in ("sample_id", "group", "final", "forgotten"):  # the first columns of `to_csv`
            raise ValueError(f"predictions: {name!r} is the name of another column; choose another")
        right[name] = correctness(p, y)
        if right[name].shape != (n,):
            raise ValueError(f"predictions[{name!r}]: expected one prediction per sample, got {right[name].shape}")
    group_of = None if groups is None else _check.labels(groups, n, name="groups")
    ids = list(range(n)) if sample_ids is None else list(sample_ids)
    if len(ids) != n:
        raise ValueError(f"sample_ids: expected {n}, got {len(ids)}")
    final = history[-1]
    return Recovery(final, history.any(0) & ~final, right, group_of, ids)
