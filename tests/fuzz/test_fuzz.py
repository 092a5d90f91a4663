"""A short run of the fuzzers: every reader with files that broke one before, and with many damaged ones."""

import contextlib
import importlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import oracle
import pytest
from mutations import mutate
from targets import TARGETS, Target

HERE = Path(__file__).parent
SEED, EXECUTIONS = 1, 400  # of the damage of each target: the same on a fast machine and on a slow one

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """A function that prepares a target in an empty folder and reads its first files: late imports come then."""

    def begin(target):
        monkeypatch.chdir(tmp_path)
        path, seeds = target.prepare(tmp_path), target.seeds()
        for seed in seeds:
            path.write_bytes(target.mended(seed))
            with contextlib.suppress(*oracle.ALLOWED):
                target.read(path)
        oracle.watch()
        return path, seeds

    return begin


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(name, begin):
    target = TARGETS[name]
    path, seeds = begin(target)
    known = [file.read_bytes() for file in sorted((HERE / "corpus" / name).glob("*"))]
    for i, data in enumerate(itertools.chain(seeds, known, itertools.islice(mutate(seeds, SEED), EXECUTIONS))):
        try:
            oracle.check(target, path, target.mended(data))
        except oracle.Finding as finding:
            pytest.fail(f"file {i} of seed {SEED}: {finding}\n{data[:2000]!r}")


def test_each_file_of_the_corpus_belongs_to_a_target():
    assert {folder.name for folder in (HERE / "corpus").iterdir()} <= {*TARGETS, "keras_weights"}


def _unnamed(path):
    raise ValueError("it is damaged")


def _slow(path):
    end = time.process_time() + 1.05
    while time.process_time() < end:
        pass


READERS = {
    "an error of another kind": lambda path: {}["a"],
    "an error without the name": _unnamed,
    "a file": lambda path: Path("new").write_bytes(b""),
    "a file removed": lambda path: path.unlink(),
    "a command": lambda path: os.system(":"),
    "code": lambda path: exec("1"),
    "much time": _slow,
    "much memory": lambda path: bytes(range(256)) * (3 << 20),
}


@pytest.mark.parametrize("what", READERS)
def test_the_oracle_finds(what, begin):
    target = Target("file.bin", READERS[what], list)
    path, _ = begin(target)
    with pytest.raises(oracle.Finding):
        oracle.check(target, path, b"")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux, which forgets a peak")
def test_an_earlier_peak_of_memory_hides_none(begin):
    target = Target("file.bin", READERS["much memory"], list)
    path, _ = begin(target)
    for _ in range(2):
        with pytest.raises(oracle.Finding, match="MiB"):
            oracle.check(target, path, b"")


def test_a_reader_that_was_slow_once_is_not_slow(begin):
    calls = []

    def read(path):
        calls.append(1)
        if len(calls) == 1:
            _slow(path)

    target = Target("file.bin", read, list)
    path, _ = begin(target)
    assert oracle.check(target, path, b"")
    assert len(calls) == 2


OF_THE_FILE = b"ccolorsys\nrgb_to_hls\n."  # a pickle that names a module


def _import_statement(path):
    import colorsys

    del colorsys


def _slow_import_statement(path):
    if "colorsys" not in sys.modules:
        _slow(path)
    _import_statement(path)


IMPORTS_OF_THE_FILE = {
    "pickle": lambda path: pickle.loads(path.read_bytes()),
    "pickle in Python": lambda path: pickle._loads(path.read_bytes()),
    "import_module": lambda path: importlib.import_module(path.read_bytes()[1:9].decode()),
    "__import__": lambda path: __import__(path.read_bytes()[1:9].decode()),
}


@pytest.mark.parametrize("how", IMPORTS_OF_THE_FILE)
def test_an_import_that_the_file_names_is_a_finding(how, tmp_path, monkeypatch):
    oracle.watch()
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(oracle.Finding, match=r"import|find_class|exec"):
        oracle.check(Target("file", IMPORTS_OF_THE_FILE[how], list), tmp_path / "file", OF_THE_FILE)


def test_a_pickle_that_names_what_is_already_imported_is_a_finding(tmp_path):
    oracle.watch()
    import colorsys  # noqa: F401

    with pytest.raises(oracle.Finding, match="find_class"):
        oracle.check(Target("file", IMPORTS_OF_THE_FILE["pickle"], list), tmp_path / "file", OF_THE_FILE)


@pytest.mark.parametrize("read", [_import_statement, _slow_import_statement])
def test_a_late_import_by_installed_code_is_none_of_the_file(read, tmp_path, monkeypatch):
    oracle.watch()
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert oracle.check(Target("file", read, list), tmp_path / "file", OF_THE_FILE)


def test_an_import_does_not_excuse_what_follows(tmp_path, monkeypatch):
    def read(path):
        _import_statement(path)
        exec("1")

    oracle.watch()
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(oracle.Finding, match="exec"):
        oracle.check(Target("file", read, list), tmp_path / "file", b"")


def test_mutations_are_those_of_their_seed():
    some = [list(itertools.islice(mutate([b"abcdef"], seed), 50)) for seed in (1, 1, 2)]
    assert some[0] == some[1] != some[2]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_target_of_the_c_library_compiles():
    include = [f"-I{HERE.parents[1] / 'csrc' / part}" for part in ("include", "src")]
    subprocess.run(["c++", "-std=c++17", "-fsyntax-only", *include, HERE / "fuzz_fmn.cpp"], check=True)
