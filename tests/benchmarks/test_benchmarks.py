"""The speed benchmarks run and check what they time; committed tables follow from committed numbers."""

import json
import statistics
from pathlib import Path

import pytest

from fmn_ref.benchmarks.speed import fusion, metric, training
from fmn_ref.cli import main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_on_speed_quotes_the_committed_results():
    result = json.loads((RESULTS / "metric_throughput.json").read_text())
    assert metric.summary(result) in (ROOT / "docs" / "speed.md").read_text()
    assert metric.markdown(result) == (RESULTS / "metric_throughput.md").read_text()


def test_the_speed_of_the_fusion_is_as_committed():
    result = json.loads((RESULTS / "fusion_speed.json").read_text())
    assert fusion.markdown(result) == (RESULTS / "fusion_speed.md").read_text()
    assert {r["method"] for r in result["fuse"]} <= set(fusion.METHODS)  # a new method joins with the next timing


def test_metric_throughput(tmp_path, monkeypatch, capsys):
    """Small inputs, each call timed once. The benchmark compares every result with NumPy's first."""
    monkeypatch.setattr(metric, "median_seconds", lambda call, seconds=0: (call(), 1.0)[1])
    monkeypatch.setattr(metric, "IN_CACHE", (5, 100))
    monkeypatch.setattr(metric, "TONEVA", (5, 300))
    monkeypatch.setenv("FMN_NUM_THREADS", "1")
    assert main(["bench", "metric", "--epochs", "9", "--samples", "3000", "-o", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "metric_throughput.json").read_text())
    assert {"processor", "compiler", "instruction set", "numpy"} <= set(result["machine"])
    assert {"cpp", "numba", "numpy", "torch"} == {row["program"] for row in result["rows"]}
    assert capsys.readouterr().out.strip() == (tmp_path / "metric_throughput.md").read_text().strip()


def test_the_speed_of_training_is_as_committed():
    result = json.loads((RESULTS / "training.json").read_text())
    assert training.markdown(result) == (RESULTS / "training.md").read_text()
    assert not result["quick"]


def test_training(tmp_path):
    """Tiny data. The benchmark compares weights and predictions of the programs that it times."""
    text = training.benchmark(None, str(tmp_path), quick=True, device="cpu")
    result = json.loads((tmp_path / "training.json").read_text())
    assert (result["format"], result["version"]) == ("fmn_ref.training-benchmark", 1)
    assert text == training.markdown(result) == (tmp_path / "training.md").read_text()
    row = result["training"][1]
    assert row["augmented"]
    assert len(row["seconds"]["recorded"][0]) == row["epochs"] == 2
    epochs = {name: statistics.median(calls[0][1:]) for name, calls in row["seconds"].items()}
    assert row["relative"]["plain"]["median"] == pytest.approx(epochs["plain"] / epochs["recorded"])
    assert row["images_per_second"]["recorded"] == pytest.approx(64 / epochs["recorded"])
    assert [len(seeds) for seeds in result["accuracy"][0]["accuracies"].values()] == [2, 2]


def test_bench_training(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(training, "benchmark", lambda *args, **options: asked.append((args, options)) or "# table\n")
    assert main(["bench", "training", "--data", "root", "--device", "cpu", "-o", "out"]) == 0
    assert asked == [(("root", "out"), {"device": "cpu"})]
    assert capsys.readouterr().out == "# table\n"
