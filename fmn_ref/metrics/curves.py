"""The forget fraction and its relatives, over per-sample correctness of every epoch. NumPy only; see `_backend`.

Scores on a labelled set T of n samples, after arXiv 2507.08686 Section III: M_e is the part of T that is wrong at epoch
e, E the final (or any reference) epoch.

    forget fraction   F_e = acc(e, M_E) |M_E| / n     right at e, wrong at the end
    learned fraction  L_e = acc(E, M_e) |M_e| / n     wrong at e, right at the end
    identity          acc(E) = acc(e) + L_e - F_e

Everywhere `correct` is (n_epochs, n_samples): bool or integers 0 and 1, in anything that NumPy can view (list, memmap,
torch tensor, DLPack), or a CorrectnessHistory, whose bits are read as they are. Memory-mapped arrays and history files
may be larger than memory: they are streamed in blocks. Tensors on an accelerator are reduced there. Counts are exact
integers, the same from every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..kernels import backend
from .matrix import Matrix

NEVER_LEARNED = ("nan", "toneva", "cartography", "datadiet", "deepcore")


def correctness(predictions_or_scores: Any, labels: Any) -> NDArray[np.bool_]:
    """Which samples are classified correctly.

    Parameters
    ----------
    predictions_or_scores : (..., n_samples) integers or (..., n_samples, n_classes) floats
        Predicted classes, or scores (probabilities, logits) whose arg-max is the prediction, the first of equal ones.
    labels : (n_samples,) integers
        True classes, from 0.

    Returns
    -------
    (..., n_samples) bool

    Raises
    ------
    TypeError
        Strings, objects, or labels that are not integers.
    ValueError
        Shapes that do not fit, labels out of range, NaN among the scores.

    Examples
    --------
    >>> correctness([[0, 1, 1], [0, 1, 2]], [0, 1, 2])
    array([[ True,  True, False],
           [ True,  True,  True]])
    >>> correctness([[0.9, 0.1], [0.5, 0.5]], [0, 1])
    array([ True, False])
    """
    a, bfloat16 = _check.predictions_or_scores(predictions_or_scores)
    kernels, shape = backend.kernels_for(a), tuple(a.shape)
    if _check.kind(a) == "i" and not bfloat16:
        y = _check.labels(labels)
        if a.ndim < 1 or shape[-1] != len(y):
            raise ValueError(f"predictions: expected shape (..., {len(y)}) as labels, got shape {shape}")
        bits = kernels.pack_predictions(_check.plain(a.reshape(-1, len(y))), y)
        return np.asarray(kernels.unpack(bits, len(y))).reshape(shape)
    if a.ndim < 2 or shape[-1] == 0:
        hint = "; for one score a sample give classes, score > 0 as integers" if a.ndim == 1 else ""
        raise ValueError(f"scores: expected shape (..., n_samples, n_classes), got shape {shape}{hint}")
    y = _check.labels(labels, shape[-2], shape[-1])
    out = np.empty(shape[:-1], bool)
    for epoch in np.ndindex(shape[:-2]):
        bits = kernels.pack_scores(_check.plain(a[epoch]), y, bfloat16)
        if bits is None:
            at = (*epoch, *_check.first_nan(a[epoch], bfloat16))
            raise ValueError(f"scores: expected numbers, got NaN at index {at}")
        out[epoch] = kernels.unpack(bits[None], len(y))[0]
    return out


@dataclass(frozen=True, eq=False)
class ForgettingCurves:
    """Accuracy, forget, learned and retained fraction per epoch, against one reference epoch.

    Fractions are (n_epochs,) float64, or (n_groups, n_epochs) when groups were given (nan for an empty group).

    Attributes
    ----------
    counts : (4, [n_groups,] n_epochs)
        Right, forgotten, learned and retained samples (int64), or sums of their weights (float64).
    n_samples : int or (n_groups,) int64
    total : n_samples, or the sum of the weights
    reference : int
    groups : (n_groups,) or None
        The distinct group labels, sorted: the order of the leading axis.

    Notes
    -----
    Curves of disjoint sample sets add, ``a + b``: the parts may come from shards, blocks or machines. Group labels are
    united.
    """

    counts: NDArray[Any]
    n_samples: Any
    total: Any
    reference: int
    groups: NDArray[Any] | None = None

    def __repr__(self) -> str:
        n, groups = self.counts.shape[-1], "" if self.groups is None else f", {len(self.groups)} groups"
        peak = f"peak forget fraction {np.nanmax(self.forget):.4f}"
        return f"ForgettingCurves({n} epochs, {np.sum(self.n_samples)} samples{groups}, {peak})"

    def _fraction(self, row: int) -> NDArray[np.float64]:
        if self.groups is None:
            return np.asarray(self.counts[row] / self.total)
        with np.errstate(invalid="ignore"):  # of an empty group
            return np.asarray(self.counts[row] / self.total[:, None])

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of samples right at e."""
        return self._fraction(0)

    @property
    def forget(self) -> NDArray[np.float64]:
        """F_e: share right at e and wrong at the reference."""
        return self._fraction(1)

    @property
    def learned(self) -> NDArray[np.float64]:
        """L_e: share wrong at e and right at the reference."""
        return self._fraction(2)

    @property
    def retained(self) -> NDArray[np.float64]:
        """Share right at e and still right at the reference."""
        return self._fraction(3)

    def __radd__(self, other: int) -> ForgettingCurves:
        """0 + curves, so that sum() works."""
        return self if other == 0 else NotImplemented

    def __add__(self, other: ForgettingCurves) -> ForgettingCurves:
        if not isinstance(other, ForgettingCurves):
            return NotImplemented
        if self.counts.shape[-1] != other.counts.shape[-1] or self.reference != other.reference:
            raise ValueError("ForgettingCurves: can only add curves of the same epochs and reference")
        if (self.groups is None) != (other.groups is None):
            raise ValueError("ForgettingCurves: can only add curves that both have groups, or both have none")
        a, b, groups = self, other, None
        if self.groups is not None and other.groups is not None:
            groups = np.union1d(self.groups, other.groups)
            a, b = _spread(self, self.groups, groups), _spread(other, other.groups, groups)
        return ForgettingCurves(
            a.counts + b.counts, a.n_samples + b.n_samples, a.total + b.total, self.reference, groups
        )


def _spread(curves: ForgettingCurves, names: NDArray[Any], groups: NDArray[Any]) -> ForgettingCurves:
    """The same curves with empty groups where `groups` has more labels than `names`."""
    at = np.searchsorted(groups, names)

    def spread(a: NDArray[Any], axis: int) -> NDArray[Any]:
        out = np.zeros((*a.shape[:axis], len(groups), *a.shape[axis + 1 :]), a.dtype)
        out[(slice(None),) * axis + (at,)] = a
        return out

    n, total = spread(curves.n_samples, 0), spread(curves.total, 0)
    return ForgettingCurves(spread(curves.counts, 1), n, total, curves.reference, groups)


def forgetting_curves(
    correct: Any, *, reference: int = -1, groups: Any = None, sample_weight: Any = None, progress: bool = False
) -> ForgettingCurves:
    """Accuracy, F_e, L_e and retained accuracy of every epoch in one pass.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1
    reference : int
        The epoch that stands for "the end"; negative counts from the last.
    groups : (n_samples,), optional
        A label per sample (class, cluster, annotator): the same curves inside each group.
    sample_weight : (n_samples,) float, optional
        Finite, >= 0; fractions become shares of the total weight. Summed in double in the order of the samples (on an
        accelerator: in the device's order).
    progress : bool
        Show a bar on stderr, if that is a terminal, while a file is streamed.

    Returns
    -------
    ForgettingCurves

    Raises
    ------
    TypeError, ValueError
        Floats, strings, wrong shapes, values other than 0 and 1, empty arrays, an epoch out of range.

    Examples
    --------
    >>> curves = forgetting_curves([[1, 1, 0, 0], [1, 0, 1, 0]])
    >>> curves.accuracy, curves.forget, curves.learned
    (array([0.5, 0.5]), array([0.25, 0.  ]), array([0.25, 0.  ]))

    References
    ----------
    arXiv 2507.08686, Section III (F_e, L_e); arXiv 2412.12968.
    """
    m = Matrix(correct)
    r = _check.index(reference, m.n_epochs, "reference")
    n, k = m.n_samples, m.kernels
    if groups is None and sample_weight is None:
        return ForgettingCurves(_curve_counts(m, r, progress), n, n, r)
    names, member = _groups(np.zeros(n, np.int64) if groups is None else groups, n)
    w = None if sample_weight is None else _check.weights(sample_weight, n)
    sums = np.zeros((4, len(names), m.n_epochs), np.int64 if w is None else np.float64)
    for part, rows in m.blocks(progress):
        n_part, g = part.stop - part.start, member[part]
        if w is None:
            k.group_counts(rows, n_part, r, g, len(names), sums)
        else:
            k.group_sums(rows, n_part, r, g, len(names), w[part], sums)
    size, total = np.bincount(member), np.bincount(member, w)
    if groups is None:
        return ForgettingCurves(sums[:, 0], n, total[0], r)
    return ForgettingCurves(sums, size, size if w is None else total, r, names)


def _curve_counts(m: Matrix, reference: int, progress: bool = False) -> NDArray[np.int64]:
    counts = np.zeros((4, m.n_epochs), np.int64)
    for part, rows in m.blocks(progress):
        m.kernels.curve_counts(rows, part.stop - part.start, reference, counts)
    return counts


def _groups(groups: Any, n_samples: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Distinct labels, sorted, and each sample's place among them."""
    g = np.asarray(groups.detach().cpu() if _check.is_tensor(groups) else groups)
    if g.shape != (n_samples,) or g.dtype.kind not in "biuUS":
        raise ValueError(
            f"groups: expected {n_samples} integers or strings, one per sample, got shape {g.shape}, dtype {g.dtype}"
        )
    names, member = np.unique(g, return_inverse=True)
    return names, member.astype(np.int64)


def forget_fraction(correct: Any, *, reference: int = -1, sample_weight: Any = None) -> NDArray[np.float64]:
    """F_e: the share of samples right at epoch e and wrong at the end.

    Parameters, errors and source are those of `forgetting_curves`.

    Returns
    -------
    (n_epochs,) float64

    Examples
    --------
    >>> forget_fraction([[1, 1, 0, 0], [1, 0, 1, 0]])
    array([0.25, 0.  ])
    """
    return forgetting_curves(correct, reference=reference, sample_weight=sample_weight).forget


def learned_fraction(correct: Any, *, reference: int = -1, sample_weight: Any = None) -> NDArray[np.float64]:
    """L_e: the share of samples wrong at epoch e and right at the end.

    Parameters, errors and source are those of `forgetting_curves`.

    Returns
    -------
    (n_epochs,) float64

    Examples
    --------
    >>> learned_fraction([[1, 1, 0, 0], [1, 0, 1, 1]])
    array([0.5, 0. ])
    """
    return forgetting_curves(correct, reference=reference, sample_weight=sample_weight).learned


def forgetting_matrix(correct: Any, *, progress: bool = False) -> NDArray[np.int64]:
    """How many samples are right at epoch i and wrong at epoch j.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1
    progress : bool
        As `forgetting_curves`.

    Returns
    -------
    (n_epochs, n_epochs) int64
        Zero diagonal; the last column divided by n_samples is F_e, the last row L_e. Matrices of disjoint sample sets
        add.

    Raises
    ------
    TypeError, ValueError
        As `forgetting_curves`.

    Examples
    --------
    >>> forgetting_matrix([[1, 1, 0, 0], [1, 0, 1, 1]])
    array([[0, 1],
           [2, 0]])
    """
    m = Matrix(correct)
    overlap = np.zeros((m.n_epochs, m.n_epochs), np.int64)
    for part, rows in m.blocks(progress):
        n = part.stop - part.start
        m.kernels.overlap_counts(rows if m.bits else m.kernels.pack(rows, n), n, overlap)
    return np.asarray(np.diag(overlap)[:, None] - overlap)


@dataclass(frozen=True, eq=False)
class SampleStatistics:
    """What happened to each sample; all arrays are (n_samples,).

    Attributes
    ----------
    first_learned : float64
        First epoch at which the sample was right; nan when there is none.
    last_correct : float64
        Last epoch at which it was right; nan when there is none.
    forgetting_events : float64
        Changes from right to wrong between recorded epochs (Toneva et al. 2019); never-learned samples by the
        convention asked for.
    correctness : int64
        Number of epochs at which it was right.
    presentations_needed : int64
        Epochs until it was right for good: one past the last wrong epoch; n_epochs when it is wrong at the end.
    forgotten : bool
        Right at some epoch and wrong at the last one.
    """

    first_learned: NDArray[np.float64]
    last_correct: NDArray[np.float64]
    forgetting_events: NDArray[np.float64]
    correctness: NDArray[np.int64]
    presentations_needed: NDArray[np.int64]
    forgotten: NDArray[np.bool_]

    @classmethod
    def concatenate(cls, parts: Sequence[SampleStatistics]) -> SampleStatistics:
        """Join the statistics of disjoint samples over the same epochs (shards, blocks, machines), in the order given.

        Raises
        ------
        ValueError
            Nothing to join.
        """
        if not parts:
            raise ValueError("parts: expected at least one")
        return cls(**{name: np.concatenate([vars(p)[name] for p in parts]) for name in vars(parts[0])})


def sample_statistics(correct: Any, *, never_learned: str = "nan", progress: bool = False) -> SampleStatistics:
    """Per-sample learning and forgetting, in one pass.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1
    never_learned : {"nan", "toneva", "cartography", "datadiet", "deepcore"}
        The forgetting events of a sample that was never right: nan, n_epochs, 1000, infinity or 0, as those projects
        count.
    progress : bool
        As `forgetting_curves`.

    Returns
    -------
    SampleStatistics

    Raises
    ------
    TypeError, ValueError
        As `forgetting_curves`; an unknown convention.

    Examples
    --------
    >>> s = sample_statistics([[1, 0, 0], [0, 0, 1], [1, 0, 0]])
    >>> s.forgetting_events, s.forgotten
    (array([ 1., nan,  1.]), array([False, False,  True]))

    References
    ----------
    Toneva et al., "An Empirical Study of Example Forgetting", ICLR 2019; arXiv 2507.08686, Section III.
    """
    m = Matrix(correct)
    _check.choice(never_learned, NEVER_LEARNED, "never_learned")
    value = dict(zip(NEVER_LEARNED, (np.nan, m.n_epochs, 1000.0, np.inf, 0.0), strict=True))[never_learned]
    counts = [m.kernels.sample_counts(rows, part.stop - part.start) for part, rows in m.blocks(progress)]
    first, last, events, right, last_wrong = counts[0] if len(counts) == 1 else np.concatenate(counts, axis=1)
    never = first < 0
    return SampleStatistics(
        first_learned=np.where(never, np.nan, first),
        last_correct=np.where(never, np.nan, last),
        forgetting_events=np.where(never, value, events),
        correctness=right.astype(np.int64),
        presentations_needed=last_wrong.astype(np.int64) + 1,
        forgotten=~never & (last_wrong == m.n_epochs - 1),
    )
