"""Knowledge Fusion: choose epochs by what the current predictor gets wrong, and mix them in; and stronger choices.

Input is what every epoch's checkpoint predicts on a labelled selection set. NumPy only. The method is that of arXiv
2412.12968, Algorithm 1, and arXiv 2507.08686, Section IV; where the papers are silent (ties, the ends of the range) the
docstrings say what was decided. The ways to choose are in `_selection.py`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..kernels import reference
from ..metrics.curves import correctness
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest
from .epsilon import SEARCHES, Target, grid_of
from .methods import WINDOWED, Problem, choose, replay
from .plan import METHODS, Epochs, Float, FusionPlan

Int = NDArray[np.int64]
AUTO = ("top", "coverage", "forget", "greedy", "bagged", "likelihood")
_DRAWS = 2000  # of the bootstrap


def fuse(
    probs: Any,
    labels: Any,
    *,
    correct: Any = None,
    method: str = "forget",
    window: int = 1,
    max_rounds: int | None = None,
    search: str = "grid",
    step: float = 0.01,
    max_members: int | None = None,
    max_forward_passes: int | None = None,
    sample_weight: Any = None,
    folds: int | None = None,
) -> FusionPlan:
    """Knowledge Fusion: find the epochs that know what the final model forgot, and their weights.

    Parameters
    ----------
    probs : (n_epochs, n_samples, n_classes) array, or a sequence of (n_samples, n_classes) arrays
        Predicted probabilities of every epoch on the selection set, of any floating-point type. With `correct` given,
        "forget" reads only the last epoch and the chosen windows, so the sequence may compute them on demand
        (`Run.probabilities`); the other methods read every epoch. Logits: wrap them in `from_logits`.
    labels : (n_samples,) integers
    correct : (n_epochs, n_samples) bool or 0 and 1, optional
        The correctness history on the same samples; default: from `probs`.
    method : str
        "forget", the papers': each round takes the epoch that is right most often where the fused predictor is wrong
        (ties: the earliest), averages its window, and mixes that in with the epsilon of the best selection accuracy; it
        stops when accuracy no longer rises. An epoch may be chosen again.
        "greedy": each round tries every window with its exact epsilon and takes the best.
        "bagged": the mean of what "greedy" finds on five bootstrap samples of the selection set.
        "likelihood": the convex weights of all windows and the final model with the best log-likelihood of the labels.
        "coverage": marginal coverage; "equal", "last", "top": the plain mean of k epochs at equal distances, the last
        k, the k most accurate, k chosen by selection accuracy. These four mix single epochs and leave `window` aside.
        "auto": by cross-validation, "bagged", or "top", "coverage", "forget", "greedy" or "likelihood" where that is
        better by more than a standard error, or the final model alone where nothing is better than it; needs folds.
    window : int >= 0
        Half width of the window; the papers use 1. Clipped at the first and last epoch.
    max_rounds, max_members : int >= 1, optional
        Most members; two names of one bound. None: to the end, "KF(inf)"; 1 is "KF(1)".
    search : {"grid", "exact"}
        How "forget" finds epsilon: see `best_epsilon`.
    step : float
        Of the grid.
    max_forward_passes : int >= 1, optional
        Most checkpoints in the plan, windows spread out and the final model counted where it has weight.
    sample_weight : (n_samples,) floats >= 0, or "balanced", optional
        Maximise weighted accuracy; "balanced": every class weighs the same.
    folds : int >= 2, or 0, optional
        Cross-validation inside the selection set: the method is run without each fold and scored on it, which gives
        `cv_accuracy` and `gain_interval` of the plan. Default: 5 for "auto", and where `probs` is an array or a list
        with at least 50 samples; 0 where reading an epoch may cost something.

    Returns
    -------
    FusionPlan

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit, labels out of range, non-finite or negative probabilities, rows that do not sum to 1;
        a history of other samples.

    Examples
    --------
    The first epoch knows sample 1, which the last one forgot:

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
    _check.choice(method, tuple(m for m in METHODS if m != "weights"), "method")
    _check.choice(search, tuple(SEARCHES), "search")
    grid, window = grid_of(step), _check.number(window, 0, 2**31, "window", int)
    bounds = {"max_rounds": max_rounds, "max_members": max_members, "max_forward_passes": max_forward_passes}
    most = {k: 2**31 if v is None else _check.number(v, 1, 2**31, k, int) for k, v in bounds.items()}
    probs = Epochs.of(probs)
    final = probs[len(probs) - 1]
    y = _check.labels(labels, *final.shape)
    target = Target(y, sample_weight)
    if folds is None:
        folds = min(5, len(y)) if method == "auto" or (probs.in_memory and len(y) >= 50) else 0
    if folds != 0:
        folds = _check.number(folds, 2, len(y), "folds", int)
    if method == "auto" and folds == 0:
        raise ValueError("folds: method 'auto' chooses by cross-validation; expected at least 2")
    if correct is None:
        right = np.stack([correctness(probs.scores(e), y) for e in range(len(probs))])
    else:
        right = _recorded(correct, len(probs), y, final)
    members_bound = min(most["max_rounds"], most["max_members"])
    problem = Problem(probs, right, final, window, search, grid, members_bound, most["max_forward_passes"])
    cv_accuracy, interval = None, None
    if folds:
        unseen = {m: _right_unseen(problem, target, m, folds) for m in (AUTO if method == "auto" else (method,))}
        of_final = final.argmax(1) == y
        if method == "auto":
            method = _best_method(unseen, target)
            if target.score(unseen[method]) <= target.score(of_final):
                unseen[method] = of_final
        cv_accuracy = target.score(unseen[method]) / target.total
        interval = _gain_interval(of_final, unseen[method], target)
    declined = folds and unseen[method] is of_final
    members = () if declined else choose(problem, target, method)
    window = window if method in WINDOWED else 0
    accuracy = tuple(target.score(p.argmax(1) == y) / target.total for p in replay(problem, members, window))
    search = "exact" if method == "greedy" else search
    digest = labels_digest(y).hex()
    return FusionPlan(members, len(probs), window, accuracy, method, search, digest, cv_accuracy, interval)


def best_epsilon(
    current: Any,
    candidate: Any,
    labels: Any,
    *,
    search: str = "grid",
    step: float = 0.01,
    sample_weight: Any = None,
) -> tuple[float, float]:
    """The epsilon in [0, 1] with the best accuracy of eps * candidate + (1 - eps) * current.

    Parameters
    ----------
    current, candidate : (n_samples, n_classes) probabilities
        Of 16, 32 or 64 bits, bfloat16 tensors included; mixed as float64.
    labels : (n_samples,) integers
    search : {"grid", "exact"}
        "grid" tries 0, step, ..., 1 (ties: the smallest). "exact" finds the best over the whole interval: each sample
        is right on one sub-interval, so one pass gives their ends and one sort the best count; it returns the middle of
        the first best stretch (or its end, where only equal scores make it best), and 0 when nothing is better than
        `current`. Never below the grid.
    step : float
        1 / step must be a whole number.
    sample_weight : (n_samples,) floats >= 0, or "balanced", optional
        Maximise weighted accuracy; "balanced": every class weighs the same.

    Returns
    -------
    eps, accuracy : float, float

    Raises
    ------
    TypeError, ValueError
        As `fuse`.

    Examples
    --------
    >>> current, candidate = [[0.65, 0.35], [0.9, 0.1]], [[0.1, 0.9], [0.6, 0.4]]
    >>> best_epsilon(current, candidate, [1, 0])
    (0.28, 1.0)
    >>> eps, accuracy = best_epsilon(current, candidate, [1, 0], search="exact")
    >>> round(eps, 3), accuracy
    (0.636, 1.0)
    """
    find, grid = SEARCHES[_check.choice(search, tuple(SEARCHES), "search")], grid_of(step)
    now, bfloat16 = _check.native_probabilities(current, None, "current")
    if bfloat16:
        now = reference.widened(now, bfloat16)
    then, bfloat16 = _check.native_probabilities(candidate, now.shape, "candidate")
    target = Target(_check.labels(labels, *now.shape), sample_weight)
    eps, right = find(now, [then], bfloat16, target, grid)
    return eps, right / target.total


def _recorded(correct: Any, n_epochs: int, y: Int, final: Float) -> NDArray[np.bool_]:
    """The correctness history, checked to be of these samples: its last row is compared with the last predictions."""
    if isinstance(correct, CorrectnessHistory) and correct.digest not in (NO_LABELS, labels_digest(y)):
        counts = f" ({correct.n_samples} samples, not {len(y)})" if correct.n_samples != len(y) else ""
        raise ValueError(f"correct: a history of other labels, or in another order{counts}")
    right = _check.correctness(correct)
    if right.shape != (n_epochs, len(y)):
        raise ValueError(f"correct: expected shape {(n_epochs, len(y))} as probs, got shape {right.shape}")
    top = np.sort(final, axis=1)[:, -2:]
    decided = top[:, -1] - top[:, 0] > 0.02  # the others may differ by rounding: in half precision, on another device
    differ = int(((right[-1] != (final.argmax(1) == y)) & decided).sum())
    if differ > 0.01 * len(y):
        reason = "other samples, order or preprocessing, or recorded without model.eval()?"
        raise ValueError(f"correct: last row disagrees with probs[-1] on {differ} of {len(y)} samples: {reason}")
    return right


def _right_unseen(problem: Problem, target: Target, method: str, folds: int) -> NDArray[np.bool_]:
    """Which samples are right by the plan that is chosen without their fold."""
    y = target.labels
    fold = np.random.default_rng(0).permutation(len(y)) % folds
    right = np.zeros(len(y), bool)
    for k in range(folds):
        hidden = fold == k
        members = choose(problem, target.weighted(np.where(hidden, 0, target.each)), method)
        window = problem.window if method in WINDOWED else 0
        fused = deque(replay(problem, members, window), maxlen=1)[0]
        right[hidden] = fused[hidden].argmax(1) == y[hidden]
    return right


def _best_method(unseen: dict[str, NDArray[np.bool_]], target: Target) -> str:
    """ "bagged", unless another is better by more than a standard error of the difference: then the best of those."""
    w = target.each / target.total
    better = {"bagged": 0.0}
    for method, right in unseen.items():
        difference = (right * 1.0 - unseen["bagged"]) * w
        error = float(np.sqrt(len(w)) * difference.std())
        if difference.sum() > error:
            better[method] = float(difference.sum())
    return max(better, key=lambda m: better[m])


def _gain_interval(before: NDArray[np.bool_], after: NDArray[np.bool_], target: Target) -> tuple[float, float]:
    """95 % bootstrap interval of the gain in (weighted) accuracy: samples drawn with replacement."""
    w = np.ones(len(before)) if target.weights is None else target.weights / target.total
    pairs = np.stack([after * 1.0 - before, w], axis=1)
    kinds, count = np.unique(pairs, axis=0, return_counts=True)  # equal samples are drawn together
    draws = np.random.default_rng(0).multinomial(len(before), count / count.sum(), _DRAWS)
    gain = draws @ (kinds[:, 0] * kinds[:, 1]) / np.maximum(draws @ kinds[:, 1], 1e-300)
    low, high = np.quantile(gain, [0.025, 0.975])
    return float(low), float(high)
