"""What is off while the frozen model reads the source: dropout, adapters that are not ours, compiled calls.

Layers of ours know by the running thread's slot that a source pass runs (flare.source.context), so two threads may call
one model. What is switched here is state of the modules: in train mode with dropout, or next to PEFT layers that were
declined, another thread's target pass would meet it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._compat import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    is_bnb_linear,
    registrations,
    set_adapters_disabled,
)
from ..tuner.layer import FlareLayer

_LOCK = threading.Lock()
_COMPILED = "_compiled_call_impl"
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
            # bitsandbytes linears repack their weights in eval mode
            if type(module) not in _INDIFFERENT and "training" in module.__dict__ and not is_bnb_linear(module):
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
        self._compiled = [(state, state.pop(_COMPILED)) for state in self.states if _COMPILED in state]

    def _switch_on(self) -> None:
        for module, before in self._disabled:
            set_adapters_disabled(module, before)
        for state in self._in_training:
            state["training"] = True
        for state, call in self._compiled:
            state[_COMPILED] = call


def switches_of(model: nn.Module) -> Switches:
    """Return what is off while a model runs frozen; it is kept with the model."""
    if torch.compiler.is_compiling():
        return Switches(model, 0)
    known: Switches | None = model.__dict__.get(_SWITCHES)
    if known is None or not known.hold():
        known = model.__dict__[_SWITCHES] = Switches(model, registrations.count)
    return known
