"""What an average of networks averages: parameters and running statistics, of finite epochs; nothing frozen."""

import numpy as np
import pytest
import torch
from networks import RECIPE, make_data
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import swa_utils
from training_runs import same_weights

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training import averages, engine, ensemble

TRAIN, VAL, _ = make_data(n=60)
X, Y = TRAIN


class Mixed(nn.Module):
    """Every kind of tensor that a network may have."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.cfloat))
        self.steps = nn.Parameter(torch.tensor(0), requires_grad=False)
        self.register_buffer("running_phase", torch.ones(4, dtype=torch.cfloat))
        self.register_buffer("direction", torch.ones(4))  # a unit vector, as in a power iteration
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("temporary", torch.zeros(2), persistent=False)

    def forward(self, x):
        return (self.net(x) * self.phase).real


def states(n=4):
    torch.manual_seed(0)
    made = [Mixed() for _ in range(n)]
    for i, model in enumerate(made):
        model.phase.data = torch.randn(4, dtype=torch.cfloat)
        model.running_phase = torch.randn(4, dtype=torch.cfloat)
        model.direction = nn.functional.normalize(torch.randn(4), dim=0)
        model.steps.data.fill_(i)
        model.net[1].running_mean.normal_()
        model.net[1].num_batches_tracked.fill_(10 * i)
    return [model.eval() for model in made]


def recorded(models, folder):
    recorder = fmn.Recorder(folder, models[0])
    for epoch, model in enumerate(models):
        recorder.record_correct(epoch, Y == 0, Y, weights=model.state_dict())
    return recorder.run


def test_parameters_and_running_statistics_are_averaged_and_nothing_else(tmp_path):
    models = states()
    run = recorded(models, tmp_path)
    mean = fmn.averaged_model(run, {0: 1.0, 2: 3.0, 3: 0.0}, TRAIN)
    for name in ("phase", "running_phase", "net.0.weight"):
        a, b = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (models[0], models[2]))
        torch.testing.assert_close(mean.state_dict()[name], 0.25 * a[name].data + 0.75 * b[name].data)
    latest = models[2]  # the last one of a weight above 0
    assert torch.equal(mean.direction, latest.direction)
    assert torch.equal(mean.mask, latest.mask)
    assert (mean.steps, mean.net[1].num_batches_tracked) == (2, 1)  # the pass over the data counts anew


def test_a_moving_average_of_steps_follows_the_same_rule():
    models = states()
    ours = engine.Average(models[0], 0.7)
    theirs = swa_utils.AveragedModel(models[0], multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7), use_buffers=True)
    for model in models:
        model.temporary = torch.rand(2)
        ours.update(model)
        theirs.update_parameters(model)
    for name in averages.averaged_tensors(models[0]):
        assert torch.equal(ours.model.state_dict()[name], theirs.module.state_dict()[name]), name
    for name in ("direction", "steps", "mask", "net.1.num_batches_tracked"):
        assert torch.equal(ours.model.state_dict()[name], models[-1].state_dict()[name]), name
    assert torch.equal(ours.model.temporary, models[-1].temporary)


def test_a_moving_average_goes_on_from_its_state():
    models = states()
    whole, first = engine.Average(models[0], 0.7), engine.Average(models[0], 0.7)
    for model in models:
        whole.update(model)
    for model in models[:2]:
        first.update(model)
    second = engine.Average(models[0], 0.7)
    second.load_state_dict(checkpoints.snapshot(first.state_dict()))
    for model in models[2:]:
        second.update(model)
    assert same_weights(whole.model, second.model)
    assert whole.state_dict()["steps"] == second.state_dict()["steps"] == 4


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_average_of_networks_with_spectral_norm_keeps_its_operator_norm(tmp_path, norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(6, 32), n_power_iterations=20), nn.ReLU(), norm(nn.Linear(32, 4)))
    run = fmn.train(model, TRAIN, VAL, epochs=20, run_dir=tmp_path, **RECIPE)
    mean = fmn.averaged_model(run, dict.fromkeys(range(8, 20), 1.0), None)
    mean(X)
    assert torch.linalg.matrix_norm(mean[0].weight.detach(), 2) < 1.1
    vectors = [checkpoints.load(run.checkpoints[-1]), mean.state_dict()]
    names = [name for name in vectors[0] if name.endswith(("_u", "_v"))]
    assert len(names) == 4
    assert all(torch.equal(*(v[name] for v in vectors)) for name in names)


@pytest.mark.parametrize("name", ["net.0.weight", "net.1.running_var", "phase"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_epoch_that_diverged_is_named_unless_it_has_no_weight(tmp_path, name, value):
    models = states()
    (dict(models[1].named_parameters()) | dict(models[1].named_buffers()))[name].data[0] = value
    run = recorded(models, tmp_path)
    with pytest.raises(ValueError, match=rf"epoch_00001\.pt: {name} holds NaN or infinity"):
        fmn.averaged_model(run, {0: 1.0, 1: 1e-9}, TRAIN)
    checkpoints.save({}, run.checkpoints[2])  # of weight 0 as well: not even read
    mean = fmn.averaged_model(run, {0: 1.0, 1: 0.0, 2: 0, 3: 1.0}, TRAIN)
    assert all(t.isfinite().all() for t in mean.parameters())


def frozen(norm, **options):
    model = nn.Sequential(norm, nn.Linear(6, 4))
    norm.running_mean.fill_(7.0)
    for key, value in options.items():
        setattr(norm, key, value)
    return model


FROZEN = {
    "evaluation mode, no gradients": lambda: frozen(nn.BatchNorm1d(6).eval().requires_grad_(False)),
    "evaluation mode, gradients": lambda: frozen(nn.BatchNorm1d(6).eval()),
    "no parameters": lambda: frozen(nn.BatchNorm1d(6, affine=False).eval()),
    "all in evaluation mode, no gradients": lambda: frozen(nn.BatchNorm1d(6).requires_grad_(False)).eval(),
    "momentum 0": lambda: frozen(nn.BatchNorm1d(6, momentum=0.0)),
}


@pytest.mark.parametrize("case", FROZEN)
def test_frozen_batchnorm_keeps_its_statistics(tmp_path, case):
    model = FROZEN[case]()
    run = fmn.train(model, TRAIN, VAL, epochs=2, run_dir=tmp_path, **RECIPE)
    assert (model[0].running_mean == 7).all()
    assert (fmn.averaged_model(run, {0: 1.0, 1: 1.0}, TRAIN)[0].running_mean == 7).all()
    if case not in ("evaluation mode, gradients", "no parameters"):  # one epoch shows nothing of the training
        assert (fmn.averaged_model(run, {1: 1.0}, TRAIN)[0].running_mean == 7).all()
    student = FROZEN[case]()
    fmn.distill(student, model, TRAIN, epochs=2, ema_decay=0.9, progress=False)
    assert (student[0].running_mean == 7).all()


def test_a_network_that_comes_in_evaluation_mode_trains_its_batchnorm(tmp_path):
    """Earlier trainings and from_pretrained leave every layer in it."""
    runs = []
    for mode in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4)).train(mode)
        runs.append(fmn.train(model, TRAIN, VAL, epochs=2, run_dir=tmp_path / str(mode), **RECIPE))
    assert same_weights(runs[0].model, runs[1].model)
    assert (runs[1].model[1].running_mean != 0).all()


def test_layers_that_share_a_frozen_network_are_told_apart(tmp_path):
    """One BatchNorm is frozen, the other one is recomputed."""
    torch.manual_seed(0)
    still, moving = nn.BatchNorm1d(6).eval().requires_grad_(False), nn.BatchNorm1d(8)
    still.running_mean.fill_(7.0)
    model = nn.Sequential(still, nn.Linear(6, 8), moving, nn.Linear(8, 4))
    run = fmn.train(model, TRAIN, VAL, epochs=3, run_dir=tmp_path, **RECIPE)
    mean = fmn.averaged_model(run, {1: 1.0, 2: 1.0}, TRAIN)
    assert (mean[0].running_mean == 7).all()
    np.testing.assert_allclose(mean[2].running_mean, mean[:2](X).mean(0).detach(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_batchnorm_is_refused_unless_its_statistics_are_valid(tmp_path):
    """Its momentum is a constant. The network that it was made from takes the same checkpoints."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    run = fmn.train(torch.jit.script(plain), TRAIN, VAL, epochs=2, run_dir=tmp_path, **RECIPE)
    with pytest.raises(
        ValueError, match="the statistics of a ScriptModule's 1 cannot be recomputed; attach the network"
    ):
        fmn.averaged_model(run, {0: 1.0, 1: 1.0}, TRAIN)
    assert same_weights(fmn.averaged_model(run, {0: 1.0}, TRAIN), checkpoints.load(run.checkpoints[0]))
    assert fmn.averaged_model(fmn.Run.open(tmp_path, plain), {0: 1.0, 1: 1.0}, TRAIN)(X).shape == (60, 4)


class Domains(nn.Module):
    """A BatchNorm for each domain, of which a batch reaches one."""

    def __init__(self):
        super().__init__()
        self.norms, self.head, self.domain = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(2)), nn.Linear(6, 4), 0

    def forward(self, x):
        return self.head(self.norms[self.domain](x))


def domains(folder):
    """Two epochs with both domains, the second one shifted."""
    torch.manual_seed(0)
    model, recorder = Domains(), None
    recorder = fmn.Recorder(folder, model)
    for epoch in range(3):
        model.train()
        for model.domain in (1, 0):
            model(3 * X + 5 + 4 * model.domain)
        recorder.record(epoch, model.eval()(X).detach(), Y)
    return recorder.run


def test_a_norm_that_no_batch_reaches_keeps_the_average_of_its_statistics(tmp_path, caplog):
    run = domains(tmp_path)
    mean = fmn.averaged_model(run, {1: 1.0, 2: 3.0}, (3 * X + 5, Y))
    states = [torch.load(path) for path in run.checkpoints]
    for name in ("norms.1.running_mean", "norms.1.running_var"):
        torch.testing.assert_close(mean.state_dict()[name], 0.25 * states[1][name] + 0.75 * states[2][name])
    torch.testing.assert_close(mean.norms[0].running_mean, (3 * X + 5).mean(0))
    assert caplog.text.count("no batch of two or more samples reaches norms.1, which keeps its statistics") == 1


def test_a_norm_that_only_single_samples_reach_keeps_its_statistics(tmp_path, caplog):
    run = domains(tmp_path)

    def forward(model, batch):
        model.domain = int(len(batch[0]) == 1)
        return model(batch[0]), batch[1]

    batches = [(X[:5], Y[:5]), (X[5:6], Y[5:6])]
    mean = fmn.averaged_model(fmn.Run.open(tmp_path, run.model, forward), {2: 1.0}, batches)
    torch.testing.assert_close(mean.norms[1].running_var, torch.load(run.checkpoints[2])["norms.1.running_var"])
    assert "norms.1" in caplog.text


class Gained(nn.BatchNorm1d):
    """A BatchNorm with arguments of its own."""

    def forward(self, x, gain=None):
        return super().forward(x) * gain


CALLS = {
    "keyword": lambda norm, x: norm(x=x, gain=2.0),
    "keywords in another order": lambda norm, x: norm(gain=torch.ones(len(x), 1), x=x),
    "position": lambda norm, x: norm(x, torch.ones(6)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_norm_may_be_called_in_any_way(tmp_path, name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = Gained(6), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(CALLS[name](self.norm, x))

    model = Net()
    recorder = fmn.Recorder(tmp_path, model)
    for epoch in range(2):
        model.train()(X)
        recorder.record(epoch, model.eval()(X).detach(), Y)
    mean = fmn.averaged_model(recorder.run, {0: 1.0, 1: 1.0}, [(X[:40], Y[:40]), (X[40:], Y[40:])])
    torch.testing.assert_close(mean.norm.running_mean, X.mean(0))


def test_a_norm_that_gets_no_tensor_is_named():
    class Packed(nn.BatchNorm1d):
        def forward(self, packed):
            return super().forward(packed["x"])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Packed(6)

        def forward(self, x):
            return self.norm({"x": x})

    with pytest.raises(ValueError, match="model: expected a tensor of 6 channels as an argument of Packed"):
        ensemble.recompute_batchnorm(Net(), (X, Y))
