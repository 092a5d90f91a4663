"""Curves as characters, and tables that stay short."""

import itertools

import numpy as np
import pytest

from fmn_ref.reporting import terminal

DOTS = {(0, 0): 1, (1, 0): 2, (2, 0): 4, (0, 1): 8, (1, 1): 16, (2, 1): 32, (3, 0): 64, (3, 1): 128}  # of Unicode


def dots_of(lines):
    """Read braille characters back: a set of (row, column) of the dots."""
    return {
        (4 * i + row, 2 * j + column)
        for i, line in enumerate(lines)
        for j, char in enumerate(line)
        for (row, column), bit in DOTS.items()
        if (ord(char) - 0x2800) & bit
    }


def test_a_line_from_corner_to_corner():
    lines = terminal.draw_curve([0, 1], 4, 2)
    assert [len(line) for line in lines] == [4, 4]
    dots = dots_of(lines)
    assert {column for _, column in dots} == set(range(8))
    assert (7, 0) in dots
    assert (0, 7) in dots
    assert all(abs(7 - row - column) <= 1 for row, column in dots)


def test_a_constant_is_a_line_at_the_bottom():
    assert terminal.draw_curve([3.0], 5, 2, braille=False) == ["", "*****"]
    assert dots_of(terminal.draw_curve([2, 2, 2], 3, 1)) == {(3, column) for column in range(6)}


@pytest.mark.parametrize("n", [2, 3, 17, 40, 41, 1000])
@pytest.mark.parametrize("braille", [True, False])
def test_curves_have_no_gap_and_reach_both_ends(n, braille):
    values = np.random.default_rng(n).random(n)
    lines = terminal.draw_curve(values, 20, 5, braille)
    if braille:
        dots = dots_of(lines)
    else:
        dots = {(i, j) for i, line in enumerate(lines) for j, char in enumerate(line) if char == "*"}
    rows, columns = (20, 40) if braille else (5, 20)
    spans = [sorted(row for row, c in dots if c == column) for column in range(columns)]
    for rows_here in spans:
        assert rows_here == list(range(rows_here[0], rows_here[-1] + 1))
    for a, b in itertools.pairwise(spans):
        assert a[0] <= b[-1] + 1
        assert b[0] <= a[-1] + 1
    assert {min(map(min, spans)), max(map(max, spans))} == {0, rows - 1}


def test_the_peak_is_marked_below_its_column():
    n = 101
    columns = {"epoch": list(range(5, 5 + n)), "accuracy": [0.5] * n, "forget_fraction": [0.0] * n}
    for epoch in (5, 30, 55, 95, 105):
        columns["forget_fraction"] = [float(e == epoch) for e in columns["epoch"]]
        text = terminal.curves_text(columns, {"peak_epoch": epoch}, 111)
        lines = text.splitlines()
        assert all(len(line) <= 111 for line in lines)
        assert f"peak at {epoch}" in lines[-1]
        assert lines[-1].index("^") - 9 == epoch - 5
        assert lines[-2].split() == ["5", "105"]


def test_a_narrow_terminal_gets_a_small_drawing():
    columns = {"epoch": [0, 1], "accuracy": [0.1, 0.2], "forget_fraction": [0.0, 0.0]}
    assert max(map(len, terminal.curves_text(columns, {"peak_epoch": 0}, 3).splitlines())) == 29


def test_long_tables_show_both_ends_and_what_is_to_keep():
    assert terminal.some_rows(40) == list(range(40))
    rows = terminal.some_rows(41, [7])
    assert len(rows) in (20, 21)
    assert {0, 7, 40} <= set(rows)
    assert rows == sorted(set(rows))
