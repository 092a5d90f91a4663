"""Epoch-wise double descent under label noise on real data, and what is forgotten in the dip (the papers' Figure 2).

    fmn-ref bench descent --data ROOT [-o benchmarks/results]

2 000 images of MNIST with wrong training labels, SGD at a constant rate. Accuracy first rises, falls while the wrong
labels are learned, and rises again; what is right at an epoch and still right at the end shows how much of the first
rise is lost.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fmn_ref as fmn
from fmn_ref import _files

from . import datasets, networks

RECIPE: dict[str, Any] = {"batch_size": 64, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
NAMES = ("accuracy", "retained", "forget", "learned")


def mlp(hidden: int = 512) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


CASES: dict[str, tuple[str, Any, float]] = {
    "MLP, 20 % wrong labels": ("sym20", mlp, 0.05),
    "CNN, 40 % wrong labels": ("sym40", lambda: networks.small_cnn(1, 28, 10), 0.02),
}


def benchmark(root: str, output: str | None = None, n_seeds: int = 3, epochs: int = 150) -> dict[str, Any]:
    """The curves of every case and seed; writes double_descent.json and .png."""
    source = datasets.mnist(Path(root))
    result: dict[str, Any] = {"format": "fmn_ref.double-descent", "version": 1, "epochs": epochs, "cases": {}}
    for name, (noise, network, lr) in CASES.items():
        seeds = []
        for seed in range(n_seeds):
            data = datasets.split(source, noise, seed, 2000, 5000, 5000)
            torch.manual_seed(seed)
            with tempfile.TemporaryDirectory() as folder:
                options = {**RECIPE, "epochs": epochs, "lr": lr, "seed": seed, "keep": "none", "progress": False}
                run = fmn.train(network(), data.train, data.test, run_dir=folder, **options)
                curves = fmn.forgetting_curves(run.history)
            seeds.append({k: getattr(curves, k).round(6).tolist() for k in NAMES})
        result["cases"][name] = {
            "noise": noise,
            "lr": lr,
            "seeds": seeds,
            "depth": [depth(s["accuracy"]) for s in seeds],
        }
    if output is not None:
        folder_out = Path(output)
        folder_out.mkdir(parents=True, exist_ok=True)
        _files.write_json(folder_out / "double_descent.json", result)
        draw(result, folder_out / "double_descent.png")
    return result


def depth(accuracy: list[float]) -> dict[str, float]:
    """The first peak, the dip after it, and the mean of the last ten epochs."""
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
    from matplotlib.figure import Figure

    figure = Figure((9.6, 3.6), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(result["cases"]), sharey=True, squeeze=False)[0]
    for axes, (name, case) in zip(all_axes, result["cases"].items(), strict=True):
        mean = {k: np.mean([s[k] for s in case["seeds"]], axis=0) for k in NAMES}
        axes.plot(mean["accuracy"], color="#2563eb", label="accuracy")
        axes.plot(mean["retained"], color="#2563eb", linestyle=":", label="of it still right at the end")
        axes.plot(mean["forget"], color="#dc2626", label="forget fraction $F_e$")
        axes.fill_between(range(len(mean["forget"])), mean["retained"], mean["accuracy"], color="#dc2626", alpha=0.12)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set(xlabel="epoch", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of 5 000 test images")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def markdown(result: dict[str, Any]) -> str:
    lines = ["| case | first peak | dip | last 10 epochs |", "|---|--:|--:|--:|"]
    for name, case in result["cases"].items():
        mean = {k: 100 * np.mean([d[k] for d in case["depth"]]) for k in ("peak", "dip", "end")}
        lines.append(f"| {name} | {mean['peak']:.1f} | {mean['dip']:.1f} | {mean['end']:.1f} |")
    return "\n".join(lines) + "\n"
