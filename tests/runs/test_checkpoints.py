"""Checkpoints: a written one comes back unchanged, damage is an error that names the file, 16 bits lose little."""

import os
import pickle
from functools import partial

import pytest
import torch
from folders import flip_bit, full_disk
from networks import make_model
from torch import nn
from training_runs import fresh, same_weights

from fmn_ref.runs import checkpoints


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


def test_versions_of_modules_are_kept(tmp_path):
    checkpoints.save_state(Versioned(), tmp_path / "a.pt")
    assert (checkpoints.load_into(Versioned(), tmp_path / "a.pt").weight == 1).all()


def test_wrapped_models_are_stored_under_plain_names(tmp_path):
    model = fresh()
    for wrap in (nn.DataParallel, partial(torch.compile, backend="eager")):
        checkpoints.save_state(wrap(model), tmp_path / "a.pt")
        assert same_weights(checkpoints.load_into(make_model(), tmp_path / "a.pt"), model)
        other = fresh(2)
        checkpoints.load_into(wrap(other), tmp_path / "a.pt")
        assert same_weights(other, model)


def test_round_trip_keeps_everything(tmp_path):
    model = fresh()
    checkpoints.save_state(model, tmp_path / "a.pt")
    assert same_weights(checkpoints.load_into(make_model(), tmp_path / "a.pt"), model)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_pickle_runs_no_code(tmp_path):
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
def test_truncated(tmp_path, keep):
    path = tmp_path / "a.pt"
    checkpoints.save_state(fresh(), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
    with pytest.raises(ValueError, match=r"a\.pt"):
        checkpoints.load(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    model = nn.Linear(50, 50)
    checkpoints.save_state(model, tmp_path / "a.pt")
    weights = model.weight.detach().numpy().tobytes()
    flip_bit(tmp_path / "a.pt", (tmp_path / "a.pt").read_bytes().index(weights) + 400)
    with pytest.raises(ValueError, match=r"a\.pt.*checksum"):
        checkpoints.load(tmp_path / "a.pt")


def test_missing_or_of_another_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        checkpoints.load(tmp_path / "none.pt")
    checkpoints.save_state(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: does not fit"):
        checkpoints.load_into(make_model(), tmp_path / "a.pt")
    checkpoints.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt: does not fit"):
        checkpoints.load_into(make_model(), tmp_path / "b.pt")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoints.save_state(nn.Linear(2, 2), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space.*a\.pt"):
        checkpoints.save_state(fresh(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_half_the_disk_and_a_rounding(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.BatchNorm1d(200))
    checkpoints.save_state(model, tmp_path / "whole.pt")
    checkpoints.save_state(model, tmp_path / "half.pt", half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "whole.pt").stat().st_size
    assert model[0].weight.dtype == torch.float32
    stored = checkpoints.load(tmp_path / "half.pt")
    assert {k: v.dtype for k, v in stored.items()} == {
        k: torch.float16 if v.is_floating_point() else torch.int64 for k, v in model.state_dict().items()
    }
    torch.manual_seed(1)
    loaded = checkpoints.load_into(nn.Sequential(nn.Linear(100, 200), nn.BatchNorm1d(200)), tmp_path / "half.pt")
    for ours, given in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert ours.dtype == given.dtype
        torch.testing.assert_close(ours, given, rtol=2**-11, atol=2**-24)


def test_what_does_not_fit_stays_whole(tmp_path):
    model = nn.BatchNorm1d(3)
    model.running_var[:] = torch.tensor([1.0, 1e5, 0.1])
    model.running_mean[:] = torch.tensor([torch.nan, torch.inf, 0.5])
    model.num_batches_tracked += 100_000
    checkpoints.save_state(model.double(), tmp_path / "a.pt", half=True)
    stored = checkpoints.load(tmp_path / "a.pt")
    assert (stored["running_var"].dtype, stored["running_mean"].dtype) == (torch.float64, torch.float16)
    loaded = checkpoints.load_into(nn.BatchNorm1d(3).double(), tmp_path / "a.pt")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_names_and_versions_stay(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    checkpoints.save_state(nn.DataParallel(model), tmp_path / "a.pt", half=True)
    stored = checkpoints.load(tmp_path / "a.pt")
    assert list(stored) == list(model.state_dict())
    assert stored._metadata == model.state_dict()._metadata
