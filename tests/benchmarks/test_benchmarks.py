"""The speed benchmarks run and check what they time; committed tables follow from committed numbers."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from fmn_ref.benchmarks.speed import fusion, metric, metric_tensors, training
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


def test_the_metric_on_tensors(tmp_path, monkeypatch, capsys):
    """The rows of a GPU, on the CPU. The benchmark compares every result with the host's first."""
    monkeypatch.setattr(metric_tensors, "median_seconds", lambda call, seconds=0: (call(), 1.0)[1])
    sizes = ["--epochs", "9", "--samples", "4099"]  # two blocks of products, two of words, and samples after them
    assert main(["bench", "metric", "--device", "cpu", *sizes, "-o", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "metric_tensors.json").read_text())
    assert result["shape"] == [9, 4099]
    assert capsys.readouterr().out.strip() == metric_tensors.markdown(result).strip()
    kernel_rows = {row["function"] for row in result["rows"] if row["program"] == "kernel"}
    assert kernel_rows == {"four curves", "100 groups", "per sample", "all pairs"}
    for row in result["rows"]:
        assert row["GB/s"] == pytest.approx(9 * 4099 / row["ms"] / 1e6)
        assert row["share of read bandwidth"] == pytest.approx(row["GB/s"] / row["read GB/s"])


def test_the_metric_on_tensors_checks_its_results(monkeypatch):
    monkeypatch.setattr(metric_tensors, "sums_of_words", lambda x: x.sum(1) + 1)
    with pytest.raises(AssertionError, match="forget fraction, sums of words"):
        metric_tensors.benchmark(5, 300, "cpu")


def test_what_a_device_lacks_does_not_stop_the_other_rows(monkeypatch, capsys):
    def fails(x):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(metric_tensors, "sums_of_words", fails)
    text = metric_tensors.benchmark(5, 300, "cpu")
    assert "forget fraction, sums of words: out of memory" in capsys.readouterr().err
    assert "sums of words" not in text
    assert "int32 sums" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("suite", ["metric", "training"])
def test_a_benchmark_on_a_gpu_needs_one(suite, capsys):
    assert main(["bench", suite, "--device", "cuda"]) == 1
    assert "--device cuda: torch finds no CUDA device" in capsys.readouterr().err


def test_a_part_of_the_training_benchmark(tmp_path):
    text = training.benchmark(None, str(tmp_path), quick=True, device="cpu", only="training mnist")
    result = json.loads((tmp_path / "training.json").read_text())
    assert [row["dataset"] for row in result["training"]] == ["mnist"]
    rate = result["training"][0]["images_per_second"]
    assert f"| {rate['unrecorded'] / rate['step_alone']:.0%} |" in text
    assert "Distillation (" not in text
    with pytest.raises(ValueError, match="--only: no part matches 'nothing'"):
        training.benchmark(None, None, quick=True, device="cpu", only="nothing")


def test_bench_training(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(training, "benchmark", lambda *args, **options: asked.append((args, options)) or "# table\n")
    assert main(["bench", "training", "--data", "root", "--device", "cpu", "-o", "out"]) == 0
    assert asked == [(("root", "out", False, "cpu", ""), {})]
    assert capsys.readouterr().out == "# table\n"
