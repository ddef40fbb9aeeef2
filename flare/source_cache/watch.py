"""Whether a base model is still the one that was fingerprinted: one flat comparison before every source pass.

The comparison runs in C over lists made once: identity of everything on the way to a weight, then each weight's
address, version and ``requires_grad``. Any difference has the modules walked again, which finds out what it means.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import without_torch_function
from .checksum import checksum
from .fingerprint import config_digest
from .weights import FrozenWeights

_trained = attrgetter("requires_grad")
_version = attrgetter("_version")
_merged = attrgetter("merged_adapters")


class Watch:
    """A frozen base model as it is now.

    It sees in-place changes, other tensors and modules, moves, merged adapters and changes of the config and of the
    modules' plain attributes. It does not see a write through ``.data``.

    Attributes:
        stamp: equal for two watches where the weights and the config are the same objects, unchanged in between.
        traits: what the modules' code reads beside weights and config, by name: plain attributes, and the bytes of
            buffers that are not saved. Equal for copies of a model in one process.

    Raises:
        ValueError: see FrozenWeights.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = FrozenWeights(model)
        self._model_config: Any = getattr(model, "config", None)
        self._holders = [holder for holder, _ in weights.places]
        self._keys = [key for _, key in weights.places]
        self._values = [holder.get(key) for holder, key in weights.places]
        self._dictionaries, self._sizes = weights.dictionaries, sum(map(len, weights.dictionaries))
        self._wrappers = weights.wrappers
        tensors = (*weights.tensors, *weights.derived)
        self._tensors = list({id(tensor): tensor for _, tensor in tensors}.values())
        self._trait_holders = [holder for _, holder, _ in weights.traits]
        self._trait_keys = [key for _, _, key in weights.traits]
        self._trait_values = list(map(dict.get, self._trait_holders, self._trait_keys))
        self.traits: dict[str, Any] = {name: holder[key] for name, holder, key in weights.traits}
        self.traits |= {
            name: (buffer.dtype, checksum(buffer)) for name, buffer in weights.derived if not buffer.is_meta
        }
        self._with_version = [tensor for tensor in self._tensors if not torch.is_inference(tensor)]
        with without_torch_function():
            self._with_address = [tensor for tensor in self._tensors if _has_address(tensor)]
            self._addresses = list(map(Tensor.data_ptr, self._with_address))
            self._versions = list(map(_version, self._with_version))
        self._note_config()
        names = [(name, id(tensor)) for name, tensor in weights.tensors]
        self.stamp = (names, self._addresses, self._versions, self._config, self.traits)

    def _note_config(self) -> None:
        self._config = config_digest(self._model_config)
        self._config_views = list(_views(self._model_config))
        self._config_values = list(chain.from_iterable(self._config_views))

    def is_unchanged(self) -> bool:
        """Return whether nothing has changed. Adds no Python call per module or weight."""
        with without_torch_function():
            return (
                all(map(is_, map(dict.get, self._holders, self._keys), self._values))
                and sum(map(len, self._dictionaries)) == self._sizes
                and list(map(Tensor.data_ptr, self._with_address)) == self._addresses
                and list(map(_version, self._with_version)) == self._versions
                and not any(map(_trained, self._tensors))
                and not any(map(_merged, self._wrappers))
                and list(map(dict.get, self._trait_holders, self._trait_keys)) == self._trait_values
                and self._config_is_unchanged()
            )

    def _config_is_unchanged(self) -> bool:
        values = list(chain.from_iterable(self._config_views))
        if len(values) == len(self._config_values) and all(map(is_, values, self._config_values)):
            return True
        if config_digest(self._model_config) != self._config:
            return False  # and nothing is noted, so that the next pass notices it as well
        self._note_config()  # what changed says nothing about hidden states, such as use_cache
        return True


def _views(value: Any) -> Any:
    """Live views of the keys and values of a config, of the configs in it, and of their dictionaries and lists."""
    if isinstance(value, list):
        yield value
        for one in value:
            yield from _views(one)
    elif isinstance(value, dict) or hasattr(value, "to_dict"):
        held = value if isinstance(value, dict) else vars(value)
        yield held.keys()
        yield held.values()
        for one in held.values():
            yield from _views(one)


def _has_address(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without storage of its own
        return False
    return True
