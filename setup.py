"""Builds the compiled kernels; everything else is in pyproject.toml.

The extension is optional: without a C++ compiler the install succeeds and the package falls back to numba or NumPy
(`fmn-ref info` says which and why). FMN_REQUIRE_EXT=1 turns that fallback into an error, for CI and wheels.
FMN_NO_EXT=1 leaves the extension out: the wheel is then py3-none-any.

Wheels and sdists are reproducible: the same source gives the same bytes in any folder, if SOURCE_DATE_EPOCH is set.
"""

import gzip
import io
import os
import tarfile
import time
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.sdist import sdist

kinds = ("base", "avx2", "avx512", "neon")  # each compiles to nothing on other processors
required, left_out = (os.environ.get(f"FMN_{name}_EXT", "0") not in ("", "0") for name in ("REQUIRE", "NO"))
if required and left_out:
    raise SystemExit("FMN_REQUIRE_EXT and FMN_NO_EXT exclude each other: unset one")
files = "dispatch", "groups", "mixture", *(f"kernel_{k}" for k in kinds)
sources = ["bindings/module.cpp", *(f"src/{s}.cpp" for s in files)]


class Build(build_ext):
    def run(self):
        super().run()
        built = all(os.path.exists(self.get_ext_fullpath(e.name)) for e in self.extensions)
        print(f"fmn_ref: compiled kernels {'built' if built else 'NOT built, falling back to numba or NumPy'}")


class Sdist(sdist):
    """An archive whose entries have no owner, one time, and the order of their names."""

    def make_archive(self, base_name, *args, **options):
        when, archive = int(os.environ.get("SOURCE_DATE_EPOCH", time.time())), io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted(p for p in Path(os.path.basename(base_name)).rglob("*") if p.is_file()):
                entry = tarfile.TarInfo(path.as_posix())
                entry.size, entry.mtime = path.stat().st_size, when
                entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
                tar.addfile(entry, io.BytesIO(path.read_bytes()))
        Path(f"{base_name}.tar.gz").write_bytes(gzip.compress(archive.getvalue(), mtime=when))
        return f"{base_name}.tar.gz"


# No debug information and no path of the folder of the build: both differ from build to build.
unix_flags = ["-O3", "-ffp-contract=off", "-g0", f"-ffile-prefix-map={os.getcwd()}=."]
extension = Pybind11Extension(
    "fmn_ref.kernels._kernels",
    [f"csrc/{s}" for s in sources],
    include_dirs=["csrc/include", "csrc/src"],
    depends=[
        "csrc/include/fmn/fmn.h",
        "csrc/src/kernels.h",
        "csrc/src/loops.h",
        "csrc/src/ends.h",
        "csrc/src/sample_loops.h",
        "csrc/src/blocks.h",
        "csrc/src/threads.h",
    ],
    cxx_std=17,  # explicit: letting pybind11 probe for it would fail without a compiler instead of falling back
    extra_compile_args=["/O2"] if os.name == "nt" else unix_flags,
    extra_link_args=["/Brepro"] if os.name == "nt" else [],
    optional=not required,
)
setup(ext_modules=[] if left_out else [extension], cmdclass={"build_ext": Build, "sdist": Sdist})
