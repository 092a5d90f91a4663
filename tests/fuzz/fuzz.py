"""Fuzz the readers of files, one after the other, and write what was found to benchmarks/results/fuzz.json.

    python tests/fuzz/fuzz.py [TARGET ...] [--seconds 60] [--executions N] [--seed 1] [--record]

Each target runs in a process of its own, a fork, with atheris where it is installed, else with the mutations of
mutations.py.
The target `c_api` needs clang.
"""

import argparse
import base64
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import oracle

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = ROOT / "benchmarks" / "results" / "fuzz.json"
C_API = "c_api"
ATHERIS = importlib.util.find_spec("atheris") is not None
_OPTIONS = ["-timeout=300", "-rss_limit_mb=6000", "-len_control=0"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--executions", type=int, default=(1 << 31) - 1, help="after which a target ends earlier")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="add the result to benchmarks/results/fuzz.json")
    args = parser.parse_args()
    for name in args.targets or [*_targets(), C_API]:
        found = fuzz_c(args) if name == C_API else fuzz_apart(name, args)
        print(json.dumps(found), flush=True)
        if args.record:
            add_to_record(found)


@functools.cache
def _targets():
    """All targets; the package is instrumented where atheris is installed."""
    if not ATHERIS:
        from targets import TARGETS

        return TARGETS
    import atheris

    with atheris.instrument_imports(include=["fmn_ref"]):
        from targets import TARGETS

        return TARGETS


def fuzz_apart(name, args):
    """Fuzz a target in a copy of this process, which a file may kill; all that was imported is there."""
    _targets()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        child = multiprocessing.get_context("fork").Process(target=fuzz_here, args=(name, args, Path(folder)))
        child.start()
        child.join()
        result, state = Path(folder, "result.json"), Path(folder, "state.json")
        if result.exists():
            return json.loads(result.read_text())
        found = json.loads(state.read_text()) if state.exists() else {"target": name}
        files = [p for p in Path(folder, "files").rglob("*") if p.is_file()]
        last = max(files, key=lambda p: p.stat().st_mtime).read_bytes() if files else b""
        what = f"exit status {child.exitcode}: {Path(folder, 'stderr').read_text(errors='replace')[-600:]}"
        found.setdefault("findings", []).append({"what": what, "input": base64.b64encode(last).decode()})
        return found


def fuzz_here(name, args, folder):
    """Fuzz a target in this process, until it ends."""
    os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY, 0o600), 2)
    engine = f"atheris {_version('atheris')}" if ATHERIS else "mutations"
    run = Fuzzing(name, _targets()[name], folder, args.seed, engine)
    run.begin(args.seconds, args.executions)
    if not ATHERIS:
        from mutations import mutate

        for data in mutate(run.seeds, args.seed):
            run.execute(data)
    import atheris

    options = [*_OPTIONS, f"-seed={args.seed}", "-max_len=16384", str(write_corpus(folder, run.seeds))]
    atheris.Setup([name, f"-dict={folder / 'words.dict'}", *options], run.execute)
    atheris.Fuzz()


def _version(package):
    from importlib.metadata import version

    return version(package)


def write_corpus(folder, seeds):
    """Write the first files, and the words of mutations.py as a dictionary of libFuzzer."""
    from mutations import WORDS

    (folder / "corpus").mkdir()
    for i, seed in enumerate(seeds):
        (folder / "corpus" / f"seed_{i}").write_bytes(seed)
    quoted = ("".join(f"\\x{b:02x}" for b in word) for word in WORDS if len(word) < 64)
    (folder / "words.dict").write_text("".join(f'"{word}"\n' for word in quoted))
    return folder / "corpus"


class Fuzzing:
    """Executions of one target, and each kind of finding once."""

    def __init__(self, name, target, folder, seed, engine):
        self.name, self.target, self.folder, self.seed, self.engine = name, target, folder, seed, engine
        self.executions = self.taken = 0
        self.most = math.inf
        self.findings, self.end, self.start = {}, math.inf, time.monotonic()
        (folder / "files").mkdir()
        os.chdir(folder / "files")
        self.path = target.prepare(folder / "files")
        self.seeds = target.seeds()

    def begin(self, seconds, most):
        """Read the first files: what is imported late is imported then."""
        for seed in self.seeds:
            self.execute(seed)
        warnings.simplefilter("ignore")
        self.findings.clear()
        self.executions = self.taken = 0
        oracle.watch()
        self.start = time.monotonic()
        self.end, self.most = self.start + seconds, most
        for seed in self.seeds:
            self.execute(seed)

    def execute(self, data):
        if (
            time.monotonic() > self.end or self.executions >= self.most
        ):  # libFuzzer ends the process without Python's own exit
            self.write("result.json")
            os._exit(0)  # libFuzzer does not let Python end
        self.executions += 1
        if self.executions % 10_000 == 0:  # for a process that is killed
            self.write("state.json")
        try:
            self.taken += oracle.check(self.target, self.path, self.target.mended(bytes(data)))
        except oracle.Finding as finding:
            cause = finding.__cause__
            where = traceback.extract_tb(cause.__traceback__)[-1] if cause else None
            kind = f"{re.sub(r'[0-9]+', '#', str(finding))[:60]} {where and (where.filename, where.lineno)}"
            if kind not in self.findings and len(self.findings) < 50:
                text = "".join(traceback.format_exception(finding)) if cause else str(finding)
                self.findings[kind] = {"what": text[-1500:], "input": base64.b64encode(bytes(data)).decode()[:20000]}
                self.write("state.json")

    def write(self, name):
        seconds = round(time.monotonic() - self.start)
        content = {"target": self.name, "engine": self.engine, "executions": self.executions, "taken": self.taken}
        content |= {"seconds": seconds, "seed": self.seed, "findings": list(self.findings.values())}
        (self.folder / name).write_text(json.dumps(content))


def fuzz_c(args):
    """Build the C library and its target with AddressSanitizer and UndefinedBehaviorSanitizer, and run libFuzzer."""
    with tempfile.TemporaryDirectory() as folder:
        sources = [*map(str, sorted((ROOT / "csrc" / "src").glob("*.cpp"))), str(HERE / "fuzz_fmn.cpp")]
        clang = os.environ.get("CLANGXX", "clang++")
        options = "-w -std=c++17 -O1 -g -ffp-contract=off -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all"
        include = [f"-I{ROOT / 'csrc' / part}" for part in ("include", "src")]
        subprocess.run(
            [clang, *options.split(), *include, *sources, "-pthread", "-o", f"{folder}/fuzz_fmn"], check=True
        )
        Path(folder, "corpus").mkdir()
        command = [
            f"{folder}/fuzz_fmn",
            f"-max_total_time={args.seconds}",
            f"-runs={args.executions}",
            f"-seed={args.seed}",
            "-max_len=256",
            f"{folder}/corpus",
        ]
        start = time.monotonic()
        done = subprocess.run(
            [*command, "-print_final_stats=1"], cwd=folder, capture_output=True, text=True, check=False
        )
        count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        findings = [] if done.returncode == 0 else [{"what": done.stderr[-3000:], "input": ""}]
        return {"target": C_API, "engine": "libFuzzer, ASan, UBSan", "executions": int(count[1]) if count else 0,
                "seconds": round(time.monotonic() - start), "seed": args.seed, "findings": findings}  # fmt: skip


def add_to_record(found):
    """Add a run; findings are kept without their input, which becomes a regression test."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": []}
    found["findings"] = [finding["what"].splitlines()[-1] for finding in found["findings"]]
    record["runs"].append(found)
    record["executions"] = sum(run.get("executions", 0) for run in record["runs"])
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
