"""The command `fmn-ref`: measure, fuse and compare from files, without writing Python.

Exit status: 0 for success, 1 for wrong input or a failed read or write (one line on stderr), 2 for wrong usage, 130
after an interrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, _arguments, _check, _files, _stderr, cli_import
from .fusion.expectation import expected_gain
from .fusion.fuse import fuse
from .fusion.plan import FusionPlan
from .kernels.backend import backend
from .metrics.overview import curves_and_forgotten, first_samples
from .metrics.samples import sample_statistics
from .metrics.scores import scores
from .reporting import terminal
from .reporting.comparison import compare_probabilities
from .reporting.graded import answers_summary
from .reporting.report import write_report
from .reporting.tables import csv_table
from .runs.arrays import write_epochs
from .runs.load import (
    check_outputs,
    error_line,
    has_labels,
    load_correct,
    load_epoch_numbers,
    load_epochs,
    load_labels,
    load_named,
)
from .runs.run import Run
from .runs.text import BYTES, read_ids

# Each benchmark: its module under fmn_ref.benchmarks, and how to call its function `benchmark`.
SUITES: dict[str, tuple[str, Callable[[Any, argparse.Namespace], Any]]] = {
    "metric": ("speed.metric", lambda run, a: run(a.epochs, a.samples, a.output, a.device)),
    "fusion": ("speed.fusion", lambda run, a: run(a.output)),
    "scale": ("speed.scale", lambda run, a: run(a.output, a.only)),
    "training": ("speed.training", lambda run, a: run(a.data, a.output, a.quick, a.device, a.only)),
    "paper": (
        "experiments.suite",
        lambda run, a: run(
            a.scale, a.data, a.output or f"runs/paper_{a.scale}", a.only, a.jobs, a.seeds, a.clean, a.device, a.quick
        ),
    ),
    "descent": ("experiments.double_descent", lambda run, a: run(a.data, a.output, a.seeds)),
    "boosting": ("experiments.boosting", lambda run, a: run(a.output)),
}


def command_info(args: argparse.Namespace) -> None:
    """Show which kernels are in use, and why.

    Example: FMN_BACKEND=numpy fmn-ref info
    """
    b = backend()
    text = f"fmn_ref {__version__}\nbackend {b.name} ({b.reason})\ninstruction set {b.instruction_set}\n"
    print_result(args, {"version": __version__, **b._asdict()}, f"{text}threads {b.threads}")


def command_metric(args: argparse.Namespace) -> None:
    """Print accuracy, forget fraction and learned fraction per epoch.

    Example: fmn-ref metric runs/mine
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
    text = terminal.metric_text(columns, summary, epochs[args.reference], args.all)
    if sys.stdout.isatty() and not args.no_plot:
        text = f"{terminal.curves_text(columns, summary, *terminal_form())}\n{text}"
    print_result(args, {**summary, **columns}, text)


def terminal_form() -> tuple[int, bool]:
    """Width of the terminal, and whether standard output can show braille."""
    encoded = "\u28ff".encode(sys.stdout.encoding or "ascii", "ignore")
    return shutil.get_terminal_size().columns, bool(encoded)


def write_per_sample(args: argparse.Namespace, correct: Any, epochs: list[int]) -> None:
    stats = sample_statistics(correct, never_learned=args.never_learned, progress=True)
    n = stats.counts.shape[1]
    names = list(range(n)) if args.ids is None else read_ids(args.ids)
    if len(names) != n:
        raise ValueError(f"{args.ids}: expected {n} lines, one id per sample, got {len(names)}")
    table = stats.columns()
    columns = {"sample_id": names, **{k: v.tolist() for k, v in table.items()}}
    for k in ("first_learned", "last_correct"):  # from rows of the matrix to epochs; empty for never
        columns[k] = ["" if np.isnan(row) else epochs[int(row)] for row in table[k]]
    text = csv_table(list(columns), zip(*columns.values(), strict=True))
    _files.write_bytes(args.per_sample, text.encode("utf-8", BYTES))


def command_fuse(args: argparse.Namespace) -> None:
    """Choose checkpoints and weights on a selection set and write them as a plan.

    Example: fmn-ref fuse select.npz --method pool
    Example: fmn-ref fuse probs.npy --labels labels.npy --method auto -o plan.json
    """
    probs = load_epochs(args.probs, args.logits)
    labels = load_labels(args.labels, args.probs)
    correct = load_named(args.correct, "correct")[0] if args.correct else None
    options = options_of(args, "method", "window", "search", "max_members", "max_forward_passes", "folds")
    plan = fuse(probs, labels, correct=correct, sample_weight="balanced" if args.balanced else None, **options)
    plan = replace(plan, epochs=plan.epochs or load_epoch_numbers(args.probs, len(probs)))
    plan.save(args.output)
    content = {"output": args.output, "members": plan.members, "weights": plan.weights, "combine": plan.combine}
    content |= {"epochs": plan.epochs} | {"selection_accuracy": plan.accuracy, "method": plan.method}
    content |= {"cv_accuracy": plan.cv_accuracy, "gain_interval": plan.gain_interval}
    print_result(args, content, f"{terminal.rounds(plan)}{plan}\nplan written to {args.output}")


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


def command_predict(args: argparse.Namespace) -> None:
    """Predict data with every checkpoint of a run, for fuse, apply, compare and metric.

    Example: fmn-ref predict runs/mine --model train:make_model --data train:test_data -o test.npz
    """
    from .training.data import check_module

    whole = Run.open(args.run_dir)
    forward_fn = _arguments.named_object(args.forward_fn, "--forward-fn") if args.forward_fn else None
    model = _arguments.called(args.model, "--model")
    check_module(model, f"--model: {args.model}")
    run = Run.open(args.run_dir, model, forward_fn).kept
    probs = run.probabilities(_arguments.called(args.data, "--data"), batch_size=args.batch_size, amp=args.amp)
    others = {"epochs": np.array(run.history.epochs)}
    bar = _stderr.progress_bar(probs, "predicting")
    shape = write_epochs(args.output, bar, lambda: {"labels": probs.labels, **others})
    n, epochs = len(whole.history), list(run.history.epochs)
    text = f"probabilities {shape} written to {args.output}"
    text += f"; {len(epochs)} of {n} epochs have a checkpoint: {epochs}" * (len(epochs) < n)
    print_result(args, {"output": args.output, "shape": list(shape), "epochs": epochs}, text)


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
    path = write_report(
        args.run_dir, output, **options_of(args, "labels", "images", "plan", "comparison", "class_names")
    )
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
    files = f"report: {out / 'report.md'}   one run: {out / 'report.html'}   numbers: {out / 'results.json'}"
    tables = f"{demo.accuracy_table(results)}\n{demo.calibration_table(results)}"
    print_result(args, results, f"{tables}\n{files}")


def command_import(args: argparse.Namespace) -> None:
    """Make a run of saved checkpoints, or convert the records of another tool, for `fmn-ref metric`.

    Example: fmn-ref import checkpoints runs/old --model mine:make_model --data mine:validation_data -o runs/imported
    """
    print_result(args, *cli_import.import_records(args))


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
    print(json.dumps(content, indent=1) if args.json else _stderr.printable(text))


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], Callable[[_arguments.Add], None]]] = {
    "demo": (command_demo, _arguments.demo_options),
    "info": (command_info, lambda add: None),
    "metric": (command_metric, _arguments.metric_options),
    "bench": (command_bench, partial(_arguments.bench_options, list(SUITES))),
    "predict": (command_predict, _arguments.predict_options),
    "fuse": (command_fuse, _arguments.fuse_options),
    "import": (command_import, cli_import.import_options),
    "apply": (command_apply, _arguments.apply_options),
    "compare": (command_compare, _arguments.compare_options),
    "report": (command_report, _arguments.report_options),
}


def parser() -> argparse.ArgumentParser:
    purpose = "Measure what a network forgot during training, and recover it from its checkpoints."
    p = _arguments.Parser("fmn-ref", description=purpose)
    p.add_argument("--version", action="version", version=__version__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_options) in COMMANDS.items():
        summary, _, examples = (inspect.getdoc(run) or "").partition("\n\n")
        lines = argparse.RawDescriptionHelpFormatter
        c = commands.add_parser(name, help=summary, description=summary, epilog=examples, formatter_class=lines)
        c.set_defaults(run=run, usage_error=c.error)
        c.add_argument("--json", action="store_true", help="print JSON")
        add_options(c.add_argument)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        check_outputs(vars(args))
        with _check.naming_packages(f"fmn-ref {args.command}"):
            args.run(args)
        _files.flush_output()
    except KeyboardInterrupt:
        _stderr.say("fmn-ref: interrupted" + "; run it again to continue" * (args.command in ("demo", "import")))
        return 130
    except Exception as error:  # whatever fails is told in one line
        with contextlib.suppress(OSError):
            _files.flush_output()
        _stderr.say(f"fmn-ref: error: {error_line(error, vars(args))}")
        return 1
    return 0
