"""Kill a training and a distillation again and again, and compare what comes out with runs that nobody disturbed.

    python tests/kill_runs.py --kills 100 -o benchmarks/results/kills.json

Half of the SIGKILLs come from outside at a random time. The others strike at a random operation on the disk: after half
of a write, before or after an fsync, a rename or a removal. A run is killed until it gets to its end in spite of it (at
each start within the next fifth of it); then another begins, until there were so many kills.
"""

import argparse
import json
import multiprocessing
import platform
import random
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from importlib import metadata
from pathlib import Path

import resumable
import torch

PROCESSES = multiprocessing.get_context("forkserver")  # torch is loaded once, not in each of hundreds of processes
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "fmn_ref.training", "fmn_ref.distillation"])


def work(job, folder, kill=None, seconds=None):
    """Run a job of `resumable` in a process; kill it there or then, if it has not ended.

    Returns what it reported: its calls (a Counter) at the end, the path at which it killed itself; None: killed by us.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=resumable.work, args=(sender, job, folder, kill))
    process.start()
    sender.close()
    with receiver:
        assert receiver.recv() == "ready"
        process.join(seconds)
        process.kill()  # nothing happens to one that has ended
        process.join()
        try:
            report = receiver.recv()
        except EOFError:
            report = None
    if isinstance(report, Exception):
        raise report
    assert process.exitcode in (0, -signal.SIGKILL)
    return report


def contents(folder):
    """Every file of a run but run.json, as tensors where it holds tensors; raises where one is half-written."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}
    return {name: torch.load(p) if p.suffix == ".pt" else p.read_bytes() for name, p in files.items()}


def identical(a, b):
    """The same bits, in nested containers."""
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def next_epoch(folder):
    """Where a run that was killed goes on."""
    states = [folder / name for name in ("resume.pt", "resume.previous.pt") if (folder / name).exists()]
    return torch.load(states[0])["epoch"] + 1 if states else 0


def kill_often(job, unbroken, folder, kills, draw):
    """Do the job once in the folder `unbroken`, then in others, with so many kills.

    Returns how many there were of each kind, a line about each, how many runs these were, and which files differ from
    the unbroken run's.
    """
    begin = time.monotonic()
    calls = work(job, unbroken)
    duration, expected = time.monotonic() - begin, contents(unbroken)
    kinds, hits, differ = Counter(), [], []
    for n_runs in range(1, 10 * kills):
        killed, report = folder / f"run_{n_runs}", None
        while len(hits) < kills and not isinstance(report, Counter):
            if kinds["time"] < kills / 2 and draw.random() < 0.5 or 2*(len(hits) - kinds["time"]) >= kills:
