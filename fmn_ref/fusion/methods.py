"""The ways to choose epochs and weights: each looks at a selection set and returns members, (epoch, eps) in order.

A way takes a `Problem` and a `Target`; samples of weight zero are left out, which is how cross-validation hides some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..kernels import reference
from ..kernels.backend import load
from . import baselines
from .epsilon import SEARCHES, Target
from .plan import Epochs, Float, members_of, mix, mixture, window_epochs

Int = NDArray[np.int64]
Bool = NDArray[np.bool_]
Members = tuple[tuple[int, float], ...]
MIN_WEIGHT = 0.01  # members of "bagged" and "likelihood" that weigh less are left out
MIN_COVERAGE = 0.005  # checkpoints of "coverage" that add a smaller share of the samples are left out
EM_STEPS = 100
BAGS = 5


@dataclass
class Problem:
    """What every way to choose looks at."""

    probs: Epochs
    right: Bool  # (n_epochs, n_samples): single epochs
    final: Float  # (n_samples, n_classes)
    window: int
    search: str
    grid: Float
    max_members: int
    max_forward_passes: int

    @property
    def n_epochs(self) -> int:
        return len(self.probs)

    def epochs_of(self, epoch: int) -> range:
        return window_epochs(epoch, self.window, self.n_epochs)

    def affordable(self, members: Iterable[tuple[int, float]], epoch: int) -> bool:
        """Whether a further member keeps within the forward passes."""
        final = float(not any(eps == 1 for _, eps in members))
        return self.within([*(e for e, _ in members), epoch], final)

    def within(self, epochs: Iterable[int], final: float) -> bool:
        """Whether windows, and the final model if it has weight, keep within the forward passes."""
        used = {self.n_epochs - 1} if final > 0 else set[int]()
        return len(used.union(*map(self.epochs_of, epochs))) <= self.max_forward_passes

    def natives(self) -> list[NDArray[np.generic]]:
        """All epochs as they are stored."""
        return self.probs.natives(range(self.n_epochs))


def forget(problem: Problem, target: Target) -> Members:
    """METHOD's rounds: the epoch that is right most often where the fused predictor is wrong (arXiv 2412.12968)."""
    current, members = problem.final, list[tuple[int, float]]()
    best = target.score(current.argmax(1) == target.labels)
    while len(members) < problem.max_members:
        wrong = current.argmax(1) != target.labels
        forgotten = problem.right[:, wrong] @ target.each[wrong]  # n * F_e against the current predictor
        for e in range(problem.n_epochs):
            if problem.max_forward_passes < problem.n_epochs and not problem.affordable(members, e):
                forgotten[e] = -1
        epoch = int(forgotten.argmax())
        if forgotten[epoch] < 0:
            break
        window = problem.probs.natives(problem.epochs_of(epoch))
        eps, right = SEARCHES[problem.search](current, window, problem.probs.bfloat16, target, problem.grid)
        if right <= best:
            break
        best = right
        current = mix(current, problem.probs.mean(problem.epochs_of(epoch)), eps)
        members.append((epoch, eps))
    return tuple(members)


def greedy(problem: Problem, target: Target) -> Members:
    """Every round takes, of all windows, the one whose exact epsilon makes the most right (ties: the earliest)."""
    natives = problem.natives()
    current, members = problem.final, list[tuple[int, float]]()
    best = target.score(current.argmax(1) == target.labels)
    while len(members) < problem.max_members:
        affordable = [e for e in range(problem.n_epochs) if problem.affordable(members, e)]
        windows = np.array([[r[0], r[-1]] for r in map(problem.epochs_of, affordable)], np.int64).reshape(-1, 2)
        args = target.labels, target.weights
        eps, bound, _ = load()[0].best_epsilons(current, natives, *args, windows, np.empty(0), problem.probs.bfloat16)
        chosen: tuple[int, float] | None = None
        for c in np.argsort(-bound, kind="stable"):
            if bound[c] <= best:
                break
            first, last = windows[c]
            at = np.array([eps[c]])
            right = load()[0].mixture_right(current, natives[first : last + 1], *args, at, problem.probs.bfloat16)[0]
            if right > best:  # as the intervals say, unless rounding took it away
                chosen, best = (affordable[c], float(eps[c])), int(right)
        if chosen is None:
            break
        current = mix(current, problem.probs.mean(problem.epochs_of(chosen[0])), chosen[1])
        members.append(chosen)
    return tuple(members)


def bagged(problem: Problem, target: Target) -> Members:
    """The mean of what `greedy` finds on bootstrap samples of the selection set, which it fits less closely; members
    that weigh little are left out."""
    n, samples, generator = problem.n_epochs, len(target.labels), np.random.default_rng(0)
    total, final = np.zeros(n), 0.0
    for _ in range(BAGS):
        drawn = np.bincount(generator.integers(0, samples, samples), minlength=samples)
        rest = 1.0
        for epoch, eps in reversed(greedy(problem, target.weighted(target.each * drawn))):
            total[epoch] += rest * eps / BAGS
            rest *= 1 - eps
        final += rest / BAGS
    kept = [e for e in np.argsort(-total, kind="stable") if total[e] >= MIN_WEIGHT][: problem.max_members]
    while kept and not problem.within(kept, final):
        kept.pop()
    return members_of({int(e): float(total[e]) for e in kept}, n, final=final) if kept else ()


def likelihood(problem: Problem, target: Target) -> Members:
    """Convex weights of all windows and the final model that maximise the held-out log-likelihood, by EM.

    Small weights are left out, and the others found again; more of them until the costs allowed are met.
    """
    n = problem.n_epochs
    p = np.stack([_of_label(a, problem.probs.bfloat16, target.labels) for a in problem.natives()])
    parts = [problem.epochs_of(e) for e in range(n)] + [range(n - 1, n)]
    components = np.stack([p[part.start : part.stop].mean(0) for part in parts])
    w = target.each / target.each.max()
    alive = list(range(n + 1))
    while True:
        q = _em(components[alive], w)
        passes = len(set().union(*(parts[i] for i in alive)))
        small = q < min(MIN_WEIGHT, q.max())
        if small.any():
            alive = [i for i, s in zip(alive, small, strict=True) if not s]
        elif passes > problem.max_forward_passes or sum(i < n for i in alive) > problem.max_members:
            del alive[int(q.argmin())]
        else:
            break
    weights = {i: float(v) for i, v in zip(alive, q, strict=True)}
    return members_of(weights, n, final=weights.pop(n, 0.0))


def _of_label(p: NDArray[np.generic], bfloat16: bool, labels: Int) -> Float:
    return reference.widened(p[np.arange(len(labels)), labels], bfloat16)


def _em(components: Float, w: Float) -> Float:
    """Weights (n_components,) that maximise sum_i w_i log sum_c q_c components[c, i], from equal ones."""
    q = np.full(len(components), 1 / len(components))
    components = components + 1e-12
    for _ in range(EM_STEPS):
        q = q * (components @ (w / (q @ components))) / w.sum()
    return np.asarray(q / q.sum())


def coverage(problem: Problem, target: Target) -> Members:
    """Marginal coverage (VISTA, arXiv 2604.12044): from the most accurate checkpoint on, each weighs the share of
    samples that it alone of those so far gets right."""
    w = target.each
    order = np.argsort(-(problem.right @ w), kind="stable")
    covered = np.zeros(len(w), bool)
    share = np.zeros(problem.n_epochs)
    for e in order:
        share[e] = w[problem.right[e] & ~covered].sum() / target.total
        covered |= problem.right[e]
    share[share < MIN_COVERAGE] = 0
    if not share.any():
        return ()
    kept = np.argsort(-share, kind="stable")[: min(problem.max_members, problem.max_forward_passes)]
    return members_of({int(e): float(share[e]) for e in kept}, problem.n_epochs)


def _best_mean(problem: Problem, target: Target, choices: Iterable[dict[int, float]]) -> Members:
    """Of several plain means, the one with the best selection accuracy; the first of equal ones."""
    best, found = target.score(problem.final.argmax(1) == target.labels), dict[int, float]()
    for weights in choices:
        right = target.score(mixture(problem.probs, weights).argmax(1) == target.labels)
        if right > best:
            best, found = right, weights
    return members_of(found, problem.n_epochs) if found else ()


def _best_prefix(problem: Problem, target: Target, order: Iterable[int]) -> Members:
    """The plain mean of the first k epochs of an order, with the k of the best selection accuracy (ties: the least)."""
    best, found = target.score(problem.final.argmax(1) == target.labels), list[int]()
    most = min(problem.n_epochs, problem.max_forward_passes, problem.max_members)
    total, taken = np.zeros_like(problem.final), list[int]()
    for e in list(order)[:most]:
        total += problem.probs[e]
        taken.append(int(e))
        right = target.score(total.argmax(1) == target.labels)
        if right > best:
            best, found = right, list(taken)
    return members_of(dict.fromkeys(found, 1.0), problem.n_epochs) if found else ()


def _sizes(problem: Problem) -> list[int]:
    """Numbers of epochs worth trying: all up to eight, then each a quarter above the last."""
    most = min(problem.n_epochs, problem.max_forward_passes, problem.max_members)
    sizes = [k for k in range(1, 9) if k <= most]
    while sizes[-1] < most:
        sizes.append(min(most, sizes[-1] * 5 // 4))
    return sizes


def equal(problem: Problem, target: Target) -> Members:
    """k equally spaced epochs ("fixed jumps")."""
    return _best_mean(problem, target, (baselines.equally_spaced(problem.n_epochs, k) for k in _sizes(problem)))


def last(problem: Problem, target: Target) -> Members:
    """The last k epochs ("horizontal")."""
    return _best_prefix(problem, target, range(problem.n_epochs)[::-1])


def top(problem: Problem, target: Target) -> Members:
    """The k epochs with the best selection accuracy."""
    order = np.argsort(-(problem.right @ target.each), kind="stable")
    return _best_prefix(problem, target, order)


WAYS: dict[str, Callable[[Problem, Target], Members]] = {
    "forget": forget,
    "greedy": greedy,
    "bagged": bagged,
    "likelihood": likelihood,
    "coverage": coverage,
    "equal": equal,
    "last": last,
    "top": top,
}
WINDOWED = ("forget", "greedy", "bagged", "likelihood")  # the others mix single epochs


def choose(problem: Problem, target: Target, method: str) -> Members:
    """The members that a method finds."""
    return WAYS[method](replace(problem, window=problem.window if method in WINDOWED else 0), target)


def replay(problem: Problem, members: Members, window: int) -> Iterator[Float]:
    """Fused probabilities: of the final model, then after each member."""
    current = problem.final
    yield current
    for epoch, eps in members:
        current = mix(current, problem.probs.mean(window_epochs(epoch, window, problem.n_epochs)), eps)
        yield current
