"""Tables and figures of the suite, computed from the pieces' JSON files and nothing else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmn_ref import _files

Float = NDArray[np.float64]
Result = dict[str, Any]
_DRAWS = 10_000
FORMAT = "fmn_ref.paper-piece"
AGAINST = ("final", "KF", "auto")
SHOWN = (
    *("final", "best epoch", "best window", "top", "Caruana", "top at auto's cost", "equally spaced at auto's cost"),
    *("KF(1)", "KF", "KF exact", "greedy", "bagged", "likelihood", "coverage", "auto", "averaged auto"),
    *("EMA", "SWA", "snapshots", "FGE", "distilled final", "distilled KF", "distilled auto", "distilled EMA"),
    *("2 networks, early stopped", "3 networks, early stopped", "5 networks", "5 networks, early stopped"),
    "generations, stopped by selection",
)


def load(folder: Path) -> list[Result]:
    """All finished pieces, by name."""
    return [_files.read_json(path, FORMAT) for path in sorted((folder / "pieces").glob("*.json"))]


def rows_of(result: Result) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in result["rows"]}


def cells(results: list[Result]) -> list[dict[str, Any]]:
    """A cell for each setting and method: mean and standard error over the seeds, costs."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        for method, row in rows_of(result).items():
            found.setdefault((result["setting"], method), []).append(row)
    return [
        {
            "setting": setting,
            "method": method,
            "seeds": len(rows),
            **_mean_se("test_accuracy", [100 * r["test_accuracy"] for r in rows]),
            "forward_passes": float(np.mean([r["forward_passes"] for r in rows])),
            "training_runs": float(np.mean([r["training_runs"] for r in rows])),
        }
        for (setting, method), rows in found.items()
    ]


def _mean_se(name: str, values: list[float]) -> dict[str, float | None]:
    se = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {name: float(np.mean(values)), "standard_error": se}


def paired(results: list[Result], method: str, against: str) -> dict[str, Any] | None:
    """Test accuracy of one method minus another's on the same pieces, in points: the mean over settings, and a 95 %
    bootstrap interval over the settings."""
    by_setting: dict[str, list[float]] = {}
    for result in results:
        rows = rows_of(result)
        if method in rows and against in rows:
            difference = 100 * (rows[method]["test_accuracy"] - rows[against]["test_accuracy"])
            by_setting.setdefault(result["setting"], []).append(difference)
    if not by_setting:
        return None
    means = np.array([np.mean(v) for v in by_setting.values()])
    draws = np.random.default_rng(0).choice(means, (_DRAWS, len(means))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"settings": len(means), "difference": float(means.mean()), "low": float(low), "high": float(high)}


def overall(results: list[Result]) -> list[dict[str, Any]]:
    """A row per method: its mean over its settings, and its differences from the final model, KF and auto."""
    table = cells(results)
    order = list(dict.fromkeys(row["method"] for result in results for row in result["rows"]))
    rows = []
    for method in order:
        own = [c for c in table if c["method"] == method]
        rows.append(
            {
                "method": method,
                "settings": len(own),
                "test_accuracy": float(np.mean([c["test_accuracy"] for c in own])),
                "forward_passes": float(np.mean([c["forward_passes"] for c in own])),
                "training_runs": float(np.mean([c["training_runs"] for c in own])),
                **{f"minus {other}": paired(results, method, other) for other in AGAINST},
            }
        )
    return rows


def budget(results: list[Result]) -> list[dict[str, Any]]:
    """Share of the fusion's gain that is left with fewer checkpoints, over all pieces."""
    sums: dict[tuple[str, float, str], list[tuple[float, float, int]]] = {}
    for result in results:
        rows = rows_of(result)
        for entry in result["budget"]:
            final = rows["final"]["test_accuracy"]
            full = rows[entry["fusion"]]["test_accuracy"] - final
            key = entry["keep"], entry["share"], entry["fusion"]
            sums.setdefault(key, []).append((entry["test_accuracy"] - final, full, entry["n"]))
    return [
        {
            "keep": keep,
            "share": share,
            "fusion": fusion,
            "pieces": len(v),
            "gain": 100 * float(np.mean([g for g, _, _ in v])),
            "full_gain": 100 * float(np.mean([f for _, f, _ in v])),
            "share_of_gain": float(sum(g for g, _, _ in v) / (sum(f for _, f, _ in v) or np.inf)),
            "checkpoints": float(np.mean([n for _, _, n in v])),
        }
        for (keep, share, fusion), v in sums.items()
    ]


def fit_rule(results: list[Result], method: str = "auto") -> dict[str, Any]:
    """Gain of the fusion by least squares on what the history shows; its error on settings that were left out."""
    names = ["peak", "churn", "drop"]
    x = np.array([[1.0, *(r["history"][n] for n in names)] for r in results])
    y = np.array([rows_of(r)[method]["test_accuracy"] - rows_of(r)["final"]["test_accuracy"] for r in results])
    settings = np.array([r["setting"] for r in results])
    error = []
    for setting in np.unique(settings):
        out = settings == setting
        if out.all():
            return {}
        error += list(y[out] - np.clip(x[out] @ np.linalg.lstsq(x[~out], y[~out], rcond=None)[0], 0, 1))
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    return {
        "coefficients": dict(zip(["constant", *names], np.round(coefficients, 4).tolist(), strict=True)),
        "error": float(np.round(np.sqrt(np.mean(np.square(error))), 4)),
        "error_of_the_mean": float(np.round(np.std(y), 4)),
    }


def markdown(results: list[Result]) -> str:
    """All tables."""
    return "\n".join(
        ["# The suite's tables", "", _overall_table(results), *_setting_tables(results), _budget_table(results)]
    )


def _difference(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['difference']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _overall_table(results: list[Result], only: tuple[str, ...] = ()) -> str:
    head = [
        "method",
        "settings",
        "test accuracy",
        *(f"minus {other}" for other in AGAINST),
        "forward passes",
        "training",
    ]
    rows = [
        [
            row["method"],
            str(row["settings"]),
            f"{row['test_accuracy']:.2f}",
            *(_difference(row[f"minus {other}"]) for other in AGAINST),
            f"{row['forward_passes']:.1f}",
            f"{row['training_runs']:.3g}",
        ]
        for row in overall(results)
        if not only or row["method"] in only
    ]
    return _table(head, rows)


def summary(results: list[Result]) -> str:
    """What docs/results.md shows: single runs, students, and what costs more training."""
    return _overall_table(results, SHOWN)


def _setting_tables(results: list[Result]) -> list[str]:
    """A table per data set and augmentation: methods by noises, mean ± standard error."""
    by_cell = {(c["setting"], c["method"]): c for c in cells(results)}
    tables = []
    for dataset in dict.fromkeys(r["dataset"] for r in results):
        for kind in ("plain", "augmented"):
            settings = [s for s in dict.fromkeys(r["setting"] for r in results) if s.startswith(f"{dataset}-")]
            settings = [s for s in settings if s.endswith(kind)]
            if not settings:
                continue
            methods = dict.fromkeys(m for s, m in by_cell if s in settings)
            rows = [[m, *(_cell(by_cell.get((s, m))) for s in settings)] for m in methods]
            seeds = {by_cell[s, "final"]["seeds"] for s in settings}
            noises = [s.split("-")[1] for s in settings]
            count = " to ".join(map(str, sorted(seeds)))
            head = f"## {dataset}, {kind}\n\nMean ± standard error over {count} seeds.\n"
            tables.append(f"{head}\n{_table(['method', *noises], rows)}")
    return tables


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    se = "" if cell["standard_error"] is None else f" ± {cell['standard_error']:.1f}"
    return f"{cell['test_accuracy']:.1f}{se}"


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
    return "## Fewer checkpoints\n\n" + _table(
        ["keep", "fusion", "checkpoints", "gain, points", "of the full gain"], rows
    )


def to_csv(results: list[Result]) -> str:
    out = io.StringIO()
    table = cells(results)
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def to_json(results: list[Result]) -> str:
    content = {
        "overall": overall(results),
        "cells": cells(results),
        "budget": budget(results),
        "rule": fit_rule(results),
    }
    return json.dumps(content, indent=1) + "\n"


def write(folder: Path) -> str:
    """Tables as Markdown, CSV and JSON, and figures, of all finished pieces; the Markdown text."""
    results = load(folder)
    if not results:
        raise ValueError(f"{folder / 'pieces'}: no finished piece")
    for name, content in (("tables.md", markdown), ("tables.csv", to_csv), ("tables.json", to_json)):
        text = content(results).encode()
        _files.write_atomic(folder / name, lambda f, text=text: f.write(text))
    figures(results, folder)
    return markdown(results)


def figures(results: list[Result], folder: Path) -> None:
    from matplotlib.figure import Figure

    def save(name: str, draw: Callable[[Any], None]) -> None:
        figure = Figure((6.4, 3.8), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.savefig(folder / name)

    save("gain.png", lambda axes: _draw_gain(axes, results))
    save("budget.png", lambda axes: _draw_budget(axes, results))


def _draw_gain(axes: Any, results: list[Result]) -> None:
    """Gain of auto against the peak forget fraction."""
    for (dataset, augmented), marker in _kinds(results):
        some = [r for r in results if (r["dataset"], r["augmented"]) == (dataset, augmented)]
        x = [100 * r["history"]["peak"] for r in some]
        y = [100 * (rows_of(r)["auto"]["test_accuracy"] - rows_of(r)["final"]["test_accuracy"]) for r in some]
        axes.plot(x, y, marker, label=f"{dataset}{', augmented' if augmented else ''}", markersize=4)
    axes.axhline(0, color="#6b7280", linewidth=0.8)
    axes.set(xlabel="peak forget fraction on the selection set, %", ylabel="gain over the final model, points")
    axes.legend(frameon=False, fontsize=8)


def _kinds(results: list[Result]) -> list[tuple[tuple[str, bool], str]]:
    kinds = dict.fromkeys((r["dataset"], r["augmented"]) for r in results)
    return list(zip(kinds, ["o", "s", "^", "v", "D", "x", "P", "*"], strict=False))


def _draw_budget(axes: Any, results: list[Result]) -> None:
    """Share of the gain that is left, by the share of checkpoints kept."""
    for fusion in ("KF", "auto"):
        for keep, line in (("budget", "-o"), ("every", ":s")):
            points = [b for b in budget(results) if (b["fusion"], b["keep"]) == (fusion, keep)]
            x, y = [100 * b["share"] for b in points], [100 * b["share_of_gain"] for b in points]
            axes.plot(x, y, line, label=f"{fusion}, keep={keep}:n", markersize=4)
    axes.axhline(95, color="#6b7280", linewidth=0.8)
    axes.set(xlabel="share of the checkpoints kept, %", ylabel="of the gain from all checkpoints, %", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
