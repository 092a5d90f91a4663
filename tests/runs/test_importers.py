"""Records of other tools are read correctly; broken or hostile files are refused by name and run no code."""

import io
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from inputs import random_probs, softmax

import fmn_ref as fmn


class TestLogits:
    @pytest.mark.parametrize("kind", ["float16", "float32", "float64", ">f4", "memmap", "list", "bfloat16"])
    def test_the_plan_is_that_of_the_probabilities(self, rng, tmp_path, kind):
        p, labels = random_probs(rng)
        z = 3 + np.log(p)
        given = z = z.astype(kind if kind.startswith((">", "float")) else np.float32)
        if kind == "memmap":
            np.save(tmp_path / "z.npy", z)
            given = np.load(tmp_path / "z.npy", mmap_mode="r")
        elif kind == "list":
            given = list(z)
        elif kind == "bfloat16":
            given = torch.tensor(z).bfloat16()
            z = given.float().numpy()
        plan = fmn.fuse(fmn.from_logits(given), labels)
        assert plan.members
        assert plan == fmn.fuse(softmax(z), labels)
        assert fmn.fuse(fmn.from_logits(given), labels, method="auto", folds=3).members
        probs = fmn.from_logits(given)
        assert len(probs) == len(z)
        assert probs[-1].dtype == np.float32
        np.testing.assert_allclose(np.stack(list(probs)), softmax(z), atol=1e-6)

    def test_extreme_values_do_not_overflow(self):
        for row in ([1e4, 0, -1e4], [-np.inf, 0, 0], [-1e300, 0, 1], [-3e38, 3e38, 0], [88.8, 88.8, 88.8]):
            np.testing.assert_allclose(fmn.from_logits([np.array([row])])[0], softmax([row]), atol=1e-7)

    def test_only_the_epochs_that_are_asked_for_are_read(self):
        class Files(list):
            def __getitem__(self, i):
                read.append(i)
                return super().__getitem__(i)

        read = []
        fmn.FusionPlan(((0, 0.5),), 5, 0, (0.5, 0.5)).apply(fmn.from_logits(Files([np.eye(3)] * 5)))
        assert sorted(read) == [0, 4]

    @pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
    @pytest.mark.parametrize("n_classes", [2, 1000])
    def test_probabilities_are_no_logits(self, rng, kind, n_classes):
        p = rng.dirichlet(np.ones(n_classes), (2, 40)).astype(kind)
        with pytest.raises(ValueError, match=r"logits\[1\]: expected logits or log-probabilities, got probabilities"):
            fmn.from_logits(p)[1]
        for logits in (np.log(p + 1e-3), 3 * p, p - p.mean(), np.eye(3), rng.random((9, 5))):
            fmn.from_logits([logits.reshape(-1, logits.shape[-1])])[0]

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            ([[0.0, np.nan], [0.0, 0.0]], "row 0.*nan"),
            ([[5.0, 0.0], [0.0, np.inf]], "row 1.*inf"),
            ([[0.0, 0.0], [-np.inf, -np.inf]], "row 1.*-inf"),
            ([[0.0, 0.0], [1e300, 0.0]], "row 1.*inf"),
            ([[0, 1]], "int64"),
            ([0.0, 1.0], "shape"),
            (np.zeros((0, 2)), "shape"),
            ([["a"]], "<U1"),
        ],
    )
    def test_bad_logits(self, bad, words):
        with pytest.raises((ValueError, TypeError), match=rf"^logits\[1\].*{words}"):
            fmn.from_logits([[[0.0, 0.0]], bad])[1]


class TestEpochFiles:
    def test_natural_order(self, tmp_path, rng):
        p = rng.dirichlet(np.ones(3), (12, 7)).astype(np.float32)
        for e in rng.permutation(12):
            np.save(tmp_path / f"run7_epoch_{e}.npy", p[e])
        np.save(tmp_path / "labels", np.zeros(7, int))
        found = fmn.epoch_files(tmp_path, "*epoch*.npy")
        np.testing.assert_array_equal(np.stack(found), p)
        assert all(isinstance(a, np.memmap) for a in found)
        labels = rng.integers(0, 3, 7)
        assert fmn.fuse(found, labels) == fmn.fuse(p, labels)

    @pytest.mark.parametrize(
        "other",
        [
            *("epoch_0 (1).npy", "epoch_1_copy.npy", "._epoch_1.npy", "epoch_1.0.npy", "Epoch_3.npy"),
            *("labels.npy", "labels_1.npy", "epoch_1_labels.npy", "best.npy", "epoch_².npy"),
        ],
    )
    def test_a_file_that_is_no_epoch_is_not_counted_as_one(self, tmp_path, other):
        """Copies of a browser or of macOS, labels, a best model: a number in a name does not make an epoch."""
        for name in ("epoch_0.npy", "epoch_1.npy", "epoch_10.npy", other):
            np.save(tmp_path / name, np.full((3, 2), 0.5))
        with pytest.raises(ValueError, match=re.escape(f"{other}: not an epoch like epoch_0.npy")):
            fmn.epoch_files(tmp_path)
        assert len(fmn.epoch_files(tmp_path, "epoch_[0-9].npy")) == 2

    def test_a_number_sign_is_no_number(self, tmp_path):
        for name in ("#1.npy", "2#.npy"):
            np.save(tmp_path / name, np.full((3, 2), 0.5))
        with pytest.raises(ValueError, match=r"#1\.npy: not an epoch like 2#\.npy"):
            fmn.epoch_files(tmp_path)

    def test_one_epoch_is_not_counted_twice(self, tmp_path):
        for name in ("epoch_1.npy", "epoch_01.npy", "epoch_2.npy"):
            np.save(tmp_path / name, np.full((3, 2), 0.5))
        with pytest.raises(ValueError, match=r"epoch_0?1\.npy: the same epoch as epoch_0?1\.npy"):
            fmn.epoch_files(tmp_path)

    def test_names_may_hold_several_numbers(self, tmp_path):
        names = [f"lr0.1_epoch_{e}_step_{100 * e}.npy" for e in (0, 2, 10)]
        for i, name in enumerate(names):
            np.save(tmp_path / name, np.full(1, i))
        assert [a[0] for a in fmn.epoch_files(str(tmp_path))] == [0, 1, 2]

    @pytest.mark.parametrize(
        "names",
        [
            ("acc0.91-epoch0", "acc0.88-epoch1", "acc0.95-epoch2"),
            ("epoch0-loss0.95", "epoch1-loss0.88", "epoch2-loss0.91"),
            ("seed0_epoch0", "seed0_epoch1", "seed1_epoch0"),
            ("seed0_epoch0", "seed0_epoch1", "seed1_epoch0", "seed1_epoch1"),
            ("seed0_epoch0", "seed0_epoch1", "seed1_epoch1"),
        ],
    )
    def test_numbers_that_give_several_orders(self, tmp_path, names):
        """The first number decided: an accuracy, or the seed of another run, ordered the epochs."""
        for name in names:
            np.save(tmp_path / name, np.full((3, 2), 0.5))
        with pytest.raises(ValueError, match=r"\d\.npy: an epoch after .*\d\.npy\? .* two orders; .*`pattern`"):
            fmn.epoch_files(tmp_path)

    def test_a_single_file_needs_no_number(self, tmp_path):
        np.save(tmp_path / "final.npy", np.full((3, 2), 0.5))
        assert len(fmn.epoch_files(tmp_path)) == 1

    def test_a_folder_below_the_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        np.save(tmp_path / "epoch_0.npy", np.full((3, 2), 0.5))
        assert len(fmn.epoch_files("~")) == 1
        line = {"guid": "a", "logits_epoch_0": [1.0, 2.0], "gold": 1}
        (tmp_path / "dynamics_epoch_0.jsonl").write_text(json.dumps(line))
        assert fmn.from_cartography("~")[2] == ["a"]

    def test_none_there(self, tmp_path):
        for folder in (tmp_path, tmp_path / "none"):
            with pytest.raises(FileNotFoundError, match=folder.name):
                fmn.epoch_files(folder)

    @pytest.mark.parametrize("kind", ["objects", "pickle", "truncated", "empty", "text", "zip", "header", "strings"])
    def test_a_bad_file_is_named(self, tmp_path, kind):
        np.save(tmp_path / "epoch_1.npy", np.zeros((5, 2)))
        bad = tmp_path / "epoch_2.npy"
        raw = (tmp_path / "epoch_1.npy").read_bytes()
        if kind in ("objects", "strings"):
            np.save(bad, np.array([{}, None]) if kind == "objects" else np.array(["a"]), allow_pickle=True)
        elif kind == "zip":
            with open(bad, "wb") as file:
                np.savez(file, probs=np.zeros((5, 2)))
        else:
            content = {"pickle": pickle.dumps([1]), "truncated": raw[:140], "empty": b"", "text": b"epoch,loss\n"}
            bad.write_bytes(content.get(kind, raw.replace(b"'descr'", b"'descr\"", 1)))
        with pytest.raises(ValueError, match=r"epoch_2\.npy: not an \.npy file of numbers"):
            fmn.epoch_files(tmp_path)


def write_dynamics(folder, logits, labels, guids, rng):
    """As allenai/cartography does: one file per epoch, lines in the order of training."""
    folder.mkdir(exist_ok=True)
    for e, epoch in enumerate(logits):
        order = range(len(guids)) if e == 0 else rng.permutation(len(guids))
        lines = [
            json.dumps({"guid": guids[i], f"logits_epoch_{e}": epoch[i].tolist(), "gold": int(labels[i])})
            for i in order
        ]
        (folder / f"dynamics_epoch_{e}.jsonl").write_text("\n".join(lines) + "\n")


class TestCartography:
    @pytest.fixture
    def written(self, tmp_path, rng):
        logits, labels = rng.normal(size=(12, 20, 3)).astype(np.float32), rng.integers(0, 3, 20)
        write_dynamics(tmp_path / "dynamics", logits, labels, [f"s{i}" for i in range(20)], rng)
        return tmp_path / "dynamics", logits, labels

    def test_what_was_written(self, written):
        folder, logits, labels = written
        found, gold, guids = fmn.from_cartography(folder)
        np.testing.assert_array_equal(found, logits)  # the eleventh epoch is not between the second and the third
        np.testing.assert_array_equal(gold, labels)
        assert guids == [f"s{i}" for i in range(20)]
        assert (found.dtype, gold.dtype) == (np.float32, np.int64)
        assert fmn.fuse(fmn.from_logits(found), gold) == fmn.fuse(softmax(logits), labels)

    def test_ids_of_any_kind(self, tmp_path, rng):
        guids = [7, "ünï", "a\u2028b", "a\x85b", "a b"]
        write_dynamics(tmp_path, np.zeros((2, 5, 2)), np.zeros(5), guids, rng)
        for path in tmp_path.iterdir():  # as pandas with force_ascii=False, or by hand
            lines = [json.dumps(json.loads(line), ensure_ascii=False) for line in path.read_text().splitlines()]
            path.write_bytes("\n".join(lines).encode())
        assert fmn.from_cartography(tmp_path)[2] == list(map(str, guids))

    @pytest.mark.parametrize(
        "line",
        [
            b'{"guid": "s19", "logits_epo',
            b"",
            b"7",
            b'{"guid": "s4"}',
            b'{"guid": "s4", "logits_epoch_1": [1, "a", 2], "gold": 0}',
            b'{"guid": "s4", "logits_epoch_1": 3, "gold": 0}',
            b'{"guid": "s4", "logits_epoch_1": [1, 2, 3], "gold": null}',
            b'{"guid": "s\xff", "logits_epoch_1": [1, 2, 3], "gold": 0}',
            b"[" * 100_000,
        ],
    )
    def test_a_torn_line_is_named(self, written, line):
        path = written[0] / "dynamics_epoch_1.jsonl"
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([*lines[:4], line, *lines[5:]]))
        with pytest.raises(ValueError, match=r"dynamics_epoch_1\.jsonl:5: "):
            fmn.from_cartography(written[0])

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda lines: lines[1:], "samples of dynamics_epoch_0"),
            (lambda lines: [*lines, lines[0].replace('"s', '"new')], "samples of dynamics_epoch_0"),
            (lambda lines: [lines[0].replace('"s', '"other'), *lines[1:]], "samples of dynamics_epoch_0"),
            (lambda lines: [*lines, lines[3]], r":21: .*twice"),
            (lambda lines: [], "samples of dynamics_epoch_0"),
            (lambda lines: [lines[0].replace("[", "[0.5, "), *lines[1:]], "4 logits"),
            (lambda lines: [line.replace("[", "[0.5, ") for line in lines], "4 logits"),
            (lambda lines: [lines[0].replace('"gold": ', '"gold": 1'), *lines[1:]], "label 1"),
        ],
    )
    def test_samples_and_classes_that_differ_are_refused(self, written, change, words):
        path = written[0] / "dynamics_epoch_3.jsonl"
        path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))
        with pytest.raises(ValueError, match=rf"dynamics_epoch_3\.jsonl.*{words}"):
            fmn.from_cartography(written[0])

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("dynamics_epoch_0 (1).jsonl", "not an epoch like"),
            ("dynamics_epoch_0_backup.jsonl", "not an epoch like"),
            ("dynamics_epoch_12.jsonl", "missing 'logits_epoch_12'"),
            ("dynamics_epoch_00.jsonl", "the same epoch as"),
        ],
    )
    def test_a_copy_is_not_counted_as_an_epoch(self, written, name, words):
        (written[0] / name).write_bytes((written[0] / "dynamics_epoch_0.jsonl").read_bytes())
        with pytest.raises(ValueError, match=rf"dynamics_epoch_.*\.jsonl.*{words}"):
            fmn.from_cartography(written[0])

    def test_only_dynamics_that_are_all_misnamed(self, tmp_path, rng):
        write_dynamics(tmp_path, np.zeros((1, 3, 2)), [0, 1, 0], "abc", rng)
        (tmp_path / "dynamics_epoch_0.jsonl").rename(tmp_path / "dynamics_epoch_0 (1).jsonl")
        with pytest.raises(ValueError, match=r"\(1\)\.jsonl: expected a name like"):
            fmn.from_cartography(tmp_path)

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_marks_and_line_ends_of_other_systems(self, written, encoding, end):
        folder, logits, labels = written
        for path in folder.iterdir():
            path.write_bytes(end.join([*path.read_text().splitlines(), ""]).encode(encoding))
        found, gold, guids = fmn.from_cartography(folder)
        np.testing.assert_array_equal(found, logits)
        np.testing.assert_array_equal(gold, labels)
        assert guids == [f"s{i}" for i in range(20)]

    @pytest.mark.parametrize(
        "change",
        [
            {"guid": None},
            {"guid": 1.0},
            {"guid": True},
            {"guid": ["s4"]},
            {"gold": 1.0},
            {"gold": "1"},
            {"gold": True},
            {"gold": float("inf")},
            {"logits_epoch_1": "123"},
            {"logits_epoch_1": [1, True, 2]},
            {"logits_epoch_1": [1, "2", 3]},
            {"logits_epoch_1": [1, None, 3]},
            {"logits_epoch_1": [1, [2], 3]},
            {"logits_epoch_1": [1, float("nan"), 3]},
            {"logits_epoch_1": [1, float("inf"), 3]},
            {"logits_epoch_1": [1, 1e39, 3]},
            {"logits_epoch_1": [1, 10**400, 3]},
            {"logits_epoch_1": [1, -(10**400), 3]},
            {"logits_epoch_1": {"0": 1}},
        ],
        ids=str,
    )
    def test_values_of_other_types_are_refused(self, written, change):
        """int("1"), int(1.7) and str(None) would all have succeeded."""
        path = written[0] / "dynamics_epoch_1.jsonl"
        lines = path.read_text().splitlines()
        lines[4] = json.dumps({**json.loads(lines[4]), **change})
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=r"dynamics_epoch_1\.jsonl:5: .*(expected|too large)"):
            fmn.from_cartography(written[0])

    def test_masked_logits_are_kept(self, tmp_path, rng):
        write_dynamics(tmp_path, np.array([[[-np.inf, 0.0]]]), [1], "a", rng)
        np.testing.assert_array_equal(fmn.from_cartography(tmp_path)[0], [[[-np.inf, 0]]])

    def test_labels_out_of_range(self, tmp_path, rng):
        write_dynamics(tmp_path, np.zeros((2, 3, 2)), [0, 1, 2], "abc", rng)
        with pytest.raises(ValueError, match="gold"):
            fmn.from_cartography(tmp_path)

    def test_none_there(self, tmp_path):
        (tmp_path / "dynamics_epoch_0.json").write_text("{}")
        with pytest.raises(FileNotFoundError, match="dynamics_epoch"):
            fmn.from_cartography(tmp_path)


def toneva(correct, indices, key=np.int64):
    """As run_cifar.py collects it: the keys are elements of an array, samples in the order of training."""
    stats = {}
    for i in np.random.default_rng(1).permutation(len(indices)):
        stats[key(indices[i])] = [[0.5] * len(correct), correct[:, i].astype(int).tolist(), [-0.25] * len(correct)]
    return {**stats, "train": [[], [99.0]], "test": [[], [98.0]]}


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Dtype(Calls):
    """Pickled as NumPy pickles a dtype, with any state."""

    def __init__(self, arguments, state):
        super().__init__(np.dtype, *arguments)
        self.state = state

    def __reduce__(self):
        return (*self.call, self.state)


SOUND = (3, "<", None, None, None, -1, -1, 0)


class TestToneva:
    @pytest.mark.parametrize("key", [int, np.int64, np.int32, np.uint16])
    @pytest.mark.parametrize("protocol", [3, 4, 5])
    def test_what_was_written(self, tmp_path, rng, protocol, key):
        correct, indices = rng.random((6, 9)) < 0.6, [3, 500, 7, 0, 12, 40_000, 2, 1, 9]
        path = tmp_path / "stats_dict.pkl"
        path.write_bytes(pickle.dumps(toneva(correct, indices, key), protocol))
        found, numbers = fmn.from_toneva(path)
        assert numbers == sorted(indices)
        assert all(type(i) is int for i in numbers)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, correct[:, np.argsort(indices)])
        assert fmn.sample_statistics(found).forgetting_events.shape == (9,)

    def test_written_by_an_older_numpy(self, tmp_path):
        raw = pickle.dumps(toneva(np.eye(3), [1, 2, 300]), 3)
        assert b"numpy._core" in raw or b"numpy.core" in raw
        for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
            other = raw.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module)
            (tmp_path / "s.pkl").write_bytes(other)
            assert fmn.from_toneva(tmp_path / "s.pkl")[1] == [1, 2, 300]

    def test_bytes_in_the_other_order(self, tmp_path):
        """Files of a big-endian machine are read; a byte order that would split one number into two is refused."""
        scalar = np.int64(1).__reduce__()[0]
        for order, size, found in ((">", 8, [7, 300]), ("i8,", 16, None)):
            dtype = Dtype(("i8", False, True), (3, order, *SOUND[2:]))
            key = Calls(scalar, dtype, (300).to_bytes(size, "big"))
            (tmp_path / "s.pkl").write_bytes(pickle.dumps({key: [[0.5], [1], [0.1]], 7: [[0.5], [0], [0.1]]}, 4))
            if found is None:
                with pytest.raises(ValueError, match=r"s\.pkl.*byte order"):
                    fmn.from_toneva(tmp_path / "s.pkl")
            else:
                assert fmn.from_toneva(tmp_path / "s.pkl")[1] == found

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (lambda owned: Calls(os.system, f"touch {owned}"), "system"),
            (lambda owned: {0: [[], [Calls(os.mkdir, owned)], []]}, "mkdir"),
            (lambda owned: Calls(eval, f"open({owned!r}, 'w')"), "eval"),
            (lambda owned: Calls(np.lib.format.open_memmap, owned, "w+", float, 3), "open_memmap"),
            (lambda owned: Calls(getattr, 3, "mkdir"), "getattr"),
            (lambda owned: {0: [[], np.ones(3), []]}, "_reconstruct|_frombuffer"),
            (lambda owned: {0: [[], [1], [torch.ones(1)]]}, "torch"),
            (lambda owned: {Calls(np.dtype, "O"): 1}, "NumPy type"),
            (lambda owned: toneva(np.eye(3), [1, 2, 3], np.float64), "accuracies"),
            (lambda owned: {np.bool_(True): [[], [1], []]}, "accuracies"),
        ],
    )
    @pytest.mark.parametrize("protocol", [2, 5])
    def test_a_pickle_runs_nothing(self, tmp_path, content, words, protocol):
        owned = tmp_path / "owned"
        (tmp_path / "s.pkl").write_bytes(pickle.dumps(content(str(owned)), protocol))
        with pytest.raises(ValueError, match=rf"s\.pkl: not example statistics: .*({words}|_codecs)"):
            fmn.from_toneva(tmp_path / "s.pkl")
        assert not owned.exists()

    @pytest.mark.parametrize(
        ("dtype", "data", "words"),
        [
            (Dtype(("O8", False, True), (3, "|", None, None, None, -1, -1, 63)), b"\1" * 8, "no number"),
            (Dtype(("V8", False, True), SOUND), b"\1" * 8, "no number"),
            (Dtype(([("a", "i8")],), SOUND), b"\1" * 8, "no number"),
            (Dtype(("i8", False, True), (3, "O", None)), b"\1" * 8, "byte order"),
            (Dtype(("i8", False, True), 7), b"\1" * 8, "int"),
            (Dtype(("i8", False, True), SOUND), b"\1" * 7, "size"),
            (Dtype(("i8", False, True), SOUND), b"", "size"),
            (Dtype(("i8", False, True), SOUND), [1], "list"),
            (7, b"\1" * 8, "int"),
        ],
    )
    def test_numbers_of_numpy_are_nothing_else(self, tmp_path, dtype, data, words):
        scalar = np.int64(1).__reduce__()[0]
        (tmp_path / "s.pkl").write_bytes(pickle.dumps({Calls(scalar, dtype, data): [[0.5], [1], [0.1]]}, 4))
        with pytest.raises(ValueError, match=rf"s\.pkl: not example statistics: .*{words}"):
            fmn.from_toneva(tmp_path / "s.pkl")

    @pytest.mark.parametrize("function", [b"numpy\ndtype", b"numpy.core.multiarray\nscalar"])
    @pytest.mark.parametrize("state", [{"order": ">"}, (None, {"__new__": 1})])
    def test_what_stands_in_for_numpy_cannot_be_changed(self, tmp_path, function, state):
        """A pickle that sets the state of the function itself, not of its result, is refused."""
        (tmp_path / "good.pkl").write_bytes(pickle.dumps(toneva(np.eye(2), [5, 6]), 4))
        (tmp_path / "s.pkl").write_bytes(b"\x80\x03c" + function + b"\n" + pickle.dumps(state, 3)[2:-1] + b"b.")
        with pytest.raises(ValueError, match=r"s\.pkl"):
            fmn.from_toneva(tmp_path / "s.pkl")
        assert fmn.from_toneva(tmp_path / "good.pkl")[1] == [5, 6]

    def test_references_to_the_outside_are_refused(self, tmp_path):
        class Pickler(pickle.Pickler):
            def persistent_id(self, obj):
                return "elsewhere" if obj == 0.5 else None

        buffer = io.BytesIO()
        Pickler(buffer).dump(toneva(np.eye(2), [0, 1], int))
        (tmp_path / "s.pkl").write_bytes(buffer.getvalue())
        with pytest.raises(ValueError, match=r"s\.pkl.*outside"):
            fmn.from_toneva(tmp_path / "s.pkl")

    @pytest.mark.parametrize(
        "content",
        [
            pickle.dumps({0: [[], [1, 0], []], 1: [[], [1], []]}),
            pickle.dumps({0: [[], [1, 2], []]}),
            pickle.dumps({0: [[], [1, float("nan")], []]}),
            pickle.dumps({0: [[], [], []]}),
            pickle.dumps({0: [[]]}),
            pickle.dumps({"train": [[], [1]]}),
            pickle.dumps({True: [[], [1], []]}),
            pickle.dumps([1, 2]),
            pickle.dumps(toneva(np.eye(3), [0, 1, 2]))[:-20],
            b"",
            b"epoch,loss\n",
            b"\x80\x05" + b"(" * 1000,
        ],
    )
    def test_other_content_is_named(self, tmp_path, content):
        (tmp_path / "s.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=r"s\.pkl: not example statistics"):
            fmn.from_toneva(tmp_path / "s.pkl")

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.pkl"):
            fmn.from_toneva(tmp_path / "none.pkl")

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"\x80\x04})" + b"\x85" * 1_000_000 + b"K\x01s.", "too deep"),  # the interpreter dies of its hash
            (b"\x80\x04}K\x01]\x94(h\x00h\x00es.", "contains itself"),  # NumPy would never end
            (b"\x80\x04Nr\xff\xff\xff\x07.", "memory"),  # 2 GiB
            (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.", "overflow"),  # a frame of exabytes
            (b"\x80\x04B\xff\xff\xff\xffabc.", "ends within"),
            (b"\x80\x04N.", "AttributeError"),
            (b".", "UnpicklingError"),
            (b"", "no end"),
        ],
    )
    def test_small_files_that_ask_for_much(self, tmp_path, data, words):
        (tmp_path / "s.pkl").write_bytes(data)
        with pytest.raises(ValueError, match=rf"^\S+s\.pkl: not example statistics: .*({words})"):
            fmn.from_toneva(tmp_path / "s.pkl")

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_what_is_no_file_is_named(self, tmp_path, make):
        make(tmp_path / "s.pkl")
        with pytest.raises(ValueError, match=r"s\.pkl: expected a regular file"):
            fmn.from_toneva(tmp_path / "s.pkl")
