"""The adapters of several projections that share their input (q, k, v), as one autograd node.

Each stream is read once for all adapters: the A matrices are stacked, so T = x [A_1; A_2; ...]^T is one product, and
so are dA and dx. With the frozen weights given, the node also owns dx of the frozen products, accumulated into one
buffer: dx = sum_p G_p W_p + dT [A_1; A_2; ...].

Stacking order: projections that fuse come first, so S needs only the leading rows of the stacked A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dropout as _dropout
from . import reference, validation
from .backends import primitives, select_backend
from .function import Masks, rows, without_autocast, writable
from .reference import compute_dtype

Adapter = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Projection:
    """One adapted projection: its name, constants, and the columns of the stacked bottleneck that are its own."""

    name: str
    scaling: float
    fusion: str | None
    columns: slice


@dataclass(frozen=True)
class JointCall:
    """What is constant in one call of the joint node; `fused` columns of the stacked bottleneck have a source."""

    ops: ModuleType
    dtype: torch.dtype
    projections: tuple[Projection, ...]
    names: tuple[str, ...]
    fused: int
    p: float
    has_weights: bool


class FusedLoRAJoint(torch.autograd.Function):
    """y_p += scaling_p * phi_p(S_p, T_p) B_p^T for every projection p, each stream read once.

    Shapes: x, x_source (..., d); S_cat (..., R_fused) or None; then per name y (..., n_p), per adapter A (r_p, d) and
    B (n_p, r_p), per name W (n_p, d) where the node owns dx of the frozen products.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        call: JointCall,
        x: Tensor,
        x_source: Tensor | None,
        S_cat: Tensor | None,
        seed: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ys, As, Bs, Ws = _split(call, tensors)
        count = len(call.projections)
        first_A = 5 + len(ys)
        needs_x, needs_source, needs_S = ctx.needs_input_grad[1:4]
        needs_A = ctx.needs_input_grad[first_A : first_A + count]
        needs_B = ctx.needs_input_grad[first_A + count : first_A + 2 * count]
        needs_hidden = needs_x or needs_source or needs_S or any(needs_A)
        with without_autocast(x.device):
            A_cat = torch.cat([A.to(call.dtype) for A in As]) if As else None
            T_cat = None
            if A_cat is not None:
                masks = Masks(seed, call.p)
                x_MK, xs_MK = rows(x), None if x_source is None else rows(x_source)
                mask = masks.bits(x_MK.shape, _dropout.TARGET_STREAM)
                options: dict[str, Any] = {"compute_dtype": call.dtype, "keep_scale": masks.scale}
                if xs_MK is not None:
                    bits = masks.bits(xs_MK.shape, _dropout.SOURCE_STREAM)
                    if call.fused == A_cat.shape[0]:
                        T_cat, S_cat = call.ops.shrink(x_MK, xs_MK, A_cat, mask=mask, mask_source=bits, **options)
                    else:
                        T_cat, _ = call.ops.shrink(x_MK, None, A_cat, mask=mask, **options)
                        _, S_cat = call.ops.shrink(None, xs_MK, A_cat[: call.fused], mask_source=bits, **options)
                else:
                    T_cat, _ = call.ops.shrink(x_MK, None, A_cat, mask=mask, **options)
                    S_cat = None if S_cat is None else rows(S_cat).to(call.dtype)
            hidden: list[Tensor | None] = []
            for projection, B, needs in zip(call.projections, Bs, needs_B, strict=True):
                T, S = _bottleneck(projection, T_cat, S_cat)
                y = ys[call.names.index(projection.name)]
                fusion = None if projection.fusion == "add" else projection.fusion
                if projection.fusion == "add":  # linear: only H = S + T matters from here on
                    T, S = T if S is None else T + S, None
                call.ops.expand_(rows(y), T, S, B, scaling=projection.scaling, fusion=fusion)
                keep = needs or (needs_hidden and fusion is not None)
                hidden += [T if keep else None, S if keep else None]
        ctx.mark_dirty(*ys)
        ctx.call = call
        keep_x = any(needs_A)
        ctx.save_for_backward(x if keep_x else None, x_source if keep_x else None, seed, *As, *Bs, *Ws, *hidden)
        ctx.x_like = (x.shape, x.dtype)
        ctx.source_like = None if x_source is None else (x_source.shape, x_source.dtype)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: JointCall = ctx.call
        count, total = len(call.projections), len(call.names)
        x, x_source, seed, *rest = ctx.saved_tensors
        As, Bs = rest[:count], rest[count : 2 * count]
        Ws = rest[2 * count : 2 * count + (total if call.has_weights else 0)]
        hidden = rest[len(rest) - 2 * count :]
        needs_x, needs_source, needs_S = ctx.needs_input_grad[1:4]
        first_A = 5 + total
        needs_y = ctx.needs_input_grad[5:first_A]
        needs_A = ctx.needs_input_grad[first_A : first_A + count]
        needs_B = ctx.needs_input_grad[first_A + count : first_A + 2 * count]
        shape, dtype = ctx.x_like
        M, K = shape[:-1].numel(), shape[-1]
        R = sum(A.shape[0] for A in As)
        two_streams = ctx.source_like is not None
        want_hidden = needs_x or needs_source or needs_S or any(needs_A)
        dx = dx_source = dS_cat = None
        dAs: list[Tensor | None] = [None] * count
        dBs: list[Tensor | None] = [None] * count
        device = next((g.device for g in grads if g is not None), x.device if x is not None else None)
        if device is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(device):
            masks = Masks(seed, call.p)
            dT_cat = torch.zeros(M, R, dtype=call.dtype, device=device) if count and want_hidden else None
            needs_dS = want_hidden and call.fused and (two_streams or needs_S)
            dS_cat = torch.zeros(M, call.fused, dtype=call.dtype, device=device) if needs_dS else None
            for index, (projection, B) in enumerate(zip(call.projections, Bs, strict=True)):
                G = grads[call.names.index(projection.name)]
                if G is None:
                    continue
                T, S = hidden[2 * index], hidden[2 * index + 1]
                G_MN = rows(G)
                own_T = None if dT_cat is None else dT_cat[:, projection.columns]
                own_S = None if dS_cat is None or projection.fusion is None else dS_cat[:, projection.columns]
                linear = S is None
                _, _, dBs[index] = call.ops.grad_bottleneck(
                    G_MN if T is not None else G_MN.to(call.dtype),
                    T,
                    S,
                    B,
                    scaling=projection.scaling,
                    fusion=None if linear else projection.fusion,
                    need_hidden=want_hidden,
                    need_B=needs_B[index],
                    B_grad_dtype=B.dtype,
                    out_dT=own_T,
                    out_dS=None if linear else own_S,
                )
                if linear and own_S is not None and own_T is not None:  # add: dS = dT
                    own_S.copy_(own_T)
            if any(needs_A) and dT_cat is not None:
                dAs = _grad_A(call, As, dT_cat, dS_cat, x, x_source, masks)
            if needs_x:
                dx = _grad_x(call, grads, Ws, As, dT_cat, masks, dtype, (M, K))
                dx = None if dx is None else dx.view(shape)
            if needs_source and dS_cat is not None:
                s_shape, s_dtype = ctx.source_like
                A_fused = torch.cat([A.to(call.dtype) for A in As])[: call.fused]
                bits = masks.bits((M, K), _dropout.SOURCE_STREAM)
                dx_source = call.ops.grad_input(dS_cat, A_fused, mask=bits, keep_scale=masks.scale, dtype=s_dtype)
                dx_source = dx_source.view(s_shape)
        dS_out = dS_cat.view(*shape[:-1], call.fused) if needs_S and dS_cat is not None else None
        dys = [g if need else None for g, need in zip(grads, needs_y, strict=True)]
        dAs = [g if need else None for g, need in zip(dAs, needs_A, strict=True)]
        return (None, dx, dx_source, dS_out, None, *dys, *dAs, *dBs, *([None] * len(Ws)))


def _split(call: JointCall, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    total, count = len(call.names), len(call.projections)
    ys, rest = tensors[:total], tensors[total:]
    return ys, rest[:count], rest[count : 2 * count], rest[2 * count :]


def _bottleneck(projection: Projection, T_cat: Tensor | None, S_cat: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert T_cat is not None
    T = T_cat[:, projection.columns]
    if projection.fusion is None or S_cat is None:
        return T, None
    return T, S_cat[:, projection.columns]


def _grad_A(
    call: JointCall,
    As: list[Tensor],
    dT_cat: Tensor,
    dS_cat: Tensor | None,
    x: Tensor,
    x_source: Tensor | None,
    masks: Masks,
) -> list[Tensor | None]:
    """dA of all adapters from one pass over each stream."""
    x_MK, xs_MK = rows(x), None if x_source is None or dS_cat is None else rows(x_source)
    grad_dtype = torch.float32 if call.dtype != torch.float64 else torch.float64
    mask = masks.bits(x_MK.shape, _dropout.TARGET_STREAM)
    mask_source = None if xs_MK is None else masks.bits(xs_MK.shape, _dropout.SOURCE_STREAM)
    if xs_MK is not None and call.fused < dT_cat.shape[1]:
        dA_cat = call.ops.grad_weight(
            dT_cat, x_MK, None, None, mask=mask, keep_scale=masks.scale, grad_dtype=grad_dtype
        )
        dA_cat[: call.fused] += call.ops.grad_weight(
            None, None, dS_cat, xs_MK, mask_source=mask_source, keep_scale=masks.scale, grad_dtype=grad_dtype
        )
    else:
        dA_cat = call.ops.grad_weight(
            dT_cat,
            x_MK,
            dS_cat if xs_MK is not None else None,
            xs_MK,
            mask=mask,
            mask_source=mask_source,
            keep_scale=masks.scale,
            grad_dtype=grad_dtype,
        )
    return [dA_cat[p.columns].to(A.dtype) for p, A in zip(call.projections, As, strict=True)]


def _grad_x(
    call: JointCall,
    grads: tuple[Tensor | None, ...],
    Ws: list[Tensor],
    As: list[Tensor],
    dT_cat: Tensor | None,
    masks: Masks,
    dtype: torch.dtype,
    size: tuple[int, int],
) -> Tensor | None:
    """One dx buffer: the frozen products' share where the node owns it, then the adapters' share on top."""
    dx: Tensor | None = None
    for G, W in zip(grads, Ws, strict=False):
        if G is not None:
            G_MN, W_NK = rows(G).to(call.dtype), W.to(call.dtype)
            dx = G_MN @ W_NK if dx is None else dx.addmm_(G_MN, W_NK)
    if dT_cat is not None:
        A_cat = torch.cat([A.to(call.dtype) for A in As])
        if dx is not None and masks.seed is None:
            dx.addmm_(dT_cat, A_cat)
        else:
            bits = masks.bits(size, _dropout.TARGET_STREAM)
            share = call.ops.grad_input(dT_cat, A_cat, mask=bits, keep_scale=masks.scale, dtype=call.dtype)
            dx = share if dx is None else dx.add_(share)
    return None if dx is None else dx.to(dtype)


def fused_lora_qkv(
    x: Tensor,
    x_source: Tensor | None,
    base_outputs: Mapping[str, Tensor],
    adapters: Mapping[str, Adapter],
    *,
    fusion: str | Mapping[str, str | None] | None = "add_relu",
    source_bottleneck: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """:func:`flare_kernels.fused_lora` for projections that share their input, reading each stream once.

    Args:
        x: (..., m, d) input of all projections.
        x_source: (..., m, d) source stream, or None.
        base_outputs: name -> (..., m, n) output of the frozen linear; consumed, as in ``fused_lora``.
        adapters: name -> (A (r, d), B (n, r), scaling) for any subset of the names; the others come back as they are.
        fusion: one name for all adapters, or name -> fusion (None, or a name left out: plain LoRA).
        source_bottleneck: name -> S (..., m, r) instead of x_source; differentiable. A name left out is plain LoRA.
        weights: name -> frozen weight W (n, d). With it the node owns dx of the frozen products too (one buffer):
            give base_outputs without a graph, computed under ``torch.no_grad()``.
        dropout_p, training: one mask for x and one for x_source, shared by the projections (PEFT draws one per
            projection; the distribution of each projection's gradient is the same).
        backend: as in ``fused_lora``.

    Returns:
        name -> (..., m, n), in the order of base_outputs.

    Raises:
        TypeError, ValueError: as ``fused_lora``; also names in one mapping that base_outputs lacks, and base_outputs
            with a graph beside ``weights`` (their dx would count twice).
    """
    fusions = _check(x, x_source, base_outputs, adapters, fusion, source_bottleneck, weights, dropout_p, backend)
    p = dropout_p if training else 0.0
    if backend == "reference":
        return _reference(x, x_source, base_outputs, adapters, fusions, source_bottleneck, weights, p)
    # without weights a projection with no adapter has nothing to do in the node
    names = tuple(base_outputs) if weights is not None else tuple(name for name in base_outputs if name in adapters)
    if not names:
        return dict(base_outputs)
    dtype = compute_dtype(x, next(iter(base_outputs.values())))
    if backend == "auto":
        backend = select_backend(x.device, dtype)
    ordered = sorted(adapters, key=lambda name: fusions[name] is None)
    projections, start = [], 0
    for name in ordered:
        r = adapters[name][0].shape[0]
        projections.append(Projection(name, adapters[name][2], fusions[name], slice(start, start + r)))
        start += r
    fusing = [p_.name for p_ in projections if p_.fusion is not None]
    fused = sum(adapters[name][0].shape[0] for name in fusing)
    S_cat = None
    if source_bottleneck is not None and fusing:
        S_cat = torch.cat([source_bottleneck[name] for name in fusing], dim=-1)
    ops = primitives(backend, x.device, dtype)
    call = JointCall(ops, dtype, tuple(projections), names, fused, p, weights is not None)
    outputs = FusedLoRAJoint.apply(
        call,
        x,
        x_source if fusing else None,
        S_cat,
        _dropout.draw_seed(x.device) if p > 0.0 else None,
        *_writable(base_outputs, names, x, x_source, S_cat),
        *(adapters[name][0] for name in ordered),
        *(adapters[name][1] for name in ordered),
        *((weights[name] for name in names) if weights is not None else ()),
    )
    results = dict(zip(names, outputs, strict=True))
    return {name: results.get(name, y) for name, y in base_outputs.items()}


def _writable(base_outputs: Mapping[str, Tensor], names: tuple[str, ...], *beside: Tensor | None) -> list[Tensor]:
    """The outputs to accumulate into; none shares memory with another or with a tensor ``beside``."""
    ys: list[Tensor] = []
    for name in names:
        ys.append(writable(base_outputs[name], *beside, *ys))
    return ys


def _check(
    x: Tensor,
    x_source: Tensor | None,
    base_outputs: Mapping[str, Tensor],
    adapters: Mapping[str, Adapter],
    fusion: str | Mapping[str, str | None] | None,
    source_bottleneck: Mapping[str, Tensor] | None,
    weights: Mapping[str, Tensor] | None,
    dropout_p: float,
    backend: str,
) -> dict[str, str | None]:
    """Validate a joint call; the fusion of every adapter (None: plain LoRA)."""
    validation.check_numbers(1.0, dropout_p)
    validation.check_dtypes({"x": x, "x_source": x_source})
    validation.check_streams(x, x_source, None)
    for argument, mapping in (("adapters", adapters), ("source_bottleneck", source_bottleneck or {})):
        unknown = sorted(set(mapping) - set(base_outputs))
        if unknown:
            raise ValueError(f"{argument} names {unknown}, base_outputs has {sorted(base_outputs)}")
    if weights is not None and set(weights) != set(base_outputs):
        raise ValueError(f"weights names {sorted(weights)}, base_outputs has {sorted(base_outputs)}: give all or none")
    if isinstance(fusion, Mapping) and set(fusion) - set(base_outputs):
        raise ValueError(
            f"fusion names {sorted(set(fusion) - set(base_outputs))}, base_outputs has {sorted(base_outputs)}"
        )
    for own in fusion.values() if isinstance(fusion, Mapping) else (fusion,):
        validation.check_fusion(own, "torch" if backend == "auto" else backend)
    for name, W in (weights or {}).items():
        validation.check_weight(x, base_outputs[name], W, where=name)
    fusions: dict[str, str | None] = {}
    for name, (A, B, scaling) in adapters.items():
        validation.check_numbers(scaling, dropout_p)
        own = fusion.get(name) if isinstance(fusion, Mapping) else fusion
        S = None if source_bottleneck is None else source_bottleneck.get(name)
        tensors = {
            "x": x,
            "x_source": x_source,
            f"base_outputs[{name!r}]": base_outputs[name],
            "lora_A": A,
            "lora_B": B,
        }
        validation.check_dtypes({**tensors, "source_bottleneck": S})
        validation.check_streams(x, x_source, S)
        validation.check_adapter(x, base_outputs[name], A, B, S, where=name)
        fusions[name] = None if x_source is None and S is None else own
    if weights is not None:
        tracked = sorted(name for name, y in base_outputs.items() if y.requires_grad)
        if tracked:
            raise ValueError(
                f"base_outputs {tracked} require grad while weights are given: the node computes their dx itself; "
                "compute base_outputs under torch.no_grad()"
            )
    return fusions


def _reference(
    x: Tensor,
    x_source: Tensor | None,
    base_outputs: Mapping[str, Tensor],
    adapters: Mapping[str, Adapter],
    fusions: Mapping[str, str | None],
    source_bottleneck: Mapping[str, Tensor] | None,
    weights: Mapping[str, Tensor] | None,
    p: float,
) -> dict[str, Tensor]:
    """The joint form by the oracle, one projection after the other, with the same masks for all of them."""
    result = {}
    seed = _dropout.draw_seed(x.device) if p > 0.0 else torch.zeros((), dtype=torch.int64)
    dtype = compute_dtype(x, next(iter(base_outputs.values()))) if base_outputs else x.dtype
    x_target = reference.drop(x.to(dtype), p, seed, _dropout.TARGET_STREAM)
    x_other = None if x_source is None else reference.drop(x_source.to(dtype), p, seed, _dropout.SOURCE_STREAM)
    for name, y in base_outputs.items():
        if weights is not None:  # the value is y's, the gradient x W^T's
            product = x.to(dtype) @ weights[name].to(dtype).T
            y = y + (product - product.detach()).to(y.dtype)
        if name in adapters:
            A, B, scaling = adapters[name]
            S = None if source_bottleneck is None else source_bottleneck.get(name)
            y = reference.fused_lora(
                x_target,
                x_other if S is None else None,
                y,
                A,
                B,
                scaling=scaling,
                fusion=fusions[name],
                source_bottleneck=S,
            )
        result[name] = y
    return result
