"""The threats of SECURITY.md that no other file tests: each file of a run folder in turn, names, terminals."""

import ast
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents

import fmn_ref as fmn
from fmn_ref.cli import main
from fmn_ref.runs import distributed_files

ROOT = Path(__file__).parents[2]
NEWEST = ROOT / "tests" / "golden" / "0.1.0rc1"
PAGE = (ROOT / "SECURITY.md").read_text()


def data():
    with np.load(NEWEST.parent / "data.npz") as file:
        return torch.from_numpy(file["x"][24:]), torch.from_numpy(file["y"][24:])


def model():
    return torch.nn.Linear(3, 4)


def read_run(folder):
    run = fmn.Run.open(folder / "run", model())
    return run.history.correct(), np.asarray(run.probabilities(data())[:])


def read_report(folder):
    return fmn.report.write_report(folder / "run", folder / "report.html").read_text()


def read_plan(folder):
    return str(fmn.FusionPlan.load(folder / "run" / "plan.json"))


def read_fused(folder):
    return fmn.FusedModel.load(folder / "fused", model())(data()[0]).detach().numpy()


def read_imported(folder):
    return np.asarray(fmn.Run.open(folder / "imported", model()).probabilities(data())[:])


READERS = {
    "run/run.json": read_run,
    "run/history.fmnh": read_run,
    "run/checkpoints/epoch_00001.pt": read_run,
    "run/plan.json": read_plan,
    "run/comparison.json": read_report,
    "fused/plan.json": read_fused,
    "fused/member_00002.pt": read_fused,
    "imported/run.json": read_imported,
    "imported/history.fmnh": read_imported,
    "imported/predictions/data.json": read_imported,
    "imported/predictions/labels.npy": read_imported,
    "imported/predictions/epoch_00001.npy": read_imported,
}
TRICKS = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Canary())),
    "a header that lies": lambda path: path.write_bytes(lying_header()),
    "deep JSON": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "a number too large": lambda path: path.write_bytes(b"9" * 100_000),
}


def lying_header():
    """An .npy file of 8 TB, by its header alone."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (2**40,)})
    return file.getvalue()


class Canary:
    def __reduce__(self):
        return os.mkdir, (os.environ["FMN_CANARY"],)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the files that 0.1.0rc1 wrote, with a clock that ends a test which waits for a pipe or a device."""

    def too_long(*_):
        raise AssertionError("waited for ten seconds")

    monkeypatch.setenv("FMN_CANARY", str(tmp_path / "RAN"))
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    yield Path(shutil.copytree(NEWEST, tmp_path / "given"))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_none_is_refused_by_name(folder, name, trick):
    """Or it is not needed, and the values are the right ones: probabilities can be computed again."""
    right = READERS[name](NEWEST if "report" not in READERS[name].__name__ else folder)
    (folder / name).unlink()
    TRICKS[trick](folder / name)
    (folder / "report.html").unlink(missing_ok=True)
    before, refused = contents(folder), ""
    try:
        found = READERS[name](folder)
    except (ValueError, OSError) as error:
        refused = str(error)
    if refused:
        assert Path(name).name in refused
    else:
        assert all(np.array_equal(a, b) for a, b in zip(found, right, strict=True))
    assert contents(folder) == before


@pytest.mark.parametrize(
    "suffix",
    ["/../../../outside", ".pt/../../outside.pt", "../outside", "", "pt", ".pt\n", 3, [".pt"], "." + "a" * 300],
)
def test_the_ending_of_a_strangers_run_leads_nowhere_else(folder, suffix):
    content = json.loads((folder / "run" / "run.json").read_text())
    (folder / "run" / "run.json").write_text(json.dumps(content | {"checkpoint_suffix": suffix}))
    with pytest.raises((ValueError, OSError), match=r"run\.json|epoch_00000"):
        read_run(folder)


@pytest.mark.parametrize("row", ["-1", "3", "../2", "2.0", "1e9", "", "٢"])
def test_the_rows_of_a_strangers_plan_are_rows_of_the_run(folder, row):
    content = json.loads((folder / "fused" / "plan.json").read_text())
    (folder / "fused" / "plan.json").write_text(json.dumps(content | {"weights": {row: 1.0}}))
    with pytest.raises(ValueError, match=r"plan\.json"):
        read_fused(folder)


def test_a_link_out_of_the_folder_is_replaced_and_not_written_through(folder, tmp_path):
    """Everything that a training writes again: the run is done anew in a folder that holds links to a file of ours."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    shutil.rmtree(folder / "run")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    for name in ("resume.pt.tmp", ".lock", "checkpoints/.epoch_00000.pt.tmp", "plan.json", "comparison.json"):
        (folder / "run" / name).symlink_to(mine)
    x, y = data()
    with contextlib.suppress(ValueError, OSError):  # the lock is refused: see test_folder.py
        fmn.train(model(), (x, y), (x, y), epochs=1, run_dir=folder / "run", progress=False)
    (folder / "run" / ".lock").unlink()
    fmn.train(model(), (x, y), (x, y), epochs=1, run_dir=folder / "run", progress=False)
    fmn.FusionPlan.from_weights({0: 1.0}, 1).save(folder / "run" / "plan.json")
    assert mine.read_text() == "mine"
    assert not (folder / "run" / "plan.json").is_symlink()


def test_a_terminal_gets_no_control_sequences_from_a_file(tmp_path, capsys):
    """A name that sets the window's title, one that turns the text round, and one with an end of line."""
    name = "\x1b]0;owned\x07\u202e\r.npy"
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    (tmp_path / "a.npy").rename(tmp_path / name)
    assert main(["metric", str(tmp_path / name)]) == 1
    assert main(["metric", str(tmp_path / f"missing{name}")]) == 1
    written = "".join(capsys.readouterr())
    assert r"\x1b]0;owned\x07\u202e\r.npy" in written
    assert not set(written) & set("\x1b\x07\u202e\r")


def calls(tree):
    """(name, {keyword: source}) of every call, names of functions with their modules: "torch.load"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_file_is_opened_by_pickle():
    """torch.load and np.load are told not to unpickle; two unpicklers of ours have a list of what they may make."""
    code = [p for p in Path(fmn.__file__).parent.rglob("*.py") if "benchmarks" not in p.parts]
    safe = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
    unpicklers, seen = set(), set()
    for path in code:
        text = path.read_text()
        unpicklers |= {path.name} if re.search(r"class \w+\(pickle\.Unpickler\)", text) else set()
        for name, options in calls(ast.parse(text)):
            seen.add(name)
            if name in safe:
                assert options.get(safe[name][0]) == safe[name][1], path
            assert not re.fullmatch(r"(pickle|marshal|shelve|dill|joblib|cloudpickle)\.\w*load\w*|eval|exec", name), (
                path
            )
    assert unpicklers == {"distributed_files.py", "importers.py"}
    assert "torch.load" in seen


def test_the_metadata_of_a_checkpoint_does_not_make_torch_import_a_part_of_it(tmp_path, monkeypatch):
    """`torch.onnx` and others are imported when somebody asks for them."""
    monkeypatch.setattr(torch, "__getattr__", lambda name: pytest.fail(f"torch was asked for {name}"))
    for name in ("onnx", "_inductor", "no_such_name"):
        (tmp_path / ".metadata").write_bytes(f"\x80\2ctorch\n{name}\n.".encode("latin-1"))
        monkeypatch.delitem(vars(torch), name, raising=False)
        with pytest.raises(ValueError, match=rf"\.metadata.*refers to torch\.{name}"):
            distributed_files.read_metadata(tmp_path)


def test_the_page_names_a_test_for_each_threat():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(\w+/test_\w+\.py)::(\w+)(?:::(\w+))?`", row)
        assert named, row
        for path, *names in named:
            text = (ROOT / "tests" / path).read_text()
            assert all(re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE) for name in filter(None, names)), row
