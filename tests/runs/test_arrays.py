"""Arrays in files: what a header promises is compared with the file before any memory is asked for."""

import gc
import io
import os
import struct
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

import fmn_ref as fmn
from fmn_ref.fusion import probabilities
from fmn_ref.kernels import backend
from fmn_ref.runs import arrays

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


def npy(header, data=bytes(48), version=b"\1\0"):
    """An .npy file with a header of any text."""
    text = header.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", len(text)) + text + data


def header(shape="(3, 4)", descr="'<f4'", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        ARRAY.T,
        ARRAY > 3,
        ARRAY.astype(">i8"),
        np.array(3.5),
        np.zeros((0, 4)),
        np.zeros((2, 0, 3)),
        ARRAY[:, ::2],
    ],
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "compressed.npz"])
def test_comes_back(tmp_path, array, name):
    path = tmp_path / name
    {"a.npy": np.save, "a.npz": np.savez, "compressed.npz": np.savez_compressed}[name](path, array)
    found = arrays.open_npy(path) if name == "a.npy" else arrays.load_npz(path, ["x", "arr_0"])[0]
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype
    assert isinstance(found, np.memmap) == (name == "a.npy")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy(header("(18446744073709551616,)")), "needs .* bytes, and 48 are there"),
        (npy(header("(3, 5)")), "needs 60 bytes, and 48 are there"),
        (npy(header("(-1, 4)")), "needs|negative"),
        (npy(header("(2147483647, 2147483647)")), "and 48 are there"),
        (npy(header("(True, 4)")), "."),
        (npy(header("3")), "."),
        (npy(header(descr="('<f4',)")), "."),
        (npy(header(descr="'|O'")), "objects"),
        (npy(header(descr="[('a', 'O')]")), "objects"),
        (npy("{'descr': " + "-" * 9000 + "1}"), "header"),
        (npy("(" * 5000), "."),
        (npy("x" * 20000), "."),
        (npy(header(), version=b"\3\0"), r"version \(3, 0\)"),
        (npy(header(), version=b"\7\0"), "version"),
        (npy(header())[:40], "."),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff", "."),
        (b"\x93NUM", "."),
        (b"", "."),
        (b"\x80\x04K\1.", "."),
    ],
)
def test_a_header_of_a_stranger(tmp_path, content, words):
    """It neither asks for memory, nor gives another kind of error than one that names the file."""
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^\S+a\.npy: not an \.npy file of numbers: .*{words}"):
        arrays.open_npy(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("probs.npy", content)
    with pytest.raises(ValueError, match=rf"^\S+a\.npz: not an \.npz file of arrays: .*{words}"):
        arrays.load_npz(tmp_path / "a.npz", ["probs"])


@pytest.mark.parametrize("version", [b"\1\0", b"\2\0"])
def test_both_versions_of_the_format(tmp_path, version):
    (tmp_path / "a.npy").write_bytes(npy(header(), ARRAY.tobytes(), version))
    np.testing.assert_array_equal(arrays.open_npy(tmp_path / "a.npy"), ARRAY)


def test_a_member_must_be_as_long_as_its_header_says(tmp_path):
    for data in (ARRAY.tobytes()[:-4], ARRAY.tobytes() + b"1234"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            file.writestr("probs.npy", npy(header(), data))
        with pytest.raises(ValueError, match=rf"a\.npz: .*needs 48 bytes, and {len(data)} are there"):
            arrays.load_npz(tmp_path / "a.npz", ["probs"])


def test_a_member_that_expands_beyond_its_bytes_is_refused(tmp_path):
    """The directory of a zip file can promise any size."""
    np.savez_compressed(tmp_path / "a.npz", probs=ARRAY)
    raw = (tmp_path / "a.npz").read_bytes()
    at = raw.index(b"PK\1\2") + 24
    (tmp_path / "a.npz").write_bytes(raw[:at] + struct.pack("<I", 2**31) + raw[at + 4 :])
    with pytest.raises(ValueError, match=r"a\.npz: .*cannot hold an array of 2147483648"):
        arrays.load_npz(tmp_path / "a.npz", ["probs"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_a_member_is_noticed(tmp_path, save, rng):
    save(tmp_path / "a.npz", probs=rng.random((40, 5)))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[700] ^= 4
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.npz: "):
        arrays.load_npz(tmp_path / "a.npz", ["probs"])


def test_zeros_may_be_compressed_well(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", probs=np.zeros((1000, 1000)))
    assert arrays.load_npz(tmp_path / "a.npz", ["probs"])[0].shape == (1000, 1000)


def test_only_the_member_that_is_asked_for_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("broken.npy", b"")
        buffer = io.BytesIO()
        np.save(buffer, ARRAY)
        file.writestr("probs.npy", buffer.getvalue())
    array, name = arrays.load_npz(tmp_path / "a.npz", ["scores", "probs"])
    assert name == "probs"
    np.testing.assert_array_equal(array, ARRAY)
    assert arrays.npz_names(tmp_path / "a.npz") == ["broken", "probs"]
    with pytest.raises(ValueError, match=r"a\.npz: expected an array named 'x', found \['broken', 'probs'\]"):
        arrays.load_npz(tmp_path / "a.npz", ["x"])


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda p: os.symlink("/dev/zero", p)])
@pytest.mark.parametrize("read", [arrays.open_npy, arrays.npz_names, fmn.CorrectnessHistory.open, fmn.FusionPlan.load])
def test_what_is_no_file_is_named(tmp_path, make, read):
    """A FIFO would be waited for, a device read without end."""
    make(tmp_path / "a")
    with pytest.raises(ValueError, match=r"/a: expected a regular file"):
        read(tmp_path / "a")


class TestManyFiles:
    @pytest.fixture
    def folder(self, tmp_path, rng):
        self.probs = rng.dirichlet(np.ones(3), (arrays.MOST_MAPPED + 6, 40)).astype(np.float32)
        for i, p in enumerate(self.probs):
            np.save(tmp_path / f"epoch_{i}.npy", p)
        return tmp_path

    def descriptors(self):
        return len(os.listdir("/proc/self/fd"))

    @pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts descriptors as Linux shows them")
    @pytest.mark.parametrize("method", ["forget", "greedy", "likelihood", "pool", "auto"])
    def test_few_descriptors_are_held(self, folder, rng, method):
        labels = rng.integers(0, 3, 40)
        gc.collect()  # other tests may have left some
        before = self.descriptors()
        files = fmn.epoch_files(folder)
        assert self.descriptors() == before
        read = list(files)
        assert self.descriptors() == before + arrays.MOST_MAPPED
        np.testing.assert_array_equal(np.stack(read), self.probs)
        del read
        options = {"method": method, "max_members": 3, "folds": 3}
        assert fmn.fuse(files, labels, **options) == fmn.fuse(self.probs, labels, **options)
        gc.collect()
        assert self.descriptors() == before

    def test_each_file_is_checked_once(self, folder, rng, monkeypatch):
        checked = []

        def check(a, tolerance):
            checked.append(a)
            return backend.kernels().check_probabilities(a, tolerance)

        monkeypatch.setattr(probabilities, "kernels", lambda: SimpleNamespace(check_probabilities=check))
        fmn.fuse(fmn.epoch_files(folder), rng.integers(0, 3, 40), method="likelihood", folds=0)
        assert len(checked) == len(self.probs)

    def test_they_are_a_sequence(self, folder):
        files = fmn.epoch_files(folder)
        assert len(files) == len(self.probs)
        np.testing.assert_array_equal(files[-1], self.probs[-1])
        np.testing.assert_array_equal(files[1:3], self.probs[1:3])
        with pytest.raises(IndexError):
            files[len(files)]
        assert files[69].filename == str(folder / "epoch_69.npy")

    def test_another_working_directory_does_not_matter(self, folder, monkeypatch, tmp_path):
        monkeypatch.chdir(folder)
        files = fmn.epoch_files(".")
        monkeypatch.chdir("/")
        np.testing.assert_array_equal(files[3], self.probs[3])


@pytest.mark.parametrize(
    ("names", "numbers"),
    [(("a_1", "a_10"), (1, 10)), (("#1", "2#"), ()), (("a_1", "b_2"), ()), (("1_1", "2_2"), ()), (("a_1", "a_#"), ())],
)
def test_numbers_of_names_are_those_that_differ_alone(names, numbers):
    assert arrays.differing_numbers(names) == numbers
