"""The whole job on real images in a few minutes: scikit-learn's digits with wrong labels in train.

    fmn-ref demo

For each noise rate and seed: train, record, fuse, distill, compare with every control. Each finished (rate, seed) is
kept in its folder, so that a second run reuses it and a killed one continues. Settings were fixed beforehand (METHOD's
optimiser; the size of the network and the number of epochs so that a run takes seconds); nothing was tuned on test
samples.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import _check, _files
from .metrics.curves import forgetting_curves
from .reporting import plot
from .reporting.comparison import Comparison, compare
from .runs.run import Run
from .training.noise import symmetric_noise
from .training.train import train

logger = logging.getLogger(__name__)
RATES = (0.0, 0.2, 0.4)
N_TRAIN, N_SELECT = 800, 300
RECIPE: dict[str, Any] = {"batch_size": 64, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}

Data = tuple[Tensor, Tensor]


def make_model() -> nn.Module:
    """Two convolutions and two linear layers on 8 x 8 images: 70 000 weights, enough to memorise 800 labels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def load_digits(seed: int, rate: float) -> tuple[Data, Data, Data]:
    """Train (with wrong labels), selection and test set: disjoint, drawn by the seed."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise ImportError('the demo needs scikit-learn and matplotlib: pip install "fmn_ref[demo]"') from None
    digits = load()
    x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # (1797, 1, 8, 8)
    y = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    rows = order[:N_TRAIN], order[N_TRAIN : N_TRAIN + N_SELECT], order[N_TRAIN + N_SELECT :]
    train_set, select, test = ((x[r], y[r]) for r in rows)
    return (train_set[0], torch.from_numpy(symmetric_noise(train_set[1], rate, 10, seed))), select, test


def run_cell(folder: Path, rate: float, seed: int, epochs: int, progress: bool | None = False) -> dict[str, Any]:
    """One noise rate and seed, or its stored result."""
    done = folder / "cell.json"
    settings = {"rate": rate, "seed": seed, "epochs": epochs}
    if done.exists():
        cell = _files.read_json(done, "fmn_ref.demo-cell")
        if cell["settings"] != settings:
            raise ValueError(f"{done}: made with {cell['settings']}, not {settings}; choose another folder")
        return cell
    train_set, select, test = load_digits(seed, rate)
    torch.manual_seed(seed)
    run = train(make_model(), train_set, select, epochs=epochs, run_dir=folder, seed=seed, progress=progress, **RECIPE)
    options = {"epochs": epochs, "seed": seed, "progress": progress, **RECIPE}
    table = compare(run, select, test, train_data=train_set, make_student=make_model, distill_options=options)
    table.plan.save(folder / "plan.json")
    _figures(run, table, select[1], folder / "report")
    cell = {
        "format": "fmn_ref.demo-cell",
        "version": 1,
        "settings": settings,
        "peak_forget_fraction": float(forgetting_curves(run.history).forget.max()),
        **json.loads(table.to_json()),
    }
    _files.write_json(done, cell)
    return cell


def _figures(run: Run, table: Comparison, labels: Tensor, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    plot.curves(run.history).savefig(folder / "curves.png")
    plot.matrix(run.history).savefig(folder / "matrix.png")
    plot.plan_weights(table.plan).savefig(folder / "weights.png")
    plot.last_correct(run.history).savefig(folder / "last_correct.png")
    plot.per_class(run.history, labels).savefig(folder / "per_class.png")


def run_demo(out: Path, n_seeds: int = 5, epochs: int = 40, progress: bool | None = None) -> dict[str, Any]:
    """All cells; writes results.json and report.md in `out`, returns what results.json holds."""
    _check.number(n_seeds, 1, 10_000, "seeds", int)
    todo = [(rate, seed) for seed in range(n_seeds) for rate in RATES]
    cells: dict[float, list[dict[str, Any]]] = {rate: [] for rate in RATES}
    hidden = None if progress is None else not progress
    for i, (rate, seed) in enumerate(bar := tqdm(todo, "demo", unit="run", disable=hidden)):
        bar.set_postfix_str(f"{rate:.0%} wrong labels, seed {seed}")
        cells[rate].append(run_cell(out / f"noise_{rate * 100:02.0f}" / f"seed_{seed}", rate, seed, epochs))
        logger.info("%d of %d done: %.0f%% wrong labels, seed %d", i + 1, len(todo), rate * 100, seed)
    noise = {}
    for rate in RATES:
        methods = [row["method"] for row in cells[rate][0]["rows"]]
        table = {m: _summary([c["rows"][i] for c in cells[rate]]) for i, m in enumerate(methods)}
        peaks = [c["peak_forget_fraction"] for c in cells[rate]]
        noise[f"{rate:.0%}"] = {"methods": table, "peak_forget_fraction": _mean_se(peaks)}
    results = {"format": "fmn_ref.demo", "version": 1, "n_seeds": n_seeds, "epochs": epochs, "noise": noise}
    _files.write_json(out / "results.json", results)
    _files.write_atomic(out / "report.md", lambda f: f.write(report(results).encode()))
    return results


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "test_accuracy": _mean_se([r["test_accuracy"] for r in rows]),
        "selection_accuracy": _mean_se([r["selection_accuracy"] for r in rows]),
        "forward_passes": float(np.mean([r["forward_passes"] for r in rows])),
    }


def _mean_se(values: list[float]) -> dict[str, float | None]:
    """Mean and standard error over the seeds (none for a single seed)."""
    se = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "se": se}


def table(results: dict[str, Any]) -> str:
    """Test accuracy in percent, mean ± standard error, a row per method."""
    noise = results["noise"]
    methods = list(next(iter(noise.values()))["methods"])

    def cell(value: dict[str, Any]) -> str:
        return f"{value['mean'] * 100:.1f}" + ("" if value["se"] is None else f" ± {value['se'] * 100:.1f}")

    lines = ["| method | " + " | ".join(f"{rate} wrong labels" for rate in noise) + " | forward passes |"]
    lines.append("|---|" + "--:|" * (len(noise) + 1))
    for m in methods:
        passes = [n["methods"][m]["forward_passes"] for n in noise.values()]
        span = f"{min(passes):.3g}" if min(passes) == max(passes) else f"{min(passes):.3g}-{max(passes):.3g}"
        scores = [cell(n["methods"][m]["test_accuracy"]) for n in noise.values()]
        lines.append(f"| {m} | " + " | ".join(scores) + f" | {span} |")
    peaks = [cell(n["peak_forget_fraction"]) for n in noise.values()]
    lines.append("| *peak forget fraction (selection set)* | " + " | ".join(peaks) + " | |")
    return "\n".join(lines) + "\n"


def report(results: dict[str, Any]) -> str:
    """report.md: the table, and the figures of the first seed at the highest noise."""
    figures = {
        "curves": "Accuracy per epoch, and what of it is left at the end: the shaded gap is the forget fraction.",
        "matrix": "The forgetting matrix: right at epoch i and wrong at epoch j.",
        "weights": "The weights that Knowledge Fusion gave to the checkpoints.",
        "last_correct": "When the forgotten samples were right for the last time.",
        "per_class": "Forgotten samples per class (dashed: all classes).",
    }
    n_test = 1797 - N_TRAIN - N_SELECT
    shown = f"noise_{RATES[-1] * 100:02.0f}/seed_0/report"
    return "\n".join(
        [
            "# What the network forgot, and what fusing it back gives",
            "",
            f"scikit-learn's digits: {N_TRAIN} training images (labels wrong as stated), {N_SELECT} to choose epochs",
            f"and weights, {n_test} others to score. Test accuracy in %, mean ± standard error over",
            f"{results['n_seeds']} seed(s), {results['epochs']} epochs each. Everything is chosen on the {N_SELECT};",
            "k is the number of checkpoints in KF's plan.",
            "",
            table(results),
            f"## One run: {RATES[-1]:.0%} wrong labels, seed 0",
            *(line for name, text in figures.items() for line in ("", text, "", f"![{name}]({shown}/{name}.png)")),
            "",
        ]
    )
