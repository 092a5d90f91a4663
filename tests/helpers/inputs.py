"""Inputs that many tests use: correctness in awkward layouts, probabilities of a run, a history."""

import importlib.util
import os

import numpy as np
import pytest
import torch

import fmn_ref as fmn

FORCED = os.environ.get("FMN_BACKEND")
BACKENDS = [b for b in ("cpp", "numba", "numpy", "torch") if b != "numba" or importlib.util.find_spec("numba")]
BACKENDS = [FORCED] if FORCED else BACKENDS  # `FMN_BACKEND=numpy pytest` tests one backend


def awkward_correctness(rng):
    """Yield (name, array): correctness matrices of many sizes, layouts and dtypes."""
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
    """The matrices of `awkward_correctness`, as parameters of a test."""
    return [pytest.param(a, id=name) for name, a in awkward_correctness(rng)]


def random_probs(rng, n_epochs=8, n_samples=60, n_classes=5, dtype=np.float64):
    """Draw (probs, labels). The epochs differ in the samples they classify correctly, so each forgets some."""
    labels = rng.integers(0, n_classes, n_samples)
    logits = rng.normal(size=(n_epochs, n_samples, n_classes))
    logits[:, np.arange(n_samples), labels] += rng.normal(1, 1, (n_epochs, n_samples))
    p = np.exp(logits)
    return (p / p.sum(-1, keepdims=True)).astype(dtype), labels


def history_of(correct, path=None, labels=None, epochs=None):
    """Append the rows of a correctness matrix to a new history, in memory or at `path`."""
    history = fmn.CorrectnessHistory(len(correct[0]), path, labels=labels)
    for i, row in enumerate(correct):
        history.append(row, None if epochs is None else epochs[i])
    return history


def softmax(logits, dtype=np.float64):
    """The softmax over the last axis, computed in `dtype`."""
    z = np.asarray(logits, dtype)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
