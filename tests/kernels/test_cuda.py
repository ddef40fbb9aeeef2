"""Tests that need a CUDA device.

They cover graph capture, other streams and devices, launch hooks, profiles, accuracy at real sizes, and "tma" and
"last_adds", which are alternative implementations ("forms") of shrink and grad_weight.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from flare_kernels import fused_lora, fused_lora_qkv, launch_plan, select_backend
from flare_kernels.launch_mode import counting, forcing
from flare_kernels.triton_ops import primitives as triton_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or select_backend("cuda", torch.bfloat16) != "triton",
        reason="needs a CUDA device that the kernels run on",
    ),
]
CUDA = torch.device("cuda")
WIDTHS = {"q": 256, "k": 64, "v": 64}


def make(M: int, device: torch.device = CUDA, d: int = 256, r: int = 16) -> dict[str, Tensor]:
    def randn(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    t = {"x": randn(M, d), "x_source": randn(M, d)}
    for name, n in WIDTHS.items():
        t |= {f"W.{name}": randn(n, d, scale=d**-0.5), f"G.{name}": randn(M, n)}
        t |= {f"A.{name}": randn(r, d, scale=d**-0.5, dtype=torch.float32)}
        t |= {f"B.{name}": randn(n, r, scale=r**-0.5, dtype=torch.float32)}
    for name in ("x", "A.q", "B.q", "A.v", "B.v"):
        t[name].requires_grad_()
    return t


def forward(t: dict[str, Tensor], **options) -> list[Tensor]:
    with torch.no_grad():
        base = {name: t["x"] @ t[f"W.{name}"].T for name in WIDTHS}
    adapters = {name: (t[f"A.{name}"], t[f"B.{name}"], 0.5) for name in ("q", "v")}
    weights = {name: t[f"W.{name}"] for name in WIDTHS}
    return list(fused_lora_qkv(t["x"], t["x_source"], base, adapters, weights=weights, **options).values())


def step(t: dict[str, Tensor], **options) -> list[Tensor]:
    ys = forward(t, **options)
    leaves = [tensor for tensor in t.values() if tensor.requires_grad]
    return [*ys, *torch.autograd.grad(ys, leaves, [t[f"G.{name}"] for name in WIDTHS])]


@pytest.mark.parametrize("M", [16, 300])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_training_step_is_captured_in_a_cuda_graph(M: int, p: float) -> None:
    """Replays give the bits of the eager step. With dropout, each replay draws new masks.

    Leaves are created on the capturing stream, because their AccumulateGrad nodes use the stream of their creation.
    """
    options = {"dropout_p": p, "training": True}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        t = make(M)
        for _ in range(3):
            expected = step(t, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        static = step(t, **options)
    torch.cuda.current_stream().wait_stream(stream)
    replays = []
    for _ in range(2):
        for tensor in static:
            tensor.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        replays.append([tensor.detach().clone() for tensor in static])
    assert not any(tensor.isnan().any() for tensor in replays[0])
    same = [torch.equal(a, b) for a, b in zip(*replays, strict=True)]
    if p == 0.0:
        assert all(same) and all(torch.equal(a, b) for a, b in zip(replays[0], expected, strict=True))
    else:
        assert not any(same[i] for i in (0, 2)), "q and v must differ from replay to replay"


@pytest.mark.parametrize("M", [16, 300])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_second_step_calls_compiled_kernels_and_gives_the_same_bits(M: int, p: float, monkeypatch) -> None:
    """The first step launches through Triton's ``kernel[grid]``, the second calls the compiled kernels directly."""
    t = make(M)
    results = []
    with forcing():  # caches nothing of earlier calls, so that the first step launches through kernel[grid]
        for _ in range(2):
            torch.manual_seed(0)
            results.append(step(t, dropout_p=p, training=True))
            monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: pytest.fail("a launch through the JIT"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_launch_hooks_see_launches_of_compiled_kernels() -> None:
    """Profilers such as Proton use launch hooks."""
    t, seen = make(300), []

    def hook(metadata) -> None:
        seen.append(metadata.get()["name"])

    step(t)
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        with counting() as names:
            for _ in range(2):
                step(t)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == names and len(names) >= 10


@pytest.mark.parametrize("M", [1, 16, 64])
def test_decoding_runs_only_two_kernels(M: int) -> None:
    """The profiler reports two kernels for all projections together."""
    t = make(M)
    with torch.no_grad():
        base = {name: t["x"] @ t[f"W.{name}"].T for name in WIDTHS}
        adapters = {name: (t[f"A.{name}"], t[f"B.{name}"], 0.5) for name in ("q", "v")}
        fused_lora_qkv(t["x"], t["x_source"], base, adapters)  # compiles the kernels
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            fused_lora_qkv(t["x"], t["x_source"], base, adapters)
            torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if event.self_device_time_total > 0]
    assert sorted(names) == ["expand_decode_kernel", "shrink_decode_kernel"], names
    assert "decode" in launch_plan(M, 256, (256, 64), 16)


def test_a_step_on_a_side_stream_waits_for_earlier_work_of_that_stream() -> None:
    """When the step is launched, the side stream has not yet written the inputs."""
    t = make(300)
    expected = step(t)
    fresh = t["x"].detach().clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        t["x"].data.fill_(torch.nan)
        torch.cuda._sleep(50_000_000)
        t["x"].data.copy_(fresh)
        actual = step(t)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    t = make(300)
    other = {k: v.detach().to("cuda:1").requires_grad_(v.requires_grad) for k, v in t.items()}
    assert torch.cuda.current_device() == 0
    for a, b in zip(step(other), step(t), strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("M", [1, 64, 300, 8192])
@pytest.mark.parametrize("fusion", ["add", "mul", "add_relu", "mul_relu", None])
def test_auto_matches_float64_at_real_sizes(M: int, fusion: str | None) -> None:
    """Forward and backward with the widths of a real model match float64, with the launches that "auto" chooses."""
    d, n, r = 1024, 1024, 64
    x, x_source = (torch.randn(M, d, device=CUDA).bfloat16() for _ in range(2))
    A, B = torch.randn(r, d, device=CUDA) * d**-0.5, torch.randn(n, r, device=CUDA) * r**-0.5
    base, G = (torch.randn(M, n, device=CUDA).bfloat16() for _ in range(2))

    def run(backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [v.detach().to(dtype or v.dtype).clone().requires_grad_() for v in (x, A, B)]
        source, base_output = (v.to(dtype or v.dtype) for v in (x_source, base))
        options = {"scaling": 0.5, "fusion": fusion, "backend": backend}
        y = fused_lora(leaves[0], source, base_output.clone(), *leaves[1:], **options)
        return [y, *torch.autograd.grad(y, leaves, G.to(y.dtype))]

    truth, plain, actual = run("reference", torch.float64), run("reference"), run("auto")
    for exact, usual, ours in zip(truth, plain, actual, strict=True):
        eps = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= 2 * (usual.double() - exact).abs().max() + eps


@pytest.mark.parametrize("form", ["tma", "last_adds"])
def test_forms_give_the_same_bits_in_a_graph_and_on_concurrent_streams(form: str) -> None:
    """A graph is replayed concurrently with eager calls on several streams, and all give the same bits."""
    if form == "tma" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need sm_90")
    dT, x, A = (torch.randn(*size, device=CUDA).bfloat16() for size in ((4096, 128), (4096, 1024), (128, 1024)))

    def run() -> list[Tensor]:
        T, _ = triton_ops.shrink(x[:512], None, A, compute_dtype=torch.bfloat16)
        return [T, triton_ops.grad_weight(dT, x, None, None, grad_dtype=torch.float32)]

    with forcing(form=form), counting() as names:
        expected_results = run()
        assert all(name.startswith(("shrink", "grad_weight", "split_k_reduce")) for name in names)
        assert ("split_k_reduce_kernel" in names) == (form == "tma") == ("grad_weight_tma_kernel" in names)
        streams = [torch.cuda.Stream() for _ in range(3)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[0]):
            static = run()
        results = []
        for _ in range(50):
            graph.replay()
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(run())
        torch.cuda.synchronize()
    for result in (static, *results):
        assert all(torch.equal(actual, expected) for actual, expected in zip(result, expected_results, strict=True))


def test_descriptors_are_made_in_autograd_threads() -> None:
    """The threads of the autograd engine do not inherit Triton's allocator for descriptors."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need sm_90")
    t = make(300)
    expected_results = step(t)
    with forcing(form="tma"), counting() as names:
        first = step(t)
        assert {"shrink_tma_kernel", "grad_weight_tma_kernel"} <= set(names)
        again = step(t)
    for actual, repeated, expected in zip(first, again, expected_results, strict=True):
        assert torch.equal(actual, repeated)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
