"""The constants of the autograd node (:mod:`flare_kernels.node`), computed once and read in every step.

After the first training step, no code of this module runs as long as the adapters and the flags in :class:`Needs` stay
the same.

T (M, R) holds the bottlenecks x A^T of all adapters side by side, in *stacking order*: adapters that fuse with a source
come first. M is the number of tokens, and R the sum of all ranks. phi is the fusion of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import dropout as _dropout

#: (output index, rank, scaling, fusion) of an adapter.
AdapterSpec = tuple[int, int, float, str | None]


class Projection(NamedTuple):
    """An adapted projection: the index of its output, its constants, and its columns of T."""

    output: int
    scaling: float
    fusion: str | None
    columns: slice


class ProjectionGroup(NamedTuple):
    """Neighbouring projections of one phi and one rank, which share a launch.

    Attributes:
        fusion: the projections' phi; None for plain LoRA.
        launch_fusion: the fusion that is passed to the kernels; None for plain LoRA and for "add". For "add", the
            kernels get the sum H = S + T and treat it as T of plain LoRA.
        members: the projections' indices in stacking order.
        columns: the projections' columns of T.
        scalings: alpha / r of each projection.
    """

    fusion: str | None
    launch_fusion: str | None
    members: slice
    columns: slice
    scalings: tuple[float, ...]


class Call:
    """The constants of the autograd node, reused by all calls with the same adapters.

    Args:
        ops: the module or object whose functions (primitives) compute the node's operations, such as shrink.
        dtype: compute dtype.
        adapters: (output index, rank, scaling, fusion) of each adapter, in stacking order.
        outputs: number of outputs, adapted or not.
        p: probability of dropping an entry of x and x_source.

    Attributes:
        rank: R, the number of columns of T.
        fused: the number of leading columns of T that fuse with a source.
        nonlinear: whether some phi needs T and S in backward.
        only_adds: whether the fusion of every projection is "add" (H = S + T).
        adapted: the output index of each projection, in stacking order.
        others: the indices of the outputs without an adapter.
        needs: mapping to :class:`Needs`. A key is (flags, number of S_i). The S_i are the source bottlenecks that the
            caller passes instead of x_source. The flags tell whether x, x_source, each S_i, each A_i and each B_i
            require grad.
    """

    def __init__(self, ops: Any, dtype: torch.dtype, adapters: Sequence[AdapterSpec], outputs: int, p: float) -> None:
        self.ops, self.dtype, self.outputs, self.p = ops, dtype, outputs, p
        projections, start = [], 0
        for output, rank, scaling, fusion in adapters:
            projections.append(Projection(output, float(scaling), fusion, slice(start, start + rank)))
            start += rank
        self.projections = tuple(projections)
        self.count = len(projections)
        self.adapted = tuple(projection.output for projection in projections)
        self.others = sorted(set(range(outputs)) - set(self.adapted))
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
        decodes = p == 0.0 and self.group is not None and hasattr(ops, "decode") and ops.can_decode(1, self.ranks)
        #: the largest number of tokens that the decoding kernels take; 0 if this call cannot use them
        self.decode_rows = ops.DECODE_ROWS if decodes else 0
        self.needs = _NeedsCache(self.count)


def _groups(projections: Sequence[Projection], ranks: Sequence[int]) -> tuple[ProjectionGroup, ...]:
    groups: list[ProjectionGroup] = []
    for index, projection in enumerate(projections):
        first = groups[-1].members.start if groups else 0
        if groups and groups[-1].fusion == projection.fusion and ranks[first] == ranks[index]:
            groups.pop()
        else:
            first = index
        members = slice(first, index + 1)
        groups.append(
            ProjectionGroup(
                projection.fusion,
                None if projection.fusion == "add" else projection.fusion,
                members,
                slice(projections[first].columns.start, projection.columns.stop),
                tuple(member.scaling for member in projections[members]),
            )
        )
    return tuple(groups)


class Needs:
    """Flags that tell which gradients a backward pass has to compute."""

    def __init__(self, x: bool, x_source: bool, S: tuple[bool, ...], A: tuple[bool, ...], B: tuple[bool, ...]) -> None:
        self.x, self.x_source, self.S, self.A, self.B = x, x_source, S, A, B
        self.count_S = len(S)
        self.any_S, self.any_A, self.any_B, self.all_B = any(S), any(A), any(B), all(B)
        #: whether some required gradient depends on dT or dS
        self.hidden = x or x_source or self.any_S or self.any_A
        self.anything = self.hidden or self.any_B


class _NeedsCache(dict[tuple[tuple[bool, ...], int], Needs]):
    """Mapping that builds each :class:`Needs` on its first lookup."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __missing__(self, key: tuple[tuple[bool, ...], int]) -> Needs:
        (flags, count_S), count = key, self.count
        S, A, B = flags[2 : 2 + count_S], flags[2 + count_S : 2 + count_S + count], flags[-count:]
        self[key] = Needs(flags[0], flags[1], S, A, B if count else ())
        return self[key]
