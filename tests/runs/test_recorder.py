"""The Recorder, in one's own loop."""

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from folders import full_disk
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


class TestPaths:
    def test_another_working_directory_does_not_matter(self, tmp_path, monkeypatch):
        """Another run has the same name there: Hydra changes the directory, and so do notebooks."""
        recorders = {}
        for name, value in (("a", 1.0), ("b", 2.0)):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            model = nn.Linear(2, 2)
            nn.init.constant_(model.weight, value)
            recorders[name] = fmn.Recorder("runs/mine", model)
            recorders[name].record(0, [0, 1], [0, 1])
        runs = {name: recorder.run for name, recorder in recorders.items()}
        recorders["a"].record(1, [0, 1], [0, 1])
        assert runs["a"].checkpoint(0) == tmp_path / "a" / "runs" / "mine" / "checkpoints" / "epoch_00000.pt"
        assert fmn.Run.open(tmp_path / "a" / "runs" / "mine").history.epochs == (0, 1)
        assert fmn.Run.open(tmp_path / "b" / "runs" / "mine").history.epochs == (0,)
        assert sorted(p.name for p in runs["b"].folder.checkpoints.iterdir()) == ["epoch_00000.pt"]
        recorders["a"].rewind(1)
        assert len(runs["a"].kept.history) == 1

    def test_the_home_is_filled_in(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        fmn.Recorder("~/run").record(0, [0], [0])
        assert fmn.Run.open("~/run").run_dir == fmn.Run.open(tmp_path / "run").run_dir == tmp_path / "run"
        assert not (tmp_path / "~").exists()
        fmn.FusionPlan.from_weights({0: 1}, 1).save("~/plan.json")
        assert fmn.FusionPlan.load("~/plan.json") == fmn.FusionPlan.load(tmp_path / "plan.json")

    def test_a_copy_in_another_process_writes_to_the_same_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        recorder = pickle.loads(pickle.dumps(fmn.Recorder("run")))
        monkeypatch.chdir("/")
        recorder.record(0, [0], [0])
        assert len(fmn.Run.open(tmp_path / "run").history) == 1


class TestOneWriter:
    def test_of_several_threads_one_records(self, tmp_path):
        """Those that are refused have not replaced the other's checkpoint."""
        together = threading.Barrier(4)

        def work(value):
            model = nn.Linear(50, 50)
            nn.init.constant_(model.weight, value)
            recorder = fmn.Recorder(tmp_path, model)
            together.wait()
            try:
                recorder.record(0, [0, 1], [0, 1])
            except (ValueError, FileExistsError):
                return None
            return value

        with ThreadPoolExecutor(4) as pool:
            recorded = [v for v in pool.map(work, [1.0, 2.0, 3.0, 4.0]) if v is not None]
        assert len(recorded) == 1
        stored = torch.load(tmp_path / "checkpoints" / "epoch_00000.pt")
        assert (stored["weight"] == recorded[0]).all()

    def test_the_ranks_of_a_job_do_not_record_together(self, tmp_path):
        """Every rank makes a Recorder for one folder: all but one are refused, and told why."""
        script = "import sys, time, fmn_ref as fmn\nrecorder = fmn.Recorder(sys.argv[1])\nprint('begins', flush=True)\n"
        script += "sys.stdin.read()\nrecorder.record(0, [0, 1], [0, 1])\n"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], **pipes) for _ in range(3)]
        began = [rank.stdout.readline() for rank in ranks]  # empty for those that ended
        faults = [rank.communicate("")[1] for rank in ranks]
        assert sorted(began) == ["", "", "begins\n"]
        refused = [fault for fault in faults if fault]
        assert len(refused) == 2
        assert all("a run has one writer: of the processes of a distributed job, one records" in f for f in refused)
        assert len(fmn.Run.open(tmp_path).history) == 1


@pytest.mark.parametrize("at", range(1, 8))
def test_on_a_disk_that_is_full_once_the_same_call_succeeds_later(tmp_path, monkeypatch, at):
    """At whichever call of fsync."""
    calls, real = [0], os.fsync

    def fsync(descriptor):
        calls[0] += 1
        if calls[0] == at:
            full_disk(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    recorder, done = None, []
    for _ in range(2):
        with contextlib.suppress(OSError):
            recorder = recorder or fmn.Recorder(tmp_path, fresh(), keep="every:1")
            for epoch in range(len(done), 2):
                recorder.record(epoch, [0, 1], [0, 1])
                done.append(epoch)
    monkeypatch.undo()
    assert done == [0, 1]
    assert fmn.Run.open(tmp_path).history.epochs == (0, 1)
    names = ["checkpoints", "epoch_00000.pt", "epoch_00001.pt", "history.fmnh", "run.json"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name != ".lock") == names


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["run.json", "history.fmnh"])
def test_something_else_in_place_of_a_file_is_named(tmp_path, make, name):
    """A FIFO is not waited for."""
    fmn.Recorder(tmp_path).record(0, [0], [0])
    (tmp_path / name).unlink()
    make(tmp_path / name)
    for call in (lambda: fmn.Recorder(tmp_path), lambda: fmn.Run.open(tmp_path)):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            call()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    with fmn.Recorder(tmp_path, nn.Linear(2, 2), config={"lr": 1}) as recorder:
        for epoch in range(3):
            recorder.record(epoch, [0, 1], [0, 1])
    (tmp_path / "resume.pt").write_bytes(b"of train")
    (tmp_path / "plan.json").write_text("{}")
    mine = [tmp_path / "notes.txt", tmp_path / "checkpoints" / "mine.pt", tmp_path / "checkpoints" / "epoch_best.pt"]
    for path in mine:
        path.write_text("keep")
    with fmn.Recorder(tmp_path, config={"lr": 2}, overwrite=True) as recorder:
        assert recorder.next_epoch == 0
        left = {p for p in tmp_path.rglob("*") if p.is_file()}
        assert left == {*mine, tmp_path / "run.json", tmp_path / ".lock"}
        recorder.record(0, [0, 1, 1], [0, 1, 1])
    run = fmn.Run.open(tmp_path)
    assert (run.config, run.history.n_samples) == ({"lr": 2}, 3)


def test_overwrite_takes_a_new_folder_and_a_damaged_one(tmp_path):
    with fmn.Recorder(tmp_path / "new", overwrite=True) as recorder:
        recorder.record(0, [0, 1], [0, 1])
    for name in ("run.json", "history.fmnh"):
        (tmp_path / "new" / name).write_bytes(b"damaged")
    with fmn.Recorder(tmp_path / "new", overwrite=True) as recorder:
        recorder.record(0, [0, 1, 1], [0, 1, 1])
    assert fmn.Run.open(tmp_path / "new").history.n_samples == 3


def test_overwrite_leaves_the_run_of_another_process(tmp_path):
    script = "import sys, fmn_ref, time; r = fmn_ref.Recorder(sys.argv[1]); r.record(0, [1], [1]); print('there', "
    script += "flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "there\n"
        with pytest.raises(ValueError, match="a run has one writer"):
            fmn.Recorder(tmp_path, overwrite=True)
        other.stdin.close()
    assert fmn.Run.open(tmp_path).history.epochs == (0,)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(2)])
def test_scores_of_a_network_in_training_mode_are_reported_once(tmp_path, caplog, layer):
    model = nn.Sequential(nn.Linear(2, 2), layer)
    recorder = fmn.Recorder(tmp_path, model)
    for epoch in range(2):
        recorder.record(epoch, [0, 1], [0, 1])
    (record,) = caplog.records
    assert f"epoch 0: a {type(layer).__name__} of the model is in training mode" in record.getMessage()


def test_a_network_that_computes_the_same_in_both_modes_is_not_reported(tmp_path, caplog):
    fmn.Recorder(tmp_path / "a", nn.Linear(2, 2)).record(0, [0, 1], [0, 1])
    fmn.Recorder(tmp_path / "b", nn.Sequential(nn.Dropout(0.1)).eval()).record(0, [0, 1], [0, 1])
    fmn.Recorder(tmp_path / "c").record(0, [0, 1], [0, 1])
    assert not caplog.records


class Partial(nn.Module):
    """It stores its head only, and loads everything."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.base(x))

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "head" in name}


class LoadsPartially(Partial):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=False)


class Renaming(nn.Linear):
    def __init__(self):
        super().__init__(6, 4)
        self.register_state_dict_post_hook(lambda module, state, *_: state.update(old=state.pop("weight")))


class InAList(nn.Module):
    """Its layers are in a plain list, where no state_dict finds them."""

    def __init__(self, keep=lambda layers: layers):
        super().__init__()
        self.layers, self.scale = keep([nn.Linear(6, 6), nn.Linear(6, 4)]), nn.Parameter(torch.ones(()))

    def forward(self, x):
        first, last = self.layers if isinstance(self.layers, list) else self.layers["all"]
        return last(first(x).tanh()) * self.scale


class OpenBase(LoadsPartially):
    """It trains what it leaves out."""

    def __init__(self):
        super().__init__()
        self.base.requires_grad_(True)


UNLOADABLE = {
    "a part left out": (Partial, "cannot be loaded into it again.*base.weight"),
    "another name": (Renaming, "cannot be loaded into it again.*old"),
    "layers in a list": (InAList, r"layers\[0\].weight is trained, but no part of the state_dict"),
    "layers in a dict": (lambda: InAList(lambda layers: {"all": layers}), r"layers\['all'\]\[0\].weight is trained"),
    "a trained part left out": (OpenBase, "base.weight is trained, but its state_dict leaves it out"),
}


@pytest.mark.parametrize("name", UNLOADABLE)
def test_a_state_that_would_not_bring_the_network_back_is_refused_at_the_first_record(tmp_path, name):
    make, match = UNLOADABLE[name]
    model, (x, y) = make(), make_data()[1]
    nn.functional.cross_entropy(model(x), y).backward()
    with fmn.Recorder(tmp_path, model) as recorder:
        with pytest.raises(ValueError, match="(?s)" + match):
            recorder.record(0, model(x).detach(), y)
        assert not list(recorder.folder.checkpoints.iterdir())
        assert not recorder.folder.history.exists()


def with_teacher():
    """A teacher in a list, where the optimizer does not find it either."""
    model = nn.Linear(6, 4)
    model.others = [nn.Linear(6, 4), {"itself": model, "weight": model.weight, "free": nn.Linear(2, 2)}]
    return model


@pytest.mark.parametrize("make", [LoadsPartially, with_teacher])
def test_a_state_that_the_network_loads_is_recorded(tmp_path, make):
    torch.manual_seed(0)
    model, (x, y) = make(), make_data()[1]
    nn.functional.cross_entropy(model(x), y).backward()
    recorder, truth = fmn.Recorder(tmp_path, model), []
    for epoch in range(2):
        with torch.no_grad():
            model.get_parameter("head.weight" if make is LoadsPartially else "weight").mul_(2)
            truth.append(model(x).softmax(1).numpy())
        recorder.record(epoch, truth[-1], y)
    for found, expected in zip(recorder.run.probabilities((x, y)), truth, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_train_refuses_a_network_that_does_not_load_its_state_before_the_first_epoch(tmp_path):
    train_set, val, _ = make_data()
    with pytest.raises(ValueError, match="cannot be loaded into it again"):
        fmn.train(Partial(), train_set, val, epochs=2, run_dir=tmp_path, progress=False)
    assert not list((tmp_path / "checkpoints").iterdir())
