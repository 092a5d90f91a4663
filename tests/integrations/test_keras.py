"""Keras, on torch in this process and on each other installed backend in a process of its own.

As a script it is the training that is killed: FOLDER [MOMENT EPOCH].
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # a subprocess has no conftest

from folders import full_disk  # noqa: E402
from forgetful_disk import states_after  # noqa: E402
from fresh_process import record_in_another_process  # noqa: E402
from inputs import softmax  # noqa: E402
from keras_models import Dump, fit, make_data, make_model, state_of  # noqa: E402
from pages import blocks, n_lines  # noqa: E402

import fmn_ref as fmn  # noqa: E402
from fmn_ref.integrations.keras import RecorderCallback, probabilities  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
BACKEND = keras.backend.backend()
DOCS = Path(__file__).parents[2] / "docs" / "integrations" / "keras.md"
EPOCHS = 6


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(1)


@pytest.mark.parametrize("last", ["softmax", None])
def test_history_plan_and_fused_predictions_are_those_of_dumped_predictions(last):
    _, (x_val, y_val), (x_test, y_test) = make_data()
    model, dump, dump_test = make_model(last), Dump(x_val), Dump(x_test)
    callback = RecorderCallback("run", x_val, y_val)
    fit(model, [dump_test, callback, dump])
    right = np.array([z.argmax(1) == y_val for z in dump.outputs])
    run = fmn.Run.open("run")
    assert run.history.epochs == tuple(range(EPOCHS))
    assert json.loads(Path("run/run.json").read_text())["made_with"]["keras"] == keras.__version__
    np.testing.assert_array_equal(run.history.packed, np.packbits(right, axis=1, bitorder="little"))
    np.testing.assert_array_equal(fmn.forget_fraction(run.history), fmn.forget_fraction(right))
    assert fmn.forget_fraction(right).max() > 0

    dumped, dumped_test = np.array(dump.outputs), np.array(dump_test.outputs)
    if last is None:
        dumped, dumped_test = (softmax(a, np.float32) for a in (dumped, dumped_test))
    weights = state_of(model)
    probs, test_probs = probabilities(run, model, x_val), probabilities(run, model, x_test)
    np.testing.assert_allclose(np.array(list(probs)), dumped, atol=1e-6)
    assert probs[-1].dtype == np.float32
    for method in ("forget", "auto"):
        plan = fmn.fuse(probs, y_val, correct=run.history, method=method)
        assert plan.members == fmn.fuse(dumped, y_val, method=method).members
        fused = plan.apply(test_probs)
        np.testing.assert_allclose(fused, plan.apply(dumped_test), atol=1e-6)
        assert (fused.argmax(1) == y_test).mean() == (plan.apply(dumped_test).argmax(1) == y_test).mean()
    assert all(np.array_equal(a, b) for a, b in zip(weights, state_of(model), strict=True))
    with pytest.raises(IndexError):
        probs[EPOCHS]


@pytest.mark.parametrize("last", ["sigmoid", None])
def test_two_classes_by_one_output(last):
    (x, y), (x_val, y_val), _ = make_data()
    model = make_model(last, 1, keras.losses.BinaryCrossentropy(from_logits=last is None))
    callback, dump = RecorderCallback("run", x_val, (y_val % 2).astype(np.float32)), Dump(x_val)
    model.fit(x, y % 2, epochs=3, verbose=0, callbacks=[callback, dump])
    z = np.array(dump.outputs)[:, :, 0]
    right = (z > (0 if last is None else 0.5)) == y_val % 2
    np.testing.assert_array_equal(callback.run.history.correct(), right)
    p = z if last == "sigmoid" else 1 / (1 + np.exp(-z))
    found = np.array(list(probabilities(callback.run, model, x_val)))
    np.testing.assert_allclose(found, np.stack([1 - p, p], axis=-1), atol=1e-6)


@pytest.mark.parametrize("shape", ["column", "one-hot", "float"])
def test_labels_as_keras_takes_them(shape):
    _, (x_val, y_val), _ = make_data()
    y = {"column": y_val[:, None].astype(np.uint8), "one-hot": np.eye(4)[y_val], "float": y_val.astype(np.float32)}
    np.testing.assert_array_equal(RecorderCallback("run", x_val, y[shape]).labels, y_val)


def test_models_and_arguments_that_are_refused():
    (x, y), (x_val, y_val), _ = make_data()

    def refused(error, match, model, **options):
        with pytest.raises(error, match=match):
            fit(model, [RecorderCallback("refused", x_val, y_val, **options)])

    refused(ValueError, "sum to 1.*from_logits=True", make_model("sigmoid"))
    refused(ValueError, "from_logits=True", make_model(None, loss="sparse_categorical_crossentropy"))
    refused(ValueError, "from_logits: the model gives probabilities", make_model(), from_logits=True)
    with pytest.raises(ValueError, match="y_val: expected 120 labels"):
        fit(make_model(), [RecorderCallback("refused", x_val, y_val[:-1])])
    inputs = keras.Input((6,))
    two = keras.Model(inputs, [keras.layers.Dense(4)(inputs), keras.layers.Dense(4)(inputs)])
    two.compile("sgd", "mse")
    with pytest.raises(TypeError, match="expected one output, got 2"):
        two.fit(x, [np.eye(4)[y]] * 2, verbose=0, callbacks=[RecorderCallback("refused", x_val, y_val)])
    for labels in (y_val + 0.5, np.ones((120, 4)), "abc"):
        with pytest.raises((TypeError, ValueError), match="y_val"):
            RecorderCallback("refused", x_val, labels)
    with pytest.raises(ValueError, match="keep"):
        RecorderCallback("refused", x_val, y_val, keep="some")
    with pytest.raises(TypeError, match="run: expected a Run"):
        probabilities("refused", make_model(), x_val)
    recorder = fmn.Recorder("torch")
    recorder.record(0, y_val, y_val)
    with pytest.raises(ValueError, match="not recorded with Keras"):
        probabilities(recorder.run, make_model(), x_val)
    with pytest.raises(ValueError, match=r"torch: holds a run whose checkpoints end in"):
        RecorderCallback("torch", x_val, y_val)


def test_a_budget_of_checkpoints():
    _, (x_val, y_val), _ = make_data()
    model, callback = make_model(), RecorderCallback("run", x_val, y_val, keep="budget:2")
    fit(model, [callback])
    assert model.history.history["peak_forget_fraction"][-1] == callback.recorder.peak_forget_fraction
    names = sorted(path.name for path in Path("run", "checkpoints").iterdir())
    assert len(names) == 3
    assert names[-1] == "epoch_00005.weights.h5"
    kept = callback.run.kept
    plan = fmn.fuse(probabilities(kept, model, x_val), y_val, correct=kept.history)
    assert plan.n_epochs == 3
    assert len(probabilities(kept, model, x_val)[1:]) == 2
    with pytest.raises(FileNotFoundError, match=r"run\.kept"):
        list(probabilities(callback.run, model, x_val))


def test_checkpoints_that_are_damaged_or_of_another_model():
    _, (x_val, y_val), _ = make_data()
    model, callback = make_model(), RecorderCallback("run", x_val, y_val)
    fit(model, [callback], epochs=2)
    first, last = callback.run.checkpoints
    with pytest.raises(ValueError, match=r"epoch_00001\.weights\.h5: damaged, or does not fit"):
        callback.restore(make_model(n_outputs=5))
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"epoch_00001\.weights\.h5: damaged"):
        callback.restore(model)
    weights = model.get_weights()
    with pytest.raises(ValueError, match=r"epoch_00001\.weights\.h5: damaged"):
        probabilities(callback.run, model, x_val)[1]
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    last.unlink()
    with pytest.raises(FileNotFoundError, match="BackupAndRestore"):
        callback.restore(model)
    last.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="compile"):
        callback.restore(keras.Sequential([keras.layers.Dense(4)]))


def test_a_write_that_fails_leaves_everything_before(monkeypatch):
    _, (x_val, y_val), _ = make_data()
    model, callback = make_model(), RecorderCallback("run", x_val, y_val)
    fit(model, [callback], epochs=2)
    before = Path("run", "history.fmnh").read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        fit(model, [callback], epochs=3, initial_epoch=2)
    assert Path("run", "history.fmnh").read_bytes() == before
    assert sorted(os.listdir("run/checkpoints")) == ["epoch_00000.weights.h5", "epoch_00001.weights.h5"]


def test_epochs_that_do_not_follow():
    _, (x_val, y_val), _ = make_data()
    model, callback = make_model(), RecorderCallback("run", x_val, y_val)
    fit(model, [callback], epochs=1)
    with pytest.raises(ValueError, match="has epochs up to 0, and training begins with 0"):
        fit(model, [callback], epochs=1)  # one fit per epoch, without initial_epoch: nothing is lost
    fit(model, [callback], epochs=3, initial_epoch=callback.restore(model))
    with pytest.raises(ValueError, match="has epochs up to 2, and training begins with 0"):
        fit(model, [RecorderCallback("run", x_val, y_val)])
    with pytest.raises(ValueError, match="ends with epoch 2, training begins with 5"):
        fit(make_model(), [RecorderCallback("run", x_val, y_val)], initial_epoch=5)
    assert len(fmn.Run.open("run").history) == 3
    callback.recorder.rewind(0)
    fit(model, [callback], epochs=1)
    assert callback.run.history.epochs == (0,)


def test_a_callback_for_each_epoch_of_a_loop():
    _, (x_val, y_val), _ = make_data()
    model = make_model()
    fit(model, [RecorderCallback("run", x_val, y_val)], epochs=1)
    with pytest.raises(ValueError, match="has epochs up to 0, and training begins with 0"):
        fit(model, [RecorderCallback("run", x_val, y_val)], epochs=1)
    for epoch in (1, 2):
        fit(model, [RecorderCallback("run", x_val, y_val)], initial_epoch=epoch, epochs=epoch + 1)
    assert fmn.Run.open("run").history.epochs == (0, 1, 2)
    fit(make_model(), [callback := RecorderCallback("other", x_val, y_val)], epochs=1)
    warm = make_model()
    fit(warm, [], epochs=1)
    fit(warm, [callback := RecorderCallback("other", x_val, y_val)], epochs=1)  # as after an early kill
    assert callback.run.history.epochs == (0,)


class Intruder(keras.callbacks.Callback):
    """Another process records while the training goes on."""

    def __init__(self, labels):
        super().__init__()
        self.labels = labels

    def on_epoch_end(self, epoch, logs=None):
        self.outcome = record_in_another_process("run", 9, self.labels, ".weights.h5")


def test_another_process_records_after_the_training():
    """The folder is locked while it goes on, again in a second `fit`, and free after each."""
    _, (x_val, y_val), _ = make_data()
    model, callback = make_model(), RecorderCallback("run", x_val, y_val)
    for epoch in (0, 1):
        fit(model, [callback, intruder := Intruder(y_val)], initial_epoch=epoch, epochs=epoch + 1)
        assert re.search(r"run_dir: process \d+ on .* writes in", intruder.outcome)
    assert record_in_another_process("run", 9, y_val, ".weights.h5") == ""
    with pytest.raises(ValueError, match="changed since it was opened here"):
        fit(model, [callback], initial_epoch=2, epochs=3)
    with pytest.raises(ValueError, match="changed since it was opened here"):
        callback.recorder.rewind(1)
    callback = RecorderCallback("run", x_val, y_val)
    assert callback.recorder.rewind(2) == [9]
    fit(make_model(), [callback], initial_epoch=callback.restore(model), epochs=3)
    assert fmn.Run.open("run").history.epochs == (0, 1, 2)


class Loader(keras.utils.PyDataset):
    """Batches of 40 with their labels; shuffled at the end of each pass, as many do."""

    def __init__(self, x, y, shuffle):
        super().__init__()
        self.x, self.y, self.shuffle = x, y, shuffle
        self.order = np.arange(len(x))

    def __len__(self):
        return len(self.x) // 40

    def __getitem__(self, i):
        rows = self.order[40 * i : 40 * i + 40]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self):
        if self.shuffle:
            np.random.default_rng(0).shuffle(self.order)


def test_loaders():
    _, (x_val, y_val), _ = make_data()
    histories = []
    for data in (x_val, Loader(x_val, y_val, False)):
        keras.utils.set_random_seed(1)
        callback = RecorderCallback(f"run{len(histories)}", data, y_val)
        fit(make_model(), [callback], epochs=2)
        histories.append(callback.run.history.correct())
    np.testing.assert_array_equal(*histories)
    with pytest.raises(ValueError, match="x_val: gave other predictions, or another order, the second time"):
        fit(make_model(), [RecorderCallback("run", Loader(x_val, y_val, True), y_val)])
    torch = pytest.importorskip("torch")
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(x_val)), 40, shuffle=True)
    with pytest.raises(ValueError, match="x_val: gave other predictions, or another order, the second time"):
        fit(make_model(), [RecorderCallback("run", shuffled, y_val)])


def test_the_training_does_not_notice():
    """Nothing is drawn from random numbers that the training draws from."""
    _, (x_val, y_val), _ = make_data()
    found = []
    for callbacks in ([], [RecorderCallback("run", x_val, y_val)]):
        keras.utils.set_random_seed(1)
        model = make_model()
        fit(model, callbacks, epochs=3)
        found.append(state_of(model))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


class Stop(keras.callbacks.Callback):
    """Ends training before the callbacks after it see the end of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("order", [1, -1], ids=["recorder first", "backup first"])
def test_backup_and_restore(order):
    """Interrupted between the two callbacks, so that one is an epoch ahead of the other."""
    _, (x_val, y_val), _ = make_data()

    def callbacks(folder, *between):
        recorder = RecorderCallback(f"{folder}/run", x_val, y_val, seed=0)
        backup = keras.callbacks.BackupAndRestore(f"{folder}/backup", delete_checkpoint=False)
        return [(first := [recorder, backup][::order])[0], *between, first[1]]

    keras.utils.set_random_seed(5)
    fit(make_model(), callbacks("unbroken"))
    for stop in (0, 3):
        keras.utils.set_random_seed(5)
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(), callbacks("broken", Stop(stop)))
    keras.utils.set_random_seed(5)
    fit(make_model(), callbacks("broken"))
    assert Path("broken/run/history.fmnh").read_bytes() == Path("unbroken/run/history.fmnh").read_bytes()


def test_a_backup_of_the_last_batch_of_an_epoch():
    """It holds epoch 0 as not done, and the history has it."""
    _, (x_val, y_val), _ = make_data()

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations) == 10:
                raise KeyboardInterrupt

    def callbacks():
        backup = keras.callbacks.BackupAndRestore("backup", save_freq=8, delete_checkpoint=False)  # of 8 batches
        return [backup, RecorderCallback("run", x_val, y_val)]

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), [*callbacks(), Interrupt()])
    assert fmn.Run.open("run").history.epochs == (0,)
    fit(make_model(), callbacks())
    assert fmn.Run.open("run").history.epochs == tuple(range(EPOCHS))


def test_a_model_that_learns_its_shape_from_data():
    (x, y), (x_val, y_val), _ = make_data()

    def unbuilt():
        model = keras.Sequential([keras.layers.Dense(8, "relu"), keras.layers.Dense(4)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    callback = RecorderCallback("run", x_val, y_val)
    first, second = unbuilt(), unbuilt()
    first.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    assert callback.restore(second) == 2
    for a, b in zip(first.optimizer.variables, second.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b))
    run = fmn.Run.open("run")
    found = probabilities(run, unbuilt(), x_val)[1]
    np.testing.assert_allclose(found, softmax(first.predict(x_val, verbose=0), np.float32), atol=1e-6)
    uncompiled = keras.Sequential([keras.layers.Dense(8, "relu"), keras.layers.Dense(4)])
    with pytest.raises(ValueError, match="from_logits=True"):
        probabilities(run, uncompiled, x_val)[1]
    np.testing.assert_array_equal(probabilities(run, uncompiled, x_val, from_logits=True)[1], found)


def test_the_end_of_checkpoint_names():
    """`suffix` of Recorder, which run.json keeps."""
    recorder = fmn.Recorder("run", save=lambda path: path.write_bytes(b""), suffix=".weights.h5")
    recorder.record(0, [0, 1], [0, 1])
    assert [path.name for path in fmn.Run.open("run").checkpoints] == ["epoch_00000.weights.h5"]
    with pytest.raises(ValueError, match=r"run: holds a run whose checkpoints end in '\.weights\.h5', not '\.pt'"):
        fmn.Recorder("run")
    with pytest.raises(ValueError, match=r"suffix: '\.h5' needs `save`"):
        fmn.Recorder("other", suffix=".h5")
    for suffix in ("h5", "./x", "/../../x", ".h5\n", 5):
        with pytest.raises(ValueError, match="suffix: expected the end of a file's name"):
            fmn.Recorder("other", save=print, suffix=suffix)
    path = Path("run", "run.json")
    path.write_text(path.read_text().replace(".weights.h5", "/../../x"))
    with pytest.raises(ValueError, match=r"run\.json: checkpoint_suffix"):
        fmn.Run.open("run")


@pytest.mark.parametrize("missing", ["keras", "backend"])
def test_what_is_said_when_something_is_missing(missing):
    if missing == "backend" and importlib.util.find_spec("tensorflow"):
        pytest.skip("tensorflow is installed")
    code = "import sys; sys.modules['keras'] = None; " if missing == "keras" else ""
    code += "import fmn_ref.integrations.keras"
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    expected = 'pip install "fmn_ref[keras]"' if missing == "keras" else "set KERAS_BACKEND to one that is installed"
    assert expected in process.stderr


FIRST, FUSING, _, BACKUP = blocks(DOCS.read_text())


@pytest.mark.parametrize("block", [FIRST + FUSING, BACKUP])
def test_the_guide(block, capsys):
    """Twice: the second time resumes, or says that the run is complete."""
    (x, y), (x_val, y_val), (x_test, _) = make_data()
    assert n_lines(FIRST) <= 10
    names = {"x": x, "y": y, "x_val": x_val, "y_val": y_val, "x_test": x_test, "model": make_model()}
    exec(block, names)
    assert len(names["callback"].run.history) == 5
    if "fused" in names:
        assert names["fused"].shape == (120, 4)
        again = {**names, "model": make_model()}
        exec(block, again)
        np.testing.assert_allclose(again["fused"], names["fused"], atol=1e-6)
    else:
        with pytest.raises(ValueError, match="has epochs up to 4"):
            exec(block, names)
    capsys.readouterr()


def trained(*arguments):
    """This file as a script; its exit status."""
    process = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=600)
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    return process.returncode


def test_killed_and_resumed():
    """Shuffling, dropout and Adam's state too: the same bits as without the kills."""
    assert trained("unbroken") == 0
    for moment, epoch in (("half of the weights", "1"), ("before the history", "3")):
        assert trained("killed", moment, epoch) == -signal.SIGKILL
    assert trained("killed") == 0
    for name in ("history.fmnh", "weights.npy"):
        assert Path("killed", name).read_bytes() == Path("unbroken", name).read_bytes()
    assert sorted(os.listdir("killed/checkpoints")) == sorted(os.listdir("unbroken/checkpoints"))
    assert len(fmn.Run.open("killed").history) == EPOCHS


def training(folder, moment=None, kill_epoch=-1):
    _, (x_val, y_val), _ = make_data()
    keras.utils.set_random_seed(3)
    model, callback = make_model(), RecorderCallback(folder, x_val, y_val, seed=0)

    def die(epoch, logs=None):
        if epoch == kill_epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if self.epoch == kill_epoch and moment == "half of the weights":
                os.replace = half
            if self.epoch == kill_epoch and moment == "before the history":
                fmn.CorrectnessHistory.append = lambda history, correct, epoch: die(epoch)

    def half(source, target):
        content = Path(source).read_bytes()
        Path(source).write_bytes(content[: len(content) // 2])
        die(kill_epoch)

    fit(model, [Kill(), callback], initial_epoch=callback.restore(model))
    np.save(Path(folder, "weights.npy"), np.concatenate([w.ravel() for w in model.get_weights()]))


@pytest.mark.skipif(BACKEND != "torch", reason="started from there")
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_other_backends(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    tests = "dumped or two_classes or killed or backup or damaged or loaders or notice"  # of those that compute
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, __file__]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    process = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=1200
    )
    assert process.returncode == 0, process.stdout + process.stderr


SAVES = """
import pathlib, sys, h5py
from fmn_ref import _files
with _files.replacing(pathlib.Path(sys.argv[1]) / "a.weights.h5") as temporary, h5py.File(temporary, "w") as file:
    file["w"] = list(range(10_000))
"""


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace, which sees every write")
def test_what_hdf5_writes_survives_a_power_loss(tmp_path):
    states = states_after(SAVES, tmp_path, 20)
    assert {state["a.weights.h5"] for state in states} == {(tmp_path / "root" / "a.weights.h5").read_bytes()}


if __name__ == "__main__":
    training(*sys.argv[1:3], *map(int, sys.argv[3:]))
