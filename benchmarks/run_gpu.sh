#!/usr/bin/env bash
# Run tests and benchmarks on a GPU machine:
#
#   benchmarks/run_gpu.sh            compile, test, measure every number of summary.json, and tune (under 10 minutes)
#   benchmarks/run_gpu.sh tune       time every candidate launch, for flare_kernels/tables (under 9 minutes)
#   benchmarks/run_gpu.sh sweep N    run part N of the whole grid, which sweep.py splits into parts (under 9 minutes)
#
# Results go to benchmarks/results/<gpu>, or to the folder $OUT if it is set. Without an argument, the script writes
# only results.tar.gz to $OUT, and updates this file after each step and every 15 seconds. Each step has a time limit,
# and measurements made before the limit are kept. A sweep skips cases that have results of the same source files in
# benchmarks/results/<gpu> or in $OUT.
# The script installs nothing. It uses python3 (or $PYTHON) and the installed packages. Without git, set the commit with
# FLARE_COMMIT. FLARE_BENCH_SECONDS limits the time of a run without an argument (default 570). FLARE_BENCH_DRY=1 runs
# the steps with tiny sizes and without limits, also on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DRY=${FLARE_BENCH_DRY:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
if [ -n "$DRY" ]; then
  export FLARE_BENCH_GRID=tiny
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "run_gpu.sh needs a CUDA device that torch can see (FLARE_BENCH_DRY=1 runs tiny sizes without a GPU)"
  exit 2
fi
RESULTS=${OUT:-benchmarks/results/$("$PYTHON" -c 'import sys; sys.path.insert(0, "benchmarks"); import sweep; print(sweep.gpu_name())')}
source benchmarks/steps.sh

bench() { # bench SECONDS NAME FILE ARGUMENTS...
  local limit=$1 name=$2 file=$3
  shift 3
  step "$limit" "$name" "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds \
    --results "$RESULTS/$file" "$@"
}
if [ "${1:-}" = sweep ]; then
  part=${2:?"name the part to run; python benchmarks/sweep.py lists all parts"}
  [ -n "$DRY" ] || export FLARE_BENCH_GRID=full
  mkdir -p "$RESULTS"
  LOG="$RESULTS/sweep-$part.txt"
  : > "$LOG"
  bench 520 "part $part" "sweep-$part.json" benchmarks --part "$part"
  exit $status
fi

tune() { # tune SECONDS ARGUMENTS...: the table is updated after each entry
  local limit=$1
  shift
  step "$limit" tune "$PYTHON" -u -m flare bench --tune --overwrite --output "$RESULTS/launch-table.json" "$@"
}

if [ "${1:-}" = tune ]; then
  mkdir -p "$RESULTS"
  LOG="$RESULTS/tune.txt"
  : > "$LOG"
  # the time limit of --budget does not include compiling; a table that is written before the step's limit is kept
  tune 530 --budget 400 "${@:2}"
  exit $status
fi

begin
END=$((${FLARE_BENCH_SECONDS:-570} - 30)) # the remaining time is for the summary
GPU_TESTS="tests/test_models_on_cuda.py tests/kernels/test_cuda.py tests/test_source_cache_warm.py tests/experiments/test_measure.py
  tests/test_compile.py"

# 1. compile the kernels that the measurements launch
# 2. tests that need a GPU: whole models first, then every kernel
# 3. whole steps, projections, padded steps, the tuner
# 4. in the remaining time: the other questions, and the projections with the tuner's table
if [ -n "$DRY" ]; then
  step 0 "compile" "$PYTHON" benchmarks/precompile.py --jobs 1 --most 1
  step 0 "tests" "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_cuda.py
  bench 0 "whole steps" steps.json benchmarks/test_training_step.py -k "step/xlmr"
  bench 0 "projections" projections.json benchmarks/test_projection.py -k "xlmr-qv"
  [ -e /dev/nvidiactl ] && tune 0 --shapes xlm-r-large --tokens 512 --ranks 8 # a CPU has nothing to tune
  bench 0 "more" more.json benchmarks/test_decoding.py benchmarks/test_host_time.py -k "decode/xlmr/M1- or host/xlmr/plain"
else
  CORES=$(nproc)
  "$PYTHON" -c 'import xdist' 2> /dev/null && WORKERS="-n $((CORES < 16 ? CORES : 16))"
  step 40 "compile" "$PYTHON" benchmarks/precompile.py --seconds 30
  # shellcheck disable=SC2086
  step 90 "tests" "$PYTHON" -m pytest -q -p no:cacheprovider ${WORKERS:-} --maxfail=20 --continue-on-collection-errors \
    -k "gpu or kernels" $GPU_TESTS tests/kernels --ignore tests/kernels/test_aot.py --ignore tests/kernels/test_binder.py
  bench 210 "whole steps" steps.json benchmarks/test_training_step.py -k "not padded"
  bench 60 "projections" projections.json benchmarks/test_projection.py
  bench 90 "whole steps, padded" padded.json benchmarks/test_training_step.py -k padded
  tune 125 --budget 110
  bench 70 "more" more.json benchmarks/test_host_time.py benchmarks/test_decoding.py benchmarks/test_kernels.py \
    benchmarks/test_block.py
  if [ -s "$RESULTS/launch-table.json" ]; then
    FLARE_LAUNCH_TABLE="$RESULTS/launch-table.json" bench 50 "projections, tuned here" projections-tuned.json \
      benchmarks/test_projection.py -k "qv and plain"
  fi
fi

END=1000000
MEASURED=()
for name in steps padded projections more; do [ -f "$RESULTS/$name.json" ] && MEASURED+=("$RESULTS/$name.json"); done
if [ ${#MEASURED[@]} -gt 0 ]; then
  if "$PYTHON" -c 'import matplotlib' 2> /dev/null; then
    step 20 "table and figures" "$PYTHON" benchmarks/plot.py "${MEASURED[@]}" --output "$RESULTS"
  fi
  step 10 "summary.json" "$PYTHON" benchmarks/summary.py "${MEASURED[@]}" --output "$RESULTS/summary.json"
else
  echo "nothing was measured" | tee -a "$LOG"
  status=1
fi
outcomes
exit $status
