"""Kill a training and a distillation many times, and compare their results with undisturbed runs.

    python tests/helpers/kill_runs.py --kills 100 -o benchmarks/results/kills.json

Half of the SIGKILLs come from outside, at a random time. The others strike at a random disk operation: after half of a
write, or before or after an fsync, a rename or a removal. Each kill strikes within a fifth of a run after its start. A
run is started again until it reaches its end; then the next run begins, until the number of kills is reached.
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
    """Run a job of `resumable` in a process, and kill it at a disk operation, or after some seconds.

    Returns the process's report: (calls, seconds) if it ended, or the path at which it killed itself. None if this
    process killed it.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=resumable.work, args=(sender, job, folder, kill))
    process.start()
    sender.close()
    with receiver:
        assert receiver.recv() == "ready"
        process.join(seconds)
        process.kill()  # has no effect on a process that has ended
        process.join()
        try:
            report = receiver.recv()
        except EOFError:
            report = None
    if isinstance(report, Exception):
        raise report
    assert process.exitcode in (0, -signal.SIGKILL)
    return report


def final_files(folder):
    """Read every file of a run except run.json; .pt files as tensors. Raises an error for a half-written file."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != "run.json"}
    return {name: torch.load(p) if p.suffix == ".pt" else p.read_bytes() for name, p in files.items()}


def identical(a, b):
    """Compare nested containers bit by bit."""
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
    """Epoch at which a killed run resumes."""
    states = [folder / name for name in ("resume.pt", "resume.previous.pt") if (folder / name).exists()]
    return torch.load(states[0])["epoch"] + 1 if states else 0


def kill_often(job, folder, kills, draw):
    """Run the job undisturbed in folder/unbroken, then in other folders with `kills` kills.

    Returns the number of kills of each kind, a line for each kill, the number of killed runs, and the files that differ
    from those of the undisturbed run.
    """
    calls, duration = work(job, folder / "unbroken")
    expected = final_files(folder / "unbroken")
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
            found = final_files(killed)
        names = sorted(expected.keys() | found.keys())
        differ += [f"{killed.name}/{n}" for n in names if not identical(expected.get(n), found.get(n))]
    return {"kills": dict(sorted(kinds.items())), "runs": n_runs, "different": differ, "hits": hits}


def draw_call(calls, draw):
    """Draw a kill (operation, number of the call, moment) within the next fifth of the run's calls."""
    operation = draw.choice(sorted(calls))
    moment = "half of" if operation == "write" else draw.choice(["before", "after"])
    return operation, draw.randint(1, -(-calls[operation] // 5)), moment


def kill_both(folder, kills, seed):
    """Kill the training, and the distillation of the undisturbed training's run."""
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
    parser.add_argument("--kills", type=int, default=100, help="kills of each job (default: 100)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="seed of the draws (default: new)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_both(Path(folder), args.kills, args.seed)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
