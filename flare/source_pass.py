"""The source pass as one autograd node: run the frozen model on the source text, keep only what the adapters need.

    SourcePass.apply(reader, groups, A_1 ... A_n)  ->  S_1 ... S_k        S_j (B, m, sum of the ranks of group j)

    forward    the reader hands over the source's hidden states block by block; each becomes S = x_S A^T at once, while
               it is still in cache
    backward   receives all dS and forms dA = dS^T x_S from the states, as the node's strategy provides them

The target pass then fuses S with its own T and sees only the rank-r bottleneck. Both streams' shares of dA meet in
autograd, so data-parallel hooks fire once. Strategy "keep" (the one there is) holds one copy of each state between
forward and backward; another strategy changes only where :meth:`SourcePass.backward` reads x_S from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flare_kernels import dropout as kernel_dropout
from flare_kernels.backends import primitives
from flare_kernels.node import Masks, rows, without_autocast

from ._compat import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    compiled_calls_off,
    is_bnb_linear,
    set_adapters_disabled,
)
from .layer import FlareLayer, weight_of
from .source_states import SourceStates, StateKey

#: Called with every wanted state x_S (B, m, d), in the order in which the model produces them.
Visitor = Callable[[StateKey, Tensor], None]
#: Runs something that yields source states into a visitor: the frozen model, or states read before.
Reader = Callable[[Visitor], None]


# --- which layers want which state ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The layers that read one state through one adapter; their A matrices are stacked, their S lie side by side."""

    key: StateKey
    adapter: str
    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    first: int  # index of the group's first A among all of the node's
    dropout_p: float


def make_groups(wanted: Iterable[tuple[StateKey, str, FlareLayer]]) -> tuple[list[Group], list[nn.Parameter]]:
    """Group (state, adapter, layer) triples; the groups in order of depth, and all A (r, d) in the groups' order."""
    members: dict[tuple[StateKey, str], list[FlareLayer]] = {}
    for key, adapter, layer in wanted:
        members.setdefault((key, adapter), []).append(layer)
    groups: list[Group] = []
    weights: list[nn.Parameter] = []
    for (key, adapter), layers in sorted(members.items(), key=lambda item: item[0]):
        own = [weight_of(layer, adapter) for layer in layers]
        dropout = layers[0].lora_dropout[adapter]
        p = getattr(dropout, "p", 0.0) if dropout.training else 0.0
        names = tuple(layer.flare_key for layer in layers)
        groups.append(Group(key, adapter, names, tuple(A.shape[0] for A in own), len(weights), p))
        weights += own
    return groups, weights


# --- reading the states -----------------------------------------------------------------------------------------------


class _AllRead(Exception):
    """Raised inside the frozen pass once the last wanted state was read: what comes after it need not run."""


def read_from_model(
    model: nn.Module,
    inputs: dict[str, Any],
    wanted: set[StateKey],
    *,
    dropout: bool,
) -> Reader:
    """A reader that runs the frozen model: adapters off, no gradient, and (unless ``dropout``) every dropout off.

    The pass stops after the last wanted state, so no head, pooler or final norm runs, nor blocks behind it.

    Args:
        model: the transformers model (not the PeftModel); its backbone is run.
        inputs: keyword arguments of the backbone.
        wanted: the states to read.
        dropout: leave the modules' training mode as it is.
    """
    backbone: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    return read_from_run(model, lambda: backbone(**inputs), wanted, dropout=dropout)


def read_from_run(
    model: nn.Module, run: Callable[[], object], wanted: set[StateKey], *, dropout: bool, to_the_end: bool = False
) -> Reader:
    """:func:`read_from_model` for any way to run the frozen model; ``to_the_end`` where its output is wanted too."""

    def read(visit: Visitor) -> None:
        missing = set(wanted)

        def note(key: StateKey, hidden: Tensor) -> None:
            missing.discard(key)
            visit(key, hidden)
            if not missing and not to_the_end:
                raise _AllRead

        with contextlib.ExitStack() as stack:
            for key in wanted:
                stack.callback(_listen(model, key, note).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(adapters_off(model))
            stack.enter_context(compiled_calls_off(model))
            if not dropout:
                stack.enter_context(training_off(model))
            with contextlib.suppress(_AllRead):
                run()
        if missing:
            raise RuntimeError(f"the source pass ended without reaching {sorted(missing)}: its blocks were not all run")

    return read


def read_from_states(states: SourceStates, wanted: set[StateKey]) -> Reader:
    """A reader of states that were computed before.

    Raises:
        ValueError: the states lack one that a fusing layer wants.
    """
    lacking = sorted(wanted - set(states.states))
    if lacking:
        raise ValueError(
            f"source_states (offset {states.offset}) lacks {lacking[0]}, which this model's adapters read: "
            "make them with encode_source of this model"
        )

    def read(visit: Visitor) -> None:
        for key in sorted(wanted):
            visit(key, states.states[key])

    return read


def _listen(model: nn.Module, key: StateKey, note: Visitor) -> Any:
    """Hook the place a key names: the first block's input, or the output of the block before."""
    blocks = model.get_submodule(key.stack)
    assert isinstance(blocks, nn.ModuleList)
    if key.position == 0:

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(key, args[0] if args else kwargs["hidden_states"])

        return blocks[0].register_forward_pre_hook(on_input, with_kwargs=True)

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note(key, output if isinstance(output, Tensor) else output[0])

    return blocks[key.position - 1].register_forward_hook(on_output)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Every adapter, and every trained copy of a module, off; unlike PEFT's disable_adapter, requires_grad is left."""
    switched = [
        (module, set_adapters_disabled(module, True))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for module, before in switched:
            set_adapters_disabled(module, before)


@contextlib.contextmanager
def training_off(model: nn.Module) -> Iterator[None]:
    """``training = False`` below a model, without eval()'s recursion; only flags that were set are set again.

    Not on bitsandbytes linears, which repack their weights in eval mode.
    """
    switched = [module for module in model.modules() if module.training and not is_bnb_linear(module)]
    for module in switched:
        module.__dict__["training"] = False
    try:
        yield
    finally:
        for module in switched:
            module.__dict__["training"] = True


# --- the node ---------------------------------------------------------------------------------------------------------


def zero_pads(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """hidden (B, m, d) with zeros, whatever stood there, where the mask (B, m) has none."""
    return hidden.masked_fill(attention_mask.to(hidden.device).unsqueeze(-1) == 0, 0.0)


@dataclass
class Preparation:
    """What a hidden state goes through before it is projected or kept."""

    masks: Mapping[str, Tensor] = field(default_factory=dict)  # stack -> (B, m), where source_padding="zero"
    dtype: torch.dtype | None = None  # autocast's, where autocast is on

    def __call__(self, key: StateKey, hidden: Tensor) -> Tensor:
        hidden = hidden.detach()
        if self.dtype is not None and hidden.dtype == torch.float32:
            hidden = hidden.to(self.dtype)
        if key.stack in self.masks:
            hidden = zero_pads(hidden, self.masks[key.stack])
        return hidden

    @classmethod
    def under_autocast(cls, device: torch.device, masks: Mapping[str, Tensor] | None = None) -> Preparation:
        """The preparation for the autocast state that is in force now."""
        on = torch.is_autocast_enabled(device.type)
        return cls(masks or {}, torch.get_autocast_dtype(device.type) if on else None)


class SourcePass(torch.autograd.Function):
    """S of every group, and in backward the source's share of every dA. Shapes in the module's docstring.

    ``kept`` is filled with the states (only where an A asks for a gradient): under reentrant checkpointing, which
    cannot send a gradient into S, layers read x_S there.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        reader: Reader,
        prepare: Preparation,
        groups: list[Group],
        kept: dict[StateKey, Tensor],
        keep: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        by_key: dict[StateKey, list[int]] = {}
        for index, group in enumerate(groups):
            by_key.setdefault(group.key, []).append(index)
        S: list[Tensor | None] = [None] * len(groups)
        seeds: list[Tensor | None] = [None] * len(groups)

        def visit(key: StateKey, hidden: Tensor) -> None:
            hidden = prepare(key, hidden)
            if keep:
                kept[key] = hidden
            x_MK = rows(hidden)
            for index in by_key[key]:
                group = groups[index]
                stacked = _stack(group, weights, hidden.dtype)
                if group.dropout_p > 0.0:
                    seeds[index] = kernel_dropout.draw_seed(hidden.device)
                masks = Masks(seeds[index], group.dropout_p)
                with without_autocast(hidden.device):
                    _, projected = _ops(hidden).shrink(
                        None,
                        x_MK,
                        stacked,
                        compute_dtype=hidden.dtype,
                        mask_source=masks.bits(x_MK.shape, kernel_dropout.SOURCE_STREAM),
                        keep_scale=masks.scale,
                    )
                S[index] = projected.view(*hidden.shape[:-1], sum(group.ranks))

        reader(visit)
        ctx.set_materialize_grads(False)
        ctx.groups = groups
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        ctx.order = sorted(kept)
        ctx.save_for_backward(*(kept[key] for key in ctx.order), *seeds)
        return tuple(S)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        states = dict(zip(ctx.order, saved[: len(ctx.order)], strict=True))
        seeds = saved[len(ctx.order) :]
        needs = ctx.needs_input_grad[5:]
        dA: list[Tensor | None] = [None] * len(needs)
        for group, dS, seed in zip(ctx.groups, grads, seeds, strict=True):
            own = range(group.first, group.first + len(group.ranks))
            if dS is None or not any(needs[index] for index in own):
                continue
            x_MK = rows(states[group.key])
            masks = Masks(seed, group.dropout_p)
            exact = torch.float64 if x_MK.dtype == torch.float64 else torch.float32
            with without_autocast(x_MK.device):
                stacked = _ops(x_MK).grad_weight(
                    None,
                    None,
                    rows(dS),
                    x_MK,
                    mask_source=masks.bits(x_MK.shape, kernel_dropout.SOURCE_STREAM),
                    keep_scale=masks.scale,
                    grad_dtype=exact,
                )
            for index, part in zip(own, stacked.split(list(group.ranks)), strict=True):
                if needs[index]:
                    dA[index] = part.to(ctx.weight_dtypes[index])
        return (None, None, None, None, None, *dA)


def _stack(group: Group, weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return torch.cat([A.detach().to(dtype) for A in weights[group.first : group.first + len(group.ranks)]])


def _ops(x: Tensor) -> Any:
    return primitives("auto", x.device, x.dtype)


# --- what travels to the layers ---------------------------------------------------------------------------------------


@dataclass
class SourceCarrier:
    """The source of one forward pass, on its way to the layers as a keyword argument of the blocks.

    It stays with the block's saved arguments, so a checkpoint's recompute finds the same S.
    """

    S: dict[str, dict[str, Tensor]]  # layer -> adapter -> (B, m, r)
    where: dict[tuple[str, str], StateKey]
    kept: dict[StateKey, Tensor]
    graded: bool  # whether gradients were on where the source pass ran
    reentrant: bool = False
    reached: set[str] = field(default_factory=set)
    target_masks: dict[str, Tensor] = field(default_factory=dict)  # layer -> (B, m), where a fusion looks at it

    def for_layer(self, layer: str) -> LayerSource:
        """What one layer is handed; notes that the source has reached it."""
        self.reached.add(layer)
        if self.graded and not torch.is_grad_enabled():
            # blocks that run without a graph where the model ran with one: reentrant checkpointing
            self.reentrant = True
        return LayerSource(
            {
                adapter: (self.x_source((layer, adapter)), None) if self.reentrant else (None, S)
                for adapter, S in self.S.get(layer, {}).items()
            }
        )

    def x_source(self, slot: tuple[str, str]) -> Tensor:
        """The state x_S (B, m, d) of a (layer, adapter), for a layer that makes its own S."""
        return self.kept[self.where[slot]]

    @property
    def expected(self) -> set[str]:
        """The layers that must be reached."""
        return set(self.S)


@dataclass(frozen=True)
class LayerSource:
    """What one layer is handed: adapter -> (x_source, source_bottleneck), one of the two."""

    by_adapter: dict[str, tuple[Tensor | None, Tensor | None]]

    def of(self, adapter: str) -> tuple[Tensor | None, Tensor | None]:
        """(x_source, source_bottleneck) for an adapter of this layer; neither where it does not fuse."""
        return self.by_adapter.get(adapter, (None, None))


def run_source_pass(
    reader: Reader, prepare: Preparation, groups: list[Group], weights: list[nn.Parameter]
) -> SourceCarrier:
    """Run the node and sort its outputs by layer and adapter."""
    keep = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    kept: dict[StateKey, Tensor] = {}
    outputs = SourcePass.apply(reader, prepare, groups, kept, keep, *weights)
    S: dict[str, dict[str, Tensor]] = {}
    where: dict[tuple[str, str], StateKey] = {}
    for group, output in zip(groups, outputs, strict=True):
        parts = output.split(list(group.ranks), dim=-1) if len(group.ranks) > 1 else (output,)
        for layer, part in zip(group.layers, parts, strict=True):
            S.setdefault(layer, {})[group.adapter] = part
            where[layer, group.adapter] = group.key
    return SourceCarrier(S, where, kept, graded=keep)
