"""Graded answers of language models: expected curves over random draws, temporal forgetting, Pass@k, Maj@k. NumPy only.

A model that samples its answers is right at a question with some probability. `rates` are (n_checkpoints, n_questions):
the share of the draws that is right. `correct` is (n_checkpoints, n_questions, n_draws): whether each draw is right.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .curves import ForgettingCurves
from .groups import group_members

EXACT = 20_000  # most ways of counting the votes on a question that are enumerated
SAMPLES = 4096  # random draws where there are more: a standard error below 0.8 points per question


def expected_curves(
    rates: Any, *, n_draws: int | None = None, reference: int = -1, groups: Any = None, sample_weight: Any = None
) -> ForgettingCurves:
    """Expected curves of a model that samples: accuracy, F_e, L_e and retained accuracy of one draw per checkpoint.

    Draws of two checkpoints are independent, so F_e is the mean of p_e (1 - p_E), and L_e that of (1 - p_e) p_E. With
    the share of right draws in place of each p, both are unbiased. Rates of 0 and 1 give `forgetting_curves`.

    Parameters
    ----------
    rates : (n_checkpoints, n_questions) numbers in [0, 1]
        Share of the draws that is right.
    n_draws : int, optional
        Draws behind each rate, at least 2. Default: none. The row of the reference then compares two draws of that
        checkpoint: F and L show what sampling alone changes. By default they are 0 there.
    reference, groups, sample_weight
        As in `forgetting_curves`.

    Returns
    -------
    ForgettingCurves
        Its counts are expected numbers of questions (float64).

    Raises
    ------
    TypeError, ValueError
        Rates that are no numbers in [0, 1], wrong shapes; otherwise as in `forgetting_curves`.

    Examples
    --------
    >>> curves = expected_curves([[1.0, 0.5, 0.0, 0.5], [0.5, 0.5, 0.0, 1.0]])
    >>> curves.accuracy, curves.forget, curves.learned
    (array([0.5, 0.5]), array([0.1875, 0.    ]), array([0.1875, 0.    ]))
    """
    p = _rates(rates)
    n = p.shape[1]
    r = _check.index(reference, len(p), "reference")
    w = np.ones(n) if sample_weight is None else _check.weights(sample_weight, n)
    sums = np.stack([p, p * (1 - p[r]), (1 - p) * p[r], p * p[r]])
    changed = 0.0  # of the reference: one draw compared with itself, or two different ones
    if n_draws is not None:
        more = _check.number(n_draws, 2, math.inf, "n_draws", int)
        changed = sums[1, r] * more / (more - 1)
    sums[1:3, r], sums[3, r] = changed, p[r] - changed
    names, member = group_members(np.zeros(n, np.int64) if groups is None else groups, n)
    size = np.bincount(member)
    total = size if sample_weight is None else np.bincount(member, w)
    in_order = np.stack([np.bincount(member, w * row) for row in sums.reshape(-1, n)])  # BLAS would take any order
    counts = np.ascontiguousarray(in_order.reshape(*sums.shape[:2], len(names)).swapaxes(1, 2))
    if groups is None:
        return ForgettingCurves(counts[:, 0], n, n if sample_weight is None else total[0], r)
    return ForgettingCurves(counts, size, total, r, names)


def _rates(rates: Any) -> NDArray[np.float64]:
    a = _check.array(rates, "rates")
    if a.ndim != 2 or 0 in a.shape:
        hint = "; of draws take correct.mean(-1)" if a.ndim == 3 else ""
        raise ValueError(f"rates: expected shape (n_checkpoints, n_questions), not empty, got shape {a.shape}{hint}")
    p = a.astype(np.float64)
    bad = ~((p >= 0) & (p <= 1))  # NaN too
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"rates: expected values in [0, 1], got {p[index]} at index {index}")
    return p


class TemporalForgetting(NamedTuple):
    """Shares of questions that some checkpoint answers and the last one does not; each is an expectation over draws.

    Attributes
    ----------
    ever_correct : float
        Questions that at least one checkpoint answers correctly.
    score : float
        Questions that an earlier checkpoint answers correctly and the last one does not: `ever_correct` less the final
        accuracy.
    of_errors : float
        The score divided by the final error rate; nan without errors.
    """

    ever_correct: float
    score: float
    of_errors: float


def temporal_forgetting(rates: Any) -> TemporalForgetting:
    """Temporal forgetting: final errors that an earlier checkpoint answered correctly.

    Parameters
    ----------
    rates : (n_checkpoints, n_questions) numbers in [0, 1], or bool
        Share of the draws that is right. One draw of each checkpoint counts.

    Returns
    -------
    TemporalForgetting

    Raises
    ------
    TypeError, ValueError
        As in `expected_curves`.

    Examples
    --------
    >>> temporal_forgetting([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    TemporalForgetting(ever_correct=0.5, score=0.25, of_errors=0.3333333333333333)

    References
    ----------
    arXiv 2505.20196 (ever correct score, temporal forgetting score).
    """
    wrong = 1 - _rates(rates)
    errors, never = float(wrong[-1].mean()), float(wrong.prod(0).mean())
    return TemporalForgetting(1 - never, errors - never, (errors - never) / errors if errors else math.nan)


def pass_at_k(correct: Any, k: Any, *, last: int = 1) -> NDArray[np.float64]:
    """Pass@k of each question: the probability that at least one of k draws is right.

    Parameters
    ----------
    correct : (n_checkpoints, n_questions, n_draws) bool or 0 and 1
        Whether each draw is right. Draws have no order.
    k : int, or (n_checkpoints,) integers
        Number of draws: in all, or of each checkpoint.
    last : int
        Default: 1, the last checkpoint alone. Otherwise one number `k` of draws is spread evenly over the `last`
        checkpoints; the latest ones take the remainder.

    Returns
    -------
    (n_questions,) float64
        Unbiased. Take the mean for the Pass@k of a benchmark.

    Raises
    ------
    TypeError, ValueError
        Wrong types or shapes, values other than 0 and 1, a budget of more draws than there are.

    Examples
    --------
    >>> correct = [[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]
    >>> pass_at_k(correct, 2), pass_at_k(correct, 2, last=2)
    (array([0.5, 0. ]), array([0.625, 0.25 ]))

    References
    ----------
    Chen et al. 2021, arXiv 2107.03374, Equation 1 (Pass@k); arXiv 2505.20196 (spread over checkpoints).
    """
    right = _check.draws(correct)
    n = right.shape[2]
    fails = np.ones(right.shape[1])
    for n_right, draws in zip(right.sum(2), _budget(k, last, *right.shape[::2]), strict=True):
        all_wrong = [math.comb(n - c, draws) / math.comb(n, draws) for c in range(n + 1)]
        fails *= np.array(all_wrong)[n_right]
    return 1 - fails


def maj_at_k(answers: Any, correct: Any, k: Any, *, last: int = 1, seed: int = 0) -> NDArray[np.float64]:
    """Maj@k of each question: the probability that the most frequent of k drawn answers is right.

    Parameters
    ----------
    answers : (n_checkpoints, n_questions, n_draws) integers or strings
        The answers; equal values are the same answer. A missing answer is one too.
    correct : (n_checkpoints, n_questions, n_draws) bool or 0 and 1
        Whether each is right.
    k, last
        As in `pass_at_k`.
    seed : int
        Default: 0. Of the random draws for questions with too many possible ones: see Notes.

    Returns
    -------
    (n_questions,) float64
        Unbiased. Of equally frequent answers each wins with the same probability.

    Raises
    ------
    TypeError, ValueError
        As in `pass_at_k`; an answer to a question that is both right and wrong.

    Notes
    -----
    Up to 20 000 ways of counting the votes on a question are enumerated: exact. Above, 4096 random draws take their
    place, with a standard error below 0.008 per question.

    Examples
    --------
    >>> maj_at_k([[[7, 7, 3, 5]]], [[[1, 1, 0, 0]]], 3)
    array([0.66666667])

    References
    ----------
    Wang et al. 2022, arXiv 2203.11171 (self-consistency); arXiv 2505.20196 (spread over checkpoints).
    """
    right = _check.draws(correct)
    a = _check.array(answers, "answers", kinds="biuSUT")
    if a.shape != right.shape:
        raise ValueError(f"answers: expected shape {right.shape} as correct, got shape {a.shape}")
    budget = _budget(k, last, *right.shape[::2])
    used = budget > 0
    rng = np.random.default_rng(_check.number(seed, 0, 2**64, "seed", int))
    shares = np.empty(right.shape[1])
    for i in range(len(shares)):
        counts, is_right = _ballots(a[used, i], right[used, i], f"question {i}")
        votes, weights = _possible_votes(counts, budget[used], rng)
        most = votes == votes.max(1, keepdims=True)
        shares[i] = (weights * ((most @ is_right) / most.sum(1))).sum()
    return shares


def _budget(k: Any, last: Any, n_checkpoints: int, n_draws: int) -> NDArray[np.int64]:
    """Number of draws of each checkpoint."""
    last = _check.number(last, 1, n_checkpoints, "last", int)
    if np.ndim(k) == 0:
        each, more = divmod(_check.number(k, 1, last * n_draws, "k", int), last)
        return np.repeat([0, each, each + 1], [n_checkpoints - last, last - more, more])
    budget = _check.labels(k, n_checkpoints, name="k")
    if not budget.any() or budget.max() > n_draws:
        raise ValueError(f"k: expected 0 to {n_draws} draws of each checkpoint, not all 0, got {budget.tolist()}")
    return budget


def _ballots(
    answers: NDArray[Any], right: NDArray[np.bool_], where: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How often each checkpoint gives each answer, and whether the answer is right."""
    names, code = np.unique(answers, return_inverse=True)
    code = code.reshape(answers.shape)
    counts = np.stack([np.bincount(row, minlength=len(names)) for row in code])
    is_right = np.bincount(code.ravel(), right.ravel()) / counts.sum(0)
    unsure = (is_right > 0) & (is_right < 1)
    if unsure.any():
        raise ValueError(f"correct: {where} has the answer {names[unsure].tolist()[0]!r} both right and wrong")
    return counts, is_right


def _possible_votes(
    counts: NDArray[np.int64], budget: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(n_ways, n_answers) votes that a draw can give, and the probability of each way; or a random sample of them."""
    most = np.minimum(counts, budget[:, None])
    if math.prod((most + 1).ravel().tolist()) > EXACT:
        drawn = (rng.multivariate_hypergeometric(c, k, SAMPLES) for c, k in zip(counts, budget, strict=True))
        return np.sum(list(drawn), 0), np.full(SAMPLES, 1 / SAMPLES)
    votes, weights = np.zeros((1, counts.shape[1]), np.int64), np.ones(1)
    for c, m, k in zip(counts.tolist(), most.tolist(), budget.tolist(), strict=True):
        drawn_votes = [v for v in itertools.product(*(range(x + 1) for x in m)) if sum(v) == k]
        ways = [math.prod(map(math.comb, c, v)) / math.comb(sum(c), k) for v in drawn_votes]
        votes = (votes[:, None] + np.array(drawn_votes)).reshape(-1, counts.shape[1])
        weights = np.outer(weights, ways).ravel()
    return votes, weights
