"""The adapter of one projection as one autograd node over five primitives.

    T = x A^T    S = x_source A^T    H = phi(S, T)    y = base_output + s H B^T            (paper, section 3)
    dB = s G^T H    dH = s G B    dx = dT A    dA = dT^T x + dS^T x_source                 (G = dL/dy)

Saved for backward: x and x_source as they came (only where A asks for a gradient), T and S rounded to the compute
dtype (only H where phi is linear), and with dropout the seed, from which the masks are made again. Never a cast or
dropped-out copy of x. The joint form for projections that share their input is in :mod:`flare_kernels.joint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dropout as _dropout
from . import reference, validation
from .backends import primitives, select_backend
from .fusion import EAGER_FUSIONS
from .reference import compute_dtype


def rows(x: Tensor) -> Tensor:
    """(..., m, c) as (M, c); a view wherever the strides allow one."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The primitives choose their dtypes themselves; autocast inside them would round a second time."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def writable(base_output: Tensor, *beside: Tensor | None) -> Tensor:
    """base_output itself where the result may stand in its memory, else a copy of it.

    A leaf that requires grad, a view, a part of a larger storage, and memory that one of the tensors ``beside`` lives
    in too, are still somebody's; memory with gaps cannot be accumulated into as (M, n). What PyTorch cannot tell from a
    tensor of its own, a ``detach()`` that covers the whole, is written to.
    """
    storage = base_output.untyped_storage()
    others = (other.untyped_storage().data_ptr() for other in beside if other is not None and other.numel())
    is_somebodys = (
        (base_output.is_leaf and base_output.requires_grad)
        or base_output._is_view()
        or storage.nbytes() > base_output.numel() * base_output.element_size()  # inference mode hides views
        or (base_output.is_inference() and not torch.is_inference_mode_enabled())
        or (base_output.numel() > 0 and storage.data_ptr() in others)
    )
    return base_output.clone(memory_format=torch.contiguous_format) if is_somebodys else base_output.contiguous()


@dataclass(frozen=True)
class Masks:
    """Dropout of one call: the seed (a tensor, so that nothing waits for the device) and the probability."""

    seed: Tensor | None
    p: float

    def bits(self, size: Sequence[int], stream: int) -> Tensor | None:
        """The packed keep-mask of a stream of size (M, K), made from the seed; None without dropout."""
        return None if self.seed is None else _dropout.packed_mask(self.seed, size[0], size[1], self.p, stream)

    @property
    def scale(self) -> float:
        return _dropout.keep_scale(self.p) if self.seed is not None else 1.0


@dataclass(frozen=True)
class Call:
    """What is constant in one call of the node: everything that is not a tensor."""

    ops: ModuleType
    dtype: torch.dtype
    scaling: float
    fusion: str | None
    p: float


class FusedLoRA(torch.autograd.Function):
    """y (..., n) = base_output + scaling * phi(S, T) B^T, accumulated into base_output's memory.

    Shapes: x, x_source (..., d); bottleneck (..., r); y (..., n); A (r, d); B (n, r); seed () int64 or None.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        x_source: Tensor | None,
        bottleneck: Tensor | None,
        y: Tensor,
        A: Tensor,
        B: Tensor,
        seed: Tensor | None,
        call: Call,
    ) -> Tensor:
        needs_x, needs_source, needs_bottleneck, _, needs_A, needs_B = ctx.needs_input_grad[:6]
        needs_hidden = needs_x or needs_source or needs_bottleneck or needs_A
        with without_autocast(x.device):
            masks = Masks(seed, call.p)
            x_MK, xs_MK = rows(x), None if x_source is None else rows(x_source)
            T, S = call.ops.shrink(
                x_MK,
                xs_MK,
                A,
                compute_dtype=call.dtype,
                mask=masks.bits(x_MK.shape, _dropout.TARGET_STREAM),
                mask_source=None if xs_MK is None else masks.bits(xs_MK.shape, _dropout.SOURCE_STREAM),
                keep_scale=masks.scale,
                sum_streams=call.fusion == "add",
            )
            if bottleneck is not None:
                S = rows(bottleneck).to(call.dtype)
            fusion = call.fusion
            if fusion == "add":  # linear: only H = S + T matters from here on
                T, S, fusion = (T if S is None else T.add_(S)), None, None
            call.ops.expand_(rows(y), T, S, B, scaling=call.scaling, fusion=fusion)
        ctx.mark_dirty(y)
        ctx.call, ctx.fusion = call, fusion
        keep_streams = needs_A
        keep_bottleneck = needs_B or (needs_hidden and fusion is not None)
        ctx.save_for_backward(
            x if keep_streams else None,
            x_source if keep_streams else None,
            T if keep_bottleneck else None,
            S if keep_bottleneck else None,
            A,
            B,
            seed,
        )
        ctx.x_like = (x.shape, x.dtype)
        ctx.source_like = None if x_source is None else (x_source.shape, x_source.dtype)
        ctx.bottleneck_like = None if bottleneck is None else (bottleneck.shape, bottleneck.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x_source, T, S, A, B, seed = ctx.saved_tensors
        call: Call = ctx.call
        ops = call.ops
        needs_x, needs_source, needs_bottleneck, needs_y, needs_A, needs_B = ctx.needs_input_grad[:6]
        needs_hidden = needs_x or needs_source or needs_bottleneck or needs_A
        dx = dx_source = d_bottleneck = dA = None
        with without_autocast(G.device):
            masks = Masks(seed, call.p)
            G_MN = rows(G)
            dT, dS, dB = ops.grad_bottleneck(
                G_MN if T is not None else G_MN.to(call.dtype),
                T,
                S,
                B,
                scaling=call.scaling,
                fusion=ctx.fusion,
                need_hidden=needs_hidden,
                need_B=needs_B,
                B_grad_dtype=B.dtype,
            )
            if call.fusion == "add":
                dS = dT
            two_streams = ctx.source_like is not None
            size = (G_MN.shape[0], A.shape[1])
            mask = masks.bits(size, _dropout.TARGET_STREAM) if needs_x or needs_A else None
            mask_source = (
                masks.bits(size, _dropout.SOURCE_STREAM) if two_streams and (needs_source or needs_A) else None
            )
            if needs_A:
                dA = ops.grad_weight(
                    dT,
                    rows(x),
                    dS if two_streams else None,
                    rows(x_source) if two_streams else None,
                    mask=mask,
                    mask_source=mask_source,
                    keep_scale=masks.scale,
                    grad_dtype=A.dtype,
                )
            if needs_x:
                shape, dtype = ctx.x_like
                dx = ops.grad_input(dT, A, mask=mask, keep_scale=masks.scale, dtype=dtype).view(shape)
            if needs_source:
                shape, dtype = ctx.source_like
                dx_source = ops.grad_input(dS, A, mask=mask_source, keep_scale=masks.scale, dtype=dtype).view(shape)
            if needs_bottleneck:
                shape, dtype = ctx.bottleneck_like
                d_bottleneck = dS.to(dtype).view(shape)
        return dx, dx_source, d_bottleneck, G if needs_y else None, dA, dB, None, None


def fused_lora(
    x: Tensor,
    x_source: Tensor | None,
    base_output: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    fusion: str | None = "add_relu",
    source_bottleneck: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y = base_output + scaling * phi(x_source A^T, x A^T) B^T for one projection (FLARE, section 3).

    Args:
        x: (..., m, d) target stream.
        x_source: (..., m, d) source stream, or None.
        base_output: (..., m, n) output of the frozen linear, whatever its quantisation. It is consumed: the result
            may stand in its memory, as with ``addmm_``; a leaf that requires grad, a view, or a tensor that shares
            memory with x or the source, is copied first.
        lora_A: (r, d) as PEFT stores it, shared by both streams.
        lora_B: (n, r) as PEFT stores it.
        scaling: alpha / r.
        fusion: one of ``FUSIONS``; None, or neither source given, is plain LoRA: phi(S, T) = T.
        source_bottleneck: (..., m, r) instead of x_source: S, already projected; differentiable.
        dropout_p: probability of zeroing an entry of x and x_source (independent masks), where ``training``.
        training: whether dropout acts.
        backend: "triton", "torch", "reference", or "auto" (see :func:`flare_kernels.select_backend`).

    Returns:
        (..., m, n) in base_output's dtype. Compute dtype: x's, or base_output's where autocast left x in float32; sums
        are float32 (float64 for float64 inputs). Gradients come in each parameter's dtype; differentiable once in x,
        base_output, lora_A, lora_B, source_bottleneck, x_source. dx is the adapter's share, dT A.

    Raises:
        TypeError: a non-floating tensor, or float64 mixed with another dtype.
        ValueError: shapes that do not fit, both source forms, an unknown fusion or backend, or a backend that cannot
            run here.
    """
    validation.check_fusion(fusion, backend)
    validation.check_numbers(scaling, dropout_p)
    validation.check_dtypes(
        {
            "x": x,
            "x_source": x_source,
            "base_output": base_output,
            "lora_A": lora_A,
            "lora_B": lora_B,
            "source_bottleneck": source_bottleneck,
        }
    )
    validation.check_streams(x, x_source, source_bottleneck)
    validation.check_adapter(x, base_output, lora_A, lora_B, source_bottleneck)
    if x_source is None and source_bottleneck is None:
        fusion = None
    if fusion is None:
        x_source = source_bottleneck = None
    if backend == "reference" or fusion in EAGER_FUSIONS:
        return reference.fused_lora(
            x,
            x_source,
            base_output,
            lora_A,
            lora_B,
            scaling=scaling,
            fusion=fusion,
            source_bottleneck=source_bottleneck,
            dropout_p=dropout_p,
            training=training,
        )
    dtype = compute_dtype(x, base_output)
    if backend == "auto":
        backend = select_backend(x.device, dtype, fusion)
    p = dropout_p if training else 0.0
    call = Call(primitives(backend, x.device, dtype), dtype, scaling, fusion, p)
    seed = _dropout.draw_seed(x.device) if p > 0.0 else None
    y = writable(base_output, x, x_source, source_bottleneck)
    return FusedLoRA.apply(x, x_source, source_bottleneck, y, lora_A, lora_B, seed, call)
