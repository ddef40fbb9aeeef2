"""The source pass: run the frozen model on the source text, and hand its hidden states to the adapters.

A pass of a :data:`Reader` visits the states that are wanted in the order in which the model makes them. States that are
kept on the device anyway go straight to the layers (:func:`keep_states`), which project both streams in one launch and
form both shares of dA in one; otherwise flare.source.projected turns each into S at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flare_kernels.dropout import draw_seed

from .._compat import (
    COMPILED_CALL,
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    is_quantized_linear,
    registrations,
    set_adapters_disabled,
)
from ..tuner.layer import FlareLayer
from .context import THREAD, SiteSource, SourceContext
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
    dropout: nn.Dropout | None

    @property
    def is_touched(self) -> bool:
        """Whether somebody hooks or patches the modules of the adapter, as accelerate does to offload weights."""
        return not all(layer.is_untouched_adapter(self.adapter) for layer in self.modules)

    def project(self, x: Tensor) -> Tensor:
        """Return S (n, sum of ranks) of x (n, d) by calling the adapters' modules, with their hooks."""
        return torch.cat([layer.project(self.adapter, x) for layer in self.modules], dim=-1)

    @property
    def dropout_p(self) -> float:
        """The probability of lora_dropout that acts now."""
        return self.dropout.p if self.dropout is not None and self.dropout.training else 0.0


def make_groups(wanted: Iterable[Wanted], sites: Mapping[str, str]) -> list[Group]:
    """Return the groups of (state, adapter, layer) triples in order of depth; ``sites``: layer -> its site."""
    members: dict[tuple[StateKey, str, str], list[FlareLayer]] = {}
    for key, adapter, layer in wanted:
        members.setdefault((key, adapter, sites[layer.flare_key]), []).append(layer)
    groups = []
    for (key, adapter, site), layers in sorted(members.items(), key=lambda item: item[0]):
        dropout = layers[0].lora_dropout[adapter]
        paths = tuple(layer.flare_key for layer in layers)
        groups.append(
            Group(key, adapter, site, paths, tuple(layers), dropout if isinstance(dropout, nn.Dropout) else None)
        )
    return groups


# --- what is off meanwhile --------------------------------------------------------------------------------------------
# Layers of ours know by the running thread's slot that a source pass runs, so several threads may call one model. What
# is switched here is state of the modules: in train mode with dropout, or next to PEFT layers that were declined,
# another thread's target pass would meet it.

_LOCK = threading.Lock()
_SWITCHES = "_flare_switches"
#: Modules whose forward does not look at ``training``.
_INDIFFERENT = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.Identity)


class Switches:
    """The modules of a model that are switched while it runs frozen; found once until modules come or go.

    Args:
        model: the part of the transformers model that runs.
        registered: how many submodules were registered in this process.
    """

    def __init__(self, model: nn.Module, registered: int) -> None:
        self.model = model
        self.registrations = registered
        self.tuners: list[nn.Module] = []
        self.states: list[dict[str, Any]] = []
        self.lists: list[tuple[nn.ModuleList, int]] = []
        self._passes = 0
        self._find(model)

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copy of the model finds its own

    def _find(self, module: nn.Module) -> None:
        waiting, seen = [module], set()
        while waiting:
            module = waiting.pop()
            if module in seen:
                continue
            seen.add(module)
            if isinstance(module, FlareLayer):  # its adapters are not called
                waiting.append(module.base_layer)
            else:
                waiting += [child for child in module._modules.values() if child is not None]
                if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                    self.tuners.append(module)
            if isinstance(module, nn.ModuleList):
                self.lists.append((module, len(module)))
            # some quantised linears repack their weights in eval mode
            if type(module) not in _INDIFFERENT and "training" in module.__dict__ and not is_quantized_linear(module):
                self.states.append(module.__dict__)

    def hold(self) -> bool:
        """Whether the model still has the modules that were found."""
        return self.registrations == registrations.count and all(len(blocks) == n for blocks, n in self.lists)

    @contextlib.contextmanager
    def off(self, *, dropout: bool) -> Iterator[None]:
        """Switch adapters, compiled calls and (unless ``dropout``) train mode off; the last pass that ends restores."""
        if torch.compiler.is_compiling():  # within a graph, which no other thread sees
            self._switch_off(dropout)
            try:
                yield
            finally:
                self._switch_on()
            return
        with _LOCK:
            if not self._passes:
                self._switch_off(dropout)
            self._passes += 1
        try:
            yield
        finally:
            with _LOCK:
                self._passes -= 1
                if not self._passes:
                    self._switch_on()

    def _switch_off(self, dropout: bool) -> None:
        self._disabled = [(module, set_adapters_disabled(module, True)) for module in self.tuners]
        self._in_training = [] if dropout else [state for state in self.states if state["training"]]
        for state in self._in_training:
            state["training"] = False
        # a compiled call does not look for a pass that its hooks serve
        self._compiled = [(state, state.pop(COMPILED_CALL)) for state in self.states if COMPILED_CALL in state]

    def _switch_on(self) -> None:
        for module, before in self._disabled:
            set_adapters_disabled(module, before)
        for state in self._in_training:
            state["training"] = True
        for state, call in self._compiled:
            state[COMPILED_CALL] = call


def switches_of(model: nn.Module) -> Switches:
    """Return what is off while a model runs frozen; it is kept with the model."""
    if torch.compiler.is_compiling():
        return Switches(model, 0)
    known: Switches | None = model.__dict__.get(_SWITCHES)
    if known is None or not known.hold():
        known = model.__dict__[_SWITCHES] = Switches(model, registrations.count)
    return known


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
    # torch.export keeps count of the modules that run, which an early end would leave open
    to_the_end = torch.compiler.is_exporting()
    return read_from_run(backbone, lambda: backbone(**inputs), wanted, dropout=dropout, to_the_end=to_the_end)


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
            f"source_states (offset {states.offset}) lacks {lacking[0]}, which this model's adapters read: "
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
        on = device.type != "meta" and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if on else None
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
                if group.dropout is not None and group.dropout.training and group.dropout.p > 0.0:
                    source.seed = draw_seed(hidden.device)

    if isinstance(states, Mapping):
        for key, state in states.items():
            visit(key, state)
    else:
        states(visit)
    return context
