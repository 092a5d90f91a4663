"""Text for a terminal: the curves of a run as braille dots, its table, and a plan's members. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..fusion.plan import FusionPlan

MOST_ROWS = 40  # of a table that is printed whole
SOME_ROWS = 20  # of a longer one
HEIGHT = 6  # lines of a curve
_MARGIN = 9  # characters left of a curve
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # bits of a braille character
_BRAILLE = 0x2800


def draw_curve(values: Any, width: int, height: int = HEIGHT, braille: bool = True) -> list[str]:
    """Draw a line through values at equal distances.

    Parameters
    ----------
    values : (n,) float
        At least one; finite.
    width, height : int
        In characters. A braille character has 2 x 4 dots.
    braille : bool, default True
        False: draw with asterisks, for an encoding without braille.

    Returns
    -------
    list of str
        `height` lines of `width` characters. The top is the largest value.

    Examples
    --------
    >>> print("\\n".join(draw_curve([0, 2, 1], 6, 2, braille=False)))
      ****
    **   *
    """
    y = _check.array(values, "values").astype(np.float64)
    columns, rows = (2 * width, 4 * height) if braille else (width, height)
    last = max(1, len(y) - 1)
    x = np.union1d(np.linspace(0, last, 2 * columns + 1), np.arange(len(y)))  # every value, and points between them
    span = float(np.ptp(y)) or 1.0
    level = np.rint((np.interp(x, np.arange(len(y)), y) - y.min()) / span * (rows - 1)).astype(int)
    at = np.minimum(x * columns / last, columns - 1).astype(int)
    low, high = np.full(columns, rows), np.zeros(columns, int)
    np.minimum.at(low, at, level)
    np.maximum.at(high, at, level)
    before = low[:-1].copy(), high[:-1].copy()
    low[1:] = np.minimum(low[1:], before[1] + 1)  # no gap to the column before
    high[1:] = np.maximum(high[1:], before[0] - 1)
    level = np.arange(rows)[::-1, None]
    dots = (low <= level) & (level <= high)
    if not braille:
        return ["".join(line).rstrip() for line in np.where(dots, "*", " ")]
    codes = (dots.reshape(height, 4, width, 2) * _DOTS[:, None]).sum((1, 3)) + _BRAILLE
    return ["".join(map(chr, line)) for line in codes]


def curves_text(columns: dict[str, list[Any]], summary: dict[str, Any], width: int, braille: bool = True) -> str:
    """Draw accuracy and forget fraction over the epochs, with the range of values and the peak marked.

    Parameters
    ----------
    columns : dict
        Lists "epoch", "accuracy" and "forget_fraction".
    summary : dict
        With "peak_epoch".
    width : int
        Of the terminal, in characters.
    braille : bool, default True
        As in `draw_curve`.
    """
    epochs, inner, lines = columns["epoch"], max(20, width - _MARGIN - 1), list[str]()
    for name, title in (("accuracy", "accuracy"), ("forget_fraction", "forget fraction F_e")):
        values = columns[name]
        top, bottom = f"{max(values):.2%}", f"{min(values):.2%}"
        labels = [top, *[""] * (HEIGHT - 2), bottom]
        lines.append(f"{'':{_MARGIN}}{title}")
        curve = draw_curve(values, inner, braille=braille)
        lines += [f"{label:>{_MARGIN - 1}} {line}" for label, line in zip(labels, curve, strict=True)]
    first, last = f"{epochs[0]}", f"{epochs[-1]}"
    axis = f"{first}{last:>{inner - len(first)}}"
    at = round((inner - 1) * epochs.index(summary["peak_epoch"]) / max(1, len(epochs) - 1))
    mark = f"peak at {summary['peak_epoch']}"
    mark = f"{'^ ' + mark:>{at + len(mark) + 2}}" if at + len(mark) + 2 <= inner else f"{mark + ' ^':>{at + 1}}"
    return "\n".join([*lines, " " * _MARGIN + axis, " " * _MARGIN + mark])


def some_rows(n: int, keep: Sequence[int] = ()) -> list[int]:
    """Choose rows of a table of n to show: all of a short one, else some at equal distances and those to keep."""
    if n <= MOST_ROWS:
        return list(range(n))
    spread: NDArray[np.int64] = np.linspace(0, n - 1, SOME_ROWS).round().astype(np.int64)
    return sorted({*spread.tolist(), *keep})


def metric_text(columns: dict[str, list[Any]], summary: dict[str, Any], reference: int, everything: bool) -> str:
    """Write a line per epoch, then the peak, the forgotten samples and the expected gain.

    Parameters
    ----------
    columns : dict of lists
        "epoch" first; a row of the table for each.
    summary : dict
        As `fmn-ref metric --json` has it.
    reference : int
        Epoch that the others are compared with.
    everything : bool
        Print all epochs of a long history.
    """
    n, lines = len(columns["epoch"]), [f"{'epoch':>6} {'accuracy':>9} {'F_e':>9} {'L_e':>9} {'retained':>9}"]
    rows = list(range(n)) if everything else some_rows(n, [columns["epoch"].index(summary["peak_epoch"])])
    for epoch, *values in (tuple(column[row] for column in columns.values()) for row in rows):
        lines.append(f"{epoch:6d} " + " ".join(f"{v:9.4f}" for v in values))
    if len(rows) < n:
        lines.append(f"{len(rows)} of {n} epochs; --all prints the others")
    lines.append(f"F_e: right at the epoch, wrong at epoch {reference}; L_e: the reverse; retained: right at both")
    peak = f"peak forget fraction {summary['peak_forget_fraction']:.2%} at epoch {summary['peak_epoch']}"
    share = f"{summary['forgotten_samples']} of {summary['n_samples']} samples"
    lines.append(f"{peak}; {share} were right once and are wrong at epoch {reference}")
    gain = f"{100 * summary['expected_gain']:.0f} ± {100 * summary['expected_gain_error']:.0f} points"
    lines.append(
        f"fusing the checkpoints may add about {gain} (fmn_ref.expected_gain: a rule fitted on image classifiers)"
    )
    return "\n".join(lines)


def rounds(plan: FusionPlan) -> str:
    """Write a line per member of a linear plan, in the order of mixing: epsilon and the accuracy reached."""
    if plan.combine == "geometric" or not plan.members:
        return ""
    lines = [f"{'round':>6} {'epoch' if plan.epochs else 'row':>6} {'eps':>7} {'accuracy':>9}"]
    lines.append(f"{'final':>6} {'':>6} {'':>7} {plan.accuracy[0]:9.4f}")
    for i, ((row, eps), accuracy) in enumerate(zip(plan.members, plan.accuracy[1:], strict=True), 1):
        lines.append(f"{i:6d} {plan.epoch_of(row):6d} {eps:7.4f} {accuracy:9.4f}")
    return "\n".join([*lines, "", ""])
