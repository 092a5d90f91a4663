"""Epoch-wise double descent under label noise on MNIST, and the samples forgotten in the dip.

    fmn-ref bench descent --data ROOT [-o benchmarks/results]

Trains on 2 000 images with wrong labels by SGD at a constant rate. Accuracy rises, falls while the network learns the
wrong labels, and rises again (Figure 2 of arXiv 2412.12968 and 2507.08686). The forget fraction shows how many samples
of the first rise are wrong at the end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fmn_ref as fmn
from fmn_ref.reporting.tables import markdown_table

from ..common import write_result
from . import datasets, networks

RECIPE: dict[str, Any] = {"batch_size": 64, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
NAMES = ("accuracy", "retained", "forget", "learned")
CASES: dict[str, tuple[str, Any, float]] = {  # noise, network, learning rate
    "MLP, 20 % wrong labels": ("sym20", lambda: networks.mlp(1, 28, 10, hidden=512), 0.05),
    "CNN, 40 % wrong labels": ("sym40", lambda: networks.small_cnn(1, 28, 10), 0.02),
}


def benchmark(root: str, output: str | None = None, n_seeds: int = 3, epochs: int = 150) -> dict[str, Any]:
    """Train every case with every seed; write double_descent.json and double_descent.png into `output`."""
    source = datasets.mnist(Path(root))
    result: dict[str, Any] = {"format": "fmn_ref.double-descent", "version": 1, "epochs": epochs, "cases": {}}
    for name, (noise, network, lr) in CASES.items():
        seeds = []
        for seed in range(n_seeds):
            data = datasets.split(source, noise, seed, 2000, 5000, 5000)
            seeds.append(train_curves(network, data, epochs, lr, seed))
        depths = [depth(curves["accuracy"]) for curves in seeds]
        result["cases"][name] = {"noise": noise, "lr": lr, "seeds": seeds, "depth": depths}
    if output is not None:
        draw(result, write_result(output, "double_descent", result) / "double_descent.png")
    return result


def train_curves(network: Any, data: datasets.Split, epochs: int, lr: float, seed: int) -> dict[str, list[float]]:
    """Train a network; return its curves on the test set."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        options = {**RECIPE, "epochs": epochs, "lr": lr, "seed": seed, "keep": "none", "progress": False}
        run = fmn.train(network(), data.train, data.test, run_dir=folder, **options)
        curves = fmn.forgetting_curves(run.history)
    return {name: getattr(curves, name).round(6).tolist() for name in NAMES}


def depth(accuracy: list[float]) -> dict[str, float]:
    """Find the first peak and the dip after it, and average the last ten epochs."""
    a = np.array(accuracy)
    peak = int(a.argmax()) if a.argmax() < len(a) // 2 else int(a[: len(a) // 2].argmax())
    dip = peak + int(a[peak:].argmin())
    return {
        "peak": float(a[peak]),
        "peak_epoch": peak,
        "dip": float(a[dip]),
        "dip_epoch": dip,
        "end": float(a[-10:].mean()),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the curves of each case, averaged over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure((9.6, 3.6), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(result["cases"]), sharey=True, squeeze=False)[0]
    for axes, (name, case) in zip(all_axes, result["cases"].items(), strict=True):
        _draw_case(axes, name, case)
    figure.axes[0].set_ylabel("share of 5 000 test images")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_case(axes: Any, name: str, case: dict[str, Any]) -> None:
    mean = {k: np.mean([s[k] for s in case["seeds"]], axis=0) for k in NAMES}
    axes.plot(mean["accuracy"], color="#2563eb", label="accuracy")
    axes.plot(mean["retained"], color="#2563eb", linestyle=":", label="of it still right at the end")
    axes.plot(mean["forget"], color="#dc2626", label="forget fraction")
    axes.fill_between(range(len(mean["forget"])), mean["retained"], mean["accuracy"], color="#dc2626", alpha=0.12)
    axes.set_title(name, loc="left", fontsize=10)
    axes.set(xlabel="epoch", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)


def markdown(result: dict[str, Any]) -> str:
    """A table of accuracies in percent, averaged over the seeds."""
    rows = []
    for name, case in result["cases"].items():
        means = [100 * np.mean([d[key] for d in case["depth"]]) for key in ("peak", "dip", "end")]
        rows.append([name, *(f"{mean:.1f}" for mean in means)])
    return markdown_table(["case", "first peak", "dip", "last 10 epochs"], rows)
