#!/usr/bin/env bash
# On a GPU machine:
#
#   benchmarks/run_gpu.sh            the tests that run kernels, then every number of summary.json; under 9 minutes
#   benchmarks/run_gpu.sh tune       times every candidate launch; launch-table.json for flare_kernels/tables; under 9 minutes
#   benchmarks/run_gpu.sh sweep N    part N of the whole grid (python benchmarks/sweep.py lists the parts); under 9 minutes
#
# Results go to the folder $OUT, else to benchmarks/results/<gpu>. Each step has a time limit of its own, and what was
# measured before one ran out is kept. A sweep skips cases that have a result of the same sources in either folder.
# Nothing is installed: it takes python3 (or $PYTHON) and the packages that are there. Where there is no git, name the
# commit: FLARE_COMMIT=... . FLARE_BENCH_DRY=1 takes the same path with tiny sizes, on a CPU too.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DRY=${FLARE_BENCH_DRY:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
if [ -n "$DRY" ]; then
  export FLARE_BENCH_GRID=tiny
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "run_gpu.sh needs a CUDA device that torch can see (FLARE_BENCH_DRY=1 runs tiny sizes without)"
  exit 2
fi
RESULTS=${OUT:-benchmarks/results/$("$PYTHON" -c 'import sys; sys.path.insert(0, "benchmarks"); import sweep; print(sweep.gpu_name())')}
mkdir -p "$RESULTS"
status=0

# step SECONDS NAME COMMAND...: run with a limit, log, go on whatever happens
step() {
  local limit=$1 name=$2
  shift 2
  echo "== $name (at most ${limit}s)" | tee -a "$LOG"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$LOG"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] && return
  [ "$code" -eq 124 ] && echo "== $name: stopped after ${limit}s; what was measured is kept" | tee -a "$LOG"
  status=1
}
bench() { # bench SECONDS NAME FILE ARGUMENTS...
  local limit=$1 name=$2 file=$3
  shift 3
  step "$limit" "$name" "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds \
    --results "$RESULTS/$file" "$@"
}

if [ "${1:-}" = sweep ]; then
  part=${2:?"which part? python benchmarks/sweep.py lists them"}
  [ -n "$DRY" ] || export FLARE_BENCH_GRID=full
  LOG="$RESULTS/sweep-$part.txt"
  : > "$LOG"
  bench 520 "part $part" "sweep-$part.json" benchmarks --part "$part"
  exit $status
fi

if [ "${1:-}" = tune ]; then
  LOG="$RESULTS/tune.txt"
  : > "$LOG"
  # compiling is not timed by --budget: the limit of the step keeps what was found by then
  step 530 "tune" "$PYTHON" -u -m flare bench --tune --overwrite --output "$RESULTS/launch-table.json" --budget 400 "${@:2}"
  exit $status
fi

LOG="$RESULTS/log.txt"
: > "$LOG"
# what only a GPU can show comes first: whole models, captured steps, the caches' streams (without a GPU all are skipped)
step 110 "gpu tests" "$PYTHON" -m pytest -q -p no:cacheprovider --maxfail=10 -m gpu tests/test_models_on_cuda.py \
  tests/kernels/test_cuda.py tests/test_graphed_step*.py tests/test_source_cache_warm.py
if [ -n "$DRY" ]; then
  step 60 "tests" "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_measure.py -k peak
  bench 120 "summary" results.json benchmarks/test_projection.py benchmarks/test_training_step.py \
    -k "xlmr-qv or step/xlmr"
  bench 90 "more" more.json benchmarks/test_generation.py benchmarks/test_host_time.py \
    -k "decode/xlmr/M1- or host/xlmr/plain"
else
  step 70 "tests" "$PYTHON" -m pytest -q -p no:cacheprovider --maxfail=10 -m "not gpu" tests/kernels \
    tests/test_fast_lora.py tests/test_source_pass.py tests/test_goldens.py --deselect tests/kernels/test_aot.py
  bench 200 "summary" results.json benchmarks/test_training_step.py benchmarks/test_projection.py
  bench 110 "more" more.json benchmarks/test_host_time.py benchmarks/test_generation.py benchmarks/test_kernels.py \
    benchmarks/test_block.py
fi
MEASURED=()
for file in results.json more.json; do [ -f "$RESULTS/$file" ] && MEASURED+=("$RESULTS/$file"); done
if [ ${#MEASURED[@]} -eq 0 ]; then
  echo "nothing was measured: see $LOG"
  exit 1
fi
step 20 "summary.json" "$PYTHON" benchmarks/summary.py "${MEASURED[@]}" --output "$RESULTS/summary.json"
if "$PYTHON" -c 'import matplotlib' 2>/dev/null; then
  step 30 "table and pictures" "$PYTHON" benchmarks/plot.py "${MEASURED[@]}" --output "$RESULTS"
fi
exit $status
