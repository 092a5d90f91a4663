"""A plan at the edges: bounds of its file, names of values at fault, checkpoints of a run folder, its words."""

import dataclasses
import json

import numpy as np
import pytest
from inputs import random_probs

import fmn_ref as fmn


def plan_of(members=((1, 0.5),), n_epochs=3, window=1, accuracy=(0.5, 0.6), **others):
    return fmn.FusionPlan(members, n_epochs, window, accuracy, **others)


@pytest.fixture
def file(tmp_path):
    """A function that saves a plan with some values of the file changed, or removed (None), and returns its path."""

    def write(plan, **changes):
        path = tmp_path / "plan.json"
        plan.save(path)
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if k not in changes or v is not None}))
        return path

    return write


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"n_epochs": 3.0}, "n_epochs"),
        ({"window": 1.0}, "window"),
        ({"members": ((1.0, 0.5),)}, "epoch"),
        ({"members": ((1, "0.5"),)}, "eps"),
        ({"members": ((1, "0.5"),), "window": 0, "combine": "geometric"}, "weight"),
        ({"accuracy": (0.5, "0.6")}, "accuracy"),
        ({"gain_interval": ("0", 0.1)}, "gain_interval"),
        ({"gain_interval": (0, "0.1")}, "gain_interval"),
    ],
)
def test_a_value_of_another_type_is_named(change, name):
    with pytest.raises(TypeError, match=f"^{name}: expected a"):
        plan_of(**change)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"combine": "harmonic"}, "combine: expected one of 'linear', 'geometric', got 'harmonic'"),
        ({"epochs": [-1, 2, 3]}, r"epochs: expected a value in \[0, "),
        ({"epochs": [1, 2, 2**63]}, r"epochs: expected a value in \[0, "),
        ({"epochs": [1, 2.0, 3]}, "epochs: expected an integer"),
        ({"weights": {"0": "a", "1": 1 / 6, "2": 2 / 3}}, "weights: expected a number"),
        (
            {"weights": {"0": 0.2, "1": 1 / 6, "2": 2 / 3}},
            "weights: expected 0.166667 for row 0 as in .* 0.2",
        ),
    ],
)
def test_a_file_names_the_value_at_fault(file, changes, words):
    with pytest.raises(ValueError, match=rf"plan\.json: not a valid plan: {words}"):
        fmn.FusionPlan.load(file(plan_of(), **changes))


def test_what_a_file_may_leave_out(file):
    plan = plan_of(cv_accuracy=0.5, gain_interval=(0, 0.1), samples_sha256="ab", labels_sha256="cd")
    left_out = dict.fromkeys(("selection_samples_sha256", "cv_accuracy", "gain_interval", "weights"))
    found = fmn.FusionPlan.load(file(plan, **left_out))
    assert (found.samples_sha256, found.cv_accuracy, found.gain_interval, found.labels_sha256) == ("", None, None, "cd")
    assert (plan_of().labels_sha256, plan_of().samples_sha256, plan_of().files) == ("", "", {})
    epochs = [0, 7, 2**63 - 1]
    assert fmn.FusionPlan.load(file(plan, epochs=epochs)).epochs == tuple(epochs)


def test_weights_in_a_file_may_be_rounded(file):
    """By a millionth, of the weight or of 1: so a file of six digits is read, and an edited one is not."""
    pool = fmn.FusionPlan.from_weights({0: 2000.0, 1: 0.5}, 3, combine="geometric")
    for row, within, beyond in (("0", 0.0019, 0.0021), ("1", 0.9e-6, 1.5e-6)):
        for sign in (-1, 1):
            weights = {"0": 2000.0, "1": 0.5}
            weights[row] += sign * within
            assert fmn.FusionPlan.load(file(pool, weights=weights)) == pool
            weights[row] += sign * (beyond - within)
            with pytest.raises(ValueError, match=f"not a valid plan: weights: expected .* for row {row} as in members"):
                fmn.FusionPlan.load(file(pool, weights=weights))


def test_the_file_of_a_pool_has_weights_of_members(file):
    pool = fmn.FusionPlan.from_weights({1: 0.25, 3: 2.5, 0: 0}, 5, combine="geometric")
    assert (pool.members, pool.method, pool.accuracy) == (((3, 2.5), (1, 0.25)), "weights", (0.0, 0.0))
    content = json.loads(file(pool).read_text())
    assert content["members"] == [{"row": 3, "weight": 2.5}, {"row": 1, "weight": 0.25}]
    assert content["weights"] == {"1": 0.25, "3": 2.5}
    without = plan_of(((0, 0.0), (2, 0.5)), window=0, combine="geometric")
    assert (without.weights, without.forward_passes) == ({2: 0.5}, 1)


@pytest.mark.parametrize(("n_members", "missing", "loads"), [(1000, 0, True), (1000, 1, False), (1001, 0, False)])
def test_windows_cover_what_a_file_can_pay_for(file, n_members, missing, loads):
    """A thousand epochs more than the file has bytes, a thousand times: a small file may not ask for much memory."""
    path, size = file(plan_of(((2**30, 0.001),) * n_members, 2**31, 0, (0.5,) * (n_members + 1)), weights=None), 60_000
    window = (1000 + size - 2) // 2  # with the member itself and the last epoch: 1000 + size
    text = path.read_text().replace('"window": 0', f'"window": {window}')
    path.write_text(text + " " * (size - missing - len(text)))
    if loads:
        assert fmn.FusionPlan.load(path).window == window
    else:
        with pytest.raises(ValueError, match=f"window: expected windows of epochs that the file lists, got {window}"):
            fmn.FusionPlan.load(path)


def test_a_pool_reads_only_its_members(rng):
    p, _ = random_probs(rng, n_epochs=6)
    read = []

    class Reads(list):
        def __getitem__(self, epoch):
            read.append(epoch)
            return super().__getitem__(epoch)

    fmn.FusionPlan.from_weights({4: 0.5, 1: 2.0}, 6, combine="geometric").apply(Reads(p))
    assert set(read) == {1, 4}


def test_checkpoints_of_the_run_folder_that_holds_the_plan(tmp_path, rng):
    """Shown beside the rows, if the file still is there; a plan elsewhere knows none."""
    p, labels = random_probs(rng)
    for epoch, q in zip(range(10, 90, 10), p, strict=True):
        recorder = fmn.Recorder(tmp_path / "run", save=lambda path: path.write_text("weights"))
        recorder.record(epoch, q, labels)
    stored = [tmp_path / "run" / "checkpoints" / f"epoch_{epoch:05d}.pt" for epoch in range(10, 90, 10)]
    plan = fmn.fuse(p, labels, correct=recorder.run.history)
    assert plan.files == {}
    assert len(plan.weights) > 2
    for folder in (tmp_path / "run", tmp_path):
        plan.save(folder / "plan.json")
    assert fmn.FusionPlan.load(tmp_path / "run" / "plan.json").files == {row: stored[row] for row in plan.weights}
    assert fmn.FusionPlan.load(tmp_path / "plan.json").files == {}
    gone = max(plan.weights)
    stored[gone].unlink()
    assert set(fmn.FusionPlan.load(tmp_path / "run" / "plan.json").files) == set(plan.weights) - {gone}
    dataclasses.replace(plan, epochs=()).save(tmp_path / "run" / "plan.json")
    assert fmn.FusionPlan.load(tmp_path / "run" / "plan.json").files == {}

    class OfRun(list):
        epochs, file_of = tuple(range(10, 90, 10)), staticmethod(stored.__getitem__)

    made = fmn.fuse(OfRun(p), labels)
    assert (made.files, made.epochs) == ({row: stored[row] for row in made.weights}, OfRun.epochs)


def test_the_summary_shows_the_last_accuracy_and_a_whole_estimate():
    plan = plan_of(((1, 0.5), (0, 0.25)), accuracy=(0.25, 0.5, 0.75))
    assert "75.00% on the selection set, the final model 25.00%; not cross-validated" in str(plan)
    for part in ({"cv_accuracy": 0.5}, {"gain_interval": (0, 0.1)}):
        assert str(dataclasses.replace(plan, **part)) == str(plan)


def test_the_options_by_default_and_their_largest_values(rng):
    p, labels = random_probs(rng)
    plan = fmn.fuse(p, labels)
    assert (plan.method, plan.window, plan.search) == ("forget", 1, "grid")
    for bound in (100, 2**31):
        assert fmn.fuse(p, labels, max_members=bound, max_forward_passes=bound) == plan
    assert fmn.fuse(p, labels, window=2**31).window == 2**31
    for name in ("max_members", "max_forward_passes", "window"):
        with pytest.raises(ValueError, match=rf"^{name}: expected a value in \[[01], 2147483648\], got 2147483649"):
            fmn.fuse(p, labels, **{name: 2**31 + 1})


def test_a_history_may_differ_from_the_probabilities_where_the_two_best_scores_are_close():
    """By rounding; on one sample in a hundred elsewhere too."""
    for gap, n_different, accepted in ((0.019, 200, True), (0.03, 2, True), (0.03, 3, False)):
        p = np.tile([0.05, 0.35 - gap / 2, 0.2, 0.35 + gap / 2, 0.05], (2, 200, 1))  # the third is far from both
        labels = np.where(np.arange(200) < n_different, 1, 3)
        correct = np.ones((2, 200), bool)
        if accepted:
            assert fmn.fuse(p, labels, correct=correct).n_epochs == 2
        else:
            with pytest.raises(ValueError, match=r"^correct: last row disagrees .* on 3 of 200 samples"):
                fmn.fuse(p, labels, correct=correct)
