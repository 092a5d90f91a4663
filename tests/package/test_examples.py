"""The examples in docs/examples print the same table for the same file, and refuse a bad one by name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
LANGUAGES = [
    "c",
    "cpp",
    pytest.param("rust", marks=pytest.mark.skipif(not shutil.which("rustc"), reason="needs rustc")),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with the examples in C, C++ and, where there is a compiler, Rust, with the library's sources."""
    if not shutil.which("cc") or not shutil.which("c++"):
        pytest.skip("needs a C and a C++ compiler")
    folder = tmp_path_factory.mktemp("compiled")
    flags = ["-O1", "-pthread", "-I", ROOT / "csrc" / "include", "-I", ROOT / "csrc" / "src"]
    cxx = ["c++", "-std=c++17", *flags]

    def run(*command):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr

    run(*cxx, "-c", *sorted((ROOT / "csrc" / "src").glob("*.cpp")))
    library = sorted(folder.glob("*.o"))
    run("cc", "-std=c11", *WARNINGS, *flags, "-c", EXAMPLES / "forget_fraction.c", "-o", "c.o")
    run(*cxx, *WARNINGS, "-c", EXAMPLES / "forget_fraction.cpp", "-o", "cpp.o")
    for name in ("c", "cpp"):
        run(*cxx, f"{name}.o", *library, "-o", name)
    if shutil.which("rustc"):
        run("ar", "rcs", "libfmn.a", *library)
        run(
            "rustc",
            "-D",
            "warnings",
            "-L",
            folder,
            "-l",
            "static=fmn",
            "-l",
            "stdc++",
            EXAMPLES / "forget_fraction.rs",
            "-o",
            "rust",
        )
    return folder


def run(*command, n_ranks=1):
    """The process, run without a launcher as the only rank of its group, or by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    command = [sys.executable, *(launcher if n_ranks > 1 else []), *command] if command[0].suffix == ".py" else command
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (alone if n_ranks == 1 else {})
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)


def table(correct):
    lines = ["epoch accuracy      F_e"]
    for epoch, row in enumerate(correct):
        lines.append(f"{epoch:5d} {row.sum() / row.size:.6f} {(row & ~correct[-1]).sum() / row.size:.6f}")
    return "\n".join(lines) + "\n"


def saved(path, correct, version=(1, 0)):
    with open(path, "wb") as f:
        np.lib.format.write_array(f, correct, version)
    return path


def header_and_150_bytes(path, shape):
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|b1", "fortran_order": False, "shape": shape})
        f.write(bytes(150))


def check(example, path, correct, *args, **kwargs):
    done = run(example, path, *args, **kwargs)
    assert (done.returncode, done.stdout) == (0, table(correct)), done.stderr


@pytest.mark.parametrize("name", LANGUAGES)
def test_compiled(name, compiled, tmp_path, rng):
    for shape in [(1, 1), (2, 7), (3, 8), (7, 1003), (4, 8193), (300, 65), (2, 3_000_001)]:
        correct = rng.random(shape) < 0.6
        check(compiled / name, saved(tmp_path / "correct.npy", correct), correct)
    check(compiled / name, saved(tmp_path / "correct.npy", correct, (2, 0)), correct)


def test_the_guide(compiled):
    """The program of docs/howto/c-library.md prints what stands below it."""
    text = (ROOT / "docs" / "howto" / "c-library.md").read_text()
    code, printed = re.search(r"```c\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL).groups()
    (compiled / "guide.c").write_text(code)
    flags = ["-std=c11", *WARNINGS, "-I", ROOT / "csrc" / "include"]
    subprocess.run(["cc", *flags, "-c", "guide.c", "-o", "guide_c.o"], cwd=compiled, check=True)
    library = [path for path in compiled.glob("*.o") if path.name not in ("c.o", "cpp.o", "guide_c.o")]
    subprocess.run(["c++", "guide_c.o", *library, "-pthread", "-o", "guide"], cwd=compiled, check=True)
    assert run(compiled / "guide").stdout == printed


def test_dask(tmp_path, rng):
    pytest.importorskip("dask.array")
    correct = rng.random((7, 1003)) < 0.6
    path = saved(tmp_path / "correct.npy", correct)
    check(EXAMPLES / "dask_array.py", path, correct)
    check(EXAMPLES / "dask_array.py", path, correct, "--block", "100")


def test_torch_distributed(tmp_path, rng):
    correct = rng.random((7, 1003)) < 0.6
    check(EXAMPLES / "torch_distributed.py", saved(tmp_path / "correct.npy", correct), correct, n_ranks=2)


def test_torch_distributed_wants_a_sample_per_rank(tmp_path):
    path = saved(tmp_path / "correct.npy", np.ones((3, 1), bool))
    done = run(EXAMPLES / "torch_distributed.py", path, n_ranks=2)
    assert done.returncode == 1
    assert f"{path}: expected (n_epochs, n_samples) with a sample for each of 2 ranks, got (3, 1)" in done.stderr


BAD = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("1,0,1\n0,1,1\n"),
    "a folder": lambda path: path.mkdir(),
    "header cut": lambda path: path.write_bytes(saved(path, np.ones((3, 50), bool)).read_bytes()[:100]),
    "data cut": lambda path: path.write_bytes(saved(path, np.ones((3, 50), bool)).read_bytes()[:-1]),
    "version 3.0": lambda path: saved(path, np.ones((3, 50), bool), (3, 0)),
    "float": lambda path: np.save(path, np.ones((3, 50))),
    "uint8": lambda path: np.save(path, np.ones((3, 50), np.uint8)),
    "structured": lambda path: np.save(path, np.ones((3, 50), [("descr", bool)])),
    "Fortran order": lambda path: np.save(path, np.ones((3, 50), bool, order="F")),
    "one dimension": lambda path: np.save(path, np.ones(50, bool)),
    "three dimensions": lambda path: np.save(path, np.ones((3, 5, 10), bool)),
    "no epochs": lambda path: np.save(path, np.ones((0, 50), bool)),
    "no samples": lambda path: np.save(path, np.ones((3, 0), bool)),
    "negative": lambda path: header_and_150_bytes(path, (-3, -50)),
    "more than memory": lambda path: header_and_150_bytes(path, (1 << 30, 1 << 31)),
    "product overflows": lambda path: header_and_150_bytes(path, (1 << 33, 1 << 33)),
    "number overflows": lambda path: header_and_150_bytes(path, (1 << 64, 1)),
}


def check_refused(example, path, write):
    write(path)
    done = run(example, path)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith(f"{path}: "), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", LANGUAGES)
def test_compiled_refuse(name, bad, compiled, tmp_path):
    check_refused(compiled / name, tmp_path / "correct.npy", BAD[bad])


@pytest.mark.parametrize(
    ("name", "bad"),  # NumPy's own checks are not ours to test: one of each kind that it, or fmn, refuses
    [("dask_array.py", bad) for bad in ("missing", "text", "float", "one dimension")]
    + [("torch_distributed.py", "data cut")],
)
def test_python_refuses(name, bad, tmp_path):
    if name == "dask_array.py":
        pytest.importorskip("dask.array")
    check_refused(EXAMPLES / name, tmp_path / "correct.npy", BAD[bad])
