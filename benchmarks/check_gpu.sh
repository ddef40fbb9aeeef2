#!/usr/bin/env bash
# Run a few calls of every kernel (tests/kernels/odd_calls.py: odd sizes, dropout, decoding) under tools. The tools find
# errors that a comparison of results does not show. The script needs a GPU and takes less than 10 minutes.
#
#   calls       run the calls without a tool and compare them with plain PyTorch; this compiles the kernels for memcheck
#               and racecheck
#   memcheck    compute-sanitizer finds accesses outside an allocation (each tensor is a separate allocation)
#   racecheck   compute-sanitizer finds races on shared memory
#   fpsan       the sanitizer of Triton 3.8 and later checks that fused and naive kernels are bitwise equal
#               (tests/kernels/exact.py)
#
# The log and the tools' reports go to benchmarks/results/<gpu>/checks, or to results.tar.gz in $OUT. Tools that are not
# installed are listed as skipped. FLARE_BENCH_DRY=1 runs the same steps on a CPU, in Triton's interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DRY=${FLARE_BENCH_DRY:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
EXACT=""
if [ -n "$DRY" ]; then
  export TRITON_INTERPRET=1
  EXACT=--close
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "check_gpu.sh needs a CUDA device that torch can see (FLARE_BENCH_DRY=1 runs in the interpreter)"
  exit 2
fi
RESULTS=benchmarks/results/$("$PYTHON" -c 'import sys; sys.path.insert(0, "benchmarks"); import sweep; print(sweep.gpu_name())')/checks
source benchmarks/steps.sh
begin

sanitizer() { # sanitizer SECONDS TOOL OPTIONS...
  local limit=$1 tool=$2
  shift 2
  step "$limit" "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --log-file "$RESULTS/$tool.txt" "${FILTER[@]}" "$@" "$PYTHON" tests/kernels/odd_calls.py
  [ -f "$RESULTS/$tool.txt" ] && tail -n 20 "$RESULTS/$tool.txt" | tee -a "$LOG"
}

step 120 "calls" "$PYTHON" tests/kernels/odd_calls.py
if command -v compute-sanitizer > /dev/null; then
  # instrument only kernels with Triton's names, if this release has the option: PyTorch's own kernels take minutes
  FILTER=()
  compute-sanitizer --help | grep -q -- --kernel-name && FILTER=(--kernel-name kernel_substring=_kernel)
  sanitizer 150 memcheck --padding 256
  sanitizer 150 racecheck
else
  skip "memcheck, racecheck" "compute-sanitizer is not installed"
fi
if [ -n "$DRY" ] || "$PYTHON" -c 'import sys, triton; sys.exit(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8))'; then
  step 120 "fpsan" env TRITON_INSTRUMENTATION_MODE=fpsan "$PYTHON" tests/kernels/exact.py $EXACT
else
  skip "fpsan" "needs Triton 3.8 or later"
fi
outcomes
exit $status
