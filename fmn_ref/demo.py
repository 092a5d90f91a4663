"""The whole method on real images in a few minutes: scikit-learn's digits with wrong training labels.

    fmn-ref demo

For each noise rate and seed, the demo trains, records, fuses, distills and compares with every control. Each finished
run is stored in its own folder: a second call reuses it, and a killed call resumes. The settings were fixed in advance:
the optimizer is the papers', and the network and the number of epochs are small enough for runs of seconds. Nothing was
tuned on test samples.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _check, _files, _stderr
from .metrics.curves import forgetting_curves
from .reporting import plot
from .reporting.comparison import Comparison, compare
from .reporting.report import write_report
from .reporting.tables import markdown_table, mean_and_error
from .runs.run import Run
from .training.noise import symmetric_noise
from .training.train import train

logger = logging.getLogger(__name__)
RATES = (0.0, 0.2, 0.4)
MEASURES = ("test_accuracy", "selection_accuracy", "test_nll", "test_ece")
CALIBRATED = ("last", "KF", "pool", "distilled KF", "distilled pool")  # rows of the second table
N_TRAIN, N_SELECT = 800, 300
SHOWN = f"noise_{RATES[-1] * 100:02.0f}/seed_0"  # the run that report.md and report.html show
RECIPE: dict[str, Any] = {"batch_size": 64, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"}
FIGURES = {
    "curves": "Accuracy and retained accuracy (right at the end too) per epoch, on the selection images. "
    "The shaded gap is the forget fraction. Horizontal lines: test accuracy of KF and of its student.",
    "matrix": "Forgetting matrix: share of samples that are right at epoch i and wrong at epoch j.",
    "weights": "Weights of the checkpoints in the fusion plan.",
    "last_correct": "Last epoch at which each forgotten sample was right.",
    "per_class": "Share of forgotten samples per class (dashed line: all classes).",
}


def make_model() -> nn.Module:
    """Two convolutions and two linear layers on 8 x 8 images: 70 000 weights, enough to memorise 800 labels."""
    features = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    features += [nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(32 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


def load_digits(seed: int, rate: float) -> tuple[tuple[Tensor, Tensor], ...]:
    """Training set (a share `rate` of its labels wrong), selection set and test set: disjoint, drawn with `seed`."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise ImportError('the demo needs scikit-learn and matplotlib: pip install "fmn_ref[demo]"') from None
    digits = load()
    x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # (1797, 1, 8, 8)
    y = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    rows = order[:N_TRAIN], order[N_TRAIN : N_TRAIN + N_SELECT], order[N_TRAIN + N_SELECT :]
    noisy = torch.from_numpy(symmetric_noise(y[rows[0]], rate, 10, seed))
    return (x[rows[0]], noisy), *((x[r], y[r]) for r in rows[1:])


def run_cell(folder: Path, rate: float, seed: int, epochs: int) -> dict[str, Any]:
    """Run one noise rate and seed, or return the stored result."""
    done = folder / "cell.json"
    settings = {"rate": rate, "seed": seed, "epochs": epochs}
    if done.exists():
        cell = _files.read_json(done, "fmn_ref.demo-cell")
        if cell["settings"] != settings:
            raise ValueError(f"{done}: made with {cell['settings']}, not {settings}; choose another folder")
        return cell
    train_set, select, test = load_digits(seed, rate)
    torch.manual_seed(seed)
    options = {"epochs": epochs, "seed": seed, "progress": False, **RECIPE}
    run = train(make_model(), train_set, select, run_dir=folder, **options)
    table = compare(run, select, test, train_data=train_set, make_student=make_model, distill_options=options)
    table.plan.save(run.folder.plan)
    _save_figures(run, table, select[1], folder / "report")
    cell = {
        "format": "fmn_ref.demo-cell",
        "version": 1,
        "settings": settings,
        "peak_forget_fraction": float(forgetting_curves(run.history).forget.max()),
        **json.loads(table.to_json()),
    }
    _files.write_json(done, cell)
    return cell


def _save_figures(run: Run, table: Comparison, labels: Tensor, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    levels = {"fused": table["KF"].test_accuracy, "student": table["distilled KF"].test_accuracy}
    plot.curves(run.history, **levels).savefig(folder / "curves.png")
    plot.matrix(run.history).savefig(folder / "matrix.png")
    plot.plan_weights(table.plan).savefig(folder / "weights.png")
    plot.last_correct(run.history).savefig(folder / "last_correct.png")
    plot.per_class(run.history, labels).savefig(folder / "per_class.png")


def run_demo(out: Path, n_seeds: int = 5, epochs: int = 40) -> dict[str, Any]:
    """Run every noise rate and seed, write results.json, report.md and report.html to `out`; return the results."""
    _check.number(n_seeds, 1, 10_000, "seeds", int)
    todo = [(rate, seed) for seed in range(n_seeds) for rate in RATES]
    cells: dict[float, list[dict[str, Any]]] = {rate: [] for rate in RATES}
    for i, (rate, seed) in enumerate(bar := _stderr.progress_bar(todo, "demo", unit="run")):
        bar.set_postfix_str(f"{rate:.0%} wrong labels, seed {seed}")
        cells[rate].append(run_cell(out / f"noise_{rate * 100:02.0f}" / f"seed_{seed}", rate, seed, epochs))
        logger.info("%d of %d done: %.0f%% wrong labels, seed %d", i + 1, len(todo), rate * 100, seed)
    noise = {f"{rate:.0%}": _over_seeds(cells[rate]) for rate in RATES}
    results = {"format": "fmn_ref.demo", "version": 1, "n_seeds": n_seeds, "epochs": epochs, "noise": noise}
    _files.write_json(out / "results.json", results)
    _files.write_bytes(out / "report.md", report_text(results).encode())
    images, labels = load_digits(0, RATES[-1])[1]
    write_report(out / SHOWN, out / "report.html", labels=labels, images=images)
    return results


def _over_seeds(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over the seeds of one noise rate, for each method and the peak forget fraction."""
    methods: dict[str, Any] = {}
    for rows in zip(*(cell["rows"] for cell in cells), strict=True):
        measured = {name: _mean_dict([r[name] for r in rows]) for name in MEASURES}
        passes = float(np.mean([r["forward_passes"] for r in rows]))
        methods[rows[0]["method"]] = measured | {"forward_passes": passes}
    return {"methods": methods, "peak_forget_fraction": _mean_dict([cell["peak_forget_fraction"] for cell in cells])}


def _mean_dict(values: list[float]) -> dict[str, float | None]:
    return dict(zip(("mean", "se"), mean_and_error(values), strict=True))


def accuracy_table(results: dict[str, Any]) -> str:
    """Test accuracy in percent, mean ± standard error, with a row per method."""
    noise = results["noise"]
    rows = []
    for method in next(iter(noise.values()))["methods"]:
        found = [n["methods"][method] for n in noise.values()]
        passes = sorted({m["forward_passes"] for m in found})
        span = "-".join(f"{n:.3g}" for n in dict.fromkeys((passes[0], passes[-1])))
        rows.append([method, *(_mean_text(m["test_accuracy"]) for m in found), span])
    peaks = [_mean_text(n["peak_forget_fraction"]) for n in noise.values()]
    rows.append(["*peak forget fraction (selection set)*", *peaks, ""])
    columns = ["method", *(f"{rate} wrong labels" for rate in noise), "forward passes"]
    return markdown_table(columns, rows).replace("|  |", "| |")


def calibration_table(results: dict[str, Any]) -> str:
    """Negative log-likelihood (NLL) and expected calibration error (ECE) on the test set, means over the seeds."""
    columns = [f"{name}, {rate} wrong" for name in ("NLL", "ECE") for rate in results["noise"]]
    rows = [
        [method, *(f"{n['methods'][method][k]['mean']:.3f}" for k in MEASURES[2:] for n in results["noise"].values())]
        for method in CALIBRATED
    ]
    return markdown_table(["method", *columns], rows)


def _mean_text(value: dict[str, Any]) -> str:
    return f"{value['mean'] * 100:.1f}" + ("" if value["se"] is None else f" ± {value['se'] * 100:.1f}")


def report_text(results: dict[str, Any]) -> str:
    """Text of report.md: the table, and the figures of the first seed at the highest noise rate."""
    n_test = 1797 - N_TRAIN - N_SELECT
    figures = "\n".join(f"{text}\n\n![{name}]({SHOWN}/report/{name}.png)\n" for name, text in FIGURES.items())
    return f"""# What the network forgot, and what the fusion recovers

Data: scikit-learn's digits, {N_TRAIN} training images (a share of the labels wrong), {N_SELECT} selection images and
{n_test} test images. Test accuracy in %, mean ± standard error over {results["n_seeds"]} seed(s),
{results["epochs"]} epochs each. Epochs, weights and settings are chosen on the selection images; k is the number of
checkpoints in the plan of KF.

{accuracy_table(results)}
Negative log-likelihood (NLL, in nats) and expected calibration error (ECE) on the test images:

{calibration_table(results)}
## One run: {RATES[-1]:.0%} wrong labels, seed 0

[report.html](report.html) shows this run in more detail.

{figures}"""
