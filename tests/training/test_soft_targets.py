"""Soft targets: cached on disk, one set per view, cut to the top classes."""

import json
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from folders import contents, flip_bit
from networks import RECIPE, make_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_runs import fresh, interrupted_at, same_weights

import fmn_ref as fmn
from fmn_ref.training import soft_targets

TRAIN, VAL, TEST = make_data()


def distilled(teacher, folder=None, **options):
    return fmn.distill(fresh(3), teacher, TRAIN, **RECIPE | {"epochs": 6, "run_dir": folder, **options})


def noisy(x):
    return x + 0.1 * torch.randn_like(x)


def test_cached_targets_are_on_disk(teacher, tmp_path):
    student = distilled(teacher, tmp_path)
    stored = np.load(tmp_path / "targets" / "view_00000.log_probs.npy")
    np.testing.assert_allclose(stored, teacher(TRAIN[0]).numpy(), atol=1e-5)
    assert same_weights(student, distilled(teacher))


def test_the_teacher_sees_each_view_once_and_the_student_replays_them(teacher, tmp_path, monkeypatch):
    asked, seen = [], []

    class Listening(nn.Module):
        def forward(self, x):
            asked.append(x)
            return teacher(x)

    real = soft_targets.Cached.step

    def step(self, student, batch):
        seen.append(batch[0])
        return real(self, student, batch)

    monkeypatch.setattr(soft_targets.Cached, "step", step)
    distilled(Listening(), tmp_path, augment=noisy, targets="cached-views", views=2)
    n = len(TRAIN[0])
    assert sum(len(x) for x in asked) == 2 * n
    rows = [{tuple(r.tolist()) for r in torch.cat(seen)[e * n : (e + 1) * n]} for e in range(6)]
    views = [{tuple(r.tolist()) for r in torch.cat(asked)[v * n : (v + 1) * n]} for v in range(2)]
    assert rows == views * 3
    assert views[0].isdisjoint(views[1])


def test_the_target_belongs_to_the_view(teacher, tmp_path):
    options = {"targets": "cached-views", "views": 3, "augment": noisy, "folder": tmp_path}
    source = soft_targets.SoftTargets(teacher, TRAIN, fmn.Recipe(batch_size=32), **options)
    cached = source.open(torch.device("cpu"))
    for epoch in range(4):
        for batch in cached.batches(epoch):
            _, (_, log_probs) = cached.step(nn.Linear(6, 4), batch)
            torch.testing.assert_close(log_probs, teacher(batch[0]), atol=1e-5, rtol=1e-4)


def test_views_resume_with_the_same_bits(teacher, tmp_path):
    options = {"augment": noisy, "targets": "cached-views", "views": 3, "val_data": VAL, "ema_decay": 0.9}
    whole = distilled(teacher, tmp_path / "whole", **options)
    with interrupted_at("resume.pt", 4):
        distilled(teacher, tmp_path / "b", **options)
    assert same_weights(distilled(teacher, tmp_path / "b", **options), whole)


@pytest.mark.parametrize(
    "options", [{}, {"augment": noisy, "targets": "cached-views", "views": 2}], ids=["one", "views"]
)
def test_the_top_classes_are_enough(teacher, tmp_path, options):
    full = distilled(teacher, **options)
    top = distilled(teacher, tmp_path, top_k=3, **options)
    torch.testing.assert_close(top(TEST[0]).softmax(1), full(TEST[0]).softmax(1), atol=0.02, rtol=0)
    files = sorted(p.name for p in (tmp_path / "targets").iterdir())
    assert files[:3] == ["targets.json", "view_00000.classes.npy", "view_00000.log_probs.npy"]
    assert np.load(tmp_path / "targets" / files[2]).dtype == np.float16


def test_the_top_classes_keep_the_sum_and_their_values():
    log_probs = torch.randn(50, 20).log_softmax(1)
    for k in (1, 5, 19, 20, 40):
        values, classes = soft_targets.compressed(log_probs, k)
        back = soft_targets.expanded(values, classes, 20)
        torch.testing.assert_close(back.exp().sum(1), torch.ones(50), atol=2e-3, rtol=0)
        torch.testing.assert_close(back.gather(1, classes.long()), values.float())
    torch.testing.assert_close(back, log_probs, atol=4e-3, rtol=0)


def test_targets_of_another_teacher_are_refused(teacher, tmp_path):
    distilled(teacher, targets_dir=tmp_path, epochs=1)
    with pytest.raises(ValueError, match="teacher: the targets in"):
        distilled(nn.Linear(6, 4), targets_dir=tmp_path, epochs=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "stored"}, "targets"),
        ({"targets": "cached", "augment": noisy}, "targets: 'cached' ignores augmentation"),
        ({"targets": "cached-views"}, "targets: 'cached-views' needs augment"),
        ({"targets": "online", "top_k": 3}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"targets": "cached-views", "augment": noisy, "views": 0}, "views"),
        ({"patience": 3}, "patience: needs val_data"),
        ({"ema_decay": 1.5}, "ema_decay"),
    ],
)
def test_bad_input(teacher, options, words):
    with pytest.raises(ValueError, match=words):
        distilled(teacher, **options)


# --- what a cache depends on ---


class Scaled(nn.Module):
    """A teacher whose answers depend on a buffer that its state_dict lacks, and on an attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.net, self.scale = nn.Linear(6, 4), 1.0
        self.register_buffer("shift", torch.zeros(4), persistent=False)

    def forward(self, x):
        return self.net(x) * self.scale + self.shift


def changed(teacher, **values):
    for name, value in values.items():
        setattr(teacher, name, value)
    return teacher


def at(x, row, value):
    x = x.clone()
    x[row, 1] = value
    return x


NOISY = {"augment": noisy, "targets": "cached-views", "views": 2}
OTHERS = {
    "weights": ({"teacher": nn.Linear(6, 4)}, {}, "teacher: the targets in"),
    "buffer": ({"teacher": changed(Scaled(), shift=torch.ones(4))}, {}, "teacher: the targets in"),
    "attribute": ({"teacher": changed(Scaled(), scale=3.0)}, {}, "teacher: gives other answers"),
    "forward_fn": ({"forward_fn": lambda m, b: (m(-b[0]), b[1])}, {}, "teacher: gives other answers"),
    "fewer classes": ({"forward_fn": lambda m, b: (m(b[0])[:, :3], b[1])}, {}, "teacher: gives other answers"),
    "one input": ({"train_data": (at(TRAIN[0], 77, 9.0), TRAIN[1])}, {}, "data: the targets in"),
    "last input": ({"train_data": (at(TRAIN[0], -1, 9.0), TRAIN[1])}, {}, "data: the targets in"),
    "type": ({"train_data": (TRAIN[0].double(), TRAIN[1]), "teacher": Scaled().double()}, {}, "the targets in"),
    "augment": ({**NOISY, "augment": lambda x: x + 9 * torch.randn_like(x)}, NOISY, "teacher: gives other answers"),
    "seed": ({**NOISY, "seed": 77}, NOISY, "view_seeds: the targets in"),
    "top_k": ({"top_k": 2}, {}, "top_k: the targets in"),
    "attribute, top_k": ({"top_k": 2, "teacher": changed(Scaled(), scale=3.0)}, {"top_k": 2}, "gives other answers"),
}


@pytest.mark.parametrize(("other", "first", "words"), OTHERS.values(), ids=OTHERS)
def test_targets_that_depend_on_something_else_are_refused(tmp_path, other, first, words):
    def distil(teacher=None, train_data=TRAIN, **options):
        options = RECIPE | {"epochs": 2, "targets_dir": tmp_path} | options
        student = nn.Linear(6, 4).to(train_data[0].dtype)
        return fmn.distill(student, teacher or Scaled(), train_data, **options)

    distil(**first)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words):
        distil(**other)
    assert contents(tmp_path) == before
    distil(**first)


def no_longer(x, calls=[0]):  # noqa: B006
    calls[0] += 1
    return x * calls[0]


@pytest.mark.parametrize(
    "augment",
    [
        lambda x: x + torch.from_numpy(np.random.rand(len(x), 1)).float(),  # noqa: NPY002
        lambda x: x + torch.tensor([random.random() for _ in range(6)]),
        lambda x: (x + torch.from_numpy(np.random.default_rng().integers(100, size=x.shape))).int(),
        no_longer,
    ],
    ids=["NumPy", "Python", "a generator of its own", "state"],
)
def test_views_that_cannot_be_made_again_are_refused(teacher, tmp_path, augment):
    options = {"targets": "cached-views", "views": 2, "targets_dir": tmp_path, "forward_fn": as_floats, "epochs": 1}
    with pytest.raises(ValueError, match=r"augment: 'cached-views' cannot repeat .* torch's generators"):
        distilled(teacher, augment=augment, **options)
    assert contents(tmp_path) == {}
    distilled(teacher, augment=lambda x: (x + torch.rand_like(x)).int(), **options)


def as_floats(model, batch):
    return model(batch[0].float()), batch[1]


ONLINE = ["weights", "buffer", "attribute", "forward_fn", "fewer classes", "one input", "last input"]


@pytest.mark.parametrize("targets", ["online", "cached"])
@pytest.mark.parametrize("other", ONLINE)
def test_a_distillation_of_another_teacher_or_data_is_not_resumed(tmp_path, other, targets):
    def distil(teacher=None, train_data=TRAIN, **options):
        options = RECIPE | {"epochs": 2, "run_dir": tmp_path, "targets": targets} | options
        torch.manual_seed(2)
        return fmn.distill(nn.Linear(6, 4), teacher or Scaled(), train_data, **options)

    first, before = distil(), contents(tmp_path)
    with pytest.raises(ValueError, match=r"^(teacher|data)(_in_full)?: "):
        distil(**OTHERS[other][0])
    assert contents(tmp_path) == before
    assert same_weights(distil(), first)


def test_a_buffer_of_the_teacher_counts_for_loaders_too(tmp_path):
    loader, options = DataLoader(TensorDataset(*TRAIN), 48), RECIPE | {"epochs": 1, "run_dir": tmp_path}
    fmn.distill(nn.Linear(6, 4), Scaled(), loader, **options)
    with pytest.raises(ValueError, match="teacher_in_full: the run in"):
        fmn.distill(nn.Linear(6, 4), changed(Scaled(), shift=torch.ones(4)), loader, **options)


def test_a_killed_online_distillation_resumes_with_the_same_bits(teacher, tmp_path):
    options = {"augment": noisy, "targets": "online", "val_data": VAL}
    whole = distilled(teacher, tmp_path / "whole", **options)
    with interrupted_at("resume.pt", 3):
        distilled(teacher, tmp_path / "b", **options)
    assert same_weights(distilled(teacher, tmp_path / "b", **options), whole)
    assert same_weights(distilled(teacher, **{**options, "val_data": None}), whole)  # without any folder


def test_targets_of_another_combination_are_refused(run, tmp_path):
    plans = [fmn.FusionPlan.from_weights({3: 0.5, 11: 0.5}, 12, combine) for combine in ("linear", "geometric")]
    distilled(fmn.FusedModel(plans[0], run), targets_dir=tmp_path, epochs=1)
    with pytest.raises(ValueError, match="teacher"):
        distilled(fmn.FusedModel(plans[1], run), targets_dir=tmp_path, epochs=1)


def test_stored_targets_are_read_after_a_short_question(tmp_path):
    asked = []

    class Listening(Scaled):
        def forward(self, x):
            asked.append(len(x))
            return super().forward(x)

    x, y = torch.randn(1000, 6), torch.zeros(1000, dtype=torch.int64)
    students = []
    for _ in range(2):
        asked.clear()
        students.append(fmn.distill(fresh(1), Listening(), (x, y), **RECIPE | {"epochs": 1, "targets_dir": tmp_path}))
    assert sum(asked) == soft_targets.PROBED
    assert same_weights(*students)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_bit(path),
        lambda path: flip_bit(path, at=8),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: np.save(path, np.load(path)[:100]),
        lambda path: np.save(path, np.load(path).astype("f8")),
        lambda path: np.save(path, np.load(path)[:, 0]),
        lambda path: np.save(path, np.array([{}]), allow_pickle=True),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    ],
    ids=["bit", "header", "short", "empty", "missing", "rows", "type", "axes", "objects", "device"],
)
def test_damaged_targets_are_made_again(tmp_path, damage, top_k, caplog):
    options = {"targets_dir": tmp_path / "targets", "top_k": top_k, "epochs": 2}
    student = distilled(Scaled(), tmp_path / "a", **options)
    files = contents(tmp_path / "targets")
    for path in sorted((tmp_path / "targets").glob("*.npy")):
        damage(path)
        assert same_weights(distilled(Scaled(), tmp_path / path.stem, **options), student)
        assert contents(tmp_path / "targets") == files


def test_targets_of_version_1_are_made_again(tmp_path, caplog):
    """They have no checksums. Those of another teacher are refused, as before."""
    student = distilled(Scaled(), tmp_path / "a")
    path = tmp_path / "a" / "targets" / "targets.json"
    current = json.loads(path.read_text())
    config = json.loads((tmp_path / "a" / "run.json").read_text())["config"]
    first = {
        "format": "fmn_ref.targets",
        "version": 1,
        **{k: config[k] for k in ("targets", "top_k", "data", "teacher")},
    }
    path.write_text(json.dumps(first))
    np.save(path.parent / "view_00000.log_probs.npy", np.zeros((240, 4), np.float32))
    options = {"targets_dir": path.parent}
    assert same_weights(distilled(Scaled(), tmp_path / "b", **options), student)
    assert "without checksums; the targets are made again" in caplog.text
    assert json.loads(path.read_text()) == current
    path.write_text(json.dumps(first | {"teacher": "0123"}))
    with pytest.raises(ValueError, match="teacher: the targets in"):
        distilled(Scaled(), tmp_path / "c", **options)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "fmn_ref.targets", "version": 3}'])
def test_a_damaged_description_is_named(tmp_path, content):
    distilled(Scaled(), targets_dir=tmp_path, epochs=1)
    (tmp_path / "targets.json").write_text(content)
    with pytest.raises(ValueError, match=r"targets\.json"):
        distilled(Scaled(), targets_dir=tmp_path, epochs=1)


DISTIL = """
import sys, torch, fmn_ref as fmn
torch.set_num_threads(1)
torch.manual_seed(3)
x, teacher, student = torch.randn(20_000, 4), torch.nn.Linear(4, 50), torch.nn.Linear(4, 50)
options = {"targets_dir": sys.argv[1], "temperature": float(sys.argv[2]), "progress": False, "lr": 0.1}
fmn.distill(student, teacher, (x, x[:, :3].argmax(1)), epochs=1, **options)
print(fmn.training.samples.tensors_digest(student.parameters()))
"""


def test_processes_that_share_targets_take_turns(tmp_path):
    """One makes the cache, the others read it; all get what a process alone gets."""

    def start(folder, temperature):
        command = [sys.executable, "-c", DISTIL, str(folder), str(temperature)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    together = [start(tmp_path / "shared", t) for t in (1, 1, 2)]
    outputs = [process.communicate(timeout=300) for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], outputs
    alone = start(tmp_path / "alone", 1).communicate(timeout=300)
    assert outputs[0][0] == outputs[1][0] == alone[0]
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == ["targets.json", "view_00000.log_probs.npy"]


def test_threads_that_share_targets_take_turns(tmp_path):
    teachers = [Scaled() for _ in range(3)]  # not in the threads, which share torch's generator
    with ThreadPoolExecutor(3) as pool:
        options = {"targets_dir": tmp_path, "epochs": 1, "progress": False}
        students = list(pool.map(lambda t, k: distilled(t, temperature=k, **options), teachers, (1.0, 2.0, 3.0)))
    assert len(students) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["targets.json", "view_00000.log_probs.npy"]


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = "import os, signal, sys, pathlib; from fmn_ref.runs.lock import sole_user\n"
    code += "with sole_user(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    distilled(Scaled(), targets_dir=tmp_path, epochs=1)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("n_classes", [3, 5])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_teacher_of_other_classes_is_refused(tmp_path, n_classes, top_k):
    teacher = nn.Linear(6, n_classes)
    for folder in (None, tmp_path, tmp_path):  # predicted, stored, read
        with pytest.raises(ValueError, match="teacher: expected outputs of the student's shape"):
            distilled(teacher, targets_dir=folder, top_k=top_k, epochs=1)
