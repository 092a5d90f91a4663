"""What rounds of gradient boosting forget under label noise, and what fusing them is worth.

    python -m fmn_ref.benchmarks.boosting [-o benchmarks/results]

scikit-learn's digits and breast_cancer with 0, 20 and 40 % of the training labels wrong (symmetric noise); 300 rounds
at the libraries' own settings. Each seed draws training, selection and test samples (disjoint) and the wrong labels.
Everything is chosen on the selection set, whose labels are right, and scored on the test set: the number of rounds, the
fusion, and what a user would do without this package: stop early, and train again with the selection samples added.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import fmn_ref as fmn
from fmn_ref import _files
from fmn_ref.integrations.boosting import staged_probabilities

from ..speed.metric import machine

SIZES = {"digits": (800, 300), "breast_cancer": (250, 120)}  # to train on, to select on; the rest is scored
RATES = (0.0, 0.2, 0.4)
LIBRARIES = ("scikit-learn", "xgboost", "lightgbm")
ROUNDS, SEEDS, EVERY = 300, 5, 5  # EVERY: of the stored curves
SHOWN = ("final round", "early stopping", "early stopping, log loss", "trained again", "KF", "auto")
COLORS = {"scikit-learn": "#2563eb", "xgboost": "#059669", "lightgbm": "#d97706"}

Array = NDArray[Any]


def make_model(library: str, rounds: int, seed: int) -> Any:
    """The library's own settings but for the number of rounds."""
    if library == "xgboost":
        from xgboost import XGBClassifier

        return XGBClassifier(n_estimators=rounds, learning_rate=0.1, n_jobs=1, random_state=seed)
    if library == "lightgbm":
        from lightgbm import LGBMClassifier

        return LGBMClassifier(n_estimators=rounds, n_jobs=1, random_state=seed, deterministic=True, verbose=-1)
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(max_iter=rounds, early_stopping=False, random_state=seed)


def split(dataset: str, rate: float, seed: int) -> dict[str, tuple[Array, Array]]:
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{dataset}")(return_X_y=True)
    n_train, n_select = SIZES[dataset]
    order = np.random.default_rng(seed).permutation(len(x))
    rows = dict(zip(("train", "select", "test"), np.split(order, [n_train, n_train + n_select]), strict=True))
    parts = {name: (x[r], y[r]) for name, r in rows.items()}
    noisy = fmn.symmetric_noise(parts["train"][1], rate, int(y.max()) + 1, seed)
    return {**parts, "train": (parts["train"][0], noisy)}


def run(library: str, dataset: str, rate: float, seed: int, rounds: int) -> dict[str, Any]:
    """Accuracy of every method on the test set, and the curves there."""
    parts = split(dataset, rate, seed)
    (x, y), (x_select, y_select), (x_test, y_test) = parts["train"], parts["select"], parts["test"]
    model = make_model(library, rounds, seed).fit(x, y)
    select, test = staged_probabilities(model, x_select), staged_probabilities(model, x_test)
    table = fmn.compare_probabilities(select, y_select, test, y_test, allow_overlap=True)  # disjoint by `split`
    accuracy = {row.method: row.test_accuracy for row in table.rows}
    accuracy = {"final round": accuracy.pop("last"), "early stopping": accuracy.pop("best epoch"), **accuracy}
    right, right_test = fmn.correctness(select, y_select), fmn.correctness(test, y_test)
    likelihood = np.log(np.maximum(select[:, np.arange(len(y_select)), y_select], 1e-7)).mean(1)
    accuracy["early stopping, log loss"] = float(right_test[likelihood.argmax()].mean())
    stop = int(right.mean(1).argmax()) + 1
    both = np.concatenate([x, x_select]), np.concatenate([y, y_select])
    again = make_model(library, stop, seed).fit(*both).predict_proba(x_test)
    accuracy["trained again"] = float((again.argmax(1) == y_test).mean())
    curves = fmn.forgetting_curves(right_test)
    rest = (0, rounds - len(right))  # LightGBM stops where no leaf can be split
    return {
        "seed": seed,
        "peak_forget": float(curves.forget.max()),
        "rounds": len(right),
        "stopped_at": stop,
        "test_accuracy": {name: round(value, 6) for name, value in accuracy.items()},
        "accuracy": np.pad(curves.accuracy, rest, "edge")[EVERY - 1 :: EVERY].round(5).tolist(),
        "forget": np.pad(curves.forget, rest, "edge")[EVERY - 1 :: EVERY].round(5).tolist(),
    }


def benchmark(output: str | None = None, rounds: int = ROUNDS, seeds: int = SEEDS) -> dict[str, Any]:
    """Every library, data set, noise rate and seed; writes boosting.json and .png."""
    cells = []
    todo = [(library, dataset, rate) for dataset in SIZES for rate in RATES for library in LIBRARIES]
    for library, dataset, rate in (bar := tqdm(todo, "boosting", disable=None)):
        bar.set_postfix_str(f"{dataset}, {rate:.0%}, {library}")
        found = [run(library, dataset, rate, seed, rounds) for seed in range(seeds)]
        curves = {
            name: np.mean([f.pop(name) for f in found], axis=0).round(5).tolist() for name in ("accuracy", "forget")
        }
        cells.append({"library": library, "dataset": dataset, "rate": rate, "seeds": found, **curves})
    versions = {name: metadata.version(name) for name in LIBRARIES}
    result = {
        "format": "fmn_ref.boosting-benchmark",
        "version": 1,
        "machine": {**machine(), **versions},
        "rounds": rounds,
        "every": EVERY,
        "cells": cells,
    }
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        _files.write_json(folder / "boosting.json", result)
        draw(result, folder / "boosting.png")
    return result


def mean_error(values: Any) -> tuple[float, float]:
    """Mean and standard error, in percent."""
    a = 100 * np.asarray(values)
    return float(a.mean()), float(a.std(ddof=1) / np.sqrt(len(a))) if len(a) > 1 else 0.0


def accuracies(cell: dict[str, Any], method: str) -> Array:
    return np.array([seed["test_accuracy"][method] for seed in cell["seeds"]])


def markdown(result: dict[str, Any]) -> str:
    """Two tables: every cell; and what "auto" gains over each method, the libraries and data sets averaged."""
    head = ["data", "wrong labels", "library", "peak F_e", *SHOWN, "auto - final", "auto - early stopping"]
    lines = [f"| {' | '.join(head)} |", "|---|--:|---" + "|--:" * (len(head) - 3) + "|"]
    for cell in result["cells"]:
        values = [mean_error([s["peak_forget"] for s in cell["seeds"]])]
        values += [mean_error(accuracies(cell, method)) for method in SHOWN]
        texts = [f"{mean:.1f} ± {error:.1f}" for mean, error in values]
        for method in ("final round", "early stopping"):
            mean, error = mean_error(accuracies(cell, "auto") - accuracies(cell, method))
            texts.append(f"{mean:+.1f} ± {error:.1f}")
        names = [cell["dataset"], f"{cell['rate']:.0%}", cell["library"]]
        lines.append(f"| {' | '.join(names + texts)} |")
    return "\n".join(lines) + "\n\n" + _gains(result)


def _gains(result: dict[str, Any]) -> str:
    methods = [m for m in result["cells"][0]["seeds"][0]["test_accuracy"] if m != "auto"]
    lines = ["| auto minus | " + " | ".join(f"{r:.0%} wrong labels" for r in RATES) + " |", "|---" + "|--:" * 3 + "|"]
    for method in methods:
        texts = []
        for rate in RATES:
            cells = [c for c in result["cells"] if c["rate"] == rate]
            gains = np.mean([accuracies(c, "auto") - accuracies(c, method) for c in cells], axis=0)  # (n_seeds,)
            mean, error = mean_error(gains)
            texts.append(f"{mean:+.2f} ± {error:.2f}")
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy and forget fraction on the test set per round, mean over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure((9.6, 5.4), dpi=120, layout="constrained")
    grid = figure.subplots(len(SIZES), len(RATES), sharex=True, sharey="row", squeeze=False)
    for cell in result["cells"]:
        axes = grid[list(SIZES).index(cell["dataset"]), RATES.index(cell["rate"])]
        rounds = np.arange(1, len(cell["accuracy"]) + 1) * result["every"]
        color = COLORS[cell["library"]]
        axes.plot(rounds, cell["accuracy"], color=color, label=cell["library"])
        axes.plot(rounds, cell["forget"], color=color, linestyle=":", label="forget fraction $F_e$")
        axes.axhline(accuracies(cell, "auto").mean(), color=color, linestyle="--", linewidth=0.8, label="fused (auto)")
        axes.set_title(f"{cell['dataset']}, {cell['rate']:.0%} wrong labels", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1)
    for axes in grid[-1]:
        axes.set_xlabel("round")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of test samples")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside lower center"
    )
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", help="folder for boosting.json and boosting.png")
    parser.add_argument("--from-json", help="print the tables, and draw the figure, of a boosting.json")
    arguments = parser.parse_args()
    if arguments.from_json:
        result = json.loads(Path(arguments.from_json).read_text())
        draw(result, Path(arguments.from_json).with_suffix(".png"))
    else:
        result = benchmark(arguments.output)
    print(markdown(result))


if __name__ == "__main__":
    main()
