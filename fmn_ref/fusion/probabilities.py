"""Reads the probabilities of every epoch, one epoch at a time, and checks them as they are read. NumPy only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import _check
from .._check import Array, Bool, Float, Int
from ..kernels.backend import kernels
from ..kernels.mixing import mean, widened
from ..kernels.threads import in_order, n_threads_for
from ..metrics.curves import correctness
from ..runs.arrays import MOST_MAPPED

_LARGE = 1 << 17  # probabilities of an epoch, whose arg-maxima take 0.1 ms: threads pay


class ProbabilityReader:
    """Probabilities of all epochs; ``reader[epoch]`` is (n_samples, n_classes) float64.

    Parameters
    ----------
    probs : (n_epochs, n_samples, n_classes) array, or a sequence of (n_samples, n_classes) arrays
        A sequence may compute an epoch when it is read.
    name : str
        Name of the argument in error messages.

    Attributes
    ----------
    in_memory : bool
        Whether `probs` is an array, a list, a tuple or files: then reading an epoch is cheap.
    epochs : tuple of int
        Recorded epoch or step of each row, if `probs` knows them.
    file_of : callable(row) or None
        Returns the checkpoint of a row, if `probs` knows them.
    """

    def __init__(self, probs: Any, name: str = "probs") -> None:
        if isinstance(probs, Mapping) or not (hasattr(probs, "__getitem__") and hasattr(probs, "__len__")):
            raise TypeError(f"{name}: expected an array or a sequence of arrays, got {type(probs).__name__}")
        shape = getattr(probs, "shape", None)
        if (shape is not None and len(shape) != 3) or len(probs) == 0:
            got = "none" if shape is None else f"shape {tuple(shape)}"
            raise ValueError(
                f"{name}: expected shape (n_epochs, n_samples, n_classes) with at least one epoch, got {got}"
            )
        self._probs, self._name = probs, name
        self._shape: tuple[int, int] | None = None
        self.in_memory = shape is not None or isinstance(probs, (list, tuple)) or hasattr(probs, "paths")
        epochs = getattr(probs, "epochs", ())
        self.epochs: tuple[int, ...] = epochs if isinstance(epochs, tuple) else ()
        self.file_of = getattr(probs, "file_of", None)
        self._checked: set[int] = set()
        self._views: dict[int, Array] = {}
        self._few = not hasattr(probs, "paths") or len(probs) <= MOST_MAPPED

    @classmethod
    def of(cls, probs: Any, name: str = "probs") -> ProbabilityReader:
        """The reader itself, or a reader of anything else."""
        return probs if isinstance(probs, cls) else cls(probs, name)

    def __len__(self) -> int:
        return len(self._probs)

    def __getitem__(self, epoch: int) -> Float:
        return widened(self.stored(epoch))

    def stored(self, epoch: int) -> Array:
        """The probabilities of one epoch in the type in which they are stored."""
        epoch = _check.index(epoch, len(self), "epoch")
        if epoch in self._views:
            return self._views[epoch]
        given = self._probs[epoch]
        name = f"{self._name}[{epoch}]{_check.of_file(given)}"
        p = stored_probabilities(given, self._shape, name, checked=epoch in self._checked)
        self._shape = (p.shape[0], p.shape[1])
        if self.in_memory:  # not computed anew
            self._checked.add(epoch)
            if self._few and not p.flags.owndata:  # a view: keeping it needs no memory
                self._views[epoch] = p
        return p

    def correctness(self, labels: Int) -> Bool:
        """(n_epochs, n_samples): whether the arg-max of each epoch is the label."""
        large = isinstance(self._probs, np.ndarray) and self._probs[0].size >= _LARGE  # one thread reads sequences
        n_threads = n_threads_for(self._probs.size, len(self)) if large else 1
        return np.stack(in_order(lambda epoch, _: correctness(self.stored(epoch), labels), len(self), n_threads))

    def alike(self, epochs: Iterable[int]) -> list[Array]:
        """The probabilities of several epochs in one type: as stored, or float64 if their types differ."""
        found = [self.stored(e) for e in epochs]
        return found if len({p.dtype for p in found}) == 1 else [widened(p) for p in found]

    def mean(self, epochs: Sequence[int]) -> Float:
        """Mean probabilities of several epochs."""
        return mean(self.alike(epochs))


def samples_digest(probs: Float) -> str:
    """Digest of the rows of (n_samples, n_classes) probabilities, in any order and rounded to 32 bits."""
    factors = np.frombuffer(hashlib.shake_256(b"classes").digest(8 * probs.shape[1]), "<u8").astype(np.uint64)
    bits = np.ascontiguousarray(probs, np.float32).view(np.uint32).astype(np.uint64)
    rows = bits @ factors  # modulo 2^64, exact
    return hashlib.sha256(np.sort(rows).astype("<u8").tobytes()).hexdigest()


def stored_probabilities(
    x: Any, shape: tuple[int, int] | None = None, name: str = "probs", *, checked: bool = False
) -> Array:
    """Probabilities of 16 to 64 bits, (n_samples, n_classes), contiguous; the checks are `_check.probabilities`'s.

    `shape` is the expected shape, or None for any. Values that were `checked` before are not looked at again.
    """
    a = _check.array(x, name, bfloat16=True)
    if a.dtype.kind == "f" and a.dtype.itemsize > 8:
        a = a.astype(np.float64)
    valid = _check.kind(a) == "f" and a.ndim == 2 and 0 not in a.shape and shape in (None, a.shape)
    if valid:
        a = np.ascontiguousarray(a.astype(a.dtype.newbyteorder("="), copy=False))
        valid = checked or kernels().check_probabilities(a, _check.TOLERANCE)
    if not valid:
        _check.probabilities(x, shape, name)  # raises the error that says why
    return a
