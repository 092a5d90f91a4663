"""What people do wrong, or meet first, when they start from a folder of checkpoints: each says what to do."""

import json

import numpy as np
import pytest
import torch
from networks import make_data, make_model
from safetensors_files import write, write_folder
from torch import nn

import fmn_ref as fmn
from fmn_ref.cli import main
from fmn_ref.training import data

TRAIN, VAL, TEST = make_data()
N_CLASSES = 4


def state(epoch):
    torch.manual_seed(epoch)
    return make_model().state_dict()


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints, of epochs 1 to 3."""
    (tmp_path / "old").mkdir()
    for epoch in (1, 2, 3):
        torch.save(state(epoch), tmp_path / "old" / f"epoch_{epoch}.pt")
    return tmp_path / "old"


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """The command that imports the folder, whose model and data lie in a module beside it."""
    lines = ["from networks import make_data, make_model", "def val():\n    return make_data()[1]"]
    lines += ["def needs(n):\n    return n", "def from_one():\n    return val()[0], val()[1] + 1"]
    (tmp_path / "mistakes.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return ["import", "checkpoints", "old", "--model", "mistakes:make_model", "-o", "run"]


def same(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# --- what a run gives ---


def test_the_runs_model_has_the_latest_weights(folder, tmp_path):
    mine = make_model()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    for _ in range(2):  # made, and made before
        run = fmn.from_checkpoints(folder, mine, VAL, tmp_path / "run")
        assert same(run.model, state(3))
        assert np.array_equal(fmn.correctness(run.model(VAL[0]).detach(), VAL[1]), run.history[-1])
    assert same(mine, before)
    torch.save(state(4), folder / "epoch_4.pt")
    assert same(fmn.from_checkpoints(folder, mine, VAL, tmp_path / "run").model, state(4))


def test_a_plan_from_the_command_line_names_epochs(command, tmp_path, capsys):
    assert main([*command, "--data", "mistakes:val"]) == 0
    predict = ["predict", "run", "--model", "mistakes:make_model", "--data", "mistakes:val", "-o"]
    assert main([*predict, "select.npz"]) == 0
    assert main(["fuse", "select.npz", "--method", "equal", "--max-forward-passes", "3"]) == 0
    assert " epoch  weight" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["epochs"] == [1, 2, 3]
    assert fmn.FusionPlan.load("plan.json").epochs == (1, 2, 3)
    assert main(["metric", "select.npz", "--csv"]) == 0
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "epochs", [[1, 2], [3, 2, 1], [-1, 0, 1], [0.5, 1, 2], 3, [1, 1, 2], [0, 1, 2**62], [[0], [1], [2]]]
)
def test_epochs_that_cannot_be_are_refused(tmp_path, monkeypatch, capsys, epochs):
    monkeypatch.chdir(tmp_path)
    np.savez("p.npz", probs=np.full((3, 4, 2), 0.5), labels=np.array([0, 1, 0, 1]), epochs=np.array(epochs))
    assert main(["fuse", "p.npz", "--folds", "0"]) == 1
    assert "p.npz: epochs: expected 3 ascending integers" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


# --- data that does not fit ---


def test_labels_from_one_are_refused(command, tmp_path, capsys):
    assert main([*command, "--data", "mistakes:from_one"]) == 1
    expected = f"labels: expected classes in [0, {N_CLASSES}), got values from 1 to {N_CLASSES}; do they count from 1?"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--data", "mistakes:val"]) == 0  # the same call with the right data
    with pytest.raises(ValueError, match="do they count from 1"):
        fmn.Run.open("run", make_model()).probabilities((VAL[0], VAL[1] + 1))[0]


@pytest.mark.parametrize("x", [VAL[0].double(), VAL[0][:, :5]])
def test_inputs_that_the_network_refuses_leave_nothing(folder, tmp_path, x):
    with pytest.raises(RuntimeError, match=r"dtype|shape"):
        fmn.from_checkpoints(folder, make_model(), (x, VAL[1]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_predictions_are_kept_of_the_first_checkpoint_too(folder, tmp_path):
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", keep_predictions=True)
    for row, probs in enumerate(run.probabilities(VAL)):
        model = make_model()
        model.load_state_dict(state(row + 1))
        own = model.eval()(VAL[0]).softmax(1).detach().numpy()
        assert np.allclose(probs, own, atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (VAL[1][:, None], r"labels\[:, 0\]"),
        (nn.functional.one_hot(VAL[1], N_CLASSES), r"one-hot\? labels\.argmax\(1\)"),
        (nn.functional.one_hot(VAL[1], N_CLASSES).float(), r"one-hot\? labels\.argmax\(1\)"),
        (torch.zeros(len(VAL[1]), N_CLASSES + 1, dtype=torch.int64), "of tokens"),
    ],
)
def test_labels_in_another_form_say_how_to_convert(folder, tmp_path, labels, words):
    with pytest.raises(TypeError, match=words):
        fmn.from_checkpoints(folder, make_model(), (VAL[0], labels), tmp_path / "run")


def test_lists_of_numbers_are_told_from_batches():
    with pytest.raises(TypeError, match=r"got list and list of numbers; numpy\.array makes arrays"):
        data.predict(nn.Linear(2, 2), ([[0.0, 1.0]], [1]))
    batches = [[torch.zeros(3, 2), torch.tensor([0, 1, 0])]] * 2
    assert len(data.predict(nn.Linear(2, 2), batches)[1]) == 6


def test_data_on_which_every_checkpoint_guesses_is_told(tmp_path, caplog):
    model = nn.Linear(2, 2)
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.tensor([0.0, 3.0])}, tmp_path / "epoch_1.pt")
    x, y = torch.zeros(10, 2), torch.tensor([0] * 8 + [1] * 2)
    fmn.from_checkpoints(tmp_path / "epoch_1.pt", model, (x, y), tmp_path / "guess")
    assert "no checkpoint is right more often (20.0 %) than the most frequent label is (80.0 %)" in caplog.text
    caplog.clear()
    fmn.from_checkpoints(tmp_path / "epoch_1.pt", model, (x, 1 - y), tmp_path / "same")
    assert "no checkpoint is right more often (80.0 %) than the most frequent label is (80.0 %)" in caplog.text
    caplog.clear()
    fmn.from_checkpoints(tmp_path / "epoch_1.pt", model, (x, y * 0 + 1), tmp_path / "one_class")
    assert caplog.text == ""


def test_other_data_is_named_without_digests(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fmn.from_checkpoints("old", make_model(), VAL, "run")
    expected = r"data: the run in run was made with other data \(the digests differ; the order counts\)"
    with pytest.raises(ValueError, match=expected):
        fmn.from_checkpoints("old", make_model(), (VAL[0].flip(0), VAL[1].flip(0)), "run")


# --- files and folders ---


def test_other_shapes_are_told_shortly(folder, tmp_path):
    wide = make_model()
    wide[0], wide[1], wide[4] = nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)
    first_three = (
        r"0\.weight is \(32, 6\), not \(64, 6\), 0\.bias is \(32,\), not \(64,\), 1\.weight is \(32,\), not \(64,\)"
    )
    with pytest.raises(ValueError, match=rf"epoch_1\.pt: does not fit the model: {first_three} and 4 more$"):
        fmn.from_checkpoints(folder, wide, VAL, tmp_path / "run")


def test_folders_of_checkpoints_below_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    folder.rename(tmp_path / "deep" / "old")
    for source in (".", "deep"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoints there; there are some in deep/old$"):
            fmn.from_checkpoints(source, make_model(), VAL, "run")


def test_the_folder_of_one_checkpoint(tmp_path):
    one = tmp_path / "out" / "checkpoint-50"
    one.mkdir(parents=True)
    write(one / "model.safetensors", state(1))
    torch.save({}, one / "optimizer.pt")
    run = fmn.from_checkpoints(one, make_model(), VAL, tmp_path / "run")
    assert run.history.epochs == (50,)


def test_the_folder_of_one_checkpoint_in_shards(tmp_path, caplog):
    one = tmp_path / "step_7"
    write_folder(one, state(1))
    run = fmn.from_checkpoints(one, make_model(), VAL, tmp_path / "run")
    assert run.history.epochs == (7,)
    assert caplog.text == ""
    assert same(run.model, state(1))


def test_a_key_where_the_file_is_the_state_dict(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no state_dict at key 'model'; the file itself is one, which needs no key"):
        fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", key="model")


def test_shards_of_a_pattern_are_no_checkpoints(tmp_path):
    write_folder(tmp_path / "step_7", state(1))
    with pytest.raises(FileNotFoundError, match=r"no checkpoints there; left out: model-00001-of-00002.* \(a shard"):
        fmn.from_checkpoints(str(tmp_path / "step_7" / "*.safetensors"), make_model(), VAL, tmp_path / "run")


def test_shards_beside_the_checkpoints_of_a_trainer_are_left_out(tmp_path):
    for step in (5, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        write(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors", state(step))
    write_folder(tmp_path / "final", state(10))
    for path in (tmp_path / "final").iterdir():
        path.rename(tmp_path / "out" / path.name)  # what save_model leaves in the output folder
    run = fmn.from_checkpoints(tmp_path / "out", make_model(), VAL, tmp_path / "run")
    assert run.history.epochs == (5, 10)


def test_a_reference_that_does_not_fit_names_the_file(folder, tmp_path):
    fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    other = make_model()
    other[4] = nn.Linear(32, 5)
    with pytest.raises(
        ValueError, match=r"old/epoch_1\.pt: does not fit the model: 4\.weight is \(4, 32\), not \(5, 32\)"
    ):
        fmn.Run.open(tmp_path / "run", other).probabilities(VAL)[0]


def test_a_file_for_the_run_dir(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file: a file; expected a folder"):
        fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "file")


# --- calls ---


def test_all_missing_options_are_named_with_the_usage(capsys):
    with pytest.raises(SystemExit) as e:
        main(["import", "checkpoints", "old"])
    assert e.value.code == 2
    printed = capsys.readouterr().err
    assert "usage: fmn-ref import" in printed
    assert "import checkpoints needs --model, --data, --output too" in printed


def test_a_function_with_arguments_is_named(command, capsys):
    assert main([*command, "--data", "mistakes:needs"]) == 1
    assert (
        "--data: mistakes:needs is called without arguments; missing a required argument: 'n'"
        in capsys.readouterr().err
    )


def test_one_checkpoint_is_no_plural(command, capsys):
    assert main([*command[:2], "old/epoch_2.pt", *command[3:], "--data", "mistakes:val"]) == 0
    assert "run: 1 checkpoint, epoch 2, accuracy" in capsys.readouterr().out


def test_no_bar_where_nothing_is_new(folder, tmp_path, capsys):
    for bars in (True, False):
        fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run", progress=True)
        assert ("checkpoints" in capsys.readouterr().err) == bars


def test_student_and_teacher_the_wrong_way_round(folder, tmp_path):
    run = fmn.from_checkpoints(folder, make_model(), VAL, tmp_path / "run")
    fused = fmn.FusedModel(fmn.FusionPlan.from_weights({0: 0.5, 1: 0.5}, 3), run)
    with pytest.raises(ValueError, match=r"student: no parameter requires a gradient; the order is distill\(student"):
        fmn.distill(fused, make_model(), TRAIN, epochs=1)


def test_the_hint_names_every_call_that_takes_a_forward_fn(folder, tmp_path):
    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"from_checkpoints and Run\.open take it; --forward-fn"):
        fmn.from_checkpoints(folder, Pair(*make_model()), VAL, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["metric", "gone.npz"], ["fuse", "gone.npz"], ["apply", "gone.json", "gone.npz"]])
def test_a_file_that_is_not_there_is_named_as_given(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    assert capsys.readouterr().err == f"fmn-ref: error: {command[1]}: no such file or directory\n"
