"""The source pass: run the frozen model on the source text, and pass its hidden states to the adapters.

A :data:`Reader` calls a function with each required state, in the order in which the model computes the states. States
that stay on the device go to the layers unprojected (:func:`context_from_states`). A layer then projects the states of
both texts in one kernel launch, and computes both texts' contributions to dA in one launch. All other states are
projected to S as soon as they are computed (flare.source.projected).

Shapes: B rows of a batch, m positions, hidden states of width d. A tensor (n, c) has one row for each of n positions
of the batch.
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

#: Called with every required state x_S (B, m, d), in the order in which the model computes them.
Visitor = Callable[[StateKey, Tensor], None]
#: Calls a visitor with source states, from a run of the frozen model or from given states.
Reader = Callable[[Visitor], None]

#: A state, and the adapter and layer that read it.
StateUse = tuple[StateKey, str, FlareLayer]


# --- which layers use which state -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateGroup:
    """The layers of one site (flare.tuner.site) that read one state through one adapter.

    Their A are stacked, so one product gives their S, concatenated.

    Attributes:
        key: the state.
        adapter: name of the adapter.
        site: path of the site.
        layers: paths of the layers.
        modules: the layers, in the order of ``layers``.
        dropout: lora_dropout of the first layer; None if the adapter has no dropout.
    """

    key: StateKey
    adapter: str
    site: str
    layers: tuple[str, ...]
    modules: tuple[FlareLayer, ...]
    dropout: nn.Dropout | None

    @property
    def has_hooks(self) -> bool:
        """Whether the adapter's modules have hooks or a patched forward, as accelerate adds to offload weights."""
        return not all(layer.is_untouched_adapter(self.adapter) for layer in self.modules)

    def project(self, x: Tensor) -> Tensor:
        """Return S (n, sum of ranks) of x (n, d) by calling the adapter's modules, with their hooks."""
        return torch.cat([layer.project(self.adapter, x) for layer in self.modules], dim=-1)

    @property
    def dropout_p(self) -> float:
        """Probability of lora_dropout in the current mode; 0 in eval mode."""
        return self.dropout.p if self.dropout is not None and self.dropout.training else 0.0


def make_groups(uses: Iterable[StateUse], sites: Mapping[str, str]) -> list[StateGroup]:
    """Return the groups of (state, adapter, layer) triples in order of depth; ``sites``: layer's path -> its site."""
    members: dict[tuple[StateKey, str, str], list[FlareLayer]] = {}
    for key, adapter, layer in uses:
        members.setdefault((key, adapter, sites[layer.flare_key]), []).append(layer)
    groups = []
    for (key, adapter, site), layers in sorted(members.items(), key=lambda item: item[0]):
        dropout = layers[0].lora_dropout[adapter]
        paths = tuple(layer.flare_key for layer in layers)
        groups.append(
            StateGroup(key, adapter, site, paths, tuple(layers), dropout if isinstance(dropout, nn.Dropout) else None)
        )
    return groups


# --- switches of the frozen pass --------------------------------------------------------------------------------------
# FLARE layers read from the thread's slot whether a source pass is running, so several threads may call one model. The
# switches below change the modules themselves. If the model has dropout in train mode, or adapter layers of PEFT that
# are not FLARE layers, a target pass of another thread would therefore run with switched modules.

_LOCK = threading.Lock()
_SWITCHES = "_flare_switches"
#: Modules whose forward does not depend on ``training``. nn.Embedding's does with NEFTune, whose hook adds noise.
_SAME_IN_TRAINING = (nn.Linear, nn.LayerNorm, nn.ModuleList, nn.ModuleDict, nn.Identity)


class ModuleSwitches:
    """Modules whose adapters, train mode, LayerDrop or compiled call are switched off during a source pass.

    They are collected once for each model, and again after modules were added or replaced.

    Args:
        model: the part of the transformers model that runs.
        registered: number of submodule registrations in this process when the modules are collected.
    """

    def __init__(self, model: nn.Module, registered: int) -> None:
        self.model = model
        self.registrations = registered
        self.tuners: list[nn.Module] = []
        self.states: list[dict[str, Any]] = []
        self.lists: list[tuple[nn.ModuleList, int]] = []
        self.droppers: list[dict[str, Any]] = []
        self._passes = 0
        self._find(model)

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copy of the model collects its own modules

    def _find(self, module: nn.Module) -> None:
        pending, seen = [module], set()
        while pending:
            module = pending.pop()
            if module in seen:
                continue
            seen.add(module)
            if isinstance(module, FlareLayer):  # its adapter modules are not called in a source pass
                pending.append(module.base_layer)
            else:
                pending += [child for child in module._modules.values() if child is not None]
                if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                    self.tuners.append(module)
            if isinstance(module, nn.ModuleList):
                self.lists.append((module, len(module)))
            if "layerdrop" in module.__dict__:
                self.droppers.append(module.__dict__)
            # the flag of quantised linears is not changed, because some repack their weights in eval mode
            if (
                type(module) not in _SAME_IN_TRAINING
                and "training" in module.__dict__
                and not is_quantized_linear(module)
            ):
                self.states.append(module.__dict__)

    def is_current(self) -> bool:
        """Return whether the model still has the collected modules."""
        return self.registrations == registrations.count and all(len(blocks) == n for blocks, n in self.lists)

    @contextlib.contextmanager
    def off(self, *, dropout: bool) -> Iterator[None]:
        """Disable adapters, compiled calls, LayerDrop and (if ``dropout`` is False) train mode.

        If source passes of several threads overlap, the last one to end restores the modules.
        """
        if torch.compiler.is_compiling():  # tracing: no other thread runs this
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
        # a disabled layer of PEFT would unmerge its merged adapters
        tuners = [module for module in self.tuners if not getattr(module, "merged", False)]
        self._disabled = [(module, set_adapters_disabled(module, True)) for module in tuners]
        self._in_training = [] if dropout else [state for state in self.states if state["training"]]
        for state in self._in_training:
            state["training"] = False
        self._layerdrops = [(state, state["layerdrop"]) for state in self.droppers] if dropout else []
        for state, _ in self._layerdrops:
            state["layerdrop"] = 0.0
        # a compiled call does not check for a running source pass
        self._compiled = [(state, state.pop(COMPILED_CALL)) for state in self.states if COMPILED_CALL in state]

    def _switch_on(self) -> None:
        for module, before in self._disabled:
            set_adapters_disabled(module, before)
        for state in self._in_training:
            state["training"] = True
        for state, probability in self._layerdrops:
            state["layerdrop"] = probability
        for state, call in self._compiled:
            state[COMPILED_CALL] = call


def module_switches(model: nn.Module) -> ModuleSwitches:
    """Return the switches of a model, which are cached on the model."""
    if torch.compiler.is_compiling():
        return ModuleSwitches(model, 0)
    switches: ModuleSwitches | None = model.__dict__.get(_SWITCHES)
    if switches is None or not switches.is_current():
        switches = model.__dict__[_SWITCHES] = ModuleSwitches(model, registrations.count)
    return switches


# --- reading the states -----------------------------------------------------------------------------------------------


class _AllStatesRead(Exception):
    """Raised in the frozen pass after the last required state, because the remaining blocks need not run."""


class FrozenPass:
    """A run of the frozen model. The hooks of the blocks (flare.source.hooks) call :meth:`record` with each state."""

    def __init__(self, keys: Iterable[StateKey], visit: Visitor, to_the_end: bool) -> None:
        self.missing = dict.fromkeys(keys)
        self.visit, self.to_the_end = visit, to_the_end

    def record(self, key: StateKey, hidden: Tensor) -> None:
        """Visit a state (B, m, d) if it is required; end the pass after the last required state."""
        if key in self.missing:
            del self.missing[key]
            self.visit(key, hidden)
            if not self.missing and not self.to_the_end:
                raise _AllStatesRead


def read_from_model(model: nn.Module, inputs: dict[str, Any], keys: Iterable[StateKey], *, dropout: bool) -> Reader:
    """Return a reader that runs the frozen model without adapters, gradients and (if ``dropout`` is False) dropout.

    The pass stops after the last required state: no later block, final norm, pooler or head runs.

    Args:
        model: the transformers model (not the PeftModel), whose backbone runs.
        inputs: keyword arguments of the backbone.
        keys: the states to read.
        dropout: whether to keep the modules' training mode.
    """
    backbone: nn.Module = getattr(model, "base_model", model)  # type: ignore[assignment]
    # torch.export tracks entered modules, and an early end would leave them entered
    to_the_end = torch.compiler.is_exporting()
    return read_from_run(backbone, lambda: backbone(**inputs), keys, dropout=dropout, to_the_end=to_the_end)


def read_from_run(
    model: nn.Module,
    run: Callable[[], object],
    keys: Iterable[StateKey],
    *,
    dropout: bool,
    to_the_end: bool = False,
) -> Reader:
    """Return a reader that calls ``run`` to run the frozen model; see :func:`read_from_model`.

    Args:
        model: the part of the transformers model that runs.
        run: a function that runs this part.
        keys: the states to read.
        dropout: whether to keep the modules' training mode.
        to_the_end: whether to complete the run after the last required state.
    """

    def read(visit: Visitor) -> None:
        frozen_pass = FrozenPass(keys, visit, to_the_end)
        outer, THREAD.slot.frozen_pass = THREAD.slot.frozen_pass, frozen_pass
        try:
            with torch.no_grad(), module_switches(model).off(dropout=dropout):
                run()
        except _AllStatesRead:
            pass
        finally:
            THREAD.slot.frozen_pass = outer
        if frozen_pass.missing:
            missing = ", ".join(f"{key.stack} {key.position}" for key in frozen_pass.missing)
            raise RuntimeError(f"the source pass ended before {missing}: the model did not run all its blocks")

    return read


def read_from_states(states: SourceStates, keys: Iterable[StateKey]) -> Reader:
    """Return a reader of given states.

    Raises:
        ValueError: a required state is missing.
    """
    ordered = sorted(keys)
    missing = [key for key in ordered if key not in states.states]
    if missing:
        raise ValueError(
            f"source_states (offset {states.offset}) lacks {missing[0]}, which this model's adapters read: "
            "make them with encode_source of this model"
        )

    def read(visit: Visitor) -> None:
        for key in ordered:
            visit(key, states.states[key])

    return read


# --- padding and dtypes -----------------------------------------------------------------------------------------------


def zero_pads(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return hidden (B, m, d) with zeros where the mask (B, m) is zero."""
    return hidden.masked_fill(attention_mask.to(hidden.device).unsqueeze(-1) == 0, 0.0)


@dataclass(frozen=True)
class TokenPositions:
    """Positions of the tokens in a padded batch, so that padding is neither projected nor stored.

    Attributes:
        index: (n,), the tokens' indices among B * m positions.
        size: (B, m).
    """

    index: Tensor
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> TokenPositions:
        """Return the token positions of a mask (B, m)."""
        return cls(mask.flatten().nonzero().squeeze(-1), (int(mask.shape[0]), int(mask.shape[1])))

    def unpad_input(self, x: Tensor) -> Tensor:
        """Return the tokens' rows (n, c) of x (B, m', c). m' < m if the last columns, all padding, were cut off."""
        index = self.index
        if x.shape[1] != self.size[1]:
            index = index // self.size[1] * x.shape[1] + index % self.size[1]
        return x.flatten(0, 1).index_select(0, index.to(x.device))

    def pad_input(self, x: Tensor) -> Tensor:
        """Return the rows (n, c) as (B, m, c), zero at padding."""
        padded = x.new_zeros(self.size[0] * self.size[1], x.shape[1])
        return padded.index_copy_(0, self.index.to(x.device), x).view(*self.size, x.shape[1])


@dataclass
class Preparation:
    """Steps that a hidden state goes through before it is projected or stored.

    Attributes:
        dtype: autocast's dtype, or None without autocast.
        tokens: stack -> token positions, if source_padding="zero" and padding is removed. Empty if ``masks`` is used.
        masks: stack -> mask (B, m), if source_padding="zero" and padding is set to zero instead of being removed. This
            is done in two cases: the mask is on a GPU, where finding the tokens would wait for the GPU; or the layers
            project the states (B, m, d) themselves.
    """

    dtype: torch.dtype | None = None
    tokens: Mapping[str, TokenPositions] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, key: StateKey, hidden: Tensor) -> Tensor:
        """Return a state (B, m, d), detached, in the compute dtype, and zero at padding if there are masks."""
        if hidden.requires_grad:
            hidden = hidden.detach()
        if self.dtype is not None and hidden.dtype == torch.float32:
            hidden = hidden.to(self.dtype)
        mask = self.masks.get(key.stack) if self.masks else None
        return hidden if mask is None else zero_pads(hidden, mask[:, : hidden.shape[1]])

    def rows(self, key: StateKey, hidden: Tensor) -> Tensor:
        """Return a prepared state (B, m, d) as rows (n, d), without padding if the token positions are known."""
        return self.unpad_input(key, self(key, hidden))

    def pad_input(self, key: StateKey, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return rows (n, c) as (B, m, c), zero at removed padding; ``size``: (B, m), for rows that include padding."""
        tokens = self.tokens.get(key.stack)
        return x.view(*size, x.shape[-1]) if tokens is None else tokens.pad_input(x)

    def unpad_input(self, key: StateKey, x: Tensor) -> Tensor:
        """Return the rows (n, c) of x (B, m, c) at the positions that :meth:`rows` returns."""
        tokens = self.tokens.get(key.stack)
        return x.reshape(-1, x.shape[-1]) if tokens is None else tokens.unpad_input(x)

    @classmethod
    def under_autocast(cls, device: torch.device, masks: Mapping[str, Tensor] | None = None) -> Preparation:
        """Return the preparation for the current autocast state.

        Args:
            device: where the states are computed.
            masks: stack -> mask (B, m) with source_padding="zero"; None or empty with "keep".
        """
        enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if enabled else None
        if not masks:
            return cls(dtype)
        if any(mask.device.type != "cpu" for mask in masks.values()):
            return cls(dtype, masks=masks)
        # stacks that read the same text share a mask, whose token positions are found once
        by_mask = {id(mask): TokenPositions.of(mask) for mask in masks.values()}
        return cls(dtype, {stack: by_mask[id(mask)] for stack, mask in masks.items()})


# --- states on the device ---------------------------------------------------------------------------------------------


def context_from_states(
    states: Reader | Mapping[StateKey, Tensor],
    prepare: Preparation,
    readers: Mapping[StateKey, Sequence[StateGroup]],
) -> SourceContext:
    """Return a context of states that the layers project themselves.

    Args:
        states: a reader, or the states.
        prepare: prepares each state.
        readers: state -> the groups that read it.
    """
    context = SourceContext(with_grad=True)
    unchanged = prepare.dtype is None and not prepare.masks

    def visit(key: StateKey, hidden: Tensor) -> None:
        if not unchanged or hidden.requires_grad:
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
