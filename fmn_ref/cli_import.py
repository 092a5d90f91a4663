"""The command `fmn-ref import`: a run of checkpoints, or an .npz file of the records of another tool."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _files
from ._arguments import called, named_object
from .metrics.curves import forget_fraction
from .reporting.graded import import_answers
from .runs import importers
from .runs.run import Run
from .runs.text import id_array

Result = tuple[dict[str, Any], str]  # what is printed with --json, and without
_OPTIONS = ("key", "keep_predictions", "batch_size")


def import_options(add: Callable[..., object]) -> None:
    add("tool", choices=["checkpoints", "cartography", "toneva", "lm-eval"], help="what is imported, or its tool")
    formats = "dynamics_epoch_*.jsonl (cartography), or with samples_*.jsonl: one per checkpoint (lm-eval)"
    checkpoints = "folder, or files (checkpoints)"
    add("path", nargs="+", help=f"{checkpoints}; file of pickled example statistics (toneva); folder with {formats}")
    add("-o", "--output", help="checkpoints: run directory, required; else the file to write (default history.npz)")
    add("--model", metavar="MODULE:FUNCTION", help="checkpoints: function that returns the network")
    data = "function that returns labelled data: (inputs, labels), a Dataset or a DataLoader"
    add("--data", metavar="MODULE:FUNCTION", help=f"checkpoints: {data}")
    add("--forward-fn", metavar="MODULE:FUNCTION", help="checkpoints: function (model, batch) -> (logits, labels)")
    add("--key", help="checkpoints: where the weights are in a file, such as model_ema (default: found by their names)")
    add("--copy", action="store_true", help="checkpoints: copy the weights instead of referring to the files")
    add(
        "--keep-predictions",
        action="store_true",
        help="checkpoints: store the probabilities, so that fusing reads them",
    )
    for name, what in {"task": "name or pattern", "metric": "such as acc", "filter": "such as strict-match"}.items():
        add(f"--{name}", help=f"lm-eval: {name}, {what}")
    add("--batch-size", type=int, help="checkpoints: samples at a time (default 256; of Keras: 32)")


def import_records(args: argparse.Namespace) -> Result:
    """Read what `args.tool` wrote at `args.path`, and write it to `args.output`."""
    if args.tool == "checkpoints":
        return _import_checkpoints(args)
    args.output = args.output or "history.npz"
    if args.tool == "lm-eval":
        return import_answers(args.path, args.output, args.task, args.metric, args.filter)
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
    text = f"{args.output}: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
    return {"output": args.output, **shapes}, text


def _import_checkpoints(args: argparse.Namespace) -> Result:
    """Evaluate the checkpoints with the network and the data that the user's functions return."""
    missing = [f"--{name}" for name in ("model", "data", "output") if not vars(args)[name]]
    if missing:
        args.usage_error(f"import checkpoints needs {', '.join(missing)} too")
    model, data = called(args.model, "--model"), called(args.data, "--data")
    source = args.path[0] if len(args.path) == 1 else args.path
    run = (_keras_run if _is_of_keras(model) else _torch_run)(args, source, model, data)
    forget, epochs, accuracy = forget_fraction(run.history), run.history.epochs, float(run.history[-1].mean())
    peak, at = float(forget.max()), epochs[int(forget.argmax())]
    content = {"output": args.output, "epochs": list(epochs), "n_samples": run.history.n_samples}
    content |= {"final_accuracy": accuracy, "peak_forget_fraction": peak, "peak_epoch": at}
    several = f"{len(epochs)} checkpoints, epochs {epochs[0]} to {epochs[-1]}"
    text = f"{args.output}: {several if len(epochs) > 1 else f'1 checkpoint, epoch {epochs[0]}'}, accuracy at the end "
    return content, f"{text}{accuracy:.2%}\npeak forget fraction {peak:.2%} at epoch {at}"


def _torch_run(args: argparse.Namespace, source: Any, model: Any, data: Any) -> Run:
    from .training.existing import from_checkpoints

    options = {name: vars(args)[name] for name in _OPTIONS if vars(args)[name] is not None} | {"link": not args.copy}
    if args.forward_fn:
        options["forward_fn"] = named_object(args.forward_fn, "--forward-fn")
    return from_checkpoints(source, model, data, args.output, **options)


def _is_of_keras(model: Any) -> bool:
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.Model)


def _keras_run(args: argparse.Namespace, source: Any, model: Any, data: Any) -> Run:
    from .integrations.keras_checkpoints import from_checkpoints

    for name in ("key", "copy", "keep_predictions", "forward_fn"):
        if vars(args)[name]:
            raise ValueError(f"--{name.replace('_', '-')}: not for a model of Keras")
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"--data: expected (inputs, labels) for a model of Keras, got {type(data).__name__}")
    x, y = data
    return from_checkpoints(source, model, x, y, args.output, batch_size=args.batch_size)
