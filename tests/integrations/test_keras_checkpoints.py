"""A run of the checkpoints that Keras wrote itself, on torch in this process, on jax in a process of its own."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
h5py = pytest.importorskip("h5py")

from inputs import softmax  # noqa: E402
from keras_models import Dump, fit, make_data, make_model, state_of  # noqa: E402
from pages import blocks  # noqa: E402

import fmn_ref as fmn  # noqa: E402
from fmn_ref.cli import main  # noqa: E402
from fmn_ref.integrations.keras import RecorderCallback, from_checkpoints, probabilities  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
BACKEND = keras.backend.backend()
DOCS = Path(__file__).parents[2] / "docs" / "integrations" / "keras.md"
_, (X, Y), _ = make_data()
NAMES = {"weights": "{epoch:02d}-{loss:.3f}.weights.h5", "keras": "model_{epoch}.keras", "h5": "epoch{epoch}.h5"}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(1)


def trained(kind, epochs=12, folder="out", last="softmax"):
    """Train with ModelCheckpoint; return what each epoch predicts, written down by hand."""
    saver = keras.callbacks.ModelCheckpoint(f"{folder}/{NAMES[kind]}", save_weights_only=kind == "weights")
    dump = Dump(X)
    fit(make_model(last), [saver, dump], epochs=epochs)
    return np.array(dump.outputs)


def imported(model=None, source="out", x=X, y=Y, run_dir="run", **options):
    return from_checkpoints(source, model or make_model(), x, y, run_dir, **options)


@pytest.mark.parametrize("kind", NAMES)
def test_the_run_is_that_of_the_predictions_of_each_epoch(kind):
    """Also the order: 1, 2, ..., 10, 11, 12. The folder and the model stay as they are."""
    outputs, files = trained(kind), sorted(os.listdir("out"))
    model = make_model()
    before = [*state_of(model), *(np.array(v) for v in model.variables)]
    run = imported(model)
    assert run.history.epochs == tuple(range(1, 13))
    np.testing.assert_array_equal(run.history.correct(), outputs.argmax(2) == Y)
    assert fmn.forget_fraction(run.history).max() > 0
    opened = fmn.Run.open("run")
    probs = probabilities(opened, model, X)
    np.testing.assert_allclose(np.array(list(probs)), outputs, atol=1e-6)
    after = [*state_of(model), *(np.array(v) for v in model.variables)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    plan = fmn.fuse(probs, Y, correct=run.history, method="equal")
    assert plan.members == fmn.fuse(outputs, Y, method="equal").members
    last = next(name for name in files if re.match(r"\D*12\D", name))
    assert str(plan).splitlines()[-2].split()[::2] == ["12", f"out/{last}"]
    assert sorted(os.listdir("out")) == files
    names = [f"epoch_{epoch:05d}.ref.json" for epoch in range(1, 13)]
    assert sorted(os.listdir("run/checkpoints")) == names
    assert json.loads(Path("run/checkpoints", names[0]).read_text())["path"] == str(Path("out").resolve() / files[0])


def test_weights_of_a_loop_of_ones_own_over_logits():
    model, outputs = make_model(None), []
    for i in (0, 1, 2):
        fit(model, [], epochs=1)
        outputs.append(model.predict(X, verbose=0))
        os.makedirs("out", exist_ok=True)
        model.save_weights(f"out/step{100 * i}.weights.h5")
    run = imported(make_model(None))
    assert run.history.epochs == (0, 100, 200)
    expected = [softmax(z, np.float32) for z in outputs]
    np.testing.assert_allclose(np.array(list(probabilities(run, make_model(None), X))), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"from_logits=True \(with the weights of .*step0\.weights\.h5\)"):
        imported(make_model(None), run_dir="other", from_logits=False)


def test_two_classes_by_one_output_and_labels_in_a_column_over_a_pattern():
    model = make_model("sigmoid", 1, "binary_crossentropy")
    (x, y), _, _ = make_data()
    os.mkdir("out")
    for i in (1, 2):
        model.fit(x, y % 2, epochs=1, verbose=0)
        model.save(f"out/model_{i}.keras")
        model.save(f"out/other_{i}.keras")
    with pytest.raises(ValueError, match=r"both claim|two schemes"):
        imported(model)
    run = imported(model, "out/model_*.keras", y=(Y % 2)[:, None])
    z = model.predict(X, verbose=0)[:, 0]
    np.testing.assert_array_equal(run.history[-1], (z > 0.5) == Y % 2)


class Counting(keras.Sequential):
    """Counts its predictions, and may be interrupted in one."""

    calls, last = 0, np.inf

    def predict(self, *args, **options):
        self.calls += 1
        if self.calls > self.last:
            raise KeyboardInterrupt
        return super().predict(*args, **options)


def counting():
    return Counting([keras.layers.Input((6,)), *make_model().layers])


def test_interrupted_and_called_again_it_goes_on_with_what_is_left_over():
    outputs = trained("keras", 6)
    model = counting()
    model.last = 4  # the first one twice, to see that it fits
    with pytest.raises(KeyboardInterrupt):
        imported(model)
    assert fmn.Run.open("run").history.epochs == (1, 2, 3)
    os.rename("out/model_6.keras", "model_6.keras")
    again = counting()
    assert imported(again).history.epochs == (1, 2, 3, 4, 5)
    assert again.calls == 3  # the third one again, to see that nothing has changed
    os.rename("model_6.keras", "out/model_6.keras")
    run = imported()
    np.testing.assert_array_equal(run.history.correct(), outputs.argmax(2) == Y)
    os.rename("out/model_1.keras", "out/model_0.keras")
    with pytest.raises(ValueError, match=r"model_0\.keras, which comes before epoch 6"):
        imported()


@pytest.mark.parametrize("kind", NAMES)
def test_a_changed_file_is_noticed_and_one_that_moved_is_followed(kind):
    trained(kind, 3)
    run = imported()
    os.rename("out", "moved")
    with pytest.raises(FileNotFoundError, match=r"out/.*: no such checkpoint"):
        probabilities(run, make_model(), X)[1]
    run = imported(source="moved")
    assert probabilities(run, make_model(), X)[1].shape == (120, 4)
    second = next(path for path in Path("moved").iterdir() if "2" in path.name.partition("-")[0])
    os.utime(second, (0, 0))
    with pytest.raises(ValueError, match=re.escape(second.name) + ": changed since it was recorded"):
        probabilities(run, make_model(), X)[1]
    with pytest.raises(ValueError, match=re.escape(second.name) + ": changed since it was recorded"):
        imported(source="moved")


def test_other_data_is_refused():
    trained("weights", 3)
    imported()
    other = make_data(7)[1]
    for x, y in (other, (X, np.roll(Y, 1)), (X[:100], Y[:100])):
        with pytest.raises(ValueError, match=r"run holds a run of other checkpoints than .*, or of other data"):
            imported(x=x, y=y)
    with pytest.raises(ValueError, match="y: expected 120 labels, as x has samples, got 119"):
        imported(y=Y[:-1], run_dir="other")
    with pytest.raises(ValueError, match="y: expected classes, or rows"):
        imported(y=np.ones((120, 4)), run_dir="other")
    assert not Path("other").exists()


def test_a_run_of_a_callback_is_no_such_run():
    trained("weights", 2)
    fit(make_model(), [RecorderCallback("recorded", X, Y)], epochs=2)
    with pytest.raises(ValueError, match=r"recorded: holds a run whose checkpoints end in"):
        imported(run_dir="recorded")
    run = imported(source="recorded/checkpoints")
    np.testing.assert_array_equal(run.history.correct(), fmn.Run.open("recorded").history.correct())
    with pytest.raises(ValueError, match="run_dir: out is the folder of the checkpoints"):
        imported(run_dir="out")


def deeper():
    layers = keras.layers
    hidden = [layers.Dense(8), layers.Dense(8)]
    return keras.Sequential([layers.Input((6,)), *hidden, layers.Dense(8, "softmax"), layers.Dense(8, "softmax")])


def shallower():
    layers = keras.layers
    return keras.Sequential([layers.Input((6,)), layers.Dense(8), layers.Dense(8), layers.Dense(8, "softmax")])


@pytest.mark.parametrize("ending", [".weights.h5", ".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")
def test_weights_of_another_network_are_refused(ending):
    """Keras itself loads a deeper network's weights into a shallower one, without a word."""
    for name, model in (("deep", deeper()), ("shallow", shallower())):
        os.mkdir(name)
        (model.save_weights if ending == ".weights.h5" else model.save)(f"{name}/epoch_1{ending}")
    with pytest.raises(ValueError, match=rf"epoch_1\{ending}: .*it holds 272 numbers, and the model 200.*left over"):
        imported(shallower(), "deep")
    with pytest.raises(ValueError, match=rf"epoch_1\{ending}: .*it holds 200 numbers, and the model 272.*missing"):
        imported(deeper(), "shallow")
    with pytest.raises(ValueError, match=rf"epoch_1\{ending}: does not fit the model"):
        imported(make_model(), "deep")
    assert not Path("run").exists()
    imported(shallower(), "shallow")
    with pytest.raises(ValueError, match=r"epoch_1.*does not fit the model"):
        probabilities(fmn.Run.open("run"), deeper(), X)[0]


def leads_elsewhere(how):
    """A file whose first array is in another file, or under another name."""
    with h5py.File("out/01.weights.h5", "r+") as file, h5py.File("secret.h5", "w") as secret:
        name = "layers/dense/vars/0"
        shape = file[name].shape
        secret["x"] = np.ones(shape, np.float32)
        del file[name]
        if how == "external link":
            file[name] = h5py.ExternalLink("secret.h5", "x")
        elif how == "soft link":
            file[name] = h5py.SoftLink("/layers/dense_1/vars/0")
        elif how == "external data":
            Path("raw").write_bytes(np.ones(shape, np.float32).tobytes())
            file.create_dataset(name, shape, np.float32, external=[("raw", 0, h5py.h5f.UNLIMITED)])
        else:
            layout = h5py.VirtualLayout(shape, np.float32)
            layout[:] = h5py.VirtualSource("secret.h5", "x", shape)
            file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("how", ["external link", "soft link", "external data", "virtual data"])
def test_nothing_outside_the_file_is_read(how):
    os.mkdir("out")
    make_model().save_weights("out/01.weights.h5")
    leads_elsewhere(how)
    with pytest.raises(ValueError, match=r"01\.weights\.h5: damaged.*layers/dense/vars/0 in it leads elsewhere"):
        imported()
    assert not Path("run").exists()


def test_a_shape_that_memory_could_not_hold_is_refused():
    os.mkdir("out")
    make_model().save_weights("out/01.weights.h5")
    with h5py.File("out/01.weights.h5", "r+") as file:
        del file["layers/dense/vars/0"]
        file.create_dataset("layers/dense/vars/0", (1 << 22, 1 << 22), np.float32, chunks=(1 << 10, 1 << 10))
    with pytest.raises(ValueError, match=r"01\.weights\.h5: does not fit the model: it holds 17592186044\d+ numbers"):
        imported()


def rewritten(change):
    """An archive of Keras whose members `change` has changed."""
    os.mkdir("out")
    make_model().save("model.keras")
    with zipfile.ZipFile("model.keras") as archive:
        members = [(info.filename, archive.read(info), zipfile.ZIP_STORED) for info in archive.infolist()]
    with zipfile.ZipFile("out/model_1.keras", "w") as archive:
        for name, content, method in change(members):
            archive.writestr(name, content, method)


def test_the_configuration_in_an_archive_is_not_read():
    """It could hold code: a Lambda layer, or a class of any module."""
    rewritten(lambda members: [(n, b"{" if n.endswith(".json") else c, m) for n, c, m in members])
    assert imported().history.epochs == (1,)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "change",
    [
        lambda members: [m for m in members if not m[0].endswith("h5")],
        lambda members: [*members, members[-1]],
        lambda members: [(name, content, zipfile.ZIP_DEFLATED) for name, content, _ in members],
        lambda members: [(f"../../{name}", content, method) for name, content, method in members],
    ],
    ids=["no weights", "weights twice", "compressed", "names that lead elsewhere"],
)
def test_archives_of_another_form_are_refused(change):
    rewritten(change)
    with pytest.raises(ValueError, match=r"model_1\.keras: not a \.keras file: expected model\.weights\.h5 in it"):
        imported()
    assert sorted(os.listdir()) == ["model.keras", "out"]


@pytest.mark.parametrize("kind", NAMES)
def test_damaged_files_are_named_or_left_out(kind, caplog):
    trained(kind, 3)
    first, second, third = sorted(Path("out").iterdir())
    second.write_bytes(second.read_bytes()[:-3000])
    assert imported().history.epochs == (1, 3)
    assert f"left out: {second.name} (half-written)" in caplog.text
    third.write_bytes(third.read_bytes().replace(b"dense", b"\xff" * 5))
    with pytest.raises(ValueError, match=re.escape(third.name)):
        imported(source=[third], run_dir="other")
    first.write_bytes(b"\x89HDF\r\n\x1a\nno such thing")
    with pytest.raises(ValueError, match=re.escape(first.name)):
        imported(source=[first], run_dir="other")
    os.mkfifo("epoch_1.weights.h5")
    with pytest.raises(ValueError, match=r"epoch_1\.weights\.h5: .*expected a regular file"):
        imported(source=["epoch_1.weights.h5"], run_dir="other")
    assert not Path("other").exists()


def test_copies_and_links_are_left_out(caplog):
    trained("keras", 2)
    model = make_model()
    model.save("out/best.keras")
    model.save("out/last.keras")
    os.symlink("model_2.keras", "out/model_9.keras")
    assert imported().history.epochs == (1, 2)
    left_out = ["best.keras (a copy, by its name)", "last.keras (a copy, by its name)", "model_9.keras (a link)"]
    assert f"left out: {', '.join(left_out)}" in caplog.text
    with pytest.raises(FileNotFoundError, match="no checkpoints there"):
        imported(source="run")
    model.save("single.keras")
    with pytest.raises(ValueError, match="no epoch or step"):
        imported(source="single.keras", run_dir="other")


class Loader(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[40 * i : 40 * i + 40], Y[40 * i : 40 * i + 40]


def test_loaders_and_models_without_a_shape_yet_over_a_list_of_files():
    outputs = trained("weights", 2)
    layers = keras.layers
    hidden = [layers.Dense(32, "relu"), layers.BatchNormalization(), layers.Dropout(0.2)]
    unbuilt = keras.Sequential([*hidden, layers.Dense(4, "softmax")])
    run = imported(unbuilt, sorted(Path("out").iterdir()), x=Loader())
    np.testing.assert_array_equal(run.history.correct(), outputs.argmax(2) == Y)


def test_the_door_of_torch_points_here():
    torch = pytest.importorskip("torch")
    trained("weights", 2)
    make_model().save("model_1.keras")
    network, words = torch.nn.Linear(6, 4), r"from_checkpoints and probabilities of fmn_ref\.integrations\.keras"
    for source in ("out", ".", sorted(Path("out").iterdir()), "out/*.h5", ["model_1.keras"]):
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            fmn.from_checkpoints(source, network, (X, Y), "torch")
    run = imported()
    run.model = network
    with pytest.raises(ValueError, match=words):
        run.probabilities((torch.tensor(X), torch.tensor(Y)))[0]
    recorded = fmn.Recorder("recorded", network)
    recorded.record(0, Y, Y)
    with pytest.raises(ValueError, match="not recorded with Keras"):
        probabilities(recorded.run, make_model(), X)
    with pytest.raises(TypeError, match=r"model: expected a keras\.Model, got Linear"):
        imported(network)


def test_the_command_line(monkeypatch, capsys):
    outputs = trained("keras", 3)
    monkeypatch.syspath_prepend(".")
    Path("mine.py").write_text(f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1] / "helpers")]}
from keras_models import make_data, make_model
data = lambda: make_data()[1]
loader = lambda: iter([])
""")
    command = ["import", "checkpoints", "out", "--model", "mine:make_model", "-o", "run"]
    assert main([*command, "--data", "mine:data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epochs"] == [1, 2, 3]
    np.testing.assert_array_equal(fmn.Run.open("run").history.correct(), outputs.argmax(2) == Y)
    assert main([*command, "--data", "mine:loader"]) == 1
    assert "--data: expected (inputs, labels) for a model of Keras" in capsys.readouterr().err
    for option in (["--key", "a"], ["--copy"], ["--keep-predictions"], ["--forward-fn", "mine:data"]):
        assert main([*command, "--data", "mine:data", *option]) == 1
        assert f"{option[0]}: not for a model of Keras" in capsys.readouterr().err


def test_the_guide(capsys):
    trained("keras", 5)
    names = {"model": make_model(), "x_val": X, "y_val": Y}
    exec(next(code for code in blocks(DOCS.read_text()) if "from_checkpoints" in code), names)
    assert len(names["run"].history) == 5
    assert "out/model_5.keras" in capsys.readouterr().out


@pytest.mark.skipif(BACKEND != "torch", reason="started from there")
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_other_backends(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "over or each_epoch", __file__]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    process = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=1200
    )
    assert process.returncode == 0, process.stdout + process.stderr
