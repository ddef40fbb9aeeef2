"""The source pass as one autograd node: run the frozen model on the source text, keep only what the adapters need.

    SourcePass.apply(reader, groups, A_1 ... A_n)  ->  S_1 ... S_k        S_j (B, m, sum of the ranks of group j)

    forward    the reader hands over the source's hidden states block by block; each becomes S = x_S A^T at once, while
               it is still in cache
    backward   receives all dS and forms dA = dS^T x_S from the states, as the node's memory (flare.source.memory)
               brings them again: kept, copied back from the host, or computed a second time

The target pass then fuses S with its own T and sees only the rank-r bottleneck. Both streams' shares of dA meet in
autograd, so data-parallel hooks fire once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flare_kernels import dropout as kernel_dropout
from flare_kernels.node import Masks, rows, without_autocast
from flare_kernels.selection import primitives

from .._compat import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    compiled_calls_off,
    every_module,
    is_bnb_linear,
    set_adapters_disabled,
)
from ..tuner.layer import FlareLayer, weight_of
from .fsdp import gathered
from .memory import Keep, StateMemory
from .states import SourceStates, StateKey

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
                stack.callback(listen(model, key, note).remove)
            modules = every_module(model)
            stack.enter_context(torch.no_grad())
            stack.enter_context(adapters_off(modules))
            stack.enter_context(compiled_calls_off(modules))
            if not dropout:
                stack.enter_context(training_off(modules))
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


def listen(model: nn.Module, key: StateKey, note: Visitor) -> Any:
    """Hook the place a key names: the first block's input, or the output of the block before. Returns the handle."""
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
def adapters_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every adapter, and every trained copy of a module, off; unlike PEFT's disable_adapter, requires_grad is left."""
    # an abstract class is slow to tell what its instances are: each class is asked once
    ours = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    classes = {cls for cls in set(map(type, modules)) if issubclass(cls, ours)}
    switched = [(module, set_adapters_disabled(module, True)) for module in modules if type(module) in classes]
    try:
        yield
    finally:
        for module, before in switched:
            set_adapters_disabled(module, before)


@contextlib.contextmanager
def training_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """``training = False``, without eval()'s recursion; only flags that were set are set again.

    Not on bitsandbytes linears, which repack their weights in eval mode.
    """
    switched = [module for module in modules if module.training and not is_bnb_linear(module)]
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


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded text stand: rows of pads are neither projected nor kept.

    index: (n,) of the tokens among B * m positions. size: (B, m).
    """

    index: Tensor
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """The packing of a mask (B, m)."""
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
    """What a hidden state goes through before it is projected or kept: rows (n, d) of the compute dtype."""

    packings: Mapping[str, Packing] = field(default_factory=dict)  # by stack, where source_padding="zero"
    dtype: torch.dtype | None = None  # autocast's, where autocast is on

    def __call__(self, hidden: Tensor) -> Tensor:
        """A state (B, m, d), detached, in the compute dtype."""
        hidden = hidden.detach()
        if self.dtype is not None and hidden.dtype == torch.float32:
            hidden = hidden.to(self.dtype)
        return hidden

    def rows(self, key: StateKey, hidden: Tensor) -> Tensor:
        """The rows (n, d) of a state (B, m, d) that are read."""
        packing = self.packings.get(key.stack)
        return rows(self(hidden)) if packing is None else packing.pack(self(hidden))

    def spread(self, key: StateKey, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """(n, c) as (B, m, c), where ``size`` is that of a state without packing."""
        packing = self.packings.get(key.stack)
        return x.view(*size, x.shape[-1]) if packing is None else packing.unpack(x)

    def gather(self, key: StateKey, x: Tensor) -> Tensor:
        """(B, m, c) as (n, c): the rows that :meth:`rows` reads."""
        packing = self.packings.get(key.stack)
        return rows(x) if packing is None else packing.pack(x)

    @classmethod
    def under_autocast(cls, device: torch.device, masks: Mapping[str, Tensor] | None = None) -> Preparation:
        """The preparation for the autocast state that is in force now; masks: stack -> (B, m), for "zero"."""
        on = torch.is_autocast_enabled(device.type)
        made: dict[int, Packing] = {}
        for mask in (masks or {}).values():  # stacks that read one text share its mask
            if id(mask) not in made:
                made[id(mask)] = Packing.of(mask)
        packings = {stack: made[id(mask)] for stack, mask in (masks or {}).items()}
        return cls(packings, torch.get_autocast_dtype(device.type) if on else None)


class SourcePass(torch.autograd.Function):
    """S of every group, and in backward the source's share of every dA. Shapes in the module's docstring.

    ``memory`` (None where no A asks for a gradient) takes the states' rows and brings them again in backward.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        reader: Reader,
        prepare: Preparation,
        groups: list[Group],
        memory: StateMemory | None,
        sizes: dict[str, tuple[int, ...]],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        by_key = _by_key(groups)
        S: list[Tensor | None] = [None] * len(groups)
        seeds: list[Tensor | None] = [None] * len(groups)

        def visit(key: StateKey, hidden: Tensor) -> None:
            sizes[key.stack] = tuple(hidden.shape[:-1])
            x = prepare.rows(key, hidden)
            if memory is not None:
                memory.put(key, x)
            for index in by_key[key]:
                group = groups[index]
                stacked = _stack(group, weights, x.dtype)
                if group.dropout_p > 0.0:
                    seeds[index] = kernel_dropout.draw_seed(x.device)
                masks = Masks(seeds[index], group.dropout_p, _ops(x).keep_bits)
                with without_autocast(x.device):
                    _, projected = _ops(x).shrink(
                        None,
                        x,
                        stacked,
                        compute_dtype=x.dtype,
                        mask_source=masks.bits(x.shape, kernel_dropout.SOURCE_STREAM),
                        keep_scale=masks.scale,
                    )
                S[index] = prepare.spread(key, projected, sizes[key.stack])

        reader(visit)
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.prepare = groups, prepare
        ctx.replay = None if memory is None else memory.replayer()
        ctx.weight_dtypes = [weight.dtype for weight in weights]
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
        by_key = _by_key(groups)
        needs = ctx.needs_input_grad[5:]
        dA: list[Tensor | None] = [None] * len(needs)
        wanted = [
            grad is not None and any(needs[group.first : group.first + len(group.ranks)])
            for group, grad in zip(groups, grads, strict=True)
        ]

        def visit(key: StateKey, x: Tensor) -> None:
            for index in by_key.get(key, ()):
                group, dS = groups[index], grads[index]
                if not wanted[index] or dS is None:
                    continue
                masks = Masks(seeds[index], group.dropout_p, _ops(x).keep_bits)
                exact = torch.float64 if x.dtype == torch.float64 else torch.float32
                with without_autocast(x.device):
                    stacked = _ops(x).grad_weight(
                        None,
                        None,
                        ctx.prepare.gather(key, dS),
                        x,
                        mask_source=masks.bits(x.shape, kernel_dropout.SOURCE_STREAM),
                        keep_scale=masks.scale,
                        grad_dtype=exact,
                    )
                own = range(group.first, group.first + len(group.ranks))
                for at, part in zip(own, stacked.split(list(group.ranks)), strict=True):
                    if needs[at]:
                        dA[at] = part.to(ctx.weight_dtypes[at])

        if any(wanted):
            ctx.replay(states, visit)
        return (None, None, None, None, None, *dA)


def _by_key(groups: list[Group]) -> dict[StateKey, list[int]]:
    """State -> the indices of the groups that read it."""
    found: dict[StateKey, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group.key, []).append(index)
    return found


def _stack(group: Group, weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    own = [A.detach() for A in weights[group.first : group.first + len(group.ranks)]]
    return primitives("auto", own[0].device, dtype).stack(own, dtype)  # type: ignore[no-any-return]


def _ops(x: Tensor) -> Any:
    return primitives("auto", x.device, x.dtype)


# --- what travels to the layers ---------------------------------------------------------------------------------------


class SourceCarrier:
    """The source of one forward pass, on its way to the layers as a keyword argument of the blocks.

    It stays with the block's saved arguments, so a checkpoint's recompute finds the same S. No dataclass: FSDP2's mixed
    precision would hand each block a copy of one.

    S: layer -> adapter -> (B, m, r).
    where: (layer, adapter) -> the state that it reads; kept: these states.
    graded: whether gradients were on where the source pass ran.
    """

    def __init__(
        self,
        S: dict[str, dict[str, Tensor]],
        where: dict[tuple[str, str], StateKey],
        kept: Mapping[StateKey, Tensor],
        graded: bool,
    ) -> None:
        self.S, self.where, self.kept, self.graded = S, where, kept, graded
        self.reentrant = False
        # An object for each layer, only written to in a block: torch.compile would guard on the contents of a set.
        self.arrivals = {layer: Arrival() for layer in S}
        self.target_masks: dict[str, Tensor] = {}  # layer -> (B, m), where a fusion looks at it

    def for_layer(self, layer: str) -> LayerSource:
        """What one layer is handed; notes that the source has reached it."""
        if layer in self.arrivals:
            self.arrivals[layer].seen = True
        if self.graded and not torch.is_grad_enabled():
            # blocks that run without a graph where the model ran with one: reentrant checkpointing
            self.reentrant = True
            self.check_reentrant()
        return LayerSource(
            {
                adapter: (self.x_source((layer, adapter)), None) if self.reentrant else (None, S)
                for adapter, S in self.S.get(layer, {}).items()
            }
        )

    def check_reentrant(self) -> None:
        """Raises ValueError where the source cannot be trained under reentrant checkpointing."""

    def x_source(self, slot: tuple[str, str]) -> Tensor:
        """The state x_S (B, m, d) of a (layer, adapter), for a layer that makes its own S."""
        return self.kept[self.where[slot]]

    @property
    def missed(self) -> list[str]:
        """The layers that the source has not reached yet."""
        return sorted(layer for layer, arrival in self.arrivals.items() if not arrival.seen)


class Arrival:
    """Whether the source has reached one layer."""

    seen = False


@dataclass(frozen=True)
class LayerSource:
    """What one layer is handed: adapter -> (x_source, source_bottleneck), one of the two."""

    by_adapter: dict[str, tuple[Tensor | None, Tensor | None]]

    def of(self, adapter: str) -> tuple[Tensor | None, Tensor | None]:
        """(x_source, source_bottleneck) for an adapter of this layer; neither where it does not fuse."""
        return self.by_adapter.get(adapter, (None, None))


class KeptStates(Mapping[StateKey, Tensor]):
    """What a memory keeps as states (B, m, d), for layers that make their own S under reentrant checkpointing."""

    def __init__(self, memory: StateMemory | None, prepare: Preparation, sizes: dict[str, tuple[int, ...]]) -> None:
        self.memory, self.prepare, self.sizes = memory, prepare, sizes
        # one object per state as long as somebody holds it: query and value are computed together for one x_S
        self._whole: weakref.WeakValueDictionary[StateKey, Tensor] = weakref.WeakValueDictionary()

    def __getitem__(self, key: StateKey) -> Tensor:
        if not isinstance(self.memory, Keep):
            mode = "none" if self.memory is None else self.memory.name
            raise ValueError(
                "blocks run without a graph inside a forward with one (reentrant checkpointing), which needs the "
                f"source's states, and source_memory is {mode!r}: checkpoint with use_reentrant=False, or "
                "source_memory='keep'"
            )
        whole = self._whole.get(key)
        if whole is None:
            whole = self._whole[key] = self.prepare.spread(key, self.memory.states[key], self.sizes[key.stack])
        return whole

    def __iter__(self) -> Iterator[StateKey]:
        return iter(self.memory.states if isinstance(self.memory, Keep) else ())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def run_source_pass(
    reader: Reader,
    prepare: Preparation,
    groups: list[Group],
    weights: list[nn.Parameter],
    memory: StateMemory | None = None,
) -> SourceCarrier:
    """Run the node and sort its outputs by layer and adapter. memory: how states wait for backward (default: kept)."""
    graded = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    memory = (memory or Keep()) if graded else None
    sizes: dict[str, tuple[int, ...]] = {}
    outputs = SourcePass.apply(reader, prepare, groups, memory, sizes, *map(gathered, weights))
    S: dict[str, dict[str, Tensor]] = {}
    where: dict[tuple[str, str], StateKey] = {}
    for group, output in zip(groups, outputs, strict=True):
        parts = output.split(list(group.ranks), dim=-1) if len(group.ranks) > 1 else (output,)
        for layer, part in zip(group.layers, parts, strict=True):
            S.setdefault(layer, {})[group.adapter] = part
            where[layer, group.adapter] = group.key
    return SourceCarrier(S, where, KeptStates(memory, prepare, sizes), graded=graded)
