"""Every example of the README and the docs runs as it is written; every link and every quoted number has its source."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import history_of, random_probs
from networks import make_data, make_model
from pages import block, blocks
from safetensors_files import read_folder, write_folder

import fmn_ref as fmn
from fmn_ref import demo
from fmn_ref.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def page(name):
    return next((ROOT / "docs").rglob(f"{name}.md")).read_text()


def commands(text):
    """The fmn-ref commands of a page, as lists of arguments."""
    lines = "".join(blocks(text, "")).replace("\\\n", "").splitlines()
    return [shlex.split(line.split(" > ")[0], comments=True)[1:] for line in lines if line.startswith("fmn-ref ")]


def check_output(printed, shown):
    """The same words; percentages within 5 points, for other machines train to other bits."""
    texts = [re.sub(r"[\d.]+|\[[\d, ]+\]", "#", text).strip() for text in (printed, shown)]
    assert texts[0] == texts[1]
    values = [[float(v) for v in re.findall(r"([\d.]+)%", text)] for text in (printed, shown)]
    np.testing.assert_allclose(*values, atol=5)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data():
    """The names that the pages use for data and models."""
    (x_train, y_train), (x_val, y_val), (x_test, y_test) = make_data()
    names = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test, "fmn": fmn}
    names |= dict.fromkeys(("x_val", "x_select"), x_val) | dict.fromkeys(("y_val", "y_select"), y_val)
    torch.manual_seed(0)
    return names | {"model": make_model(), "make_model": make_model, "epochs": 4}


def train_one_epoch(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.nn.functional.cross_entropy(model.train()(x), y).backward()
    optimizer.step()


def test_readme_and_quickstart(capsys):
    """The quickstart trains what the README trained, and so returns the stored run at once."""
    exec(block(README, "## Example"), {})
    check_output(capsys.readouterr().out, block(README, "## Example", ""))
    text, names = page("quickstart"), {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if blocks(section):
            exec(blocks(section)[0], names)
            printed = capsys.readouterr().out
            if blocks(section, ""):
                check_output(printed, blocks(section, "")[0])
            else:  # a table, of which the page shows some rows
                shown, whole = (re.findall(r"^(\| [^|]+)", text, re.MULTILINE) for text in (section, printed))
                assert shown
                assert set(shown) <= set(whole)
    for command in commands(text):
        assert main(command) == 0, capsys.readouterr().err


def test_the_front_page(data):
    (recording,), train = blocks(page("index").split("## I train")[0]), block(page("index"), "## I train")
    names = dict(data)
    Path("runs/old").mkdir(parents=True)
    for epoch in (3, 20):
        torch.save(data["model"].state_dict(), f"runs/old/epoch_{epoch}.pt")
    names["val_data"] = data["x_val"], data["y_val"]
    exec(recording, names)
    assert names["run"].history.epochs == (3, 20)
    names |= {"train_data": (data["x_train"], data["y_train"]), "val_data": (data["x_val"], data["y_val"])}
    exec(train.replace("epochs=40", "epochs=2, progress=False"), names)
    assert len(names["run"].history) == 2


def test_own_loop(data):
    pytest.importorskip("matplotlib")

    def predict(model, x):
        with torch.no_grad():
            return model.eval()(x)

    def train(model):
        train_one_epoch(model, data["x_train"], data["y_train"])

    names = data | {"train_one_epoch": train, "predict": predict}
    for code in blocks(page("own-loop")):
        exec(code, names)
    assert names["fused"](data["x_val"]).shape == names["student"](data["x_val"]).shape == (240, 4)
    assert Path("curves.png").exists()


def test_figures_and_report(data, capsys):
    pytest.importorskip("matplotlib")
    train, val = (data["x_train"], data["y_train"]), (data["x_val"], data["y_val"])
    data["run"] = fmn.train(data["model"], train, val, epochs=4, run_dir="runs/mine", progress=False)
    text = page("figures-and-report")
    for code in blocks(text):
        exec(code, data)
    np.save("labels.npy", val[1])
    Path("classes.txt").write_text("\n".join(data["names"]))
    for command in commands(text):
        assert main(command) == 0, capsys.readouterr().err
    assert Path("runs/mine/report.html").read_bytes() == Path("report.html").read_bytes()


def test_existing_checkpoints(data, capsys):
    Path("runs/old").mkdir(parents=True)
    paths = [Path(f"runs/old/checkpoint_{i}.pt") for i in range(4)]
    for path in paths:
        train_one_epoch(data["model"], data["x_train"], data["y_train"])
        torch.save(data["model"].state_dict(), path)
    names = data | {"paths": paths}
    for code in blocks(page("existing-checkpoints")):
        exec(code, names)
    assert names["log_probs"].shape == (240, 4)
    assert names["student"](data["x_test"]).shape == (240, 4)
    np.testing.assert_array_equal(names["run"].history.correct(), names["recorder"].run.history.correct())
    assert "| auto |" in capsys.readouterr().out


def test_existing_checkpoints_on_the_command_line(data, capsys):
    Path("runs/old").mkdir(parents=True)
    for epoch in range(4):
        train_one_epoch(data["model"], data["x_train"], data["y_train"])
        torch.save(data["model"].state_dict(), f"runs/old/checkpoint_{epoch}.pt")
    functions = "def select_data():\n    return make_data()[1]\n\ndef test_data():\n    return make_data()[2]\n"
    Path("mine.py").write_text(f"from networks import make_data, make_model\n\n{functions}")
    for command in commands(page("existing-checkpoints")):
        capsys.readouterr()
        assert main(command) == 0, command
        if command[0] == "compare":
            Path("runs/a/comparison.json").write_text(capsys.readouterr().out)
    report = Path("runs/a/report.html").read_text()
    assert "The plan of the fusion" in report
    assert "pool" in report
    assert "greedy" in report  # a row of the comparison alone


def test_disk_budget_and_split(data):
    record, fuse = blocks(page("disk-budget"))
    exec(record, data)
    for epoch in range(3):
        train_one_epoch(data["model"], data["x_train"], data["y_train"])
        with torch.no_grad():
            data["recorder"].record(epoch, data["model"].eval()(data["x_val"]), data["y_val"])
    exec(fuse, data)
    data["run"] = data["recorder"].run
    plan, same = blocks(page("choose-a-split"))
    exec(plan + same, data)
    assert data["same"].weights == pytest.approx(data["plan"].weights)


def test_training_guide(capsys):
    def images(n):
        y = torch.arange(n) % 4
        return torch.randn(n, 1, 8, 8) + y[:, None, None, None], y

    def make_model():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))

    (x_train, y_train), (x_val, y_val) = images(128), images(64)
    names = dict(locals(), model=make_model())
    for code in blocks(page("train-and-distil")):
        exec(code, names)
    assert len(names["sweep"].rows) == 4
    assert names["student"](x_val).shape == (64, 4)
    capsys.readouterr()


def test_averaging_weights(data, capsys):
    """The last block needs safetensors: tests/integrations/test_transformers.py has it."""
    model, averaged = data["model"], blocks(page("average-weights"))
    recorder = fmn.Recorder("run", model)
    for epoch, name in enumerate(("checkpoint-500", "checkpoint-1000", "checkpoint-1500")):
        torch.manual_seed(epoch)
        model.load_state_dict(data["make_model"]().state_dict())
        recorder.record(epoch, model.eval()(data["x_val"]), data["y_val"])
        write_folder(name, model.state_dict())
    data |= {"run": recorder.run, "plan": fmn.FusionPlan.from_weights({0: 0.2, 1: 0.3, 2: 0.5}, 3)}
    exec(averaged[0], data)
    exec(averaged[1], data)
    found, _ = read_folder(data["folder"])
    for name, p in data["model"].named_parameters():
        assert torch.equal(found[name], p), name
    capsys.readouterr()


def test_several_processes(data, monkeypatch):
    """One process; test_distributed.py has several."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    data |= {"train": (data["x_train"], data["y_train"]), "val": (data["x_val"], data["y_val"])}
    exec(block(page("several-processes"), "# Use"), data)
    assert data["plan"].n_epochs == 3


def test_arrays_and_command_line(capsys):
    p, labels = random_probs(np.random.default_rng(1))
    text = page("arrays")
    names = {"probs": p[:, :30], "labels": labels[:30], "test_probs": p[:, 30:]}
    np.save("probs.npy", p[:, :30])
    np.save("labels.npy", labels[:30])
    np.save("test_probs.npy", p[:, 30:])
    np.save("test_labels.npy", labels[30:])
    first, larger, slices, parts, groups = blocks(text)
    exec(first, names)
    np.testing.assert_array_equal(names["fused"], fmn.FusionPlan.load("plan.json").apply(p[:, 30:]))
    whole = names["samples"]
    np.save("correct.npy", names["correct"])
    history_of(names["correct"], "history.fmnh")
    exec(larger, names)
    expected = names["curves"]
    exec(slices, names)
    np.testing.assert_array_equal(names["events"], whole.forgetting_events)
    exec(parts, names)
    np.testing.assert_array_equal(names["curves"].counts, expected.counts)
    np.testing.assert_array_equal(names["samples"].forgotten, whole.forgotten)
    exec(groups, names)
    assert capsys.readouterr().out.splitlines()[-1] == "(5, 8)"
    recorder = fmn.Recorder("runs/mine")
    for epoch, row in enumerate(p[:, :30]):
        recorder.record(epoch, row, labels[:30])
    assert len(commands(text)) == 6
    for command in commands(text):
        assert main(command) == 0, capsys.readouterr().err


def test_graded_answers(capsys):
    pytest.importorskip("matplotlib")
    text, names = page("graded-answers"), {}
    shutil.copytree(ROOT / "tests" / "data" / "lm_eval", "out")
    Path("out/README.md").unlink()
    first, sampled, series, *_ = commands(text)
    assert main([*first[:2], *sorted(map(str, Path("out").glob("check*"))), *first[3:]]) == 0, capsys.readouterr().err
    assert blocks(text, "text")[0] in capsys.readouterr().out
    for command in (sampled, series):
        assert main(command) == 0, capsys.readouterr().err
    for code in blocks(text):
        exec(code, names)
    shares = [f"{100 * fmn.pass_at_k(names['correct'], 32, last=n).mean():.0f} %" for n in (1, 8)]
    assert shares == re.findall(r"\d+ %", text.rpartition("*Simulated")[2])
    assert Path("pass_at_k.png").exists()
    assert "3 checkpoints: Pass@5" in capsys.readouterr().out


def test_every_method_has_its_row():
    with pytest.raises(ValueError, match="method") as error:
        fmn.fuse(np.full((2, 2, 2), 0.5), [0, 1], method="?")
    known = set(re.findall(r"'(\w+)'", str(error.value)))
    assert set(re.findall(r"^\| `(\w+)` \|", page("choose-a-method"), re.MULTILINE)) == known


def test_reading_a_history(rng, capsys):
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    text = page("read-history")
    labels = rng.integers(0, 3, 1003)
    recorder = fmn.Recorder("runs/mine")
    for epoch in range(5):
        recorder.record(epoch, np.where(rng.random(1003) < 0.6, labels, 3), labels)
    shutil.copy("runs/mine/history.fmnh", "history.fmnh")
    correct = recorder.run.history.correct()

    for command in commands(text):
        assert main(command) == 0, capsys.readouterr().err
    assert len(Path("samples.csv").read_text().splitlines()) == 1004
    exec(block(text, "## As an array"), {})
    np.testing.assert_array_equal(np.load("correct.npy"), correct)
    Path("read.c").write_text(block(text, "## Byte by byte", "c"))
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", "-std=c99", *warnings, "read.c", "-o", "read"], check=True)
    done = subprocess.run([Path("read").resolve()], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"epoch {e}: {row.mean():.4f}\n" for e, row in enumerate(correct))


def test_reading_a_history_without_the_package(rng):
    correct = rng.random((5, 1000)) < 0.5
    history_of(correct, "history.fmnh")
    names = {}
    exec(block((ROOT / "docs" / "reference" / "formats.md").read_text(), "## history.fmnh", "python"), names)
    np.testing.assert_array_equal(names["correct"], correct)


@pytest.mark.parametrize("method", ["forget", "pool"])
def test_applying_a_plan_without_the_package(rng, method):
    p, labels = random_probs(rng)
    p[p < 0.01] = 0
    p /= p.sum(-1, keepdims=True)
    plan = fmn.fuse(p, labels, method=method)
    assert plan.forward_passes > 1
    plan.save("plan.json")
    names = {"probs": p}
    exec(block(page("formats"), "## plan.json"), names)
    np.testing.assert_allclose(names["fused"], plan.apply(p), atol=1e-12)


def test_the_demo_page_has_the_committed_table():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert demo.accuracy_table(results) in page("demo")
    assert demo.calibration_table(results) in page("demo")


def test_the_readme_quotes_its_sources():
    rows = [line.split("|")[1:-1] for line in README.split("| setting |")[1].split("\n\n")[0].splitlines()[2:]]
    assert 1 <= len(rows) <= 6
    for _, *cells, source in rows:
        text = (ROOT / re.search(r"\((.+)\)", source).group(1)).read_text()
        numbers = re.findall(r"\d+\.\d", " ".join(cells))
        assert numbers, source
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text), f"{source}: {number}"


def test_the_readme_is_short():
    assert len(README.split()) <= 1000


def slugs(path):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def texts():
    yield from ((path, path.read_text()) for path in PAGES)
    cells = json.loads(TUTORIAL.read_text())["cells"]
    yield TUTORIAL, "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def test_links_lead_somewhere():
    for path, text in texts():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("https://"):
                continue
            name, _, anchor = link.partition("#")
            target = Path(os.path.normpath(path.parent / name)) if name else path
            assert target.exists(), f"{path.relative_to(ROOT)}: {link}"
            assert not anchor or anchor in slugs(target), f"{path.relative_to(ROOT)}: {link}"


def test_code_fits_the_site():
    code = [
        (path, line)
        for path, text in texts()
        for f in re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
        for line in f.splitlines()
    ]
    cells = json.loads(TUTORIAL.read_text())["cells"]
    code += [(TUTORIAL, line) for c in cells if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()]
    for path, line in code:
        assert len(line) <= 80, f"{path.relative_to(ROOT)}: {line}"
