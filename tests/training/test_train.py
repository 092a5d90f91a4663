"""`train`: what a run holds, its options, its data, and how it survives interruptions and full disks."""

import json
import os
import struct
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from folders import full_disk
from networks import RECIPE, make_data, make_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from training_runs import fresh, interrupted_at, same_weights, trained

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training import data, store


def test_a_run_holds_every_epoch(unbroken):
    assert unbroken.history.epochs == tuple(range(6))
    assert [p.name for p in unbroken.checkpoints] == [f"epoch_{e:05d}.pt" for e in range(6)]
    assert all(p.exists() for p in unbroken.checkpoints)
    assert unbroken.config["epochs"] == 6
    assert unbroken.config["lr"] == 0.1
    made_with = json.loads((unbroken.run_dir / "run.json").read_text())["made_with"]
    imported = {"lightning", "transformers", "keras", "jax"} & sys.modules.keys()  # other tests import them
    assert made_with.keys() == {"python", "fmn_ref", "numpy", "torch"} | imported
    assert "n_epochs=6" in repr(unbroken)


def test_history_is_what_the_checkpoints_predict(unbroken):
    _, (x, y), _ = make_data()
    for e, path in enumerate(unbroken.checkpoints):
        model = checkpoints.load_into(make_model(), path).eval()
        np.testing.assert_array_equal(unbroken.history.correct()[e], (model(x).argmax(1) == y).numpy())


def test_it_learns(unbroken):
    assert unbroken.history.correct()[-1].mean() > 0.45  # chance: 0.25


def test_same_seed_same_bits(unbroken, tmp_path):
    again = trained(tmp_path, epochs=6)
    np.testing.assert_array_equal(again.history.packed, unbroken.history.packed)
    assert same_weights(again.model, unbroken.model)


def test_the_global_generator_is_put_back(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trained_model = make_model()
    torch.manual_seed(3)
    train_set, val, _ = make_data()
    fmn.train(trained_model, train_set, val, epochs=1, run_dir=tmp_path, **RECIPE)
    assert torch.equal(torch.rand(3), expected)


def test_continuing_after_an_interruption(unbroken, tmp_path):
    """Interrupt between the history's append and the write of resume.pt, then resume."""
    with interrupted_at("resume.pt", 3):
        trained(tmp_path, epochs=6)
    assert len(fmn.Run.open(tmp_path).history) == 3
    again = trained(tmp_path, epochs=6)
    np.testing.assert_array_equal(again.history.packed, unbroken.history.packed)
    assert same_weights(again.model, unbroken.model)
    finished = trained(tmp_path, epochs=6)  # a finished run: the final weights are loaded
    assert same_weights(finished.model, unbroken.model)


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("three"), epochs=3)


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
def test_every_option_changes_the_training(three_epochs, tmp_path, options):
    run = trained(tmp_path, epochs=3, **options)
    assert len(run.history) == 3
    assert run.history.correct()[-1].mean() > 0.3
    assert not same_weights(run.model, three_epochs.model)


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


def test_a_full_disk_during_training_is_survived(unbroken, tmp_path, monkeypatch):
    """With disk_wait=0 the run fails with the system's error; it resumes when there is space again."""
    full_at(monkeypatch, {17})
    with pytest.raises(OSError, match="No space"):
        trained(tmp_path, epochs=6, disk_wait=0)
    monkeypatch.undo()
    assert len(fmn.Run.open(tmp_path).history) >= 1
    assert same_weights(trained(tmp_path, epochs=6).model, unbroken.model)


@pytest.mark.parametrize("first", range(8, 20))
def test_a_run_waits_for_room(unbroken, tmp_path, monkeypatch, caplog, first):
    """Two failures in a row, for each file that is written."""
    full_at(monkeypatch, {first, first + 1})
    again = trained(tmp_path, epochs=6)
    assert "No space left on device; the run waits for free space" in caplog.text
    assert str(tmp_path) in caplog.text
    assert same_weights(again.model, unbroken.model)
    assert again.history.packed.tobytes() == unbroken.history.packed.tobytes()
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again.checkpoints, unbroken.checkpoints, strict=True))


def full_at(monkeypatch, when):
    """Make some calls of fsync fail as on a full disk."""
    real, calls = os.fsync, []

    def sometimes_full(descriptor):
        calls.append(1)
        if len(calls) in when:
            full_disk(descriptor)
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
    backwards = mapped[::-1], y.numpy()[::-1]
    runs = [
        fmn.train(fresh(), train_set, val, epochs=1, run_dir=tmp_path / name, **RECIPE)
        for name, train_set in (("c", backwards), ("d", (x.flip(0), y.flip(0))))
    ]
    assert same_weights(runs[0].model, runs[1].model)


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
