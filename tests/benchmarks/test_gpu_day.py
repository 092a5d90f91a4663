"""benchmarks/gpu_day.sh: pieces that resume. A stand-in for Python plays a GPU; the toy size runs on the CPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fmn_ref.benchmarks.experiments.suite import all_pieces
from fmn_ref.benchmarks.speed import training

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_day.sh"
STAND_IN = """#!/usr/bin/env bash
# Writes the results that `python -P -m fmn_ref bench ...` would, and lists pieces: -P -c CODE SCALE DATA REGEX.
[ "$2" = -m ] || { grep -E -e "$6" "$NAMES/$4"; exit 0; }
echo "${@:5}" >>"$CALLS"
suite=$5
while [ $# -gt 0 ]; do
  case $1 in --only) only=$2 ;; --scale) scale=$2 ;; -o) out=$2 ;; esac
  shift
done
[ "$only" != "${FAILS:-}" ] || { echo "no memory"; exit 1; }
mkdir -p "$out/pieces"
case $suite in
  metric) touch "$out/metric_tensors.json" ;;
  training) touch "$out/training.json" ;;
  paper) # one more piece in each call, as if the time were out after it
    for name in $(grep -E -e "$only" "$NAMES/$scale"); do
      [ -e "$out/pieces/$name.json" ] || { touch "$out/pieces/$name.json"; exit 124; }
    done
    ;;
esac
echo "table of $suite" >"$out/$suite.md"
"""

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "timeout"))), reason="needs bash and timeout")


@pytest.fixture
def on_a_gpu(tmp_path):
    """Call the script with a stand-in for Python; return the exit status, what was printed, and the calls."""
    stand_in, calls = tmp_path / "python", tmp_path / "calls"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (tmp_path / "data" / "cifar-100-binary").mkdir(parents=True)
    (tmp_path / "data" / "cifar-100-binary" / "train.bin").touch()

    for scale in ("middle", "gpu"):
        (tmp_path / scale).write_text("".join(f"{piece.name}\n" for piece in all_pieces(scale, tmp_path)))

    def call(**variables):
        calls.write_text("")
        own = {"PYTHON": str(stand_in), "NAMES": str(tmp_path), "CALLS": str(calls)}
        status, text = run(tmp_path / "data", tmp_path / "out", **own, **variables)
        return status, text, calls.read_text().splitlines()

    return call


def run(data, out, **variables):
    names = ("TOY", "ONLY", "LIMIT", "JOBS")
    env = {k: v for k, v in os.environ.items() if k not in names} | variables
    done = subprocess.run([SCRIPT, data, out], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_a_piece_that_fails_stops_no_other_and_a_second_call_does_the_rest(on_a_gpu, tmp_path):
    status, text, calls = on_a_gpu(FAILS="^evaluation$")
    assert status == 1
    assert "evaluation: status 1" in text
    assert "no memory" in text
    assert "1 results are missing" in text
    assert calls[0].startswith("metric --device cuda")
    suites = [line.split()[0] for line in calls]
    assert suites.index("paper") > max(i for i, name in enumerate(suites) if name == "training")
    done = {path.stem for path in (tmp_path / "out").glob("*/pieces/*.json")}
    assert {f"cifar100-{noise}-augmented-{seed}" for noise in ("clean", "sym40") for seed in range(3)} < done
    assert {piece.name for piece in all_pieces("middle", tmp_path)} < done
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert all(f"table of {name}" in tables for name in ("metric", "training"))
    status, text, calls = on_a_gpu()
    assert status == 0
    assert ["--only ^evaluation$" in line for line in calls] == [True]
    assert on_a_gpu() == (0, f"all results are in {tmp_path / 'out'}\n", [])


def test_experiments_out_of_time_resume_in_the_same_call(on_a_gpu):
    status, text, calls = on_a_gpu(ONLY="^gpu_first_seed$", JOBS="3")
    assert (status, len(calls), len(set(calls))) == (0, 2, 1)
    assert "--jobs 3" in calls[0]
    assert text.count("status 124") == 2


def test_a_call_without_time_begins_nothing(on_a_gpu):
    status, text, calls = on_a_gpu(LIMIT="5")
    assert (status, calls) == (1, [])
    assert "metric: no result yet" in text
    assert "middle: not begun" in text


def test_every_part_of_the_training_benchmark_has_a_piece(on_a_gpu):
    calls = on_a_gpu(ONLY="^(training|distill|eval|memory|accuracy)")[2]
    asked = [re.search(r"--only (\^.*\$)", line)[1] for line in calls]
    names = list(training.parts(None, False, "cuda"))
    assert sorted(name for only in asked for name in names if re.search(only, name)) == sorted(names)


def test_the_experiments_need_data(on_a_gpu, tmp_path):
    (tmp_path / "data" / "cifar-100-binary" / "train.bin").unlink()
    status, text, calls = on_a_gpu()
    assert status == 1
    assert "no experiments" in text
    assert not [line for line in calls if line.startswith("paper")]


def test_the_toy_size_on_the_cpu(tmp_path):
    """Two pieces of it; the whole takes a minute."""
    options = {"PYTHON": sys.executable, "TOY": "1", "ONLY": "^metric$|digits"}
    status, text = run(tmp_path, tmp_path / "out", **options)
    assert status == 0, text
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| all pairs | kernel |" in tables
    assert "## digits, augmented" in tables
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status, text = run(tmp_path, tmp_path / "out", **options)
    assert (status, text) == (0, f"all results are in {tmp_path / 'out'}\n")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
