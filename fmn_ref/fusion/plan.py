"""FusionPlan, the result of a fusion: epochs, weights and how they combine, as a value and as a file. NumPy only."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import _check, _files
from .._check import Float
from ..metrics.history import labels_digest
from ..runs.folder import RunFolder
from ..runs.references import file_of
from .methods import method_names
from .mixtures import COMBINATIONS, Members, log_linear_pool, members_from_weights, replay, window_epochs
from .probabilities import ProbabilityReader, samples_digest

MOST_WEIGHT = 1e6  # of a member of a log-linear pool
LISTED = 1000  # epochs that windows may have beyond those that a file lists; each of those takes some bytes
_VALUE = {"linear": "eps", "geometric": "weight"}  # what a member has beside its row, in the file


@dataclass(frozen=True)
class FusionPlan:
    """The epochs that a fusion chose, how they combine, and an estimate of the gain.

    Attributes
    ----------
    members : tuple of (row, eps), or of (row, weight) if `combine` is "geometric"
        Linear members are in the order of mixing: fused <- eps * mean of the window around row + (1 - eps) * fused,
        starting from the last row (arXiv 2412.12968, Algorithm 1). Geometric members are single rows with the
        weights of a log-linear pool, the heaviest first. Rows are those of the probabilities, from 0. Empty if the
        final model alone is best.
    n_epochs : int
        Number of rows that the plan chose from, one for each epoch.
    window : int
        A member is the mean over epochs A - window .. A + window, clipped to the range.
    accuracy : tuple of float
        Accuracy on the selection set: of the final model, then after each linear member, or of the pool.
    method, search : str
        As in `fuse`. After "auto" the method that it tried; "weights" for a plan made by `from_weights`.
    labels_sha256, samples_sha256 : str
        Digests of the selection labels, and of the selection samples: see `was_chosen_on`.
    combine : {"linear", "geometric"}
        Whether the fused prediction is sum_e weight_e * p_e, or proportional to exp(sum_e weight_e * log p_e).
    cv_accuracy : float, optional
        Accuracy by cross-validation inside the selection set.
    gain_interval : (float, float), optional
        95 % bootstrap interval of `cv_accuracy` minus the final model's accuracy on the same samples.
    epochs : tuple of int
        Recorded epoch or step of each row, if `probs` or `correct` of `fuse` knew them; else empty. Texts and tables
        show these numbers.
    files : {row: Path}
        Checkpoint of each row with a weight, for texts: of the run that made the probabilities, or in whose folder the
        plan was read. Else empty. Not saved.
    """

    members: Members
    n_epochs: int
    window: int
    accuracy: tuple[float, ...]
    method: str = "forget"
    search: str = "grid"
    labels_sha256: str = field(default="", repr=False)
    combine: str = "linear"
    cv_accuracy: float | None = field(default=None, compare=False)
    gain_interval: tuple[float, float] | None = field(default=None, compare=False)
    epochs: tuple[int, ...] = field(default=(), compare=False, repr=False)
    samples_sha256: str = field(default="", compare=False, repr=False)
    files: Mapping[int, Path] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.members:  # the final model's own probabilities, without a floor
            object.__setattr__(self, "combine", "linear")
        n_epochs = _check.number(self.n_epochs, 1, 2**31, "n_epochs", int)
        _check.number(self.window, 0, 2**31, "window", int)
        linear = _check.choice(self.combine, COMBINATIONS, "combine") == "linear"
        for epoch, value in self.members:
            _check.number(epoch, 0, n_epochs - 1, "epoch", int)
            _check.number(value, 0, 1 if linear else MOST_WEIGHT, "eps" if linear else "weight")
        if not linear and (self.window or len(dict(self.members)) < len(self.members)):
            raise ValueError("members: a geometric plan has single epochs, each once, and window 0")
        for value in (*self.accuracy, *([] if self.cv_accuracy is None else [self.cv_accuracy])):
            _check.number(value, 0, 1, "accuracy")
        steps = len(self.members) if linear else 1
        if len(self.accuracy) != steps + 1:
            raise ValueError(f"accuracy: expected {steps + 1} values, got {len(self.accuracy)}")
        if self.gain_interval is not None:
            low, high = self.gain_interval
            _check.number(high, _check.number(low, -1, 1, "gain_interval"), 1, "gain_interval")
        _check.choice(self.method, (*method_names(), "weights"), "method")
        _check.choice(self.search, ("grid", "exact"), "search")
        if self.epochs and (len(self.epochs) != n_epochs or sorted(set(self.epochs)) != list(self.epochs)):
            raise ValueError(f"epochs: expected {n_epochs} ascending numbers, got {len(self.epochs)}")

    @classmethod
    def from_weights(cls, weights: dict[int, float], n_epochs: int, combine: str = "linear") -> FusionPlan:
        """Make a plan of given weights of the epochs. Its selection accuracy is unknown and set to 0.

        Parameters
        ----------
        weights : {row: weight}
            Not negative. Linear weights are scaled to sum 1; geometric ones are taken as they are.
        n_epochs : int
            Number of epochs of the run.
        combine : {"linear", "geometric"}
            Default: "linear".

        Raises
        ------
        TypeError, ValueError
            Negative or zero weights, rows out of range.

        Examples
        --------
        >>> FusionPlan.from_weights({0: 1, 2: 3}, 4).weights
        {0: 0.25, 2: 0.75}
        """
        if not isinstance(weights, dict):
            raise TypeError(f"weights: expected {{epoch: weight}}, got {type(weights).__name__}")
        members = members_from_weights(weights, n_epochs)  # checks the weights
        if _check.choice(combine, COMBINATIONS, "combine") == "geometric":
            members = tuple((int(e), float(w)) for e, w in sorted(weights.items(), key=lambda item: -item[1]) if w > 0)
            return cls(members, n_epochs, 0, (0.0, 0.0), "weights", combine=combine)
        return cls(members, n_epochs, 0, (0.0,) * (len(members) + 1), "weights")

    @property
    def final_model_alone(self) -> bool:
        """True if no member helped: the fused model is the final one."""
        return not self.members

    @property
    def forward_passes(self) -> int:
        """Number of checkpoints that one prediction runs."""
        return len(self.weights)

    @property
    def weights(self) -> dict[int, float]:
        """{row: weight} of single epochs, without zeros, for the formula of `combine`. Linear weights sum to 1."""
        if self.combine == "geometric":
            return {epoch: weight for epoch, weight in sorted(self.members) if weight > 0}
        epochs = np.concatenate([np.arange(part.start, part.stop) for part in self._covered])  # few of n_epochs
        w = np.zeros(len(epochs))
        w[-1] = 1
        windows = [window_epochs(epoch, self.window, self.n_epochs) for epoch, _ in self._counted]
        starts = np.searchsorted(epochs, [chosen.start for chosen in windows]).tolist()
        for (_, eps), chosen, start in zip(self._counted, windows, starts, strict=True):
            w *= 1 - eps
            w[start : start + len(chosen)] += eps / len(chosen)
        return {int(epochs[i]): float(w[i]) for i in np.flatnonzero(w)}

    @property
    def _counted(self) -> Members:
        """Linear members that have a weight in the end."""
        replaced = max((i for i, (_, eps) in enumerate(self.members) if eps == 1), default=0)
        return tuple((epoch, eps) for epoch, eps in self.members[replaced:] if eps > 0)

    @property
    def _covered(self) -> list[range]:
        """Epochs in the windows of these members, and the last epoch."""
        merged = [range(0)]
        windows = [window_epochs(epoch, self.window, self.n_epochs) for epoch in sorted(dict(self._counted))]
        for part in (*windows, range(self.n_epochs - 1, self.n_epochs)):
            if part.start <= merged[-1].stop:
                merged[-1] = range(merged[-1].start, part.stop)
            else:
                merged.append(part)
        return merged

    def with_files(self, file_of: Callable[[int], Path | None]) -> FusionPlan:
        """Return the plan with `files`, by a function that returns a row's checkpoint, or None."""
        found = {row: file_of(row) for row in self.weights}
        return replace(self, files={row: path for row, path in found.items() if path is not None})

    def epoch_of(self, row: int) -> int:
        """Recorded epoch or step of a row; the row itself if none is known."""
        return self.epochs[row] if self.epochs else row

    def apply(self, probs: Any) -> Float:
        """Replay the plan on other samples.

        Parameters
        ----------
        probs : (n_epochs, n_samples, n_classes) array, or a sequence of (n_samples, n_classes) arrays
            Only the epochs of the plan are read.

        Returns
        -------
        (n_samples, n_classes) float64
            Fused probabilities. On the selection set their accuracy is exactly `accuracy[-1]`.

        Raises
        ------
        TypeError, ValueError
            Another number of epochs, or values that are no probabilities.
        """
        reader = ProbabilityReader.of(probs)
        if len(reader) != self.n_epochs:
            raise ValueError(f"probs: expected {self.n_epochs} epochs as in the plan, got {len(reader)}")
        if self.combine == "geometric":  # the last epoch may have no weight: it is not read then
            return log_linear_pool(reader, dict(self.members))
        return deque(replay(reader, self.members, self.window, self.combine), maxlen=1)[0]

    def was_chosen_on(self, probs: Any, labels: Any) -> bool:
        """Tell whether these are the samples that the plan was chosen on, in any order.

        A sample is known by its probabilities at the last row, in 32 bits. So a part of the selection set is not
        noticed, nor are probabilities that another device or batch size has rounded otherwise. A plan that does not
        know its samples goes by the labels and their order.
        """
        if not self.samples_sha256:
            return labels_digest(labels).hex() == self.labels_sha256
        reader = ProbabilityReader.of(probs)
        return samples_digest(reader[len(reader) - 1]) == self.samples_sha256

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON (docs/reference/formats.md)."""
        _files.write_json(
            path,
            {
                "format": "fmn_ref.plan",
                "version": 2,
                "method": self.method,
                "combine": self.combine,
                "search": self.search,
                "window": self.window,
                "n_epochs": self.n_epochs,
                "members": [{"row": row, _VALUE[self.combine]: value} for row, value in self.members],
                "weights": {str(row): weight for row, weight in self.weights.items()},
                "epochs": list(self.epochs),
                "selection_accuracy": list(self.accuracy),
                "selection_labels_sha256": self.labels_sha256,
                "selection_samples_sha256": self.samples_sha256,
                "cv_accuracy": self.cv_accuracy,
                "gain_interval": self.gain_interval,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FusionPlan:
        """Read a plan. A ValueError names a file that is no plan. Runs no code from the file."""
        content = _files.read_json(path, "fmn_ref.plan", newest=2)
        with _files.naming(path, "a valid plan"):
            old = content["version"] == 1
            combine, row = ("linear", "epoch") if old else (content["combine"], "row")
            value = _VALUE[_check.choice(combine, COMBINATIONS, "combine")]
            plan = cls(
                members=tuple((m[row], m[value]) for m in content["members"]),
                n_epochs=content["n_epochs"],
                window=content["window"],
                accuracy=tuple(content["selection_accuracy"]),
                method=content["method"],
                search=content["search"],
                labels_sha256=str(content["selection_labels_sha256"]),
                combine=combine,
                cv_accuracy=content.get("cv_accuracy"),
                gain_interval=None if content.get("gain_interval") is None else tuple(content["gain_interval"]),
                epochs=() if old else tuple(_check.number(e, 0, 2**63 - 1, "epochs", int) for e in content["epochs"]),
                samples_sha256=str(content.get("selection_samples_sha256", "")),
            )
            most, n_covered = LISTED + os.path.getsize(_files.absolute(path)), sum(map(len, plan._covered))
            if plan.combine == "linear" and (n_covered > most or n_covered * len(plan.members) > LISTED * most):
                raise ValueError(f"window: expected windows of epochs that the file lists, got {plan.window}")
            if "weights" in content:
                plan._check_weights(content["weights"])
        folder = RunFolder.of(path)
        return plan.with_files(lambda row: file_of(folder, plan.epochs[row])) if folder and plan.epochs else plan

    def _check_weights(self, given: dict[str, Any]) -> None:
        """Refuse weights that are not those of the members: other languages read `weights` alone."""
        for row, weight in self.weights.items():
            if str(row) not in given:
                raise ValueError(f"weights: missing row {row}, whose weight is {weight:g} as in members")
            found = _check.number(given[str(row)], 0, MOST_WEIGHT, "weights")
            if abs(found - weight) > 1e-6 * max(1, weight):
                raise ValueError(f"weights: expected {weight:g} for row {row} as in members, got {found:g}")
        if len(given) != self.forward_passes:
            raise ValueError(f"weights: expected {self.forward_passes} rows as in members, got {len(given)}")

    def __str__(self) -> str:
        """The checkpoints with their weights, a line each, then what they reach and cost."""
        name = "epoch" if self.epochs else "row"
        lines = [f"{name:>6} {'weight':>7}" + "  file" * bool(self.files)]
        for row, weight in self.weights.items():
            file = f"  {_shown(self.files[row])}" if row in self.files else ""
            lines.append(f"{self.epoch_of(row):6d} {weight:7.4f}{file}")
        return "\n".join([*(lines if self.members else ()), self._summary()])

    def _summary(self) -> str:
        """Method, number of checkpoints, accuracies and the gain in one sentence."""
        final = f"the final model {self.accuracy[0]:.2%}"
        text = f"{self.method}: the final model alone is best, {self.accuracy[0]:.2%} on the selection set"
        if self.members:
            fused = f"{self.accuracy[-1]:.2%} on the selection set"
            text = f"{self.method}: {self.forward_passes} checkpoints and forward passes, {fused}, {final}"
        if self.cv_accuracy is not None and self.gain_interval is not None:
            low, high = (100 * v for v in self.gain_interval)
            text += f"; cross-validated {self.cv_accuracy:.2%}, {low:+.1f} to {high:+.1f} points from the final model's"
        elif self.members and self.method != "weights":
            text += "; not cross-validated (folds=5 does it)"
        return text


def _shown(path: Path) -> Path:
    """A path relative to the working directory, if it lies there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
