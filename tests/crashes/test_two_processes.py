"""Every pair of processes on one run folder: the second writer is refused before it writes; readers always read."""

import errno
import os
import shutil

import numpy as np
import pytest
from folders import contents
from parties import EPOCHS, ROLES, WRITERS, Party
from training_runs import trained

import fmn_ref as fmn
from fmn_ref.runs import lock
from fmn_ref.training.target_files import TargetFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished training."""
    return trained(tmp_path_factory.mktemp("finished") / "run", EPOCHS).run_dir


@pytest.mark.parametrize("first", WRITERS)
def test_while_one_writes_others_are_refused_and_readers_read(tmp_path, first):
    party = Party(first, tmp_path / "run", stops=True)
    try:
        before = contents(tmp_path / "run")
        assert before
        for second in ROLES:
            refused = Party(second, tmp_path / "run").end()
            if second in WRITERS:
                assert f"run_dir: process {party.process.pid} on " in refused, second
                assert "a run has one writer" in refused
            else:
                assert refused == "", second
            assert contents(tmp_path / "run") == before, second
    finally:
        assert party.end() == ""
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("second", ROLES)
@pytest.mark.parametrize("first", sorted(ROLES.keys() - WRITERS.keys()))
def test_while_one_reads_others_write(tmp_path, finished, first, second):
    """Rows that were there when it opened are what it reads, or it says that they were discarded."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before, expected = contents(folder), fmn.Run.open(folder).history.correct()
    party = Party(first, folder, stops=True)
    error = Party(second, folder).end()
    if second in ("distill", "bring"):  # of another configuration than the training
        assert "choose another folder" in error
        assert contents(folder) == before
    else:
        assert error == ""
    found = fmn.Run.open(folder).history
    n = {"recorder": EPOCHS + 2, "rewind": EPOCHS - 1}.get(second, EPOCHS)
    assert len(found) == n
    np.testing.assert_array_equal(found[: EPOCHS - 1], expected[: EPOCHS - 1])
    ended = party.end()
    assert ended == "" if second != "rewind" else "another process discarded epochs" in ended


@pytest.mark.parametrize("first", WRITERS)
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, first):
    party = Party(first, tmp_path / "run", stops=True)
    party.kill()
    assert (tmp_path / "run" / ".lock").exists()
    for second in WRITERS:
        shutil.copytree(tmp_path / "run", tmp_path / second)
        if first == "bring":
            shutil.copytree(tmp_path / "run-source", tmp_path / f"{second}-source", copy_function=shutil.copy2)
        assert "one writer" not in Party(second, tmp_path / second).end()
        assert not (tmp_path / second / ".lock").exists()
    assert Party(first, tmp_path / "run").end() == ""


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_warning_names_the_folder(tmp_path, monkeypatch, caplog, code):
    def no_locks(descriptor, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    run = trained(tmp_path / "run", 2)
    with TargetFolder(tmp_path / "targets", {}, {}) as targets:
        targets.save({"a.npy": np.zeros(3)}, 1)
    assert len(run.history) == 2
    for name in ("run", "targets"):
        words = f"{tmp_path}/{name}/.lock: {os.strerror(code)}; nothing keeps a second process from writing here"
        assert words in caplog.text
    assert not list(tmp_path.rglob(".*"))  # neither locks nor temporary files
