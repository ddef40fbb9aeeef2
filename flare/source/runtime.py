"""What the hooks of one transformers model share: its map, its adapters, and what these read of a source."""

from __future__ import annotations

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
from .source_pass import Group, Wanted, make_groups
from .states import StateKey

_RUNTIME = "_flare_runtime"


class Reading:
    """What the active adapters read of a source, worked out once until they change.

    wanted: every (state, adapter, layer). of_text, of_decoder: those of the source text, and of an encoder-decoder's
    decoder.
    """

    def __init__(self, layers: Sequence[FlareLayer], map: ModelMap, configs: dict[str, FlareConfig]) -> None:
        self.layers = list(layers)
        self.configs = configs
        if not torch.compiler.is_compiling():
            self.registrations = registrations.count
            self.switches, self.merged, self.offsets = self._state()
        self.wanted: list[Wanted] = []
        for layer in layers:
            if layer.disable_adapters or layer.merged:
                continue
            place = map.places[layer.flare_key]
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A and layer.flare_fusion.get(adapter) is not None:
                    key = StateKey(place.stack, place.block + configs[adapter].source_layer_offset)
                    self.wanted.append((key, adapter, layer))
        self.sites = {layer.flare_key: layer.__dict__[SITE].path for layer in layers}
        self.of_text = Reads([one for one in self.wanted if one[0].stack not in map.decoders], self.sites)
        self.of_decoder = Reads([one for one in self.wanted if one[0].stack in map.decoders], self.sites)
        self.of_both = Reads(self.wanted, self.sites)

    def _state(self) -> tuple[list[Any], list[int], list[int]]:
        return (
            [*map(SWITCHES, self.layers)],
            [*map(len, map(MERGED, self.layers))],
            [config.source_layer_offset for config in self.configs.values()],
        )

    def holds(self) -> bool:
        """Whether nothing has changed that this was worked out from."""
        return self.registrations == registrations.count and self._state() == (
            self.switches,
            self.merged,
            self.offsets,
        )


class Reads:
    """A part of what is wanted, ready for a source pass."""

    def __init__(self, wanted: list[Wanted], sites: dict[str, str]) -> None:
        self.wanted, self.sites = wanted, sites
        self.groups: list[Group] = make_groups(wanted, sites)
        self.by_key: dict[StateKey, list[Group]] = {}
        for group in self.groups:
            self.by_key.setdefault(group.key, []).append(group)
        self.keys = sorted(self.by_key)
        self.adapters = {group.adapter for group in self.groups}
        #: whether a fusion looks at all positions of the target
        self.mixes = any(layer.flare_fusion[adapter] in EAGER_FUSIONS for _, adapter, layer in wanted)
        self._A = [layer.lora_A[adapter] for _, adapter, layer in wanted]
        called = [*self._A, *(layer.lora_dropout[adapter] for _, adapter, layer in wanted)]
        self._hooks = [table for module in called for table in module_hooks(module)]
        self._attributes = [module.__dict__ for module in called]

    def __bool__(self) -> bool:
        return len(self.wanted) > 0  # Dynamo of torch 2.11 does not trace bool of a list

    def are_touched(self) -> bool:
        """Whether somebody hooks or patches a lora_A or lora_dropout, which must then be called."""
        for hooks in self._hooks:
            if hooks:
                return True
        for own in self._attributes:  # noqa: SIM110  (a generator is a call for each)
            if "forward" in own or "_hf_hook" in own:
                return True
        return False

    @property
    def device(self) -> torch.device:
        """Where the adapters compute: of weights that accelerate offloads, where they are put for a call."""
        return execution_device(self._A[0])

    def weights(self) -> list[Tensor]:
        """lora_A's weight (r, d) of every layer that reads."""
        return [A._parameters["weight"] if "weight" in A._parameters else A.weight for A in self._A]  # type: ignore[misc]  # noqa: SIM401


@dataclass
class Runtime:
    """What the hooks of one transformers model share. Attached to the model; copied and pickled with it.

    Nothing of a forward is kept here: two threads may call one model.
    """

    map: ModelMap
    configs: dict[str, FlareConfig]
    layers: list[FlareLayer] = field(default_factory=list)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    source_cache: Any = None  # a flare.SourceStateCache
    said: set[str] = field(default_factory=set)
    warned_padding: bool = False
    _reading: Reading | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reading": None}

    def reading(self) -> Reading:
        """What the active adapters read now; nothing where adapters are off or merged."""
        if torch.compiler.is_compiling():  # a graph guards on all that this is worked out from
            return Reading(self.layers, self.map, self.configs)
        reading = self._reading
        if reading is None or not reading.holds():
            reading = self._reading = Reading(self.layers, self.map, self.configs)
        return reading

    def wanted(self) -> list[Wanted]:
        """(state, adapter, layer) of every layer that fuses now."""
        return self.reading().wanted

    def setting(self, name: str, adapters: set[str]) -> Any:
        """Return a config field that adapters active together must share, as one source pass serves all of them."""
        values = {adapter: getattr(self.configs[adapter], name) for adapter in sorted(adapters)}
        if len(set(values.values())) > 1:
            raise ValueError(f"adapters active together must share {name}, they have {values}: activate one at a time")
        return next(iter(values.values()))

    def clear(self) -> None:
        """Forget what was worked out; called whenever adapters come or go."""
        self._reading = None


def runtime_of(model: nn.Module) -> Runtime | None:
    """Return the runtime attached to a transformers model."""
    return model.__dict__.get(_RUNTIME)


def graded(weights: Sequence[Tensor]) -> bool:
    """Whether a source pass over these A will be differentiated."""
    return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, weights))


_REQUIRES_GRAD = attrgetter("requires_grad")
