"""A student that does not follow its teacher is reported, with what to try; one that does is not."""

import pytest
import torch
from networks import RECIPE, make_data, make_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fmn_ref as fmn
from fmn_ref.training.agreement import Agreement

TRAIN, VAL, _ = make_data()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return fmn.train(make_model(), TRAIN, VAL, epochs=12, run_dir=tmp_path_factory.mktemp("run"), **RECIPE).model


@pytest.mark.parametrize("data", [TRAIN, DataLoader(TensorDataset(*TRAIN), 64)], ids=["arrays", "loader"])
def test_a_student_near_chance_is_reported(teacher, caplog, data):
    torch.manual_seed(0)
    fmn.distill(make_model(), teacher, data, epochs=1, **RECIPE | {"lr": 1e-9})
    (record,) = caplog.records
    text = record.getMessage()
    assert "the student is near chance" in text
    assert "more epochs (now 1), a smaller or larger lr (now 1e-09)" in text


def test_a_student_that_follows_is_not_reported(teacher, caplog):
    fmn.distill(make_model(), teacher, TRAIN, epochs=12, **RECIPE)
    assert not caplog.records


def test_labels_alone_say_nothing_about_the_teacher(caplog):
    fmn.distill(make_model(), nn.Linear(6, 4), TRAIN, epochs=1, kd_weight=0.0, **RECIPE)
    assert not caplog.records


def watched(student, teacher, n_classes=4):
    """Agreement after one batch with these classes."""
    loss = Agreement(lambda logits, targets: torch.zeros(()))
    eye = torch.eye(n_classes)
    loss(eye[torch.tensor(student)], (torch.tensor(teacher), eye[torch.tensor(teacher)].log()))
    return loss.fault()


def test_the_limits_are_shares_of_the_way_from_chance_to_the_teacher():
    teacher = [0] * 100 + [1] * 100  # chance is 50 %
    right = lambda n: teacher[: n // 2] + [3] * (100 - n // 2) + teacher[100 : 100 + n // 2] + [3] * (100 - n // 2)  # noqa: E731
    assert watched(right(150), teacher) is None
    assert "far below its teacher: it chooses the teacher's class for 74%" in watched(right(148), teacher)
    assert "near chance" in watched(right(108), teacher)
    assert "most frequent class alone has 50%" in watched(right(108), teacher)
    assert "near chance" in watched([0] * 200, teacher)


def test_too_few_samples_and_a_teacher_of_one_class_say_nothing():
    assert watched([1] * 99, [0, 1, 2] * 33) is None
    assert watched([1] * 200, [0] * 200) is None
    assert Agreement(lambda logits, targets: torch.zeros(())).fault() is None
