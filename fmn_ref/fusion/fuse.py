"""`fuse`: Knowledge Fusion and its relatives, with cross-validation inside the selection set. NumPy only.

The input is what every epoch's checkpoint predicts on a labelled selection set. The default method is that of arXiv
2412.12968, Algorithm 1, and arXiv 2507.08686, Section IV. Where the papers are silent (ties, the ends of the range) the
docstrings state the decision. `methods.py` holds the methods.
"""

from __future__ import annotations

from collections import deque
from inspect import cleandoc
from typing import Any, NamedTuple

import numpy as np

from .. import _check
from .._check import Bool, Float, Int
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest
from ..metrics.scores import FLOOR
from .epsilon import SEARCHES, Target, grid_of
from .methods import AUTO, AUTO_METHOD, METHODS, UNBOUNDED, Problem, method_names, problem_for, summaries
from .mixtures import replay
from .plan import FusionPlan
from .probabilities import ProbabilityReader, samples_digest

_DRAWS = 2000  # of the bootstrap
_MANY = 5000  # samples of which half choose nearly as well as four fifths


def fuse(
    probs: Any,
    labels: Any,
    *,
    correct: Any = None,
    method: str = "forget",
    window: int = 1,
    search: str = "grid",
    step: float = 0.01,
    max_members: int | None = None,
    max_forward_passes: int | None = None,
    sample_weight: Any = None,
    folds: int | None = None,
) -> FusionPlan:
    """Find the epochs that classify correctly what the final model forgot, and their weights (Knowledge Fusion).

    Parameters
    ----------
    probs : (n_epochs, n_samples, n_classes) array, or a sequence of (n_samples, n_classes) arrays
        Predicted probabilities of every epoch on the selection set, of any floating-point type. Wrap logits in
        `from_logits`. A sequence may compute an epoch when it is read (`Run.probabilities`): with `correct` given,
        "forget" reads only the last epoch and the chosen windows. The other methods read every epoch.
    labels : (n_samples,) integers
        True classes of the selection set.
    correct : (n_epochs, n_samples) bool or 0 and 1, optional
        Correctness history on the same samples. Default: computed from `probs`.
    method : str
        Default: "forget". A name in the table of `fmn_ref/fusion/methods.py`, or "auto", which needs folds.
    window : int >= 0
        Default: 1, as in the papers. Half width of a member's window, which is clipped at the first and last epoch.
        "pool", "coverage" and the plain means take single epochs.
    search : {"grid", "exact"}
        Default: "grid". How "forget" finds epsilon: see `best_epsilon`.
    step : float
        Default: 0.01. Distance of the grid's points.
    max_members : int >= 1, optional
        Most members. Default: ten for "pool", else no bound, "KF(inf)" in the papers; 1 is "KF(1)".
    max_forward_passes : int >= 1, optional
        Most checkpoints that a prediction runs: every epoch of a window counts, and the final model if it has weight.
        Default: no bound. If no window fits, the final model alone is the answer.
    sample_weight : (n_samples,) floats >= 0, or "balanced", optional
        Default: 1 each. How much a sample counts when epochs are chosen; "balanced" gives every class the same weight.
        A fold that leaves no weight is predicted by the final model.
    folds : int >= 2, or 0, optional
        Folds of a cross-validation inside the selection set: the method runs without each fold and is scored on it,
        which gives the plan's `cv_accuracy` and `gain_interval`. 0: none. Default: 5, or 2 from 5000 samples on, for
        "auto", and if `probs` is an array or a list of at least 50 samples; else 0, since reading an epoch may be
        expensive.

    Returns
    -------
    FusionPlan

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit, labels out of range, masked, non-finite or negative probabilities, rows that do not sum
        to 1; a history of other samples.

    Examples
    --------
    The first epoch is right on sample 1, which the last one forgot:

    >>> p = [[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [[0.9, 0.1], [0.65, 0.35], [0.2, 0.8]]]
    >>> plan = fuse(p, [0, 1, 1], window=0)
    >>> plan.members, plan.accuracy
    (((0, 0.34),), (0.6666666666666666, 1.0))
    >>> plan.apply(p).argmax(1)
    array([0, 1, 1])

    References
    ----------
    arXiv 2412.12968, Algorithm 1; arXiv 2507.08686, Section IV; "coverage": arXiv 2604.12044.
    """
    _check.choice(method, method_names(), "method")
    _check.choice(search, tuple(SEARCHES), "search")
    grid, window = grid_of(step), _check.number(window, 0, 2**31, "window", int)
    bounds = _bound(max_members, "max_members"), _bound(max_forward_passes, "max_forward_passes")
    reader = ProbabilityReader.of(probs)
    final = reader[len(reader) - 1]
    y = _check.labels(labels, *final.shape)
    target = Target(y, sample_weight)
    n_folds = _number_of_folds(folds, method, reader, len(y))
    problem = Problem(reader, _correctness_of(reader, correct, y, final), final, window, search, grid, *bounds)
    epochs = correct.epochs if isinstance(correct, CorrectnessHistory) else reader.epochs
    found = _cross_validate(problem, target, method, n_folds) if n_folds else _Estimate(method)
    plan = _planned(problem, target, found, epochs)
    return plan if reader.file_of is None else plan.with_files(reader.file_of)


_METHODS_DOC = "".join(f'\n    - "{name}": {text}' for name, text in summaries().items())
fuse.__doc__ = cleandoc(fuse.__doc__ or "").replace("needs folds.\n", f"needs folds.\n{_METHODS_DOC}\n", 1)


def _bound(value: Any, name: str) -> int:
    return UNBOUNDED if value is None else int(_check.number(value, 1, UNBOUNDED, name, int))


def _number_of_folds(folds: Any, method: str, reader: ProbabilityReader, n_samples: int) -> int:
    """Folds of the cross-validation; 0 for none."""
    if folds is None:
        enough = 2 if n_samples >= _MANY else min(5, n_samples)
        folds = enough if method == AUTO or (reader.in_memory and n_samples >= 50) else 0
    if folds != 0 and n_samples < 2:
        raise ValueError("folds: a cross-validation needs at least 2 samples, got 1")
    if folds != 0:
        return int(_check.number(folds, 2, n_samples, "folds", int))
    if method == AUTO:
        raise ValueError("folds: method 'auto' chooses by cross-validation; expected at least 2")
    return 0


def _correctness_of(reader: ProbabilityReader, correct: Any, y: Int, final: Float) -> Bool:
    """Correctness of every epoch: from its probabilities, or as given, after checks that it is of these samples."""
    if correct is None:
        return reader.correctness(y)
    if isinstance(correct, CorrectnessHistory) and correct.digest not in (NO_LABELS, labels_digest(y)):
        counts = f" ({correct.n_samples} samples, not {len(y)})" if correct.n_samples != len(y) else ""
        raise ValueError(f"correct: a history of other labels, or in another order{counts}")
    right = _check.bool_matrix(correct)
    if right.shape != (len(reader), len(y)):
        raise ValueError(f"correct: expected shape {(len(reader), len(y))} as probs, got shape {right.shape}")
    top = np.sort(final, axis=1)[:, -2:]
    decided = top[:, -1] - top[:, 0] > 0.02  # closer scores may differ by rounding: half precision, another device
    differ = int(((right[-1] != (final.argmax(1) == y)) & decided).sum())
    if differ > 0.01 * len(y):
        reason = "other samples, order or preprocessing, or recorded without model.eval()?"
        raise ValueError(f"correct: last row disagrees with probs[-1] on {differ} of {len(y)} samples: {reason}")
    return right


class _Estimate(NamedTuple):
    method: str
    final_is_best: bool = False  # "auto" found nothing better
    accuracy: float | None = None
    gain_interval: tuple[float, float] | None = None


class _Unseen(NamedTuple):
    """Predictions for samples that did not choose the plan."""

    right: Bool  # (n_samples,)
    of_label: Float  # (n_samples,): probability of the label

    @classmethod
    def of(cls, probs: Float, labels: Int) -> _Unseen:
        return cls(probs.argmax(1) == labels, probs[np.arange(len(labels)), labels])

    def log_likelihood(self, target: Target) -> float:
        return float((np.log(np.maximum(self.of_label, FLOOR)) * (target.each / target.total)).sum())


def _cross_validate(problem: Problem, target: Target, method: str, folds: int) -> _Estimate:
    """Estimate the accuracy of a method on unseen samples; for "auto", compare it with the final model."""
    final = _Unseen.of(problem.final, target.labels)
    tried = AUTO_METHOD if method == AUTO else method
    unseen = _predict_unseen(problem, target, tried, folds)
    final_is_best = method == AUTO and not _better(unseen, final, target)
    right = (final if final_is_best else unseen).right
    accuracy = target.score(right) / target.total
    return _Estimate(tried, final_is_best, accuracy, _gain_interval(final.right, right, target))


def _better(unseen: _Unseen, final: _Unseen, target: Target) -> bool:
    """Tell whether the likelihood is better, and the accuracy at most a standard error of the difference worse."""
    lost = (final.right * 1.0 - unseen.right) * (target.each / target.total)
    error = float(np.sqrt(len(lost)) * lost.std())
    return unseen.log_likelihood(target) > final.log_likelihood(target) and float(lost.sum()) <= error


def _planned(problem: Problem, target: Target, found: _Estimate, epochs: tuple[int, ...]) -> FusionPlan:
    """The plan of a method on the whole selection set."""
    method, seen = METHODS[found.method], problem_for(problem, found.method)
    members = () if found.final_is_best else method.members(seen, target)
    mixtures = replay(seen.probs, members, seen.window, method.combine)
    accuracy = tuple(target.score_of(p) / target.total for p in mixtures)
    search, digest = "exact" if method.exact else problem.search, labels_digest(target.labels).hex()
    kind = accuracy, method.name, search, digest, method.combine
    estimate, samples = (found.accuracy, found.gain_interval), samples_digest(problem.final)
    return FusionPlan(members, problem.n_epochs, seen.window, *kind, *estimate, epochs, samples)


def _predict_unseen(problem: Problem, target: Target, method: str, folds: int) -> _Unseen:
    """Predict every sample by the plan that is chosen without its fold."""
    seen, y = problem_for(problem, method), target.labels
    fold = np.random.default_rng(0).permutation(len(y)) % folds
    found = _Unseen(np.zeros(len(y), bool), np.zeros(len(y)))
    for k in range(folds):
        hidden = fold == k
        members = METHODS[method].members(seen, target.weighted(np.where(hidden, 0, target.each)))
        fused = deque(replay(seen.probs, members, seen.window, METHODS[method].combine), maxlen=1)[0]
        found.right[hidden], found.of_label[hidden] = _Unseen.of(fused[hidden], y[hidden])
    return found


def _gain_interval(before: Bool, after: Bool, target: Target) -> tuple[float, float]:
    """95 % bootstrap interval of the gain in (weighted) accuracy: samples drawn with replacement."""
    pairs = np.stack([after * 1 - before, target.each], axis=1)
    kinds, count = np.unique(pairs, axis=0, return_counts=True)  # one multinomial draw for equal samples
    draws = np.random.default_rng(0).multinomial(len(before), count / count.sum(), _DRAWS)
    gain = draws @ (kinds[:, 0] * kinds[:, 1]) / np.maximum(draws @ kinds[:, 1], 1)  # of integers: exact sums
    low, high = np.quantile(gain, [0.025, 0.975])
    return float(low), float(high)
