"""ForgetFraction: what an epoch is, in a plain loop, in Lightning and in two processes; the guide as it is written."""

import contextlib
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torchmetrics = pytest.importorskip("torchmetrics")

import torch  # noqa: E402
from inputs import random_probs  # noqa: E402
from networks import make_data, make_model  # noqa: E402
from pages import block, n_lines  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

import fmn_ref as fmn  # noqa: E402
from fmn_ref.integrations.torchmetrics import ForgetFraction  # noqa: E402

GUIDE = Path(__file__).parents[2] / "docs" / "integrations" / "torchmetrics.md"


@pytest.fixture
def scores(rng):
    """((n_epochs, 101, n_classes), labels)"""
    probs, labels = random_probs(rng, n_samples=101)
    return torch.tensor(probs), torch.tensor(labels)


def epoch(metric, probs, labels, order=None, call=False):
    """An epoch of batches of 20; its value."""
    rows = torch.arange(len(labels)) if order is None else order
    for part in rows.split(20):
        index = () if order is None else (part,)
        (metric if call else metric.update)(probs[part], labels[part], *index)
    value = metric.compute()
    metric.reset()
    return value


@pytest.mark.parametrize("call", [False, True])
def test_values_are_those_of_the_core(scores, call):
    probs, labels = scores
    correct = fmn.correctness(probs, labels)
    metric = ForgetFraction()
    for e in range(len(probs)):
        assert epoch(metric, probs[e], labels, call=call) == np.float32(fmn.forget_fraction(correct[: e + 1]).max())
    np.testing.assert_array_equal(metric.history.correct(), correct)
    assert metric(probs[0], labels) == np.float32(fmn.forget_fraction(correct).max())  # of the last compute


def test_what_an_epoch_is(scores):
    probs, labels = scores
    correct = fmn.correctness(probs, labels)
    metric = ForgetFraction()
    metric.update(probs[5, :40], labels[:40])
    metric.reset()  # without compute: dropped
    epoch(metric, probs[5, :64], labels[:64])  # fewer samples than in the next: a sanity check
    metric.update(probs[0, :80], labels[:80])
    metric.compute()
    assert metric.history.n_samples == 80
    metric.update(probs[0, 80:], labels[80:])
    metric.compute()  # replaces it
    metric.compute()
    metric.reset()
    metric.reset()
    value = epoch(metric, probs[1], labels)
    with pytest.warns(UserWarning, match="64 samples, not the 101 of the epochs before: not recorded, as"):
        assert epoch(metric, probs[5, :64], labels[:64]) == value > 0
    np.testing.assert_array_equal(metric.history.correct(), correct[:2])


def test_numbers_of_samples_undo_shuffling_and_repetition(scores):
    probs, labels = scores
    metric = ForgetFraction()
    for p in probs:
        epoch(metric, p, labels, order=torch.cat([torch.randperm(101), torch.tensor([3, 1, 4])]))
    np.testing.assert_array_equal(metric.history.correct(), fmn.correctness(probs, labels))


def test_copies_and_files_have_the_history(scores, tmp_path):
    probs, labels = scores
    metric = ForgetFraction()
    epoch(metric, probs[0], labels)
    metric.update(probs[1], labels)
    metric.compute()  # a checkpoint may be saved before the reset
    torch.save(metric.state_dict(), tmp_path / "metric.pt")
    loaded = ForgetFraction()
    loaded.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    copies = [loaded, pickle.loads(pickle.dumps(metric)), metric.clone()]
    for copy in copies:
        copy.reset()
        assert epoch(copy, probs[2], labels) == np.float32(fmn.forget_fraction(copy.history).max())
        assert copy.history.digest == metric.history.digest
        np.testing.assert_array_equal(copy.history.correct(), fmn.correctness(probs[:3], labels))
    assert len(metric.history) == 2
    net, before = torch.nn.Module(), torch.nn.Module()
    net.metric = metric
    net.load_state_dict(before.state_dict())  # weights that were saved before there was a metric
    assert len(metric.history) == 2
    empty = ForgetFraction()
    empty.load_state_dict(ForgetFraction().state_dict())
    with pytest.raises(ValueError, match="history: compute"):
        empty.history  # noqa: B018


def test_among_others(scores):
    probs, labels = scores
    both = torchmetrics.MetricCollection({"accuracy": MulticlassAccuracy(5, average="micro"), "f": ForgetFraction()})
    for p in probs[:3]:
        both(p, labels)
        values = both.compute()
        both.reset()
    correct = fmn.correctness(probs[:3], labels)
    assert values["accuracy"] == pytest.approx(correct[-1].mean())
    assert values["f"] == np.float32(fmn.forget_fraction(correct).max())


def test_mistakes(scores):
    probs, labels = scores
    metric = ForgetFraction()
    for p in probs[:2]:
        metric.update(p, labels)
        with pytest.warns(UserWarning, match="was reset") if len(metric.rows) > 1 else contextlib.nullcontext():
            metric.compute()
    metric = ForgetFraction()
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(ValueError, match="nothing was updated"),
    ):
        metric.compute()
    with pytest.raises(ValueError, match="preds: expected shape"):
        metric.update(probs, labels)
    with pytest.raises(ValueError, match="index: expected 101 samples"):
        metric.update(probs[0], labels, torch.arange(3))
    with pytest.raises(ValueError, match="NaN"):
        metric.update(probs[0] * torch.nan, labels)
    metric.reset()
    metric.update(probs[0, :20], labels[:20], torch.arange(20))
    metric.update(probs[0, 20:], labels[20:])
    with pytest.raises(ValueError, match="index: expected sample numbers in every batch or in none"):
        metric.compute()
    metric.reset()
    epoch(metric, probs[0], labels)
    metric.update(probs[1].flip(0), labels.flip(0))
    with pytest.raises(ValueError, match="target: other samples than in the epochs before, or in another order"):
        metric.compute()
    metric.reset()
    epoch(metric, probs[1], labels)
    for _ in range(2):
        metric.update(probs[2], labels)
    with pytest.raises(ValueError, match="target: 202 samples, not the 101 of the epochs before"):
        metric.compute()


def process(rank, folder, probs, labels):
    """One of two, with what a DistributedSampler gives it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric, plain = ForgetFraction(), ForgetFraction()
    numbers = torch.utils.data.DistributedSampler(labels, shuffle=False)
    for e in range(3):
        numbers.set_epoch(e)
        order = torch.tensor(list(numbers))
        peak = epoch(metric, probs[e], labels, order)
        for part in order.split(20):
            plain.update(probs[e, part], labels[part])
        plain.compute()
        plain.reset()
    result = torch.tensor(metric.history.packed), peak, plain.history.n_samples
    torch.save(result, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_history_of_one(scores, tmp_path):
    probs, labels = scores
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=process, args=(rank, str(tmp_path), probs, labels)) for rank in (0, 1)]
    for p in both:
        p.start()
    for p in both:
        p.join(600)
        assert p.exitcode == 0
    one = ForgetFraction()
    for p in probs[:3]:
        peak = epoch(one, p, labels)
    for rank in (0, 1):
        packed, found, n_plain = torch.load(tmp_path / f"{rank}.pt")
        np.testing.assert_array_equal(packed, one.history.packed)
        assert found == peak
        assert n_plain == 102  # without numbers the repeated sample counts twice


@pytest.mark.filterwarnings("ignore:ForgetFraction. 64 samples, not the 240 of the epochs before")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated")
def test_the_guide_in_lightning(tmp_path, monkeypatch):
    """As it is written; resumed, it agrees with the callback, which keeps its own history without the sanity check."""
    lightning = pytest.importorskip("lightning")
    from fmn_ref.integrations.lightning import RecorderCallback

    monkeypatch.chdir(tmp_path)
    train, val, _ = make_data()
    names = {"L": lightning, "torch": torch}
    exec(block(GUIDE.read_text(), "In Lightning"), names)

    class Net(names["Net"]):
        def __init__(self):
            super().__init__()
            self.net = make_model()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            torch.manual_seed(self.global_step)
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.2)

    def fit(epochs, ckpt_path=None, alone=False):
        torch.manual_seed(1)
        module, recorder = Net(), RecorderCallback("run", outputs_of=lambda outputs, batch: (outputs, batch[1]))
        trainer = lightning.Trainer(
            max_epochs=epochs,
            callbacks=[] if alone else [recorder],
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        loaders = [DataLoader(TensorDataset(*data), 32) for data in (train, val)]
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
        trainer.save_checkpoint("last.ckpt")
        return module, recorder, trainer

    fit(3)
    module, recorder, trainer = fit(5, "last.ckpt")
    np.testing.assert_array_equal(module.forget.history.correct(), recorder.run.history.correct())
    assert module.forget.history.correct().shape == (5, 240)
    peak = fmn.forget_fraction(recorder.run.history).max()
    for each in (trainer, fit(5, alone=True)[2]):  # the recorder logs the same under this name
        assert each.callback_metrics["peak_forget_fraction"] == np.float32(peak) > 0
    plan = fmn.fuse(recorder.run.probabilities(val), val[1], correct=recorder.run.history)
    fused = fmn.FusedModel(plan, recorder.run)  # the metric's history is among the weights, and does no harm
    np.testing.assert_allclose(fused(val[0]).exp(), plan.apply(recorder.run.probabilities(val)), atol=1e-6)


def test_the_guide_in_a_loop(capsys):
    _, val, _ = make_data()
    names = {"model": make_model().eval(), "epochs": 2, "train_one_epoch": lambda model: None}
    names["val_loader"] = DataLoader(TensorDataset(*val), 64)
    code = block(GUIDE.read_text(), "In a loop")
    assert n_lines(code) <= 10
    exec(code, names)
    assert capsys.readouterr().out.splitlines() == ["0.0", "0.0"]
    assert len(names["metric"].history) == 2


def test_without_torchmetrics():
    code = "import sys; sys.modules['torchmetrics'] = None; import fmn_ref.integrations.torchmetrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().endswith('ImportError: this needs torchmetrics: pip install "fmn_ref[torchmetrics]"')
