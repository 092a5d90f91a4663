"""The table of installs follows from its record; what is missing is named with the command that installs it."""

import json

import clean_room
import pytest
from fresh_process import python

RECORD = json.loads((clean_room.ROOT / "benchmarks" / "results" / "clean_room.json").read_text())


def test_the_table_of_installs_is_as_recorded():
    page = clean_room.PAGE.read_text()
    assert clean_room.with_table(page, RECORD) == page
    tried = [{key: row[key] for key in ("source", "compiler", "without")} for row in RECORD["rows"]]
    assert tried
    assert tried == [row for row in clean_room.rows() if row in tried]  # rows not recorded yet join with the next run


def test_every_install_worked():
    for row in RECORD["rows"]:
        assert row["faults"] == []
        assert row["works"] == ["metrics", "fusion", "without_torch" if "torch" in row["without"] else "training"]


def test_build_variables_that_exclude_each_other_are_named():
    needed = "pybind11", "pybind11.setup_helpers", "setuptools", "setuptools.command", "setuptools.command.sdist"
    code = (
        "import runpy, sys; from unittest.mock import MagicMock\n"
        f"sys.modules |= dict.fromkeys({needed!r}, MagicMock())\n"
        "try: runpy.run_path(sys.argv[1])\nexcept SystemExit as error: print(error)"
    )
    printed = python(code, clean_room.ROOT / "setup.py", FMN_REQUIRE_EXT="1", FMN_NO_EXT="1")
    assert printed == "FMN_REQUIRE_EXT and FMN_NO_EXT exclude each other: unset one\n"
    assert python(code, clean_room.ROOT / "setup.py", FMN_REQUIRE_EXT="1", FMN_NO_EXT="0") == ""


def test_the_page_names_the_packages_in_an_order_that_pip_accepts():
    """pip calls it an error if packages are added beside a package that lacks torch."""
    command = "pip install numpy tqdm && pip install --no-deps ."
    assert f"\n{command}\n" in clean_room.PAGE.read_text()


@pytest.mark.parametrize(
    ("module", "command", "expected"),
    [
        ("torch", ["demo"], "fmn-ref demo needs torch: pip install torch"),
        ("torch", ["bench", "metric"], "fmn-ref bench needs torch: pip install torch"),
        ("sklearn", ["bench", "boosting"], 'fmn-ref bench needs sklearn: pip install "fmn_ref[demo]"'),
    ],
)
def test_a_command_names_the_package_that_it_lacks(module, command, expected, tmp_path):
    blocked = f"import sys; sys.modules[{module!r}] = None; from fmn_ref.cli import main; sys.stderr = sys.stdout; "
    found = python(f"{blocked}assert main({[*command, '-o', str(tmp_path / 'out')]!r}) == 1")
    assert found.startswith(f"fmn-ref: error: {expected}")
    assert found.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("cpp", "fmn_ref.kernels._kernels", "install a C++ compiler, then fmn_ref again"),
        ("numba", "numba", 'pip install "fmn_ref[numba]"'),
        ("torch", "torch", "pip install torch"),
    ],
)
def test_a_forced_backend_that_is_missing_says_how_to_get_it(name, module, expected):
    code = f"import sys; sys.modules[{module!r}] = None; import fmn_ref\n"
    found = python(code + "try: fmn_ref.backend()\nexcept ImportError as error: print(error)", FMN_BACKEND=name)
    assert found.startswith(f"the backend {name} needs {module}: {expected}")


@pytest.mark.parametrize("call", ["run.probabilities(data)", "fmn_ref.compare(run, data, data)"])
def test_a_method_that_needs_torch_says_so(call, tmp_path):
    code = (
        "import sys, fmn_ref; sys.modules['torch'] = None\n"
        "data = [[0.0, 1.0]] * 2, [0, 1]; recorder = fmn_ref.Recorder(sys.argv[1], save=lambda path: path.touch())\n"
        "recorder.record(0, *data); run = recorder.run\n"
        f"try: {call}\nexcept ImportError as error: print(error)"
    )
    assert " needs torch: pip install torch" in python(code, tmp_path / "run")
