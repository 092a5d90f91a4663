"""The methods of `fuse`: each looks at a selection set and chooses members. NumPy only.

To add a method: write a function (Problem, Target) -> Members, and give it one entry in `_ENTRIES`, below. `fuse`, the
plan's checks, the command line, comparisons, benchmarks, docs and tests read `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from .._check import Array, Bool, Float, Int
from ..kernels.mixing import widened
from ..kernels.protocol import Seen
from . import baselines
from .epsilon import SEARCHES, Target, weight_right
from .mixtures import Members, members_from_weights, mix, mixture, window_epochs
from .pool import pool_weights
from .probabilities import ProbabilityReader

MIN_WEIGHT = 0.01  # "bagged" and "likelihood" drop members below this weight
MIN_COVERAGE = 0.005  # "coverage" drops checkpoints that add a smaller share of the samples
EM_STEPS = 100
BAGS = 5
POOL_MEMBERS = 10  # "pool" drops others, unless another bound is given
UNBOUNDED = 2**31


@dataclass
class Problem:
    """The selection set as a method sees it, and the bounds of the plan."""

    probs: ProbabilityReader
    right: Bool  # (n_epochs, n_samples): correctness of single epochs
    final: Float  # (n_samples, n_classes): probabilities of the last epoch
    window: int
    search: str
    grid: Float
    max_members: int
    max_forward_passes: int

    @property
    def n_epochs(self) -> int:
        return len(self.probs)

    @cached_property
    def seen(self) -> Seen:
        """What the kernel knows about each epoch's window and sample, for all rounds, folds and bags."""
        return np.zeros((self.n_epochs, len(self.final)), np.uint16)

    def window_of(self, epoch: int) -> range:
        """The epochs of a member."""
        return window_epochs(epoch, self.window, self.n_epochs)

    def affordable(self, members: Iterable[tuple[int, float]], epoch: int) -> bool:
        """Tell whether one more member stays within the forward passes."""
        final = float(not any(eps == 1 for _, eps in members))
        return self.within([*(e for e, _ in members), epoch], final)

    def within(self, epochs: Iterable[int], final: float) -> bool:
        """Tell whether windows, and the final model if it has weight, stay within the forward passes."""
        used = {self.n_epochs - 1} if final > 0 else set[int]()
        within = self.max_forward_passes >= self.n_epochs
        return within or len(used.union(*map(self.window_of, epochs))) <= self.max_forward_passes

    def most_epochs(self) -> int:
        """Most single epochs that a plan may hold."""
        return min(self.n_epochs, self.max_forward_passes, self.max_members)


_Found = tuple[int, float, int]  # an epoch, its epsilon, and the weight that is then right


def _in_rounds(problem: Problem, target: Target, find: Callable[[Float, list[int], int], _Found | None]) -> Members:
    """Mix in what `find` finds for the fused predictor among the affordable epochs, until it finds nothing better."""
    current, members, best = problem.final, list[tuple[int, float]](), target.score_of(problem.final)
    while len(members) < problem.max_members:
        candidates = [e for e in range(problem.n_epochs) if problem.affordable(members, e)]
        found = find(current, candidates, best) if candidates else None
        if found is None:
            break
        epoch, eps, best = found
        current = mix(current, problem.probs.mean(problem.window_of(epoch)), eps)
        members.append((epoch, eps))
    return tuple(members)


def forget(problem: Problem, target: Target) -> Members:
    """The papers' Knowledge Fusion: each round mixes in the epoch that is right most often where the fused predictor is
    wrong.

    arXiv 2412.12968, Algorithm 1. The mean of the epoch's window is mixed in with the epsilon of the best selection
    accuracy, until accuracy no longer rises. The earliest of equally good epochs is taken, and an epoch may be chosen
    again (the paper leaves both open).
    """

    def most_forgotten(current: Float, candidates: list[int], best: int) -> _Found | None:
        wrong = np.flatnonzero(current.argmax(1) != target.labels)
        # n * F_e against the current predictor
        forgotten = weight_right(problem.right.take(wrong, axis=1), target.each[wrong])
        epoch = max(candidates, key=forgotten.__getitem__)
        window = problem.probs.alike(problem.window_of(epoch))
        eps, right = SEARCHES[problem.search](current, window, target, problem.grid)
        return (epoch, eps, right) if right > best else None

    return _in_rounds(problem, target, most_forgotten)


def greedy(problem: Problem, target: Target) -> Members:
    """Each round tries every window with its exact epsilon and mixes in the best (ties: the earliest)."""
    epochs = problem.probs.alike(range(problem.n_epochs))
    return _in_rounds(problem, target, partial(_best_candidate, problem, target, epochs))


def _best_candidate(
    problem: Problem, target: Target, epochs: list[Array], current: Float, candidates: list[int], best: int
) -> _Found | None:
    """The best window with its exact epsilon; None if no window is better than `best`.

    Exact searches go by descending bound: two at first, then twice as many each time, in case bounds are far off.
    """
    search, at_once, found = partial(_search_windows, problem, target, epochs, current, candidates), 1, None
    eps, bound = search(np.arange(len(candidates)), exact=False)
    eps[:] = np.nan
    while bound.max() > best:
        c = int(bound.argmax())
        if np.isnan(eps[c]):
            at_once *= 2
            open_ = np.flatnonzero(np.isnan(eps) & (bound > best))
            some = open_[np.argsort(-bound[open_], kind="stable")][:at_once]
            eps[some], bound[some] = search(some, exact=True)
            continue
        window, bound[c] = problem.window_of(candidates[c]), 0
        right = int(target.mixture_right(current, epochs[window.start : window.stop], eps[c : c + 1])[0])
        if right > best:  # rounding may make it less than the bound
            found, best = (candidates[c], float(eps[c]), right), right
    return found


def _search_windows(
    problem: Problem,
    target: Target,
    epochs: list[Array],
    current: Float,
    candidates: list[int],
    some: Int,
    *,
    exact: bool,
) -> tuple[Float, Int]:
    """For the windows of some candidates: epsilons and weights, or upper bounds of the weights unless `exact`."""
    chosen = np.array(candidates)[some]
    windows = np.array([[r[0], r[-1]] for r in map(problem.window_of, chosen.tolist())], np.int64)
    seen = problem.seen[chosen]
    found = target.best_windows(current, epochs, windows, seen, exact=exact)
    problem.seen[chosen] = seen
    return found


def bagged(problem: Problem, target: Target) -> Members:
    """The mean of the plans that greedy finds on five bootstrap samples of the selection set.

    It fits the selection set less closely than one plan does. Members below MIN_WEIGHT are dropped.
    """
    n, samples, generator = problem.n_epochs, len(target.labels), np.random.default_rng(0)
    total, final = np.zeros(n), 0.0
    for _ in range(BAGS):
        drawn = np.bincount(generator.integers(0, samples, samples), minlength=samples)
        rest = 1.0
        for epoch, eps in reversed(METHODS["greedy"].members(problem, target.weighted(target.each * drawn))):
            total[epoch] += rest * eps / BAGS
            rest *= 1 - eps
        final += rest / BAGS
    kept = [e for e in np.argsort(-total, kind="stable") if total[e] >= MIN_WEIGHT][: problem.max_members]
    while kept and not problem.within(kept, final):
        kept.pop()
    return members_from_weights({int(e): float(total[e]) for e in kept}, n, final=final) if kept else ()


def pool(problem: Problem, target: Target) -> Members:
    """The log-linear pool: the weighted geometric mean of ten epochs that has the best log-likelihood of the labels.

    Genest and Zidek 1986. `pool_weights` has the objective and its guard against few samples. A sample's weight counts
    it several times; the weights are scaled to a mean of 1.
    """
    most = problem.most_epochs()
    if problem.max_members == UNBOUNDED:
        most = min(most, POOL_MEMBERS)
    counted = target.each[target.each > 0]
    count = target.each * (len(counted) / counted.sum())
    weights = pool_weights(problem.probs.alike(range(problem.n_epochs)), target.labels, count, max_members=most)
    found = zip(weights, _rounded(np.array([*weights.values()])).tolist(), strict=True)
    return tuple(sorted(((e, w) for e, w in found if w > 0), key=lambda item: -item[1]))


def likelihood(problem: Problem, target: Target) -> Members:
    """The convex weights of all windows and the final model with the best log-likelihood of the labels.

    Found by expectation-maximisation. Small weights are dropped and the others fitted again, until the plan is within
    its bounds. If nothing is left, no window fits the bounds: the final model alone.
    """
    n = problem.n_epochs
    at_label = np.arange(len(target.labels)), target.labels
    p = np.stack([widened(probs[at_label]) for probs in problem.probs.alike(range(n))])
    parts = [problem.window_of(e) for e in range(n)] + [range(n - 1, n)]
    components = np.stack([p[part.start : part.stop].mean(0) for part in parts])
    w = target.each / target.each.max()
    alive = [*(i for i in range(n) if parts[i] != parts[n]), n]  # the final model is no member
    while alive:
        q = _em(components[alive], w)
        passes = len(set().union(*(parts[i] for i in alive)))
        small = q < min(MIN_WEIGHT, q.max())
        if small.any():
            alive = [i for i, s in zip(alive, small, strict=True) if not s]
        elif passes > problem.max_forward_passes or sum(i < n for i in alive) > problem.max_members:
            del alive[int(q.argmin())]
        else:
            weights = {i: float(v) for i, v in zip(alive, q, strict=True)}
            return members_from_weights(weights, n, final=weights.pop(n, 0.0))
    return ()


def _em(components: Float, w: Float) -> Float:
    """Weights (n_components,) that maximise sum_i w_i log sum_c q_c components[c, i]; starts from equal weights."""
    q = np.full(len(components), 1 / len(components))
    components = components + 1e-12
    for _ in range(EM_STEPS):
        q = q * (components @ (w / (q @ components))) / w.sum()
    return _rounded(q / q.sum())


def _rounded(weights: Float) -> Float:
    """Multiples of 2^-20, about 1e-6. BLAS, exponentials and logarithms have their own last bits on every processor."""
    return np.asarray(np.rint(weights * 2**20) / 2**20)


def coverage(problem: Problem, target: Target) -> Members:
    """Marginal coverage: a checkpoint weighs the share of samples that it gets right and no more accurate one does.

    VISTA, arXiv 2604.12044.
    """
    w = target.each
    order = np.argsort(-weight_right(problem.right, w), kind="stable")
    covered = np.zeros(len(w), bool)
    share = np.zeros(problem.n_epochs)
    for e in order:
        share[e] = w[problem.right[e] & ~covered].sum() / target.total
        covered |= problem.right[e]
    share[share < MIN_COVERAGE] = 0
    if not share.any():
        return ()
    kept = np.argsort(-share, kind="stable")[: problem.most_epochs()]
    return members_from_weights({int(e): float(share[e]) for e in kept}, problem.n_epochs)


def _best_mean(problem: Problem, target: Target, choices: Iterable[tuple[dict[int, float], Float]]) -> Members:
    """The (weights, probabilities) with the best selection accuracy; the first of equal ones."""
    best, found = target.score_of(problem.final), dict[int, float]()
    for weights, probs in choices:
        right = target.score_of(probs)
        if right > best:
            best, found = right, weights
    return members_from_weights(found, problem.n_epochs) if found else ()


def _prefixes(problem: Problem, order: Sequence[int] | Int) -> Iterator[tuple[dict[int, float], Float]]:
    """Equal weights, and the sum of the probabilities, of the first k epochs of an order, for each k."""
    total = np.zeros_like(problem.final)
    for k in range(1, problem.most_epochs() + 1):
        total += problem.probs[order[k - 1]]
        yield dict.fromkeys(order[:k], 1.0), total


def _sizes(problem: Problem) -> list[int]:
    """Numbers of epochs to try: all up to eight, then each a quarter above the one before."""
    most = problem.most_epochs()
    sizes = list(range(1, min(8, most) + 1))
    while sizes[-1] < most:
        sizes.append(min(most, sizes[-1] * 5 // 4))
    return sizes


def best_spaced(problem: Problem, target: Target) -> Members:
    """The plain mean of k equally spaced epochs ("fixed jumps"), with the best k."""
    spaced = (baselines.equally_spaced(problem.n_epochs, k) for k in _sizes(problem))
    return _best_mean(problem, target, ((weights, mixture(problem.probs, weights)) for weights in spaced))


def best_last(problem: Problem, target: Target) -> Members:
    """The plain mean of the last k epochs ("horizontal"), with the best k."""
    return _best_mean(problem, target, _prefixes(problem, range(problem.n_epochs)[::-1]))


def best_top(problem: Problem, target: Target) -> Members:
    """The plain mean of the k epochs with the best selection accuracy, with the best k."""
    order = np.argsort(-weight_right(problem.right, target.each), kind="stable")
    return _best_mean(problem, target, _prefixes(problem, order))


class Method(NamedTuple):
    """One method of `fuse`.

    Attributes
    ----------
    name : str
        Value of `fuse(method=...)` and of `FusionPlan.method`.
    choose : callable(Problem, Target) -> Members
        The first sentence of its docstring describes the method in the docstring of `fuse`.
    windowed : bool
        Whether members are means of windows. Otherwise they are single epochs, and `window` has no effect.
    control : bool
        Whether it is a plain mean of k epochs, a control for the others.
    exact : bool
        Whether it always searches epsilon exactly, whatever `search` is.
    combine : {"linear", "geometric"}
        How the members combine, and so what `choose` returns: (epoch, eps) in the order of mixing, or (epoch, weight).
    """

    name: str
    choose: Callable[[Problem, Target], Members]
    windowed: bool = False
    control: bool = False
    exact: bool = False
    combine: str = "linear"

    def members(self, problem: Problem, target: Target) -> Members:
        """Members that `choose` finds; none if no sample has weight, as in a fold or a bootstrap sample."""
        return self.choose(problem, target) if target.total > 0 else ()


_ENTRIES = (
    Method("pool", pool, combine="geometric"),
    Method("forget", forget, windowed=True),
    Method("greedy", greedy, windowed=True, exact=True),
    Method("bagged", bagged, windowed=True),
    Method("likelihood", likelihood, windowed=True),
    Method("coverage", coverage),
    Method("equal", best_spaced, control=True),
    Method("last", best_last, control=True),
    Method("top", best_top, control=True),
)
METHODS = {method.name: method for method in _ENTRIES}
AUTO = "auto"
AUTO_METHOD = "pool"  # the method that "auto" compares with the final model
_AUTO_SUMMARY = f'Cross-validation chooses between "{AUTO_METHOD}" and the final model alone.'


def method_names() -> tuple[str, ...]:
    """Values that `fuse(method=...)` accepts."""
    return (*METHODS, AUTO)


def summaries() -> dict[str, str]:
    """{name: one sentence} for everything that `fuse(method=...)` accepts."""
    texts = {m.name: (m.choose.__doc__ or "").split("\n\n")[0] for m in METHODS.values()}
    return {name: " ".join(text.split()) for name, text in texts.items()} | {AUTO: _AUTO_SUMMARY}


def problem_for(problem: Problem, method: str) -> Problem:
    """The problem as a method sees it: without windows if its members are single epochs."""
    return problem if METHODS[method].windowed else replace(problem, window=0)
