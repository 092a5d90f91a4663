"""Print digests of what the package computes on random problems, for every method and metric, as JSON.

    python result_digests.py            > tests/data/digests.json
    python result_digests.py --each     one line a result, to find which one differs

`digests` of groups of results are the same on every backend, instruction set, number of threads and processor.
`values` come from exponentials and logarithms, which every processor rounds in its own way. The program needs NumPy
only. It draws integers, adds and divides, so every machine has the same problems.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import fmn_ref as fmn
from fmn_ref._check import BFLOAT16
from fmn_ref.fusion.methods import METHODS, method_names
from fmn_ref.metrics.history import CorrectnessHistory
from fmn_ref.metrics.scores import scores

DTYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bfloat16": BFLOAT16}
SMALL = [(1, 1, 2), (3, 1, 2), (5, 7, 3), (12, 65, 7)]  # epochs, samples, classes
LARGE = [(20, 257, 10), (6, 1501, 3), (3, 9001, 7)]  # the last is split over three threads
MATRICES = [(1, 1), (2, 1), (5, 63), (300, 65), (40, 8193), (120, 105_001)]  # epochs, samples; the last too
ANSWERS = [(1, 1, 2), (3, 7, 4), (6, 101, 16)]  # checkpoints, questions, draws
BOUNDS = {"search": "exact", "max_forward_passes": 3, "window": 0}


def content_of(value):
    """Bytes of a result: of arrays with type and shape, of anything else its text."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}".encode() + value.tobytes()
    return value if isinstance(value, bytes) else repr(value).encode()


def results():
    """(group, name, result, exact): a result that is not exact is one number."""
    rng = np.random.default_rng(20260101)
    for shape in MATRICES:
        yield from of_matrix(rng, shape)
    for shape in ANSWERS:
        yield from of_answers(rng, shape)
    kinds = [(shape, dtype, ties) for shape in SMALL for dtype in DTYPES for ties in (False, True)]
    kinds += [(shape, dtype, False) for shape, dtype in zip(LARGE, DTYPES, strict=False)]
    for i, (shape, dtype, ties) in enumerate(kinds):
        probs, labels = problem(rng, shape, DTYPES[dtype], ties)
        weights = (None, rng.random(shape[1]) + 0.01, "balanced")[i % 3]
        name = f"{shape} {dtype}{' with ties' * ties}"
        yield from of_problem(name, probs, labels, weights, BOUNDS if i % 2 and shape in SMALL else {})


def problem(rng, shape, dtype, ties):
    """Probabilities of a type, some of them equal if `ties`, and labels."""
    n_epochs, n_samples, n_classes = shape
    labels = rng.integers(0, n_classes, n_samples)
    if ties:
        cuts = np.sort(rng.integers(0, 9, (n_epochs, n_samples, n_classes - 1)), -1)
        p = np.diff(cuts, prepend=0, append=8) / 8
    else:
        votes = rng.integers(1, 1 << 20, shape)
        votes[:, np.arange(n_samples), labels] += rng.integers(0, 1 << 20, (n_epochs, n_samples))
        p = votes / votes.sum(-1, keepdims=True)
    if dtype == BFLOAT16:
        return (p.astype("f4").view("u4") >> 16).astype("u2").view(BFLOAT16), labels
    return p.astype(dtype), labels


def of_matrix(rng, shape):
    """Every metric of a matrix of correctness and of its history file, and that file."""
    labels = rng.integers(0, 9, shape[1])
    predictions = np.where(rng.random(shape) < 0.7, labels, rng.integers(0, 9, shape))
    correct = fmn.correctness(predictions, labels)
    groups, weights = rng.integers(0, 5, shape[1]), rng.random(shape[1]) + 0.01
    yield "correctness", shape, correct, True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.fmnh"
        history = CorrectnessHistory(shape[1], path, labels=labels)
        for row in correct:
            history.append(row)
        yield "history file", shape, path.read_bytes(), True
        for source in (correct, CorrectnessHistory.open(path)):
            yield from of_correctness(f"{shape} {type(source).__name__}", source, groups, weights)


def of_correctness(name, correct, groups, weights):
    for group, options in {
        "curves": {},
        "curves against the first epoch": {"reference": 0},
        "curves by group": {"groups": groups},
        "weighted curves": {"sample_weight": weights},
        "weighted curves by group": {"groups": groups, "sample_weight": weights},
    }.items():
        c = fmn.forgetting_curves(correct, **options)
        yield group, name, c.counts, True
        yield group, name, np.stack([c.accuracy, c.forget, c.learned, c.retained]), True
    yield "forgetting matrix", name, fmn.forgetting_matrix(correct), True
    yield "sample statistics", name, list(map(content_of, fmn.sample_statistics(correct).columns().values())), True
    yield "expected gain", name, fmn.expected_gain(correct), True


def of_answers(rng, shape):
    """Every metric of graded answers."""
    answers, last = rng.integers(0, 4, shape), min(shape[0], 2)
    right = answers == rng.integers(0, 4, shape[1])[:, None]
    weights, groups = rng.random(shape[1]) + 0.01, rng.integers(0, 3, shape[1])
    for options in ({}, {"n_draws": shape[2]}, {"sample_weight": weights}, {"groups": groups}):
        yield "expected curves", f"{shape} {[*options]}", fmn.expected_curves(right.mean(-1), **options).counts, True
    yield "temporal forgetting", shape, fmn.temporal_forgetting(right.mean(-1)), True
    yield "pass@k", shape, fmn.pass_at_k(right, 2, last=last), True
    for k in (2, last * shape[2]):  # the second draws at random from the large problem
        yield "maj@k", f"{shape} {k}", fmn.maj_at_k(answers, right, k, last=last), True


def of_problem(name, probs, labels, weights, bounds):
    """Correctness, epsilons and recovered samples of probabilities, and the plan of every method."""
    correct = fmn.correctness(probs, labels)
    yield "correctness of scores", name, correct, True
    for search in ("grid", "exact"):
        found = fmn.best_epsilon(probs[-1], probs[0], labels, search=search, sample_weight=weights)
        yield f"epsilon, {search}", name, found, True
    folds = 2 if 1 < len(labels) < 1000 else 0
    for method in method_names():
        if method not in METHODS and not folds:
            continue
        plan = fmn.fuse(probs, labels, method=method, sample_weight=weights, folds=folds, **bounds)
        fused = plan.apply(probs)
        with tempfile.TemporaryDirectory() as folder:
            plan.save(Path(folder) / "plan.json")
            yield f"plan, {method}", name, (Path(folder) / "plan.json").read_bytes(), True
            assert fmn.FusionPlan.load(Path(folder) / "plan.json") == plan
        yield f"predictions, {method}", name, fused.argmax(1), True
        yield f"recovery, {method}", name, fmn.recovery(correct, {"fused": fused}, labels).counts(), True
        if plan.combine == "linear":
            yield f"probabilities, {method}", name, fused, True
        else:
            yield f"probabilities, {method}", name, float(fused[0, 0]), False
        yield f"log-likelihood, {method}", name, scores(fused, labels).nll, False


def summary():
    """{"digests": {group: SHA-256}, "values": {group: numbers}}."""
    hashes, values = {}, {}
    for group, _, result, exact in results():
        if exact:
            hashes.setdefault(group, hashlib.sha256()).update(hashlib.sha256(content_of(result)).digest())
        else:
            values.setdefault(group, []).append(result)
    return {"digests": {group: h.hexdigest()[:16] for group, h in hashes.items()}, "values": values}


if __name__ == "__main__":
    if sys.argv[1:] == ["--each"]:
        for group, name, result, exact in results():
            print(group, name, hashlib.sha256(content_of(result)).hexdigest()[:16] if exact else result, sep="; ")
    else:
        print(json.dumps(summary(), indent=1))
