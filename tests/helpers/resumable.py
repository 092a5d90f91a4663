"""The training and the distillation that kill_runs kills, and a disk that kills at a given operation."""

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

import fmn_ref as fmn
from fmn_ref.runs import checkpoints

EPOCHS = 30


def training(folder):
    """Train, fuse and save the plan; every checkpoint is kept."""
    train_set, val, _ = make_data()
    torch.manual_seed(1)
    run = fmn.train(make_model(), train_set, val, epochs=EPOCHS, run_dir=folder, augment=jitter, **RECIPE)
    fmn.fuse(run.probabilities(val), val[1], correct=run.history).save(folder / "plan.json")


def distillation(folder, trained):
    """Distil what `training` left in the folder `trained`: with everything that `distill` can keep on disk."""
    train_set, val, _ = make_data()
    plan, run = fmn.FusionPlan.load(trained / "plan.json"), fmn.Run.open(trained, make_model())
    torch.manual_seed(2)
    options = {"targets": "cached-views", "views": 3, "top_k": 2, "augment": jitter, "kd_weight": 0.7}
    recorded = {"val_data": val, "keep": "budget:3", "ema_decay": 0.9, "patience": EPOCHS, "run_dir": folder}
    student = fmn.distill(
        make_model(), fmn.FusedModel(plan, run), train_set, epochs=EPOCHS, **options, **recorded, **RECIPE
    )
    checkpoints.save_state(student, folder / "student.pt")


def jitter(x):
    return x + 0.1 * torch.randn_like(x)


class Disk:
    """Counts what this process does to the disk, and kills it at one operation, whose path is reported first.

    kill : (operation, which of its calls from 1, moment), or None
        At "half of" a "write"; "before" or "after" an "fsync", "replace" or "unlink".
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
        """When to die in this call; None: not in this one."""
        self.calls[name] += 1
        return self.kill[2] if self.kill is not None and (name, self.calls[name]) == self.kill[:2] else None

    def die(self, path):
        if isinstance(path, int):
            path = os.path.realpath(f"/proc/self/fd/{path}")  # a number elsewhere than on Linux
        self.report(os.path.relpath(path, self.folder))
        os.kill(os.getpid(), signal.SIGKILL)


class File:
    """A file open for writing, on such a disk; np.save takes it for one that has nothing but `write`."""

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
    """A process: it sends "ready", then the path at which it kills itself, (its calls, seconds), or what went wrong."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill leaves behind
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*dropped the torn last record")  # a history after half of a write
    disk = Disk(folder, connection.send, kill)
    connection.send("ready")
    begin = time.monotonic()
    try:
        job(folder)
        connection.send((disk.calls, time.monotonic() - begin))
    except Exception:
        connection.send(AssertionError(traceback.format_exc()))
