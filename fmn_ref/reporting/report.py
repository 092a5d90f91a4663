"""Write one HTML file that shows what a run forgot. NumPy only.

    fmn-ref report RUN_DIR -o report.html

Lines are SVG and pictures are PNG, inside the file. The template report.html.in holds the fixed text, and the CSS that
adapts the page to the screen and to light or dark. The page has no script and escapes every text. Its content security
policy forbids it to load anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files
from .._check import Bool, Int
from ..fusion.expectation import expected_gain
from ..fusion.methods import summaries
from ..fusion.plan import FusionPlan
from ..metrics.curves import ForgettingCurves, forgetting_curves, forgetting_matrix
from ..metrics.groups import group_members
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest
from ..metrics.overview import first_samples
from ..metrics.samples import SampleStatistics, sample_statistics
from ..runs.load import load_array
from ..runs.run import Run
from ..runs.text import read_ids
from . import html
from .comparison import KF, read_comparison, row_summaries

MATRIX_ROWS, TABLE_ROWS = 200, 500  # longer ones show every k-th epoch
CARDS, BARS = 24, 40
# From nothing to much in one hue, so that only lightness counts. A ramp starts at the colour of the page.
RAMPS = {
    "ramp_light": "#f4f7fa, #b5d2ea, #5b9fd2, #1f69ae, #08306b",
    "ramp_dark": "#1c2126, #123f70, #2a74b8, #74b6f5, #eef6fd",
}
Images = NDArray[Any] | None
Table = tuple[list[tuple[Any, ...]], list[Any], int, int]  # of `read_comparison`


def write_report(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    labels: Any = None,
    images: Any = None,
    plan: Any = None,
    comparison: Any = None,
    class_names: Any = None,
) -> Path:
    """Write one HTML file with the curves, matrix, forgotten samples, plan and comparison of a run.

    Parameters
    ----------
    run_dir : path
        Run directory of `Recorder`, `train` or `distill`.
    output : path ending in .html
    labels : (n_samples,) integers, or the path of an .npy or .npz file, optional
        Classes of the samples that the run was recorded on.
    images : (n_samples, h, w), (n_samples, h, w, c) or (n_samples, c, h, w), or a path, optional
        Pictures of the same samples; c is 1 or 3. uint8 and numbers within [0, 1] are shown unchanged, others are
        stretched from the lowest to the highest value of each picture.
    plan : FusionPlan or path, optional
        Default: plan.json in `run_dir`, if it exists.
    comparison : Comparison, content of its `to_json`, or path, optional
        Default: comparison.json, or the demo's cell.json, in `run_dir`, if it exists.
    class_names : list of str, or the path of a text file with one name per line, optional
        Names of the classes 0, 1, ... of `labels`. Default: their numbers.

    Returns
    -------
    Path
        `output`, under 3 MB for any run and never half-written. The matrix and the tables of a long run show every k-th
        epoch; lines keep their extremes. The call needs 41 bytes of memory per sample.

    Raises
    ------
    FileNotFoundError
        `run_dir` contains no run or an empty one, or a given file does not exist.
    TypeError, ValueError
        Labels or images that do not match the run, names without labels or too few of them, a damaged file, or a name
        of `output` that does not end in .html.

    Examples
    --------
    >>> import tempfile, fmn_ref as fmn
    >>> folder = Path(tempfile.mkdtemp())
    >>> recorder = fmn.Recorder(folder / "run")
    >>> for epoch, predictions in enumerate([[0, 1, 1], [0, 0, 1]]):
    ...     recorder.record(epoch, predictions, labels=[0, 1, 1])
    >>> write_report(folder / "run", folder / "report.html", labels=[0, 1, 1]).name
    'report.html'
    """
    target, folder = Path(output).expanduser(), Path(run_dir).expanduser()
    if target.suffix.lower() not in (".html", ".htm"):  # a typing error must not overwrite a plan or a history
        raise ValueError(f"output: expected a name ending in .html, got {target.name!r}")
    run = Run.open(folder)
    history = run.history
    if not len(history):
        raise ValueError(f"{folder}: nothing recorded yet")
    y = None if labels is None else _checked_labels(labels, history)
    names = _class_names(class_names, y)
    pictures = None if images is None else _checked_images(images, history.n_samples)
    fusion = _read_plan(_given_or_found(plan, run.folder.plan))
    scored = _given_or_found(comparison, *run.folder.comparisons)
    table = None if scored is None else read_comparison(scored)
    curves, samples = forgetting_curves(history), sample_statistics(history)
    page = Template(Path(__file__).with_name("report.html.in").read_text("utf-8")).substitute(
        RAMPS,
        name=html.text(folder.resolve().name),
        n_epochs=html.count(len(history), "epoch"),
        n_samples=html.count(history.n_samples, "sample"),
        **_curve_parts(history, curves, int(samples.forgotten.sum()), _levels(fusion, table)),
        matrix=_matrix_section(history),
        samples=_samples_section(history, samples, y, names, pictures),
        plan="" if fusion is None else _plan_section(fusion, run),
        comparison="" if table is None else _comparison_section(*table),
        settings=_settings(run),
    )
    _files.write_bytes(target, page.encode())
    return target


def _given_or_found(given: Any, *paths: Path) -> Any:
    """The argument, or else the first of the files that the run's folder contains."""
    return given if given is not None else next(filter(os.path.lexists, paths), None)


def _loaded(given: Any, load: Callable[[str], Any]) -> Any:
    """Load the file if a path is given; return anything else as it is."""
    return load(os.fspath(given)) if isinstance(given, (str, os.PathLike)) else given


def _checked_labels(labels: Any, history: CorrectnessHistory) -> Int:
    y = _check.labels(_loaded(labels, lambda path: load_array(path, "labels")), history.n_samples)
    if history.digest not in (NO_LABELS, labels_digest(y)):
        raise ValueError("labels: not the labels (or not in the order) that the run was recorded with")
    return y


def _class_names(given: Any, y: Int | None) -> dict[int, str]:
    """{class: its name as HTML} for the classes that have samples."""
    if y is None and given is not None:
        raise ValueError("class_names: needs labels")
    classes = np.array([], np.int64) if y is None else np.unique(y)
    names = None if given is None else _check.class_names(_loaded(given, read_ids), classes)
    return {k: str(k) if names is None else html.text(names[k], 60) for k in classes.tolist()}


def _checked_images(images: Any, n: int) -> NDArray[Any]:
    """Images with a checked shape; their values are read later, and only those of the samples shown."""
    a = _check.array(_loaded(images, lambda path: load_array(path, "images")), "images")
    channels = a.ndim == 3 or (a.ndim == 4 and (a.shape[3] in (1, 3) or a.shape[1] in (1, 3)))
    if not channels or len(a) != n or 0 in a.shape:
        expected = f"({n}, h, w), ({n}, h, w, c) or ({n}, c, h, w) with c 1 or 3"
        raise ValueError(f"images: expected shape {expected}, one picture per sample, got shape {a.shape}")
    return a


# --- parts of the page ---


def _levels(p: FusionPlan | None, table: Table | None) -> dict[str, tuple[float, str]]:
    """{CSS class: (accuracy, where it was measured)} of the fused model and its student, as far as known."""
    name = "KF" if p is None or p.method == KF else p.method
    scored = {} if table is None else {row[0]: row[3] for row in table[0]}
    rows = {"fused": name, "student": f"distilled {name}"}
    levels = {kind: (scored[row], f"{row}, test samples") for kind, row in rows.items() if row in scored}
    if p is None or p.final_model_alone or p.method == "weights" or "fused" in levels:
        return levels
    if p.cv_accuracy is None:
        return {"fused": (p.accuracy[-1], f"{name}, on the samples that chose it: too high"), **levels}
    return {"fused": (p.cv_accuracy, f"{name}, cross-validated"), **levels}


def _curve_parts(
    history: CorrectnessHistory, c: ForgettingCurves, n_forgotten: int, levels: dict[str, tuple[float, str]]
) -> dict[str, str]:
    """Tiles, the two charts, the legend of the first, and the table of the curves."""
    e, best, peak = history.epochs, int(c.accuracy.argmax()), int(c.forget.argmax())
    gain, error = expected_gain(first_samples(history))
    tiles = [
        ("", "Final accuracy", f"{c.accuracy[-1]:.1%}", f"at epoch {e[-1]}"),
        ("", "Best accuracy", f"{c.accuracy[best]:.1%}", f"at epoch {e[best]}"),
        ("key", "Peak forget fraction", f"{c.forget[peak]:.1%}", f"at epoch {e[peak]}"),
        ("", "Forgotten samples", f"{n_forgotten:,}", f"of {history.n_samples:,}: right once, wrong at the end"),
        ("", "Expected gain", f"{100 * gain:+.1f}", f"points from fusion, ± {100 * error:.1f} (rough)"),
    ]
    tile = '<div class="{}"><dt>{}</dt><dd>{}<small>{}</small></dd></div>'
    gap = f"The best accuracy, {c.accuracy[best]:.1%} at epoch {e[best]}, is "
    gap += f"{100 * (c.accuracy[best] - c.accuracy[-1]):.1f} points above the final one. "
    gap += f"{c.forget[best]:.1%} of the samples are right at that epoch and wrong at the end."
    if best == len(e) - 1:
        gap = "The last epoch has the best accuracy."
    lines = {"retained": c.retained, "accuracy": c.accuracy}
    heights = {kind: value for kind, (value, _) in levels.items()}
    legend = '<li class="{}"><i></i>{} ({}): {:.1%}</li>'
    forget = f"at most {c.forget[peak]:.1%}, at epoch {e[peak]}; zero at the end by definition."
    shown = sorted({*html.thinned(len(e), TABLE_ROWS), 0, best, peak})
    rows = [[str(e[i]), *(f"{v[i]:.2%}" for v in (c.accuracy, c.forget, c.learned, c.retained))] for i in shown]
    columns = ("epoch", "accuracy", "F<sub>e</sub>", "L<sub>e</sub>", "retained")
    return {
        "tiles": "".join(tile.format(*parts) for parts in tiles),
        "accuracy": html.chart(e, lines, f"Accuracy per epoch. {gap}", best, "% of samples", heights),
        "levels": "".join(legend.format(kind, kind, where, value) for kind, (value, where) in levels.items()),
        "gap": gap,
        "forget": html.chart(e, {"forget": c.forget}, f"Forget fraction per epoch: {forget}", peak, "% of samples"),
        "thinned": html.thinned_note(shown, e),
        "numbers": html.scroll_table(columns, rows, "Numbers of each epoch", "tall"),
    }


def _matrix_section(history: CorrectnessHistory) -> str:
    shown = html.thinned(len(history), MATRIX_ROWS)
    e = [history.epochs[k] for k in shown]
    rows = history.packed[shown.start :: shown.step]  # a view: a large one is streamed
    counts = forgetting_matrix(SimpleNamespace(packed=rows, n_samples=history.n_samples))
    share, later = counts / history.n_samples, np.triu(counts, 1) / history.n_samples
    top = float(later.max())  # the forgotten shares set the scale: what the first epochs still learn is far more
    if not top:
        return "\n<p>No sample was right at one of these epochs and wrong at a later one.</p>"
    i, j = (e[k] for k in np.unravel_index(later.argmax(), later.shape))
    beyond = " or more" if share.max() > top else ""
    highest = f"At most {top:.1%} of the samples are right at an epoch and wrong at a later one: at {i} and {j}."
    pixels = np.rint(255 * np.minimum(share[::-1] / top, 1)).astype(np.uint8)  # epoch i upwards
    light, dark = (html.png(pixels, html.palette(ramp.split(", "))) for ramp in RAMPS.values())
    places = [((np.interp(k, e, range(len(e))) + 0.5) / len(e), html.short(k)) for k in html.ticks(e[0], e[-1], 5)]
    axes = "".join(html.axis_label("x", "left", *p) + html.axis_label("y", "bottom", *p) for p in places)
    return f"""
<div class="matrix"><figure><div class="plot"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="Heat map of the forgetting matrix. {highest}"></picture>{axes}
{html.axis_names("wrong at epoch j", "right at epoch i")}</div></figure>
<div><p>The share of samples that are right at epoch i and wrong at epoch j{html.thinned_note(shown, history.epochs)}.
Forgotten samples are below the diagonal, learned samples above it. The last column is F<sub>e</sub>.</p>
<p>{highest}</p><div class="scale"><span>0</span><i></i><span>{top:.1%}{beyond}</span></div></div></div>"""


def _samples_section(
    history: CorrectnessHistory, s: SampleStatistics, y: Int | None, names: dict[int, str], images: Images
) -> str:
    forgotten = np.flatnonzero(s.forgotten)
    if not len(forgotten):
        return "\n<p>None: every sample that was right at some epoch is right at the end.</p>"
    chosen = _most_often_right(s, forgotten)
    kinds = [""] * CARDS if y is None else [f"class {names[k]}, " for k in y[chosen].tolist()]
    cards = _cards(history, s, chosen, kinds, images)
    shown, rest = cards[: CARDS // 2], cards[CARDS // 2 :]
    more = f'<details><summary>{len(rest)} more</summary><ul class="cards">{"".join(rest)}</ul></details>'
    return f"""{"" if y is None else _class_table(s.forgotten, y, names)}
<h3>Right for most epochs, wrong at the end</h3>
<p class="muted">The bar shows the epochs at which the sample was right, from the first to the last.</p>
<ul class="cards">{"".join(shown)}</ul>
{more if rest else ""}"""


def _most_often_right(s: SampleStatistics, forgotten: Int) -> Int:
    """Samples for the cards: right at most epochs; among equals, first the one that was wrong for longest."""
    score = s.correctness[forgotten] * s.n_epochs - s.counts[1, forgotten]
    least = np.partition(score, -CARDS)[-CARDS] if len(score) > CARDS else score.min()
    best = np.flatnonzero(score >= least)  # few, so that sorting them costs little
    return np.asarray(forgotten[best[np.argsort(-score[best], kind="stable")[:CARDS]]])


def _cards(
    history: CorrectnessHistory, s: SampleStatistics, chosen: Int, kinds: list[str], images: Images
) -> list[str]:
    pictures = [""] * len(chosen) if images is None else html.thumbnails(images, chosen)
    epochs = np.array(html.thinned(len(history), MATRIX_ROWS))
    right = history.packed[np.ix_(epochs, chosen // 8)] >> (chosen % 8).astype(np.uint8) & 1
    cards = []
    for k, i in enumerate(chosen):
        last = history.epochs[int(s.last_correct[i])]
        facts = f"{kinds[k]}right at {s.correctness[i]} of {len(history)} epochs, last at {last}"
        words = f"<div><b>sample {i}</b><br><span>{facts}</span></div>"
        cards.append(f"<li>{pictures[k]}{words}{html.strip(right[:, k])}</li>")
    return cards


def _class_table(forgotten: Bool, y: Int, names: dict[int, str]) -> str:
    """Share of each class that was forgotten; of many classes, the highest shares first."""
    classes, member = group_members(y, len(y))
    size, n = np.bincount(member), np.bincount(member, forgotten).astype(np.int64)
    share = n / size
    order = np.argsort(-share, kind="stable")
    worst = np.sort(order[:20]) if len(classes) <= 20 else order[:12]
    columns = ("class", "forgotten", "share", f"0 to {share.max():.1%}")

    def table(chosen: Int, name: str, box: str = "") -> str:
        bars = [(k, html.share_bar(share[k] / share.max())) for k in chosen]
        rows = [(names[int(classes[k])], f"{n[k]:,} of {size[k]:,}", f"{share[k]:.1%}", bar) for k, bar in bars]
        return html.scroll_table(columns, rows, name, box, "bars")

    text = f"\n<h3>By class</h3>\n{table(worst, 'Forgotten samples per class')}"
    if len(worst) < len(classes):
        title = f"{len(classes):,} classes, the most forgotten first"
        title += f": {TABLE_ROWS}" * (len(classes) > TABLE_ROWS)
        text += f"\n<details><summary>{title}</summary>{table(order[:TABLE_ROWS], title, 'tall')}</details>"
    return text


def _read_plan(source: Any) -> FusionPlan | None:
    plan = _loaded(source, FusionPlan.load)
    if plan is None or isinstance(plan, FusionPlan):
        return plan
    raise TypeError(f"plan: expected a FusionPlan or a path, got {type(plan).__name__}")


def _plan_section(p: FusionPlan, run: Run) -> str:
    n = len(run.history)
    names = p.epochs or (run.history.epochs if p.n_epochs == n else range(p.n_epochs))
    counted = "" if p.epochs else " Its rows are counted from 0 here."
    note = "" if p.n_epochs == n else f"<p>The plan was made from {p.n_epochs} epochs, the run has {n}.{counted}</p>"
    tables = "" if p.final_model_alone else f"\n{_weights_table(p, names)}\n{_members_table(p, names)}"
    return f"<h2>The plan of the fusion</h2>\n{_plan_summary(p)}\n{note}{tables}"


def _plan_summary(p: FusionPlan) -> str:
    mean = "mean" if p.combine == "linear" else "geometric mean"
    text = f"Method “{p.method}”: a weighted {mean} of {html.count(p.forward_passes, 'checkpoint')}."
    final = f"{p.accuracy[0]:.2%}"
    if p.final_model_alone and p.method != "weights":
        text = f"The final model alone is best: no checkpoint that method “{p.method}” tried improves on it"
        text += f" ({final} on the selection set)."
    elif p.method != "weights":  # a plan of given weights knows no accuracy
        text += f" Its accuracy on the selection set is {p.accuracy[-1]:.2%}, that of the final model {final}."
        text += " The plan was chosen on this set, so its accuracy there is too high."
    if p.cv_accuracy is not None:
        text += f"</p>\n<p>Cross-validated accuracy, on samples not used for the choice: {p.cv_accuracy:.2%}"
        if p.gain_interval is not None:
            low, high = (100 * v for v in p.gain_interval)
            text += f", {low:+.1f} to {high:+.1f} points from the final model (95 % confidence interval)"
        text += "."
    method = html.text(summaries().get(p.method, ""))
    return f'<p>{text}</p>\n<p class="muted">{method}</p>'


def _weights_table(p: FusionPlan, names: Sequence[int]) -> str:
    weights = p.weights
    heavy = sorted(sorted(weights, key=lambda e: -weights[e])[:BARS])
    linear = p.combine == "linear"
    shown = "{:.1%}" if linear else "{:.3f}"
    largest = max(weights.values())
    rows = [(str(names[e]), shown.format(weights[e]), html.share_bar(weights[e] / largest)) for e in heavy]
    columns = ("epoch", "weight", f"0 to {shown.format(largest)}")
    table = html.scroll_table(columns, rows, "Weight of each checkpoint", kind="bars")
    rest = shown.format(sum(weights.values()) - sum(weights[e] for e in heavy))
    others = f"<p>The {BARS} largest weights. {len(weights) - BARS} other checkpoints share {rest}.</p>"
    kind = "Weights" if linear else "Weights of the logarithms"
    return f"<h3>{kind}</h3>\n{table}{others if len(weights) > BARS else ''}"


def _members_table(p: FusionPlan, names: Sequence[int]) -> str:
    if p.method == "weights" or p.combine == "geometric":  # members have no order
        return ""
    rows = [("the final model", "", f"{p.accuracy[0]:.2%}")]
    for (e, eps), accuracy in zip(p.members[: TABLE_ROWS - 1], p.accuracy[1:TABLE_ROWS], strict=True):
        rows.append((str(names[e]), f"{eps:.4g}", f"{accuracy:.2%}"))
    columns = ("member", "epsilon", "selection accuracy")
    around = f" (each with {html.count(p.window, 'neighbour')} on either side)" if p.window else ""
    table = html.scroll_table(columns, rows, "Members of the plan", "tall")
    return f"<h3>Members, in the order found{around}</h3>\n{table}"


def _comparison_section(rows: list[tuple[Any, ...]], notes: list[Any], n: int, n_test: int) -> str:
    best = max(r[3] for r in rows)
    cells = [
        (html.text(name, 80), f"{k:g}", f"{a:.2%}", f"{b:.2%}", *(f"{v:.3f}" for v in more), html.share_bar(b))
        for name, k, a, b, *more in rows[:TABLE_ROWS]
    ]
    measures = ("test NLL", "test ECE")[: len(rows[0]) - 4]
    columns = ("method", "forward passes", "selection accuracy", "test accuracy", *measures, "test accuracy, 0 to 100%")
    marked = [k for k, row in enumerate(rows[:TABLE_ROWS]) if row[3] == best]
    table = html.scroll_table(columns, cells, "Methods compared", kind="bars many", best=marked)
    remarks = "".join(f"<p>{html.text(note, 500)}</p>" for note in notes[:20])
    said = {row[0] for row in rows}
    methods = "".join(f"<dt>{k}</dt><dd>{html.text(v)}</dd>" for k, v in row_summaries().items() if k in said)
    return f"""<h2>Comparison with the controls</h2>
<p>Chosen on {html.count(n, "sample")}, scored on {n_test:,}. A prediction costs the given number of forward passes. The
best test accuracy is in bold. last-k, equally spaced and top-k are plain means of as many checkpoints as KF has. EMA,
SWA and averaged KF are averages of weights. “distilled …” is a network trained on the predictions of that method.</p>
{table}{remarks}<dl class="methods">{methods}</dl>"""


def _settings(run: Run) -> str:
    info = run.folder.read()
    rows = []
    for key, value in (*info.config.items(), *info.made_with.items()):
        shown = value if isinstance(value, str) else json.dumps(value)
        rows.append((html.text(key, 80), html.text(shown)))
    return html.scroll_table(("setting", "value"), rows[:100], "Settings of the run", kind="settings")
