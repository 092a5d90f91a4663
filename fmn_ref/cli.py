"""The command `fmn-ref`: measure, fuse and compare from files, without writing Python.

Exit status: 0 for success, 1 for wrong input or a failed read or write (one line on stderr), 2 for wrong usage, 130
after an interrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, _files, _stderr
from .fusion.expectation import expected_gain
from .fusion.fuse import fuse
from .fusion.methods import method_names
from .fusion.plan import FusionPlan
from .kernels.backend import backend
from .metrics.overview import curves_and_forgotten, first_samples
from .metrics.samples import NEVER_LEARNED, sample_statistics
from .metrics.scores import scores
from .reporting.comparison import compare_probabilities
from .reporting.graded import answers_summary, import_answers
from .reporting.report import write_report
from .reporting.tables import csv_table
from .runs import importers
from .runs.load import check_outputs, error_line, has_labels, load_correct, load_epochs, load_labels, load_named
from .runs.text import BYTES, id_array, read_ids

PROBS = (
    "probabilities (n_epochs, n_samples, n_classes): an .npy file; an .npz file with 'probs', and optionally 'labels'; "
    "or a folder with one .npy file (n_samples, n_classes) per epoch, ordered by the numbers in the file names"
)
BESIDE = "; default: 'labels' in the .npz file with the "
LABELS = "true classes (n_samples,): an .npy file, or an .npz file with 'labels'"
LOGITS = "the files contain logits: apply softmax"
# Each benchmark: its module under fmn_ref.benchmarks, and how to call its function `benchmark`.
SUITES: dict[str, tuple[str, Callable[[Any, argparse.Namespace], Any]]] = {
    "metric": ("speed.metric", lambda run, a: run(a.epochs, a.samples, a.output)),
    "fusion": ("speed.fusion", lambda run, a: run(a.output)),
    "training": ("speed.training", lambda run, a: run(a.data, a.output, device=a.device)),
    "paper": (
        "experiments.suite",
        lambda run, a: run(
            a.scale, a.data, a.output or f"runs/paper_{a.scale}", a.only, a.jobs, a.seeds, a.clean, a.device
        ),
    ),
    "descent": ("experiments.double_descent", lambda run, a: run(a.data, a.output, a.seeds)),
    "boosting": ("experiments.boosting", lambda run, a: run(a.output)),
}
Add = Callable[..., object]  # ArgumentParser.add_argument


def command_info(args: argparse.Namespace) -> None:
    """Show which kernels are in use, and why.

    Example: FMN_BACKEND=numpy fmn-ref info
    """
    b = backend()
    text = f"fmn_ref {__version__}\nbackend {b.name} ({b.reason})\ninstruction set {b.instruction_set}\n"
    print_result(args, {"version": __version__, **b._asdict()}, f"{text}threads {b.threads}")


def command_metric(args: argparse.Namespace) -> None:
    """Print accuracy, forget fraction and learned fraction per epoch.

    Example: fmn-ref metric predictions.npy --labels labels.npy --csv
    """
    correct = load_correct(args.file, args.labels, verify=not args.no_verify)
    if getattr(correct, "ndim", 2) == 3:
        if args.csv or args.per_sample or args.reference != -1:
            raise ValueError(f"{args.file}: has several draws per question; --csv, --per-sample, --reference need one")
        return print_result(args, *answers_summary(correct))
    epochs = list(getattr(correct, "epochs", range(len(correct))))
    curves, n_forgotten = curves_and_forgotten(correct, reference=args.reference, progress=True)
    gain, error = expected_gain(first_samples(correct))
    columns: dict[str, list[Any]] = {"epoch": epochs, "accuracy": curves.accuracy.tolist()}
    columns |= {"forget_fraction": curves.forget.tolist(), "learned_fraction": curves.learned.tolist()}
    columns["retained"] = curves.retained.tolist()
    peak = int(curves.forget.argmax())
    summary = {
        "n_samples": curves.n_samples,
        "peak_forget_fraction": float(curves.forget[peak]),
        "peak_epoch": epochs[peak],
        "forgotten_samples": n_forgotten,
        "expected_gain": gain,
        "expected_gain_error": error,
    }
    if args.per_sample:
        write_per_sample(args, correct, epochs)
    if args.csv:
        return print(csv_table(list(columns), zip(*columns.values(), strict=True)), end="")
    print_result(args, {**summary, **columns}, metric_text(columns, summary, epochs[args.reference]))


def metric_text(columns: dict[str, list[Any]], summary: dict[str, Any], reference: int) -> str:
    """A line per epoch, then the peak, the forgotten samples and the expected gain."""
    lines = [f"{'epoch':>6} {'accuracy':>9} {'F_e':>9} {'L_e':>9} {'retained':>9}"]
    for epoch, *values in zip(*columns.values(), strict=True):
        lines.append(f"{epoch:6d} " + " ".join(f"{v:9.4f}" for v in values))
    peak = f"peak forget fraction {summary['peak_forget_fraction']:.2%} at epoch {summary['peak_epoch']}"
    share = f"{summary['forgotten_samples']} of {summary['n_samples']} samples"
    lines.append(f"{peak}; {share} were right once and are wrong at epoch {reference}")
    gain = f"{100 * summary['expected_gain']:.0f} ± {100 * summary['expected_gain_error']:.0f} points"
    lines.append(f"fusing the checkpoints may add about {gain} (a rule fitted on small networks: docs/results.md)")
    return "\n".join(lines)


def write_per_sample(args: argparse.Namespace, correct: Any, epochs: list[int]) -> None:
    stats = sample_statistics(correct, never_learned=args.never_learned, progress=True)
    n = len(stats.forgotten)
    names = list(range(n)) if args.ids is None else read_ids(args.ids)
    if len(names) != n:
        raise ValueError(f"{args.ids}: expected {n} lines, one id per sample, got {len(names)}")
    columns = {"sample_id": names, **{k: v.tolist() for k, v in vars(stats).items()}}
    for k in ("first_learned", "last_correct"):  # from rows of the matrix to epochs; empty for never
        columns[k] = ["" if np.isnan(row) else epochs[int(row)] for row in vars(stats)[k]]
    text = csv_table(list(columns), zip(*columns.values(), strict=True))
    _files.write_atomic(args.per_sample, lambda f: f.write(text.encode("utf-8", BYTES)))


def command_fuse(args: argparse.Namespace) -> None:
    """Choose checkpoints and weights on a selection set and write them as a plan.

    Example: fmn-ref fuse probs.npy --labels labels.npy --method auto -o plan.json
    """
    probs = load_epochs(args.probs, args.logits)
    labels = load_labels(args.labels, args.probs)
    correct = load_named(args.correct, "correct")[0] if args.correct else None
    options = options_of(args, "method", "window", "search", "max_members", "max_forward_passes", "folds")
    plan = fuse(probs, labels, correct=correct, sample_weight="balanced" if args.balanced else None, **options)
    plan.save(args.output)
    content = {"output": args.output, "members": plan.members, "weights": plan.weights, "combine": plan.combine}
    content |= {"epochs": plan.epochs} | {"selection_accuracy": plan.accuracy, "method": plan.method}
    content |= {"cv_accuracy": plan.cv_accuracy, "gain_interval": plan.gain_interval}
    print_result(args, content, f"{rounds(plan)}{plan}\nplan written to {args.output}")


def rounds(plan: FusionPlan) -> str:
    """The members of a linear plan in the order of mixing, a line each: epsilon and the accuracy reached."""
    if plan.combine == "geometric" or not plan.members:
        return ""
    lines = [f"{'round':>6} {'epoch' if plan.epochs else 'row':>6} {'eps':>7} {'accuracy':>9}"]
    lines.append(f"{'final':>6} {'':>6} {'':>7} {plan.accuracy[0]:9.4f}")
    for i, ((row, eps), accuracy) in enumerate(zip(plan.members, plan.accuracy[1:], strict=True), 1):
        lines.append(f"{i:6d} {plan.epoch_of(row):6d} {eps:7.4f} {accuracy:9.4f}")
    return "\n".join([*lines, "", ""])


def command_apply(args: argparse.Namespace) -> None:
    """Compute the fused probabilities of other samples.

    Example: fmn-ref apply plan.json test_probs.npy --labels test_labels.npy
    """
    plan = FusionPlan.load(args.plan)
    probs = load_epochs(args.probs, args.logits)
    labels = None
    if args.labels or has_labels(args.probs):
        labels = load_labels(args.labels, args.probs)
        if plan.was_chosen_on(probs, labels) and not args.allow_selection_data:
            reason = "the plan was chosen on these samples, so its accuracy on them is too high"
            raise ValueError(f"{args.probs}: {reason} (--allow-selection-data permits it)")
    fused = plan.apply(probs)
    _files.write_atomic(args.output, lambda f: np.save(f, fused))
    content: dict[str, Any] = {"output": args.output, "shape": list(fused.shape)}
    text = f"fused probabilities {fused.shape} written to {args.output}"
    if labels is not None:
        of_fused, of_final = scores(fused, labels), scores(probs[-1], labels)
        content |= of_fused._asdict() | {f"final_model_{k}": v for k, v in of_final._asdict().items()}
        text += "".join(f"\n{name}: {s}" for name, s in (("fused", of_fused), ("final model alone", of_final)))
    print_result(args, content, text)


def command_compare(args: argparse.Namespace) -> None:
    """Compare the fusion with its controls: choose on one set, score on another.

    Example: fmn-ref compare --select selection.npz --test test.npz
    """
    select, test = load_epochs(args.select, args.logits), load_epochs(args.test, args.logits)
    y = load_labels(args.select_labels, args.select, "--select-labels")
    y_test = load_labels(args.test_labels, args.test, "--test-labels")
    table = compare_probabilities(select, y, test, y_test, **options_of(args, "window", "search", "allow_overlap"))
    text = table.to_json() if args.json else table.to_csv() if args.csv else table.to_markdown()
    print(text.rstrip())


def command_report(args: argparse.Namespace) -> None:
    """Write one HTML file that shows what a run forgot.

    Example: fmn-ref report runs/mine --labels labels.npy --images images.npy
    """
    output = args.output or Path(args.run_dir, "report.html")
    path = write_report(args.run_dir, output, **options_of(args, "labels", "images", "plan", "comparison"))
    size = path.stat().st_size
    print_result(args, {"output": str(output), "bytes": size}, f"report written to {output} ({-(-size // 1000)} kB)")


def command_demo(args: argparse.Namespace) -> None:
    """Train, measure, fuse, distill and compare on scikit-learn's digits (minutes).

    Example: fmn-ref demo --seeds 2
    """
    from . import demo

    if not _stderr.shows():  # no progress bar there: log a line per run
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = Path(args.output)
    results = demo.run_demo(out, args.seeds, args.epochs)
    files = f"report: {out / 'report.md'}   numbers: {out / 'results.json'}"
    tables = f"{demo.accuracy_table(results)}\n{demo.calibration_table(results)}"
    print_result(args, results, f"{tables}\n{files}")


def command_import(args: argparse.Namespace) -> None:
    """Convert the records of another tool to an .npz file for `fmn-ref metric`.

    Example: fmn-ref import cartography training_dynamics -o history.npz
    """
    if args.tool == "lm-eval":
        return print_result(args, *import_answers(args.path, args.output, args.task, args.metric, args.filter))
    if len(args.path) > 1:
        raise ValueError(f"{args.tool}: expected one path, got {len(args.path)}")
    if args.tool == "cartography":
        logits, labels, ids = importers.from_cartography(args.path[0])
        arrays: dict[str, Any] = {"scores": logits, "labels": labels}
    else:
        correct, indices = importers.from_toneva(args.path[0])
        arrays, ids = {"correct": correct}, list(map(str, indices))
    arrays["sample_ids"] = id_array(ids)
    _files.write_atomic(args.output, lambda f: np.savez(f, **arrays))
    shapes = {name: list(a.shape) for name, a in arrays.items()}
    text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    print_result(args, {"output": args.output, **shapes}, f"{args.output}: {text}")


def command_bench(args: argparse.Namespace) -> None:
    """Time the kernels, the searches or the training loop, or repeat an experiment.

    Example: fmn-ref bench metric -o results
    """
    if args.suite in ("paper", "descent") and not args.data:
        raise ValueError(f"--data: bench {args.suite} needs the folder with the data sets")
    name, call = SUITES[args.suite]
    module = importlib.import_module(f"fmn_ref.benchmarks.{name}")
    result = call(module.benchmark, args)
    if isinstance(result, str):  # already Markdown
        return print(result.rstrip())
    print_result(args, result, module.markdown(result).rstrip())


def options_of(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that a function takes under the same names."""
    return {name: vars(args)[name] for name in names}


def print_result(args: argparse.Namespace, content: dict[str, Any], text: str) -> None:
    print(json.dumps(content, indent=1) if args.json else text)


def demo_options(add: Add) -> None:
    add("-o", "--output", default="runs/demo", help="folder (default runs/demo); finished runs are reused")
    add("--seeds", type=int, default=5, help="runs per noise rate (default 5)")
    add("--epochs", type=int, default=40, help="epochs of each run (default 40)")


def metric_options(add: Add) -> None:
    add("file", help="run directory, .fmnh history, or .npy or .npz file with correctness, predictions or scores")
    add("--labels", help=f"{LABELS}; needed for predictions and scores{BESIDE}predictions")
    add("--reference", type=int, default=-1, help="row to compare each epoch with (default: the last)")
    never = "forgetting events of a sample that was never right, as that project counts them (default nan)"
    add("--never-learned", choices=NEVER_LEARNED, default="nan", help=never)
    add("--per-sample", metavar="CSV", help="also write a table with a row per sample to this file")
    add("--ids", help="text file with one sample id per line, for --per-sample")
    add("--csv", action="store_true", help="print CSV")
    add("--no-verify", action="store_true", help="skip the CRC-32 check of a history, which reads it once more")


def bench_options(add: Add) -> None:
    suites = "metric: kernels; fusion: searches; training: training loop; the others: experiments"
    add("suite", choices=list(SUITES), help=suites)
    add("--epochs", type=int, default=200, help="metric: epochs of the large matrix (default 200)")
    add("--samples", type=int, default=1_281_167, help="metric: its samples (default 1281167)")
    scales = "paper: cpu takes 5 hours on two cores, middle two days, gpu hours on a GPU (default cpu)"
    add("--scale", choices=["cpu", "middle", "gpu"], default="cpu", help=scales)
    folders = "mnist/, cifar-100-binary/, cifar-100n/, tiny-imagenet-200/"
    add("--data", help=f"paper, descent, training: folder that contains {folders}")
    device = "device (default: training: cuda if available; paper: cuda at scale gpu, else cpu)"
    add("--device", choices=["cpu", "cuda"], help=f"training, paper: {device}")
    add("--only", default="", help="paper: regular expression; run only the pieces whose names match")
    add("--jobs", type=int, default=1, help="paper: pieces to run at the same time (default 1)")
    add("--seeds", type=int, default=3, help="paper, descent: seeds per setting (default 3)")
    add("--clean", action="store_true", help="paper: delete the checkpoints of finished pieces")
    add("-o", "--output", help="folder for the results; paper resumes from it")


def window_options(add: Add) -> None:
    add("--logits", action="store_true", help=LOGITS)
    add("--window", type=int, default=1, help="half width of the window around a member (default 1)")
    search = "search for epsilon among 101 values (grid, the default) or in the whole interval [0, 1] (exact)"
    add("--search", choices=["grid", "exact"], default="grid", help=search)


def fuse_options(add: Add) -> None:
    add("probs", help=PROBS)
    add("--labels", help=f"{LABELS}{BESIDE}probabilities")
    add("--correct", help="correctness of the same samples, .fmnh or .npy: forget then reads only the chosen epochs")
    add("--method", choices=method_names(), default="forget", help="how epochs are chosen (default forget)")
    add("--max-members", type=int, help="most members (default: ten for pool, else no bound)")
    add("--max-forward-passes", type=int, help="most checkpoints that one prediction may evaluate")
    add("--folds", type=int, help="folds of the cross-validation that estimates the plan's gain (default 5; 0: none)")
    add("--balanced", action="store_true", help="maximise balanced accuracy: every class has the same weight")
    add("-o", "--output", default="plan.json", help="plan to write (default plan.json)")
    window_options(add)


def import_options(add: Add) -> None:
    add("tool", choices=["cartography", "toneva", "lm-eval"], help="the tool that wrote the records")
    formats = "dynamics_epoch_*.jsonl (cartography), or with samples_*.jsonl: one per checkpoint (lm-eval)"
    add("path", nargs="+", help=f"file of pickled example statistics (toneva); folder with {formats}")
    for name, what in {"task": "name or pattern", "metric": "such as acc", "filter": "such as strict-match"}.items():
        add(f"--{name}", help=f"lm-eval: {name}, {what}")
    add("-o", "--output", default="history.npz", help="file to write (default history.npz)")


def apply_options(add: Add) -> None:
    add("plan", help="plan.json, as fuse wrote it")
    add("probs", help=PROBS)
    add("--labels", help=f"{LABELS}: print accuracy, NLL and calibration error too")
    add("-o", "--output", default="fused.npy", help="file to write (default fused.npy)")
    add("--logits", action="store_true", help=LOGITS)
    add("--allow-selection-data", action="store_true", help="print the accuracy on the samples that chose the plan")


def compare_options(add: Add) -> None:
    for name, what in (("select", "samples to choose on"), ("test", "samples to score on")):
        add(f"--{name}", required=True, help=f"{what}: {PROBS}")
        add(f"--{name}-labels", help=f"{LABELS}{BESIDE}probabilities")
    add("--csv", action="store_true", help="print CSV")
    add("--allow-overlap", action="store_true", help="permit test samples that are in the selection set")
    window_options(add)


def report_options(add: Add) -> None:
    add("run_dir", help="run directory")
    add("--labels", help=f"{LABELS}: show the classes of the recorded samples")
    shapes = "(n_samples, h, w), (n_samples, h, w, c) or (n_samples, c, h, w), uint8 or floats"
    add("--images", help=f"pictures of the recorded samples, {shapes}: an .npy file, or an .npz file with 'images'")
    add("--plan", help="plan.json (default: the one in the run directory)")
    add("--comparison", help="output of `fmn-ref compare --json` (default: the run directory's comparison.json)")
    add("-o", "--output", help="file to write (default: report.html in the run directory)")


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], Callable[[Add], None]]] = {
    "demo": (command_demo, demo_options),
    "info": (command_info, lambda add: None),
    "metric": (command_metric, metric_options),
    "bench": (command_bench, bench_options),
    "fuse": (command_fuse, fuse_options),
    "import": (command_import, import_options),
    "apply": (command_apply, apply_options),
    "compare": (command_compare, compare_options),
    "report": (command_report, report_options),
}


def parser() -> argparse.ArgumentParser:
    purpose = "Measure what a network forgot during training, and recover it from its checkpoints."
    p = argparse.ArgumentParser("fmn-ref", description=purpose)
    p.add_argument("--version", action="version", version=__version__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_options) in COMMANDS.items():
        summary, _, example = (run.__doc__ or "").partition("\n\n")
        c = commands.add_parser(name, help=summary, description=summary, epilog=example.strip())
        c.set_defaults(run=run)
        c.add_argument("--json", action="store_true", help="print JSON")
        add_options(c.add_argument)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        check_outputs(vars(args))
        args.run(args)
        _files.flush_output()
    except KeyboardInterrupt:
        _stderr.say("fmn-ref: interrupted" + "; run it again to continue" * (args.command == "demo"))
        return 130
    except Exception as error:  # whatever fails is told in one line
        with contextlib.suppress(OSError):
            _files.flush_output()
        _stderr.say(f"fmn-ref: error: {error_line(error, vars(args))}")
        return 1
    return 0
