"""The training and the distillation that `kill_runs` kills, and a disk that kills the process at an operation."""

import builtins
import os
import signal
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from networks import RECIPE, make_data, make_model
from tqdm import tqdm
from training_runs import fresh

import fmn_ref as fmn
from fmn_ref.runs import checkpoints

EPOCHS = 30


def training(folder):
    """Train, fuse and save the plan. Every checkpoint is kept."""
    train_set, val, _ = make_data()
    run = fmn.train(fresh(), train_set, val, epochs=EPOCHS, run_dir=folder, augment=jitter, **RECIPE)
    fmn.fuse(run.probabilities(val), val[1], correct=run.history).save(folder / "plan.json")


def distillation(folder, trained):
    """Distil the run that `training` left in `trained`, with every file that `distill` can write."""
    train_set, val, _ = make_data()
    plan, run = fmn.FusionPlan.load(trained / "plan.json"), fmn.Run.open(trained, make_model())
    options = {"targets": "cached-views", "views": 3, "top_k": 2, "augment": jitter, "kd_weight": 0.7}
    recorded = {"val_data": val, "keep": "budget:3", "ema_decay": 0.9, "patience": EPOCHS, "run_dir": folder}
    student = fmn.distill(
        fresh(2), fmn.FusedModel(plan, run), train_set, epochs=EPOCHS, **options, **recorded, **RECIPE
    )
    checkpoints.save_state(student, folder / "student.pt")


def jitter(x):
    return x + 0.1 * torch.randn_like(x)


class Disk:
    """Counts this process's disk operations, and kills it at one of them after reporting the path.

    Parameters
    ----------
    kill : (operation, number of the call, moment), optional
        Operation "write" with moment "half of", or "fsync", "replace" or "unlink" with "before" or "after". Calls are
        numbered from 1.
    """

    def __init__(self, folder, report, kill=None):
        self.folder, self.report, self.kill, self.calls = folder, report, kill, Counter()
        for where, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            setattr(where, name, self.watched(getattr(where, name), name))
        builtins.open = self.opener(open)

    def watched(self, function, name):
        def operation(path, *args, **options):
            moment = self.moment(name)
            if moment == "before":
                self.die(path)
            result = function(path, *args, **options)
            if moment == "after":
                self.die(path)
            return result

        return operation

    def opener(self, function):
        def opened(path, mode="r", *args, **options):
            file = function(path, mode, *args, **options)
            return file if mode in ("r", "rb") else File(file, self)

        return opened

    def moment(self, name):
        """Moment to die in this call, or None."""
        self.calls[name] += 1
        return self.kill[2] if self.kill is not None and (name, self.calls[name]) == self.kill[:2] else None

    def die(self, path):
        if isinstance(path, int):
            path = os.path.realpath(f"/proc/self/fd/{path}")  # on other systems the number remains
        self.report(os.path.relpath(path, self.folder))
        os.kill(os.getpid(), signal.SIGKILL)


class File:
    """A file open for writing on a `Disk`. np.save uses only its `write`, because it is no file object of Python's."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        if self._disk.moment("write"):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            self._disk.die(self._file.name)
        return self._file.write(content)


def work(connection, job, folder, kill):
    """Run a job in a process. It sends "ready", then its report: see `kill_runs.work`, or an error."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is a semaphore, which a kill leaves behind
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*dropped the torn last record")  # after half of a write
    disk = Disk(folder, connection.send, kill)
    connection.send("ready")
    begin = time.monotonic()
    try:
        job(folder)
        connection.send((disk.calls, time.monotonic() - begin))
    except Exception:
        connection.send(AssertionError(traceback.format_exc()))
