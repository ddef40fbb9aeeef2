"""The constants of a call of the node: worked out once, read in every step.

Nothing here runs in a step that has been warmed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import dropout as _dropout

#: (output index, rank, scaling, fusion) of an adapter.
Adapter = tuple[int, int, float, str | None]


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
        adapted: the output of each projection. others: the outputs without an adapter.
        needs: the flags of (x, x_source, S_i ..., A_i ..., B_i ...) and the number of S_i -> :class:`Needs`.
    """

    def __init__(self, ops: Any, dtype: torch.dtype, adapters: Sequence[Adapter], outputs: int, p: float) -> None:
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
        #: the most tokens for which a call takes the form for decoding; 0 if it has no such form
        decodes = p == 0.0 and self.group is not None and hasattr(ops, "decode") and ops.can_decode(1, self.ranks)
        self.decode_rows = ops.DECODE_ROWS if decodes else 0
        self.needs = _NeedsOfFlags(self.count)


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


class _NeedsOfFlags(dict[tuple[tuple[bool, ...], int], Needs]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __missing__(self, key: tuple[tuple[bool, ...], int]) -> Needs:
        (flags, sources), count = key, self.count
        of_S, of_A, of_B = flags[2 : 2 + sources], flags[2 + sources : 2 + sources + count], flags[-count:]
        self[key] = Needs(flags[0], flags[1], of_S, of_A, of_B if count else ())
        return self[key]
