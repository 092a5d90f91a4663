"""The documentation builds without a warning, and the tutorial runs as it is stored."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fmn_ref.cli import parser

DOCS = Path(__file__).parents[2] / "docs"


def subcommands():
    """{name: argparse parser} of fmn-ref."""
    return next(a for a in parser()._actions if a.dest == "command").choices


def test_the_site_builds(tmp_path):
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "forget_fraction" in (tmp_path / "reference" / "api.html").read_text()
    commands = (tmp_path / "reference" / "cli.html").read_text()
    assert all(f'id="cmdoption-fmn-ref-{name}-json"' in commands for name in subcommands())
    assert "data:image/png" in (tmp_path / "tutorial.html").read_text() or list(tmp_path.glob("_images/*.png"))


def test_the_pages_name_every_command_and_every_method():
    commands = re.findall(r"^\| `(\w+)` \|", (DOCS / "reference" / "cli.md").read_text(), re.MULTILINE)
    assert commands == list(subcommands())
    table = (DOCS / "explanation" / "method.md").read_text().split("## Other methods of `fuse`")[1].split("\n\n")[2]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    method = next(a for a in subcommands()["fuse"]._actions if a.dest == "method")
    assert sorted(name for row in rows for name in row) == sorted(method.choices)


@pytest.mark.filterwarnings("ignore")  # the kernel's
def test_the_tutorial_runs():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(DOCS / "tutorial.ipynb", 4)
    stored = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(notebook, timeout=300).execute()
    again = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    for before, now in zip(stored, again, strict=True):
        kinds = [[set(o.get("data", {"text": 0})) for o in outputs] for outputs in (before, now)]
        assert kinds[0] == kinds[1]
        words = [
            re.sub(r"[\d.]+|/\S+|^\w+:", "#", "".join(o.get("text", "") for o in outputs)) for outputs in (before, now)
        ]
        words = [re.sub(r"(?m)^[ #]+\n", "", text) for text in words]  # a plan's rows: their number differs too
        if "| method" not in words[0]:  # which way wins, by how much, differs between machines
            assert words[0] == words[1]
