"""Contract of the compiled kernels; `_reference.py` holds the same functions as a few lines of NumPy each."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]  # (n_epochs, n_samples) bool, or (n_epochs, ceil(n_samples / 8)) uint8 of bits, the least first
Bits = NDArray[np.uint8]
Int = NDArray[np.int64]
Float = NDArray[np.float64]

def curve_counts(rows: Rows, n_samples: int, reference: int, counts: Int) -> None: ...
def group_counts(rows: Rows, n_samples: int, reference: int, groups: Int, n_groups: int, counts: Int) -> None: ...
def group_sums(
    rows: Rows,
    n_samples: int,
    reference: int,
    groups: Int,
    n_groups: int,
    weights: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> None: ...
def sample_counts(rows: Rows, n_samples: int) -> NDArray[np.int32]: ...
def overlap_counts(rows: Rows, n_samples: int, counts: Int) -> None: ...
def pack(rows: NDArray[np.bool_], n_samples: int) -> Bits: ...
def unpack(rows: Bits, n_samples: int) -> NDArray[np.bool_]: ...
def pack_predictions(predictions: NDArray[Any], labels: Int) -> Bits: ...
def pack_scores(scores: NDArray[Any], labels: Int, bfloat16: bool = False) -> Bits | None: ...
def check_probabilities(scores: NDArray[Any], tolerance: float, bfloat16: bool = False) -> bool: ...
def mixture_right(
    current: NDArray[Any],
    epochs: list[NDArray[Any]],
    labels: Int,
    weights: Int | None,
    epsilon: Float,
    bfloat16: bool = False,
) -> Int: ...
def best_epsilons(
    current: NDArray[Any],
    epochs: list[NDArray[Any]],
    labels: Int,
    weights: Int | None,
    windows: Int,
    grid: Float,
    bfloat16: bool = False,
) -> tuple[Float, Int, Int]: ...

compiler: str

def instruction_set() -> str: ...
def threads() -> int: ...
