"""Checkpoints: a written one comes back unchanged, damage is an error that names the file, 16 bits lose little."""

import os
import pickle
from collections import ChainMap, OrderedDict, defaultdict, namedtuple
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from folders import contents, flip_bit, full_disk
from networks import make_model
from torch import nn
from training_runs import fresh, same_weights

import fmn_ref as fmn
from fmn_ref.runs import checkpoints


class Versioned(nn.Module):
    """Module that changes its weights when it loads a state of an older version, as some torch modules do."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = -state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_versions_of_modules_are_kept(tmp_path):
    checkpoints.save_state(Versioned(), tmp_path / "a.pt")
    assert (checkpoints.load_into(Versioned(), tmp_path / "a.pt").weight == 1).all()


def test_wrapped_models_are_stored_under_plain_names(tmp_path):
    model = fresh()
    for wrap in (nn.DataParallel, partial(torch.compile, backend="eager")):
        checkpoints.save_state(wrap(model), tmp_path / "a.pt")
        assert same_weights(checkpoints.load_into(make_model(), tmp_path / "a.pt"), model)
        other = fresh(2)
        checkpoints.load_into(wrap(other), tmp_path / "a.pt")
        assert same_weights(other, model)


def test_round_trip_keeps_everything(tmp_path):
    model = fresh()
    checkpoints.save_state(model, tmp_path / "a.pt")
    assert same_weights(checkpoints.load_into(make_model(), tmp_path / "a.pt"), model)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_pickle_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=name):
            checkpoints.load(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated(tmp_path, keep):
    path = tmp_path / "a.pt"
    checkpoints.save_state(fresh(), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
    with pytest.raises(ValueError, match=r"a\.pt"):
        checkpoints.load(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    model = nn.Linear(50, 50)
    checkpoints.save_state(model, tmp_path / "a.pt")
    weights = model.weight.detach().numpy().tobytes()
    flip_bit(tmp_path / "a.pt", (tmp_path / "a.pt").read_bytes().index(weights) + 400)
    with pytest.raises(ValueError, match=r"a\.pt.*checksum"):
        checkpoints.load(tmp_path / "a.pt")


def test_missing_or_of_another_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        checkpoints.load(tmp_path / "none.pt")
    checkpoints.save_state(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: does not fit"):
        checkpoints.load_into(make_model(), tmp_path / "a.pt")
    checkpoints.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt: does not fit"):
        checkpoints.load_into(make_model(), tmp_path / "b.pt")


def test_weights_of_other_shapes_are_listed(tmp_path):
    """Three of them; where names differ too, torch's words say it."""
    checkpoints.save_state(nn.Sequential(nn.Linear(2, 3)), tmp_path / "a.pt")
    shapes = r"0\.weight is \(3, 2\), not \(4, 2\), 0\.bias is \(3,\), not \(4,\)$"
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a\.pt: does not fit the model: {shapes}"):
        checkpoints.load_into(nn.Sequential(nn.Linear(2, 4)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"does not fit the model: .*(1\.weight|Missing)"):
        checkpoints.load_into(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), tmp_path / "a.pt")
    checkpoints.save_state(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)), tmp_path / "b.pt")
    shapes = r"0\.weight is .*, 0\.bias is .*, 1\.weight is \(3, 3\), not \(5, 5\) and 2 more$"
    with pytest.raises(ValueError, match=shapes):
        checkpoints.load_into(nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 2)), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r": 1 is \(3, 3\), not \(4, 3\)$"):
        checkpoints.load_weights(
            nn.ParameterList([torch.ones(1), torch.ones(4, 3)]),
            {"0": torch.ones(1), "1": torch.ones(3, 3)},
            tmp_path / "c.pt",
        )


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoints.save_state(nn.Linear(2, 2), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space.*a\.pt"):
        checkpoints.save_state(fresh(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_half_the_disk_and_a_rounding(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200), nn.BatchNorm1d(200))
    checkpoints.save_state(model, tmp_path / "whole.pt")
    checkpoints.save_state(model, tmp_path / "half.pt", half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (tmp_path / "whole.pt").stat().st_size
    assert model[0].weight.dtype == torch.float32
    stored = checkpoints.load(tmp_path / "half.pt")
    parameters = dict(model.named_parameters())
    assert {k: v.dtype for k, v in stored.items()} == {
        k: torch.float16 if k in parameters else v.dtype for k, v in model.state_dict().items()
    }
    torch.manual_seed(1)
    loaded = checkpoints.load_into(nn.Sequential(nn.Linear(100, 200), nn.BatchNorm1d(200)), tmp_path / "half.pt")
    for ours, given in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert ours.dtype == given.dtype
        torch.testing.assert_close(ours, given, rtol=2**-11, atol=2**-24)


def test_what_does_not_fit_stays_whole(tmp_path):
    model = nn.BatchNorm1d(3)
    model.num_batches_tracked += 100_000
    with torch.no_grad():
        model.weight[:] = torch.tensor([1.0, 1e5, 0.1])
        model.bias[:] = torch.tensor([torch.nan, torch.inf, 0.5])
    checkpoints.save_state(model.double(), tmp_path / "a.pt", half=True)
    stored = checkpoints.load(tmp_path / "a.pt")
    assert (stored["weight"].dtype, stored["bias"].dtype) == (torch.float64, torch.float16)
    loaded = checkpoints.load_into(nn.BatchNorm1d(3).double(), tmp_path / "a.pt")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0, equal_nan=True)


class WithTables(nn.Module):
    """A network whose buffers do not bear rounding: large means, places in a table, and the same in two dimensions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([20003.7, 60000.3]))
        self.register_buffer("places", torch.arange(1.0, 8001.0, 2).reshape(2, -1))
        self.norm, self.head = nn.BatchNorm1d(2, momentum=None), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.norm(x) + x - self.mean)


def compiled(model):
    return torch.compile(model, backend="eager")


class TestBuffersAreNotRounded:
    @staticmethod
    def changed(path, model):
        stored = checkpoints.load(path)
        dtypes = {name for name, value in stored.items() if value.dtype == torch.float16}
        assert dtypes == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
        return [name for name, value in model.named_buffers() if not torch.equal(value, stored[name])]

    @pytest.mark.parametrize("wrapped", [lambda model: model, nn.DataParallel, compiled])
    def test_by_the_recorder(self, tmp_path, wrapped):
        model = WithTables()
        model.norm(20000 + torch.randn(50, 2))
        recorder = fmn.Recorder(tmp_path, wrapped(model), half=True)
        recorder.record(0, [0, 1], [0, 1])
        assert self.changed(recorder.run.checkpoints[0], model) == []

    @pytest.mark.parametrize("averaged", [False, True])
    def test_by_train_and_distill(self, tmp_path, averaged):
        x, model = 20000 + torch.randn(40, 2), WithTables()
        data = x, (x[:, 0] > 20000).long()
        run = fmn.train(model, data, data, epochs=1, run_dir=tmp_path / "a", half=True, progress=False)
        assert self.changed(run.checkpoints[0], model) == []
        options = {"ema_decay": 0.9} if averaged else {}
        options |= {"run_dir": tmp_path / "b", "val_data": data, "half": True, "progress": False}
        student = fmn.distill(WithTables(), model, data, epochs=1, **options)
        assert self.changed(fmn.Run.open(tmp_path / "b").checkpoints[0], student) == []

    def test_answers_are_those_that_were_recorded(self, tmp_path):
        """Raw inputs, such as years: a mean of 20000 with a deviation of 5."""
        torch.manual_seed(0)
        x = 20003.7 + 5 * torch.randn(200, 2)
        model = nn.Sequential(nn.BatchNorm1d(2, momentum=None), nn.Linear(2, 2))
        model(x)
        want = model.eval()(x).softmax(1).detach()
        recorder = fmn.Recorder(tmp_path, model, half=True)
        recorder.record(0, want, torch.zeros(200, dtype=torch.long))
        found = recorder.run.probabilities((x, torch.zeros(200, dtype=torch.long)))[0]
        np.testing.assert_allclose(found, want, atol=2**-10)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(3000, 8), nn.Linear(8, 3000, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.table(x))[:, :3]


class TestTiedWeightsAreStoredOnce:
    @pytest.mark.parametrize("half", [False, True])
    def test_by_train_and_distill(self, tmp_path, half):
        x = torch.randint(0, 3000, (40,))
        data, once = (x, x % 3), 3000 * 8 * 4
        model = Tied()
        run = fmn.train(model, data, data, epochs=2, run_dir=tmp_path / "a", half=half, progress=False)
        options = {"run_dir": tmp_path / "b", "val_data": data, "ema_decay": 0.9, "patience": 5, "progress": False}
        fmn.distill(Tied(), model, data, epochs=2, half=half, **options)
        for folder in ("a", "b"):
            path = tmp_path / folder / "checkpoints" / "epoch_00001.pt"
            assert path.stat().st_size < (0.6 if half else 1.1) * once
        assert (tmp_path / "a" / "resume.pt").stat().st_size < 2.1 * once  # weights and momentum
        stored = checkpoints.load(run.checkpoints[1])
        assert stored["table.weight"].data_ptr() == stored["out.weight"].data_ptr()
        torch.testing.assert_close(stored["out.weight"].float(), model.out.weight.detach(), rtol=2**-11, atol=2**-24)

    def test_copies_are_apart_from_the_original(self):
        """The writer thread stores the copy while the network trains on."""
        model = Tied()
        before, state = model.out.weight.detach().clone(), model.state_dict()
        copies = checkpoints.snapshot(state), checkpoints.to_cpu(state, copy=True)
        with torch.no_grad():
            model.out.weight += 1
        for copied in copies:
            assert torch.equal(copied["table.weight"], before)
            assert copied["table.weight"].data_ptr() == copied["out.weight"].data_ptr()

    def test_the_same_memory_read_otherwise_is_another_tensor(self):
        z = torch.tensor([[1 + 2j, 3 + 4j], [5j, 6 + 0j]])
        views = {"z": z, "conj": z.conj(), "turned": z.T, "real": torch.view_as_real(z), "row": z[0], "none": z[:0]}
        for copied in (checkpoints.snapshot(views), checkpoints.to_cpu(views, copy=True)):
            assert all(torch.equal(copied[name], view) for name, view in views.items())


def test_names_and_versions_stay(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    checkpoints.save_state(nn.DataParallel(model), tmp_path / "a.pt", half=True)
    stored = checkpoints.load(tmp_path / "a.pt")
    assert list(stored) == list(model.state_dict())
    assert stored._metadata == model.state_dict()._metadata


def stored_in_16_bits(tmp_path, value):
    checkpoints.save_weights({"value": value}, tmp_path / "a.pt", half=True)
    stored = checkpoints.load(tmp_path / "a.pt")["value"]
    if stored.dtype == value.dtype:
        assert torch.equal(stored, value)
    return stored.dtype == torch.float16


def large(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def with_part(value, at, part):
    value[at] = part
    return value


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-5, 1e-30])
@pytest.mark.parametrize(
    "small",
    [
        lambda scale: scale * large(20, 30),  # the first layer of a network whose inputs are in hertz
        lambda scale: with_part(large(20, 30), (slice(None), 3), scale * large(20)),  # one input of them is in hertz
        lambda scale: with_part(large(20, 30), 3, scale * large(30)),  # one row
        lambda scale: with_part(large(4, 5, 3, 3), (slice(None), 2), scale * large(4, 3, 3)),  # an input channel
        lambda scale: scale * large(7),  # LayerScale
        lambda scale: with_part(large(7), 2, scale),  # running_var of a channel that is almost constant
        lambda scale: torch.tensor(1.1 * scale),
        lambda scale: (scale * large(20, 30)).double(),
    ],
)
def test_weights_too_small_for_16_bits_stay_whole(tmp_path, small, scale):
    """LoRA's matrices, LayerScale, rarely used rows of an embedding, an input in a small unit."""
    assert not stored_in_16_bits(tmp_path, small(scale))


@pytest.mark.parametrize(
    "value",
    [
        with_part(large(20, 30), (3, 4), 1e-9),  # lost, and without effect beside the others
        with_part(large(20, 30), 5, 0.0),  # a pruned row
        torch.zeros(9),
        torch.tensor([2.0**-14, -(2.0**-14), 2.0**-24, 0.0, 65504.0, torch.inf, torch.nan]),  # exactly as they are
        torch.tensor(3.0),
        large(3).double(),
        torch.zeros(0, 3),
    ],
)
def test_rounding_without_harm_is_in_16_bits(tmp_path, value):
    assert stored_in_16_bits(tmp_path, value)


@pytest.mark.parametrize("value", [65520.0, -1e5, 1e30])
def test_weights_too_large_for_16_bits_stay_whole(tmp_path, value):
    assert not stored_in_16_bits(tmp_path, with_part(large(20, 30), (3, 4), value))


class Extra(nn.Linear):
    """Keeps something beside its weights, as layers of several libraries do."""

    extra = None

    def get_extra_state(self):
        return {"value": self.extra}

    def set_extra_state(self, state):
        self.extra = state["value"]


def with_extra(extra):
    model = Extra(2, 2)
    model.extra = extra
    return model


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_parts_that_are_too_deep_are_refused_when_they_are_recorded(tmp_path):
    """Python bounds the depth of the recursions that store a state; one that holds itself has no end."""
    ring, rings = [], {}
    ring.append(ring)
    rings["next"] = {"next": rings}
    for extra in (nested(900), nested(5000), ring, rings, {"a": (nested(101),)}):
        recorder = fmn.Recorder(tmp_path, with_extra(extra))
        with pytest.raises(TypeError, match=r"^state_dict\._extra_state.*: expected parts at most 100 deep"):
            recorder.record(0, [0, 1], [0, 1])
    recorder = fmn.Recorder(tmp_path, with_extra(nested(90)))
    recorder.record(0, [0, 1], [0, 1])
    assert checkpoints.load(recorder.run.checkpoints[0], scan=True)["_extra_state"]["value"] == nested(90)


@pytest.mark.parametrize("extra", [ChainMap({"a": 1}), MappingProxyType({"a": 1})])
def test_what_would_become_another_type_is_refused_when_it_is_recorded(tmp_path, extra):
    with pytest.raises(TypeError, match=r"_extra_state.*could not be read back.*becomes dict"):
        fmn.Recorder(tmp_path, with_extra(extra)).record(0, [0, 1], [0, 1])


@pytest.mark.filterwarnings("ignore:.*prototype")
def test_a_nested_tensor_is_refused_when_it_is_recorded(tmp_path):
    parts = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    recorder = fmn.Recorder(tmp_path, with_extra(parts))
    with pytest.raises(TypeError, match=r"state_dict\._extra_state\.value: Tensor could not be read back"):
        recorder.record(0, [0, 1], [0, 1])
    assert not list(recorder.folder.checkpoints.iterdir())


Pair = namedtuple("Pair", "a b")
DEEP = [0]
for _ in range(50):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "extra",
    [
        *(None, True, 7, -(2**70), 0.5, 1 + 2j, "text", b"bytes", [1, (2, {"a": [None]})], {1: 2, (3, "x"): 4}, {1, 2}),
        *(torch.Size([1]), torch.float16, torch.device("cpu"), bytearray(b"ab"), DEEP, torch.zeros(2).to_sparse()),
        OrderedDict(a=torch.ones(2)),
    ],
    ids=repr,
)
def test_what_can_be_read_back_comes_back(tmp_path, extra):
    recorder = fmn.Recorder(tmp_path, with_extra(extra))
    recorder.record(0, [0], [0])
    found = checkpoints.load_into(Extra(2, 2), recorder.run.checkpoints[0]).extra
    assert type(found) is type(extra)
    assert str(found) == str(extra)


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        (np.float64(0.1), r"_extra_state\.value"),
        (np.arange(3.0), r"_extra_state\.value"),
        ({"deep": [0, Path("x")]}, r"_extra_state\.value\.deep\[1\]"),
        (Pair(1, 2), r"_extra_state\.value"),
        (defaultdict(int, a=1), r"_extra_state\.value"),
        ({np.int64(3): 1}, r"_extra_state\.value: key"),
        (slice(1), r"_extra_state\.value"),
        (len, r"_extra_state\.value"),
        (lambda: 0, r"_extra_state\.value"),
        (torch.zeros(2, device="meta"), r"_extra_state\.value"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_what_cannot_be_read_back_is_refused_when_it_is_recorded(tmp_path, extra, where, half):
    recorder = fmn.Recorder(tmp_path, with_extra(extra), half=half)
    before = contents(tmp_path)
    with pytest.raises(TypeError, match=rf"^state_dict\.{where}.*: .*could not be read back"):
        recorder.record(0, [0], [0])
    assert contents(tmp_path) == before
    recorder.model.extra = "text"
    recorder.record(0, [0], [0])


def test_weights_that_are_not_there_yet_are_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"^state_dict\.weight: "):
        fmn.Recorder(tmp_path, nn.LazyLinear(3)).record(0, [0], [0])


def test_a_part_of_a_large_tensor_is_stored_alone(tmp_path):
    large = torch.randn(100_000, 4)
    parts = {
        "rows": large[5:9],
        "column": large[:9, 1],
        "step": large[:40:10].t(),
        "one": large[0, 0],
        "none": large[:0],
    }
    parts["tied"] = parts["rows"]
    checkpoints.save(parts, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 5000
    stored = checkpoints.load(tmp_path / "a.pt")
    assert all(torch.equal(stored[k], v) for k, v in parts.items())
    assert stored["tied"].data_ptr() == stored["rows"].data_ptr()
    assert stored["step"].stride() == (1, 4)


def test_tensors_that_share_their_memory_are_stored_once(tmp_path):
    """Weights of a recurrent network are parts of one buffer; embeddings are tied to the output layer."""
    buffer = torch.randn(50_000)
    for tensors in ({"a": buffer, "b": buffer.view(500, 100)}, {"a": buffer.view(500, 100).t(), "b": buffer}):
        checkpoints.save(tensors, tmp_path / "a.pt")
        assert (tmp_path / "a.pt").stat().st_size < 1.1 * buffer.nbytes
        stored = checkpoints.load(tmp_path / "a.pt")
        assert all(torch.equal(stored[k], v) and stored[k].stride() == v.stride() for k, v in tensors.items())
    checkpoints.save({"wide": torch.ones(1).expand(1000, 1000)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 5000


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(tmp_path, make):
    make(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: expected a regular file"):
        checkpoints.load(tmp_path / "a.pt")


def test_the_message_has_the_cause_and_no_advice_to_run_code(tmp_path):
    torch.save({"weight": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"^\S+a\.pt: not a readable checkpoint of tensors: .*pathlib") as caught:
        checkpoints.load(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("half", [False, True])
def test_tied_weights_are_stored_once(tmp_path, half):
    model = TiedHead()
    checkpoints.save_state(model, tmp_path / "a.pt", half=half)
    stored = checkpoints.load(tmp_path / "a.pt")
    assert stored["head.weight"].data_ptr() == stored["embedding.weight"].data_ptr()
    assert stored["head.weight"].dtype == (torch.float16 if half else torch.float32)
    copied = checkpoints.to_cpu(model.state_dict(), copy=True)  # as from another device
    assert copied["head.weight"].data_ptr() == copied["embedding.weight"].data_ptr() != model.head.weight.data_ptr()


def test_views_of_one_memory_that_are_not_the_same_stay_apart():
    t, z = torch.arange(6.0).view(2, 3), torch.tensor([1 + 2j])
    views = {"a": t, "b": t.T, "c": t[0], "d": t[1], "e": t.view(torch.int32), "f": z, "g": z.conj()}
    found = checkpoints.to_cpu(views, copy=True)
    for name, expected in views.items():
        assert torch.equal(found[name], expected)
