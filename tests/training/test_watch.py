"""Networks whose code finds the original by a way that no search of a copy knows; what a copy is watched for.

The right value is what the network itself gave at each epoch.
"""

import argparse
import collections
import contextvars
import gc
import pickle
import sys
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from fresh_process import python
from networks import RECIPE
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import DataLoader, TensorDataset

import fmn_ref as fmn
from fmn_ref.training import copies, data, engine

torch.manual_seed(0)
X = torch.randn(60, 6)
Y = X[:, :3].argmax(1)
PLAN = fmn.FusionPlan.from_weights({0: 0.25, 2: 0.75}, 3)

SPACE, ARGUMENTS, LINE = types.SimpleNamespace(), argparse.Namespace(), collections.deque(maxlen=1)
WEAK, USER = weakref.WeakValueDictionary(), collections.UserDict()
VARIABLE, LOCAL = contextvars.ContextVar("network"), threading.local()


FOUND = {  # (store the network, find it)
    "namespace": (lambda n: setattr(SPACE, "net", n), lambda: SPACE.net),
    "arguments": (lambda n: setattr(ARGUMENTS, "net", n), lambda: ARGUMENTS.net),
    "deque": (LINE.append, lambda: LINE[-1]),
    "weak dict": (lambda n: WEAK.__setitem__("net", n), lambda: WEAK["net"]),
    "user dict": (lambda n: USER.__setitem__("net", n), lambda: USER["net"]),
    "context variable": (VARIABLE.set, VARIABLE.get),
    "thread-local": (lambda n: setattr(LOCAL, "net", n), lambda: LOCAL.net),
    "module by name": (lambda n: setattr(sys.modules[__name__], "NET", n), lambda: sys.modules[__name__].NET),
    "globals": (lambda n: globals().__setitem__("NET2", n), lambda: globals()["NET2"]),
    "address": (lambda n: setattr(SPACE, "address", id(n)), lambda: by_address(SPACE.address)),
}


def by_address(address):
    return next(o for o in gc.get_objects() if id(o) == address)


class Finder(nn.Module):
    """Its head is the one of the network that it finds."""

    def __init__(self, name):
        super().__init__()
        self.body, self.norm, self.head, self.name = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), name
        FOUND[name][0](self)

    def forward(self, x):
        return FOUND[self.name][1]().head(self.norm(self.body(x)).tanh())


def recorded(model, folder, epochs=3, rate=0.5):
    """Record a plain loop; return the run and each epoch's probabilities by hand."""
    recorder, truth = fmn.Recorder(folder, model), []
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for epoch in range(epochs):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            truth.append(model(X).softmax(1).numpy())
        recorder.record(epoch, truth[-1], Y)
    return recorder.run, np.stack(truth)


@pytest.mark.parametrize("name", FOUND)
def test_a_network_that_finds_itself_anywhere_is_evaluated_with_the_weights_of_each_epoch(tmp_path, name):
    run, truth = recorded(Finder(name), tmp_path)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    loader = DataLoader(TensorDataset(X, Y), 25)
    np.testing.assert_allclose(np.stack(list(run.probabilities(loader))), truth, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())


@pytest.mark.parametrize("name", FOUND)
def test_a_fused_model_of_a_network_that_finds_itself(tmp_path, name):
    run, truth = recorded(Finder(name), tmp_path)
    fused = fmn.FusedModel(PLAN, run)
    expected = 0.25 * truth[0] + 0.75 * truth[2]
    for rows in (X[:7], X):  # the first batch, and later ones
        np.testing.assert_allclose(fused(rows).exp().detach(), expected[: len(rows)], atol=1e-6)


@pytest.mark.parametrize("name", FOUND)
def test_an_average_of_a_network_that_finds_itself(tmp_path, name):
    """Its BatchNorm is recomputed in a pass over the data."""
    run, _ = recorded(Finder(name), tmp_path)
    mean = fmn.averaged_model(run, {0: 1.0, 2: 1.0}, (X, Y))
    states = [torch.load(path) for path in run.checkpoints[::2]]
    average = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
    inner = nn.functional.linear(X, average["body.weight"], average["body.bias"])
    normed = (inner - inner.mean(0)) / (inner.var(0) + 1e-5).sqrt()
    hidden = (normed * average["norm.weight"] + average["norm.bias"]).tanh()
    expected = nn.functional.linear(hidden, average["head.weight"], average["head.bias"])
    torch.testing.assert_close(mean(X).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_moving_average_of_a_network_that_finds_itself_is_recorded_as_such(tmp_path):
    class Plain(Finder):
        def forward(self, x):
            return self.head(self.norm(self.body(x)).tanh())

    teacher, histories = nn.Linear(6, 3), []
    for kind in (Finder, Plain):
        torch.manual_seed(0)
        options = {**RECIPE, "val_data": (X, Y), "run_dir": tmp_path / kind.__name__, "ema_decay": 0.99, "lr": 1.0}
        fmn.distill(kind("context variable"), teacher, (X, Y), epochs=3, **options)
        histories.append(fmn.Run.open(options["run_dir"]).history.correct())
    np.testing.assert_array_equal(*histories)


class Table(nn.Module):
    """It looks rows of its weights up in an array that shares their memory."""

    def __init__(self, array):
        super().__init__()
        self.embedding = nn.Embedding(10, 3)
        self.table = array(self.embedding.weight.detach())

    def forward(self, rows):
        rows = (rows[:, 0] * 3).abs().long().clamp(max=9)
        return self.embedding(rows) if self.training else torch.from_numpy(np.asarray(self.table)[rows.numpy()])


ARRAYS = {
    "view": lambda weight: weight.numpy(),
    "turned": lambda weight: weight.numpy()[::-1][::-1],
    "exchanged": lambda weight: np.from_dlpack(weight),
    "in a list of objects": lambda weight: Asked([weight.numpy()]),
    "buffer": lambda weight: memoryview(weight.numpy()),
}


class Asked(list):
    def __array__(self, dtype=None, copy=None):
        return self[0]


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_shares_the_memory_of_weights_holds_those_of_each_epoch(tmp_path, name):
    run, truth = recorded(Table(ARRAYS[name]), tmp_path, rate=20.0)
    assert not np.allclose(truth[0], truth[-1])
    np.testing.assert_allclose(np.stack(list(run.probabilities((X, Y)))), truth, atol=1e-6)
    np.testing.assert_allclose(fmn.FusedModel(PLAN, run)(X).exp(), 0.25 * truth[0] + 0.75 * truth[2], atol=1e-6)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.encoder(x[:, None])[:, 0])


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x.reshape(-1, 1, 2, 3))


class NoMode(nn.Linear):
    """Code that fails while torch is watched, as some of its own higher-order operators do."""

    def __init__(self):
        super().__init__(6, 3)

    def forward(self, x):
        assert _get_current_dispatch_mode() is None
        return super().forward(x)


@pytest.mark.parametrize("make", [Transformer, Images, NoMode, lambda: nn.Linear(6, 3)])
def test_watching_changes_no_bit_and_ends_with_the_first_batch(make):
    torch.manual_seed(0)
    model = make().eval()
    watched, plain = copies.independent(model), copies.independent(model)
    assert vars(plain).pop("_fmn_watch", None) is not None
    for _ in range(2):
        found, expected = (data.predict(network, (X, Y), batch_size=16)[0] for network in (watched, plain))
        assert torch.equal(found, expected)
        assert not hasattr(watched, "_fmn_watch")
    assert type(watched) is type(model)


def test_a_network_with_compiled_layers_is_not_watched():
    """It would run without its compiled code, and give other bits, in the first batch."""
    model = nn.Sequential(torch.compile(nn.Linear(6, 3), backend="eager"))
    assert not hasattr(copies.independent(model), "_fmn_watch")


def test_watching_does_not_load_the_compiler_of_torch():
    script = (
        "import sys, torch; from fmn_ref.training import copies, data; x = torch.ones(4, 6), torch.ones(4).long();"
        "data.predict(copies.independent(torch.nn.Linear(6, 3)), x); assert 'torch._dynamo' not in sys.modules"
    )
    python(script)


def test_a_pickled_copy_leaves_the_original_behind():
    copied = copies.independent(nn.Linear(1000, 1000))
    again = pickle.loads(pickle.dumps(copied))
    assert len(pickle.dumps(again)) < 4.1e6
    assert torch.equal(again(torch.ones(1000)), copied(torch.ones(1000)))


def test_a_failing_first_batch_is_watched_again():
    """The contiguous format is tried after an error of the other one."""
    model = Finder("context variable")
    average = engine.Average(model, 0.5)
    expected = model.eval()(X).softmax(1)
    with pytest.raises(RuntimeError):
        data.predict(average.model, (X[:, :5], Y))
    with torch.no_grad():
        model.head.weight.zero_()
    torch.testing.assert_close(data.predict(average.model, (X, Y))[0], expected.detach())
    assert isinstance(average.model, copies.InPlace)


# --- networks that compute in place ---


class Scaled(nn.Module):
    """It keeps a number beside its tensors, and its forward is a closure."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 3), 1.0
        forward = self.forward
        self.forward = lambda x: forward(x)

    def forward(self, x):
        if self.training:
            self.scale *= 2
        return self.linear(x) * self.scale

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


class Renamed(Scaled):
    """Its state has other names than its tensors, and so has what it loads."""

    def __init__(self):
        super().__init__()
        self.register_state_dict_post_hook(lambda module, state, prefix, _: rename(state, prefix, "linear.", "old_"))
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: rename(state, prefix, "old_", "linear.")
        )


class Adapter(Scaled):
    """It stores what is trained only."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "base" not in name}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=False)


def rename(state, prefix, old, new):
    for name in [n for n in state if n.startswith(prefix + old)]:
        state[prefix + new + name.removeprefix(prefix + old)] = state.pop(name)


@pytest.mark.parametrize("make", [Scaled, Renamed, Adapter])
def test_a_network_that_computes_in_place_loads_what_it_stored(tmp_path, make):
    run, truth = recorded(make(), tmp_path)
    assert isinstance(copies.independent(run.model), copies.InPlace)
    np.testing.assert_allclose(np.stack(list(run.probabilities((X, Y)))), truth, atol=1e-6)
    fused = fmn.FusedModel(PLAN, run)
    np.testing.assert_allclose(fused(X).exp(), 0.25 * truth[0] + 0.75 * truth[2], atol=1e-6)
    assert run.model.scale == 8.0
    assert copies.independent(run.model).state_dict().keys() == run.model.state_dict().keys()


class ByVersion(nn.Module):
    """It derives weights again when the counter of their changes has moved."""

    def __init__(self):
        super().__init__()
        self.linear, self.version = nn.Linear(6, 3), None
        forward = self.forward
        self.forward = lambda x: forward(x)

    def forward(self, x):
        if self.training:
            return self.linear(x)
        if self.version != self.linear.weight._version:
            self.version, self.derived = self.linear.weight._version, self.linear.weight.detach().clone()
        return nn.functional.linear(x, self.derived, self.linear.bias)


def test_weights_that_are_swapped_in_have_versions_of_their_own(tmp_path):
    run, truth = recorded(ByVersion(), tmp_path)
    probs, version = run.probabilities((X, Y)), run.model.linear.weight._version
    for row in (0, 1, 2, 0):
        probs._cache.clear()
        np.testing.assert_allclose(probs[row], truth[row], atol=1e-6)
    assert run.model.linear.weight._version == version
    np.testing.assert_allclose(run.model(X).softmax(1).detach(), truth[-1], atol=1e-6)
