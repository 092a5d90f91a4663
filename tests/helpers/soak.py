"""Work on runs for an hour: nothing may grow, and no number may be wrong.

    python tests/helpers/soak.py --seconds 3600 --seed 0 -o benchmarks/results/soak.json

Four kinds of processes use the same folders:

- `jobs`: trainings with each kind of `keep`, and distillations. They are killed at a time or at a disk operation, and
  begun again.
- `killer` starts the jobs and kills them. Their files must be those of undisturbed jobs: same names, same bits.
- `long`: one training with "budget:3" that goes on for ever.
- `user`: this process. In each round it reads the run that is being killed, fuses, averages, records, imports, trains,
  distils, reports, plots, and is refused. It compares every number with that of a plain loop, or of the first round.

Each counts its memory, file descriptors, threads and files again and again. Growth is the difference between the second
quarter of its measurements and the last one.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import random
import re
import shutil
import statistics
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors_files
import soak_jobs
import torch
from folders import flip_bit
from kill_runs import PROCESSES, versions
from networks import RECIPE, make_data, make_model
from training_runs import fresh

import fmn_ref as fmn
from fmn_ref import cli
from fmn_ref.fusion.methods import method_names
from fmn_ref.reporting import plot
from fmn_ref.reporting.report import write_report
from fmn_ref.runs import checkpoints

ROUNDS = 8  # at least, so that a quarter has two
LINES = 4  # of measurements of each other process, at least, so that a quarter has one
QUANTITIES = ("resident_bytes", "python_blocks", "file_descriptors", "threads", "files", "disk_bytes")
ALLOWED = {"resident_bytes": 2**22, "python_blocks": 1500, "disk_bytes": 2**14}  # a history has a number per epoch


def plain_rows(path, n_samples):
    """Read the bits of a history as docs/reference/formats.md describes them: lists of 0 and 1."""
    content, width = path.read_bytes(), 64 + -(-n_samples // 512) * 64
    starts = range(64 + 64, len(content), width)
    return [[content[start + i // 8] >> i % 8 & 1 for i in range(n_samples)] for start in starts]


def check_numbers(history, rows):
    """Compare what the metrics say with counts by plain loops."""
    assert history.correct().tolist() == rows
    gained = [[sum(a > b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    forget = [row[-1] / len(rows[0]) for row in gained]
    assert fmn.forget_fraction(history).tolist() == forget
    assert fmn.forgetting_matrix(history).tolist() == gained
    curves = fmn.forgetting_curves(history)
    assert curves.forget.tolist() == forget
    assert curves.learned.tolist() == [n / len(rows[0]) for n in gained[-1]]
    assert curves.accuracy.tolist() == [sum(row) / len(row) for row in rows]
    samples = list(zip(*rows, strict=True))
    events = [sum(a > b for a, b in itertools.pairwise(sample)) if any(sample) else len(rows) for sample in samples]
    assert fmn.sample_statistics(history, never_learned="toneva").forgetting_events.tolist() == events


class User:
    """One process that uses the package in many ways: `round` does each of `acts` once."""

    def __init__(self, root):
        self.root, self.folder, self.data = root, root / "user", make_data()
        self.val, self.counts, self.faults, self.first, self.n = self.data[1], Counter(), [], {}, 0
        self.trained, n = root / "unbroken" / "all", len(self.val[1])
        self.rows = {name: plain_rows(root / "unbroken" / name / "history.fmnh", n) for name in soak_jobs.JOBS}
        for name, rows in self.rows.items():
            check_numbers(fmn.Run.open(root / "unbroken" / name).history, rows)
        self.probs = np.stack(list(self.run().probabilities(self.val)))
        self.folder.mkdir(exist_ok=True)
        self.acts = [self.read, self.fuse, self.compare, self.average, self.record, self.bring, self.train, self.report]
        self.acts += [self.refuse]

    def round(self):
        """Do everything once; keep what went wrong."""
        for act in self.acts:
            self.act(act)
        self.n += 1
        soak_jobs.log(self.root / "user.jsonl", soak_jobs.measure(self.folder))

    def act(self, act):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*dropped the torn last record")
            try:
                self.counts[act() or act.__name__] += 1
            except Exception:
                self.faults.append(f"{act.__name__}, round {self.n}: {traceback.format_exc()}")

    def run(self):
        return fmn.Run.open(self.trained, make_model())

    def new(self, name):
        """A folder that does not exist, in the place of that of the round before."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def same(self, name, content):
        """The content is that of the first round."""
        assert content == self.first.setdefault(name, content)

    def read(self):
        """Read the runs that are being written. Each row is that of the undisturbed run, as is each checkpoint."""
        found = "read nothing"
        for name, rows in self.rows.items():
            with contextlib.suppress(FileNotFoundError), discarded():
                folder = self.root / "killed" / name
                run = fmn.Run.open(folder, make_model())
                if len(run.history):
                    check_numbers(run.history, rows[: len(run.history)])
                    found = "read"
                    if name != "distilled":
                        kept = run.kept
                        probs = kept.probabilities(self.val)[0]
                        difference = np.abs(probs - self.probs[kept.history.epochs[0]]).max()
                        assert difference <= (0.01 if name == "half" else 0)
                    page = write_report(folder, self.folder / "killed.html", labels=self.val[1])
                    assert page.read_text().rstrip().endswith("</html>")
                    page.unlink()
                    found = "read and reported"
        return found

    def fuse(self):
        """By each method in turn."""
        run, y, method = self.run(), self.val[1].numpy(), method_names()[self.n % len(method_names())]
        check_numbers(run.history, self.rows["all"])
        probs = run.probabilities(self.val)
        plan = fmn.fuse(probs, y, correct=run.history, method=method)
        plan.save(self.folder / "plan.json")
        assert fmn.FusionPlan.load(self.folder / "plan.json") == plan
        self.same(method, (self.folder / "plan.json").read_text())
        fused, p = plan.apply(probs), self.probs.astype(np.float64)
        if plan.combine == "linear":
            expected = sum(w * p[epoch] for epoch, w in plan.weights.items())
        else:
            expected = np.exp(sum(w * np.log(np.maximum(p[epoch], 1e-6)) for epoch, w in plan.weights.items()))
            expected /= expected.sum(1, keepdims=True)
        np.testing.assert_allclose(fused, expected, atol=1e-5)
        assert plan.accuracy[-1] == (fused.argmax(1) == y).mean()
        np.testing.assert_allclose(fmn.FusedModel(plan, run)(self.val[0]).exp(), fused, atol=1e-4)

    def compare(self):
        table = fmn.compare(self.run(), self.val, self.data[2])
        self.same("compared", table.to_json())

    def average(self):
        run, weights = self.run(), {1: 0.25, 7: 0.5, 11: 0.25}
        folder = fmn.average_checkpoints(run, weights, self.new("mean"), progress=False)
        found, _ = safetensors_files.read(folder / "model.safetensors")
        states = {epoch: torch.load(run.checkpoint(epoch)) for epoch in weights}
        for name in ("0.weight", "1.running_var", "4.bias"):
            mean = sum(w * states[epoch][name].double() for epoch, w in weights.items())
            np.testing.assert_allclose(found[name], mean, atol=1e-6)
        model = fmn.averaged_model(run, weights, self.data[0])
        self.same("averaged", model(self.val[0]).tolist())

    def record(self):
        """Go on with a run of six epochs from the second."""
        y, predictions = self.val[1].numpy(), self.probs.argmax(2)
        with fmn.Recorder(self.folder / "recorded", fresh().eval(), "budget:2") as recorder:
            recorder.rewind(2)
            for epoch in range(recorder.next_epoch, 6):
                recorder.record(epoch, predictions[epoch], y)
            check_numbers(recorder.run.history, self.rows["all"][:6])

    def bring(self):
        source, link = self.trained / "checkpoints", self.n % 2 == 0
        options = {"keep_predictions": True, "link": link, "progress": False}
        run = fmn.from_checkpoints(source, make_model(), self.val, self.new("imported"), **options)
        check_numbers(run.history, self.rows["all"])

    def train(self):
        train_set, val, _ = self.data
        options = {"val_data": val, "keep": "budget:1", "epochs": 3, **RECIPE}
        run = fmn.train(fresh(), train_set, run_dir=self.new("trained"), **options)
        self.same("trained", run.history.correct().tolist())
        student = fmn.distill(fresh(2), run.model, train_set, run_dir=self.new("student"), top_k=2, **options)
        self.same("student", student(val[0]).tolist())

    def report(self):
        write_report(self.trained, self.folder / "report.html", labels=self.val[1])
        self.same("report", (self.folder / "report.html").read_text())
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main(["metric", str(self.trained), "--json"]) == 0
        assert json.loads(out.getvalue())["forget_fraction"] == fmn.forget_fraction(self.run().history).tolist()
        plot.curves(self.run().history).savefig(self.folder / "curves.png")

    def refuse(self):
        """Damaged files, and a folder in which another process writes."""
        for name in ("history.fmnh", "plan.json", "resume.pt"):
            shutil.copy(self.trained / name, self.folder / name)
            flip_bit(self.folder / name)
        refused(fmn.CorrectnessHistory.open, self.folder / "history.fmnh", "corrupt record")
        refused(checkpoints.load, self.folder / "resume.pt", "")
        (self.folder / "plan.json").write_bytes((self.folder / "plan.json").read_bytes()[:99])
        refused(fmn.FusionPlan.load, self.folder / "plan.json", "")
        refused(fmn.Recorder, self.root / "long", "a run has one writer")

    def stopped(self):
        """What the long training left: the bits of each checkpoint that it kept are those of the history."""
        run = fmn.Run.open(self.root / "long", make_model())
        self.counts["epochs of the long training"] = len(run.history)
        for row, probs in zip(run.kept.history, run.kept.probabilities(self.val), strict=True):
            assert (probs.argmax(1) == self.val[1].numpy()).tolist() == row.tolist()


@contextlib.contextmanager
def discarded():
    """A reader is told that a resumed training has discarded the epochs that it was about to repeat."""
    try:
        yield
    except ValueError as error:
        if "another process discarded epochs" not in str(error) and "nothing recorded yet" not in str(error):
            raise


def refused(function, path, words):
    try:
        function(path)
    except ValueError as error:
        assert re.search(f"{path}.*{words}", str(error)), error  # noqa: PT017 - pytest's error is no Exception
    else:
        raise AssertionError(f"{path} was not refused")


def soak(root, seconds, seed):
    """Work in an empty folder; return the record."""
    killer = PROCESSES.Process(target=soak_jobs.kill_and_compare, args=(root, seed))
    long = PROCESSES.Process(target=soak_jobs.long_training, args=(root,))
    killer.start(), long.start()
    try:
        while not ((root / "ready").exists() and (root / "long.jsonl").exists()):
            assert all(process.is_alive() for process in (killer, long))
            time.sleep(0.1)
        user, end = User(root), time.monotonic() + seconds
        while time.monotonic() < end or user.n < ROUNDS or fewest(root) < LINES:
            user.round()
            assert all(process.is_alive() for process in (killer, long))
    finally:
        (root / "stop").touch()
        long.kill(), long.join(), killer.join()
    user.act(user.stopped)
    return {"seconds": seconds, "seed": seed} | record(root, user)


def fewest(root):
    """Number of measurements of the process that has the fewest."""
    logs = [root / f"{name}.jsonl" for name in ("killer", "long")]
    return min(len(path.read_text().splitlines()) if path.exists() else 0 for path in logs)


def record(root, user):
    """What was done, what each process held, what grew and what went wrong."""
    actors = {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in sorted(root.glob("*.jsonl"))}
    ended = Counter(done["job"] for done in actors["killer"])
    kills = {name: sum(done["kills"] for done in actors["killer"] if done["job"] == name) for name in ended}
    faults = user.faults + [f"{done['job']}: {done['fault']}" for done in actors["killer"] if done["fault"]]
    growth = [f"{name}: {line}" for name in ("killer", "long", "user") for line in grown(actors[name])]
    return {
        "rounds": user.n,
        "done": dict(sorted(user.counts.items())),
        "jobs": dict(ended),
        "kills": kills,
        "faults": faults[:20],
        "growth": growth,
        "measurements": {name: len(lines) for name, lines in actors.items()},
        "held": {name: {key: summary(lines, key) for key in QUANTITIES} for name, lines in actors.items()},
    }


def quarters(values):
    """The second and the last quarter of a list: before the first one ends, caches fill."""
    n = len(values) // 4
    return values[n : 2 * n], values[-n:]


def summary(lines, key):
    """A quantity at the start, in two quarters, at the end and at most."""
    values = [line[key] for line in lines]
    before, after = map(statistics.median, quarters(values))
    return {"start": values[0], "second_quarter": before, "last_quarter": after, "end": values[-1], "max": max(values)}


def grown(lines):
    """Name the quantities that grew: a median of bytes by more than ALLOWED, the least of the others at all."""
    for key in QUANTITIES:
        before, after = quarters([line[key] for line in lines])
        middle = statistics.median if key in ALLOWED else min
        if middle(after) > middle(before) + ALLOWED.get(key, 0):
            yield f"{key}: {middle(before)}, then {middle(after)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="how long to work (default: 3600)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="seed of the kills (default: new)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        parser.error(f"{args.output}: its folder does not exist")
    print("seed", args.seed, flush=True)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), args.seconds, args.seed)
    head = {"format": "fmn_ref.soak", "version": 1, "made_with": versions()}
    args.output.write_text(json.dumps(head | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
