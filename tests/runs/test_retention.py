"""The checkpoints that a run keeps. A killed and resumed run keeps the same ones, with the same bits."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import full_disk
from inputs import history_of
from networks import RECIPE, make_data, make_model
from training_runs import fresh, same_weights, trained

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.runs import recorder as recorder_module
from fmn_ref.runs.retention import Keep, values

TRAIN, VAL, TEST = make_data()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that keeps every checkpoint."""
    return trained(tmp_path_factory.mktemp("whole"), epochs=8)


@pytest.fixture(scope="module")
def five_epochs(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("five"), epochs=5, keep="budget:2")


def on_disk(folder):
    return sorted(int(p.stem[6:]) for p in (folder / "checkpoints").iterdir())


def by_hand(correct, n):
    """Epochs kept after each epoch, in a slow loop: while there are more than n + 1, discard the one of least value."""
    kept, after = [], []
    for e in range(len(correct)):
        kept = [*kept, e]
        while len(kept) > n + 1:
            values_of_kept = [
                sum(1 / sum(correct[k][i] for k in kept) for i in range(len(correct[j])) if correct[j][i])
                for j in kept[:-1]
            ]
            kept.remove(kept[int(np.argmin(np.round(values_of_kept, 9)))])
        after.append(kept)
    return after


class TestRule:
    def test_values_share_each_sample(self):
        correct = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], bool)
        np.testing.assert_allclose(values(correct), [1 / 3 + 1, 1 / 3 + 1])
        np.testing.assert_array_equal(values(np.zeros((3, 4), bool)), [0, 0])

    def test_of_equal_values_the_earliest_epoch_is_discarded(self):
        assert Keep.of("budget:2").dropped([3, 5, 8, 9], np.ones((4, 5), bool)) == [3]

    def test_several_go_at_once_after_the_budget_was_cut(self, rng):
        correct = rng.random((7, 60)) < 0.5
        kept = list(range(7))
        for _ in range(4):
            del kept[int(values(correct[kept]).argmin())]
        assert kept[:2] not in ([0, 1], [4, 5])  # otherwise the last two would do
        assert set(Keep.of("budget:2").dropped(range(7), correct)) == set(range(7)) - set(kept)
        assert Keep.of("every:3").dropped(range(7), correct) == [0, 1, 3, 4]
        assert Keep.of("budget:6").dropped(range(7), correct) == []

    @pytest.mark.parametrize("text", ["all", "none", "every:1", "every:10", "budget:3"])
    def test_rules_that_are_read(self, text):
        rule, _, n = text.partition(":")
        assert Keep.of(text) == (rule, int(n or 0))

    @pytest.mark.parametrize(
        "text",
        ["", "some", "budget", "budget:", "budget:0", "budget:-1", "every:1.5", "every:x", "all:3", "every: ", 3, None],
    )
    def test_rules_that_are_refused(self, text, tmp_path):
        with pytest.raises(ValueError, match="keep: expected"):
            fmn.Recorder(tmp_path, keep=text)
        assert not list(tmp_path.iterdir())


class TestRecorder:
    def recorded(self, folder, correct, keep, epochs=None):
        """Record epochs; return the epochs on disk after each. A checkpoint holds the number of its epoch."""
        after = []
        for row, epoch in zip(correct, epochs or range(len(correct)), strict=True):
            recorder = fmn.Recorder(folder, keep=keep, save=lambda path, e=epoch: path.write_text(f"{e}"))
            recorder.record(epoch, row.astype(int), np.ones(len(row), int))
            after.append(on_disk(folder))
        return after

    @pytest.mark.parametrize("n", [1, 2, 5, 20])
    def test_a_budget_against_a_loop(self, tmp_path, rng, n):
        correct = rng.random((14, 90)) < np.linspace(0.3, 0.8, 14)[:, None]
        after = self.recorded(tmp_path, correct, f"budget:{n}")
        assert after == by_hand(correct.tolist(), n)
        assert max(map(len, after)) == min(14, n + 1)

    @pytest.mark.parametrize("n", [1, 3, 4])
    def test_every_nth_and_the_latest(self, tmp_path, rng, n):
        correct = rng.random((9, 5)) < 0.5
        expected = [[k for k in range(e + 1) if (k + 1) % n == 0 or k == e] for e in range(9)]
        assert self.recorded(tmp_path, correct, f"every:{n}") == expected

    def test_the_only_epoch_right_on_a_sample_stays(self, tmp_path):
        correct = np.zeros((7, 10), bool)
        correct[:, 3:] = True
        correct[1] = ~correct[1]  # three samples, where the others know seven: but the same seven
        assert self.recorded(tmp_path, correct, "budget:2")[4:] == [[1, 3, 4], [1, 4, 5], [1, 5, 6]]

    def test_gaps_in_the_epochs(self, tmp_path, rng):
        correct = rng.random((6, 40)) < 0.5
        epochs = [2, 3, 10, 11, 50, 51]
        expected = [[epochs[i] for i in kept] for kept in by_hand(correct.tolist(), 2)]
        assert self.recorded(tmp_path, correct, "budget:2", epochs) == expected
        kept = fmn.Run.open(tmp_path).kept
        assert list(kept.history.epochs) == expected[-1]
        assert [p.read_text() for p in kept.checkpoints] == list(map(str, expected[-1]))

    def test_a_history_alone_needs_no_checkpoints(self, tmp_path):
        recorder = fmn.Recorder(tmp_path, keep="budget:2")
        for epoch in range(5):
            recorder.record(epoch, [0, 1], [0, 1])
        assert recorder.next_epoch == 5

    def test_rewinding_drops_the_checkpoints_too(self, tmp_path, rng):
        correct = rng.random((9, 40)) < 0.5
        self.recorded(tmp_path, correct, "budget:3")
        before = on_disk(tmp_path)
        fmn.Recorder(tmp_path, keep="budget:3").rewind(6)
        assert on_disk(tmp_path) == [e for e in before if e < 6]
        for after in self.recorded(tmp_path, correct[:4], "budget:3", [6, 9, 12, 13]):
            assert len(after) <= 4
        assert on_disk(tmp_path) == list(fmn.Run.open(tmp_path).kept.history.epochs)

    def test_old_weights_never_stand_for_a_new_epoch(self, tmp_path):
        self.recorded(tmp_path, np.ones((3, 4), bool), "all")
        recorder = fmn.Recorder(tmp_path, keep="none")
        recorder.rewind(1)
        recorder.record(1, [1, 1, 1, 1], [1, 1, 1, 1])
        assert [p.exists() for p in recorder.run.checkpoints] == [True, False]

    def test_a_checkpoint_that_a_crash_left_does_not_count(self, tmp_path, rng):
        correct = rng.random((8, 40)) < 0.5
        self.recorded(tmp_path, correct[:6], "budget:2")
        (tmp_path / "checkpoints" / "epoch_00006.pt").write_text("saved, but not in the history")
        after = self.recorded(tmp_path, correct[6:], "budget:2", [9, 10])
        assert [len(a) for a in after] == [3, 3]
        assert 6 not in after[0]


class TestKept:
    def test_all_of_them_are_the_run_itself(self, whole):
        assert whole.kept is whole

    def test_none(self, tmp_path):
        run = trained(tmp_path, epochs=2, keep="none")
        assert on_disk(tmp_path) == []
        with pytest.raises(FileNotFoundError, match="checkpoints"):
            _ = run.kept

    def test_kept_epochs_have_the_bits_of_the_whole_run(self, whole, tmp_path):
        run = trained(tmp_path, epochs=8, keep="budget:3")
        np.testing.assert_array_equal(run.history.packed, whole.history.packed)
        assert on_disk(tmp_path) == by_hand(whole.history.correct().tolist(), 3)[-1]
        kept = run.kept
        assert list(kept.history.epochs) == on_disk(tmp_path)
        assert kept.history.epochs[-1] == 7
        np.testing.assert_array_equal(kept.history.correct(), whole.history.correct()[on_disk(tmp_path)])
        p, all_p = kept.probabilities(VAL), whole.probabilities(VAL)
        for i, e in enumerate(kept.history.epochs):
            np.testing.assert_array_equal(p[i], all_p[e])
        with pytest.raises(FileNotFoundError, match=r"epoch_0000\d\.pt"):
            [run.probabilities(VAL)[e] for e in range(8)]

    def test_it_can_be_fused_and_distilled(self, tmp_path):
        kept = trained(tmp_path, epochs=8, keep="every:2").kept
        assert kept.history.epochs == (1, 3, 5, 7)
        plan = fmn.fuse(kept.probabilities(VAL), VAL[1], correct=kept.history, method="equal")
        assert plan.n_epochs == 4
        fused = fmn.FusedModel(plan, fmn.Run.open(tmp_path, make_model()).kept)
        np.testing.assert_allclose(fused(TEST[0]).exp(), plan.apply(kept.probabilities(TEST)), atol=1e-6)
        assert fmn.averaged_model(kept, {0: 1.0, 3: 1.0}, TRAIN)(TEST[0]).shape == (240, 4)
        assert fmn.compare(kept, VAL, TEST)["last"].forward_passes == 1
        with pytest.raises(ValueError, match="made for 4 epochs"):
            fmn.FusedModel(plan, fmn.Run.open(tmp_path, make_model()))

    def test_training_it_again_returns_the_final_weights(self, whole, tmp_path):
        trained(tmp_path, epochs=8, keep="budget:1")
        (tmp_path / "resume.pt").unlink()
        assert same_weights(trained(tmp_path, epochs=8, keep="budget:1").model, whole.model)


class Killed(BaseException):
    """Raised by the disk operation at which the process would die, and by every later one."""


class CountedDisk:
    """Counts disk operations, and raises Killed before a given one."""

    def __init__(self, monkeypatch, folder, dies_at=None):
        self.operations, self.dies_at, self.most = 0, dies_at, 0  # most files at any moment, half-written ones too
        for where, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            monkeypatch.setattr(where, name, self.watched(getattr(where, name), folder / "checkpoints"))

    def watched(self, real, folder, fsync=os.fsync):
        def operation(*args, **options):
            if folder.exists():
                self.most = max(self.most, len(os.listdir(folder)))
            self.operations += 1
            if self.dies_at is not None and self.operations > self.dies_at:
                raise Killed
            return None if real is fsync else real(*args, **options)

        return operation


def survived(monkeypatch, dies_at, folder, work):
    """Tell whether `work` ended before the kill. Check that there were never too many checkpoints."""
    with monkeypatch.context() as patch:
        disk = CountedDisk(patch, folder, dies_at)
        try:
            work(folder)
            return True
        except Killed:
            return False
        finally:
            assert disk.most <= 3  # a budget of 1, and 2


class TestKilled:
    def test_at_any_operation_on_the_disk(self, tmp_path, monkeypatch):
        """Killed at an operation, killed again while it resumes, then resumed: the same files and weights."""

        def work(folder):
            some = TRAIN[0][:64], TRAIN[1][:64]
            return fmn.train(fresh(), some, VAL, epochs=4, run_dir=folder, keep="budget:1", **RECIPE)

        unbroken = work(tmp_path / "unbroken")
        expected = on_disk(unbroken.run_dir)
        assert expected == by_hand(unbroken.history.correct().tolist(), 1)[-1]
        assert expected == [1, 3]  # not the last two, or this would show little
        for moment in range(200):
            folder = tmp_path / str(moment)
            if survived(monkeypatch, moment, folder, work):
                break
            survived(monkeypatch, moment % 5, folder, work)
            run = work(folder)
            assert on_disk(folder) == expected
            np.testing.assert_array_equal(run.history.packed, unbroken.history.packed)
            assert run.history.epochs == unbroken.history.epochs
            assert same_weights(run.model, unbroken.model)
            for ours, theirs in zip(run.kept.checkpoints, unbroken.kept.checkpoints, strict=True):
                assert ours.read_bytes() == theirs.read_bytes()
        assert moment > 30

    @pytest.mark.parametrize("stop", range(5))
    def test_after_any_epoch(self, five_epochs, tmp_path, monkeypatch, stop):
        """Interrupted with the history one epoch ahead of resume.pt; at most n + 1 files after each epoch."""
        real, after = checkpoints.save, []

        def save(content, path):
            if path.name == "resume.pt":
                after.append(on_disk(tmp_path / "a"))
                if len(after) == stop + 1:
                    raise KeyboardInterrupt
            real(content, path)

        monkeypatch.setattr(checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "a", epochs=5, keep="budget:2")
        run = trained(tmp_path / "a", epochs=5, keep="budget:2")
        monkeypatch.undo()
        assert max(map(len, after)) <= 3
        assert on_disk(tmp_path / "a") == on_disk(five_epochs.run_dir) == after[-1]
        np.testing.assert_array_equal(run.history.packed, five_epochs.history.packed)
        assert same_weights(run.model, five_epochs.model)


class TestHalf:
    def test_a_run_is_the_same_but_for_its_checkpoints(self, whole, tmp_path, monkeypatch):
        with pytest.raises(KeyboardInterrupt):  # and resumes with all bits
            trained(tmp_path, epochs=8, half=True, augment=interrupted_in_epoch(tmp_path, 3))
        run = trained(tmp_path, epochs=8, half=True)
        np.testing.assert_array_equal(run.history.packed, whole.history.packed)
        assert same_weights(run.model, whole.model)
        p, full = run.probabilities(VAL), whole.probabilities(VAL)
        assert all(0 < np.abs(a - b).max() < 5e-3 for a, b in zip(p, full, strict=True))
        assert fmn.fuse(p, VAL[1], correct=run.history).n_epochs == 8

    def test_together_with_a_budget_and_in_ones_own_loop(self, tmp_path):
        recorder = fmn.Recorder(tmp_path, make_model(), "budget:1", half=True)
        for epoch in range(3):
            recorder.record(epoch, VAL[1], VAL[1])
        assert on_disk(tmp_path) == [1, 2]
        assert checkpoints.load(recorder.run.checkpoints[2])["0.weight"].dtype == torch.float16


def interrupted_in_epoch(folder, epoch):
    def augment(x):
        if (folder / "checkpoints" / f"epoch_{epoch - 1:05d}.pt").exists():
            raise KeyboardInterrupt
        return x

    return augment


@pytest.mark.parametrize("epochs", [range(0, 51, 5), range(100, 1200, 100), [7, 8, 9, 20, 21, 40, 41, 42, 43, 44, 99]])
def test_every_counts_recorded_rows(tmp_path, epochs):
    """Epochs that are numbered by steps, begin late or leave some out: each third row, and the latest."""
    recorder = fmn.Recorder(tmp_path, make_model(), keep="every:3")
    for epoch in epochs:
        recorder.record(epoch, [0, 1], [0, 1])
    rows = [2, 5, 8, 10]
    assert list(recorder.run.kept.history.epochs) == [list(epochs)[row] for row in rows]


def test_every_counts_on_after_a_rewind_and_a_restart(tmp_path):
    recorder = fmn.Recorder(tmp_path, make_model(), keep="every:2")
    for epoch in range(10, 60, 10):
        recorder.record(epoch, [0, 1], [0, 1])
    recorder.rewind(40)
    recorder = fmn.Recorder(tmp_path, make_model(), keep="every:2")
    for epoch in (41, 42):
        recorder.record(epoch, [0, 1], [0, 1])
    assert recorder.run.history.epochs == (10, 20, 30, 41, 42)
    assert recorder.run.kept.history.epochs == (20, 41, 42)


@pytest.mark.parametrize("keep", ["every:2", "budget:1"])
def test_a_deletion_that_fails_is_made_up_for(tmp_path, monkeypatch, caplog, keep):
    """The epoch is recorded then, and a second call would be refused."""
    recorder = fmn.Recorder(tmp_path, make_model(), keep=keep)
    for epoch in range(5):
        with monkeypatch.context() as patch:
            if epoch == 3:
                patch.setattr(recorder_module, "remove_checkpoint", lambda path: full_disk(0))
            recorder.record(epoch, [0, 1], [0, 1])
    assert recorder.next_epoch == 5
    assert "deleted after the next epoch instead" in caplog.text
    assert len(on_disk(tmp_path)) == (3 if keep == "every:2" else 2)


def test_recording_takes_no_more_memory_after_thousands_of_epochs(tmp_path, monkeypatch):
    """A path for each recorded epoch took 8 MB at 1700 epochs, at every epoch."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    labels, peaks = np.arange(40) % 4, []
    for n in (10, 4000):
        fmn.Recorder(tmp_path / str(n)).close()
        history_of([labels == 0] * n, tmp_path / str(n) / "history.fmnh", labels)
        with fmn.Recorder(tmp_path / str(n), fresh().eval(), "budget:2") as recorder:
            for epoch in range(n, n + 5):
                tracemalloc.start()
                recorder.record(epoch, labels, labels)
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
    assert min(peaks[5:]) < min(peaks[:5]) + 300_000
