"""Exponential moving averages of every step, which accompany a training that may be killed."""

import copy
import multiprocessing
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fmn_ref.benchmarks.experiments import controls, suite
from fmn_ref.benchmarks.experiments.pieces import Piece
from fmn_ref.training.data import Batches, predict
from fmn_ref.training.engine import Average
from fmn_ref.training.store import Store

EPOCHS = 6
STEPS = 3  # of 150 samples in batches of 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bits are the same for the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def piece():
    task = next(t for t in suite.cpu_tasks() if t.dataset == "digits")
    return Piece(replace(task, n_train=150, n_select=100, n_test=120, epochs=EPOCHS), "sym40", True, 0)


def train(folder, averages=controls.StepAverages):
    p = piece()
    data = p.split(Path())
    folder.mkdir(exist_ok=True)
    return p.train(data, folder, beside=partial(averages, p, data, folder))


def bits(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def files(run):
    return [torch.load(path, weights_only=True) for path in run.checkpoints]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """The folder of a training without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def best(folder):
    return controls.best_average(piece(), folder)


def test_the_training_does_not_notice(whole, tmp_path):
    p = piece()
    with_averages, without = train(whole), p.train(p.split(Path()), tmp_path)
    for a, b in zip(files(with_averages), files(without), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert (with_averages.history.correct() == without.history.correct()).all()


def test_the_best_average_by_hand(whole, tmp_path):
    """Repeat the training with averages that the test updates and scores itself."""
    found = []

    class ByHand(controls.StepAverages):
        def __init__(self, *args):
            super().__init__(*args)
            self.own, self.n = [Average(self.model, d) for d in controls.EMA_DECAYS], 0

        def after_step(self, *args):
            self.n += 1
            for average in self.own:
                average.update(self.model)
                if self.n % STEPS == 0:
                    probs, labels = predict(average.model, self.select)
                    found.append(((probs.argmax(1) == labels).sum().item(), copy.deepcopy(average.model)))

    train(tmp_path, ByHand)
    assert len(found) == EPOCHS * len(controls.EMA_DECAYS)
    first_best = max(found, key=lambda f: f[0])
    assert bits(first_best[1]) == bits(best(whole))
    assert len({n for n, _ in found}) > 1


class Stopped(Exception):
    pass


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 1, 3 * STEPS - 1, 4 * STEPS, EPOCHS * STEPS])
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_training_has_the_same_best_average(whole, tmp_path, step, before):
    """It stops at a step, before or after the averages are updated and saved there."""

    class Interrupted(controls.StepAverages):
        n = 0

        def after_step(self, *args):
            Interrupted.n += 1
            if before and Interrupted.n == step:
                raise Stopped
            super().after_step(*args)
            if Interrupted.n == step:
                raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path, Interrupted)
    train(tmp_path)
    assert bits(best(tmp_path)) == bits(best(whole))


def test_the_averages_may_be_two_epochs_ahead_of_the_training(whole, tmp_path, monkeypatch):
    """The resume state of an epoch is lost while the averages of the next one are on disk."""
    save = Store._save_resume

    def lost(self, state):
        if state["epoch"] == 3:
            raise OSError("lost")
        save(self, state)

    monkeypatch.setattr(Store, "_save_resume", lost)
    with pytest.raises(OSError, match="lost"):
        train(tmp_path)
    monkeypatch.setattr(Store, "_save_resume", save)
    assert (tmp_path / "ema" / "epoch_4.pt").exists()
    run = train(tmp_path)
    assert bits(best(tmp_path)) == bits(best(whole))
    assert len(run.history) == EPOCHS


def killed(folder):
    """Train in a process that ends in the middle of epoch 4, while the writer thread may be at work."""

    class Killed(controls.StepAverages):
        def after_step(self, *args):
            super().after_step(*args)
            if self.step == 4 * STEPS + 1:
                os._exit(9)

    torch.set_num_threads(1)
    train(folder, Killed)


def test_a_killed_training_has_the_same_best_average(whole, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    train(tmp_path)
    assert bits(best(tmp_path)) == bits(best(whole))


def test_a_long_training_scores_twenty_epochs_and_the_last(tmp_path, monkeypatch):
    scored, score = [], controls.accuracy

    def counted(*args):
        scored.append(len(list(tmp_path.glob("network_0/checkpoints/*.pt"))))
        return score(*args)

    monkeypatch.setattr(controls, "accuracy", counted)
    p = replace(piece(), task=replace(piece().task, epochs=41))
    data = p.split(Path())
    p.train(data, tmp_path, beside=partial(controls.StepAverages, p, data, tmp_path))
    assert len(scored) == 21 * len(controls.EMA_DECAYS)
    assert scored[-1] >= 39  # checkpoints on disk or being written
    assert scored[0] <= 1


def test_few_states_stay_on_disk(whole):
    assert {p.name for p in (whole / "ema").iterdir()} == {f"epoch_{e}.pt" for e in range(EPOCHS - 3, EPOCHS)}


def test_a_training_without_averages_is_refused(tmp_path):
    p = piece()
    p.train(p.split(Path()), tmp_path)
    train(tmp_path)
    with pytest.raises(FileNotFoundError, match="ema"):
        best(tmp_path)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 66, 128, 129, 130])
def test_the_number_of_steps_of_an_epoch(n):
    p = piece()
    x, y = torch.zeros(n, 1), torch.zeros(n, dtype=torch.long)
    data = p.split(Path())._replace(train=(x, y))
    averages = controls.StepAverages(p, data, Path(), nn.Linear(1, 2))
    assert averages.steps_per_epoch == len(list(Batches((x, y), 64, torch.device("cpu"), shuffle=True)))
