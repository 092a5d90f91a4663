"""The engine of `train` and `distill`: damaged files, memory formats, compilation."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from folders import contents, flip_bit
from networks import RECIPE, make_data, make_model
from torch import nn
from training_runs import interrupted_at, same_weights, trained

import fmn_ref as fmn
from fmn_ref.runs import checkpoints

TRAIN, VAL, _ = make_data()


@pytest.fixture
def interrupted(tmp_path):
    """A run of six epochs that ended while the fifth was written."""
    with interrupted_at("epoch_00004.pt"):
        trained(tmp_path, epochs=6)
    return tmp_path


class Code:
    def __reduce__(self):
        return os.abort, ()


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "bit-flipped": flip_bit,
    "missing": lambda path: path.unlink(),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Code())),
    "pickle in an archive": lambda path: torch.save(Code(), path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_resumes_from_the_one_before(unbroken, interrupted, caplog, damage):
    DAMAGE[damage](interrupted / "resume.pt")
    run = trained(interrupted, epochs=6)
    if damage != "missing":
        assert f"{interrupted}/resume.pt: not a readable checkpoint" in caplog.text
    assert same_weights(run.model, unbroken.model)
    assert run.history.packed.tobytes() == unbroken.history.packed.tobytes()
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(run.checkpoints, unbroken.checkpoints, strict=True))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_left_out(unbroken, interrupted, caplog, damage):
    DAMAGE[damage](interrupted / "checkpoints" / "epoch_00002.pt")
    run = trained(interrupted, epochs=6)
    assert f"{interrupted}/checkpoints/epoch_00002.pt: " in caplog.text
    assert "fuse `run.kept`" in caplog.text
    assert same_weights(run.model, unbroken.model)
    assert run.history.packed.tobytes() == unbroken.history.packed.tobytes()
    assert run.kept.history.epochs == (0, 1, 3, 4, 5)
    assert fmn.fuse(run.kept.probabilities(VAL), VAL[1]).n_epochs == 5


def test_two_damaged_states_change_nothing(interrupted):
    for name in ("resume.pt", "resume.previous.pt"):
        flip_bit(interrupted / name)
    before = contents(interrupted)
    with pytest.raises(ValueError, match=r"resume\.pt: not a readable.*resume\.previous\.pt: not a readable"):
        trained(interrupted, epochs=6)
    assert contents(interrupted) == before


def test_a_damaged_state_does_not_replace_the_intact_one(unbroken, interrupted):
    """Killed again after the run went on from resume.previous.pt, while it wrote the next resume.pt."""
    flip_bit(interrupted / "resume.pt")
    with interrupted_at("resume.pt"):
        trained(interrupted, epochs=6)
    assert (interrupted / "resume.damaged").exists()
    assert same_weights(trained(interrupted, epochs=6).model, unbroken.model)


@pytest.mark.parametrize("options", [{"keep": "none"}, {"half": True}, {}])
def test_one_epoch_killed_before_its_resume_state_is_trained_again(tmp_path, options):
    """Its history looks like that of a finished run whose resume files were deleted."""
    with interrupted_at("resume.pt"):
        trained(tmp_path / "killed", epochs=1, **options)
    run = trained(tmp_path / "killed", epochs=1, **options)
    assert same_weights(run.model, trained(tmp_path / "whole", epochs=1).model)


def images(n=96):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (n,), generator=g)
    return torch.randn(n, 3, 8, 8, generator=g) + y[:, None, None, None] * 0.5, y


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def test_memory_formats_agree(tmp_path):
    runs = []
    for channels_last in (True, False):
        folder = tmp_path / str(channels_last)
        options = RECIPE | {"channels_last": channels_last, "lr": 0.01}
        runs.append(fmn.train(cnn(), images(), images(), epochs=3, run_dir=folder, **options))
    for run, format in zip(runs, (torch.channels_last, torch.contiguous_format), strict=True):
        assert run.model[0].weight.is_contiguous(memory_format=format)
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_a_compiled_model_learns_the_same(tmp_path):
    runs = []
    for mode in ("default", "none"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))  # Dropout would draw otherwise
        runs.append(fmn.train(model, TRAIN, VAL, epochs=2, run_dir=tmp_path / mode, **RECIPE | {"compile": mode}))
    for a, b in zip(*(run.checkpoints for run in runs), strict=True):
        compiled, plain = checkpoints.load(a), checkpoints.load(b)
        assert compiled.keys() == plain.keys()
        for name, value in compiled.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["train", "val"])
@pytest.mark.parametrize("row", [1, 77, -1])
def test_a_run_of_other_inputs_is_not_resumed(tmp_path, which, row):
    """Whatever input it is; a run whose run.json has no digest of all inputs goes on as before."""
    sets = dict(zip(("train", "val"), make_data(), strict=False))
    options = RECIPE | {"epochs": 2, "run_dir": tmp_path}
    run = fmn.train(make_model(), sets["train"], sets["val"], **options)
    x = sets[which][0].clone()
    x[row, 2] += 1
    others = sets | {which: (x, sets[which][1])}
    name = "data" if which == "train" else "val_data"
    with pytest.raises(ValueError, match=rf"^{name}(_in_full)?: the run in"):
        fmn.train(make_model(), others["train"], others["val"], **options)
    content = json.loads((tmp_path / "run.json").read_text())
    content["config"] = {key: value for key, value in content["config"].items() if not key.endswith("_in_full")}
    (tmp_path / "run.json").write_text(json.dumps(content))
    again = fmn.train(make_model(), sets["train"], sets["val"], **options)
    np.testing.assert_array_equal(again.history.packed, run.history.packed)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("make", [nn.EmbeddingBag, lambda *a, **k: nn.Sequential(nn.Embedding(*a, **k), nn.Flatten())])
def test_sparse_gradients_are_named(tmp_path, optimizer, make):
    x, y = torch.randint(0, 20, (40, 7)), torch.randint(0, 3, (40,))
    options = {"epochs": 1, "optimizer": optimizer, "progress": False}
    for sparse in (True, False):
        model = nn.Sequential(make(20, 8, sparse=sparse), nn.LazyLinear(3))
        model(x)
        if not sparse:
            fmn.train(model, (x, y), (x, y), run_dir=tmp_path, **options)
            return
        words = r"model: expected dense gradients, got a sparse one for 0\.\S*weight; make the embedding"
        with pytest.raises(ValueError, match=words):
            fmn.train(model, (x, y), (x, y), run_dir=tmp_path, **options)
