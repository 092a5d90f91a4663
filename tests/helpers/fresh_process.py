"""Code in a new Python process; one that records into a run folder, which the lock of another process refuses."""

import json
import os
import subprocess
import sys

import fmn_ref as fmn

RECORD = """
import json, sys, fmn_ref
run_dir, epoch, suffix, labels = sys.argv[1:]
save = (lambda path: path.write_bytes(b"")) if suffix != ".pt" else None
with fmn_ref.Recorder(run_dir, save=save, suffix=suffix) as recorder:
    recorder.record(int(epoch), json.loads(labels), json.loads(labels))
"""


def python(code, *args, **env):
    """Run code in a new interpreter, which must succeed; return its standard output."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def record_in_another_process(run_dir, epoch, labels, suffix=".pt"):
    """Record an epoch in which every prediction is correct; return "", or the last line of the error."""
    arguments = [str(run_dir), str(epoch), suffix, json.dumps([int(y) for y in labels])]
    done = subprocess.run([sys.executable, "-c", RECORD, *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        assert fmn.Run.open(run_dir).history.epochs[-1] == epoch
        return ""
    return done.stderr.strip().splitlines()[-1]
