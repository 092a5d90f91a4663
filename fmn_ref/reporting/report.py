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
from ..fusion.plan import FusionPlan
from ..metrics.curves import ForgettingCurves, forgetting_curves, forgetting_matrix
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest
from ..metrics.overview import first_samples
from ..metrics.samples import SampleStatistics, sample_statistics
from ..runs.load import load_array
from ..runs.run import Run
from . import html
from .comparison import Comparison

MATRIX_ROWS, TABLE_ROWS = 200, 500  # longer ones show every k-th epoch
CARDS, BARS = 24, 40
# From nothing to much in one hue, so that only lightness counts. A ramp starts at the colour of the page.
RAMPS = {
    "ramp_light": "#f4f7fa, #b5d2ea, #5b9fd2, #1f69ae, #08306b",
    "ramp_dark": "#1c2126, #123f70, #2a74b8, #74b6f5, #eef6fd",
}
Images = NDArray[Any] | None


def write_report(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    labels: Any = None,
    images: Any = None,
    plan: Any = None,
    comparison: Any = None,
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
        Labels or images that do not match the run, a damaged file, or a name of `output` that does not end in .html.

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
    pictures = None if images is None else _checked_images(images, history.n_samples)
    curves, samples = forgetting_curves(history), sample_statistics(history)
    page = Template(Path(__file__).with_name("report.html.in").read_text("utf-8")).substitute(
        RAMPS,
        name=html.text(folder.resolve().name),
        n_epochs=html.count(len(history), "epoch"),
        n_samples=html.count(history.n_samples, "sample"),
        **_curve_parts(history, curves, int(samples.forgotten.sum())),
        matrix=_matrix_section(history),
        samples=_samples_section(history, samples, y, pictures),
        plan=_plan_section(_given_or_found(plan, run.folder.plan), run),
        comparison=_comparison_section(_given_or_found(comparison, *run.folder.comparisons)),
        settings=_settings(run),
    )
    _files.write_bytes(target, page.encode())
    return target


def _given_or_found(given: Any, *paths: Path) -> Any:
    """The argument, or else the first of the files that the run's folder contains."""
    return given if given is not None else next((path for path in paths if path.is_file()), None)


def _loaded(given: Any, load: Callable[[str], Any]) -> Any:
    """Load the file if a path is given; return anything else as it is."""
    return load(os.fspath(given)) if isinstance(given, (str, os.PathLike)) else given


def _checked_labels(labels: Any, history: CorrectnessHistory) -> Int:
    y = _check.labels(_loaded(labels, lambda path: load_array(path, "labels")), history.n_samples)
    if history.digest not in (NO_LABELS, labels_digest(y)):
        raise ValueError("labels: not the labels (or not in the order) that the run was recorded with")
    return y


def _checked_images(images: Any, n: int) -> NDArray[Any]:
    """Images with a checked shape; their values are read later, and only those of the samples shown."""
    a = _check.array(_loaded(images, lambda path: load_array(path, "images")), "images")
    channels = a.ndim == 3 or (a.ndim == 4 and (a.shape[3] in (1, 3) or a.shape[1] in (1, 3)))
    if not channels or len(a) != n or 0 in a.shape:
        expected = f"({n}, h, w), ({n}, h, w, c) or ({n}, c, h, w) with c 1 or 3"
        raise ValueError(f"images: expected shape {expected}, one picture per sample, got shape {a.shape}")
    return a


# --- parts of the page ---


def _curve_parts(history: CorrectnessHistory, c: ForgettingCurves, n_forgotten: int) -> dict[str, str]:
    """Tiles, the two charts and the table of the curves."""
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
    accuracy = (
        f"Accuracy per epoch: {c.accuracy[0]:.1%} at epoch {e[0]}, at best {c.accuracy[best]:.1%} at epoch {e[best]}, "
        f"{c.accuracy[-1]:.1%} at the end. {c.retained[best]:.1%} of the samples are right at epoch {e[best]} and at "
        "the end."
    )
    forget = f"at most {c.forget[peak]:.1%}, at epoch {e[peak]}; zero at the end by definition."
    shown = sorted({*html.thinned(len(e), TABLE_ROWS), 0, best, peak})
    rows = [[str(e[i]), *(f"{v[i]:.2%}" for v in (c.accuracy, c.forget, c.learned, c.retained))] for i in shown]
    columns = ("epoch", "accuracy", "F<sub>e</sub>", "L<sub>e</sub>", "retained")
    return {
        "tiles": "".join(tile.format(*parts) for parts in tiles),
        "accuracy": html.chart(e, {"retained": c.retained, "accuracy": c.accuracy}, accuracy, best),
        "forget": html.chart(e, {"forget": c.forget}, f"Forget fraction per epoch: {forget}", peak),
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
<span class="xname">wrong at epoch j</span><span class="yname">right at epoch i</span></div></figure>
<div><p>The share of samples that are right at epoch i and wrong at epoch j{html.thinned_note(shown, history.epochs)}.
Forgotten samples are below the diagonal, learned samples above it. The last column is F<sub>e</sub>.</p>
<p>{highest}</p><div class="scale"><span>0</span><i></i><span>{top:.1%}{beyond}</span></div></div></div>"""


def _samples_section(history: CorrectnessHistory, s: SampleStatistics, y: Int | None, images: Images) -> str:
    forgotten = np.flatnonzero(s.forgotten)
    if not len(forgotten):
        return "\n<p>None: every sample that was right at some epoch is right at the end.</p>"
    # Right at most epochs and wrong at the end; among equals, first the one that was wrong for longest.
    chosen = forgotten[np.lexsort((s.last_correct[forgotten], -s.correctness[forgotten]))[:CARDS]]
    cards = _cards(history, s, chosen, y, images)
    shown, rest = cards[: CARDS // 2], cards[CARDS // 2 :]
    more = f'<details><summary>{len(rest)} more</summary><ul class="cards">{"".join(rest)}</ul></details>'
    return f"""{"" if y is None else _class_table(s.forgotten, y)}
<h3>Right for most epochs, wrong at the end</h3>
<p class="muted">The bar shows the epochs at which the sample was right, from the first to the last.</p>
<ul class="cards">{"".join(shown)}</ul>
{more if rest else ""}"""


def _cards(history: CorrectnessHistory, s: SampleStatistics, chosen: Int, y: Int | None, images: Images) -> list[str]:
    pictures = [""] * len(chosen) if images is None else html.thumbnails(images, chosen)
    epochs = np.array(html.thinned(len(history), MATRIX_ROWS))
    right = history.packed[np.ix_(epochs, chosen // 8)] >> (chosen % 8).astype(np.uint8) & 1
    cards = []
    for k, i in enumerate(chosen):
        kind = "" if y is None else f"class {y[i]}, "
        last = history.epochs[int(s.last_correct[i])]
        facts = f"{kind}right at {s.correctness[i]} of {len(history)} epochs, last at {last}"
        words = f"<div><b>sample {i}</b><br><span>{facts}</span></div>"
        cards.append(f"<li>{pictures[k]}{words}{html.strip(right[:, k])}</li>")
    return cards


def _class_table(forgotten: Bool, y: Int) -> str:
    """Share of each class that was forgotten; of many classes, the highest shares first."""
    names, member, size = np.unique(y, return_inverse=True, return_counts=True)
    n = np.bincount(member, forgotten).astype(np.int64)
    share = n / size
    order = np.argsort(-share, kind="stable")
    worst = np.sort(order[:20]) if len(names) <= 20 else order[:12]
    columns = ("class", "forgotten", "share", "")

    def table(chosen: Int, name: str, box: str = "") -> str:
        bars = [(k, html.share_bar(share[k] / share.max())) for k in chosen]
        rows = [(str(names[k]), f"{n[k]:,} of {size[k]:,}", f"{share[k]:.1%}", bar) for k, bar in bars]
        return html.scroll_table(columns, rows, name, box, "bars")

    text = f"\n<h3>By class</h3>\n{table(worst, 'Forgotten samples per class')}"
    if len(worst) < len(names):
        title = f"{len(names):,} classes, the most forgotten first" + (f": {TABLE_ROWS}" * (len(names) > TABLE_ROWS))
        text += f"\n<details><summary>{title}</summary>{table(order[:TABLE_ROWS], title, 'tall')}</details>"
    return text


def _plan_section(plan: Any, run: Run) -> str:
    if plan is None:
        return ""
    p = _loaded(plan, FusionPlan.load)
    if not isinstance(p, FusionPlan):
        raise TypeError(f"plan: expected a FusionPlan or a path, got {type(plan).__name__}")
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
    return f"<p>{text}</p>"


def _weights_table(p: FusionPlan, names: Sequence[int]) -> str:
    weights = p.weights
    heavy = sorted(sorted(weights, key=lambda e: -weights[e])[:BARS])
    linear = p.combine == "linear"
    shown = "{:.1%}" if linear else "{:.3f}"
    largest = max(weights.values())
    rows = [(str(names[e]), shown.format(weights[e]), html.share_bar(weights[e] / largest)) for e in heavy]
    table = html.scroll_table(("epoch", "weight", ""), rows, "Weight of each checkpoint", kind="bars")
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


def _comparison_section(source: Any) -> str:
    if source is None:
        return ""
    rows, notes, n, n_test = _read_comparison(source)
    best = max(r[3] for r in rows)
    cells = [
        (name, f"{k:g}", f"{a:.2%}", f"{b:.2%}", html.share_bar(b), *(f"{v:.3f}" for v in more))
        for name, k, a, b, *more in rows[:TABLE_ROWS]
    ]
    measures = ("test NLL", "test ECE")[: len(rows[0]) - 4]
    columns = ("method", "forward passes", "selection accuracy", "test accuracy", "", *measures)
    marked = [k for k, row in enumerate(rows[:TABLE_ROWS]) if row[3] == best]
    table = html.scroll_table(columns, cells, "Methods compared", kind="bars many", best=marked)
    remarks = "".join(f"<p>{html.text(note, 500)}</p>" for note in notes[:20])
    return f"""<h2>Comparison with the controls</h2>
<p>Chosen on {html.count(n, "sample")}, scored on {n_test:,}. A prediction costs the given number of forward passes. The
best test accuracy is in bold.</p>
{table}{remarks}"""


def _read_comparison(source: Any) -> tuple[list[tuple[Any, ...]], list[Any], int, int]:
    """Rows (method, forward passes, accuracies, NLL and ECE if known), notes, and the sizes of the two sets."""
    try:
        content = _loaded(source, lambda path: json.loads(_files.read_bytes(path)))
        if isinstance(source, Comparison):
            content = json.loads(source.to_json())
        rows = []
        known = [
            k for k in ("test_nll", "test_ece") if all(k in row for row in content["rows"])
        ]  # older files lack them
        for row in content["rows"]:
            passes = _check.number(row["forward_passes"], 0, 1e9, "forward_passes")
            accuracies = (_check.number(row[k], 0, 1, k) for k in ("selection_accuracy", "test_accuracy"))
            more = (_check.number(row[k], 0, 1e9, k) for k in known)
            rows.append((html.text(row["method"], 80), passes, *accuracies, *more))
        if not rows:
            raise ValueError("rows: expected at least one")
        n, n_test = (_check.number(content[k], 0, 2**62, k, int) for k in ("n_selection", "n_test"))
        return rows, list(content.get("notes", [])), n, n_test
    except OSError:
        raise
    except Exception as error:  # a file from a stranger may fail in any way
        reason = f"missing {error}" if isinstance(error, KeyError) else error
        where = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "comparison"
        raise ValueError(f"{where}: not a comparison (Comparison.to_json, fmn-ref compare --json): {reason}") from None


def _settings(run: Run) -> str:
    info = run.folder.read()
    rows = []
    for key, value in (*info.config.items(), *info.made_with.items()):
        shown = value if isinstance(value, str) else json.dumps(value)
        rows.append((html.text(key, 80), html.text(shown)))
    return html.scroll_table(("setting", "value"), rows[:100], "Settings of the run", kind="settings")
