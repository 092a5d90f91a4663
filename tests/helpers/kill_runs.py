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
from collections import Counter
from functools import partial
from importlib import metadata
from pathlib import Path

import resumable
import torch

PROCESSES = multiprocessing.get_context("forkserver")  # torch is loaded once, not in each of hundreds of processes
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "fmn_ref.training.train", "fmn_ref.training.distill"])


def work(job, folder, kill=None, seconds=None):
    """Run a job of `resumable` in a process; kill it there or then, if it has not ended.

    Returns what it reported: (its calls, seconds) at its end, or the path at which it killed itself; None: killed here.
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
    if type(a) is not type(b):
        return False
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


def kill_often(job, folder, kills, draw):
    """Do the job undisturbed in folder/unbroken, then in others, with so many kills.

    Returns how many kills of each kind, a line about each, how many runs they hit, and the files that differ from the
    unbroken run's.
    """
    calls, duration = work(job, folder / "unbroken")
    expected = contents(folder / "unbroken")
    kinds, hits, differ, n_runs = Counter(), [], [], 0
    while len(hits) < kills:
        n_runs += 1
        killed, ended = folder / f"killed_{n_runs}", False
        while not ended:
            kill = seconds = None
            if len(hits) < kills and len(hits) % 2:
                seconds = draw.uniform(0, duration / 5)
            elif len(hits) < kills:
                kill = draw_call(calls, draw)
            report = work(job, killed, kill, seconds)
            ended = isinstance(report, tuple)
            if not ended:
                kind = "at a time" if kill is None else f"{kill[2]} {kill[0]}"
                where = f"after {seconds:.3f} s" if kill is None else f"{kind} {kill[1]}, {report}"
                kinds[kind] += 1
                hits.append(f"epoch {next_epoch(killed)}: {where}")
            found = contents(killed)
        names = sorted(expected.keys() | found.keys())
        differ += [f"{killed.name}/{n}" for n in names if not identical(expected.get(n), found.get(n))]
    return {"kills": dict(sorted(kinds.items())), "runs": n_runs, "different": differ, "hits": hits}


def draw_call(calls, draw):
    """Where to strike: (operation, which of its calls, when), within the next fifth of the run's."""
    operation = draw.choice(sorted(calls))
    moment = "half of" if operation == "write" else draw.choice(["before", "after"])
    return operation, draw.randint(1, -(-calls[operation] // 5)), moment


def kill_both(folder, kills, seed):
    """Kill the training, and the distillation of what an undisturbed training left."""
    print("seed", seed)
    draw = random.Random(seed)
    result = {"format": "fmn_ref.kills", "version": 1, "seed": seed, "made_with": versions()}
    result["training"] = kill_often(resumable.training, folder / "training", kills, draw)
    distillation = partial(resumable.distillation, trained=folder / "training" / "unbroken")
    result["distillation"] = kill_often(distillation, folder / "distillation", kills, draw)
    return result


def versions():
    names = ("fmn_ref", "numpy", "torch")
    return {"system": platform.system(), "python": platform.python_version()} | {n: metadata.version(n) for n in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each (default: 100)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the draws; default: a new one")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_both(Path(folder), args.kills, args.seed)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
