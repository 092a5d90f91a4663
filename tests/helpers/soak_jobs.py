"""Processes beside the one of `soak`: jobs that are killed and begun again, and one training that lasts."""

import contextlib
import ctypes
import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import kill_runs
import resumable
import torch
from networks import RECIPE, make_data
from tqdm import tqdm
from training_runs import fresh

import fmn_ref as fmn

EPOCHS = 12
KEEP = {"all": ("all", False), "every": ("every:3", False), "budget": ("budget:3", False), "half": ("budget:4", True)}
PAUSE = 0.2  # seconds before each of the 8 batches of an epoch of `long_training`: 2000 epochs an hour
LIBC = ctypes.CDLL(None)


def measure(folder):
    """Count what this process holds, and the files of a folder. Histories have a record per epoch: no bytes of them."""
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = file_sizes(folder)
    return {
        "resident_bytes": 1024 * int(status["VmRSS"].split()[0]),
        "python_blocks": sys.getallocatedblocks(),
        "file_descriptors": len(os.listdir("/proc/self/fd")) - 1,  # that of listdir
        "threads": int(status["Threads"]),
        "files": len(sizes),
        "disk_bytes": sum(size for path, size in sizes.items() if path.name != "history.fmnh"),
    }


def file_sizes(folder):
    """{path: size} of the files below a folder, where another thread may delete some."""
    sizes = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                sizes[path] = path.stat().st_size
    return sizes


def log(path, content):
    """Add a line to a file. Not by `open`, which `resumable.Disk` counts."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, (json.dumps(content) + "\n").encode())
    os.close(descriptor)


def training(folder, keep, half):
    """Train, fuse the epochs that are kept, save the plan."""
    train_set, val, _ = make_data()
    options = {"keep": keep, "half": half, "augment": resumable.jitter, **RECIPE}
    kept = fmn.train(fresh(), train_set, val, epochs=EPOCHS, run_dir=folder, **options).kept
    fmn.fuse(kept.probabilities(val), val[1], correct=kept.history).save(folder / "plan.json")
    log(folder.parents[1] / "jobs.jsonl", measure(folder))


def distillation(folder):
    """Distil the undisturbed training, with every file that `distill` can write."""
    resumable.distillation(folder, folder.parents[1] / "unbroken" / "all")
    log(folder.parents[1] / "jobs.jsonl", measure(folder))


JOBS = {name: partial(training, keep=keep, half=half) for name, (keep, half) in KEEP.items()}
JOBS["distilled"] = distillation


def kill_and_compare(root, seed):
    """Run the jobs undisturbed in root/unbroken, then in root/killed with kills, until the file root/stop is there."""
    torch.set_num_threads(1)
    draw, known = random.Random(seed), {}
    for name, job in JOBS.items():
        known[name] = *kill_runs.work(job, root / "unbroken" / name), kill_runs.final_files(root / "unbroken" / name)
    (root / "ready").touch()
    for name in itertools.cycle(JOBS):
        folder, (calls, duration, expected) = root / "killed" / name, known[name]
        try:
            kills = run_to_the_end(JOBS[name], folder, calls, duration, draw)
            fault = different(folder, expected)
        except Exception:
            kills, fault = 0, traceback.format_exc()
        shutil.rmtree(folder, ignore_errors=True)
        done = {"job": name, "kills": kills, "fault": fault}
        log(root / "killer.jsonl", measure(root / "killed") | done)
        if stopped(root):
            return


def stopped(root):
    """Tell whether the soak is over, or its process is gone."""
    return (root / "stop").exists() or not multiprocessing.parent_process().is_alive()


def different(folder, expected):
    """Name the files that differ, or that are missing or left over, such as a lock or a temporary file."""
    found = kill_runs.final_files(folder)
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if not kill_runs.identical(expected.get(name), found.get(name))]


def run_to_the_end(job, folder, calls, duration, draw):
    """Start a job until it ends; kill most of its processes: at a time, or at a disk operation. Return their number."""
    for kills in itertools.count():
        kill = seconds = None
        kind = draw.choice(["none", "time", "disk", "disk"])
        if kind == "disk":
            kill = kill_runs.draw_call(calls, draw)
        elif kind == "time":
            seconds = draw.uniform(0, duration / 2)
        if isinstance(kill_runs.work(job, folder, kill, seconds), tuple):
            return kills


def long_training(root):
    """Train until this process is killed."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # as in `resumable.work`
    train_set, val, _ = make_data()
    last = [time.monotonic()]

    def augment(x):
        if stopped(root):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(PAUSE)
        if time.monotonic() > last[0] + 2:
            log(root / "long.jsonl", measure(root / "long"))
            last[0] = time.monotonic()
        return resumable.jitter(x)

    options = {"keep": "budget:3", "augment": augment, **RECIPE}
    fmn.train(fresh(3), train_set, val, epochs=10**6, run_dir=root / "long", **options)
