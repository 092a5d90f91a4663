"""The thread that writes a training's files."""

import errno
import threading

import pytest
from training_runs import trained

from fmn_ref.runs import checkpoints
from fmn_ref.training import store
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
