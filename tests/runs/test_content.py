"""Files are told apart by their content, whatever they are called; nothing of them is loaded."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors_files import write

import fmn_ref as fmn
from fmn_ref.runs.content import content_of


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a file ran')",))


def history(path):
    fmn.CorrectnessHistory(2, path).append([1, 0], 0)


def with_open(path, save, *args, **kwargs):
    with open(path, "wb") as file:  # np.save would add a suffix to a name
        save(file, *args, **kwargs)


def keras(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", b"")


MAKE = {
    "npy": lambda p: with_open(p, np.save, np.ones(2)),
    "npz": lambda p: with_open(p, np.savez, probs=np.ones(2), correct=np.ones(2)),
    "history": history,
    "checkpoint": lambda p: torch.save({"w": Evil()}, p),
    "pickle": lambda p: p.write_bytes(pickle.dumps(Evil())),
    "plan": lambda p: fmn.FusionPlan.from_weights({0: 1}, 2).save(p),
    "json": lambda p: p.write_text('{"a": 1}'),
    "text": lambda p: p.write_text("0 1 2 \u00e9\n"),
}


@pytest.mark.parametrize("kind", MAKE)
def test_each_kind_is_known_by_its_content(tmp_path, kind):
    MAKE[kind](tmp_path / "file")
    assert content_of(tmp_path / "file").kind == kind


def test_other_checkpoints_and_histories(tmp_path):
    write(tmp_path / "safetensors", {"w": torch.ones(2)})
    keras(tmp_path / "keras")
    (tmp_path / "hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    for name in ("safetensors", "keras", "hdf5"):
        assert content_of(tmp_path / name).kind == "checkpoint"
    np.savez(tmp_path / "h.npz", predictions=np.ones(2), labels=np.ones(2))
    assert content_of(tmp_path / "h.npz").kind == "correctness"
    fmn.Recorder(tmp_path / "run").record(0, [1], [1])
    assert content_of(tmp_path / "run" / "run.json").kind == "run"


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\3\4", b"PK\3\4" + bytes(100), b"\x00" * 64, b"[1]" + bytes(3), bytes(8) + b"x"],
)
def test_damaged_and_unknown_files_are_no_error(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert content_of(tmp_path / "file") is None
    assert content_of(tmp_path) is None
    assert content_of(tmp_path / "missing") is None


def test_other_json(tmp_path):
    for text in (json.dumps({"format": ["fmn_ref.plan"]}), "{", "{" * 100_000):
        (tmp_path / "file").write_text(text)
        assert content_of(tmp_path / "file").kind == "json"


def test_an_archive_of_a_later_zip_version_is_no_error(tmp_path):
    """Fuzzing found zipfile's NotImplementedError, with which the command line ended in a traceback."""
    np.savez(tmp_path / "a.npz", correct=np.eye(2))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(b"PK\1\2") + 6] = 250
    (tmp_path / "a.npz").write_bytes(content)
    assert content_of(tmp_path / "a.npz") is None
