"""Read the graded answers that lm-evaluation-harness logs (`lm_eval --log_samples`): samples_TASK_DATE.jsonl files."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _files, _stderr
from .text import natural

# What a line holds beside its metrics; older versions of the harness do not list the metrics.
_KNOWN = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
_KNOWN |= {"doc_hash", "prompt_hash", "target_hash"}
Key = tuple[str, int]  # task and doc_id


class GradedAnswers(NamedTuple):
    """Graded answers of several checkpoints to the same questions.

    Attributes
    ----------
    correct : (n_checkpoints, n_questions, n_draws) bool
        Whether each draw is right. Draws have no order.
    answers : (n_checkpoints, n_questions, n_draws) int64, or None
        A number per answer, the same for the same text and question. None where the files do not tell which text was
        graded as right, and for multiple choice.
    n_choices : (n_questions,) int64
        Options of a multiple-choice question; 0 for an open one.
    tasks : (n_questions,) str
    sample_ids : list of str
        "TASK/doc_id".
    checkpoints : list of str
        Names of their folders.
    """

    correct: NDArray[np.bool_]
    answers: NDArray[np.int64] | None
    n_choices: NDArray[np.int64]
    tasks: NDArray[np.str_]
    sample_ids: list[str]
    checkpoints: list[str]

    @property
    def rates(self) -> NDArray[np.float64]:
        """(n_checkpoints, n_questions): share of the draws that is right."""
        return np.asarray(self.correct.mean(-1))


class _Question(NamedTuple):
    """The draws of one checkpoint for a question."""

    identity: tuple[Any, Any]  # hashes of the document and the target
    n_choices: int
    right: list[bool]
    answers: list[bytes] | None  # digests; None where unknown


def from_lm_eval(
    folders: str | Path | Sequence[str | Path],
    *,
    task: str | None = None,
    metric: str | None = None,
    filter: str | None = None,
) -> GradedAnswers:
    """Read the answers that lm-evaluation-harness graded, one folder per checkpoint.

    Parameters
    ----------
    folders : path or sequence of paths
        Output folders of the checkpoints, or one folder that contains them. Names that differ in numbers only are put
        in the order of these numbers.
    task : str, optional
        A name, or a pattern such as "mmlu_*". Default: all tasks.
    metric : str, optional
        Metric that grades a question: "acc", "exact_match", ... Default: the only one.
    filter : str, optional
        Filter of the answers: "strict-match", ... Default: the only one.

    Returns
    -------
    GradedAnswers
        Draws of a question are the answers that the filter keeps, and those of further runs in the same folder.

    Raises
    ------
    FileNotFoundError
        No samples there.
    ValueError
        A malformed line; runs of several models in a folder; a metric that is not the share of right draws; several
        metrics or filters to choose from; questions or numbers of draws that differ. The message names the file or the
        question.

    Examples
    --------
    >>> graded = from_lm_eval(["out/checkpoint-100", "out/checkpoint-200"])  # doctest: +SKIP
    >>> expected_curves(graded.rates).forget  # doctest: +SKIP
    """
    several = isinstance(folders, Iterable) and not isinstance(folders, str)
    files = _sample_files(folders if several else [folders], "*" if task is None else task)
    tables: dict[str, dict[Key, _Question]] = {}
    for name, paths in _stderr.progress_bar(files.items(), "reading"):
        tables[name] = _read_checkpoint(paths, metric, filter)
        _check_same(tables, name)
    first = next(iter(tables.values()))
    keys = sorted(first, key=lambda key: (natural(key[0]), key[1]))
    columns = [[table[key] for key in keys] for table in tables.values()]
    return GradedAnswers(
        np.array([[question.right for question in column] for column in columns]),
        _numbered([[question.answers for question in column] for column in columns]),
        np.array([first[key].n_choices for key in keys], np.int64),
        np.array([name for name, _ in keys]),
        [f"{name}/{doc_id}" for name, doc_id in keys],
        list(tables),
    )


def _sample_files(folders: Any, task: str) -> dict[str, list[tuple[str, Path]]]:
    """Tasks and paths of each checkpoint's samples, by its name; the checkpoints in their order."""
    found: dict[Path, list[tuple[str, Path]]] = {}
    for folder in folders:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folders: expected paths, got {type(folder).__name__}")
        inside = _samples_below(_files.absolute(folder))
        wanted = {path: name for path, name in inside.items() if fnmatch.fnmatchcase(name, task)}
        if not wanted:
            others = f"task like {task!r}, but {', '.join(sorted(set(inside.values())))}"
            missing = others if inside else "samples_*.jsonl (from lm_eval --log_samples)"
            raise FileNotFoundError(f"{folder}: no {missing} there")
        for parent in dict.fromkeys(path.parent for path in wanted):
            found[parent] = [(name, path) for path, name in wanted.items() if path.parent == parent]
    if not found:
        raise ValueError("folders: expected at least one")
    parents = _ordered(list(found))
    return dict(zip(_names(parents), (found[parent] for parent in parents), strict=True))


def _samples_below(folder: Path) -> dict[Path, str]:
    """Paths of the samples in a folder and below, and their tasks."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    pattern = re.compile(r"samples_(.+?)(_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl")
    matches = {path: pattern.fullmatch(path.name) for path in sorted(paths, key=lambda path: natural(str(path)))}
    return {path: match[1] for path, match in matches.items() if match}


def _ordered(parents: list[Path]) -> list[Path]:
    """Sort among themselves the folders whose names differ in numbers only: a shell puts 1000 before 200."""
    frames = [re.sub(r"\d+", "\0", str(parent)) for parent in parents]  # no name holds \0
    of_frame: dict[str, list[Path]] = {frame: [] for frame in frames}
    for parent, frame in zip(parents, frames, strict=True):
        of_frame[frame].append(parent)
    in_order = {f: iter(sorted(like, key=lambda parent: natural(str(parent)))) for f, like in of_frame.items()}
    return [next(in_order[frame]) for frame in frames]


def _names(parents: list[Path]) -> list[str]:
    """The shortest of: first part below the common folder, all parts below it."""
    if len(parents) == 1:
        return [parents[0].name]
    common = os.path.commonpath(parents)
    below = [p.relative_to(common) for p in parents]
    first = [p.parts[0] if p.parts else "." for p in below]
    return first if len(set(first)) == len(first) else [p.as_posix() for p in below]


def _check_one_model(paths: Sequence[Path]) -> None:
    """A ValueError if the runs in a folder are not of one model: the harness names the folder without the revision."""
    beside = {path.with_name(f"results_{path.stem.rpartition('_')[2]}.json") for path in paths}
    models = {}
    for path in sorted(filter(Path.is_file, beside)) if len(beside) > 1 else ():
        with _files.reading(path, "results of lm_eval") as file:
            models[path.name] = _without_seed(json.load(file).get("config", {}).get("model_args"))
    if len(set(models.values())) > 1:
        several = "; ".join(f"{name}: {model}" for name, model in models.items())
        raise ValueError(f"{paths[0].parent}: expected one model, give each its own --output_path ({several})")


def _without_seed(model_args: Any) -> str:
    """The arguments of a model, a text or a dict, without the seed: draws differ in it."""
    args = [f"{k}={v}" for k, v in model_args.items()] if isinstance(model_args, dict) else str(model_args).split(",")
    return ",".join(arg for arg in args if not arg.startswith("seed="))


def _read_checkpoint(
    files: Sequence[tuple[str, Path]], metric: str | None, filter_name: str | None
) -> dict[Key, _Question]:
    _check_one_model([path for _, path in files])
    questions: dict[Key, _Question] = {}
    for task, path in files:
        for doc_id, new in _read_samples(path, metric, filter_name).items():
            old = questions.get((task, doc_id), new._replace(right=[], answers=[]))
            if old[:2] != new[:2]:
                raise ValueError(f"{path}: question {doc_id} is not the same as in the other runs of the folder")
            known = old.answers is not None and new.answers is not None
            answers = [*(old.answers or ()), *(new.answers or ())] if known else None
            questions[task, doc_id] = new._replace(right=old.right + new.right, answers=answers)
    return questions


def _read_samples(path: Path, metric: str | None, filter_name: str | None) -> dict[int, _Question]:
    """The questions of a file, for one filter."""
    by_filter: dict[str, dict[int, _Question]] = {}
    with _files.opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = json.loads(raw)
                name = line.get("filter", "none")
                of_filter = by_filter.setdefault(name, {})
                if filter_name in (None, name):
                    doc_id = line["doc_id"]
                    if type(doc_id) is not int or doc_id in of_filter:
                        raise ValueError(f"expected an integer as doc_id, each once, got {doc_id!r:.40}")
                    of_filter[doc_id] = _question(line, metric)
            except Exception as error:  # a line from a stranger may fail in any way
                reason = f"missing {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}:{number}: not a graded answer ({reason})") from None
    if not by_filter:
        raise ValueError(f"{path}: expected at least one line")
    return by_filter[_choice(filter_name, list(by_filter), f"{path}: filter")]


def _choice(wanted: str | None, known: list[str], what: str) -> str:
    """The wanted one of the known names, or the only one."""
    if wanted in known or (wanted is None and len(known) == 1):
        return wanted or known[0]
    raise ValueError(f"{what}: choose one of {', '.join(map(repr, known))}, got {wanted!r}")


def _question(line: dict[str, Any], metric: str | None) -> _Question:
    """The graded answer in a line."""
    name = _choice(metric, line.get("metrics") or [name for name in line if name not in _KNOWN], "metric")
    if re.fullmatch(r"pass@(?!1$)\d+", name):
        raise ValueError(f"metric: {name} is not the share of right draws; take pass@1")
    asked = [_values(request) for request in _values(line["arguments"])]
    kept = line["filtered_resps"][0]
    generated = isinstance(asked[0][1], dict)  # its second argument: settings of the generation, or a continuation
    texts = (kept if isinstance(kept, list) else [kept]) if generated else None
    right, known = _grades(line[name], texts, line["target"])
    answers = [_digest(text) for text in texts] if texts is not None and known else None
    n_choices = len(asked) // (2 if "acc_mutual_info" in line else 1)  # that metric asks twice about each option
    identity = line.get("doc_hash"), line.get("target_hash")
    return _Question(identity, 0 if generated or n_choices == 1 else n_choices, right, answers)


def _digest(text: Any) -> bytes:
    return hashlib.blake2b(str(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _values(arguments: Any) -> list[Any]:
    return list(arguments.values()) if isinstance(arguments, dict) else arguments


def _grades(value: Any, texts: list[Any] | None, target: Any) -> tuple[list[bool], bool]:
    """Read which draws are right, if it is known which: the harness logs the share of the draws, or a list."""
    if isinstance(value, list):
        if not value or not all(type(v) in (bool, int, float) and v in (0, 1) for v in value):
            raise ValueError(f"expected grades 0 and 1, got {value!r:.40}")
        return [v == 1 for v in value], texts is not None and len(texts) == len(value)
    n = 1 if texts is None else len(texts)
    share = type(value) in (bool, int, float) and 0 <= value <= 1
    if n == 0 or not share or abs(value * n - round(value * n)) > 1e-6:
        raise ValueError(f"expected the share of {n} draws that is right, got {value!r:.40}")
    n_right = round(value * n)
    if n > 1 and texts is not None:
        equal = [str(text) == target for text in texts]
        if sum(equal) == n_right:
            return equal, True
    return [True] * n_right + [False] * (n - n_right), n_right in (0, n)


def _check_same(tables: dict[str, dict[Key, _Question]], name: str) -> None:
    """A ValueError unless the checkpoint has the questions of the first one, and as many draws of each."""
    first_name, first = next(iter(tables.items()))
    table = tables[name]
    for task, doc_id in sorted(first.keys() ^ table.keys())[:1]:
        lacks = name if (task, doc_id) in first else first_name
        raise ValueError(f"{lacks}: no answer to question {task}/{doc_id}; the other checkpoints have one")
    n = len(next(iter(first.values())).right)
    for (task, doc_id), question in table.items():
        if question.identity != first[task, doc_id].identity:
            raise ValueError(f"{name}: question {task}/{doc_id} is not the same as in {first_name} (its hash differs)")
        if len(question.right) != n:
            drawn = f"{len(question.right)} draws of question {task}/{doc_id}"
            raise ValueError(f"{name}: expected {n} draws as of the others, got {drawn}; is there an unfinished run?")


def _numbered(answers: list[list[list[bytes] | None]]) -> NDArray[np.int64] | None:
    """Numbers in place of the answers' digests, question by question."""
    numbered = []
    for column in zip(*answers, strict=True):
        if any(draws is None for draws in column):
            return None
        digests = np.array([draws for draws in column if draws is not None])
        numbered.append(np.unique(digests, return_inverse=True)[1].reshape(digests.shape))
    return np.stack(numbered, 1)
