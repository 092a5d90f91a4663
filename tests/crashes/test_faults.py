"""Disks that fail, systems that refuse: the error names the file, nothing is lost, and the same call goes on later."""

import builtins
import contextlib
import errno
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash_jobs
import numpy as np
import pytest
from crash_jobs import EPOCHS, JOBS, LABELS, record
from folders import contents
from kill_runs import final_files, identical
from networks import make_data, make_model
from resumable import File
from training_runs import fresh, same_weights, trained

import fmn_ref as fmn
from fmn_ref.training import store

FAULTS = {
    "open": (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EROFS, errno.EIO),
    "write": (errno.EIO, errno.ENOSPC, errno.EFBIG, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC),
    "replace": (errno.EIO, errno.ENOSPC, errno.EACCES, errno.ENOENT),
}
CALLS = 6  # each job has as many of each operation, or only two


class FailsOnce:
    """Operations below a folder, of which one call fails: the one before which `left` are left."""

    def __init__(self, patch, folder, operation, code, at):
        self.folder, self.operation, self.code, self.left = str(folder), operation, code, at
        patch.setattr(builtins, "open", self.opener(builtins.open))
        patch.setattr(os, "fsync", self.guarded("fsync", os.fsync))
        patch.setattr(os, "replace", self.guarded("replace", os.replace))

    def strike(self, operation, path):
        if isinstance(path, int):
            path = os.path.realpath(f"/proc/self/fd/{path}")
        if operation == self.operation and str(path).startswith(self.folder):
            self.left -= 1
            if self.left == 0:
                raise OSError(self.code, os.strerror(self.code), *[str(path)] * (operation in ("open", "replace")))

    def guarded(self, name, function):
        def operation(path, *more):
            self.strike(name, path)
            return function(path, *more)

        return operation

    def opener(self, function):
        def opened(path, mode="r", *args, **options):
            if mode not in ("r", "rb"):
                self.strike("open", path)
            file = function(path, mode, *args, **options)
            return file if mode in ("r", "rb") else Writing(file, self)

        return opened


class Writing(File):
    """A file that is written in halves, between which the disk may fail."""

    def write(self, content):
        half = len(content) // 2
        self._file.write(content[:half])
        self._disk.strike("write", self._file.name)
        return half + self._file.write(content[half:])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Files that each job leaves."""
    folder = tmp_path_factory.mktemp("unbroken")
    crash_jobs.inputs.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMN_CRASH_INPUTS", str(folder / "inputs"))
        patch.setattr(os, "fsync", lambda descriptor: None)
        for name, (work, _) in JOBS.items():
            work(folder / name / "run", lambda what: None)
        yield {name: compared(folder / name) for name in JOBS}
    crash_jobs.inputs.cache_clear()


def compared(folder):
    files = final_files(folder) if folder.exists() else {"": folder.with_suffix(".fmnh").read_bytes()}
    return {name: content for name, content in files.items() if not name.endswith(".html")}


@pytest.mark.parametrize(("operation", "code"), [(o, code) for o, codes in FAULTS.items() for code in codes])
@pytest.mark.parametrize("job", ["recorder", "budget", "foreign", "training", "references"])
def test_a_call_that_fails_names_the_file_and_can_be_repeated(tmp_path, monkeypatch, unbroken, job, operation, code):
    seed = random.randrange(2**32)
    print("seed", seed)
    work, check = JOBS[job]
    done, folder = [], tmp_path / job / "run"
    monkeypatch.setattr(store, "PAUSE", 0.01)
    with monkeypatch.context() as patch:
        disk = FailsOnce(patch, tmp_path, operation, code, random.Random(seed).randint(1, CALLS))
        error = None
        try:
            work(folder, done.append)
        except OSError as fault:
            error = fault
    assert disk.left <= 0 or (job, operation) == ("foreign", "replace")
    if error is not None:  # a training waits for room, and a checkpoint that is not deleted is deleted later
        assert error.errno == code
        assert str(error.filename).startswith(str(tmp_path)) or (job, operation) == (
            "foreign",
            "write",
        )  # np.save's own
    check(folder, done)
    work(folder, done.append)
    assert identical(compared(tmp_path / job), unbroken[job])


def test_a_storm_of_signals_changes_nothing(tmp_path, unbroken):
    """Each interrupts a system call: EINTR. A fast machine records several times until there were enough."""
    seen, folders = [], []
    before = signal.signal(signal.SIGALRM, lambda *signal: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        while len(seen) <= 10:
            folders.append(tmp_path / str(len(folders)))
            record(folders[-1] / "run", lambda what: None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for folder in folders:
        assert identical(compared(folder), unbroken["recorder"])


@contextlib.contextmanager
def limited(what, soft):
    """Lower a limit of this process for a while."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_a_write_that_is_cut_short_tells_the_cause(tmp_path):
    """The system writes what fits, and says why at the next try only."""
    history = fmn.CorrectnessHistory(600, tmp_path / "a")
    history.append(np.ones(600, bool))
    before = contents(tmp_path)
    limit = limited(resource.RLIMIT_FSIZE, (tmp_path / "a").stat().st_size + 100)
    with limit, pytest.raises(OSError, match=rf"File too large: '{tmp_path}/a'"):
        history.append(np.zeros(600, bool))
    assert contents(tmp_path) == before
    history.append(np.zeros(600, bool))
    assert fmn.CorrectnessHistory.open(tmp_path / "a").correct().sum(1).tolist() == [600, 0]


def files_left(n):
    """Let this process open n more files at most."""
    gc.collect()  # what is collected later could free a descriptor
    free = [os.dup(0) for _ in range(n + 1)]
    for descriptor in free:
        os.close(descriptor)
    return limited(resource.RLIMIT_NOFILE, max(free))


def error_of(call):
    """Number and file of the OSError of a call, whose lock is released; or None."""
    found = None
    try:
        call()
    except OSError as error:
        found = error.errno, str(error.filename)
    gc.collect()
    return found


def test_without_file_descriptors_nothing_is_taken_for_damage(tmp_path):
    """With no descriptor, with one, and so on, until the call has enough."""
    run, (_, val, _) = trained(tmp_path / "run", 3), make_data()
    recorder = fmn.Recorder(tmp_path / "mine")
    recorder.record(0, LABELS, LABELS)
    mean, source, quiet = tmp_path / "mean", run.folder.checkpoints, {"progress": False}
    fmn.from_checkpoints(source, make_model(), val, tmp_path / "kept", keep_predictions=True, **quiet)
    kept = fmn.Run.open(tmp_path / "kept", make_model())
    kept.probabilities(val)[0]  # this and the next load what is loaded late
    fmn.average_checkpoints(run, {1: 0.5, 2: 0.5}, tmp_path / "first", **quiet)
    before, fewest = contents(tmp_path), {}
    calls = {
        "history": lambda: run.history.correct(),
        "open": lambda: fmn.Run.open(tmp_path / "run"),
        "predictions": lambda: kept.probabilities(val)[1],
        "resume": lambda: trained(tmp_path / "run", 3),
        "record": lambda: recorder.record(1, LABELS, LABELS),
        "average": lambda: fmn.average_checkpoints(run, {1: 0.5, 2: 0.5}, mean, **quiet),
        "import": lambda: fmn.from_checkpoints(source, make_model(), val, tmp_path / "new", **quiet),
    }
    for name, call in calls.items():
        for fewest[name] in range(12):
            with files_left(fewest[name]):
                error = error_of(call)
            if error is None:
                break
            assert error[0] == errno.EMFILE, name
            assert error[1].startswith(str(tmp_path)), name
            assert name == "import" or contents(tmp_path) == before, name  # an import goes on where it ended
        before = contents(tmp_path)
    assert min(fewest.values()) > 0
    assert max(fewest.values()) < 11
    assert same_weights(trained(tmp_path / "run", 3).model, run.model)
    np.testing.assert_array_equal(fmn.Run.open(tmp_path / "new").history.correct(), run.history.correct())


MEMORY = """
import re, resource, sys, torch
import fmn_ref as fmn
from fmn_ref.runs import checkpoints
weights = {"w": torch.ones(10_000_000)}  # 40 MB
fmn.Run.open(sys.argv[1])
checkpoints.load(checkpoints.save(weights, sys.argv[1] + "/first.pt") or sys.argv[1] + "/first.pt")
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), used + (30 << 20)))
for call in (
    lambda: fmn.CorrectnessHistory.open(sys.argv[1] + "/large", verify=False),
    lambda: checkpoints.save(weights, sys.argv[1] + "/second.pt"),
    lambda: checkpoints.load(sys.argv[1] + "/first.pt"),
):
    try:
        call()
    except MemoryError as error:
        print(error)
"""


def test_too_little_memory_says_how_much_was_needed(tmp_path):
    fmn.Recorder(tmp_path).record(0, LABELS, LABELS)
    history = fmn.CorrectnessHistory(8 * 50_000_000, tmp_path / "large")
    with open(history.path, "r+b") as file:
        file.truncate(64 + 10 * history._record_size)  # a torn file of 500 MB, without blocks on the disk
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"{tmp_path}/{n}" for n in ("large", "second.pt", "first.pt")
    ]
    for line, least in zip(lines, (499_000_000, 39_000_000, 39_000_000), strict=True):
        assert max(int(word) for word in line.split() if word.isdecimal()) >= least, line
    assert not (tmp_path / "second.pt").exists()


def test_a_folder_that_is_away_for_a_while(tmp_path, unbroken):
    folder, away = tmp_path / "recorder" / "run", tmp_path / "away"
    network = fresh().eval()
    with fmn.Recorder(folder, network) as recorder:
        for epoch in range(EPOCHS + 3):
            network.load_state_dict(fresh(epoch).state_dict())
            if epoch in (0, 3, EPOCHS + 2):
                folder.rename(away)
                before = contents(away)
                with pytest.raises(OSError, match=rf"No such file or directory: '{folder}|{folder} does not exist"):
                    recorder.record(epoch, crash_jobs.row(epoch), LABELS)
                assert not folder.exists()
                assert contents(away) == before
                away.rename(folder)
            recorder.record(epoch, crash_jobs.row(epoch), LABELS)
    assert identical(compared(tmp_path / "recorder"), unbroken["recorder"])


def test_a_training_whose_folder_is_away_for_a_while(tmp_path):
    expected = trained(tmp_path / "unbroken", 4)
    batches = []

    def augment(x):
        batches.append(1)
        if len(batches) == 17:  # in the third epoch
            (tmp_path / "run").rename(tmp_path / "away")
        return x

    with pytest.raises(OSError, match=rf"{tmp_path}/run"):
        trained(tmp_path / "run", 4, augment=augment)
    assert not (tmp_path / "run").exists()
    (tmp_path / "away").rename(tmp_path / "run")
    again = trained(tmp_path / "run", 4, augment=lambda x: x)
    assert same_weights(again.model, expected.model)
    np.testing.assert_array_equal(again.history.packed, expected.history.packed)


READ_ONLY = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root may write everywhere
    ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""
USES = """
import sys, fmn_ref as fmn
from fmn_ref.reporting.report import write_report
folder = sys.argv[1] + "/run"
assert len(fmn.Run.open(folder).history) == 1
write_report(folder, sys.argv[1] + "/report.html")
for call in (lambda: fmn.Recorder(folder).record(1, [0, 1], [0, 1]), lambda: fmn.Recorder(folder).rewind(0),
             lambda: fmn.Recorder(folder, overwrite=True), lambda: fmn.Recorder(folder + "/new")):
    try:
        call()
    except PermissionError as error:
        print(error.filename)
"""


def test_a_folder_to_read_from(tmp_path):
    fmn.Recorder(tmp_path / "run").record(0, [0, 1], [0, 1])
    before = contents(tmp_path)
    folders = [tmp_path / "run", tmp_path / "run" / "checkpoints"]
    for path in [*folders, *before]:
        (tmp_path / path).chmod(0o555 if (tmp_path / path).is_dir() else 0o444)
    try:
        command = [sys.executable, "-c", READ_ONLY, USES, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    named = done.stdout.splitlines()
    assert len(named) == 4
    assert all(name.startswith(f"{tmp_path}/run/") for name in named), named
    assert contents(tmp_path).keys() - {Path("report.html")} == before.keys()


def test_a_clock_that_is_set_back(tmp_path, monkeypatch, unbroken):
    """Files of the future, and times before 1980, which zip archives cannot hold."""
    with contextlib.suppress(KeyboardInterrupt):
        record(tmp_path / "recorder" / "run", interrupt_at(4))
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9))
    for name in ("time", "localtime", "gmtime"):
        real = getattr(time, name)
        monkeypatch.setattr(time, name, lambda *args, real=real, name=name: 1.0 if name == "time" else real(1.0))
    record(tmp_path / "recorder" / "run", lambda what: None)
    monkeypatch.undo()
    assert identical(compared(tmp_path / "recorder"), unbroken["recorder"])


def interrupt_at(epoch):
    def done(what):
        if what == epoch:
            raise KeyboardInterrupt

    return done
