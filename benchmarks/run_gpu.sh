#!/usr/bin/env bash
# On a GPU machine: the tests that run kernels, then the benchmarks; JSON under the folder named by $OUT, or under
# benchmarks/results/<gpu>. Nothing is installed: it takes the python3 on the PATH and the packages that are there.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
GPU=$(python3 -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())') || {
  echo "run_gpu.sh needs a CUDA device that torch can see"; exit 2; }
RESULTS=${OUT:-benchmarks/results/$GPU}
mkdir -p "$RESULTS"
status=0
echo "== tests on $GPU"
timeout 240 python3 -m pytest tests/kernels tests/test_fast_lora.py tests/test_source_pass.py tests/test_goldens.py \
  -q --deselect tests/kernels/test_aot.py -p no:cacheprovider -x 2>&1 | tee "$RESULTS/tests.txt" || status=1
echo "== benchmarks"
timeout 270 python3 -m pytest benchmarks -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds \
  --benchmark-json="$RESULTS/benchmarks.json" 2>&1 | tee "$RESULTS/benchmarks.txt" || status=1
exit $status
