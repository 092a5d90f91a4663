"""Names and signatures that users call change only on purpose: docs/explanation/stability.md."""

import difflib
from pathlib import Path

import public_api

SNAPSHOT = Path(__file__).parents[1] / "data" / "public_api.txt"


def test_the_public_api_is_the_one_that_was_agreed():
    found, agreed = list(public_api.lines()), SNAPSHOT.read_text().splitlines()
    changes = "\n".join(difflib.unified_diff(agreed, found, "agreed", "found", lineterm="", n=0))
    accept = "accept: python tests/helpers/public_api.py > tests/data/public_api.txt, and say so in CHANGELOG.md"
    assert not changes, f"{accept}\n{changes}"


def test_the_snapshot_sees_every_interface():
    """A line of each kind, written by hand from the documentation."""
    lines = set(public_api.lines())
    assert "forget_fraction(correct, *, reference=-1, sample_weight=None)" in lines
    assert "FusionPlan.apply(self, probs)" in lines
    assert "integrations.transformers.load_fused(folder, base)" in lines
    assert "fmn-ref info --json" in lines
    assert "int fmn_threads(void);" in lines
