"""Install the package into empty environments, in every way, and use it there; write the table of docs/installation.md.

    python tests/install/clean_room.py [-o benchmarks/results] [--only checkout editable ...]

Needs dist/ as `.ci/release --light` leaves it; `make clean-room` does both. Every row has a new virtual environment.
What the row leaves out is not installed; without a compiler, PATH names no other folder. With -o, each row goes into
clean_room.json there and into the page; rows that are there already are not repeated.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fmn_ref.reporting.tables import markdown_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "installation.md"
CHECKOUTS = {"checkout": [], "editable": ["-e"]}  # options of pip before the folder
FILES = {"sdist": "*.tar.gz", "wheel": "*-linux_*.whl", "pure wheel": "*-none-any.whl"}
NAMES = {"editable": "editable checkout", "wheel": "wheel with kernels", "pure wheel": "wheel without kernels"}
COMPLETE, NO_NUMBA, NO_TORCH, NEITHER = [], ["numba"], ["torch"], ["numba", "torch"]
ROWS = [  # source, with a compiler (None: nothing is compiled), what is left out
    ("checkout", True, [NO_NUMBA, NO_TORCH, NEITHER]),
    ("checkout", False, [COMPLETE, NO_TORCH, NEITHER]),
    ("sdist", True, [NO_NUMBA, NEITHER]),
    ("sdist", False, [NO_TORCH, NEITHER]),
    ("editable", True, [NO_NUMBA, NEITHER]),
    ("editable", False, [NO_TORCH, NEITHER]),
    ("wheel", None, [COMPLETE, NEITHER]),
    ("pure wheel", None, [COMPLETE, NO_NUMBA, NO_TORCH, NEITHER]),
]
NUMBA_CACHE = (".nbi", ".nbc")  # numba writes them beside its source; pip leaves them
INHERITED = ("PIP_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy", "HOME", "TMPDIR", "LANG")


def rows():
    return [{"source": s, "compiler": c, "without": w} for s, c, left_out in ROWS for w in left_out]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*CHECKOUTS, *FILES], default=[*CHECKOUTS, *FILES])
    parser.add_argument("--torch", type=Path, help="site-packages with torch, to link to (default: installed once)")
    args = parser.parse_args()
    file = args.output and args.output / "clean_room.json"
    record = json.loads(file.read_text()) if file and file.exists() else new_record()
    done = [{key: row[key] for key in ("source", "compiler", "without")} for row in record["rows"]]
    pending = [row for row in rows() if row["source"] in args.only and row not in done]
    with tempfile.TemporaryDirectory(prefix="fmn_torch_") as shared:
        torch = args.torch or torch_alone(pending, Path(shared))
        for row in pending:
            with tempfile.TemporaryDirectory(prefix="fmn_clean_room_") as folder:
                record["rows"].append(row | installed(row, Path(folder), torch))
            print(json.dumps(record["rows"][-1]), flush=True)
            if file:
                write(file, record)
    print(markdown(record))
    return 0 if all(row["faults"] == [] for row in record["rows"]) else 1


def torch_alone(pending, folder):
    """Install torch, without the package, if a row needs it; return the folder that the rows link to."""
    if all("torch" in row["without"] for row in pending):
        return None
    Room(folder, None).pip("install", "torch")
    return next(folder.glob("env/lib/*/site-packages"))


def new_record():
    made = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    return {"format": "fmn_ref.clean-room", "version": 1, **made, "rows": []}


def write(file, record):
    """Write the record, in the order of the rows, and the table."""
    order = [(row["source"], row["compiler"], row["without"]) for row in rows()]
    record["rows"].sort(key=lambda row: order.index((row["source"], row["compiler"], row["without"])))
    file.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), record))


def installed(row, folder, torch):
    """Install one row's source, use it elsewhere, uninstall it; return what was found."""
    room, extra = Room(folder, row["compiler"]), [p for p in ("numba", "torch") if p not in row["without"]]
    if "torch" in extra:
        room.link(torch)
    start = time.perf_counter()
    output = install(room, room.source(row["source"]), extra)
    found = {"seconds": round(time.perf_counter() - start), "load": round(os.getloadavg()[0], 1)}
    room.check("the install is quiet", len(output.splitlines()) < 60 and "error" not in output.lower(), output)
    present = {line.split("==")[0] for line in room.pip("freeze", "--all").splitlines()}
    room.check("what is left out is not there", not present & set(row["without"]), str(present))
    compiled = row["compiler"] or row["source"] == "wheel"
    found |= use(room, "cpp" if compiled else "numba" if "numba" in extra else "numpy")
    room.pip("uninstall", "-y", "fmn_ref")
    left = {str(p.relative_to(folder)) for p in folder.glob("env/**/*") if p.is_file() and p.suffix not in NUMBA_CACHE}
    room.check("nothing is left", not any(re.search("fmn[_-]ref", name) for name in left), str(sorted(left)))
    return found | {"faults": room.faults}


def install(room, source, extra):
    """Install as the page says; return what pip printed."""
    if "torch" not in extra:
        return room.pip("install", "numpy", "tqdm", *extra) + room.pip("install", "--no-deps", *source)
    source[-1] += "[numba]" * ("numba" in extra)
    return room.pip("install", *source)


def use(room, backend):
    """Run check_wheel.py and `fmn-ref info`; return what works, and how large the environment is."""
    works = re.findall(r"^(\w+): works$", room.run("python", str(HERE / "check_wheel.py"), backend), re.MULTILINE)
    found = json.loads(room.run("fmn-ref", "info", "--json") or "{}")
    size = sum(p.stat().st_size for p in room.folder.glob("env/lib/*/site-packages/**/*") if p.is_file())
    return {"backend": found.get("name"), "works": works, "megabytes": round(size / 1e6)}


class Room:
    """An empty environment in a folder, and the commands that run in it from a folder beside it."""

    def __init__(self, folder, compiler):
        self.folder, self.faults = folder, []
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.variables = {k: v for k, v in os.environ.items() if k.startswith(INHERITED)}
        self.variables["PIP_NO_COMPILE"] = "1"  # most of the time otherwise
        self.variables["PATH"] = str(folder / "env" / "bin")
        if compiler:
            self.variables["PATH"] += f":{os.environ['PATH']}"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True, env=self.variables)

    def link(self, packages):
        """Give the environment packages that pip installed elsewhere, by hard links: torch has 12 000 files."""
        (here,) = self.folder.glob("env/lib/*/site-packages")
        shutil.copytree(packages, here, copy_function=os.link, dirs_exist_ok=True, ignore=_of_pip)

    def source(self, name):
        """What pip is to install; a checkout is copied into a folder with a name that is awkward."""
        if name in FILES:
            (file,) = (ROOT / "dist").glob(FILES[name])
            return [str(file)]
        copy = self.folder / "a checkout, é文"
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for path in filter(None, subprocess.check_output(listed, text=True).split("\0")):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, copy / path)
        return [*CHECKOUTS[name], str(copy)]

    def pip(self, command, *arguments):
        constraints = ["-c", str(ROOT / "constraints.txt")] if command == "install" else []
        return self.run("python", "-m", "pip", command, *constraints, *arguments)

    def run(self, program, *arguments):
        """Run a program of the environment; return what it printed. A failure is a fault."""
        command = [str(self.folder / "env" / "bin" / program), *arguments]
        options = {"cwd": self.elsewhere, "env": self.variables, "stdin": subprocess.DEVNULL, "text": True}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options)
        self.check(f"{program} {' '.join(arguments)}", done.returncode == 0, done.stdout)
        return done.stdout

    def check(self, what, holds, shown):
        if not holds:
            print(f"{what}:\n{shown}", file=sys.stderr)
            self.faults.append(what.replace(str(self.folder), "").replace(str(ROOT), ""))


def _of_pip(folder, names):
    """What every new environment has."""
    return [n for n in names if n.startswith(("pip", "setuptools", "pkg_resources", "_distutils", "distutils-"))]


def markdown(record):
    """The table of the page."""
    columns = ["installed from", "compiler", "left out", "kernels", "metrics, fusion", "training", "MB"]
    cells = {True: "yes", False: "no", None: "not needed"}
    lines = []
    for r in record["rows"]:
        works = cells[{"metrics", "fusion"} <= set(r["works"])], cells["training" in r["works"]]
        named = [NAMES.get(r["source"], r["source"]), cells[r["compiler"]], ", ".join(r["without"]) or "nothing"]
        lines.append([*named, f"`{r['backend']}`", *works, str(r["megabytes"])])
    return markdown_table(columns, lines, n_text=6)


def with_table(page, record):
    """The text of the page with the record's table between its two marks."""
    before, start, rest = page.partition("<!-- table: installs -->\n")
    return before + start + markdown(record) + rest[rest.index("<!-- end -->") :]


if __name__ == "__main__":
    sys.exit(main())
