"""`distill`: its loss, its teacher, what it records, and the sweep over temperatures."""

import json

import numpy as np
import pytest
import torch
from networks import RECIPE, make_data, make_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_runs import fresh, interrupted_at, same_weights

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training.distill import distillation_loss

TRAIN, VAL, TEST = make_data()
SHORT = {**RECIPE, "epochs": 3}


def distilled(folder, teacher, train_set=TRAIN, **options):
    """Distil and record with VAL in `folder`."""
    options = {"epochs": 5, "val_data": VAL, "run_dir": folder, **RECIPE, **options}
    return fmn.distill(fresh(3), teacher, train_set, **options)


def test_the_loss_against_a_sum_by_hand():
    logits, teacher = torch.randn(5, 3), torch.randn(5, 3).softmax(1)
    labels = torch.tensor([0, 1, 2, 0, 1])
    t, w = 3.0, 0.7
    total = 0.0
    for z, p, y in zip(logits, teacher, labels, strict=True):
        soft = (p.log() / t).softmax(0)
        student = (z / t).softmax(0)
        kl = sum(s * (s.log() - q.log()) for s, q in zip(soft, student, strict=True))
        total += w * t**2 * kl - (1 - w) * z.log_softmax(0)[y]
    loss = distillation_loss(logits, (labels, teacher.log()), temperature=t, kd_weight=w)
    torch.testing.assert_close(loss, total / 5)


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures_do_not_overflow(temperature):
    log_probs = torch.tensor([[0.0, -120.0, -300.0]])
    soft = (log_probs.double() / temperature).softmax(1)
    z = torch.zeros(1, 3)
    loss = distillation_loss(z, (torch.tensor([0]), log_probs), temperature=temperature, kd_weight=1.0)
    expected = temperature**2 * (torch.special.xlogy(soft, soft).sum() + np.log(3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_a_teacher_of_probabilities_is_refused():
    teacher = nn.Sequential(nn.Linear(6, 4), nn.Softmax(1))
    for options in ({}, {"augment": lambda x: x}):
        with pytest.raises(ValueError, match="model: expected logits or log-probabilities, got probabilities"):
            fmn.distill(make_model(), teacher, TRAIN, epochs=1, **RECIPE | options)


def test_the_teacher_is_left_as_it_was():
    teacher = make_model().train()
    teacher[1].eval()
    fmn.distill(make_model(), teacher, TRAIN, epochs=1, **RECIPE)
    assert [m.training for m in teacher] == [True, False, True, True, True]


def test_another_teacher_is_refused_in_the_same_folder(tmp_path):
    options = {"epochs": 1, "run_dir": tmp_path, **RECIPE}
    fmn.distill(make_model(), nn.Linear(6, 4), TRAIN, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resume.pt", "run.json", "targets"]
    with pytest.raises(ValueError, match="teacher"):
        fmn.distill(make_model(), nn.Linear(6, 4), TRAIN, **options)


def test_a_student_becomes_its_teacher(teacher):
    student = fmn.distill(fresh(0), teacher, TRAIN, epochs=60, **RECIPE)
    agreement = (student(TEST[0]).argmax(1) == teacher(TEST[0]).argmax(1)).float().mean()
    assert agreement > 0.85
    assert not student.training


def test_without_soft_targets_it_is_training(run):
    student = fmn.distill(fresh(2), nn.Linear(6, 4), TRAIN, epochs=12, kd_weight=0.0, **RECIPE)
    for ours, theirs in zip(student.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_online_teacher_sees_what_the_student_sees():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.net = [], nn.Linear(6, 4)

        def forward(self, x):
            self.seen.append(x)
            return self.net(x)

    teacher, student = Spy().train(), Spy()
    marked = {"augment": lambda x: x + 100}
    fmn.distill(student, teacher, TRAIN, epochs=1, **RECIPE | {"lr": 1e-6}, **marked)
    _, *seen = teacher.seen  # the first call checks for logits
    assert all(torch.equal(a, b) and a.min() > 50 for a, b in zip(seen, student.seen, strict=True))
    assert teacher.training  # restored
    assert teacher.net.weight.grad is None


def test_cached_and_online_agree_without_augmentation(teacher):
    students = []
    for data in (TRAIN, TensorDataset(*TRAIN)):
        torch.manual_seed(4)
        net = nn.Linear(6, 4)
        loader = data if data is TRAIN else DataLoader(data, 240)
        options = RECIPE | {"batch_size": 240, "lr": 0.5}
        students.append(fmn.distill(net, teacher, loader, epochs=5, temperature=2.0, **options))
    torch.testing.assert_close(students[0].weight, students[1].weight)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"kd_weight": 1.5}, ValueError, "kd_weight"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"teacher": nn.Linear(6, 5)}, ValueError, "teacher"),
    ],
)
def test_bad_input(options, error, words):
    options = {"teacher": nn.Linear(6, 4), "epochs": 1} | RECIPE | options
    with pytest.raises(error, match=words):
        fmn.distill(make_model(), options.pop("teacher"), TRAIN, **options)


def test_another_configuration_is_refused(tmp_path):
    options = {"epochs": 1, "run_dir": tmp_path, **RECIPE}
    fmn.distill(make_model(), nn.Linear(6, 4), TRAIN, kd_weight=1.0, **options)
    with pytest.raises(ValueError, match="kd_weight"):
        fmn.distill(make_model(), nn.Linear(6, 4), TRAIN, kd_weight=0.5, **options)


def test_history_and_checkpoints_are_the_students(teacher, tmp_path):
    student = distilled(tmp_path, teacher)
    run = fmn.Run.open(tmp_path, make_model())
    assert run.history.epochs == (0, 1, 2, 3, 4)
    assert run.config["temperature"] == 1
    for row, path in zip(run.history.correct(), run.checkpoints, strict=True):
        model = checkpoints.load_into(make_model(), path).eval()
        np.testing.assert_array_equal(row, (model(VAL[0]).argmax(1) == VAL[1]).numpy())
    assert same_weights(model, student)
    assert not student.training


def test_recording_changes_nothing(teacher, tmp_path):
    assert same_weights(distilled(tmp_path, teacher), distilled(None, teacher, val_data=None))


def test_a_student_can_be_fused_and_distilled_again(teacher, tmp_path):
    run = fmn.Run.open(tmp_path / "a", distilled(tmp_path / "a", teacher))
    plan = fmn.fuse(run.probabilities(VAL), VAL[1], correct=run.history, method="equal")
    assert plan.forward_passes > 1
    fused = fmn.FusedModel(plan, run)
    np.testing.assert_allclose(fused(TEST[0]).exp(), plan.apply(run.probabilities(TEST)), atol=1e-6)
    grandchild = distilled(tmp_path / "b", fused)
    assert (grandchild(TEST[0]).argmax(1) == fused(TEST[0]).argmax(1)).float().mean() > 0.7
    assert len(fmn.Run.open(tmp_path / "b").history) == 5


@pytest.mark.parametrize("options", [{}, {"augment": lambda x: x + torch.randn_like(x) / 9}, {"keep": "budget:1"}])
@pytest.mark.parametrize("where", ["resume.pt", "epoch_00002.pt"])
def test_an_interruption_leaves_no_trace(teacher, tmp_path, options, where):
    """Interrupt before the third checkpoint is written, and between it and resume.pt."""
    whole = distilled(tmp_path / "whole", teacher, **options)
    with interrupted_at(where, 3 if where == "resume.pt" else 1):
        distilled(tmp_path / "b", teacher, **options)
    assert len(fmn.Run.open(tmp_path / "b").history) == (3 if where == "resume.pt" else 2)
    assert same_weights(distilled(tmp_path / "b", teacher, **options), whole)
    kept = [fmn.Run.open(tmp_path / name).kept for name in ("whole", "b")]
    assert kept[0].history.epochs == kept[1].history.epochs
    np.testing.assert_array_equal(kept[0].history.packed, kept[1].history.packed)
    for a, b in zip(*(run.checkpoints for run in kept), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_finished_student_is_returned(teacher, tmp_path):
    student = distilled(tmp_path, teacher)
    before = (tmp_path / "history.fmnh").read_bytes()
    assert same_weights(distilled(tmp_path, teacher), student)
    (tmp_path / "resume.pt").unlink()
    assert same_weights(distilled(tmp_path, teacher), student)
    assert (tmp_path / "history.fmnh").read_bytes() == before
    with pytest.raises(FileExistsError, match="resume"):
        distilled(tmp_path, teacher, resume=False)


def test_keep_and_half(teacher, tmp_path):
    distilled(tmp_path, teacher, keep="every:2", half=True)
    kept = fmn.Run.open(tmp_path, make_model()).kept
    assert kept.history.epochs == (1, 3, 4)
    assert checkpoints.load(kept.checkpoints[0])["0.weight"].dtype == torch.float16
    assert kept.probabilities(VAL)[0].dtype == np.float32


def test_loaders_and_forward_fn(teacher, tmp_path):
    def forward(model, batch):
        return model(batch[0]), batch[2]

    three = TensorDataset(VAL[0], torch.zeros(240), VAL[1])
    options = {"forward_fn": forward, "val_data": DataLoader(three, 64)}
    distilled(tmp_path / "a", teacher, (TRAIN[0], torch.zeros(240), TRAIN[1]), **options)
    distilled(tmp_path / "b", teacher)
    histories = [fmn.Run.open(tmp_path / name).history.packed for name in "ab"]
    np.testing.assert_array_equal(*histories)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["config"]["val_data"] is None


def test_val_data_needs_a_run_dir(teacher):
    with pytest.raises(ValueError, match="val_data: needs run_dir"):
        distilled(None, teacher)


def test_other_val_data_is_refused(teacher, tmp_path):
    distilled(tmp_path, teacher, epochs=1)
    for other in (TEST, None):
        with pytest.raises(ValueError, match=r"^val_data:"):
            distilled(tmp_path, teacher, epochs=1, val_data=other)


def test_an_unknown_rule_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="keep"):
        distilled(tmp_path, teacher, keep="most")


def test_ema_is_the_average_of_the_steps(teacher):
    """Against an average by hand of plain SGD steps on cached targets."""
    weights = []
    real = torch.optim.SGD.step

    def step(optimizer, *args):
        result = real(optimizer, *args)
        weights.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        student = distilled(None, teacher, val_data=None, ema_decay=0.8, epochs=2)
    mean = weights[0]
    for now in weights[1:]:
        mean = [0.8 * m + 0.2 * w for m, w in zip(mean, now, strict=True)]
    for a, b in zip(student.parameters(), mean, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_stops_early_with_the_best_epoch(teacher, tmp_path):
    options = {"patience": 2, "epochs": 40, "lr": 0.3, "schedule": "constant"}
    student = distilled(tmp_path, teacher, **options)
    run = fmn.Run.open(tmp_path, make_model())
    accuracy = run.history.correct().mean(1)
    assert len(run.history) < 40
    assert len(run.history) == accuracy.argmax() + 3
    assert same_weights(student, checkpoints.load(run.checkpoints[int(accuracy.argmax())]))
    before = run.history.packed.tobytes()
    assert same_weights(distilled(tmp_path, teacher, **options), student)  # once more: nothing to do
    assert fmn.Run.open(tmp_path).history.packed.tobytes() == before


def test_progress_names_student_and_teacher(teacher, tmp_path, capsys):
    distilled(tmp_path, teacher, progress=True)
    text = capsys.readouterr().err
    assert "student=" in text
    assert "teacher=" in text
    assert "peak F_e=" in text


def test_a_sweep_takes_the_best_and_keeps_all(teacher, tmp_path):
    sweep = fmn.tune_distillation(make_model, teacher, TRAIN, VAL, run_dir=tmp_path, temperatures=(1, 3), **SHORT)
    assert isinstance(sweep, fmn.Sweep)
    accuracy = [row["accuracy"] for row in sweep.rows]
    assert [(row["temperature"], row["kd_weight"]) for row in sweep.rows] == [(1, 1), (1, 0.7), (3, 1), (3, 0.7)]
    best = sweep.rows[int(np.argmax(accuracy))]
    assert (sweep.temperature, sweep.kd_weight) == (best["temperature"], best["kd_weight"])
    right = (sweep.run.model(VAL[0]).argmax(1) == VAL[1]).double().mean()
    assert right == max(accuracy)
    folders = sorted(p.name for p in tmp_path.iterdir() if (p / "run.json").exists())
    assert folders == [f"temperature_{t}_kd_weight_{w}" for t in (1, 3) for w in ("0.7", "1")]
    again = fmn.tune_distillation(make_model, teacher, TRAIN, VAL, run_dir=tmp_path, temperatures=(1, 3), **SHORT)
    assert again.rows == sweep.rows
    student = fresh(RECIPE["seed"])
    alone = fmn.distill(student, teacher, TRAIN, temperature=sweep.temperature, kd_weight=sweep.kd_weight, **SHORT)
    assert same_weights(alone, sweep.run.model)


def test_a_sweep_asks_the_teacher_once(teacher, tmp_path):
    asked = []

    class Listening(nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return teacher(x)

    fmn.tune_distillation(make_model, Listening(), TRAIN, VAL, run_dir=tmp_path, **SHORT)
    assert sum(asked) == len(TRAIN[0])


def test_an_empty_sweep_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match="temperatures, kd_weights: expected at least one"):
        fmn.tune_distillation(make_model, teacher, TRAIN, VAL, run_dir=tmp_path, kd_weights=(), **SHORT)


# --- classes that a network rules out ---


class Masked(nn.Module):
    """A network that gives the logit -inf, or another, to some classes."""

    def __init__(self, mask, value=-torch.inf):
        super().__init__()
        self.net, self.mask, self.value = nn.Linear(6, 4), mask, value

    def forward(self, x):
        mask = self.mask(x) if callable(self.mask) else torch.tensor(self.mask)
        return self.net(x).masked_fill(mask, self.value)


ONE = [False, False, False, True]
UP_TO_2 = (TRAIN[0], TRAIN[1].clamp(max=2))


def by_sample(x):
    """Rule out class 3, and class 2 for some samples: as for multiple choice with fewer answers."""
    return torch.stack([torch.zeros(len(x)), torch.zeros(len(x)), x[:, 0] > 0, torch.ones(len(x))], 1).bool()


@pytest.mark.parametrize("targets", ["cached", "online"])
@pytest.mark.parametrize("options", [{}, {"temperature": 4.0}, {"kd_weight": 0.5}, {"ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("value", [-torch.inf, -1e9, torch.finfo(torch.float32).min], ids=["inf", "1e9", "min"])
def test_a_student_with_a_masked_class_learns(targets, options, value):
    """From a teacher with the same mask, and from one without: then from its answers to the other classes."""
    for teacher in (Masked(ONE, value), nn.Linear(6, 4)):
        student = Masked(ONE, value)
        fmn.distill(student, teacher, UP_TO_2, epochs=20, targets=targets, **RECIPE | {"lr": 0.5} | options)
        assert student(TEST[0])[:, :3].isfinite().all()
        if options.get("kd_weight", 1) == 1:
            agreement = student(TEST[0])[:, :3].argmax(1) == teacher(TEST[0])[:, :3].argmax(1)
            assert agreement.double().mean() > 0.9


def test_a_mask_may_differ_between_samples_and_members(tmp_path):
    run = fmn.train(Masked(by_sample), *[(x, y.clamp(max=1)) for x, y in (TRAIN, VAL)], epochs=3, run_dir=tmp_path)
    fused = fmn.FusedModel(fmn.FusionPlan.from_weights({0: 1, 2: 1}, 3), run)
    for options in ({}, {"targets": "online"}, {"top_k": 2}, {"top_k": 2, "targets_dir": tmp_path / "targets"}):
        student = fmn.distill(Masked(by_sample), fused, TRAIN, epochs=20, **RECIPE | {"lr": 0.5} | options)
        probs = student(TEST[0]).softmax(1)
        assert (probs[by_sample(TEST[0])] == 0).all()
        assert (probs.argmax(1) == fused(TEST[0]).argmax(1)).double().mean() > 0.9


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min], ids=["inf", "min"])
def test_masked_classes_have_no_gradient(value):
    logits, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4).log_softmax(1)
    labels, mask = torch.tensor([0, 1, 2, 0, 1]), torch.tensor(ONE)
    options = {"temperature": 3.0, "kd_weight": 0.7}
    loss = distillation_loss(logits.masked_fill(mask, value), (labels, teacher.masked_fill(mask, value)), **options)
    torch.testing.assert_close(loss, distillation_loss(logits[:, :3], (labels, teacher[:, :3]), **options))
    # a teacher without the mask: the gradient is that of its distribution over the other classes
    share = (teacher / 3).softmax(1)[:, :3].sum(1, keepdim=True)
    loss = distillation_loss(logits.masked_fill(mask, value), (labels, teacher), temperature=3.0, kd_weight=1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    rest = (teacher[:, :3] / 3).softmax(1)
    expected = 3.0 * share * ((logits[:, :3] / 3).softmax(1) - rest) / 5
    torch.testing.assert_close(gradient[:, :3], expected.detach())
    assert (gradient[:, 3] == 0).all()


def test_a_label_of_a_masked_class_is_still_an_error():
    with pytest.raises(FloatingPointError, match="the loss is inf"):
        fmn.distill(Masked(ONE), nn.Linear(6, 4), TRAIN, epochs=1, kd_weight=0.5, **RECIPE)


def test_batches_that_cannot_be_augmented_are_named():
    loader = [{"x": TRAIN[0], "labels": TRAIN[1]}]
    with pytest.raises(TypeError, match="augment: expected batches that are tuples, got dict"):
        fmn.distill(make_model(), nn.Linear(6, 4), loader, epochs=1, augment=lambda x: x, forward_fn=by_name, **RECIPE)


def by_name(model, batch):
    return model(batch["x"]), batch["labels"]


@pytest.mark.parametrize("share", ["everything", "a layer"])
def test_a_teacher_that_the_student_changes_is_refused_online(share):
    """It would teach what the student is, and not what it was."""
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    student = teacher if share == "everything" else nn.Sequential(teacher[0], nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"teacher: shares 0\.weight with the student"):
        fmn.distill(student, teacher, (x, y), epochs=1, targets="online", progress=False)


def test_a_frozen_layer_may_be_shared_and_answers_may_be_cached_first():
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    teacher = nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 3))
    student = nn.Sequential(teacher[0], nn.Tanh(), nn.Linear(8, 3))
    fmn.distill(student, teacher, (x, y), epochs=1, targets="online", progress=False)
    fmn.distill(teacher, teacher, (x, y), epochs=1, targets="cached", progress=False)
