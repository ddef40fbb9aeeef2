"""The adapters of projections that share their input: forward and backward over the primitives, without autograd.

    T = x A^T    S = x_source A^T    H_i = phi_i(S_i, T_i)    y_i = base_i + s_i H_i B_i^T            (paper, section 3)
    dB_i = s_i G_i^T H_i    dH_i = s_i G_i B_i    dA = dT^T x + dS^T x_source    dx = dT A            (G_i = dL/dy_i)

The A_i (r_i, d) are stacked in A (R, d), so each stream is read once for all projections. The T_i are columns of one
T (M, R). Projections that fuse with a source come first, so S (M, fused) belongs to the leading columns of T. Here,
fused is the sum of the ranks of these projections. If the frozen weights W_i are passed, the node also computes dx of
the frozen products, accumulated in the same buffer: dx = sum_i G_i W_i + dT A. For y and for dx there are two orders
(:mod:`flare_kernels.order`): the frozen products write the buffer and the adapters add to it, or the adapters write it
and the frozen products add to it.

Except for biases and seeds, tensors in this module are matrices. M is the number of tokens, K the input width d, and R
the stacked rank.
:mod:`flare_kernels.function` wraps the node in an autograd function, :mod:`flare_kernels.library` in operators for
``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dropout as _dropout
from .call import Call, Needs, ProjectionGroup

#: T, S, A and B, which the forward pass returns for the backward pass, in the compute dtype. T (M, R) is T + S for
#: "add". S (M, fused) is None if no phi needs it. The stacked A (R, d) is None if A was not stacked. The stacked
#: B (sum of n_i, r) is None if B was not stacked or already had the compute dtype.
Hidden = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
#: dx, dx_source, dS_i, dA_i and dB_i; None if not required. dx is the adapters' share, plus the frozen products' share
#: if the node computes it.
Grads = tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]

#: The dropout seeds of target and source, or None. They are tensors, so that the host does not wait for the device.
Seeds = tuple[Tensor, Tensor] | None

_Result = TypeVar("_Result")


def rows(x: Tensor) -> Tensor:
    """Return (..., m, c) as (M, c), as a view if the strides allow it."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def without_autocast(function: Callable[..., _Result], device: torch.device, *args: Any) -> _Result:
    """Return ``function(*args)`` with autocast disabled: the primitives cast their operands themselves."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return function(*args)
    return function(*args)


def dropout_mask(call: Call, seeds: Seeds, size: Sequence[int], stream: int) -> Tensor | None:
    """Return the packed dropout mask of a stream of size (M, K), generated from its seed; None without dropout."""
    if seeds is None:
        return None
    return _dropout.packed_mask(seeds[stream], size[0], size[1], call.p, stream, call.ops.dropout_mask)


# --- forward ----------------------------------------------------------------------------------------------------------


def forward(
    call: Call,
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    seeds: Seeds,
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    save_for_backward: bool,
    outs: Sequence[Tensor] | None = None,
    A: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> Hidden:
    """Add every adapter's share to its y (M, n_i), in place, or write the sum to ``outs``.

    Args:
        call: the constants.
        x, x_source: (M, d); x_source may be None.
        Ss: S (M, fused) instead of x_source, as one matrix or as one matrix per fusing projection; otherwise empty.
        seeds: dropout seeds of target and source, or None.
        ys: (M, n_i) of every output.
        As, Bs: (r_i, d) and (n_i, r_i), in stacking order.
        save_for_backward: whether a backward pass needs T and S.
        outs: destinations with the shapes and dtypes of ys; None: ys are overwritten.
        A: the stacked A (R, d) in the compute dtype if the caller has it, otherwise None.
        biases: (n_i,) or None for every output. If passed, y is not read: the bias plus the adapter's share are written
            to y. The decoding kernels are then not used.
    """
    if not call.projections:
        return None, None, None, None
    ops, dtype = call.ops, call.dtype
    targets = [*map(ys.__getitem__, call.adapted)]  # map loops in C, without a Python call per output
    results = None if outs is None else [*map(outs.__getitem__, call.adapted)]
    adapter_biases = None if biases is None else [*map(biases.__getitem__, call.adapted)]
    decodes = 0 < x.shape[0] <= call.decode_rows and x.shape[1] and biases is None
    if decodes and _one_dtype(targets) and _one_dtype(As) and _one_dtype(Bs):
        T, S = ops.decode(
            x,
            x_source,
            _columns(Ss, call),
            targets,
            As,
            Bs,
            compute_dtype=dtype,
            scalings=call.scalings,
            fusion=call.projections[0].fusion,
            save_for_backward=save_for_backward,
            outs=results,
        )
        return T, S, None, None
    if A is None:
        A = ops.stack(As, dtype)
    B, Bs = _cast_B(call, Bs)
    T, S = _shrink(call, x, x_source, Ss, A, seeds)
    if call.group is not None:
        group = call.group
        if group.launch_fusion is None and S is not None:
            T.add_(S)
        ops.expand_(
            targets,
            T,
            S if group.launch_fusion is not None else None,
            Bs,
            scalings=call.scalings,
            fusion=group.launch_fusion,
            outs=results,
            biases=adapter_biases,
        )
    else:
        for group in call.groups:
            at, columns = group.members, group.columns
            if group.fusion == "add" and S is not None:
                T[:, columns].add_(S[:, columns])
            ops.expand_(
                targets[at],
                T[:, columns],
                S[:, columns] if group.launch_fusion is not None and S is not None else None,
                Bs[at],
                scalings=group.scalings,
                fusion=group.launch_fusion,
                outs=None if results is None else results[at],
                biases=None if adapter_biases is None else adapter_biases[at],
            )
    return T, S if call.nonlinear else None, A, B


def _one_dtype(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0].dtype
    for tensor in tensors:  # noqa: SIM110  (a generator makes a call per tensor)
        if tensor.dtype != first:
            return False
    return True


def _columns(Ss: Sequence[Tensor], call: Call) -> Sequence[Tensor]:
    """Return S as one matrix (M, r_i) per projection."""
    if len(Ss) != 1 or len(call.projections) == 1:
        return Ss
    return Ss[0].split(call.ranks, dim=1)


def _cast_B(call: Call, Bs: Sequence[Tensor], B: Tensor | None = None) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Return (stacked B in the compute dtype, its parts), or (None, Bs) if Bs have that dtype or different ranks.

    B is cast once and not tile by tile, because every row of tiles reads it.
    """
    for B_i in Bs:
        if B_i.dtype != call.dtype and call.one_rank:
            B = call.ops.stack(Bs, call.dtype) if B is None else B
            return B, B.split([part.shape[0] for part in Bs])
    return None, Bs


def _shrink(
    call: Call, x: Tensor, x_source: Tensor | None, Ss: Sequence[Tensor], A: Tensor, seeds: Seeds
) -> tuple[Tensor, Tensor | None]:
    """Return T (M, R) and S (M, fused), or (T + S, None) if every phi is "add"."""
    shrink, dtype, scale = call.ops.shrink, call.dtype, call.keep_scale
    mask = None if seeds is None else dropout_mask(call, seeds, x.shape, _dropout.TARGET_STREAM)
    if x_source is None or not call.fused:
        T, _ = shrink(x, None, A, compute_dtype=dtype, mask=mask, keep_scale=scale)
        if not Ss:
            return T, None
        S = concat_columns(Ss) if len(Ss) > 1 else Ss[0]
        if S.dtype != dtype:
            S = S.to(dtype)
        return (T.add_(S), None) if call.only_adds else (T, S)
    mask_source = None if seeds is None else dropout_mask(call, seeds, x_source.shape, _dropout.SOURCE_STREAM)
    if call.fused == call.rank:
        return shrink(  # type: ignore[no-any-return]
            x,
            x_source,
            A,
            compute_dtype=dtype,
            mask=mask,
            mask_source=mask_source,
            keep_scale=scale,
            sum_streams=call.only_adds,
        )
    T, _ = shrink(x, None, A, compute_dtype=dtype, mask=mask, keep_scale=scale)
    _, S = shrink(None, x_source, A[: call.fused], compute_dtype=dtype, mask_source=mask_source, keep_scale=scale)
    return T, S


def concat_columns(parts: Sequence[Tensor]) -> Tensor:
    """Return matrices (M, r_i) as one (M, sum of r_i), without a copy if they are adjacent columns of one buffer."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    if len(parts) == 1:
        return first
    start = first.storage_offset()
    for part in parts:
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same_memory or part.stride() != first.stride() or part.storage_offset() != start or part.stride(1) != 1:
            return torch.cat(list(parts), dim=-1)
        start += part.shape[1]
    return first.as_strided((first.shape[0], width), first.stride())


# --- backward ---------------------------------------------------------------------------------------------------------


def backward(
    call: Call,
    needs: Needs,
    x: Tensor | None,
    x_source: Tensor | None,
    hidden: Hidden,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
    seeds: Seeds,
    Gs: Sequence[Tensor | None],
    width: int,
    x_dtype: torch.dtype,
    source_dtype: torch.dtype | None,
    source_columns: Sequence[int] = (),
    adapter_first: bool = False,
) -> Grads:
    """Return the required gradients: dx, dx_source (M, width), dS_i, dA_i (r_i, width), dB_i (n_i, r_i).

    Args:
        call: the constants.
        needs: the gradients to compute.
        x, x_source: (M, width); None if no A requires grad.
        hidden: the result of :func:`forward`.
        As, Bs: (r_i, width) and (n_i, r_i), in stacking order.
        Ws: (n_i, width) frozen weights, if the node computes dx of the frozen products; otherwise empty.
        seeds: as in :func:`forward`.
        Gs: dL/dy (M, n) of each output, None if the loss does not depend on it. At least one is not None.
        width: d.
        x_dtype: dtype of dx.
        source_dtype: dtype of dx_source; None without a second stream.
        source_columns: number of columns of each S that was passed to forward.
        adapter_first: whether the adapters' share of dx is written first (:mod:`flare_kernels.order`).
    """
    ops, dtype = call.ops, call.dtype
    T, S, A, B = hidden
    B_params = Bs
    if needs.hidden:  # otherwise only dB is computed, which does not read B
        _, Bs = _cast_B(call, Bs, B)
    dT, dS, dBs = _grad_bottleneck(call, needs, T, S, Bs, B_params, Gs, source_dtype is not None)
    dAs: list[Tensor | None] = [None] * call.count
    dx = dx_source = None
    if A is None and As and (needs.x or needs.x_source):
        A = ops.stack(As, dtype)
    mask = None
    if seeds is not None and dT is not None and (needs.x or (needs.any_A and x is not None)):
        mask = dropout_mask(call, seeds, (dT.shape[0], width), _dropout.TARGET_STREAM)
    if needs.any_A and dT is not None and x is not None:
        dAs = _grad_A(call, needs, As, dT, dS, x, None if dS is None else x_source, seeds, mask)
    if needs.x:
        dx = _grad_x(call, Gs, Ws, dT, A, mask, x_dtype, adapter_first)
    if needs.x_source and dS is not None and A is not None and source_dtype is not None:
        mask = dropout_mask(call, seeds, (dS.shape[0], width), _dropout.SOURCE_STREAM)
        dx_source = ops.grad_input(dS, A[: call.fused], mask=mask, keep_scale=call.keep_scale, dtype=source_dtype)
    dSs: list[Tensor | None] = [None] * needs.count_S
    if needs.any_S and dS is not None:
        parts = (dS,) if len(source_columns) == 1 else dS.split(list(source_columns), dim=1)
        dSs = [part if needed else None for part, needed in zip(parts, needs.S, strict=True)]
    return dx, dx_source, dSs, dAs, dBs


def _grad_bottleneck(
    call: Call,
    needs: Needs,
    T: Tensor | None,
    S: Tensor | None,
    Bs: Sequence[Tensor],
    B_params: Sequence[Tensor],
    Gs: Sequence[Tensor | None],
    two_streams: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Return dT (M, R), dS (M, fused) and dB_i, from G_i = dL/dy_i. dB_i get the dtypes of ``B_params``."""
    dBs: list[Tensor | None] = [None] * call.count
    if not call.count or not needs.anything:
        return None, None, dBs
    missing, sample = False, None
    for projection in call.projections:
        if Gs[projection.output] is None:
            missing = True
        else:
            sample = Gs[projection.output]
    if sample is None:  # the loss depends only on outputs without an adapter
        return None, None, dBs
    size = sample.shape[0], call.rank
    allocate = torch.zeros if missing else torch.empty
    dT = allocate(size, dtype=call.dtype, device=sample.device) if needs.hidden else None
    dS = None
    if dT is not None and call.fused and (two_streams or needs.any_S or call.nonlinear):
        # if every phi is linear, dS is dT; otherwise one pass computes both derivatives
        if call.nonlinear:
            dS = allocate((size[0], call.fused), dtype=call.dtype, device=sample.device)
        else:
            dS = dT if call.fused == call.rank else dT[:, : call.fused]
    if call.group is not None and not missing and _one_dtype(B_params):
        group_dBs = call.ops.grad_bottleneck(
            [Gs[projection.output] for projection in call.projections],
            T,
            S if call.nonlinear else None,
            Bs,
            scalings=call.scalings,
            fusion=call.group.launch_fusion,
            dT=dT,
            dS=dS if call.nonlinear else None,
            B_grad_dtype=B_params[0].dtype if needs.any_B else None,
        )
        if group_dBs is not None:
            dBs = group_dBs
            if not needs.all_B:
                dBs = [dB if need else None for dB, need in zip(group_dBs, needs.B, strict=True)]
        return dT, dS, dBs
    for group in call.groups:
        _grad_group(call, needs, group, T, S, Bs, B_params, Gs, dT, dS, dBs)
        if dS is not None and dT is not None and group.fusion == "add" and call.nonlinear:
            dS[:, group.columns].copy_(dT[:, group.columns])
    return dT, dS, dBs


def _grad_group(
    call: Call,
    needs: Needs,
    group: ProjectionGroup,
    T: Tensor | None,
    S: Tensor | None,
    Bs: Sequence[Tensor],
    B_params: Sequence[Tensor],
    Gs: Sequence[Tensor | None],
    dT: Tensor | None,
    dS: Tensor | None,
    dBs: list[Tensor | None],
) -> None:
    """Fill one group's columns of dT and dS, and its dB_i. If an output has no gradient, G_i = 0 for its projection."""
    at, columns = group.members, group.columns
    G_or_None = [Gs[projection.output] for projection in call.projections[at]]
    sample = next((G for G in G_or_None if G is not None), None)
    if sample is None or (dT is None and not any(needs.B[at])):
        return
    group_Gs = [
        sample.new_zeros((sample.shape[0], B.shape[0])) if G is None else G
        for G, B in zip(G_or_None, Bs[at], strict=True)
    ]
    fuses = group.launch_fusion is not None
    needs_dB, dtypes = needs.B[at], [B.dtype for B in B_params[at]]
    # one pass per dtype of dB
    for dtype_B in dict.fromkeys(dtype for dtype, need in zip(dtypes, needs_dB, strict=True) if need) or (None,):
        group_dBs = call.ops.grad_bottleneck(
            group_Gs,
            None if T is None else T[:, columns],
            None if S is None or not fuses else S[:, columns],
            Bs[at],
            scalings=group.scalings,
            fusion=group.launch_fusion,
            dT=None if dT is None else dT[:, columns],
            dS=None if dS is None or not fuses else dS[:, columns],
            B_grad_dtype=dtype_B,
        )
        for i, index in enumerate(range(at.start, at.stop)):
            if group_dBs is not None and needs_dB[i] and dtypes[i] == dtype_B:
                dBs[index] = group_dBs[i]


def _grad_A(
    call: Call,
    needs: Needs,
    As: Sequence[Tensor],
    dT: Tensor,
    dS: Tensor | None,
    x: Tensor,
    x_source: Tensor | None,
    seeds: Seeds,
    mask: Tensor | None,
) -> list[Tensor | None]:
    """Return dA of each adapter, from one pass over each stream; None for an A that needs no gradient.

    ``mask``: the target's dropout mask. The source's mask is generated here.
    """
    grad_weight, scale = call.ops.grad_weight, call.keep_scale
    grad_dtype = As[0].dtype if _one_dtype(As) else call.exact
    mask_source = None
    if x_source is not None and seeds is not None:
        mask_source = dropout_mask(call, seeds, x_source.shape, _dropout.SOURCE_STREAM)
    if x_source is not None and call.fused < call.rank:
        dA = grad_weight(dT, x, None, None, mask=mask, keep_scale=scale, grad_dtype=call.exact)
        dA[: call.fused] += grad_weight(
            None, None, dS, x_source, mask_source=mask_source, keep_scale=scale, grad_dtype=call.exact
        )
    else:
        dS = None if x_source is None else dS
        masks = {"mask": mask, "mask_source": mask_source, "keep_scale": scale}
        dA = grad_weight(dT, x, dS, x_source, **masks, grad_dtype=grad_dtype)
    dAs: list[Tensor | None] = []
    for projection, A, need in zip(call.projections, As, needs.A, strict=True):
        part = dA[projection.columns] if need else None
        dAs += (part if part is None or part.dtype == A.dtype else part.to(A.dtype),)
    return dAs


def _grad_x(
    call: Call,
    Gs: Sequence[Tensor | None],
    Ws: Sequence[Tensor],
    dT: Tensor | None,
    A: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    adapter_first: bool,
) -> Tensor | None:
    """Return dx in one buffer: the adapters' share, plus the frozen products' share if Ws are passed."""
    dx = None
    if adapter_first and dT is not None and A is not None:
        dx = call.ops.grad_input(dT, A, mask=mask, keep_scale=call.keep_scale, dtype=call.dtype)
    for G, W in zip(Gs, Ws, strict=False):
        if G is not None:
            if G.dtype != call.dtype or W.dtype != call.dtype:
                G, W = G.to(call.dtype), W.to(call.dtype)
            dx = G @ W if dx is None else dx.addmm_(G, W)
    if not adapter_first and dT is not None and A is not None:
        share_dtype = dtype if dx is None else call.dtype
        dx = call.ops.grad_input(dT, A, mask=mask, keep_scale=call.keep_scale, dtype=share_dtype, out=dx)
    return dx if dx is None or dx.dtype == dtype else dx.to(dtype)
