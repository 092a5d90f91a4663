"""The loops that a user would write: `train` a network, `evaluate` the checkpoints of a run."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fmn_ref as fmn

from ..experiments import datasets
from .settings import Setting


class Cropped(Dataset[tuple[Tensor, Tensor]]):
    """Images that are cropped and flipped one at a time, as by torchvision's transforms."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(9, (2,)).tolist()
        height, width = self.images.shape[2:]
        image = F.pad(self.images[i], (4, 4, 4, 4))[:, top : top + height, left : left + width]
        return image.flip(2) if torch.rand(()) < 0.5 else image, self.labels[i]


def train(model: nn.Module, s: Setting, split: datasets.Split, folder: Path, seed: int = 0) -> list[float]:
    """Train a network: the twin of `fmn.train`. Returns the seconds of each epoch."""
    torch.manual_seed(seed)
    on_gpu = {"num_workers": min(8, os.cpu_count() or 1), "pin_memory": True, "persistent_workers": True}
    options: dict[str, Any] = on_gpu if s.device == "cuda" else {}
    train_set = Cropped(*split.train) if s.augmented else TensorDataset(*split.train)
    train_loader = DataLoader(train_set, s.batch_size, shuffle=True, **options)
    val_loader = DataLoader(TensorDataset(*split.select), 256, **options)
    optimizer = torch.optim.SGD(model.parameters(), s.lr, 0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.epochs)
    stamps = [time.perf_counter()]
    for epoch in range(s.epochs):
        model.train()
        total, right, val_right = 0.0, 0, 0
        for x, y in train_loader:
            x, y = x.to(s.device, non_blocking=True), y.to(s.device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(s.device, torch.bfloat16, enabled=s.amp):
                logits = model(x)
                loss = F.cross_entropy(logits, y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
            right += (logits.argmax(1) == y).sum().item()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            for x, y in val_loader:
                val_right += (model(x.to(s.device)).argmax(1) == y.to(s.device)).sum().item()
        torch.save(model.state_dict(), folder / f"{epoch}.pt")
        stamps.append(time.perf_counter())
    return [end - start for start, end in pairwise(stamps)]


@torch.no_grad()
def evaluate(s: Setting, run: fmn.Run, samples: datasets.Data) -> NDArray[np.float32]:
    """Predict with every checkpoint: probabilities (n_checkpoints, n_samples, n_classes)."""
    stacked = []
    for path in run.checkpoints:
        model = s.make_model()
        model.load_state_dict(torch.load(path, weights_only=True))
        model.eval()
        parts, right = [], 0
        for x, y in DataLoader(TensorDataset(*samples), 256):
            parts.append(model(x.to(s.device)).softmax(1).cpu())
            right += (parts[-1].argmax(1) == y).sum().item()
        stacked.append(torch.cat(parts).numpy())
    return np.stack(stacked)
