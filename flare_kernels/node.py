"""The adapters of projections that share their input: forward and backward over the primitives, without autograd.

    T = x A^T    S = x_source A^T    H_i = phi_i(S_i, T_i)    y_i = base_i + s_i H_i B_i^T            (paper, section 3)
    dB_i = s_i G_i^T H_i    dH_i = s_i G_i B_i    dA = dT^T x + dS^T x_source    dx = dT A            (G_i = dL/dy_i)

The A_i (r_i, d) are stacked in A (R, d), so each stream is read once for all projections, and the T_i lie side by side
in T (M, R). Projections that fuse come first: S has the leading columns only. With the frozen weights W_i the node owns
dx of the frozen products too, accumulated into the same buffer: dx = sum_i G_i W_i + dT A. Which of the two runs first,
in forward and in backward, is a choice (:mod:`flare_kernels.order`): the first writes, the second reads and adds.

Every tensor here is a matrix: M tokens, K input width d, N output width n, R rank.
:mod:`flare_kernels.function` makes an autograd function of this, :mod:`flare_kernels.library` operators for
``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dropout as _dropout
from .call import Call, Group, Needs

#: What the forward pass leaves for the backward pass, in the compute dtype: T (M, R), for "add" T + S; S (M, fused),
#: None where no phi needs it; the stacked A (R, d) and B (sum of n_i, r), None where they were not stacked or, for B,
#: already had the compute dtype.
Hidden = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
#: dx, dx_source, dS_i, dA_i and dB_i, None where not asked for. dx is the adapters' share, or all of it where the node
#: owns the frozen products.
Grads = tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]

#: The dropout seeds of the target and of the source, or None. They are tensors, so that the host does not wait.
Seeds = tuple[Tensor, Tensor] | None

_Result = TypeVar("_Result")


def rows(x: Tensor) -> Tensor:
    """Return (..., m, c) as (M, c); a view wherever the strides allow one."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def without_autocast(function: Callable[..., _Result], device: torch.device, *args: Any) -> _Result:
    """Return ``function(*args)`` without autocast: the primitives choose their dtypes, it would round a second time."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return function(*args)
    return function(*args)


def keep_bits(call: Call, seeds: Seeds, size: Sequence[int], stream: int) -> Tensor | None:
    """Return the packed keep-mask of a stream of size (M, K), made from its seed; None without dropout."""
    if seeds is None:
        return None
    return _dropout.packed_mask(seeds[stream], size[0], size[1], call.p, stream, call.ops.keep_bits)


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
    keep: bool,
    outs: Sequence[Tensor] | None = None,
    A: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> Hidden:
    """Add every adapter's share to its y (M, n_i), in place, or write the sum to ``outs``.

    Args:
        x, x_source: (M, d).
        Ss: given instead of x_source: S (M, fused), whole or cut into columns.
        ys: (M, n_i) of every output.
        As, Bs: (r_i, d) and (n_i, r_i), in stacking order.
        keep: whether a backward pass will follow.
        A: the stacked A (R, d) in the compute dtype, where the caller has it.
        biases: (n_i,) or None of every output; with them the share and its bias are written to y, whose values are not
            read, and the call is not one for decoding.
    """
    if not call.projections:
        return None, None, None, None
    ops, dtype = call.ops, call.dtype
    targets = [*map(ys.__getitem__, call.adapted)]  # a loop in C: calls are what this costs
    results = None if outs is None else [*map(outs.__getitem__, call.adapted)]
    own_biases = None if biases is None else [*map(biases.__getitem__, call.adapted)]
    few = 0 < x.shape[0] <= call.decode_rows and x.shape[1] and biases is None
    if few and _one_dtype(targets) and _one_dtype(As) and _one_dtype(Bs):
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
            keep=keep,
            outs=results,
        )
        return T, S, None, None
    if A is None:
        A = ops.stack(As, dtype)
    B, Bs = _narrow(call, Bs)
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
            biases=own_biases,
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
                biases=None if own_biases is None else own_biases[at],
            )
    return T, S if call.nonlinear else None, A, B


def _one_dtype(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0].dtype
    for tensor in tensors:  # noqa: SIM110  (a generator costs a call per tensor)
        if tensor.dtype != first:
            return False
    return True


def _columns(Ss: Sequence[Tensor], call: Call) -> Sequence[Tensor]:
    """Return S as one matrix (M, r_i) per projection."""
    if len(Ss) != 1 or len(call.projections) == 1:
        return Ss
    return Ss[0].split(call.ranks, dim=1)


def _narrow(call: Call, Bs: Sequence[Tensor], B: Tensor | None = None) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Return the stacked B and its parts in the compute dtype; None and the B_i as given where they have it already.

    They are cast once and not tile by tile, because every row of tiles reads them.
    """
    for one in Bs:
        if one.dtype != call.dtype and call.one_rank:
            B = call.ops.stack(Bs, call.dtype) if B is None else B
            return B, B.split([B_.shape[0] for B_ in Bs])
    return None, Bs


def _shrink(
    call: Call, x: Tensor, x_source: Tensor | None, Ss: Sequence[Tensor], A: Tensor, seeds: Seeds
) -> tuple[Tensor, Tensor | None]:
    """Return T (M, R) and S (M, fused); where every phi is "add" their sum, alone."""
    shrink, dtype, scale = call.ops.shrink, call.dtype, call.keep_scale
    mask = None if seeds is None else keep_bits(call, seeds, x.shape, _dropout.TARGET_STREAM)
    if x_source is None or not call.fused:
        T, _ = shrink(x, None, A, compute_dtype=dtype, mask=mask, keep_scale=scale)
        if not Ss:
            return T, None
        S = side_by_side(Ss) if len(Ss) > 1 else Ss[0]
        if S.dtype != dtype:
            S = S.to(dtype)
        return (T.add_(S), None) if call.only_adds else (T, S)
    bits = None if seeds is None else keep_bits(call, seeds, x_source.shape, _dropout.SOURCE_STREAM)
    if call.fused == call.rank:
        return shrink(  # type: ignore[no-any-return]
            x,
            x_source,
            A,
            compute_dtype=dtype,
            mask=mask,
            mask_source=bits,
            keep_scale=scale,
            sum_streams=call.only_adds,
        )
    T, _ = shrink(x, None, A, compute_dtype=dtype, mask=mask, keep_scale=scale)
    _, S = shrink(None, x_source, A[: call.fused], compute_dtype=dtype, mask_source=bits, keep_scale=scale)
    return T, S


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return matrices (M, r_i) as one (M, sum of r_i); without a copy where they are adjacent columns of one buffer."""
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
    """Return the gradients that are asked for: dx, dx_source (M, width), dS_i, dA_i (r_i, width), dB_i (n_i, r_i).

    Args:
        x, x_source: (M, width), where an A asks for a gradient.
        Gs: dL/dy (M, n) per output, None where the loss does not depend on it; at least one is given.
        source_dtype: None without a second stream.
        source_columns: columns of each S that was given.
        adapter_first: whether dx begins with the adapters' share (:mod:`flare_kernels.order`).
    """
    ops, dtype = call.ops, call.dtype
    T, S, A, B = hidden
    given_Bs = Bs
    if needs.hidden:  # otherwise only dB is formed, which does not read B
        _, Bs = _narrow(call, Bs, B)
    dT, dS, dBs = _grad_bottleneck(call, needs, T, S, Bs, given_Bs, Gs, source_dtype is not None)
    dAs: list[Tensor | None] = [None] * call.count
    dx = dx_source = None
    if A is None and As and (needs.x or needs.x_source):
        A = ops.stack(As, dtype)
    if needs.any_A and dT is not None and x is not None:
        dAs = _grad_A(call, needs, As, dT, dS, x, None if dS is None else x_source, seeds)
    if needs.x:
        dx = _grad_x(call, Gs, Ws, dT, A, seeds, width, x_dtype, adapter_first)
    if needs.x_source and dS is not None and A is not None and source_dtype is not None:
        bits = keep_bits(call, seeds, (dS.shape[0], width), _dropout.SOURCE_STREAM)
        dx_source = ops.grad_input(dS, A[: call.fused], mask=bits, keep_scale=call.keep_scale, dtype=source_dtype)
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
    given_Bs: Sequence[Tensor],
    Gs: Sequence[Tensor | None],
    two_streams: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Return dT (M, R), dS (M, fused) and dB_i, from dL/dy_i; ``given_Bs`` have the dtypes of dB_i."""
    dBs: list[Tensor | None] = [None] * call.count
    if not call.count or not needs.anything:
        return None, None, dBs
    missing, sample = False, None
    for projection in call.projections:
        if Gs[projection.output] is None:
            missing = True
        else:
            sample = Gs[projection.output]
    if sample is None:  # the loss depends on outputs without an adapter only
        return None, None, dBs
    size = sample.shape[0], call.rank
    allocate = torch.zeros if missing else torch.empty
    dT = allocate(size, dtype=call.dtype, device=sample.device) if needs.hidden else None
    dS = None
    if dT is not None and call.fused and (two_streams or needs.any_S or call.nonlinear):
        # where every phi is linear dS is dT; a phi of two arguments has both derivatives in one pass
        if call.nonlinear:
            dS = allocate((size[0], call.fused), dtype=call.dtype, device=sample.device)
        else:
            dS = dT if call.fused == call.rank else dT[:, : call.fused]
    if call.group is not None and not missing and _one_dtype(given_Bs):
        found = call.ops.grad_bottleneck(
            [Gs[projection.output] for projection in call.projections],
            T,
            S if call.nonlinear else None,
            Bs,
            scalings=call.scalings,
            fusion=call.group.launch_fusion,
            dT=dT,
            dS=dS if call.nonlinear else None,
            B_grad_dtype=given_Bs[0].dtype if needs.any_B else None,
        )
        if found is not None:
            dBs = found if needs.all_B else [dB if need else None for dB, need in zip(found, needs.B, strict=True)]
        return dT, dS, dBs
    for group in call.groups:
        _grad_group(call, needs, group, T, S, Bs, given_Bs, Gs, dT, dS, dBs)
        if dS is not None and dT is not None and group.fusion == "add" and call.nonlinear:
            dS[:, group.columns].copy_(dT[:, group.columns])
    return dT, dS, dBs


def _grad_group(
    call: Call,
    needs: Needs,
    group: Group,
    T: Tensor | None,
    S: Tensor | None,
    Bs: Sequence[Tensor],
    given_Bs: Sequence[Tensor],
    Gs: Sequence[Tensor | None],
    dT: Tensor | None,
    dS: Tensor | None,
    dBs: list[Tensor | None],
) -> None:
    """Fill one group's columns of dT and dS, and its dB_i; an output without a gradient has one of zeros."""
    at, columns = group.members, group.columns
    own = [Gs[projection.output] for projection in call.projections[at]]
    given = next((G for G in own if G is not None), None)
    if given is None or (dT is None and not any(needs.B[at])):
        return
    G_group = [
        given.new_zeros((given.shape[0], B.shape[0])) if G is None else G for G, B in zip(own, Bs[at], strict=True)
    ]
    fuses = group.launch_fusion is not None
    wanted, dtypes = needs.B[at], [B.dtype for B in given_Bs[at]]
    # one pass per dtype of B's gradients
    for dtype_B in dict.fromkeys(to for to, want in zip(dtypes, wanted, strict=True) if want) or (None,):
        found = call.ops.grad_bottleneck(
            G_group,
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
            if found is not None and wanted[i] and dtypes[i] == dtype_B:
                dBs[index] = found[i]


def _grad_A(
    call: Call,
    needs: Needs,
    As: Sequence[Tensor],
    dT: Tensor,
    dS: Tensor | None,
    x: Tensor,
    x_source: Tensor | None,
    seeds: Seeds,
) -> list[Tensor | None]:
    """Return dA of all adapters from one pass over each stream, summed in float32 (float64 for float64)."""
    grad_weight, scale = call.ops.grad_weight, call.keep_scale
    grad_dtype = As[0].dtype if _one_dtype(As) else call.exact
    mask = None if seeds is None else keep_bits(call, seeds, x.shape, _dropout.TARGET_STREAM)
    bits = None
    if x_source is not None and seeds is not None:
        bits = keep_bits(call, seeds, x_source.shape, _dropout.SOURCE_STREAM)
    if x_source is not None and call.fused < call.rank:
        dA = grad_weight(dT, x, None, None, mask=mask, keep_scale=scale, grad_dtype=call.exact)
        dA[: call.fused] += grad_weight(
            None, None, dS, x_source, mask_source=bits, keep_scale=scale, grad_dtype=call.exact
        )
    else:
        dS = None if x_source is None else dS
        dA = grad_weight(dT, x, dS, x_source, mask=mask, mask_source=bits, keep_scale=scale, grad_dtype=grad_dtype)
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
    seeds: Seeds,
    width: int,
    dtype: torch.dtype,
    adapter_first: bool,
) -> Tensor | None:
    """Return one dx buffer: the frozen products' share where the node owns it, and the adapters' share."""
    dx = bits = None
    if dT is not None and seeds is not None:
        bits = keep_bits(call, seeds, (dT.shape[0], width), _dropout.TARGET_STREAM)
    if adapter_first and dT is not None and A is not None:
        dx = call.ops.grad_input(dT, A, mask=bits, keep_scale=call.keep_scale, dtype=call.dtype)
    for G, W in zip(Gs, Ws, strict=False):
        if G is not None:
            if G.dtype != call.dtype or W.dtype != call.dtype:
                G, W = G.to(call.dtype), W.to(call.dtype)
            dx = G @ W if dx is None else dx.addmm_(G, W)
    if not adapter_first and dT is not None and A is not None:
        share_dtype = dtype if dx is None else call.dtype
        dx = call.ops.grad_input(dT, A, mask=bits, keep_scale=call.keep_scale, dtype=share_dtype, out=dx)
    return dx if dx is None or dx.dtype == dtype else dx.to(dtype)
