"""State that the hooks of one transformers model share: its adapters, and the source states that the adapters use."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from flare_kernels.fusion import EAGER_FUSIONS

from .._compat import execution_device, module_hooks, registrations
from ..tuner.config import FlareConfig
from ..tuner.layer import MERGED, SITE, SWITCHES, FlareLayer
from ..tuner.routing import ModelMap
from .source_pass import StateGroup, StateUse, make_groups
from .states import StateKey

_RUNTIME = "_flare_runtime"


class ActiveUses:
    """Uses of source states by the active adapters, computed again when the adapters change.

    A use is a triple (state, adapter, layer): the layer fuses the state through the adapter.

    Attributes:
        uses: the uses of all layers that fuse.
        sites: path of each layer -> path of its site, the layers with the same input (flare.tuner.site).
        of_text: the uses of the source text's states.
        of_decoder: the uses of the states of an encoder-decoder's decoder.
        of_both: all uses.
    """

    def __init__(self, layers: Sequence[FlareLayer], map: ModelMap, configs: dict[str, FlareConfig]) -> None:
        self.layers = list(layers)
        self.configs = configs
        if not torch.compiler.is_compiling():
            self.registrations = registrations.count
            self.switches, self.merged, self.offsets = copy.deepcopy(self._state())
        self.uses: list[StateUse] = []
        for layer in layers:
            if layer.disable_adapters or layer.merged:
                continue
            place = map.places[layer.flare_key]
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A and layer.flare_fusion.get(adapter) is not None:
                    key = StateKey(place.stack, place.block + configs[adapter].source_layer_offset)
                    self.uses.append((key, adapter, layer))
        self.sites = {layer.flare_key: layer.__dict__[SITE].path for layer in layers}
        self.of_text = Reads([use for use in self.uses if use[0].stack not in map.decoders], self.sites)
        self.of_decoder = Reads([use for use in self.uses if use[0].stack in map.decoders], self.sites)
        self.of_both = Reads(self.uses, self.sites)

    def _state(self) -> tuple[list[Any], list[int], list[int]]:
        return (
            [*map(SWITCHES, self.layers)],
            [*map(len, map(MERGED, self.layers))],
            [config.source_layer_offset for config in self.configs.values()],
        )

    def is_current(self) -> bool:
        """Return whether modules, active adapters, merged adapters and source_layer_offset have not changed."""
        return self.registrations == registrations.count and self._state() == (
            self.switches,
            self.merged,
            self.offsets,
        )


class Reads:
    """Uses (state, adapter, layer) of the states of one source pass, grouped for the projection S = x_S A^T.

    Attributes:
        uses: the (state, adapter, layer) triples.
        groups: the uses, grouped by state, adapter and site, in order of depth.
        by_key: state -> the groups that use it.
        keys: the states, in order of depth.
        adapters: names of the adapters.
        mixes_positions: whether a fusion combines different positions (cross_attention, matmul).
    """

    def __init__(self, uses: list[StateUse], sites: dict[str, str]) -> None:
        self.uses, self.sites = uses, sites
        self.groups: list[StateGroup] = make_groups(uses, sites)
        self.by_key: dict[StateKey, list[StateGroup]] = {}
        for group in self.groups:
            self.by_key.setdefault(group.key, []).append(group)
        self.keys = sorted(self.by_key)
        self.adapters = {group.adapter for group in self.groups}
        self.mixes_positions = any(layer.flare_fusion[adapter] in EAGER_FUSIONS for _, adapter, layer in uses)
        self._A = [layer.lora_A[adapter] for _, adapter, layer in uses]
        modules = [*self._A, *(layer.lora_dropout[adapter] for _, adapter, layer in uses)]
        self._hooks = [table for module in modules for table in module_hooks(module)]
        self._attributes = [module.__dict__ for module in modules]

    def __bool__(self) -> bool:
        return len(self.uses) > 0  # Dynamo of torch 2.11 does not trace bool of a list

    def have_hooks(self) -> bool:
        """Return whether a lora_A or lora_dropout has hooks or a patched forward, so the module must be called."""
        for hooks in self._hooks:
            if hooks:
                return True
        for attributes in self._attributes:  # noqa: SIM110  (any() would add a call per module)
            if "forward" in attributes or "_hf_hook" in attributes:
                return True
        return False

    @property
    def device(self) -> torch.device:
        """Device on which the adapters compute; for weights that accelerate offloads, the device they are loaded to."""
        return execution_device(self._A[0])

    def weights(self) -> list[Tensor]:
        """Return the weight (r, d) of every lora_A that reads a state: rank r, hidden states of width d."""
        return [A._parameters["weight"] if "weight" in A._parameters else A.weight for A in self._A]  # type: ignore[misc]  # noqa: SIM401


@dataclass
class Runtime:
    """State that the hooks of one transformers model share. It is stored on the model, and copied and pickled with it.

    It holds no state of a forward pass, because two threads may call one model at the same time.

    Attributes:
        map: the model's blocks and projections (flare.tuner.routing).
        configs: adapter name -> config.
        layers: the adapter layers in which an adapter fuses.
        reasons: (path of a module, adapter name) -> why the adapter does not fuse in the module; "" if it fuses.
        handles: handles of the hooks.
        source_cache: a flare.SourceStateCache, or None.
        warned: messages of the warnings that were given, so that none is repeated.
        warned_padding: whether ``generate`` has warned about padding.
    """

    map: ModelMap
    configs: dict[str, FlareConfig]
    layers: list[FlareLayer] = field(default_factory=list)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    source_cache: Any = None
    warned: set[str] = field(default_factory=set)
    warned_padding: bool = False
    _active_uses: ActiveUses | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_active_uses": None}

    def active_uses(self) -> ActiveUses:
        """Return the current uses of source states; there are none if adapters are disabled or merged."""
        if torch.compiler.is_compiling():  # the graph guards on every value this depends on
            return ActiveUses(self.layers, self.map, self.configs)
        active = self._active_uses
        if active is None or not active.is_current():
            active = self._active_uses = ActiveUses(self.layers, self.map, self.configs)
        return active

    def state_uses(self) -> list[StateUse]:
        """Return (state, adapter, layer) of every layer that fuses now."""
        return self.active_uses().uses

    def setting(self, name: str, adapters: set[str]) -> Any:
        """Return the value of a config field that all active adapters must share, because they share one source pass.

        Raises:
            ValueError: the adapters have different values.
        """
        values = {adapter: getattr(self.configs[adapter], name) for adapter in sorted(adapters)}
        if len(set(values.values())) > 1:
            raise ValueError(f"adapters active together must share {name}, but have {values}: activate one at a time")
        return next(iter(values.values()))

    def warn_once(self, message: str) -> None:
        """Warn if this warning was not given before."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=3)

    def clear(self) -> None:
        """Drop the cached uses of source states. Called whenever adapters are added or removed."""
        self._active_uses = None


def runtime_of(model: nn.Module) -> Runtime | None:
    """Return the runtime attached to a transformers model, or None."""
    return model.__dict__.get(_RUNTIME)


def needs_grad(weights: Sequence[Tensor]) -> bool:
    """Return whether gradients are enabled and one of the lora_A weights that read the source requires them."""
    return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, weights))


_REQUIRES_GRAD = attrgetter("requires_grad")
