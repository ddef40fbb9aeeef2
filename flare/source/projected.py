"""Project source states as soon as they are computed, in one autograd node for the whole source pass.

A group is a set of layers with the same input that read one state through one adapter (StateGroup).

SourcePass.apply(reader, ..., groups, ..., A_1 ... A_n)  ->  S_1 ... S_k        S_j (B, m, sum of the ranks of group j)

forward    S = x_S A^T of each state x_S (B, m, d), while it is still in the device's cache. x_S need not be stored.
backward   dA = dS^T x_S. The node's memory (flare.source.memory) yields each x_S again: it was kept on the device, is
           copied from the host, or is computed a second time.

Shapes: B rows of a batch, m positions, hidden states of width d, rank r.
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

from ..tuner.layer import raise_weight_mismatch, weight_of
from .context import Bottlenecks, SourceContext
from .fsdp import full_parameter
from .memory import Keep, StateMemory
from .runtime import needs_grad
from .source_pass import Preparation, Reader, StateGroup
from .states import StateKey


class SourcePass(torch.autograd.Function):
    """Compute S of every group, and in backward the source's share of every dA. See the module's docstring.

    ``memory`` stores the states and yields them again in backward; it is None if no A needs a gradient. The
    forward pass fills ``sizes`` (path of a stack of blocks -> size (B, m) of its states) and ``stacked`` (layers of a
    group -> their stacked A).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        reader: Reader,
        prepare: Preparation,
        groups: list[StateGroup],
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
                if memory is None and group.has_hooks:
                    S[index] = prepare.pad_input(key, group.project(x), sizes[key.stack])
                    continue
                A = _stacked(group, weights[firsts[index] : firsts[index + 1]], x)
                stacked[group.layers] = A
                seeds[index] = draw_seed(x.device) if p > 0.0 else None
                S[index] = prepare.pad_input(key, project(x, A, seed=seeds[index], dropout_p=p), sizes[key.stack])

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
        groups: list[StateGroup] = ctx.groups
        firsts: list[int] = ctx.firsts
        by_key = _by_key(groups)
        needs = ctx.needs_input_grad[6:]
        dA: list[Tensor | None] = [None] * len(needs)
        needed = [
            grad is not None and any(needs[firsts[index] : firsts[index + 1]]) for index, grad in enumerate(grads)
        ]

        def visit(key: StateKey, x: Tensor) -> None:
            for index in by_key.get(key, ()):
                dS = grads[index]
                if not needed[index] or dS is None:
                    continue
                weight_indices = range(firsts[index], firsts[index + 1])
                dS_rows = ctx.prepare.unpad_input(key, dS)
                grad = project_grad(dS_rows, x, seed=seeds[index], dropout_p=ctx.dropouts[index])
                ranks = [ctx.weight_likes[at][0] for at in weight_indices]
                for at, part in zip(weight_indices, grad.split(ranks), strict=True):
                    if needs[at]:
                        dA[at] = part.to(ctx.weight_likes[at][1])

        if any(needed):
            ctx.replay(states, visit)
        return (None, None, None, None, None, None, *dA)


def _stacked(group: StateGroup, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return the stacked A of a group in x's dtype; raise ValueError if an A is not on x's device."""
    for layer, path, A in zip(group.modules, group.layers, weights, strict=True):
        if A.device != x.device:
            raise_weight_mismatch(path, x, A, cast(Tensor, layer.lora_B[group.adapter].weight))
    return stack([A.detach() for A in weights], x.dtype)


def _by_key(groups: list[StateGroup]) -> dict[StateKey, list[int]]:
    """Return state -> the indices of the groups that read it."""
    indices: dict[StateKey, list[int]] = {}
    for index, group in enumerate(groups):
        indices.setdefault(group.key, []).append(index)
    return indices


def _firsts(groups: list[StateGroup]) -> list[int]:
    """Return the index of each group's first A among all A, followed by the number of all A."""
    firsts = [0]
    for group in groups:
        firsts.append(firsts[-1] + len(group.layers))
    return firsts


class PaddedStates:
    """Callable that returns a stored state as (B, m, d). Under reentrant checkpointing, layers compute S from it."""

    def __init__(
        self,
        memory: StateMemory | None,
        prepare: Preparation,
        sizes: dict[str, tuple[int, ...]],
        groups: list[StateGroup],
    ) -> None:
        self.memory, self.prepare, self.sizes = memory, prepare, sizes
        self.where = {(layer, group.adapter): group.key for group in groups for layer in group.layers}
        # One tensor per state while it is in use: query and value share a computation if their x_S is the same object.
        self._padded: weakref.WeakValueDictionary[StateKey, Tensor] = weakref.WeakValueDictionary()

    def __call__(self, layer: str, adapter: str) -> Tensor:
        if not isinstance(self.memory, Keep):
            mode = "none" if self.memory is None else self.memory.name
            raise ValueError(
                "reentrant checkpointing runs the blocks again, for which the source states are needed, and "
                f"source_memory is {mode!r}: use checkpointing with use_reentrant=False, or source_memory='keep'"
            )
        key = self.where[layer, adapter]
        padded = self._padded.get(key)
        if padded is None:
            padded = self._padded[key] = self.prepare.pad_input(key, self.memory.states[key], self.sizes[key.stack])
        return padded


def project_states(
    reader: Reader, prepare: Preparation, groups: list[StateGroup], memory: StateMemory | None = None
) -> SourceContext:
    """Run the source pass's autograd node, and return a context that holds its S.

    ``memory`` stores the states for the backward pass. Default: Keep.
    """
    weights = [weight_of(layer, group.adapter) for group in groups for layer in group.modules]
    with_grad = needs_grad(weights)
    memory = (memory or Keep()) if with_grad else None
    sizes: dict[str, tuple[int, ...]] = {}
    stacked: dict[tuple[str, ...], Tensor] = {}
    outputs = SourcePass.apply(reader, prepare, groups, memory, sizes, stacked, *map(full_parameter, weights))
    context = SourceContext(with_grad, PaddedStates(memory, prepare, sizes, groups))
    context.stacked_A = stacked
    context.update(*split_by_layer(groups, outputs))
    return context


def project_rows(hidden: Tensor, prepare: Preparation, groups: Sequence[StateGroup]) -> Bottlenecks:
    """Return S (B, q, r) of one state (B, q, d), by layer and adapter, without gradients or dropout.

    Decoding calls this function for the q new positions of the source.
    """
    x = prepare.rows(groups[0].key, hidden)
    outputs = []
    for group in groups:
        if group.has_hooks:
            S = group.project(x)
        else:
            S = project(x, _stacked(group, [weight_of(layer, group.adapter) for layer in group.modules], x))
        outputs.append(prepare.pad_input(group.key, S, tuple(hidden.shape[:-1])))
    return split_by_layer(groups, outputs)[0]


def split_by_layer(groups: Sequence[StateGroup], outputs: Iterable[Tensor]) -> tuple[Bottlenecks, dict[str, str]]:
    """Split the groups' S by layer and adapter. Return these S, and path of each layer -> path of its site."""
    S: Bottlenecks = {}
    for group, output in zip(groups, outputs, strict=True):
        ranks = [weight_of(layer, group.adapter).shape[0] for layer in group.modules]
        parts = output.split(ranks, dim=-1) if len(ranks) > 1 else (output,)
        for layer, part in zip(group.layers, parts, strict=True):
            S.setdefault(layer, {})[group.adapter] = part
    return S, {layer: group.site for group in groups for layer in group.layers}
