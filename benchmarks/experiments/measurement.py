"""Measure one piece of the suite: its run, the fusions of its checkpoints, and the controls, each as a row of a table.

`measure` does the fusions first, then the piece's `STAGES`.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import fmn_ref as fmn
from fmn_ref import _files
from fmn_ref.fusion import baselines
from fmn_ref.fusion.methods import method_names
from fmn_ref.fusion.plan import FusionPlan
from fmn_ref.metrics.scores import scores
from fmn_ref.reporting import comparison
from fmn_ref.runs import checkpoints
from fmn_ref.runs.retention import Keep
from fmn_ref.training.data import fingerprints
from fmn_ref.training.ensemble import FusedModel, averaged_model

from . import controls, datasets
from .pieces import Piece

Labels = NDArray[np.int64]
FUSIONS: dict[str, dict[str, Any]] = {"KF": {"method": "forget"}, "KF exact": {"method": "forget", "search": "exact"}}
FUSIONS |= {name: {"method": name} for name in method_names() if name != "forget"}
VIEWS = 8  # augmented versions of the training images that a teacher predicts
BUDGETS = (0.05, 0.1, 0.2, 0.4)  # shares of the checkpoints that are kept
FEW_LABELS, DRAWS = (50, 100, 300, 1000), 3  # selection samples, and how often they are drawn


class Bench:
    """State of a measurement: the piece's data, its run, every epoch's predictions, the plans and rows so far."""

    def __init__(self, piece: Piece, root: Path, folder: Path) -> None:
        self.piece, self.root, self.folder = piece, root, folder
        self.stages = tuple(STAGES) if piece.stages is None else piece.stages
        self.data = piece.split(root)
        comparison.refuse_overlap(fingerprints(self.data.select), fingerprints(self.data.test), "test")
        folder.mkdir(parents=True, exist_ok=True)
        beside = partial(controls.StepAverages, piece, self.data, folder) if "ema" in self.stages else nullcontext
        self.run = self.train(beside=beside)
        self.select, self.y = self.stored("select", self.data.select)
        self.test, self.y_test = self.stored("test", self.data.test)
        self.plans: dict[str, FusionPlan] = {}
        self.students: dict[str, nn.Module] = {}
        self.rows: list[dict[str, Any]] = []

    def train(self, network: int = 0, **options: Any) -> fmn.Run:
        """Train one of the piece's networks, as `Piece.train`; first on the piece before, where there is one."""
        first = self.piece.before
        if first is not None:
            run = first.train(first.split(self.root), self.folder / "before", network)
            options["start"] = run.checkpoint(-1)
        return self.piece.train(self.data, self.folder, network, **options)

    def stored(self, name: str, samples: datasets.Data) -> tuple[NDArray[np.float16], Labels]:
        """Probabilities (n_epochs, n_samples, n_classes), read from the piece's folder or computed and stored there."""
        path = self.folder / f"{name}.npy"
        if not path.exists():
            probs = self.run.probabilities(samples, batch_size=250, amp=self.piece.task.amp)
            array = np.stack([probs[e].astype(np.float16) for e in range(len(probs))])
            with _files.replacing(path, ".npy") as temporary:
                np.save(temporary, array)
        return np.load(path, mmap_mode="r"), samples[1].cpu().numpy()

    def row(
        self, method: str, passes: int, training: float, select: NDArray[Any], test: NDArray[Any], **more: Any
    ) -> None:
        """Add a row from a method's probabilities on both sets.

        `passes` is what one prediction costs, `training` what the method costs in runs. `gain_error` is the standard
        error, over the test samples, of the accuracy minus the final model's.
        """
        costs = {"forward_passes": passes, "training_runs": training}
        found = scores(test, self.y_test)
        accuracies = {"selection_accuracy": scores(select, self.y).accuracy, "test_accuracy": found.accuracy}
        right, final = (p.argmax(1) == self.y_test for p in (test, self.test[-1]))
        error = float((right * 1.0 - final).std() / len(right) ** 0.5)
        measured = {**accuracies, "test_nll": found.nll, "test_ece": found.ece, "gain_error": error}
        self.rows.append({"method": method, **costs, **measured, **more})

    def add_plan(self, method: str, plan: FusionPlan, training: float = 1, **more: Any) -> None:
        """Score a plan and add its row."""
        self.row(method, plan.forward_passes, training, plan.apply(self.select), plan.apply(self.test), **more)

    def add_model(self, method: str, model: nn.Module, training: float, passes: int = 1) -> None:
        """Score a network and add its row."""
        predicted = (controls.predicted(model, d, self.piece.task.amp) for d in (self.data.select, self.data.test))
        self.row(method, passes, training, *predicted)

    def add_student(self, name: str, teacher: nn.Module, training: float = 2, **options: Any) -> None:
        """Distil the teacher into a new network of the original size and add its row."""
        seed, task = self.piece.seed + 500, self.piece.task
        torch.manual_seed(seed)
        options |= {"targets": "cached-views", "views": VIEWS} if self.piece.augmented else {"targets": "cached"}
        options |= {"run_dir": self.folder / re.sub(r"\W+", "_", f"student {name}"), **self.piece.recipe(seed)}
        teacher = controls.Bfloat16(teacher, task.amp)
        self.students[name] = fmn.distill(task.make_model(), teacher, self.data.train, **options)
        self.add_model(f"distilled {name}", self.students[name], training)


def measure(piece: Piece, root: Path, folder: Path) -> dict[str, Any]:
    """Measure a piece; return a dictionary that JSON can hold."""
    bench = Bench(piece, root, folder)
    fusions(bench)
    for stage in bench.stages:
        STAGES[stage](bench)
    curves = fmn.forgetting_curves(bench.run.history)
    return {
        "piece": piece.name,
        "setting": piece.setting,
        "dataset": piece.task.name,
        "noise": piece.noise,
        "augmented": piece.augmented,
        "seed": piece.seed,
        "share_of_wrong_labels": bench.data.share_wrong,
        "sizes": {name: len(getattr(bench.data, name)[1]) for name in ("train", "select", "test")},
        "epochs": piece.task.epochs,
        "made_with": made_with(piece.task.device),
        "history": fmn.expectation.features(bench.run.history),
        "curves": {k: getattr(curves, k).round(6).tolist() for k in ("accuracy", "retained", "forget", "learned")},
        "rows": bench.rows,
        "budget": budget_study(bench),
        "few_labels": few_labels_study(bench),
        "recovery": recovered(bench),
        "accuracy_before": accuracy_before(bench),
    }


def fusions(bench: Bench) -> None:
    """Single epochs and windows, every fusion method, then controls at the cost of the pool and of KF."""
    n, y = len(bench.select), bench.y
    right = np.stack([p.argmax(1) == y for p in bench.select])
    single = {
        "final": baselines.last_epochs(n),
        "best epoch": baselines.best_epoch(right),
        "best window": baselines.best_window(bench.select, y, 1),
        "Caruana": controls.caruana(bench.select, y),
    }
    for name, weights in single.items():
        bench.add_plan(name, FusionPlan.from_weights(weights, n))
    add_fusions(bench)
    for name in ("pool", "KF"):
        k = bench.plans[name].forward_passes
        same_cost = {
            "last": baselines.last_epochs(n, k),
            "equally spaced": baselines.equally_spaced(n, k),
            "top": baselines.top_epochs(right, k),
        }
        for control, weights in same_cost.items():
            bench.add_plan(f"{control} at {name}'s cost", FusionPlan.from_weights(weights, n))


def add_fusions(bench: Bench) -> None:
    """Every fusion method, and KF's first member alone; keep the plans."""
    for name, options in FUSIONS.items():
        plan = fmn.fuse(bench.select, bench.y, **options)
        bench.plans[name] = plan
        certainty: dict[str, Any] = {"cv_accuracy": plan.cv_accuracy, "gain_interval": plan.gain_interval}
        bench.add_plan(name, plan, chosen=plan.method if plan.members else "final", **certainty)
    kf = bench.plans["KF"]
    bench.add_plan("KF(1)", FusionPlan(kf.members[:1], kf.n_epochs, kf.window, kf.accuracy[:2]))
    bench.plans["final"] = FusionPlan((), kf.n_epochs, 0, kf.accuracy[:1])


def students(bench: Bench) -> None:
    """Students distilled from the pool, from KF and from the final model; that of auto is one of them."""
    for name in ("pool", "KF", "final"):
        bench.add_student(name, FusedModel(bench.plans[name], bench.run))
    twin = "final" if bench.plans["auto"].final_model_alone else "pool"
    bench.students["auto"] = bench.students[twin]
    row = next(r for r in bench.rows if r["method"] == f"distilled {twin}")
    bench.rows.append({**row, "method": "distilled auto"})


def temperatures(bench: Bench) -> None:
    """Students of softer pools: one with weights of sum 1, and one with a temperature of 2."""
    pool = bench.plans["pool"]
    total = sum(pool.weights.values())
    weights = {epoch: weight / total for epoch, weight in pool.weights.items()}
    flat = FusionPlan.from_weights(weights, pool.n_epochs, pool.combine)
    bench.add_student("pool, weights of sum 1", FusedModel(flat, bench.run))
    bench.add_student("pool, temperature 2", FusedModel(pool, bench.run), temperature=2.0)


def averages(bench: Bench) -> None:
    """Networks whose weights are means of the checkpoints' weights."""
    n, train = len(bench.select), bench.data.train
    candidates = [averaged_model(bench.run, baselines.ema_weights(n, d), train) for d in comparison.EMA_DECAYS]
    best = max(candidates, key=lambda m: controls.accuracy(m, bench.data.select, bench.piece.task.amp))
    bench.add_model("EMA over epochs", best, 1)
    bench.add_model("SWA over epochs", averaged_model(bench.run, baselines.swa_weights(n), train), 1)
    for name in ("KF", "auto"):
        bench.add_model(f"averaged {name}", averaged_model(bench.run, bench.plans[name].weights, train), 1)


def ema(bench: Bench) -> None:
    """The best exponential moving average of every step of the run's training."""
    bench.add_model("EMA", controls.best_average(bench.piece, bench.folder), 1)


def independent_networks(bench: Bench) -> None:
    """Ensembles of two, three and five networks, each at its final epoch or at its best epoch."""
    final, early = five_networks(bench)
    for m in (2, 3, 5):
        bench.add_model(f"{m} networks", controls.Mean(final[:m]), m, m)
        bench.add_model(f"{m} networks, early stopped", controls.Mean(early[:m]), m, m)


def five_networks(bench: Bench) -> tuple[list[nn.Module], list[nn.Module]]:
    """Train five networks; return them at their final and at their best epochs."""
    final: list[nn.Module] = []
    early: list[nn.Module] = []
    for i in range(5):
        run = bench.run if i == 0 else bench.train(i)
        best = int(fmn.forgetting_curves(run.history).accuracy.argmax())
        for found, epoch in ((final, -1), (early, best)):
            found.append(checkpoints.load_into(bench.piece.task.make_model(), run.checkpoints[epoch]))
    return final, early


def trained_differently(bench: Bench) -> None:
    """Snapshot ensemble, FGE, and SWA on its own schedule."""
    piece, data, folder = bench.piece, bench.data, bench.folder
    snapshots = controls.train_snapshots(piece, data, folder)
    fge = controls.train_fge(piece, data, folder, bench.run)
    for name, members in (("snapshots", snapshots), ("FGE", fge)):
        bench.add_model(name, controls.Mean(members), 1, len(members))
    bench.add_model("SWA", controls.train_swa(piece, data, folder, bench.run), 1)


def distilled_controls(bench: Bench) -> None:
    """Students of five early-stopped networks and of the EMA."""
    bench.add_student("5 networks, early stopped", controls.Mean(five_networks(bench)[1]), 6)
    bench.add_student("EMA", controls.best_average(bench.piece, bench.folder))


STAGES: dict[str, Callable[[Bench], None]] = {
    "students": students,
    "temperatures": temperatures,
    "ema": ema,
    "averages": averages,
    "networks": independent_networks,
    "trained_differently": trained_differently,
    "distilled_controls": distilled_controls,
}


def budget_study(bench: Bench) -> list[dict[str, Any]]:
    """Test accuracy of the fusion from the checkpoints that keep="budget:n" and keep="every:n" leave on disk."""
    correct, n_epochs = bench.run.history.correct(), len(bench.select)
    study = []
    for share in BUDGETS:
        n = max(1, round(share * n_epochs))
        for keep in (Keep("budget", n), Keep("every", max(1, n_epochs // n))):
            rows = kept_rows(keep, correct)
            for name in ("KF", "auto"):
                method = "forget" if name == "KF" else bench.plans[name].method
                plan = fmn.fuse([bench.select[e] for e in rows], bench.y, method=method, folds=0)
                test = scores(plan.apply([bench.test[e] for e in rows]), bench.y_test).accuracy
                study.append({"keep": keep.rule, "n": len(rows), "share": share, "fusion": name, "test_accuracy": test})
    return study


def few_labels_study(bench: Bench) -> list[dict[str, Any]]:
    """Test accuracy of fusions that are chosen on few of the selection samples: means over draws of them."""
    n_epochs, study = len(bench.select), []
    for n in FEW_LABELS:
        if n >= len(bench.y):
            break
        found: dict[str, list[float]] = {}
        for draw in range(DRAWS):
            some = np.sort(np.random.default_rng(draw).permutation(len(bench.y))[:n])
            select, y = np.ascontiguousarray(bench.select[:, some]), bench.y[some]
            plans = {"Caruana": FusionPlan.from_weights(controls.caruana(select, y), n_epochs)}
            plans |= {name: fmn.fuse(select, y, **FUSIONS[name], folds=0) for name in ("KF", "bagged", "pool")}
            plans["auto"] = fmn.fuse(select, y, method="auto")
            for name, plan in plans.items():
                accuracy = scores(plan.apply(bench.test), bench.y_test).accuracy
                found.setdefault(name, []).append(accuracy)
        study += [{"n": n, "fusion": name, "test_accuracy": float(np.mean(a))} for name, a in found.items()]
    return study


def kept_rows(keep: Keep, correct: NDArray[np.bool_]) -> list[int]:
    """Epochs that are still on disk after a run with this rule."""
    rows: list[int] = []
    for epoch in range(len(correct)):
        rows.append(epoch)
        dropped = keep.dropped(rows, correct[rows])
        rows = [e for e in rows if e not in dropped]
    return rows


def recovered(bench: Bench) -> dict[str, dict[str, int]]:
    """Test samples that the pool, KF, auto and their students bring back, and those that they lose."""
    correct = np.stack([p.argmax(1) == bench.y_test for p in bench.test])
    predictions: dict[str, Any] = {}
    for name in ("KF", "pool", "auto"):
        predictions[name] = bench.plans[name].apply(bench.test)
        if name in bench.students:
            student = controls.predicted(bench.students[name], bench.data.test, bench.piece.task.amp)
            predictions[f"distilled {name}"] = student
    return fmn.recovery(correct, predictions, bench.y_test).counts()


def accuracy_before(bench: Bench) -> dict[str, float]:
    """Accuracy on the test set of the piece before: of its own network, and after the training of this piece."""
    first = bench.piece.before
    if first is None:
        return {}
    data = first.split(bench.root)
    models = {"before": first.train(data, bench.folder / "before").model}
    models |= {name: FusedModel(bench.plans[name], bench.run) for name in ("final", "KF", "pool")}
    return {name: controls.accuracy(m, data.test, first.task.amp) for name, m in models.items()}


def made_with(device: str) -> dict[str, str]:
    """Versions, device and threads."""
    names = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"fmn_ref": fmn.__version__, **names, "device": where, "threads": str(torch.get_num_threads())}
