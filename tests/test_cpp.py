"""The C library: built with CMake, its own tests, and a project that finds the installed library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # pip's cmake, then the system's


@pytest.mark.skipif(not shutil.which("cmake", path=PATH), reason="needs cmake")
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")
def test_build_test_install_and_consume(tmp_path):
    def cmake(*args):
        subprocess.run(args, check=True, capture_output=True, timeout=300, env=os.environ | {"PATH": PATH})

    build, prefix = tmp_path / "build", tmp_path / "prefix"
    cmake("cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    cmake("cmake", "--build", build)
    cmake("ctest", "--test-dir", build, "--output-on-failure")
    cmake("cmake", "--install", build)
    consumer = tmp_path / "consumer"
    cmake("cmake", "-S", ROOT / "tests" / "install", "-B", consumer, f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("cmake", "--build", consumer)
    done = subprocess.run(consumer / "consumer", check=True, capture_output=True, text=True)
    assert done.stdout == "F_0 = 0.25\n"
