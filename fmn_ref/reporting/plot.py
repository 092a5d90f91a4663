"""Figures, with matplotlib (optional: pip install "fmn_ref[plot]"). Each function returns a Figure, without pyplot.

fmn_ref.plot.curves(run.history).savefig("curves.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..fusion.plan import FusionPlan
from ..metrics import answers
from ..metrics.curves import forgetting_curves, forgetting_matrix
from ..metrics.samples import sample_statistics
from .recovery import Recovery
from .tables import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _RED, _GREEN, _GREY = "#2563eb", "#dc2626", "#059669", "#6b7280"
_PURPLE, _AMBER = "#7c3aed", "#b45309"
CLASSES = 25  # named bars that fit beside each other


def _axes(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (6.4, 3.6)) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ImportError('figures need matplotlib: pip install "fmn_ref[plot]"') from None
    figure = Figure(size, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _epochs(correct: Any) -> NDArray[np.int64]:
    """Epoch numbers of the rows: the recorded ones of a history, otherwise 0, 1, ..."""
    return np.array(getattr(correct, "epochs", range(len(correct))), np.int64)


def curves(correct: Any, *, fused: float | None = None, student: float | None = None) -> Figure:
    """Plot accuracy, retained accuracy, F_e and L_e per epoch; the shaded gap between the first two is F_e.

    A dot marks the peak, the epoch with the best accuracy. At the right stand the gap between the peak and the final
    accuracy, and the forget fraction of the peak.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool, or a CorrectnessHistory
    fused, student : float in [0, 1], optional
        Accuracies of the fused model and of its student, for horizontal lines. A fair one comes from samples that did
        not choose the plan: `FusionPlan.cv_accuracy`, or a test set.

    Raises
    ------
    TypeError, ValueError
        As `forgetting_curves`; an accuracy that is no number in [0, 1].

    Examples
    --------
    >>> figure = curves([[True, True], [True, False]], fused=0.9)
    >>> figure.axes[0].get_legend().get_texts()[0].get_text()
    'fused: 90.0%'
    """
    c = forgetting_curves(correct)
    epochs, peak = _epochs(correct), int(c.accuracy.argmax())
    figure, axes = _axes("Accuracy per epoch, and retained at the end", "epoch", "share of samples", (6.4, 4.2))
    for name, value, color, style in (("fused", fused, _PURPLE, "--"), ("student", student, _AMBER, "-.")):
        if value is not None:
            share = _check.number(value, 0, 1, name)
            axes.axhline(share, color=color, linestyle=style, label=f"{name}: {share:.1%}")
    axes.plot(epochs, c.accuracy, color=_BLUE, label="accuracy")
    note = f"peak: {c.accuracy[peak]:.1%} at epoch {epochs[peak]}"
    axes.plot(epochs[peak], c.accuracy[peak], "o", color=_BLUE, label=note)
    axes.plot(epochs, c.retained, color=_BLUE, linestyle=":", label="retained: right at the end too")
    axes.fill_between(epochs, c.retained, c.accuracy, color=_RED, alpha=0.12, linewidth=0)
    axes.plot(epochs, c.forget, color=_RED, label="forget fraction")
    axes.plot(epochs, c.learned, color=_GREEN, label="learned fraction")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    if c.forget[peak] > 0:
        _mark_gap(axes, c.accuracy[peak], c.accuracy[-1], c.forget[peak])
    return figure


def _mark_gap(axes: Axes, top: float, bottom: float, forget: float) -> None:
    """Mark the gap from `top` to `bottom` at the right edge."""
    x = axes.get_yaxis_transform()  # shares of the width, values of the height
    axes.plot([1.02] * 2, [bottom, top], "_-", color=_GREY, transform=x, clip_on=False)
    text = f"peak above final:\n{100 * (top - bottom):.1f} points\n\nforget fraction\nat the peak:\n{forget:.1%}"
    axes.text(1.04, (top + bottom) / 2, text, transform=x, va="center", fontsize=8)


def matrix(correct: Any) -> Figure:
    """Plot the forgetting matrix as shares of the samples; below the diagonal are the forgotten samples."""
    c, epochs = _check.bool_matrix(correct), _epochs(correct)
    share = forgetting_matrix(c) / c.shape[1]
    figure, axes = _axes("Right at epoch i, wrong at epoch j", "epoch j", "epoch i", (4.8, 4.0))
    # Forgotten shares set the scale: those an untrained epoch still learns are far larger.
    most = np.triu(share).max() or 1
    mesh = axes.pcolormesh(epochs, epochs, share, cmap="magma", vmin=0, vmax=most)
    figure.colorbar(mesh, ax=axes, label="share of samples", extend="max" if share.max() > most else "neither")
    return figure


def plan_weights(plan: FusionPlan) -> Figure:
    """Plot the weight of each checkpoint in the fused prediction."""
    figure, axes = _axes("Weights of the fused prediction", "epoch" if plan.epochs else "row", "weight")
    x = np.asarray(plan.epochs or range(plan.n_epochs))
    width = 0.9 * np.diff(x).min(initial=x[-1] + 1)
    axes.bar(x[list(plan.weights)], list(plan.weights.values()), color=_BLUE, width=width)
    axes.set_xlim(x[0] - width, x[-1] + width)
    return figure


def last_correct(correct: Any) -> Figure:
    """Plot how many of the forgotten samples were right for the last time at each epoch."""
    s = sample_statistics(correct)
    epochs = _epochs(correct)
    title = f"Last epoch at which the {int(s.forgotten.sum())} forgotten samples were right"
    figure, axes = _axes(title, "epoch", "samples")
    n = np.bincount(s.last_correct[s.forgotten].astype(int), minlength=len(epochs))
    axes.bar(epochs, n, width=0.9 * np.diff(epochs).min(initial=epochs[-1] + 1), color=_RED)
    return figure


def per_class(correct: Any, labels: Any, *, class_names: Any = None) -> Figure:
    """Plot the share of each class that was forgotten: right at some epoch and wrong at the end.

    The dashed line is the share of all samples.

    Parameters
    ----------
    correct : (n_epochs, n_samples) bool, or a CorrectnessHistory
    labels : (n_samples,) integers
    class_names : list of str, optional
        Names of the classes 0, 1, ... The figure then shows the 25 classes with the largest shares, if there are more.
        Default: a numbered axis.

    Raises
    ------
    TypeError, ValueError
        As `sample_statistics`; labels of another number of samples; too few names, or names that are no strings.

    Examples
    --------
    >>> figure = per_class([[True, True], [True, False]], [0, 1], class_names=["cat", "dog"])
    >>> [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    ['cat', 'dog']
    """
    forgotten = sample_statistics(correct).forgotten
    y = _check.labels(labels, len(forgotten))
    classes, member, size = np.unique(y, return_inverse=True, return_counts=True)
    share = np.bincount(member, forgotten) / size
    figure, axes = _axes("Forgotten samples per class", "class", "share of the class")
    if class_names is None:
        axes.bar(classes, share, color=_RED)
    else:
        names = _check.class_names(class_names, y)
        shown = np.sort(np.argsort(-share, kind="stable")[:CLASSES])
        texts = [one_line(names[k], 24) for k in classes[shown]]
        axes.bar(range(len(shown)), share[shown], color=_RED)
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
        axes.set_xticks(range(len(shown)), texts, parse_math=False, **slanted)  # a name may contain $
        if len(shown) < len(classes):
            axes.set_title(f"Most forgotten: {len(shown)} of {len(classes):,} classes", loc="left", fontsize=10)
    axes.axhline(forgotten.mean(), color=_GREY, linewidth=1, linestyle="--")
    axes.set_ylim(0)
    return figure


def recovery(r: Recovery) -> Figure:
    """Plot, for each predictor, the recovered, the new and the lost samples of `Recovery.counts`."""
    figure, axes = _axes("Changes relative to the final model", "", "samples")
    counts = r.counts()
    places = np.arange(len(counts))
    bars = (("recovered", _GREEN, "forgotten, recovered"), ("new", _BLUE, "never right, new"), ("lost", _RED, "lost"))
    for i, (key, color, label) in enumerate(bars):
        axes.bar(places + 0.27 * (i - 1), [n[key] for n in counts.values()], 0.25, color=color, label=label)
    axes.set_xticks(places, list(counts))
    axes.margins(y=0.2)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    return figure


def pass_at_k(correct: Any, last: Sequence[int] | None = None) -> Figure:
    """Plot Pass@k against k, with the draws spread over each of `last` numbers of checkpoints; default: 1, 2, 4, ..."""
    right = _check.draws(correct)
    spread = [2**i for i in range(len(right).bit_length())] if last is None else list(last)
    figure, axes = _axes("Pass@k of draws spread over the last checkpoints", "draws per question, k", "Pass@k")
    budgets = range(1, right.shape[2] + 1)
    for i, n in enumerate(spread):
        shares = [answers.pass_at_k(right, k, last=n).mean() for k in budgets]
        color = (_GREY, _BLUE, _GREEN, _RED)[i % 4]
        axes.plot(budgets, shares, color=color, label="the last alone" if n == 1 else f"the last {n}")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    return figure
