"""One owner of a run folder: layout, run.json, and the lock that keeps a second writer out."""

import contextlib
import copy
import errno
import gc
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from folders import contents
from fresh_process import record_in_another_process
from torch import nn

import fmn_ref as fmn
from fmn_ref import _files
from fmn_ref.runs import lock as module
from fmn_ref.runs.folder import RunFolder
from fmn_ref.runs.lock import RunLock

LABELS = [0, 1, 1]
HOLD = """
import sys, fmn_ref as fmn
recorder = fmn.Recorder(sys.argv[1])
recorder.record(0, [0, 1, 1], [0, 1, 1])
print("recorded", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(folder):
    """A process that has recorded epoch 0, and holds the folder's lock until it is killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], **pipes) as process:
        assert process.stdout.readline() == "recorded\n"
        yield process
        process.kill()


def network(value):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    return model


class TestTwoProcesses:
    def test_the_second_writer_is_refused_before_anything_is_written(self, tmp_path):
        with another_process(tmp_path) as process:
            before = contents(tmp_path)
            for make in (fmn.Recorder, lambda folder: fmn.Recorder(folder, config={"lr": 1})):
                with pytest.raises(
                    ValueError, match=rf"run_dir: process {process.pid} on .* writes in .*; a run has one"
                ):
                    make(tmp_path)
            x = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
            with pytest.raises(ValueError, match="a run has one writer"):
                fmn.train(network(0.0), x, x, epochs=1, run_dir=tmp_path, progress=False)
            assert contents(tmp_path) == before
            assert len(fmn.Run.open(tmp_path).history) == 1  # a reader needs no lock

    def test_a_killed_process_holds_no_lock(self, tmp_path):
        with another_process(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
        recorder = fmn.Recorder(tmp_path)
        recorder.record(1, LABELS, LABELS)
        assert fmn.Run.open(tmp_path).history.epochs == (0, 1)

    def test_the_end_of_a_process_leaves_no_lock_file(self, tmp_path):
        assert record_in_another_process(tmp_path, 0, LABELS) == ""
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "history.fmnh", "run.json"]

    def test_a_forked_worker_does_not_hold_it(self, tmp_path):
        recorder = fmn.Recorder(tmp_path)
        recorder.record(0, LABELS, LABELS)
        done = multiprocessing.get_context("fork").Event()
        worker = multiprocessing.get_context("fork").Process(target=done.wait, args=(60,))
        worker.start()
        recorder.close()
        assert record_in_another_process(tmp_path, 1, LABELS) == ""
        done.set()
        worker.join()
        assert worker.exitcode == 0
        assert len(fmn.Run.open(tmp_path).history) == 2


class TestOneProcess:
    @pytest.mark.parametrize("recorded", [0, 3])
    def test_of_two_recorders_the_stale_one_writes_nothing(self, tmp_path, recorded):
        first = fmn.Recorder(tmp_path, network(1.0))
        for epoch in range(recorded):
            first.record(epoch, LABELS, LABELS)
        second = fmn.Recorder(tmp_path, network(2.0))
        first.record(recorded, LABELS, LABELS)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="one writer"):
            second.record(recorded, LABELS, LABELS)
        assert contents(tmp_path) == before

    def test_a_notebook_may_make_its_recorder_again(self, tmp_path):
        recorder = fmn.Recorder(tmp_path)
        recorder.record(0, LABELS, LABELS)
        recorder = fmn.Recorder(tmp_path)
        recorder.record(1, LABELS, LABELS)
        assert (tmp_path / ".lock").exists()
        recorder.close()
        gc.collect()
        assert not (tmp_path / ".lock").exists()
        recorder.record(2, LABELS, LABELS)  # takes the lock again
        assert (tmp_path / ".lock").exists()

    @pytest.mark.parametrize("factor", [1.0, float("nan")])
    def test_a_training_releases_the_folder(self, tmp_path, factor):
        """A training that ends, and one that fails."""
        x, failed = (torch.randn(3, 2), torch.tensor(LABELS)), None
        try:
            loss_fn = lambda logits, labels: factor * nn.functional.cross_entropy(logits, labels)  # noqa: E731
            fmn.train(nn.Linear(2, 2), x, x, epochs=2, run_dir=tmp_path, progress=False, loss_fn=loss_fn)
        except FloatingPointError as error:
            failed = error  # its traceback holds the frames of `train`
        assert (failed is None) == (factor == 1)
        assert not (tmp_path / ".lock").exists()
        assert record_in_another_process(tmp_path, 9, LABELS) == ""

    def test_it_is_a_context_manager(self, tmp_path):
        with fmn.Recorder(tmp_path) as recorder:
            recorder.record(0, LABELS, LABELS)
        assert record_in_another_process(tmp_path, 1, LABELS) == ""

    def test_a_refused_claim_leaves_no_lock(self, tmp_path):
        fmn.Recorder(tmp_path, config={"lr": 1}).record(0, LABELS, LABELS)
        with pytest.raises(ValueError, match="lr: the run in"):
            fmn.Recorder(tmp_path, config={"lr": 2})
        assert not (tmp_path / ".lock").exists()


class TestLock:
    def test_a_link_in_its_place_is_not_followed(self, tmp_path):
        target = tmp_path / "precious"
        target.write_text("mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").symlink_to(target)
        with pytest.raises(ValueError, match=r"\.lock: expected a regular file"):
            fmn.Recorder(tmp_path / "run")
        assert target.read_text() == "mine"

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_something_else_in_its_place_is_named(self, tmp_path, make):
        make(tmp_path / ".lock")
        with pytest.raises(ValueError, match=r"\.lock: expected a regular file"):
            fmn.Recorder(tmp_path)

    def test_a_file_system_without_locks_is_named(self, tmp_path, monkeypatch, caplog):
        def no_locks(*args):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(module.fcntl, "flock", no_locks)
        fmn.Recorder(tmp_path).record(0, LABELS, LABELS)
        assert f"{tmp_path}/.lock: No locks available" in caplog.text
        assert "nothing keeps a second process from writing here" in caplog.text

    def test_a_folder_to_read_from_needs_none(self, tmp_path, monkeypatch):
        fmn.Recorder(tmp_path).record(0, LABELS, LABELS)

        def refused(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(module, "_opened", refused)
        assert fmn.Recorder(tmp_path).next_epoch == 1

    def test_a_folder_that_is_made_again_is_locked_again(self, tmp_path):
        """As in a notebook that deletes the run and goes on."""
        old = fmn.Recorder(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
        new = fmn.Recorder(tmp_path / "run")
        new.record(0, LABELS, LABELS)
        del old
        assert "a run has one writer" in record_in_another_process(tmp_path / "run", 1, LABELS)

    def test_the_lock_of_another_process_is_not_deleted(self, tmp_path):
        old = fmn.Recorder(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
        with another_process(tmp_path / "run"):
            old.close()
            with pytest.raises(ValueError, match="a run has one writer"):
                fmn.Recorder(tmp_path / "run")

    def test_reading_the_file_does_not_release_it(self, tmp_path):
        recorder = fmn.Recorder(tmp_path / "run")
        recorder.record(0, LABELS, LABELS)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert "a run has one writer" in record_in_another_process(tmp_path / "run", 1, LABELS)

    def test_a_forked_child_is_another_process(self, tmp_path):
        recorder = fmn.Recorder(tmp_path)
        recorder.record(0, LABELS, LABELS)

        def record_too(refused):
            for make in (lambda: recorder, lambda: fmn.Recorder(tmp_path)):
                with contextlib.suppress(ValueError):
                    make().record(1, LABELS, LABELS)
                    return
            refused.set()

        fork = multiprocessing.get_context("fork")
        refused = fork.Event()
        child = fork.Process(target=record_too, args=(refused,))
        child.start()
        child.join()
        assert refused.is_set()
        recorder.record(1, LABELS, LABELS)

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
    def test_a_copy_takes_the_lock_when_it_writes(self, tmp_path, copied):
        recorder = fmn.Recorder(tmp_path)
        recorder.record(0, LABELS, LABELS)
        again = copied(recorder)
        del recorder
        gc.collect()
        assert not (tmp_path / ".lock").exists()
        again.record(1, LABELS, LABELS)
        assert (tmp_path / ".lock").exists()

    def test_threads_share_it(self, tmp_path):
        def hold(k):
            return [RunLock.of(tmp_path) for _ in range(50)]

        with ThreadPoolExecutor(4) as pool:
            held = list(pool.map(hold, range(4)))
        assert len({id(lock) for locks in held for lock in locks}) == 1
        del held
        gc.collect()
        assert not (tmp_path / ".lock").exists()


def test_names_of_files_stay(tmp_path):
    """Runs that older versions wrote have these names."""
    folder = RunFolder(tmp_path)
    named = [folder.run_json, folder.history, folder.resume, folder.previous_resume, folder.targets]
    assert [p.name for p in named] == ["run.json", "history.fmnh", "resume.pt", "resume.previous.pt", "targets"]
    assert folder.checkpoint(7).relative_to(tmp_path).as_posix() == "checkpoints/epoch_00007.pt"
    assert folder.checkpoint(123456, ".weights.h5").name == "epoch_123456.weights.h5"


class TestFolderOfAnotherTool:
    """Files of a run's names that no run wrote are the user's: nothing of them is overwritten or deleted."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        for name in ("run.json", "plan.json", "checkpoints/epoch_00000.pt", "checkpoints/epoch_00007.pt"):
            (tmp_path / name).write_text('{"my": "own"}')
        (tmp_path / "checkpoints" / ".epoch_00003.pt.01234567.tmp").mkdir()
        return tmp_path

    @pytest.mark.parametrize("options", [{}, {"config": {"lr": 1}}, {"keep": "every:2"}])
    @pytest.mark.parametrize("missing", [[], ["run.json"]])
    def test_it_is_no_run_folder(self, folder, options, missing):
        for name in missing:
            (folder / name).unlink()
        before, names = contents(folder), sorted(folder.rglob("*"))
        with pytest.raises((ValueError, FileExistsError), match=r"not a fmn_ref.run file|belongs to no run"):
            fmn.Recorder(folder, network(0.0), **options)
        assert contents(folder) == before
        assert sorted(folder.rglob("*")) == names

    def test_training_refuses_it(self, folder):
        x, before = (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)), contents(folder)
        with pytest.raises(ValueError, match=r"run\.json: not a fmn_ref\.run file"):
            fmn.train(network(0.0), x, x, epochs=1, run_dir=folder, progress=False)
        assert contents(folder) == before

    def test_checkpoints_of_another_ending_are_not_touched(self, folder):
        """They have other names than the run's, so the run and they can share the folder."""
        (folder / "run.json").unlink()
        for path in folder.glob("checkpoints/*.pt"):
            path.rename(path.with_suffix(".h5"))
        recorder = fmn.Recorder(folder, network(0.0), keep="every:2")
        for epoch in range(3):
            recorder.record(epoch, LABELS, LABELS)
        assert {p.name for p in folder.glob("checkpoints/*.h5")} == {"epoch_00000.h5", "epoch_00007.h5"}

    def test_a_run_that_failed_before_its_first_epoch_is_begun_again(self, tmp_path):
        """A crash may leave a checkpoint without a history; run.json tells that it is the run's."""
        fmn.Recorder(tmp_path, config={"lr": 1}).close()
        (tmp_path / "checkpoints" / "epoch_00000.pt").write_text("half")
        with fmn.Recorder(tmp_path, network(0.0), config={"lr": 2}) as recorder:
            recorder.record(0, LABELS, LABELS)
        assert recorder.run.config == {"lr": 2}


class TestLeftovers:
    def test_what_a_killed_writer_left_is_deleted(self, tmp_path):
        """Temporary files, half-deleted checkpoints that are folders; not the files of the run, nor other people's."""
        fmn.Recorder(tmp_path).record(0, LABELS, LABELS)
        before = contents(tmp_path)
        for name in (".resume.pt.01234567.tmp", "checkpoints/.epoch_00001.pt.89abcdef.tmp.weights.h5"):
            (tmp_path / name).write_text("half")
        (tmp_path / "checkpoints" / ".epoch_00000.orbax.01234567.tmp" / "deep").mkdir(parents=True)
        (tmp_path / ".mine.tmp").write_text("mine")
        fmn.Recorder(tmp_path)
        assert contents(tmp_path) == before | {Path(".mine.tmp"): b"mine"}
        assert not list((tmp_path / "checkpoints").glob(".*"))

    def test_a_file_that_somebody_is_writing_stays(self, tmp_path):
        fmn.Recorder(tmp_path).record(0, LABELS, LABELS)
        _files.write_atomic(tmp_path / "report.html", lambda file: (fmn.Recorder(tmp_path), file.write(b"<html>")))
        assert (tmp_path / "report.html").read_text() == "<html>"


@pytest.mark.parametrize(
    "name", ["run.json", "history.fmnh", "resume.pt", "plan.json", "checkpoints/epoch_00000.pt", "targets/a.npy"]
)
def test_a_run_holds_its_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (".", tmp_path, "link"):
        assert RunFolder(folder).holds(name)
        assert RunFolder(folder).holds(tmp_path / "link" / name)
        assert not RunFolder(folder).holds(tmp_path / "other" / name)


@pytest.mark.parametrize("name", ["report.html", "history.fmnh.csv", "notes/run.json"])
def test_other_files_beside_a_run_are_not_its_own(tmp_path, name):
    assert not RunFolder(tmp_path).holds(tmp_path / name)
