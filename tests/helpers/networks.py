"""Tiny networks and data for the tests; also what the subprocesses of test_resume import."""

import numpy as np
import torch
from torch import nn


def make_model():
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))


def make_data(n=240, seed=0, wrong=0.3):
    """Gaussian blobs; `wrong` of the labels drawn anew. ((x, y) train, (x, y) validation, (x, y) test)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, 3 * n)
    x = rng.normal(size=(3 * n, 6)) + 1.2 * np.eye(6)[y]
    noisy = np.where(rng.random(3 * n) < wrong, rng.integers(0, 4, 3 * n), y)
    x, y, noisy = torch.tensor(x, dtype=torch.float32), torch.tensor(y), torch.tensor(noisy)
    return (x[:n], noisy[:n]), (x[n : 2 * n], y[n : 2 * n]), (x[2 * n :], y[2 * n :])


RECIPE = {"lr": 0.1, "batch_size": 32, "seed": 5, "progress": False}
