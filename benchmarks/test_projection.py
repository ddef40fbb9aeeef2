"""What do the q and v projections of one block cost with a fusing adapter, forward and backward?

Frozen GEMM + adapter in bf16, fusion add_relu. Rows: the formula over PEFT-like eager layers with bf16 adapters, the
same as PEFT makes them by default (float32 adapters, x cast up), the hand-written addmm form ("torch" backend), and
what "auto" picks. Each row must agree with the float64 oracle before it is timed. Saved bytes are exact on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
import torch.nn.functional as F
from torch import Tensor

import flare_kernels
from flare.measure import peak_bytes, saved_bytes
from flare_kernels import fused_lora, reference

FUSION = "add_relu"
Inputs = dict[str, Tensor]
Projection = Callable[[Inputs, str], Tensor]


def make(shape: shapes.ProjectionShape, device: torch.device) -> Inputs:
    """Inputs of one block; adapters are float32 masters."""

    def randn(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    inputs = {"x": randn(shape.M, shape.d), "x_source": randn(shape.M, shape.d)}
    for name, n in (("q", shape.n_q), ("v", shape.n_v)):
        inputs[f"{name}.W"] = randn(n, shape.d, scale=shape.d**-0.5)
        inputs[f"{name}.A"] = randn(shape.r, shape.d, scale=shape.d**-0.5, dtype=torch.float32)
        inputs[f"{name}.B"] = randn(n, shape.r, scale=shape.r**-0.5, dtype=torch.float32)
        if shape.bias:
            inputs[f"{name}.b"] = randn(n)
    return inputs


def eager(adapter_dtype: torch.dtype) -> Projection:
    """The formula as PEFT's layers would compute it: x cast to the adapters' dtype, every product its own operation."""

    def project(t: Inputs, name: str) -> Tensor:
        A, B = t[f"{name}.A"].to(adapter_dtype), t[f"{name}.B"].to(adapter_dtype)
        base = F.linear(t["x"], t[f"{name}.W"], t.get(f"{name}.b"))
        T, S = t["x"].to(adapter_dtype) @ A.T, t["x_source"].to(adapter_dtype) @ A.T
        return (base + (reference.fuse(S, T, FUSION) @ B.T) * 2.0).to(base.dtype)

    return project


def fused(backend: str) -> Projection:
    """This package."""

    def project(t: Inputs, name: str) -> Tensor:
        base = F.linear(t["x"], t[f"{name}.W"], t.get(f"{name}.b"))
        A, B = t[f"{name}.A"], t[f"{name}.B"]
        return fused_lora(t["x"], t["x_source"], base, A, B, scaling=2.0, fusion=FUSION, backend=backend)

    return project


PROVIDERS: dict[str, Projection] = {
    "eager-bf16": eager(torch.bfloat16),
    "eager-fp32-adapters": eager(torch.float32),
    "flare-torch": fused("torch"),
    "flare-auto": fused("auto"),
}


def step(project: Projection, t: Inputs, G: dict[str, Tensor]) -> None:
    """Forward and backward of both projections."""
    torch.autograd.backward([project(t, name) for name in G], list(G.values()))


def assert_correct(project: Projection, t: Inputs, shape: shapes.ProjectionShape) -> None:
    """Against the oracle in float64, on the first rows: error at most twice eager bf16's, plus one epsilon."""
    few = {k: (v[:64] if k in ("x", "x_source") else v) for k, v in t.items()}
    exact = {k: v.double() for k, v in few.items()}
    with torch.no_grad():
        for name in ("q", "v"):
            base = F.linear(exact["x"], exact[f"{name}.W"], exact.get(f"{name}.b"))
            A, B = exact[f"{name}.A"], exact[f"{name}.B"]
            truth = reference.fused_lora(exact["x"], exact["x_source"], base, A, B, scaling=2.0, fusion=FUSION)
            plain = eager(torch.bfloat16)(few, name).double()
            error = (project(few, name).double() - truth).abs().max()
            allowed = 2 * (plain - truth).abs().max() + torch.finfo(torch.bfloat16).eps * truth.abs().max()
            assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", shapes.PROJECTIONS, ids=lambda s: f"{s.name}-M{s.M}-r{s.r}")
def test_qv_projection(benchmark: Any, measure: Any, provider: str, shape: shapes.ProjectionShape, device: Any) -> None:
    t = make(shape, device)
    for name in ("x", "q.A", "q.B", "v.A", "v.B"):
        t[name].requires_grad_()
    project = PROVIDERS[provider]
    G = {
        "q": torch.randn(shape.M, shape.n_q, device=device).bfloat16(),
        "v": torch.randn(shape.M, shape.n_v, device=device).bfloat16(),
    }
    assert_correct(project, t, shape)
    with saved_bytes(ignore=[t["q.A"], t["q.B"], t["v.A"], t["v.B"], t["q.W"], t["v.W"]]) as saved:
        kept = [project(t, name) for name in G]
    del kept
    with peak_bytes(device=device) as peak:
        step(project, t, G)
    benchmark.group = f"q+v projection, {shape.name}, M={shape.M}, r={shape.r}"
    benchmark.extra_info.update(
        provider=provider,
        backend=flare_kernels.select_backend(device, torch.bfloat16) if provider == "flare-auto" else "",
        saved_bytes=saved.total,
        peak_bytes_above_inputs=peak.above_start,
        conditions="bf16, add_relu, dropout 0, forward + backward, frozen product included",
    )
    measure(lambda: step(project, t, G))
