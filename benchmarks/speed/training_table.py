"""The tables of `fmn-ref bench training`, from its JSON."""

from __future__ import annotations

import json
import statistics
from typing import Any

PROGRAMS = {"plain": "plain loop", "recorded": "fmn.train"}
INTRO = """\
Images/s of whole epochs: training, validation, and what is written. Plain: the loop that everybody writes, with a
DataLoader, `.item()` for every batch, `torch.save` every epoch. Step alone: the training step on one batch that stays
on the device. Recording: what history, checkpoints and the state to resume from add, as a share of the epoch. Ratios
are of times; median (least to most) over repetitions, in each of which the programs ran one after the other.
"""


def markdown(result: dict[str, Any]) -> str:
    e, d = result["evaluation"], result["distillation"]
    parts = [
        "# Speed of training, evaluation and distillation",
        f"`{result['command']}`\n\n{INTRO}",
        table(
            "data | network | batch | augmented | bf16 | compile | plain | fmn.train | step alone | "
            "plain / fmn.train | recording",
            [training_row(r) for r in result["training"]],
            6,
        ),
        f"Nine checkpoints ({e['network']}) on {e['n_test']} images, from the files to probabilities.",
        table(
            "way | seconds | relative to the plain loop",
            [
                [name, f"{statistics.median(times):.3f}", ratio(e["relative"][name])]
                for name, times in e["seconds"].items()
            ],
        ),
        f"Distillation ({d['network']}, {d['n_train']} images, batch {d['batch_size']}), recorded as `fmn.train` is; "
        "relative to its epoch with the same augmentation. Caches are filled, by nine members, before the first epoch.",
        table(
            "way | seconds an epoch | relative to train | seconds before the first epoch",
            [
                [name, f"{s:.3f}", ratio(d["relative"][name]), f"{d['before_the_first_epoch'][name]:.2f}"]
                for name, s in d["epoch"].items()
            ],
        ),
        "Memory of a process that trains for two epochs, MiB.",
        table(
            "program | before | at most | of the GPU at most",
            [
                [PROGRAMS[r["program"]], f"{r['before_mib']:.0f}", f"{r['peak_mib']:.0f}", whole(r["gpu_mib"])]
                for r in result["memory"]
            ],
        ),
        "Test accuracy after the last epoch in %, mean and standard error over seeds.",
        table(
            "data | seeds | plain | fmn.train | difference",
            [
                [r["dataset"], str(len(r["accuracies"]["plain"])), *map(percent, r["mean_and_error"].values())]
                for r in result["accuracy"]
            ],
        ),
        f"Machine: {json.dumps(result['machine'])}\n",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def training_row(r: dict[str, Any]) -> list[str]:
    options = [r["dataset"], r["network"], str(r["batch_size"])]
    options += ["yes" if r[name] else "no" for name in ("augmented", "amp")]
    speeds = [f"{r['images_per_second'][name]:.0f}" for name in ("plain", "recorded", "step_alone")]
    recording = f"{1 - r['relative']['unrecorded']['median']:.1%}"
    return [*options, r["compile"], *speeds, ratio(r["relative"]["plain"]), recording]


def table(head: str, rows: list[list[str]], n_text: int = 1) -> str:
    """The first `n_text` columns are text, the others numbers."""
    n = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * n_text + "--:|" * (n - n_text)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def ratio(r: dict[str, float]) -> str:
    return f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"


def whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def percent(mean_and_error: list[float]) -> str:
    mean, error = mean_and_error
    return f"{100 * mean:.2f} ± {100 * error:.2f}"
