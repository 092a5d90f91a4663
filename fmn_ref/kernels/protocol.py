"""The interface of the kernels. Every backend is a module with these functions; `backend.py` picks one.

`rows` holds the correctness of all epochs for `n_samples` samples, in one of two forms:

- bool, (n_epochs, n_samples), samples adjacent; any stride between rows;
- bits, (n_epochs, ceil(n_samples / 8)) uint8, the least significant bit first.

Counting kernels add to their last argument. A caller can therefore pass a large matrix in blocks of samples. The rows
of a four-row result are right, forgotten, learned and retained against the reference epoch (arXiv 2507.08686, Section
III): F_e is forgotten / n_samples, L_e is learned / n_samples.

To add a kernel: write it here, in `reference.py` (NumPy, obviously right), `numba.py`, `torch.py`, and in
`csrc/include/fmn/fmn.h`, `csrc/src/` and `csrc/bindings/module.cpp`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .._check import Array, Bool, Float, Int

Bits = NDArray[np.uint8]
Seen = NDArray[np.uint16]
Rows = Any  # an array of bool or of bits; a tensor on an accelerator


class Kernels(Protocol):
    """Functions of a backend. All backends return the same bits."""

    reads_bits: bool
    """True if the kernels count packed bits as they are. Others unpack a block first, to 8 times its size."""

    def instruction_set(self) -> str:
        """Name of the instruction set, or of the library that chooses it."""

    def threads(self) -> int:
        """Most threads of one call."""

    def curve_counts(self, rows: Rows, n_samples: int, reference: int, counts: Int) -> None:
        """Add right, forgotten, learned and retained samples to `counts` (4, n_epochs)."""

    def group_sums(
        self, rows: Rows, n_samples: int, reference: int, groups: Int, n_groups: int, weights: Float | None, sums: Array
    ) -> None:
        """Add the weights of the same samples, by group, to `sums` (4, n_groups, n_epochs).

        `groups` (n_samples,) numbers from 0. `weights` (n_samples,) are added to float64 sums in the order of the
        samples; None adds 1 each to int64 sums.
        """

    def sample_counts(self, rows: Rows, n_samples: int) -> NDArray[np.int32]:
        """Five values per sample, (5, n_samples): first and last epoch right, number of right-to-wrong changes, number
        of epochs right, last epoch wrong; -1 if there is no such epoch."""

    def overlap_counts(self, rows: Rows, n_samples: int, counts: Int) -> None:
        """Add to `counts` (n_epochs, n_epochs) the samples that are right at both epochs."""

    def pack(self, rows: Rows, n_samples: int) -> Any:
        """Bits of bool rows, with zeros past the last sample."""

    def unpack(self, rows: Rows, n_samples: int) -> Bool:
        """(n_epochs, n_samples) bool."""

    def pack_predictions(self, predictions: Any, labels: Int) -> Bits:
        """Bits (n_epochs, ceil(n_samples / 8)): whether predictions (n_epochs, n_samples) equal the labels."""

    def pack_scores(self, scores: Any, labels: Int) -> Bits | None:
        """Bits (ceil(n_samples / 8),): whether the arg-max of scores (n_samples, n_classes) is the label.

        The first of equal scores is the arg-max. None if a score is NaN.
        """

    def check_probabilities(self, scores: Array, tolerance: float) -> bool:
        """Tell whether each row of (n_samples, n_classes) is finite, not negative, and sums to 1 within `tolerance`."""

    def mixture_right(
        self, current: Array, epochs: list[Array], labels: Int, weights: Int | None, epsilon: Float
    ) -> Int:
        """Weight of the samples that eps * mean(epochs) + (1 - eps) * current classifies correctly, per epsilon.

        `current` and each of `epochs` are (n_samples, n_classes) probabilities. All epochs have one dtype.
        `weights` (n_samples,) or None for 1 each. Returns (n_epsilons,).
        """

    def best_epsilons(
        self,
        current: Array,
        epochs: list[Array],
        labels: Int,
        weights: Int | None,
        windows: Int,
        grid: Float,
        seen: Seen | None = None,
        exact: bool = True,
    ) -> tuple[Float, Int, Int]:
        """The best epsilon in [0, 1] for each window, the weight that is right there, and a bound for the grid.

        `windows` (n_windows, 2) holds the first and the last epoch of each window; its mean is mixed into `current`.
        The best epsilon is the middle of the first stretch of [0, 1] in which the most weight is right and which is
        longer than 1e-12; the middle of the first stretch if none is longer. The third result bounds from above the
        weight that is right at any point of `grid`; 0 for an empty grid.

        `seen` (n_windows, n_samples), zeros at first, saves time in calls that differ in `current` and `weights` only,
        with an empty grid. Unless `exact`, a backend may give an upper bound of the weight, and any epsilon.
        """
