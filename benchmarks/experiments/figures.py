"""Figures of the suite, drawn from the pieces' JSON files; and `write`, which makes its tables and figures.

| figure | question |
|---|---|
| forgotten.png | How much is forgotten? |
| methods.png | What does fusing bring? |
| students.png | Can one network hold it? |
| gain.png | When does it not help? |
| budget.png | How many checkpoints does it take? |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fmn_ref import _files

from . import tables
from .tables import FUSIONS, Result, budget, difference, kind_of, load_results, paired, peak

MOST_INSIDE = 8  # entries of a legend inside the axes
MARKERS = ("o", "s", "^", "v", "D", "x", "P", "*", "<", ">", "+", "h")


def write(folder: Path) -> str:
    """Write the tables of all finished pieces as Markdown, CSV and JSON, and the figures; return the Markdown."""
    results = load_results(folder)
    if not results:
        raise ValueError(f"{folder / 'pieces'}: no finished piece")
    text = tables.markdown(results)
    for ending, content in (("md", text), ("csv", tables.to_csv(results)), ("json", tables.to_json(results))):
        with _files.replacing(folder / f"tables.{ending}") as path:
            path.write_text(content)
    draw(results, folder)
    return text


def draw(results: list[Result], folder: Path) -> None:
    """Draw every figure."""
    from matplotlib.figure import Figure

    for name, draw_axes in FIGURES.items():
        figure = Figure((6.4, 3.8), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw_axes(axes, results)
        if n := len(axes.get_legend_handles_labels()[0]):
            beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if n > MOST_INSIDE else {}
            axes.legend(frameon=False, fontsize=7, **beside)
        figure.savefig(folder / name)


def _draw_forgotten(axes: Any, results: list[Result]) -> None:
    """Plot the forget fraction over the run, one line for each setting: the mean over its seeds."""
    settings: dict[str, list[Result]] = {}
    for result in results:
        if result["noise"] in ("clean", "sym40"):
            settings.setdefault(result["setting"], []).append(result)
    colors = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(map(kind_of, results)))}
    for some in settings.values():
        curve = 100 * np.mean([r["curves"]["forget"] for r in some], axis=0)
        line = ":" if some[0]["noise"] == "clean" else "-"
        kind = kind_of(some[0])
        x = np.arange(1, len(curve) + 1) / len(curve)
        axes.plot(x, curve, line, color=colors[kind], label=f"{kind}, {some[0]['noise']}")
    axes.set(xlabel="share of the run", ylabel="forget fraction on the selection set, %")


def _draw_methods(axes: Any, results: list[Result]) -> None:
    """Plot each fusion's mean difference from KF with its 95 % interval, for wrong and for correct labels."""
    methods = [m for m in FUSIONS if m not in ("final", "KF")]
    for i, name in enumerate(("wrong labels", "correct labels")):
        some = [r for r in results if (r["noise"] == "clean") == (name == "correct labels")]
        found = {m: d for m in methods if (d := paired(some, m, "KF"))}
        x = [d["difference"] for d in found.values()]
        sides = [[abs(d[end] - d["difference"]) for d in found.values()] for end in ("low", "high")]
        y = [len(methods) - methods.index(m) - 0.25 * i for m in found]
        axes.errorbar(x, y, xerr=sides, fmt="os"[i], markersize=4, linewidth=1, label=name)
    axes.axvline(0, color="#6b7280", linewidth=0.8)
    axes.set_yticks(range(len(methods), 0, -1), methods, fontsize=7)
    axes.set(xlabel="test accuracy minus KF's, points")


def _draw_gain(axes: Any, results: list[Result]) -> None:
    """Plot the gain of the pool against the peak forget fraction."""
    _draw_points(axes, results, peak, difference("pool", "final"))
    axes.set(xlabel="peak forget fraction on the selection set, %", ylabel="pool minus final model, points")


def _draw_students(axes: Any, results: list[Result]) -> None:
    """Plot the gain of the pool's student against the gain of the pool; on the line the student has all of it."""
    _draw_points(axes, results, difference("pool", "final"), difference("distilled pool", "final"))
    ends = [max(axes.get_xlim()[0], axes.get_ylim()[0]), min(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(ends, ends, color="#6b7280", linewidth=0.8)
    axes.set(xlabel="pool minus final model, points", ylabel="its student minus final model, points")


def _draw_points(axes: Any, results: list[Result], x: Any, y: Any) -> None:
    """Plot a point for each piece that has both values, in percent, with a marker for each kind."""
    for kind, marker in zip(dict.fromkeys(map(kind_of, results)), MARKERS, strict=False):
        pairs = [(x(r), y(r)) for r in results if kind_of(r) == kind]
        points = [(100 * a[0], 100 * b[0]) for a, b in pairs if a is not None and b is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=kind, markersize=4, linestyle="none")
    axes.axhline(0, color="#6b7280", linewidth=0.8)


def _draw_budget(axes: Any, results: list[Result]) -> None:
    """Plot the share of the gain that remains against the share of the checkpoints kept."""
    for fusion in ("KF", "pool"):
        for keep, line in (("budget", "-o"), ("every", ":s")):
            points = [b for b in budget(results) if (b["fusion"], b["keep"]) == (fusion, keep)]
            x, y = [100 * b["share"] for b in points], [100 * b["share_of_gain"] for b in points]
            axes.plot(x, y, line, label=f"{fusion}, keep={keep}:n", markersize=4)
    axes.axhline(95, color="#6b7280", linewidth=0.8)
    axes.set(xlabel="share of the checkpoints kept, %", ylabel="of the gain from all checkpoints, %", ylim=(0, None))


FIGURES = {
    "forgotten.png": _draw_forgotten,
    "methods.png": _draw_methods,
    "students.png": _draw_students,
    "gain.png": _draw_gain,
    "budget.png": _draw_budget,
}
