"""SIGKILL at ten random moments; what comes out in the end has the same bits as an undisturbed run."""

import random
import subprocess
import sys
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent / "resumable.py"


def start(folder):
    process = subprocess.Popen([sys.executable, SCRIPT, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def finish(folder):
    process = start(folder)
    assert process.communicate()[0] == ""
    assert process.returncode == 0


def contents(folder):
    """Every file that a run leaves, as tensors where it holds tensors."""
    files = {p.relative_to(folder): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "run.json"}
    return {k: torch.load(p) if p.suffix == ".pt" else p.read_bytes() for k, p in files.items()}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_killed_ten_times(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = start(undisturbed)
    begin = time.monotonic()
    process.communicate()
    assert process.returncode == 0
    duration = time.monotonic() - begin
    seed = random.randrange(2**32)
    print(f"seed {seed}, one run takes {duration:.2f} s")
    moments = random.Random(seed)
    kills = 0
    for _ in range(10):
        process = start(killed)
        try:
            process.wait(moments.uniform(0, duration / 5))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.wait()
        process.stdout.close()
    print(f"{kills} kills hit the run while it was working")
    assert kills >= 3
    finish(killed)
    assert equal(contents(killed), contents(undisturbed))
