"""SIGKILL at random moments, during writes too; what comes out in the end has the same bits as an undisturbed run."""

import json
import random
from pathlib import Path

import pytest
from kill_runs import kill_both

JOBS = "training", "distillation"


def test_killed_ten_times(tmp_path):
    result = kill_both(tmp_path, 10, random.randrange(2**32))
    for job in JOBS:
        print(*result[job]["hits"], sep="\n")
        assert sum(result[job]["kills"].values()) == 10
        assert result[job]["different"] == []


@pytest.mark.parametrize("job", JOBS)
def test_the_recorded_run_of_a_hundred_kills(job):
    """benchmarks/results/kills.json, as kill_runs.py wrote it."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "kills.json"
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("fmn_ref.kills", 1)
    kills, hits = content[job]["kills"], content[job]["hits"]
    assert sum(kills.values()) == len(hits) >= 100
    assert kills["at a time"] == len(hits) // 2
    for name in ("resume.pt", "history.fmnh", "checkpoints/"):
        assert any("half of write" in hit and name in hit for hit in hits)
    assert content[job]["different"] == []
