"""Names and signatures that users call change only on purpose: docs/explanation/stability.md. Versions agree."""

import difflib
import re
import tomllib
from pathlib import Path

import public_api

import fmn_ref as fmn

ROOT = Path(__file__).parents[2]
SNAPSHOT = ROOT / "tests" / "data" / "public_api.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


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


def test_the_changelog_and_the_c_library_have_the_packages_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == fmn.__version__
    in_cmake = re.search(r"project\(fmn VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert in_cmake == re.match(r"[\d.]+\d(?=rc|$)", fmn.__version__)[0]


def test_the_extra_for_tests_holds_their_dependency_group():
    assert set(PROJECT["dependency-groups"]["test"]) <= set(PROJECT["project"]["optional-dependencies"]["test"])


def test_the_oldest_versions_are_the_lower_bounds():
    """constraints-oldest.txt pins what pyproject.toml says."""
    project = PROJECT["project"]
    extras = [line for name in ("test", "numba", "demo", "dask") for line in project["optional-dependencies"][name]]
    bounds = dict(
        re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)$", "\n".join(project["dependencies"] + extras), re.MULTILINE)
    )
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    for name in bounds.keys() - {"cmake"}:
        assert f"{pins[name]}.0".startswith(f"{bounds[name]}."), name
