"""Names of compiled parts, what 16 bits may lose, depth of a state, shared memory, a state larger than memory."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from fmn_ref.runs import checkpoints, references
from fmn_ref.runs.retention import Keep


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.weight", "weight"),
        ("block._orig_mod.0._orig_mod.weight", "block.0.weight"),
        ("block._orig_mod", "block"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("_orig_model.weight", "_orig_model.weight"),
        ("", ""),
        (7, 7),
        (None, None),
    ],
)
def test_names_without_compiled_parts(name, plain):
    assert checkpoints.uncompiled(name) == plain


class TestNamesOfCompiledParts:
    @pytest.fixture
    def models(self):
        """The same model plain, and with its first part compiled."""
        plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        return plain, nn.Sequential(compiled(plain[0]), plain[1])

    def test_a_state_takes_the_names_and_versions_of_the_model(self, models):
        plain, partly = (model.state_dict() for model in models)
        assert list(partly) != list(plain)
        for state, own in ((plain, partly), (partly, plain)):
            found = checkpoints.renamed(state, own)
            assert list(found) == list(own)
            assert all(torch.equal(found[name], value) for name, value in own.items())
            assert found._metadata == {name: v for name, v in own._metadata.items() if name != "0" or own is plain} | {
                name: {"version": 1} for name in own._metadata if name.startswith("0")
            }
        found = checkpoints.renamed(partly, {})  # a model that is not there: plain names
        assert list(found) == list(plain)
        assert found._metadata == plain._metadata
        assert checkpoints.renamed(dict(partly), {})._metadata == {}
        assert list(checkpoints.renamed(dict(plain), partly)) == list(partly)

    def test_what_needs_no_other_names_is_returned_as_it_is(self, models):
        state = models[0].state_dict()
        for given, own in ((state, state), (state, {}), ([1, 2], {"0._orig_mod.weight": 1}), ("_orig_mod.a", {})):
            assert checkpoints.renamed(given, own) is given
        assert checkpoints.renamed({7: 1, "_orig_mod.a": 2}, {}) == {7: 1, "a": 2}

    def test_the_file_has_plain_names_and_fits_both(self, models, tmp_path):
        for model in models:
            checkpoints.save_state(model, tmp_path / "a.pt")
            assert list(checkpoints.load(tmp_path / "a.pt")) == list(models[0].state_dict())
            for other in (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), models[1]):
                checkpoints.load_into(other, tmp_path / "a.pt")
                assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
        assert checkpoints.parameter_names(models[1]) == dict(models[0].named_parameters()).keys()

    def test_wrappers_are_taken_off(self, models):
        plain, partly = models
        for wrapped in (plain, compiled(plain), nn.DataParallel(plain), nn.DataParallel(compiled(plain))):
            assert checkpoints.unwrap(wrapped) is plain
        assert checkpoints.unwrap(partly) is partly
        assert checkpoints.unwrap(7) == 7


def test_the_names_of_an_adapter_are_parameters(monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.setattr(checkpoints.adapters, "adapter_of", lambda given: given if given is model else None)
    monkeypatch.setattr(checkpoints.adapters, "state_of", lambda given: {"lora": given.weight})
    assert checkpoints.parameter_names(model) == {"weight", "bias", "lora"}


def large(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def with_parts(value, *parts):
    for at, part in parts:
        value[at] = part
    return value


NAN, INF = torch.nan, torch.inf


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor([0.75 * 2.0**-14 + 2.0**-26]), torch.float16),  # an error of 2^-11.6 of the weight
        (torch.tensor([2.0**-15 + 2.0**-25]), torch.float32),  # of 2^-10
        (torch.arange(3) * 100_003, torch.int64),
        (torch.tensor([True]), torch.bool),
        (with_parts(large(4, 5, 3), ((0, 0), 1e-9)), torch.float16),  # each slice has other weights
        (with_parts(large(20, 30), (5, 0.0), ((3, 4), 1e-9)), torch.float16),  # beside a pruned row
        (with_parts(large(3, 4), ((0, 0), NAN), ((1, 1), 1e-9)), torch.float16),
        (with_parts(large(3, 4), ((0, 0), NAN), ((0, 1), 1e-9)), torch.float32),  # a row without a largest weight
        (with_parts(large(3, 4), ((0, 0), INF), ((2, 1), INF), ((0, 1), 1e-9)), torch.float32),
        (with_parts(large(3, 4), ((0, 0), INF), ((0, 1), 1e-9)), torch.float16),  # the column has one
    ],
)
def test_the_type_in_which_weights_are_stored(tmp_path, value, dtype):
    checkpoints.save_weights({"value": value}, tmp_path / "a.pt", half=True)
    assert checkpoints.load(tmp_path / "a.pt")["value"].dtype == dtype
    checkpoints.save_weights({"value": value}, tmp_path / "b.pt")
    torch.testing.assert_close(checkpoints.load(tmp_path / "b.pt")["value"], value, rtol=0, atol=0, equal_nan=True)


def nested(depth, kind):
    content = kind([0]) if kind is not dict else {"a": 0}
    for _ in range(depth):
        content = {"a": content} if kind is dict else kind([content])
    return content


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_how_deep_a_state_may_be(kind):
    """A hundred parts within parts, also in a key."""
    checkpoints.check_readable(nested(100, kind))
    with pytest.raises(TypeError, match=r"^state.*: expected parts at most 100 deep"):
        checkpoints.check_readable(nested(101, kind))
    if kind is tuple:
        checkpoints.check_readable({nested(99, tuple): 1})
        with pytest.raises(TypeError, match=r"^state: key .*: expected parts at most 100 deep"):
            checkpoints.check_readable({nested(100, tuple): 1})


def test_entries_that_could_not_be_read_back_are_named():
    unusual = np.float64(1)
    with_metadata = OrderedDict(a=1)
    with_metadata._metadata = {"part": unusual}
    for content, where in (
        ({"a": unusual}, r"state\.a"),
        ({"a": [0, unusual]}, r"state\.a\[1\]"),
        ({np.int64(3): 1}, r"state: key "),
        ({(1, unusual): 1}, r"state: key .*\[1\]"),
        (with_metadata, r"state\._metadata\.part"),
    ):
        with pytest.raises(TypeError, match=rf"^{where}.*: (float|int)64 could not be read back"):
            checkpoints.check_readable(content)
    checkpoints.check_readable({"a": nn.Parameter(torch.ones(1)), (1, "b"): [None, True, 0.5, -(2**70)], 3: {4, 5}})


def test_what_is_tried_is_read_without_running_code(monkeypatch):
    given, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: given.append(options) or load(*args, **options))
    checkpoints.check_readable({"a": {1, 2}})
    assert given == [{"map_location": "cpu", "weights_only": True}]


def without_memory(*_):
    try:
        raise MemoryError
    except MemoryError:
        raise RuntimeError("PytorchStreamWriter failed writing file") from None


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (without_memory, True),  # torch's writer hides what its buffer raised
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("unexpected pos"), False),
    ],
)
def test_a_state_that_does_not_fit_into_memory(tmp_path, monkeypatch, error, out_of_memory):
    def fail(*given):
        if callable(error):
            error(*given)
        raise error

    monkeypatch.setattr(torch, "save", fail)
    content = {"a": torch.ones(3), "b": [torch.ones(2, dtype=torch.float64), 7]}
    words = rf"^{tmp_path}/a\.pt: storing 28 bytes of tensors needs as much memory more$"
    with pytest.raises(MemoryError if out_of_memory else RuntimeError, match=words if out_of_memory else "^unexpected"):
        checkpoints.save(content, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


class WithExtra(nn.Linear):
    def get_extra_state(self):
        return {"value": 1}

    def set_extra_state(self, state):
        pass


def test_values_without_a_shape_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"a\.pt: does not fit the model: "):
        checkpoints.load_weights(nn.Linear(2, 2), {"weight": 5, "bias": "text"}, tmp_path / "a.pt")
    state = WithExtra(2, 3).state_dict()
    with pytest.raises(ValueError, match=r"a\.pt: does not fit the model: weight is \(3, 2\), not \(2, 2\), bias is"):
        checkpoints.load_weights(WithExtra(2, 2), state, tmp_path / "a.pt")


def test_a_checkpoint_that_another_program_wrote(tmp_path):
    """Its weights are under a key, with names of a compiled model; errors name that file, not the reference."""
    target, reference = tmp_path / "other.pt", tmp_path / "epoch_00000.ref.json"
    written = nn.Linear(2, 3)
    torch.save({"model": compiled(written).state_dict(), "epoch": 3}, target)
    references.write_reference(reference, target=target, key="model", files=references.stamp(target))
    for path in (reference, str(reference)):
        found = nn.Linear(2, 3)
        assert checkpoints.load_into(found, path) is found
        assert torch.equal(found.weight, written.weight)
        with pytest.raises(ValueError, match=rf"^{target}: does not fit the model: weight is \(3, 2\), not \(2, 2\)"):
            checkpoints.load_into(nn.Linear(2, 2), path)


def test_loading_keeps_the_modes_of_the_parts(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    model.eval()[1].train()
    checkpoints.load_weights(model, model.state_dict(), tmp_path / "a.pt")
    assert [module.training for module in model.modules()] == [False, False, True, False]
    assert all(type(module.training) is bool for module in model.modules())


def test_a_copy_on_the_processor():
    t = torch.ones(3)
    assert checkpoints.to_cpu({"a": t})["a"].data_ptr() == t.data_ptr()
    assert checkpoints.to_cpu({"a": t}, copy=True)["a"].data_ptr() != t.data_ptr()
    with pytest.raises(NotImplementedError, match="meta"):
        checkpoints.to_cpu({"a": torch.ones(2, device="meta")})  # has nothing that could be moved


class Own(torch.Tensor):
    pass


def test_tensors_that_are_the_same_memory():
    t = torch.arange(6.0).view(2, 3)
    assert checkpoints.memory(t) == checkpoints.memory(t[:]) == checkpoints.memory(nn.Parameter(t))
    makers = {
        "sparse": lambda: t.to_sparse(),
        "meta": lambda: torch.zeros(2, device="meta"),
        "empty": lambda: torch.zeros(0, 3),
        "of another class": lambda: t.as_subclass(Own),
    }
    for name, make in makers.items():
        a, b = make(), make()
        assert checkpoints.memory(a) == checkpoints.memory(a) != checkpoints.memory(b), name


Pair = namedtuple("Pair", "first second")


def test_every_tensor_of_nested_containers():
    content = {"a": [torch.ones(1), (torch.ones(1), 7)], "b": Pair(torch.ones(1), "text"), "c": OrderedDict(d=None)}
    found = checkpoints.each_tensor(content, lambda t: 2 * t)
    assert found == {"a": [2, (2, 7)], "b": Pair(2, "text"), "c": {"d": None}}
    assert (type(found["a"][1]), type(found["b"]), type(found["c"])) == (tuple, Pair, OrderedDict)
    assert content["a"][0] == 1


def test_rules_that_delete_checkpoints():
    assert [Keep.of(text).limited for text in ("all", "none", "every:2", "budget:2")] == [False, False, True, True]
    for text in (None, 3, ["every:2"]):
        with pytest.raises(ValueError, match=r"^keep: expected 'all'"):
            Keep.of(text)
