"""Networks whose copies would go on with the original's weights, and networks that torch cannot copy.

Every stored epoch must be evaluated with its own weights: by a copy, or by the network itself.
"""

import copy
import functools
import logging
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from networks import RECIPE, make_data
from torch import nn
from training_runs import same_weights

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training import copies, engine

TRAIN, VAL, _ = make_data(n=60)
X, Y = VAL
PLAN = fmn.FusionPlan.from_weights({0: 0.25, 2: 0.75}, 3)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the older weight_norm
]


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def replaced(model, wrap):
    """Replace `forward` on the instance."""
    model.forward = wrap(model.forward)
    return model


def with_hook():
    """A hook that reads the weights of the network it was made for."""
    model = net()
    model[3].register_forward_hook(lambda module, args, output: output + model[0].weight.sum())
    return model


def with_pre_hook():
    model = net()
    model[3].register_forward_pre_hook(lambda module, args: (args[0] * model[1].weight,))
    return model


def wrapped(forward):
    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


class NamesItsVariable(nn.Module):
    """Its forward says VARIABLE.net where it should say self.net, as happens in a notebook."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.reader(x)

    def reader(self, x):
        return VARIABLE["model"].net(x)


VARIABLE = {}
VARIABLE["itself"] = VARIABLE


def in_a_variable():
    VARIABLE["model"] = NamesItsVariable()
    return VARIABLE["model"]


def global_forward(x):
    return VARIABLE["forward"](x)


def forward_in_a_variable():
    model = net()
    VARIABLE["forward"], model.forward = model.forward, global_forward
    return model


class KnowsItsParent(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x):
        return self.parent().net(x)


class WithChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
        self.child = KnowsItsParent(self)

    def forward(self, x):
        return self.child(x)


class KeepsAView(nn.Linear):
    """It keeps a view of its weights, which is no view any more in a copy."""

    def __init__(self):
        super().__init__(6, 4)
        self.turned = self.weight.detach().t()

    def forward(self, x):
        return x @ self.turned + self.bias


class KeepsALock(nn.Linear):
    def __init__(self):
        super().__init__(6, 4)
        self.lock = threading.Lock()


def tied_and_replaced():
    first = nn.Linear(6, 6)
    model = nn.Sequential(first, nn.Linear(6, 6), first, nn.Linear(6, 4))
    model[1].weight = first.weight
    return replaced(model, lambda forward: lambda x: forward(x))


def later_global():
    """A forward that comes from another module of Python, whose variable holds it."""
    module = types.ModuleType("settings_of_a_project")
    module.forward = (model := net()).forward
    space = {"settings": module, "__name__": "a_script"}
    exec("def forward(x):\n    return settings.forward(x)", space)
    model.forward = space["forward"]
    return model


IN_PLACE = {
    "compiled forward": lambda: replaced(net(), lambda forward: torch.compile(forward, backend="eager")),
    "closure": lambda: replaced(net(), lambda forward: lambda x: forward(x) * 1.0),
    "decorated forward": lambda: replaced(net(), wrapped),
    "forward of a layer": lambda: nn.Sequential(replaced(net(), wrapped)),
    "forward in a variable": forward_in_a_variable,
    "variable of another module": later_global,
    "default argument": lambda: (lambda m: replaced(m, lambda forward: lambda x, f=forward: f(x)))(net()),
    "forward hook": with_hook,
    "forward pre-hook": with_pre_hook,
    "method that names a variable": in_a_variable,
    "weak reference to the parent": WithChild,
    "view of the weights": KeepsAView,
    "lock": KeepsALock,
    "tied weights, shared layers": tied_and_replaced,
}


class KeepsActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = net(), []

    def forward(self, x):
        self.features = self.net(x)
        self.seen.append({"last": self.features})
        return self.features


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 2, 3))[0][:, -1])


LOGGER = logging.getLogger("a project")


class HoldsOthers(nn.Module):
    """Attributes that reach the network but take no part in its computation."""

    def __init__(self):
        super().__init__()
        self.net = net()
        self.optimizer = torch.optim.SGD(self.parameters(), 0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)  # it wraps optimizer.step
        self.layers = [self.net[0], self.net[3]]

    def forward(self, x):
        LOGGER.debug("the attribute `net` has the name of a global function")
        return self.net(x) + self.layers[0].weight.sum()


class Caching(nn.Linear):
    """It keeps what it derives from its weights until it trains again, as some networks of timm do."""

    def __init__(self):
        super().__init__(6, 4)
        self.derived = None

    def train(self, mode=True):
        self.derived = None if mode else self.derived
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return nn.functional.linear(x, 2 * self.weight, self.bias)
        self.derived = 2 * self.weight if self.derived is None else self.derived
        return nn.functional.linear(x, self.derived, self.bias)


def observed():
    model, seen = net(), {}
    model[0].register_forward_hook(lambda module, args, output: seen.update(last=output))
    return model


COPIED = {
    "plain": net,
    "method": lambda: replaced(
        net(), lambda f: types.MethodType(lambda self, x: nn.Sequential.forward(self, x), f.__self__)
    ),
    "partial": lambda: replaced(net(), functools.partial),
    "activations with a graph": KeepsActivations,
    "observing hook": observed,
    "older weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4))),
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
    "older spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 4))),
    "spectral_norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))),
    "recurrent": Recurrent,
    "compiled layer": lambda: nn.Sequential(torch.compile(nn.Linear(6, 4), backend="eager")),
    "script": lambda: torch.jit.script(nn.Linear(6, 4)),
    "trace": lambda: torch.jit.trace(nn.Linear(6, 4), X),
    "script inside": lambda: nn.Sequential(torch.jit.script(nn.Linear(6, 8)), nn.Linear(8, 4)),
    "fx": lambda: torch.fx.symbolic_trace(net()),
    "data parallel inside": lambda: nn.Sequential(nn.DataParallel(net())),
    "optimizer, scheduler, plain lists": HoldsOthers,
    "caching": Caching,
}


def recorded(make, folder):
    """A plain loop that records three epochs; returns the run and the probabilities of each, by hand."""
    torch.manual_seed(0)
    model, truth = make(), []
    recorder = fmn.Recorder(folder, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for epoch in range(3):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            truth.append(model(X).softmax(1).numpy().copy())
        recorder.record(epoch, truth[-1], Y)
    model.train()
    model(X)  # leaves a graph
    return recorder.run, np.stack(truth)


@pytest.mark.parametrize("name", [*IN_PLACE, *COPIED])
def test_each_epoch_is_evaluated_with_its_own_weights(tmp_path, name):
    run, truth = recorded((IN_PLACE | COPIED)[name], tmp_path)
    before, modes = checkpoints.snapshot(run.model.state_dict()), [m.training for m in run.model.modules()]
    network = copies.independent(run.model)
    assert isinstance(network, copies.InPlace) == (name in IN_PLACE)
    np.testing.assert_allclose(np.stack(list(run.probabilities(VAL))), truth, atol=1e-6)
    fused = fmn.FusedModel(PLAN, run)
    np.testing.assert_allclose(fused(X).detach().exp(), 0.25 * truth[0] + 0.75 * truth[2], atol=1e-6)
    np.testing.assert_allclose(copy.deepcopy(fused)(X).detach(), fused(X).detach(), atol=1e-7)
    alone = fmn.averaged_model(run, {1: 1.0}, VAL)
    if not any("running" in buffer for buffer, _ in run.model.named_buffers()):  # the others are recomputed
        np.testing.assert_allclose(alone(X).detach().softmax(1), truth[1], atol=1e-6)
    assert same_weights(before, run.model.state_dict())
    assert modes == [m.training for m in run.model.modules()]


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_moving_average_is_evaluated_with_its_own_weights(name):
    torch.manual_seed(0)
    model = IN_PLACE[name]()
    average = engine.Average(model, 0.5)
    average.update(model)
    before, first = model.eval()(X), checkpoints.snapshot(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    assert torch.equal(average.model.eval()(X), before)
    assert same_weights(average.model, first)


def test_the_statistics_of_a_network_that_computes_in_place_are_recomputed(tmp_path):
    run, _ = recorded(IN_PLACE["closure"], tmp_path)
    plain = fmn.Run.open(tmp_path, net())
    ours, theirs = (fmn.averaged_model(r, {0: 1.0, 2: 1.0}, TRAIN) for r in (run, plain))
    assert same_weights(ours, theirs)
    torch.testing.assert_close(ours(X), theirs(X))


def test_an_average_in_place_loads_into_a_plain_network(tmp_path):
    """distill records it, and leaves it in the student."""
    student = IN_PLACE["closure"]()
    options = {**RECIPE, "val_data": VAL, "run_dir": tmp_path, "ema_decay": 0.5}
    fmn.distill(student, net(), TRAIN, epochs=2, **options)
    run = fmn.Run.open(tmp_path, net())
    assert same_weights(checkpoints.load_into(net(), run.checkpoints[-1]), student)
    np.testing.assert_array_equal((run.probabilities(VAL)[-1].argmax(1) == Y.numpy()), run.history[-1])


class Failing(nn.Linear):
    """A network that cannot be copied, and fails or does something else on request."""

    def __init__(self):
        super().__init__(6, 4)
        self.lock, self.then = threading.Lock(), lambda: None

    def forward(self, x):
        out = super().forward(x)
        self.then()
        return out


def test_weights_are_put_back_after_an_error(tmp_path):
    run, truth = recorded(Failing, tmp_path)
    before = checkpoints.snapshot(run.model.state_dict())

    def fail():
        raise KeyboardInterrupt

    probs, fused = run.probabilities(VAL), fmn.FusedModel(PLAN, run)
    run.model.then = fail
    for call in (lambda: probs[0], lambda: fused(X)):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert same_weights(run.model.state_dict(), before)
        assert run.model.training
    run.model.then = lambda: None
    np.testing.assert_allclose(probs[0], truth[0], atol=1e-6)


def test_nested_and_parallel_evaluations_do_not_mix(tmp_path):
    run, truth = recorded(Failing, tmp_path)
    before, inner = checkpoints.snapshot(run.model.state_dict()), []

    def once():
        run.model.then = lambda: None
        inner.append(run.probabilities(VAL)[2])

    run.model.then = once
    np.testing.assert_allclose(run.probabilities(VAL)[0], truth[0], atol=1e-6)
    np.testing.assert_allclose(inner[0], truth[2], atol=1e-6)

    probs = [run.probabilities(VAL) for _ in range(3)]
    found = [None] * 3

    def evaluate(i):
        for _ in range(20):
            probs[i]._cache.clear()
            found[i] = probs[i][i]
            np.testing.assert_allclose(found[i], truth[i], atol=1e-6)

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(found, truth, atol=1e-6)
    assert same_weights(run.model.state_dict(), before)


def test_threads_may_read_the_same_probabilities(run):
    expected = list(run.probabilities(VAL))
    probs = copy.deepcopy(run.probabilities(VAL))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(probs.__getitem__, [*range(len(run.history))] * 2))
    assert all(np.array_equal(p, expected[i % len(expected)]) for i, p in enumerate(found))

    def forward(model, batch):
        probs[1]
        return model(batch[0]), batch[1]

    probs = fmn.Run.open(run.run_dir, run.model, forward).probabilities(VAL)
    with pytest.raises(ValueError, match="epoch: 1 is read while another epoch is evaluated"):
        probs[0]


def test_a_step_goes_on_after_an_evaluation_in_place(tmp_path):
    """The graph of a training step has saved the weights; they are the same bits when it runs backward."""
    run, _ = recorded(IN_PLACE["closure"], tmp_path)
    fused, gradients = fmn.FusedModel(PLAN, run), []
    for evaluates in (False, True):
        run.model.zero_grad()
        loss = run.model(X).square().sum()
        if evaluates:
            fused(X)
        loss.backward()
        gradients.append(run.model[0].weight.grad.clone())
    assert torch.equal(*gradients)


def test_what_computes_in_place_is_refused_where_it_cannot(tmp_path):
    run, _ = recorded(IN_PLACE["closure"], tmp_path)
    fused = fmn.FusedModel(PLAN, run)
    with pytest.raises(ValueError, match="a Sequential that computes in place cannot be traced"):
        torch.export.export(fused, (X,), strict=False)
    run.model[3] = nn.Linear(8, 9)
    with pytest.raises(ValueError, match="the Sequential has other layers than when this was made"):
        fused(X)


def test_a_fused_model_loads_its_own_state_into_a_network_that_caches(tmp_path):
    run, truth = recorded(Caching, tmp_path)
    fused, other = (
        fmn.FusedModel(fmn.FusionPlan.from_weights(w, 3), run) for w in ({0: 0.5, 1: 0.5}, {1: 0.5, 2: 0.5})
    )
    assert not torch.equal(fused(X), other(X))
    fused.load_state_dict(other.state_dict())
    np.testing.assert_allclose(fused(X).exp(), truth[1:].mean(0), atol=1e-6)


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))


def test_lazy_layers_take_their_shapes_from_the_checkpoints(tmp_path):
    run = fmn.train(lazy(), TRAIN, VAL, epochs=3, run_dir=tmp_path, **RECIPE)
    probs = np.stack(list(run.probabilities(VAL)))
    fresh = fmn.Run.open(tmp_path, lazy())
    np.testing.assert_array_equal(np.stack(list(fresh.probabilities(VAL))), probs)
    np.testing.assert_allclose(fmn.FusedModel(PLAN, fresh)(X).exp(), 0.25 * probs[0] + 0.75 * probs[2], atol=1e-6)
    assert same_weights(*(fmn.averaged_model(r, {0: 1.0, 1: 1.0}, TRAIN) for r in (run, fresh)))
    with pytest.raises(ValueError, match="run a batch through the lazy ones"):
        fmn.distill(lazy(), run.model, TRAIN, epochs=1, ema_decay=0.9, progress=False)


def test_versions_of_layers_survive_in_place():
    """A layer may convert older states, and recognises them by their version."""

    class Versioned(nn.Linear):
        _version = 7

    model = nn.Sequential(Versioned(6, 4))
    assert copies.InPlace(model).state_dict()._metadata["0"] == {"version": 7}
