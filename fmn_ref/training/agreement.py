"""How often a student chooses its teacher's class on the latest training batches: a warning where that is rare."""

from __future__ import annotations

import logging
from collections import deque

import torch
from torch import Tensor

from . import distributed
from .engine import Loss
from .recipe import Recipe
from .soft_targets import Targets

logger = logging.getLogger(__name__)
BATCHES, SAMPLES = 32, 1024  # the latest batches, and the first samples of each, that are looked at
ENOUGH = 100  # samples: fewer say little
NEAR_CHANCE, FAR_BELOW = 0.1, 0.5  # of the way from chance to the teacher


class Agreement:
    """A loss function that remembers what student and teacher answered. It adds no pass over the data.

    Parameters
    ----------
    loss_fn : callable(logits, targets) -> scalar tensor
    """

    def __init__(self, loss_fn: Loss) -> None:
        self._loss_fn = loss_fn
        self._latest = deque[tuple[Tensor, Tensor]](maxlen=BATCHES)

    def __call__(self, logits: Tensor, targets: Targets) -> Tensor:
        loss = self._loss_fn(logits, targets)
        self._latest.append((logits[:SAMPLES].detach().argmax(1), targets[1][:SAMPLES].argmax(1)))
        return loss

    def fault(self) -> str | None:
        """Say that the student is near chance or far below its teacher; None if it is not, or too little is known.

        Chance is the share of the class that the teacher chooses most often.
        """
        if not self._latest:
            return None
        student, teacher = (torch.cat(answers) for answers in zip(*self._latest, strict=True))
        agreed = float((student == teacher).double().mean())
        chance = float(teacher.bincount().max()) / len(teacher)
        if len(teacher) < ENOUGH or chance == 1 or agreed - chance >= FAR_BELOW * (1 - chance):
            return None
        what = "is near chance" if agreed - chance < NEAR_CHANCE * (1 - chance) else "is far below its teacher"
        return f"the student {what}: it chooses the teacher's class for {agreed:.0%} of the last training samples, " + (
            f"and the most frequent class alone has {chance:.0%}"
        )

    def warn(self, recipe: Recipe, epochs: int) -> None:
        """Log the fault, if there is one, and what to try; rank zero alone."""
        fault = self.fault()
        if fault is not None and distributed.rank() == 0:
            tries = f"more epochs (now {epochs}), a smaller or larger lr (now {recipe.lr:g})"
            logger.warning("%s; try %s, or start it from the weights of the run's last checkpoint", fault, tries)
