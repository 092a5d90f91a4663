"""Data that `train`, `probabilities` and `distill` take: labels and inputs of every type of integers, masked ones."""

import numpy as np
import pytest
import torch
from networks import make_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fmn_ref as fmn
from fmn_ref.training.data import Batches

DTYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", ">u2", ">u8", ">i4", ">i8"]


def bits_of(run):
    return run.history.packed.tobytes(), *(p.numpy().tobytes() for p in run.model.state_dict().values())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 4), nn.Linear(12, 2)

    def forward(self, tokens):
        return self.out(self.table(tokens.int()).flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_and_inputs_of_every_type_of_integers(tmp_path, rng, dtype):
    """torch can do little with unsigned numbers above 8 bits, and nothing with bytes in the other order."""
    tokens, y = rng.integers(0, 5, (64, 3)), rng.integers(0, 2, 64)
    runs = []
    for name, given in (("plain", "i8"), ("other", dtype)):
        torch.manual_seed(0)
        data = tokens.astype(given), y.astype(given)
        run = fmn.train(Tokens(), data, data, epochs=2, run_dir=tmp_path / name, progress=False)
        assert run.probabilities(data).labels.tolist() == y.tolist()
        student = fmn.distill(Tokens(), run.model, data, epochs=1, progress=False)
        runs.append(
            (*bits_of(run), run.probabilities(data)[-1].tobytes(), student.out.weight.detach().numpy().tobytes())
        )
    assert runs[0] == runs[1]


def test_inputs_in_the_other_byte_order(tmp_path, rng):
    x, y = rng.standard_normal((64, 6)).astype(np.float32), rng.integers(0, 2, 64)
    runs = []
    for name, inputs in (("plain", x), ("other", x.astype(">f4"))):
        torch.manual_seed(0)
        runs.append(
            fmn.train(nn.Linear(6, 2), (inputs, y), (inputs, y), epochs=1, run_dir=tmp_path / name, progress=False)
        )
    assert bits_of(runs[0]) == bits_of(runs[1])


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_tensors_of_unsigned_integers(dtype):
    x, y = torch.arange(6, dtype=torch.int64).reshape(6, 1).to(dtype), torch.tensor([0, 1, 0, 1, 1, 0]).to(dtype)
    for shuffle in (False, True):
        got = list(Batches((x, y), 4, torch.device("cpu"), shuffle=shuffle))
        assert {t.dtype for batch in got for t in batch} == {torch.int64}
        assert sorted(torch.cat([batch[0] for batch in got]).flatten().tolist()) == list(range(6))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_a_dataset_and_a_loss_of_unsigned_integers(tmp_path, rng, dtype):
    """The batches of a Dataset or a DataLoader are converted like arrays, before a forward_fn sees them."""

    def forward(model, batch):
        return model(batch[0].float() / 9), batch[1]

    x, y = torch.from_numpy(rng.integers(0, 9, (64, 6))), torch.from_numpy(rng.integers(0, 2, 64))
    runs = []
    for i, data in enumerate(((x, y), (x.to(dtype), y.to(dtype)))):
        for set_ in (TensorDataset(*data), DataLoader(TensorDataset(*data), 32)):
            torch.manual_seed(0)
            path = tmp_path / f"{i}{type(set_).__name__}"
            run = fmn.train(nn.Linear(6, 2), set_, set_, epochs=1, run_dir=path, forward_fn=forward, progress=False)
            runs.append((*bits_of(run), run.probabilities(set_).labels.tobytes()))
    assert runs[:2] == runs[2:]


def test_masked_samples_are_refused(tmp_path, rng):
    x, y = rng.standard_normal((64, 8)).astype(np.float32), rng.integers(0, 4, 64)
    for data in ((np.ma.array(x, mask=x > 1), y), (x, np.ma.array(y, mask=y == 2))):
        with pytest.raises(TypeError, match=r"data: expected an array, got MaskedArray .*masked"):
            fmn.train(make_model(), data, data, epochs=1, run_dir=tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


def test_complex_inputs_stay_complex(rng):
    x = rng.standard_normal((4, 2)) + 1j * rng.standard_normal((4, 2))
    (batch,) = Batches((x, np.zeros(4, int)), 4, torch.device("cpu"))
    np.testing.assert_array_equal(batch[0].numpy(), x)


class Named(nn.Module):
    """Takes a sample's parts by their names."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(x)


X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
LISTS = {
    "tensors": [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)],
    "numbers": [{"x": x.tolist(), "labels": int(y)} for x, y in zip(X, Y, strict=True)],
    "arrays": tuple({"x": x.numpy(), "labels": np.int64(y)} for x, y in zip(X, Y, strict=True)),
    "batches": [{"x": x, "labels": y} for x, y in zip(X.split(7), Y.split(7), strict=True)],
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_dicts_gives_what_arrays_give(tmp_path, kind):
    model = Named()
    recorder = fmn.Recorder(tmp_path, model)
    recorder.record(0, model(X).detach(), Y)
    probs = recorder.run.probabilities(LISTS[kind], batch_size=7)
    np.testing.assert_allclose(probs[0], model(X).softmax(1).detach(), atol=1e-6)
    assert probs.labels.tolist() == Y.tolist()


def test_a_list_of_samples_trains_in_another_order_each_time():
    """A list of batches would be read as it is."""
    batches = Batches(LISTS["numbers"], 10, torch.device("cpu"), shuffle=True)
    first, second = (torch.cat([b["labels"] for b in batches]) for _ in range(2))
    assert len(first) == 50
    assert first.sum() == second.sum()
    assert not torch.equal(first, second)


def test_a_dict_with_an_array_of_labels_is_no_list_of_samples(tmp_path):
    data = {"x": X, "names": ["a"] * 50}, Y
    with pytest.raises(TypeError, match=r"data: expected arrays \(inputs, labels\), got tuple of dict, Tensor"):
        fmn.train(Named(), data, data, epochs=1, run_dir=tmp_path, progress=False)


def test_labels_of_tokens_lead_to_their_forward_fn(tmp_path):
    data = [{"x": X, "labels": torch.zeros(50, 3, dtype=int)}]
    with pytest.raises(TypeError, match=r"of shape \(50, 3\); of tokens\? forward_fn=causal_lm_forward"):
        fmn.train(Named(), data, data, epochs=1, run_dir=tmp_path, progress=False)
