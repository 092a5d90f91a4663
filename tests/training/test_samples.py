"""Samples in batches of any form: their fingerprints, data sets that share some, loaders that change their order."""

import logging
import warnings
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from networks import RECIPE, make_data, make_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset
from training_runs import fresh, trained

import fmn_ref as fmn
from fmn_ref.training import data, ensemble, samples
from fmn_ref.training import order as order_module
from fmn_ref.training.logits import check_logits
from fmn_ref.training.order import Order
from fmn_ref.training.samples import fingerprints

TRAIN, VAL, TEST = make_data()


@dataclass
class Graph:
    """A batch that is an object: `parts` holds tensors."""

    parts: dict
    name: str = "graph"


class Image(torch.Tensor):
    """A tensor that does not mix with others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("__getitem__", "__get__", "as_subclass", "detach"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise TypeError(f"no {function.__name__} with {types}")


class Wrapped(UserDict):
    """A mapping that is no dict, as a tokenizer returns."""


def hashes(inputs, n, labels=None):
    return fingerprints(inputs, n, labels).tolist()


A, B = torch.arange(18.0).sin().view(6, 3), torch.arange(24.0).cos().view(6, 2, 2)
Y = torch.tensor([0, 1, 1, 0, 2, 1])
TEXTS = ["a", "bc", "", "d", "\ud800", "f"]
FORMS = {
    "tensor": lambda i: A[i],
    "pair": lambda i: (A[i], B[i]),
    "tuple in a tuple": lambda i: (A[i], (B[i], None)),
    "nested dict": lambda i: {"x": {"a": A[i], "b": {"c": B[i]}}},
    "mapping": lambda i: Wrapped(a=A[i], b=B[i]),
    "object": lambda i: Graph({"a": A[i]}),
    "array": lambda i: A[i].numpy(),
    "big-endian array": lambda i: A[i].numpy().astype(">f8"),
    "array of texts": lambda i: np.array(list("uvwxyz"))[i],
    "texts": lambda i: [TEXTS[j] for j in i],
    "pair of texts": lambda i: (tuple(TEXTS[j] for j in i), A[i]),
    "images of several sizes": lambda i: [torch.ones(j + 1, 2) for j in i],
    "records": lambda i: [{"a": A[j], "n": int(j)} for j in i],
    "time first": lambda i: A[i].T,
    "bfloat16": lambda i: A[i].bfloat16(),
    "half, complex and bool": lambda i: (A[i].half(), torch.complex(A[i], A[i]).conj(), A[i] > 0),
    "sparse": lambda i: A[i].to_sparse(),
    "sparse rows": lambda i: A[i].to_sparse_csr(),
    "nested": lambda i: torch.nested.nested_tensor([A[j, : 1 + j % 3] for j in i]),
    "quantized": lambda i: torch.quantize_per_tensor(A[i], 0.001, 0, torch.qint32),
    "class of its own": lambda i: A[i].as_subclass(Image),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|quantize_per_tensor)")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_sample_has_one_fingerprint_wherever_it_stands(form):
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    plain = hashes(form(torch.arange(6)), 6)
    assert len(set(plain)) == 6
    assert hashes(form(order), 6) == [plain[i] for i in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("width", [1, 3, 8, 1001])
def test_one_changed_value_changes_one_fingerprint(dtype, width):
    x = (torch.rand(50, width) * 9).to(dtype)
    before = fingerprints(x, 50)
    for column in {0, width // 2, width - 1}:
        changed = x.clone()
        changed[7, column] = ~changed[7, column] if dtype == torch.bool else changed[7, column] + 1
        assert (fingerprints(changed, 50) != before).tolist() == [i == 7 for i in range(50)]


def test_values_that_change_places_change_the_fingerprint():
    x = torch.randint(0, 3, (2000, 12)).float()  # floating-point numbers that differ in upper bits alone
    n_different = len({tuple(row) for row in x.tolist()})
    assert len(set(hashes(x, 2000))) == n_different
    assert hashes(x.flip(1), 2000) != hashes(x, 2000)


def test_a_wide_row_and_a_slice_in_the_middle_of_memory():
    wide = torch.randn(3, 300_001)
    assert len(set(hashes(wide, 3))) == 3
    assert hashes(wide[1:], 2) == hashes(wide, 3)[1:]
    assert hashes(wide[:, 1:], 3) == hashes(wide[:, 1:].clone(), 3)


def pieces_on_boards(n, n_planes, size, n_pieces):
    boards = torch.zeros(n, n_planes, size, size)
    for _ in range(n_pieces):
        places = (torch.randint(high, (n,)) for high in (n_planes, size, size))
        boards[(torch.arange(n), *places)] = 1 - 2.0 * torch.randint(2, (n,))
    return boards


def squares():
    """A small square on a dark canvas, each time in another place."""
    x = torch.zeros(900, 1, 64, 64)
    for i in range(900):
        row, column = 2 * (i // 30), 2 * (i % 30)
        x[i, 0, row : row + 4, column : column + 4] = 1
    return x


def point_mutations():
    x = nn.functional.one_hot(torch.zeros(1200, 400, dtype=torch.long), 4).float()
    for i in range(1200):
        x[i, i // 3] = torch.eye(4)[1 + i % 3]
    return x


STRUCTURED = {
    "one-hot": lambda: torch.eye(3000),
    "one-hot float64": lambda: torch.eye(500).double(),
    "one-hot float16": lambda: torch.eye(2000).half(),
    "one-hot bool": lambda: torch.eye(2000).bool(),
    "one bright pixel": lambda: torch.eye(784).mul(255).byte(),
    "one complex number": lambda: torch.eye(500) * 1j,
    "pairs of categories": lambda: torch.eye(300)[torch.randint(300, (5000, 2))],
    "signs": lambda: torch.randint(0, 2, (20_000, 64)) * 2.0 - 1,
    "signed zeros": lambda: torch.randint(0, 2, (20_000, 64)) * 2.0 * -0.0,
    "stones on a board": lambda: pieces_on_boards(20_000, 1, 19, 2),
    "pieces of a game": lambda: pieces_on_boards(20_000, 12, 8, 6),
    "squares on a canvas": squares,
    "point mutations": point_mutations,
    "bag of two words": lambda: torch.eye(5000)[torch.randint(5000, (2000, 2))].sum(1),
    "numbers and their complements": lambda: torch.stack([torch.arange(5000), ~torch.arange(5000)]).view(-1, 1).int(),
    "permutations": lambda: torch.rand(20_000, 9).argsort(1),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_samples_have_fingerprints_of_their_own(name):
    torch.manual_seed(1)
    x = STRUCTURED[name]()
    n_different = len({row.numpy().tobytes() for row in x})
    assert len(set(hashes(x, len(x)))) == n_different


def test_one_hot_samples_are_no_overlap(tmp_path):
    x, y = torch.eye(400), torch.arange(400) % 3
    model = nn.Linear(400, 3)
    recorder = fmn.Recorder(tmp_path, model)
    for epoch in range(2):
        recorder.record(epoch, model(x).detach(), y)
    fmn.compare(recorder.run, (x[:200], y[:200]), (x[200:], y[200:]))
    with pytest.raises(ValueError, match="4 of 200 test samples are in the selection set"):
        fmn.compare(recorder.run, (x[:204], y[:204]), (x[200:], y[200:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_padding_does_not_count(dtype):
    tokens = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]])
    assert hashes(tokens, 2) == hashes(tokens[:, :2], 2)
    for width in (1, 7, 500, 1023, 1024, 4095, 4096, 9000):
        x = (torch.rand(3, width) * 9 + 1).to(dtype)
        assert hashes(nn.functional.pad(x, (0, 5001)), 3) == hashes(nn.functional.pad(x, (0, 3)), 3) == hashes(x, 3)


def test_a_sample_has_one_fingerprint_in_a_batch_of_any_size():
    x = torch.randn(2000, 300)
    assert hashes(x, 2000) == [h for part in x.split(33) for h in hashes(part, len(part))]


def test_labels_are_not_part_of_a_sample():
    other = (Y + 1) % 3
    for form in (lambda y: {"x": A, "y": y}, lambda y: (A, y[:, None].float()), lambda y: Graph({"x": A, "y": y})):
        assert hashes(form(Y), 6, Y) == hashes(form(other), 6, other)
    assert len(set(hashes(Y, 6, Y))) == 3  # unless there is nothing else


def test_samples_that_cannot_be_told_apart_have_the_fingerprint_of_their_batch():
    nodes, edges = torch.randn(11, 3), torch.randint(0, 11, (2, 20))
    one = hashes(Graph({"x": nodes, "edges": edges}), 4)
    assert len(one) == 4
    assert len(set(one)) == 1
    assert hashes(Graph({"x": nodes + 1, "edges": edges}), 4) != one
    per_graph = torch.zeros(4, 2)  # equal for all: what they share tells them from other batches
    same = hashes({"x": nodes, "u": per_graph}, 4)
    assert not set(same) & set(hashes({"x": nodes + 1, "u": per_graph}, 4))


def test_tokens_belong_to_their_sequence():
    tokens = torch.randint(0, 99, (5, 8))
    assert len(set(hashes({"ids": tokens, "mask": tokens > 3}, 35))) == 5


def test_unknown_objects_have_no_fingerprint():
    for unknown in (object(), iter([1]), None, 3, {"flag": True}):
        assert hashes(unknown, 4) == []
    endless = Graph({})
    endless.parts["self"] = endless
    assert hashes(endless, 4) == []


# --- batches whose form only the forward_fn knows ---


class TwoInputs(Dataset):
    """Samples of two parts; `form` puts them together."""

    def __init__(self, arrays, form):
        self.arrays, self.form = arrays, form

    def __len__(self):
        return len(self.arrays[1])

    def __getitem__(self, i):
        return self.form(self.arrays[0][i], self.arrays[1][i])


class Net(nn.Module):
    """A network that takes two parts, alone, in a tuple or in a dict, and words as a list."""

    def __init__(self):
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(6, affine=False), make_model()

    def forward(self, *parts, **named):
        x, *words = [*parts, *named.values()]
        x = torch.cat(list(x.values() if isinstance(x, dict) else x), 1) if isinstance(x, (dict, list, tuple)) else x
        return self.net(self.norm(x)) + (0.0 if not words else torch.tensor([[len(w)] for w in words[0]]) * 0.0)


class Record:
    """A batch that is neither tuple nor dict, and moves itself."""

    def __init__(self, items):
        self.x, self.y = torch.stack([x for x, _ in items]), torch.tensor([int(y) for _, y in items])

    def to(self, device):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


DATASETS = {
    "pair": (lambda x, y: ((x[:2], x[2:]), y), None, None),
    "nested dict": (lambda x, y: {"x": {"a": x[:2], "b": x[2:]}, "labels": y}, None, None),
    "text beside": (
        lambda x, y: (x, f"sample {x[0]:.3f}", y),
        lambda model, batch: (model(batch[0], batch[1]), batch[2]),
        None,
    ),
    "object": (lambda x, y: (x, y), lambda model, batch: (model(batch.x), batch.y), Record),
    "method": (lambda x, y: (x, y), lambda model, batch: (model.net(model.norm(batch[0])), batch[1]), None),
    "two calls": (
        lambda x, y: (x, y),
        lambda model, batch: ((model(batch[0]) + model(batch[0])) / 2, batch[1]),
        None,
    ),
}


@pytest.fixture(params=DATASETS.values(), ids=DATASETS)
def kind(request, tmp_path):
    """(run, loader of arrays): a run that was recorded with batches of this form."""
    form, forward_fn, collate = request.param

    def loader(arrays, size=50, **options):
        return DataLoader(TwoInputs(arrays, form), size, collate_fn=collate, **options)

    torch.manual_seed(1)
    options = {"epochs": 3, "run_dir": tmp_path, "forward_fn": forward_fn, **RECIPE}
    return fmn.train(Net(), loader(TRAIN), loader(VAL), **options), loader


def test_the_overlap_is_noticed_in_any_form(kind):
    run, loader = kind
    with pytest.raises(ValueError, match="test_data: 240 of 240 test samples are in the selection set"):
        fmn.compare(run, loader(VAL), loader(tuple(a.flip(0) for a in VAL), 33))
    some = tuple(torch.cat([a[:30], b[30:]]) for a, b in zip(VAL, TEST, strict=True))
    with pytest.raises(ValueError, match="test_data: 30 of 240"):
        fmn.compare(run, loader(VAL), loader(some))
    assert fmn.compare(run, loader(VAL), loader(TEST)).n_test == 240


def test_batchnorm_weighs_a_short_batch_in_any_form(kind):
    run, loader = kind
    some = tuple(a[:101] for a in TRAIN)
    model = fmn.averaged_model(run, {0: 1, 2: 1}, loader(some, 97))
    torch.testing.assert_close(model.norm.running_mean, some[0].mean(0))


def test_a_shuffled_loader_is_noticed_in_any_form(kind):
    run, loader = kind
    one_class = VAL[0], torch.ones_like(VAL[1])
    probs = run.probabilities(Reordered(loader(one_class, 16), one_class))
    with pytest.raises(ValueError, match="data: the samples or their order changed since the last pass"):
        list(probs)


class Reordered:
    """A loader whose data set is put into another order before each pass: no sampler tells."""

    def __init__(self, loader, arrays):
        self.loader, self.arrays = loader, arrays

    def __iter__(self):
        order = torch.randperm(len(self.arrays[1]))
        self.loader.dataset.arrays = tuple(a[order] for a in self.arrays)
        return iter(self.loader)


def test_each_norm_weighs_what_reaches_it():
    """A layer that is called twice, images of several sizes, and one that is given by name."""

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, a, b):
            return self.norm(a).mean((2, 3)) + self.norm(input=b).mean((2, 3))

    batches = [{"a": torch.randn(n, 2, 3, s), "b": 4 + torch.randn(n, 2, 5, 5)} for n, s in ((7, 4), (2, 9), (30, 1))]
    model = Siamese()
    ensemble.recompute_batchnorm(model, [{**b, "labels": torch.zeros(len(b["a"]), dtype=int)} for b in batches])
    everything = torch.cat([x.transpose(0, 1).flatten(1) for b in batches for x in b.values()], 1)
    torch.testing.assert_close(model.norm.running_mean, everything.mean(1))
    assert model.norm.momentum == 0.1
    assert not model.norm._forward_pre_hooks
    assert not model.norm.training


def test_a_batch_of_any_form_moves_to_the_device():
    meta = torch.device("meta")
    record = Graph({"a": [A, (B, "text")]})
    there = samples.moved({"x": record, "y": Wrapped(z=A)}, meta)
    assert there["x"].parts["a"][0].is_meta
    assert there["x"].parts["a"][1][0].is_meta
    assert there["y"]["z"].is_meta
    assert not record.parts["a"][0].is_meta
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    assert not samples.moved(packed, torch.device("cpu")).batch_sizes.is_meta


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (((A, B), Y), r"data: expected arrays \(inputs, labels\), got tuple of tuple, Tensor; a torch Dataset"),
        ((TEXTS, Y), "got tuple of list, Tensor"),
        (({"x": A}, Y.numpy()), "got tuple of dict, ndarray"),
        ({"x": A, "labels": Y}, "got dict"),
        ([(A, TEXTS)], "labels: expected integers, got list"),
        ([(A, "abcdef")], "labels: expected integers of shape"),
    ],
)
def test_data_that_looks_like_batches_is_refused(bad, words):
    with pytest.raises(TypeError, match=words):
        data.predict(nn.Linear(3, 2), bad)


def test_labels_may_be_a_list():
    probs, labels = data.predict(nn.Linear(3, 3), [(A, Y.tolist()), (A, Y.numpy())])
    assert len(probs) == 12
    assert torch.equal(labels, torch.cat([Y, Y]))


@pytest.mark.parametrize(
    ("forward_fn", "error", "words"),
    [
        (lambda model, batch: model(batch[0]), TypeError, r"forward_fn: expected \(logits, labels\), got Tensor"),
        (lambda model, batch: (model(batch[0]), batch[1], 0), TypeError, "got 3 values"),
        (lambda model, batch: (model(batch[0]), batch[1][:4]), ValueError, r"got shapes \(6, 2\) and \(4,\)"),
        (lambda model, batch: (model(batch[0]), batch[1][:, None]), ValueError, r"got shapes \(6, 2\) and \(6, 1\)"),
        (lambda model, batch: (model(batch[0])[:, None], batch[1]), ValueError, r"got shapes \(6, 1, 2\)"),
        (lambda model, batch: (model(batch[0]), None), ValueError, r"got shapes \(6, 2\) and NoneType"),
    ],
)
def test_what_a_forward_fn_returns_is_checked(forward_fn, error, words):
    with pytest.raises(error, match=words):
        data.predict(nn.Linear(3, 2), (A, Y), forward_fn=forward_fn)


# --- order ---


def still_network():
    return nn.Linear(6, 4)


ONE_CLASS = VAL[0], torch.zeros_like(VAL[1])
STILL = {"epochs": 4, "lr": 0.0, "progress": False}


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(*ONE_CLASS), 50, shuffle=True),
        DataLoader(TensorDataset(*ONE_CLASS), 50, sampler=SubsetRandomSampler(range(240))),
        DataLoader(
            TensorDataset(*ONE_CLASS),
            batch_sampler=torch.utils.data.BatchSampler(SubsetRandomSampler(range(240)), 50, drop_last=False),
        ),
    ],
    ids=["shuffle", "sampler", "batch sampler"],
)
def test_a_loader_that_shuffles_is_refused_before_anything_is_written(loader, tmp_path):
    words = "val_data: a .*RandomSampler draws another order in each pass; its loader must not shuffle"
    with pytest.raises(ValueError, match=words):
        fmn.train(still_network(), TRAIN, loader, run_dir=tmp_path / "a", **STILL)
    with pytest.raises(ValueError, match=words):
        fmn.distill(still_network(), still_network(), TRAIN, val_data=loader, run_dir=tmp_path / "a", **STILL)
    assert not (tmp_path / "a").exists()


class Stream(IterableDataset):
    """Samples in a new order for each pass."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __iter__(self):
        order = np.random.default_rng().permutation(len(self.arrays[0]))
        return iter([tuple(a[i] for a in self.arrays) for i in order])


class Swapped(torch.utils.data.Sampler):
    """Two samples change places in each pass."""

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return 240

    def __iter__(self):
        self.passes += 1
        order = list(range(240))
        order[self.passes], order[200] = order[200], order[self.passes]
        return iter(order)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: Stream(ONE_CLASS),
        lambda: DataLoader(Stream(ONE_CLASS), 50),
        lambda: DataLoader(TensorDataset(*ONE_CLASS), 50, sampler=Swapped()),
    ],
    ids=["stream", "loader of a stream", "sampler of its own"],
)
def test_samples_of_one_class_that_change_places_are_noticed(loader, tmp_path):
    words = "the samples or their order changed since the last pass; its loader must not shuffle"
    with pytest.raises(ValueError, match=f"val_data: {words}"):
        fmn.train(still_network(), TRAIN, loader(), run_dir=tmp_path / "a", **STILL)
    with pytest.raises(ValueError, match=f"val_data: {words}"):
        fmn.distill(still_network(), still_network(), TRAIN, val_data=loader(), run_dir=tmp_path / "b", **STILL)
    run = trained(tmp_path / "c", epochs=2)
    probs = run.probabilities(loader())
    with pytest.raises(ValueError, match=f"data: {words}"):
        fmn.fuse(probs, probs.labels)
    with pytest.raises(ValueError, match=words):
        fmn.compare(run, loader(), TEST)


class Chained:
    """Loaders that are read one after the other."""

    def __init__(self, *loaders):
        self.loaders = loaders

    def __iter__(self):
        for loader in self.loaders:
            yield from loader


class LastTwo(Swapped):
    """Exchanges the last two samples in every second pass."""

    def __iter__(self):
        self.passes += 1
        return iter([*range(238), *((238, 239) if self.passes % 2 else (239, 238))])


@pytest.mark.parametrize(
    "loader",
    [
        lambda set_: Chained(DataLoader(set_, 20), DataLoader(set_, 20, shuffle=True)),
        lambda set_: DataLoader(set_, 16, sampler=LastTwo()),
    ],
    ids=["a second loader shuffles", "only the last batch"],
)
def test_the_last_batch_is_looked_at(loader, tmp_path):
    loader = loader(TensorDataset(*ONE_CLASS))
    with pytest.raises(ValueError, match="val_data: the samples or their order changed"):
        fmn.train(still_network(), TRAIN, loader, run_dir=tmp_path, **STILL)


def test_a_loader_with_one_order_is_accepted(tmp_path):
    """Also with repeated samples, workers, and an order of its own."""
    order = [*torch.randperm(240, generator=torch.Generator().manual_seed(1)).tolist(), 3, 3, 17]
    loader = DataLoader(TensorDataset(*VAL), 50, sampler=order, num_workers=1)
    run = fmn.train(fresh(), TRAIN, loader, run_dir=tmp_path, **RECIPE | {"epochs": 3})
    probs = run.probabilities(loader)
    assert fmn.fuse(probs, probs.labels, correct=run.history).n_epochs == 3
    np.testing.assert_array_equal(probs.labels, VAL[1][order])


def test_inputs_that_are_drawn_anew_are_accepted_with_a_warning(tmp_path, caplog):
    """Their order cannot be checked."""

    class Noisy(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn_like(x), y

    with caplog.at_level(logging.WARNING):
        run = fmn.train(fresh(), TRAIN, Noisy(*VAL), run_dir=tmp_path, **RECIPE | {"epochs": 4})
    assert len(run.history) == 4
    assert caplog.text.count("val_data: gives other inputs in each pass; whether it shuffles cannot be told") == 1


def test_inputs_without_a_fingerprint_are_accepted_with_a_warning(caplog, monkeypatch):
    def fails(*args):
        raise NotImplementedError("no such operation")

    monkeypatch.setattr(order_module, "fingerprints", fails)
    order = Order(VAL)
    for _ in range(2):
        data.predict(still_network(), DataLoader(TensorDataset(*VAL), 50), order=order)
    assert caplog.text.count("data: holds what has no fingerprint (no such operation)") == 1


def test_a_pass_of_another_length_is_refused():
    def check(x, y):
        order.check(y, [fingerprints(x[i : i + 2], 2) for i in range(0, len(x), 2)])

    order = Order(VAL)
    check(A, Y)
    check(A, Y)
    with pytest.raises(ValueError, match="data: labels or their order changed"):
        check(A[:4], Y[:4])
    with pytest.raises(ValueError, match="data: labels or their order changed"):
        check(A.flip(0), Y.flip(0))
    with pytest.raises(ValueError, match="data: the samples or their order changed"):
        check(A[:4], Y)
    with pytest.raises(ValueError, match="data: the samples or their order changed"):
        check(A.flip(0), Y)
    check(A, Y)


def test_a_loader_of_another_set_is_not_taken_for_the_first(run):
    """The controls of `compare` are scored on the very samples of the fusion."""
    probs = run.probabilities(VAL)
    assert len(probs.labels) == 240
    assert probs.order.fingerprints == set()  # arrays cannot change their order
    with pytest.raises(ValueError, match="order changed"):
        data.predict(run.model, TensorDataset(*(a.flip(0) for a in VAL)), order=probs.order)


def test_hooks_do_not_stay(run):
    probs = run.probabilities(DataLoader(TensorDataset(*VAL), 50))
    assert len(probs.labels) == 240
    assert not any(m._forward_pre_hooks for m in run.model.modules())


def test_a_scripted_network_is_watched_too(tmp_path):
    """It takes no hooks: the batch counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(still_network())
    order = Order(VAL)
    for _ in range(2):
        data.predict(model, DataLoader(TensorDataset(*ONE_CLASS), 50), order=order)
    with pytest.raises(ValueError, match="the samples or their order"):
        data.predict(model, Stream(ONE_CLASS), order=order)


# --- softmax outputs ---


@pytest.mark.parametrize("n_classes", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wider", [False, True], ids=["own type", "as float32"])
def test_probabilities_are_noticed_in_every_type(dtype, n_classes, wider):
    for scale in (0.1, 1.0, 10.0):
        probs = (torch.randn(64, n_classes) * scale).softmax(1).to(dtype)
        with pytest.raises(ValueError, match="expected logits or log-probabilities, got probabilities"):
            check_logits(probs.float() if wider else probs, "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_are_not_taken_for_probabilities(dtype):
    check_logits(torch.randn(8, 4).log_softmax(1).to(dtype), "")
    close = torch.full((8, 4), 0.2475)  # rows of sum 0.99
    for logits in (torch.rand(64, 3), torch.tensor([[0.3, 0.6]]), torch.tensor([[0.6, 0.4], [0.6, 0.5]]), close * 1.03):
        check_logits(logits.to(dtype), "")
    check_logits(close * 1.0001, "")


def test_a_softmax_in_16_bits_is_refused_everywhere(tmp_path):
    """By `run.probabilities`, `train`, `distill` and the fused model."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)).bfloat16()
    val = VAL[0].bfloat16(), VAL[1]
    recorder = fmn.Recorder(tmp_path / "run", model)
    for epoch in range(2):
        recorder.record(epoch, model(val[0]).detach(), VAL[1])
    for call in (
        lambda: recorder.run.probabilities(val)[0],
        lambda: fmn.FusedModel(fmn.FusionPlan.from_weights({0: 1, 1: 1}, 2), recorder.run)(val[0]),
        lambda: fmn.train(model, val, val, epochs=1, run_dir=tmp_path / "b"),
        lambda: fmn.distill(nn.Linear(6, 4).bfloat16(), model, val, epochs=1),
    ):
        with pytest.raises(ValueError, match="got probabilities"):
            call()


@pytest.mark.parametrize("targets", ["cached", "online"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_ends_in_softmax_is_refused(targets, dtype):
    """Before its first step; one that ends in log_softmax is not."""
    data = TRAIN[0].to(dtype), TRAIN[1]
    teacher, options = nn.Linear(6, 4).to(dtype), {"epochs": 1, "targets": targets, "progress": False}
    student = nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)).to(dtype)
    before = student[0].weight.clone()
    with pytest.raises(ValueError, match="logits or log-probabilities, got probabilities; the student needs"):
        fmn.distill(student, teacher, data, **options)
    assert torch.equal(student[0].weight, before)
    fmn.distill(nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(1)).to(dtype), teacher, data, **options)


class Wrapping(nn.Linear):
    """A network whose outputs are in a tuple, a dict or another object."""

    def __init__(self, wrap):
        super().__init__(6, 4)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


@pytest.mark.parametrize("wrap", [lambda z: (z, z), lambda z: {"logits": z}, lambda z: [z], lambda z: Graph({"x": z})])
def test_outputs_that_are_no_logits_are_named(wrap, tmp_path):
    model, plain, options = Wrapping(wrap), nn.Linear(6, 4), {"epochs": 1, "progress": False}
    name = type(wrap(A)).__name__
    for call in (
        lambda: fmn.train(model, TRAIN, VAL, run_dir=tmp_path, **options),
        lambda: fmn.distill(model, plain, TRAIN, **options),
        lambda: fmn.distill(model, plain, TRAIN, targets="online", **options),
        lambda: fmn.distill(plain, model, TRAIN, **options),
        lambda: data.predict(model, VAL),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"expected logits.*got {name}; .*forward_fn"):
            call()


def test_a_loss_may_take_what_a_network_returns_in_training(tmp_path):
    def forward(model, batch):
        z = model(batch[0])
        return (z, z.square()) if model.training else z, batch[1]

    def loss(outputs, labels):
        return nn.functional.cross_entropy(outputs[0], labels) + 0 * outputs[1].sum()

    options = {"forward_fn": forward, "loss_fn": loss, "epochs": 1, "progress": False}
    runs = [
        fmn.train(fresh(), TRAIN, VAL, run_dir=tmp_path / name, **RECIPE | given)
        for name, given in (("a", options), ("b", {"epochs": 1}))
    ]
    np.testing.assert_array_equal(*(run.probabilities(VAL)[0] for run in runs))
