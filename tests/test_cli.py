"""The command line, run as a user would."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import random_probs

import fmn_ref as fmn
from fmn_ref.cli import main


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with predictions of a run in it, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    p, labels = random_probs(np.random.default_rng(5), n_samples=80)
    np.save("probs.npy", p[:, :40])
    np.save("labels.npy", labels[:40])
    np.savez("test.npz", probs=p[:, 40:], labels=labels[40:])
    np.save("correct.npy", fmn.correctness(p[:, :40], labels[:40]))
    history = fmn.CorrectnessHistory(40, "history.fmnh", labels=labels[:40])
    for row in fmn.correctness(p[:, :40], labels[:40]):
        history.append(row)
    return tmp_path


def run(capsys, *args):
    assert main([str(a) for a in args]) == 0
    return capsys.readouterr().out


def test_info(capsys):
    assert json.loads(run(capsys, "info", "--json"))["name"] == fmn.backend().name
    assert fmn.backend().reason in run(capsys, "info")


def test_metric_gives_the_same_from_every_kind_of_file(files, capsys):
    expected = fmn.forget_fraction(np.load("correct.npy")).tolist()
    np.save("predictions.npy", np.load("probs.npy").argmax(2))
    np.savez("both.npz", scores=np.load("probs.npy"), labels=np.load("labels.npy"))
    np.savez("zeros_and_ones.npz", correct=np.load("correct.npy").astype(int), labels=np.load("labels.npy"))
    for args in (
        ["correct.npy"],
        ["history.fmnh"],
        ["predictions.npy", "--labels", "labels.npy"],
        ["probs.npy", "--labels", "labels.npy"],
        ["both.npz"],
        ["zeros_and_ones.npz"],
    ):
        content = json.loads(run(capsys, "metric", *args, "--json"))
        assert content["forget_fraction"] == expected
        assert content["peak_forget_fraction"] == max(expected)
    assert f"peak forget fraction {max(expected):.2%}" in run(capsys, "metric", "correct.npy")
    rows = list(csv.DictReader(run(capsys, "metric", "correct.npy", "--csv").splitlines()))
    assert [float(r["forget_fraction"]) for r in rows] == expected


def test_metric_per_sample(files, capsys):
    (files / "ids.txt").write_text("\n".join(f"img_{i}" for i in range(40)) + "\n")
    run(capsys, "metric", "correct.npy", "--per-sample", "s.csv", "--ids", "ids.txt", "--never-learned", "deepcore")
    rows = list(csv.DictReader((files / "s.csv").read_text().splitlines()))
    stats = fmn.sample_statistics(np.load("correct.npy"), never_learned="deepcore")
    assert [r["sample_id"] for r in rows] == [f"img_{i}" for i in range(40)]
    assert [float(r["forgetting_events"]) for r in rows] == stats.forgetting_events.tolist()
    assert [r["forgotten"] == "True" for r in rows] == stats.forgotten.tolist()


def test_fuse_and_apply(files, capsys):
    p, labels = np.load("probs.npy"), np.load("labels.npy")
    content = json.loads(run(capsys, "fuse", "probs.npy", "--labels", "labels.npy", "--json", "--search", "exact"))
    plan = fmn.fuse(p, labels, search="exact")
    assert fmn.FusionPlan.load("plan.json") == plan
    assert content["selection_accuracy"] == list(plan.accuracy)
    args = [
        "fuse",
        "probs.npy",
        "--labels",
        "labels.npy",
        "--correct",
        "history.fmnh",
        "-o",
        "one.json",
        "--max-rounds",
        1,
    ]
    assert "plan written to one.json" in run(capsys, *args)
    assert len(fmn.FusionPlan.load("one.json").members) == 1
    content = json.loads(run(capsys, "apply", "plan.json", "test.npz", "--json"))
    test = np.load("test.npz")
    np.testing.assert_array_equal(np.load("fused.npy"), plan.apply(test["probs"]))
    assert content["accuracy"] == (np.load("fused.npy").argmax(1) == test["labels"]).mean()
    assert "accuracy" not in run(capsys, "apply", "plan.json", "probs.npy")


def test_apply_refuses_the_samples_that_chose_the_plan(files, capsys):
    run(capsys, "fuse", "probs.npy", "--labels", "labels.npy")
    assert main(["apply", "plan.json", "probs.npy", "--labels", "labels.npy"]) == 1
    assert "--allow-selection-data" in capsys.readouterr().err
    assert not (files / "fused.npy").exists()
    args = ["apply", "plan.json", "probs.npy", "--labels", "labels.npy", "--allow-selection-data"]
    assert "accuracy" in run(capsys, *args)


def test_compare(files, capsys):
    args = ["compare", "--select", "probs.npy", "--select-labels", "labels.npy", "--test", "test.npz"]
    test = np.load("test.npz")
    table = fmn.compare_probabilities(np.load("probs.npy"), np.load("labels.npy"), test["probs"], test["labels"])
    assert run(capsys, *args) == table.to_markdown()
    assert run(capsys, *args, "--csv") == table.to_csv()
    assert run(capsys, *args, "--json") == table.to_json() + "\n"


def test_final_model_alone(files, capsys):
    p = np.load("probs.npy")
    np.savez("easy.npz", probs=p, labels=p[-1].argmax(1))
    assert "the final model alone is best" in run(capsys, "fuse", "easy.npz")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["metric", "none.npy"], "none.npy"),
        (["metric", "truncated.npy"], "truncated.npy"),
        (["metric", "pickle.npy"], "pickle.npy"),
        (["metric", "objects.npy"], "objects.npy"),
        (["metric", "truncated.npz"], "truncated.npz"),
        (["metric", "truncated.fmnh"], "truncated.fmnh"),
        (["metric", "test.npz", "--labels", "labels3.npy"], "labels"),
        (["metric", "probs.npy"], "--labels"),
        (["metric", "labels.npy"], "n_epochs, n_samples"),
        (["metric", "correct.npy", "--reference", "99"], "reference"),
        (["metric", "correct.npy", "--per-sample", "s.csv", "--ids", "short.txt"], "short.txt"),
        (["metric", "correct.npy", "--per-sample", "no/such/folder.csv"], "folder.csv"),
        (["metric", "other.npz"], "named 'correct'"),
        (["fuse", "correct.npy", "--labels", "labels.npy"], "n_classes"),
        (["fuse", "probs.npy"], "--labels"),
        (["fuse", "probs.npy", "--labels", "labels.npy", "-o", "no/such/plan.json"], "plan.json"),
        (["apply", "correct.npy", "probs.npy"], "correct.npy"),
        (["apply", "none.json", "probs.npy"], "none.json"),
        (["compare", "--select", "test.npz", "--test", "test.npz"], "40 of 40 test samples"),
        (["compare", "--select", "test.npz", "--test", "probs.npy"], "--test-labels"),
        (["compare", "--select", "test.npz", "--test", "probs.npy", "--test-labels", "labels3.npy"], "test_labels"),
        (["apply", "plan3.json", "probs.npy", "-o", "plan3.json"], "one of the files"),
        (["fuse", "probs.npy", "--labels", "labels.npy", "-o", "probs.npy"], "probs.npy: is one of the files"),
        (["apply", "plan3.json", "probs.npy", "--labels", "labels.npy", "-o", "labels.npy"], "is one of the files"),
        (["metric", "correct.npy", "--per-sample", "correct.npy"], "is one of the files"),
        (["fuse", "history.fmnh", "--labels", "labels.npy"], "history.fmnh: holds correctness, not probs"),
        (["compare", "--select", "test.npz", "--test", "run"], "run: holds correctness"),
        (["fuse", "header.npy", "--labels", "labels.npy"], "header.npy"),
        (["metric", "disguised"], "disguised: an .npz file"),
        (["metric", "history.fmnh", "--labels", "labels3.npy"], "labels3.npy: not the labels"),
        (["demo", "--seeds", "0"], "seeds"),
        (["metric", "text.npy"], "text.npy: not an .npy file"),
    ],
)
def test_bad_input_is_one_line_on_stderr(files, capsys, args, words):
    np.save("labels3.npy", np.zeros(3, int))
    np.savez("other.npz", something=np.zeros(3))
    np.save("objects.npy", np.array([{}, None]), allow_pickle=True)
    (files / "pickle.npy").write_bytes(b"\x80\x04K\x01.")
    (files / "short.txt").write_text("a\nb\n")
    for name, source in (("npy", "correct.npy"), ("npz", "test.npz"), ("fmnh", "history.fmnh")):
        (files / f"truncated.{name}").write_bytes((files / source).read_bytes()[:50])
    (files / "text.npy").write_text("epoch,accuracy\n")
    (files / "disguised").write_bytes((files / "test.npz").read_bytes())
    fmn.FusionPlan((), 8, 1, (0.5,)).save("plan3.json")
    (files / "runs" / "demo").mkdir(parents=True)
    (files / "run").mkdir()
    (files / "run" / "history.fmnh").write_bytes((files / "history.fmnh").read_bytes())
    header = (files / "probs.npy").read_bytes()
    (files / "header.npy").write_bytes(header.replace(b"'descr'", b"'descr\"", 1))
    before = sorted(files.rglob("*"))
    assert main(args) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fmn-ref: error: ")
    assert shown.err.count("\n") == 1
    assert words in shown.err
    assert sorted(files.rglob("*")) == before


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a folder that nobody can write to")
def test_unwritable_folder(files, capsys):
    """/proc takes no files from anybody, root included."""
    assert main(["fuse", "probs.npy", "--labels", "labels.npy", "-o", "/proc/self/plan.json"]) == 1
    assert "plan.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "info", "metric", "fuse", "apply", "compare"])
def test_help_and_usage(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([command, "--no-such-option"])


def test_the_installed_command_and_the_module():
    for command in ([os.path.join(os.path.dirname(sys.executable), "fmn-ref")], [sys.executable, "-m", "fmn_ref"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == fmn.__version__


def test_interrupt(monkeypatch):
    def interrupted(correct):
        raise KeyboardInterrupt

    assert main(["metric", "x.fmnh"]) == 1  # no such file comes first
    monkeypatch.setattr("fmn_ref.cli.load_correct", lambda *a, **k: interrupted(None))
    assert main(["metric", "x.fmnh"]) == 130


def test_demo_small(files, capsys):
    """Two seeds of few epochs: all files are there, a second run reuses them, other settings are refused."""
    args = ["demo", "-o", "demo", "--seeds", "2", "--epochs", "3", "--json"]
    results = json.loads(run(capsys, *args))
    assert json.loads((files / "demo/results.json").read_text()) == results
    report = (files / "demo/report.md").read_text()
    for figure in ("curves", "matrix", "weights", "last_correct", "per_class"):
        assert f"({(path := f'noise_40/seed_0/report/{figure}.png')})" in report
        assert (files / "demo" / path).exists()
    run_dir = fmn.Run.open(files / "demo/noise_20/seed_1")
    assert len(run_dir.history) == 3
    assert fmn.FusionPlan.load(run_dir.run_dir / "plan.json").n_epochs == 3
    before = {p: p.stat().st_mtime_ns for p in files.rglob("demo/noise_*/**/*") if p.is_file()}
    assert json.loads(run(capsys, *args)) == results
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert main([*args[:-2], "4"]) == 1
    assert "choose another folder" in capsys.readouterr().err
