"""The experiment suite on tiny pieces, and the committed tables against the committed pieces."""

import csv
import gzip
import io
import json
import re
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import fmn_ref as fmn
from fmn_ref.benchmarks.experiments import datasets, double_descent, figures, measurement, networks, suite, tables
from fmn_ref.benchmarks.experiments.controls import accuracy
from fmn_ref.benchmarks.experiments.pieces import Piece
from fmn_ref.benchmarks.speed import fusion
from fmn_ref.cli import main
from fmn_ref.fusion.methods import method_names
from fmn_ref.runs.checkpoints import load_into

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "paper"


def cifar_like(root, n_train=260, n_test=240):
    """CIFAR-100's layout with random images, and CIFAR-100N's labels."""
    rng = np.random.default_rng(0)
    (root / "cifar-100-binary").mkdir(parents=True)
    for name, n in (("train", n_train), ("test", n_test)):
        rows = rng.integers(0, 100, (n, 3074)).astype(np.uint8)
        rows.tofile(root / "cifar-100-binary" / f"{name}.bin")
    (root / "cifar-100n").mkdir()
    np.save(root / "cifar-100n" / "noisy_fine.npy", rng.integers(0, 100, n_train))
    return root


def idx(a):
    return struct.pack(f">BBBB{a.ndim}I", 0, 0, 8, a.ndim, *a.shape) + a.tobytes()


def tiny(dataset="digits", stages=None, **changes):
    task = next(t for t in suite.cpu_tasks() if t.dataset == dataset)
    return replace(task, n_train=150, n_select=100, n_test=120, epochs=10, stages=stages, **changes)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(piece, folder, result) of a piece with all stages, on digits."""
    out = tmp_path_factory.mktemp("suite")
    piece = Piece(tiny(), "sym40", False, 0)
    return piece, out, suite.run_piece(piece, Path(), out)


def test_a_piece_holds_every_method(everything):
    _, _, result = everything
    rows = tables.rows_of(result)
    assert {
        "final",
        "KF",
        "auto",
        "Caruana",
        "distilled auto",
        "5 networks, early stopped",
        "snapshots",
        "FGE",
        "SWA",
    } <= set(rows)
    assert {"EMA", "distilled EMA", "distilled pool", "distilled 5 networks, early stopped"} <= set(rows)
    assert {"distilled pool, weights of sum 1", "distilled pool, temperature 2"} <= set(rows)
    assert {"averaged auto", "top at pool's cost"} <= set(rows)
    assert len(rows) == len(result["rows"])
    for row in rows.values():
        n_right = 120 * row["test_accuracy"]
        assert 0 < round(n_right) < 120
        assert n_right == pytest.approx(round(n_right))
        assert row["forward_passes"] >= 1
        assert 0 < row["test_nll"] < 14  # -log of 1e-6
        assert 0 <= row["test_ece"] <= 1
    assert rows["top at pool's cost"]["forward_passes"] == rows["pool"]["forward_passes"]
    assert rows["5 networks"]["training_runs"] == 5
    fusions = [method for method in rows if method in measurement.FUSIONS]
    assert fusions[:2] == ["KF", "KF exact"]
    assert fusions[2:] == [name for name in method_names() if name != "forget"]
    assert {"fmn_ref", "torch", "numpy", "python", "device"} <= set(result["made_with"])
    assert result["piece"] == f"{result['setting']}-{result['seed']}"
    assert len(result["curves"]["accuracy"]) == result["epochs"]
    assert result["share_of_wrong_labels"] == 0.4
    assert result["recovery"]["auto"]["samples"] == 120


def test_a_finished_piece_is_not_done_again(everything, monkeypatch):
    piece, out, result = everything
    monkeypatch.setattr(measurement, "measure", None)
    assert suite.run_piece(piece, Path(), out)["rows"] == result["rows"]


def test_an_interrupted_piece_ends_the_same(everything, tmp_path, monkeypatch):
    piece, _, result = everything
    stages = dict(measurement.STAGES)
    monkeypatch.setitem(measurement.STAGES, "networks", lambda bench: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        suite.run_piece(piece, Path(), tmp_path)
    monkeypatch.setitem(measurement.STAGES, "networks", stages["networks"])
    assert suite.run_piece(piece, Path(), tmp_path)["rows"] == result["rows"]


def test_tables_of_a_suite(everything):
    _, out, result = everything
    worse = [{**row, "test_accuracy": row["test_accuracy"] - 0.02} for row in result["rows"]]
    other = {**result, "piece": "digits-sym40-plain-1", "seed": 1, "rows": worse}
    (out / "pieces" / "digits-sym40-plain-1.json").write_text(
        json.dumps({"format": tables.FORMAT, "version": 1, **other})
    )
    text = figures.write(out)
    accuracy = 100 * tables.rows_of(result)["auto"]["test_accuracy"]
    assert f"| auto | {accuracy - 1:.1f} ± 1.0 |" in text
    assert (out / "tables.md").read_text() == text
    assert {*figures.FIGURES, "tables.csv", "tables.json"} <= {p.name for p in out.iterdir()}


def test_the_same_samples_cannot_select_and_score(monkeypatch, tmp_path):
    """A split whose test set is the selection set is refused."""
    piece = Piece(tiny(stages={"": ()}), "clean", False, 0)
    honest = piece.split(Path())
    monkeypatch.setattr(Piece, "split", lambda self, root: honest._replace(test=honest.select))
    with pytest.raises(ValueError, match="selection set"):
        suite.run_piece(piece, Path(), tmp_path)


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar100"])
def test_splits_are_disjoint_and_seeded(dataset, tmp_path):
    if dataset == "cifar100":
        cifar_like(tmp_path)
    if dataset == "mnist":
        (tmp_path / "mnist").mkdir()
        rng = np.random.default_rng(1)
        for name, n in (("train", 200), ("t10k", 230)):
            images, labels = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8), rng.integers(0, 10, n).astype(np.uint8)
            (tmp_path / "mnist" / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
            (tmp_path / "mnist" / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))
    source = datasets.SOURCES[dataset](tmp_path)
    for noise in ("clean", "sym20", "asym40", *(["human"] if dataset == "cifar100" else [])):
        a, b = (datasets.split(source, noise, 3, 150, 100, 110, pooled=dataset == "digits") for _ in range(2))
        for x, y in zip(a[:3], b[:3], strict=True):
            assert torch.equal(x[0], y[0])
            assert torch.equal(x[1], y[1])
        sets = [set(map(bytes, part[0].numpy().reshape(len(part[0]), -1))) for part in a[:3]]
        assert not sets[0] & sets[1] | sets[1] & sets[2] | sets[0] & sets[2]
        if noise == "human":
            drawn = np.random.default_rng(3).permutation(len(source.human))[:150]
            assert a.train[1].tolist() == source.human[drawn].tolist()
            assert a.share_wrong == (source.human[drawn] != source.train[1][drawn]).mean() > 0.9
        else:
            assert a.share_wrong == {"clean": 0, "sym20": 0.2, "asym40": 0.4}[noise]
    with pytest.raises(ValueError, match="at most"):
        datasets.split(source, "clean", 0, 150, 5000, 6000, pooled=dataset == "digits")
    with pytest.raises(ValueError, match="noise"):
        datasets.split(source, "sym", 0, 150, 10, 10, pooled=dataset == "digits")


def test_tinyimagenet(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    folder = tmp_path / "tiny-imagenet-200"
    assert [t.dataset for t in suite.gpu_tasks(tmp_path)] == ["cifar100"]
    for name in ("n01", "n02"):
        (folder / "train" / name / "images").mkdir(parents=True)
        for i in range(3):
            grey = image.fromarray(rng.integers(0, 256, (64, 64)).astype(np.uint8))  # some images there are grey
            grey.save(folder / "train" / name / "images" / f"{name}_{i}.JPEG", "JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    image.new("RGB", (64, 64), (255, 0, 0)).save(folder / "val" / "images" / "val_0.JPEG", "JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    (folder / "wnids.txt").write_text("n01\nn02\n")
    source = datasets.tinyimagenet(tmp_path)
    assert source.train[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test[1].tolist() == [1]
    assert source.test[0].shape == (1, 3, 64, 64)
    assert source.test[0][0, 0].min() > 250 > 5 > source.test[0][0, 1].max()
    assert [t.dataset for t in suite.gpu_tasks(tmp_path)] == ["cifar100", "tinyimagenet"]


def test_damaged_data_is_named(tmp_path):
    cifar_like(tmp_path)
    path = tmp_path / "cifar-100-binary" / "test.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test\.bin"):
        datasets.cifar100(tmp_path)


def test_the_gpu_scale_on_a_tiny_network(tmp_path):
    """ResNet-18, four channels wide, on random images in CIFAR's layout, on the CPU."""
    cifar_like(tmp_path / "data")
    task, *_ = suite.gpu_tasks(tmp_path / "data")
    network = partial(networks.resnet18, 3, 100, width=4)
    small = {"n_select": 60, "n_test": 60, "epochs": 2, "device": "cpu"}
    piece = Piece(replace(task, network=network, stages={"": ("students",)}, **small), "sym40", True, 0)
    rows = tables.rows_of(suite.run_piece(piece, tmp_path / "data", tmp_path / "out"))
    assert "distilled KF" in rows
    names = [p.name for p in suite.all_pieces("gpu", tmp_path / "data")]
    assert names[:4] == [f"cifar100-clean-augmented-{s}" for s in range(3)] + ["cifar100-sym40-augmented-0"]
    assert len(names) == 15


def test_the_middle_scale_on_a_tiny_network(tmp_path):
    """All stages of its first task, with ResNet-18 four channels wide on random images in CIFAR's layout."""
    cifar_like(tmp_path / "data")
    task, *_ = suite.middle_tasks()
    network = partial(networks.resnet18, 3, 100, width=4)
    task = replace(task, network=network, n_train=200, n_select=60, n_test=60, epochs=2)
    piece = Piece(task, "sym40", True, 0)
    result = suite.run_piece(piece, tmp_path / "data", tmp_path / "out")
    rows = tables.rows_of(result)
    order = [
        name for name in rows if name in ("distilled pool", "distilled KF", "distilled final", "EMA", "5 networks")
    ]
    assert order == ["distilled pool", "distilled KF", "distilled final", "EMA", "5 networks"]
    assert "averaged KF" in rows
    assert rows["distilled auto"]["test_nll"] in (
        rows["distilled pool"]["test_nll"],
        rows["distilled final"]["test_nll"],
    )
    assert result["dataset"] == "cifar100_resnet18"
    assert result["setting"] == "cifar100_resnet18-sym40-augmented"
    assert result["recovery"]["distilled pool"]["samples"] == 60
    views = tmp_path / "out" / "runs" / piece.name / "student_pool" / "targets"
    assert len(list(views.glob("view_*.npy"))) == 2  # of two epochs


def test_a_network_that_learned_other_classes_first(tmp_path):
    cifar_like(tmp_path / "data", 800, 600)
    task = next(t for t in suite.middle_tasks() if t.before is not None)
    network = partial(networks.resnet18, 3, 100, width=4)
    small = {"network": network, "n_select": 40, "n_test": 70, "epochs": 2}
    task = replace(task, n_train=150, before=replace(task.before, n_train=160, **small), **small)
    piece = Piece(task, "sym40", True, 0)
    data, old = piece.split(tmp_path / "data"), piece.before.split(tmp_path / "data")
    for split, classes in ((data, range(50, 100)), (old, range(50))):
        assert all(set(labels.tolist()) <= set(classes) for _, labels in split[:3])
    assert (data.share_wrong, old.share_wrong) == (0.4, 0)
    result = suite.run_piece(piece, tmp_path / "data", tmp_path / "out")
    assert set(result["accuracy_before"]) == {"before", "final", "KF", "pool"}
    folder = tmp_path / "out" / "runs" / piece.name
    learned = load_into(task.make_model(), folder / "before" / "network_0" / "checkpoints" / "epoch_00001.pt")
    assert result["accuracy_before"]["before"] == accuracy(learned, old.test, True)
    own = piece.train(data, tmp_path / "own", start=None)  # from new weights
    started = piece.train(data, folder)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(own.model.state_dict().values(), started.model.state_dict().values(), strict=True)
    )


def test_the_pieces_of_middle_scale():
    pieces = suite.all_pieces("middle", Path())
    names = [p.name for p in pieces]
    assert names[:2] == ["cifar100_resnet18-clean-augmented-0", "cifar100_resnet18-sym40-augmented-0"]
    assert len(set(names)) == len(names)
    assert {(p.task.name, p.seed) for p in pieces if p.seed} == {("cifar100_resnet18", 1)}
    assert [p.name for p in pieces if p.seed == 0] == [p.name for p in suite.all_pieces("middle", Path(), 1)]
    assert all(p.setting.split("-") == [p.task.name, p.noise, "augmented"] for p in pieces)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [["--scale", "gpu"], ["--scale", "middle", "--device", "cuda"]])
def test_a_suite_on_a_gpu_needs_one(tmp_path, capsys, options):
    assert main(["bench", "paper", *options, "--data", str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert f"--scale {options[1]}: torch finds no CUDA device" in capsys.readouterr().err


def test_all_pieces_of_a_suite_are_on_one_device():
    """Those on which a network is trained first, too."""
    pieces = suite.all_pieces("middle", Path(), device="cuda")
    pieces += [p.before for p in pieces if p.before is not None]
    assert {p.task.device for p in pieces} == {"cuda"}
    assert len({p.name for p in pieces}) == len({p.name for p in suite.all_pieces("middle", Path())}) + 1


def test_the_suite_as_a_command(tmp_path, monkeypatch, capsys):
    tasks = [tiny(stages={"": ()})]
    monkeypatch.setattr(suite, "cpu_tasks", lambda: tasks)
    command = ["bench", "paper", "--data", str(tmp_path), "-o", str(tmp_path / "out"), "--clean"]
    command += ["--only", "clean-plain-[01]"]
    assert main(command) == 0
    assert "| auto |" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "pieces").iterdir())) == 2
    assert not list((tmp_path / "out").rglob("*.pt"))
    assert main([*command[:-1], "nothing"]) == 1
    assert main(["bench", "paper"]) == 1
    assert "--data" in capsys.readouterr().err


def test_double_descent_on_a_few_images(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    rng = np.random.default_rng(1)
    for name, n in (("train", 2000), ("t10k", 10000)):
        (tmp_path / "mnist" / f"{name}-images-idx3-ubyte").write_bytes(
            idx(rng.integers(0, 256, (n, 28, 28)).astype(np.uint8))
        )
        (tmp_path / "mnist" / f"{name}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 10, n).astype(np.uint8)))
    monkeypatch.setattr(double_descent, "CASES", {"case": ("sym20", lambda: networks.mlp(1, 28, 10, hidden=4), 0.01)})
    result = double_descent.benchmark(str(tmp_path), str(tmp_path), n_seeds=2, epochs=3)
    seeds = result["cases"]["case"]["seeds"]
    assert len(seeds[1]["forget"]) == 3
    assert json.loads((tmp_path / "double_descent.json").read_text()) == result
    assert (tmp_path / "double_descent.png").stat().st_size > 5000
    end = 100 * np.mean([seed["accuracy"] for seed in seeds])
    assert re.fullmatch(
        rf"\| case \| [\d.]+ \| [\d.]+ \| {end:.1f} \|", double_descent.markdown(result).splitlines()[2]
    )


def test_the_depth_of_a_double_descent():
    curve = [0.1, 0.6, 0.3, 0.2, *[0.5] * 9, 0.7]
    expected = {"peak": 0.6, "peak_epoch": 1, "dip": 0.2, "dip_epoch": 3, "end": pytest.approx(0.52)}
    assert double_descent.depth(curve) == expected


def test_fusion_speed_on_small_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(fusion, "SIZES", [(300, 5), (200, 7)])
    monkeypatch.setattr(fusion, "median_seconds", lambda call, seconds=0, most=0, pause=0: (call(), 1.0)[1])
    monkeypatch.setattr(fusion, "METHODS", ("forget", "auto"))
    monkeypatch.setattr(fusion, "LARGE", (4, 100, 5))
    monkeypatch.setattr(fusion, "RECORDED", (300, 4))
    result = fusion.benchmark(str(tmp_path))
    assert [r["dtype"] for r in result["search"]] == ["float32", "float32", "float16", "bfloat16", "float64"]
    assert all(r["accuracy"]["exact"] >= r["accuracy"]["torch_grid"] for r in result["search"])
    assert [(r["method"], r["folds"]) for r in result["fuse"]] == [("forget", 0), ("forget", 5), ("auto", 5)]
    assert [(r["call"], r["shape"]) for r in result["calls"]] == [
        ("compare_probabilities", [4, 100, 5]),
        ("CorrectnessHistory.append", [300]),
        ("Recorder.record", [300, 4]),
    ]
    assert (tmp_path / "fusion_speed.md").read_text() == fusion.markdown(result)


class TestCommittedResults:
    """The committed tables follow from the committed pieces."""

    @pytest.fixture
    def results(self):
        return tables.load_results(RESULTS)

    @pytest.mark.parametrize("folder", [path.parent for path in RESULTS.parent.glob("*/pieces")], ids=lambda p: p.name)
    def test_every_table_follows_from_the_pieces(self, folder):
        results = tables.load_results(folder)
        assert tables.markdown(results) == (folder / "tables.md").read_text()
        assert tables.to_csv(results) == (folder / "tables.csv").read_text()
        assert tables.to_json(results) == (folder / "tables.json").read_text()

    def test_cells_by_hand(self, results):
        """The CSV's means and errors, recomputed from the pieces without the suite's code."""
        accuracy = {}
        for path in (RESULTS / "pieces").glob("*.json"):
            content = json.loads(path.read_text())
            for row in content["rows"]:
                key = re.sub(r"-\d+$", "", content["piece"]), row["method"]
                accuracy.setdefault(key, []).append(100 * row["test_accuracy"])
        cells = list(csv.DictReader(io.StringIO((RESULTS / "tables.csv").read_text())))
        assert len(cells) == len(accuracy)
        for cell in cells:
            values = accuracy[cell["setting"], cell["method"]]
            assert float(cell["test_accuracy"]) == pytest.approx(np.mean(values))
            if len(values) > 1:
                assert float(cell["standard_error"]) == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)

    def test_the_documentation_quotes_them(self, results):
        text = (RESULTS.parents[2] / "docs" / "results.md").read_text()
        middle = tables.load_results(RESULTS.parent / "middle")
        for name, table in tables.quoted(results, middle).items():
            assert table in text, name
        for scale, done in (("cpu", results), ("middle", middle)):
            assert f"{len(done)} of {len(suite.all_pieces(scale, Path()))} pieces of scale {scale}" in text

    def test_the_rule_is_the_fitted_one(self, results):
        rule = tables.fit_rule([*results, *tables.load_results(RESULTS.parent / "middle")])
        assert rule["coefficients"] == fmn.expectation.RULE
        assert rule["error"] == fmn.expectation.ERROR

    def test_double_descent_is_drawn_from_its_numbers(self):
        result = json.loads((RESULTS.parent / "double_descent.json").read_text())
        for case in result["cases"].values():
            assert [double_descent.depth(s["accuracy"]) for s in case["seeds"]] == case["depth"]
