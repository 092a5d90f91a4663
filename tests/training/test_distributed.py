"""Tests with two gloo processes: history and plan equal those of one process; a killed process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import make_data, make_model

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training import data, distributed

SCRIPT = Path(__file__).parents[1] / "helpers" / "two_processes.py"
VAL = tuple(a[:-3] for a in make_data()[1])


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, *arguments]
    return subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_history_is_what_one_process_makes_of_the_checkpoints(folder):
    run = fmn.Run.open(folder / "run", make_model())
    assert len(run.history) == 8
    for e, path in enumerate(run.checkpoints):
        model = checkpoints.load_into(make_model(), path)
        probs, labels = data.predict(model, VAL)
        np.testing.assert_array_equal(run.history.correct()[e], fmn.correctness(probs, labels))
    assert run.history.correct()[-1].mean() > 0.4  # chance: 0.25


def test_the_plan_is_that_of_one_process(folder):
    run = fmn.Run.open(folder / "run", make_model())
    alone = fmn.fuse(run.probabilities(VAL), VAL[1], correct=run.history)
    assert fmn.FusionPlan.load(folder / "plan.json").members == alone.members


def test_every_sample_counts_once_and_stands_where_it_stood(folder):
    run = fmn.Run.open(folder / "run", make_model())
    _, probs, from_sampler = torch.load(folder / "results.pt")
    alone = run.probabilities(VAL)[-1]
    assert probs.shape == from_sampler.shape == alone.shape
    np.testing.assert_allclose(probs, alone, atol=1e-6)
    np.testing.assert_allclose(from_sampler, alone, atol=1e-6)


def test_a_killed_process_ends_the_job_and_the_run_resumes_with_the_same_bits(folder, tmp_path):
    killed = torchrun(tmp_path, 4)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert 3 <= len(fmn.Run.open(tmp_path / "run").history) <= 5
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("run/history.fmnh", "plan.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    runs = [fmn.Run.open(f / "run", make_model()) for f in (tmp_path, folder)]
    for a, b in zip(*(r.checkpoints for r in runs), strict=True):
        assert a.read_bytes() == b.read_bytes()
    students = [torch.load(f / "results.pt")[0] for f in (tmp_path, folder)]
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[0])


@pytest.mark.parametrize("n", [97, 96, 5, 64, 65])
def test_parts_of_batches_are_equal_and_disjoint(monkeypatch, n):
    """Training uses no sample twice, and leaves out at most world_size - 1 samples."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        samples = torch.arange(n), torch.zeros(n, dtype=torch.int64)
        batches = data.Batches(samples, 32, torch.device("cpu"), shuffle=True, split=True)
        seen.append([x for x, _ in batches])
    assert [len(x) for x in seen[0]] == [len(x) for x in seen[1]]
    assert all(len(x) >= 2 for x in seen[0])
    numbers = torch.cat([x for part in seen for x in part])
    assert len(numbers.unique()) == len(numbers) == n - n % 2


def test_a_batch_size_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 2 processes, got 33"):
        data.Batches(VAL, 33, torch.device("cpu"), shuffle=True, split=True)
