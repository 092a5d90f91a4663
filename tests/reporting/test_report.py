"""The HTML report: its numbers, that it loads nothing and trusts no text, and how a browser shows it."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch
from inputs import history_of

import fmn_ref as fmn
from fmn_ref import demo
from fmn_ref.cli import main
from fmn_ref.fusion.methods import summaries
from fmn_ref.reporting.report import write_report

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Page as a tree; every tag must be closed in the right place."""

    def __init__(self, path):
        super().__init__()
        self.builder, self.open, self.bytes = ET.TreeBuilder(), [], path.read_bytes()
        self.source = self.bytes.decode("utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open
        self.root = self.builder.close()

    def handle_starttag(self, tag, attrs):
        self.builder.start(tag, dict(attrs))
        if tag in VOID:
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)

    def text(self):
        return " ".join("".join(self.root.find("body").itertext()).split())

    def table(self, name):
        for box in self.root.iter("div"):
            if box.get("aria-label") == name:
                return [["".join(cell.itertext()) for cell in row] for row in box.iter("tr")][1:]
        raise KeyError(name)

    def tiles(self):
        tiles = self.root.find(".//dl")
        return {"".join(t.find("dt").itertext()): "".join(t.find("dd").itertext()) for t in tiles}

    def cards(self):
        return ["".join(card.itertext()) for card in self.root.iter("li") if card.find("div") is not None]

    def tags(self):
        return {element.tag for element in self.root.iter()}


def picture(uri):
    """Pixels of a data URI, by matplotlib."""
    assert uri.startswith("data:image/png;base64,")
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(uri.split(",")[1])), format="png")
    return np.rint(255 * pixels).astype(int)


def write_run(folder, correct, labels=None, config=None, epochs=None):
    """A run directory with this history."""
    fmn.Recorder(folder, config=config)
    return history_of(correct, folder / "history.fmnh", labels, epochs)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A short run on scikit-learn's digits with 40 % wrong labels, its plan and its comparison; the selection set."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train_set, (x, y), test = demo.load_digits(0, 0.4)
    torch.manual_seed(0)
    run = fmn.train(demo.make_model(), train_set, (x, y), epochs=14, run_dir=folder, progress=False, **demo.RECIPE)
    plan = fmn.fuse(run.probabilities((x, y)), y, correct=run.history, method="greedy", folds=3)
    plan.save(folder / "plan.json")
    (folder / "comparison.json").write_text(fmn.compare(run, (x, y), test).to_json())
    return run, x.numpy(), y.numpy()


@pytest.fixture(scope="module")
def report(digits, tmp_path_factory):
    run, x, y = digits
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert write_report(run.run_dir, path, labels=y, images=x) == path
    return path


# --- content ---


def test_headline_and_curves(digits, report):
    history, page = digits[0].history, Page(report)
    curves, samples = fmn.forgetting_curves(history), fmn.sample_statistics(history)
    best, peak = curves.accuracy.argmax(), curves.forget.argmax()
    gain, error = fmn.expected_gain(history)
    assert page.tiles() == {
        "Final accuracy": f"{curves.accuracy[-1]:.1%}at epoch {history.epochs[-1]}",
        "Best accuracy": f"{curves.accuracy[best]:.1%}at epoch {history.epochs[best]}",
        "Peak forget fraction": f"{curves.forget[peak]:.1%}at epoch {history.epochs[peak]}",
        "Forgotten samples": f"{samples.forgotten.sum()}of {history.n_samples}: right once, wrong at the end",
        "Expected gain": f"{100 * gain:+.1f}points from fusion, ± {100 * error:.1f} (rough)",
    }
    columns = (curves.accuracy, curves.forget, curves.learned, curves.retained)
    expected = [[str(e), *(f"{c[i]:.2%}" for c in columns)] for i, e in enumerate(history.epochs)]
    assert page.table("Numbers of each epoch") == expected


def test_lines_are_drawn_where_the_numbers_are(digits, report):
    """Points of a line, converted back with the labels of the axis, are the numbers."""
    curves, drawn = fmn.forgetting_curves(digits[0].history), []
    for plot in plots(Page(report)):
        ticks = [float(s.text.rstrip("%")) / 100 for s in plot.iter("span") if s.get("class") == "y"]
        for path in plot.iter("path"):
            values = {"accuracy": curves.accuracy, "retained": curves.retained, "forget": curves.forget}.get(
                path.get("class")
            )
            if values is None:
                continue
            drawn.append(path.get("class"))
            points = np.array([p.split() for p in path.get("d")[1:].split("L")], float) / 1000
            np.testing.assert_allclose(points[:, 0], np.linspace(0, 1, len(values)), atol=1e-4)
            np.testing.assert_allclose(
                ticks[-1] - points[:, 1] * (ticks[-1] - ticks[0]), values, atol=1e-4 * (ticks[-1] - ticks[0])
            )
    assert sorted(drawn) == ["accuracy", "forget", "retained"]
    scored = json.loads((digits[0].run_dir / "comparison.json").read_text())["rows"]
    fused = next(row["test_accuracy"] for row in scored if row["method"] == "greedy")  # the method of the plan
    value, text = levels(Page(report))["fused"]
    assert value == pytest.approx(fused, abs=1e-3)
    assert text == f"fused (greedy, test samples): {fused:.1%}"


def test_heat_map_is_the_forgetting_matrix(digits, report):
    matrix = fmn.forgetting_matrix(digits[0].history)
    page = Page(report)
    heat = page.root.find(".//picture")
    top = np.triu(matrix).max()
    assert f"At most {top / 300:.1%} of the samples are right at an epoch" in page.text()
    for uri, direction in ((heat.find("img").get("src"), -1), (heat.find("source").get("srcset"), 1)):
        pixels = picture(uri)[::-1, :, :3]  # epoch i upwards
        assert pixels.shape[:2] == matrix.shape
        colours = [tuple(pixels[i, j]) for i, j in np.ndindex(matrix.shape)]
        values = np.minimum(matrix.ravel(), top)
        assert len(set(colours)) == len(np.unique(values))
        lightness = pixels.reshape(-1, 3) @ [0.2126, 0.7152, 0.0722]
        order = np.argsort(values)
        assert (direction * np.diff(lightness[order]) >= -0.5).all()  # darker, or lighter, with every step


def test_forgotten_samples(digits, report):
    run, x, y = digits
    page, s = Page(report), fmn.sample_statistics(run.history)
    by_class = [[str(k), f"{s.forgotten[y == k].sum()} of {(y == k).sum()}"] for k in range(10)]
    assert [row[:2] for row in page.table("Forgotten samples per class")] == by_class
    cards = page.cards()
    assert len(cards) == min(24, s.forgotten.sum())
    chosen = [int(re.match(r"sample (\d+)", card).group(1)) for card in cards]
    forgotten = np.flatnonzero(s.forgotten)
    order = np.lexsort((s.last_correct[forgotten], -s.correctness[forgotten]))  # of equal ones, the first sample
    assert chosen == forgotten[order[:24]].tolist()
    right = run.history.correct()
    elements = [card for card in page.root.iter("li") if card.find("div") is not None]
    for i, card, element in zip(chosen, cards, elements, strict=True):
        told = f"class {y[i]}, right at {right[:, i].sum()} of 14 epochs, last at {np.flatnonzero(right[:, i])[-1]}"
        assert card == f"sample {i}{told}"
        np.testing.assert_allclose(picture(element.find("img").get("src")), 255 * x[i, 0], atol=0.5)
        runs = re.findall(r"M(\d+) 0H(\d+)", element.find("svg/path").get("d"))
        assert sum(int(b) - int(a) for a, b in runs) == right[:, i].sum()
        assert all(right[int(a) : int(b), i].all() for a, b in runs)


def test_plan_and_comparison(digits, report):
    run, page = digits[0], Page(report)
    plan = fmn.FusionPlan.load(run.run_dir / "plan.json")
    assert page.table("Weight of each checkpoint") == [[str(e), f"{w:.1%}", ""] for e, w in plan.weights.items()]
    expected = [[str(e), f"{eps:.4g}", f"{a:.2%}"] for (e, eps), a in zip(plan.members, plan.accuracy[1:], strict=True)]
    assert page.table("Members of the plan")[1:] == expected
    low, high = (100 * v for v in plan.gain_interval)
    assert f"{plan.cv_accuracy:.2%}, {low:+.1f} to {high:+.1f} points from the final model" in page.text()
    content = json.loads((run.run_dir / "comparison.json").read_text())
    numbers = ("selection_accuracy", "test_accuracy")
    more = ("test_nll", "test_ece")
    rows = [
        [r["method"], str(r["forward_passes"]), *(f"{r[k]:.2%}" for k in numbers), *(f"{r[k]:.3f}" for k in more), ""]
        for r in content["rows"]
    ]
    assert page.table("Methods compared") == rows
    best = {row[0].text for row in page.root.iter("tr") if row.get("class") == "best"}
    top = max(r["test_accuracy"] for r in content["rows"])
    assert best == {r["method"] for r in content["rows"] if r["test_accuracy"] == top}
    assert "Chosen on 300 samples, scored on 697." in page.text()


def test_bars_stand_in_their_column(report):
    """The style sheet draws a bar in a cell of the class "bar" only."""
    cells = [cell for cell in Page(report).root.iter("td") if cell.find("i") is not None]
    assert len(cells) > 20
    assert {cell.get("class") for cell in cells} == {"bar"}


def test_a_sentence_for_each_method(digits, tmp_path):
    sentences = {name: text.replace("\n", " ") for name, text in summaries().items()}
    rows = [{"method": name, **ROW} for name in ("last", "KF", "pool", "auto", "top-k", "mine")]
    table = {"rows": rows, "n_selection": 10, "n_test": 20}
    page = Page(write_report(digits[0].run_dir, tmp_path / "r.html", comparison=table))
    words = ["".join(e.itertext()) for e in page.root.find(".//dl[@class='methods']")]
    assert words == ["KF", sentences["forget"], "pool", sentences["pool"], "auto", sentences["auto"]]
    plan = page.text().split("The plan of the fusion")[1].split("Weights")[0]
    assert plan.endswith(f"{sentences['greedy']} ")


# --- the chart of the accuracy ---


def plots(page):
    return [box for box in page.root.iter("div") if box.get("role") == "img"]


def levels(page):
    """Accuracy and legend of each horizontal line in the first chart."""
    plot = plots(page)[0]
    ticks = [float(s.text.rstrip("%")) / 100 for s in plot.iter("span") if s.get("class") == "y"]
    texts = {li.get("class"): "".join(li.itertext()) for li in page.root.find(".//ul[@class='legend']")}
    found = {}
    for kind in ("fused", "student"):
        assert (kind in texts) == (plot.find(f"svg/path[@class='{kind}']") is not None)
        if kind in texts:
            height = re.fullmatch(r"M0 (\S+)H1000", plot.find(f"svg/path[@class='{kind}']").get("d"))[1]
            found[kind] = round(ticks[-1] - float(height) / 1000 * (ticks[-1] - ticks[0]), 3), texts[kind]
    return found


ROW = {"forward_passes": 2, "selection_accuracy": 0.5, "test_accuracy": 0.25}
SCORED = {"KF": 0.75, "distilled KF": 0.8, "pool": 0.91, "distilled pool": 0.955}
POOL = {"members": ((2, 1.0),), "accuracy": (0.5, 0.7), "method": "pool", "combine": "geometric"}
KF = {"members": ((1, 0.5),), "accuracy": (0.5, 0.625)}


@pytest.mark.parametrize(
    ("plan", "scored", "expected"),
    [
        (None, None, {}),
        (None, {"mine": 0.5}, {}),
        (None, SCORED, {"fused": (0.75, "KF, test samples"), "student": (0.8, "distilled KF, test samples")}),
        (KF, SCORED, {"fused": (0.75, "KF, test samples"), "student": (0.8, "distilled KF, test samples")}),
        (POOL, SCORED, {"fused": (0.91, "pool, test samples"), "student": (0.955, "distilled pool, test samples")}),
        (POOL, {"distilled pool": 1.0}, {"fused": (0.7, "pool, on the samples that chose it: too high"),
                                         "student": (1.0, "distilled pool, test samples")}),
        (POOL | {"cv_accuracy": 0.625}, None, {"fused": (0.625, "pool, cross-validated")}),
        (KF, None, {"fused": (0.625, "KF, on the samples that chose it: too high")}),
        ({"members": (), "accuracy": (0.5,)}, None, {}),
        (KF | {"method": "weights"}, SCORED, {}),
    ],
)  # fmt: skip
def test_accuracy_of_the_fused_model_and_its_student(tmp_path, rng, plan, scored, expected):
    write_run(tmp_path / "run", rng.random((3, 40)) < 0.5)
    if plan is not None:
        fmn.FusionPlan(n_epochs=3, window=0, **plan).save(tmp_path / "run" / "plan.json")
    if scored is not None:
        rows = [{"method": name, **ROW, "test_accuracy": accuracy} for name, accuracy in scored.items()]
        table = {"rows": rows, "n_selection": 10, "n_test": 20}
        (tmp_path / "run" / "comparison.json").write_text(json.dumps(table))
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html"))
    shown = {kind: (value, f"{kind} ({where}): {value:.1%}") for kind, (value, where) in expected.items()}
    assert levels(page) == shown


def test_one_epoch_has_a_level_too(tmp_path):
    write_run(tmp_path / "run", [[1, 0, 0, 1]])
    plan = fmn.FusionPlan(((0, 0.5),), 1, 0, (0.5, 1.0))
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html", plan=plan))
    assert levels(page)["fused"][0] == 1
    assert "The last epoch has the best accuracy." in page.text()


def test_every_axis_has_a_name(report):
    found = [[span.text for span in plot.iter("span") if span.get("class") in ("xname", "yname")]
             for plot in Page(report).root.iter("div") if (plot.get("class") or "").startswith("plot")]  # fmt: skip
    assert found == [["epoch", "% of samples"]] * 2 + [["wrong at epoch j", "right at epoch i"]]


@pytest.mark.parametrize(
    ("correct", "text"),
    [
        ([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]],
         "The best accuracy, 75.0% at epoch 1, is 25.0 points above the final one. "
         "50.0% of the samples are right at that epoch and wrong at the end."),
        ([[1, 0], [0, 1]],
         "The best accuracy, 50.0% at epoch 0, is 0.0 points above the final one. "
         "50.0% of the samples are right at that epoch and wrong at the end."),
        ([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0]],
         "The best accuracy, 60.0% at epoch 1, is 20.0 points above the final one. "
         "20.0% of the samples are right at that epoch and wrong at the end."),
        ([[1, 0], [1, 1]], "The last epoch has the best accuracy."),
    ],
    ids=["a gap", "other samples", "F_e is larger at another epoch", "no gap"],
)  # fmt: skip
def test_the_gap_to_the_peak(tmp_path, correct, text):
    write_run(tmp_path / "run", correct)
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html"))
    assert "".join(page.root.find(".//figcaption").itertext()) == text


# --- class names ---

NAMES = ["cat", "dog", '<b>&"\u202e', "long " * 1000, "none of them"]


def named_page(tmp_path, class_names, n=8):
    if not (tmp_path / "run").exists():
        write_run(tmp_path / "run", [[1] * n, [0] * n])
    y = np.arange(n) % 4
    return Page(write_report(tmp_path / "run", tmp_path / "r.html", labels=y, class_names=class_names))


def test_class_names(tmp_path):
    page = named_page(tmp_path, NAMES)
    assert not page.root.findall(".//b/b")
    shown = ["cat", "dog", '<b>&"\N{REPLACEMENT CHARACTER}', ("long " * 12)[:59] + "…"]
    assert [row[0] for row in page.table("Forgotten samples per class")] == shown
    for i, card in enumerate(page.cards()):
        assert card == f"sample {i}class {shown[i % 4]}, right at 1 of 2 epochs, last at 0"
    (tmp_path / "names.txt").write_text("\n".join(NAMES), "utf-8")
    for given in (tuple(NAMES), np.array(NAMES), tmp_path / "names.txt", str(tmp_path / "names.txt")):
        assert named_page(tmp_path, given).bytes == page.bytes
    assert [row[0] for row in named_page(tmp_path, None).table("Forgotten samples per class")] == list("0123")


def test_a_thousand_names(tmp_path):
    write_run(tmp_path / "run", [[1] * 2000, [0] * 2000])
    names, y = [f"class of number {i}" for i in range(1000)], np.arange(2000) % 1000
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html", labels=y, class_names=names))
    assert [row[0] for row in page.table("Forgotten samples per class")] == names[:12]
    assert [row[0] for row in page.table("1,000 classes, the most forgotten first: 500")] == names[:500]


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["a", "b"], ValueError, "class_names: expected at least 4 names, got 2"),
        ([], ValueError, "class_names: expected at least 4 names, got 0"),
        (["a", "b", "c", 3], TypeError, "class_names: expected a list of strings, got list"),
        ({0: "a"}, TypeError, "class_names: expected a list of strings, got dict"),
        ({"a", "b", "c", "d"}, TypeError, "class_names: expected a list of strings, got set"),
        ([["a", "b", "c", "d"]], TypeError, "class_names: expected a list of strings, got list"),
        (b"abcd", TypeError, "class_names: expected a list of strings, got bytes"),
        ("missing.txt", FileNotFoundError, "missing.txt"),
    ],
)
def test_wrong_class_names(tmp_path, names, error, words):
    with pytest.raises(error, match=words):
        named_page(tmp_path, names)
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(ValueError, match="class_names: needs labels"):
        write_report(tmp_path / "run", tmp_path / "r.html", class_names=["a", "b", "c", "d"])


def test_without_labels_images_plan_and_comparison(tmp_path, rng):
    write_run(tmp_path / "run", rng.random((5, 40)) < 0.5)
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html"))
    assert "The plan" not in page.text()
    assert "By class" not in page.text()
    assert len(list(page.root.iter("img"))) == 1  # the matrix
    assert page.cards()


def test_what_is_passed_wins_over_what_lies_there(digits, tmp_path):
    run, plan = digits[0], fmn.FusionPlan.from_weights({0: 1, 13: 3}, 14)
    table = {"rows": [{"method": "mine", "forward_passes": 2, "selection_accuracy": 0.5, "test_accuracy": 0.25}]}
    table |= {"n_selection": 10, "n_test": 20}
    page = Page(write_report(run.run_dir, tmp_path / "r.html", plan=plan, comparison=table))
    assert page.table("Weight of each checkpoint") == [["0", "25.0%", ""], ["13", "75.0%", ""]]
    assert "selection set" not in page.text()  # of mere weights the accuracy is not known
    assert page.table("Methods compared") == [["mine", "2", "50.00%", "25.00%", ""]]


def test_the_plan_of_a_pool(digits, tmp_path):
    weights = {2: 0.25, 13: 1.5}
    plan = fmn.FusionPlan(((13, 1.5), (2, 0.25)), 14, 0, (0.5, 0.75), "pool", combine="geometric")
    page = Page(write_report(digits[0].run_dir, tmp_path / "r.html", plan=plan))
    assert page.table("Weight of each checkpoint") == [[str(e), f"{w:.3f}", ""] for e, w in weights.items()]
    assert "a weighted geometric mean of 2 checkpoints" in page.text()
    assert "75.00%" in page.text()
    assert "Members, in the order found" not in page.text()


def test_the_demos_cell_is_a_comparison(digits, tmp_path):
    run = digits[0]
    folder = tmp_path / "seed_0"
    write_run(folder, run.history.correct())
    content = {"format": "fmn_ref.demo-cell", "version": 1, "settings": {}}
    content |= json.loads((run.run_dir / "comparison.json").read_text())
    (folder / "cell.json").write_text(json.dumps(content))
    assert len(Page(write_report(folder, tmp_path / "r.html")).table("Methods compared")) == len(content["rows"])


def test_epochs_of_a_plan(tmp_path, rng):
    """Those that the plan names, else the history's if it has as many rows, else rows."""
    epochs = [0, 10, 20, 50, 100]
    write_run(tmp_path / "run", rng.random((5, 40)) < 0.5, epochs=epochs)
    for e in (10, 50, 100):
        (tmp_path / "run" / "checkpoints" / f"epoch_{e:05d}.pt").write_bytes(b"")

    def rows(n_epochs, numbers=()):
        plan = fmn.FusionPlan(((1, 0.5),), n_epochs, 0, (0.5, 0.75), epochs=numbers)
        page = Page(write_report(tmp_path / "run", tmp_path / "r.html", plan=plan))
        return [row[0] for row in page.table("Weight of each checkpoint")], page.text()

    assert rows(5)[0] == ["10", "100"]
    assert rows(3, (10, 50, 100))[0] == ["50", "100"]
    assert "The plan was made from 3 epochs, the run has 5." in rows(3, (10, 50, 100))[1]
    assert "counted from 0" not in rows(3, (10, 50, 100))[1]
    assert rows(4)[0] == ["1", "3"]
    assert "The plan was made from 4 epochs, the run has 5. Its rows are counted from 0 here." in rows(4)[1]
    alone = write_report(tmp_path / "run", tmp_path / "r.html", plan=fmn.FusionPlan((), 5, 1, (0.5,)))
    assert "The final model alone is best" in Page(alone).text()
    last = write_report(tmp_path / "run", tmp_path / "r.html", plan=fmn.FusionPlan.from_weights({4: 1}, 5))
    assert "weighted mean of 1 checkpoint" in Page(last).text()


@pytest.mark.parametrize(
    "correct",
    [[[1, 0, 1]], [[1], [0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0, 1], [0, 1, 1]], [[1, 1, 0], [0, 0, 0]]],
    ids=["one epoch", "one sample", "all wrong", "all right", "nothing forgotten", "all forgotten"],
)
def test_degenerate_runs(tmp_path, correct):
    write_run(tmp_path / "run", np.array(correct, bool))
    n = len(correct[0])
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html", labels=np.arange(n), images=np.zeros((n, 2, 2))))
    forgotten = fmn.sample_statistics(np.array(correct)).forgotten.sum()
    assert page.tiles()["Forgotten samples"].startswith(f"{forgotten}of {n}")
    assert "nan" not in page.source
    assert "inf" not in re.sub(r"base64,[^\"]*", "", page.source)


# --- pictures ---


def test_every_layout_of_images_gives_the_same_pictures(tmp_path, rng):
    write_run(tmp_path / "run", [[1] * 6, [0] * 6])
    grey, colour = rng.integers(0, 256, (6, 5, 7), np.uint8), rng.integers(0, 256, (6, 5, 7, 3), np.uint8)
    np.savez(tmp_path / "both.npz", images=colour)

    def pictures(images):
        page = Page(write_report(tmp_path / "run", tmp_path / "r.html", images=images))
        return [img.get("src") for li in page.root.iter("li") for img in li.iter("img")]

    expected = pictures(grey)
    np.testing.assert_array_equal(picture(expected[2]), grey[2])
    for images in (grey[..., None], grey[:, None], grey / 255, torch.from_numpy(grey)):
        assert pictures(images) == expected
    expected = pictures(colour)
    np.testing.assert_array_equal(picture(expected[3])[..., :3], colour[3])
    for images in (np.moveaxis(colour, 3, 1), tmp_path / "both.npz", (colour / 255).astype(np.float32)):
        assert pictures(images) == expected
    stretched = picture(pictures(grey.astype(np.int64) * 2 - 100)[1])  # normalised in some way
    low, high = int(grey[1].min()), int(grey[1].max())
    np.testing.assert_allclose(stretched, (grey[1] - low) * 255.0 / (high - low), atol=0.51)


def test_large_pictures_shrink(tmp_path):
    write_run(tmp_path / "run", [[1, 1], [0, 0]])
    images = np.zeros((2, 300, 100), np.uint8)
    images[:, :150] = 200
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html", images=images))
    small = picture(page.root.find(".//li/img").get("src"))
    assert small.shape == (75, 25)
    assert (small[:37] == 200).all()
    assert (small[38:] == 0).all()
    for shape in ((2, 1, 5000), (2, 5000, 1, 3), (2, 97, 97)):
        page = Page(write_report(tmp_path / "run", tmp_path / "r.html", images=np.ones(shape)))
        assert max(picture(page.root.find(".//li/img").get("src")).shape) <= 96


# --- nothing from elsewhere, nothing trusted ---


def test_the_file_is_complete_in_itself(report):
    page = Page(report)
    for element in page.root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "xlink:href", "action", "poster", "data"):
                assert value.startswith("data:image/png;base64,")
    assert not page.tags() & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|url\(|@import", page.source)
    policy = [m.get("content") for m in page.root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_drawings_are_well_formed(report):
    drawings = re.findall(r"<svg.*?</svg>", report.read_text("utf-8"), re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        ET.fromstring(drawing)


def test_the_same_run_gives_the_same_file(digits, report, tmp_path):
    run, x, y = digits
    again = write_report(run.run_dir, tmp_path / "again.html", labels=y, images=x)
    assert again.read_bytes() == report.read_bytes()


HOSTILE = (
    '</title></style><script>alert(1)</script><img src=x onerror=alert(2)>"\' onload="alert(3)&lt;\u202e\ud800\n\0'
)


def test_hostile_strings_are_shown_as_they_are(tmp_path, rng):
    name = HOSTILE.replace("/", "|").replace("\0", "").replace("\ud800", "").replace("\n", "")
    correct = rng.random((5, 40)) < 0.5
    table = {
        "rows": [{"method": HOSTILE, "forward_passes": 2, "selection_accuracy": 0.5, "test_accuracy": 0.25}],
        "notes": [HOSTILE],
        "n_selection": 1,
        "n_test": 1,
    }
    pages = []
    for folder, text in ((tmp_path / name, HOSTILE), (tmp_path / "plain", "plain")):
        write_run(folder, correct, config={text: text, "list": [text], "long": text * 1000})
        table["rows"][0]["method"] = table["notes"][0] = text
        (folder / "comparison.json").write_text(json.dumps(table))
        pages.append(Page(write_report(folder, tmp_path / "r.html")))
    hostile, plain = pages
    assert [e.tag for e in hostile.root.iter()] == [e.tag for e in plain.root.iter()]
    assert [sorted(e.attrib) for e in hostile.root.iter()] == [sorted(e.attrib) for e in plain.root.iter()]
    assert hostile.text().count("<script>alert(1)") >= 6
    assert not set(hostile.source) & set("\u202e\0")
    assert len(hostile.bytes) < 40_000
    assert hostile.table("Settings of the run")[2][1].endswith("…")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"labels": [0, 1]}, ValueError, "labels: expected 4 samples, got 2"),
        ({"labels": [0, 1, 2, 4]}, ValueError, "labels: not the labels"),
        ({"labels": [0.0, 1, 2, 3]}, TypeError, "labels: expected integers"),
        ({"labels": "missing.npy"}, FileNotFoundError, "missing.npy"),
        ({"images": np.zeros((3, 2, 2))}, ValueError, r"images: expected shape \(4, h, w\).*got shape \(3, 2, 2\)"),
        ({"images": np.zeros((4, 2))}, ValueError, "images: expected shape"),
        ({"images": np.zeros((4, 2, 2, 2))}, ValueError, "images: expected shape"),
        ({"images": np.zeros((4, 0, 2))}, ValueError, "images: expected shape"),
        ({"images": np.full((4, 2, 2), np.nan)}, ValueError, "images: expected finite numbers, sample 1"),
        ({"images": [["a"]]}, TypeError, "images: expected"),
        ({"plan": "missing.json"}, FileNotFoundError, "missing.json"),
        ({"plan": "damaged.json"}, ValueError, r"damaged.json: not a fmn_ref.plan file"),
        ({"plan": 3}, TypeError, "plan: expected a FusionPlan or a path, got int"),
        ({"comparison": "missing.json"}, FileNotFoundError, "missing.json"),
        ({"comparison": "damaged.json"}, ValueError, "damaged.json: not a comparison"),
        ({"comparison": "list.json"}, ValueError, "list.json: not a comparison"),
        ({"comparison": {"rows": []}}, ValueError, "comparison: not a comparison.*rows: expected at least one"),
        ({"comparison": {"rows": [{"method": "a"}]}}, ValueError, "missing 'forward_passes'"),
        ({"output": "report.txt"}, ValueError, "output: expected a name ending in .html, got 'report.txt'"),
        ({"output": "nowhere/report.html"}, FileNotFoundError, "nowhere"),
        ({"run_dir": "nowhere"}, FileNotFoundError, "nowhere: no run there"),
        ({"run_dir": "begun"}, FileNotFoundError, "begun: nothing recorded yet"),
        ({"run_dir": "empty"}, ValueError, "empty: nothing recorded yet"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, arguments, error, words):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", [[1, 1, 0, 1], [1, 0, 1, 1]], labels=[0, 1, 2, 3])
    fmn.Recorder("begun")
    write_run(tmp_path / "empty", [[1, 0, 0, 1]])
    fmn.CorrectnessHistory.open("empty/history.fmnh").truncate(0)
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "report.html").write_text("what was there")
    with pytest.raises(error, match=words):
        write_report(**{"run_dir": "run", "output": "report.html"} | arguments)
    assert (tmp_path / "report.html").read_text() == "what was there"


def test_command_line(digits, tmp_path, monkeypatch, capsys):
    run, x, y = digits
    monkeypatch.chdir(tmp_path)
    np.savez("val.npz", images=x, labels=y)
    (tmp_path / "names.txt").write_text("".join(f"the {i}\r\n" for i in range(10)))
    args = ["report", str(run.run_dir), "--labels", "val.npz", "--images", "val.npz", "--class-names", "names.txt"]
    assert main(args) == 0
    first = run.run_dir / "report.html"
    assert capsys.readouterr().out == f"report written to {first} ({-(-first.stat().st_size // 1000)} kB)\n"
    assert [row[0] for row in Page(first).table("Forgotten samples per class")] == [f"the {i}" for i in range(10)]
    plan, comparison = (str(run.run_dir / name) for name in ("plan.json", "comparison.json"))
    assert main([*args, "--plan", plan, "--comparison", comparison, "-o", "again.html", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == {"output": "again.html", "bytes": os.path.getsize("again.html")}
    assert (tmp_path / "again.html").read_bytes() == first.read_bytes()
    (tmp_path / "names.txt").write_text("one\n")
    assert main(args) == 1
    words = "names.txt: class_names: expected at least 10 names, got 1"
    assert capsys.readouterr().err == f"fmn-ref: error: {words}\n"
    assert main(["report", "nowhere"]) == 1
    assert capsys.readouterr().err == "fmn-ref: error: nowhere: no run there (run.json is missing)\n"


# --- large runs ---


def write_large(folder, n_samples, rows):
    """Write packed rows as docs/reference/formats.md describes the file: appending them takes minutes."""
    fmn.Recorder(folder)
    fmn.CorrectnessHistory(n_samples, folder / "history.fmnh")
    with open(folder / "history.fmnh", "ab") as file:
        for epoch, row in enumerate(rows):
            number, bits = struct.pack("<q", epoch), row.tobytes().ljust(-(-len(row) // 64) * 64, b"\0")
            file.write(b"EPOC" + struct.pack("<I", zlib.crc32(bits, zlib.crc32(number))) + number + bytes(48) + bits)


def test_a_large_run_gives_a_small_file_soon(tmp_path, rng):
    n = 200_000
    write_large(tmp_path / "run", n, (rng.integers(0, 256, n // 8, np.uint8) for _ in range(1000)))
    images = np.broadcast_to(rng.integers(0, 256, (1, 192, 192, 3), np.uint8), (n, 192, 192, 3))  # cannot be compressed
    begin = time.process_time()
    path = write_report(tmp_path / "run", tmp_path / "r.html", labels=rng.integers(0, 1000, n), images=images)
    took = time.process_time() - begin
    assert path.stat().st_size < 3_000_000
    assert took < 60 or fmn.backend().name == "numpy"
    page = Page(path)
    curves = fmn.forgetting_curves(fmn.Run.open(tmp_path / "run").history)
    assert page.tiles()["Peak forget fraction"] == f"{curves.forget.max():.1%}at epoch {curves.forget.argmax()}"
    assert picture(page.root.find(".//picture/img").get("src")).shape[:2] == (200, 200)
    rows = page.table("Numbers of each epoch")
    assert len(rows) <= 503
    assert {int(r[0]) for r in rows} >= {0, curves.accuracy.argmax(), curves.forget.argmax(), 999}
    for row in rows:
        assert row[1] == f"{curves.accuracy[int(row[0])]:.2%}"


def test_lines_of_many_epochs_keep_their_extremes(tmp_path, rng):
    correct = rng.random((7001, 48)) < 0.5
    correct[4321], correct[-1] = True, False
    write_large(tmp_path / "run", 48, np.packbits(correct, axis=1, bitorder="little"))
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html"))
    accuracy = correct.mean(1)
    path = next(p.get("d") for p in page.root.iter("path") if p.get("class") == "accuracy")
    x, y = np.array([p.split() for p in path[1:].split("L")], float).T
    assert len(x) <= 1002
    assert x[y.argmin()] == pytest.approx(1000 * 4321 / 7000, abs=0.06)
    for a in range(0, 1000, 100):  # the highest of every tenth, from 100 % at the top
        inside, rows = (x > a + 1) & (x < a + 99), slice(int(7.01 * a) + 7, int(7.01 * a) + 693)
        assert 1 - y[inside].min() / 1000 == pytest.approx(accuracy[rows].max(), abs=0.03)


# --- in a browser ---


# Chromium reads commands from descriptor 3 and answers on 4.
START = """
import fcntl, os, sys
its_in, its_out = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(its_in, 3), os.dup2(its_out, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Browser:
    """Headless Chromium, controlled by the DevTools protocol over two pipes."""

    def __init__(self, program, folder):
        answers, its_out = os.pipe()
        its_in, commands = os.pipe()
        chromium = (program, *FLAGS, "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={folder}")
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(its_in), str(its_out), *chromium],
            pass_fds=(its_in, its_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        self.commands, self.answers = os.fdopen(commands, "wb", buffering=0), os.fdopen(answers, "rb")
        self.n, self.session = 0, {}

    def open_tab(self):
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def __call__(self, method, **params):
        self.n += 1
        message = {"id": self.n, "method": method, "params": params, **self.session}
        self.commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.n:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def message(self):
        watchdog = threading.Timer(300, self.process.kill)  # a browser that hangs fails the test
        watchdog.start()
        try:
            return json.loads(b"".join(iter(lambda: self.answers.read(1) or b"\0", b"\0")))
        finally:
            watchdog.cancel()

    def show(self, path, width, height, scheme):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=path.as_uri())
        end = time.monotonic() + 300
        while self.ask("location.href + document.readyState") != path.as_uri() + "complete":
            assert time.monotonic() < end, f"{path} is not loaded"
            time.sleep(0.02)

    def ask(self, expression):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self):
        png = base64.b64decode(self("Page.captureScreenshot", format="png")["data"])
        return (255 * matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]).round().astype(int)

    def close(self):
        self.commands.close()  # which ends it
        self.answers.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # on a busy machine
            self.process.wait(30)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"needs one of {', '.join(names)} (Debian: apt-get install chromium)")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    try:
        browser.open_tab()
        yield browser
    finally:
        browser.close()


# Contrast (WCAG 2) of the colour of each element that has text with the colour behind it.
CONTRAST = """(() => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255)); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    found.push((a + .05) / (b + .05));
  }
  return [found.length, Math.min(...found)];
})()"""
# Elements that stick out of the page sideways, except inside a box that scrolls.
OUTSIDE = """[...document.body.querySelectorAll("*")].filter(e => {
  const box = e.getBoundingClientRect();
  return !e.closest(".scroll") && (box.right > innerWidth + .5 || box.left < -.5);
}).map(e => e.outerHTML)"""


# Pairs of labels of one chart that lie over each other.
OVERLAPS = """[...document.querySelectorAll(".plot")].flatMap(plot => {
  const labels = [...plot.querySelectorAll("span:not(.dot)")].map(e => [e.textContent, e.getBoundingClientRect()]);
  return labels.flatMap(([a, p], i) => labels.slice(i + 1).filter(([b, q]) =>
    p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom).map(([b, q]) => a + " | " + b));
})"""


@pytest.fixture(scope="module")
def long_report(tmp_path_factory):
    """Report with contents that may not fit: many classes, long words, large numbers."""
    folder, rng = tmp_path_factory.mktemp("long"), np.random.default_rng(2)
    epochs = (np.arange(30) * 41_234_567).tolist()
    write_run(folder / ("run" * 60), rng.random((30, 5000)) < 0.5, config={"k" * 90: "v" * 300}, epochs=epochs)
    row = {"forward_passes": 1000, "selection_accuracy": 1.0, "test_accuracy": 1.0}
    table = {"rows": [{"method": "m" * 200, **row}, {"method": "a b", **row}], "notes": ["n" * 300]}
    labels = rng.integers(0, 60, 5000)
    plan = fmn.FusionPlan(tuple((i, 0.5) for i in range(29)), 30, 1, (0.5,) * 30)
    names = ["n" * 500, "two words " * 50] * 30
    options = {
        "class_names": names,
        "labels": labels,
        "plan": plan,
        "comparison": table | {"n_selection": 10**9, "n_test": 10**9},
    }
    return write_report(folder / ("run" * 60), folder / "r.html", images=rng.random((5000, 4, 200)), **options)


@pytest.mark.parametrize(("width", "height"), [(360, 740), (400, 800), (1280, 900)])
@pytest.mark.parametrize("which", ["report", "long_report"])
def test_in_a_browser(browser, request, which, width, height):
    path = request.getfixturevalue(which)
    corners = {}
    for scheme in ("light", "dark"):
        browser.show(path, width, height, scheme)
        browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.ask("document.documentElement.scrollWidth") == browser.ask("innerWidth") == width
        assert browser.ask(OUTSIDE) == []
        assert browser.ask(OVERLAPS) == []
        assert browser.ask("[...document.images].every(i => i.naturalWidth > 0)")
        elements, contrast = browser.ask(CONTRAST)
        assert elements > 100
        assert contrast >= 4.5
        loaded = browser.ask("performance.getEntriesByType('resource').map(r => r.name)")
        assert all(name.startswith("data:") for name in loaded)
        shown = browser.screenshot()
        assert shown.shape == (height, width, 3)
        corners[scheme] = shown[0, 0].tolist()
        heat = browser.ask("document.querySelector('picture img').currentSrc")
        assert (heat == Page(path).root.find(".//picture/img").get("src")) == (scheme == "light")
    assert min(corners["light"]) > 240
    assert max(corners["dark"]) < 40


def test_epochs_that_are_equal_as_floats(tmp_path):
    """Numbers of 2^62 and one more: their difference is zero as floating-point numbers."""
    recorder = fmn.Recorder(tmp_path / "run")
    for epoch in (2**62 - 1, 2**62):
        recorder.record(epoch, [0, 1, epoch % 2], [0, 1, 1])
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html"))
    path = next(p.get("d") for p in page.root.iter("path") if p.get("class") == "forget")
    assert [float(p.split()[0]) for p in path[1:].split("L")] == [0, 1000]


def test_paths_below_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    fmn.Recorder("~/run").record(0, [0, 1, 1], [0, 1, 1])
    assert write_report("~/run", "~/run/report.html") == tmp_path / "run" / "report.html"
    assert (tmp_path / "run" / "report.html").is_file()
