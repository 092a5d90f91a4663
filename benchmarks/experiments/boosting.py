"""Gradient boosting under label noise: what the rounds forget, and what fusing them gains.

    fmn-ref bench boosting [-o benchmarks/results]

Data: scikit-learn's digits and breast_cancer with 0, 20 and 40 % of the training labels wrong (symmetric noise).
Models: 300 rounds with each library's own settings. Each seed draws disjoint training, selection and test samples, and
the wrong labels. The selection set has correct labels; it chooses the number of rounds and the fusion. The controls
need no fusion: stop early, and train again on the training and selection samples together.

A setting is a library, a data set and a noise rate. The result lists the settings under "cells".
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fmn_ref as fmn
from fmn_ref import _stderr
from fmn_ref.integrations.boosting import staged_probabilities
from fmn_ref.reporting.tables import markdown_table, mean_and_error

from ..common import machine, write_result

SIZES = {"digits": (800, 300), "breast_cancer": (250, 120)}  # training, selection; the other samples are scored
RATES = (0.0, 0.2, 0.4)
LIBRARIES = ("scikit-learn", "xgboost", "lightgbm")
ROUNDS, SEEDS = 300, 5
EVERY = 5  # rounds between two points of a stored curve
SHOWN = ("final round", "early stopping", "early stopping, log loss", "trained again", "KF", "auto")
COLORS = {"scikit-learn": "#2563eb", "xgboost": "#059669", "lightgbm": "#d97706"}

Array = NDArray[Any]


def make_classifier(library: str, rounds: int, seed: int) -> Any:
    """Make a classifier with the library's own settings, except for the number of rounds."""
    if library == "xgboost":
        from xgboost import XGBClassifier

        return XGBClassifier(n_estimators=rounds, learning_rate=0.1, n_jobs=1, random_state=seed)
    if library == "lightgbm":
        from lightgbm import LGBMClassifier

        return LGBMClassifier(n_estimators=rounds, n_jobs=1, random_state=seed, deterministic=True, verbose=-1)
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(max_iter=rounds, early_stopping=False, random_state=seed)


def draw_sets(dataset: str, rate: float, seed: int) -> dict[str, tuple[Array, Array]]:
    """Draw disjoint sets "train", "select" and "test"; only the labels of "train" are noisy."""
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{dataset}")(return_X_y=True)
    n_train, n_select = SIZES[dataset]
    order = np.random.default_rng(seed).permutation(len(x))
    rows = dict(zip(("train", "select", "test"), np.split(order, [n_train, n_train + n_select]), strict=True))
    sets = {name: (x[r], y[r]) for name, r in rows.items()}
    noisy = fmn.symmetric_noise(sets["train"][1], rate, int(y.max()) + 1, seed)
    return {**sets, "train": (sets["train"][0], noisy)}


def run_seed(library: str, dataset: str, rate: float, seed: int, rounds: int) -> dict[str, Any]:
    """Train once; return every method's test accuracy and the curves on the test set."""
    sets = draw_sets(dataset, rate, seed)
    (x_select, y_select), (x_test, y_test) = sets["select"], sets["test"]
    model = make_classifier(library, rounds, seed).fit(*sets["train"])
    select, test = staged_probabilities(model, x_select), staged_probabilities(model, x_test)
    accuracy = mixed_accuracies(select, y_select, test, y_test)
    right, right_test = fmn.correctness(select, y_select), fmn.correctness(test, y_test)
    likelihood = np.log(np.maximum(select[:, np.arange(len(y_select)), y_select], 1e-7)).mean(1)
    accuracy["early stopping, log loss"] = float(right_test[likelihood.argmax()].mean())
    stop = int(right.mean(1).argmax()) + 1
    both = [np.concatenate(parts) for parts in zip(sets["train"], sets["select"], strict=True)]
    again = make_classifier(library, stop, seed).fit(*both).predict_proba(x_test)
    accuracy["trained again"] = float((again.argmax(1) == y_test).mean())
    curves = fmn.forgetting_curves(right_test)
    rest = (0, rounds - len(right))  # LightGBM stops when no leaf can be split
    return {
        "seed": seed,
        "peak_forget": float(curves.forget.max()),
        "rounds": len(right),
        "stopped_at": stop,
        "test_accuracy": {name: round(value, 6) for name, value in accuracy.items()},
        "accuracy": np.pad(curves.accuracy, rest, "edge")[EVERY - 1 :: EVERY].round(5).tolist(),
        "forget": np.pad(curves.forget, rest, "edge")[EVERY - 1 :: EVERY].round(5).tolist(),
    }


def mixed_accuracies(select: Array, y_select: Array, test: Array, y_test: Array) -> dict[str, float]:
    """Test accuracies of single rounds and of every mixture of rounds."""
    table = fmn.compare_probabilities(select, y_select, test, y_test, allow_overlap=True)  # the sets are disjoint
    accuracy = {row.method: row.test_accuracy for row in table.rows}
    return {"final round": accuracy.pop("last"), "early stopping": accuracy.pop("best epoch"), **accuracy}


def benchmark(output: str | None = None, rounds: int = ROUNDS, seeds: int = SEEDS) -> dict[str, Any]:
    """Run every library, data set, noise rate and seed; write boosting.json and boosting.png into `output`."""
    settings = []
    todo = [(library, dataset, rate) for dataset in SIZES for rate in RATES for library in LIBRARIES]
    for library, dataset, rate in (bar := _stderr.progress_bar(todo, "boosting")):
        bar.set_postfix_str(f"{dataset}, {rate:.0%}, {library}")
        found = [run_seed(library, dataset, rate, seed, rounds) for seed in range(seeds)]
        curves = {
            name: np.mean([f.pop(name) for f in found], axis=0).round(5).tolist() for name in ("accuracy", "forget")
        }
        settings.append({"library": library, "dataset": dataset, "rate": rate, "seeds": found, **curves})
    versions = {name: metadata.version(name) for name in LIBRARIES}
    result = {
        "format": "fmn_ref.boosting-benchmark",
        "version": 1,
        "machine": {**machine(), **versions},
        "rounds": rounds,
        "every": EVERY,
        "cells": settings,
    }
    if output is not None:
        draw(result, write_result(output, "boosting", result) / "boosting.png")
    return result


def accuracies(setting: dict[str, Any], method: str) -> Array:
    """Test accuracies (n_seeds,) in percent."""
    return 100 * np.array([seed["test_accuracy"][method] for seed in setting["seeds"]])


def markdown(result: dict[str, Any]) -> str:
    """Two tables: all settings, and the gain of "auto" over each method."""
    return _settings_table(result) + "\n" + _gains_table(result)


def _settings_table(result: dict[str, Any]) -> str:
    columns = ["data", "wrong labels", "library", "peak F_e", *SHOWN, "auto - final", "auto - early stopping"]
    rows = []
    for setting in result["cells"]:
        peaks = 100 * np.array([seed["peak_forget"] for seed in setting["seeds"]])
        values = [peaks, *(accuracies(setting, method) for method in SHOWN)]
        gains = [accuracies(setting, "auto") - accuracies(setting, m) for m in ("final round", "early stopping")]
        names = [setting["dataset"], f"{setting['rate']:.0%}", setting["library"]]
        rows.append([*names, *(_percent_and_error(v) for v in values), *(_percent_and_error(v, "+") for v in gains)])
    return markdown_table(columns, rows, 3)


def _gains_table(result: dict[str, Any]) -> str:
    """Mean gain of "auto" over the libraries and data sets, by noise rate."""
    rows = []
    for method in result["cells"][0]["seeds"][0]["test_accuracy"]:
        if method != "auto":
            rows.append([method, *(_percent_and_error(_mean_gains(result, method, rate), "+", 2) for rate in RATES)])
    return markdown_table(["auto minus", *(f"{rate:.0%} wrong labels" for rate in RATES)], rows)


def _mean_gains(result: dict[str, Any], method: str, rate: float) -> Array:
    """Gains of "auto" (n_seeds,), averaged over the settings with this noise rate."""
    settings = [s for s in result["cells"] if s["rate"] == rate]
    return np.asarray(np.mean([accuracies(s, "auto") - accuracies(s, method) for s in settings], axis=0))


def _percent_and_error(values: Array, sign: str = "", digits: int = 1) -> str:
    """Mean ± standard error over the seeds."""
    mean, error = mean_and_error(values.tolist())
    return f"{mean:{sign}.{digits}f} ± {error or 0.0:.{digits}f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy and forget fraction on the test set per round, averaged over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure((9.6, 5.4), dpi=120, layout="constrained")
    grid = figure.subplots(len(SIZES), len(RATES), sharex=True, sharey="row", squeeze=False)
    for setting in result["cells"]:
        axes = grid[list(SIZES).index(setting["dataset"]), RATES.index(setting["rate"])]
        _draw_setting(axes, setting, result["every"])
    for axes in grid[-1]:
        axes.set_xlabel("round")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of test samples")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside lower center"
    )
    figure.savefig(path)


def _draw_setting(axes: Any, setting: dict[str, Any], every: int) -> None:
    rounds = np.arange(1, len(setting["accuracy"]) + 1) * every
    fused = accuracies(setting, "auto").mean() / 100
    color = COLORS[setting["library"]]
    axes.plot(rounds, setting["accuracy"], color=color, label=setting["library"])
    axes.plot(rounds, setting["forget"], color=color, linestyle=":", label="forget fraction")
    axes.axhline(fused, color=color, linestyle="--", linewidth=0.8, label="fused (auto)")
    axes.set_title(f"{setting['dataset']}, {setting['rate']:.0%} wrong labels", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1)
