"""Tests of the Recorder, of checkpoints and of `train`."""

import errno
import json
import os
import pickle
import struct
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from networks import RECIPE, make_data, make_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from training_runs import fresh, same_weights, trained

import fmn_ref as fmn
from fmn_ref import _files
from fmn_ref.runs import checkpoints
from fmn_ref.training import data, store


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), epochs=6)


def test_a_run_holds_every_epoch(run):
    assert run.history.epochs == tuple(range(6))
    assert [p.name for p in run.checkpoints] == [f"epoch_{e:05d}.pt" for e in range(6)]
    assert all(p.exists() for p in run.checkpoints)
    assert run.config["epochs"] == 6
    assert run.config["lr"] == 0.1
    made_with = json.loads((run.run_dir / "run.json").read_text())["made_with"]
    imported = {"lightning", "transformers", "keras", "jax"} & sys.modules.keys()  # other tests import them
    assert made_with.keys() == {"python", "fmn_ref", "numpy", "torch"} | imported
    assert "n_epochs=6" in repr(run)


def test_history_is_what_the_checkpoints_predict(run):
    _, (x, y), _ = make_data()
    for e, path in enumerate(run.checkpoints):
        model = checkpoints.load_into(make_model(), path).eval()
        np.testing.assert_array_equal(run.history.correct()[e], (model(x).argmax(1) == y).numpy())


def test_it_learns(run):
    assert run.history.correct()[-1].mean() > 0.45  # chance: 0.25


def test_same_seed_same_bits(run, tmp_path):
    again = trained(tmp_path, epochs=6)
    np.testing.assert_array_equal(again.history.packed, run.history.packed)
    assert same_weights(again.model, run.model)


def test_the_global_generator_is_put_back(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trained_model = make_model()
    torch.manual_seed(3)
    train_set, val, _ = make_data()
    fmn.train(trained_model, train_set, val, epochs=1, run_dir=tmp_path, **RECIPE)
    assert torch.equal(torch.rand(3), expected)


def test_continuing_after_an_interruption(run, tmp_path, monkeypatch):
    """Interrupt between the history's append and the write of resume.pt, then resume."""
    real, calls = checkpoints.save, []

    def interrupted(content, path):
        if path.name == "resume.pt":
            calls.append(path)
            if len(calls) == 3:
                raise KeyboardInterrupt
        real(content, path)

    monkeypatch.setattr(checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, epochs=6)
    monkeypatch.undo()
    assert len(fmn.Run.open(tmp_path).history) == 3
    again = trained(tmp_path, epochs=6)
    np.testing.assert_array_equal(again.history.packed, run.history.packed)
    assert same_weights(again.model, run.model)
    finished = trained(tmp_path, epochs=6)  # a finished run: the final weights are loaded
    assert same_weights(finished.model, run.model)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "lr": 1e-3},
        {"schedule": "step", "milestones": (2,), "gamma": 0.5},
        {"schedule": "constant", "momentum": 0.0},
        {"amp": True},
        {"augment": lambda x: x + 0.01 * torch.randn_like(x)},
        {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)},
    ],
    ids=str,
)
def test_options(tmp_path, options):
    run = trained(tmp_path, epochs=3, **options)
    assert len(run.history) == 3
    assert run.history.correct()[-1].mean() > 0.3


class Pairs(Dataset):
    """A map-style dataset that is not a tuple of arrays."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, i):
        return tuple(a[i] for a in self.arrays)


class Dicts(Pairs):
    def __getitem__(self, i):
        return {"input": self.arrays[0][i], "labels": self.arrays[1][i]}


def test_kinds_of_data_give_the_same_history(tmp_path):
    """Arrays, a Dataset and a DataLoader give the same samples in validation."""
    train_set, val, _ = make_data()
    histories = []
    for i, wrap in enumerate((lambda d: d, Pairs, lambda d: DataLoader(TensorDataset(*d), 512))):
        run = fmn.train(fresh(), train_set, wrap(val), epochs=2, run_dir=tmp_path / str(i), **RECIPE)
        histories.append(run.history.packed)
        np.testing.assert_array_equal(run.probabilities(wrap(val)).labels, val[1])
    np.testing.assert_array_equal(histories[0], histories[1])
    np.testing.assert_array_equal(histories[0], histories[2])


def test_a_shuffling_loader_resumes_with_the_same_bits(tmp_path):
    """The loader's own generator is reseeded as well."""
    train_set, val, _ = make_data()

    def go(folder, stop=None):
        loader = DataLoader(TensorDataset(*train_set), 32, shuffle=True, generator=torch.Generator())
        model = fresh()

        def loss(logits, labels):
            if stop is not None and (folder / "checkpoints" / "epoch_00001.pt").exists():
                raise KeyboardInterrupt
            return nn.functional.cross_entropy(logits, labels)

        return fmn.train(model, loader, val, epochs=4, run_dir=folder, loss_fn=loss, **RECIPE)

    whole = go(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "b", stop=2)
    assert same_weights(go(tmp_path / "b").model, whole.model)


class KeywordModel(nn.Module):
    """Model called like Hugging Face's: it takes keywords and returns an object with logits."""

    def __init__(self):
        super().__init__()
        self.net = make_model()

    def forward(self, input):
        class Output:
            logits = self.net(input)

        return Output()


def test_dict_batches_and_objects_with_logits(tmp_path):
    train_set, val, test = make_data()
    run = fmn.train(KeywordModel(), Dicts(train_set), Dicts(val), epochs=3, run_dir=tmp_path, **RECIPE)
    probs = run.probabilities(Dicts(val))
    np.testing.assert_array_equal(probs.labels, val[1])
    plan = fmn.fuse(probs, probs.labels, correct=run.history)
    fused = fmn.FusedModel(plan, run)(input=test[0]).exp()
    np.testing.assert_allclose(fused.numpy(), plan.apply(run.probabilities(Dicts(test))), atol=1e-6)
    assert len(data.fingerprints(Dicts(test))) == 240


def test_forward_fn(tmp_path):
    train_set, val, _ = make_data()
    three = [(x, torch.full((len(x),), 0.5), y) for x, y in (train_set, val)]

    def forward(model, batch):
        assert (batch[1] == 0.5).all()
        return model(batch[0]), batch[2].long()

    plain = trained(tmp_path / "plain", epochs=2)
    options = {"epochs": 2, "forward_fn": forward, **RECIPE}
    run = fmn.train(fresh(), three[0], three[1], run_dir=tmp_path / "arrays", **options)
    np.testing.assert_array_equal(run.history.packed, plain.history.packed)
    np.testing.assert_array_equal(run.probabilities(three[1]).labels, val[1])
    run = fmn.train(fresh(), three[0], Pairs(three[1]), run_dir=tmp_path / "set", **options)
    np.testing.assert_array_equal(run.history.packed, plain.history.packed)
    students = []
    for d, f in ((three[0], forward), (train_set, None)):
        options = {"epochs": 2, "forward_fn": f, "kd_weight": 0.5, **RECIPE}
        students.append(fmn.distill(fresh(), plain.model, d, **options))
    assert same_weights(*students)


def test_progress_shows_accuracy_and_peak_forget_fraction(tmp_path, capsys):
    trained(tmp_path, epochs=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "val=" in shown.err
    assert "peak F_e=" in shown.err


class TestRecorder:
    def test_three_lines_in_ones_own_loop(self, tmp_path):
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

    def test_continues_what_is_there(self, tmp_path):
        fmn.Recorder(tmp_path).record(0, [0, 1], [0, 1])
        recorder = fmn.Recorder(tmp_path)
        recorder.record(3, [0, 0], [0, 1])
        assert fmn.Run.open(tmp_path).history.epochs == (0, 3)
        recorder.rewind(3)
        recorder.record(1, [1, 1], [0, 1])
        np.testing.assert_array_equal(fmn.Run.open(tmp_path).history.correct(), [[True, True], [False, True]])

    def test_rewinding_everything_allows_other_samples(self, tmp_path):
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

    def test_a_failed_save_leaves_nothing_behind(self, tmp_path):
        def broken(path):
            raise OSError("no room")

        with pytest.raises(OSError, match="no room"):
            fmn.Recorder(tmp_path, save=broken).record(0, [0, 1], [0, 1])
        fmn.Recorder(tmp_path).record(0, [0, 1, 1], [0, 1, 1])
        assert fmn.Run.open(tmp_path).history.n_samples == 3

    def test_a_history_without_epochs_makes_room(self, tmp_path):
        fmn.Recorder(tmp_path)
        fmn.CorrectnessHistory(2, tmp_path / "history.fmnh", labels=[0, 1])  # killed before its first row
        fmn.Recorder(tmp_path).record(0, [0, 1, 1], [0, 1, 1])
        assert fmn.Run.open(tmp_path).history.n_samples == 3

    def test_other_frameworks_save_their_own(self, tmp_path):
        recorder = fmn.Recorder(tmp_path, save=lambda path: path.write_text("weights"))
        recorder.record(0, [0], [0])
        assert recorder.run.checkpoints[0].read_text() == "weights"

    @pytest.mark.parametrize("keep", ["all", "every:2"])
    def test_checkpoints_may_be_folders(self, tmp_path, keep):
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

    def test_a_save_that_does_not_is_noticed(self, tmp_path):
        recorder = fmn.Recorder(tmp_path, save=str)
        with pytest.raises(FileNotFoundError, match=r"epoch_00000\.pt: `save` returned, but there is no such file"):
            recorder.record(0, [0], [0])
        assert recorder.next_epoch == 0

    def test_keep_none(self, tmp_path):
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
    def test_bad_input_loses_nothing(self, tmp_path, call, error, words):
        recorder = fmn.Recorder(tmp_path)
        recorder.record(0, [0, 0], [0, 1])
        with pytest.raises(error, match=words):
            call(recorder)
        np.testing.assert_array_equal(fmn.Run.open(tmp_path).history.correct(), [[True, False]])

    def test_nothing_recorded(self, tmp_path):
        recorder = fmn.Recorder(tmp_path)
        assert recorder.peak_forget_fraction == 0
        with pytest.raises(ValueError, match="nothing recorded"):
            _ = recorder.run

    def test_no_run_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            fmn.Run.open(tmp_path / "none")
        fmn.Recorder(tmp_path / "of" / "them").record(0, [0], [0])
        with pytest.raises(FileNotFoundError, match=r"run\.json is missing\); there is one in .*them"):
            fmn.Run.open(tmp_path)
        fmn.Recorder(tmp_path).record(0, [0], [0])
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(ValueError, match=r"run\.json"):
            fmn.Run.open(tmp_path)

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(OSError, match="run"):
            fmn.Recorder(tmp_path / "run")
        assert (tmp_path / "run").read_text() == "mine"


class Versioned(nn.Module):
    """Module that changes its weights when it loads a state of an older version, as some torch modules do."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = -state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, metadata, *args)


class TestCheckpoints:
    def test_versions_of_modules_are_kept(self, tmp_path):
        checkpoints.save_state(Versioned(), tmp_path / "a.pt")
        assert (checkpoints.load_into(Versioned(), tmp_path / "a.pt").weight == 1).all()

    def test_wrapped_models_are_stored_under_plain_names(self, tmp_path):
        model = fresh()
        for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
            checkpoints.save_state(wrapped, tmp_path / "a.pt")
            assert same_weights(checkpoints.load_into(make_model(), tmp_path / "a.pt"), model)
            checkpoints.load_into(wrapped, tmp_path / "a.pt")

    def test_round_trip_keeps_everything(self, tmp_path):
        model = fresh()
        checkpoints.save_state(model, tmp_path / "a.pt")
        assert same_weights(checkpoints.load_into(make_model(), tmp_path / "a.pt"), model)
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]

    def test_a_pickle_runs_no_code(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "owned"),)

        (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
        torch.save(Evil(), tmp_path / "b.pt")
        for name in ("a.pt", "b.pt"):
            with pytest.raises(ValueError, match=name):
                checkpoints.load(tmp_path / name)
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
    def test_truncated(self, tmp_path, keep):
        path = tmp_path / "a.pt"
        checkpoints.save_state(fresh(), path)
        raw = path.read_bytes()
        path.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
        with pytest.raises(ValueError, match=r"a\.pt"):
            checkpoints.load(path)

    def test_a_flipped_bit_is_noticed(self, tmp_path):
        model = nn.Linear(50, 50)
        checkpoints.save_state(model, tmp_path / "a.pt")
        raw = bytearray((tmp_path / "a.pt").read_bytes())
        raw[raw.index(model.weight.detach().numpy().tobytes()) + 400] ^= 1
        (tmp_path / "a.pt").write_bytes(raw)
        with pytest.raises(ValueError, match=r"a\.pt.*checksum"):
            checkpoints.load(tmp_path / "a.pt")

    def test_missing_or_of_another_model(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            checkpoints.load(tmp_path / "none.pt")
        checkpoints.save_state(nn.Linear(2, 2), tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"a\.pt: does not fit"):
            checkpoints.load_into(make_model(), tmp_path / "a.pt")
        checkpoints.save([1, 2], tmp_path / "b.pt")
        with pytest.raises(ValueError, match=r"b\.pt: does not fit"):
            checkpoints.load_into(make_model(), tmp_path / "b.pt")

    def test_a_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.pt"
        checkpoints.save_state(nn.Linear(2, 2), path)
        before = path.read_bytes()

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(_files.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space.*a\.pt"):
            checkpoints.save_state(fresh(), path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: fmn.Recorder(folder),
        lambda folder: trained(folder, epochs=1),
        lambda folder: fmn.distill(fresh(), fresh(), make_data()[0], epochs=1, run_dir=folder, **RECIPE),
        lambda folder: fmn.CorrectnessHistory(3, f"{folder}/history.fmnh"),
        lambda folder: fmn.FusionPlan((), 3, 1, (0.5,)).save(f"{folder}/plan.json"),
        lambda folder: checkpoints.save_state(fresh(), f"{folder}/a.pt"),
    ],
)
@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a folder that nobody can write to")
def test_an_unwritable_folder_is_named(call):
    with pytest.raises(OSError, match="/proc/"):
        call("/proc/self/fd")


def test_a_full_disk_during_training_is_survived(run, tmp_path, monkeypatch):
    """With disk_wait=0 the run fails with the system's error; it resumes when there is space again."""
    full_at(monkeypatch, {17})
    with pytest.raises(OSError, match="No space"):
        trained(tmp_path, epochs=6, disk_wait=0)
    monkeypatch.undo()
    assert len(fmn.Run.open(tmp_path).history) >= 1
    assert same_weights(trained(tmp_path, epochs=6).model, run.model)


@pytest.mark.parametrize("first", range(8, 20))
def test_a_run_waits_for_room(run, tmp_path, monkeypatch, caplog, first):
    """Two failures in a row, for each file that is written."""
    full_at(monkeypatch, {first, first + 1})
    again = trained(tmp_path, epochs=6)
    assert "No space left on device; the run waits for free space" in caplog.text
    assert str(tmp_path) in caplog.text
    assert same_weights(again.model, run.model)
    assert again.history.packed.tobytes() == run.history.packed.tobytes()
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again.checkpoints, run.checkpoints, strict=True))


def full_at(monkeypatch, when):
    """Make some calls of fsync fail as on a full disk."""
    real, calls = os.fsync, []

    def sometimes_full(descriptor):
        calls.append(1)
        if len(calls) in when:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sometimes_full)
    monkeypatch.setattr(store, "PAUSE", 0.001)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"epochs": 0}, ValueError, "epochs"),
        ({"epochs": 1.5}, TypeError, "epochs"),
        ({"optimizer": "lion"}, ValueError, "optimizer"),
        ({"schedule": "zigzag"}, ValueError, "schedule"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"learning_rate": 0.1}, TypeError, "learning_rate"),
        ({"amp": "no"}, TypeError, "amp"),
        ({"milestones": "12"}, TypeError, "milestones"),
        ({"milestones": (1.5,)}, TypeError, "milestones"),
        ({"lr": 1e6, "momentum": 0.99}, FloatingPointError, "loss"),
    ],
)
def test_bad_recipe(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        trained(tmp_path, **{"epochs": 3} | options)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ((torch.zeros(3, 6), torch.zeros(2)), ValueError, "one row per sample"),
        ((torch.zeros(0, 6), torch.zeros(0)), ValueError, "not empty"),
        ((torch.zeros(3, 6), torch.zeros(3)), TypeError, "labels.*float32"),
        ((torch.zeros(3, 6),), ValueError, "inputs, labels"),
        (torch.zeros(3, 6), TypeError, "DataLoader"),
        ("runs", TypeError, "DataLoader"),
        (7, TypeError, "DataLoader"),
        ([(torch.zeros(3, 6), torch.zeros(3), torch.zeros(3))], ValueError, "forward_fn"),
        ([{"x": torch.zeros(3, 6)}], ValueError, "labels"),
        ([], ValueError, "at least one batch"),
    ],
)
def test_bad_data(bad, error, words):
    with pytest.raises(error, match=words):
        data.predict(make_model(), bad)


def test_labels_out_of_range_are_named(tmp_path):
    train_set, (x, y), _ = make_data()
    with pytest.raises(ValueError, match="labels"):
        fmn.train(fresh(), train_set, (x, y + 4), epochs=1, run_dir=tmp_path, **RECIPE)


def test_other_data_is_refused(tmp_path):
    (x, y), val, _ = make_data()
    trained(tmp_path, epochs=2)
    for train_set, val_set, name in (((x, y.flip(0)), val, "data"), ((x, y), (val[0][:77], val[1][:77]), "val_data")):
        with pytest.raises(ValueError, match=f"^{name}:"):
            fmn.train(fresh(), train_set, val_set, epochs=2, run_dir=tmp_path, **RECIPE)


def test_a_failed_first_attempt_does_not_block_the_folder(tmp_path):
    (x, y), val, _ = make_data()
    for bad in ((x, y + 1), (x, y - 1), None, (x, y.float())):
        with pytest.raises((ValueError, TypeError), match=r"labels|data"):
            fmn.train(fresh(), bad, val, epochs=2, run_dir=tmp_path, **RECIPE)
    assert len(trained(tmp_path, epochs=2).history) == 2


def test_a_missing_run_json_is_not_made_up(tmp_path):
    trained(tmp_path, epochs=2)
    (tmp_path / "run.json").unlink()
    for resume in (True, False):
        with pytest.raises(FileNotFoundError, match=r"run\.json"):
            trained(tmp_path, epochs=2, resume=resume)


@pytest.mark.parametrize("content", [torch.ones(3), {"model": {}}, {"epoch": "1", "model": {}}, [1]], ids=str)
def test_a_resume_file_of_something_else(tmp_path, caplog, content):
    """The run resumes from the previous state, or fails if that is unreadable too."""
    done = trained(tmp_path, epochs=3)
    history = done.history.packed.tobytes()
    checkpoints.save(content, tmp_path / "resume.pt")
    again = trained(tmp_path, epochs=3)
    assert f"{tmp_path}/resume.pt: not what train or distill left to resume from; going on" in caplog.text
    assert same_weights(again.model, done.model)
    assert again.history.packed.tobytes() == history
    checkpoints.save(content, tmp_path / "resume.pt")
    checkpoints.save(content, tmp_path / "resume.previous.pt")
    model = fresh()
    with pytest.raises(ValueError, match=r"resume\.pt: not what.*resume\.previous\.pt: not what"):
        fmn.train(model, *make_data()[:2], epochs=3, run_dir=tmp_path, **RECIPE)
    assert same_weights(model, fresh())
    assert fmn.Run.open(tmp_path).history.packed.tobytes() == history


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Named(Pairs):
    def __getitem__(self, i):
        return Pair(*super().__getitem__(i))


def test_datasets_give_the_bits_that_arrays_give(tmp_path):
    """Also with a last batch of one sample, and with named tuples."""
    (x, y), val, _ = make_data()
    some = x[:97], y[:97]
    runs = [fmn.train(fresh(), some, val, epochs=2, run_dir=tmp_path / "a", **RECIPE)]
    runs.append(fmn.train(fresh(), Pairs(some), val, epochs=2, run_dir=tmp_path / "b", **RECIPE))
    options = {"forward_fn": lambda model, batch: (model(batch.x), batch.y), **RECIPE}
    runs.append(fmn.train(fresh(), Named(some), Named(val), epochs=2, run_dir=tmp_path / "c", **options))
    for run in runs[1:]:
        assert same_weights(run.model, runs[0].model)
        np.testing.assert_array_equal(run.history.packed, runs[0].history.packed)


def test_a_stream_of_samples_can_be_trained_on(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return zip(*make_data()[0], strict=True)

    assert len(fmn.train(fresh(), Stream(), make_data()[1], epochs=2, run_dir=tmp_path, **RECIPE).history) == 2


def test_without_resume_file_nothing_is_lost(tmp_path):
    done = trained(tmp_path / "done", epochs=3)
    for name in ("resume.pt", "resume.previous.pt"):
        (tmp_path / "done" / name).unlink()
    assert same_weights(trained(tmp_path / "done", epochs=3).model, done.model)
    trained(tmp_path / "half", epochs=3)
    history = fmn.CorrectnessHistory.open(tmp_path / "half" / "history.fmnh")
    history.truncate(2)
    with pytest.raises(ValueError, match=r"resume\.pt: is after 3 epochs, but the history has 2"):
        trained(tmp_path / "half", epochs=3)
    for name in ("resume.pt", "resume.previous.pt"):
        (tmp_path / "half" / name).unlink()
    with pytest.raises(ValueError, match=r"resume\.pt: is missing, but the history has 2"):
        trained(tmp_path / "half", epochs=3)
    assert len(fmn.Run.open(tmp_path / "half").history) == 2


def test_numpy_arrays_of_any_kind(tmp_path):
    """Double precision, negative strides, memory maps, and NumPy numbers in the recipe."""
    (x, y), val, _ = make_data()
    np.save(tmp_path / "x.npy", x.numpy().astype(np.float64))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    run = fmn.train(
        fresh(), (mapped, y.numpy()), val, epochs=2, run_dir=tmp_path / "a", **RECIPE | {"seed": np.int64(5)}
    )
    np.testing.assert_array_equal(run.history.packed, trained(tmp_path / "b", epochs=2).history.packed)
    fmn.train(fresh(), (mapped[::-1], y.numpy()[::-1]), val, epochs=1, run_dir=tmp_path / "c", **RECIPE)


def test_another_configuration_is_refused(tmp_path):
    trained(tmp_path, epochs=2)
    before = (tmp_path / "history.fmnh").read_bytes()
    with pytest.raises(ValueError, match=r"lr.*0\.1.*0\.2"):
        trained(tmp_path, epochs=2, lr=0.2)
    with pytest.raises(ValueError, match="epochs"):
        trained(tmp_path, epochs=3)
    with pytest.raises(FileExistsError, match="resume"):
        trained(tmp_path, epochs=2, resume=False)
    for name in ("resume.pt", "resume.previous.pt"):
        (tmp_path / name).write_bytes(struct.pack("<q", 7))
    with pytest.raises(ValueError, match=r"resume\.pt"):
        trained(tmp_path, epochs=2)
    assert (tmp_path / "history.fmnh").read_bytes() == before
