"""Predictions that a run keeps on disk, in 16 bits, and the data set that they belong to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _check, _files
from ..runs.arrays import open_npy
from ..runs.folder import RunFolder
from . import data
from .samples import tensors_digest

FORMAT = "fmn_ref.predictions"
_BATCH = 256  # of a Dataset whose samples are hashed


def data_digest(source: Any) -> str | None:
    """Hash all inputs and labels of a data set; None where it holds objects of other kinds than numbers and texts.

    Parameters
    ----------
    source : (inputs, labels), torch Dataset or DataLoader
        Arrays are hashed as they are, others in one pass. Inputs that are drawn anew in each pass have another hash in
        each.
    """
    parts = data.as_tensors(source) if data.is_arrays(source) else data.Batches(source, _BATCH, torch.device("cpu"))
    digest = hashlib.sha256()
    try:
        for part in parts:
            digest.update(_described(part).encode(errors="surrogatepass"))
    except TypeError:
        return None
    return digest.hexdigest()[:32]


def _described(value: Any) -> str:
    """Text that differs where the values in a batch differ."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))))
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{tensors_digest([value])}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key!r}:{_described(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_described, value)) + "]"
    if isinstance(value, (str, bytes, int, float, complex, type(None))):
        return repr(value)
    raise TypeError(f"a {type(value).__name__} has no known content")


class KeptPredictions:
    """Probabilities of a run's epochs on one data set, stored as float16 and memory-mapped.

    Parameters
    ----------
    folder : RunFolder
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._about, self._labels = (
            folder,
            folder.predictions / "data.json",
            folder.predictions / "labels.npy",
        )

    @classmethod
    def matching(cls, folder: RunFolder, source: Any) -> KeptPredictions | None:
        """Those of a run, if it has some and they are of this data set."""
        kept = cls(folder)
        if not os.path.lexists(kept._about):
            return None
        return kept if _files.read_json(kept._about, FORMAT).get("data") == data_digest(source) else None

    def begin(self, digest: str, labels: NDArray[np.int64]) -> None:
        """Write which data the predictions are of, before the first of them; ValueError if there are some of others."""
        if os.path.lexists(self._about):
            if _files.read_json(self._about, FORMAT).get("data") != digest:
                raise ValueError(f"data: not the data whose predictions {self._folder.predictions} keeps")
        else:
            _files.make_folder(self._folder.predictions)
            _files.write_atomic(self._labels, lambda file: np.save(file, labels))
            _files.write_json(self._about, {"format": FORMAT, "version": 1, "data": digest})

    def write(self, epoch: int, probs: NDArray[np.float32]) -> None:
        """Store (n_samples, n_classes) probabilities of an epoch."""
        rounded = probs.astype(np.float16)
        _files.write_atomic(self._folder.prediction(epoch), lambda file: np.save(file, rounded))

    def read(self, epoch: int) -> NDArray[np.float32] | None:
        """Probabilities of an epoch, scaled to sum 1; None if they were not kept."""
        path = self._folder.prediction(epoch)
        if not os.path.lexists(path):
            return None
        with _files.naming(path, "kept predictions"):
            probs = open_npy(path).astype(np.float32)
            if probs.ndim != 2 or len(probs) != len(self.labels):
                raise ValueError(f"expected {len(self.labels)} rows, got shape {probs.shape}")
            return np.asarray(probs / probs.sum(1, keepdims=True))

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (n_samples,) of the data set."""
        with _files.naming(self._labels, "labels of kept predictions"):
            return _check.labels(np.array(open_npy(self._labels)))
