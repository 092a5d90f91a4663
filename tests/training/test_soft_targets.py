"""Soft targets: cached on disk, one set per view, cut to the top classes."""

import numpy as np
import pytest
import torch
from networks import RECIPE, make_data
from torch import nn
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
