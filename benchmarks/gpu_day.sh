#!/usr/bin/env bash
# Measure all that needs a GPU, unattended, in pieces of at most nine minutes:
#
#   benchmarks/gpu_day.sh DATA OUT
#
# DATA is the folder of the data sets; only the experiments, which come last, need it. OUT is the folder of the results.
# A piece whose result is in OUT is skipped, so the same command resumes. Experiments resume from their last epochs.
# A piece that fails does not stop the next one. OUT/logs has a log of each piece, OUT/tables.md all tables so far.
# The exit status is 1 as long as a result is missing.
#
# OUT/middle may begin as a copy of results/middle: the pieces that it holds are not run again.
#
# Variables: LIMIT=590 ends the call after so many seconds. ONLY is a regular expression of the pieces that run. JOBS
# (default: the number of processors) is the number of networks that train at once in the experiments.
# PYTHON (python3) has fmn_ref installed. TOY=1 runs a small version of everything on the CPU, in about a minute.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 DATA OUT" >&2; exit 2; }
data=$1 out=$2 python=${PYTHON:-python3} limit=${LIMIT:-1000000} jobs=${JOBS:-$(nproc)} missing=0
mkdir -p "$out/logs"

finished() { # FILES: whether all of them are in OUT
  local file
  for file in $1; do [ -e "$out/$file" ] || return 1; done
}

piece() { # NAME TRIES FILES OPTION...: `fmn-ref bench OPTION...` writes FILES; a try ends after nine minutes
  local name=$1 tries=$2 results=$3 seconds status
  shift 3
  [[ $name =~ ${ONLY:-} ]] || return 0
  while ! finished "$results" && ((tries-- > 0)); do
    seconds=$((limit - SECONDS - 10)) status=0 # SECONDS counts from the start of this script
    ((seconds > 20)) || break
    ((seconds <= 530)) || seconds=530
    timeout -k 10 "$seconds" "$python" -P -m fmn_ref bench "$@" >>"$out/logs/$name.log" 2>&1 || status=$?
    echo "$name: status $status at $SECONDS s"
    ((status == 0)) || tail -n 1 "$out/logs/$name.log"
    find "$out" -mindepth 2 -name '*.md' -print0 | sort -z | xargs -0r tail -v -n +1 >"$out/tables.md"
    ((status == 124)) || break # 124: out of time; experiments resume
  done
  finished "$results" || { missing=$((missing + 1)); echo "$name: no result yet"; }
}

metric() { # NAME OPTION...
  piece "$1" 1 "$1/metric_tensors.json" metric --device "$device" -o "$out/$1" "${@:2}"
}

part() { # NAME: a part of `bench training`, on random images
  local folder=${1// /_}
  piece "$folder" 1 "$folder/training.json" training "${training[@]}" --only "^$1\$" -o "$out/$folder"
}

experiments() { # NAME SCALE REGEX OPTION...: the pieces of `bench paper` whose names match, several at once
  local names= list="import re, sys; from pathlib import Path; "
  list+="from fmn_ref.benchmarks.experiments.suite import all_pieces; "
  list+="[print(p.name) for p in all_pieces(sys.argv[1], Path(sys.argv[2])) if re.search(sys.argv[3], p.name)]"
  ((limit - SECONDS > 30)) && names=$("$python" -P -c "$list" "$2" "$data" "$3") || true
  if [ -z "$names" ]; then
    missing=$((missing + 1))
    echo "$1: not begun"
  else
    piece "$1" 50 "$(for name in $names; do echo "$2/pieces/$name.json"; done)" \
      paper --scale "$2" --device "$device" --data "$data" --only "$3" --clean --jobs "$jobs" -o "$out/$2" "${@:4}"
  fi
}

if [ -n "${TOY:-}" ]; then
  device=cpu training=(--device cpu --quick)
  metric metric --epochs 9 --samples 3000
  for name in "training mnist-small_cnn-32" distillation evaluation memory accuracy; do part "$name"; done
  experiments digits cpu '^digits-clean-augmented-0$' --quick
else
  device=cuda training=(--device cuda)
  metric metric
  part "training cifar100-resnet18-1024-augmented"
  part distillation
  part "training cifar100-resnet18-512-augmented"
  metric metric_ten_times --samples 12811670
  part evaluation
  part "training cifar100-resnet18-1024-augmented-default"
  part "training cifar100-resnet18-1024-augmented-max-autotune"
  for name in cifar100-small_cnn-128{-augmented,} mnist-small_cnn-128; do part "training $name"; done
  part memory
  part accuracy
  if [ -e "$data/cifar-100-binary/train.bin" ]; then
    experiments middle middle .
    experiments gpu_first_seed gpu '^cifar100-(clean|sym40)-augmented-0$'
    experiments gpu gpu '^cifar100-(clean|sym40)-'
  else
    missing=$((missing + 1))
    echo "no experiments: $data has no cifar-100-binary/train.bin"
  fi
fi
if ((missing > 0)); then
  echo "$missing results are missing: run the same command again"
  exit 1
fi
echo "all results are in $out"
