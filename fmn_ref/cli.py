"""fmn-ref: the metric and the fusion on files, and the demo.

Exit status: 0 done, 1 something was wrong with the input or the disk (one line on stderr), 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import __version__, _check, _files
from .fusion.expectation import expected_gain
from .fusion.fuse import fuse
from .fusion.methods import method_names
from .fusion.plan import FusionPlan
from .kernels.backend import backend
from .kernels.reference import correct_of
from .metrics.curves import ForgettingCurves, correctness
from .metrics.history import CorrectnessHistory, labels_digest
from .metrics.matrix import Matrix
from .metrics.samples import NEVER_LEARNED, SampleStatistics, sample_statistics
from .reporting.comparison import compare_probabilities
from .reporting.report import write_report
from .runs import importers
from .runs.load import has_labels, load_correct, load_epochs, load_labels, load_named

PROBS = (
    "probabilities (n_epochs, n_samples, n_classes): .npy, or .npz with 'probs' and perhaps 'labels'; "
    "or a folder with one .npy (n_samples, n_classes) per epoch, in the order of the numbers in their names"
)
LABELS = "true classes (n_samples,): .npy, or .npz with 'labels'; default: 'labels' in the other file, if it is .npz"


def command_info(args: argparse.Namespace) -> None:
    b = backend()
    content = {"version": __version__, **b._asdict()}
    rows = [f"fmn_ref {__version__}", f"backend {b.name} ({b.reason})", f"instruction set {b.instruction_set}"]
    show(args, content, "\n".join([*rows, f"threads {b.threads}"]))


def command_metric(args: argparse.Namespace) -> None:
    correct = load_correct(args.file, args.labels, verify=not args.no_verify)
    epochs = np.array(correct.epochs if isinstance(correct, CorrectnessHistory) else range(len(correct)))
    curves, n_forgotten, (expected, error) = curves_and_forgotten(correct, args.reference)
    columns = {
        "epoch": epochs.tolist(),
        "accuracy": curves.accuracy.tolist(),
        "forget_fraction": curves.forget.tolist(),
        "learned_fraction": curves.learned.tolist(),
        "retained": curves.retained.tolist(),
    }
    peak = int(curves.forget.argmax())
    summary = {
        "n_samples": curves.n_samples,
        "peak_forget_fraction": float(curves.forget[peak]),
        "peak_epoch": int(epochs[peak]),
        "forgotten_samples": n_forgotten,
        "expected_gain": expected,
        "expected_gain_error": error,
    }
    if args.per_sample:
        stats = sample_statistics(correct, never_learned=args.never_learned, progress=True)
        write_per_sample(args.per_sample, stats, epochs, args.ids)
    if args.csv:
        return print(to_csv(columns), end="")
    head = f"{'epoch':>6} {'accuracy':>9} {'F_e':>9} {'L_e':>9} {'retained':>9}"
    rows = [f"{e:6d} " + " ".join(f"{v:9.4f}" for v in values) for e, *values in zip(*columns.values(), strict=True)]
    end = (
        f"peak forget fraction {summary['peak_forget_fraction']:.2%} at epoch {summary['peak_epoch']}; "
        f"{summary['forgotten_samples']} of {curves.n_samples} samples were right once and are wrong at epoch "
        f"{epochs[args.reference]}\n"
        f"fusing the checkpoints may add about {100 * expected:.0f} points, give or take {100 * error:.0f} "
        "(a rule fitted on small networks: docs/results.md)"
    )
    show(args, {**summary, **columns}, "\n".join([head, *rows, end]))


def curves_and_forgotten(correct: Any, reference: int) -> tuple[ForgettingCurves, int, tuple[float, float]]:
    """The curves, how many samples were right at some epoch and are wrong at the reference, and the gain to expect
    (from the first 65536 samples), in one reading."""
    m = Matrix(correct)
    r, n = _check.index(reference, m.n_epochs, "reference"), m.n_samples
    counts, of_ever = np.zeros((4, m.n_epochs), np.int64), np.zeros((4, 2), np.int64)
    for part, rows in m.blocks(progress=True):
        m.kernels.curve_counts(rows, part.stop - part.start, r, counts)
        ever = np.stack([np.bitwise_or.reduce(rows, axis=0), rows[r]])
        m.kernels.curve_counts(ever, part.stop - part.start, 1, of_ever)
        if part.start == 0:
            some = rows[:, :8192] if rows.dtype == np.uint8 else rows[:, :65536]
            expected = expected_gain(correct_of(some, min(part.stop, 65536)))
    return ForgettingCurves(counts, n, n, r), int(of_ever[1, 0]), expected


def write_per_sample(path: str, stats: SampleStatistics, epochs: NDArray[np.int64], ids: str | None) -> None:
    n = len(stats.forgotten)
    names = list(range(n)) if ids is None else Path(ids).read_text().splitlines()
    if len(names) != n:
        raise ValueError(f"{ids}: expected {n} lines, one id per sample, got {len(names)}")
    columns = {"sample_id": names, **{k: v.tolist() for k, v in vars(stats).items()}}
    for k in ("first_learned", "last_correct"):  # rows of the matrix -> epochs; empty for never
        rows = vars(stats)[k]
        columns[k] = ["" if np.isnan(r) else int(epochs[int(r)]) for r in rows]
    _files.write_atomic(path, lambda f: f.write(to_csv(columns).encode()))


def command_fuse(args: argparse.Namespace) -> None:
    probs = load_epochs(args.probs, args.logits)
    labels = load_labels(args.labels, args.probs)
    correct = load_named(args.correct, "correct")[0] if args.correct else None
    names = ("method", "window", "search", "max_members", "max_forward_passes", "folds")
    options = {name: vars(args)[name] for name in names}
    plan = fuse(probs, labels, correct=correct, sample_weight="balanced" if args.balanced else None, **options)
    plan.save(args.output)
    content = {
        "output": args.output,
        "members": plan.members,
        "weights": plan.weights,
        "selection_accuracy": plan.accuracy,
        "method": plan.method,
        "cv_accuracy": plan.cv_accuracy,
        "gain_interval": plan.gain_interval,
    }
    rows = [
        f"{'round':>6} {'epoch':>6} {'eps':>7} {'accuracy':>9}",
        f"{'final':>6} {'':>6} {'':>7} {plan.accuracy[0]:9.4f}",
    ]
    for i, ((epoch, eps), accuracy) in enumerate(zip(plan.members, plan.accuracy[1:], strict=True), 1):
        rows.append(f"{i:6d} {epoch:6d} {eps:7.4f} {accuracy:9.4f}")
    show(args, content, "\n".join([*rows, str(plan), f"plan written to {args.output}"]))


def command_apply(args: argparse.Namespace) -> None:
    plan = FusionPlan.load(args.plan)
    probs = load_epochs(args.probs, args.logits)
    labels = None
    if args.labels or has_labels(args.probs):
        labels = load_labels(args.labels, args.probs)
        if labels_digest(labels).hex() == plan.labels_sha256 and not args.allow_selection_data:
            raise ValueError(
                "labels: those that the plan was chosen on; scoring there flatters (--allow-selection-data permits it)"
            )
    fused = plan.apply(probs)
    _files.write_atomic(args.output, lambda f: np.save(f, fused))
    content: dict[str, Any] = {"output": args.output, "shape": list(fused.shape)}
    text = f"fused probabilities {fused.shape} written to {args.output}"
    if labels is not None:
        right = correctness(fused, labels), correctness(probs[-1], labels)
        content |= {"accuracy": float(right[0].mean()), "final_model_accuracy": float(right[1].mean())}
        text += f"\naccuracy {content['accuracy']:.2%}, final model alone {content['final_model_accuracy']:.2%}"
    show(args, content, text)


def command_compare(args: argparse.Namespace) -> None:
    select, test = load_epochs(args.select, args.logits), load_epochs(args.test, args.logits)
    y = load_labels(args.select_labels, args.select, "--select-labels")
    y_test = load_labels(args.test_labels, args.test, "--test-labels")
    options = {"window": args.window, "search": args.search, "allow_overlap": args.allow_overlap}
    table = compare_probabilities(select, y, test, y_test, **options)
    text = table.to_json() if args.json else table.to_csv() if args.csv else table.to_markdown()
    print(text.rstrip())


def command_report(args: argparse.Namespace) -> None:
    names = ("labels", "images", "plan", "comparison")
    output = args.output or Path(args.run_dir, "report.html")
    size = write_report(args.run_dir, output, **{name: vars(args)[name] for name in names}).stat().st_size
    show(args, {"output": str(output), "bytes": size}, f"report written to {output} ({-(-size // 1000)} kB)")


def command_demo(args: argparse.Namespace) -> None:
    from . import demo

    if not sys.stderr.isatty():  # no bar there: a line per run instead
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    results = demo.run_demo(out, args.seeds, args.epochs)
    show(args, results, f"{demo.table(results)}\nreport: {out / 'report.md'}   numbers: {out / 'results.json'}")


def command_import(args: argparse.Namespace) -> None:
    if args.tool == "cartography":
        logits, labels, ids = importers.from_cartography(args.path)
        arrays: dict[str, Any] = {"scores": logits, "labels": labels}
    else:
        correct, indices = importers.from_toneva(args.path)
        arrays, ids = {"correct": correct}, list(map(str, indices))
    arrays["sample_ids"] = np.array(ids)
    _files.write_atomic(args.output, lambda f: np.savez(f, **arrays))
    shapes = {name: list(a.shape) for name, a in arrays.items()}
    show(args, {"output": args.output, **shapes}, f"{args.output}: {', '.join(f'{k} {v}' for k, v in shapes.items())}")


def command_bench(args: argparse.Namespace) -> None:
    def module(name: str) -> Any:
        return importlib.import_module(f"fmn_ref.benchmarks.{name}")

    if args.suite in ("paper", "descent") and not args.data:
        raise ValueError("--data: the folder with the data sets is needed")
    if args.suite == "paper":
        out = args.output or f"runs/paper_{args.scale}"
        tables = module("experiments.suite").benchmark(
            args.scale, args.data, out, args.only, args.jobs, args.seeds, args.clean
        )
        return print(tables.rstrip())
    if args.suite == "training":
        return print(module("speed.training").benchmark(args.data, args.output, device=args.device).rstrip())
    if args.suite == "descent":
        suite, result = (
            module("experiments.double_descent"),
            module("experiments.double_descent").benchmark(args.data, args.output, args.seeds),
        )
    elif args.suite == "fusion":
        suite, result = module("speed.fusion"), module("speed.fusion").benchmark(args.output)
    else:
        suite = module("speed.metric")
        result = suite.benchmark(args.epochs, args.samples, args.output)
    show(args, result, suite.markdown(result).rstrip())


def show(args: argparse.Namespace, content: dict[str, Any], text: str) -> None:
    print(json.dumps(content, indent=1) if args.json else text)


def to_csv(columns: dict[str, list[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "fmn-ref", description="Measure what a network forgot while it was trained, and fuse it back."
    )
    p.add_argument("--version", action="version", version=__version__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        c = commands.add_parser(name, help=text, description=text)
        c.set_defaults(run=run)
        c.add_argument("--json", action="store_true", help="print JSON")
        return c

    def logits(c: argparse.ArgumentParser) -> None:
        c.add_argument("--logits", action="store_true", help="the files hold logits: apply softmax")

    def selection(c: argparse.ArgumentParser) -> None:
        logits(c)
        c.add_argument("--window", type=int, default=1, help="half width of a member's window (default 1)")
        c.add_argument(
            "--search", choices=["grid", "exact"], default="grid", help="how epsilon is found (default grid)"
        )

    c = add("demo", command_demo, "train, measure, fuse, distill and compare on scikit-learn's digits (minutes)")
    c.add_argument(
        "-o", "--output", default="runs/demo", help="folder (default runs/demo); what is done there is reused"
    )
    c.add_argument("--seeds", type=int, default=5, help="runs per noise rate (default 5)")
    c.add_argument("--epochs", type=int, default=40, help="of each run (default 40)")

    add("info", command_info, "say which compiled kernels are in use, and why")

    c = add("metric", command_metric, "forget fraction and its relatives per epoch")
    c.add_argument("file", help="run directory or .fmnh history; .npy or .npz with correctness, predictions or scores")
    c.add_argument(
        "--labels", help="true classes, for a file of predictions or scores; " + LABELS.split(";")[1].strip()
    )
    c.add_argument("--reference", type=int, default=-1, help="row that stands for the end (default: the last)")
    c.add_argument("--never-learned", choices=NEVER_LEARNED, default="nan", help="how never-learned samples count")
    c.add_argument("--per-sample", metavar="CSV", help="write a table with a row per sample")
    c.add_argument("--ids", help="text file with a sample id per line, for --per-sample")
    c.add_argument("--csv", action="store_true", help="print CSV")
    c.add_argument(
        "--no-verify", action="store_true", help="do not check a history's CRC-32s, which reads it once more"
    )

    c = add(
        "bench",
        command_bench,
        "time the kernels (metric), the searches (fusion) or training, or repeat the experiments (paper, descent)",
    )
    c.add_argument("suite", choices=["metric", "fusion", "training", "paper", "descent"], help="what to run")
    c.add_argument("--epochs", type=int, default=200, help="metric: of the large matrix (default 200)")
    c.add_argument("--samples", type=int, default=1_281_167, help="metric: of the large matrix (default 1281167)")
    c.add_argument("--scale", choices=["cpu", "gpu"], default="cpu", help="paper: hours on two cores, or on a GPU")
    c.add_argument(
        "--data",
        help="paper, descent, training: folder with mnist/, cifar-100-binary/, cifar-100n/, tiny-imagenet-200/",
    )
    c.add_argument("--device", choices=["cpu", "cuda"], help="training: where (default: a GPU if there is one)")
    c.add_argument("--only", default="", help="paper: regular expression for the names of pieces")
    c.add_argument("--jobs", type=int, default=1, help="paper: pieces at once (default 1)")
    c.add_argument("--seeds", type=int, default=3, help="paper, descent: per setting (default 3)")
    c.add_argument("--clean", action="store_true", help="paper: remove the checkpoints of finished pieces")
    c.add_argument("-o", "--output", help="folder for the results; paper goes on with what is there")

    c = add("fuse", command_fuse, "find a fusion plan on a selection set")
    c.add_argument("probs", help=PROBS)
    c.add_argument("--labels", help=LABELS)
    c.add_argument(
        "--correct", help="correctness of the same samples (.fmnh or .npy): then only the chosen epochs are read"
    )
    c.add_argument("--method", choices=method_names(), default="forget", help="how epochs are chosen (default forget)")
    c.add_argument("--max-members", type=int, help="most members (default: no bound)")
    c.add_argument("--max-forward-passes", type=int, help="at most so many checkpoints")
    c.add_argument(
        "--folds", type=int, help="of the cross-validation that says how sure the plan is (default 5; 0: none)"
    )
    c.add_argument("--balanced", action="store_true", help="maximise balanced accuracy: every class weighs the same")
    c.add_argument("-o", "--output", default="plan.json", help="plan to write (default plan.json)")
    selection(c)

    c = add("import", command_import, "correctness or scores from what other tools recorded, as .npz for `metric`")
    c.add_argument("tool", choices=["cartography", "toneva"], help="dynamics_epoch_*.jsonl; pickled example statistics")
    c.add_argument("path", help="the folder of the dynamics, or the file of the statistics")
    c.add_argument("-o", "--output", default="history.npz", help="file to write (default history.npz)")

    c = add("apply", command_apply, "fused probabilities of other samples, by a plan")
    c.add_argument("plan", help="plan.json")
    c.add_argument("probs", help=PROBS)
    c.add_argument("--labels", help="true classes: print the accuracy too")
    c.add_argument("-o", "--output", default="fused.npy", help="file to write (default fused.npy)")
    logits(c)
    c.add_argument("--allow-selection-data", action="store_true", help="score on the samples that chose the plan")

    c = add("compare", command_compare, "the fusion beside its controls: chosen on one set, scored on another")
    c.add_argument("--select", required=True, help=PROBS)
    c.add_argument("--select-labels", help=LABELS)
    c.add_argument("--test", required=True, help=PROBS)
    c.add_argument("--test-labels", help=LABELS)
    c.add_argument("--csv", action="store_true", help="print CSV")
    c.add_argument("--allow-overlap", action="store_true", help="score on the selection set all the same")
    selection(c)

    c = add("report", command_report, "one HTML file that shows what a run forgot, to read in a browser or pass on")
    c.add_argument("run_dir", help="run directory")
    c.add_argument("--labels", help="true classes of the recorded samples (n_samples,): .npy, or .npz with 'labels'")
    c.add_argument(
        "--images",
        help="their pictures, (n_samples, h, w), (n_samples, h, w, c) or (n_samples, c, h, w), uint8 or floats: .npy, "
        "or .npz with 'images'",
    )
    c.add_argument("--plan", help="plan.json (default: the run directory's)")
    c.add_argument(
        "--comparison", help="what `fmn-ref compare --json` printed (default: the run directory's comparison.json)"
    )
    c.add_argument("-o", "--output", help="file to write (default: report.html in the run directory)")
    return p


def check_output(args: argparse.Namespace) -> None:
    """No command writes over a file that it reads, nor what would be read next time into a folder of epochs."""
    names = [vars(args).get(name) for name in ("file", "plan", "probs", "labels", "correct", "ids", "path")]
    inputs = [Path(name).resolve() for name in names if name]
    for output in (vars(args).get("output"), vars(args).get("per_sample")):
        path = Path(output or "").resolve()
        beside_epochs = path.suffix in (".npy", ".jsonl") and path.parent in inputs
        if output and (path in inputs or beside_epochs):
            raise ValueError(f"{output}: is one of the files to read; choose another name for what is written")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        check_output(args)
        args.run(args)
    except KeyboardInterrupt:
        print("fmn-ref: interrupted" + "; run it again to continue" * (args.command == "demo"), file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"fmn-ref: error: {error}", file=sys.stderr)
        return 1
    return 0
