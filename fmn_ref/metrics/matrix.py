"""A correctness matrix in whatever form it comes, as the blocks of samples that the kernels take.

What lies in memory is one block. What is mapped from a file, has to be converted first, or lives on an accelerator
(where kernels need room beside it) comes in blocks of about 64 MB, and mapped pages are given back after each: so a
matrix larger than memory is read once, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from .. import _check, _files
from ..kernels import backend

_BLOCK_BYTES = 1 << 26
_LEAST_SAMPLES = 1 << 14  # of a block, however many epochs: reads from a disk stay long enough


class Matrix:
    """(n_epochs, n_samples) correctness; `blocks` gives its rows as `_reference` describes them."""

    def __init__(self, correct: Any) -> None:
        self.bits = hasattr(correct, "packed") and hasattr(correct, "n_samples")  # a history
        self.source: Any  # an array, or a tensor that lives on an accelerator
        if self.bits:
            self.source, self.n_samples = correct.packed, int(correct.n_samples)
            self.n_epochs = len(self.source)
        else:
            self.source = _check.matrix(correct)
            self.n_epochs, self.n_samples = self.source.shape
        if not self.n_epochs or not self.n_samples:
            shape = (self.n_epochs, self.n_samples)
            raise ValueError(f"correct: expected at least one epoch and one sample, got shape {shape}")
        self.kernels: ModuleType = backend.kernels_for(self.source)

    def blocks(self, progress: bool = False) -> Iterator[tuple[slice, Any]]:
        """(samples, rows) pairs that make up the matrix."""
        mapping, step = _files.mapping(self.source), self._block_samples()
        in_memory = mapping is None and isinstance(self.source, np.ndarray)
        if self.n_samples <= step or (in_memory and (self.bits or self.source.dtype == np.bool_)):
            yield slice(0, self.n_samples), self._checked(self.source)
            _files.drop_pages(mapping)
            return
        with _bar(self.n_samples, progress) as bar, _files.own_read_ahead(mapping) as will_need:
            will_need(self._rows(0, step)[1])
            for start in range(0, self.n_samples, step):
                part, rows = self._rows(start, step)
                will_need(self._rows(part.stop, step)[1])
                yield part, self._checked(rows)
                _files.drop_pages(mapping)
                bar.update(part.stop - start)

    def _checked(self, rows: Any) -> Any:
        if not self.bits:
            rows = _check.zeros_and_ones(rows, "correct")
        if not isinstance(rows, np.ndarray) or rows.shape[1] <= 1 or rows.strides[1] == rows.itemsize:
            return rows
        return np.ascontiguousarray(rows)

    def _rows(self, start: int, step: int) -> tuple[slice, Any]:
        stop = min(start + step, self.n_samples)
        at = slice(start // 8, -(-stop // 8)) if self.bits else slice(start, stop)
        return slice(start, stop), self.source[:, at]

    def _block_samples(self) -> int:
        cells: int = _BLOCK_BYTES // self.source.dtype.itemsize
        if self.bits and self.kernels.__name__.endswith("_kernels"):
            cells *= 8  # the others unpack a block
        return max(_LEAST_SAMPLES, cells // self.n_epochs // 512 * 512)


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="reading", unit=" samples", unit_scale=True, disable=None if progress else True)
