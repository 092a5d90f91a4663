"""The kernels of `_reference.py` on torch tensors: correctness on an accelerator is reduced there, counts leave it.

Not chosen by itself: tensors that are not on the CPU come here, and FMN_BACKEND=torch sends everything here (NumPy
arrays too, which is how the tests run it without an accelerator).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .reference import best_epsilons as best_epsilons  # mixtures are computed on the host
from .reference import check_probabilities as check_probabilities
from .reference import mixture_right as mixture_right

Int = NDArray[np.int64]
Float = NDArray[np.float64]
_STEP = 1 << 18  # samples whose correctness is held as float32 at once; below 2^24, so that sums of 0 and 1 are exact


def _correct(rows: Any, n_samples: int) -> Tensor:
    """(n_epochs, n_samples) bool, on its device."""
    if not isinstance(rows, Tensor):
        rows = torch.from_numpy(np.array(rows))  # a copy: the array may be read-only or run backwards
    if rows.dtype == torch.bool:
        values: Tensor = rows.view(torch.uint8)  # another library's bytes may not be 0 and 1
    else:
        bits = rows[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1
        values = bits.flatten(1)[:, :n_samples]
    return values.ne(0)


def _four(correct: Tensor, reference: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    at_end = correct[reference]
    return correct, correct & ~at_end, ~correct & at_end, correct & at_end


def curve_counts(rows: Any, n_samples: int, reference: int, counts: Int) -> None:
    counts += torch.stack([c.sum(1) for c in _four(_correct(rows, n_samples), reference)]).cpu().numpy()


def group_counts(rows: Any, n_samples: int, reference: int, groups: Int, n_groups: int, counts: Int) -> None:
    _add_by_group(_correct(rows, n_samples), reference, groups, np.ones(n_samples, np.int64), counts)


def group_sums(
    rows: Any, n_samples: int, reference: int, groups: Int, n_groups: int, weights: Float, sums: Float
) -> None:
    """In double, but in the device's own order: whole numbers are exact, others agree to rounding."""
    correct = _correct(rows, n_samples)
    if correct.device.type == "mps":  # it has no doubles
        correct = correct.cpu()
    _add_by_group(correct, reference, groups, weights, sums)


def _add_by_group(correct: Tensor, reference: int, groups: Int, weights: NDArray[Any], sums: NDArray[Any]) -> None:
    g, w = (torch.from_numpy(a.copy()).to(correct.device) for a in (groups, weights))
    added = torch.zeros((4, len(correct), sums.shape[1]), dtype=w.dtype, device=correct.device)
    for row, c in enumerate(_four(correct, reference)):
        for e in range(len(c)):
            added[row, e].index_add_(0, g, w * c[e])
    sums += added.transpose(1, 2).cpu().numpy()


def sample_counts(rows: Any, n_samples: int) -> NDArray[np.int32]:
    correct = _correct(rows, n_samples)
    n = len(correct)
    epoch = torch.arange(n, dtype=torch.int32, device=correct.device)[:, None]
    first = torch.where(correct, epoch, n).amin(0)
    last, last_wrong = (torch.where(c, epoch, -1).amax(0) for c in (correct, ~correct))
    events = (correct[:-1] & ~correct[1:]).sum(0, dtype=torch.int32)
    right = correct.sum(0, dtype=torch.int32)
    return torch.stack([torch.where(first == n, -1, first), last, events, right, last_wrong]).cpu().numpy()


def overlap_counts(rows: Any, n_samples: int, counts: Int) -> None:
    correct = _correct(rows, n_samples)
    for start in range(0, n_samples, _STEP):
        c = correct[:, start : start + _STEP].float()
        with torch.autocast(c.device.type, enabled=False):  # whose 16 bits would round the counts
            counts += (c @ c.T).long().cpu().numpy()


def pack(rows: Any, n_samples: int) -> Any:
    """As it is: products of matrices need no bits."""
    return rows


def unpack(rows: Any, n_samples: int) -> NDArray[np.bool_]:
    return _correct(rows, n_samples).cpu().numpy()


def threads() -> int:
    return torch.get_num_threads()


def _pack(correct: Tensor) -> NDArray[np.uint8]:
    return np.packbits(correct.cpu().numpy(), axis=-1, bitorder="little")


def pack_predictions(predictions: Any, labels: Int) -> NDArray[np.uint8]:
    if isinstance(predictions, Tensor):
        p = predictions
    else:  # of the unsigned, torch has the 8-bit one alone; what is no int64 equals no label
        p = torch.from_numpy(np.where(predictions <= np.iinfo(np.int64).max, predictions, -1).astype(np.int64))
    return _pack(p == torch.from_numpy(labels).to(p.device))


def pack_scores(scores: Any, labels: Int, bfloat16: bool = False) -> NDArray[np.uint8] | None:
    s = scores if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores))
    if bfloat16 and s.dtype != torch.bfloat16:
        s = s.view(torch.bfloat16)
    y = torch.from_numpy(labels).to(s.device)[:, None]
    at_label = s.gather(1, y)
    before = torch.arange(s.shape[1], device=s.device) < y
    if bool(s.isnan().any()):
        return None
    return _pack(~((s > at_label) | ((s == at_label) & before)).any(1))
