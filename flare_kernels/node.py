"""The adapters of projections that share their input: forward and backward over the primitives, without autograd.

    T = x A^T    S = x_source A^T    H_i = phi_i(S_i, T_i)    y_i = base_i + s_i H_i B_i^T            (paper, section 3)
    dB_i = s_i G_i^T H_i    dH_i = s_i G_i B_i    dA = dT^T x + dS^T x_source    dx = dT A            (G_i = dL/dy_i)

The A_i (r_i, d) stand below each other in A (R, d), so each stream is read once for all projections, and the T_i beside
each other in T (M, R). Projections that fuse come first: S has the leading columns only. With the frozen weights W_i
the node owns dx of the frozen products too, accumulated into the same buffer: dx = sum_i G_i W_i + dT A.

:mod:`flare_kernels.function` makes an autograd function of this, :mod:`flare_kernels.library` operators for
``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import dropout as _dropout


def rows(x: Tensor) -> Tensor:
    """(..., m, c) as (M, c); a view wherever the strides allow one."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The primitives choose their dtypes themselves; autocast inside them would round a second time."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@dataclass(frozen=True)
class Masks:
    """Dropout of one call: the seed (a tensor, so that nothing waits for the device) and the probability."""

    seed: Tensor | None
    p: float
    keep_bits: Any = None

    def bits(self, size: Sequence[int], stream: int) -> Tensor | None:
        """The packed keep-mask of a stream of size (M, K), made from the seed; None without dropout."""
        return (
            None
            if self.seed is None
            else _dropout.packed_mask(self.seed, size[0], size[1], self.p, stream, self.keep_bits)
        )

    @property
    def scale(self) -> float:
        return _dropout.keep_scale(self.p) if self.seed is not None else 1.0


@dataclass(frozen=True)
class Projection:
    """One adapted projection: its output's index, its constants, and its columns of T."""

    output: int
    scaling: float
    fusion: str | None
    columns: slice

    @property
    def rank(self) -> int:
        return self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Group:
    """Neighbouring projections of one phi and one rank, which a launch can hold; ``columns`` of T are theirs.

    "add" is linear: only H = S + T matters once it is formed, so in a launch it is plain LoRA of that sum.
    """

    fusion: str | None
    members: slice
    columns: slice

    @property
    def launch_fusion(self) -> str | None:
        return None if self.fusion == "add" else self.fusion


@dataclass(frozen=True)
class Call:
    """What is constant in one call of the node. ``projections`` in stacking order: those that fuse first.

    ops: the module of primitives. outputs: how many tensors are accumulated into, adapted or not. owns_products:
    whether the frozen weights are given. p: probability of dropping an entry of the streams.
    """

    ops: Any
    dtype: torch.dtype
    projections: tuple[Projection, ...]
    outputs: int
    owns_products: bool
    p: float

    @cached_property
    def rank(self) -> int:
        """R: columns of T."""
        return self.projections[-1].columns.stop if self.projections else 0

    @cached_property
    def fused(self) -> int:
        """Leading columns of T that have a source."""
        return sum(projection.rank for projection in self.projections if projection.fusion is not None)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        groups: list[Group] = []
        for index, projection in enumerate(self.projections):
            last = groups[-1] if groups else None
            alike = last is not None and last.fusion == projection.fusion
            if last is not None and alike and self.projections[last.members.start].rank == projection.rank:
                members, columns = (
                    slice(last.members.start, index + 1),
                    slice(last.columns.start, projection.columns.stop),
                )
                groups[-1] = Group(last.fusion, members, columns)
            else:
                groups.append(Group(projection.fusion, slice(index, index + 1), projection.columns))
        return tuple(groups)

    @cached_property
    def only_adds(self) -> bool:
        """Whether every projection's H is S + T, so that one sum serves all."""
        return bool(self.projections) and all(projection.fusion == "add" for projection in self.projections)


def make_call(
    ops: Any,
    dtype: torch.dtype,
    adapters: Sequence[tuple[int, int, float, str | None]],
    *,
    outputs: int,
    owns_products: bool,
    p: float,
) -> Call:
    """A call from (output index, rank, scaling, fusion) per adapter, in stacking order."""
    projections, start = [], 0
    for output, rank, scaling, fusion in adapters:
        projections.append(Projection(output, float(scaling), fusion, slice(start, start + rank)))
        start += rank
    return Call(ops, dtype, tuple(projections), outputs, owns_products, p)


@dataclass
class Hidden:
    """What the forward pass leaves for the backward pass, in the compute dtype.

    T (M, R): for "add" T + S. S (M, fused): None where no phi needs it. A (R, d) and B (sum of n_i, r): the weights
    below each other; None where they were not stacked or, for B, had the compute dtype.
    """

    T: Tensor | None = None
    S: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for."""

    x: bool
    x_source: bool
    S: tuple[bool, ...]
    A: tuple[bool, ...]
    B: tuple[bool, ...]

    @property
    def hidden(self) -> bool:
        """Whether dT is needed on the way to something."""
        return self.x or self.x_source or any(self.S) or any(self.A)

    @property
    def anything(self) -> bool:
        return self.hidden or any(self.B)


@dataclass
class Grads:
    """Gradients, None where not asked for. dx is the adapters' share, or all of it where products are owned."""

    x: Tensor | None
    x_source: Tensor | None
    S: list[Tensor | None]
    A: list[Tensor | None]
    B: list[Tensor | None]


def forward(
    call: Call,
    x: Tensor,
    x_source: Tensor | None,
    Ss: Sequence[Tensor],
    seed: Tensor | None,
    ys: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    keep: bool,
    outs: Sequence[Tensor] | None = None,
) -> Hidden:
    """Adds every adapter's share to its y (..., n_i), in place, or to a copy of it in ``outs``.

    Shapes: x, x_source (..., d); Ss (..., r_i), given instead of x_source, for the projections that fuse; As (r_i, d);
    Bs (n_i, r_i), in stacking order. ``keep``: whether a backward pass will follow.
    """
    if not call.projections:
        return Hidden()
    ops, dtype = call.ops, call.dtype
    x_MK, xs_MK = rows(x), None if x_source is None else rows(x_source)
    S_given = [rows(S) for S in Ss]
    targets = [rows(ys[projection.output]) for projection in call.projections]
    results = None if outs is None else [rows(outs[projection.output]) for projection in call.projections]
    scalings = [projection.scaling for projection in call.projections]
    if _can_decode(call, x_MK, seed, targets, As, Bs):
        T, S = ops.decode(
            x_MK,
            xs_MK,
            S_given,
            targets,
            As,
            Bs,
            compute_dtype=dtype,
            scalings=scalings,
            fusion=call.projections[0].fusion,
            keep=keep,
            outs=results,
        )
        return Hidden(T, S)
    A = ops.stack(As, dtype)
    B, Bs = _narrow(ops, Bs, dtype)
    T, S = _shrink(call, x_MK, xs_MK, S_given, A, Masks(seed, call.p, call.ops.keep_bits))
    for group in call.groups:
        at, columns = group.members, group.columns
        if group.fusion == "add" and S is not None:
            T[:, columns].add_(S[:, columns])
        T_group, S_group = (T, S) if len(call.groups) == 1 else (T[:, columns], None if S is None else S[:, columns])
        ops.expand_(
            targets[at],
            T_group,
            S_group if group.launch_fusion is not None else None,
            Bs[at],
            scalings=scalings[at],
            fusion=group.launch_fusion,
            outs=None if results is None else results[at],
        )
    if all(group.launch_fusion is None for group in call.groups):
        S = None
    return Hidden(T, S, A, B)


def _narrow(
    ops: Any, Bs: Sequence[Tensor], dtype: torch.dtype, B: Tensor | None = None
) -> tuple[Tensor | None, Sequence[Tensor]]:
    """The B_i in the compute dtype, and the tensor they are parts of; None and as they are where they have it already.

    Cast once, not tile by tile: every row of tiles reads them.
    """
    if all(one.dtype == dtype for one in Bs) or len({one.shape[1] for one in Bs}) > 1:
        return None, Bs
    B = ops.stack(Bs, dtype) if B is None else B
    return B, B.split([one.shape[0] for one in Bs])


def _can_decode(
    call: Call, x_MK: Tensor, seed: Tensor | None, ys: list[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor]
) -> bool:
    """Whether the primitives have a form for a few tokens that takes this call: one phi, one rank, no mix of dtypes."""
    if seed is not None or len(call.groups) != 1 or not hasattr(call.ops, "decode"):
        return False
    one_dtype = all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in (ys, As, Bs))
    return one_dtype and x_MK.shape[1] > 0 and call.ops.can_decode(x_MK.shape[0], [A.shape[0] for A in As])


def _shrink(
    call: Call, x_MK: Tensor, xs_MK: Tensor | None, S_given: list[Tensor], A: Tensor, masks: Masks
) -> tuple[Tensor, Tensor | None]:
    """T (M, R) and S (M, fused); where every phi is "add" their sum, alone."""
    shrink, mask = call.ops.shrink, masks.bits(x_MK.shape, _dropout.TARGET_STREAM)
    options: dict[str, Any] = {"compute_dtype": call.dtype, "keep_scale": masks.scale}
    S: Tensor | None = None
    if xs_MK is None or not call.fused:
        T, _ = shrink(x_MK, None, A, mask=mask, **options)
        if S_given:
            S = side_by_side(S_given).to(call.dtype)
            return (T.add_(S), None) if call.only_adds else (T, S)
        return T, None
    bits = masks.bits(xs_MK.shape, _dropout.SOURCE_STREAM)
    if call.fused == call.rank:
        T, S = shrink(x_MK, xs_MK, A, mask=mask, mask_source=bits, sum_streams=call.only_adds, **options)
    else:
        T, _ = shrink(x_MK, None, A, mask=mask, **options)
        _, S = shrink(None, xs_MK, A[: call.fused], mask_source=bits, **options)
    return T, S


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Matrices (M, r_i) as one (M, sum of r_i): without a copy where they are neighbouring columns of one buffer."""
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


def backward(
    call: Call,
    needs: Needs,
    x: Tensor | None,
    x_source: Tensor | None,
    hidden: Hidden,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    Ws: Sequence[Tensor],
    seed: Tensor | None,
    grads: Sequence[Tensor | None],
    *,
    d: int,
    x_dtype: torch.dtype,
    source_dtype: torch.dtype | None,
) -> Grads:
    """The gradients that are asked for, as matrices: dx, dx_source (M, d), dS_i (M, r_i), dA_i, dB_i.

    grads: dL/dy (..., n) per output, None where the loss does not depend on it; at least one is there. x and x_source
    are given where an A asks for a gradient. source_dtype: None without a second stream.
    """
    ops, dtype = call.ops, call.dtype
    Gs = [None if G is None else rows(G) for G in grads]
    device, M = next((G.device, G.shape[0]) for G in Gs if G is not None)
    masks = Masks(seed, call.p, call.ops.keep_bits)
    dtypes = [B.dtype for B in Bs]
    if needs.hidden:  # else only dB is formed, which no B enters
        _, Bs = _narrow(ops, Bs, dtype, hidden.B)
    dT, dS, dBs = _to_bottleneck(call, needs, hidden, Bs, dtypes, Gs, source_dtype is not None, M, device)
    dAs: list[Tensor | None] = [None] * len(As)
    dx = dx_source = None
    A = hidden.A
    if A is None and As and (needs.x or needs.x_source):
        A = ops.stack(As, dtype)
    if any(needs.A) and dT is not None and x is not None:
        xs_MK = None if x_source is None or dS is None else rows(x_source)
        dAs = _grad_A(call, needs, [A_.dtype for A_ in As], dT, dS, rows(x), xs_MK, masks)
    if needs.x:
        dx = _grad_x(call, Gs, Ws, dT, A, masks, (M, d), x_dtype)
    if needs.x_source and dS is not None and A is not None and source_dtype is not None:
        bits = masks.bits((M, d), _dropout.SOURCE_STREAM)
        dx_source = ops.grad_input(dS, A[: call.fused], mask=bits, keep_scale=masks.scale, dtype=source_dtype)
    dSs: list[Tensor | None] = [None] * len(needs.S)
    if any(needs.S) and dS is not None:
        fusing = [projection for projection in call.projections if projection.fusion is not None]
        dSs = [
            dS[:, projection.columns] if needed else None for projection, needed in zip(fusing, needs.S, strict=True)
        ]
    return Grads(dx, dx_source, dSs, dAs, dBs)


def _to_bottleneck(
    call: Call,
    needs: Needs,
    hidden: Hidden,
    Bs: Sequence[Tensor],
    B_dtypes: list[torch.dtype],
    Gs: list[Tensor | None],
    two_streams: bool,
    M: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dT (M, R), dS (M, fused) and dB_i, from dL/dy_i."""
    dBs: list[Tensor | None] = [None] * len(Bs)
    reached = [any(Gs[p.output] is not None for p in call.projections[group.members]) for group in call.groups]
    allocate = torch.empty if all(reached) else torch.zeros
    wants_hidden = needs.hidden and bool(call.projections)
    dT = allocate((M, call.rank), dtype=call.dtype, device=device) if wants_hidden else None
    # where every phi is linear dS is dT; a phi of two arguments has both derivatives in one pass
    dS_is_dT = all(group.launch_fusion is None for group in call.groups)
    wants_dS = wants_hidden and call.fused > 0 and (two_streams or any(needs.S) or not dS_is_dT)
    dS = None
    if wants_dS and dT is not None:
        dS = dT[:, : call.fused] if dS_is_dT else allocate((M, call.fused), dtype=call.dtype, device=device)
    for group, is_reached in zip(call.groups, reached, strict=True):
        if not is_reached or (dT is None and not any(needs.B[group.members])):
            continue
        at, columns = group.members, group.columns
        members, B_group = call.projections[at], list(Bs[at])
        G_group = []
        for p, B in zip(members, B_group, strict=True):
            G = Gs[p.output]
            G_group.append(torch.zeros((M, B.shape[0]), dtype=call.dtype, device=device) if G is None else G)
        wanted, grad_dtypes = needs.B[at], B_dtypes[at]
        fuses = group.launch_fusion is not None
        dtypes: set[torch.dtype | None] = {to for to, want in zip(grad_dtypes, wanted, strict=True) if want}
        for dtype_B in dtypes or {None}:
            found = call.ops.grad_bottleneck(
                G_group,
                None if hidden.T is None else hidden.T[:, columns],
                hidden.S[:, columns] if fuses and hidden.S is not None else None,
                B_group,
                scalings=[p.scaling for p in members],
                fusion=group.launch_fusion,
                dT=None if dT is None else dT[:, columns],
                dS=None if dS is None or not fuses else dS[:, columns],
                B_grad_dtype=dtype_B,
            )
            for i, index in enumerate(range(at.start, at.stop)):
                if found is not None and wanted[i] and grad_dtypes[i] == dtype_B:
                    dBs[index] = found[i]
        if dS is not None and dT is not None and group.fusion == "add" and not dS_is_dT:
            dS[:, columns].copy_(dT[:, columns])
    return dT, dS, dBs


def _grad_A(
    call: Call,
    needs: Needs,
    dtypes: list[torch.dtype],
    dT: Tensor,
    dS: Tensor | None,
    x_MK: Tensor,
    xs_MK: Tensor | None,
    masks: Masks,
) -> list[Tensor | None]:
    """dA of all adapters from one pass over each stream, summed in float32 (float64 for float64)."""
    grad_weight = call.ops.grad_weight
    alike = len(set(dtypes)) == 1
    exact = torch.float64 if call.dtype == torch.float64 else torch.float32
    grad_dtype = dtypes[0] if alike else exact
    mask = masks.bits(x_MK.shape, _dropout.TARGET_STREAM)
    bits = None if xs_MK is None else masks.bits(xs_MK.shape, _dropout.SOURCE_STREAM)
    options: dict[str, Any] = {"keep_scale": masks.scale}
    if xs_MK is not None and call.fused < call.rank:
        dA = grad_weight(dT, x_MK, None, None, mask=mask, grad_dtype=exact, **options)
        dA[: call.fused] += grad_weight(None, None, dS, xs_MK, mask_source=bits, grad_dtype=exact, **options)
    else:
        dS = dS if xs_MK is not None else None
        dA = grad_weight(dT, x_MK, dS, xs_MK, mask=mask, mask_source=bits, grad_dtype=grad_dtype, **options)
    parts = [dA[projection.columns] for projection in call.projections]
    return [part.to(to) if need else None for part, to, need in zip(parts, dtypes, needs.A, strict=True)]


def _grad_x(
    call: Call,
    Gs: list[Tensor | None],
    Ws: Sequence[Tensor],
    dT: Tensor | None,
    A: Tensor | None,
    masks: Masks,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor | None:
    """One dx buffer: the frozen products' share where the node owns it, then the adapters' share on top."""
    dx: Tensor | None = None
    for G, W in zip(Gs, Ws, strict=False):
        if G is not None:
            G_MN, W_NK = G.to(call.dtype), W.to(call.dtype)
            dx = G_MN @ W_NK if dx is None else dx.addmm_(G_MN, W_NK)
    if dT is not None and A is not None:
        bits = masks.bits(size, _dropout.TARGET_STREAM)
        options: dict[str, Any] = {"mask": bits, "keep_scale": masks.scale}
        dx = call.ops.grad_input(dT, A, dtype=dtype if dx is None else call.dtype, out=dx, **options)
    return None if dx is None else dx.to(dtype)
