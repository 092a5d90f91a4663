"""Compare the fusion with its controls at equal cost: choose on one set, score on another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..fusion import baselines
from ..fusion.fuse import fuse
from ..fusion.methods import AUTO, METHODS
from ..fusion.mixtures import mixture
from ..fusion.plan import FusionPlan
from ..fusion.probabilities import ProbabilityReader
from .tables import csv_table, markdown_table

Int = NDArray[np.int64]
# Methods of `fuse` beside KF ("forget") and the plain means, which are controls at KF's cost.
OTHER_METHODS = (*(m.name for m in METHODS.values() if not m.control and m.name != "forget"), AUTO)
EMA_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)  # per epoch; the decay with the best selection accuracy is scored


@dataclass(frozen=True)
class Row:
    """Result of one method: accuracies in [0, 1], and the forward passes that one prediction costs."""

    method: str
    forward_passes: int
    selection_accuracy: float
    test_accuracy: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Table of a comparison and the plan of its KF row; `print` shows the table."""

    rows: list[Row]
    plan: FusionPlan
    n_selection: int
    n_test: int
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, method: str) -> Row:
        """Row of a method."""
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(f"{method!r}; there are {', '.join(r.method for r in self.rows)}")

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        columns = ["method", "forward passes", "selection accuracy", "test accuracy"]
        rows = [
            [r.method, str(r.forward_passes), f"{r.selection_accuracy:.2%}", f"{r.test_accuracy:.2%}"]
            for r in self.rows
        ]
        counts = f"Chosen on {self.n_selection} samples, scored on {self.n_test}."
        return "\n".join([markdown_table(columns, rows), counts, *self.notes]) + "\n"

    def to_csv(self) -> str:
        return csv_table([f.name for f in fields(Row)], map(astuple, self.rows))

    def to_json(self) -> str:
        content = {
            "rows": [asdict(r) for r in self.rows],
            "members": [list(m) for m in self.plan.members],
            "n_selection": self.n_selection,
            "n_test": self.n_test,
            "notes": self.notes,
        }
        return json.dumps(content, indent=1)


def compare_probabilities(
    select_probs: Any,
    select_labels: Any,
    test_probs: Any,
    test_labels: Any,
    *,
    correct: Any = None,
    window: int = 1,
    search: str = "grid",
    allow_overlap: bool = False,
) -> Comparison:
    """Compare the methods that mix predictions, from arrays.

    Rows: last, best epoch, best window, last-k, equally spaced, top-k, KF(1), KF, and the other methods of `fuse`,
    where k is the number of checkpoints in the plan of KF.

    Parameters
    ----------
    select_probs, test_probs : (n_epochs, n_samples, n_classes), or sequences of arrays
        Probabilities of the samples to choose on and of the samples to score on.
    select_labels, test_labels : (n_samples,) integers
    correct : (n_epochs, n_select) bool, optional
        Correctness history on the selection set. Default: computed from `select_probs`.
    window, search
        As in `fuse`.
    allow_overlap : bool, default False
        Permit test samples that are in the selection set.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError, TypeError
        As `fuse`; also if more than 1 % of the samples are in both sets. Two samples count as the same when their
        predictions at the first and the last epoch are equal.
    """
    select_probs = ProbabilityReader(select_probs, "select_probs")
    test_probs = ProbabilityReader(test_probs, "test_probs")
    if not allow_overlap:
        refuse_overlap(_prediction_bytes(select_probs), _prediction_bytes(test_probs), "test_probs")
    rows, plans = _mixing_methods(select_probs, select_labels, test_probs, test_labels, correct, window, search)
    return _with_notes(rows, plans["KF"], select_labels, test_labels, allow_overlap)


def _mixing_methods(
    select_probs: Any, select_labels: Any, test_probs: Any, test_labels: Any, correct: Any, window: int, search: str
) -> tuple[list[Row], dict[str, FusionPlan]]:
    """Rows of the methods that mix predictions, and the plans of those that fuse."""
    plan = fuse(select_probs, select_labels, correct=correct, window=window, search=search, folds=0)
    y = _check.labels(select_labels)
    n = plan.n_epochs
    n_test, n_classes = np.shape(test_probs[-1])
    if (len(test_probs), n_classes) != (n, np.shape(select_probs[-1])[1]):
        raise ValueError("test_probs: expected as many epochs and classes as select_probs")
    y_test = _check.labels(test_labels, n_test, n_classes, "test_labels")
    rows = [
        Row(name, len(w), _share_right(mixture(select_probs, w), y), _share_right(mixture(test_probs, w), y_test))
        for name, w in _controls(select_probs, y, correct, window, len(plan.weights)).items()
    ]
    plans = {"KF(1)": FusionPlan(plan.members[:1], n, window, plan.accuracy[:2]), "KF": plan}
    for method in OTHER_METHODS:
        folds = None if method == "auto" else 0
        plans[method] = fuse(select_probs, y, correct=correct, method=method, window=window, folds=folds)
    for name, p in plans.items():
        rows.append(Row(name, p.forward_passes, p.accuracy[-1], _share_right(p.apply(test_probs), y_test)))
    return rows, plans


def _controls(probs: Any, y: Int, correct: Any, window: int, k: int) -> dict[str, dict[int, float]]:
    """Weights of the epochs in each control; k is the number of checkpoints in the plan of KF."""
    n = len(probs)
    right = np.stack([np.argmax(probs[e], 1) == y for e in range(n)]) if correct is None else correct
    return {
        "last": baselines.last_epochs(n),
        "best epoch": baselines.best_epoch(right),
        "best window": baselines.best_window(probs, y, window),
        "last-k": baselines.last_epochs(n, k),
        "equally spaced": baselines.equally_spaced(n, k),
        "top-k": baselines.top_epochs(right, k),
    }


def _with_notes(rows: list[Row], plan: FusionPlan, y: Any, y_test: Any, allow_overlap: bool) -> Comparison:
    notes = ["The test samples may include samples that the methods were selected on."] if allow_overlap else []
    if plan.final_model_alone:
        notes.append("The final model alone is best: no checkpoint improved its selection accuracy.")
    return Comparison(rows, plan, len(y), len(y_test), notes)


def compare(
    run: Any,
    select_data: Any,
    test_data: Any,
    *,
    train_data: Any = None,
    make_student: Callable[[], Any] | None = None,
    distill_options: dict[str, Any] | None = None,
    window: int = 1,
    search: str = "grid",
    allow_overlap: bool = False,
) -> Comparison:
    """Compare the fusion with every control on one run.

    The methods are chosen on `select_data` and scored on `test_data`. The rows are, in order:

    - the rows of `compare_probabilities`;
    - with `train_data`, averaged weights: EMA and SWA over the checkpoints, and the average with the weights of KF.
      Their BatchNorm statistics are recomputed on `train_data`;
    - with `make_student` as well, students distilled from the final model, from KF and from "auto".

    Parameters
    ----------
    run : Run
        Run with its model attached.
    select_data, test_data, train_data
        As in `train`. `select_data` may be the data that the run's history was recorded on, or other data.
    make_student : callable() -> nn.Module, optional
        Makes a new network at each call.
    distill_options : dict, optional
        Keywords of `distill`. For a run that `train` made, missing keywords are taken from the run.
    window, search
        As in `fuse`.
    allow_overlap : bool, default False
        Permit test samples that are in the selection set.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError, TypeError
        As `fuse` and `distill`; also if more than 1 % of the samples are in both sets.
    """
    from ..training import data
    from ..training.ensemble import attached_model

    attached_model(run)
    options = _distill_options(run, distill_options)
    if make_student is not None and (train_data is None or "epochs" not in options):
        raise ValueError("make_student: needs train_data, and distill_options with at least epochs")
    if not allow_overlap:
        refuse_overlap(data.fingerprints(select_data), data.fingerprints(test_data), "test_data")
    select, test = run.probabilities(select_data), run.probabilities(test_data)
    y, y_test = select.labels, test.labels
    rows, plans = _mixing_methods(select, y, test, y_test, None, window, search)
    rows += [
        Row(name, 1, _model_score(model, select_data, run, y), _model_score(model, test_data, run, y_test))
        for name, model in _single_models(run, plans, select_data, y, train_data, make_student, options)
    ]
    return _with_notes(rows, plans["KF"], y, y_test, allow_overlap)


def _single_models(
    run: Any,
    plans: dict[str, FusionPlan],
    select_data: Any,
    y: Int,
    train_data: Any,
    make_student: Any,
    options: dict[str, Any],
) -> Iterator[tuple[str, Any]]:
    """Controls whose prediction is that of a single network."""
    from ..training.distill import distill
    from ..training.ensemble import FusedModel, averaged_model

    if train_data is None:
        return
    plan = plans["KF"]
    n = plan.n_epochs
    candidates = [averaged_model(run, baselines.ema_weights(n, d), train_data) for d in EMA_DECAYS]
    yield "EMA", max(candidates, key=lambda m: _model_score(m, select_data, run, y))
    yield "SWA", averaged_model(run, baselines.swa_weights(n), train_data)
    yield "averaged KF", averaged_model(run, plan.weights, train_data)
    if make_student is None:
        return
    final = FusionPlan((), n, 0, plan.accuracy[:1])
    for name, p in (("distilled last", final), ("distilled KF", plan), ("distilled auto", plans["auto"])):
        teacher = FusedModel(p, run)
        yield name, distill(make_student(), teacher, train_data, forward_fn=run.forward_fn, **options)


def _distill_options(run: Any, given: dict[str, Any] | None) -> dict[str, Any]:
    """Keywords of `distill`: the run's own recipe, updated with the given ones."""
    from ..training.recipe import Recipe

    known = {"epochs", *(f.name for f in fields(Recipe))}
    return {k: v for k, v in run.config.items() if k in known} | (given or {})


def _prediction_bytes(probs: Any) -> set[bytes]:
    """Probabilities of each sample at the first and the last epoch: different samples rarely share them."""
    return {a.tobytes() + b.tobytes() for a, b in zip(probs[0], probs[-1], strict=True)}


def refuse_overlap(select: set[bytes], test: set[bytes], name: str) -> None:
    """Raise a ValueError if more than 1 % of the samples are in both sets."""
    both = len(select & test)
    if both > 0.01 * min(len(select), len(test)):  # a few equal images are normal in real data
        reason = "so test accuracy would be too high (allow_overlap=True or --allow-overlap permits it)"
        raise ValueError(f"{name}: {both} of {len(test)} test samples are in the selection set, {reason}")


def _share_right(probs: Any, labels: Int) -> float:
    return float((np.asarray(probs).argmax(1) == labels).mean())


def _model_score(model: Any, samples: Any, run: Any, labels: Int) -> float:
    from ..training.data import predict

    return _share_right(predict(model, samples, forward_fn=run.forward_fn)[0].cpu().numpy(), labels)
