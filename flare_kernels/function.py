"""The autograd function over :mod:`flare_kernels.node`, and the public function for one projection.

Saved for backward: x and x_source as they came (only where an A asks for a gradient), T and S rounded to the compute
dtype (only H where phi is linear), A and B in the compute dtype where they had to be stacked or cast and are small
beside x, and with dropout the seed, from which the masks are made again. Never a cast or dropped-out copy of x. The
form for projections that share their input is in :mod:`flare_kernels.joint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dropout as _dropout
from . import library, node, reference, validation
from .fusion import EAGER_FUSIONS
from .node import Call, Hidden, Needs, without_autocast
from .reference import compute_dtype

#: Weights in the compute dtype are kept for the backward pass where x is so many times as large.
_KEPT_SHARE = 16


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


class FusedLoRA(torch.autograd.Function):
    """y_i (..., n_i) += s_i phi_i(S_i, T_i) B_i^T in the memory of every output that has an adapter.

    Shapes: x, x_source (..., d); seed () int64 or None; then, of the numbers that ``sizes`` states, outputs y_i, given
    S_i (..., r_i), A_i (r_i, d), B_i (n_i, r_i) in stacking order, and W_i (n_i, d) where products are owned.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        call: Call,
        sizes: tuple[int, ...],
        x: Tensor,
        x_source: Tensor | None,
        seed: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ys, Ss, As, Bs, Ws = split(tensors, sizes)
        _, needs_Ss, needs_As, needs_Bs, _ = split(ctx.needs_input_grad[5:], sizes)
        needs = Needs(ctx.needs_input_grad[2], ctx.needs_input_grad[3], needs_Ss, needs_As, needs_Bs)
        with without_autocast(x.device):
            hidden = node.forward(call, x, x_source, Ss, seed, ys, As, Bs, keep=needs.anything)
        ctx.mark_dirty(*ys)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.sizes, ctx.needs = call, sizes, needs
        keep_streams = any(needs.A)
        # T is needed for dB, and T and S where dH goes through phi
        nonlinear = any(group.launch_fusion is not None for group in call.groups)
        keep_hidden = any(needs.B) or (needs.hidden and nonlinear)
        A, B = (hidden.A if needs.x or needs.x_source else None), (hidden.B if needs.hidden else None)
        ctx.save_for_backward(
            x if keep_streams else None,
            x_source if keep_streams else None,
            hidden.T if keep_hidden else None,
            hidden.S if keep_hidden else None,
            _worth_keeping(A, As, x),
            _worth_keeping(B, Bs, x),
            seed,
            *(*As, *Bs, *Ws),
        )
        ctx.x_like = (x.shape, x.dtype)
        ctx.source_like = None if x_source is None else (x_source.shape, x_source.dtype)
        ctx.S_likes = [(S.shape, S.dtype) for S in Ss]
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        device = next((G.device for G in grads if G is not None), None)
        if device is None:
            return (None,) * len(ctx.needs_input_grad)
        call: Call = ctx.call
        x, x_source, T, S, A, B, seed, *rest = ctx.saved_tensors
        _, As, Bs, Ws = split(rest, (0, *ctx.sizes[2:]))
        (x_shape, x_dtype), source_like = ctx.x_like, ctx.source_like
        with without_autocast(device):
            found = node.backward(
                call,
                ctx.needs,
                x,
                x_source,
                Hidden(T, S, As[0] if A is None and len(As) == 1 and As[0].dtype == call.dtype else A, B),
                As,
                Bs,
                Ws,
                seed,
                grads,
                d=x_shape[-1],
                x_dtype=x_dtype,
                source_dtype=None if source_like is None else source_like[1],
            )
        needs_ys = ctx.needs_input_grad[5 : 5 + ctx.sizes[0]]
        return (
            None,
            None,
            None if found.x is None else found.x.view(x_shape),
            None if found.x_source is None else found.x_source.view(source_like[0]),
            None,
            *(G if need else None for G, need in zip(grads, needs_ys, strict=True)),
            *(
                None if dS is None else dS.to(to).view(like)
                for dS, (like, to) in zip(found.S, ctx.S_likes, strict=True)
            ),
            *found.A,
            *found.B,
            *([None] * len(Ws)),
        )


def _worth_keeping(stacked: Tensor | None, weights: Sequence[Tensor], x: Tensor) -> Tensor | None:
    """Weights that were stacked or cast, where they are small beside x; else the backward pass makes them again."""
    if stacked is None or any(stacked is weight for weight in weights) or _KEPT_SHARE * stacked.nbytes > x.nbytes:
        return None
    return stacked


def split(items: Sequence[Any], sizes: Sequence[int]) -> list[tuple[Any, ...]]:
    """Consecutive parts of a sequence."""
    parts, start = [], 0
    for size in sizes:
        parts.append(tuple(items[start : start + size]))
        start += size
    return parts


def apply(
    backend: str,
    dtype: torch.dtype,
    adapters: Sequence[library.Adapter],
    p: float,
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """One call of the node with gradients: in place, or as an operator of its own while torch.compile traces.

    adapters: (output index, rank, scaling, fusion) in stacking order, those that fuse first. p: dropout that acts.
    """
    p = p if adapters else 0.0
    seed = _dropout.draw_seed(x.device) if p > 0.0 else None
    if torch.compiler.is_compiling():
        return library.apply(backend, dtype, adapters, p, x, x_source, Ss, seed, ys, As, Bs, Ws)
    call = library.build_call(backend, x.device, dtype, adapters, outputs=len(ys), owns_products=bool(Ws), p=p)
    own: list[Tensor] = []
    for y in ys:  # none shares memory with another or with an input
        own.append(writable(y, x, x_source, *Ss, *own))
    sizes = (len(ys), len(Ss), len(As), len(Bs), len(Ws))
    return FusedLoRA.apply(call, sizes, x, x_source, seed, *own, *Ss, *As, *Bs, *Ws)  # type: ignore[no-any-return]


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
    Ss = [] if source_bottleneck is None else [source_bottleneck]
    adapters = [(0, lora_A.shape[0], float(scaling), fusion)]
    p = dropout_p if training else 0.0
    return apply(backend, dtype, adapters, p, x, x_source, Ss, [base_output], [lora_A], [lora_B], [])[0]
