"""Tables as text: Markdown for people, CSV for programs. NumPy only."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], n_text: int = 1) -> str:
    """Write a Markdown table that ends with a line break.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : iterable of sequences of str
        Cells, one per heading.
    n_text : int, default 1
        How many columns hold text and are aligned left. The others hold numbers and are aligned right.

    Examples
    --------
    >>> print(markdown_table(["method", "accuracy"], [["KF", "92.5"]]), end="")
    | method | accuracy |
    |---|--:|
    | KF | 92.5 |
    """
    rule = "|" + "---|" * n_text + "--:|" * (len(columns) - n_text)
    lines = (" | ".join(cells).join(("| ", " |")) for cells in (columns, *rows))
    return "\n".join([next(lines), rule, *lines]) + "\n"


def csv_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table as CSV, with a header line and line breaks as on Unix.

    Text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    lines: list[str] = []
    # the default line end makes csv quote a lone \r too
    writer = csv.writer(SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n")))
    writer.writerow(columns)
    writer.writerows(map(_inert, row) for row in rows)
    return "".join(lines)


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str) or cell[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell  # a number with a sign


def one_line(value: Any, limit: int) -> str:
    """Text of `value` on one line of at most `limit` characters.

    Characters that do not show (line breaks, reversed writing, half surrogates) are replaced.

    Examples
    --------
    >>> one_line("great white shark", 12)
    'great white…'
    """
    s = str(value)
    s = s if len(s) <= limit else s[: limit - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in s)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over the seeds and its standard error; None for the error of a single seed."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(np.mean(values)), error
