"""Source states projected as they come: one autograd node for the whole source pass, and nothing of width d stays.

SourcePass.apply(reader, groups, A_1 ... A_n)  ->  S_1 ... S_k        S_j (B, m, sum of the ranks of group j)

forward    each state becomes S = x_S A^T at once, while it is still in cache
backward   receives all dS and forms dA = dS^T x_S from the states, as the node's memory (flare.source.memory) brings
           them again: kept, copied back from the host, or computed a second time
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flare_kernels.dropout import draw_seed
from flare_kernels.function import differentiable_once
from flare_kernels.projection import project, project_grad, stack

from ..tuner.layer import check_weights, weight_of
from .context import Bottlenecks, SourceContext
from .fsdp import gathered
from .memory import Keep, StateMemory
from .runtime import graded
from .source_pass import Group, Preparation, Reader
from .states import StateKey


class SourcePass(torch.autograd.Function):
    """S of every group, and in backward the source's share of every dA. Shapes in the module's docstring.

    ``memory`` (None where no A asks for a gradient) takes the states' rows and brings them again in backward. ``sizes``
    and ``stacked`` are filled: the size of each stack's states, and every group's stacked A.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        reader: Reader,
        prepare: Preparation,
        groups: list[Group],
        memory: StateMemory | None,
        sizes: dict[str, tuple[int, ...]],
        stacked: dict[tuple[str, ...], Tensor],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        by_key = _by_key(groups)
        firsts = _firsts(groups)
        dropouts = [group.dropout_p for group in groups]
        S: list[Tensor | None] = [None] * len(groups)
        seeds: list[Tensor | None] = [None] * len(groups)

        def visit(key: StateKey, hidden: Tensor) -> None:
            sizes[key.stack] = tuple(hidden.shape[:-1])
            x = prepare.rows(key, hidden)
            if memory is not None:
                memory.put(key, x)
            for index in by_key[key]:
                group, p = groups[index], dropouts[index]
                if memory is None and group.is_touched:
                    S[index] = prepare.spread(key, group.project(x), sizes[key.stack])
                    continue
                A = _stacked(group, weights[firsts[index] : firsts[index + 1]], x)
                stacked[group.layers] = A
                seeds[index] = draw_seed(x.device) if p > 0.0 else None
                S[index] = prepare.spread(key, project(x, A, seed=seeds[index], dropout_p=p), sizes[key.stack])

        reader(visit)
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.prepare, ctx.firsts, ctx.dropouts = groups, prepare, firsts, dropouts
        ctx.replay = None if memory is None else memory.replayer()
        ctx.weight_likes = [(weight.shape[0], weight.dtype) for weight in weights]
        saved = [] if memory is None else memory.saved()
        ctx.saved_states = len(saved)
        ctx.save_for_backward(*saved, *seeds)
        return tuple(S)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                return differentiable_once(SourcePass.backward(ctx, *grads), grads)
        saved = ctx.saved_tensors
        states, seeds = saved[: ctx.saved_states], saved[ctx.saved_states :]
        groups: list[Group] = ctx.groups
        firsts: list[int] = ctx.firsts
        by_key = _by_key(groups)
        needs = ctx.needs_input_grad[6:]
        dA: list[Tensor | None] = [None] * len(needs)
        wanted = [
            grad is not None and any(needs[firsts[index] : firsts[index + 1]]) for index, grad in enumerate(grads)
        ]

        def visit(key: StateKey, x: Tensor) -> None:
            for index in by_key.get(key, ()):
                dS = grads[index]
                if not wanted[index] or dS is None:
                    continue
                own = range(firsts[index], firsts[index + 1])
                dS_rows = ctx.prepare.gather(key, dS)
                grad = project_grad(dS_rows, x, seed=seeds[index], dropout_p=ctx.dropouts[index])
                ranks = [ctx.weight_likes[at][0] for at in own]
                for at, part in zip(own, grad.split(ranks), strict=True):
                    if needs[at]:
                        dA[at] = part.to(ctx.weight_likes[at][1])

        if any(wanted):
            ctx.replay(states, visit)
        return (None, None, None, None, None, None, *dA)


def _stacked(group: Group, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return the A of a group below each other, in the dtype of x; ValueError for one on another device."""
    for layer, path, A in zip(group.modules, group.layers, weights, strict=True):
        if A.device != x.device:
            check_weights(path, x, A, cast(Tensor, layer.lora_B[group.adapter].weight))
    return stack([A.detach() for A in weights], x.dtype)


def _by_key(groups: list[Group]) -> dict[StateKey, list[int]]:
    """State -> the indices of the groups that read it."""
    found: dict[StateKey, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group.key, []).append(index)
    return found


def _firsts(groups: list[Group]) -> list[int]:
    """The index of each group's first A among all, and the number of all."""
    firsts = [0]
    for group in groups:
        firsts.append(firsts[-1] + len(group.layers))
    return firsts


class KeptStates:
    """What a memory keeps as states (B, m, d), for layers that make their own S under reentrant checkpointing."""

    def __init__(
        self, memory: StateMemory | None, prepare: Preparation, sizes: dict[str, tuple[int, ...]], groups: list[Group]
    ) -> None:
        self.memory, self.prepare, self.sizes = memory, prepare, sizes
        self.where = {(layer, group.adapter): group.key for group in groups for layer in group.layers}
        # one object per state as long as somebody holds it: query and value are computed together for one x_S
        self._whole: weakref.WeakValueDictionary[StateKey, Tensor] = weakref.WeakValueDictionary()

    def __call__(self, layer: str, adapter: str) -> Tensor:
        if not isinstance(self.memory, Keep):
            mode = "none" if self.memory is None else self.memory.name
            raise ValueError(
                "blocks run without a graph inside a forward with one (reentrant checkpointing), which needs the "
                f"source's states, and source_memory is {mode!r}: checkpoint with use_reentrant=False, or "
                "source_memory='keep'"
            )
        key = self.where[layer, adapter]
        whole = self._whole.get(key)
        if whole is None:
            whole = self._whole[key] = self.prepare.spread(key, self.memory.states[key], self.sizes[key.stack])
        return whole


def project_states(
    reader: Reader, prepare: Preparation, groups: list[Group], memory: StateMemory | None = None
) -> SourceContext:
    """Run the node and return a context of its outputs. memory: how states wait for backward (default: kept)."""
    weights = [weight_of(layer, group.adapter) for group in groups for layer in group.modules]
    is_graded = graded(weights)
    memory = (memory or Keep()) if is_graded else None
    sizes: dict[str, tuple[int, ...]] = {}
    stacked: dict[tuple[str, ...], Tensor] = {}
    outputs = SourcePass.apply(reader, prepare, groups, memory, sizes, stacked, *map(gathered, weights))
    context = SourceContext(is_graded, KeptStates(memory, prepare, sizes, groups))
    context.stacked_A = stacked
    context.update(*split_by_layer(groups, outputs))
    return context


def project_rows(hidden: Tensor, prepare: Preparation, groups: Sequence[Group]) -> Bottlenecks:
    """Return S (B, q, r) of a state's groups, by layer and adapter; for decoding, without gradients or dropout."""
    x = prepare.rows(groups[0].key, hidden)
    outputs = []
    for group in groups:
        if group.is_touched:
            S = group.project(x)
        else:
            S = project(x, _stacked(group, [weight_of(layer, group.adapter) for layer in group.modules], x))
        outputs.append(prepare.spread(group.key, S, tuple(hidden.shape[:-1])))
    return split_by_layer(groups, outputs)[0]


def split_by_layer(groups: Sequence[Group], outputs: Iterable[Tensor]) -> tuple[Bottlenecks, dict[str, str]]:
    """Return S of every layer and adapter, and layer -> site."""
    S: Bottlenecks = {}
    for group, output in zip(groups, outputs, strict=True):
        ranks = [weight_of(layer, group.adapter).shape[0] for layer in group.modules]
        parts = output.split(ranks, dim=-1) if len(ranks) > 1 else (output,)
        for layer, part in zip(group.layers, parts, strict=True):
            S.setdefault(layer, {})[group.adapter] = part
    return S, {layer: group.site for group in groups for layer in group.layers}
