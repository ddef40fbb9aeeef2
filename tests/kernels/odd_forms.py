"""Calls with odd sizes in the implementations ("forms") that only a tuned launch table chooses.

A step is one operation of the adapter, such as "shrink", and has one or more forms. Without a tuned table, the general
rule chooses the first form of each step (flare_kernels/triton_ops/config.py). odd_calls.py runs the calls of both
modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from odd_calls import BF16, F32, KEEP_SCALE, Place, Results, both, grad_bottlenecks, random_in
from torch import Tensor

from flare_kernels import fused_lora_qkv, torch_ops
from flare_kernels.forms import capability
from flare_kernels.launch_mode import counting, forcing
from flare_kernels.triton_ops import primitives as triton_ops
from flare_kernels.triton_ops.config import FORMS, NARROW, TileConfig, can_run

#: Length of the summed axis, length of the other axis, rank R, (dtype of activations, dtype of A and B). The summed
#: axis is the input width K for shrink, and the number of tokens M for grad_weight and grad_bottleneck's dB.
CASES: list[tuple[int, int, int, tuple[torch.dtype, torch.dtype]]] = [
    (131, 19, 5, (F32, F32)),
    (136, 24, 24, (BF16, BF16)),  # rows have a multiple of 16 bytes, as tensor descriptors require
]
#: Small tiles and many programs, so that the sums of these cases are split.
_TILES = TileConfig(BLOCK_M=16, BLOCK_K=16, BLOCK_N=32, BLOCK_R=32, num_warps=4, num_stages=2, programs=40)
_PHI: dict[str, Any] = {"scalings": [0.5, 2.0], "fusion": "mul_relu"}


def odd_forms(case: Any, place: Place, device: torch.device) -> Iterator[Results]:
    """Call shrink, grad_weight and grad_bottleneck in forms that the general rule does not choose.

    In addition, call expand_ with ``biases``, so that it does not read y, and fused_lora_qkv in the order adapter_first
    (flare_kernels/order.py).

    Yields:
        The results of each call, and the results of plain PyTorch.

    Raises:
        AssertionError: a forced form was not used.
    """
    M, N, R, (dtype, adapter) = case
    randn = random_in(place, device, dtype)
    yield from _sums(case, place, device)
    Bs = [randn(n, R, adapter, R**-0.5) for n in (N, N + 3)]
    Gs, T, S = [randn(M, B.shape[0]) for B in Bs], randn(M, 2 * R), randn(M, 2 * R)
    with _forced("grad_bottleneck", "rows_first", ["grad_bottleneck_kernel", "split_k_reduce_kernel"]):
        results = grad_bottlenecks(place, Gs, T, S, Bs, B_grad_dtype=adapter, **_PHI)
    yield results
    bias_vectors = [randn(1, B.shape[0])[0] for B in Bs]
    for biases in (bias_vectors, [None, None]):
        actual, expected = ([place(torch.full_like(G, torch.nan)) for G in Gs] for _ in range(2))
        for ops, ys in ((triton_ops, actual), (torch_ops, expected)):
            ops.expand_(ys, T, S, Bs, biases=biases, **_PHI)
        yield actual, expected
    K = N + 2
    leaves = {"x": randn(M, K), "x_source": randn(M, K), "B.q": Bs[0], "B.v": Bs[1]}
    leaves |= {f"A.{name}": randn(R, K, adapter, K**-0.5) for name in "qv"}
    weights = [randn(B.shape[0], K, scale=K**-0.5) for B in Bs]
    frozen = {"weights": dict(zip("qv", weights, strict=True)), "biases": dict(zip("qv", bias_vectors, strict=True))}
    with forcing(form="adapter_first"), counting() as names:
        actual = _step(leaves, frozen, Gs, "triton")
    assert names.count("expand_kernel") == 1 and names.count("grad_input_kernel") == 1, names
    with forcing(form="frozen_first"):
        yield actual, _step(leaves, frozen, Gs, "torch")


def _sums(case: Any, place: Place, device: torch.device) -> Iterator[Results]:
    """Call shrink and grad_weight in the form "last_adds" with and without dropout, and in the form "tma".

    "tma" is called only if the device has tensor descriptors and the case's dtype and sizes allow them.
    """
    long, short, R, (dtype, adapter) = case
    randn = random_in(place, device, dtype)
    forms: list[tuple[str, dict[str, Any]]] = [("last_adds", {}), ("last_adds", {"keep_scale": KEEP_SCALE})]
    has_descriptors = can_run("shrink", "tma", NARROW, capability(device))
    if has_descriptors and dtype != F32 and long % 8 == short % 8 == R % 8 == 0:
        forms.append(("tma", {}))
    seed = torch.tensor(7, device=device)
    for step, M, K in (("shrink", short, long), ("grad_weight", long, short)):
        x, x_source = randn(M, K), randn(M, K)
        args: tuple[Tensor, ...] = (x, x_source, randn(R, K, scale=K**-0.5))
        options = {"compute_dtype": dtype}
        if step == "grad_weight":
            args, options = (randn(M, R), x, randn(M, R), x_source), {"grad_dtype": adapter}
        masks = [place(torch_ops.dropout_mask(seed, M, K, 6554, stream)) for stream in (0, 1)]
        for form, dropped in forms:
            if dropped:
                dropped |= {"mask": masks[0], "mask_source": masks[1]}
            launches = [f"{step}_tma_kernel", "split_k_reduce_kernel"] if form == "tma" else [f"{step}_kernel"]
            with _forced(step, form, launches):
                results = both(step, *args, **options, **dropped)
            yield results


@contextlib.contextmanager
def _forced(step: str, form: str, launches: list[str]) -> Iterator[None]:
    """Force a form of a step with tiles that split its sums, and assert the names of the kernels that it launches."""
    tiles: dict[str, Any] = dict.fromkeys(FORMS[step][form], _TILES)
    with forcing(form=form, **tiles), counting() as names:
        yield
    assert names == launches, f"{step}, {form}: {names}"


def _step(leaves: dict[str, Tensor], frozen: dict[str, Any], Gs: list[Tensor], backend: str) -> list[Tensor]:
    """Return the outputs of q and v and the gradients of x, A and B, from fused_lora_qkv with the frozen weights."""
    t = {name: leaf.detach().requires_grad_(name != "x_source") for name, leaf in leaves.items()}
    adapters = {name: (t[f"A.{name}"], t[f"B.{name}"], 0.5 + at) for at, name in enumerate("qv")}
    ys = fused_lora_qkv(t["x"][None], t["x_source"][None], None, adapters, **frozen, training=True, backend=backend)
    torch.autograd.backward(list(ys.values()), [G[None].to(y.dtype) for G, y in zip(Gs, ys.values(), strict=True)])
    grads = [leaf.grad for name, leaf in t.items() if name != "x_source"]
    return [*(y.detach() for y in ys.values()), *(grad for grad in grads if grad is not None)]
