"""Tests that every backend gives NaN and infinity in the same elements as autograd of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flare_kernels import FUSIONS, fused_lora

SHAPES = {"x": (5, 12), "x_source": (5, 12), "base_output": (5, 10), "lora_A": (4, 12), "lora_B": (10, 4)}


def outputs(backend: str, fusion: str | None, where: str, value: float, device: torch.device) -> dict[str, Tensor]:
    """Return the output and all gradients if one entry of a tensor is ``value``.

    ``where``: name of that tensor, or "dy" for the gradient of the output.
    """
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator).to(device) for name, shape in SHAPES.items()}
    dy = torch.randn(SHAPES["base_output"], generator=generator).to(device)
    (dy if where == "dy" else tensors[where]).view(-1)[7] = value
    if fusion is None:
        tensors["x_source"] = None
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items() if tensor is not None}
    y = fused_lora(
        tensors["x"], tensors["x_source"], tensors["base_output"].clone(), tensors["lora_A"], tensors["lora_B"],
        scaling=2.0, fusion=fusion, backend=backend,
    )  # fmt: skip
    y.backward(dy)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


@pytest.mark.parametrize("fusion", [None, *FUSIONS])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which warns
def test_non_finite_values_propagate_as_in_the_formula(backend, fusion, value, device) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    for where in (*SHAPES, "dy"):
        if where == "x_source" and fusion is None:
            continue
        expected = outputs("reference", fusion, where, value, device)
        actual = outputs(backend, fusion, where, value, device)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            same = torch.equal(actual[name].isnan(), tensor.isnan())
            same = same and torch.equal(actual[name].isfinite(), tensor.isfinite())
            assert same, f"{value} in {where}: {name}"
