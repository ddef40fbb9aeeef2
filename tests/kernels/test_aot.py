"""Ahead-of-time compilation, in another process, because interpreted kernels cannot be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler exists for Linux only")

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository, without Triton's interpreter unless ``environment`` enables it."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    """Return the reports of the cases that CI compiles (about a minute and a half on two cores)."""
    result = run("-m", "flare_kernels.aot", "--json")
    assert result.stdout.startswith("["), result.stderr
    reports = json.loads(result.stdout)
    violations = [f"{r['kernel']} {r['case']}: {r['violation']}" for r in reports if r["violation"]]
    assert result.returncode == (1 if violations else 0), result.stderr
    assert not violations, "\n".join(violations)
    return reports


KERNELS = {"shrink", "expand", "grad_bottleneck", "grad_weight", "grad_input", "shrink_decode", "expand_decode"}
DESCRIPTOR_KERNELS = {"shrink_tma", "grad_weight_tma"}


@pytest.mark.slow
def test_ci_selection_compiles_within_limits(reports: list[dict]) -> None:
    """CI compiles all kernels in bfloat16 for four ranks and three targets, and a few other cases."""
    seen = {(r["kernel"], r["case"]["capability"], r["case"]["rank"]) for r in reports if r["case"]["aligned"]}
    for capability in (80, 90, 100):
        for rank in (16, 32, 64, 128):
            assert {(kernel, capability, rank) for kernel in KERNELS} <= seen
            with_descriptors = {(kernel, capability, rank) for kernel in DESCRIPTOR_KERNELS}
            assert with_descriptors <= seen if capability >= 90 else not with_descriptors & seen
    on_hopper = [r for r in reports if r["case"]["capability"] == 90]
    kinds = {
        "float32": [r for r in on_hopper if r["case"]["dtype"] == "float32"],
        "unaligned": [r for r in on_hopper if not r["case"]["aligned"]],
    }
    for kind, rows in kinds.items():
        assert {r["kernel"] for r in rows} >= KERNELS, kind
    # only these kernels have different code for rank 256 and rank 128: they loop over blocks of R
    assert {r["kernel"] for r in on_hopper if r["case"]["rank"] == 256} >= {"expand", "grad_input"}
    assert all(r["registers"] > 0 for r in reports)


@pytest.mark.slow
def test_16_bit_kernels_use_tensor_cores_and_float32_kernels_do_not(tmp_path: Path) -> None:
    """On sm_90, bfloat16 compiles to wgmma (decode kernels: to mma). float32 uses neither on sm_80 and sm_90."""
    script = """
import sys, triton
from flare_kernels import aot
from triton.backends.compiler import GPUTarget
seen = []
compile = triton.compile
triton.compile = lambda *a, **k: seen.append(compile(*a, **k)) or seen[-1]
for dtype, capability in (("bfloat16", 90), ("float32", 80), ("float32", 90)):
    for launch in aot.record(aot.Case(capability, dtype=dtype)):
        if launch.kernel.fn.__name__ == "split_k_reduce_kernel":
            continue
        error = aot.compile_unit(aot.specialise(launch, capability)).get("error")
        ptx = seen[-1].asm["ptx"]
        print(dtype, capability, launch.kernel.fn.__name__, "wgmma" in ptx, "mma." in ptx, error)
"""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {line[2].removesuffix("_kernel") for line in lines} == KERNELS
    for dtype, capability, kernel, wgmma, mma, error in lines:
        assert error == "None", kernel
        # a tile of 16 tokens is too small for wgmma, but not for the older mma instruction
        narrow = dtype == "bfloat16"
        assert wgmma == str(narrow and "decode" not in kernel), (dtype, capability, kernel)
        assert mma == str(narrow), (dtype, capability, kernel)


def test_every_default_configuration_is_launched() -> None:
    """The cases of --all use each default configuration (`config.all_configs`), on small and on large GPUs."""
    script = """
from flare_kernels import aot
from flare_kernels.triton_ops import config
reached = set()
limits = {80: config.LARGE_SHARED_BYTES, 90: config.HOPPER_SHARED_BYTES}
limits[89] = config.SMALL_SHARED_BYTES
for case in aot.all_cases():
    limit = limits.get(case.capability)
    if case.fusion == "mul_relu" and not case.dropout and case.dtype != "float16" and limit is not None:
        reached |= {(launch.kernel.fn.__name__, limit, launch.config) for launch in aot.record(case)}
for kernel, operands, bucket, shared_bytes, row in config.all_configs():
    kernel = kernel.removesuffix("_last_adds")  # the kernel of the form last_adds is shrink or grad_weight
    if not kernel.endswith("_tma") or shared_bytes == config.HOPPER_SHARED_BYTES:  # other GPUs have no descriptors
        assert (kernel + "_kernel", shared_bytes, row) in reached, (kernel, operands, bucket, shared_bytes, row)
print("all")
"""
    result = run("-c", script)
    assert result.stdout.strip() == "all", result.stderr


def test_refuses_to_run_under_the_interpreter() -> None:
    result = run("-m", "flare_kernels.aot", TRITON_INTERPRET="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr


def test_violations_are_reported() -> None:
    """Spills are errors only for aligned 2-byte operands up to rank 128. Too much shared memory is always an error."""
    from flare_kernels.aot import Case, Report

    def report(case: Case, spills: int = 0, shared: int = 0, error: str = "") -> str:
        return Report("expand", case, "M64", 4, 2, registers=255, spills=spills, shared=shared, error=error).violation

    assert "spills" in report(Case(90), spills=8)
    assert "spills" in report(Case(80, rank=128, dropout=True), spills=8)
    printed_only = ({"rank": 256}, {"dtype": "float32"}, {"aligned": False}, {"adapter_dtype": "float32"})
    for case in (Case(90, **kind) for kind in printed_only):
        assert not report(case, spills=8)
    assert not report(Case(90), shared=200 * 1024)
    assert "shared memory" in report(Case(89), shared=100 * 1024)
    assert "shared memory" in report(Case(80, dtype="float32"), shared=164 * 1024)
    assert report(Case(90), error="no such thing") == "no such thing"


CACHE_LOOKUP = """
import torch, triton
from triton.backends.compiler import GPUTarget
from flare_kernels import aot

class Driver:  # answers the queries that a launch makes before it looks up a compiled kernel
    get_current_device = get_current_stream = lambda self, device=0: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cpu")

hits = {}
triton.runtime.driver.set_active(Driver())
# the two kernels that compile fastest; stack has arguments that are None or not multiples of 16
kernels = {"stack_kernel", "dropout_mask_kernel"}
case = aot.Case(90, aligned=False, dropout=True, projections=2)
launches = [launch for launch in aot.record(case) if launch.kernel.fn.__name__ in kernels]
for unit in {aot.specialise(launch, 90) for launch in launches}:
    assert "error" not in aot.compile_unit(unit)
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: hits.setdefault(src.name, []).append(cache_hit)
for launch in launches:
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages, "enable_fp_fusion": True}
    launch.kernel.warmup(*launch.args.values(), grid=launch.grid, **options)
print(sorted(hits), all(map(all, hits.values())))
"""


def test_a_launch_finds_the_kernel_compiled_ahead_of_time(tmp_path: Path) -> None:
    result = run("-c", CACHE_LOOKUP, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "['dropout_mask_kernel', 'stack_kernel'] True"
