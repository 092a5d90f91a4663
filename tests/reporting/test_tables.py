"""CSV tables: what csv reads back, and what a spreadsheet would run."""

import csv
import io

import pytest

from fmn_ref.reporting.tables import csv_table


def read(text):
    return list(csv.reader(io.StringIO(text, newline="")))


def test_cells_come_back():
    cells = ["a", "", "a,b", 'a"b', "a\nb", "a\rb", "a\r\nb", " a ", "ünï", "\u2028", "a=1", "'=1"]
    text = csv_table(["sample_id", "x"], [(cell, i) for i, cell in enumerate(cells)])
    assert read(text) == [["sample_id", "x"], *([cell, str(i)] for i, cell in enumerate(cells))]
    assert text.startswith("sample_id,x\na,0\n")


@pytest.mark.parametrize(
    "cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "=", "-", "=HYPERLINK(1)"]
)
def test_a_spreadsheet_runs_no_cell(cell):
    assert read(csv_table(["id"], [[cell]])) == [["id"], [f"'{cell}"]]


@pytest.mark.parametrize("cell", ["-1", "+3", "-0.5", "-1e-9", -1, -0.25, None, True])
def test_numbers_with_a_sign_stay(cell):
    assert read(csv_table(["id", "x"], [["a", cell]]))[1] == ["a", "" if cell is None else str(cell)]
