"""The C library: its own tests on each instruction set, real or emulated, and with sanitizers; projects that use it."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # pip's cmake, then the system's
CONSUMERS = {"C": ROOT / "docs" / "examples" / "forget_fraction.c", "CXX": ROOT / "tests" / "install" / "consumer.cpp"}
EXPECTED = {"C": "epoch accuracy      F_e\n    0 0.500000 0.250000\n    1 0.500000 0.000000\n", "CXX": "F_0 = 0.25\n"}

pytestmark = [
    pytest.mark.skipif(not shutil.which("cmake", path=PATH), reason="needs cmake"),
    pytest.mark.skipif(not shutil.which("cc") or not shutil.which("c++"), reason="needs a C and a C++ compiler"),
]


def needs(*programs):
    missing = [p for p in programs if not shutil.which(p, path=PATH)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


def run(*command, skip_status=None, **env):
    """Run a command, which must succeed; return what it prints, or None if it exits with `skip_status`."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, **both, timeout=600, env=os.environ | {"PATH": PATH} | env, check=False)
    if done.returncode == skip_status:
        return None
    assert done.returncode == 0, f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}"
    return done.stdout


def build(folder, *options, target="all"):
    run("cmake", "-S", ROOT, "-B", folder, *options)
    run("cmake", "--build", folder, "--parallel", "2", "--target", target)
    return folder


def at_fixed_addresses():
    """The prefix of such a command, where it works: older sanitizers fail at some of the random addresses."""
    command = ["setarch", platform.machine(), "-R"]
    works = shutil.which("setarch") and not subprocess.run([*command, "true"], check=False).returncode
    return command if works else []


def check(isa, *command, may_skip=False):
    """Run the library's test on an instruction set. It exits with 77 if the processor lacks it; tell whether it ran."""
    printed = run(*command, FMN_ISA=isa, skip_status=77 if may_skip else None)
    if printed is None:
        return False
    first, last = printed.splitlines()
    assert isa in first
    assert last == "ok"
    return True


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def prefix(built, tmp_path_factory):
    """The installed library, in another place than it was configured for."""
    folder = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", built, "--prefix", folder)
    return folder


def test_ctest(built):
    run("ctest", "--test-dir", built, "--output-on-failure", "--parallel", "2")


@pytest.mark.parametrize("language", CONSUMERS)
@pytest.mark.parametrize("how", ["find_package", pytest.param("pkg-config", marks=needs("pkg-config"))])
def test_installed(how, language, prefix, tmp_path):
    source, program = CONSUMERS[language], tmp_path / "consumer"
    if how == "find_package":
        options = [f"-DCMAKE_PREFIX_PATH={prefix}", f"-DLANGUAGE={language}", f"-DSOURCE={source}"]
        run("cmake", "-S", ROOT / "tests" / "install", "-B", tmp_path, *options)
        run("cmake", "--build", tmp_path)
    else:
        folder = next(prefix.glob("**/pkgconfig"))
        flags = run("pkg-config", "--cflags", "--libs", "--static", "fmn", PKG_CONFIG_PATH=str(folder)).split()
        run({"C": "cc", "CXX": "c++"}[language], source, *flags, "-o", program)
    np.save(tmp_path / "correct.npy", np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool))
    assert run(program, tmp_path / "correct.npy") == EXPECTED[language]


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(sanitizers, tmp_path):
    (tmp_path / "empty.cpp").write_text("int main() {}")
    command = at_fixed_addresses()
    trial = f"c++ -fsanitize={sanitizers} empty.cpp -o empty && {' '.join(command)} ./empty"
    if subprocess.run(trial, shell=True, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip(f"-fsanitize={sanitizers} does not work here")
    test = build(tmp_path / "build", f"-DFMN_SANITIZE={sanitizers}", target="test_fmn") / "test_fmn"
    ran = [isa for isa in ("base", "avx2", "avx512", "neon") if check(isa, *command, test, "1000", may_skip=True)]
    assert "base" in ran


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64 processor")
@pytest.mark.skipif(not os.path.exists("/usr/include/simde/x86/avx512.h"), reason="needs SIMDe (libsimde-dev)")
def test_simde(tmp_path):
    check("avx512", build(tmp_path, "-DFMN_SIMDE=ON", target="test_fmn") / "test_fmn", "1000")


@needs("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64")
def test_aarch64(tmp_path):
    options = ["SYSTEM_NAME=Linux", "SYSTEM_PROCESSOR=aarch64", "EXE_LINKER_FLAGS=-static"]
    options += ["C_COMPILER=aarch64-linux-gnu-gcc", "CXX_COMPILER=aarch64-linux-gnu-g++"]
    test = build(tmp_path, *(f"-DCMAKE_{o}" for o in options), target="test_fmn") / "test_fmn"
    for isa in ("neon", "base"):
        check(isa, "qemu-aarch64", test, "1000")
