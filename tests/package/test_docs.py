"""The README's and the guides' examples run as they are written."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_probs
from networks import make_data, make_model

import fmn_ref as fmn
from fmn_ref.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(text, after, language):
    return re.search(rf"```{language}\n(.*?)```", text.split(after, 1)[1], re.DOTALL).group(1)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_own_loop():
    (x_train, y_train), (x_val, y_val), _ = make_data()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train_one_epoch(model):
        torch.nn.functional.cross_entropy(model.train()(x_train), y_train).backward()
        optimizer.step()

    def predict(model, x):
        with torch.no_grad():
            return model.eval()(x)

    names = dict(locals(), epochs=4, make_model=make_model)
    exec(block(README, "## In your own loop", "python"), names)
    assert names["fused"](x_val).shape == names["student"](x_val).shape == (240, 4)


def test_training_guide(capsys):
    def images(n):
        y = torch.arange(n) % 4
        return torch.randn(n, 1, 8, 8) + y[:, None, None, None], y

    def make_model():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))

    (x_train, y_train), (x_val, y_val) = images(128), images(64)
    names = dict(locals(), model=make_model())
    exec(block((ROOT / "docs" / "training.md").read_text(), "# Training and distilling", "python"), names)
    assert len(names["sweep"].rows) == 4
    assert names["student"](x_val).shape == (64, 4)
    capsys.readouterr()


def test_arrays_and_command_line(capsys):
    p, labels = random_probs(np.random.default_rng(1))
    names = {"probs": p[:, :30], "labels": labels[:30], "test_probs": p[:, 30:]}
    exec(block(README, "## With arrays alone", "python"), names)
    np.testing.assert_array_equal(names["fused"], fmn.FusionPlan.load("plan.json").apply(p[:, 30:]))
    np.save("correct.npy", names["correct"])
    np.save("probs.npy", p[:, :30])
    np.save("labels.npy", labels[:30])
    np.save("test_probs.npy", p[:, 30:])
    np.save("test_labels.npy", labels[30:])
    commands = block(README, "## On the command line", "").strip().splitlines()
    assert len(commands) == 8
    recorder = fmn.Recorder("runs/mine")
    for epoch, row in enumerate(p[:, :30]):
        recorder.record(epoch, row, labels[:30])
    for command in commands:
        if " bench " in command:  # minutes; test_benchmarks.py runs it on small inputs
            continue
        program, *args = shlex.split(command, comments=True)
        assert program == "fmn-ref"
        assert main(args) == 0, capsys.readouterr().err


def test_reading_a_history_without_the_package(rng):
    correct = rng.random((5, 1000)) < 0.5
    history = fmn.CorrectnessHistory(1000, "history.fmnh")
    for row in correct:
        history.append(row)
    names = {}
    exec(block((ROOT / "docs" / "reference" / "formats.md").read_text(), "## history.fmnh", "python"), names)
    np.testing.assert_array_equal(names["correct"], correct)


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path.name}: {link}"
