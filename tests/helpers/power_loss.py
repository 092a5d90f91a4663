"""Cut the power of real programs at every moment that matters, and see what the next boot finds.

    python tests/helpers/power_loss.py --share 1 -o benchmarks/results/power_losses.json

`crash_jobs` runs once under strace. Its calls are replayed on a `forgetful_disk.Disk`, which loses power before every
fsync and after every change. For each moment several states are drawn: nothing of the unsynced survives, its names do,
its data does, everything does (that is a kill), and random parts. Each state is written to a new folder; what had been
done must be there, and the program must go on and end with the bits of the unbroken one.
"""

import argparse
import ast
import contextlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import crash_jobs
import torch
from forgetful_disk import MODES, Disk, record, write
from kill_runs import final_files, identical, versions


class Program:
    """The recorded calls of all jobs, and the files that they left.

    Parameters
    ----------
    folder : Path
        An empty one.
    """

    def __init__(self, folder):
        self.folder, self.root, self.log = folder, folder / "unbroken", folder / "done"
        self.root.mkdir()
        os.environ["FMN_CRASH_INPUTS"] = str(folder / "inputs")
        options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}}
        command = [sys.executable, crash_jobs.__file__, str(self.root), str(self.log)]
        self.calls = record(command, folder / "strace", **options)
        self.files = final_files(self.root)

    def moments(self):
        """Yield (disk, job, what it has done, whether a sync follows) before each call that changes or syncs a file."""
        disk, done, job = Disk(self.root), {name: [] for name in crash_jobs.JOBS}, None
        for call in self.calls:
            if call.name == "write" and call.file(0)[1] == str(self.log):
                job, what = ast.literal_eval(call.text(1).decode())
                if what is not None:
                    done[job].append(what)
                elif done_before := [name for name in done if done[name]]:
                    yield disk, done_before[-1], done[done_before[-1]], True  # the end of the job before
                continue
            if disk.concerns(call):
                yield disk, job, list(done[job]), "sync" in call.name
            disk.run(call)
        yield disk, job, done[job], True

    def check(self, disk, job, done, mode, draw):
        """Lose power, boot, look, go on, compare; return what went wrong, or None."""
        state = disk.lose_power(draw, mode)
        boot = self.folder / "boot"
        shutil.rmtree(boot, ignore_errors=True)
        write(_of(job, state), boot)
        work, check = crash_jobs.JOBS[job]
        try:
            check(boot / job / "run", done)
            work(boot / job / "run", lambda what: None)
            found, expected = _compared(final_files(boot)), _compared(_of(job, self.files))
            differ = sorted(n for n in found.keys() | expected.keys() if not identical(found.get(n), expected.get(n)))
            return (
                f"other bits: {[(n, n in found, n in expected) for n in differ]}, {sorted(found)}" if differ else None
            )
        except Exception:
            return traceback.format_exc()

    def losses(self, draw, share):
        """Cut the power in a share of each job's moments and modes, a third of it where no sync follows.

        The draw says which: every job has its share, whatever the draw. Yields (job, what it had done, mode, fault or
        None).
        """
        due = {job: draw.random() for job in crash_jobs.JOBS}
        with _quick():
            for disk, job, done, sync in self.moments():
                for mode in draw.sample(MODES, len(MODES)):
                    due[job] += share if sync else share / 3
                    if due[job] >= 1:
                        due[job] -= 1
                        yield job, done, mode, self.check(disk, job, done, mode, draw)


def _of(job, files):
    """Files of a job."""
    return {path: content for path, content in files.items() if path.split("/")[0] in (job, f"{job}.fmnh")}


def _compared(files):
    """Leave out reports, which name their folder, and temporary files, which the next write deletes."""
    return {path: content for path, content in files.items() if not path.endswith(".html") and "/." not in path}


@contextlib.contextmanager
def _quick():
    """After the boot nothing is synced, and torn records are no warning."""
    with mock.patch("os.fsync"), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*dropped the torn last record")
        yield


def summary(program, seed, share):
    """Number of power losses for each job, and the faults."""
    print("seed", seed, flush=True)
    counts, faults = Counter(), []
    for job, done, mode, fault in program.losses(random.Random(seed), share):
        counts[job] += 1
        if fault:
            faults.append(f"{job}, {mode}, after {done[-3:]}: {fault}")
    return {"seed": seed, "share": share, "losses": counts.total(), "of": dict(counts), "faults": faults}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of the moments and states (default: 1)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="seed of the draws (default: new)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        result = summary(Program(Path(folder)), args.seed, args.share)
    content = {"format": "fmn_ref.power_losses", "version": 1, "made_with": versions(), **result}
    args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
