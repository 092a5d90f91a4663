"""The command line, called as a user calls it."""

import contextlib
import csv
import importlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from folders import contents
from inputs import history_of, random_probs

import fmn_ref as fmn
from fmn_ref.cli import COMMANDS, SUITES, main, parser
from fmn_ref.fusion import expectation
from fmn_ref.metrics.scores import scores


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Working directory with the predictions of a run."""
    monkeypatch.chdir(tmp_path)
    p, labels = random_probs(np.random.default_rng(5), n_samples=80)
    np.save("probs.npy", p[:, :40])
    np.save("labels.npy", labels[:40])
    np.savez("test.npz", probs=p[:, 40:], labels=labels[40:])
    np.save("correct.npy", fmn.correctness(p[:, :40], labels[:40]))
    history_of(fmn.correctness(p[:, :40], labels[:40]), "history.fmnh", labels[:40])
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


@pytest.mark.parametrize(
    ("raw", "ids"),
    [
        ("\r\n".join(f"img_{i}" for i in range(40)).encode("utf-8-sig"), [f"img_{i}" for i in range(40)]),
        ("\n".join(f"img_{i}" for i in range(40)).encode("utf-16"), [f"img_{i}" for i in range(40)]),
        (b"\r".join(b"caf\xe9 %d" % i for i in range(40)), [f"caf\udce9 {i}" for i in range(40)]),
        ("".join(f"a\u2028\x0c\x85{i}\n" for i in range(40)).encode(), [f"a\u2028\x0c\x85{i}" for i in range(40)]),
        ("\n".join(f"=cmd({i})" for i in range(40)).encode(), [f"'=cmd({i})" for i in range(40)]),
    ],
    ids=["mark", "utf-16", "latin-1", "separators", "formulas"],
)
def test_ids_of_any_editor(files, capsys, raw, ids):
    (files / "ids.txt").write_bytes(raw)
    run(capsys, "metric", "correct.npy", "--per-sample", "s.csv", "--ids", "ids.txt")
    with open("s.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row["sample_id"] for row in csv.DictReader(file)] == ids


def test_a_message_names_the_file_of_the_argument(files, capsys):
    """Where several files were read, the one that the message is about."""
    p, labels = np.load("probs.npy"), np.load("labels.npy")
    os.mkdir("epochs")
    for e, epoch in enumerate(p):
        np.save(f"epochs/epoch_{e}.npy", epoch if e != 5 else epoch * 2)
    np.save("few.npy", labels[:7])
    np.savez("few.npz", labels=labels[:7])
    np.save("float.npy", labels.astype(float))
    np.save("two.npy", np.load("correct.npy") * 2)
    np.savez("int.npz", probs=p.astype(int))
    np.save("flat.npy", labels[None].astype(float))
    select, test = ["compare", "--select", "test.npz"], ["--test", "probs.npy", "--test-labels"]
    for args, named, words in (
        (["fuse", "probs.npy", "--labels", "few.npy"], "few.npy", "expected 40 samples, got 7"),
        (["fuse", "probs.npy", "--labels", "few.npz"], "few.npz", "expected 40 samples, got 7"),
        (["fuse", "probs.npy", "--labels", "float.npy"], "float.npy", "expected integers"),
        (["fuse", "epochs", "--labels", "labels.npy"], "epoch_5.npy", "rows that sum to 1"),
        (["fuse", "int.npz", "--labels", "labels.npy"], "int.npz", "floating-point"),
        (["fuse", "probs.npy", "--labels", "labels.npy", "--correct", "two.npy"], "two.npy", "0 and 1"),
        (["metric", "two.npy"], "two.npy", "0 and 1"),
        (["metric", "flat.npy", "--labels", "labels.npy"], "flat.npy with labels.npy", "integer predictions"),
        (["metric", "probs.npy", "--labels", "few.npy"], "probs.npy with few.npy", "7 samples"),
        ([*select, *test, "few.npy"], "few.npy", "expected 40 samples, got 7"),
        ([*select, *test, "float.npy"], "float.npy", "expected integers"),
        ([*select, "--select-labels", "few.npz", *test, "labels.npy"], "few.npz", "expected 40 samples, got 7"),
    ):
        assert main([*args, *(["-o", "no.json"] if args[0] == "fuse" else [])]) == 1
        error = capsys.readouterr().err
        assert named in error, error
        assert words in error, error
        assert error.count("\n") == 1
    assert not os.path.exists("no.json")


@pytest.mark.parametrize("beside", ["labels.npy", "labels_2024.npy", "epoch_0 (1).npy"])
def test_a_file_beside_the_epochs_is_named(files, capsys, beside):
    epochs_in("epochs", np.load("probs.npy"))
    np.save(f"epochs/{beside}", np.load("labels.npy") if "labels" in beside else np.load("probs.npy")[0])
    assert main(["fuse", "epochs", "--labels", "labels.npy"]) == 1
    error = capsys.readouterr().err
    assert f"{beside}: not an epoch like epoch_3.npy" in error
    assert not os.path.exists("plan.json")


def test_any_error_is_one_line(files, capsys, monkeypatch):
    for error, shown in ((MemoryError("8 GiB\nfor x"), "MemoryError: 8 GiB for x"), (KeyError("a"), "KeyError: 'a'")):
        monkeypatch.setattr("fmn_ref.cli.load_correct", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        assert main(["metric", "correct.npy"]) == 1
        assert capsys.readouterr().err == f"fmn-ref: error: {shown}\n"


def test_one_long_id_is_refused(files, capsys):
    """NumPy pads ids to the longest one: 8 GB from a file of 2 MB."""
    os.mkdir("dynamics")
    guids = ["x" * 2_000_000, *map(str, range(999))]
    lines = (json.dumps({"guid": g, "logits_epoch_0": [1, 2], "gold": 0}) + "\n" for g in guids)
    (files / "dynamics/dynamics_epoch_0.jsonl").write_text("".join(lines))
    assert main(["import", "cartography", "dynamics"]) == 1
    assert "dynamics: sample_ids: expected ids of similar length" in capsys.readouterr().err
    assert not os.path.exists("history.npz")


def test_fuse_and_apply(files, capsys):
    p, labels = np.load("probs.npy"), np.load("labels.npy")
    content = json.loads(run(capsys, "fuse", "probs.npy", "--labels", "labels.npy", "--json", "--search", "exact"))
    plan = fmn.fuse(p, labels, search="exact")
    assert fmn.FusionPlan.load("plan.json") == plan
    assert content["selection_accuracy"] == list(plan.accuracy)
    args = ["fuse", "probs.npy", "--labels", "labels.npy", "--correct", "history.fmnh", "-o", "one.json"]
    args += ["--max-members", 1]
    assert "plan written to one.json" in run(capsys, *args)
    assert len(fmn.FusionPlan.load("one.json").members) == 1
    content = json.loads(run(capsys, "apply", "plan.json", "test.npz", "--json"))
    test = np.load("test.npz")
    np.testing.assert_array_equal(np.load("fused.npy"), plan.apply(test["probs"]))
    assert content["accuracy"] == (np.load("fused.npy").argmax(1) == test["labels"]).mean()
    assert "accuracy" not in run(capsys, "apply", "plan.json", "probs.npy")


def test_the_pool(files, capsys):
    p, labels, test = np.load("probs.npy"), np.load("labels.npy"), np.load("test.npz")
    plan = fmn.fuse(p, labels, method="pool", max_members=2)
    args = ["fuse", "probs.npy", "--labels", "labels.npy", "--method", "pool", "--max-members", 2]
    lines = run(capsys, *args).splitlines()
    assert lines[0].split() == ["row", "weight"]
    assert [line.split() for line in lines[1:3]] == [[str(e), f"{w:.4f}"] for e, w in plan.weights.items()]
    assert fmn.FusionPlan.load("plan.json") == plan
    content = json.loads(run(capsys, "apply", "plan.json", "test.npz", "--json"))
    of_pool, of_final = scores(plan.apply(test["probs"]), test["labels"]), scores(test["probs"][-1], test["labels"])
    assert (content["accuracy"], content["nll"], content["ece"]) == of_pool
    assert content["final_model_nll"] == of_final.nll
    assert f"fused: {of_pool}" in run(capsys, "apply", "plan.json", "test.npz")


def epochs_in(folder, p):
    """A folder with one file per epoch; "epoch_10" is not between "epoch_1" and "epoch_2"."""
    os.mkdir(folder)
    for e, epoch in enumerate(p, 3):
        np.save(f"{folder}/epoch_{e}.npy", epoch)


def test_a_plan_shows_the_numbers_of_the_files(files, capsys):
    """The first file is epoch_3, so row 0 is epoch 3."""
    p = np.load("probs.npy")
    epochs_in("epochs", p)
    lines = run(capsys, "fuse", "epochs", "--labels", "labels.npy", "--method", "equal").splitlines()
    plan = fmn.FusionPlan.load("plan.json")
    assert plan.epochs == tuple(range(3, 3 + len(p)))
    at = lines.index(" epoch  weight")
    shown = [line.split()[0] for line in lines[at + 1 : at + 1 + plan.forward_passes]]
    assert shown == [str(row + 3) for row in plan.weights]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ([], {}),
        (["--method", "greedy", "--max-members", "2"], {"method": "greedy", "max_members": 2}),
        (["--method", "top", "--max-forward-passes", "2"], {"method": "top", "max_forward_passes": 2}),
        (["--method", "likelihood", "--folds", "0"], {"method": "likelihood", "folds": 0}),
        (["--method", "auto", "--folds", "3", "--balanced"], {"method": "auto", "folds": 3, "balanced": True}),
        (["--window", "0", "--folds", "4"], {"window": 0, "folds": 4}),
    ],
    ids=str,
)
def test_ways_to_fuse(files, capsys, args, options):
    p, labels = np.load("probs.npy"), np.load("labels.npy")
    content = json.loads(run(capsys, "fuse", "probs.npy", "--labels", "labels.npy", "--json", *args))
    plan = fmn.fuse(p, labels, sample_weight="balanced" if options.pop("balanced", False) else None, **options)
    assert fmn.FusionPlan.load("plan.json") == plan
    assert content["method"] == plan.method
    assert content["selection_accuracy"] == list(plan.accuracy)
    assert content["members"] == [list(m) for m in plan.members]
    assert content["cv_accuracy"] == plan.cv_accuracy
    assert content["gain_interval"] == (None if plan.gain_interval is None else list(plan.gain_interval))
    assert (plan.cv_accuracy is None) == (options.get("folds", 0) == 0)
    assert str(plan) in run(capsys, "fuse", "probs.npy", "--labels", "labels.npy", *args)


def test_bounds_hold(files, capsys):
    args = ["fuse", "probs.npy", "--labels", "labels.npy", "--method", "equal"]
    for more, passes in (([], None), (["--max-members", "2"], 2), (["--max-forward-passes", "3"], 3)):
        run(capsys, *args, *more)
        plan = fmn.FusionPlan.load("plan.json")
        assert passes is None or 1 < plan.forward_passes <= passes
    assert fmn.fuse(np.load("probs.npy"), np.load("labels.npy"), method="equal").forward_passes > 3


def test_folders_and_logits_give_the_same_plan(files, capsys):
    p = np.concatenate([np.load("probs.npy")[:4], np.load("probs.npy")])  # twelve epochs
    labels, test = np.load("labels.npy"), np.load("test.npz")
    test_p = np.concatenate([test["probs"][:4], test["probs"]])
    logits = np.log(p) + 3
    np.save("logits.npy", logits)
    np.save("half_logits.npy", logits.astype(np.float16))
    np.savez("logits.npz", logits=logits, labels=labels)
    epochs_in("epochs", p)
    epochs_in("logits", logits)
    epochs_in("test", test_p)
    epochs_in("test_logits", np.log(test_p) - 7)
    np.save("test_labels.npy", test["labels"])
    plan = fmn.fuse(p, labels)
    assert plan.members
    for source in (["epochs"], ["logits.npy", "--logits"], ["logits.npz", "--logits"], ["logits", "--logits"]):
        run(capsys, "fuse", *source, "--labels", "labels.npy")
        assert fmn.FusionPlan.load("plan.json") == plan
    run(capsys, "apply", "plan.json", "test", "-o", "a.npy")
    np.testing.assert_array_equal(np.load("a.npy"), plan.apply(test_p))
    run(capsys, "apply", "plan.json", "test_logits", "--logits", "-o", "b.npy", "--labels", "test_labels.npy")
    np.testing.assert_allclose(np.load("b.npy"), plan.apply(test_p), atol=1e-6)
    run(capsys, "fuse", "half_logits.npy", "--logits", "--labels", "labels.npy")
    assert fmn.FusionPlan.load("plan.json") == fmn.fuse(fmn.from_logits(np.load("half_logits.npy")), labels)
    args = ["compare", "--select-labels", "labels.npy", "--test-labels", "test_labels.npy", "--select"]
    table = run(capsys, *args, "epochs", "--test", "test")
    assert table == fmn.compare_probabilities(p, labels, test_p, test["labels"]).to_markdown()
    assert table == run(capsys, *args, "logits", "--test", "test_logits", "--logits")


def test_import_cartography(files, capsys):
    """Written as allenai/cartography does, in the order of training."""
    logits, labels = np.log(np.load("probs.npy")).astype(np.float32), np.load("labels.npy")
    os.mkdir("dynamics")
    order = np.random.default_rng(0).permutation(40)
    for e, epoch in enumerate(logits):
        lines = [{"guid": f"g{i}", f"logits_epoch_{e}": epoch[i].tolist(), "gold": int(labels[i])} for i in order]
        (files / f"dynamics/dynamics_epoch_{e}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    content = json.loads(run(capsys, "import", "cartography", "dynamics", "-o", "dynamics.npz", "--json"))
    assert content == {"output": "dynamics.npz", "scores": [8, 40, 5], "labels": [40], "sample_ids": [40]}
    written = np.load("dynamics.npz")
    np.testing.assert_array_equal(written["scores"], logits[:, order])
    assert written["sample_ids"].tolist() == [f"g{i}" for i in order]
    found = json.loads(run(capsys, "metric", "dynamics.npz", "--json"))
    assert found["forget_fraction"] == fmn.forget_fraction(np.load("correct.npy")).tolist()
    assert run(capsys, "fuse", "dynamics.npz", "--logits", "-o", "imported.json")


def test_import_toneva(files, capsys):
    correct = np.load("correct.npy")
    stats = {np.int64(3 * i): [[0.1] * 8, correct[:, i].astype(int).tolist(), [0.2] * 8] for i in range(40)[::-1]}
    (files / "stats.pkl").write_bytes(pickle.dumps({**stats, "train": [[], [50.0]], "test": [[], [50.0]]}))
    assert "correct [8, 40]" in run(capsys, "import", "toneva", "stats.pkl")
    written = np.load("history.npz")
    np.testing.assert_array_equal(written["correct"], correct)
    assert written["sample_ids"].tolist() == [str(3 * i) for i in range(40)]
    found = json.loads(run(capsys, "metric", "history.npz", "--json"))
    assert found["forget_fraction"] == fmn.forget_fraction(correct).tolist()


def test_metric_says_what_to_expect(files, capsys, monkeypatch):
    monkeypatch.setattr(expectation, "RULE", {"constant": 0.01, "peak": 0.5, "churn": 0.25, "drop": 0.125})
    monkeypatch.setattr(expectation, "ERROR", 0.02)
    correct = np.load("correct.npy")
    gain, error = fmn.expected_gain(correct)
    assert 0.01 < gain < 1
    np.save("integers.npy", correct.astype(np.uint8))
    for source in (["correct.npy"], ["integers.npy"], ["history.fmnh"], ["probs.npy", "--labels", "labels.npy"]):
        content = json.loads(run(capsys, "metric", *source, "--json"))
        assert (content["expected_gain"], content["expected_gain_error"]) == (gain, error)
    text = run(capsys, "metric", "correct.npy")
    assert f"may add about {100 * gain:.0f} ± 2 points " in text
    large = np.random.default_rng(0).random((3, 70_001)) < 0.5
    large[0, 65536:], large[1:, 65536:] = True, False
    history_of(large, "large.fmnh")
    np.save("large.npy", large)
    for name in ("large.npy", "large.fmnh"):
        content = json.loads(run(capsys, "metric", name, "--json"))
        assert content["expected_gain"] == fmn.expected_gain(large[:, :65536])[0]


def test_apply_refuses_the_samples_that_chose_the_plan(files, capsys):
    run(capsys, "fuse", "probs.npy", "--labels", "labels.npy")
    assert main(["apply", "plan.json", "probs.npy", "--labels", "labels.npy"]) == 1
    assert "--allow-selection-data" in capsys.readouterr().err
    assert not (files / "fused.npy").exists()
    args = ["apply", "plan.json", "probs.npy", "--labels", "labels.npy", "--allow-selection-data"]
    assert "accuracy" in run(capsys, *args)


@pytest.mark.parametrize("logits", [[[2.0, 1.0], [0.0, 5.0]], [[-2.0, 1.0], [0.0, 5.0]]])
def test_logits_without_the_option_name_it(files, capsys, logits):
    np.save("logits.npy", np.array([logits] * 3))
    np.save("two.npy", np.array([0, 1]))
    compared = ["--select", "logits.npy", "--select-labels", "two.npy", "--test", "logits.npy"]
    for args in (["fuse", "logits.npy", "--labels", "two.npy"], ["compare", *compared, "--test-labels", "two.npy"]):
        assert main(args) == 1
        assert "logits.npy" in (said := capsys.readouterr().err)
        assert "--logits" in said


@pytest.mark.parametrize("shape", [(3, 40), (40,)])
def test_a_matrix_of_floats_is_told_to_be_integers(files, capsys, shape):
    """Labels alone would not help: correctness, or predictions, saved as floats."""
    np.save("right.npy", np.ones(shape))
    assert main(["metric", "right.npy"]) == 1
    said = capsys.readouterr().err
    assert "right.npy: expected bool or integers 0 and 1, got dtype float64" in said


def test_apply_knows_the_samples_that_chose_the_plan_in_any_order(files, capsys):
    """Not by their labels: two balanced sets that are sorted by class have the same."""
    order, labels = np.random.default_rng(1).permutation(40), np.load("labels.npy")
    run(capsys, "fuse", "probs.npy", "--labels", "labels.npy")
    np.save("moved.npy", np.load("probs.npy")[:, order].astype(np.float32))
    np.save("moved_labels.npy", labels[order])
    assert main(["apply", "plan.json", "moved.npy", "--labels", "moved_labels.npy"]) == 1
    assert "moved.npy: the plan was chosen on these samples" in capsys.readouterr().err
    np.save("other.npy", np.roll(np.load("probs.npy"), 1, axis=2))  # other answers: other samples
    assert "accuracy" in run(capsys, "apply", "plan.json", "other.npy", "--labels", "labels.npy")
    plan = json.loads((files / "plan.json").read_text())
    del plan["selection_samples_sha256"]  # as older versions wrote it
    (files / "plan.json").write_text(json.dumps(plan))
    assert main(["apply", "plan.json", "other.npy", "--labels", "labels.npy"]) == 1
    assert "chosen on these samples" in capsys.readouterr().err


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
        (["metric", ".."], "..: a folder, and no run there (history.fmnh is missing)"),
        (
            ["fuse", "history.fmnh", "--labels", "labels.npy"],
            "history.fmnh: expected arrays (.npy or .npz), got a correctness history",
        ),
        (["compare", "--select", "test.npz", "--test", "run"], "run: holds correctness"),
        (["fuse", "header.npy", "--labels", "labels.npy"], "header.npy"),
        (["metric", "disguised"], "disguised: an .npz file"),
        (["metric", "history.fmnh", "--labels", "labels3.npy"], "labels3.npy: not the labels"),
        (["demo", "--seeds", "0"], "seeds"),
        (["metric", "text.npy"], "got a text file"),
        (["import", "cartography", "dynamics"], "dynamics_epoch_0.jsonl:2"),
        (["import", "cartography", "run"], "run: no dynamics_epoch_*.jsonl"),
        (["import", "cartography", "dynamics", "-o", "dynamics/dynamics_epoch_0.jsonl"], "one of the files"),
        (["import", "toneva", "evil.pkl"], "evil.pkl: not example statistics"),
        (["import", "toneva", "labels.npy"], "labels.npy: not example statistics"),
        (["import", "toneva", "none.pkl"], "none.pkl"),
        (["import", "toneva", "good.pkl", "-o", "good.pkl"], "good.pkl: is one of the files"),
        (["import", "toneva", "good.pkl", "-o", "no/such/history.npz"], "history.npz"),
        (["fuse", "epochs", "--labels", "labels.npy", "-o", "epochs/epoch_3.npy"], "one of the files"),
        (["apply", "plan3.json", "epochs", "-o", "epochs/fused.npy"], "one of the files"),
        (["fuse", "epochs"], "--labels"),
        (["fuse", "mixed", "--labels", "labels.npy"], "probs[1]"),
        (["fuse", "broken", "--labels", "labels.npy"], "epoch_2.npy"),
        (["fuse", "dynamics", "--labels", "labels.npy"], "dynamics: no *.npy"),
        (["fuse", "run", "--labels", "labels.npy"], "run: holds correctness"),
        (["fuse", "probs.npy", "--labels", "labels.npy", "--folds", "1"], "folds"),
        (["fuse", "probs.npy", "--labels", "labels.npy", "--folds", "41"], "folds"),
        (["fuse", "probs.npy", "--labels", "labels.npy", "--method", "auto", "--folds", "0"], "folds"),
        (["fuse", "probs.npy", "--labels", "labels.npy", "--max-members", "0"], "max_members"),
        (["fuse", "probs.npy", "--labels", "labels.npy", "--max-forward-passes", "0"], "max_forward_passes"),
        (["fuse", "correct.npy", "--labels", "labels.npy", "--logits"], "logits["),
        (["fuse", "nan.npy", "--labels", "labels.npy", "--logits"], "logits[7], row 3"),
        (["fuse", "logits.npz"], "named 'probs'"),
        (["apply", "plan3.json", "nan.npy", "--logits"], "logits[7]"),
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
    nan = np.load("probs.npy")
    nan[7, 3] = np.nan
    np.save("nan.npy", nan)
    np.savez("logits.npz", logits=nan, labels=np.load("labels.npy"))
    (files / "dynamics").mkdir()
    line = json.dumps({"guid": "a", "logits_epoch_0": [0.0, 1.0], "gold": 0})
    (files / "dynamics" / "dynamics_epoch_0.jsonl").write_text(f"{line}\n{line[:-7]}")
    (files / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (files / "good.pkl").write_bytes(pickle.dumps({0: [[0.5], [1], [0.5]]}))
    epochs_in("epochs", np.load("probs.npy"))
    epochs_in("mixed", [nan[0], nan[1, :3], nan[2]])
    epochs_in("broken", np.load("probs.npy")[:2])
    (files / "broken" / "epoch_2.npy").write_bytes(b"epoch")
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


@pytest.mark.parametrize(
    ("array", "words"),
    [(np.array(True), "n_epochs, n_samples"), (np.zeros((2, 3, 4), int), "n_epochs, n_samples")],
)
def test_metric_names_the_file_of_a_wrong_shape(tmp_path, capsys, array, words):
    np.save(tmp_path / "wrong.npy", array)
    assert main(["metric", str(tmp_path / "wrong.npy")]) == 1
    error = capsys.readouterr().err
    assert "wrong.npy" in error
    assert words in error


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a folder that nobody can write to")
def test_unwritable_folder(files, capsys):
    """Nobody can create files in /proc, not even root."""
    assert main(["fuse", "probs.npy", "--labels", "labels.npy", "-o", "/proc/self/plan.json"]) == 1
    assert "plan.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "info", "metric", "bench", "fuse", "import", "apply", "compare", "report"])
def test_help_and_usage(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([command, "--no-such-option"])


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_a_benchmark(suite):
    assert callable(importlib.import_module(f"fmn_ref.benchmarks.{SUITES[suite][0]}").benchmark)


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
    """Two seeds of few epochs write all files; a second run reuses them and refuses other settings."""
    args = ["demo", "-o", "demo", "--seeds", "2", "--epochs", "3", "--json"]
    results = json.loads(run(capsys, *args))
    assert json.loads((files / "demo/results.json").read_text()) == results
    report = (files / "demo/report.md").read_text()
    for figure in ("curves", "matrix", "weights", "last_correct", "per_class"):
        assert f"({(path := f'noise_40/seed_0/report/{figure}.png')})" in report
        assert (files / "demo" / path).exists()
    assert "(report.html)" in report
    shown = (files / "demo/report.html").read_text()
    assert "seed_0: 3 epochs, 300 samples" in shown
    lines = {
        r["method"]: r["test_accuracy"]
        for r in json.loads((files / "demo/noise_40/seed_0/cell.json").read_text())["rows"]
    }
    for kind, row in (("fused", "KF"), ("student", "distilled KF")):
        assert f"{kind} ({row}, test samples): {lines[row]:.1%}" in shown
    run_dir = fmn.Run.open(files / "demo/noise_20/seed_1")
    assert len(run_dir.history) == 3
    assert fmn.FusionPlan.load(run_dir.run_dir / "plan.json").n_epochs == 3
    before = {p: p.stat().st_mtime_ns for p in files.rglob("demo/noise_*/**/*") if p.is_file()}
    assert json.loads(run(capsys, *args)) == results
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert main([*args[:-2], "4"]) == 1
    assert "choose another folder" in capsys.readouterr().err
    assert "one run: demo/report.html" in run(capsys, *args[:-1])


def by_any_name(folder, name):
    """Paths that lead to one file of a run, from the working directory."""
    (folder / "link").symlink_to(folder / "run")
    return [f"run/{name}", f"./run/../run/{name}", f"link/{name}", str(folder / "run" / name)]


@pytest.mark.parametrize("name", ["history.fmnh", "run.json", "resume.pt", "checkpoints/epoch_00000.pt"])
def test_an_output_never_replaces_a_file_of_the_run_that_is_read(files, capsys, name):
    recorder = fmn.Recorder("run", save=lambda path: path.write_text("weights"))
    for epoch in np.load("correct.npy")[:3]:
        recorder.record(recorder.next_epoch, epoch.astype(int), np.ones(40, int))
    (files / "run" / "resume.pt").write_text("state")
    before = {p: p.read_bytes() for p in (files / "run").rglob("*") if p.is_file()}
    for output in by_any_name(files, name):
        for args in (
            ["metric", "run", "--per-sample", output],
            ["metric", "link", "--per-sample", output],
            ["fuse", "probs.npy", "--labels", "labels.npy", "--correct", "run", "-o", output],
        ):
            assert main(args) == 1
            assert f"{output}: is one of the files to read" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (files / "run").rglob("*") if p.is_file()}
    run(capsys, "metric", "run", "--per-sample", "run/samples.csv")  # beside them


@pytest.mark.parametrize(
    "args",
    [
        ["apply", "plan.json", "probs.npy", "-o", "link.json"],
        ["metric", "correct.npy", "--per-sample", "ids.txt", "--ids", "ids.txt"],
        ["report", "run", "--images", "images.html", "-o", "images.html"],
    ],
)
def test_an_output_is_never_one_of_the_other_inputs(files, capsys, args):
    fmn.FusionPlan((), 8, 1, (0.5,)).save("plan.json")
    (files / "link.json").symlink_to("plan.json")
    for name in ("ids.txt", "images.html"):
        (files / name).write_text("mine")
    assert main(args) == 1
    assert "is one of the files to read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["history.fmnh", "run.json", "checkpoints/epoch_00000.pt", "targets/a", "plan.json"])
def test_an_output_never_replaces_a_file_of_a_run_that_is_not_read(files, capsys, name):
    recorder = fmn.Recorder("run", save=lambda path: path.write_text("weights"))
    recorder.record(0, np.ones(40, int), np.ones(40, int))
    fmn.FusionPlan((), 8, 1, (0.5,)).save("plan.json")
    fmn.FusionPlan((), 8, 1, (0.5,)).save("run/plan.json")
    before = contents(files / "run")
    for output in by_any_name(files, name):
        for args in (
            ["apply", "plan.json", "probs.npy", "-o", output],
            ["metric", "correct.npy", "--per-sample", output],
            ["import", "toneva", "correct.npy", "-o", output],
            *([] if name == "plan.json" else [["fuse", "probs.npy", "--labels", "labels.npy", "-o", output]]),
        ):
            assert main(args) == 1
            assert f"{output}: is a file of the run in {files / 'run'}" in capsys.readouterr().err
    assert contents(files / "run") == before


def test_fuse_replaces_the_plan_of_a_run(files, capsys):
    fmn.Recorder("run").record(0, np.ones(40, int), np.ones(40, int))
    for method in ("forget", "likelihood"):
        run(capsys, "fuse", "probs.npy", "--labels", "labels.npy", "--method", method, "-o", "run/plan.json")
        assert fmn.FusionPlan.load("run/plan.json").method == method


@pytest.mark.parametrize("closed", ["1>&-", "1>&- 2>&-", "0<&- 1>&-"])
@pytest.mark.parametrize(
    ("args", "status"), [("info", 0), ("metric correct.npy --csv", 0), ("apply plan.json nothing.npy", 1)]
)
def test_without_standard_output_nothing_else_changes(files, closed, args, status):
    fmn.FusionPlan((), 8, 1, (0.5,)).save("plan.json")
    command = f"'{sys.executable}' -m fmn_ref {args} {closed}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == (0 if "2>" in closed else status)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "args", [["info"], ["info", "--json"], ["metric", "correct.npy"], ["metric", "correct.npy", "--csv"]]
)
def test_output_that_cannot_be_written_is_one_line(files, args):
    """The interpreter must not complain once more at its end, with another exit status."""
    command = [sys.executable, "-m", "fmn_ref", *args]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "fmn-ref: error: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize("output", ["pipe", "folder", "null"])
def test_an_output_that_is_no_file_is_refused(files, capsys, output):
    os.mkfifo("pipe")
    os.mkdir("folder")
    os.symlink("/dev/null", "null")
    assert main(["fuse", "probs.npy", "--labels", "labels.npy", "-o", output]) == 1
    assert f"{output}: expected a regular file to replace" in capsys.readouterr().err
    assert os.path.exists("/dev/null")


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("float division"), KeyError("x"), RecursionError("deep"), MemoryError(), AssertionError()],
)
def test_any_fault_is_one_line(files, capsys, monkeypatch, error):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr("fmn_ref.cli.load_correct", fails)
    assert main(["metric", "correct.npy"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("fmn-ref: error: ")
    assert shown.count("\n") == 1
    assert len(shown) > len("fmn-ref: error: \n")


NETWORK = """
import torch
x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] > 0).long()
def make_model(): return torch.nn.Linear(6, 2)
def data(): return x, y
same_data = x, y
def by_hand(model, batch): return model(batch[0]) * 2, batch[1]
def broken(): raise KeyError("of mine")
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Working directory with a module of a user's and a run of three epochs."""
    name = f"network_{abs(hash(tmp_path))}"  # modules stay imported
    (tmp_path / f"{name}.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module(name)
    fmn.train(mine.make_model(), mine.data(), mine.data(), epochs=3, run_dir="run", progress=False)
    return name, mine


def test_predict_writes_what_fuse_apply_compare_and_metric_read(trained, capsys):
    name, mine = trained
    model = ["--model", f"{name}:make_model"]
    content = json.loads(run(capsys, "predict", "run", *model, "--data", f"{name}:data", "--json"))
    assert content == {"output": "probs.npz", "shape": [3, 30, 2], "epochs": [0, 1, 2]}
    run(capsys, "predict", "run", *model, "--data", f"{name}:same_data", "-o", "probs.npy", "--batch-size", 7)
    expected = fmn.Run.open("run", mine.make_model()).probabilities(mine.data())
    with np.load("probs.npz") as found:
        np.testing.assert_array_equal(found["probs"], np.stack(list(expected)))
        np.testing.assert_array_equal(found["labels"], mine.y)
    np.testing.assert_allclose(np.load("probs.npy"), np.stack(list(expected)), atol=1e-6)
    run(capsys, "fuse", "probs.npz")
    run(capsys, "apply", "plan.json", "probs.npz", "--allow-selection-data")
    run(capsys, "compare", "--select", "probs.npz", "--test", "probs.npz", "--allow-overlap")
    found = json.loads(run(capsys, "metric", "probs.npz", "--json"))
    assert found["accuracy"] == fmn.Run.open("run").history.correct().mean(1).tolist()


def test_predict_takes_a_forward_fn_and_names_missing_checkpoints(trained, capsys):
    name, mine = trained
    options = ["--model", f"{name}:make_model", "--data", f"{name}:data", "--forward-fn", f"{name}:by_hand"]
    os.unlink("run/checkpoints/epoch_00001.pt")
    assert "2 of 3 epochs have a checkpoint: [0, 2]" in run(capsys, "predict", "run", *options)
    model = mine.make_model()
    model.load_state_dict(fmn.checkpoints.load("run/checkpoints/epoch_00002.pt"))
    with np.load("probs.npz") as found:
        np.testing.assert_allclose(found["probs"][1], (2 * model(mine.x)).softmax(1).detach(), atol=1e-6)


def test_predict_says_which_argument_is_wrong(trained, capsys):
    name, _ = trained
    good = {"--model": f"{name}:make_model", "--data": f"{name}:data", "-o": "p.npz"}
    for option, value, words in (
        ("--model", name, "--model: expected module:function"),
        ("--model", "no_such_module:f", "--model: No module named 'no_such_module'"),
        ("--model", f"{name}:nothing", "has no attribute 'nothing'"),
        ("--model", f"{name}:x", f"--model: {name}:x: expected a torch.nn.Module, got Tensor"),
        ("--data", f"{name}:broken", "KeyError: 'of mine'"),
        ("--data", f"{name}:x", "data: expected"),
        ("-o", "p.txt", ".npy or .npz"),
        ("-o", "run/history.fmnh", "one of the files to read"),
    ):
        args = [word for pair in (good | {option: value}).items() for word in pair]
        assert main(["predict", "run", *args]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not os.path.exists("p.npz")


@pytest.mark.parametrize(
    ("args", "usage", "words"),
    [
        (["metrc", "x"], "usage: fmn-ref [-h]", "did you mean metric?"),
        (["metric", "x", "--labls", "y"], "usage: fmn-ref metric [-h]", "did you mean --labels?"),
        (["metric", "x", "--labls=y"], "usage: fmn-ref metric [-h]", "did you mean --labels?"),
        (["fuse", "x", "--method", "forgt"], "usage: fmn-ref fuse [-h]", "did you mean forget?"),
        (["metric", "x", "y"], "usage: fmn-ref metric [-h]", "unrecognized arguments: y"),
        (["metric", "x", "--qqqq"], "usage: fmn-ref metric [-h]", "unrecognized arguments: --qqqq\n"),
    ],
)
def test_a_typo_shows_the_usage_of_its_command_and_what_was_meant(capsys, args, usage, words):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith(usage)
    assert words in error


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_an_example_that_parses(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Example: ")]
    assert lines
    for line in lines:
        words = line.partition("fmn-ref ")[2].split()
        assert parser().parse_args(words).command == command


def test_a_file_in_the_wrong_place_is_told_by_its_content(files, capsys):
    torch.save({"w": torch.ones(2)}, "epoch_3.npy")
    np.savez("history.npz", correct=np.load("correct.npy"), labels=np.load("labels.npy"))
    fmn.FusionPlan.from_weights({0: 1}, 2).save("plan.json")
    (files / "labels.txt").write_text("0 1\n")
    labels = ["--labels", "labels.npy"]
    for args, words in (
        (["metric", "epoch_3.npy"], "got a checkpoint of torch; `fmn-ref predict`"),
        (["fuse", "epoch_3.npy", *labels], "expected arrays (.npy or .npz), got a checkpoint of torch"),
        (["fuse", "history.npz"], "got an .npz file of correctness or predictions, which `fmn-ref metric` reads"),
        (["fuse", "history.fmnh", *labels], "got a correctness history, which `fmn-ref metric` reads"),
        (["fuse", "probs.npy", "--labels", "labels.txt"], "labels.txt: expected arrays (.npy or .npz), got a text"),
        (["metric", "plan.json"], "got a fusion plan, which `fmn-ref apply` reads"),
        (["apply", "test.npz", "test.npz"], "test.npz: expected a plan that `fmn-ref fuse` wrote, got an .npz file"),
        (["report", "test.npz"], "test.npz: expected a run directory, got an .npz file with labels, probs"),
    ):
        assert main(args) == 1
        error = capsys.readouterr().err
        assert words in error, error
        assert error.count("\n") == 1


def test_long_histories_are_summarised_unless_all_is_asked_for(tmp_path, capsys):
    correct = np.random.default_rng(0).random((200, 50)) < 0.5
    np.save(tmp_path / "c.npy", correct)
    peak = int(fmn.forget_fraction(correct).argmax())
    lines = run(capsys, "metric", tmp_path / "c.npy").splitlines()
    shown = [int(line.split()[0]) for line in lines[1:-4]]
    assert len(shown) <= 21
    assert {0, peak, 199} <= set(shown)
    assert f"{len(shown)} of 200 epochs; --all prints the others" in lines
    assert len(run(capsys, "metric", tmp_path / "c.npy", "--all").splitlines()) == 204
    assert len(json.loads(run(capsys, "metric", tmp_path / "c.npy", "--json"))["epoch"]) == 200


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("options", "encoding", "drawn"),
    [([], "utf-8", True), ([], "ascii", True), (["--no-plot"], "utf-8", False), (["--json"], "utf-8", False)],
)
def test_curves_are_drawn_to_a_terminal_alone(files, options, encoding, drawn):
    import pty

    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "60", "PYTHONIOENCODING": f"{encoding}:replace"}
    command = [sys.executable, "-m", "fmn_ref", "metric", "correct.npy", *options]
    subprocess.run(command, stdout=slave, env=environment, check=True)
    os.close(slave)
    text = b""
    with contextlib.suppress(OSError):  # Linux reports the end as an error
        while part := os.read(master, 1 << 16):
            text += part
    os.close(master)
    lines = text.decode(encoding).splitlines()
    assert any("forget fraction F_e" in line for line in lines) == drawn
    if drawn:
        curve = lines[1:7]
        assert all(len(line) <= 60 for line in curve)
        assert any(0x2801 <= ord(c) <= 0x28FF for line in curve for c in line) == (encoding == "utf-8")
        assert any("*" in line for line in curve) == (encoding == "ascii")
