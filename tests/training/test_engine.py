"""The engine under train and distill: damaged files, the writer, memory formats, compilation, ways to distil."""

import errno
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from networks import RECIPE, make_data, make_model
from torch import nn

import fmn_ref as fmn
from fmn_ref.runs import checkpoints
from fmn_ref.training import soft_targets, store
from fmn_ref.training.store import Writer

TRAIN, VAL, TEST = make_data()


def fresh(seed=0):
    torch.manual_seed(seed)
    return make_model()


def trained(folder, epochs=6, **options):
    return fmn.train(fresh(), TRAIN, VAL, epochs=epochs, run_dir=folder, **RECIPE | options)


def same(a, b):
    states = [m if isinstance(m, dict) else m.state_dict() for m in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*(s.values() for s in states), strict=True))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("unbroken"))


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run of six epochs that ended while the fifth was written."""
    real = checkpoints.save

    def save(content, path):
        if path.name == "epoch_00004.pt":
            raise KeyboardInterrupt
        real(content, path)

    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path)
    monkeypatch.undo()
    return tmp_path


class Code:
    def __reduce__(self):
        return os.abort, ()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "bit-flipped": flip,
    "missing": lambda path: path.unlink(),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Code())),
    "pickle in an archive": lambda path: torch.save(Code(), path),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_of_the_state_takes_the_one_before(self, unbroken, interrupted, caplog, damage):
        DAMAGE[damage](interrupted / "resume.pt")
        run = trained(interrupted)
        if damage != "missing":
            assert f"{interrupted}/resume.pt: not a readable checkpoint" in caplog.text
        assert same(run.model, unbroken.model)
        assert run.history.packed.tobytes() == unbroken.history.packed.tobytes()
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(run.checkpoints, unbroken.checkpoints, strict=True))

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_of_a_checkpoint_is_named_and_gone_without(self, unbroken, interrupted, caplog, damage):
        DAMAGE[damage](interrupted / "checkpoints" / "epoch_00002.pt")
        run = trained(interrupted)
        assert f"{interrupted}/checkpoints/epoch_00002.pt: " in caplog.text
        assert "fuse `run.kept`" in caplog.text
        assert same(run.model, unbroken.model)
        assert run.history.packed.tobytes() == unbroken.history.packed.tobytes()
        assert run.kept.history.epochs == (0, 1, 3, 4, 5)
        assert fmn.fuse(run.kept.probabilities(VAL), VAL[1]).n_epochs == 5

    def test_of_both_states_changes_nothing(self, interrupted):
        for name in ("resume.pt", "resume.previous.pt"):
            flip(interrupted / name)
        before = {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()}
        with pytest.raises(ValueError, match=r"resume\.pt: not a readable.*resume\.previous\.pt: not a readable"):
            trained(interrupted)
        assert {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()} == before


class TestWriter:
    def test_writes_in_order_beside_the_caller(self):
        done, may_go = [], threading.Event()
        with Writer(0) as writer:
            writer.put(may_go.wait, lambda: done.append(threading.current_thread().name))
            assert done == []
            may_go.set()
            writer.put(lambda: done.append(2))
            assert done[0].startswith("fmn-writer")
        assert done[1:] == [2]

    def test_an_error_reaches_the_caller_and_stops_what_follows(self):
        done = []

        def fails():
            raise OSError(errno.EIO, "bad disk")

        writer = Writer(0)
        writer.put(fails, lambda: done.append(1))
        with pytest.raises(OSError, match="bad disk"):
            writer.put(lambda: done.append(2))
        writer.__exit__(None, None, None)
        assert done == []

    def test_patience_has_an_end(self, monkeypatch):
        monkeypatch.setattr(store, "PAUSE", 0.001)
        tries = []

        def full():
            tries.append(1)
            raise OSError(errno.ENOSPC, "No space left on device", "x")

        with Writer(0.05) as writer:
            writer.put(full)
            with pytest.raises(OSError, match="No space"):
                writer.wait()
        assert len(tries) > 2

    def test_does_not_wait_after_another_error(self):
        def full():
            raise OSError(errno.ENOSPC, "No space left on device", "x")

        writer = Writer(1e9)
        writer.put(full)
        writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_checkpoints_are_written_by_another_thread(tmp_path, monkeypatch):
    real, threads = checkpoints.save, set()

    def save(content, path):
        threads.add(threading.current_thread().name)
        real(content, path)

    monkeypatch.setattr(checkpoints, "save", save)
    trained(tmp_path, epochs=2)
    assert [name.startswith("fmn-writer") for name in threads] == [True]


def images(n=96):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (n,), generator=g)
    return torch.randn(n, 3, 8, 8, generator=g) + y[:, None, None, None] * 0.5, y


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def test_memory_formats_agree(tmp_path):
    runs = []
    for channels_last in (True, False):
        folder = tmp_path / str(channels_last)
        options = RECIPE | {"channels_last": channels_last, "lr": 0.01}
        runs.append(fmn.train(cnn(), images(), images(), epochs=3, run_dir=folder, **options))
    for run, format in zip(runs, (torch.channels_last, torch.contiguous_format), strict=True):
        assert run.model[0].weight.is_contiguous(memory_format=format)
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_it_learns_the_same(tmp_path):
    runs = []
    for mode in ("default", "none"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))  # Dropout would draw otherwise
        runs.append(fmn.train(model, TRAIN, VAL, epochs=2, run_dir=tmp_path / mode, **RECIPE | {"compile": mode}))
    for a, b in zip(*(run.checkpoints for run in runs), strict=True):
        compiled, plain = checkpoints.load(a), checkpoints.load(b)
        assert compiled.keys() == plain.keys()
        for name, value in compiled.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def teacher(unbroken):
    return fmn.FusedModel(fmn.fuse(unbroken.probabilities(VAL), VAL[1]), unbroken)


class TestDistill:
    def distilled(self, teacher, folder=None, **options):
        return fmn.distill(fresh(3), teacher, TRAIN, **RECIPE | {"epochs": 6, "run_dir": folder, **options})

    def noisy(self, x):
        return x + 0.1 * torch.randn_like(x)

    def test_cached_targets_are_on_disk(self, teacher, tmp_path):
        student = self.distilled(teacher, tmp_path)
        stored = np.load(tmp_path / "targets" / "view_00000.log_probs.npy")
        np.testing.assert_allclose(stored, teacher(TRAIN[0]).numpy(), atol=1e-5)
        assert same(student, self.distilled(teacher))

    def test_views_are_asked_about_once_and_replayed(self, teacher, tmp_path, monkeypatch):
        asked, seen = [], []

        class Listening(nn.Module):
            def forward(self, x):
                asked.append(x)
                return teacher(x)

        real = soft_targets.Cached.step

        def step(self, student, batch):
            seen.append(batch[0])
            return real(self, student, batch)

        monkeypatch.setattr(soft_targets.Cached, "step", step)
        self.distilled(Listening(), tmp_path, augment=self.noisy, targets="cached-views", views=2)
        n = len(TRAIN[0])
        assert sum(len(x) for x in asked) == 2 * n
        rows = [{tuple(r.tolist()) for r in torch.cat(seen)[e * n : (e + 1) * n]} for e in range(6)]
        views = [{tuple(r.tolist()) for r in torch.cat(asked)[v * n : (v + 1) * n]} for v in range(2)]
        assert rows == views * 3
        assert views[0].isdisjoint(views[1])

    def test_the_target_belongs_to_the_view(self, teacher, tmp_path):
        options = {"targets": "cached-views", "views": 3, "augment": self.noisy, "folder": tmp_path}
        source = soft_targets.SoftTargets(teacher, TRAIN, fmn.Recipe(batch_size=32), **options)
        cached = source.open(torch.device("cpu"))
        for epoch in range(4):
            for batch in cached.batches(epoch):
                _, (_, log_probs) = cached.step(nn.Linear(6, 4), batch)
                torch.testing.assert_close(log_probs, teacher(batch[0]), atol=1e-5, rtol=1e-4)

    def test_views_resume_with_the_same_bits(self, teacher, tmp_path, monkeypatch):
        options = {"augment": self.noisy, "targets": "cached-views", "views": 3, "val_data": VAL, "ema_decay": 0.9}
        whole = self.distilled(teacher, tmp_path / "whole", **options)
        real, calls = checkpoints.save, []

        def save(content, path):
            calls.append(path.name)
            if calls.count("resume.pt") == 4:
                raise KeyboardInterrupt
            real(content, path)

        monkeypatch.setattr(checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            self.distilled(teacher, tmp_path / "b", **options)
        monkeypatch.undo()
        assert same(self.distilled(teacher, tmp_path / "b", **options), whole)

    @pytest.mark.parametrize("augment", [None, noisy])
    def test_the_top_of_the_targets(self, teacher, tmp_path, augment):
        options = {} if augment is None else {"augment": lambda x: self.noisy(x), "targets": "cached-views", "views": 2}
        full = self.distilled(teacher, **options)
        top = self.distilled(teacher, tmp_path, top_k=3, **options)
        torch.testing.assert_close(top(TEST[0]).softmax(1), full(TEST[0]).softmax(1), atol=0.02, rtol=0)
        files = sorted(p.name for p in (tmp_path / "targets").iterdir())
        assert files[:3] == ["targets.json", "view_00000.classes.npy", "view_00000.log_probs.npy"]
        assert np.load(tmp_path / "targets" / files[2]).dtype == np.float16

    def test_the_top_keeps_mass(self):
        log_probs = torch.randn(50, 20).log_softmax(1)
        for k in (1, 5, 19, 20, 40):
            values, classes = soft_targets.compressed(log_probs, k)
            back = soft_targets.expanded(values, classes, 20)
            torch.testing.assert_close(back.exp().sum(1), torch.ones(50), atol=2e-3, rtol=0)
            torch.testing.assert_close(back.gather(1, classes.long()), values.float())
        torch.testing.assert_close(back, log_probs, atol=4e-3, rtol=0)

    def test_the_average_is_that_of_the_steps(self, teacher):
        """Against an average by hand of plain SGD steps on cached targets."""
        weights = []
        real = torch.optim.SGD.step

        def step(optimizer, *args):
            result = real(optimizer, *args)
            weights.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", step)
            student = self.distilled(teacher, ema_decay=0.8, epochs=2)
        mean = weights[0]
        for now in weights[1:]:
            mean = [0.8 * m + 0.2 * w for m, w in zip(mean, now, strict=True)]
        for a, b in zip(student.parameters(), mean, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_stops_early_with_the_best_epoch(self, teacher, tmp_path):
        options = {"val_data": VAL, "patience": 2, "epochs": 40, "lr": 0.3, "schedule": "constant"}
        student = self.distilled(teacher, tmp_path, **options)
        run = fmn.Run.open(tmp_path, make_model())
        accuracy = run.history.correct().mean(1)
        assert len(run.history) < 40
        assert len(run.history) == accuracy.argmax() + 3
        assert same(student, checkpoints.load(run.checkpoints[int(accuracy.argmax())]))
        before = run.history.packed.tobytes()
        assert same(self.distilled(teacher, tmp_path, **options), student)  # once more: nothing to do
        assert fmn.Run.open(tmp_path).history.packed.tobytes() == before

    def test_progress_names_student_and_teacher(self, teacher, tmp_path, capsys):
        self.distilled(teacher, tmp_path, val_data=VAL, progress=True)
        text = capsys.readouterr().err
        assert "student=" in text
        assert "teacher=" in text
        assert "peak F_e=" in text

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"targets": "stored"}, "targets"),
            ({"targets": "cached", "augment": noisy}, "targets: 'cached' ignores augmentation"),
            ({"targets": "cached-views"}, "targets: 'cached-views' needs augment"),
            ({"targets": "online", "top_k": 3}, "top_k"),
            ({"top_k": 0}, "top_k"),
            ({"targets": "cached-views", "augment": noisy, "views": 0}, "views"),
            ({"patience": 3}, "patience: needs val_data"),
            ({"ema_decay": 1.5}, "ema_decay"),
        ],
    )
    def test_bad_input(self, teacher, options, words):
        with pytest.raises(ValueError, match=words):
            self.distilled(teacher, **options)


SHORT = {**RECIPE, "epochs": 3}


class TestTune:
    def test_takes_the_best_and_keeps_all(self, teacher, tmp_path):
        sweep = fmn.tune_distillation(make_model, teacher, TRAIN, VAL, run_dir=tmp_path, temperatures=(1, 3), **SHORT)
        assert isinstance(sweep, fmn.Sweep)
        accuracy = [row["accuracy"] for row in sweep.rows]
        assert [(row["temperature"], row["kd_weight"]) for row in sweep.rows] == [(1, 1), (1, 0.7), (3, 1), (3, 0.7)]
        best = sweep.rows[int(np.argmax(accuracy))]
        assert (sweep.temperature, sweep.kd_weight) == (best["temperature"], best["kd_weight"])
        right = (sweep.run.model(VAL[0]).argmax(1) == VAL[1]).double().mean()
        assert right == max(accuracy)
        folders = sorted(p.name for p in tmp_path.iterdir() if (p / "run.json").exists())
        assert folders == [f"temperature_{t}_kd_weight_{w}" for t in (1, 3) for w in ("0.7", "1")]
        again = fmn.tune_distillation(make_model, teacher, TRAIN, VAL, run_dir=tmp_path, temperatures=(1, 3), **SHORT)
        assert again.rows == sweep.rows
        alone = fmn.distill(
            self.seeded(), teacher, TRAIN, temperature=sweep.temperature, kd_weight=sweep.kd_weight, **SHORT
        )
        assert same(alone, sweep.run.model)

    def seeded(self):
        torch.manual_seed(RECIPE["seed"])
        return make_model()

    def test_the_teacher_is_asked_once(self, teacher, tmp_path):
        asked = []

        class Listening(nn.Module):
            def forward(self, x):
                asked.append(len(x))
                return teacher(x)

        fmn.tune_distillation(make_model, Listening(), TRAIN, VAL, run_dir=tmp_path, **SHORT)
        assert sum(asked) == len(TRAIN[0])

    def test_nothing_to_try(self, teacher, tmp_path):
        with pytest.raises(ValueError, match="temperatures, kd_weights: expected at least one"):
            fmn.tune_distillation(make_model, teacher, TRAIN, VAL, run_dir=tmp_path, kd_weights=(), **SHORT)

    def test_targets_of_another_teacher_are_refused(self, teacher, tmp_path):
        fmn.distill(make_model(), teacher, TRAIN, targets_dir=tmp_path, **SHORT)
        with pytest.raises(ValueError, match="teacher: the targets in"):
            fmn.distill(make_model(), nn.Linear(6, 4), TRAIN, targets_dir=tmp_path, **SHORT)
