"""Tests of recorded distillations: history, checkpoints, and a second fusion and distillation from them."""

import json

import numpy as np
import pytest
import torch
from networks import RECIPE, make_data, make_model
from torch.utils.data import DataLoader, TensorDataset
from training_runs import fresh, same_weights, trained

import fmn_ref as fmn
from fmn_ref.runs import checkpoints

TRAIN, VAL, TEST = make_data()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = trained(tmp_path_factory.mktemp("run"), epochs=8, init_seed=2)
    return fmn.FusedModel(fmn.fuse(run.probabilities(VAL), VAL[1], correct=run.history, method="equal"), run)


def distilled(folder, teacher, train_set=TRAIN, **options):
    options = {"epochs": 5, "val_data": VAL, "run_dir": folder, **RECIPE, **options}
    return fmn.distill(fresh(3), teacher, train_set, **options)


def test_history_and_checkpoints_are_the_students(teacher, tmp_path):
    student = distilled(tmp_path, teacher)
    run = fmn.Run.open(tmp_path, make_model())
    assert run.history.epochs == (0, 1, 2, 3, 4)
    assert run.config["temperature"] == 1
    for row, path in zip(run.history.correct(), run.checkpoints, strict=True):
        model = checkpoints.load_into(make_model(), path).eval()
        np.testing.assert_array_equal(row, (model(VAL[0]).argmax(1) == VAL[1]).numpy())
    assert same_weights(model, student)
    assert not student.training


def test_recording_changes_nothing(teacher, tmp_path):
    assert same_weights(distilled(tmp_path, teacher), distilled(None, teacher, val_data=None))


def test_a_student_is_fused_and_distilled_in_its_turn(teacher, tmp_path):
    run = fmn.Run.open(tmp_path / "a", distilled(tmp_path / "a", teacher))
    plan = fmn.fuse(run.probabilities(VAL), VAL[1], correct=run.history, method="equal")
    assert plan.forward_passes > 1
    fused = fmn.FusedModel(plan, run)
    np.testing.assert_allclose(fused(TEST[0]).exp(), plan.apply(run.probabilities(TEST)), atol=1e-6)
    grandchild = distilled(tmp_path / "b", fused)
    assert (grandchild(TEST[0]).argmax(1) == fused(TEST[0]).argmax(1)).float().mean() > 0.7
    assert len(fmn.Run.open(tmp_path / "b").history) == 5


@pytest.mark.parametrize("options", [{}, {"augment": lambda x: x + torch.randn_like(x) / 9}, {"keep": "budget:1"}])
@pytest.mark.parametrize("where", ["resume.pt", "epoch_00002.pt"])
def test_an_interruption_leaves_no_trace(teacher, tmp_path, monkeypatch, options, where):
    """Interrupt before the third checkpoint is written, and between it and resume.pt."""
    whole, real, calls = distilled(tmp_path / "whole", teacher, **options), checkpoints.save, []

    def interrupted(content, path):
        calls.append(path.name)
        if calls.count(where) == (3 if where == "resume.pt" else 1) and path.name == where:
            raise KeyboardInterrupt
        real(content, path)

    monkeypatch.setattr(checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "b", teacher, **options)
    monkeypatch.undo()
    assert len(fmn.Run.open(tmp_path / "b").history) == (3 if where == "resume.pt" else 2)
    assert same_weights(distilled(tmp_path / "b", teacher, **options), whole)
    kept = [fmn.Run.open(tmp_path / name).kept for name in ("whole", "b")]
    assert kept[0].history.epochs == kept[1].history.epochs
    np.testing.assert_array_equal(kept[0].history.packed, kept[1].history.packed)
    for a, b in zip(*(run.checkpoints for run in kept), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_finished_one_is_returned(teacher, tmp_path):
    student = distilled(tmp_path, teacher)
    before = (tmp_path / "history.fmnh").read_bytes()
    assert same_weights(distilled(tmp_path, teacher), student)
    (tmp_path / "resume.pt").unlink()
    assert same_weights(distilled(tmp_path, teacher), student)
    assert (tmp_path / "history.fmnh").read_bytes() == before
    with pytest.raises(FileExistsError, match="resume"):
        distilled(tmp_path, teacher, resume=False)


def test_keep_and_half(teacher, tmp_path):
    distilled(tmp_path, teacher, keep="every:2", half=True)
    kept = fmn.Run.open(tmp_path, make_model()).kept
    assert kept.history.epochs == (1, 3, 4)
    assert checkpoints.load(kept.checkpoints[0])["0.weight"].dtype == torch.float16
    assert kept.probabilities(VAL)[0].dtype == np.float32


def test_loaders_and_forward_fn(teacher, tmp_path):
    def forward(model, batch):
        return model(batch[0]), batch[2]

    three = TensorDataset(VAL[0], torch.zeros(240), VAL[1])
    options = {"forward_fn": forward, "val_data": DataLoader(three, 64)}
    distilled(tmp_path / "a", teacher, (TRAIN[0], torch.zeros(240), TRAIN[1]), **options)
    distilled(tmp_path / "b", teacher)
    histories = [fmn.Run.open(tmp_path / name).history.packed for name in "ab"]
    np.testing.assert_array_equal(*histories)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["config"]["val_data"] is None


def test_val_data_needs_a_run_dir(teacher):
    with pytest.raises(ValueError, match="val_data: needs run_dir"):
        distilled(None, teacher)


def test_other_val_data_is_refused(teacher, tmp_path):
    distilled(tmp_path, teacher, epochs=1)
    for other in (TEST, None):
        with pytest.raises(ValueError, match=r"^val_data:"):
            distilled(tmp_path, teacher, epochs=1, val_data=other)


def test_an_unknown_rule_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="keep"):
        distilled(tmp_path, teacher, keep="most")
