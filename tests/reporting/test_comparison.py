"""Controls and tables: every row is computed again, and figures are drawn."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from inputs import random_probs
from networks import RECIPE, make_data, make_model

import fmn_ref as fmn
from fmn_ref.fusion import baselines, probabilities
from fmn_ref.fusion.mixtures import mixture
from fmn_ref.reporting import comparison, plot

TRAIN, VAL, TEST = make_data()


@pytest.fixture(scope="module")
def table(run):
    options = {"epochs": 3, **RECIPE}
    return fmn.compare(run, VAL, TEST, train_data=TRAIN, make_student=make_model, distill_options=options)


def test_rows_are_what_they_say(run, table):
    select, test = run.probabilities(VAL), run.probabilities(TEST)
    k = len(table.plan.weights)
    for method, weights in (
        ("last", {11: 1.0}),
        ("last-k", baselines.last_epochs(12, k)),
        ("equally spaced", baselines.equally_spaced(12, k)),
        ("best epoch", baselines.best_epoch(run.history)),
        ("top-k", baselines.top_epochs(run.history, k)),
        ("KF", table.plan.weights),
    ):
        row = table[method]
        assert row.forward_passes == len(weights)
        assert row.selection_accuracy == (mixture(select, weights).argmax(1) == VAL[1].numpy()).mean()
        assert row.test_accuracy == (mixture(test, weights).argmax(1) == TEST[1].numpy()).mean()
    swa = fmn.averaged_model(run, baselines.swa_weights(12), TRAIN)
    assert table["SWA"].test_accuracy == (swa(TEST[0]).argmax(1) == TEST[1]).double().mean().item()
    names = [r.method for r in table.rows]
    singles = ["EMA", "SWA", "averaged KF", *(f"distilled {name}" for name in ("last", "KF", "auto", "pool"))]
    assert names[-7:] == singles
    assert all(r.forward_passes == 1 for r in table.rows[-6:])
    with pytest.raises(KeyError, match="there are last"):
        table["bagging"]


def test_a_comparison_finds_the_correctness_of_each_epoch_once(monkeypatch):
    p, labels = random_probs(np.random.default_rng(3), n_samples=100)
    seen = []
    monkeypatch.setattr(probabilities, "correctness", lambda a, y: seen.append(len(a)) or fmn.correctness(a, y))
    fmn.compare_probabilities(p[:, :60], labels[:60], p[:, 60:], labels[60:])
    assert seen == [60] * len(p)


@pytest.mark.parametrize("calibrated", [False, True], ids=["auto chooses the pool", "auto keeps the final model"])
def test_the_rows_of_the_methods_are_what_fuse_finds(calibrated):
    """Labels that are drawn from a calibrated final model's own probabilities leave nothing to find."""
    rng = np.random.default_rng(2)
    p, labels = random_probs(rng, n_samples=300)
    if calibrated:
        labels = (p[-1].cumsum(1) > rng.random((300, 1))).argmax(1)
    table = fmn.compare_probabilities(p[:, :150], labels[:150], p[:, 150:], labels[150:])
    kept = {}
    for method in comparison.OTHER_METHODS:
        folds = None if method == "auto" else 0
        plan = fmn.fuse(p[:, :150], labels[:150], method=method, folds=folds)
        fused = plan.apply(p[:, 150:])
        assert table[method].forward_passes == plan.forward_passes
        assert table[method].selection_accuracy == plan.accuracy[-1]
        assert table[method].test_accuracy == (fused.argmax(1) == labels[150:]).mean()
        kept[method] = plan.members
    assert kept["pool"]
    assert kept["auto"] == (() if calibrated else kept["pool"])


def test_formats(table):
    assert len(list(csv.DictReader(io.StringIO(table.to_csv())))) == len(table.rows)
    content = json.loads(table.to_json())
    assert [r["method"] for r in content["rows"]] == [r.method for r in table.rows]
    assert f"| KF | {table['KF'].forward_passes} |" in table.to_markdown()
    assert "scored on 240." in str(table)


def test_scoring_on_the_selection_set_is_refused(run, rng):
    with pytest.raises(ValueError, match="240 of 240"):
        fmn.compare(run, VAL, VAL)
    half = tuple(torch.cat([a[:120], b[:120]]) for a, b in zip(VAL, TEST, strict=True))
    with pytest.raises(ValueError, match="120 of 240"):
        fmn.compare(run, VAL, half)
    same = fmn.compare(run, VAL, VAL, allow_overlap=True)["KF"]
    assert same.test_accuracy == same.selection_accuracy
    with pytest.raises(ValueError, match="10 of 240"):
        fmn.compare(run, tuple(a[:10] for a in TEST), TEST)
    p, labels = random_probs(rng)
    for part in (slice(None), slice(None, None, -1), slice(20, 40)):
        with pytest.raises(ValueError, match="are in the selection set"):
            fmn.compare_probabilities(p, labels, p[:, part], labels[part])
    table = fmn.compare_probabilities(p, labels, p, labels, allow_overlap=True)
    assert "selected on" in str(table)
    for bad in ([1], labels[31:], labels[30:] + 5):
        with pytest.raises(ValueError, match="test_labels"):
            fmn.compare_probabilities(p[:, :30], labels[:30], p[:, 30:], bad)
    assert "selected on" not in str(fmn.compare_probabilities(p[:, :30], labels[:30], p[:, 30:], labels[30:]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"select_probs": None}, "select_probs"),
        ({"test_probs": None}, "test_probs"),
        ({"test_probs": np.full((2, 4, 3), 1 / 3)}, "test_probs"),
        ({"test_probs": np.full((3, 4, 2), 1 / 2)}, "test_probs"),
        ({"test_probs": np.full((4, 3), 1 / 3)}, "test_probs"),
        ({"test_probs": np.zeros((0, 4, 3))}, "test_probs"),
        ({"test_probs": np.full((3, 4, 3), np.nan)}, "test_probs"),
        ({"test_labels": [0, 1, 2, 3]}, "test_labels"),
        ({"select_labels": [0, 1]}, "labels"),
    ],
)
def test_bad_probabilities(change, words):
    rng = np.random.default_rng(0)
    given = {"select_probs": rng.dirichlet(np.ones(3), (3, 4)), "test_probs": rng.dirichlet(np.ones(3), (3, 4))}
    given |= {"select_labels": [0, 1, 2, 0], "test_labels": [0, 1, 2, 0]}
    assert len(fmn.compare_probabilities(**given).rows) == 8 + len(comparison.OTHER_METHODS)
    as_tensors = {k: torch.tensor(v) for k, v in given.items()}
    assert fmn.compare_probabilities(**as_tensors).rows == fmn.compare_probabilities(**given).rows
    with pytest.raises((ValueError, TypeError), match=f"^{words}"):
        fmn.compare_probabilities(**given | change)


def test_students_need_train_data_and_epochs(run):
    with pytest.raises(ValueError, match="make_student"):
        fmn.compare(run, VAL, TEST, make_student=make_model)
    bare = fmn.Run(run.run_dir, run.history, run.model)
    bare.config = {}
    with pytest.raises(ValueError, match="make_student"):
        fmn.compare(bare, VAL, TEST, train_data=TRAIN, make_student=make_model)


def test_final_model_alone_is_said(rng):
    p, _ = random_probs(rng)
    y = p[-1].argmax(1)
    table = fmn.compare_probabilities(p[:, :30], y[:30], p[:, 30:], y[30:])
    assert "final model alone is best" in table.to_markdown()
    assert table["KF"].forward_passes == 1


def test_figures(run, table, tmp_path):
    figures = {
        "curves": plot.curves(run.history),
        "matrix": plot.matrix(run.history),
        "weights": plot.plan_weights(table.plan),
        "last": plot.last_correct(run.history),
        "class": plot.per_class(run.history, VAL[1]),
    }
    predictions = {"KF": table.plan.apply(run.probabilities(VAL)), "epoch 0": run.probabilities(VAL)[0]}
    recovered = fmn.recovery(run.history, predictions, VAL[1])
    figures["recovery"] = plot.recovery(recovered)
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    axes = figures["curves"].axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_array_equal(drawn["forget fraction"], fmn.forget_fraction(run.history))
    bars = [bar.get_height() for bar in figures["weights"].axes[0].patches]
    np.testing.assert_allclose(bars, list(table.plan.weights.values()))
    forgotten = fmn.sample_statistics(run.history).forgotten
    assert sum(bar.get_height() for bar in figures["last"].axes[0].patches) == forgotten.sum()
    shares = [bar.get_height() for bar in figures["class"].axes[0].patches]
    np.testing.assert_allclose(shares, [forgotten[VAL[1].numpy() == c].mean() for c in range(4)])
    axes = figures["recovery"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["KF", "epoch 0"]
    for bars, key in zip(axes.containers, ("recovered", "new", "lost"), strict=True):
        assert key in bars.get_label()
        assert [bar.get_height() for bar in bars] == [n[key] for n in recovered.counts().values()]


def test_pass_at_k_is_drawn_for_each_number_of_checkpoints(rng, tmp_path):
    correct = rng.random((5, 20, 6)) < 0.3
    for last, expected in ((None, [1, 2, 4]), ((3,), [3])):
        figure = plot.pass_at_k(correct, last)
        figure.savefig(tmp_path / "pass.png")
        for line, n in zip(figure.axes[0].lines, expected, strict=True):
            shares = [fmn.pass_at_k(correct, k, last=n).mean() for k in range(1, 7)]
            np.testing.assert_allclose(line.get_ydata(), shares)


def test_figures_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fmn_ref\[plot\]"):
        plot.curves([[True]])
