"""RecorderCallback: the history is that of predictions dumped by hand; kills, exceptions, two processes, the guide.

This file is also what the subprocesses run: test_lightning.py FOLDER [DEVICES] [kill:E | raise:E]
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

L = pytest.importorskip("lightning")
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # a subprocess has no conftest

import torch  # noqa: E402
from fresh_process import record_in_another_process  # noqa: E402
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402
from networks import make_data, make_model  # noqa: E402
from pages import block, n_lines  # noqa: E402
from torch.optim.swa_utils import get_ema_avg_fn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import fmn_ref as fmn  # noqa: E402
from fmn_ref.integrations.lightning import RecorderCallback  # noqa: E402
from fmn_ref.integrations.torchmetrics import ForgetFraction  # noqa: E402
from fmn_ref.runs import checkpoints  # noqa: E402

GUIDE = Path(__file__).parents[2] / "docs" / "integrations" / "lightning.md"
EPOCHS = 6
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

TRAIN, VAL, TEST = make_data()
VAL = tuple(a[:-3] for a in VAL)  # 237: two processes cannot share them evenly, so that the sampler repeats one


class Net(L.LightningModule):
    """Keeps what it predicted: dumped[epoch] is the list of the batches' logits."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or make_model()
        self.dumped = {}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_step)  # so that a resumed training is the same, also within an epoch
        rows = torch.randint(len(TRAIN[0]), (32,))
        return torch.nn.functional.cross_entropy(self(TRAIN[0][rows]), TRAIN[1][rows])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self(batch[0])
        if not self.trainer.sanity_checking and dataloader_idx == 0:
            self.dumped.setdefault(self.global_step, []).append(logits.clone())
        return {"loss": torch.nn.functional.cross_entropy(logits, batch[1]), "logits": logits}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)

    @property
    def logits(self):
        """(n_epochs, n_samples, n_classes)"""
        return torch.stack([torch.cat(batches) for batches in self.dumped.values()]).numpy()


def make_net(cls=Net):
    torch.manual_seed(1)
    return cls()


def loader(data, batch_size=32, **options):
    return DataLoader(TensorDataset(*data), batch_size, **options)


def trainer_of(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    quiet["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return L.Trainer(**{"max_epochs": EPOCHS, "default_root_dir": folder, **quiet, **options}, callbacks=[*callbacks])


def fit(folder, *callbacks, module=None, val=None, ckpt_path=None, recording=None, **options):
    """(callback, module) of a training into folder / "run"."""
    recorder = RecorderCallback(folder / "run", **(recording or {}))
    module = module or make_net()
    trainer = trainer_of(folder, recorder, *callbacks, **options)
    trainer.fit(module, loader(TRAIN), val or loader(VAL, 50), ckpt_path=ckpt_path)
    return recorder, module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("lightning"))


def test_the_history_is_that_of_predictions_dumped_by_hand(trained):
    recorder, module = trained
    assert module.logits.shape == (EPOCHS, 237, 4)
    history = recorder.run.history
    np.testing.assert_array_equal(history.correct(), fmn.correctness(module.logits, VAL[1]))
    assert history.epochs == tuple(range(EPOCHS))
    assert 0.4 < history.correct()[-1].mean() < 0.99
    assert history.digest == fmn.CorrectnessHistory(237, labels=VAL[1]).digest


def test_what_follows_agrees_with_the_core_on_the_dumped_arrays(trained):
    recorder, module = trained
    run, probs = recorder.run, fmn.from_logits(module.logits)
    correct = fmn.correctness(module.logits, VAL[1])
    np.testing.assert_array_equal(fmn.forget_fraction(run.history), fmn.forget_fraction(correct))
    plan = fmn.fuse(run.probabilities(loader(VAL, 50)), VAL[1], correct=run.history)
    by_hand = fmn.fuse(probs, VAL[1], correct=correct)
    assert plan.members == by_hand.members
    assert not plan.final_model_alone
    fused = fmn.FusedModel(plan, run)
    assert fmn.correctness(fused(VAL[0]), VAL[1]).mean() == fmn.correctness(by_hand.apply(probs), VAL[1]).mean()
    student = fmn.distill(make_model(), fused, TRAIN, epochs=1, progress=False)
    assert student(VAL[0]).shape == (237, 4)


def same_run(folder, other):
    """The same bits of history, and the same weights."""
    assert (folder / "run/history.fmnh").read_bytes() == (other / "run/history.fmnh").read_bytes()
    files = [sorted((f / "run/checkpoints").iterdir()) for f in (folder, other)]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    for a, b in zip(*(map(checkpoints.load, f) for f in files), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a | b)


class Accident(Callback):
    """ "kill:2": SIGKILL in epoch 2; "late:2": after its validation, before Lightning saves; "raise:2": an error."""

    def __init__(self, text):
        self.how, _, epoch = text.partition(":")
        self.epoch = int(epoch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 3) and self.how != "late":
            self.happen()

    def on_validation_end(self, trainer, module):
        if trainer.current_epoch == self.epoch and not trainer.sanity_checking and self.how == "late":
            self.happen()

    def happen(self):
        if self.how == "raise":
            raise RuntimeError("an accident")
        os.kill(os.getpid(), signal.SIGKILL)


def last_of(folder, **options):
    return ModelCheckpoint(folder / "last", save_last=True, **options)


def script(*arguments):
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("how", ["kill:3", "late:3"])
def test_a_killed_training_resumes_to_the_same_history(trained, tmp_path, how):
    assert script(tmp_path, 1, how).returncode == -signal.SIGKILL
    assert len(fmn.Run.open(tmp_path / "run").history) == (3 if how == "kill:3" else 4)
    fit(tmp_path, last_of(tmp_path), ckpt_path="last")
    same_run(tmp_path, trained[0].run_dir.parent)


@pytest.mark.parametrize(
    ("saving", "options"),
    [
        ({}, {}),
        ({"save_on_train_epoch_end": False}, {}),
        ({"every_n_train_steps": 5}, {}),
        ({}, {"val_check_interval": 0.5}),
        ({}, {"check_val_every_n_epoch": 2}),
        ({"save_on_train_epoch_end": False}, {"check_val_every_n_epoch": None, "val_check_interval": 7}),
    ],
)
def test_an_exception_and_resuming_give_the_same_history(tmp_path, saving, options):
    """Wherever Lightning saves, and however often it validates."""
    whole, _ = fit(tmp_path / "whole", **options)
    broken = tmp_path / "broken"
    with pytest.raises(RuntimeError, match="an accident"):
        fit(broken, last_of(broken, **saving), Accident("raise:4"), **options)
    module = make_net()
    fit(broken, last_of(broken, **saving), ckpt_path="last", module=module, **options)
    assert len(module.dumped) < len(whole.run.history)  # it did resume
    same_run(broken, whole.run_dir.parent)


def test_resuming_from_an_older_checkpoint_records_what_follows_anew(trained, tmp_path, caplog):
    fit(tmp_path, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    recorder, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert "dropped epochs [2, 3, 4, 5], recorded after the checkpoint" in caplog.text
    assert recorder.run.history.epochs == (0, 1, 2, 3)
    fit(tmp_path, ckpt_path=tmp_path / "epoch=2.ckpt")
    same_run(tmp_path, trained[0].run_dir.parent)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"check_val_every_n_epoch": 2}, (1, 3, 5)),
        ({"val_check_interval": 0.5, "max_epochs": 2}, (0, 1, 2, 3)),
        ({"check_val_every_n_epoch": None, "val_check_interval": 9, "max_epochs": 3}, (1, 2)),
    ],
)
def test_numbers_of_epochs(tmp_path, options, epochs):
    recorder, module = fit(tmp_path, **options)
    assert recorder.run.history.epochs == epochs
    np.testing.assert_array_equal(recorder.run.history.correct(), fmn.correctness(module.logits, VAL[1]))


def test_two_processes_give_the_history_of_one(tmp_path):
    done = script(tmp_path, 2)
    assert done.returncode == 0, done.stderr
    run = fmn.Run.open(tmp_path / "run", make_net())
    assert run.history.correct().shape == (EPOCHS, 237)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1)]
    logits = torch.stack([r["logits"] for r in ranks], 2).flatten(1, 2)[:, :237]  # the sampler deals them out in turns
    one = fmn.Recorder(tmp_path / "one")
    for epoch, scores in enumerate(logits):
        one.record(epoch, scores, VAL[1])
    assert (tmp_path / "one/history.fmnh").read_bytes() == (tmp_path / "run/history.fmnh").read_bytes()
    for row, probs in zip(run.history.correct(), run.probabilities(VAL), strict=True):
        np.testing.assert_array_equal(row, fmn.correctness(probs, VAL[1]))  # the first's weights are both's
    peak = fmn.forget_fraction(run.history).max()
    assert [r["peak"] for r in ranks] == [pytest.approx(peak)] * 2
    for r in ranks:  # an error of the first process ends both
        assert "holds 6 epochs, but the trainer starts anew" in r["refused"]


def test_the_budget_keeps_weights_that_fit_their_epochs(tmp_path):
    recorder, _ = fit(tmp_path, recording={"keep": "budget:2", "half": True})
    kept = recorder.run.kept
    assert len(kept.history) == 3
    stored, parameters = checkpoints.load(kept.checkpoints[0]), dict(recorder.run.model.named_parameters())
    assert all((v.dtype == torch.float16) == (name in parameters) for name, v in stored.items())  # not the buffers
    for row, probs in zip(kept.history.correct(), kept.probabilities(VAL), strict=True):
        assert (row != fmn.correctness(probs, VAL[1])).mean() < 0.02  # 16 bits
    recorder, _ = fit(tmp_path / "none", recording={"keep": "none"}, max_epochs=2)
    assert not list((tmp_path / "none/run/checkpoints").iterdir())


def test_a_part_of_the_module_is_the_model(tmp_path, trained):
    module = make_net()
    recorder, _ = fit(tmp_path, module=module, recording={"model": module.net})
    run = fmn.Run.open(recorder.run_dir, make_model())
    assert recorder.run.model is module.net
    assert checkpoints.load(run.checkpoints[0]).keys() == make_model().state_dict().keys()
    assert checkpoints.load(run.checkpoints[0])._metadata == make_model().state_dict()._metadata
    whole = trained[0].run.probabilities(VAL)
    for e in range(EPOCHS):
        np.testing.assert_array_equal(run.probabilities(VAL)[e], whole[e])


class Sparse(Net):
    """No forward, and an odd batch."""

    forward = None

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return [batch["x"], self.net(batch["x"])]


def test_a_compiled_part_and_a_metric_within(tmp_path, trained):
    """Neither leaves a trace in the checkpoints: they fit the module without them, and with them."""
    module = make_net()
    module.net, module.forget = torch.compile(module.net, backend="eager"), ForgetFraction()
    recorder, _ = fit(tmp_path, module=module)
    same_run(tmp_path, trained[0].run_dir.parent)
    stored = checkpoints.load(recorder.run.checkpoints[0])._metadata
    assert {name: v for name, v in stored.items() if name != "forget"} == make_net().state_dict()._metadata
    plain = fmn.Run.open(recorder.run_dir, make_net()).probabilities(VAL)
    np.testing.assert_array_equal(recorder.run.probabilities(VAL)[-1], plain[-1])


def test_a_forward_fn_and_outputs_of(tmp_path):
    class Named(TensorDataset):
        def __getitem__(self, i):
            return {"x": self.tensors[0][i], "truth": self.tensors[1][i]}

    options = {
        "forward_fn": lambda module, batch: (module.net(batch["x"]), batch["truth"]),
        "outputs_of": lambda outputs, batch: (outputs[1], batch["truth"]),
    }
    val = DataLoader(Named(*VAL), 64)
    recorder, _ = fit(tmp_path, module=make_net(Sparse), val=val, recording=options, max_epochs=2)
    probs = recorder.run.probabilities(val)
    np.testing.assert_array_equal(fmn.correctness(list(probs), VAL[1]), recorder.run.history.correct())
    plan = fmn.fuse(probs, VAL[1], correct=recorder.run.history)
    log_probs, labels = fmn.FusedModel(plan, recorder.run)._fmn_forward_batch(next(iter(val)), options["forward_fn"])
    assert labels.tolist() == VAL[1][:64].tolist()
    np.testing.assert_allclose(log_probs.exp(), plan.apply(probs)[:64], atol=1e-6)


def test_weights_are_those_that_were_validated(tmp_path):
    """A callback may swap averaged weights in and, before ours gets to its end, out."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")  # not in every 2.x
    average = callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    recorder = RecorderCallback(tmp_path / "run")
    for callbacks in ([average, recorder], [recorder, average]):
        recorder._overwrite = True
        module = make_net()
        trainer_of(tmp_path, *callbacks, max_epochs=3).fit(module, loader(TRAIN), loader(VAL, 50))
        correct = recorder.run.history.correct()
        np.testing.assert_array_equal(correct, fmn.correctness(module.logits, VAL[1]))
        np.testing.assert_array_equal(correct, fmn.correctness(list(recorder.run.probabilities(VAL)), VAL[1]))


def test_one_of_several_dataloaders(tmp_path):
    loaders = [loader(TEST, 50), loader(VAL, 50)]
    recorder, _ = fit(tmp_path, val=loaders, recording={"dataloader_idx": 1}, max_epochs=2)
    probs = recorder.run.probabilities(loaders[1])
    np.testing.assert_array_equal(recorder.run.history.correct(), fmn.correctness(list(probs), VAL[1]))
    two = [RecorderCallback(tmp_path / f"of {i}", dataloader_idx=i) for i in (0, 1)]
    trainer = trainer_of(tmp_path, *two, max_epochs=3)
    trainer.fit(make_net(), loader(TRAIN), loaders)
    for recorder, end in zip(two, ("", "/dataloader_idx_1"), strict=True):
        peak = fmn.forget_fraction(recorder.run.history).max()
        assert trainer.callback_metrics[f"peak_forget_fraction{end}"] == np.float32(peak)
    both = fit(tmp_path / "names", val={"test": loaders[0], "val": loaders[1]}, max_epochs=2)[0].run
    assert both.history.n_samples == 240
    with pytest.raises(ValueError, match="dataloader_idx: no validation batch came from dataloader 2"):
        fit(tmp_path / "third", val=loaders, recording={"dataloader_idx": 2})


def test_sample_numbers_undo_shuffling_and_repetition(tmp_path, trained):
    class Numbered(Net):
        def validation_step(self, batch, batch_idx):
            return {"preds": self.net(batch[0]).argmax(1), "targets": batch[1], "index": batch[2], "logit": None}

    numbers = torch.arange(237)
    val = [torch.cat([a, a[:13]]) for a in (*VAL, numbers)]
    with pytest.warns(UserWarning, match="sampler has shuffling enabled"):
        recorder, _ = fit(tmp_path, module=make_net(Numbered), val=loader(val, 50, shuffle=True))
    np.testing.assert_array_equal(recorder.run.history.correct(), trained[0].run.history.correct())


def test_numbers_that_are_not_the_samples_own(tmp_path):
    class Grouped(Net):
        def validation_step(self, batch, batch_idx):
            return {"logits": self.net(batch[0]), "index": torch.zeros(len(batch[1]), dtype=torch.int64)}

    with pytest.raises(ValueError, match="index: expected each sample's own number"):
        fit(tmp_path, module=make_net(Grouped))


def test_no_validation(tmp_path):
    with pytest.raises(ValueError, match="validation: nothing to record"):
        fit(tmp_path, limit_val_batches=0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda logits, y: None, "got None; return {"),
        (lambda logits, y: logits.mean(), "got a loss; return"),
        (lambda logits, y: {"loss": logits.mean()}, r"got a dict with \['loss'\]"),
        (lambda logits, y: {"logits": logits * torch.nan}, "scores: expected numbers, got NaN"),
        (lambda logits, y: {"logits": logits[:, 0]}, "scores: expected shape"),
        (lambda logits, y: {"logits": logits, "labels": y[1:]}, "labels"),
        (lambda logits, y: {"logits": logits[None]}, "got correctness of shape"),
    ],
)
def test_the_sanity_check_says_what_is_wrong(tmp_path, returned, message):
    class Wrong(Net):
        def validation_step(self, batch, batch_idx):
            return returned(self.net(batch[0]), batch[1])

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module=make_net(Wrong))
    assert not (tmp_path / "run").exists()


def test_logits_alone_and_labels_by_name(tmp_path, trained):
    class Bare(Net):
        def validation_step(self, batch, batch_idx):
            return self.net(batch[0] if isinstance(batch, list) else batch["x"])

    class Named(TensorDataset):
        def __getitem__(self, i):
            return {"x": self.tensors[0][i], "labels" if "labels" in names else "z": self.tensors[1][i]}

    names = ["labels"]
    for val in (None, DataLoader(Named(*VAL), 50)):
        recorder, _ = fit(tmp_path, module=make_net(Bare), val=val, recording={"overwrite": True}, max_epochs=2)
        expected = trained[0].run.history.correct()[:2]
        np.testing.assert_array_equal(recorder.run.history.correct(), expected)
    names.clear()
    with pytest.raises(ValueError, match='no "labels", neither in what it returns nor in the batch'):
        fit(tmp_path / "none", module=make_net(Bare), val=DataLoader(Named(*VAL), 50))


class Swapping(torch.utils.data.Sampler):
    """Two samples change places in each pass, and no class of torch tells."""

    passes = 0

    def __len__(self):
        return len(VAL[0])

    def __iter__(self):
        self.passes += 1
        order = list(range(len(self)))
        order[self.passes], order[200] = order[200], order[self.passes]
        return iter(order)


@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0}], ids=["sanity check", "none"])
def test_samples_of_one_class_that_change_places_are_noticed(tmp_path, options):
    one_class = VAL[0], torch.zeros_like(VAL[1])
    with pytest.raises(ValueError, match="validation: the samples or their order changed since the last pass"):
        fit(tmp_path / "a", val=loader(one_class, 50, sampler=Swapping()), **options)
    assert len(fmn.Run.open(tmp_path / "a" / "run").history) == 1
    fit(tmp_path / "b", val=loader(one_class, 50, sampler=list(range(236, -1, -1))), **options)


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_a_shuffled_loader_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="a RandomSampler does not say again which samples it drew"):
        fit(tmp_path, val=loader(VAL, 50, shuffle=True))


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep: expected"):
        RecorderCallback(tmp_path, "some")
    with pytest.raises(TypeError, match="model: expected a torch"):
        RecorderCallback(tmp_path, model="net")
    with pytest.raises(TypeError, match="outputs_of: expected a function, got str"):
        RecorderCallback(tmp_path, outputs_of="logits")
    with pytest.raises(ValueError, match="dataloader_idx"):
        RecorderCallback(tmp_path, dataloader_idx=-1)
    with pytest.raises(ValueError, match="model: expected a module inside the LightningModule, got another Sequential"):
        fit(tmp_path, recording={"model": make_model()})


def test_a_run_that_is_there(tmp_path):
    fit(tmp_path, max_epochs=1)
    fit(tmp_path, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), max_epochs=2)  # as after an early kill
    with pytest.raises(ValueError, match=r"run_dir: .*run holds 2 epochs, but the trainer starts anew; fit\(ckpt_path"):
        fit(tmp_path)
    recorder, _ = fit(tmp_path, recording={"overwrite": True}, max_epochs=1)
    assert len(recorder.run.history) == 1
    with pytest.raises(ValueError, match=r"ends before epoch 1, but the checkpoint .* was saved before 2"):
        fit(tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt")
    recorder, _ = fit(tmp_path / "elsewhere", ckpt_path=tmp_path / "epoch=1.ckpt")
    assert recorder.run.history.epochs == (2, 3, 4, 5)


def test_only_fit_is_recorded(tmp_path):
    recorder = RecorderCallback(tmp_path / "run")
    trainer = trainer_of(tmp_path, recorder, max_epochs=2, fast_dev_run=True)
    trainer.fit(make_net(), loader(TRAIN), loader(VAL, 50))
    assert not (tmp_path / "run").exists()
    assert trainer.callback_metrics["peak_forget_fraction"] == 0
    with pytest.raises(ValueError, match="run: fast_dev_run records nothing"):
        recorder.run  # noqa: B018
    trainer = trainer_of(tmp_path, recorder, max_epochs=2)
    module = make_net()
    trainer.fit(module, loader(TRAIN), loader(VAL, 50))
    trainer.validate(module, loader(TEST), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(TRAIN), loader(VAL, 50))
    assert recorder.run.history.epochs == (0, 1, 2)


class Intruder(Callback):
    """Another process records while the training goes on."""

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.outcome = record_in_another_process(Path(trainer.default_root_dir) / "run", 9, VAL[1])


@pytest.mark.parametrize("how", ["end", "raise:1"])
def test_another_process_records_after_the_training(tmp_path, caplog, how):
    """The folder is locked while it goes on, and free after its end or failure; then the training resumes."""
    intruder, accidents = Intruder(), [] if how == "end" else [Accident(how)]
    with pytest.raises(RuntimeError, match="an accident") if accidents else contextlib.nullcontext():
        fit(tmp_path, intruder, last_of(tmp_path), *accidents, max_epochs=2)
    assert re.search(r"run_dir: process \d+ on .* writes in", intruder.outcome)
    assert record_in_another_process(tmp_path / "run", 9, VAL[1]) == ""
    recorder, _ = fit(tmp_path, last_of(tmp_path), ckpt_path="last", max_epochs=3)
    assert "dropped epochs [9], recorded after the checkpoint" in caplog.text
    assert recorder.run.history.epochs == (0, 1, 2)


def test_the_peak_is_logged_and_can_be_monitored(tmp_path):
    peaks = []

    class Read(Callback):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                peaks.append(float(trainer.callback_metrics["peak_forget_fraction"]))

    stopping = EarlyStopping("peak_forget_fraction", stopping_threshold=1e-9, mode="max", patience=EPOCHS)
    recorder, _ = fit(tmp_path, Read(), stopping)
    correct = recorder.run.history.correct()
    expected = [fmn.forget_fraction(correct[: e + 1]).max() for e in range(len(correct))]
    np.testing.assert_allclose(peaks, expected, rtol=1e-6)
    assert peaks[-1] > 0 == max(peaks[:-1])


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")
def test_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = GUIDE.read_text()
    code = block(page, "# PyTorch Lightning")
    assert n_lines(code) <= 10
    names = {"module": make_net(), "epochs": 4, "y_val": VAL[1], "torch": torch}
    names |= {"train_loader": loader(TRAIN), "val_loader": loader(VAL, 50)}
    exec(code, names)
    correct = fmn.correctness(names["module"].logits, VAL[1])
    np.testing.assert_array_equal(names["run"].history.correct(), correct)
    assert names["fused"](VAL[0]).shape == (237, 4)

    exec(block(page, "## Distil in Lightning"), names)

    class Student(names["Student"]):
        def validation_step(self, batch, batch_idx):
            return self.net(batch[0])

    torch.manual_seed(1)
    student = Student(make_model(), names["fused"])
    recorder, _ = fit(tmp_path / "student", module=student, recording={"model": student.net}, max_epochs=8)
    assert recorder.run.history.correct()[-1].mean() > 0.4
    assert checkpoints.load(recorder.run.checkpoints[-1]).keys() == make_model().state_dict().keys()


OTHER_NAME = """
import sys, pytorch_lightning as pl, torch
from fmn_ref.integrations.lightning import RecorderCallback
assert "lightning" not in sys.modules
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)
    def training_step(self, batch, i):
        return self.net(batch[0]).mean()
    def validation_step(self, batch, i):
        return self.net(batch[0])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 2), torch.tensor([0, 1, 0, 1])), 4)
recorder = RecorderCallback(sys.argv[1])
pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[recorder]).fit(
    Net(), data, data
)
assert len(recorder.run.history) == 2
"""
MISSING = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import fmn_ref.integrations.lightning
"""


def test_by_its_other_name(tmp_path):
    pytest.importorskip("pytorch_lightning")
    done = subprocess.run([sys.executable, "-c", OTHER_NAME, tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_lightning():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True)
    assert done.stderr.strip().endswith('ImportError: this needs Lightning: pip install "fmn_ref[lightning]"')


def main(folder, devices=1, accident=None):
    """Program of `script`: a training in one or two processes; each leaves what it predicted."""
    torch.set_num_threads(1)
    module, callbacks = make_net(), [] if accident is None else [Accident(accident)]
    several = {"devices": int(devices), "strategy": "ddp"} if int(devices) > 1 else {}
    recorder = RecorderCallback(folder / "run")
    trainer = trainer_of(folder, recorder, *callbacks, last_of(folder), **several)
    trainer.fit(module, loader(TRAIN), loader(VAL, 50), ckpt_path="last")
    assert len(recorder.run.history) == EPOCHS
    left = {"logits": torch.tensor(module.logits), "peak": float(trainer.callback_metrics["peak_forget_fraction"])}
    try:
        trainer_of(folder, recorder, **several).fit(module, loader(TRAIN), loader(VAL, 50))
    except ValueError as error:
        left["refused"] = str(error)
    torch.save(left, folder / f"rank_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])


def test_checkpoints_of_a_finished_training(tmp_path):
    """What ModelCheckpoint saved, without the callback: the history is that of the logits dumped by hand."""
    model = Net()
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, save_last=True, save_weights_only=False)
    trainer = L.Trainer(
        max_epochs=4, callbacks=[saver], logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, DataLoader(TensorDataset(*TRAIN), 48, shuffle=True), DataLoader(TensorDataset(*VAL), 64))
    by_hand = [torch.cat([*model.dumped[epoch]]) for epoch in sorted(model.dumped)]
    for number, network in enumerate((make_model(), Net())):
        run = fmn.from_checkpoints(tmp_path / "saved", network, VAL, tmp_path / f"run{number}")
        assert run.history.epochs == (0, 1, 2, 3)
        np.testing.assert_array_equal(run.history.correct(), [fmn.correctness(z, VAL[1]) for z in by_hand])
