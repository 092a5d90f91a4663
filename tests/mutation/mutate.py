"""Mutation testing of the files that decide numbers: see README.md in this folder.

    python tests/mutation/mutate.py ROOM [--seconds 4] [--again]

It imports the package and collects the tests once. A baseline run notes which tests reach which lines, and how long
they take. Each mutant is then a forked process: it puts the mutated functions and constants into the imported module,
and runs the tests that reach the changed lines, up to the first failure. Those come first that failed on other mutants
of the function, then the fastest. `build/mutation` holds the baseline and the verdicts; a second run continues, and
`--again` tries the survivors on tests that they have not met.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
import types
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import coverage
import pytest
from mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {  # the files of a room in the order of the run, and the tests that should fail on a mutant
    "metrics": ("curves matrix scores samples groups answers history overview", "metrics"),
    "fusion": (
        "epsilon methods mixtures plan pool fuse baselines expectation probabilities",
        "fusion benchmarks/test_paper.py::TestCommittedResults::test_the_rule_is_the_fitted_one",
    ),
    "runs": (
        "checkpoints retention",
        "runs/test_checkpoints.py runs/test_checkpoint_parts.py runs/test_retention.py runs/test_recorder.py",
    ),
}
# Tests of seconds that damage a file bit by bit, or watch time, memory and threads.
SLOW = "every_bit or TestKilled or number_of_threads or resident_memory or many_draws"
FIXTURE_SECONDS = 2.0  # a training that a forked process must repeat


class Baseline:
    """Duration of each test, and the lines of the files that it reaches; kept in a file."""

    def __init__(self, work: Path, files: list[str]) -> None:
        self.file, self.files = work / "baseline.json", files
        stored = json.loads(self.file.read_text()) if self.file.exists() else {"hashes": {}, "tests": {}}
        self.hashes = {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in files}
        changed = {file for file in files if stored["hashes"].get(file) != self.hashes[file]}
        self.tests = {name: test for name, test in stored["tests"].items() if not changed & test["lines"].keys()}

    def measure(self, items: list[pytest.Item]) -> None:
        """Run the tests that are not known yet."""
        new = [item for item in items if item.nodeid not in self.tests]
        reached = coverage.Coverage(data_file=None, include=[str(ROOT / file) for file in self.files])
        if new:
            reached.start()
        for item, following in zip(new, [*new[1:], None]):  # noqa: B905
            reached.switch_context(item.nodeid)
            began = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds = time.process_time() - began
            if item.session.testsfailed:
                sys.exit(f"{item.nodeid} fails without a mutation")
            self.tests[item.nodeid] = {"seconds": round(seconds, 4), "lines": {}}
        if new:
            reached.stop()
            self._note_lines(reached.get_data())
            self.tests = {item.nodeid: self.tests[item.nodeid] for item in items}
            self.file.write_text(json.dumps({"hashes": self.hashes, "tests": self.tests}))

    def _note_lines(self, data: coverage.CoverageData) -> None:
        for file in self.files:
            for line, names in data.contexts_by_lineno(str(ROOT / file)).items():
                for name in names:
                    if name in self.tests:
                        self.tests[name]["lines"].setdefault(file, []).append(line)

    def reaching(self, mutant: Mutant) -> list[str]:
        """Tests that run one of its lines; for lines that run at import, all tests of the file."""
        lines = {name: set(test["lines"].get(mutant.file, ())) for name, test in self.tests.items()}
        names = [name for name in lines if not lines[name].isdisjoint(mutant.lines)]
        return [name for name in lines if lines[name]] if mutant.at_import else names


def transplant(old: Any, new: Any, constants: bool) -> None:
    """Give the functions of the module or class `old` what those of `new` have; `old` itself also its constants."""
    for name, value in vars(new).items():
        current = vars(old).get(name)
        function, mutated = _function(current), _function(value)
        if function and mutated:
            function.__code__ = mutated.__code__
            function.__defaults__, function.__kwdefaults__ = mutated.__defaults__, mutated.__kwdefaults__
            function.__doc__ = mutated.__doc__
            _give_cells(function, mutated)
            if hasattr(current, "cache_clear"):
                current.cache_clear()
        elif isinstance(value, type) and value.__module__ == getattr(new, "__module__", new.__name__):
            transplant(current, value, constants)
        elif constants and not name.startswith("__") and not isinstance(value, types.ModuleType | type):
            for module in [old, *_package()] if isinstance(old, types.ModuleType) else [old]:
                if vars(module).get(name) is current:
                    setattr(module, name, value)


def _give_cells(old: types.FunctionType, new: types.FunctionType) -> None:
    """Give a function what another one has in its closure: `default_factory` of a dataclass."""
    cells = zip(new.__code__.co_freevars, old.__closure__ or (), new.__closure__ or (), strict=True)
    for name, cell, other in cells:
        if name != "__class__":  # of `super()`
            cell.cell_contents = other.cell_contents


def _package() -> list[types.ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("fmn_ref.")]


def _function(value: Any) -> types.FunctionType | None:
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    elif isinstance(value, classmethod | staticmethod):
        value = value.__func__
    value = getattr(value, "__wrapped__", value)  # of `cache`, `contextmanager`, and `__repr__` of a dataclass
    return value if isinstance(value, types.FunctionType) else None


def mutate(mutant: Mutant) -> None:
    """Put the mutant into the imported module."""
    name = mutant.file.removesuffix(".py").replace("/", ".")
    fresh = types.ModuleType(name)
    fresh.__package__, fresh.__file__ = name.rpartition(".")[0], str(ROOT / mutant.file)
    old, sys.modules[name] = sys.modules[name], fresh  # dataclasses look up their module
    try:
        exec(compile(mutant.code, fresh.__file__, "exec"), vars(fresh))
    finally:
        sys.modules[name] = old
    transplant(old, fresh, mutant.at_import)


def verdict(mutant: Mutant, items: list[pytest.Item], seconds: float) -> tuple[str, str]:
    """Run the tests on the mutant in a forked process: "killed", "timeout" or "survived", and the test that failed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        failed = Path(temporary, "failed")
        pid = os.fork()
        if not pid:
            _run_and_exit(mutant, items, int(3 * seconds) + 10, failed)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL):
            return "timeout", ""
        return ("killed", failed.read_text() if failed.exists() else "") if status else ("survived", "")


def _run_and_exit(mutant: Mutant, items: list[pytest.Item], limit: int, failed: Path) -> None:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        signal.alarm(10 * limit)  # waits take no processor time
        config = items[0].config
        config._tmp_path_factory._basetemp = failed.parent  # folders of its own
        config.pluginmanager.unregister(name="terminalreporter")
        config.option.tbstyle = "no"
        mutate(mutant)
        for item, following in zip(items, [*items[1:], None], strict=True):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if item.session.testsfailed:
                failed.write_text(item.nodeid)
                os._exit(1)
        os._exit(0)
    except BaseException:
        os._exit(2)


class Session:
    """The pytest plugin: runs mutants instead of tests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = ROOT / "build" / "mutation" / options.room
        self.work.mkdir(parents=True, exist_ok=True)
        self.verdicts = self.work / "verdicts.jsonl"
        self.files = [f"fmn_ref/{options.room}/{name}.py" for name in ROOMS[options.room][0].split()]

    def pytest_configure(self) -> None:
        """Let hypothesis stop at a failure, which need not be the shortest, and draw the same examples each time."""
        from hypothesis import Phase, settings

        settings.register_profile("mutation", phases=(Phase.explicit, Phase.generate), database=None, derandomize=True)
        settings.load_profile("mutation")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.baseline = Baseline(self.work, self.files)
        self.baseline.measure(session.items)
        self.items = {item.nodeid: item for item in session.items}
        training = {
            name for name, item in self.items.items() if {"run", "unbroken"} & {*getattr(item, "fixturenames", ())}
        }
        self.costs = {
            name: test["seconds"] + FIXTURE_SECONDS * (name in training) for name, test in self.baseline.tests.items()
        }
        self.known = stored_verdicts(self.verdicts)
        self.warm_up()
        gc.freeze()  # else a collection in a forked process copies all memory
        for file in self.files:
            self.check_untouched(file)
            failures: dict[str, Counter[str]] = defaultdict(Counter)
            for mutant in mutants(ROOT, file):
                if zlib.crc32("".join(mutant.key).encode()) < self.options.share * 2**32:
                    self.judge(mutant, failures[mutant.function])
        return True

    def warm_up(self) -> None:
        """Run some tests here, so that the forked processes find all backends imported and their kernels compiled."""
        tests = self.chosen(self.items, Counter(), 4)[0]
        for name, following in itertools.pairwise([*tests, tests[0]]):
            item = self.items[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=self.items[following])
        item.session._setupstate.teardown_exact(None)

    def check_untouched(self, file: str) -> None:
        """Exit if tests fail on the file itself, put into the module as a mutant is."""
        same = Mutant(file, "", "", "", range(1000), (ROOT / file).read_text(), at_import=True)
        tests, seconds = self.chosen(self.baseline.reaching(same), Counter(), 2)
        result, failed = verdict(same, [self.items[name] for name in tests], seconds)
        if result != "survived":
            sys.exit(f"{failed} fails on {file} itself, put into the module as a mutant is")

    def judge(self, mutant: Mutant, failures: Counter[str]) -> None:
        """Test a mutant that has no verdict yet, and store it."""
        before = self.known.get(mutant.key, {"tests": []})
        if "verdict" in before and not (self.options.again and before["verdict"] == "survived"):
            failures[before["failed"]] += 1
            return
        names = set(self.baseline.reaching(mutant)).difference(before["tests"])
        tests, seconds = self.chosen(names, failures, self.options.seconds)
        result, failed = verdict(mutant, [self.items[name] for name in tests], seconds) if tests else ("survived", "")
        failures[failed] += 1
        met = [*before["tests"], *tests] if result == "survived" else []
        record = {"key": mutant.key, "line": mutant.lines[0], "verdict": result, "failed": failed, "tests": met}
        with self.verdicts.open("a") as out:
            out.write(json.dumps(record) + "\n")

    def chosen(self, names: Iterable[str], failures: Counter[str], most: float) -> tuple[list[str], float]:
        """Tests that take `most` seconds together, in the order to run, and how long they take.

        The fastest come first, but of the parameters of a test each further one counts as slower: it shows less.
        """
        known: Counter[str] = Counter()
        order = {}
        for name in sorted(names, key=self.costs.__getitem__):
            known[name.partition("[")[0]] += 1
            order[name] = -failures[name], self.costs[name] * known[name.partition("[")[0]]
        tests, seconds = [], 0.0
        for name in sorted(order, key=order.__getitem__):
            if seconds < most:
                tests.append(name)
                seconds += self.costs[name]
        return tests, seconds


def stored_verdicts(file: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """The last verdict on each mutant."""
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines]
    return {tuple(record["key"]): record for record in records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--seconds", type=float, default=4, help="most time for the tests of a mutant")
    parser.add_argument("--share", type=float, default=1, help="part of the mutants, from 0 to 1: a random sample")
    parser.add_argument("--again", action="store_true", help="try survivors on tests that they have not met")
    session = Session(parser.parse_args())
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)  # of the processes that tests start
    os.chdir(ROOT / "tests")
    tests = ROOMS[session.options.room][1].split()
    pytest.main(["-qs", "-p", "no:cacheprovider", "-k", f"not ({SLOW})", *tests], plugins=[session])


if __name__ == "__main__":
    main()
