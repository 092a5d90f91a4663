"""The forget fraction F_e, the learned fraction L_e, and the curves and the matrix around them. NumPy only.

Scores on a labelled set T of n samples (arXiv 2507.08686, Section III): M_e is the part of T that is wrong at epoch e,
E is the final epoch or any other reference epoch.

    forget fraction   F_e = acc(e, M_E) |M_E| / n     right at e, wrong at the end
    learned fraction  L_e = acc(E, M_e) |M_e| / n     wrong at e, right at the end
    identity          acc(E) = acc(e) + L_e - F_e

`correct` is (n_epochs, n_samples) everywhere: bool or integers 0 and 1, in anything that NumPy can view (list, memmap,
torch tensor, DLPack), or a CorrectnessHistory, whose bits are read directly. Memory-mapped arrays and history files may
be larger than memory: they are read in blocks. Tensors on an accelerator are reduced there. Counts are exact integers,
the same on every backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..kernels import backend
from ..kernels.mixing import widened
from .groups import group_members, joined_groups
from .matrix import Matrix, adjacent


def correctness(predictions_or_scores: Any, labels: Any) -> NDArray[np.bool_]:
    """Tell for each sample whether it is classified correctly.

    Parameters
    ----------
    predictions_or_scores : (..., n_samples) integers or (..., n_samples, n_classes) floats
        Predicted classes, or scores (probabilities, logits) whose arg-max is the prediction. The first of equal scores
        is the arg-max.
    labels : (n_samples,) integers
        True classes, from 0.

    Returns
    -------
    (..., n_samples) bool

    Raises
    ------
    TypeError
        Strings, objects, masked values, or labels that are not integers.
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
    x, name = predictions_or_scores, "predictions_or_scores"
    a = _check.computable(x.detach()) if _check.on_device(x) else _check.array(x, name, bfloat16=True)
    if _check.kind(a) == "b":
        hint = "is it correctness already? Classes are integers"
        raise TypeError(f"{name}: expected class numbers or scores, got bool; {hint}")
    shape, kernels = tuple(a.shape), backend.kernels_for(a)
    if _check.kind(a) == "i":
        y = _check.labels(labels)
        if a.ndim < 1 or shape[-1] != len(y):
            hint = "; scores must be floating-point" if shape[-2:-1] == (len(y),) else ""
            raise ValueError(f"predictions: expected shape (..., {len(y)}) as labels, got shape {shape}{hint}")
        bits = kernels.pack_predictions(adjacent(a.reshape(-1, len(y))), y)
        return np.asarray(kernels.unpack(bits, len(y))).reshape(shape)
    y = _labels_of_scores(shape, labels)
    out = np.empty(shape[:-1], bool)
    for epoch in np.ndindex(shape[:-2]):
        row = kernels.pack_scores(adjacent(a[epoch]), y)
        if row is None:
            at = (*epoch, *_first_nan(a[epoch]))
            raise ValueError(f"scores: expected numbers, got NaN at index {at}")
        out[epoch] = kernels.unpack(row[None], len(y))[0]
    return out


def _labels_of_scores(shape: tuple[int, ...], labels: Any) -> NDArray[np.int64]:
    """The labels, if they fit scores of this shape."""
    expected = "scores: expected shape (..., n_samples, n_classes)"
    hint = "predicted classes must be integers (.astype(int), without NaN)"
    if len(shape) < 2 or shape[-1] == 0:
        hint = f"; {hint}; for one score a sample give classes, score > 0 as integers" if len(shape) == 1 else ""
        raise ValueError(f"{expected}, got shape {shape}{hint}")
    y = _check.labels(labels)
    if len(y) != shape[-2]:
        hint = f"; {hint}" if len(y) == shape[-1] else ""
        raise ValueError(f"{expected} with {len(y)} samples as labels, got shape {shape}{hint}")
    return _check.labels(y, n_classes=shape[-1], copy=False)


def _first_nan(scores: Any) -> tuple[int, ...]:
    """Index of the first NaN, in scores that have one."""
    a = widened(scores) if isinstance(scores, np.ndarray) else scores
    return tuple(int(i) for i in np.unravel_index(int(((a != a) * 1).reshape(-1).argmax()), tuple(a.shape)))


@dataclass(frozen=True, eq=False)
class ForgettingCurves:
    """Accuracy, forget, learned and retained fraction of every epoch, against one reference epoch.

    Fractions are (n_epochs,) float64. With groups they are (n_groups, n_epochs), and nan for an empty group.

    Attributes
    ----------
    counts : (4, [n_groups,] n_epochs)
        Right, forgotten, learned and retained samples (int64), or sums of their weights (float64).
    n_samples : int or (n_groups,) int64
        Number of samples.
    total : n_samples, or the sum of the weights
        Denominator of the fractions.
    reference : int
        Row of the reference epoch.
    groups : (n_groups,) or None
        The distinct group labels, sorted: the order of the leading axis.

    Notes
    -----
    Results for disjoint sets of samples can be added, ``a + b``: they are counts. The sum has the groups of both.
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
        with np.errstate(invalid="ignore"):  # 0 / 0 in an empty group
            return np.asarray(self.counts[row] / self.total[:, None])

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of samples that are right at e."""
        return self._fraction(0)

    @property
    def forget(self) -> NDArray[np.float64]:
        """F_e: share that is right at e and wrong at the reference."""
        return self._fraction(1)

    @property
    def learned(self) -> NDArray[np.float64]:
        """L_e: share that is wrong at e and right at the reference."""
        return self._fraction(2)

    @property
    def retained(self) -> NDArray[np.float64]:
        """Share that is right at e and at the reference."""
        return self._fraction(3)

    def chance_corrected(self, n_choices: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """F_e and L_e of multiple-choice questions, less what guessing explains.

        The model is: a question is known or guessed, each of k options with equal probability. Guessing then turns
        (1 - acc(e)) (1 - acc(E)) / (k - 1) of the questions from right to wrong, and as many from wrong to right.

        Parameters
        ----------
        n_choices : int, or (n_groups,) integers
            Options per question, k >= 2; 0 for open questions, which are not corrected. Questions with different
            numbers of options need curves by group: ``forgetting_curves(correct, groups=n_choices)``.

        Returns
        -------
        forget, learned : float64, shaped as the fractions
            Values below 0 become 0.

        Raises
        ------
        TypeError, ValueError
            Not integers; other than one number, or one per group; 1 or a negative number.

        Examples
        --------
        >>> curves = forgetting_curves([[1, 1, 0, 0], [1, 0, 1, 0]])
        >>> curves.chance_corrected(4)[0].round(4)
        array([0.1667, 0.    ])

        References
        ----------
        arXiv 2510.17776 (the formula as in its authors' code).
        """
        k = _check.array(n_choices, "n_choices")
        if k.dtype.kind not in "iu":
            raise TypeError(f"n_choices: expected integers, got dtype {k.dtype}")
        if k.shape not in ((), np.shape(self.n_samples)) or ((k < 2) & (k != 0)).any():
            expected = f"2 or more options (0: open), as one number or shape {np.shape(self.n_samples)}"
            raise ValueError(f"n_choices: expected {expected}, got {k.tolist()}")
        wrong = 1 - self.accuracy
        guessed = np.where(k > 0, 1 / np.maximum(k - 1.0, 1), 0)[..., None]
        chance = wrong * wrong[..., [self.reference]] * guessed
        return np.maximum(self.forget - chance, 0), np.maximum(self.learned - chance, 0)

    def __radd__(self, other: int) -> ForgettingCurves:
        """Add curves to 0, so that sum() works."""
        return self if other == 0 else NotImplemented

    def __add__(self, other: ForgettingCurves) -> ForgettingCurves:
        if not isinstance(other, ForgettingCurves):
            return NotImplemented
        if self.counts.shape[-1] != other.counts.shape[-1] or self.reference != other.reference:
            raise ValueError("ForgettingCurves: can only add curves of the same epochs and reference")
        if (self.groups is None) != (other.groups is None):
            raise ValueError("ForgettingCurves: can only add curves that both have groups, or both have none")
        if self.groups is None or other.groups is None:
            n_samples, total = self.n_samples + other.n_samples, self.total + other.total
            return ForgettingCurves(self.counts + other.counts, n_samples, total, self.reference)
        groups = joined_groups(self.groups, other.groups)
        of_self, of_other = np.searchsorted(groups, self.groups), np.searchsorted(groups, other.groups)

        def added(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
            out = np.zeros((*a.shape[:-1], len(groups)), np.result_type(a, b))
            out[..., of_self] = a
            out[..., of_other] += b
            return out

        counts = added(self.counts.swapaxes(1, 2), other.counts.swapaxes(1, 2)).swapaxes(1, 2)
        n_samples, total = added(self.n_samples, other.n_samples), added(self.total, other.total)
        return ForgettingCurves(np.ascontiguousarray(counts), n_samples, total, self.reference, groups)


def forgetting_curves(
    correct: Any, *, reference: int = -1, groups: Any = None, sample_weight: Any = None, progress: bool = False
) -> ForgettingCurves:
    """Accuracy, F_e, L_e and retained accuracy of every epoch in one pass.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1
    reference : int
        Row of the epoch that stands for "the end"; negative rows count from the last.
    groups : (n_samples,), optional
        A label per sample (class, cluster, annotator): integers, strings, or a column of either, also categorical.
        Default: no groups. Computes the curves inside each group.
    sample_weight : (n_samples,) float, optional
        Finite, >= 0. Default: 1 each. Fractions become shares of the total weight. Weights are summed in double in the
        order of the samples (on an accelerator in the device's order).
    progress : bool
        Default: False. Show a progress bar on stderr, if it is a terminal, while a file is read.

    Returns
    -------
    ForgettingCurves

    Raises
    ------
    TypeError, ValueError
        Floats, strings, masked values, wrong shapes, values other than 0 and 1, empty arrays, an epoch out of range;
        groups with gaps or of several types.

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
    n = m.n_samples
    if groups is None and sample_weight is None:
        counts = np.zeros((4, m.n_epochs), np.int64)
        for part, rows in m.blocks(progress):
            m.kernels.curve_counts(rows, part.stop - part.start, r, counts)
        return ForgettingCurves(counts, n, n, r)
    names, member = group_members(np.zeros(n, np.int64) if groups is None else groups, n)
    w = None if sample_weight is None else _check.weights(sample_weight, n)
    sums: NDArray[Any] = np.zeros((4, len(names), m.n_epochs), np.int64 if w is None else np.float64)
    for part, rows in m.blocks(progress):
        of_part = None if w is None else w[part]
        m.kernels.group_sums(rows, part.stop - part.start, r, member[part], len(names), of_part, sums)
    size, total = np.bincount(member), np.bincount(member, w)
    if groups is None:
        return ForgettingCurves(sums[:, 0], n, total[0], r)
    return ForgettingCurves(sums, size, total, r, names)


def forget_fraction(correct: Any, *, reference: int = -1, sample_weight: Any = None) -> NDArray[np.float64]:
    """F_e: the share of samples that are right at epoch e and wrong at the end.

    Parameters, errors and references as in `forgetting_curves`.

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
    """L_e: the share of samples that are wrong at epoch e and right at the end.

    Parameters, errors and references as in `forgetting_curves`.

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
    """Number of samples that are right at epoch i and wrong at epoch j.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool or 0 and 1
    progress : bool
        As in `forgetting_curves`.

    Returns
    -------
    (n_epochs, n_epochs) int64
        The diagonal is zero. The last column divided by n_samples is F_e, the last row L_e. Matrices of disjoint sets
        of samples can be added.

    Raises
    ------
    TypeError, ValueError
        As in `forgetting_curves`.

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
