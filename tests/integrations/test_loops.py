"""The scripts for other loops run, and the guide shows their lines."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import make_data, make_model
from pages import block
from torch.utils.data import DataLoader, TensorDataset

import fmn_ref as fmn

DOCS = Path(__file__).parents[2] / "docs"
SCRIPTS = {"flax_loop": "flax", "ignite_engine": "ignite", "fastai_learner": "fastai.basics"}


def installed(framework):
    try:
        return __import__(framework)
    except (ImportError, RuntimeError) as error:  # torchvision for another torch
        pytest.skip(f"{framework}: {error}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, tmp_path):
    installed(SCRIPTS[script])
    command = [sys.executable, DOCS / "examples" / f"{script}.py", tmp_path / "run"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=500
    )
    assert done.returncode == 0, done.stderr
    peak, final, fused = map(
        float, re.search(r"F_e ([\d.]+);.* final ([\d.]+) %, fused ([\d.]+) %", done.stdout).groups()
    )
    history = fmn.Run.open(tmp_path / "run").history
    assert len(history) == 30
    assert peak == pytest.approx(fmn.forget_fraction(history).max(), abs=1e-3)
    assert fused > final + 5
    if script == "flax_loop":  # interrupted and run again, it goes on with the weights and Adam's state
        whole = (tmp_path / "run" / "history.fmnh").read_bytes()
        fmn.Recorder(tmp_path / "run", save=print, suffix=".msgpack").rewind(12)
        assert subprocess.run(command, capture_output=True, timeout=500).returncode == 0
        assert (tmp_path / "run" / "history.fmnh").read_bytes() == whole


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_guide_shows_lines_of_the_script(script):
    source = (DOCS / "examples" / f"{script}.py").read_text()
    code = block((DOCS / "integrations" / "loops.md").read_text(), f"[{script}.py]")
    lines = [line for line in code.splitlines() if line]  # formatted without the function around them
    assert len(lines) <= 10
    indented = textwrap.indent("\n".join(lines), "    ")
    assert indented in "\n".join(line for line in source.splitlines() if line)


@pytest.mark.filterwarnings("ignore")
def test_timm(tmp_path):
    installed("timm")
    from timm.utils import CheckpointSaver

    spec = importlib.util.spec_from_file_location("timm_checkpoints", DOCS / "examples" / "timm_checkpoints.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    _, (x, y), _ = make_data()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    args = argparse.Namespace(model="mine")
    saver = CheckpointSaver(
        model, optimizer, args, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), max_history=1000
    )
    expected = []
    for epoch in range(12):
        torch.nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        expected.append(fmn.correctness(model.eval()(x), y))
        saver.save_checkpoint(epoch, metric=expected[-1].mean())
    run = script.record_checkpoints(tmp_path, tmp_path / "run", make_model(), DataLoader(TensorDataset(x, y), 32))
    assert run.history.epochs == tuple(range(12))
    np.testing.assert_array_equal(run.history.correct(), expected)


def test_bfloat16_of_jax():
    jnp = pytest.importorskip("jax.numpy")
    scores, labels = jnp.array([[0.875, 0.125], [0.25, 0.75], [0.5, 0.5]], "bfloat16"), [0, 0, 1]
    for given in (scores, np.asarray(scores)):  # of ml_dtypes
        np.testing.assert_array_equal(fmn.correctness(given, labels), [True, False, False])
        plan = fmn.fuse(given[None], labels)
        np.testing.assert_array_equal(plan.apply(given[None]), np.asarray(scores, np.float64))
