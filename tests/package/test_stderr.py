"""Standard error that is missing, closed, broken or strange: no bar and no message ends the work."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from networks import make_data
from torch import nn

import fmn_ref as fmn
from fmn_ref import _stderr, cli

TRAIN, VAL, _ = make_data()


class Broken(io.TextIOBase):
    """A stream on which nobody listens any more."""

    def isatty(self):
        return True

    def write(self, *text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


class Writer:
    """What a service puts in place of the stream: it can write, and nothing else."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {"none": lambda: None, "closed": closed, "broken": lambda: Broken(), "writer": lambda: Writer()}


@pytest.fixture(params=STREAMS.values(), ids=STREAMS)
def replace(request, monkeypatch):
    """A function that puts a stream in place of standard error; pytest does so itself after each fixture."""

    def replaced():
        stream = request.param()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    yield replaced
    monkeypatch.undo()


@pytest.mark.parametrize("progress", [None, True, False])
def test_training_and_distillation(replace, tmp_path, progress):
    stream = replace()
    options = {"epochs": 2, "progress": progress}
    run = fmn.train(nn.Linear(6, 4), TRAIN, VAL, run_dir=tmp_path / "a", **options)
    fmn.distill(nn.Linear(6, 4), run.model, TRAIN, val_data=VAL, run_dir=tmp_path / "b", **options)
    assert len(run.history) == 2
    if isinstance(stream, Writer):
        assert ("peak F_e" in stream.text) == (progress is True)


def test_metrics_and_the_command_line(replace, tmp_path, capsys):
    stream = replace()
    correct = np.random.default_rng(0).random((40, 300)) < 0.5
    np.save(tmp_path / "a.npy", np.asfortranarray(correct).astype(np.uint8))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    np.testing.assert_array_equal(fmn.forgetting_curves(mapped, progress=True).forget, fmn.forget_fraction(correct))
    assert cli.main(["metric", str(tmp_path / "a.npy")]) == 0
    assert "forget" in capsys.readouterr().out
    assert cli.main(["metric", str(tmp_path / "missing.npy")]) == 1
    assert capsys.readouterr().out == ""  # print(file=None) would write the error there
    if isinstance(stream, Writer):
        assert "missing.npy" in stream.text


def test_a_log_message(replace, tmp_path, caplog):
    """Of cached targets that are damaged."""
    replace()
    options = {"targets_dir": tmp_path, "epochs": 1}
    torch.manual_seed(0)
    teacher = nn.Linear(6, 4)
    fmn.distill(nn.Linear(6, 4), teacher, TRAIN, **options)
    (tmp_path / "view_00000.log_probs.npy").write_bytes(b"")
    fmn.distill(nn.Linear(6, 4), teacher, TRAIN, **options)
    assert "made again" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_a_process_without_standard_error(tmp_path):
    code = "import sys, torch, fmn_ref as fmn; x = torch.randn(64, 8); data = x, (x[:, 0] > 0).long()\n"
    code += "fmn.train(torch.nn.Linear(8, 2), data, data, epochs=2, run_dir=sys.argv[1], progress=True)\n"
    code += "print(sys.stderr)"
    command = f'"{sys.executable}" -c "$CODE" "{tmp_path}/run" 2>&-'
    done = subprocess.run(command, shell=True, env=os.environ | {"CODE": code}, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (0, b"None\n")
    assert len(fmn.Run.open(tmp_path / "run").history) == 2


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    assert not _stderr.shows()
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    assert _stderr.shows()
    assert not _stderr.shows(False)
    assert list(_stderr.progress_bar(range(3), "title")) == [0, 1, 2]
    assert "title" in capsys.readouterr().err
