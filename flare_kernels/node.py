"""The adapters of projections that share their input: forward and backward over the primitives, without autograd.

    T = x A^T    S = x_source A^T    H_i = phi_i(S_i, T_i)    y_i = base_i + s_i H_i B_i^T            (paper, section 3)
    dB_i = s_i G_i^T H_i    dH_i = s_i G_i B_i    dA = dT^T x + dS^T x_source    dx = dT A            (G_i = dL/dy_i)

The A_i (r_i, d) are stacked in A (R, d), so each stream is read once for all projections, and the T_i lie side by side
in T (M, R). Projections that fuse come first: S has the leading columns only. With the frozen weights W_i the node owns
dx of the frozen products too, accumulated into the same buffer: dx = sum_i G_i W_i + dT A.

Every tensor here is a matrix: M tokens, K input width d, N output width n, R rank.
:mod:`flare_kernels.function` makes an autograd function of this, :mod:`flare_kernels.library` operators for
``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import dropout as _dropout

#: (output index, rank, scaling, fusion) of an adapter.
Adapter = tuple[int, int, float, str | None]

#: What the forward pass leaves for the backward pass, in the compute dtype: T (M, R), for "add" T + S; S (M, fused),
#: None where no phi needs it; the stacked A (R, d) and B (sum of n_i, r), None where they were not stacked or, for B,
#: already had the compute dtype.
Hidden = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
#: dx, dx_source, dS_i, dA_i and dB_i, None where not asked for. dx is the adapters' share, or all of it where the node
#: owns the frozen products.
Grads = tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]

#: The seeds of dropout (tensors, so that nothing waits for the device) of the target and of the source, or None.
Seeds = tuple[Tensor, Tensor] | None

_Result = TypeVar("_Result")


def rows(x: Tensor) -> Tensor:
    """Return (..., m, c) as (M, c); a view wherever the strides allow one."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def without_autocast(function: Callable[..., _Result], device: torch.device, *args: Any) -> _Result:
    """Return ``function(*args)`` without autocast: the primitives choose their dtypes, it would round a second time."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return function(*args)
    return function(*args)


class Projection(NamedTuple):
    """One adapted projection: its output's index, its constants, and its columns of T."""

    output: int
    scaling: float
    fusion: str | None
    columns: slice


class Group(NamedTuple):
    """Neighbouring projections of one phi and one rank, which a launch can hold; ``columns`` of T are theirs.

    launch_fusion: the fusion that a kernel sees. "add" is linear: only H = S + T matters once it is formed, so a
    kernel treats it as plain LoRA of that sum.
    """

    fusion: str | None
    launch_fusion: str | None
    members: slice
    columns: slice
    scalings: tuple[float, ...]


class Call:
    """The constants of a call of the node, worked out once for any number of calls.

    Args:
        ops: the primitives.
        dtype: compute dtype.
        adapters: (output index, rank, scaling, fusion) in stacking order, those that fuse first.
        outputs: how many outputs there are, adapted or not.
        p: probability of dropping an entry of the streams.

    Attributes:
        rank: R, the columns of T. fused: the leading columns that have a source.
        nonlinear: whether a phi needs T and S in backward. only_adds: whether every projection's H is S + T.
    """

    def __init__(self, ops: Any, dtype: torch.dtype, adapters: Sequence[Adapter], outputs: int, p: float) -> None:
        self.ops, self.dtype, self.outputs, self.p = ops, dtype, outputs, p
        projections, start = [], 0
        for output, rank, scaling, fusion in adapters:
            projections.append(Projection(output, float(scaling), fusion, slice(start, start + rank)))
            start += rank
        self.projections = tuple(projections)
        self.count = len(projections)
        #: outputs without an adapter
        self.others = sorted(set(range(outputs)) - {projection.output for projection in projections})
        self.rank = start
        self.fused = sum(rank for _, rank, _, fusion in adapters if fusion is not None)
        self.scalings = tuple(projection.scaling for projection in projections)
        self.ranks = [rank for _, rank, _, _ in adapters]
        self.one_rank = len(set(self.ranks)) == 1
        self.groups = _groups(self.projections, self.ranks)
        self.group = self.groups[0] if len(self.groups) == 1 else None
        self.nonlinear = any(group.launch_fusion is not None for group in self.groups)
        self.only_adds = bool(projections) and all(projection.fusion == "add" for projection in projections)
        self.keep_scale = _dropout.keep_scale(p) if p > 0.0 else 1.0
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        #: most tokens of a call that takes the form for decoding; 0 where there is no such form
        decodes = p == 0.0 and self.group is not None and hasattr(ops, "decode") and ops.can_decode(1, self.ranks)
        self.decode_rows = ops.DECODE_ROWS if decodes else 0
        self._needs: dict[tuple[Any, ...], Needs] = {}

    def needs(self, flags: tuple[bool, ...], sources: int) -> Needs:
        """Return the flags of (x, x_source, S_i ..., A_i ..., B_i ...) by name; ``sources`` is the number of S_i."""
        if (flags, sources) not in self._needs:
            count = self.count
            of_S, of_A, of_B = flags[2 : 2 + sources], flags[2 + sources : 2 + sources + count], flags[-count:]
            self._needs[flags, sources] = Needs(flags[0], flags[1], of_S, of_A, of_B if count else ())
        return self._needs[flags, sources]


def _groups(projections: Sequence[Projection], ranks: Sequence[int]) -> tuple[Group, ...]:
    groups: list[Group] = []
    for index, projection in enumerate(projections):
        first = groups[-1].members.start if groups else 0
        if groups and groups[-1].fusion == projection.fusion and ranks[first] == ranks[index]:
            groups.pop()
        else:
            first = index
        members = slice(first, index + 1)
        groups.append(
            Group(
                projection.fusion,
                None if projection.fusion == "add" else projection.fusion,
                members,
                slice(projections[first].columns.start, projection.columns.stop),
                tuple(one.scaling for one in projections[members]),
            )
        )
    return tuple(groups)


class Needs:
    """Which gradients are asked for."""

    def __init__(self, x: bool, x_source: bool, S: tuple[bool, ...], A: tuple[bool, ...], B: tuple[bool, ...]) -> None:
        self.x, self.x_source, self.S, self.A, self.B = x, x_source, S, A, B
        self.count_S = len(S)
        self.any_S, self.any_A, self.any_B, self.all_B = any(S), any(A), any(B), all(B)
        #: whether dT is needed on the way to something
        self.hidden = x or x_source or self.any_S or self.any_A
        self.anything = self.hidden or self.any_B


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
) -> Hidden:
    """Add every adapter's share to its y (M, n_i), in place, or write the sum to ``outs``.

    Args:
        x, x_source: (M, d).
        Ss: given instead of x_source: S (M, fused), whole or cut into columns.
        ys: (M, n_i) of every output.
        As, Bs: (r_i, d) and (n_i, r_i), in stacking order.
        keep: whether a backward pass will follow.
        A: the stacked A (R, d) in the compute dtype, where the caller has it.
    """
    if not call.projections:
        return None, None, None, None
    ops, dtype = call.ops, call.dtype
    targets = [ys[projection.output] for projection in call.projections]
    results = None if outs is None else [outs[projection.output] for projection in call.projections]
    if 0 < x.shape[0] <= call.decode_rows and x.shape[1] and _one_dtype(targets) and _one_dtype(As) and _one_dtype(Bs):
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
) -> Grads:
    """Return the gradients that are asked for: dx, dx_source (M, width), dS_i, dA_i (r_i, width), dB_i (n_i, r_i).

    Args:
        x, x_source: (M, width), where an A asks for a gradient.
        Gs: dL/dy (M, n) per output, None where the loss does not depend on it; at least one is given.
        source_dtype: None without a second stream.
        source_columns: columns of each S that was given.
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
        dx = _grad_x(call, Gs, Ws, dT, A, seeds, width, x_dtype)
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
) -> Tensor | None:
    """Return one dx buffer: the frozen products' share where the node owns it, and the adapters' share on top."""
    dx: Tensor | None = None
    for G, W in zip(Gs, Ws, strict=False):
        if G is not None:
            if G.dtype != call.dtype or W.dtype != call.dtype:
                G, W = G.to(call.dtype), W.to(call.dtype)
            dx = G @ W if dx is None else dx.addmm_(G, W)
    if dT is not None and A is not None:
        bits = None if seeds is None else keep_bits(call, seeds, (dT.shape[0], width), _dropout.TARGET_STREAM)
        dx = call.ops.grad_input(
            dT, A, mask=bits, keep_scale=call.keep_scale, dtype=dtype if dx is None else call.dtype, out=dx
        )
    return dx if dx is None or dx.dtype == dtype else dx.to(dtype)
