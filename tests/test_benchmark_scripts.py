"""Tests of the benchmarks' GPU scripts on a CPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import pytest
from benchmark_modules import KEYS, module, run

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.mark.slow
def test_run_gpu_measures_everything_without_a_gpu(tmp_path: Path) -> None:
    """The archive contains results, log, table and figures, and the summary has a number for every name in KEYS."""
    out, unpacked = tmp_path / "out", tmp_path / "unpacked"
    done = run("bash", "benchmarks/run_gpu.sh", FLARE_BENCH_DRY="1", PYTHON=sys.executable, OUT=str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in out.iterdir()] == ["results.tar.gz"]
    with tarfile.open(out / "results.tar.gz") as archive:
        archive.extractall(unpacked, filter="data")
    names = {path.name for path in unpacked.iterdir()}
    measured = {"steps.json", "projections.json", "more.json"}
    assert names >= {*measured, "log.txt", "summary.json", "table.md", "steps.png", "parts.png"}
    log = (unpacked / "log.txt").read_text()
    steps = [line[3:].split(" (")[0] for line in log.splitlines() if line.startswith("== ")]
    assert steps == [
        *("compile", "tests", "whole steps", "projections", "more", "table and figures", "summary.json"),
    ]
    table = log[log.index("outcome\n") :].splitlines()[1:]
    assert len(table) == len(steps) and all(line.endswith("done") for line in table), log
    assert " 1 compiled, 0 failed" in log, "the compiler ran"
    for source in ("projections", "kernels", "decoding", "steps", "models of tests"):
        count = re.search(rf"{source}: (\d+) kernels", log)
        assert count and int(count[1]) > 0, f"no launches were recorded of {source}: {log}"
    assert "| xlmr/plain/" in log and "calls/block" in log, "calls per block are printed"
    summary = json.loads((unpacked / "summary.json").read_text())
    missing = [name for name in KEYS if summary[name]["xlmr"] is None]
    assert not missing, f"no number for {missing}"
    assert summary["beside"]["decode_launches"]["xlmr"] > 0
    rows = module("results").load(unpacked / "more.json")["cases"]
    host = {row["variant"]: row for row in rows if row["question"] == "host"}
    for row in host.values():
        assert row["counters"]["calls_per_block"] > 0 and row["over_peft"] > 0
    assert set(host) == set(module("host_calls").VARIANTS)


#: Name of a command -> shell script that replaces it.
FAKES = {
    # a device exists, the tests fail, the benchmark of whole steps writes results, and other benchmarks write none
    "python": """#!/bin/bash
case "$*" in
  *"import xdist"* | *"import matplotlib"*) exit 1 ;;
  *test_models_on_cuda*) echo "1 failed"; exit 1 ;;
  *test_training_step*) while [ "$1" != --results ]; do shift; done; echo "{}" > "$2" ;;
esac
""",
    # the benchmark of whole steps reaches its time limit
    "timeout": """#!/bin/bash
shift 4
"$@"
code=$?
case "$*" in *test_training_step*) exit 124 ;; esac
exit $code
""",
}


@pytest.mark.parametrize("seconds", ["10000", "0"])
def test_run_gpu_keeps_results_if_steps_fail_and_time_runs_out(seconds: str, tmp_path: Path) -> None:
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path, out = os.pathsep.join([str(tmp_path), os.environ["PATH"]]), tmp_path / "out"
    options = {"PYTHON": str(tmp_path / "python"), "PATH": path, "OUT": str(out), "FLARE_BENCH_SECONDS": seconds}
    done = run("bash", "benchmarks/run_gpu.sh", **options)
    assert done.returncode == 1, done.stdout + done.stderr
    with tarfile.open(out / "results.tar.gz") as archive:
        assert ("./steps.json" in archive.getnames()) == (seconds != "0"), "results of a stopped step are kept"
        log = archive.extractfile("./log.txt").read().decode()
    lines = log[log.index("outcome\n") :].splitlines()[1:]
    outcomes = {line[:32].strip(): line[32:].split(maxsplit=1)[1] for line in lines}
    steps = ["compile", "tests", "whole steps", "projections", "whole steps, padded", "tune", "more"]
    assert [name for name in outcomes if name != "summary.json"] == steps
    if seconds == "0":
        assert all("not started" in outcome for outcome in outcomes.values())
    else:
        assert outcomes["tests"] == "failed (1)" and "stopped after 210s" in outcomes["whole steps"]
        assert {outcomes[name] for name in ("compile", "projections", "tune", "more", "summary.json")} == {"done"}


SANITIZER = """#!/bin/bash
# writes a report for each tool; racecheck fails
[ "$1" = --help ] && { echo "  --kernel-name arg"; exit; }
while [ $# -gt 0 ]; do
  case "$1" in
    --tool) tool=$2 ;;
    --log-file) echo "ERROR SUMMARY: some, $tool" > "$2" ;;
    *.py) [ -n "$PYTORCH_NO_CUDA_MEMORY_CACHING" ] && echo "$tool of $1" ;;
  esac
  shift
done
[ "$tool" != racecheck ] || exit 9
"""


@pytest.mark.slow
def test_check_gpu_compares_every_kernel_without_a_gpu(tmp_path: Path) -> None:
    """Every kernel is compared with plain PyTorch. An error of one sanitizer tool fails only that tool's step."""
    pytest.importorskip("triton", reason="Triton is not installed")
    (tmp_path / "compute-sanitizer").write_text(SANITIZER)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    path, out = os.pathsep.join([str(tmp_path), os.environ["PATH"]]), tmp_path / "out"
    done = run("bash", "benchmarks/check_gpu.sh", FLARE_BENCH_DRY="1", PYTHON=sys.executable, PATH=path, OUT=str(out))
    assert done.returncode == 1, done.stdout + done.stderr
    with tarfile.open(out / "results.tar.gz") as archive:
        assert {"./log.txt", "./memcheck.txt", "./racecheck.txt"} <= set(archive.getnames())
        log = archive.extractfile("./log.txt").read().decode()
    for kernel in (
        "shrink",
        "expand",
        "grad_bottleneck",
        "grad_weight",
        "grad_input",
        "stack",
        "dropout_mask",
        "expand_decode",
        "shrink_tma",
        "grad_weight_tma",
    ):
        assert re.search(rf"\b{kernel}_kernel \d", log), kernel
    assert "memcheck of tests/kernels/odd_calls.py" in log and "ERROR SUMMARY: some, racecheck" in log
    assert log.count(" same") >= 30 and "DIFFERENT" not in log
    table = {line.split()[0]: line for line in log[log.index("outcome\n") :].splitlines()[1:]}
    assert all(table[name].endswith("done") for name in ("calls", "memcheck", "fpsan"))
    assert table["racecheck"].endswith("failed (9)")


@pytest.mark.slow
def test_part_of_a_sweep_is_not_measured_twice(tmp_path: Path) -> None:
    """A sweep is split into numbered parts. A second run of a part uses the results of the first run."""
    dry = {"FLARE_BENCH_DRY": "1", "PYTHON": sys.executable, "OUT": str(tmp_path)}
    few = "-rs -k decode/xlmr"
    of_parts = importlib.import_module("sweep").parts("tiny")
    part = next(str(n) for n, names in enumerate(of_parts, 1) if any(name.startswith("decode/xlmr") for name in names))
    first = run("bash", "benchmarks/run_gpu.sh", "sweep", part, PYTEST_ADDOPTS=few, **dry)
    assert first.returncode == 0, first.stdout + first.stderr
    before = (tmp_path / f"sweep-{part}.json").read_text()
    second = run("bash", "benchmarks/run_gpu.sh", "sweep", part, PYTEST_ADDOPTS=few, **dry)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "already has results of the current source code" in second.stdout
    assert (tmp_path / f"sweep-{part}.json").read_text() == before
