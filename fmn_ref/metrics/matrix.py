"""Reads a correctness matrix of any form in blocks of samples, as the kernels take them.

A matrix in memory is one block. Three kinds come in blocks of about 64 MB: memory-mapped ones, those that must be
converted first, and tensors on an accelerator, where the kernels need memory of their own. Mapped pages are released
after each block, so that a matrix larger than memory is read once in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import _check, _files, _stderr
from ..kernels.backend import kernels_for

_BLOCK_BYTES = 1 << 26
_LEAST_SAMPLES = 1 << 14  # of a block, for any number of epochs: short reads from a disk are slow


class Matrix:
    """(n_epochs, n_samples) correctness; `blocks` yields rows in the form that `kernels/protocol.py` describes."""

    def __init__(self, correct: Any) -> None:
        self.bits = hasattr(correct, "packed") and hasattr(correct, "n_samples")  # a history
        # an array, or a tensor on an accelerator
        self.source: Any = correct.packed if self.bits else _check.correct_matrix(correct)
        shape = len(self.source), int(correct.n_samples if self.bits else self.source.shape[1])
        if 0 in shape:
            raise ValueError(f"correct: expected at least one epoch and one sample, got shape {shape}")
        self.n_epochs, self.n_samples = shape
        self.kernels = kernels_for(self.source)

    def blocks(self, progress: bool = False) -> Iterator[tuple[slice, Any]]:
        """Yield (samples, rows) pairs that make up the matrix."""
        mapping, step = _files.mapping(self.source), self._block_samples()
        in_memory = mapping is None and isinstance(self.source, np.ndarray)
        if self.n_samples <= step or (in_memory and (self.bits or self.source.dtype == np.bool_)):
            yield slice(0, self.n_samples), self._checked(self.source)
            _files.drop_pages(mapping)
            return
        options: dict[str, Any] = {"progress": None if progress else False, "unit": " samples", "unit_scale": True}
        bar = _stderr.progress_bar(None, "reading", self.n_samples, **options)
        with bar, _files.own_read_ahead(mapping) as will_need:
            will_need(self._rows(0, step)[1])
            for start in range(0, self.n_samples, step):
                part, rows = self._rows(start, step)
                will_need(self._rows(part.stop, step)[1])
                yield part, self._checked(rows)
                _files.drop_pages(mapping)
                bar.update(part.stop - start)

    def _checked(self, rows: Any) -> Any:
        return adjacent(rows if self.bits else _check.zeros_and_ones(rows, "correct"))

    def _rows(self, start: int, step: int) -> tuple[slice, Any]:
        stop = min(start + step, self.n_samples)
        at = slice(start // 8, -(-stop // 8)) if self.bits else slice(start, stop)
        return slice(start, stop), self.source[:, at]

    def _block_samples(self) -> int:
        cells: int = _BLOCK_BYTES // self.source.dtype.itemsize
        if self.bits and self.kernels.reads_bits:
            cells *= 8  # other kernels unpack a block
        return max(_LEAST_SAMPLES, cells // self.n_epochs // 512 * 512)


def adjacent(a: Any) -> Any:
    """The same array with native bytes and adjacent values along the last axis; tensors unchanged."""
    if not isinstance(a, np.ndarray):
        return a
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    return a if a.strides[-1] == a.itemsize else np.ascontiguousarray(a)
