"""A run of checkpoints that another program saved: one call, then everything that works on a run."""

import argparse
import copy
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import make_data, make_model
from torch import nn

import fmn_ref as fmn
from fmn_ref.cli import main
from fmn_ref.runs import existing

TRAIN, VAL, TEST = make_data()


@functools.cache
def states(n, seed=0):
    """State_dicts of n epochs of a training, each with the optimizer's state."""
    found = []
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    for _ in range(n):
        for rows in torch.randperm(len(TRAIN[0])).split(48):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(TRAIN[0][rows]), TRAIN[1][rows]).backward()
            optimizer.step()
        found.append(copy.deepcopy((dict(model.state_dict()), optimizer.state_dict())))
    return found


def plain(folder, epochs=30):
    for epoch, (state, _) in enumerate(states(epochs), 1):
        torch.save(state, folder / f"epoch_{epoch}.pt")


def with_optimizer(folder, epochs=30):
    for epoch, (state, optimizer) in enumerate(states(epochs), 1):
        model = {f"module.{name}": t for name, t in state.items()}
        torch.save({"epoch": epoch, "model": model, "optimizer": optimizer}, folder / f"ckpt_{epoch}.pth.tar")


def lightning(folder, epochs=30):
    for epoch, (state, optimizer) in enumerate(states(epochs), 1):
        content = {"epoch": epoch - 1, "global_step": 5 * epoch, "optimizer_states": [optimizer]}
        content["state_dict"] = {f"model.{name}": t for name, t in state.items()}
        torch.save(content, folder / f"epoch={epoch}-step={5 * epoch}.ckpt")


KINDS = (plain, with_optimizer, lightning)


def by_plain_loop(run_dir, epochs=30):
    """The history that a loop of one's own records."""
    recorder, model = fmn.Recorder(run_dir), make_model()
    for epoch, (state, _) in enumerate(states(epochs), 1):
        model.load_state_dict(state)
        with torch.no_grad():
            recorder.record(epoch, model.eval()(VAL[0]), VAL[1])
    return recorder.run.history


def accuracy(model, data=TEST):
    with torch.no_grad():
        return float((model.eval()(data[0]).argmax(1) == data[1]).double().mean())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "old").mkdir()
    return tmp_path / "old"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_three_kinds_of_folders_in_six_lines(folder, tmp_path, kind):
    kind(folder)
    model, student = make_model(), make_model()

    run = fmn.from_checkpoints(folder, model, VAL, tmp_path / "run")
    probs = run.probabilities(VAL)
    plan = fmn.fuse(probs, VAL[1], correct=run.history, method="pool")
    fused = fmn.FusedModel(plan, run)
    student = fmn.distill(student, fused, TRAIN, epochs=10, lr=0.1, batch_size=48, progress=False)

    last = make_model()
    last.load_state_dict(states(30)[-1][0])
    assert run.history.epochs == tuple(range(1, 31))
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own").correct())
    assert accuracy(fused) > accuracy(last)
    assert accuracy(student) > accuracy(last)
    assert sorted(folder.iterdir(), key=str) == sorted(folder.glob("*[0-9].*"), key=str)  # nothing was added


def test_a_reopened_run_is_the_same(folder, tmp_path):
    with_optimizer(folder, 6)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    again = fmn.Run.open(tmp_path / "run", make_model())
    np.testing.assert_array_equal(again.probabilities(VAL)[3], run.probabilities(VAL)[3])
    plan = fmn.FusionPlan.from_weights({2: 0.5, 5: 0.5}, 6)
    network = make_model()
    network.load_state_dict(states(6)[2][0])
    with torch.no_grad():
        expected = network.eval()(VAL[0]).softmax(1)
    np.testing.assert_allclose(again.probabilities(VAL)[2], expected, atol=1e-6)
    fused = fmn.FusedModel(plan, again)
    averaged = fmn.averaged_model(again, plan.weights, TRAIN)
    mean = (states(6)[2][0]["0.weight"] + states(6)[5][0]["0.weight"]) / 2
    torch.testing.assert_close(averaged.state_dict()["0.weight"], mean)
    np.testing.assert_allclose(
        fused(VAL[0]).exp(), (again.probabilities(VAL)[2] + again.probabilities(VAL)[5]) / 2, atol=1e-6
    )
    assert "| auto |" in fmn.compare(again, VAL, TEST).to_markdown()


def test_the_models_own_weights_stay(folder, tmp_path):
    plain(folder, 2)
    model = make_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fmn.from_checkpoints(folder, model, VAL, tmp_path / "run")
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0)
    assert model.training


def test_files_are_referred_to(folder, tmp_path):
    plain(folder, 3)
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"epoch_0000{e}.ref.json" for e in (1, 2, 3)]
    content = json.loads((tmp_path / "run" / "checkpoints" / names[1]).read_text())
    stat = (folder / "epoch_2.pt").stat()
    assert content["path"] == str(folder / "epoch_2.pt")
    assert content["files"] == {"epoch_2.pt": {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}}


def test_copies_do_without_the_files(folder, tmp_path):
    with_optimizer(folder, 4)
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", link=False, half=True)
    for path in folder.iterdir():
        path.unlink()
    run = fmn.Run.open(tmp_path / "run", make_model())
    right = run.probabilities(VAL)[1].argmax(1) == VAL[1].numpy()
    assert (right == run.history[1]).mean() > 0.98  # 16 bits round
    assert run.checkpoint(0).suffix == ".pt"


def test_called_again_it_adds_what_is_new(folder, tmp_path, monkeypatch):
    for epoch, (state, _) in enumerate(states(5), 1):
        torch.save(state, folder / f"epoch_{epoch}.pt")
        if epoch == 3:
            run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
            assert run.history.epochs == (1, 2, 3)
    read = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: read.append(file.name) or original(file, **options))
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own", 5).correct())
    assert {Path(name).name for name in read} == {"epoch_4.pt", "epoch_5.pt"}
    again = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    assert again.history.epochs == (1, 2, 3, 4, 5)


PROGRAM = """
import pathlib, sys, time, torch, fmn_ref as fmn
from networks import make_data, make_model
class Waits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make_model()
    def forward(self, x):
        if pathlib.Path(sys.argv[3]).exists():
            time.sleep(600)
        return self.model(x)
fmn.from_checkpoints(sys.argv[1], Waits(), make_data()[1], sys.argv[2], keep_predictions=True)
"""


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, x):
        return self.model(x)


def test_killed_it_resumes(folder, tmp_path):
    for epoch, (state, _) in enumerate(states(20), 1):
        torch.save({f"model.{name}": t for name, t in state.items()}, folder / f"epoch_{epoch}.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    predictions = tmp_path / "run" / "predictions" / "epoch_00004.npy"  # with them it waits
    command = [sys.executable, "-c", PROGRAM, folder, tmp_path / "run", predictions]
    process = subprocess.Popen(command, env=environment)
    while not predictions.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = len(fmn.Run.open(tmp_path / "run").history)
    assert 3 <= done < 20
    run = fmn.from_checkpoints(folder, Wrapped(), VAL, tmp_path / "run", keep_predictions=True)
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own", 20).correct())
    assert len(list((tmp_path / "run" / "predictions").glob("epoch_*.npy"))) == 20


def test_a_plan_shows_the_file_of_each_member(folder, tmp_path, monkeypatch):
    """Relative to the working directory, if the file lies there."""
    with_optimizer(folder, 4)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    plan = fmn.fuse(run.probabilities(VAL), VAL[1], correct=run.history, method="equal")
    plan.save(tmp_path / "run" / "plan.json")
    expected = [["epoch", "weight", "file"], *([str(e), "0.2500", f"{folder}/ckpt_{e}.pth.tar"] for e in (1, 2, 3, 4))]
    for found in (plan, fmn.FusionPlan.load(tmp_path / "run" / "plan.json")):
        assert found == plan
        assert [line.split() for line in str(found).splitlines()[:-1]] == expected
        assert "ckpt" not in repr(found)
    monkeypatch.chdir(tmp_path)
    (folder / "ckpt_3.pth.tar").unlink()
    assert str(fmn.FusionPlan.load("run/plan.json")).splitlines()[3] == "     3  0.2500  old/ckpt_3.pth.tar"
    plan.save("elsewhere.json")
    assert "file" not in str(fmn.FusionPlan.load("elsewhere.json"))


@pytest.mark.parametrize("damage", ["run.json", "checkpoints/epoch_00002.ref.json"])
def test_a_plan_loads_beside_a_damaged_run(folder, tmp_path, damage):
    plain(folder, 3)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    plan = fmn.fuse(run.probabilities(VAL), VAL[1], correct=run.history, method="equal")
    plan.save(tmp_path / "run" / "plan.json")
    (tmp_path / "run" / damage).write_text("{")
    text = str(fmn.FusionPlan.load(tmp_path / "run" / "plan.json"))
    assert ("epoch_3.pt" in text) == (damage != "run.json")
    assert "epoch_2.pt" not in text


def test_a_plan_of_a_training_shows_its_own_checkpoints(tmp_path):
    torch.manual_seed(0)
    run = fmn.train(make_model(), TRAIN, VAL, epochs=6, run_dir=tmp_path / "run", keep="budget:3", progress=False).kept
    plan = fmn.fuse(run.probabilities(VAL), VAL[1], correct=run.history, method="pool")
    files = [line.split()[-1] for line in str(plan).splitlines()[1:-1]]
    assert files == [str(run.checkpoints[row]) for row in plan.weights]
    assert len(files) > 1


def test_a_changed_file_is_noticed(folder, tmp_path):
    plain(folder, 3)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", keep_predictions=True)
    torch.save(make_model().state_dict(), folder / "epoch_2.pt")
    plan = fmn.FusionPlan.from_weights({1: 1.0}, 3)
    for use in (
        lambda: run.probabilities(VAL)[1],
        lambda: run.probabilities(TEST)[1],
        lambda: fmn.FusedModel(plan, run),
        lambda: fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=r"epoch_2\.pt: changed since it was recorded"):
            use()
    run.probabilities(VAL)[0]


def test_a_loss_beside_the_weights_is_not_taken_for_them(folder, tmp_path):
    """Where nothing fits, the message is about the dict with the weights."""
    torch.save({"epoch": 1, "state_dict": make_model().state_dict(), "loss": torch.ones(())}, folder / "epoch_1.pt")
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity(), torch.nn.Identity(), torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"does not fit the model: missing 3\.weight.*left over .*in 'state_dict'"):
        fmn.from_checkpoints(folder, other, VAL, tmp_path / "run")


def test_a_file_that_is_gone_is_named(folder, tmp_path):
    plain(folder, 3)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    (folder / "epoch_2.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"old/epoch_2\.pt: no such checkpoint; if it moved, give from_check"):
        run.probabilities(VAL)[1]
    assert run.kept.history.epochs == (1, 3)
    assert fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run").history.epochs == (1, 2, 3)


def test_a_folder_that_moved_is_followed(folder, tmp_path):
    plain(folder, 3)
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    moved = folder.rename(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="old/epoch_1"):
        fmn.Run.open(tmp_path / "run", make_model()).probabilities(VAL)[0]
    with pytest.raises(FileNotFoundError, match="no checkpoint of the run is there; if they moved, give from_check"):
        _ = fmn.Run.open(tmp_path / "run").kept
    run = fmn.from_checkpoints(moved, make_model(), VAL, tmp_path / "run")
    assert run.probabilities(VAL)[0].shape == (240, 4)


def test_a_copy_needs_the_time_of_each_file(folder, tmp_path):
    plain(folder, 2)
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "new", copy_function=shutil.copyfile)
    with pytest.raises(ValueError, match=r"epoch_1\.pt: changed since.*if it is a copy, copy it with its time \(cp -p"):
        fmn.from_checkpoints(tmp_path / "new", make_model(), VAL, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "kept")
    assert fmn.from_checkpoints(tmp_path / "kept", make_model(), VAL, tmp_path / "run").history.epochs == (1, 2)


def test_a_training_does_not_go_on_in_an_imported_run(folder, tmp_path):
    plain(folder, 2)
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: holds a run whose checkpoints end in '\.ref\.json', not '\.pt'"):
        fmn.train(make_model(), TRAIN, VAL, epochs=1, run_dir=tmp_path / "run", progress=False)


def test_other_checkpoints_in_the_same_run_are_refused(folder, tmp_path):
    plain(folder, 3)
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "copies", link=False)
    (tmp_path / "other").mkdir()
    for epoch, (state, _) in enumerate(states(4, seed=9), 1):
        torch.save(state, tmp_path / "other" / f"epoch_{epoch}.pt")
    with pytest.raises(ValueError, match=r"epoch_1\.pt: changed since"):
        fmn.from_checkpoints(tmp_path / "other", make_model(), VAL, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of other checkpoints than"):
        fmn.from_checkpoints(tmp_path / "other", make_model(), VAL, tmp_path / "copies", link=False)


def test_other_data_is_refused(folder, tmp_path):
    plain(folder, 2)
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    with pytest.raises(ValueError, match="data: the run in"):
        fmn.from_checkpoints(folder, make_model(), TEST, tmp_path / "run")


@pytest.mark.parametrize("link", [True, False])
def test_other_data_in_a_loader_is_refused(folder, tmp_path, link):
    plain(folder, 2)
    fmn.from_checkpoints(folder, make_model(), loader(VAL), tmp_path / "run", link=link)
    fmn.from_checkpoints(folder, make_model(), loader(VAL, 50), tmp_path / "run", link=link)
    order = torch.arange(240).roll(1)
    for other in (TEST, (VAL[0][order], VAL[1]), (VAL[0][:100], VAL[1][:100])):
        with pytest.raises(ValueError, match=r"holds a run of other checkpoints than .*, or of other data"):
            fmn.from_checkpoints(folder, make_model(), loader(other), tmp_path / "run", link=link)


def test_an_epoch_before_the_recorded_ones_is_refused(folder, tmp_path):
    plain(folder, 3)
    (folder / "epoch_2.pt").rename(tmp_path / "epoch_2.pt")
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    (tmp_path / "epoch_2.pt").rename(folder / "epoch_2.pt")
    with pytest.raises(ValueError, match=r"epoch_2\.pt, which comes before epoch 3"):
        fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")


# --- kept predictions ---


class Counting(nn.Module):
    """A network that counts its calls, wherever it is copied."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, x):
        Counting.calls += 1
        return self.model(x)


def loader(data, size=100):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), size)


@pytest.mark.parametrize("form", [lambda data: data, loader], ids=["arrays", "loader"])
def test_kept_predictions_save_the_second_pass(folder, tmp_path, form):
    for epoch, (state, _) in enumerate(states(4), 1):
        torch.save({f"model.{name}": t for name, t in state.items()}, folder / f"epoch_{epoch}.pt")
    run = fmn.from_checkpoints(folder, Counting(), form(VAL), tmp_path / "run", keep_predictions=True)
    stored = np.load(tmp_path / "run" / "predictions" / "epoch_00002.npy", mmap_mode="r")
    assert stored.dtype == np.float16
    before = Counting.calls
    probs = fmn.Run.open(run.run_dir, Counting()).probabilities(form(VAL))
    plan = fmn.fuse(probs, probs.labels, correct=run.history, method="pool")
    assert len(probs[1]) == 240
    assert Counting.calls == before
    np.testing.assert_array_equal(probs.labels, VAL[1])
    np.testing.assert_allclose(probs[1].sum(1), 1, atol=1e-6)
    fresh = fmn.from_checkpoints(folder, Counting(), form(VAL), tmp_path / "fresh").probabilities(form(VAL))
    np.testing.assert_allclose(probs[1], fresh[1], atol=1e-3)
    assert plan.n_epochs == 4


def test_kept_predictions_are_not_used_for_other_data(folder, tmp_path):
    plain(folder, 2)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", keep_predictions=True)
    x = VAL[0].clone()
    x[17, 3] += 1  # one number of one sample
    for data in ((x, VAL[1]), TEST, loader((x, VAL[1]))):
        expected = fmn.from_checkpoints(folder, make_model(), data, tmp_path / "fresh").probabilities(data)[0]
        np.testing.assert_array_equal(run.probabilities(data)[0], expected)
        (tmp_path / "fresh").rename(tmp_path / f"fresh{time.monotonic_ns()}")


def test_data_of_unknown_objects_keeps_no_predictions(folder, tmp_path):
    plain(folder, 1)

    class Part:
        def __init__(self, x):
            self.x = x

    batches = [(Part(VAL[0]), VAL[1])]
    options = {"forward_fn": lambda model, batch: (model(batch[0].x), batch[1])}
    fmn.from_checkpoints(folder, make_model(), batches, tmp_path / "run", **options)
    with pytest.raises(TypeError, match="keep_predictions"):
        fmn.from_checkpoints(folder, make_model(), batches, tmp_path / "other", keep_predictions=True, **options)


def test_rewinding_deletes_predictions(folder, tmp_path):
    plain(folder, 3)
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", keep_predictions=True)
    with fmn.Recorder(tmp_path / "run", save=print, suffix=".ref.json") as recorder:
        recorder.rewind(2)
    assert [path.name for path in (tmp_path / "run" / "predictions").glob("epoch_*")] == ["epoch_00001.npy"]


# --- other networks and layouts ---


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.two(self.one(x).relu()))


def test_tied_weights_may_be_stored_once(folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(3)
    network = Tied()
    safetensors.save_model(network, str(folder / "step_7.safetensors"))
    run = fmn.from_checkpoints(folder, Tied(), VAL, tmp_path / "run")
    with torch.no_grad():
        expected = network.eval()(VAL[0]).softmax(1)
    np.testing.assert_allclose(run.probabilities(VAL)[0], expected, atol=1e-6)


def test_counters_of_old_batchnorm_may_lack(folder, tmp_path):
    state = {k: t for k, t in states(1)[0][0].items() if k != "1.num_batches_tracked"}
    torch.save(state, folder / "epoch_1.pt")
    assert fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run").history.epochs == (1,)


def test_a_wrapper_named_like_a_prefix_is_not_taken_away(folder, tmp_path):
    """The network's own names begin with "model.": those of the file fit as they are, or with one prefix more."""
    state = states(1)[0][0]
    torch.save({f"model.{name}": t for name, t in state.items()}, folder / "epoch_1.pt")
    torch.save({f"module.model.{name}": t for name, t in state.items()}, folder / "epoch_2.pt")
    run = fmn.from_checkpoints(folder, Wrapped(), VAL, tmp_path / "run")
    np.testing.assert_array_equal(run.history[0], run.history[1])


def test_a_compiled_model_takes_the_files(folder, tmp_path):
    plain(folder, 2)
    model = torch.compile(make_model(), backend="eager")
    run = fmn.from_checkpoints(folder, model, VAL, tmp_path / "run")
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own", 2).correct())


def test_what_is_left_out_or_guessed_is_said(folder, tmp_path, caplog):
    for name in ("a_1_7.pt", "a_2_9.pt", "last.pt", "a_3_8.pt.tmp", "readme.txt"):
        torch.save(make_model().state_dict(), folder / name)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    assert run.history.epochs == (1, 2)
    assert "left out: a_3_8.pt.tmp (unfinished, by its name), last.pt (a copy, by its name)" in caplog.text
    assert "took number 1 of the name for the epoch" in caplog.text
    assert "readme" not in caplog.text


def test_one_progress_bar(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(existing, "_SHARE", 1e9)  # no time for a peak between the first and the last checkpoint
    plain(folder, 3)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", progress=True)
    printed = capsys.readouterr().err
    peak = fmn.forget_fraction(run.history).max()
    assert f"epoch 3, accuracy {run.history[2].mean():.1%}, peak F_e {peak:.1%}" in printed
    assert "3/3" in printed
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""


def test_a_list_of_files(folder, tmp_path):
    plain(folder, 4)
    paths = [folder / f"epoch_{epoch}.pt" for epoch in (4, 2)]
    assert fmn.from_checkpoints(paths, make_model(), VAL, tmp_path / "run").history.epochs == (2, 4)
    one = fmn.from_checkpoints(folder / "epoch_3.pt", make_model(), VAL, tmp_path / "one")
    assert one.history.epochs == (3,)
    with pytest.raises(FileNotFoundError, match=r"epoch_9\.pt: no such checkpoint"):
        fmn.from_checkpoints([folder / "epoch_9.pt"], make_model(), VAL, tmp_path / "other")


def test_the_only_file_of_a_numbered_folder(folder, tmp_path):
    """The folder's number counts where it says epoch or step, not a year or the like."""
    for name in ("checkpoint-70", "run-2024"):
        (folder / name).mkdir()
        torch.save({"epoch": 4, "model": states(1)[0][0]}, folder / name / "weights.bin")
    named = fmn.from_checkpoints(f"{folder}/checkpoint-*/weights.bin", make_model(), VAL, tmp_path / "named")
    assert named.history.epochs == (70,)
    inside = fmn.from_checkpoints(folder / "run-2024" / "weights.bin", make_model(), VAL, tmp_path / "inside")
    assert inside.history.epochs == (4,)


@pytest.mark.parametrize("copies", [{}, {"link": False}, {"keep_predictions": True}])
def test_a_network_that_cannot_be_copied(folder, tmp_path, copies):
    """A forward that was replaced on the instance: the weights are swapped in and put back."""
    plain(folder, 3)
    model = make_model()
    original = model.forward
    model.forward = lambda x: original(x)
    run = fmn.from_checkpoints(folder, model, VAL, tmp_path / "run", **copies)
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own", 3).correct())
    right = fmn.correctness(np.stack(run.probabilities(VAL)[:]), VAL[1])
    assert (right != run.history.correct()).mean() < 0.01


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": "fmn_ref.reference", "version": 2}',
        '{"format": "fmn_ref.reference", "version": 1, "path": 3, "key": "", "files": {}}',
        '{"format": "fmn_ref.reference", "version": 1, "path": "/gone\\u0000", "key": "", "files": {}}',
        '{"format": "fmn_ref.reference", "version": 1, "path": "/gone.pt", "key": "", "files": {}}',
        '{"format": "fmn_ref.reference", "version": 1, "path": "", "key": "", "files": {}}',
    ],
)
def test_a_damaged_reference_is_named(folder, tmp_path, text):
    plain(folder, 1)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    run.checkpoint(0).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=r"epoch_00001\.ref\.json|gone"):
        run.probabilities(VAL)[0]


def test_a_reference_with_a_relative_path_is_refused(folder, tmp_path, monkeypatch):
    """It would stand for another file in each working directory."""
    plain(folder, 1)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    content = json.loads(run.checkpoint(0).read_text())
    monkeypatch.chdir(folder)
    content["path"] = Path(content["path"]).name
    assert Path(content["path"]).exists()
    run.checkpoint(0).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"epoch_00001\.ref\.json: expected an absolute path"):
        run.probabilities(VAL)[0]


def test_timms_layout(folder, tmp_path):
    for epoch, (state, optimizer) in enumerate(states(3)):
        content = {"epoch": epoch, "arch": "mlp", "state_dict": state, "optimizer": optimizer, "version": 2}
        content |= {"args": argparse.Namespace(lr=0.1), "amp_scaler": {"scale": 1.0}, "metric": 71.2}
        torch.save(content | {"state_dict_ema": make_model().state_dict()}, folder / f"checkpoint-{epoch}.pth.tar")
    for name in ("last.pth.tar", "model_best.pth.tar"):
        os.link(folder / "checkpoint-2.pth.tar", folder / name)
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own", 3).correct())
    assert run.history.epochs == (0, 1, 2)


def test_torchvisions_layout(folder, tmp_path):
    for epoch, (state, optimizer) in enumerate(states(3)):
        content = {"model": state, "optimizer": optimizer, "lr_scheduler": {"last_epoch": epoch}, "epoch": epoch}
        average = {f"module.{name}": t for name, t in make_model().state_dict().items()}
        content |= {"args": argparse.Namespace(output_dir="x"), "model_ema": {"n_averaged": torch.tensor(3), **average}}
        torch.save(content, folder / f"model_{epoch}.pth")
    os.link(folder / "model_2.pth", folder / "checkpoint.pth")
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own", 3).correct())


def test_mmengines_layout(folder, tmp_path):
    for epoch, (state, optimizer) in enumerate(states(2), 1):
        meta = {"epoch": epoch, "iter": epoch * 5, "cfg": "model = dict()", "seed": np.int64(3)}
        content = {"meta": meta, "state_dict": state, "message_hub": {"log_scalars": {}}, "optimizer": optimizer}
        torch.save(content, folder / f"epoch_{epoch}.pth")
    (folder / "last_checkpoint").write_text(str(folder / "epoch_2.pth"))
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own", 2).correct())


@pytest.mark.parametrize("padding", [0, 2000], ids=["small", "scanned"])
@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
def test_fairseqs_layout(folder, tmp_path, padding, old):
    """The configuration of OmegaConf, whose nodes refer to each other in circles, is dropped."""
    omegaconf = pytest.importorskip("omegaconf")
    for epoch, (state, optimizer) in enumerate(states(2), 1):
        cfg = omegaconf.OmegaConf.create({"model": {"dims": [1, 2], "name": "mlp"}, "lr": 0.1, "to": "${lr}"})
        content = {"args": None, "cfg": cfg, "model": state, "last_optimizer_state": optimizer}
        content |= {"extra_state": {"epoch": epoch}, "pad": [(i,) for i in range(3 * padding)]}
        torch.save(content, folder / f"checkpoint{epoch}.pt", _use_new_zipfile_serialization=not old)
    os.link(folder / "checkpoint2.pt", folder / "checkpoint_last.pt")
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    np.testing.assert_array_equal(run.history.correct(), by_plain_loop(tmp_path / "own", 2).correct())


# --- arguments and the command line ---


def test_arguments(folder, tmp_path):
    plain(folder, 1)
    with pytest.raises(TypeError, match="model: expected a torch"):
        fmn.from_checkpoints(folder, "resnet", VAL, tmp_path / "run")
    for source in (None, b"old", 3):
        with pytest.raises(TypeError, match="source: expected a folder, a pattern or a list of paths"):
            fmn.from_checkpoints(source, make_model(), VAL, tmp_path / "run")
    with pytest.raises(ValueError, match=r"half: .*link=False"):
        fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", half=True)
    with pytest.raises(ValueError, match=r"run_dir: .* is the folder of the checkpoints"):
        fmn.from_checkpoints(folder, make_model(), VAL, folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        fmn.from_checkpoints(tmp_path / "gone", make_model(), VAL, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["metric"], ["report"]])
def test_where_no_run_is_the_door_is_named(folder, capsys, command):
    plain(folder, 1)
    assert main([*command, str(folder)]) == 1
    assert "fmn-ref import checkpoints" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"fmn_ref\.from_checkpoints"):
        fmn.Run.open(folder)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    with_optimizer(folder, 3)
    (tmp_path / "mine_for_import.py").write_text(
        "from networks import make_data, make_model\ndef validation():\n    return make_data()[1]\n"
    )
    monkeypatch.chdir(tmp_path)
    command = [
        "import",
        "checkpoints",
        "old",
        "--model",
        "mine_for_import:make_model",
        "-o",
        "run",
        "--keep-predictions",
    ]
    assert main([*command, "--data", "mine_for_import:validation", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    history = by_plain_loop(tmp_path / "own", 3)
    assert printed["epochs"] == [1, 2, 3]
    assert printed["peak_forget_fraction"] == pytest.approx(fmn.forget_fraction(history).max())
    assert main(["metric", "run"]) == 0
    for fault, message in (
        (["--data", "mine_for_import:gone"], "--data: module 'mine_for_import' has no attribute 'gone'"),
        (["--data", "nothing_there:x"], "--data: No module named 'nothing_there'"),
        (["--data", "mine_for_import"], "--data: expected module:function"),
        (["--data", "mine_for_import.py:x"], "--data: expected a module, mine_for_import:x, got the file"),
    ):
        assert main([*command, *fault]) == 1
        assert message in capsys.readouterr().err
