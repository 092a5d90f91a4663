"""The thread that writes a training's files."""

import errno
import os
import threading

import numpy as np
import pytest
import torch
from folders import contents, flip_bit
from training_runs import fresh, interrupted_at, same_weights, trained

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training import store
from fmn_ref.training.recipe import Recipe
from fmn_ref.training.store import Writer


def test_writes_in_order_beside_the_caller():
    done, may_go = [], threading.Event()
    with Writer(0) as writer:
        writer.put(may_go.wait, lambda: done.append(threading.current_thread().name))
        assert done == []
        may_go.set()
        writer.put(lambda: done.append(2))
        assert done[0].startswith("fmn-writer")
    assert done[1:] == [2]


def test_an_error_reaches_the_caller_and_stops_what_follows():
    done = []

    def fails():
        raise OSError(errno.EIO, "bad disk")

    writer = Writer(0)
    writer.put(fails, lambda: done.append(1))
    with pytest.raises(OSError, match="bad disk"):
        writer.put(lambda: done.append(2))
    writer.__exit__(None, None, None)
    assert done == []


def test_patience_has_an_end(monkeypatch):
    monkeypatch.setattr(store, "PAUSE", 0.001)
    tries = []

    def full():
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    with Writer(0.05) as writer:
        writer.put(full)
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    assert len(tries) > 2


def test_does_not_wait_after_another_error():
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    writer = Writer(1e9)
    writer.put(full)
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_checkpoints_are_written_by_another_thread(tmp_path, monkeypatch):
    real, threads = checkpoints.save, set()

    def save(content, path):
        threads.add(threading.current_thread().name)
        real(content, path)

    monkeypatch.setattr(checkpoints, "save", save)
    trained(tmp_path, epochs=2)
    assert [name.startswith("fmn-writer") for name in threads] == [True]


class TestRewindOfATraining:
    """`Recorder.rewind` on a folder that `train` made: training goes on from what remains, or the call is refused."""

    def test_to_the_epoch_of_the_state_before(self, unbroken, tmp_path):
        trained(tmp_path, epochs=6)
        with fmn.Recorder(tmp_path) as recorder:
            assert recorder.rewind(5) == [5]
        assert not (tmp_path / "resume.pt").exists()
        assert fmn.Run.open(tmp_path).history.epochs == (0, 1, 2, 3, 4)
        again = trained(tmp_path, epochs=6)
        assert same_weights(again.model, unbroken.model)
        np.testing.assert_array_equal(again.history.packed, unbroken.history.packed)

    def test_to_the_beginning(self, unbroken, tmp_path):
        trained(tmp_path, epochs=6)
        with fmn.Recorder(tmp_path) as recorder:
            assert recorder.rewind(0) == [0, 1, 2, 3, 4, 5]
        assert not [p for p in tmp_path.iterdir() if p.suffix == ".pt"]
        again = trained(tmp_path, epochs=6)  # resume=True: nothing is there to go on from
        assert same_weights(again.model, unbroken.model)

    def test_to_an_epoch_without_a_state(self, tmp_path):
        trained(tmp_path, epochs=6)
        before = contents(tmp_path)
        with fmn.Recorder(tmp_path) as recorder, pytest.raises(ValueError, match="can go on from epoch 5 or 6 only"):
            recorder.rewind(3)
        assert contents(tmp_path) == before
        with fmn.Recorder(tmp_path) as recorder:
            assert recorder.rewind(6) == []
        assert contents(tmp_path) == before

    def test_states_of_ones_own_loop_are_left_alone(self, tmp_path):
        """Such a file may have the same name, and count epochs in another way."""
        recorder = fmn.Recorder(tmp_path, fresh())
        for epoch in range(3):
            recorder.record(epoch, [0, 1], [0, 1])
            torch.save({"epoch": epoch + 1, "model": fresh().state_dict()}, tmp_path / "resume.pt")
        assert recorder.rewind(1) == [1, 2]
        assert torch.load(tmp_path / "resume.pt")["epoch"] == 3


class Counted(torch.optim.SGD):
    """An optimizer that keeps an array of NumPy in its state, as some do."""

    def state_dict(self):
        return {**super().state_dict(), "seen": np.arange(3)}


def test_a_state_that_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Not after the night, when the run should resume."""
    monkeypatch.setattr(Recipe, "make_optimizer", lambda self, model: Counted(model.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"^state\.optimizer\.seen: ndarray could not be read back"):
        trained(tmp_path, epochs=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "run.json"]
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["a bit", "half", "a pickle", "nothing", "a folder", "a pipe"])
def test_any_damage_of_the_state_leads_to_the_one_before(unbroken, tmp_path, caplog, rng, damage):
    with interrupted_at("resume.pt", 5):
        trained(tmp_path, epochs=6)
    path = tmp_path / "resume.pt"
    checkpoints.save(checkpoints.load(tmp_path / "resume.previous.pt"), path)  # the interrupt came between the two
    raw = path.read_bytes()
    path.unlink()
    if damage == "a bit":
        path.write_bytes(raw)
        flip_bit(path, int(rng.integers(len(raw))), 1 << int(rng.integers(8)))
    elif damage in ("a folder", "a pipe"):
        (os.mkdir if damage == "a folder" else os.mkfifo)(path)
    else:
        path.write_bytes({"half": raw[: len(raw) // 2], "a pickle": b"\x80\x04N.", "nothing": b""}[damage])
    again = trained(tmp_path, epochs=6)
    assert f"{path}: " in caplog.text
    assert "going on from the state of the epoch before" in caplog.text
    assert (tmp_path / "resume.damaged").exists()
    assert same_weights(again.model, unbroken.model)
    np.testing.assert_array_equal(again.history.packed, unbroken.history.packed)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    """The state stays where it is, and the next try goes on from it."""
    with interrupted_at("resume.pt", 3):
        trained(tmp_path, epochs=4)
    before = contents(tmp_path)

    def too_large(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")

    monkeypatch.setattr(torch, "load", too_large)
    with pytest.raises(MemoryError, match=r"resume\.previous\.pt: .* 8589934592 bytes"):
        trained(tmp_path, epochs=4)
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_a_state_that_cannot_be_moved_is_tried_again(unbroken, tmp_path, monkeypatch):
    """The folder's sync fails once, at every place in turn, with a disk that is full: `train` waits for room."""
    monkeypatch.setattr(store, "PAUSE", 0.001)
    real, begun = os.fsync, len(tmp_path.parents) + 4  # calls before the thread's first one
    for at in range(begun, begun + 40, 4):
        calls = []

        def fsync(descriptor, at=at, calls=calls):
            calls.append(1)
            if len(calls) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        again = trained(tmp_path / str(at), epochs=6, disk_wait=60)
        assert same_weights(again.model, unbroken.model)
        np.testing.assert_array_equal(again.history.packed, unbroken.history.packed)
    assert len(calls) < begun + 60


def test_another_working_directory_does_not_matter(unbroken, tmp_path, monkeypatch):
    """A training that changes it, as Hydra and some data sets do."""
    monkeypatch.chdir(tmp_path)

    def augment(x):
        monkeypatch.chdir("/")
        return x

    run = trained("runs/mine", epochs=6, augment=augment)
    assert run.run_dir == tmp_path / "runs" / "mine"
    assert same_weights(run.model, unbroken.model)
