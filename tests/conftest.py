"""Shared fixtures. Tests run from this folder against the installed package."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from fmn_ref.kernels import backend

BACKENDS = [b for b in ("cpp", "numba", "numpy", "torch") if b != "numba" or importlib.util.find_spec("numba")]


@pytest.fixture(params=BACKENDS)
def each_backend(request, monkeypatch):
    """Run the test once per backend, through the public functions."""
    use_backend(monkeypatch, request.param)
    yield request.param
    backend.choose_again()


def use_backend(monkeypatch, name):
    monkeypatch.setenv("FMN_BACKEND", name)
    backend.choose_again()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def rng():
    return np.random.default_rng(20260101)


def awkward_correctness(rng):
    """Yield (name, array) pairs: a correctness matrix in every layout and dtype."""
    for n_samples in (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257, 8159, 8161, 8192, 9000):
        yield f"size {n_samples}", rng.random((5, n_samples)) < 0.6
    for n_epochs in (254, 255, 256, 510, 511, 700):  # the compiled kernels count epochs in bytes, 255 at a time
        correct = rng.random((n_epochs, 90)) < 0.5
        correct[:, :9], correct[:300, 9:20], correct[300:, 20:30], correct[:, 30:33] = False, False, False, True
        yield f"{n_epochs} epochs", correct
    base = rng.random((12, 300)) < 0.5
    yield "one epoch", base[:1]
    yield "all right", np.ones((4, 70), bool)
    yield "all wrong", np.zeros((4, 70), bool)
    for dtype in "bBhHiIlLqQ":
        yield f"dtype {dtype}", base.astype(dtype)
        yield f"dtype {dtype} byte-swapped", base.astype(np.dtype(dtype).newbyteorder())
    yield "Fortran order", np.asfortranarray(base)
    yield "transposed", np.ascontiguousarray(base.T).T
    yield "every other sample", base[:, ::2]
    yield "reversed epochs", base[::-1]
    yield "reversed samples", base[:, ::-1]
    yield "repeated row", np.broadcast_to(base[0], (6, 300))
    for offset in range(1, 65, 9):
        yield f"offset {offset}", base[:, offset:]
    frozen = base.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen
    yield "list", base.tolist()
    yield "torch", torch.from_numpy(base)
    yield "bytes other than 0 and 1", rng.integers(0, 256, (4, 500), np.uint8).view(bool)


def awkward(rng):
    return [pytest.param(a, id=name) for name, a in awkward_correctness(rng)]


def random_probs(rng, n_epochs=8, n_samples=60, n_classes=5, dtype=np.float64):
    """(probs, labels) in which later epochs are better but forget a part."""
    labels = rng.integers(0, n_classes, n_samples)
    logits = rng.normal(size=(n_epochs, n_samples, n_classes))
    logits[:, np.arange(n_samples), labels] += rng.normal(1, 1, (n_epochs, n_samples))
    p = np.exp(logits)
    return (p / p.sum(-1, keepdims=True)).astype(dtype), labels
