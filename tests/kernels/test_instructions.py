"""Guards of speed: recorded instruction counts, and times beside NumPy's in one process."""

import json
import re
import shutil
import time
from pathlib import Path

import instructions
import numpy as np
import pytest

import fmn_ref as fmn
from fmn_ref.kernels.protocol import Kernels

needs_compiled_kernels = pytest.mark.skipif(
    fmn.backend().name != "cpp", reason=f"the backend is {fmn.backend().name}: {fmn.backend().reason}"
)
TRIES = 3  # of a comparison of times: other programs may take the processor during one


def recorded():
    return json.loads(instructions.RECORD.read_text())


def test_counts_changed_by_more_than_the_bound_are_named():
    """Made-up counts: the bound itself passes on both sides, one instruction more does not."""
    before = {"a": 1000, "b": 1000, "c": 1000, "d": 1000, "gone": 1000}
    now = {"a": 1100, "b": 900, "c": 1101, "d": 899, "new": 1000}
    assert instructions.changes(before, before) == []
    assert instructions.changes(now, before) == [
        "c: 1101 instructions, recorded 1000 (+10.1%)",
        "d: 899 instructions, recorded 1000 (-10.1%)",
        "gone: recorded, but not counted",
        "new: not recorded",
    ]


def test_every_kernel_and_ten_public_calls_are_recorded():
    counted = {isa: set() for isa in ("avx2", "base", "public")}
    for name in recorded()["instructions"]:
        isa, _, call = name.partition(" ") if name.startswith(("avx2 ", "base ")) else ("public", "", name)
        counted[isa].add(call.split(" ")[0])
    kernels = {name for name in vars(Kernels) if not name.startswith("_")} - {
        "instruction_set",
        "threads",
        "reads_bits",
    }
    assert counted["avx2"] == counted["base"] == kernels
    assert len(counted["public"]) >= 10


def test_the_record_is_of_the_tested_numpy():
    """Otherwise the guard below would skip in CI, and nobody would see it."""
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    tested = re.search(r"^numpy==(.*)$", constraints, re.MULTILINE)[1]
    assert recorded()["versions"]["numpy"] == tested, instructions.RENEW


@needs_compiled_kernels
def test_instruction_counts_are_the_recorded_ones():
    """Of every kernel and of the public calls, within the bound."""
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is missing")
    if (here := instructions.versions()) != recorded()["versions"]:
        pytest.skip(f"instruction counts were recorded with {recorded()['versions']}, not with {here}")
    changed = instructions.changes(instructions.counts(), recorded()["instructions"])
    assert not changed, "\n".join([*changed, instructions.RENEW])


def forgotten(correct):
    """The papers' definition in NumPy: the mean of right at the epoch and wrong at the end."""
    return (correct & ~correct[-1]).mean(axis=1)


def four_curves(correct):
    last = correct[-1]
    masks = np.ones_like(last), ~last, last, last
    values = (correct & masks[0], correct & masks[1], ~correct & masks[2], correct & masks[3])
    return [v.mean(axis=1) for v in values]


def statistics_per_sample(correct):
    first, last = correct.argmax(axis=0), len(correct) - 1 - correct[::-1].argmax(axis=0)
    return first, last, (correct[:-1] & ~correct[1:]).sum(axis=0), correct.sum(axis=0), (~correct[::-1]).argmax(axis=0)


CALLS = {
    "forget_fraction": (fmn.forget_fraction, forgotten),
    "forgetting_curves": (fmn.forgetting_curves, four_curves),
    "sample_statistics": (lambda correct: fmn.sample_statistics(correct).forgetting_events, statistics_per_sample),
}


def seconds(call, correct):
    """The shortest of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call(correct)
        times.append(time.perf_counter() - start)
    return min(times)


@needs_compiled_kernels
@pytest.mark.parametrize("name", CALLS)
def test_the_metric_takes_less_than_half_of_numpys_time(name, rng):
    ours, numpys = CALLS[name]
    correct = rng.random((200, 20_000)) < 0.7
    ratios = (seconds(numpys, correct) / seconds(ours, correct) for _ in range(TRIES))
    assert any(ratio > 2 for ratio in ratios)
