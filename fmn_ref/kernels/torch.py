"""The kernels on torch tensors: correctness on an accelerator is reduced there, and only counts leave it.

`backend.py` sends tensors on an accelerator here. FMN_BACKEND=torch sends everything here, NumPy arrays included, so
that the tests run it without an accelerator. `protocol.py` says what each function computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._check import BFLOAT16, Array, Bool, Float, Int
from . import reference
from .protocol import Bits
from .reference import best_epsilons, check_probabilities, four_outcomes, mixture_right  # noqa: F401

reads_bits = False
_STEP = 1 << 18  # samples per block of float32 correctness; below 2^24, so that sums of 0 and 1 are exact


def instruction_set() -> str:
    return "torch"


def threads() -> int:
    return torch.get_num_threads()


def _tensor_of(rows: Any, n_samples: int) -> Tensor:
    """(n_epochs, n_samples) bool tensor, on the device of `rows`."""
    if not isinstance(rows, Tensor):
        rows = torch.from_numpy(np.array(rows))  # a copy: the array may be read-only or run backwards
    if rows.dtype == torch.bool:
        values: Tensor = rows.view(torch.uint8)  # another library's bytes may not be 0 and 1
    else:
        bits = rows[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1
        values = bits.flatten(1)[:, :n_samples]
    return values.ne(0)


def curve_counts(rows: Any, n_samples: int, reference: int, counts: Int) -> None:
    correct = _tensor_of(rows, n_samples)
    right, retained = correct.sum(1), (correct & correct[reference]).sum(1)
    counts += torch.stack([right, right - retained, right[reference] - retained, retained]).cpu().numpy()


def group_sums(
    rows: Any, n_samples: int, reference: int, groups: Int, n_groups: int, weights: Float | None, sums: Array
) -> None:
    """Add in double but in the device's order: integer weights are exact, others agree up to rounding."""
    correct = _tensor_of(rows, n_samples)
    if weights is not None and correct.device.type == "mps":  # MPS has no doubles
        correct = correct.cpu()
    one_each = np.ones(n_samples, np.int64)
    g, w = (torch.from_numpy(a.copy()).to(correct.device) for a in (groups, one_each if weights is None else weights))
    added = torch.zeros((4, len(correct), n_groups), dtype=w.dtype, device=correct.device)
    for row, c in enumerate(four_outcomes(correct, reference)):
        for e in range(len(c)):
            added[row, e].index_add_(0, g, w * c[e])
    sums += added.transpose(1, 2).cpu().numpy()


def sample_counts(rows: Any, n_samples: int) -> NDArray[np.int32]:
    correct = _tensor_of(rows, n_samples)
    n = len(correct)
    epoch = torch.arange(n, dtype=torch.int32, device=correct.device)[:, None]
    first = torch.where(correct, epoch, n).amin(0)
    last, last_wrong = (torch.where(c, epoch, -1).amax(0) for c in (correct, ~correct))
    events = (correct[:-1] & ~correct[1:]).sum(0, dtype=torch.int32)
    right = correct.sum(0, dtype=torch.int32)
    return torch.stack([torch.where(first == n, -1, first), last, events, right, last_wrong]).cpu().numpy()


def overlap_counts(rows: Any, n_samples: int, counts: Int) -> None:
    correct = _tensor_of(rows, n_samples)
    for start in range(0, n_samples, _STEP):
        c = correct[:, start : start + _STEP].float()
        with torch.autocast(c.device.type, enabled=False):  # its 16 bits would round the counts
            counts += (c @ c.T).long().cpu().numpy()


def pack(rows: Any, n_samples: int) -> Any:
    """Bits of an array. A tensor stays: matrix products need no bits."""
    return rows if isinstance(rows, Tensor) else reference.pack(rows, n_samples)


def unpack(rows: Any, n_samples: int) -> Bool:
    return _tensor_of(rows, n_samples).cpu().numpy()


def _bits_of(correct: Tensor) -> Bits:
    return np.packbits(correct.cpu().numpy(), axis=-1, bitorder="little")


def pack_predictions(predictions: Any, labels: Int) -> Bits:
    if isinstance(predictions, Tensor):
        p = predictions
    else:  # torch has only the 8-bit unsigned type; a value above int64 equals no label
        p = torch.from_numpy(np.where(predictions <= np.iinfo(np.int64).max, predictions, -1).astype(np.int64))
    return _bits_of(p == torch.from_numpy(labels).to(p.device))


def pack_scores(scores: Any, labels: Int) -> Bits | None:
    if isinstance(scores, Tensor):
        s = scores
    elif scores.dtype == BFLOAT16:
        s = torch.from_numpy(np.array(scores).view(np.int16)).view(torch.bfloat16)
    else:
        s = torch.from_numpy(np.array(scores))
    y = torch.from_numpy(labels).to(s.device)[:, None]
    at_label = s.gather(1, y)
    before = torch.arange(s.shape[1], device=s.device) < y
    if bool(s.isnan().any()):
        return None
    return _bits_of(~((s > at_label) | ((s == at_label) & before)).any(1))
