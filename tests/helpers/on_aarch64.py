"""Compute the digests of `result_digests.py` on an emulated aarch64 processor and compare them with this one's.

    python tests/helpers/on_aarch64.py FOLDER -o benchmarks/results/portability.json

It takes some minutes and 200 MB in FOLDER, which may be one of an earlier time: Debian's aarch64 Python, from its
packages, and the aarch64 wheel of this NumPy. It installs nothing. It needs Debian 12 or a relative, qemu-user,
g++-aarch64-linux-gnu and pybind11. It ends with an error if a digest differs, or a rounded number by more than 1e-12.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "helpers" / "result_digests.py"
EXPECTED = ROOT / "tests" / "data" / "digests.json"
TOOLS = ("qemu-aarch64", "aarch64-linux-gnu-g++", "apt-get", "dpkg")
PACKAGES = "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libpython3.11-dev libc6 libgcc-s1 libstdc++6"
PACKAGES += " zlib1g libssl3 libffi8 libexpat1 libbz2-1.0 liblzma5 libuuid1"
APT = """APT::Architecture "arm64"; APT::Architectures {{"arm64";}}; APT::Sandbox::User "root";
Dir::State "{0}/state"; Dir::State::status "{0}/status"; Dir::Cache "{0}/cache"; Acquire::Languages "none";
Dir::Etc::sourcelist "{0}/sources.list"; Dir::Etc::sourceparts "/dev/null";
"""
SOURCES = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main\n"
SETTINGS = [("cpp", "neon", 3), ("cpp", "base", 1), ("numpy", "", 2)]


def run(*command, **env):
    """Standard output of a command, which must succeed."""
    done = subprocess.run([*map(str, command)], env=os.environ | env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def unpack_python(folder):
    """Unpack Python of Debian 12, with lists and a state of apt's own, which leave the machine's packages alone."""
    for name in ("state/lists/partial", "cache/archives/partial", "debs", "root"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(SOURCES)
    (folder / "apt.conf").write_text(APT.format(folder))
    config = {"APT_CONFIG": str(folder / "apt.conf")}
    run("apt-get", "update", **config)
    run("sh", "-c", f"cd '{folder / 'debs'}' && apt-get download {PACKAGES}", **config)
    for deb in (folder / "debs").glob("*.deb"):
        run("dpkg", "-x", deb, folder / "root")


def unpack_numpy(folder):
    """Unpack the wheel of the NumPy that runs here."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)] + ["--python-version=3.11"]
    options = ["--only-binary=:all:", "--no-deps", "--dest", folder / "wheels", *platforms]
    run(sys.executable, "-m", "pip", "download", *options, f"numpy=={np.__version__}")
    for wheel in (folder / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "site")


def build_package(folder):
    """Copy the package and compile its kernels for aarch64, with the options of setup.py."""
    import pybind11

    package, include = folder / "package" / "fmn_ref", folder / "root" / "usr" / "include"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "fmn_ref", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "benchmarks"))
    headers = [
        pybind11.get_include(),
        include / "python3.11",
        include,
        ROOT / "csrc" / "include",
        ROOT / "csrc" / "src",
    ]
    options = ["-shared", "-fPIC", "-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden"]
    sources = [ROOT / "csrc" / "bindings" / "module.cpp", *sorted((ROOT / "csrc" / "src").glob("*.cpp"))]
    target = package / "kernels" / "_kernels.cpython-311-aarch64-linux-gnu.so"
    run("aarch64-linux-gnu-g++", *options, *(f"-I{h}" for h in headers), *sources, "-o", target)


def emulated(folder, *arguments, **env):
    """What aarch64's Python prints."""
    env |= {"PYTHONPATH": f"{folder / 'package'}:{folder / 'site'}", "PYTHONDONTWRITEBYTECODE": ""}
    return run("qemu-aarch64", "-L", folder / "root", folder / "root/usr/bin/python3.11", *arguments, **env)


def compared(folder, backend, isa, threads):
    """Groups of results whose digests differ on aarch64, and the largest relative difference of the numbers."""
    env = {
        "FMN_BACKEND": backend,
        "FMN_ISA": isa,
        "FMN_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
    }
    expected, found = json.loads(EXPECTED.read_text()), json.loads(emulated(folder, PROGRAM, **env))
    digests = expected["digests"], found["digests"]
    differ = [group for group in digests[0] | digests[1] if digests[0].get(group) != digests[1].get(group)]
    pairs = [np.array([found["values"][group], values]) for group, values in expected["values"].items()]
    distance = float(np.max([np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-300)) for a, b in pairs]))
    return {"groups": len(digests[0]), "different": differ, "largest_relative_difference": distance}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("-o", type=Path, help="write the comparison as JSON")
    options = parser.parse_args()
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise SystemExit(f"missing: {', '.join(missing)}")
    if not (options.folder / "site" / "numpy").exists():
        unpack_python(options.folder)
        unpack_numpy(options.folder)
    build_package(options.folder)
    code = (
        "import platform as p, numpy; print(f'{p.machine()}, Python {p.python_version()}, NumPy {numpy.__version__}')"
    )
    machines = [text.strip() for text in (run(sys.executable, "-c", code), emulated(options.folder, "-c", code))]
    found = {f"{b}{isa and ' '}{isa}, threads: {n}": compared(options.folder, b, isa, n) for b, isa, n in SETTINGS}
    content = {"format": "fmn_ref.portability", "version": 1, "machines": machines, "settings": found}
    text = json.dumps(content, indent=1)
    print(text)
    if options.o:
        options.o.write_text(text + "\n")
    if not all(r["different"] == [] and r["largest_relative_difference"] <= 1e-12 for r in found.values()):
        raise SystemExit("the numbers differ")


if __name__ == "__main__":
    main()
