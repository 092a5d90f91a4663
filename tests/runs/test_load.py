"""Arrays are read from .npy and .npz files."""

import zipfile

import numpy as np
import pytest
from folders import flip_bit

from fmn_ref.cli import main
from fmn_ref.runs import load


@pytest.fixture
def correct(rng):
    return rng.random((7, 5003)) < 0.6


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_members_of_npz_files(tmp_path, capsys, correct, save):
    path = tmp_path / "c.npz"
    save(path, labels=np.zeros(3), correct=np.asfortranarray(correct))
    np.save(tmp_path / "c.npy", correct)
    np.testing.assert_array_equal(load.load_array(str(path), "correct"), correct)
    assert main(["metric", str(tmp_path / "c.npy"), "--csv"]) == 0
    expected = capsys.readouterr().out
    assert main(["metric", str(path), "--csv"]) == 0
    assert capsys.readouterr().out == expected


def test_members_are_checked(tmp_path, correct):
    path = tmp_path / "c.npz"
    np.savez(path, correct=correct)
    flip_bit(path, 5000)
    with pytest.raises(ValueError, match="CRC"):
        load.load_array(str(path), "correct")


def test_members_of_other_names(tmp_path, correct):
    np.save(tmp_path / "c.npy", correct)
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as z:
        z.write(tmp_path / "c.npy", "correct")
    np.testing.assert_array_equal(load.load_array(str(tmp_path / "c.npz"), "correct"), correct)
