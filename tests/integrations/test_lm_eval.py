"""lm-evaluation-harness itself, on tiny random models without a download: its numbers are those of `from_lm_eval`."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
import lm_eval_runs

import fmn_ref as fmn


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    lm_eval_runs.main(folder)
    return folder / "out"


@pytest.mark.parametrize(
    ("task", "metric", "kept", "n_draws"),
    [
        ("sums_choice", "acc", "none", 1),
        ("sums_choice", "acc_norm", "none", 1),
        ("sums_draws", "exact_match", "draws", 5),
        ("sums_draws", "exact_match", "maj", 1),
    ],
)
def test_means_are_those_of_its_aggregation(out, task, metric, kept, n_draws):
    graded = fmn.from_lm_eval(out, task=task, metric=metric, filter=kept)
    assert graded.checkpoints == [f"checkpoint-{step}" for step in lm_eval_runs.STEPS]
    assert graded.correct.shape == (3, 6, n_draws)
    assert (graded.answers is None) == (task == "sums_choice")
    assert graded.n_choices.tolist() == [4 if task == "sums_choice" else 0] * 6
    for name, mean in zip(graded.checkpoints, graded.rates.mean(1), strict=True):
        results = json.loads(next((out / name).rglob("results_*.json")).read_text())["results"]
        np.testing.assert_allclose(mean, results[task][f"{metric},{kept}"], atol=1e-12)
