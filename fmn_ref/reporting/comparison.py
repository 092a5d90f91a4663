"""Compare the fusion with its controls at equal cost: choose on one set, score on another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from .. import _check, _files
from .._check import Int
from ..fusion import baselines
from ..fusion.fuse import fuse
from ..fusion.methods import AUTO, METHODS, summaries
from ..fusion.mixtures import mixture
from ..fusion.plan import FusionPlan
from ..fusion.probabilities import ProbabilityReader
from ..metrics.scores import Scores, scores
from .tables import csv_table, markdown_table

KF = "forget"  # the method of `fuse` that the row KF shows
# Methods of `fuse` beside KF and the plain means, which are controls at KF's cost.
OTHER_METHODS = (*(m.name for m in METHODS.values() if not m.control and m.name != KF), AUTO)
EMA_DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)  # per epoch; the decay with the best selection accuracy is scored


class Row(NamedTuple):
    """Result of one method.

    Attributes
    ----------
    method : str
    forward_passes : int
        Cost of one prediction.
    selection_accuracy, test_accuracy : float
        In [0, 1].
    test_nll, test_ece : float
        Negative log-likelihood and expected calibration error, as in `scores`.
    """

    method: str
    forward_passes: int
    selection_accuracy: float
    test_accuracy: float
    test_nll: float
    test_ece: float


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

    def to_markdown(self) -> str:
        columns = ["method", "forward passes", "selection accuracy", "test accuracy", "test NLL", "test ECE"]
        shown = ("{}", "{}", "{:.2%}", "{:.2%}", "{:.3f}", "{:.3f}")
        rows = [[text.format(value) for text, value in zip(shown, row, strict=True)] for row in self.rows]
        counts = f"Chosen on {self.n_selection} samples, scored on {self.n_test}."
        return "\n".join([markdown_table(columns, rows), counts, *self.notes]) + "\n"

    __str__ = to_markdown

    def to_csv(self) -> str:
        return csv_table(Row._fields, self.rows)

    def to_json(self) -> str:
        content = {
            "rows": [r._asdict() for r in self.rows],
            "members": self.plan.members,
            "n_selection": self.n_selection,
            "n_test": self.n_test,
            "notes": self.notes,
        }
        return json.dumps(content, indent=1)


def row_summaries() -> dict[str, str]:
    """{row: one sentence} for the rows of a comparison that methods of `fuse` make at no given cost."""
    return {name: summaries()[KF if name == "KF" else name] for name in ("KF", *OTHER_METHODS)}


def read_comparison(source: Any) -> tuple[list[tuple[Any, ...]], list[Any], int, int]:
    """Check a stored comparison.

    Parameters
    ----------
    source : Comparison, content of its `to_json`, or path of a file with it

    Returns
    -------
    rows : list of tuple
        As `Row`; without the last two fields, if a row lacks one of them.
    notes : list
    n_selection, n_test : int

    Raises
    ------
    OSError, ValueError
        The file cannot be read, or is no comparison.
    """
    of_file = isinstance(source, (str, os.PathLike))
    try:
        text = _files.read_bytes(source) if of_file else source.to_json() if isinstance(source, Comparison) else None
        content = source if text is None else json.loads(text)
        measures = Row._fields[4:]
        known = measures if all({*measures} <= {*row} for row in content["rows"]) else ()  # older files lack them
        rows = []
        for row in content["rows"]:
            passes = _check.number(row["forward_passes"], 0, 1e9, "forward_passes")
            accuracies = (_check.number(row[k], 0, 1, k) for k in Row._fields[2:4])
            more = (_check.number(row[k], 0, 1e9, k) for k in known)
            rows.append((str(row["method"]), passes, *accuracies, *more))
        if not rows:
            raise ValueError("rows: expected at least one")
        n, n_test = (_check.number(content[k], 0, 2**62, k, int) for k in ("n_selection", "n_test"))
        return rows, list(content.get("notes", [])), n, n_test
    except OSError:
        raise
    except Exception as error:  # a file from a stranger may fail in any way
        reason = f"missing {error}" if isinstance(error, KeyError) else error
        where = os.fspath(source) if of_file else "comparison"
        raise ValueError(f"{where}: not a comparison (Comparison.to_json, fmn-ref compare --json): {reason}") from None


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
    select = ProbabilityReader(select_probs, "select_probs")
    test = ProbabilityReader(test_probs, "test_probs")
    if not allow_overlap:
        refuse_overlap(_prediction_bytes(select), _prediction_bytes(test), "test_probs")
    options = {"window": window, "correct": correct}
    return _mixing_methods(select, select_labels, test, test_labels, search, allow_overlap, **options)[0]


def _mixing_methods(
    select: Any, labels: Any, test: Any, test_labels: Any, search: str, allow_overlap: bool, **options: Any
) -> tuple[Comparison, dict[str, FusionPlan]]:
    """Compare the methods that mix predictions; also return the plans of those that fuse."""
    select = ProbabilityReader.of(select)
    y = _check.labels(labels, *select[-1].shape)
    if options.get("correct") is None:
        options["correct"] = select.correctness(y)  # reads every epoch once, for all methods
    plan = fuse(select, y, search=search, folds=0, **options)
    n_test, n_classes = np.shape(test[-1])
    if (len(test), n_classes) != (plan.n_epochs, np.shape(select[-1])[1]):
        raise ValueError("test_probs: expected as many epochs and classes as select_probs")
    y_test = _check.labels(test_labels, n_test, n_classes, "test_labels")
    rows = [
        Row(name, len(w), scores(mixture(select, w), y).accuracy, *scores(mixture(test, w), y_test))
        for name, w in _controls(select, y, len(plan.weights), **options).items()
    ]
    plans = {"KF(1)": FusionPlan(plan.members[:1], plan.n_epochs, plan.window, plan.accuracy[:2]), "KF": plan}
    auto = fuse(select, y, method=AUTO, **options)
    for method in OTHER_METHODS:  # "auto" has found the plan of the method that it chose
        known = method == AUTO or (auto.members and method == auto.method)
        plans[method] = auto if known else fuse(select, y, method=method, folds=0, **options)
    for name, p in plans.items():
        rows.append(Row(name, p.forward_passes, p.accuracy[-1], *scores(p.apply(test), y_test)))
    notes = ["The test samples may include samples that the methods were selected on."] if allow_overlap else []
    if plan.final_model_alone:
        notes.append("The final model alone is best: no checkpoint improved its selection accuracy.")
    return Comparison(rows, plan, len(y), len(y_test), notes), plans


def _controls(probs: Any, y: Int, k: int, window: int, correct: Any) -> dict[str, dict[int, float]]:
    """Weights of the epochs in each control; k is the number of checkpoints in the plan of KF."""
    n = len(probs)
    return {
        "last": baselines.last_epochs(n),
        "best epoch": baselines.best_epoch(correct),
        "best window": baselines.best_window(probs, y, window),
        "last-k": baselines.last_epochs(n, k),
        "equally spaced": baselines.equally_spaced(n, k),
        "top-k": baselines.top_epochs(correct, k),
    }


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
    - with `make_student` as well, students distilled from the final model, from KF, from "auto" and from "pool".

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
        As `fuse` and `distill`; also if more than 1 % of the samples are in both sets. Samples are the same if the
        network is called with the same for them, whatever their batches look like.
    """
    with _check.naming_packages("compare"):
        from ..training import data
        from ..training.ensemble import attached_model
        from ..training.recipe import Recipe

    attached_model(run)
    recipe = {"epochs", *(f.name for f in fields(Recipe))}
    options = {k: v for k, v in run.config.items() if k in recipe} | (distill_options or {})
    if make_student is not None and (train_data is None or "epochs" not in options):
        raise ValueError("make_student: needs train_data, and distill_options with at least epochs")
    select, test = run.probabilities(select_data), run.probabilities(test_data)
    select.order.wanted = test.order.wanted = not allow_overlap
    labels, test_labels = select.labels, test.labels  # evaluates the last epoch on both
    refuse_overlap(select.order.fingerprints, test.order.fingerprints, "test_data")
    table, plans = _mixing_methods(select, labels, test, test_labels, search, allow_overlap, window=window)

    def scores_of(model: Any, samples: Any = select_data, probs: Any = select) -> Scores:
        predicted, _ = data.predict(model, samples, forward_fn=run.forward_fn, order=probs.order)
        return scores(predicted.cpu(), probs.labels)

    if train_data is not None:
        models = _single_models(run, plans, train_data, make_student, options, scores_of)
        for name, m in models:
            table.rows.append(Row(name, 1, scores_of(m).accuracy, *scores_of(m, test_data, test)))
    return table


def _single_models(
    run: Any,
    plans: dict[str, FusionPlan],
    train_set: Any,
    make_student: Any,
    options: Any,
    scores_of: Callable[..., Any],
) -> Iterator[tuple[str, Any]]:
    """Controls whose prediction is that of a single network."""
    from ..training.distill import distill
    from ..training.ensemble import FusedModel, averaged_model

    plan = plans["KF"]
    n = plan.n_epochs
    candidates = [averaged_model(run, baselines.ema_weights(n, d), train_set) for d in EMA_DECAYS]
    yield "EMA", max(candidates, key=lambda m: scores_of(m).accuracy)
    yield "SWA", averaged_model(run, baselines.swa_weights(n), train_set)
    yield "averaged KF", averaged_model(run, plan.weights, train_set)
    if make_student is None:
        return
    final = FusionPlan((), n, 0, plan.accuracy[:1])
    for name, p in {"last": final, **{name: plans[name] for name in ("KF", "auto", "pool")}}.items():
        teacher = FusedModel(p, run)
        yield f"distilled {name}", distill(make_student(), teacher, train_set, forward_fn=run.forward_fn, **options)


def _prediction_bytes(probs: Any) -> set[bytes]:
    """Probabilities of each sample at the first and the last epoch: different samples rarely share them."""
    return {a.tobytes() + b.tobytes() for a, b in zip(probs[0], probs[-1], strict=True)}


def refuse_overlap(select: Set[Any], test: Set[Any], name: str) -> None:
    """Raise a ValueError if more than 1 % of the samples are in both sets, of fingerprints or other identities."""
    both = len(select & test)
    if both > 0.01 * min(len(select), len(test)):  # a few equal images are normal in real data
        reason = "so test accuracy would be too high (allow_overlap=True or --allow-overlap permits it)"
        raise ValueError(f"{name}: {both} of {len(test)} test samples are in the selection set, {reason}")
