"""Builds the compiled kernels; everything else is in pyproject.toml.

The extension is optional: without a C++ compiler the install succeeds and the package falls back to numba or NumPy
(`fmn-ref info` says which and why). FMN_REQUIRE_EXT=1 turns that fallback into an error, for CI and wheels.
"""

import os

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

kinds = ("base", "avx2", "avx512", "neon")  # each compiles to nothing on other processors
required = os.environ.get("FMN_REQUIRE_EXT", "0") not in ("", "0")
sources = [
    "bindings/module.cpp",
    *(f"src/{s}.cpp" for s in ("dispatch", "groups", "mixture", *(f"kernel_{k}" for k in kinds))),
]


class Build(build_ext):
    def run(self):
        super().run()
        built = all(os.path.exists(self.get_ext_fullpath(e.name)) for e in self.extensions)
        print(f"fmn_ref: compiled kernels {'built' if built else 'NOT built, falling back to numba or NumPy'}")


extension = Pybind11Extension(
    "fmn_ref.kernels._kernels",
    [f"csrc/{s}" for s in sources],
    include_dirs=["csrc/include", "csrc/src"],
    depends=[
        "csrc/include/fmn/fmn.h",
        "csrc/src/kernels.h",
        "csrc/src/loops.h",
        "csrc/src/blocks.h",
        "csrc/src/threads.h",
    ],
    cxx_std=17,  # explicit: letting pybind11 probe for it would fail without a compiler instead of falling back
    extra_compile_args=["/O2"] if os.name == "nt" else ["-O3", "-ffp-contract=off"],
    optional=not required,
)
setup(ext_modules=[extension], cmdclass={"build_ext": Build})
