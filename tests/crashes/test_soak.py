"""A short soak, and what a soak must find: each kind of leak, wrong numbers, files that a kill left."""

import json
import random
import shutil
import sys
import threading

import numpy as np
import pytest
from folders import flip_bit
from inputs import history_of
from kill_runs import final_files
from soak import QUANTITIES, ROUNDS, User, grown, soak
from soak_jobs import JOBS, different

import fmn_ref as fmn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts memory and file descriptors in /proc")


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """The folder of a short soak, and its record."""
    root = tmp_path_factory.mktemp("soak")
    return root, soak(root, 0, random.randrange(2**32))


@pytest.fixture
def user(soaked):
    """A user of what the soak left; it stands still."""
    return User(soaked[0])


def test_in_a_short_soak_nothing_grows_and_no_number_is_wrong(soaked):
    _, found = soaked
    print(found["seed"], found["kills"])
    assert found["faults"] == []
    # The long soak judges the rest: memory and objects settle after minutes, and a thread of the long training
    # writes files while they are counted.
    sharp = tuple(f"{of}: {name}:" for of in ("killer", "user") for name in ("file_descriptors", "threads", "files"))
    assert [line for line in found["growth"] if line.startswith(sharp)] == []
    assert found["rounds"] >= ROUNDS
    for act in ("fuse", "compare", "average", "record", "bring", "train", "report", "refuse"):
        assert found["done"][act] == found["rounds"], act
    assert found["jobs"]
    assert found["done"]["epochs of the long training"] > 0


def test_leaks_are_found(user):
    """A bit of everything in each round: a file that stays open, an array, objects, a thread, files, a growing file."""
    kept, end = [], threading.Event()

    def leak():
        kept.append((user.folder / "recorded" / "run.json").open())
        kept.append(np.ones(2**23, np.uint8))
        kept.append([object() for _ in range(1000)])
        threading.Thread(target=end.wait).start()
        (user.folder / f".plan.json.{user.n:08x}.tmp").touch()
        (user.folder / "log").write_bytes(bytes(8000 * user.n))

    user.acts = [leak]
    for _ in range(ROUNDS):
        user.round()
    end.set()
    for file in kept[::3]:
        file.close()
    lines = [json.loads(line) for line in (user.root / "user.jsonl").read_text().splitlines()[-ROUNDS:]]
    assert [line.partition(":")[0] for line in grown(lines)] == list(QUANTITIES)
    assert user.faults == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (fmn, "forget_fraction"),
        (fmn, "forgetting_matrix"),
        (fmn.FusionPlan, "apply"),
        (fmn.CorrectnessHistory, "correct"),
    ],
)
def test_a_wrong_number_is_found(user, monkeypatch, owner, name):
    real = getattr(owner, name)
    user.act(user.fuse)
    assert user.faults == []
    monkeypatch.setattr(owner, name, lambda *args: real(*args) * 1.0001)
    user.act(user.fuse)
    assert len(user.faults) == 1


def wrong_row(folder):
    correct, epochs = fmn.CorrectnessHistory.open(folder / "history.fmnh").correct(), range(12)
    correct[3, 100] ^= True
    (folder / "history.fmnh").unlink()
    history_of(correct, folder / "history.fmnh", epochs=epochs)


def checkpoint_of_another_epoch(folder):
    paths = sorted((folder / "checkpoints").iterdir())
    shutil.copy(paths[-1], paths[0])


@pytest.mark.parametrize("damage", [wrong_row, checkpoint_of_another_epoch])
@pytest.mark.parametrize("name", ["budget", "half"])
def test_what_is_wrong_in_a_run_that_is_written_is_found(user, name, damage):
    folder = user.root / "killed" / name
    shutil.copytree(user.root / "unbroken" / name, folder)
    user.act(user.read)
    assert user.counts == {"read and reported": 1}
    damage(folder)
    user.act(user.read)
    shutil.rmtree(folder)
    assert len(user.faults) == 1


@pytest.mark.parametrize("name", JOBS)
def test_what_a_kill_left_or_changed_is_found(soaked, tmp_path, name):
    unbroken, folder = soaked[0] / "unbroken" / name, tmp_path / "run"
    shutil.copytree(unbroken, folder)
    expected = final_files(unbroken)
    assert different(folder, expected) == []
    left = [".lock", ".plan.json.01234567.tmp", "checkpoints/.epoch_00001.pt.01234567.tmp"]
    for path in left:
        (folder / path).write_bytes(b"")
    flip_bit(folder / "history.fmnh")
    (folder / "resume.pt").unlink()
    assert different(folder, expected) == sorted([*left, "history.fmnh", "resume.pt"])
