"""Arguments of the command line: a parser that suggests, the options of each command, and objects by their names."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from .fusion.methods import method_names
from .metrics.samples import NEVER_LEARNED

PROBS = (
    "probabilities (n_epochs, n_samples, n_classes): an .npy file; an .npz file with 'probs', and optionally 'labels'; "
    "or a folder with one .npy file (n_samples, n_classes) per epoch, ordered by the numbers in the file names"
)
BESIDE = "; default: 'labels' in the .npz file with the "
LABELS = "true classes (n_samples,): an .npy file, or an .npz file with 'labels'"
LOGITS = "the files contain logits: apply softmax"
Add = Callable[..., object]  # ArgumentParser.add_argument


class Parser(argparse.ArgumentParser):
    """Parser whose errors show the usage of the command in question, and suggest a name like a misspelt one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse unknown arguments here: the outer parser would refuse those of a command, with its own usage."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            wrong = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_suggestion(wrong[0], options) if wrong else ''}")
        return known, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _suggestion(str(value), map(str, action.choices or ()))
            raise


def _suggestion(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(names), 1)
    return f"; did you mean {near[0]}?" if near else ""


def named_object(text: str, option: str) -> Any:
    """Return the object that "module:name" names; the module may lie in the current folder."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise ValueError(f"{option}: expected module:function, got {text!r}")
    if module.endswith(".py"):
        raise ValueError(f"{option}: expected a module, {module[:-3].replace('/', '.')}:{name}, got the file {module}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option}: {error}") from error


def called(text: str, option: str) -> Any:
    """Return what the function "module:name" returns, or the object itself if it is a network or data."""
    found = named_object(text, option)
    is_maker = inspect.isfunction(found) or inspect.isclass(found) or isinstance(found, functools.partial)
    if not is_maker:
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(f"{option}: {text} is called without arguments; {error}") from None
    return found()


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
    add("--all", action="store_true", help="print every epoch of a long history; --csv and --json always do")
    add("--no-plot", action="store_true", help="draw no curves; they are drawn only to a terminal")
    add("--no-verify", action="store_true", help="skip the CRC-32 check of a history, which reads it once more")


def bench_options(suites: list[str], add: Add) -> None:
    what = "metric: kernels; fusion: searches; scale: cost by size; training: training loop; the others: experiments"
    add("suite", choices=suites, help=what)
    add("--epochs", type=int, default=200, help="metric: epochs of the large matrix (default 200)")
    add("--samples", type=int, default=1_281_167, help="metric: its samples (default 1281167)")
    scales = "paper: cpu takes 5 hours on two cores, middle two days, gpu hours on a GPU (default cpu)"
    add("--scale", choices=["cpu", "middle", "gpu"], default="cpu", help=scales)
    folders = "mnist/, cifar-100-binary/, cifar-100n/, tiny-imagenet-200/"
    add("--data", help=f"paper, descent, training: folder that contains {folders}")
    device = "training: default cuda if available; paper: default cuda at scale gpu, else cpu"
    add("--device", choices=["cpu", "cuda"], help=f"metric: time torch tensors of this device; {device}")
    add("--only", default="", help="scale, training, paper: regular expression; run only the pieces whose names match")
    add("--quick", action="store_true", help="training, paper: few images or epochs, to try it")
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


def predict_options(add: Add) -> None:
    add("run_dir", help="run directory")
    maker = {"required": True, "metavar": "MODULE:FUNCTION"}
    network = "function that returns the run's network, or the network; MODULE may be a .py file of the current folder"
    add("--model", **maker, help=network)
    add("--data", **maker, help="function that returns (inputs, labels), a Dataset or a DataLoader, or one of these")
    add("--forward-fn", metavar="MODULE:FUNCTION", help="function (model, batch) -> (logits, labels)")
    add("--batch-size", type=int, default=256, help="samples at a time (default 256)")
    add("--amp", action="store_true", help="evaluate in bfloat16")
    output = "file to write: .npz with 'probs', 'labels' and 'epochs', or .npy of 'probs' alone (default probs.npz)"
    add("-o", "--output", default="probs.npz", help=output)


def report_options(add: Add) -> None:
    add("run_dir", help="run directory")
    add("--labels", help=f"{LABELS}: show the classes of the recorded samples")
    add("--class-names", help="text file with one class name per line, for classes 0, 1, ...; needs --labels")
    shapes = "(n_samples, h, w), (n_samples, h, w, c) or (n_samples, c, h, w), uint8 or floats"
    add("--images", help=f"pictures of the recorded samples, {shapes}: an .npy file, or an .npz file with 'images'")
    add("--plan", help="plan.json (default: the one in the run directory)")
    add("--comparison", help="output of `fmn-ref compare --json` (default: the run directory's comparison.json)")
    add("-o", "--output", help="file to write (default: report.html in the run directory)")
