"""compare: the fusion beside every control, chosen on one set and scored on another, at equal cost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..fusion import baselines
from ..fusion.fuse import fuse
from ..fusion.methods import METHODS
from ..fusion.mixtures import mixture
from ..fusion.plan import FusionPlan
from ..fusion.probabilities import ProbabilityReader

Int = NDArray[np.int64]
FLATTERS = "scoring there flatters (allow_overlap=True or --allow-overlap permits it)"
OTHERS = (*(m.name for m in METHODS.values() if not m.control and m.name != "forget"), "auto")  # beside KF
EMA_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)  # per epoch; the one with the best selection accuracy is scored


@dataclass(frozen=True)
class Row:
    """One method: accuracies in [0, 1]; forward_passes is what one prediction costs."""

    method: str
    forward_passes: int
    selection_accuracy: float
    test_accuracy: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """The table of a comparison, and the plan of its KF row; `print` shows the table."""

    rows: list[Row]
    plan: FusionPlan
    n_selection: int
    n_test: int
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, method: str) -> Row:
        """The row of a method."""
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(f"{method!r}; there are {', '.join(r.method for r in self.rows)}")

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        lines = ["| method | forward passes | selection accuracy | test accuracy |", "|---|--:|--:|--:|"]
        lines += [
            f"| {r.method} | {r.forward_passes} | {r.selection_accuracy:.2%} | {r.test_accuracy:.2%} |"
            for r in self.rows
        ]
        counts = f"Chosen on {self.n_selection} samples, scored on {self.n_test}."
        return "\n".join([*lines, "", counts, *self.notes]) + "\n"

    def to_csv(self) -> str:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in self.rows)
        return out.getvalue()

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
    """The methods that mix predictions, from arrays alone.

    Rows: last, best epoch, best window, last-k, equally spaced, top-k, KF(1), KF, and the other methods of `fuse`; k is
    the number of checkpoints of KF's plan.

    Parameters
    ----------
    select_probs, test_probs : (n_epochs, n_samples, n_classes), or sequences of arrays
    select_labels, test_labels : (n_samples,) integers
    correct : (n_epochs, n_select) bool, optional
        History on the selection set; default: from `select_probs`.
    window, search
        As `fuse`.
    allow_overlap : bool
        Score on the samples that were selected on, all the same.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError, TypeError
        As `fuse`; more than 1 % of the samples stand in both sets (the same predictions at the first and last epoch).
    """
    select_probs, test_probs = (
        ProbabilityReader(select_probs, "select_probs"),
        ProbabilityReader(test_probs, "test_probs"),
    )
    if not allow_overlap:
        refuse_overlap(_rows(select_probs), _rows(test_probs), "test_probs")
    rows, plans = _mixed(select_probs, select_labels, test_probs, test_labels, correct, window, search)
    return _comparison(rows, plans["KF"], select_labels, test_labels, allow_overlap)


def _mixed(
    select_probs: Any, select_labels: Any, test_probs: Any, test_labels: Any, correct: Any, window: int, search: str
) -> tuple[list[Row], dict[str, FusionPlan]]:
    """The rows that mix predictions, and the plans of those that fuse."""
    plan = fuse(select_probs, select_labels, correct=correct, window=window, search=search, folds=0)
    first = FusionPlan(plan.members[:1], plan.n_epochs, window, plan.accuracy[:2])
    y = _check.labels(select_labels)
    n, k = plan.n_epochs, len(plan.weights)
    n_test, n_classes = np.shape(test_probs[-1])
    if (len(test_probs), n_classes) != (n, np.shape(select_probs[-1])[1]):
        raise ValueError("test_probs: expected as many epochs and classes as select_probs")
    y_test = _check.labels(test_labels, n_test, n_classes, "test_labels")
    right = np.stack([np.argmax(select_probs[e], 1) == y for e in range(n)]) if correct is None else correct
    mixed = {
        "last": baselines.last_epochs(n),
        "best epoch": baselines.best_epoch(right),
        "best window": baselines.best_window(select_probs, y, window),
        "last-k": baselines.last_epochs(n, k),
        "equally spaced": baselines.equally_spaced(n, k),
        "top-k": baselines.top_epochs(right, k),
    }
    rows = [
        Row(name, len(w), _score(mixture(select_probs, w), y), _score(mixture(test_probs, w), y_test))
        for name, w in mixed.items()
    ]
    plans = {"KF(1)": first, "KF": plan}
    for method in OTHERS:
        folds = None if method == "auto" else 0
        plans[method] = fuse(select_probs, y, correct=correct, method=method, window=window, folds=folds)
    for name, p in plans.items():
        rows.append(Row(name, p.forward_passes, p.accuracy[-1], _score(p.apply(test_probs), y_test)))
    return rows, plans


def _comparison(rows: list[Row], plan: FusionPlan, y: Any, y_test: Any, allow_overlap: bool) -> Comparison:
    notes = ["Samples that were selected on may be among the scored ones."] if allow_overlap else []
    if plan.final_model_alone:
        notes.append("The final model alone is best: no epoch knew what would help.")
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
    """Every control of METHOD on one run: chosen on `select_data`, scored on `test_data`.

    Rows of `compare_probabilities`; with `train_data` also the averaged weights (EMA and SWA over the epochs'
    checkpoints, averaged KF; BatchNorm recomputed on `train_data`); with `make_student` too, students distilled from
    the final model alone, from KF and from "auto".

    Parameters
    ----------
    run : Run
        With its model attached.
    select_data, test_data, train_data
        As in `train`. `select_data` is what the run's history was recorded on, or other data.
    make_student : callable() -> nn.Module, optional
        A fresh network each time.
    distill_options : dict, optional
        Keywords of `distill`; what is not given is as in the run, if `train` made it.
    window, search
        As `fuse`.
    allow_overlap : bool
        Permit samples that stand in both sets.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError, TypeError
        As `fuse` and `distill`; more than 1 % of the samples stand in both sets.
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
    rows, plans = _mixed(select, y, test, y_test, None, window, search)
    rows += [
        Row(name, 1, _model_score(model, select_data, run, y), _model_score(model, test_data, run, y_test))
        for name, model in _single_models(run, plans, select_data, y, train_data, make_student, options)
    ]
    return _comparison(rows, plans["KF"], y, y_test, allow_overlap)


def _single_models(
    run: Any,
    plans: dict[str, FusionPlan],
    select_data: Any,
    y: Int,
    train_data: Any,
    make_student: Any,
    options: dict[str, Any],
) -> Iterator[tuple[str, Any]]:
    """The controls that are one network in the end."""
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
    """The run's own recipe, overridden by what was given."""
    from ..training.recipe import Recipe

    known = {"epochs", *(f.name for f in fields(Recipe))}
    return {k: v for k, v in run.config.items() if k in known} | (given or {})


def _rows(probs: Any) -> set[bytes]:
    """What the first and the last epoch predict for each sample: two samples rarely share that."""
    return {a.tobytes() + b.tobytes() for a, b in zip(probs[0], probs[-1], strict=True)}


def refuse_overlap(select: set[bytes], test: set[bytes], name: str) -> None:
    both = len(select & test)
    if both > 0.01 * min(len(select), len(test)):  # a few equal images are normal in real data
        raise ValueError(f"{name}: {both} of {len(test)} test samples are in the selection set; {FLATTERS}")


def _score(probs: Any, labels: Int) -> float:
    return float((np.asarray(probs).argmax(1) == labels).mean())


def _model_score(model: Any, samples: Any, run: Any, labels: Int) -> float:
    from ..training.data import predict

    return _score(predict(model, samples, forward_fn=run.forward_fn)[0].cpu().numpy(), labels)
