"""Tables of graded answers for the command line: curves over the checkpoints, and temporal forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _files
from ..metrics.answers import expected_curves, temporal_forgetting
from ..runs.arrays import differing_numbers
from ..runs.lm_eval import from_lm_eval
from ..runs.text import id_array


def import_answers(
    folders: Sequence[str | Path], output: str | Path, task: str | None, metric: str | None, filter_name: str | None
) -> tuple[dict[str, Any], str]:
    """Write the answers of `from_lm_eval` to an .npz file; return what was found as a dict and as text."""
    graded = from_lm_eval(folders, task=task, metric=metric, filter=filter_name)
    one = graded.correct.shape[2] == 1
    arrays: dict[str, Any] = {"correct": graded.correct[:, :, 0]} if one else {"draws": graded.correct}
    arrays |= {"n_choices": graded.n_choices, "tasks": graded.tasks, "sample_ids": id_array(graded.sample_ids)}
    arrays["checkpoints"] = np.array(graded.checkpoints)
    epochs = differing_numbers(graded.checkpoints)
    if one and epochs and list(epochs) == sorted(set(epochs)):
        arrays["epochs"] = np.array(epochs)
    if graded.answers is not None:
        arrays["answers"] = graded.answers
    _files.write_atomic(output, lambda file: np.savez(file, **arrays))
    tasks = sorted(set(graded.tasks.tolist()))
    content, text = answers_summary(graded.correct, graded.checkpoints, graded.n_choices)
    content = {"output": str(output), "tasks": tasks, **content}
    return content, f"{text}\nanswers to {', '.join(tasks)} written to {output}"


def answers_summary(
    draws: NDArray[Any], checkpoints: Sequence[str] | None = None, n_choices: NDArray[np.int64] | None = None
) -> tuple[dict[str, Any], str]:
    """Expected curves and temporal forgetting of grades (n_checkpoints, n_questions, n_draws), as a dict and as text.

    For multiple choice, F_e and L_e corrected for chance stand beside the observed ones.
    """
    rates, n_draws = draws.mean(-1), draws.shape[2]
    curves = expected_curves(rates, n_draws=n_draws if n_draws > 1 else None)
    columns = {"accuracy": curves.accuracy, "forget_fraction": curves.forget, "learned_fraction": curves.learned}
    columns["retained"] = curves.retained
    titles = ["accuracy", "F_e", "L_e", "retained"]
    if n_choices is not None and n_choices.any():
        by_choices = expected_curves(rates, groups=n_choices)
        forget, learned = by_choices.chance_corrected(by_choices.groups)
        share = (by_choices.n_samples / len(n_choices))[:, None]
        columns["corrected_forget_fraction"] = (share * forget).sum(0)
        columns["corrected_learned_fraction"] = (share * learned).sum(0)
        titles += ["F_e cor.", "L_e cor."]
    names = list(map(str, range(len(draws)))) if checkpoints is None else list(checkpoints)
    temporal = temporal_forgetting(rates)
    content = {"n_questions": draws.shape[1], "n_draws": n_draws, "checkpoints": names}
    content |= {k: v.tolist() for k, v in columns.items()}
    content |= {"ever_correct": temporal.ever_correct, "temporal_forgetting": temporal.score}
    lines = _table(titles, names, list(columns.values()))
    errors = 1 - curves.accuracy[-1]
    lost = f"{temporal.score:.2%} of the questions, of {errors:.2%} final errors"
    lines.append(f"temporal forgetting: {lost}, were answered by an earlier checkpoint")
    if n_draws > 1:
        lines.append("F_e and L_e of the last row compare two draws of that checkpoint: what sampling alone changes")
    lines.append(f"{draws.shape[1]} questions, {n_draws} draw{'s' * (n_draws > 1)} per question and checkpoint")
    return content, "\n".join(lines)


def _table(titles: Sequence[str], names: Sequence[str], columns: Sequence[NDArray[np.float64]]) -> list[str]:
    width = max(map(len, ["checkpoint", *names]))
    lines = [f"{'checkpoint':<{width}} " + " ".join(f"{title:>9}" for title in titles)]
    for name, *values in zip(names, *columns, strict=True):
        lines.append(f"{name:<{width}} " + " ".join(f"{value:9.4f}" for value in values))
    return lines
