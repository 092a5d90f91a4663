"""The tables of `fmn-ref bench training`, from its result."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from fmn_ref.reporting.tables import markdown_table

PROGRAMS = {"plain": "plain loop", "recorded": "fmn.train"}
INTRO = """\
Images per second of whole epochs, with training, validation and writing.

- plain: the loop that a user would write, with a DataLoader, `.item()` for every batch and `torch.save` every epoch.
- step alone: the training step on one batch that stays on the device, an upper bound.
- share of a step: the rate of fmn.train without recording, relative to the step alone.
- recording: share of the epoch that history, checkpoints and resume files take.

Ratios are ratios of times: the median over the repetitions, with the lowest and the highest. In each repetition the
programs run one after the other.
"""
EVALUATION = "Nine checkpoints ({network}) on {n_test} images, from the files to probabilities."
DISTILLATION = """\
Distillation ({network}, {n_train} images, batch {batch_size}), recorded like `fmn.train`, whose epoch with the same
augmentation is the base of the ratios. Nine members fill the caches before the first epoch.
"""


def markdown(result: dict[str, Any]) -> str:
    """The tables of all parts that were measured."""
    sections: dict[str, tuple[str, Callable[[Any], str]]] = {
        "training": (INTRO, _training_table),
        "evaluation": (EVALUATION, _evaluation_table),
        "distillation": (DISTILLATION, _distillation_table),
        "memory": ("Memory of a process that trains for two epochs, in MiB.", _memory_table),
        "accuracy": (
            "Test accuracy after the last epoch in %, mean ± standard error over the seeds.",
            _test_accuracy_table,
        ),
    }
    parts = ["# Speed of training, evaluation and distillation", f"`{result['command']}`"]
    for name, (intro, table) in sections.items():
        if name in result:
            of = result[name]
            parts += [intro.format(**of) if isinstance(of, dict) else intro, table(of)]
    parts.append(f"Machine: {json.dumps(result['machine'])}")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _training_table(rows: list[dict[str, Any]]) -> str:
    options = ["data", "network", "batch", "augmented", "bf16", "compile"]
    columns = [*options, "plain", "fmn.train", "step alone", "share of a step", "plain / fmn.train", "recording"]
    return markdown_table(columns, map(_training_row, rows), len(options))


def _training_row(r: dict[str, Any]) -> list[str]:
    options = [r["dataset"], r["network"], str(r["batch_size"])]
    options += ["yes" if r[name] else "no" for name in ("augmented", "amp")]
    speeds = [f"{r['images_per_second'][name]:.0f}" for name in ("plain", "recorded", "step_alone")]
    speeds.append(f"{r['images_per_second']['unrecorded'] / r['images_per_second']['step_alone']:.0%}")
    recording = f"{1 - r['relative']['unrecorded']['median']:.1%}"
    return [*options, r["compile"], *speeds, _ratio_text(r["relative"]["plain"]), recording]


def _evaluation_table(e: dict[str, Any]) -> str:
    rows = [
        [name, f"{statistics.median(times):.3f}", _ratio_text(e["relative"][name])]
        for name, times in e["seconds"].items()
    ]
    return markdown_table(["way", "seconds", "relative to the plain loop"], rows)


def _distillation_table(d: dict[str, Any]) -> str:
    rows = [
        [name, f"{seconds:.3f}", _ratio_text(d["relative"][name]), f"{d['before_the_first_epoch'][name]:.2f}"]
        for name, seconds in d["epoch"].items()
    ]
    return markdown_table(["way", "seconds per epoch", "relative to train", "seconds before the first epoch"], rows)


def _memory_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            PROGRAMS[r["program"]],
            f"{r['before_mib']:.0f}",
            f"{r['peak_mib']:.0f}",
            "" if r["gpu_mib"] is None else f"{r['gpu_mib']:.0f}",
        ]
        for r in rows
    ]
    return markdown_table(["program", "before", "peak", "peak on the GPU"], cells)


def _test_accuracy_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [r["dataset"], str(len(r["accuracies"]["plain"])), *map(_percent_text, r["mean_and_error"].values())]
        for r in rows
    ]
    return markdown_table(["data", "seeds", "plain", "fmn.train", "difference"], cells)


def _ratio_text(r: dict[str, float]) -> str:
    return f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"


def _percent_text(mean_and_error: list[float]) -> str:
    mean, error = mean_and_error
    return f"{100 * mean:.2f} ± {100 * error:.2f}"
