"""The speed benchmarks run and check what they time; committed tables follow from committed numbers."""

import json
import os
import statistics
from pathlib import Path

import pytest
import torch

import fmn_ref as fmn
from fmn_ref.benchmarks.speed import fusion, metric, metric_tensors, scale, training
from fmn_ref.cli import main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_on_speed_quotes_the_committed_results():
    result = json.loads((RESULTS / "metric_throughput.json").read_text())
    assert metric.summary(result) in (ROOT / "docs" / "speed.md").read_text()
    assert metric.markdown(result) == (RESULTS / "metric_throughput.md").read_text()


def test_the_readme_quotes_the_speed_of_the_metric():
    rows = json.loads((RESULTS / "metric_throughput.json").read_text())["rows"]
    keys = {"function": "forget fraction", "input": "bool", "shape": "200 x 1281167", "program": "cpp", "threads": 2}
    (row,) = (row for row in rows if keys.items() <= row.items())
    share = f"{100 * row['share of read bandwidth']:.0f} % of read bandwidth"
    speed = f"in {row['ms']:.0f} ms: {share}, {row['x numpy']:.0f} times NumPy's rate"
    assert speed in (ROOT / "README.md").read_text()


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


def test_the_cost_by_size_is_as_committed():
    result = json.loads((RESULTS / "scale.json").read_text())
    assert scale.markdown(result) == (RESULTS / "scale.md").read_text()
    assert all(table in (ROOT / "docs" / "speed.md").read_text() for table in scale.tables(result))
    pieces = result["pieces"]
    assert {c["work"] for name, c in pieces.items() if name != "tokens"} == set(scale.WORKS)
    assert (pieces["tokens"]["epochs"], pieces["tokens"]["samples"]) == scale.TOKENS


def a_point(name, sizes):
    """Seconds as the square of the size that grows, in place of a new process."""
    scale.point(name, sizes | {"samples": 100})  # the work itself runs too
    seconds = sizes["epochs"] ** 2 / 1e5
    return {"seconds": seconds, "cpu": seconds, "prepared": 0.0, "peak_mib": 1, "added_mib": 1, "files_mib": 0}


def test_scale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "in_new_process", lambda function, *args: a_point(*args))
    assert main(["bench", "scale", "--only", "^(sample_stat|Corr).*epochs", "-o", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scale.json").read_text())["pieces"]
    assert list(found) == ["sample_statistics: epochs", "CorrectnessHistory.open: epochs"]
    curve = found["sample_statistics: epochs"]
    assert [p["size"] for p in curve["points"]] == [10, 100, 1000]  # the next step would take a hundred times 10 s
    assert (curve["growth"], curve["end"]) == (pytest.approx(2), "time")
    assert capsys.readouterr().out.strip() == (tmp_path / "scale.md").read_text().strip()
    assert main(["bench", "scale", "--only", "write_report: epochs", "-o", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "scale.json").read_text())["pieces"]) == 3  # the others stay
    assert main(["bench", "scale", "--only", "nothing"]) == 1
    assert "--only: no piece matches 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("name", scale.WORKS)
def test_every_work_is_measured(name):
    sizes = {axis: 2 * scale.STARTS[axis] for axis in scale.WORKS[name].sizes}
    point = scale.point(name, sizes)
    assert 0 < point["cpu"] < os.cpu_count() * point["seconds"] + 1
    assert ("found" in point) == name.startswith("fuse")


def test_a_curve_ends_where_memory_does(monkeypatch):
    point = {"seconds": 1e-3, "cpu": 1e-3, "prepared": 1e-3, "peak_mib": 1e9, "added_mib": 1e9, "files_mib": 0}
    monkeypatch.setattr(scale, "in_new_process", lambda function, *args: point)
    assert scale.curve("sample_statistics", "samples")["end"] == "memory"


def test_a_large_history(monkeypatch):
    """Slices of samples that do not divide their number. Each step compares what it counts with what was appended."""
    monkeypatch.setattr(scale, "TOKENS", (5, 3001))
    monkeypatch.setattr(scale, "SLICE", 1000)
    monkeypatch.setattr(scale, "in_new_process", lambda function, *args: function(*args))
    steps = scale.tokens()["steps"]
    assert [s["step"] for s in steps] == ["append", "open", "curves", "statistics"]
    monkeypatch.setattr(fmn.CorrectnessHistory, "select", lambda self, samples: self)
    with pytest.raises(AssertionError, match="statistics: the history does not give back"):
        scale.tokens()


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
