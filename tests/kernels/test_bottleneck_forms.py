"""Tests of the two Triton forms (implementations) of grad_bottleneck: their results and the bytes that they move.

The results are compared with float64 for several tile sizes. The forms differ in the order of their programs
(flare_kernels/triton_ops/grad_bottleneck.py).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from primitive_inputs import BF16, F32, F64, Shape, assert_close, hidden, make

from flare_kernels import tuning
from flare_kernels.fusion import get_fusion
from flare_kernels.launch_mode import counting, forcing, recording
from flare_kernels.triton_ops import primitives as triton_ops
from flare_kernels.triton_ops.config import FORMS, TileConfig

pytestmark = pytest.mark.usefixtures("poisoned_empty")

KERNEL, REDUCE = "grad_bottleneck_kernel", "split_k_reduce_kernel"
by_form = pytest.mark.parametrize("form", [form for form in FORMS["grad_bottleneck"] if form != "torch"])
#: BLOCK_M, BLOCK_K, BLOCK_N, BLOCK_R. BLOCK_K (the rows of a loop iteration for dB) is smaller or larger than BLOCK_M.
TILES = {"short steps": (32, 16, 32, 16), "long steps": (16, 32, 64, 32)}


def forced(form: str, tiles: str) -> Any:
    m, k, n, r = TILES[tiles]
    config = TileConfig(m, k, n, r, num_warps=4, num_stages=2, programs=40)
    return forcing(form=form, **dict.fromkeys(FORMS["grad_bottleneck"][form], config))


@by_form
@pytest.mark.parametrize(("tiles", "dtype"), [("short steps", F32), ("long steps", BF16)], ids=str)
def test_each_form_matches_float64(form: str, tiles: str, dtype: torch.dtype, device: torch.device) -> None:
    """Two projections of different widths share a call. The sum over rows in dB is split among programs (split-K).

    Calls that need only dB, or only dT and dS, give the same bits.
    """
    parts = [make(Shape(M=267, N=N, R=20, compute=dtype), device) for N in (70, 33)]
    Gs, Bs = [i.G for i in parts], [i.B for i in parts]
    T, S = torch.cat([i.T for i in parts], 1), torch.cat([i.S for i in parts], 1)
    dT, dS, only_dT, only_dS = (torch.empty_like(T) for _ in range(4))
    phi: dict[str, Any] = {"scalings": [0.7, 2.0], "fusion": "mul_relu"}
    with forced(form, tiles):
        with counting() as names:
            dBs = triton_ops.grad_bottleneck(Gs, T, S, Bs, dT=dT, dS=dS, B_grad_dtype=F32, **phi)
        only_dBs = triton_ops.grad_bottleneck(Gs, T, S, Bs, B_grad_dtype=F32, **phi)
        assert triton_ops.grad_bottleneck(Gs, T, S, Bs, dT=only_dT, dS=only_dS, **phi) is None
    assert names == [KERNEL, REDUCE]
    assert torch.equal(only_dT, dT) and torch.equal(only_dS, dS)
    assert all(torch.equal(a, b) for a, b in zip(only_dBs, dBs, strict=True))
    for at, (i, scaling) in enumerate(zip(parts, phi["scalings"], strict=True)):
        columns, results = slice(20 * at, 20 * at + 20), {}
        for precision in (dtype, F64):
            dH = scaling * (i.G.to(precision) @ i.B.to(precision))
            grads = get_fusion("mul_relu").backward(dH, i.S.to(precision), i.T.to(precision))
            results[precision] = [*grads, (scaling * i.G.to(precision)).T @ hidden(i.T, i.S, "mul_relu", precision)]
        for actual, plain, truth in zip(
            (dT[:, columns], dS[:, columns], dBs[at]), results[dtype], results[F64], strict=True
        ):
            assert_close(actual, plain, truth, dtype)


def test_rows_first_has_the_same_programs_in_another_order() -> None:
    """Both forms have one program per tile of rows, and one per strip of columns in each chunk of rows.

    Only the order of the programs differs.
    """
    G, B, T = torch.empty(8192, 4096), torch.empty(4096, 64), torch.empty(8192, 64)
    config = TileConfig(64, 64, 128, 64, num_warps=4, num_stages=2, programs=264)
    grids = {}
    for form in ("triton", "rows_first"):
        with forcing(form=form, grad_bottleneck=config), recording(227 * 1024) as launches:
            triton_ops.grad_bottleneck(
                [G], T, None, [B], scalings=[1.0], fusion=None, dT=torch.empty_like(T), B_grad_dtype=F32
            )
        args = launches[0].args
        chunks = -(-8192 // args["chunk_rows"])
        assert args["group_chunks"] == (1 if form == "triton" else chunks) and chunks == 8
        grids[form] = launches[0].grid
    assert grids["triton"] == grids["rows_first"] == (8192 // 64 + 8 * 32,)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bytes_moved(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("bytes_moved")


@pytest.fixture
def llama(bytes_moved: Any) -> Any:
    """Return the shape of query and value of Llama 3.1 8B at M = 8192 and r = 64."""
    shapes = importlib.import_module("shapes")
    return shapes.ProjectionShape(shapes.LLAMA, 8192, 64)


def test_bytes_of_each_form_follow_from_the_shapes(bytes_moved: Any, llama: Any) -> None:
    """Each form moves the bytes of its tensors, and writes and reads the partial sums of dB once.

    Both forms read G, T and S for dH and again for dB. In the form "triton" the second read comes from the L2 cache, in
    "rows_first" from memory.
    """
    M, N, r = 8192, 5120, 64
    floor = 2 * M * N + 4 * (2 * M * 2 * r) + 2 * N * r + 4 * N * r
    assert bytes_moved.step_bytes(llama)["grad_bottleneck"] == floor == 94_240_768
    problems = tuning.problems([tuning.SHAPES["llama-3.1-8b"]], [M], [r])
    (problem,) = (problem for problem in problems if problem.step == "grad_bottleneck")
    for form in ("triton", "rows_first"):
        launches = bytes_moved.launches(problem, form)
        splits = next(launch.args["splits"] for launch in launches if "splits" in launch.args)
        again = 0 if form == "triton" else 2 * M * N + 2 * (2 * M * 2 * r)
        assert bytes_moved.moved(launches) == floor + again + 2 * splits * 4 * N * r
    assert bytes_moved.moved(bytes_moved.launches(problem, "triton")) < 1.2 * floor


def test_computing_dH_and_dB_in_one_program_would_need_too_many_partial_sums(bytes_moved: Any, llama: Any) -> None:
    """Programs that computed dH and dB from one read of G would write partial sums of both.

    With 100 or more programs (an H200 has 132 multiprocessors), they would move more than 1.5 times the least bytes.
    """
    least = bytes_moved.step_bytes(llama)["grad_bottleneck"]
    for programs in (100, 132, 264):
        assert bytes_moved.least_reading_once(llama, programs) > 1.5 * least
    # a grid with few partial sums leaves most of the device idle
    few = max(p for p in range(1, 133) if bytes_moved.least_reading_once(llama, p) <= 1.3 * least)
    assert few <= 20


def test_a_dry_run_times_each_part(tmp_path: Path) -> None:
    """The benchmark script times row programs, strip programs and both together, and writes a result for each."""
    out, root = tmp_path / "parts.json", Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/grad_bottleneck_parts.py", "--dry", "--shapes", "xlm-r-large", "--most", "3"]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--output", str(out)], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [(row["case"], row["status"]) for row in result["cases"]] == [
        (f"xlm-r-large/{part}", "timed") for part in ("rows", "strips", "both")
    ]
    assert all(part in done.stdout for part in ("rows", "strips", "both")) and "torch" in result["run"]["versions"]


def test_counters_are_parsed_from_ncu_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    parts = importlib.import_module("grad_bottleneck_parts")
    rows = [("dram__bytes.sum", "Mbyte", "92.5"), ("lts__t_sector_hit_rate.pct", "%", "51.48")]
    rows += [("dram__bytes.sum", "byte", "1,500"), ("lts__t_sector_hit_rate.pct", "%", "30")]
    text = "==PROF== Connected\n" + "\n".join(
        ",".join(f'"{cell}"' for cell in row) for row in [("Metric Name", "Metric Unit", "Metric Value"), *rows]
    )
    assert parts.parse_counters(text) == {"dram_bytes": 92_501_500.0, "l2_hit_percent": [51.48, 30.0]}
