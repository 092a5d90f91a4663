"""The log-linear pool: a weighted geometric mean of the epochs' probabilities. NumPy only.

    p(k | x)  proportional to  exp( sum_e w_e log p_e(k | x) ),   w_e >= 0

The weights maximise the likelihood of the labels under a Gaussian prior around the final model: a convex problem with
one unknown per epoch. Threads share out blocks of samples and rows of the Hessian. Sums run in one fixed order and no
product calls BLAS, so the weights do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .._check import Array, Float, Int
from ..kernels.threads import in_order, n_threads_for
from .mixtures import floored_log, softmax

TOLERANCE = 1e-8  # largest distance of the objective from its minimum
SHRINKAGE = 3.0  # precision of the prior, see `pool_weights`
_RIDGE = 1e-8  # smallest curvature; it bounds the weights of an epoch that is right on every sample
_BLOCK = 16384  # probabilities of one epoch that are processed together: 128 KiB of logarithms
_CHUNK = 8  # blocks of a thread's turn: threads hinder each other in calls of NumPy under 0.1 ms
_BUFFERS = 320  # blocks of logarithms that all threads hold together: 40 MiB
_COARSE = 50_000  # probabilities of one epoch from which the Hessian is estimated
_NEW_EPOCHS = 64  # epochs that join the working set in one round
_ROUNDS = 50


def pool_weights(
    probs: Sequence[Array],
    labels: Int,
    sample_weight: Array | None = None,
    *,
    max_members: int | None = None,
    shrinkage: float = SHRINKAGE,
) -> dict[int, float]:
    """Find the weights of the log-linear pool that fit the labels best.

    Minimises, over w >= 0 with a free sum,

        mean_i( -log p(y_i | x_i) )  +  shrinkage / (2 n) * |w - final|^2

    where `final` is the unit weight of the last epoch: a Gaussian prior, so few samples stay close to the final model
    and many samples decide alone. Leaving the final model out costs shrinkage / 2 nats in all.

    Parameters
    ----------
    probs : sequence of n_epochs arrays, (n_samples, n_classes) each
        Probabilities of any floating-point type, BFLOAT16 included. Values below 1e-6 count as 1e-6, so no single epoch
        can veto a class. `probs[e]` is read many times: it must be an array in memory.
    labels : (n_samples,) integers
    sample_weight : (n_samples,) numbers >= 0, optional
        Number of times that each sample counts; n is their sum. A sample of weight 0 is ignored.
    max_members : int >= 1, optional
        Most epochs with a weight. Epochs whose removal costs least are removed, and the other weights are found again.
    shrinkage : float >= 0
        Precision of the prior. 0 gives the maximum-likelihood weights.

    Returns
    -------
    dict
        {epoch: weight}, zeros left out, in the order of the epochs. Where `max_members` removes none, the objective is
        within 1e-8 of its minimum. Empty if no epoch is better than equal probabilities of all classes.

    References
    ----------
    C. Genest and J. V. Zidek, "Combining probability distributions", Statistical Science 1 (1986); G. Hinton, "Products
    of experts", ICANN 1999. Removal cost: B. Hassibi and D. Stork, "Optimal brain surgeon", NeurIPS 1992.

    Examples
    --------
    >>> early, late = np.array([[0.8, 0.2], [0.3, 0.7]]), np.array([[0.9, 0.1], [0.6, 0.4]])
    >>> weights = pool_weights([early, late], np.array([0, 1]))
    >>> {e: round(w, 2) for e, w in weights.items()}
    {0: 0.19, 1: 0.98}
    """
    count = np.ones(len(labels)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    rows = np.flatnonzero(count)
    n = float(count[rows].sum())
    final = np.zeros(len(probs))
    final[-1] = 1
    most = len(probs) if max_members is None else max_members
    objective = _Objective(probs, labels[rows], count[rows] / n, rows, shrinkage / n + _RIDGE)
    w = _minimise(objective, _minimise(objective.coarse, final, 1e-4), rounds=1)
    if np.count_nonzero(w) <= most:  # else removals move it further than more rounds do
        w = _minimise(objective, w)
    w = _prune(objective, w, most)
    return {int(e): float(w[e]) for e in np.flatnonzero(w)}


class _Objective:
    """Mean negative log-likelihood of the pool plus ridge / 2 * |w - final|^2, as a function of the weights.

    `weight` sums to 1. `coarse` is the same on fewer samples where there are many.
    """

    def __init__(self, probs: Sequence[Array], labels: Int, weight: Float, rows: Int, ridge: float) -> None:
        self.probs, self.labels, self.weight, self.rows, self.ridge = probs, labels, weight, rows, ridge
        self.n_classes = probs[0].shape[1]
        self.whole = len(rows) == rows[-1] - rows[0] + 1
        self.step = max(1, _BLOCK // self.n_classes)  # samples of a block
        self.coarse = self
        self.buffer = np.empty(0)  # for logarithms: allocating them anew costs more than computing them
        enough = max(500, _COARSE // self.n_classes)
        if len(rows) >= 2 * enough:
            few = slice(None, None, len(rows) // enough)
            self.coarse = _Objective(probs, labels[few], weight[few] / weight[few].sum(), rows[few], ridge)

    def chunks(self, n_blocks: int) -> list[slice]:
        """Samples to process together: a number of blocks. The last block is alone if it is smaller."""
        n, full = len(self.rows), len(self.rows) // self.step * self.step
        return [slice(a, b) for a, b in pairwise([*range(0, full, n_blocks * self.step), full, n]) if a < b]

    def buffers(self, n: int, n_blocks: int) -> Float:
        """(n, ...): room for the logarithms of a number of blocks, for each of n threads."""
        needed = n * n_blocks * self.step * self.n_classes
        if len(self.buffer) < needed:
            self.buffer = np.empty(needed)
        return self.buffer[:needed].reshape(n, -1)

    def index(self, part: slice) -> Any:
        """Index of samples into the rows of `probs`."""
        rows = self.rows[part]
        return slice(rows[0], rows[-1] + 1) if self.whole else rows

    def logs(self, epochs: Int, part: slice, buffer: Float) -> Float:
        """Log-probabilities (n_epochs, samples * n_classes), in the buffer."""
        index = self.index(part)
        parts = [self.probs[epoch][index] for epoch in epochs]
        logs = buffer[: len(parts) * parts[0].size].reshape(len(parts), -1)
        for p, log in zip(parts, logs, strict=True):
            floored_log(p, log)
        return logs

    def fused(self, w: Float, logs: Float) -> tuple[Float, Float]:
        """The pool's probabilities (samples, n_classes) and their logarithms."""
        return softmax(np.einsum("e,ej->j", w, logs).reshape(-1, self.n_classes))

    def __call__(self, w: Float, epochs: Int) -> tuple[float, Float]:
        """Value and gradient with respect to the weights of `epochs`; all others are 0."""
        members, chunks = np.flatnonzero(w) if w.any() else epochs[:1], self.chunks(_CHUNK)
        other, n_logs = np.ones(len(w), bool), max(len(members), _CHUNK)
        other[members] = False
        others = epochs[other[epochs]]
        work = len(self.rows) * self.n_classes * (len(members) + len(epochs))
        n_threads = n_threads_for(work, min(len(self.rows) // (_CHUNK * self.step), _BUFFERS // n_logs))
        buffers = self.buffers(n_threads, n_logs)

        def of_chunk(i: int, thread: int) -> list[tuple[float, Float]]:
            return self._of_chunk(w, members, others, chunks[i], buffers[thread])

        value, slope = 0.0, np.zeros(len(w))
        for blocks in in_order(of_chunk, len(chunks), n_threads):
            for log_likelihood, added in blocks:
                value -= log_likelihood
                slope += added
        shift = w.copy()
        shift[-1] -= 1
        return value + self.ridge / 2 * float((shift * shift).sum()), slope[epochs] + self.ridge * shift[epochs]

    def _of_chunk(self, w: Float, members: Int, others: Int, chunk: slice, buffer: Float) -> list[tuple[float, Float]]:
        """Log-likelihood of each block and minus its gradient (n_epochs,), 0 for epochs not asked for."""
        starts, index = range(chunk.start, chunk.stop, self.step), self.index(chunk)
        slopes, log_likelihoods, residuals = np.zeros((len(starts), len(w))), [], []
        for slope, start in zip(slopes, starts, strict=True):
            part = slice(start, min(start + self.step, chunk.stop))
            logs = self.logs(members, part, buffer)
            q, log_q = self.fused(w[members], logs)
            of_label = np.arange(len(q)), self.labels[part]
            log_likelihoods.append(float((log_q[of_label] * self.weight[part]).sum()))
            q[of_label] -= 1
            residuals.append((q * self.weight[part, None]).reshape(-1))
            slope[members] = sum(np.einsum("ej,j->e", logs[:, c], r) for c, r in _columns(residuals[-1]))
        columns = _columns(np.stack(residuals))
        for epoch in others:  # one at a time: its logarithms are still in the cache
            p = self.probs[epoch][index]
            log = floored_log(p, buffer[: p.size]).reshape(len(starts), -1)
            slopes[:, epoch] = sum(np.einsum("bj,bj->b", log[:, c], r) for c, r in columns)
        return list(zip(log_likelihoods, slopes, strict=True))

    def hessian(self, w: Float, epochs: Int) -> Float:
        """(n_epochs, n_epochs): the covariance of the log-probabilities under the pool."""
        h, buffer = np.zeros((len(epochs), len(epochs))), self.buffers(1, len(epochs))[0]
        for part in self.chunks(1):
            logs = self.logs(epochs, part, buffer)
            q, _ = self.fused(w[epochs], logs)
            logs = logs.reshape(len(epochs), *q.shape)
            logs -= np.einsum("ejk,jk->ej", logs, q)[:, :, None]
            _add_products(h, logs.reshape(len(epochs), -1), (q * self.weight[part, None]).reshape(-1))
        return np.asarray(h + np.tril(h, -1).T + self.ridge * np.eye(len(h)))

    def gap(self, w: Float, gradient: Float) -> float:
        """A bound of the value at w minus the minimum.

        The objective lies above its tangent at w by at least ridge / 2 * |v - w|^2; this is the minimum of that bound
        over v >= 0.
        """
        d = np.maximum(-gradient / self.ridge, -w)
        return -float((gradient * d + self.ridge / 2 * d * d).sum())


def _columns(x: Float) -> list[tuple[slice, Float]]:
    """Columns, and x there, whose products NumPy adds at once: 8192, as of one row alone."""
    parts = [slice(start, start + 8192) for start in range(0, x.shape[-1], 8192)]
    return [(part, x[..., part]) for part in parts]


def _add_products(h: Float, a: Float, weight: Float) -> None:
    """Add a diag(weight) a' to the lower triangle of h."""
    weighted, n = a * weight, len(a)

    def row(i: int, thread: int) -> Float:
        return np.asarray(np.einsum("ej,j->e", weighted[: i + 1], a[i]))

    for i, products in enumerate(in_order(row, n, n_threads_for(n * n // 2 * len(weight), n))):
        h[i, : i + 1] += products


def _minimise(objective: _Objective, w: Float, tolerance: float = TOLERANCE, rounds: int = _ROUNDS) -> Float:
    """The weights of the minimum, from w: rounds of Newton steps on a working set of epochs.

    A pass over all epochs verifies each round: it bounds the distance from the minimum and finds the epochs to add.
    """
    every = np.arange(len(w))
    for _ in range(rounds):
        value, gradient = objective(w, every)
        if objective.gap(w, gradient) <= tolerance:
            break
        working, others = np.flatnonzero(w), np.flatnonzero(w == 0)
        n_join = np.count_nonzero(gradient[others] < 0)
        if n_join > 0:  # the most promising of the others too: each that joins moves the gradient
            working = np.union1d(working, others[np.argsort(gradient[others], kind="stable")[:_NEW_EPOCHS]])
        least = tolerance * objective.ridge if n_join <= _NEW_EPOCHS else 1e-4
        before, w = w, _newton(objective, w, working, value, gradient[working], least)
        if np.array_equal(before, w):  # as close as rounding allows
            break
    return w


def _newton(objective: _Objective, w: Float, working: Int, value: float, gradient: Float, least: float) -> Float:
    """Newton steps on the weights of the working set, until a step promises a decrease under `least`.

    The Hessian is that of the first step, kept current by BFGS updates. Epochs that a step keeps clearly at 0 leave
    the working set.
    """
    h = objective.coarse.hessian(w, working)
    for _ in range(_ROUNDS):
        now = w[working]
        step = _nonnegative_minimum(h, np.einsum("ij,j->i", h, now) - gradient, now) - now
        decrease = -float((gradient * step).sum()) / 2
        if decrease <= 0:
            break
        slope = gradient + np.einsum("ij,j->i", h, step)
        kept = (now > 0) | (slope < 0.1 * np.abs(gradient).max())
        working, now, step, gradient, h = working[kept], now[kept], step[kept], gradient[kept], h[np.ix_(kept, kept)]
        for t in 0.5 ** np.arange(30):
            new = np.zeros_like(w)
            new[working] = now + t * step
            new_value, new_gradient = objective(new, working)
            if new_value <= value - 1e-4 * t * decrease + 1e-14 * (1 + value):  # the last term: rounding
                break
        else:
            break
        h = _bfgs(h, t * step, new_gradient - gradient)
        w, value, gradient = new, new_value, new_gradient
        if decrease <= least:
            break
    return w


def _bfgs(h: Float, step: Float, change: Float) -> Float:
    """The Hessian, changed so that the step explains the change of the gradient."""
    old = np.einsum("ij,j->i", h, step)
    expected, seen = float((step * old).sum()), float((step * change).sum())
    if seen <= 1e-8 * expected:
        return h
    return np.asarray(h + np.outer(change, change / seen) - np.outer(old, old / expected))


def _nonnegative_minimum(h: Float, c: Float, v: Float) -> Float:
    """argmin of v'hv / 2 - c'v over v >= 0, from a feasible v (Lawson & Hanson 1974, Chapter 23)."""
    free = v > 0
    for _ in range(3 * len(v) + 10):
        while free.any():
            x = np.zeros(len(v))
            x[free] = _solve(h[np.ix_(free, free)], c[free])
            low = np.flatnonzero(free & (x <= 0))
            if len(low) == 0:
                v = x
                break
            ratio = v[low] / np.maximum(v[low] - x[low], 1e-300)
            v = v + ratio.min() * (x - v)
            free[low[ratio == ratio.min()]] = False
            v[~free] = 0
        slope = np.where(free, -np.inf, c - np.einsum("ij,j->i", h, v))
        enters = int(slope.argmax())
        if slope[enters] <= 1e-13 * max(1.0, float(np.abs(c).max())):
            break
        free[enters] = True
    return v


def _solve(a: Float, b: Float) -> Float:
    """x with a x = b for a symmetric positive definite a, by Gauss-Jordan elimination."""
    n = len(a)
    m = np.column_stack([a, b])
    for i in range(n):
        row = m[i, i:] / m[i, i]
        m[:, i:] -= m[:, i, None] * row
        m[i, i:] = row
    return np.asarray(m[:, n:].reshape(b.shape))


def _prune(objective: _Objective, w: Float, most: int) -> Float:
    """Remove three quarters of the excess by one quadratic model, refit, and repeat until `most` are left."""
    while (excess := np.count_nonzero(w) - most) > 0:
        members = np.flatnonzero(w)
        gradient = objective(w, members)[1]
        h, v = objective.coarse.hessian(w, members), w[members]
        c = np.einsum("ij,j->i", h, v) - gradient
        left = np.arange(len(members))
        while len(left) > most + excess // 4:
            # removing epoch e costs w_e^2 / (2 [h^-1]_ee) once the other weights have followed
            inverse = _solve(h[np.ix_(left, left)], np.eye(len(left)))
            cost = (v[left] ** 2 / np.diag(inverse)).astype(np.float32)  # equal epochs cost the same: the first goes
            left = np.delete(left, int(cost.argmin()))
            v[left] = _nonnegative_minimum(h[np.ix_(left, left)], c[left], v[left])
            left = left[v[left] > 0]
        least = TOLERANCE * objective.ridge if len(left) <= most else 1e-4
        w, kept = np.zeros_like(w), members[left]
        w[kept] = v[left]
        if len(kept):
            w = _newton(objective, w, kept, *objective(w, kept), least)
        if not w.any():  # each of them helped only beside a removed one: the epoch that helps most alone
            kept = members[[objective(w, members)[1].argmin()]]
            w = _newton(objective, w, kept, *objective(w, kept), least)
    return w
