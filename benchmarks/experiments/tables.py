"""Tables of the suite, computed from the pieces' JSON files alone.

A piece is one task (data set and network), noise, augmentation and seed. A setting is a piece without its seed. A kind
is a setting without its noise: a row of the tables that have the noises as columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fmn_ref import _files
from fmn_ref.reporting.tables import csv_table, markdown_table, mean_and_error

Result = dict[str, Any]  # of a piece
DRAWS = 10_000  # of the bootstrap
FORMAT = "fmn_ref.paper-piece"
AGAINST = ("final", "KF", "Caruana")
MEASURES = ("test_accuracy", "test_nll", "test_ece", "forward_passes", "training_runs")
FUSIONS = (
    *("final", "best epoch", "best window", "last", "top", "equally spaced at KF's cost", "Caruana"),
    *("KF(1)", "KF", "KF exact", "greedy", "bagged", "likelihood", "coverage", "pool", "auto"),
)
SINGLE_NETWORKS = (
    *("final", "EMA", "SWA", "EMA over epochs", "SWA over epochs", "averaged KF", "averaged pool"),
    *("distilled final", "distilled KF", "distilled pool", "distilled auto", "distilled EMA"),
    *("distilled 5 networks, early stopped", "2 networks, early stopped", "3 networks, early stopped"),
    *("5 networks", "5 networks, early stopped", "snapshots", "FGE"),
)
AT_SYM40 = ("final", "KF", "Caruana", "EMA", "pool", "distilled pool", "5 networks", "5 networks, early stopped")
TEMPERATURES = ("pool", "distilled pool", "distilled pool, weights of sum 1", "distilled pool, temperature 2")
RESNET = "cifar100_resnet18"  # name of the middle scale's first task
NOISES = ("clean", "sym20", "sym40", "asym40", "human")


def load_results(folder: Path) -> list[Result]:
    """Results of all finished pieces, in the order of their names."""
    return [_files.read_json(path, FORMAT) for path in sorted((folder / "pieces").glob("*.json"))]


def rows_of(result: Result) -> dict[str, dict[str, Any]]:
    """Rows of a piece by method."""
    return {row["method"]: row for row in result["rows"]}


def setting_rows(results: list[Result]) -> list[dict[str, Any]]:
    """A row for each setting and method: mean and standard error over the seeds, and costs.

    With one seed, the error is that of the accuracy over the test samples.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        for method, row in rows_of(result).items():
            found.setdefault((result["setting"], method), []).append({**row, "n": result["sizes"]["test"]})
    table = []
    for (setting, method), rows in found.items():
        accuracy, error = mean_and_error([100 * r["test_accuracy"] for r in rows])
        if error is None:
            error = 100 * _sampling_error(rows[0]["test_accuracy"], rows[0]["n"])
        means = {name: float(np.mean([r[name] for r in rows])) for name in MEASURES[1:]}
        row = {"setting": setting, "method": method, "seeds": len(rows), "test_accuracy": accuracy}
        table.append({**row, "standard_error": error, **means})
    return table


def paired(results: list[Result], method: str, against: str) -> dict[str, Any] | None:
    """Compare the test accuracies of two methods on the same pieces, in points.

    Returns the mean difference over the settings and its 95 % bootstrap interval over the settings; None if no piece
    has both methods.
    """
    by_setting: dict[str, list[float]] = {}
    for result in results:
        rows = rows_of(result)
        if method in rows and against in rows:
            difference = 100 * (rows[method]["test_accuracy"] - rows[against]["test_accuracy"])
            by_setting.setdefault(result["setting"], []).append(difference)
    if not by_setting:
        return None
    means = np.array([np.mean(v) for v in by_setting.values()])
    draws = np.random.default_rng(0).choice(means, (DRAWS, len(means))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"settings": len(means), "difference": float(means.mean()), "low": float(low), "high": float(high)}


def overall(results: list[Result]) -> list[dict[str, Any]]:
    """A row for each method: means over its settings, and its differences from `AGAINST`."""
    table = setting_rows(results)
    rows = []
    for method in dict.fromkeys(row["method"] for result in results for row in result["rows"]):
        own = [row for row in table if row["method"] == method]
        means = {name: float(np.mean([row[name] for row in own])) for name in MEASURES}
        differences = {f"minus {other}": paired(results, method, other) for other in AGAINST}
        rows.append({"method": method, "settings": len(own), **means, **differences})
    return rows


def budget(results: list[Result]) -> list[dict[str, Any]]:
    """Share of the fusion's gain that remains with fewer checkpoints, over all pieces."""
    sums: dict[tuple[str, float, str], list[tuple[float, float, int]]] = {}
    for result in results:
        rows = rows_of(result)
        for entry in result["budget"]:
            final = rows["final"]["test_accuracy"]
            full = rows[entry["fusion"]]["test_accuracy"] - final
            key = entry["keep"], entry["share"], entry["fusion"]
            sums.setdefault(key, []).append((entry["test_accuracy"] - final, full, entry["n"]))
    return [dict(zip(("keep", "share", "fusion"), key, strict=True)) | _budget_means(v) for key, v in sums.items()]


def _budget_means(values: list[tuple[float, float, int]]) -> dict[str, Any]:
    """Means over the pieces of (gain, gain from all checkpoints, number of checkpoints)."""
    gains, full_gains, checkpoints = zip(*values, strict=True)
    return {
        "pieces": len(values),
        "gain": 100 * float(np.mean(gains)),
        "full_gain": 100 * float(np.mean(full_gains)),
        "share_of_gain": float(sum(gains) / (sum(full_gains) or np.inf)),
        "checkpoints": float(np.mean(checkpoints)),
    }


def few_labels_table(results: list[Result]) -> str:
    """Mean gain over the final model, in points, of fusions chosen on few samples: noisy pieces, then clean ones."""
    sums: dict[tuple[str, int, str], list[float]] = {}
    for result in results:
        final = rows_of(result)["final"]["test_accuracy"]
        labels = "correct" if result["noise"] == "clean" else "noisy"
        for entry in result["few_labels"]:
            gain = 100 * (entry["test_accuracy"] - final)
            sums.setdefault((labels, entry["n"], entry["fusion"]), []).append(gain)
    fusions = list(dict.fromkeys(fusion for _, _, fusion in sums))
    keys = sorted({key[:2] for key in sums}, key=lambda key: (key[0] != "noisy", key[1]))
    rows = []
    for labels, n in keys:
        gains = [sums[labels, n, fusion] for fusion in fusions]
        rows.append([labels, str(n), str(len(gains[0])), *(f"{np.mean(g):+.2f}" for g in gains)])
    return markdown_table(["training labels", "selection samples", "pieces", *fusions], rows)


def fit_rule(results: list[Result], method: str = "pool") -> dict[str, Any]:
    """Fit a fusion's gain to features of the history by least squares; cross-validate over the settings.

    `error` is the root mean square error on settings that were left out.
    """
    names = ["peak", "churn", "drop"]
    x = np.array([[1.0, *(r["history"][n] for n in names)] for r in results])  # (n_pieces, 4)
    y = np.array([rows_of(r)[method]["test_accuracy"] - rows_of(r)["final"]["test_accuracy"] for r in results])
    settings = np.array([r["setting"] for r in results])
    if (settings == settings[0]).all():
        return {}
    errors: list[float] = []
    for setting in np.unique(settings):
        out = settings == setting
        errors += list(y[out] - np.clip(x[out] @ np.linalg.lstsq(x[~out], y[~out], rcond=None)[0], 0, 1))
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    return {
        "coefficients": {n: float(np.round(c, 4)) for n, c in zip(["constant", *names], coefficients, strict=True)},
        "error": float(np.round(np.sqrt(np.mean(np.square(errors))), 4)),
        "error_of_the_mean": float(np.round(np.std(y), 4)),
    }


def markdown(results: list[Result]) -> str:
    """All tables."""
    few = "## Few selection samples\n\n" + few_labels_table(results)
    tables = [overall_table(results), *_kind_tables(results), _budget_table(results), few]
    return "\n".join(["# The suite's tables", "", *tables])


def quoted(small: list[Result], middle: list[Result]) -> dict[str, str]:
    """The tables in docs/results.md, from the pieces of both scales."""
    every = [*small, *middle]
    noisy, clean = ([r for r in small if (r["noise"] == "clean") == correct] for correct in (False, True))
    augmented, noisy = ([r for r in noisy if r["augmented"] == wanted] for wanted in (True, False))
    tables = {
        "forgotten": noise_table(every, peak),
        "fusions, wrong labels": overall_table(noisy, FUSIONS),
        "fusions, wrong labels, augmented": overall_table(augmented, FUSIONS),
        "fusions, correct labels": overall_table(clean, FUSIONS),
        "gain": noise_table(every, difference("pool", "final")),
        "single networks": overall_table(noisy, SINGLE_NETWORKS),
        "student minus pool": noise_table(every, difference("distilled pool", "pool")),
        "few labels": few_labels_table(small),
        "sym40": setting_table([r for r in noisy if r["noise"] == "sym40"], AT_SYM40),
        "temperatures": setting_table([r for r in small if TEMPERATURES[-1] in rows_of(r)], TEMPERATURES),
    }
    if middle:
        noisy, clean = ([r for r in middle if (r["noise"] == "clean") == correct] for correct in (False, True))
        resnet, constant = ([r for r in middle if r["dataset"] == RESNET + end] for end in ("", "_constant"))
        tables |= {
            "middle scale, wrong labels": overall_table(noisy, FUSIONS),
            "middle scale, correct labels": overall_table(clean, FUSIONS),
            "middle scale, ResNet": kind_table(resnet, FUSIONS + SINGLE_NETWORKS[1:]),
            "constant rate": kind_table(constant, FUSIONS + SINGLE_NETWORKS[1:]),
        }
    return tables


def setting_table(results: list[Result], methods: tuple[str, ...]) -> str:
    """A row for each setting and a column for each method: mean test accuracy over the seeds, in percent."""
    cells = {(row["setting"], row["method"]): f"{row['test_accuracy']:.1f}" for row in setting_rows(results)}
    settings = dict.fromkeys(r["setting"] for r in results)
    return markdown_table(["setting", *methods], [[s, *(cells.get((s, m), "") for m in methods)] for s in settings])


def overall_table(results: list[Result], only: tuple[str, ...] = ()) -> str:
    """A row for each method, or for some of them in the given order."""
    against = [f"minus {other}" for other in AGAINST]
    columns = ["method", "settings", "test accuracy", *against, "NLL", "ECE", "forward passes", "training"]
    found = {row["method"]: row for row in overall(results)}
    rows = []
    for method in only or found:
        if row := found.get(method):
            differences = [_difference_text(row[name]) for name in against]
            scores = [f"{row['test_nll']:.3f}", f"{row['test_ece']:.3f}"]
            costs = [f"{row['forward_passes']:.1f}", f"{row['training_runs']:.3g}"]
            rows.append([method, str(row["settings"]), f"{row['test_accuracy']:.2f}", *differences, *scores, *costs])
    return markdown_table(columns, rows)


Measured = tuple[float, float | None]  # a number of a piece, and its standard error over the samples


def noise_table(results: list[Result], measure: Callable[[Result], Measured | None]) -> str:
    """A row for each kind and a column for each noise: mean ± standard error over the seeds, in percent.

    With one seed, the error is the one over the samples.
    """
    found: dict[str, dict[str, list[Measured]]] = {}
    for result in results:
        measured = measure(result)
        if measured is not None:
            found.setdefault(kind_of(result), {}).setdefault(result["noise"], []).append(measured)
    noises = [n for n in NOISES if any(n in row for row in found.values())]
    rows = [[kind, *(_measured_text(row.get(noise, [])) for noise in noises)] for kind, row in found.items()]
    return markdown_table(["data", *noises], rows)


def kind_of(result: Result) -> str:
    """Name of the task, and whether it is augmented."""
    return f"{result['dataset']}{', augmented' if result['augmented'] else ''}"


def peak(result: Result) -> Measured:
    """Peak forget fraction on the selection set."""
    share = float(result["history"]["peak"])
    return share, _sampling_error(share, result["sizes"]["select"])


def difference(method: str, other: str) -> Callable[[Result], Measured | None]:
    """Test accuracy of a method minus that of another, for a result that has both."""

    def measure(result: Result) -> Measured | None:
        rows = rows_of(result)
        if method not in rows or other not in rows:
            return None
        error = rows[method]["gain_error"] if other == "final" else None
        return float(rows[method]["test_accuracy"] - rows[other]["test_accuracy"]), error

    return measure


def _sampling_error(share: float, n: int) -> float:
    return float(np.sqrt(share * (1 - share) / n))


def _measured_text(values: list[Measured]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error([v for v, _ in values])
    error = values[0][1] if len(values) == 1 else error
    return f"{100 * mean:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _difference_text(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['difference']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})"


def _kind_tables(results: list[Result]) -> list[str]:
    """A titled table for each kind."""
    kinds: dict[str, list[Result]] = {}
    for result in results:
        kinds.setdefault(kind_of(result), []).append(result)
    return [f"## {kind}\n\n{kind_table(some)}" for kind, some in kinds.items()]


def kind_table(results: list[Result], only: tuple[str, ...] = ()) -> str:
    """Methods by noises, mean ± standard error, for results of one kind; `only` chooses and orders the methods."""
    rows = {(row["setting"], row["method"]): row for row in setting_rows(results)}
    settings = {r["noise"]: r["setting"] for r in results}
    cells = [
        [method, *(_accuracy_text(rows.get((setting, method))) for setting in settings.values())]
        for method in only or dict.fromkeys(method for _, method in rows)
    ]
    return markdown_table(["method", *settings], [row for row in cells if any(row[1:])])


def _accuracy_text(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['test_accuracy']:.1f} ± {row['standard_error']:.1f}"


def _budget_table(results: list[Result]) -> str:
    rows = [
        [
            f"{b['keep']}, {b['share']:.0%}",
            b["fusion"],
            f"{b['checkpoints']:.1f}",
            f"{b['gain']:.2f}",
            f"{b['share_of_gain']:.0%}",
        ]
        for b in budget(results)
    ]
    columns = ["keep", "fusion", "checkpoints", "gain, points", "of the full gain"]
    return "## Fewer checkpoints\n\n" + markdown_table(columns, rows)


def to_csv(results: list[Result]) -> str:
    """The rows of `setting_rows` as CSV."""
    table = setting_rows(results)
    return csv_table(list(table[0]), [list(row.values()) for row in table])


def to_json(results: list[Result]) -> str:
    """All numbers of the tables as JSON."""
    content = {
        "overall": overall(results),
        "cells": setting_rows(results),
        "budget": budget(results),
        "rule": fit_rule(results),
    }
    return json.dumps(content, indent=1) + "\n"
