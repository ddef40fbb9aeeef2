"""The source pass: run the frozen model on the source text, and hand its hidden states to the adapters.

A pass of a :data:`Reader` visits the states that are wanted in the order in which the model makes them. Two consumers:

1. states that are kept on the device anyway go straight to the layers (:func:`keep_states`): a layer then projects both
   streams in one launch and forms both shares of dA in one;
2. otherwise one autograd node projects them at once, and nothing of width d stays::

       SourcePass.apply(reader, groups, A_1 ... A_n)  ->  S_1 ... S_k    S_j (B, m, sum of the ranks of group j)

       forward    each state becomes S = x_S A^T at once, while it is still in cache
       backward   receives all dS and forms dA = dS^T x_S from the states, as the node's memory (flare.source.memory)
                  brings them again: kept, copied back from the host, or computed a second time
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flare_kernels import dropout as kernel_dropout
from flare_kernels.projection import project, project_grad, stack

from ..tuner.layer import FlareLayer, weight_of
from .context import THREAD, Bottlenecks, SiteSource, SourceContext
from .frozen import switches_of
from .fsdp import gathered
from .memory import Keep, StateMemory
from .states import SourceStates, StateKey

#: Called with every wanted state x_S (B, m, d), in the order in which the model produces them.
Visitor = Callable[[StateKey, Tensor], None]
#: Runs something that yields source states into a visitor: the frozen model, or states read before.
Reader = Callable[[Visitor], None]

#: A state, and the adapter and layer that read it.
Wanted = tuple[StateKey, str, FlareLayer]


# --- which layers want which state ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The layers of one site that read one state through one adapter; their A are stacked, their S side by side."""

    key: StateKey
    adapter: str
    site: str
    layers: tuple[str, ...]
    modules: tuple[FlareLayer, ...]

    @property
    def dropout_p(self) -> float:
        """The probability of lora_dropout that acts now."""
        dropout = self.modules[0].lora_dropout[self.adapter]
        return getattr(dropout, "p", 0.0) if dropout.training else 0.0


def make_groups(wanted: Iterable[Wanted], sites: Mapping[str, str]) -> list[Group]:
    """Return the groups of (state, adapter, layer) triples in order of depth; ``sites``: layer -> its site."""
    members: dict[tuple[StateKey, str, str], list[FlareLayer]] = {}
    for key, adapter, layer in wanted:
        members.setdefault((key, adapter, sites[layer.flare_key]), []).append(layer)
    return [
        Group(key, adapter, site, tuple(layer.flare_key for layer in layers), tuple(layers))
        for (key, adapter, site), layers in sorted(members.items(), key=lambda item: item[0])
    ]


# --- reading the states -----------------------------------------------------------------------------------------------


class _AllRead(Exception):
    """Raised inside the frozen pass once the last wanted state was read: what comes after it need not run."""


class FrozenPass:
    """A run of the frozen model, and where the hooks of its blocks (flare.source.hooks) hand their states to."""

    def __init__(self, wanted: Iterable[StateKey], visit: Visitor, to_the_end: bool) -> None:
        self.missing = dict.fromkeys(wanted)
        self.visit, self.to_the_end = visit, to_the_end

    def note(self, key: StateKey, hidden: Tensor) -> None:
        """Take a state (B, m, d) that the model has made."""
        if key in self.missing:
            del self.missing[key]
            self.visit(key, hidden)
            if not self.missing and not self.to_the_end:
                raise _AllRead


def read_from_model(model: nn.Module, inputs: dict[str, Any], wanted: Iterable[StateKey], *, dropout: bool) -> Reader:
    """Return a reader that runs the frozen model: adapters off, no gradient, and (unless ``dropout``) no dropout.

    The pass stops after the last wanted state, so no head, pooler or final norm runs, nor blocks behind it.

    Args:
        model: the transformers model (not the PeftModel); its backbone is run.
        inputs: keyword arguments of the backbone.
        wanted: the states to read.
        dropout: leave the modules' training mode as it is.
    """
    backbone: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    return read_from_run(backbone, lambda: backbone(**inputs), wanted, dropout=dropout)


def read_from_run(
    model: nn.Module,
    run: Callable[[], object],
    wanted: Iterable[StateKey],
    *,
    dropout: bool,
    to_the_end: bool = False,
) -> Reader:
    """:func:`read_from_model` for any way to run a frozen ``model``; ``to_the_end`` where its output is wanted too."""

    def read(visit: Visitor) -> None:
        frozen_pass = FrozenPass(wanted, visit, to_the_end)
        before, THREAD.slot.frozen_pass = THREAD.slot.frozen_pass, frozen_pass
        try:
            with torch.no_grad(), switches_of(model).off(dropout=dropout):
                run()
        except _AllRead:
            pass
        finally:
            THREAD.slot.frozen_pass = before
        if frozen_pass.missing:
            missing = ", ".join(f"{key.stack} {key.position}" for key in frozen_pass.missing)
            raise RuntimeError(f"the source pass ended without reaching {missing}: its blocks were not all run")

    return read


def read_from_states(states: SourceStates, wanted: Iterable[StateKey]) -> Reader:
    """Return a reader of states that were computed before.

    Raises:
        ValueError: the states lack one that a fusing layer wants.
    """
    keys = sorted(wanted)
    lacking = [key for key in keys if key not in states.states]
    if lacking:
        raise ValueError(
            f"source_states (offset {states.offset}) lacks {tuple(lacking[0])}, which this model's adapters read: "
            "make them with encode_source of this model"
        )

    def read(visit: Visitor) -> None:
        for key in keys:
            visit(key, states.states[key])

    return read


# --- padding and dtypes -----------------------------------------------------------------------------------------------


def zero_pads(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return hidden (B, m, d) with zeros where the mask (B, m) is zero."""
    return hidden.masked_fill(attention_mask.to(hidden.device).unsqueeze(-1) == 0, 0.0)


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded text are: rows of pads are neither projected nor kept.

    index: (n,) of the tokens among B * m positions. size: (B, m).
    """

    index: Tensor
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """Return the packing of a mask (B, m)."""
        return cls(mask.flatten().nonzero().squeeze(-1), (int(mask.shape[0]), int(mask.shape[1])))

    def pack(self, x: Tensor) -> Tensor:
        """(B, m', c) as (n, c); m' is m, or less where what follows are pads in every row."""
        index = self.index
        if x.shape[1] != self.size[1]:
            index = index // self.size[1] * x.shape[1] + index % self.size[1]
        return x.flatten(0, 1).index_select(0, index.to(x.device))

    def unpack(self, x: Tensor) -> Tensor:
        """(n, c) as (B, m, c), zero elsewhere."""
        whole = x.new_zeros(self.size[0] * self.size[1], x.shape[1])
        return whole.index_copy_(0, self.index.to(x.device), x).view(*self.size, x.shape[1])


@dataclass
class Preparation:
    """What a hidden state goes through before it is projected or kept.

    dtype: autocast's, where autocast is on.
    packings: by stack, under source_padding="zero" where the mask is on the host; pads are left out.
    masks: by stack, under source_padding="zero" where it is on a GPU, which nothing waits for; pads become zeros.
    """

    dtype: torch.dtype | None = None
    packings: Mapping[str, Packing] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, key: StateKey, hidden: Tensor) -> Tensor:
        """Return a state (B, m, d), without a graph, in the compute dtype, without what stands at pads."""
        if hidden.requires_grad:
            hidden = hidden.detach()
        if self.dtype is not None and hidden.dtype == torch.float32:
            hidden = hidden.to(self.dtype)
        mask = self.masks.get(key.stack) if self.masks else None
        return hidden if mask is None else zero_pads(hidden, mask[:, : hidden.shape[1]])

    def rows(self, key: StateKey, hidden: Tensor) -> Tensor:
        """Return the rows (n, d) of a state (B, m, d) that are read."""
        packing = self.packings.get(key.stack)
        hidden = self(key, hidden)
        return hidden.reshape(-1, hidden.shape[-1]) if packing is None else packing.pack(hidden)

    def spread(self, key: StateKey, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """(n, c) as (B, m, c), where ``size`` is that of a state without packing."""
        packing = self.packings.get(key.stack)
        return x.view(*size, x.shape[-1]) if packing is None else packing.unpack(x)

    def gather(self, key: StateKey, x: Tensor) -> Tensor:
        """(B, m, c) as (n, c): the rows that :meth:`rows` reads."""
        packing = self.packings.get(key.stack)
        return x.reshape(-1, x.shape[-1]) if packing is None else packing.pack(x)

    @classmethod
    def under_autocast(cls, device: torch.device, masks: Mapping[str, Tensor] | None = None) -> Preparation:
        """Return the preparation for the autocast state that is in force; masks: stack -> (B, m), for "zero"."""
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        if not masks:
            return cls(dtype)
        if any(mask.device.type != "cpu" for mask in masks.values()):
            return cls(dtype, masks=masks)
        made = {id(mask): Packing.of(mask) for mask in masks.values()}  # stacks that read one text share its mask
        return cls(dtype, {stack: made[id(mask)] for stack, mask in masks.items()})


# --- states that are kept ---------------------------------------------------------------------------------------------


def keep_states(
    states: Reader | Mapping[StateKey, Tensor], prepare: Preparation, readers: Mapping[StateKey, Sequence[Group]]
) -> SourceContext:
    """Return a context of states that the layers project themselves, from a reader or as they are.

    Args:
        readers: state -> the groups that read it.
    """
    context = SourceContext(graded=True)
    as_it_is = prepare.dtype is None and not prepare.masks

    def visit(key: StateKey, hidden: Tensor) -> None:
        if not as_it_is or hidden.requires_grad:
            hidden = prepare(key, hidden)
        for group in readers[key]:
            if group.site in context.sites:
                context.sites[group.site].states[group.adapter] = hidden  # type: ignore[index]
            else:
                source = context.sites[group.site] = SiteSource()
                source.states = {group.adapter: hidden}

    if isinstance(states, Mapping):
        for key, state in states.items():
            visit(key, state)
    else:
        states(visit)
    return context


# --- states that are projected at once --------------------------------------------------------------------------------


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
                A = stack([A.detach() for A in weights[firsts[index] : firsts[index + 1]]], x.dtype)
                stacked[group.layers] = A
                seeds[index] = kernel_dropout.draw_seed(x.device) if p > 0.0 else None
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
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
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
    graded = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    memory = (memory or Keep()) if graded else None
    sizes: dict[str, tuple[int, ...]] = {}
    stacked: dict[tuple[str, ...], Tensor] = {}
    outputs = SourcePass.apply(reader, prepare, groups, memory, sizes, stacked, *map(gathered, weights))
    context = SourceContext(graded, KeptStates(memory, prepare, sizes, groups))
    context.stacked_A = stacked
    context.update(*split_by_layer(groups, outputs))
    return context


def project_rows(hidden: Tensor, prepare: Preparation, groups: Sequence[Group]) -> Bottlenecks:
    """Return S (B, q, r) of a state's groups, by layer and adapter; for decoding, without gradients or dropout."""
    x = prepare.rows(groups[0].key, hidden)
    outputs = []
    for group in groups:
        A = stack([weight_of(layer, group.adapter).detach() for layer in group.modules], x.dtype)
        outputs.append(prepare.spread(group.key, project(x, A), tuple(hidden.shape[:-1])))
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
