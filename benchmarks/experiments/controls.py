"""Controls that need a training of their own, and Caruana's selection.

`train_snapshots`, `train_fge` and `train_swa` return networks. `StepAverages` accompanies a training. `Mean` makes one
predictor of several. An epoch is one pass over the training data.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.runs.folder import RunFolder
from fmn_ref.training.data import predict
from fmn_ref.training.engine import Average, EarlyStopping

from . import datasets
from .pieces import Piece, run_dir

EMA_DECAYS = (0.98, 0.99, 0.995, 0.998)  # per step


class Bfloat16(nn.Module):
    """A network that computes in bfloat16, where `enabled`."""

    def __init__(self, network: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.network, self.enabled = network, enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.enabled):
            return cast(Tensor, self.network(x))


class Mean(nn.Module):
    """Log of the members' mean probabilities."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        p = sum((m(x).float().softmax(1) for m in self.members), torch.zeros(())) / len(self.members)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def train_snapshots(piece: Piece, data: datasets.Split, folder: Path, cycles: int = 5) -> list[nn.Module]:
    """Train a snapshot ensemble (Huang et al. 2017).

    The epochs are divided into cycles. Each cycle is a cosine from the full learning rate to 0.
    """
    torch.manual_seed(piece.seed)
    model, found = piece.task.make_model(), []
    for i in range(cycles):
        recipe = piece.recipe(piece.seed + 100 * i, epochs=piece.task.epochs // cycles)
        fmn.train(model, data.train, data.select, run_dir=folder / f"snapshot_{i}", keep="every:1000", **recipe)
        found.append(copy.deepcopy(model))
    return found


def train_fge(piece: Piece, data: datasets.Split, folder: Path, run: fmn.Run) -> list[nn.Module]:
    """Train a fast geometric ensemble (Garipov et al. 2018).

    It starts from the checkpoint at four fifths of the run. Each cycle has two epochs, from half the rate to 0.
    """
    start = piece.task.epochs * 4 // 5
    model, found = checkpoints.load_into(piece.task.make_model(), run.checkpoints[start - 1]), []
    for i in range((piece.task.epochs - start) // 2):
        recipe = piece.recipe(piece.seed + 100 * i, epochs=2, lr=piece.task.recipe["lr"] / 2)
        fmn.train(model, data.train, data.select, run_dir=folder / f"fge_{i}", keep="every:1000", **recipe)
        found.append(copy.deepcopy(model))
    return found


def train_swa(piece: Piece, data: datasets.Split, folder: Path, run: fmn.Run) -> nn.Module:
    """Train for SWA (Izmailov et al. 2018) and average the weights.

    It starts from the checkpoint at three quarters of the run, with half the rate held constant. BatchNorm statistics
    are recomputed.
    """
    start = piece.task.epochs * 3 // 4
    model = checkpoints.load_into(piece.task.make_model(), run.checkpoints[start - 1])
    changes = {"epochs": piece.task.epochs - start, "lr": piece.task.recipe["lr"] / 2, "schedule": "constant"}
    end = fmn.train(model, data.train, data.select, run_dir=folder / "swa", **piece.recipe(piece.seed, **changes))
    return fmn.averaged_model(end, dict.fromkeys(range(len(end.history)), 1.0), data.train)


class StepAverages:
    """Exponential moving averages (EMA) of a network's weights after every step, and the best of them.

    A context that is open while `fmn.train` trains the network. It does not change the training. At the end of each
    epoch it saves its state, so that a killed training resumes with the averages of the epoch it resumes from.

    Parameters
    ----------
    piece : Piece
    data : Split
        The selection accuracy chooses the decay and the epoch, among twenty epochs of the run.
    folder : path
        The piece's folder. The states are in its subfolder ema/.
    model : nn.Module
        The network that trains, with its weights at the start.
    """

    def __init__(self, piece: Piece, data: datasets.Split, folder: Path, model: nn.Module) -> None:
        self.model, self.select, self.epochs = model, data.select, piece.task.epochs
        self.amp = piece.task.amp
        self.run_dir, self.folder = run_dir(folder), folder / "ema"
        n = len(data.train[1])
        size: int = piece.task.recipe["batch_size"]
        self.steps_per_epoch = max(1, n // size + (n % size > 1))  # a last batch of one sample joins the one before
        self.step: int | None = None
        self.best = EarlyStopping(self.epochs)
        self.averages = {str(decay): Average(model, decay) for decay in EMA_DECAYS}

    def __enter__(self) -> None:
        self._handle = register_optimizer_step_post_hook(self.after_step)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Update the averages; at the end of an epoch score and save them."""
        if self.step is None:
            self.step = self._resume()
        self.step += 1
        for average in self.averages.values():
            average.update(self.model)
        if self.step % self.steps_per_epoch == 0:
            self._end_epoch(self.step // self.steps_per_epoch - 1)

    def _resume(self) -> int:
        """Load the state of the epoch that the training resumes from; return the number of steps until then.

        At the first step, the history on disk ends at that epoch: `fmn.train` has discarded what is later.
        """
        done = len(fmn.Run.open(self.run_dir).history) if RunFolder(self.run_dir).history.exists() else 0
        if done:
            state = checkpoints.load(self._path(done - 1))
            self.best.load_state_dict(state.pop("best"))
            for decay, average in self.averages.items():
                average.load_state_dict(state[decay])
        return done * self.steps_per_epoch

    def _end_epoch(self, epoch: int) -> None:
        if (epoch + 1) % max(1, self.epochs // 20) == 0 or epoch == self.epochs - 1:
            for average in self.averages.values():
                self.best.update(epoch, accuracy(average.model, self.select, self.amp), average.model)
        self.folder.mkdir(exist_ok=True)
        state = {decay: average.state_dict() for decay, average in self.averages.items()}
        checkpoints.save({**state, "best": self.best.state_dict()}, self._path(epoch))
        self._path(epoch - 3).unlink(missing_ok=True)  # the training may resume from either epoch before this one

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch}.pt"


def best_average(piece: Piece, folder: Path) -> nn.Module:
    """Load the best of the `StepAverages` of a finished training."""
    model = piece.task.make_model()
    state = checkpoints.load(folder / "ema" / f"epoch_{piece.task.epochs - 1}.pt")
    model.load_state_dict(state["best"]["weights"])
    return model.eval()


def predicted(model: nn.Module, samples: datasets.Data, amp: bool = False) -> NDArray[Any]:
    """Probabilities of a network that returns logits or log-probabilities; with `amp` it computes in bfloat16."""
    return predict(model, samples, amp=amp)[0].float().cpu().numpy()


def accuracy(model: nn.Module, samples: datasets.Data, amp: bool = False) -> float:
    """Share of the samples that a network classifies correctly."""
    return float((predicted(model, samples, amp).argmax(1) == samples[1].cpu().numpy()).mean())


def caruana(probs: NDArray[Any], labels: NDArray[np.int64], rounds: int = 50) -> dict[int, float]:
    """Select epochs greedily with replacement (Caruana et al. 2004); return {epoch: weight}.

    Each round adds the epoch that raises the plain mean's selection accuracy most. The round with the best selection
    accuracy counts.
    """
    total = np.zeros(probs.shape[1:], np.float32)
    chosen: list[int] = []
    best, size = -1.0, 0
    for _ in range(rounds):
        scores = [((total + p).argmax(1) == labels).mean() for p in probs]
        chosen.append(int(np.argmax(scores)))
        total += probs[chosen[-1]]
        if max(scores) > best:
            best, size = max(scores), len(chosen)
    epochs, count = np.unique(chosen[:size], return_counts=True)
    return {int(e): int(c) / size for e, c in zip(epochs, count, strict=True)}
