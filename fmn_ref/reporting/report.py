"""write_report: what a run forgot, as one HTML file that loads nothing from elsewhere. NumPy only.

    fmn-ref report RUN_DIR -o report.html

Lines are SVG, pictures are PNG, both inside the file; it adapts to the width of the screen and to light or dark by CSS
alone (report.html.in) and has no script. What comes from files is escaped, and the page forbids itself (by its content
security policy) to load anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check, _files
from ..fusion.expectation import expected_gain
from ..fusion.plan import FusionPlan
from ..metrics.curves import ForgettingCurves, SampleStatistics, forgetting_curves, forgetting_matrix, sample_statistics
from ..metrics.history import NO_LABELS, CorrectnessHistory, labels_digest
from ..runs import load
from ..runs.recorder import Run
from . import html
from .comparison import Comparison

MATRIX_ROWS, TABLE_ROWS = 200, 500  # what is longer is thinned out
CARDS, BARS = 24, 40
# From nothing to much: one hue, so that only lightness counts; it starts at the page's own colour.
RAMPS = {
    "light": ("f4f7fa", "b5d2ea", "5b9fd2", "1f69ae", "08306b"),
    "dark": ("1c2126", "123f70", "2a74b8", "74b6f5", "eef6fd"),
}
Int = NDArray[np.int64]


def write_report(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    labels: Any = None,
    images: Any = None,
    plan: Any = None,
    comparison: Any = None,
) -> Path:
    """One HTML file that shows what a run forgot: curves, matrix, samples, plan and comparison.

    Parameters
    ----------
    run_dir : path
        As `Recorder`, `train` or `distill` left it.
    output : path ending in .html
    labels : (n_samples,) integers, or the path of an .npy or .npz, optional
        Of the samples that the run was recorded on, for the classes.
    images : (n_samples, h, w), (n_samples, h, w, c) or (n_samples, c, h, w), or a path, optional
        Pictures of the same samples; c is 1 or 3. uint8 and numbers within [0, 1] are shown as they are, others
        stretched from each picture's lowest to its highest value.
    plan : FusionPlan or path, optional
        Default: plan.json in `run_dir`, where there is one.
    comparison : Comparison, what its `to_json` holds, or path, optional
        Default: comparison.json, or the demo's cell.json, in `run_dir`.

    Returns
    -------
    Path
        `output`, whole or not at all, under 3 MB for any run. Epochs past a few hundred are thinned out: lines keep
        their extremes, matrix and tables take every k-th epoch. Samples cost 41 bytes of memory each, while it works.

    Raises
    ------
    FileNotFoundError
        No run there, nothing recorded yet, or a file that was named does not exist.
    TypeError, ValueError
        Labels or images that do not fit the run; a damaged file; another name than .html.

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
    target, folder = Path(output), Path(run_dir)
    if target.suffix.lower() not in (".html", ".htm"):  # so that no slip of the hand writes over a plan or a history
        raise ValueError(f"output: expected a name ending in .html, got {target.name!r}")
    run = Run.open(folder)
    history = run.history
    if not len(history):
        raise ValueError(f"{folder}: nothing recorded yet")
    y = None if labels is None else _labels(labels, history)
    pictures = None if images is None else _images(images, history.n_samples)
    curves, samples = forgetting_curves(history), sample_statistics(history)
    name = html.text(folder.resolve().name)
    parts = [
        _headline(name, history, curves, samples),
        _curves(history, curves),
        _matrix(history),
        _samples(history, samples, y, pictures),
        _plan(_found(plan, folder, "plan.json"), run),
        _comparison(_found(comparison, folder, "comparison.json", "cell.json")),
        _settings(folder),
    ]
    template = Template(Path(__file__).with_name("report.html.in").read_text("utf-8"))
    ramps = {f"ramp_{name}": ", ".join(f"#{c}" for c in colours) for name, colours in RAMPS.items()}
    page = template.substitute(title=f"{name}: what it forgot", body="\n".join(parts), **ramps)
    _files.write_atomic(target, lambda file: file.write(page.encode()))
    return target


# --- what comes from outside ---


def _found(given: Any, folder: Path, *names: str) -> Any:
    """What was given, or the first of the files that is in the run's folder."""
    return given if given is not None else next((folder / n for n in names if (folder / n).is_file()), None)


def _is_path(x: Any) -> bool:
    return isinstance(x, (str, os.PathLike))


def _labels(labels: Any, history: CorrectnessHistory) -> Int:
    y = _check.labels(load.load_array(os.fspath(labels), "labels") if _is_path(labels) else labels, history.n_samples)
    if history.digest not in (NO_LABELS, labels_digest(y)):
        raise ValueError("labels: not the labels (or not in the order) that the run was recorded with")
    return y


def _images(images: Any, n: int) -> NDArray[Any]:
    """(n, ...) as it is; read where it is shown."""
    a = _check.array(load.load_array(os.fspath(images), "images") if _is_path(images) else images, "images")
    channels = a.ndim == 3 or (a.ndim == 4 and (a.shape[3] in (1, 3) or a.shape[1] in (1, 3)))
    if not channels or len(a) != n or 0 in a.shape:
        expected = f"({n}, h, w), ({n}, h, w, c) or ({n}, c, h, w) with c 1 or 3"
        raise ValueError(f"images: expected shape {expected}, one picture per sample, got shape {a.shape}")
    return a


# --- sections ---


def _headline(name: str, history: CorrectnessHistory, c: ForgettingCurves, s: SampleStatistics) -> str:
    e, best, peak = history.epochs, int(c.accuracy.argmax()), int(c.forget.argmax())
    n, n_forgotten = history.n_samples, int(s.forgotten.sum())
    some = min(n, 65536, max(64, (1 << 26) // len(e) // 8 * 8))  # a hint needs no more, and bits are unpacked for it
    first = np.unpackbits(history.packed[:, : -(-some // 8)], axis=1, count=some, bitorder="little")
    gain, error = expected_gain(first)
    tiles = [
        ("", "Final accuracy", f"{c.accuracy[-1]:.1%}", f"at epoch {e[-1]}"),
        ("", "Best accuracy", f"{c.accuracy[best]:.1%}", f"at epoch {e[best]}"),
        ("key", "Peak forget fraction", f"{c.forget[peak]:.1%}", f"at epoch {e[peak]}"),
        ("", "Forgotten samples", f"{n_forgotten:,}", f"of {n:,}: right once, wrong at the end"),
        ("", "Expected gain", f"{100 * gain:+.1f}", f"points by a fusion, ± {100 * error:.1f} (a rough rule)"),
    ]
    cells = "".join(
        f'<div class="{kind}"><dt>{what}</dt><dd>{value}<small>{more}</small></dd></div>'
        for kind, what, value, more in tiles
    )
    return f"""<header><h1>What this run forgot</h1>
<p class="muted">{name}: {html.count(len(e), "epoch")}, {html.count(n, "sample")}</p></header>
<dl class="tiles">{cells}</dl>
<p>The forget fraction F<sub>e</sub> of an epoch e is the share of samples that the network classified correctly at
epoch e and gets wrong at the end. Overall accuracy can rise all the while, since what is newly learned hides what is
lost; the checkpoints of earlier epochs still know it.</p>"""


def _curves(history: CorrectnessHistory, c: ForgettingCurves) -> str:
    e, best, peak = history.epochs, int(c.accuracy.argmax()), int(c.forget.argmax())
    x = np.array(e, np.float64)
    accuracy = html.chart(
        x,
        {"retained": c.retained, "accuracy": c.accuracy},
        f"Accuracy per epoch: {c.accuracy[0]:.1%} at epoch {e[0]}, at best {c.accuracy[best]:.1%} at epoch {e[best]}, "
        f"{c.accuracy[-1]:.1%} at the end. {c.retained[best]:.1%} of the samples are right at epoch {e[best]} and at "
        "the end.",
        (best, c.accuracy[best], "", f"{c.accuracy[best]:.1%} at epoch {e[best]}"),
    )
    forget = html.chart(
        x,
        {"forget": c.forget},
        f"Forget fraction per epoch: at most {c.forget[peak]:.1%}, at epoch {e[peak]}; zero at the end by definition.",
        (peak, c.forget[peak], "forget", f"{c.forget[peak]:.1%} at epoch {e[peak]}"),
    )
    columns = ("epoch", "accuracy", "F<sub>e</sub>", "L<sub>e</sub>", "still right at the end")
    shown = sorted({*html.every(len(e), TABLE_ROWS), 0, best, peak})
    values = zip(c.accuracy, c.forget, c.learned, c.retained, strict=True)
    rows = [(str(i), *(f"{v:.2%}" for v in row)) for i, row in zip(e, values, strict=True)]
    table = html.table(columns, [rows[i] for i in shown], "Numbers of each epoch", "tall")
    return f"""<h2>Epoch by epoch</h2>
<figure>{accuracy}
<ul class="legend">
<li class="accuracy"><i></i>accuracy</li>
<li class="retained"><i></i>of it, still right at the end</li>
<li class="area"><i></i>the gap is F<sub>e</sub></li></ul></figure>
<figure>{forget}
<ul class="legend"><li class="forget"><i></i>forget fraction F<sub>e</sub></li></ul></figure>
<details><summary>The numbers{html.thinned(shown, e)}</summary>{table}
<p class="muted">L<sub>e</sub>, the learned fraction: wrong at epoch e, right at the end.</p></details>"""


def _matrix(history: CorrectnessHistory) -> str:
    shown = html.every(len(history), MATRIX_ROWS)
    e, title = [history.epochs[k] for k in shown], "<h2>From epoch to epoch</h2>"
    rows = history.packed[shown.start :: shown.step]  # a view: streamed, where it is large
    counts = forgetting_matrix(SimpleNamespace(packed=rows, n_samples=history.n_samples))
    share, later = counts / history.n_samples, np.triu(counts, 1) / history.n_samples
    top = float(later.max())  # of what was forgotten: the first epochs have far more yet to learn
    if not top:
        return f"{title}\n<p>No sample was right at one of these epochs and wrong at a later one.</p>"
    i, j = (e[k] for k in np.unravel_index(later.argmax(), later.shape))
    beyond = " or more" if share.max() > top else ""
    told = f"At most {top:.1%} of the samples are right at an epoch and wrong at a later one: at {i} and {j}."
    pixels = np.rint(255 * np.minimum(share[::-1] / top, 1)).astype(np.uint8)  # epoch i upwards
    light, dark = (html.data_uri(html.png(pixels, html.palette(RAMPS[name]))) for name in ("light", "dark"))
    places = [((np.interp(k, e, range(len(e))) + 0.5) / len(e), html.short(k)) for k in html.ticks(e[0], e[-1], 5)]
    axes = "".join(html.at("x", "left", p, k) + html.at("y", "bottom", p, k) for p, k in places)
    return f"""{title}
<div class="matrix"><figure><div class="plot"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="Heat map of the forgetting matrix. {told}"></picture>{axes}
<span class="xname">wrong at epoch j</span><span class="yname">right at epoch i</span></div></figure>
<div><p>The forgetting matrix: the share of samples that are right at epoch i and wrong at epoch
j{html.thinned(shown, history.epochs)}. Below the diagonal is what was forgotten, above it what was learned; the last
column is F<sub>e</sub>.</p>
<p>{told}</p><div class="scale"><span>0</span><i></i><span>{top:.1%}{beyond}</span></div></div></div>"""


def _samples(history: CorrectnessHistory, s: SampleStatistics, y: Int | None, images: NDArray[Any] | None) -> str:
    forgotten = np.flatnonzero(s.forgotten)
    # Right at most epochs and wrong at the end; of equals, the one that was wrong for longest.
    order = np.lexsort((s.last_correct[forgotten], -s.correctness[forgotten]))[:CARDS]
    chosen = forgotten[order]
    parts = ["<h2>Forgotten samples</h2>"]
    if not len(forgotten):
        return parts[0] + "\n<p>None: whatever was right at some epoch is right at the end.</p>"
    if y is not None:
        parts.append(_classes(s.forgotten, y))
    pictures = [""] * len(chosen) if images is None else html.thumbnails(images, chosen)
    epochs = np.array(html.every(len(history), MATRIX_ROWS))
    right = history.packed[np.ix_(epochs, chosen // 8)] >> (chosen % 8).astype(np.uint8) & 1
    cards = []
    for k, i in enumerate(chosen):
        kind = "" if y is None else f"class {y[i]}, "
        picture = pictures[k] and f'<img {pictures[k]} alt="sample {i}">'
        told = f"right at {s.correctness[i]} of {len(history)} epochs, last at {history.epochs[int(s.last_correct[i])]}"
        words = f"<div><b>sample {i}</b><br><span>{kind}{told}</span></div>"
        cards.append(f"<li>{picture}{words}{html.strip(right[:, k])}</li>")
    shown, rest = "".join(cards[: CARDS // 2]), "".join(cards[CARDS // 2 :])
    more = f'<details><summary>{len(cards) - CARDS // 2} more</summary><ul class="cards">{rest}</ul></details>'
    return "\n".join(
        [
            *parts,
            "<h3>Known longest, and wrong at the end</h3>",
            '<p class="muted">The bar shows at which epochs the sample was right, from the first to the last.</p>',
            f'<ul class="cards">{shown}</ul>',
            more if rest else "",
        ]
    )


def _classes(forgotten: NDArray[np.bool_], y: Int) -> str:
    """Share of each class that was forgotten; of many classes, the worst."""
    names, member, size = np.unique(y, return_inverse=True, return_counts=True)
    n = np.bincount(member, forgotten).astype(np.int64)
    share = n / size
    order = np.argsort(-share, kind="stable")
    worst = np.sort(order[:20]) if len(names) <= 20 else order[:12]
    top = share.max()

    def rows(chosen: Int) -> list[tuple[str, ...]]:
        bars = [(k, html.bar(share[k] / top)) for k in chosen]
        return [(str(names[k]), f"{n[k]:,} of {size[k]:,}", f"{share[k]:.1%}", bar) for k, bar in bars]

    columns = ("class", "forgotten", "share", "")
    text = f"<h3>By class</h3>\n{html.table(columns, rows(worst), 'Forgotten samples per class', kind='bars')}"
    if len(worst) < len(names):
        title = f"{len(names):,} classes, the most forgotten first" + (f": {TABLE_ROWS}" * (len(names) > TABLE_ROWS))
        more = html.table(columns, rows(order[:TABLE_ROWS]), title, "tall", "bars")
        text += f"\n<details><summary>{title}</summary>{more}</details>"
    return text


def _plan(plan: Any, run: Run) -> str:
    if plan is None:
        return ""
    p = FusionPlan.load(plan) if _is_path(plan) else plan
    if not isinstance(p, FusionPlan):
        raise TypeError(f"plan: expected a FusionPlan or a path, got {type(plan).__name__}")
    names, note = _epochs_of(p, run)
    parts = ["<h2>The plan of the fusion</h2>", _worth(p), f"<p>{note}</p>" if note else ""]
    if not p.final_model_alone:
        parts += [_weights(p, names), _members(p, names)]
    return "\n".join(parts)


def _worth(p: FusionPlan) -> str:
    told = f"Method “{p.method}”: a weighted mean of {html.count(p.forward_passes, 'checkpoint')}."
    if p.final_model_alone and p.method != "weights":
        told = f"The final model alone is best: no epoch that the method “{p.method}” tried helped"
        told += f" ({p.accuracy[0]:.2%} on the selection set)."
    elif p.method != "weights":  # whose accuracy is not known
        told += f" It reaches {p.accuracy[-1]:.2%} on the selection set, where the final model has {p.accuracy[0]:.2%};"
        told += " it was chosen there, which flatters."
    if p.cv_accuracy is not None:
        told += f"</p>\n<p>Cross-validated, on samples that the choice did not see: {p.cv_accuracy:.2%}"
        if p.gain_interval is not None:
            low, high = (100 * v for v in p.gain_interval)
            told += f", {low:+.1f} to {high:+.1f} points from the final model (95 % interval)"
        told += "."
    return f"<p>{told}</p>"


def _epochs_of(p: FusionPlan, run: Run) -> tuple[Sequence[int], str]:
    """The epoch of each row that a plan speaks of, and a remark where that is not known."""
    if p.n_epochs == len(run.history):
        return run.history.epochs, ""
    kept = [e for e, path in zip(run.history.epochs, run.checkpoints, strict=True) if path.exists()]
    if p.n_epochs == len(kept):
        return kept, f"It was made from the {len(kept)} epochs whose checkpoints were kept."
    note = f"It was made when there were {p.n_epochs} epochs, and this run has {len(run.history)}: counted from 0 here."
    return range(p.n_epochs), note


def _weights(p: FusionPlan, names: Sequence[int]) -> str:
    weights = p.weights
    heavy = sorted(sorted(weights, key=lambda e: -weights[e])[:BARS])
    top = max(weights.values())
    rows = [(str(names[e]), f"{weights[e]:.1%}", html.bar(weights[e] / top)) for e in heavy]
    table = html.table(("epoch", "weight", ""), rows, "Weight of each checkpoint", kind="bars")
    rest = 1 - sum(weights[e] for e in heavy)
    more = f"<p>The heaviest; {len(weights) - BARS} others share {rest:.1%}.</p>" if len(weights) > BARS else ""
    return f"<h3>Weights</h3>\n{table}{more}"


def _members(p: FusionPlan, names: Sequence[int]) -> str:
    if p.method == "weights":
        return ""
    rows = [("the final model", "", f"{p.accuracy[0]:.2%}")]
    for (e, eps), accuracy in zip(p.members[: TABLE_ROWS - 1], p.accuracy[1:TABLE_ROWS], strict=True):
        rows.append((str(names[e]), f"{eps:.4g}", f"{accuracy:.2%}"))
    columns = ("member", "mixed in with", "selection accuracy")
    around = f" (each with {html.count(p.window, 'neighbour')} on either side)" if p.window else ""
    return f"<h3>Members, in the order found{around}</h3>\n{html.table(columns, rows, 'Members of the plan', 'tall')}"


def _comparison(source: Any) -> str:
    if source is None:
        return ""
    where = os.fspath(source) if _is_path(source) else "comparison"
    try:
        content = source
        if isinstance(source, Comparison):
            content = json.loads(source.to_json())
        elif _is_path(source):
            content = json.loads(Path(source).read_bytes())
        rows = [_method(row) for row in content["rows"]]
        if not rows:
            raise ValueError("rows: expected at least one")
        notes = [html.text(note, 500) for note in content.get("notes", [])]
        best = max(r[3] for r in rows)
        n, n_test = (_check.number(content[k], 0, 2**62, k, int) for k in ("n_selection", "n_test"))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{where}: not a comparison (Comparison.to_json, fmn-ref compare --json): {reason}") from None
    cells = [(name, f"{k:g}", f"{a:.2%}", f"{b:.2%}", html.bar(b)) for name, k, a, b in rows[:TABLE_ROWS]]
    columns = ("method", "forward passes", "selection accuracy", "test accuracy", "")
    marked = [k for k, row in enumerate(rows[:TABLE_ROWS]) if row[3] == best]
    table = html.table(columns, cells, "Methods compared", kind="bars many", best=marked)
    remarks = "".join(f"<p>{note}</p>" for note in notes[:20])
    return f"""<h2>Beside the controls</h2>
<p>Chosen on {html.count(n, "sample")}, scored on {n_test:,}. Forward passes are what a prediction costs; the best
test accuracy is in bold.</p>
{table}{remarks}"""


def _method(row: Any) -> tuple[str, float, float, float]:
    passes = _check.number(row["forward_passes"], 0, 1e9, "forward_passes")
    a, b = (_check.number(row[k], 0, 1, k) for k in ("selection_accuracy", "test_accuracy"))
    return html.text(row["method"], 80), passes, a, b


def _settings(folder: Path) -> str:
    content = _files.read_json(folder / "run.json", "fmn_ref.run")
    rows = []
    for part in ("config", "made_with"):
        found = content.get(part)
        for key, value in found.items() if isinstance(found, dict) else ():
            shown = value if isinstance(value, str) else json.dumps(value)
            rows.append((html.text(key, 80), html.text(shown)))
    table = html.table(("setting", "value"), rows[:100], "Settings of the run", kind="settings")
    return f"""<footer class="muted"><details><summary>How the run was made</summary>{table}</details>
<small>Made by fmn_ref. The forget fraction and Knowledge Fusion: arXiv 2507.08686.</small></footer>"""
