"""A correctness matrix in whatever form it comes, as the blocks of samples that the kernels take.

What lies in memory is one block. What is mapped from a file, or has to be converted first, comes in blocks of about
64 MB, and mapped pages are given back after each: so a matrix larger than memory is read once, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _backend, _check, _files

_BLOCK_BYTES = 1 << 26
_LEAST_SAMPLES = 1 << 14  # of a block, however many epochs: reads from a disk stay long enough


class Matrix:
    """(n_epochs, n_samples) correctness; `blocks` gives its rows as `_reference` describes them."""

    def __init__(self, correct: Any, name: str = "correct") -> None:
        self.name = name
        self.bits = hasattr(correct, "packed") and hasattr(correct, "n_samples")  # a history
        self.source: Any
        if self.bits:
            self.source, self.n_samples = correct.packed, int(correct.n_samples)
            self.n_epochs = len(self.source)
        else:
            self.source = _check.matrix(correct, name)
            self.n_epochs, self.n_samples = self.source.shape
        if not self.n_epochs or not self.n_samples:
            shape = (self.n_epochs, self.n_samples)
            raise ValueError(f"{name}: expected at least one epoch and one sample, got shape {shape}")
        self.kernels: ModuleType = _backend.kernels_for(self.source)

    def blocks(self, progress: bool = False) -> Iterator[tuple[slice, Any]]:
        """(samples, rows) pairs that make up the matrix."""
        a = self.source
        if not isinstance(a, np.ndarray):
            yield slice(0, self.n_samples), _check.zeros_and_ones(a, self.name)
            return
        mapping = _files.mapping(a)
        if mapping is None and (self.bits or a.dtype == np.bool_):
            yield slice(0, self.n_samples), _adjacent(a)
            return
        step = self._block_samples()
        with _bar(self.n_samples, progress and step < self.n_samples) as bar:
            for start in range(0, self.n_samples, step):
                part, rows = self._rows(start, step)
                if mapping is not None:
                    _files.read_ahead(mapping, self._rows(part.stop, step)[1])
                yield part, _adjacent(rows if self.bits else _check.zeros_and_ones(rows, self.name))
                if mapping is not None:
                    _files.drop_pages(mapping)
                bar.update(part.stop - start)

    def _rows(self, start: int, step: int) -> tuple[slice, NDArray[Any]]:
        stop = min(start + step, self.n_samples)
        at = slice(start // 8, -(-stop // 8)) if self.bits else slice(start, stop)
        return slice(start, stop), self.source[:, at]

    def _block_samples(self) -> int:
        cells: int = _BLOCK_BYTES // self.source.itemsize
        if self.bits and self.kernels.__name__.endswith("_kernels"):
            cells *= 8  # the others unpack a block
        return max(_LEAST_SAMPLES, cells // self.n_epochs // 512 * 512)


def _adjacent(rows: NDArray[Any]) -> NDArray[Any]:
    return rows if rows.shape[1] <= 1 or rows.strides[1] == rows.itemsize else np.ascontiguousarray(rows)


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="reading", unit=" samples", unit_scale=True, disable=None if progress else True)
