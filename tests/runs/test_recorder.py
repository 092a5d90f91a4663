"""The Recorder, in one's own loop."""

import numpy as np
import pytest
import torch
from networks import make_data, make_model
from torch import nn
from training_runs import fresh

import fmn_ref as fmn


def test_three_lines_in_ones_own_loop(tmp_path):
    train_set, (x, y), _ = make_data()
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = fmn.Recorder(tmp_path, model)
    for epoch in range(3):
        model.train()
        nn.functional.cross_entropy(model(train_set[0]), train_set[1]).backward()
        optimizer.step()
        model.eval()
        recorder.record(epoch, model(x), y)
    run = recorder.run
    plan = fmn.fuse(run.probabilities((x, y)), y, correct=run.history)
    assert fmn.FusedModel(plan, fmn.Run.open(tmp_path, make_model()))(x).shape == (240, 4)
    assert recorder.peak_forget_fraction == fmn.forget_fraction(run.history).max()


def test_continues_what_is_there(tmp_path):
    fmn.Recorder(tmp_path).record(0, [0, 1], [0, 1])
    recorder = fmn.Recorder(tmp_path)
    recorder.record(3, [0, 0], [0, 1])
    assert fmn.Run.open(tmp_path).history.epochs == (0, 3)
    recorder.rewind(3)
    recorder.record(1, [1, 1], [0, 1])
    np.testing.assert_array_equal(fmn.Run.open(tmp_path).history.correct(), [[True, True], [False, True]])


def test_rewinding_everything_allows_other_samples(tmp_path):
    recorder = fmn.Recorder(tmp_path)
    recorder.rewind(0)
    recorder.record(4, [0, 1], [0, 1])
    assert recorder.next_epoch == 5
    for name in ("plan.json", "comparison.json", "notes.txt"):
        (tmp_path / name).write_text("of the old run")
    recorder.rewind(0)
    assert (recorder.next_epoch, recorder.peak_forget_fraction) == (0, 0)
    assert not {"plan.json", "comparison.json"} & {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "notes.txt").exists()
    recorder.record(0, [0, 1, 2], [0, 1, 1])
    assert "next_epoch=1" in repr(recorder)


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    def broken(path):
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fmn.Recorder(tmp_path, save=broken).record(0, [0, 1], [0, 1])
    fmn.Recorder(tmp_path).record(0, [0, 1, 1], [0, 1, 1])
    assert fmn.Run.open(tmp_path).history.n_samples == 3


def test_a_history_without_epochs_makes_room(tmp_path):
    fmn.Recorder(tmp_path)
    fmn.CorrectnessHistory(2, tmp_path / "history.fmnh", labels=[0, 1])  # killed before its first row
    fmn.Recorder(tmp_path).record(0, [0, 1, 1], [0, 1, 1])
    assert fmn.Run.open(tmp_path).history.n_samples == 3


def test_other_frameworks_save_their_own(tmp_path):
    recorder = fmn.Recorder(tmp_path, save=lambda path: path.write_text("weights"))
    recorder.record(0, [0], [0])
    assert recorder.run.checkpoints[0].read_text() == "weights"


@pytest.mark.parametrize("keep", ["all", "every:2"])
def test_checkpoints_may_be_folders(tmp_path, keep):
    def save(path):
        path.mkdir()  # fails if the folder exists, as Orbax does
        (path / "weights").write_text(path.name)

    recorder = fmn.Recorder(tmp_path, save=save, suffix=".orbax", keep=keep)
    save(tmp_path / "checkpoints" / "epoch_00000.orbax")  # left by a crash before the first row of the history
    for epoch in range(5):
        recorder.record(epoch, [0, 1, 1], [0, 1, 1])
    kept = [0, 1, 2, 3, 4] if keep == "all" else [1, 3, 4]
    assert list(recorder.run.kept.history.epochs) == kept
    assert recorder.rewind(2) == [2, 3, 4]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints" / "epoch_00002.orbax").symlink_to(tmp_path / "elsewhere")
    recorder.record(2, [0, 1, 1], [0, 1, 1])
    names = [f"epoch_{e:05d}.orbax" for e in [e for e in kept if e < 2] + [2]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    with pytest.raises(ValueError, match=r"no model attached; this is for networks of torch, .* \.orbax files"):
        recorder.run.probabilities(([0.0], [0]))


def test_a_save_that_does_not_is_noticed(tmp_path):
    recorder = fmn.Recorder(tmp_path, save=str)
    with pytest.raises(FileNotFoundError, match=r"epoch_00000\.pt: `save` returned, but there is no such file"):
        recorder.record(0, [0], [0])
    assert recorder.next_epoch == 0


def test_keep_none(tmp_path):
    recorder = fmn.Recorder(tmp_path, fresh(), keep="none")
    recorder.record(0, [0], [0])
    assert not recorder.run.checkpoints[0].exists()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda r: r.record(0, [0, 1], [0, 1]), ValueError, "next_epoch"),
        (lambda r: r.record(1, [0, 1], [1, 1]), ValueError, "labels"),
        (lambda r: r.record(1, [0, 1, 1], [0, 1, 1]), ValueError, "labels.*: 3 samples, not 2"),
        (lambda r: r.record(1, [0, 1], ["a", "b"]), TypeError, r"labels: .* np\.unique"),
        (lambda r: r.record(1, [0, 1], [0.0, 1.0]), TypeError, r"labels: expected integers, .* np\.unique"),
        (lambda r: r.record(1, [[0.3], [0.2]], [0, 1]), ValueError, "one score a sample"),
        (lambda r: r.record(1, [0.3, 0.2], [0, 1]), ValueError, "one score a sample"),
        (lambda r: r.record(1, [True, False], [0, 1]), TypeError, "Classes are integers"),
        (lambda r: r.record(1, [[np.nan, 0], [0, 1]], [0, 1]), ValueError, "NaN"),
        (lambda r: r.record(1, [[0, 1]], [0, 1]), ValueError, "one epoch"),
        (lambda r: r.record(-1, [0, 1], [0, 1]), ValueError, "epoch"),
        (lambda r: r.record("one", [0, 1], [0, 1]), TypeError, "epoch"),
        (lambda r: r.record(1, ["a", "b"], [0, 1]), TypeError, "predictions_or_scores"),
        (lambda r: fmn.Recorder(r.run_dir, keep="some"), ValueError, "keep"),
        (lambda r: fmn.Recorder(r.run_dir, config={"lr": 1}), ValueError, "lr"),
        (lambda r: fmn.Recorder(r.run_dir, config=[1]), TypeError, "config"),
        (lambda r: fmn.Recorder(r.run_dir, config={"a": object()}), TypeError, "config"),
        (lambda r: fmn.Recorder(r.run_dir, model="abc"), TypeError, "model"),
        (lambda r: fmn.Recorder(r.run_dir, save=3), TypeError, "save"),
        (lambda r: r.rewind(-1), ValueError, "epoch"),
        (lambda r: r.rewind("a"), TypeError, "epoch"),
        (lambda r: r.run.probabilities(([0.0], [0])), ValueError, "no model"),
    ],
)
def test_bad_input_loses_nothing(tmp_path, call, error, words):
    recorder = fmn.Recorder(tmp_path)
    recorder.record(0, [0, 0], [0, 1])
    with pytest.raises(error, match=words):
        call(recorder)
    np.testing.assert_array_equal(fmn.Run.open(tmp_path).history.correct(), [[True, False]])


def test_nothing_recorded(tmp_path):
    recorder = fmn.Recorder(tmp_path)
    assert recorder.peak_forget_fraction == 0
    with pytest.raises(ValueError, match="nothing recorded"):
        _ = recorder.run


def test_no_run_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        fmn.Run.open(tmp_path / "none")
    fmn.Recorder(tmp_path / "of" / "them").record(0, [0], [0])
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing\); there is one in .*them"):
        fmn.Run.open(tmp_path)
    fmn.Recorder(tmp_path).record(0, [0], [0])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json"):
        fmn.Run.open(tmp_path)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError, match="run"):
        fmn.Recorder(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_sample_numbers_put_a_shuffled_epoch_in_order(tmp_path):
    """Labels of one class do not tell an order; a DistributedSampler repeats samples."""
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, 2, (4, 30)), np.zeros(30, int)
    numbered, plain = fmn.Recorder(tmp_path / "a"), fmn.Recorder(tmp_path / "b")
    for epoch, row in enumerate(predictions):
        order = np.concatenate([rng.permutation(30), [3, 3]])
        numbered.record(epoch, row[order], labels[order], index=order)
        plain.record(epoch, row, labels)
    np.testing.assert_array_equal(numbered.run.history.packed, plain.run.history.packed)
    assert numbered.run.history.digest == plain.run.history.digest


@pytest.mark.parametrize(
    ("index", "labels", "error", "words"),
    [
        ([0, 1, 3], [0, 1, 1], ValueError, "index: not the sample numbers of the epochs before"),
        (None, [0, 1, 1], ValueError, "index: not the sample numbers of the epochs before"),
        ([0, 1], [0, 1, 1], ValueError, "index: expected 3 samples, got 2"),
        ([0, 1, 1], [0, 1, 0], ValueError, "index: expected each sample's own number"),
        ([0.0, 1.0, 2.0], [0, 1, 1], TypeError, "index: expected integers"),
        ([-1, 1, 2], [0, 1, 1], ValueError, "index"),
    ],
)
def test_sample_numbers_that_do_not_fit_are_refused(tmp_path, index, labels, error, words):
    recorder = fmn.Recorder(tmp_path)
    recorder.record(0, [0, 1, 0], [1, 0, 1], index=[2, 0, 1])
    with pytest.raises(error, match=words):
        recorder.record(1, [0, 1, 0], labels, index=index)
    recorder.record(1, [0, 1, 0], [0, 1, 1], index=[0, 1, 2])
    np.testing.assert_array_equal(recorder.run.history.correct(), [[False, False, False], [True, True, False]])
    recorder.rewind(0)
    recorder.record(0, [0, 1, 0, 1], [1, 0, 1, 0])  # other samples, without numbers
