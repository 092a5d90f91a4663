"""Files of earlier releases stay readable, and hold the values that plain NumPy, json and torch find there."""

import importlib.util
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents
from training_runs import same_weights

import fmn_ref as fmn
from fmn_ref.runs.checkpoints import is_own, load_into

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASES = ["before-0.1", "0.1.0rc1"]
NEWEST = GOLDEN / RELEASES[-1]
FORMATS_PAGE = (GOLDEN.parents[1] / "docs" / "reference" / "formats.md").read_text()

_spec = importlib.util.spec_from_file_location("write_golden", GOLDEN / "write.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.fixture(params=RELEASES)
def old(request, tmp_path):
    """A copy of a release's folder: opening a run may not change it, but resuming one does."""
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / "old"))


def bits_of(path):
    """(epochs, correct), read as docs/reference/formats.md says."""
    raw = np.fromfile(path, np.uint8)
    n = int(raw[16:24].view("<u8")[0])
    records = raw[64:].reshape(-1, 64 + (n + 511) // 512 * 64)
    epochs = records[:, 8:16].copy().view("<i8")[:, 0]
    return epochs.tolist(), np.unpackbits(records[:, 64:], axis=1, count=n, bitorder="little").astype(bool)


def weights_of(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def predictions(folder):
    """(n_epochs, n_samples, n_classes) probabilities of the validation data, from the weights alone."""
    _, (x, _) = golden.read_data()
    states = [weights_of(folder / "run" / "checkpoints" / f"epoch_0000{epoch}.pt") for epoch in range(3)]
    return np.stack([torch.softmax(x @ s["weight"].T + s["bias"], 1).numpy() for s in states])


def mixed(plan, probs):
    """The fused probabilities, from the file of a plan as docs/reference/formats.md says."""
    terms = [(weight, probs[int(row)]) for row, weight in plan["weights"].items()]
    if plan.get("combine") != "geometric":
        return sum(w * p for w, p in terms)
    powers = np.exp(sum(w * np.log(np.clip(p, 1e-6, 1)) for w, p in terms))
    return powers / powers.sum(1, keepdims=True)


def test_history(old):
    history, (epochs, correct) = fmn.Run.open(old / "run").history, bits_of(old / "run" / "history.fmnh")
    assert list(history.epochs) == epochs == [0, 1, 2]
    assert (history.correct() == correct).all()
    _, (_, labels) = golden.read_data()
    assert (correct == (predictions(old).argmax(2) == labels.numpy())).all()


def test_run_and_its_checkpoints(old):
    before = contents(old / "run")
    run = fmn.Run.open(old / "run", golden.make_model())
    assert len(run.kept.history) == 3
    for path in run.checkpoints:
        assert same_weights(load_into(golden.make_model(), path), weights_of(path))
    assert np.allclose(run.probabilities(golden.read_data()[1])[:], predictions(old), atol=1e-6)
    assert contents(old / "run") == before


def test_checkpoints_of_old_have_no_checksum_and_new_ones_do():
    """Otherwise the two folders would test the same reader."""
    first, newest = (GOLDEN / release / "run/checkpoints/epoch_00000.pt" for release in RELEASES)
    assert not is_own(first)
    assert is_own(newest)
    assert zipfile.ZipFile(newest).comment.startswith(b"fmn_ref crc32 ")


def test_a_finished_run_is_returned_as_it_is(old):
    before = (old / "run" / "history.fmnh").read_bytes()
    run = fmn.train(golden.make_model(), *golden.read_data(), run_dir=old / "run", **golden.OPTIONS)
    assert (old / "run" / "history.fmnh").read_bytes() == before
    last = weights_of(old / "run/checkpoints/epoch_00002.pt")
    assert same_weights(run.model, last)


@pytest.mark.parametrize("lost", [None, "resume.pt"])
def test_an_interrupted_run_goes_on(old, lost):
    """From resume.pt, or from resume.previous.pt where that is lost; to the weights of the unbroken run beside it."""
    if lost:
        (old / "interrupted" / lost).unlink()
    run = fmn.train(golden.make_model(), *golden.read_data(), run_dir=old / "interrupted", **golden.OPTIONS)
    assert list(run.history.epochs) == [0, 1, 2]
    last = weights_of(old / "run/checkpoints/epoch_00002.pt")
    for name, value in run.model.state_dict().items():
        assert torch.allclose(value, last[name], atol=1e-5)


@pytest.mark.parametrize(
    "path",
    [f"{release}/{name}.json" for release in RELEASES for name in ("chosen", "run/plan")] + ["0.1.0rc1/pool.json"],
)
def test_plans(path):
    stored, plan = json.loads((GOLDEN / path).read_text()), fmn.FusionPlan.load(GOLDEN / path)
    assert stored["version"] == (1 if "before" in path else 2)
    assert stored["members"]
    assert plan.weights == {int(row): weight for row, weight in stored["weights"].items()}
    for name in ("method", "search", "window", "n_epochs", "gain_interval"):
        assert getattr(plan, name) == stored[name]
    probs = predictions(GOLDEN / path.partition("/")[0])
    assert np.allclose(plan.apply(probs), mixed(stored, probs), atol=1e-6)


def test_soft_targets(old, caplog):
    """Version 2 is used as it is; version 1 has no checksums and is made again, with a warning, to the same values."""
    log_probs = np.load(old / "targets/view_00000.log_probs.npy")
    run = fmn.Run.open(old / "run", golden.make_model())
    teacher = fmn.FusedModel(fmn.FusionPlan.load(old / "run" / "plan.json"), run)
    options = golden.OPTIONS | {"epochs": 1, "targets": "cached", "targets_dir": old / "targets"}
    before = contents(old / "targets")
    fmn.distill(golden.make_model(), teacher, golden.read_data()[0], **options)
    after = {name: content for name, content in contents(old / "targets").items() if name.name != ".lock"}
    if (GOLDEN / "0.1.0rc1/targets/targets.json").read_bytes() == before[Path("targets.json")]:
        assert after == before
    else:
        assert "of an earlier version" in caplog.text
        assert json.loads(after[Path("targets.json")])["version"] == 2
        assert np.allclose(np.load(old / "targets/view_00000.log_probs.npy"), log_probs, atol=1e-6)


def test_comparison(old):
    stored = json.loads((old / "run" / "comparison.json").read_text())
    page = fmn.report.write_report(old / "run", old / "report.html").read_text()
    assert stored["rows"]
    for row in stored["rows"]:
        assert row["method"] in page
        assert f"{row['test_accuracy']:.2%}" in page


def test_fused_model():
    _, (x, _) = golden.read_data()
    fused = fmn.FusedModel.load(NEWEST / "fused", golden.make_model())
    expected = mixed(json.loads((NEWEST / "fused" / "plan.json").read_text()), predictions(NEWEST))
    assert np.allclose(fused(x).exp().detach().numpy(), expected, atol=1e-6)


@pytest.fixture
def imported(tmp_path):
    """The imported run, with its references to the place where the golden checkpoints stand here."""
    shutil.copytree(NEWEST / "run", tmp_path / "run")
    folder = Path(shutil.copytree(NEWEST / "imported", tmp_path / "imported"))
    for reference in folder.rglob("*.ref.json"):
        text = reference.read_text().replace("/made/there", str(tmp_path))
        reference.write_text(text)
        name, recorded = next(iter(json.loads(text)["files"].items()))
        os.utime(tmp_path / "run/checkpoints" / name, ns=(recorded["mtime_ns"],) * 2)
    return folder


def test_references(imported):
    shutil.rmtree(imported / "predictions")  # so that the checkpoints must be read
    run = fmn.Run.open(imported, golden.make_model())
    assert np.allclose(run.probabilities(golden.read_data()[1])[:], predictions(NEWEST), atol=1e-6)


def test_kept_predictions(imported):
    shutil.rmtree(imported / "checkpoints")  # so that nothing can be predicted again
    found = np.asarray(fmn.Run.open(imported, golden.make_model()).probabilities(golden.read_data()[1])[:])
    assert np.allclose(found, predictions(NEWEST), atol=1e-3)
    for epoch, probs in enumerate(found):
        stored = np.load(imported / "predictions" / f"epoch_0000{epoch}.npy").astype(np.float32)
        assert np.allclose(probs, stored / stored.sum(1, keepdims=True), atol=1e-7)


def test_every_version_of_every_format_is_here():
    """Those that the code writes or reads: a new one needs a new folder, by write.py."""
    code = "".join(p.read_text() for p in Path(fmn.__file__).parent.rglob("*.py") if "benchmarks" not in p.parts)
    formats = set(re.findall(r'"(fmn_ref\.[a-z-]+)"', code))
    stored = [json.loads(p.read_text()) for p in GOLDEN.glob("*/**/*.json")]
    versions = {}
    for content in stored:
        if "format" in content:
            versions.setdefault(content["format"], set()).add(content["version"])
    assert all(found == set(range(1, max(found) + 1)) for found in versions.values())
    assert versions.keys() == formats - {"fmn_ref.demo", "fmn_ref.demo-cell"}  # results of the demo, to show
    assert all(f'"{name}"' in FORMATS_PAGE for name in versions)
    stated = {
        name: int(version) for name, version in re.findall(r'`"(fmn_ref\.\w+)"`, (?:`version` )?(\d)', FORMATS_PAGE)
    }
    assert stated == {name: max(found) for name, found in versions.items()}
