"""FusedModel, averaged_model and lazy probabilities, compared with torch's swa_utils and with sums by hand."""

import dataclasses
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_process import python
from networks import RECIPE, make_data, make_model
from torch import nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, TensorDataset

import fmn_ref as fmn
from fmn_ref.fusion import baselines
from fmn_ref.runs import checkpoints
from fmn_ref.training import data, ensemble, predictions

TRAIN, VAL, TEST = make_data()
PLAN_OF_ONE = fmn.FusionPlan.from_weights({0: 1.0}, 1)


def test_probabilities_are_lazy_and_right(run):
    p = run.probabilities(VAL)
    assert (len(p), p.evaluated) == (12, ())
    model = checkpoints.load_into(make_model(), run.checkpoints[3]).eval()
    np.testing.assert_allclose(p[3], model(VAL[0]).softmax(1).detach(), atol=1e-6)
    assert p[-9] is p[3]
    assert p.evaluated == (3,)
    np.testing.assert_array_equal(np.stack([q.argmax(1) for q in p]) == VAL[1].numpy(), run.history.correct())
    with pytest.raises(IndexError, match="epoch"):
        p[12]


def test_a_plan_of_other_epochs_is_refused(run):
    """A plan of as many other epochs would load the wrong checkpoints."""
    plan = fmn.fuse(run.probabilities(VAL), VAL[1], correct=run.history, method="equal")
    assert plan.epochs == run.history.epochs == tuple(range(12))
    other = dataclasses.replace(plan, epochs=(*range(11), 40))
    with pytest.raises(ValueError, match="only one of them has epoch 40"):
        fmn.FusedModel(other, run)


def test_only_the_chosen_windows_are_evaluated(run, plan):
    p = run.probabilities(TEST)
    plan.apply(p)
    assert set(p.evaluated) == {*plan.weights, 11}


@pytest.fixture(params=["linear", "geometric"])
def either(request, run, plan):
    """A plan of either combination."""
    if request.param == "linear":
        return plan
    return fmn.fuse(run.probabilities(VAL), VAL[1], method="pool", max_members=3, folds=0)


def test_a_state_of_the_other_combination_is_refused(run):
    plans = [fmn.FusionPlan.from_weights({3: 0.5, 11: 0.5}, 12, combine) for combine in ("linear", "geometric")]
    linear, geometric = (fmn.FusedModel(p, run) for p in plans)
    for ours, other in ((linear, geometric), (geometric, linear)):
        with pytest.raises(RuntimeError, match="geometric"):
            ours.load_state_dict(other.state_dict())


def test_fused_model_predicts_what_the_plan_says(run, either):
    model = fmn.FusedModel(either, run)
    log_probs = model(TEST[0])
    np.testing.assert_allclose(log_probs.exp(), either.apply(run.probabilities(TEST)), atol=1e-6)
    assert not log_probs.requires_grad
    assert not any(m.training for m in model.train().modules())
    np.testing.assert_array_equal(model(TEST[0]), log_probs)  # BatchNorm statistics did not change


def test_a_fused_model_where_values_cannot_be_looked_at(run, either):
    expected = fmn.FusedModel(either, run)(TEST[0])
    new = fmn.FusedModel(either, run)
    assert new(TEST[0][:0]).shape == (0, 4)
    torch.testing.assert_close(torch.func.vmap(fmn.FusedModel(either, run))(TEST[0][:, None])[:, 0], expected)
    exported = torch.export.export(fmn.FusedModel(either, run), (TEST[0],)).module()
    torch.testing.assert_close(exported(TEST[0]), expected)
    assert fmn.FusedModel(either, run).to("meta")(TEST[0].to("meta")).shape == expected.shape


def test_in_bfloat16(run):
    exact, rough = run.probabilities(TEST)[-1], run.probabilities(TEST, amp=True)[-1]
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.03)
    assert (rough != exact).any()


def test_fused_model_opens_from_disk_in_a_fresh_process(run, either, tmp_path):
    either.save(tmp_path / "plan.json")
    model = fmn.FusedModel(either, run)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'helpers')!r})\n"
        "import torch, numpy as np, fmn_ref as fmn; from networks import *\n"
        "run = fmn.Run.open(sys.argv[1], make_model())\n"
        "model = fmn.FusedModel(fmn.FusionPlan.load(sys.argv[2] + '/plan.json'), run)\n"
        "first = model(make_data()[2][0])\n"
        "model.load_state_dict(torch.load(sys.argv[2] + '/state.pt'))\n"
        "assert torch.equal(first, model(make_data()[2][0]))\n"
        "np.save(sys.argv[2] + '/out.npy', first)\n"
    )
    python(script, run.run_dir, tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), model(TEST[0]), atol=1e-6)


def averaged_by_torch(run, epochs, **options):
    averaged = swa_utils.AveragedModel(make_model(), **options)
    for e in epochs:
        averaged.update_parameters(checkpoints.load_into(make_model(), run.checkpoints[e]))
    swa_utils.update_bn(DataLoader(TensorDataset(*TRAIN), 60), averaged)  # torch assumes equal batches: 240 / 60
    return averaged.eval()


def test_swa_equals_torch(run):
    ours = fmn.averaged_model(run, baselines.swa_weights(12), TRAIN, batch_size=60)
    theirs = averaged_by_torch(run, [9, 10, 11])
    # update_bn runs with dropout, averaged_model without: statistics differ, parameters must not
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value)


def test_ema_equals_torch(run):
    ours = fmn.averaged_model(run, baselines.ema_weights(12, 0.7), TRAIN)
    theirs = averaged_by_torch(run, range(12), multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7))
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value)


def test_recomputed_batchnorm_equals_torch_on_equal_batches_and_weighs_a_short_one():
    x = torch.randn(100, 6) * 3 + 1
    ours, theirs = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    ensemble.recompute_batchnorm(ours, (x, torch.zeros(100, dtype=int)), batch_size=25)
    swa_utils.update_bn(DataLoader(TensorDataset(x), 25), theirs)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ensemble.recompute_batchnorm(ours, (x, torch.zeros(100, dtype=int)), batch_size=30)
    torch.testing.assert_close(ours.running_mean, x.mean(0))  # update_bn would weigh the last 10 rows like 30
    assert ours.momentum == 0.1


def test_averaged_kf_keeps_weights_and_integer_buffers(run, plan):
    model = fmn.averaged_model(run, plan.weights, TRAIN)
    states = {e: checkpoints.load(run.checkpoints[e]) for e in plan.weights}
    expected = sum(w * states[e]["0.weight"] for e, w in plan.weights.items())
    torch.testing.assert_close(model.get_parameter("0.weight"), expected)
    assert not model.training
    alone = fmn.averaged_model(run, {5: 2.0}, TRAIN)
    torch.testing.assert_close(alone.get_parameter("0.weight"), checkpoints.load(run.checkpoints[5])["0.weight"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: fmn.averaged_model(r, {}, TRAIN), "weights"),
        (lambda r: fmn.averaged_model(r, {0: -1.0, 1: 2.0}, TRAIN), "weights"),
        (lambda r: fmn.averaged_model(r, {12: 1.0}, TRAIN), "epoch"),
        (lambda r: fmn.FusedModel(fmn.FusionPlan((), 3, 1, (1.0,)), r), "3 epochs"),
        (lambda r: fmn.FusedModel(fmn.FusionPlan((), 12, 1, (1.0,)), fmn.Run.open(r.run_dir)), "no model"),
        (
            lambda r: fmn.FusedModel(fmn.FusionPlan((), 12, 1, (1.0,)), fmn.Run.open(r.run_dir, nn.ReLU())),
            "does not fit",
        ),
    ],
)
def test_bad_input(run, call, words):
    with pytest.raises(ValueError, match=words):
        call(run)


def test_a_shuffled_data_set_is_noticed(run):
    loader = DataLoader(TensorDataset(*VAL), 32, shuffle=True)
    p = run.probabilities(loader)
    with pytest.raises(ValueError, match="must not shuffle"):
        fmn.fuse(p, p.labels)
    with pytest.raises(ValueError, match=r"must not shuffle|disagrees"):
        fmn.compare(run, loader, TEST)


def test_little_memory_evaluates_again(run, monkeypatch):
    monkeypatch.setattr(predictions, "CACHE_BYTES", 1)
    p = run.probabilities(VAL)
    first = [q.copy() for q in p]
    assert p.evaluated == (10, 11)
    np.testing.assert_array_equal(p[0], first[0])


class Tuples(nn.Module):
    """Model that returns a tuple, so that it needs a forward_fn."""

    def __init__(self):
        super().__init__()
        self.net = make_model()
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x):
        return self.net(x), x

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


def test_forward_fn_is_asked_for_each_member(tmp_path):
    def forward(model, batch):
        return model(batch[0])[0], batch[1]

    run = fmn.train(Tuples(), TRAIN, VAL, epochs=6, run_dir=tmp_path, forward_fn=forward, **RECIPE)
    options = {"epochs": 2, "progress": False}
    table = fmn.compare(run, VAL, TEST, train_data=TRAIN, make_student=Tuples, distill_options=options)
    assert len(table.rows) == 21
    fused = fmn.FusedModel(table.plan, run)
    log_probs, labels = fused._fmn_forward_batch(TEST, forward)
    np.testing.assert_allclose(log_probs.exp(), table.plan.apply(run.probabilities(TEST)), atol=1e-6)
    assert labels is TEST[1]
    with pytest.raises(ValueError, match=r"model: expected logits \(n, n_classes\), got tuple; plan\.apply"):
        fmn.FusedModel(table.plan, run)(TEST[0])
    assert fmn.averaged_model(run, {4: 0.5, 5: 0.5}, TRAIN).steps == 7


def test_a_last_batch_of_one_sample(tmp_path):
    """BatchNorm cannot use it alone: arrays join it to the batch before, a DataLoader's is left out."""
    one, even = (tuple(a[:n] for a in TRAIN) for n in (129, 128))
    run = fmn.train(make_model(), one, VAL, epochs=1, run_dir=tmp_path, **RECIPE | {"batch_size": 128})
    joined = fmn.averaged_model(run, {0: 1.0}, one, batch_size=64)
    torch.testing.assert_close(joined.get_buffer("1.running_mean"), joined.get_submodule("0")(one[0]).mean(0))
    left_out = fmn.averaged_model(run, {0: 1.0}, DataLoader(TensorDataset(*one), 64))
    without = fmn.averaged_model(run, {0: 1.0}, even, batch_size=64)
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(left_out.get_buffer(name), without.get_buffer(name))


def test_average_refuses_a_checkpoint_that_does_not_fit(tmp_path):
    run = fmn.train(make_model(), TRAIN, VAL, epochs=3, run_dir=tmp_path, **RECIPE)
    state = checkpoints.load(run.checkpoints[0])
    for content in ({f"module.{k}": v for k, v in state.items()}, [1], {"0.weight": torch.zeros(2, 2)}):
        checkpoints.save(content, run.checkpoints[0])
        with pytest.raises(ValueError, match=r"epoch_00000\.pt: does not fit"):
            fmn.averaged_model(run, {0: 0.5, 2: 0.5}, TRAIN)


def test_batchnorm_needs_a_batch_of_two(run):
    for bad in (DataLoader(TensorDataset(*TRAIN), 1), tuple(a[:1] for a in TRAIN), []):
        with pytest.raises(ValueError, match="train_data"):
            fmn.averaged_model(run, {0: 1.0}, bad)


def test_average_counts_rows_from_both_ends(run):
    ours, theirs = fmn.averaged_model(run, {-1: 0.5, 0: 0.5}, TRAIN), fmn.averaged_model(run, {11: 1, 0: 1}, TRAIN)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: fmn.FusedModel(None, run), "plan"),
        (lambda run: fmn.FusedModel(fmn.FusionPlan((), 12, 1, (1.0,)), None), "run"),
        (lambda run: fmn.Probabilities(None, VAL), "run"),
        (lambda run: fmn.averaged_model(None, {0: 1.0}, TRAIN), "run"),
        (lambda run: fmn.averaged_model(run, {0: "a"}, TRAIN), "weights"),
        (lambda run: fmn.averaged_model(run, None, TRAIN), "weights"),
        (lambda run: fmn.compare(None, VAL, TEST), "run"),
        (lambda run: fmn.distill(make_model, make_model(), TRAIN, epochs=1), "student"),
        (lambda run: fmn.distill(make_model(), None, TRAIN, epochs=1), "teacher"),
    ],
)
def test_what_is_not_of_the_kind_is_named(run, call, words):
    with pytest.raises(TypeError, match=f"^{words}: expected"):
        call(run)


def test_probabilities_can_be_sliced(run):
    p = run.probabilities(VAL)
    np.testing.assert_array_equal(np.stack(p[2:5]), np.stack([p[2], p[3], p[4]]))


def test_a_missing_checkpoint_is_named(run, tmp_path):
    recorder = fmn.Recorder(tmp_path, make_model(), keep="none")
    recorder.record(0, VAL[1], VAL[1])
    for use in (lambda run: run.probabilities(VAL)[0], lambda run: fmn.FusedModel(PLAN_OF_ONE, run)):
        with pytest.raises(FileNotFoundError, match=r"epoch_00000\.pt: no such checkpoint; run\.kept"):
            use(recorder.run)


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (nn.Softmax(1), r"got probabilities; plan\.apply\(run"),
        (nn.Flatten(0), r"expected logits \(n, n_classes\), got shape \(960,\)"),
    ],
)
def test_a_fused_model_of_networks_without_logits_is_refused(tmp_path, last, words):
    """FusedModel calls the network without the run's forward_fn, which would give logits."""
    model = nn.Sequential(make_model(), last)
    recorder = fmn.Recorder(tmp_path, model, forward_fn=lambda model, batch: (model[0](batch[0]), batch[1]))
    recorder.record(0, VAL[1], VAL[1])
    assert recorder.run.probabilities(VAL)[0].shape == (240, 4)
    with pytest.raises(ValueError, match=words):
        fmn.FusedModel(PLAN_OF_ONE, recorder.run)(VAL[0])


@pytest.mark.parametrize("combine", ["linear", "geometric"])
def test_a_saved_ensemble_needs_no_run(run, tmp_path, combine):
    plan = fmn.FusionPlan.from_weights({3: 0.25, 11: 0.75}, 12, combine)
    fused = fmn.FusedModel(plan, run)
    fused.save(tmp_path / "fused")
    assert sorted(os.listdir(tmp_path / "fused")) == ["member_00003.pt", "member_00011.pt", "plan.json"]
    code = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import fmn_ref as fmn
from networks import make_data, make_model
torch.save(fmn.FusedModel.load(sys.argv[1], make_model())(make_data()[2][0]), sys.argv[1] + ".out")
"""
    python(code, tmp_path / "fused", os.path.dirname(inspect.getfile(make_model)))
    assert torch.equal(torch.load(tmp_path / "fused.out"), fused(TEST[0]))
    loaded = fmn.FusedModel.load(tmp_path / "fused", make_model())
    assert loaded.plan == plan
    assert not any(p.requires_grad for p in loaded.parameters())


def test_saving_again_replaces_the_ensemble(run, tmp_path):
    fmn.FusedModel(fmn.FusionPlan.from_weights({1: 1, 2: 1}, 12), run).save(tmp_path)
    fused = fmn.FusedModel(fmn.FusionPlan.from_weights({2: 1, 5: 1}, 12), run)
    fused.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["member_00002.pt", "member_00005.pt", "plan.json"]
    assert torch.equal(fmn.FusedModel.load(tmp_path, make_model())(TEST[0]), fused(TEST[0]))


def test_a_saved_ensemble_that_cannot_be_loaded_is_named(run, tmp_path):
    fmn.FusedModel(fmn.FusionPlan.from_weights({1: 1, 2: 1}, 12), run).save(tmp_path)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        fmn.FusedModel.load(tmp_path, make_model)
    with pytest.raises(ValueError, match=r"member_00001\.pt: does not fit the model"):
        fmn.FusedModel.load(tmp_path, torch.nn.Linear(2, 2))
    (tmp_path / "member_00002.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"member_00002\.pt"):
        fmn.FusedModel.load(tmp_path, make_model())
    (tmp_path / "plan.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        fmn.FusedModel.load(tmp_path, make_model())


@pytest.mark.parametrize("shape", [(1, 6, 7), (1, 9)], ids=["pixels", "tokens"])
def test_classes_on_an_axis_that_cannot_be_told_are_refused(tmp_path, shape):
    """A forward_fn says where they are; a direct call has none."""
    make = nn.Conv2d if len(shape) == 3 else nn.Conv1d
    torch.manual_seed(0)
    model, x = make(1, 3, 3, padding=1), torch.randn(20, *shape)
    y = (x[:, 0] > 0).long()

    def forward(network, batch):
        return network(batch[0]).movedim(1, -1).flatten(0, -2), batch[1].flatten()

    recorder, outputs = fmn.Recorder(tmp_path, model, forward_fn=forward), []
    for epoch in range(2):
        with torch.no_grad():
            model.weight.mul_(3).add_(0.1)
            outputs.append(model(x).softmax(1))
            recorder.record(epoch, *forward(model, (x, y)))
    plan = fmn.FusionPlan.from_weights({0: 0.5, 1: 0.5}, 2)
    fused = fmn.FusedModel(plan, recorder.run)
    for _ in range(2):  # each call, not the first alone
        with pytest.raises(ValueError, match=r"logits \(n, n_classes\), got shape \(20, 3, .*forward_fn"):
            fused(x)
    expected = (outputs[0] / 2 + outputs[1] / 2).movedim(1, -1).flatten(0, -2)
    np.testing.assert_allclose(plan.apply(recorder.run.probabilities((x, y))), expected, atol=1e-5)
    torch.testing.assert_close(data.predict(fused, (x, y), forward_fn=forward)[0], expected, atol=1e-5, rtol=0)
