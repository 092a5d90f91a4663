"""FusionPlan: which epochs, with which weights; and how probabilities of epochs are read and mixed. NumPy only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files
from ..kernels import reference

Float = NDArray[np.float64]
METHODS = ("forget", "greedy", "bagged", "likelihood", "coverage", "equal", "last", "top", "auto", "weights")


@dataclass(frozen=True)
class FusionPlan:
    """The outcome of a fusion: which epochs, with which epsilon, in which order; and how sure that is.

    Attributes
    ----------
    members : tuple of (epoch, eps)
        In order; fused <- eps * mean of the window around epoch + (1 - eps) * fused, starting from the last epoch.
        Epochs are row numbers of the probabilities, from 0. Empty when the final model alone is best.
    n_epochs : int
    window : int
        A member is the mean over epochs A - window .. A + window, clipped to the range.
    accuracy : tuple of float
        Accuracy on the selection set: of the final model, then after each member.
    method, search : str
        "auto" leaves the name of the method that it chose.
    labels_sha256 : str
        Digest of the selection labels, to notice scoring on the samples that chose the plan.
    cv_accuracy : float, optional
        Accuracy on samples that the choice did not see, by cross-validation inside the selection set.
    gain_interval : (float, float), optional
        95 % bootstrap interval of `cv_accuracy` minus the final model's accuracy on the same samples.
    """

    members: tuple[tuple[int, float], ...]
    n_epochs: int
    window: int
    accuracy: tuple[float, ...]
    method: str = "forget"
    search: str = "grid"
    labels_sha256: str = ""
    cv_accuracy: float | None = field(default=None, compare=False)
    gain_interval: tuple[float, float] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        n_epochs = _check.number(self.n_epochs, 1, 2**31, "n_epochs", int)
        _check.number(self.window, 0, 2**31, "window", int)
        for epoch, eps in self.members:
            _check.number(epoch, 0, n_epochs - 1, "epoch", int)
            _check.number(eps, 0, 1, "eps")
        for value in (*self.accuracy, *([] if self.cv_accuracy is None else [self.cv_accuracy])):
            _check.number(value, 0, 1, "accuracy")
        if len(self.accuracy) != len(self.members) + 1:
            raise ValueError("accuracy: expected one more value than members")
        if self.gain_interval is not None:
            low, high = self.gain_interval
            _check.number(high, _check.number(low, -1, 1, "gain_interval"), 1, "gain_interval")
        _check.choice(self.method, METHODS, "method")
        _check.choice(self.search, ("grid", "exact"), "search")

    @classmethod
    def from_weights(cls, weights: dict[int, float], n_epochs: int) -> FusionPlan:
        """The plan of any convex combination of epochs; its selection accuracy is not known and given as 0.

        Parameters
        ----------
        weights : {epoch: weight}
            Not negative; scaled to sum 1.
        n_epochs : int

        Raises
        ------
        TypeError, ValueError
            Weights that are none, epochs out of range.

        Examples
        --------
        >>> FusionPlan.from_weights({0: 1, 2: 3}, 4).weights
        {0: 0.25, 2: 0.75}
        """
        if not isinstance(weights, dict):
            raise TypeError(f"weights: expected {{epoch: weight}}, got {type(weights).__name__}")
        members = members_of(weights, n_epochs)
        return cls(members, n_epochs, 0, (0.0,) * (len(members) + 1), "weights")

    @property
    def final_model_alone(self) -> bool:
        """True when no member helped: the fused model is the final one."""
        return not self.members

    @property
    def forward_passes(self) -> int:
        """Checkpoints that one prediction runs."""
        return len(self.weights)

    @property
    def weights(self) -> dict[int, float]:
        """{epoch: weight}, windows spread out, sum 1, zeros left out: the fused prediction is sum_e weight_e * p_e."""
        w = np.zeros(self.n_epochs)
        w[-1] = 1
        for epoch, eps in self.members:
            w *= 1 - eps
            chosen = window_epochs(epoch, self.window, self.n_epochs)
            w[chosen] += eps / len(chosen)
        return {int(e): float(w[e]) for e in np.flatnonzero(w)}

    def apply(self, probs: Any) -> Float:
        """Replay the plan on other samples.

        Parameters
        ----------
        probs : (n_epochs, n_samples, n_classes) array, or a sequence of (n_samples, n_classes) arrays
            Only the epochs of the plan are read.

        Returns
        -------
        (n_samples, n_classes) float64
            Fused probabilities; on the selection set their accuracy is exactly `accuracy[-1]`.

        Raises
        ------
        TypeError, ValueError
            Another number of epochs, or probabilities that are none.
        """
        epochs = Epochs.of(probs)
        if len(epochs) != self.n_epochs:
            raise ValueError(f"probs: expected {self.n_epochs} epochs as in the plan, got {len(epochs)}")
        fused = epochs[self.n_epochs - 1]
        for epoch, eps in self.members:
            fused = mix(fused, window_mean(epochs, epoch, self.window), eps)
        return fused

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON (docs/formats.md)."""
        _files.write_json(
            path,
            {
                "format": "fmn_ref.plan",
                "version": 1,
                "method": self.method,
                "search": self.search,
                "window": self.window,
                "n_epochs": self.n_epochs,
                "members": [{"epoch": epoch, "eps": eps} for epoch, eps in self.members],
                "weights": {str(epoch): weight for epoch, weight in self.weights.items()},
                "selection_accuracy": list(self.accuracy),
                "selection_labels_sha256": self.labels_sha256,
                "cv_accuracy": self.cv_accuracy,
                "gain_interval": self.gain_interval,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FusionPlan:
        """Read a plan; ValueError naming the file for anything that is not one. Runs no code from the file."""
        content = _files.read_json(path, "fmn_ref.plan")
        try:
            return cls(
                members=tuple((m["epoch"], m["eps"]) for m in content["members"]),
                n_epochs=content["n_epochs"],
                window=content["window"],
                accuracy=tuple(content["selection_accuracy"]),
                method=content["method"],
                search=content["search"],
                labels_sha256=str(content["selection_labels_sha256"]),
                cv_accuracy=content.get("cv_accuracy"),
                gain_interval=None if content.get("gain_interval") is None else tuple(content["gain_interval"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: not a valid plan: {reason}") from None

    def __str__(self) -> str:
        """What the plan is worth, in a sentence."""
        final = f"the final model {self.accuracy[0]:.2%}"
        text = f"{self.method}: the final model alone is best, {self.accuracy[0]:.2%} on the selection set"
        if self.members:
            fused = f"{self.accuracy[-1]:.2%} on the selection set"
            text = f"{self.method}: {self.forward_passes} checkpoints, {fused}, {final}"
        if self.cv_accuracy is not None and self.gain_interval is not None:
            low, high = (100 * v for v in self.gain_interval)
            text += f"; cross-validated {self.cv_accuracy:.2%}, {low:+.1f} to {high:+.1f} points from the final model's"
        elif self.members and self.method != "weights":
            text += "; not cross-validated (folds=5 does it)"
        return text


def members_of(weights: dict[int, float], n_epochs: int, final: float | None = None) -> tuple[tuple[int, float], ...]:
    """(epoch, eps) in order, the heaviest first, for a convex combination of members.

    `final` is the weight of the last epoch alone, into which they are mixed; None: members are single epochs, and it is
    among them.
    """
    checked = {
        _check.number(e, 0, n_epochs - 1, "epoch", int): _check.number(w, 0, 1e300, "weights")
        for e, w in weights.items()
    }
    total = checked.pop(n_epochs - 1, 0.0) if final is None else final
    if total + sum(checked.values()) == 0:
        raise ValueError("weights: expected at least one above 0")
    members = []
    for epoch, w in sorted(checked.items(), key=lambda item: -item[1]):
        if w > 0:
            total += w
            members.append((epoch, w / total))
    return tuple(members)


def window_epochs(epoch: int, window: int, n_epochs: int) -> range:
    """epoch - window .. epoch + window, clipped to the range."""
    return range(max(epoch - window, 0), min(epoch + window, n_epochs - 1) + 1)


def window_mean(probs: Epochs, epoch: int, window: int) -> Float:
    """Mean probabilities of a window."""
    return probs.mean(window_epochs(epoch, window, len(probs)))


def mix(current: Float, candidate: Float, eps: float) -> Float:
    return eps * candidate + (1 - eps) * current


def mixture(probs: Any, weights: dict[int, float]) -> Float:
    """sum_e weight_e * p_e, reading each epoch once."""
    probs = Epochs.of(probs)
    return np.asarray(sum(weight * probs[epoch] for epoch, weight in sorted(weights.items())))


class Epochs:
    """Probabilities of all epochs, read one at a time and checked as they are read: (n_samples, n_classes) float64."""

    def __init__(self, probs: Any, name: str = "probs") -> None:
        if not hasattr(probs, "__getitem__") or not hasattr(probs, "__len__"):
            raise TypeError(f"{name}: expected an array or a sequence of arrays, got {type(probs).__name__}")
        shape = getattr(probs, "shape", None)
        if (shape is not None and len(shape) != 3) or len(probs) == 0:
            got = "none" if shape is None else f"shape {tuple(shape)}"
            raise ValueError(
                f"{name}: expected shape (n_epochs, n_samples, n_classes) with at least one epoch, got {got}"
            )
        self._probs, self._name = probs, name
        self._shape: tuple[int, int] | None = None
        self.in_memory = shape is not None or isinstance(probs, (list, tuple))  # reading costs nothing
        self.bfloat16 = False
        self._sound: dict[int, tuple[NDArray[Any], bool]] = {}  # epochs that were checked

    @classmethod
    def of(cls, probs: Any, name: str = "probs") -> Epochs:
        return probs if isinstance(probs, Epochs) else cls(probs, name)

    def __len__(self) -> int:
        return len(self._probs)

    def native(self, epoch: int) -> NDArray[Any]:
        """As stored: float16, float32, float64, or uint16 that hold bfloat16 (then `bfloat16` is set)."""
        epoch = _check.index(epoch, len(self), "epoch")
        if epoch in self._sound:
            p, self.bfloat16 = self._sound[epoch]
            return p
        p, self.bfloat16 = _check.native_probabilities(self._probs[epoch], self._shape, f"{self._name}[{epoch}]")
        self._shape = (p.shape[0], p.shape[1])
        if self.in_memory and not p.flags.owndata:  # a view, which costs nothing to keep
            self._sound[epoch] = p, self.bfloat16
        return p

    def natives(self, epochs: Iterable[int]) -> list[NDArray[Any]]:
        """Several of one type: float64 where they differ."""
        found = [(self.native(e), self.bfloat16) for e in epochs]
        if len({(p.dtype, b) for p, b in found}) == 1:
            return [p for p, _ in found]
        self.bfloat16 = False
        return [reference.widened(p, b) for p, b in found]

    def __getitem__(self, epoch: int) -> Float:
        p = self.native(epoch)
        return reference.widened(p, self.bfloat16)

    def __iter__(self) -> Iterator[Float]:
        return (self[e] for e in range(len(self)))

    def scores(self, epoch: int) -> Any:
        """As `metrics.correctness` takes them."""
        p = self.native(epoch)
        return reference.widened(p, True) if self.bfloat16 else p

    def mean(self, epochs: Sequence[int]) -> Float:
        arrays = self.natives(epochs)
        return reference.mean(arrays, self.bfloat16)
